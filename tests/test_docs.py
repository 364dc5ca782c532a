"""The README and docs/: commands parse and run, code compiles, and the targets of links and names exist."""

import ast
import importlib
import re
import runpy
import subprocess
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pages import (
    PAGES,
    Command,
    anchors,
    blocks,
    commands,
    files_written,
    flags_named,
    links,
    own_text,
    shell_lines,
    spans,
)
from helpers.tiny_runs import ROOT, UNET, call, parse_config
from models import Transformer
from models.registry import MOVED
from train.cli import parse as cli
from train.cli.plugins import PLUGIN_GROUPS
from train.registry import plugin_names

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def commands_to_test() -> list[tuple[str, int, Command]]:
    """(page, number, command), except commands with a file that the page writes, which its own test runs."""
    cases = []
    for page in PAGES:
        text = page.read_text()
        written = [path.stem for path in files_written(text)]
        for number, command in enumerate(commands(text)):
            if not any(name in str(command) for name in written):
                cases.append((page.stem, number, command))
    return cases


CASES = commands_to_test()
PACKAGES = ("models", "diffusion", "vq", "train", "experiments")

# Flags of other programs that the pages name.
FOREIGN = {
    *(
        "nproc_per_node",
        "nnodes",
        "standalone",
        "node_rank",
        "rdzv_backend",
        "rdzv_endpoint",
        "rdzv_id",
        "max_restarts",
    ),
    *("signal", "requeue", "logdir", "port"),
}
# Files of the reader's, not of the repository.
READERS_FILES = {
    *("my.py", "mine.py", "birds.yaml", "config.yaml", "manifest.json", "results.json", "MNIST.json", "rows.json"),
    "table.md",
    *("classes.txt", "classnames.txt", "a.txt", "prompts.txt", "models.yaml", "data.yaml"),
}

WITHOUT_LOGS = (
    "benchmark_unet.py",
    "--measure unet",
    "--measure pretrained",
    "make_panoptic.py",
    "export_shapes.py",
)  # commands that write no files


# Commands


@pytest.mark.parametrize("command", dict.fromkeys(command for _, _, command in CASES), ids=str)
def test_every_command_parses(command, monkeypatch, tmp_path, capfd):
    script, flags = command
    assert (ROOT / script).is_file()
    if script.startswith("tests/"):  # has its own parser
        assert {*re.findall(r"--(\w+)", flags)} <= own_flags(script)
    elif script == "convert.py":  # reads the weights first
        with pytest.raises(SystemExit):
            call(script, flags)
        assert re.search("not found|no run in", capfd.readouterr().err)
    else:
        logs = "" if any(words in str(command) for words in WITHOUT_LOGS) else f" --logs_root {tmp_path}"
        assert parse_config(script, flags + logs, monkeypatch)


VQGAN = (
    "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --batch_size 4 --img_size 16 --ndf 4 --disc_layers 1 "
    "--perceptual_net none --train_steps 2 --steps_per_eval 0 --num_workers 0"
)
CODES = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 --batch_size 4 --train_steps 2 --steps_per_eval 0"
PIXELS = f"{UNET} --img_size 8 --batch_size 4 --total_steps 20 --train_steps 2 --steps_per_eval 0"
SMALL = {  # by script: flags for runs of a few seconds
    "experiments/get_samples.py": "--n_samples 30 --sample_steps 2 --batch_size 30",
    "experiments/calc_FID.py": "--n_samples 8 --sample_steps 2 --features pixels",
    "experiments/calc_PRDC.py": "--n_samples 8 --sample_steps 2 --features pixels",
    "experiments/calc_VQGAN_FID.py": "--n_images 8 --features pixels",
    "experiments/calc_nearest_neighbours.py": "--n_samples 4 --sample_steps 2 --features pixels",
    "experiments/reconstruct.py": "--n_images 1",
    "experiments/inpaint.py": "--n_images 2 --sample_steps 2",
    "experiments/edit.py": "--n_images 2 --sample_steps 2",
    "experiments/interpolate.py": "--n_images 2 --sample_steps 2 --points 3",
    "experiments/invert.py": "--n_images 2 --sample_steps 4",
    "experiments/compare_edits.py": "--n_images 2 --classes 1 --sample_steps 2",
    "experiments/compare_samplers.py": "--n_samples 4 --steps 2 --features pixels",
    "experiments/ablate.py": "--n_images 2",
    "experiments/calc_approximate_ELBO.py": "--n_images 2 --calls 2 --train_steps 2",
    "experiments/generate_big_samples.py": "--n_samples 1 --shape 5 6 --sample_steps 2",
    "experiments/check_classes.py": "",
    "experiments/check_digits.py": "",
    "experiments/attention_maps.py": "--n_samples 2 --sample_steps 2",
}
ELSEWHERE = {  # words of a command, and what it needs that tests lack
    **{name: "images to download" for name in ("ffhq", "churches", "bedrooms", "faces140k", "cifar10", "mnist")},
    **{"--clip_dir": "weights of CLIP", "webdataset": "shards", "convert.py": "released weights"},
    "demo.py": "a browser",
    **{"ddpm_shapes": "a run of layouts", "--text_encoder": "a trained encoder"},
    "control.safetensors": "files below its own logs",
    **dict.fromkeys(
        ("sd15", "taef2", "configs/sd_", "--load_dir toy", "--load_dir sat", "--load_dir instruct", "logs/geo"),
        "released weights",
    ),
    **{name: "annotated data" for name in ("check_data.py", "make_panoptic.py", "export_shapes.py")},
    **{name: "annotated images to download" for name in ("coco128", "xbd", "fmow")},
    "--dataset pairs": "pairs of images",
    **{"--repaint_jump": "more than two steps", "--strength_map": "a picture and its map"},
    **{
        "experiments/benchmark": "minutes of measuring",
        **dict.fromkeys(("calc_layout.py", "shapes_layout", "shapes_panoptic", "tests/"), "minutes of training"),
        **dict.fromkeys(("digits_captions", "digits_numbers", "ablation/finetuning"), "minutes of training"),
        "digit_pairs": "minutes of training",
        "edit_layout.py": "a model of boxes",
        "calc_pairs.py": "images of the same names",
        "vqgan_plus": "a large network's time",
    },
}


class Runner:
    """Runs commands on tiny networks in a separate folder, which already holds runs of the embedded digits."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        for split in ("train", "val"):
            for name in ("hat", "shoe"):
                (folder / "images" / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / ("hat", "shoe")[i % 2] / f"{i}.png")
        np.savez(folder / "images.npz", arr_0=np.random.default_rng(0).integers(0, 255, (8, 16, 20, 3), np.uint8))
        samplers = plugin_names("train.samplers")
        for line in ("train_vqgan.py", *(f"train_sampler.py --sampler {name}" for name in samplers)):
            self(Command(*(line + " ").split(" ", 1)))

    def __call__(self, command: Command) -> None:
        script, flags = command
        self.count += 1
        for name, folder in (("/path/to/images", "images"), ("/path/to/photographs", "images/val")):
            flags = flags.replace(name, str(self.folder / folder))
        logs = self.folder / "logs"
        if script == "train_vqgan.py":
            small = VQGAN + ("" if "--codebook_size" in flags else " --codebook_size 16")
        elif script == "train_sampler.py":
            small = f"{PIXELS if 'ddpm' in flags else CODES} --warmup_iters 2"
        else:
            small = SMALL[script] + ("" if "--log_dir" in flags else f" --log_dir results_{self.count}")
        if script in ("experiments/check_classes.py", "experiments/check_digits.py"):
            sampler = "ddpm" if "ddpm" in flags else "absorbing"
            call("experiments/get_samples.py", self.samples(sampler))
            small += f" --samples {logs / f'samples_{sampler}' / 'samples.npz'}"
        if "autoregressive" in flags or "--reference" in flags:  # one step per code; no sampling
            small = small.replace("--sample_steps 2", "")
        call(script, f"{flags} {small} --logs_root {logs} --no_amp")

    def samples(self, sampler: str) -> str:
        small = SMALL["experiments/get_samples.py"]
        return f"--sampler {sampler} {small} --log_dir samples_{sampler} --logs_root {self.folder / 'logs'} --no_amp"


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory):
    """A runner for each page, whose commands use the results of earlier ones."""
    return cache(lambda page: Runner(tmp_path_factory.mktemp(page)))


@pytest.mark.slow
@pytest.mark.parametrize("page, number, command", CASES, ids=lambda each: str(each))
def test_every_command_runs(page, number, command, runner_of):
    missing = next((why for word, why in ELSEWHERE.items() if word in str(command)), None)
    if missing is not None:
        pytest.skip(f"needs {missing}")
    runner_of(page)(command)


# Code


@by_page
def test_python_blocks_compile(page):
    for code in blocks(page.read_text(), "python"):
        compile(code, page.name, "exec")


@by_page
def test_imports_in_python_blocks_exist(page):
    for code in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in PACKAGES:
                if Path(f"{node.module.replace('.', '/')}.py") in files_written(page.read_text()):
                    continue
                missing = [alias.name for alias in node.names if not exists(f"{node.module}.{alias.name}")]
                assert not missing, f"{page.name}: from {node.module} import {', '.join(missing)}"


@by_page
def test_bash_scripts_have_no_syntax_error(page, tmp_path):
    for code in blocks(page.read_text(), "bash", "sh"):
        (tmp_path / "script.sh").write_text(code)
        subprocess.run(["bash", "-n", tmp_path / "script.sh"], check=True)


def test_the_maps_of_the_attention_page_are_recorded():
    code, _ = blocks((ROOT / "docs" / "attention.md").read_text(), "python")
    ids = torch.zeros(2, 4, 4, dtype=torch.long)
    names = {"network": Transformer(codes=8, grid=(4, 4), width=16, heads=2, layers=1), "ids": ids}
    exec(code, names)
    assert names["maps"]["blocks.0.attention"][0].shape == (2, 2, 16, 16)


def test_the_function_of_the_gaussian_page_greys_images():
    (code,) = blocks((ROOT / "docs" / "gaussian.md").read_text(), "python")
    names = {}
    exec(code, names)
    item = names["grey"]({"image": torch.full((3, 2, 2), 200, dtype=torch.uint8), "label": 1})
    assert item["condition_image"].tolist() == [[[200, 200], [200, 200]]] and item["label"] == 1


# Names


@by_page
def test_links_and_anchors_resolve(page):
    for target in links(page.read_text()):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


@by_page
def test_files_named_exist(page):
    folders = [ROOT / name for name in (*PACKAGES, "configs", "tests", "docs")]
    names = {path.name for path in [*ROOT.iterdir(), *(file for folder in folders for file in folder.rglob("*"))]}
    text = page.read_text()
    written = files_written(text)
    names |= {path.name for path in written}
    words = {word for span in spans(own_text(text)) for word in span.split()}
    for word in sorted(word for word in words if re.fullmatch(r"[\w./-]+", word)):
        if re.search(r"(^|/)[A-Z_]+(\.\w+)?$", word) and not (ROOT / word).exists():  # configs/NAME.yaml
            continue
        if "/" in word and word.partition("/")[0] in (*PACKAGES, "configs", "tests", "docs", "assets"):
            assert (ROOT / word).exists() or Path(word) in written or word.rpartition("/")[2] in READERS_FILES, (
                f"{page.name}: {word}"
            )
        elif re.fullmatch(r"[\w-]+\.(py|ya?ml|toml|md|txt)", word):
            assert word in names | READERS_FILES, f"{page.name}: {word}"


@by_page
def test_dotted_names_exist(page):
    dotted = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)+(?<!\.py)")
    for span in {*spans(own_text(page.read_text()))} - {*MOVED, *MOVED.values()}:  # covered by test_moved.py
        assert not dotted.fullmatch(span) or exists(span), f"{page.name}: {span}"


@by_page
def test_flags_named_exist(page):
    text = own_text(page.read_text())
    of_page = {*re.findall(r"^    (\w+): ", "\n".join(blocks(text, "python")), re.M)}  # fields of the page's own Config
    unknown = flags_named(text) - every_flag() - FOREIGN - of_page
    assert not unknown, f"{page.name}: {sorted(unknown)}"


@by_page
def test_make_targets_named_exist(page):
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)}
    text = page.read_text()
    named = {line.split()[1] for line in [*shell_lines(text), *spans(text)] if re.match(r"make [\w-]+$", line)}
    assert named <= targets, f"{page.name}: {sorted(named - targets)}"


def test_every_picture_is_shown_somewhere():
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page.read_text())}
    unused = {path for path in (ROOT / "assets").iterdir() if path.resolve() not in shown}
    assert not unused


def test_every_page_is_linked():
    linked = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page.read_text())
    }
    assert {page.resolve() for page in PAGES[1:]} <= linked


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


def own_flags(script: str) -> set[str]:
    """The flags of a script that has its own parser."""
    return {*re.findall(r'add_argument\("--(\w+)"', (ROOT / script).read_text())}


@cache
def every_flag() -> frozenset[str]:
    """The flags of all scripts, those of every plug-in included."""
    names = {"help", "help_all", "config", "from"} | own_flags("tests/kill_training.py")
    for group in PLUGIN_GROUPS.values():
        names = names.union(*(cli.flag_names(group.config_of(name)) for name in plugin_names(group.package)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "experiments")
        for script in (*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")):
            if "__main__" not in script.read_text():
                continue
            for value in runpy.run_path(str(script), run_name="flags").values():
                if isinstance(value, type) and is_dataclass(value) and value.__name__.endswith(("Config", "Benchmark")):
                    names |= cli.flag_names(value)
    return frozenset(names)
