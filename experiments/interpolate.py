"""Walks from one image to another: mixed, forgotten in part, and drawn again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
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
from train.cli.parse import run_script, to_dict
from train.config import SamplingConfig
from train.inference import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class PairsConfig(GivenConfig):
    """Images to begin from, two for each walk."""

    n_images: int = 16
    """So many held-out images, drawn at random, always the same."""

    def __post_init__(self):
        super().__post_init__()
        if self.n_images % 2 or len(self.image) % 2:
            got = f"{len(self.image)} images" if self.image else f"n_images {self.n_images}"
            raise ValueError(f"got {got}, wanted pairs: name two as --image A B, or pass an even --n_images")


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """The walk."""

    points: int = 7
    """Images on it, both ends included."""
    strength: float = 0.5
    """How much of a mixture is forgotten before it is drawn, 0 to 1: the share of its codes, or of noise put on it."""
    label: int | None = None
    """The class the model is told; left out it is told none, and guidance is 1."""

    def __post_init__(self):
        check_strength(self.strength)
        if self.points < 2:
            raise ValueError(f"got points {self.points}, wanted at least 2, the ends: pass --points N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Interpolates between images; interpolated.png (first | the walk | second), images/ and results.json lie in
    <logs_root>/<log_dir>."""

    given: PairsConfig
    path: PathConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        check_label(trained, config.path.label, config.sampling)
        given = given_images(config.given.image, config.given.n_images, trained)
        folder = open_results("interpolated", config, trained, {"given_images": given.fingerprint})
        found = saved_report(folder, world) or interpolate(config, trained, given, folder)
        if found is not None:
            asked = f"{found['n_pairs']} pairs, {100 * found['strength']:.0f} % forgotten"
            print(f"\n{asked}\n{path_in_words(found)}\n\n{folder / 'interpolated.png'}\n{folder / 'images'}")


def interpolate(config: Config, trained: TrainedSampler, given: Given, folder: Path) -> dict[str, Any] | None:
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


if __name__ == "__main__":
    run_script(main, Config, "interpolate", under=settings_of_run)
