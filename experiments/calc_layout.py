"""How well samples obey the layouts they were drawn for, by judges trained on real scenes of another split.

Reads a samples.npz of experiments/get_samples.py, or measures real scenes. Beside every figure stand that of real
scenes of the same layouts and that of the same images under other images' layouts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import FolderConfig, ModelConfig, hash_files, model_run, peek_settings
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.images import match_data_channels, read_samples
from experiments.harness.report import table
from experiments.harness.results import load_results, write_results
from experiments.metrics.layout import map_obedience
from experiments.metrics.layout.detections import read_detections
from experiments.metrics.layout.judges import (
    VERSION,
    Scenes,
    color_names_of,
    judge_split,
    load_judges,
    load_scenes,
    open_scenes,
    training_indices,
)
from experiments.metrics.layout.layout_pictures import draw_rows, pair_images, save_picture
from experiments.metrics.layout.layouts import BUCKETS, Layouts, join_layouts, read_layout
from experiments.metrics.layout.map_obedience import (
    CLASS,
    COLOR,
    MIOU,
    REGIONS,
    MapFigures,
    estimate_words,
    name_groups,
)
from experiments.metrics.layout.obedience import ALL, OBJECTS, check_judges, open_measurement, wrong_layouts
from models.ranges import SEED, check_ranges
from train.cli.files import read_run_config
from train.cli.parse import BaseSettings, run_script, to_dict
from train.condition_source import Row
from train.config import DataConfig
from train.data.loading import ImageSource, fixed_subset
from train.datasets import DatasetConfig, content_fingerprint
from train.datasets._regions import naming, read_text
from train.datasets.webdataset.store import is_shell_command
from train.files import parse_json
from train.identity import results_identity
from train.layout_files import vocabulary_of
from train.layouts import layouts_provenance, read_layouts
from train.runs import open_run, run_lock
from train.samplers._experts import read_groups

PICTURE = "layouts_samples.png"
REAL = "real"  # as --samples: the real scenes of the layouts
SAMPLES, REAL_SCENES, WRONG = "samples", "real scenes", "wrong layouts"  # what is measured
MEANINGS = {  # of the figures
    "crop accuracy": "objects whose crop is taken for their class, of all classes and nothing",
    "crop FD": "Fréchet distance of crops to real ones, in the classifier's features: lower is better",
    "CAS": "real objects recognised by a classifier trained on these images",
    "colour": "objects of the asked colour",
    "AP": "average precision of a detector, of COCO's rules",
    "spurious": "objects in an image that its layout does not have: lower is better",
    "mIoU": "mean intersection over union of a segmenter's classes; in a bucket, within the boxes",
}


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Obedience to layouts."""

    samples: str = REAL
    """The samples.npz of get_samples.py to measure; real: the real scenes of the layouts, which show the limits."""
    n_images: int = 1000
    """Number of images: of samples the first ones, of real scenes a fixed random subset of the validation split."""
    detections: str | None = None
    """COCO results (JSON) of another detector on these images: adds its average precision."""
    min_judge: float | None = None
    """Share of real crops that the judge must recognise, or the command refuses; by default 0.95 where a data set has
    a split for judges, as shapes, and otherwise twice what it recognises under wrong layouts."""
    class_groups: tuple[str, ...] = ()
    """Groups of classes for which regions of maps are measured apart, as in disc,ring square; by default those of
    --experts of the run that drew the samples."""
    judge_seed: int = 0
    """Random seed of the judges."""

    EVERYDAY = ("samples", "n_images", "detections")
    RANGES = {"n_images": "[2, 1000000000]", "min_judge": "[0, 1]", "judge_seed": SEED}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures how well samples obey their layouts; writes results.json to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_layout.py --dataset shapes --img_size 32",
        "python experiments/calc_layout.py --samples logs/samples_ddpm_shapes_5000/samples.npz",
    )

    layout: LayoutConfig
    data: DataConfig
    reader: DatasetConfig
    output: FolderConfig


class Judged(NamedTuple):
    """What is measured: images, the items whose layouts they were drawn for, and where the data are."""

    name: str
    images: Tensor | None  # uint8 (N, C, H, W); None: the real scenes themselves
    items: list[int]  # of the real scenes, in the validation split: those of the layouts, unless these are given
    source: ImageSource  # of that split
    given: Layouts | None = None  # of the images, which were drawn for layouts that no real scene has
    numbers: Sequence[int] = ()  # (N,) of the given layout that each image has


def main(config: Config) -> None:
    settings, output = config.layout, config.output
    single_process_world("cpu")  # refuses several processes
    source = open_scenes(config.data, config.reader, "val")
    judged = open_samples(settings, source)
    provenance = {"data_fingerprint": content_fingerprint(source.dataset), "judge_version": VERSION}
    files = {"samples": settings.samples, "detections": settings.detections}
    provenance |= {f"{name}_sha256": content for name, content in hash_files(files).items()}
    provenance |= {} if judged.given is None else layouts_provenance(layouts_beside(settings))
    name = f"layout_{judged.name}"
    folder = choose_results_folder(output.logs_root, output.log_dir, name, config, provenance, results_identity)
    with run_lock(folder), deleted_if_refused(folder):
        open_run(folder, config, provenance, results_identity)
        print(f"results: {folder}", flush=True)
        results = load_results(folder)
        if results is None:
            judging = open_scenes(config.data, config.reader, judge_split(config.data))
            cache = Path(output.logs_root).expanduser() / ".cache" / "judges"
            results = measure(settings, judged, judging, cache, folder) | {"run": to_dict(config) | provenance}
            write_results(folder, results)
        print(report(results, folder))


def open_samples(settings: LayoutConfig, source: ImageSource) -> Judged:
    """Opens the images to measure. ValueError: samples without layouts, of other items, or of another size."""
    if settings.samples == REAL:
        data = source.config
        size = "x".join(map(str, data.size))
        items = sorted(fixed_subset(len(source), settings.n_images))
        return Judged(f"{REAL}_{data.dataset}_{size}", None, items, source)
    path = Path(settings.samples).expanduser()
    samples = read_samples(path, source.config.n_channels)
    items = samples.get("held_out")
    if "layout" in samples:
        return open_drawn_layouts(settings, samples, source)
    if items is None:
        raise ValueError(
            f"{path} does not say which layouts its images are of (held_out): write it with get_samples.py from a "
            "model with boxes or maps as conditions, with or without --layouts, but without --condition_file"
        )
    if len(items) != len(samples["image"]) or items.min() < 0 or items.max() >= len(source):
        got = f"{len(items)} numbers from {int(items.min())} to {int(items.max())}"
        raise ValueError(
            f"{path}: got {got} as held_out, wanted {len(samples['image'])} from 0 to {len(source) - 1}: pass the "
            "--dataset, and its options, that the model was trained on"
        )
    images = match_data_channels(samples["image"], source.config)[: settings.n_images].contiguous()
    return Judged(samples_name(path), images, items[: settings.n_images].tolist(), source)


def samples_name(path: Path) -> str:
    """Returns the name of samples: that of their folder, or of the file if it has one of its own."""
    return path.parent.name if path.name == "samples.npz" and path.parent.name else path.stem


def layouts_beside(settings: LayoutConfig) -> Path:
    """Returns the file of layouts beside the samples."""
    return Path(settings.samples).expanduser().with_name("layouts.json")


def open_drawn_layouts(settings: LayoutConfig, samples: dict[str, Tensor], source: ImageSource) -> Judged:
    """Opens samples whose layouts are in the file beside them. ValueError: it does not have them."""
    path, (H, W) = layouts_beside(settings), source.size
    numbers = samples["layout"][: settings.n_images].tolist()
    fields = ("boxes", "box_class")
    with naming(path):
        of_boxes = isinstance(parse_json(read_text(path, "keep it beside the samples")), list)
    if not of_boxes:  # but of COCO's panoptic maps
        fields += ("box_id", "panoptic", "segment_id", "segment_class")
    rows = [layout.row for layout in read_layouts(path, vocabulary_of(source.dataset, fields, source.size))]
    if not of_boxes:
        fields = ("panoptic", "segment_id", "segment_class", "box_id", "box_words")
        worded = read_layouts(path, vocabulary_of(source.dataset, fields, source.size))
        rows = [with_words(row, layout.row) for row, layout in zip(rows, worded, strict=True)]
    images = match_data_channels(samples["image"], source.config)[: settings.n_images].contiguous()
    if len(numbers) != len(images) or not 0 <= min(numbers) <= max(numbers) < len(rows):
        raise ValueError(f"{path} has {len(rows)} layouts, but the samples are of others: draw them with it again")
    sides = torch.tensor([W, H, W, H])
    colors = color_names_of(source)
    parts = [read_layout({**row, "boxes": row["boxes"].as_subclass(Tensor) * sides}, (H, W), colors) for row in rows]
    real = sorted(fixed_subset(len(source), settings.n_images))
    given = join_layouts(parts).take(numbers)
    return Judged(samples_name(Path(settings.samples)), images, real, source, given, numbers)


def with_words(row: Row, worded: Row) -> Row:
    """Returns the fields of a map with the words of its things; those of `worded` are of all its segments."""
    words = dict(zip(worded["box_id"].tolist(), worded["box_words"], strict=True))
    return row | {"box_words": [words[each] for each in row["box_id"].tolist()]}


def measure(settings: LayoutConfig, judged: Judged, judging: ImageSource, cache: Path, folder: Path) -> dict[str, Any]:
    """Trains the judges unless they are in the folder `cache`, measures all figures, and writes PICTURE to `folder`.

    ValueError: the judges do not recognise real scenes well enough, or the layouts are too few or too much alike.
    """
    names, groups = judging.dataset.region_classes, read_class_groups(settings, judging)
    start, cpu = time.perf_counter(), time.process_time()
    judges = load_judges(judging, cache, settings.judge_seed)
    trained = {"seconds_judges": time.perf_counter() - start, "cpu_seconds_judges": time.process_time() - cpu}
    real, images = load_layouts(judged)
    asked, wrong = real.layouts, wrong_layouts(real.layouts, torch.tensor(real.items))
    measurement = open_measurement(judges, judging, settings.judge_seed)
    check = check_judges(measurement, real, wrong, settings.min_judge, judging.config)
    if judged.given is not None:
        asked, wrong = judged.given, wrong_layouts(judged.given, torch.tensor(judged.numbers))
    size, external = tuple(real.images.shape[2:]), None
    if settings.detections is not None:
        external = read_detections(Path(settings.detections), asked.count, measurement.n_classes, size)
    figures = {REAL_SCENES: measurement(real.images, real.layouts, external if images is None else None)}
    if images is not None:
        figures = {SAMPLES: measurement(images, asked, external)} | figures
    figures[WRONG] = measurement(real.images if images is None else images, wrong, external)
    maps = {} if images is None else {SAMPLES: measurement.of_maps(images, asked, groups)}
    maps[REAL_SCENES] = measurement.of_maps(real.images, real.layouts, groups)
    maps[WRONG] = measurement.of_maps(real.images if images is None else images, wrong, groups)
    columns = {} if images is None else {SAMPLES: images}
    columns |= {REAL_SCENES: real.images} if judged.given is None else {}
    rows, headings = pair_images(asked, [*columns.values()]), ("layout", *columns)
    save_picture(folder / PICTURE, draw_rows(rows, size, names, measurement.palette or (), headings))
    return {
        "figures": figures,
        "maps": {kind: each for kind, each in maps.items() if each is not None},
        "check": check,
        "reference_objects": len(measurement.reference.classes) if measurement.reference is not None else 0,
        "n_images": asked.count,
        "n_layouts": len({*(judged.numbers or real.items)}),
        "given_layouts": judged.given is not None,
        "size": list(size),
        "dataset": judging.config.dataset,
        "judge_split": judge_split(judging.config),
        "judge_scenes": len(training_indices(judging)),
        "judge_seed": settings.judge_seed,
        "judges": judges.hashes,
        **trained,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }


def read_class_groups(settings: LayoutConfig, judging: ImageSource) -> dict[str, tuple[int, ...]]:
    """Returns the groups of classes of regions by name. ValueError for classes that the data do not have."""
    names = judging.dataset.region_classes
    groups = read_groups(settings.class_groups, names, "class_groups")
    if wrong := [number for group in groups for number in group if number >= len(names)]:
        raise ValueError(f"got class {wrong[0]} in --class_groups, wanted 0 to {len(names) - 1}")
    return name_groups(groups, names)


def load_layouts(judged: Judged) -> tuple[Scenes, Tensor | None]:
    """Returns the real scene of each image, and the samples, if any. ValueError: a scene cannot be read."""
    distinct = sorted({*judged.items})
    scenes = load_scenes(judged.source, distinct, "real scenes")
    if missing := sorted({*distinct} - {*scenes.items}):
        raise ValueError(f"validation image {missing[0]} cannot be read, whose layout is needed: repair the data")
    row = {item: number for number, item in enumerate(scenes.items)}
    order = [row[item] for item in judged.items]
    return Scenes(scenes.images[order], scenes.layouts.take(order), list(judged.items)), judged.images


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats one table: for each figure the rows of images, for each bucket a column."""
    figures, buckets = results["figures"], (ALL, *BUCKETS)
    kinds = [kind for kind in (SAMPLES, REAL_SCENES, WRONG) if kind in figures]
    rows = [("figure", "", *buckets)]
    for name in figures[kinds[0]][ALL] | figures[REAL_SCENES][ALL]:
        for kind in kinds if name != OBJECTS else kinds[:1]:
            values = [figures[kind][bucket].get(name) for bucket in buckets]
            first = name if kind == kinds[0] else ""
            rows.append((first, "" if name == OBJECTS else kind, *(number(value) for value in values)))
    size = "x".join(map(str, results["size"]))
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in results["judges"].items())
    seconds = f"trained or read in {results['seconds_judges']:.0f} s, all in {results['seconds']:.0f} s"
    images = f"{results['n_images']:,} images of {results['n_layouts']:,} layouts"
    of = "given ones; real scenes of others" if results.get("given_layouts") else "validation split"
    lines = [
        f"{images} of {results['dataset']}, {of}, {size}",
        table(rows),
        *map_lines(results.get("maps", {}), kinds),
        "",
        *(f"{name}: {meaning}" for name, meaning in MEANINGS.items() if name in figures[REAL_SCENES][ALL]),
        "buckets: " + "; ".join(f"{name}: {meaning}" for name, meaning in BUCKETS.items()),
        f"judges: {hashes}; {results['judge_scenes']:,} scenes of the {results['judge_split']} split, seed "
        f"{results['judge_seed']}; {seconds}",
        "",
        str(folder / "results.json"),
        *([str(folder / PICTURE)] if (folder / PICTURE).is_file() else []),  # not of an earlier version
    ]
    return "\n".join(lines)


def map_lines(maps: dict[str, MapFigures], kinds: Sequence[str]) -> list[str]:
    """Formats the table of the regions of maps: for each figure the rows of images, for each group a column. [] without
    maps."""
    kinds = [kind for kind in kinds if kind in maps]
    if not kinds:
        return []
    groups = [*maps[kinds[0]]]
    rows = [("regions of maps", "", *groups)]
    rows.append((REGIONS, "", *(f"{maps[kinds[0]][group][REGIONS]:,}" for group in groups)))
    for name in (CLASS, COLOR, MIOU):
        for kind in kinds if any(maps[kinds[0]][group][name] is not None for group in groups) else ():
            cells = [estimate_words(maps[kind][group][name]) for group in groups]
            rows.append((name if kind == kinds[0] else "", kind, *cells))
    return ["", table(rows), "", *(f"{name}: {meaning}" for name, meaning in map_obedience.MEANINGS.items())]


def number(value: float | None) -> str:
    """Formats a figure: counts as they are, others to three decimals."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def settings_of_samples(argv: list[str], section: str) -> BaseSettings:
    """Returns the data settings of the run that drew the samples, as flag defaults: config.yaml beside them names it.

    None for real scenes, samples of elsewhere, or where --dataset names other data; shell commands never.
    """
    given = peek_settings(argv, section, "samples", "dataset")
    path = Path(given.get("samples", REAL)).expanduser().parent / "config.yaml"
    if given.get("samples", REAL) == REAL or not path.is_file():
        return BaseSettings({})
    content = read_run_config(path)
    model = {key: value for key, value in content.get("model", {}).items() if key in ("sampler", "dataset", "load_dir")}
    root = content.get("output", {}).get("logs_root", FolderConfig.logs_root)
    path = model_run(root, ModelConfig(**model)) / "config.yaml"
    if not path.is_file():
        return BaseSettings({})
    stored = read_run_config(path)
    values = stored.get("data", {}) | stored.get("reader", {})
    if experts := stored.get("sampler", {}).get("experts"):
        values["class_groups"] = experts
    if given.get("dataset", values.get("dataset")) != values.get("dataset"):
        return BaseSettings({})
    return BaseSettings({key: value for key, value in values.items() if not is_shell_command(value)}, path)


if __name__ == "__main__":
    run_script(main, Config, "calc_layout", base_values=settings_of_samples)
