"""Generates command lines and config files for all scripts, from the scripts' own flags."""

import contextlib
import io
import json
import math
import random
import shutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import yaml
from fuzz.runner import call_script, run_script

from helpers.tiny_runs import DDPM, GAN, ROOT, SAMPLER, VQGAN
from train.cli import files as config_files
from train.cli import parse as cli
from train.cli.plugins import Flag, flags_of, make_default_config
from train.data import image_cache
from train.datasets import webdataset
from train.registry import plugin_names

TRAIN = "--train_steps 1 --no_amp --steps_per_log 1 --steps_per_eval 1 --steps_per_save_output 1 --val_fraction 0.01"
SAMPLE = "--batch_size 2 --no_amp --sample_steps 2"
COMMANDS = {  # by script: flags that make it quick, but for those of the sampler
    "train_vqgan.py": f"{TRAIN} {VQGAN} {GAN} --log_dir new",
    "train_sampler.py": TRAIN,
    "convert.py": "--weights missing.pt",
    "demo.py": "",
    "experiments/benchmark.py": f"{TRAIN} --repeats 1 --full_steps 1",
    "experiments/benchmark_attention.py": "--sizes 4 --kernel_size 3 --heads 1 --head_width 4 --repeats 1",
    "experiments/benchmark_unet.py": "--channels 8 --channel_mults 1 --res_blocks 1 --img_size 8 --repeats 1",
    "experiments/calc_FID.py": f"{SAMPLE} --features pixels --n_samples 60",
    "experiments/calc_PRDC.py": f"{SAMPLE} --features pixels --n_samples 60",
    "experiments/calc_VQGAN_FID.py": "--features pixels --no_amp",
    "experiments/calc_approximate_ELBO.py": "--n_images 2 --batch_size 2 --calls 2 --no_amp --train_steps 1",
    "experiments/calc_nearest_neighbours.py": f"{SAMPLE} --n_samples 2 --features pixels --rerank pixels",
    "experiments/check_captions.py": f"{SAMPLE} --n_samples 1",
    "experiments/check_classes.py": "--no_amp",
    "experiments/check_data.py": "--check_items 2 --sheet_items 1",
    "experiments/check_digits.py": "--no_amp",
    "experiments/check_experts.py": f"{SAMPLE} --n_images 2",
    "experiments/check_metadata.py": f"{SAMPLE} --n_samples 2",
    "experiments/check_numbers.py": f"{SAMPLE} --n_samples 2",
    "experiments/check_scenes.py": f"{SAMPLE} --n_samples 1",
    "experiments/compare_attention.py": "--features pixels",
    "experiments/compare_edits.py": f"{SAMPLE} --n_images 2 --classes 1",
    "experiments/compare_layouts.py": "--n_images 4",
    "experiments/compare_panoptic.py": "--n_images 4",
    "experiments/compare_quantizers.py": "--features pixels",
    "experiments/compare_samplers.py": f"{SAMPLE} --steps 2 --n_samples 4 --features pixels --log_dir new",
    "experiments/edit.py": f"{SAMPLE} --n_images 2 --label 1",
    "experiments/generate_big_samples.py": f"{SAMPLE} --n_samples 1 --shape 4 8",
    "experiments/get_samples.py": f"{SAMPLE} --n_samples 3",
    "experiments/inpaint.py": f"{SAMPLE} --n_images 2 --results 1",
    "experiments/interpolate.py": f"{SAMPLE} --n_images 2 --points 2",
    "experiments/invert.py": f"{SAMPLE} --n_images 2",
    "experiments/make_panoptic.py": "",
    "experiments/reconstruct.py": "--n_images 2 --no_amp",
}
COMPARISONS = {f"experiments/compare_{what}.py" for what in ("attention", "layouts", "panoptic", "quantizers")}
PARSED_ONLY = {"demo.py", *COMPARISONS}  # they take minutes
SAMPLERS = {"absorbing": SAMPLER, "autoregressive": SAMPLER.replace("--sample_steps 4", ""), "ddpm": DDPM}
LEFT_OUT = {  # minutes; the user's code; where files are written
    *("compile", "measure", "hooks", "adapt", "logs_root", "shard_cache", "out"),
}
LONG = (  # flags of which a large value is a long run rather than a mistake
    "train_steps n_samples n_images sample_steps total_steps repeats full_steps kid_subsets seeds steps sizes calls "
    "num_workers prefetch results points shape outpaint batch_size accumulate decoder_draws"
).split()
NUMBERS = ["-1", "0", "1", "2", "3", "17", "0.5", "1.0", "-0.0", "1e-400", "nan", "inf", "-inf"]
LARGE = ["1e12", "1000000000000", "1e400", "9" * 30, "65536", "1e300"]
ODD = [
    *("", "~", "null", "None", "'None'", "yes", "off", "true", "False", "'16'", "1 2 2", "- a", "a: b", "\t1"),
    *("1e6", "1.5e1", "2.5", "010", "0x10", "1_000", "1:30", "2024-01-01", "2024-13-45"),
    *(".nan", ".inf", "1e999999999", "9" * 5000, "sNaN", "[]", "[1, 2]", "[1, 2", "[[1], [2]]", "[-1, --help]"),
    *("[a, --lr, 3]", "[null]", "[.nan]", "[-]", "{}", "{a: 1}", "&a 1", "*a", "&a [*a]", "&a {<<: *a}", "<<"),
    *("!!set {a}", "!!binary aGk=", "!mine 3", "!!null 1", "!!omap [a: 1]", "!!bool x", "!!timestamp x", "!!int ''"),
    *("!!python/object/apply:os.system ['touch canary']", "!!float x", "!!map 1", "!!seq a", "$(touch canary)"),
    *("digits", "ddpm", "absorbing", "folder", "~stranger", "../..", "é", '"\\ud800"', '"a\\nb"', '"\\0"', "x" * 300),
    *("--help", "-h", "--seed", "-", "--", "@", "%", "`", "|", "=", "a=b", "/dev/null", ".", "x/", "a/../b"),
]
SECTIONS = ["vqgan", "demo", *plugin_names("train.samplers"), *plugin_names("experiments"), "1", "null", "<<", "? [a]"]
RUBBISH = ["[" * 5000, "{a: " * 3000, "- " * 3000, "\ufeff", "\x00", "a: &x [*x]\n", "!!python/name:os.system"]


def config_class(script: str) -> type:
    """Returns the class of a script's config, and imports all that the script does."""
    captured = []

    def capture(cls, *args, **kwargs) -> None:
        captured.append(cls)
        sys.exit()

    with mock.patch.object(cli, "parse_with_sources", capture), contextlib.redirect_stdout(io.StringIO()):
        call_script(script, [])
    return captured[0]


def script_flags(cls: type, sampler: str) -> dict[str, Flag]:
    """Returns the flags of a script that is run with this learned sampler."""
    flags = flags_of(make_default_config(cls, {"sampler": sampler}).config)
    return {name: flag for name, flag in flags.items() if name not in LEFT_OUT}


def draw_words(rng: random.Random, name: str, kind: Any) -> list[str]:
    """Returns the words of a value for a flag of this type: most are of the type, some of them senseless."""
    args = [each for each in typing.get_args(kind) if each not in (type(None), Ellipsis)]
    if rng.random() < 0.15:
        return [rng.choice(ODD)]
    if typing.get_origin(kind) is Literal:
        return [str(rng.choice(args))]
    if typing.get_origin(kind) is tuple:
        return [word for _ in range(rng.choice([0, 1, 2, 2, 3])) for word in draw_words(rng, name, rng.choice(args))]
    if args:
        return draw_words(rng, name, rng.choice(args))
    if kind in (int, float):
        return [rng.choice(NUMBERS if name in LONG or rng.random() < 0.7 else LARGE)]
    return [rng.choice(ODD)]


def draw_flag(rng: random.Random, flags: dict[str, Flag]) -> list[str]:
    """Returns one flag with its words."""
    name = rng.choice(sorted(flags))
    kind = flags[name].kind
    if kind is bool and rng.random() < 0.9:
        return [f"--{rng.choice(['', 'no_'])}{name}"]
    words = draw_words(rng, name, kind)
    form = rng.random()
    if form < 0.05:
        return [f"-{name}", *words]
    if form < 0.1:
        return [f"--{name[:-1]}", *words]
    return [f"--{name}={words[0]}"] if form < 0.3 and len(words) == 1 else [f"--{name}", *words]


def draw_file(rng: random.Random, flags: dict[str, Flag], section: str) -> str:
    """Returns the text of a config file: a section of the script's own flags, or anything."""
    if rng.random() < 0.1:
        return rng.choice([*RUBBISH, "".join(map(chr, rng.choices(range(0x20, 0x250), k=20)))])

    def lines(count: int, indent: str) -> str:
        drawn = [(name, draw_words(rng, name, flags[name].kind)) for name in rng.choices(sorted(flags), k=count)]
        texts = [words[0] if len(words) == 1 else f"[{', '.join(words)}]" for _, words in drawn]
        return "".join(f"{indent}{name}: {text}\n" for (name, _), text in zip(drawn, texts, strict=True))

    name = section if rng.random() < 0.8 else rng.choice(SECTIONS)
    return f"{lines(rng.choice([0, 0, 1]), '')}{name}:\n{lines(rng.choice([1, 1, 2, 3]), '  ')}"


def draw_json(rng: random.Random) -> str:
    """Returns configs/mnist_unet.json with another value for one key."""
    content = json.loads((ROOT / "configs" / "mnist_unet.json").read_text())
    places = [(content, key) for key in content]
    for value in list(content.values()):
        places += [(value, key) for key in value] if isinstance(value, dict) else []
    place, key = rng.choice(places)
    place[key] = rng.choice([None, True, -1, 0, 1e300, 10**400, math.nan, "x", [], [1, [2]], {}, {"a": 1}, "", [None]])
    return json.dumps(content)


def is_plain(value: Any) -> bool:
    """Returns whether a value of a config is finite, and a string, number or list."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | int) or math.isfinite(value)


class Flags:
    """Command lines and config files of all scripts, each for two steps on tiny runs that are already trained."""

    per_fork = 1

    def __init__(self, trained: Path):
        self.trained = trained
        classes = {script: config_class(script) for script in COMMANDS}
        self.flags = {(script, name): script_flags(classes[script], name) for script in COMMANDS for name in SAMPLERS}

    def run(self, rng: random.Random, box: Path) -> str:
        script = rng.choice([*COMMANDS, *["train_vqgan.py", "train_sampler.py"] * 4])
        sampler, logs = rng.choice(sorted(SAMPLERS)), box / "a" / "b" / "logs"
        flags = self.flags[script, sampler]
        shutil.copytree(self.trained, logs)
        move_caches(logs)
        argv = [f"--logs_root={logs}"] if script not in ("experiments/benchmark_unet.py", "demo.py") else []
        argv += [f"--sampler={sampler}"] if "sampler" in flags else []
        argv += COMMANDS[script].replace("--sample_steps 2" if sampler == "autoregressive" else "nothing", "").split()
        if script in ("train_sampler.py", "experiments/benchmark.py"):
            argv += [*SAMPLERS[sampler].split(), "--log_dir=new"]
        with contextlib.ExitStack() as stack:
            argv += self.draw_arguments(rng, box, script, sampler, stack)
            stack.enter_context(mock.patch.object(cli, "run_main", check_and_run(script)))
            return run_script(script, argv, logs)

    def draw_arguments(
        self, rng: random.Random, box: Path, script: str, sampler: str, stack: contextlib.ExitStack
    ) -> list[str]:
        """Returns flags, or writes a config file or a datasets.yaml and returns the flag that names it."""
        flags, kind = self.flags[script, sampler], rng.random()
        if kind < 0.03:
            (box / "datasets.yaml").write_text(draw_file(rng, flags, rng.choice(["folder", "digits"])))
            stack.enter_context(mock.patch.object(config_files, "ROOT", box))
            return ["--dataset=folder", *(["--img_size=16"] if script == "experiments/benchmark.py" else [])]
        if kind < 0.33:
            stem = {"train_vqgan.py": "vqgan", "train_sampler.py": sampler, "convert.py": sampler}
            text = draw_json(rng) if kind < 0.06 else draw_file(rng, flags, stem.get(script, Path(script).stem))
            file = box / f"given.{'json' if kind < 0.06 else 'yaml'}"
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            print(text)
            return [f"--config={file}"]
        return [word for _ in range(rng.choice([1, 1, 2, 3])) for word in draw_flag(rng, flags)]


def move_caches(logs: Path) -> None:
    """Moves the caches of this checkout to <logs>/.cache, for the rest of this process."""
    for module in (image_cache, webdataset):
        module.CACHE_DIR = logs / ".cache" / module.CACHE_DIR.name


def check_and_run(script: str) -> Callable[[Callable, Any], None]:
    """Returns a `run_main` that checks that the config can be written and read again, and runs it."""

    def run_main(main: Callable, config: Any) -> None:
        plain = cli.to_dict(config)
        assert all(is_plain(value) for group in plain.values() for value in group.values()), plain
        assert yaml.safe_load(yaml.safe_dump(plain)) == plain
        if script not in PARSED_ONLY:
            main(config)

    return run_main
