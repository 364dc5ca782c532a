"""Images forgotten in part and drawn again: under another class, or between two of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from experiments.editing import check_label, distance, draw, in_batches, save_pictures, save_rows
from experiments.experiment import write_results
from experiments.given_images import Given
from experiments.kept import forget
from experiments.metrics.survival import Share, agreement, answers, classifier_of
from experiments.table import table
from train.cli import to_dict
from train.generate import TrainedSampler
from train.start import Start

MOST = 10  # classes that are tried where none is named


def forgotten(x0: Tensor, trained: TrainedSampler, strength: float) -> Start:
    """Nothing is kept for certain; `strength` of it is forgotten."""
    grid = x0.shape[-2:]
    return Start(x0, torch.zeros(len(x0), *grid, dtype=torch.bool, device=trained.device), strength)


def encoded(images: Tensor, trained: TrainedSampler) -> Tensor:
    """Images (B, C, H, W) uint8 in the sampler's space."""
    images = images.to(trained.device)
    return trained.space.begun(images, torch.zeros_like(images[:, 0], dtype=torch.bool)).x0


def asked_labels(config: Any, trained: TrainedSampler) -> list[int]:
    """The classes that images are redrawn as. ValueError where the model does not know them."""
    if not trained.sampler.n_classes:
        raise ValueError(f"{trained.run} was trained without classes: edit by inpaint.py, or pass another --load_dir")
    labels = list(config.editing.label) or list(range(min(trained.sampler.n_classes, MOST)))
    for label in labels:
        check_label(trained, label, config.sampling)
    return labels


def edit(config: Any, labels: list[int], trained: TrainedSampler, given: Given, folder: Path) -> dict[str, Any] | None:
    """The pictures, results.json and its content, in the main process; the others take part."""
    strength = config.editing.strength

    def redrawn(places: list[int]) -> Tensor:
        rows = [place // len(labels) for place in places]  # an image forgets the same whatever it becomes
        start = forgotten(encoded(given.image[rows], trained), trained, strength)
        return draw(trained, config, start, rows, [labels[place % len(labels)] for place in places])

    made = in_batches("edited", len(given) * len(labels), redrawn, config, trained, folder)
    if made is None:
        return None
    made = made.view(len(given), len(labels), *made.shape[1:])
    run = to_dict(config) | {"step": trained.step} | trained.origin
    save_pictures(folder, given.names, made, [f"as_{label}" for label in labels], run)
    save_rows(folder / "edited.png", given.image, made)
    classifier = classifier_of(trained.data)
    found = {"n_images": len(given), "strength": strength, "labels": [], "of_label": []}
    for k, label in enumerate(labels):
        row = {"distance": distance(given.image, made[:, k])}
        if classifier is not None:
            answer = answers(classifier, made[:, k : k + 1])
            row["asked"] = agreement(torch.full((len(given),), label), answer)._asdict()
            row["stays"] = agreement(answers(classifier, given.image), answer)._asdict()
        found["labels"].append(label)
        found["of_label"].append(row)
    write_results(folder, found | {"run": run})
    forget(folder)
    return found


def edits_in_words(found: dict[str, Any]) -> str:
    judged = "asked" in found["of_label"][0]
    rows = [("redrawn as", "distance", *(("classifier sees it", "classifier sees what it was") if judged else ()))]
    for label, row in zip(found["labels"], found["of_label"], strict=True):
        shares = [str(Share(**row[name])) for name in ("asked", "stays")] if judged else []
        rows.append((str(label), f"{100 * row['distance']:.1f} %", *shares))
    return table(rows)


def interpolate(config: Any, trained: TrainedSampler, given: Given, folder: Path) -> dict[str, Any] | None:
    """Between images 0 and 1, 2 and 3, ...: the pictures, results.json and its content, in the main process."""
    points, strength, label = config.path.points, config.path.strength, config.path.label
    pairs = len(given) // 2

    def between(places: list[int]) -> Tensor:
        rows, shares = [place // points for place in places], [place % points / (points - 1) for place in places]
        ends = [encoded(given.image[[2 * row + side for row in rows]], trained) for side in (0, 1)]
        x0 = []
        for i, (row, share) in enumerate(zip(rows, shares, strict=True)):  # all of a pair's points share its noise
            rng = Streams([seed_of(config.output.seed, "between", row)], trained.device)
            x0.append(trained.space.between(ends[0][i : i + 1], ends[1][i : i + 1], share, rng))
        start = forgotten(torch.cat(x0), trained, strength)
        return draw(trained, config, start, rows, None if label is None else [label] * len(places))

    made = in_batches("interpolated", pairs * points, between, config, trained, folder)
    if made is None:
        return None
    made = made.view(pairs, points, *made.shape[1:])
    first, last = given.image[0 : 2 * pairs : 2], given.image[1 : 2 * pairs : 2]
    run = to_dict(config) | {"step": trained.step} | trained.origin
    names = tuple(f"{given.names[2 * i]}_{Path(given.names[2 * i + 1]).stem}" for i in range(pairs))
    save_pictures(folder, names, made, [str(k) for k in range(points)], run)
    save_rows(folder / "interpolated.png", first, made, last)
    found = {"n_pairs": pairs, "strength": strength, "points": []}
    for k in range(points):
        row = {
            "share": k / (points - 1),
            "to_first": distance(made[:, k], first),
            "to_last": distance(made[:, k], last),
        }
        found["points"].append(row | {"to_next": distance(made[:, k], made[:, k + 1]) if k + 1 < points else None})
    write_results(folder, found | {"run": run})
    forget(folder)
    return found


def path_in_words(found: dict[str, Any]) -> str:
    rows = [("share of the second", "distance to the first", "to the second", "to the next point")]
    for row in found["points"]:
        numbers = (
            "" if row[name] is None else f"{100 * row[name]:.1f} %" for name in ("to_first", "to_last", "to_next")
        )
        rows.append((f"{100 * row['share']:.0f} %", *numbers))
    return table(rows)
