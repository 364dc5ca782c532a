"""Compares two sets of images pair by pair, matched by name: calc_pairs.py SAMPLES REFERENCE.

Needs no trained run. Measures squared error, PSNR, SSIM, LPIPS and L1 of each pair, and draws the worst pairs.
"""

import csv
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import _root
import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness.batches import single_process_world
from experiments.harness.comparison import default_name
from experiments.harness.experiment import FolderConfig
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.image_sets import NO_HEADER, Size, find_place, header_size, open_file
from experiments.harness.images import image_names
from experiments.harness.report import table
from experiments.harness.results import load_results, write_results
from experiments.metrics.contact_sheet import PairOfImages, save_pair_sheet
from experiments.metrics.image_pairs import WINDOW, l1, luma, mse, psnr, ssim
from models.ranges import COUNT_OR_ZERO, check_ranges
from train.cli.parse import run_script, to_dict
from train.data.transforms import to_float, to_pixels
from train.datasets import Dataset, UnreadableImage
from train.datasets._pairs import index_once, strip_names
from train.datasets.folder import ImageFolder, list_images
from train.files import atomic_write
from train.identity import results_identity
from train.progress import Progress
from train.runs import open_run, perceptual_provenance, run_lock
from vq.perceptual import MIN_SIDE, load_perceptual

TABLE, SHEET = "pairs.csv", "worst.png"
HIGHER_IS_BETTER = ("psnr", "psnr_y", "ssim", "ssim_y")
METRICS = {  # what each is
    "mse": "squared difference of levels in [0, 255]; lower is better",
    "psnr": "dB, 10 log10(255^2 / mse); higher is better, the mean is over pairs that differ",
    "psnr_y": "PSNR of the luma (BT.601, 16 to 235)",
    "ssim": f"Gaussian window of {WINDOW}x{WINDOW}, mean over RGB; higher is better, at most 1",
    "ssim_y": "SSIM of the luma",
    "lpips": "lower is better",
    "l1": "absolute difference of values in [-1, 1]; lower is better",
}
NAMED = 3  # of the images of a kind that are left out, in the report; results.json has all
WANTED = "wanted a folder of images, or a samples.npz"


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Pairs of images."""

    samples: str = ""
    """Folder of images, or a samples.npz of get_samples.py; the first word of the command line."""
    reference: str = ""
    """Folder or .npz file of the images to compare them with, of the same names; the second word."""
    lpips: Literal["squeeze", "alex", "vgg", "none"] = "squeeze"
    """Network of LPIPS; none: without it."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights; if omitted, torch's cache or a download."""
    resize: bool = False
    """Resize samples to the size of their reference (bicubic, antialiased); without it, other sizes are refused."""
    worst_by: Literal["mse", "psnr", "psnr_y", "ssim", "ssim_y", "lpips", "l1"] = "psnr"
    """Metric by which the pairs in worst.png are chosen."""
    sheet_pairs: int = 8
    """Number of pairs in worst.png; 0: no picture."""
    sheet_size: int = 192
    """Longer side of an image in worst.png, in pixels."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Of LPIPS; auto: cuda if available, else mps, else cpu."""

    EVERYDAY = ("samples", "reference", "lpips", "resize", "worst_by", "sheet_pairs", "device")
    RANGES = {"sheet_pairs": COUNT_OR_ZERO, "sheet_size": "[32, 2048]"}

    def __post_init__(self):
        check_ranges(self)
        if self.lpips == "none" and self.perceptual_weights is not None:
            raise ValueError("got --perceptual_weights with --lpips none: leave one of them out")
        if self.lpips == "none" and self.worst_by == "lpips":
            raise ValueError("got worst_by lpips with --lpips none: pass --worst_by psnr, or --lpips squeeze")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Compares images with others of the same names; writes results.json, pairs.csv and worst.png to
    <logs_root>/<log_dir>.

    The first two words may be the folders, instead of --samples and --reference.
    """

    EXAMPLES = (
        "python experiments/calc_pairs.py folder_of_images other_folder",
        "python experiments/calc_pairs.py results references --resize --worst_by lpips",
    )

    pairs: PairsConfig
    output: FolderConfig


class NamedImages(NamedTuple):
    """The images of a folder or of an .npz file, by name."""

    path: Path
    dataset: Dataset
    files: tuple[str, ...]  # relative to the folder; of an .npz file, those that get_samples.py would write

    def load(self, index: int) -> Tensor:
        """Returns an image uint8 (3, H, W): grey as RGB, transparent pixels on white, 16 bits scaled to 8.

        UnreadableImage: it is broken, has floats, or other channels.
        """
        image = self.dataset[index]["image"]
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            name = self.path / self.files[index]
            raise UnreadableImage(f"{name}: its pixels are floats of unknown range: save it with 8 bits per pixel")
        return torch.from_numpy(np.array(to_pixels(image, 3, None))).permute(2, 0, 1)

    def size(self, index: int) -> Size | None:
        """Returns the height and width of an image, of a file those in its header; None if that is damaged."""
        if not isinstance(self.dataset, ImageFolder):
            return self.dataset[index]["image"].shape[:2]
        try:
            return header_size(self.path / self.files[index], self.dataset)
        except NO_HEADER:
            return None


class MatchedNames(NamedTuple):
    """Images of two sets that have the same name."""

    names: list[str]  # without suffix, in order
    pairs: list[tuple[int, int]]  # index in the samples and in the reference
    left_out: dict[str, list[str]]  # of each set, the files without a partner


class PairRow(NamedTuple):
    """A pair and its metrics."""

    name: str
    files: tuple[str, str]
    size: tuple[int, int]  # height and width
    values: dict[str, float | None]  # by metric; None: undefined for images this small


def main(config: Config) -> None:
    settings, output = config.pairs, config.output
    device = single_process_world(settings.device).device
    samples = open_images("samples", settings.samples, output.logs_root)
    reference = open_images("reference", settings.reference, output.logs_root)
    matched = match_names(samples, reference)
    if not settings.resize:
        check_sizes(samples, reference, matched.pairs)
    sets = {"samples": samples, "reference": reference}
    provenance = {f"{name}_content": each.dataset.fingerprint() for name, each in sets.items()}
    provenance |= perceptual_provenance(settings.perceptual_weights)
    default = default_name("pairs", str(samples.path), str(reference.path))
    folder = choose_results_folder(output.logs_root, output.log_dir, default, config, provenance, results_identity)
    with run_lock(folder), deleted_if_refused(folder):
        open_run(folder, config, provenance, results_identity)
        print(f"results: {folder}", flush=True)
        results = load_results(folder)
        if results is None:
            results = measure(settings, samples, reference, matched, load_network(settings, device), folder)
            write_results(folder, results | {"run": to_dict(config) | provenance})
        print(report(results, folder))


def open_images(flag: str, word: str, logs_root: str) -> NamedImages:
    """Opens the folder or the .npz file that a word names. FileNotFoundError, ValueError: there is none."""
    if not word:
        raise ValueError(f"got no {flag}, {WANTED}: calc_pairs.py SAMPLES REFERENCE")
    kind, path = find_place(word, logs_root)
    if kind == "file":
        images = open_file(path)
        if images.data.n_channels != 3:
            raise ValueError(f"{path}: got arr_0 of {images.data.n_channels} channels, wanted RGB or grey: {WANTED}")
        return NamedImages(path, images.dataset, tuple(Path(name).name for name in image_names(len(images))))
    if kind != "folder":
        raise ValueError(f"got {word}, the {kind} {path}, {WANTED}: pass the folder that has the images")
    names, others = list_images(path)
    if others:
        print(f"left out of {path}: {others}", flush=True)
    return NamedImages(path, ImageFolder(path, names, (), "all"), tuple(names))


def match_names(samples: NamedImages, reference: NamedImages) -> MatchedNames:
    """Matches images whose path below their folder is the same but for the suffix or, if one of the folders has no
    subfolders, whose file is.

    ValueError: two files of a set have the same name, or none has a partner.
    """
    sets = (samples, reference)
    keys = [strip_names(each.files, "") for each in sets]
    if any(not any("/" in key for key in each) for each in keys):
        keys = [[os.path.basename(key) for key in each] for each in keys]
    for each, names in zip(sets, keys, strict=True):
        index_once(names, [str(each.path / file) for file in each.files])
    first, second = ({key: index for index, key in enumerate(names)} for names in keys)
    common = sorted(first.keys() & second.keys())
    if not common:
        got = " and ".join(str(each.path / each.files[0]) for each in sets)
        raise ValueError(f"no image has a partner: got {got}, wanted the same names but for the suffix: rename them")
    left_out = {
        "samples": [samples.files[index] for key, index in first.items() if key not in second],
        "reference": [reference.files[index] for key, index in second.items() if key not in first],
    }
    return MatchedNames(common, [(first[key], second[key]) for key in common], left_out)


def check_sizes(samples: NamedImages, reference: NamedImages, pairs: Sequence[tuple[int, int]]) -> None:
    """Raises ValueError, with their number, if images of pairs have other sizes in their headers than their reference.

    Images whose headers differ are read, since a header may turn an image; pairs that cannot be read are left out. What
    no header tells is found when the pair is measured.
    """
    errors = []
    for pair in pairs:
        size, other = samples.size(pair[0]), reference.size(pair[1])
        if size is None or other is None or size == other:
            continue
        try:
            size, other = (each.load(i).shape[1:] for each, i in zip((samples, reference), pair, strict=True))
        except UnreadableImage:
            continue
        errors += [other_sizes(samples, reference, pair, size, other)] if size != other else []
    if errors:
        raise ValueError(f"{len(errors)} of {len(pairs)} pairs differ in size: {errors[0]}: pass --resize")


def other_sizes(
    samples: NamedImages, reference: NamedImages, pair: tuple[int, int], size: Sequence[int], other: Sequence[int]
) -> str:
    """Says that a sample has another height and width than its reference."""
    places = samples.path / samples.files[pair[0]], reference.path / reference.files[pair[1]]
    got, wanted = ("x".join(map(str, each)) for each in (size, other))
    return f"{places[0]} has {got} pixels, wanted {wanted} as {places[1]} has"


def load_network(settings: PairsConfig, device: torch.device) -> nn.Module | None:
    """Loads the network of --lpips; ValueError names the remedies if there are no weights."""
    try:
        network = load_perceptual(settings.lpips, settings.perceptual_weights)[1]
    except ValueError as error:
        if settings.perceptual_weights is not None or error.__cause__ is None:
            raise
        reason = f"the {settings.lpips} weights could not be loaded ({error.__cause__})"
        raise ValueError(f"no LPIPS: {reason}: pass their file as --perceptual_weights, or --lpips none") from error
    return None if network is None else network.to(device)


def measure(
    settings: PairsConfig,
    samples: NamedImages,
    reference: NamedImages,
    matched: MatchedNames,
    network: nn.Module | None,
    folder: Path,
) -> dict[str, Any]:
    """Measures every pair and writes TABLE and, of the worst pairs, SHEET to `folder`.

    ValueError: a sample has another size than its reference and is not to be resized, or no pair can be read.
    """
    load = partial(load_pair, samples, reference, settings.resize)
    rows, unreadable, resized = [], [], 0
    with Progress("measuring", len(matched.names), "pair") as bar:
        for name, indices in zip(matched.names, matched.pairs, strict=True):
            bar.update()
            try:
                pair = load(indices)
            except UnreadableImage as error:
                unreadable.append(f"{name}: {error}")
                continue
            resized += pair.resized
            values = measure_pair(pair.image, pair.other, network)
            files = samples.files[indices[0]], reference.files[indices[1]]
            rows.append(PairRow(name, files, tuple(pair.image.shape[1:]), values))
    if not rows:
        raise ValueError(f"none of {len(unreadable)} pairs can be read; first error: {unreadable[0]}")
    write_table(folder / TABLE, rows)
    metric, places = settings.worst_by, dict(zip(matched.names, matched.pairs, strict=True))
    worst = worst_rows(rows, metric, settings.sheet_pairs)
    if worst:
        sheet = [label_pair(row, metric, load(places[row.name])) for row in worst]
        save_pair_sheet(folder / SHEET, sheet, ("samples", "reference"), size=settings.sheet_size)
    return {
        "metrics": {metric: summarize([row.values[metric] for row in rows]) for metric in METRICS},
        "n_pairs": len(rows),
        "resized": resized,
        "left_out": matched.left_out | {"unreadable": unreadable},
        "lpips_net": settings.lpips,
        "worst": {"by": metric, "names": [row.name for row in worst]},
    }


class LoadedPair(NamedTuple):
    """Two images of the same size, uint8 (3, H, W)."""

    image: Tensor
    other: Tensor
    resized: bool


def load_pair(samples: NamedImages, reference: NamedImages, resize: bool, indices: tuple[int, int]) -> LoadedPair:
    """Loads a sample and its reference. ValueError: they have other sizes, unless the sample is to be resized."""
    image, other = samples.load(indices[0]), reference.load(indices[1])
    if image.shape == other.shape:
        return LoadedPair(image, other, False)
    if not resize:
        differ = other_sizes(samples, reference, indices, image.shape[1:], other.shape[1:])
        raise ValueError(f"{differ}: pass --resize")
    from torchvision.transforms.v2 import functional as F

    size = list(other.shape[1:])
    return LoadedPair(F.resize(image, size, F.InterpolationMode.BICUBIC, antialias=True), other, True)


@torch.no_grad()
def measure_pair(image: Tensor, other: Tensor, network: nn.Module | None) -> dict[str, float | None]:
    """Returns all METRICS of two images uint8 (3, H, W); None for SSIM and LPIPS of images that are too small."""
    pair, side = (image[None], other[None]), min(image.shape[1:])
    light = luma(pair[0]), luma(pair[1])
    values = {"mse": mse(*pair), "psnr": psnr(*pair), "psnr_y": psnr(*light), "l1": l1(*pair)}
    if side >= WINDOW:
        values |= {"ssim": ssim(*pair), "ssim_y": ssim(*light)}
    if network is not None and side >= MIN_SIDE[network.net]:
        device = next(network.parameters()).device
        values["lpips"] = network(*(to_float(each.to(device)) for each in pair))
    return {metric: values[metric].item() if metric in values else None for metric in METRICS}


def summarize(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns the mean of a metric, None without values, and the number of pairs that it is over; infinite values, the
    PSNR of equal images, are counted apart."""
    finite = [value for value in values if value not in (None, float("inf"))]
    mean = statistics.fmean(finite) if finite else None
    return {"mean": mean, "n": len(finite), "infinite": sum(value == float("inf") for value in values)}


def worst_rows(rows: Sequence[PairRow], metric: str, count: int) -> list[PairRow]:
    """Returns the `count` rows that are worst by a metric, the worst first; rows without a value are left out."""
    defined = [row for row in rows if row.values[metric] is not None]
    return sorted(defined, key=lambda row: row.values[metric], reverse=metric not in HIGHER_IS_BETTER)[:count]


def label_pair(row: PairRow, metric: str, pair: LoadedPair) -> PairOfImages:
    """Returns a pair with its name and a metric, to be drawn."""
    return PairOfImages(f"{row.name}  {metric} {row.values[metric]:.4g}", pair.image, pair.other)


def write_table(path: Path, rows: Sequence[PairRow]) -> None:
    """Writes a CSV file with a line for each pair; a metric that is not defined is empty, and equal images have the
    PSNR inf."""
    with atomic_write(path) as scratch, scratch.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "sample", "reference", "height", "width", *METRICS])
        table.writerows([row.name, *row.files, *row.size, *(row.values[metric] for metric in METRICS)] for row in rows)


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the means, what is left out, and the paths of the files."""
    rows = [("metric", "mean", "pairs", "")]
    for metric, meaning in METRICS.items():
        each = results["metrics"][metric]
        notes = [f"{meaning}; network: {results['lpips_net']}" if metric == "lpips" else meaning]
        notes += [f"{each['infinite']} equal pairs apart"] if each["infinite"] else []
        rows.append((metric, "-" if each["mean"] is None else f"{each['mean']:.4f}", str(each["n"]), "; ".join(notes)))
    lines = [f"\n{results['n_pairs']} pairs", table(rows), ""]
    meanings = {"samples": "samples without a reference", "reference": "references without a sample"}
    for kind, names in results["left_out"].items():
        more = ", ..." if len(names) > NAMED else ""
        what = meanings.get(kind, "pairs that cannot be read")
        lines += [f"left out: {len(names)} {what} ({', '.join(names[:NAMED])}{more})"] if names else []
    lines += [f"{results['resized']} samples were resized to the size of their reference"] if results["resized"] else []
    pictures = [SHEET] if (folder / SHEET).is_file() else []
    return "\n".join([*lines, *(str(folder / name) for name in ("results.json", TABLE, *pictures))])


def folder_flags(words: Sequence[str]) -> list[str]:
    """Returns the command line with flags in place of the two folders that it may begin with."""
    names = ("samples", "reference")
    count = next((i for i, word in enumerate(words[:2]) if word.startswith("-")), min(2, len(words)))
    return [*(f"--{name}={word}" for name, word in zip(names[:count], words[:count], strict=True)), *words[count:]]


if __name__ == "__main__":
    sys.argv[1:] = folder_flags(sys.argv[1:])
    run_script(main, Config, "calc_pairs")
