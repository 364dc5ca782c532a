"""Fills in what is hidden of images: by a mask, by their transparency, half of them, or what lies around them."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.editing_config import GivenConfig  # noqa: E402
from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Inpainting."""

    mask: tuple[str, ...] = ()
    """Masks, white where an image is to be filled in, of any size: one for all, or one for each. Left out, an image is
    filled in where it is transparent."""
    hide: Literal["left", "right", "top", "bottom", "centre"] | None = None
    """Hide this half (centre: a quarter) as well; held-out images: bottom, if nothing else is asked."""
    outpaint: tuple[int, int, int, int] | None = None
    """Draw what lies beyond the top, right, bottom and left, so far: in codes or latents, or in pixels of models of
    pixels."""
    shape: tuple[int, int] | None = None
    """Instead: a canvas of this height and width, in the same units, with the image in its middle."""
    window_stride: int | None = None
    """Codes from one window of a larger canvas to the next; left out, see generate_big_samples.py."""
    label: int | None = None
    """The class the model is told; left out it is told none, and guidance is 1."""
    results: int = 4
    """Results of each image."""
    paste: bool = True
    """Put the visible pixels back as they were given; else as the model renders them."""

    def __post_init__(self):
        if self.results < 1:
            raise ValueError(f"got results {self.results}, wanted at least 1: pass --results N")
        if self.outpaint is not None and (self.shape is not None or min(self.outpaint) < 0):
            raise ValueError(f"got outpaint {self.outpaint}, shape {self.shape}: pass one of them, no number below 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Inpaints images; inpainted.png (before | hidden in grey | results), images/ and results.json lie in
    <logs_root>/<log_dir>. Where the data set has a classifier, it says how often its answer survives."""

    given: GivenConfig
    inpainting: InpaintingConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.editing import check_label
    from experiments.experiment import load_model, open_results
    from experiments.inpainting import canvas_of, inpaint, inputs, told_in_words
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world

    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        check_label(trained, config.inpainting.label, config.sampling)
        given = inputs(config, trained)
        how = {"shape": canvas_of(given, trained), "window_stride": config.inpainting.window_stride}
        folder = open_results("inpainted", config, trained, {"given_images": given.fingerprint}, **how)
        found = saved_report(folder, world) or inpaint(config, trained, given, folder)
        if found is not None:
            print(f"\n{told_in_words(found)}\n\n{folder / 'inpainted.png'}\n{folder / 'images'}")


if __name__ == "__main__":
    run_script(main, Config, "inpaint", under=settings_of_run)
