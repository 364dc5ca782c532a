"""Checks the annotations of a data set before anything is trained on them: what there is, and what is wrong.

Needs no trained model. Counts boxes, maps and captions, faults such as boxes outside their image, duplicates, files
without a partner, and draws a contact sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root

from experiments.harness.experiment import FolderConfig
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.report import table
from experiments.harness.results import write_results
from experiments.metrics.annotation_counts import ENCODED_MAPS, AnnotationCounts, guess_encoding
from experiments.metrics.contact_sheet import save_contact_sheet
from models.ranges import COUNT_OR_ZERO, check_ranges
from train.cli.parse import run_script
from train.config import DataConfig
from train.data.loading import build_dataset, fixed_subset
from train.datasets import SPLITS, Dataset, DatasetConfig, UnreadableImage
from train.identity import comparison_identity
from train.progress import Progress
from train.runs import open_run, run_lock

LISTED = 10  # files named of each kind
MOST_CLASSES = 25  # in the printed table; results.json has all
NO_FAULTS = ("crowd", "below")  # counts of boxes that are only special
NOT_COUNTS = {"fields", "notes", "unpaired", "unreadable", "classes", "examples", "duplicates", "encoding"}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check."""

    splits: tuple[str, ...] = SPLITS
    """Splits to check."""
    check_items: int = 2000
    """Items of each split that are read, a fixed random choice; 0: all."""
    small_shares: tuple[float, ...] = (0.002, 0.02)
    """Count boxes smaller than these shares of their image."""
    sheet_items: int = 12
    """Items of the contact sheet; 0: none."""
    sheet_size: int = 384
    """Longer side of an image in the contact sheet, in pixels."""

    EVERYDAY = ("splits", "check_items", "sheet_items")
    RANGES = {
        **{"check_items": COUNT_OR_ZERO, "small_shares": "(0, 1]", "sheet_items": "[0, 200]"},
        **{"sheet_size": "[32, 2048]"},
    }

    def __post_init__(self):
        check_ranges(self)
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"got splits {list(self.splits)}, wanted one or more, each once: pass --splits train val")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks the annotations of a data set; writes results.json and <split>.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/check_data.py --dataset shapes",
        "python experiments/check_data.py --dataset coco --data_dir coco --annotations instances captions",
    )

    check: CheckConfig
    data: DataConfig
    reader: DatasetConfig
    output: FolderConfig


def main(config: Config) -> None:
    output, default = config.output, f"check_data_{config.data.dataset}"
    sets = {split: build_dataset(config.data, config.reader, split) for split in config.check.splits}
    folder = choose_results_folder(output.logs_root, output.log_dir, default, config, {}, comparison_identity)
    with deleted_if_refused(folder), run_lock(folder):
        open_run(folder, config, {}, comparison_identity)
        results: dict[str, Any] = {"dataset": config.data.dataset, "splits": {}}
        digests: dict[str, set[str]] = {}
        for split, dataset in sets.items():
            sheet = folder / f"{split}.png"
            results["splits"][split], digests[split] = check_split(config.check, config.data, split, dataset, sheet)
        if len(digests) > 1:
            results["images in more than one split"] = count_shared(list(digests.values()))
        write_results(folder, results)
    print(report(results))
    pictures = [folder / f"{split}.png" for split in sets if config.check.sheet_items]
    print("\n" + "\n".join(map(str, [folder / "results.json", *pictures])))


def check_split(
    check: CheckConfig, data: DataConfig, split: str, dataset: Dataset, sheet: Path
) -> tuple[dict[str, Any], set[str]]:
    """Counts what a split has and draws its contact sheet. Returns the counts, and the digests of its images.

    ValueError if no item can be read.
    """
    n = len(dataset)
    chosen = sorted(fixed_subset(n, check.check_items or n))
    shown = set(fixed_subset(len(chosen), check.sheet_items))
    counts, unreadable = AnnotationCounts(dataset, check.small_shares), []
    encoded, drawn = {}, []
    with Progress(f"checking {split}", len(chosen), "image") as bar:
        for position, index in enumerate(chosen):
            bar.update()
            try:
                item = dataset[index]
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            counts.add(index, item)
            if "panoptic" in item and len(encoded) < ENCODED_MAPS:
                encoded[index] = item
            if position in shown:
                drawn.append(item)
    if not counts.items:
        first = unreadable[0] if unreadable else "the split is empty"
        raise ValueError(f"none of {n} images of {split} can be read; first error: {first}")
    if drawn:
        options = {"size": check.sheet_size, "n_channels": data.n_channels, "data_range": data.data_range}
        save_contact_sheet(sheet, drawn, counts.names, **options)
    results = {"images": n, "unreadable images": len(unreadable), **counts.results()}
    results |= {"unreadable": unreadable[:LISTED], "notes": list(getattr(dataset, "notes", ()))}
    results["unpaired"] = {what: list(names) for what, names in getattr(dataset, "unpaired", {}).items()}
    results["encoding"] = guess_encoding(dataset, list(encoded), list(encoded.values()))
    return results, set(counts.digests)


def count_shared(digests: Sequence[set[str]]) -> int:
    """Returns how many images are in more than one of some sets of digests."""
    every = [digest for each in digests for digest in each]
    return len(every) - len(set(every))


def report(results: dict[str, Any]) -> str:
    """Formats all counts, by split."""
    splits = results["splits"]
    lines = []
    for split, result in splits.items():
        lines += [f"{split}: {note}" for note in result["notes"]]
        lines += [f"{split}: unreadable: {each}" for each in result["unreadable"]]
        if encoding := result["encoding"]:
            verdict = "possible" if encoding["given"] in encoding["possible"] else "NOT possible"
            guessed = ", ".join(encoding["possible"]) or "none"
            lines.append(f"{split}: panoptic encoding {encoding['given']} is {verdict}; by their colours: {guessed}")
    names = list(dict.fromkeys(name for result in splits.values() for name in result if name not in NOT_COUNTS))
    cells = {name: [each.get(name) for each in splits.values()] for name in names}
    partners = dict.fromkeys(what for result in splits.values() for what in result["unpaired"])
    cells |= {what: [len(each["unpaired"].get(what, ())) for each in splits.values()] for what in partners}
    rows = [("", *splits), *((name, *map(format_count, values)) for name, values in cells.items())]
    lines += ["", table(rows), "", class_report(splits)]
    if "images in more than one split" in results:
        lines += ["", f"images in more than one split: {results['images in more than one split']}"]
    for split, result in splits.items():
        for field in ("panoptic", "semantic"):
            if worst := result.get(f"unlabelled share of {field}"):
                lines.append(f"{split}: most unlabelled in {field}: {worst['image']} ({worst['max']:.0%})")
        lines += [f"{split}: the same image twice: {one}, {other}" for one, other in result["duplicates"]]
        faults = {what: names for what, names in result["examples"].items() if not what.startswith(NO_FAULTS)}
        lines += [f"{split}: {fault}: {', '.join(names)}" for fault, names in faults.items()]
    return "\n".join(lines).strip("\n")


def class_report(splits: dict[str, Any]) -> str:
    """Formats how often each class occurs, the most frequent first; classes that never occur are named below."""
    totals: dict[str, dict[str, list[int]]] = {}
    kinds: dict[str, None] = {}
    for position, result in enumerate(splits.values()):
        for row in result["classes"]:
            of_class = totals.setdefault(row["class"], {})
            for kind, count in row.items():
                if kind != "class":
                    kinds[kind] = None
                    of_class.setdefault(kind, [0] * len(splits))[position] = count
    if not kinds:
        return "no classes"
    by_images = sorted(totals, key=lambda name: -sum(totals[name].get("images", [0])))
    seen = [name for name in by_images if any(map(sum, totals[name].values()))]
    heading = ("class", *(f"{kind} {split}" for kind in kinds for split in splits))
    rows = [
        (name, *(f"{count:,}" for kind in kinds for count in totals[name].get(kind, [0] * len(splits))))
        for name in seen[:MOST_CLASSES]
    ]
    lines = [table([heading, *rows])]
    if len(seen) > MOST_CLASSES:
        lines.append(f"and {len(seen) - MOST_CLASSES} more classes")
    if never := [name for name in by_images if name not in seen]:
        lines.append(f"in no image: {', '.join(never[:LISTED])}{', ...' if len(never) > LISTED else ''} ({len(never)})")
    return "\n".join(lines)


def format_count(value: Any) -> str:
    """Formats a count, a range as smallest / mean / largest, or shares as mean and largest; "-" for None."""
    if value in (None, {}):
        return "-"
    if not isinstance(value, dict):
        return f"{value:,}"
    if "image" in value:
        return f"mean {value['mean']:.1%}, max {value['max']:.1%}"
    least, most = (f"{value[end]:.5g}" if isinstance(value[end], float) else value[end] for end in ("min", "max"))
    return f"{least} / {value['mean']:.1f} / {most}"


if __name__ == "__main__":
    run_script(main, Config, "check_data")
