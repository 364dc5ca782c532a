"""Workloads of a fixed size, which need no preset: measures, a folder of JPEG files, and the start of a process.

Beside them stand the same of other packages: torch-fidelity's Fréchet distance, if it is installed, and torchvision's
`ImageFolder`.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.harness.report import table, three_digits
from experiments.metrics.attention_speed import AttentionConfig, attention_timings, measure_attention
from experiments.metrics.experts_speed import ONE_LAYER, compare_experts, compare_memory, experts_cases
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.prdc import prdc
from experiments.metrics.pretrained_speed import PretrainedBenchmarkConfig, check_packages, measure_pretrained
from experiments.metrics.region_attention_speed import compare_ways, region_attention_cases
from experiments.metrics.speed_results import Row, timing_row
from experiments.metrics.throughput import MAX_SECONDS
from experiments.metrics.unet_speed import UNetBenchmarkConfig, measure_unet
from train.config import ROOT, DataConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.datasets import folder
from train.distributed import DistContext
from train.perf import time_call

Runs = dict[str, Callable[[], object]]  # what to time, by the name of the package: ours first
OURS = "ours"
WIDTH, IN_STATISTICS, IN_PRDC, BATCH = 2048, 4096, 4000, 256  # Inception features: their width, numbers, batch size
FILES = ((640, 480, 32), (2000, 1500, 8))  # width and height of JPEG files, and their number
SIDES = (64, 256)  # of the images that they are resized to
HELP = "train_sampler.py --help"
FIRST_STEP = (
    "train_sampler.py --sampler ddpm --dataset digits --channels 16 --train_steps 1 --warmup_iters 0 --steps_per_log 1 "
    "--steps_per_eval 0 --num_workers 0 --log_dir startup"
)


def measure_without_preset(names: Sequence[str], repeats: int, world: DistContext) -> list[Row]:
    """Runs those measurements of --measure that need no preset; those with flags of their own have the defaults."""
    device, rows = world.device, []
    if "pretrained" in names:
        check_packages()  # before anything is measured
    if "attention" in names:
        rows += attention_timings(measure_attention(AttentionConfig(repeats=repeats, device=device.type), device))
    if "unet" in names:
        rows += measure_unet(UNetBenchmarkConfig(repeats=repeats, device=device.type), world)
    if "pretrained" in names:
        rows += measure_pretrained(PretrainedBenchmarkConfig(device=device.type), world)
    if "region_attention" in names:
        rows += measure_region_attention(repeats, device)
    if "experts" in names:
        rows += measure_experts(repeats, device)
    if "metrics" in names:
        rows += measure_metrics(repeats, device)
    if "image_folder" in names:
        rows += measure_image_folder(repeats, device)
    if "startup" in names:
        rows += measure_startup(repeats, device)
    return rows


def measure_region_attention(repeats: int, device: torch.device) -> list[Row]:
    """Times attention within regions, a loop over objects, and attention to the whole map; prints their ratios."""
    rows = report_in_turn("region attention", region_attention_cases(device), repeats, device)
    print("\n".join(compare_ways(rows, "region attention")))
    return rows


def measure_experts(repeats: int, device: torch.device) -> list[Row]:
    """Times experts, one layer, and all experts everywhere; prints their ratios and their memory."""
    rows = report_in_turn("experts", experts_cases(device), repeats, device, ONE_LAYER)
    print("\n".join([*compare_experts(rows, "experts"), *compare_memory(device)]))
    return rows


def measure_metrics(repeats: int, device: torch.device) -> list[Row]:
    """Times the statistics of features, their Fréchet distance, and precision, recall, density and coverage."""
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(IN_STATISTICS, WIDTH, generator=rng) * scale for scale in (1.0, 1.1)]
    return report_in_turn(
        "measure",
        {
            f"statistics of {IN_STATISTICS} x {WIDTH}": statistics_runs(features[0]),
            f"Fréchet distance of {WIDTH} x {WIDTH}": frechet_runs(features),
            f"PRDC of {IN_PRDC} and {IN_PRDC} x {WIDTH}": {OURS: lambda: prdc(*(x[:IN_PRDC] for x in features))},
        },
        repeats,
        device,
    )


def statistics_runs(features: Tensor) -> Runs:
    """Returns the computation of mean and covariance of features (N, D)."""

    def accumulate() -> Statistics:
        statistics = Statistics()
        for batch in features.split(BATCH):
            statistics.update(batch)
        return statistics

    if importlib.util.find_spec("torch_fidelity") is None:
        return {OURS: accumulate}
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return {OURS: accumulate, "torch-fidelity": lambda: fid_features_to_statistics(features)}


def frechet_runs(features: Sequence[Tensor]) -> Runs:
    """Returns the computation of the Fréchet distance between the statistics of two sets of features (N, D)."""
    a, b = (Statistics().update(each) for each in features)
    if importlib.util.find_spec("torch_fidelity") is None:
        return {OURS: lambda: frechet_distance(a, b)}
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    theirs = [{"mu": each.mean.numpy(), "sigma": each.covariance.numpy()} for each in (a, b)]
    return {
        OURS: lambda: frechet_distance(a, b),
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID],
    }


def measure_image_folder(repeats: int, device: torch.device) -> list[Row]:
    """Times the loading of JPEG files in this process: decoding, resizing, cropping, to batches in [-1, 1]."""
    cases = {}
    with TemporaryDirectory() as root:
        for width, height, count in FILES:
            files = Path(root) / f"{width}x{height}"
            write_jpegs(files, width, height, count)
            for side in SIDES:
                cases[f"{count} JPEG files of {width}x{height} to {side}x{side}"] = folder_runs(files, side)
        return report_in_turn("image folder", cases, repeats, device)


def write_jpegs(root: Path, width: int, height: int, count: int) -> None:
    """Writes `count` training images and one for validation, smooth with some noise as photographs are."""
    rng = np.random.default_rng(0)
    for i in range(count + 1):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
        image = (smooth + rng.integers(-8, 9, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
        path = root / ("train" if i < count else "val") / "images" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=90)


def folder_runs(root: Path, side: int) -> Runs:
    """Returns the loading of all training images below `root` as a batch (N, 3, side, side)."""
    from torchvision import datasets, transforms

    data = DataConfig(dataset="folder", img_size=side, n_channels=3)
    images = TrainingImages(ImageSource(build_dataset(data, folder.Config(data_dir=str(root)), "train"), data), 0)
    theirs = datasets.ImageFolder(
        str(root / "train"),
        transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(0.5, 0.5),
            ]
        ),
    )
    return {
        OURS: lambda: images[list(range(len(images)))]["image"],
        "torchvision": lambda: torch.stack([image for image, _ in theirs]),
    }


def measure_startup(repeats: int, device: torch.device) -> list[Row]:
    """Times a fresh process: the import of PyTorch alone, the short help, and a small training to its first step."""

    def run(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)

    cases = {
        "import torch": {OURS: run("-c", "import torch")},
        HELP: {OURS: run(*HELP.split())},
        "training to its first step": {OURS: lambda: run_first_step(device)},
    }
    return report_in_turn("start-up", cases, repeats, device)


def run_first_step(device: torch.device) -> None:
    """Trains on digits in a fresh process until the figures of the first step are written; RuntimeError if it fails."""
    with TemporaryDirectory() as logs:
        words = [sys.executable, *FIRST_STEP.split(), "--logs_root", logs, "--device", device.type]
        written = Path(logs) / "startup" / "metrics.jsonl"
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (written.is_file() and written.stat().st_size):
                time.sleep(0.005)
            finished = written.is_file()
            process.terminate()
            _, errors = process.communicate()
    if not finished:
        raise RuntimeError(f"the training did not reach its first step: {errors}")


def report_in_turn(
    name: str, cases: dict[str, Runs], repeats: int, device: torch.device, reference: str | None = None
) -> list[Row]:
    """Times the runs of each case in turn, after a warm-up, and prints a table; no round starts after a minute.

    The "ratio" in a row is the median of its times relative to those of `reference` (None: ours) in the same rounds: a
    machine that is busy for a while slows both.
    """
    heading = (name, "package", "median s", "min s", "max s", f"relative to {reference or OURS}")
    rows, cells = [], []
    for case, runs in cases.items():
        seconds, start = {package: [] for package in runs}, time.perf_counter()
        other = reference or next(iter(runs))
        for i in range(1 + repeats):
            if i > 1 and time.perf_counter() - start > MAX_SECONDS:
                break
            for package, run in runs.items():
                elapsed = time_call(run, device)
                seconds[package] += [elapsed] if i else []
        for package, times in seconds.items():
            ratio = median(one / two for one, two in zip(times, seconds[other], strict=True))
            row = timing_row(f"{name}, {case}, {package}", times, ratio=ratio)
            spread = (three_digits(row[key]) for key in ("seconds", "min_seconds", "max_seconds"))
            cells.append((case, package, *spread, f"{ratio:.2f}x"))
            rows.append(row)
    print(f"\n{table([heading, *cells])}\n", flush=True)
    return rows
