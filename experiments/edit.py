"""Changes the class of images: a share of each is forgotten, and drawn again under another class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from experiments.harness.batches import experiment_world, forget
from experiments.harness.editing import (
    Given,
    GivenConfig,
    check_label,
    check_strength,
    distance,
    draw,
    encoded,
    forgotten,
    given_images,
    in_batches,
    save_pictures,
    save_rows,
)
from experiments.harness.experiment import (
    ModelConfig,
    OutputConfig,
    load_model,
    open_results,
    saved_report,
    settings_of_run,
    write_results,
)
from experiments.harness.report import table
from experiments.metrics.classifier import Share, agreement, answers, classifier_of
from train.cli.parse import run_script, to_dict
from train.config import SamplingConfig
from train.inference import TrainedSampler

MOST = 10  # classes that are tried where none is named


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """Editing."""

    label: tuple[int, ...] = ()
    """The classes that each image is redrawn as; left out, all (the first ten)."""
    strength: float = 0.7
    """How much of an image is forgotten first, above 0 and up to 1: the share of its codes, or of noise put on it."""

    def __post_init__(self):
        check_strength(self.strength, least="0 changes nothing")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Redraws images as other classes; edited.png (original | as each class), images/ and results.json lie in
    <logs_root>/<log_dir>. Where the data set has a classifier, it says how often it sees the class asked for."""

    given: GivenConfig
    editing: EditingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        labels = asked_labels(config, trained)
        given = given_images(config.given.image, config.given.n_images, trained)
        folder = open_results("edited", config, trained, {"given_images": given.fingerprint})
        found = saved_report(folder, world) or edit(config, labels, trained, given, folder)
        if found is not None:
            asked = f"{found['n_images']} images, {100 * found['strength']:.0f} % forgotten"
            print(f"\n{asked}\n{edits_in_words(found)}\n\n{folder / 'edited.png'}\n{folder / 'images'}")


def asked_labels(config: Config, trained: TrainedSampler) -> list[int]:
    """The classes that images are redrawn as. ValueError where the model does not know them."""
    if not trained.sampler.n_classes:
        raise ValueError(f"{trained.run} was trained without classes: edit by inpaint.py, or pass another --load_dir")
    labels = list(config.editing.label) or list(range(min(trained.sampler.n_classes, MOST)))
    for label in labels:
        check_label(trained, label, config.sampling)
    return labels


def edit(
    config: Config, labels: list[int], trained: TrainedSampler, given: Given, folder: Path
) -> dict[str, Any] | None:
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


if __name__ == "__main__":
    run_script(main, Config, "edit", under=settings_of_run)
