"""Compares this checkout with an earlier one, bit for bit: `python tests/helpers/pins.py BASE`, BASE a commit.

It compares flags with their types and defaults, state-dict keys of every preset, and tiny runs of each kind with their
experiments, all computed on this machine. Differences are printed; the exit code is 1 if there are any. Run it after a
refactoring. It is not part of the test suite, since bits differ between processors.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VQGAN = (
    "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --ndf 4 --disc_layers 1 "
    "--disc_start_step 3 --diff_aug --perceptual_net none --quantizer ema"
)
CODES = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --batch_size 4 --sample_steps 4 --resid_pdrop 0.1"
UNET = (
    "--channels 8 --channel_mults 1 2 --res_blocks 1 --attn_factors 2 --heads 1 --batch_size 4 --sample_steps 4 "
    "--dropout 0.1"
)
TRAINING = "--no_amp --train_steps 5 --steps_per_log 1 --steps_per_eval 5 --val_fraction 0.03"
EDM, FLOW = (f"--sampler ddpm --process {name} --prediction eps" for name in ("edm", "flow"))
TRAININGS = {  # in this order, since later runs build on earlier ones
    "vqgan": f"train_vqgan.py {VQGAN} {TRAINING} --steps_per_FD 5 --FD_samples 8 --ema_profiles 0.1 --cache_images",
    "absorbing": f"train_sampler.py {CODES} {TRAINING} --attention neighborhood --kernel_sizes 3 --position rope",
    "learned": f"train_sampler.py --log_dir learned {CODES} {TRAINING} --mask_schedule fixed --total_steps None",
    "autoregressive": f"train_sampler.py --sampler autoregressive {CODES} --sample_steps None {TRAINING}",
    "ddpm": f"train_sampler.py --sampler ddpm --img_size 8 --total_steps 20 {UNET} {TRAINING}",
    "latents": f"train_sampler.py --sampler ddpm --log_dir latents --ae_load_dir vqgan_digits {UNET} {TRAINING}",
    "edm": f"train_sampler.py {EDM} --log_dir edm --img_size 8 {UNET} {TRAINING}",
    "flow": f"train_sampler.py {FLOW} --log_dir flow --img_size 8 {UNET} {TRAINING}",
}
FEW = "--batch_size 4 --no_amp"
EXPERIMENTS = {
    **{
        f"samples of {name}": f"get_samples.py {flags} --n_samples 6 {FEW}"
        for name, flags in {
            "absorbing": "--save_process",
            "learned": "--load_dir learned --solver halton --sample_steps 6 --label 3",
            "autoregressive": "--sampler autoregressive",
            "ddpm": "--sampler ddpm --save_process",
            "latents": "--sampler ddpm --load_dir latents --solver heun",
            "edm": "--sampler ddpm --load_dir edm --solver dpmpp_2m",
            "flow": "--sampler ddpm --load_dir flow --solver unipc",
        }.items()
    },
    "FID": f"calc_FID.py --n_samples 30 --features digits {FEW}",
    "FID of ddpm": f"calc_FID.py --sampler ddpm --n_samples 30 --features pixels {FEW}",
    "PRDC": f"calc_PRDC.py --n_samples 30 --nearest_k 3 --features pixels {FEW}",
    "neighbours": f"calc_nearest_neighbours.py --n_samples 8 --candidates 10 --features pixels --rerank pixels {FEW}",
    "ELBO": f"calc_approximate_ELBO.py --n_images 8 --calls 4 --train_steps 2 --train_batch_size 4 {FEW}",
    "ELBO of ddpm": f"calc_approximate_ELBO.py --sampler ddpm --n_images 4 --calls 4 {FEW}",
    "ELBO of flow": f"calc_approximate_ELBO.py --sampler ddpm --load_dir flow --n_images 4 --calls 3 {FEW}",
    "inpaint": f"inpaint.py --n_images 4 --results 2 {FEW}",
    "inpaint by ddpm": f"inpaint.py --sampler ddpm --n_images 4 --results 2 --outpaint 2 0 2 2 {FEW}",
    "edit": f"edit.py --n_images 4 --label 1 2 {FEW}",
    "interpolate": f"interpolate.py --n_images 4 --points 3 {FEW}",
    "big samples": f"generate_big_samples.py --load_dir learned --shape 6 8 --n_samples 2 {FEW}",
    "reconstruct": "reconstruct.py --n_images 3 --size 40 --compare_whole --no_amp",
    "VQGAN FID": "calc_VQGAN_FID.py --n_images 20 --features pixels --batch_size 4 --no_amp",
    "solvers": f"compare_samplers.py --n_samples 8 --steps 2 4 --features pixels {FEW}",
    "solvers of ddpm": f"compare_samplers.py --sampler ddpm --n_samples 8 --steps 3 --features pixels {FEW}",
    "digits": "check_digits.py --no_amp",
}
RENAMED = {  # weights that have been renamed
    f"{prefix}label.weight": f"{prefix}encoders.label.embedding.weight" for prefix in ("", "network.", "0.1/network.")
}
TIMES = (
    "seconds",
    "per_second",
    "perf/",
    "wall",
    "times as fast",
)  # in the names of values that differ from run to run


class Stopped(BaseException):
    """Stops a script once its config is known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="commit or folder of the earlier checkout")
    parser.add_argument(
        "--collect", nargs=2, metavar=("ROOT", "FILE"), help="internal: collect the facts of one checkout"
    )
    args = parser.parse_args()
    if args.collect:
        collect(Path(args.collect[0]), Path(args.collect[1]))
        return
    if args.base is None:
        parser.error("wanted BASE, a commit or a folder")
    with tempfile.TemporaryDirectory(prefix="pins_") as scratch, checkout_of(args.base, Path(scratch)) as base:
        facts = [facts_of(root, Path(scratch) / f"{name}.json") for name, root in (("then", base), ("now", ROOT))]
    names = sorted(facts[0].keys() | facts[1].keys())
    differing = [name for name in names if not agree(*(each.get(name) for each in facts))]
    for name in differing:
        then, now = (json.dumps(each)[:300] for each in differing_parts(*(each.get(name) for each in facts)))
        print(f"{name}\n  then {then}\n  now  {now}")
    print(f"{len(facts[0])} facts then, {len(facts[1])} now, {len(differing)} differ")
    sys.exit(bool(differing))


def agree(then: Any, now: Any) -> bool:
    """Whether two facts are equal. Settings are compared where both have them; flags are compared separately."""
    if isinstance(then, dict) and isinstance(now, dict) and "settings" in then.keys() & now.keys():
        common = then["settings"].keys() & now["settings"].keys()
        same = all(then["settings"][key] == now["settings"][key] for key in common)
        return same and all(then.get(key) == now.get(key) for key in (then.keys() | now.keys()) - {"settings"})
    return then == now


def differing_parts(then: Any, now: Any) -> tuple[Any, Any]:
    """The differing parts of two dicts; other facts unchanged."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return then, now
    differing = [key for key in then.keys() & now.keys() if not agree(then[key], now[key])]
    parts = [differing_parts(then[key], now[key]) for key in differing]
    return {key: part[0] for key, part in zip(differing, parts, strict=True)}, dict(
        zip(differing, (p[1] for p in parts), strict=True)
    )


@contextlib.contextmanager
def checkout_of(base: str, scratch: Path) -> Iterator[Path]:
    """Checks out the earlier commit in a temporary folder."""
    if Path(base).is_dir():
        yield Path(base).resolve()
        return
    checkout = scratch / "checkout"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(checkout), base], cwd=ROOT, check=True)
    try:
        yield checkout
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)


def facts_of(root: Path, file: Path) -> dict[str, Any]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, __file__, "--collect", str(root), str(file)]
    print(f"collecting in {root}", file=sys.stderr, flush=True)
    subprocess.run(command, cwd=root, env=variables, check=True)
    return json.loads(file.read_text())


def collect(root: Path, file: Path) -> None:
    """Writes all facts of one checkout, by name, in a process that imports that checkout."""
    logs = Path(tempfile.mkdtemp(prefix="pins_logs_"))
    facts = flags(root) | preset_keys(root) | runs(root, logs)
    file.write_text(json.dumps(facts))


def call(root: Path, command: str) -> str:
    """Runs a command in this process; returns its output. RuntimeError for a nonzero exit code."""
    script, *words = command.split()
    argv, path, out = sys.argv, list(sys.path), io.StringIO()
    sys.argv = [str(root / script), *words]
    sys.path.insert(0, str((root / script).parent))  # as Python does
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise RuntimeError(f"{command} ended with {stop.code}:\n{out.getvalue()}") from stop
    finally:
        sys.argv, sys.path[:] = argv, path
    return out.getvalue()


@contextlib.contextmanager
def record_tyro(on_parse: Callable[[type, str | None, Any], None]) -> Iterator[None]:
    """Passes the class, program and result of every tyro parse to `on_parse`."""
    import tyro

    parse = tyro.cli

    def record(cls: type, **kwargs: Any) -> Any:
        result = parse(cls, **kwargs)
        on_parse(cls, kwargs.get("prog"), result)
        return result

    tyro.cli = record
    try:
        yield
    finally:
        tyro.cli = parse


def config_of(root: Path, command: str) -> Any:
    """The config that a script would pass to main."""
    configs = []

    def stop_at_main(cls: type, prog: str | None, config: Any) -> None:
        if prog is not None:  # the last parse: files first, then the command line
            configs.append(config)
            raise Stopped

    with record_tyro(stop_at_main), contextlib.suppress(Stopped):
        call(root, command)
    return configs[0]


def flags(root: Path) -> dict[str, Any]:
    """All flags of all scripts, with types, choices and defaults."""
    scripts = [p for p in sorted(root.glob("*.py")) + sorted(root.glob("experiments/*.py")) if is_script(p)]
    commands = {str(p.relative_to(root)): str(p.relative_to(root)) for p in scripts}
    samplers = [p.stem for p in sorted((root / "train" / "samplers").glob("[a-z]*.py"))]
    readers = [p.stem for p in sorted((root / "train" / "datasets").glob("[a-z]*")) if p.suffix in ("", ".py")]
    commands |= {f"train_sampler.py {name}": f"train_sampler.py --sampler {name}" for name in samplers}
    commands |= {f"calc_FID {name}": f"experiments/calc_FID.py --sampler {name}" for name in samplers}
    commands |= {f"train_vqgan.py {name}": f"train_vqgan.py --dataset {name}" for name in readers}
    commands["benchmark vqgan"] = "experiments/benchmark.py --stage vqgan"
    facts = {}
    for name, command in commands.items():
        for group in dataclasses.fields(config := config_of(root, command)):
            for flag, kind, value in flags_in(getattr(config, group.name)):
                description = [str(each).replace(str(root), "<root>") for each in (kind, value)]
                facts[f"flag of {name}: {group.name}.{flag}"] = description
    return facts


def flags_in(group: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and value of every field of a group, and of groups in it."""
    kinds = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_in(value)
        else:
            yield field.name, kinds[field.name], value


def is_script(path: Path) -> bool:
    return "__main__" in path.read_text() and path.name not in ("conftest.py",)


def preset_keys(root: Path) -> dict[str, Any]:
    """Names and shapes in the state_dicts of each preset's networks, in order."""
    import torch

    vqgan = importlib.import_module("vq.autoencoder").VQGAN
    facts = {}
    for path in sorted((root / "configs").glob("*.yaml")):
        text = path.read_text()
        if "vqgan:" in text:
            config = config_of(root, f"train_vqgan.py --config {path}")
            with torch.device("meta"):
                network = vqgan(config.network, config.data.size, config.data.n_channels)
            facts[f"keys of {path.name}, vqgan"] = keys_of(network)
        for name in ("absorbing", "autoregressive", "ddpm"):
            if f"\n{name}:" not in text:
                continue
            config = config_of(root, f"train_sampler.py --sampler {name} --config {path}")
            build = importlib.import_module(f"train.samplers.{name}").build
            if name == "ddpm":  # its process needs values: not on "meta"
                network = build(
                    config.sampler, n_classes=10, shape=(config.data.n_channels, 32, 32), pixels=True
                ).network
            else:
                with torch.device("meta"):
                    network = build(config.sampler, n_classes=10, codes=64, grid=(16, 16)).network
            facts[f"keys of {path.name}, {name}"] = keys_of(network)
    return facts


def keys_of(network: Any) -> list[str]:
    return [f"{RENAMED.get(name, name)} {tuple(value.shape)}" for name, value in network.state_dict().items()]


def runs(root: Path, logs: Path) -> dict[str, Any]:
    """Tiny runs and experiments on them: their output and the content of their files."""
    facts = {}
    for command in TRAININGS.values():
        call(root, f"{command} --logs_root {logs}")
    longer = {name: command.replace("--train_steps 5", "--train_steps 7") for name, command in TRAININGS.items()}
    for name in ("absorbing", "ddpm"):
        call(root, f"{longer[name]} --logs_root {logs} --steps_per_checkpoint 1")
    for name, command in EXPERIMENTS.items():
        print(name, file=sys.stderr, flush=True)
        script, _, flags = command.partition(" ")
        folder = "" if script == "check_digits.py" else f"--log_dir {name.replace(' ', '_')}"
        if script == "check_digits.py":
            folder = f"--samples {logs / 'samples_of_absorbing' / 'samples.npz'}"
        output = call(root, f"experiments/{script} {flags} --logs_root {logs} {folder}")
        if not script.startswith("compare"):  # their tables have columns of seconds
            facts[f"printed: {name}"] = plain_lines(output, logs)
    for path in sorted(p for p in logs.rglob("*") if p.is_file() and ".cache" not in p.parts):
        content = content_of(path, logs)
        if content is not None:
            facts[f"file: {stable_name(path, logs)}"] = content
    return facts


def stable_name(path: Path, logs: Path) -> str:
    """File names of cached codes without their key."""
    name = str(path.relative_to(logs))
    return f"{name.rpartition('_')[0]}.codes" if path.suffix == ".codes" else name


def plain_lines(text: str, logs: Path) -> list[str]:
    """The printed lines, without progress bars, warnings and times."""
    lines = [line.replace(str(logs), "<logs>") for line in text.replace("\r", "\n").splitlines()]
    skipped = ("/s]", "step/s", "s/img]", "?img", "?row", "img]", "Warning", "warn(", "time:", "100%: ", *TIMES)
    return [line for line in lines if not any(each in line for each in skipped)]


def content_of(path: Path, logs: Path) -> Any:
    """The content of a file, without times; None for files that differ from run to run."""
    if path.name.startswith("events.") or path.suffix in (".note", ".lock") or path.name == "manifest.json":
        return None
    if path.name == "compare_samplers.png":  # shows seconds
        return None
    if path.suffix in (".json", ".yaml", ".jsonl"):
        return plain_content(path, logs)
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in sorted(archive.namelist())}
    if path.suffix == ".pt":
        import torch

        return leaves(torch.load(path, weights_only=True))
    if path.suffix == ".safetensors":  # the order of its header varies
        from safetensors.torch import load_file

        return leaves(load_file(path))
    data = path.read_bytes()
    if path.suffix == ".png":  # may contain the name of its folder
        from PIL import Image

        data = Image.open(path).tobytes()
    return hashlib.sha256(data).hexdigest()


def plain_content(path: Path, logs: Path) -> Any:
    text = path.read_text().replace(str(logs), "<logs>")
    if path.suffix == ".yaml":
        import yaml

        return {"settings": flat(yaml.safe_load(text))}
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in text.splitlines()]
    content = without_times(json.loads(text))
    return content | {"settings": flat(content.pop("run", {}))} if isinstance(content, dict) else content


def flat(groups: dict[str, Any]) -> dict[str, Any]:
    """Settings by "<group>.<key>"."""
    settings = {}
    for name, group in groups.items():
        settings |= (
            {f"{name}.{key}": value for key, value in group.items()} if isinstance(group, dict) else {name: group}
        )
    return settings


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: without_times(v)
            for k, v in value.items()
            if not any(word in k for word in (*TIMES, "features_code", "features_version"))
        }
    return [without_times(each) for each in value] if isinstance(value, list) else value


def leaves(value: Any) -> Any:
    """Tensors as hashes of their content."""
    import torch

    if isinstance(value, dict):
        return {RENAMED.get(str(key), str(key)): leaves(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [leaves(each) for each in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(pickle.dumps(value.tolist())).hexdigest()]
    return value


if __name__ == "__main__":
    main()
