"""Compares ways of fine-tuning: a model of the digits 0 to 8 learns the 9 from few images.

Each run is one of train_sampler.py, whose command is printed; an interrupted comparison resumes where it was.
"""

import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _root
import torch
from safetensors import safe_open
from torch import Tensor

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import FolderConfig
from experiments.harness.images import save_grid
from experiments.harness.report import table
from experiments.harness.results import load_results, write_results
from experiments.metrics.image_classifier import (
    RECIPE,
    ImageClassifier,
    classify,
    load_labelled_images,
    train_image_classifier,
)
from models.ranges import FINITE, MILLION, POSITIVE, SEED, SIZE, check_ranges
from train.checkpoint import WEIGHTS, checkpoint_path, saved_steps
from train.cli.files import run_folder
from train.cli.parse import run_script
from train.config import ROOT
from train.data.loading import build_dataset
from train.progress import Progress
from train.runs import run_lock
from train.sampler_loading import load_trained_sampler
from train.samplers.ddpm import Sampling
from train.trained_sampler import TrainedSampler

DIGITS = range(10)
NEW, OTHERS = 9, tuple(range(9))  # the digit that is learned, and those of the base
SHOWN, AT_ONCE = 10, 100  # images in a row of the picture, and sampled at a time
ARMS: dict[str, tuple[str, ...]] = {
    "full": (),
    "lora": ("--lora_rank", "{rank}"),
    "dora": ("--lora_rank", "{rank}", "--dora"),
    "differential": ("--differential", "diff_v2"),
    "differential_lora": ("--differential", "diff_v2", "--lora_rank", "{rank}"),
}


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    arms: tuple[str, ...] = ("full", "lora", "dora", "differential")
    """Ways of fine-tuning: full, lora, dora, differential (full, with differential attention), differential_lora."""
    preset: str = "ddpm_digits"
    """File of configs/ that the base is trained with."""
    data_dir: str | None = None
    """Folder of the data set; default: the one in datasets.yaml."""
    base_steps: int = 2_500
    """Training steps of the base."""
    tuning_steps: int = 300
    """Training steps of each arm."""
    images: int = 150
    """Images of the new digit."""
    rank: int = 8
    """Rank of LoRA and DoRA."""
    full_lr: float = 1e-4
    """Learning rate where the whole network learns."""
    lora_lr: float = 1e-3
    """Learning rate of LoRA and DoRA."""
    n_samples: int = 200
    """Samples of the new digit, and of all others together."""
    guidance: float = 1.0
    """Guidance scale of the samples."""
    seed: int = 0
    """Random seed."""

    EVERYDAY = ("arms", "preset", "data_dir", "tuning_steps", "images", "rank", "n_samples")
    RANGES = {
        **dict.fromkeys(("base_steps", "tuning_steps", "n_samples"), MILLION),
        **{"images": SIZE, "rank": SIZE, "full_lr": POSITIVE, "lora_lr": POSITIVE, "guidance": FINITE, "seed": SEED},
    }

    def __post_init__(self):
        check_ranges(self)
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"got arms {' '.join(unknown)}, wanted some of {', '.join(ARMS)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains the base and each arm, and measures them; writes results.json and finetuning.png to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/compare_finetuning.py",
        "python experiments/compare_finetuning.py --arms full lora --images 50",
    )

    comparison: ComparisonConfig
    output: FolderConfig


def main(config: Config) -> None:
    c, root = config.comparison, config.output.logs_root
    folder = run_folder(root, config.output.log_dir or f"compare_finetuning_{c.preset}")
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        results = load_results(folder) or {}
        train_all(Trainer(c, folder, results))
        names, judge, pictures = ("base", *c.arms), None, []
        for name in names:
            model = open_run(folder / name, root)
            new, others = (draw(model, digits, c) for digits in ((NEW,), OTHERS))
            pictures.append(new[:SHOWN])
            judge = judge or train_judge(open_run(folder / "base", root), c.seed)
            results[name] |= measure(folder / name, judge, new, others)
            write_results(folder, results)
    labels = [name for name in names for _ in range(SHOWN)]
    save_grid(folder / "finetuning.png", torch.cat(pictures), columns=SHOWN, captions=labels)
    print(f"\n{report(results, names)}\n\n{folder / 'results.json'}\n{folder / 'finetuning.png'}")


def train_all(train: "Trainer") -> None:
    """Trains the base and all arms."""
    c = train.comparison
    train("base", c.base_steps, ["--only_digits", *map(str, OTHERS)])
    for arm in c.arms:
        own = [word.format(rank=c.rank) for word in ARMS[arm]]
        lr = c.lora_lr if "--lora_rank" in own else c.full_lr
        few = ["--only_digits", str(NEW), "--max_images", str(c.images)]
        rate = ["--lr", f"{lr:g}", "--warmup_iters", str(c.tuning_steps // 10)]
        train(arm, c.tuning_steps, ["--load_dir", str(train.folder / "base"), *few, *own, *rate])


class Trainer:
    """Runs train_sampler.py with the settings of the comparison; results keep the seconds of each run."""

    def __init__(self, comparison: ComparisonConfig, folder: Path, results: dict[str, Any]):
        self.comparison, self.folder, self.results = comparison, folder, results

    def __call__(self, name: str, steps: int, flags: Sequence[str]) -> None:
        """Trains a run to its last step, unless it is there; ValueError if the training fails."""
        c, run = self.comparison, self.folder / name
        if steps in saved_steps(run) and name in self.results:
            return
        words = ["--config", str(ROOT / "configs" / f"{c.preset}.yaml"), "--sampler", "ddpm"]
        words += [] if c.data_dir is None else ["--data_dir", c.data_dir]
        words += [*flags, "--train_steps", str(steps), "--seed", str(c.seed), "--log_dir", str(run)]
        print(f"python train_sampler.py {shlex.join(words)}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(ROOT / "train_sampler.py"), *words])
        if done.returncode:
            raise ValueError(f"the training of {name} ended with code {done.returncode}: see its message above")
        before = self.results.get(name, {}).get("seconds", 0)
        self.results[name] = {"seconds": before + time.perf_counter() - start}
        write_results(self.folder, self.results)


def open_run(run: Path, logs_root: str) -> TrainedSampler:
    """Opens the sampler of a run."""
    world = single_process_world("auto")
    return load_trained_sampler(run, None, world.device, ema=None, amp=True, logs_roots=(logs_root,))


def draw(model: TrainedSampler, digits: Sequence[int], c: ComparisonConfig) -> Tensor:
    """Draws images of digits in turn, uint8 (N, C, H, W): with the same noise for all runs."""
    options, parts = Sampling(guidance=c.guidance), []
    for indices in torch.arange(c.n_samples).split(AT_ONCE):
        labels = torch.tensor(digits)[indices % len(digits)]
        parts.append(model.draw(indices.tolist(), c.seed, options, {"label": labels})["image"].cpu())
    return torch.cat(parts)


def train_judge(model: TrainedSampler, seed: int) -> ImageClassifier:
    """Trains a classifier on real images of all ten digits."""
    reader = replace(model.reader, only_digits=(), max_images=None)
    images = load_labelled_images(build_dataset(model.data, reader, "train"), model.data)
    with Progress("classifier", RECIPE.epochs * len(images.labels), "image") as bar:
        return train_image_classifier(*images, len(DIGITS), False, seed, model.device, bar.update)


def measure(run: Path, judge: ImageClassifier, new: Tensor, others: Tensor) -> dict[str, Any]:
    """Returns the shares of samples that are recognised as what was asked for, and what the run learned and saved."""
    wanted = torch.tensor(OTHERS)[torch.arange(len(others)) % len(OTHERS)]
    path = checkpoint_path(run, saved_steps(run)[-1]) / WEIGHTS
    with safe_open(path, "pt") as file:
        sizes = [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 (it is no dict)
    return {
        "new": (classify(judge, new) == NEW).double().mean().item(),
        "others": (classify(judge, others) == wanted).double().mean().item(),
        "parameters": sum(sizes),
        "bytes": path.stat().st_size,
    }


def report(results: dict[str, Any], names: Sequence[str]) -> str:
    """Formats the table, one row per run."""
    rows = [("run", f"asked for {NEW}", "asked for 0-8", "parameters learned", "file", "training")]
    for name in names:
        row = results[name]
        size, minutes = f"{row['bytes'] / 1e6:.2f} MB", f"{row['seconds'] / 60:.1f} min"
        rows.append((name, f"{row['new']:.3f}", f"{row['others']:.3f}", f"{row['parameters']:,}", size, minutes))
    return f"{table(rows)}\nshares of samples that a classifier of real digits recognises as what was asked for"


if __name__ == "__main__":
    run_script(main, Config, "compare_finetuning")
