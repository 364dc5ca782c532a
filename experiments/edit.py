"""Changes the class of images: a share of each is forgotten, and drawn again under another class."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.editing_config import GivenConfig, check_strength  # noqa: E402
from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


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
    from experiments.experiment import load_model, open_results
    from experiments.given_images import given_images
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world
    from experiments.redrawing import asked_labels, edit, edits_in_words

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        labels = asked_labels(config, trained)
        given = given_images(config.given.image, config.given.n_images, trained)
        folder = open_results("edited", config, trained, {"given_images": given.fingerprint})
        found = saved_report(folder, world) or edit(config, labels, trained, given, folder)
        if found is not None:
            asked = f"{found['n_images']} images, {100 * found['strength']:.0f} % forgotten"
            print(f"\n{asked}\n{edits_in_words(found)}\n\n{folder / 'edited.png'}\n{folder / 'images'}")


if __name__ == "__main__":
    run_script(main, Config, "edit", under=settings_of_run)
