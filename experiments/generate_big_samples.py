"""Images larger than those a sampler was trained on: one pass over a larger canvas of codes, or windows of its grid."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """Canvas."""

    shape: tuple[int, int] = (32, 16)
    """Height and width in codes or latents, or in pixels of models of pixels."""
    window_stride: int | None = None
    """Codes from one window to the next; left out, the whole canvas at once where positions are relative, else half the
    grid."""
    n_samples: int = 4
    """Number of images."""

    def __post_init__(self):
        if min(self.shape) < 1 or self.n_samples < 1:
            raise ValueError(f"got shape {self.shape}, n_samples {self.n_samples}: wanted at least 1 of each")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples larger canvases; each becomes <logs_root>/<log_dir>/big_<number>.png, which holds its settings."""

    canvas: CanvasConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.big_samples import cost_table, sample
    from experiments.experiment import load_model, open_results
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world

    canvas = config.canvas
    how = {"shape": canvas.shape, "window_stride": canvas.window_stride}
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        folder = open_results("big_samples", config, trained, **how)
        results = saved_report(folder, world) or sample(config, trained, folder)
        if results is not None:
            size = " x ".join(map(str, canvas.shape))
            print(f"\n{canvas.n_samples} images of {size}\n{cost_table(results)}\n\n{folder}")


if __name__ == "__main__":
    run_script(main, Config, "generate_big_samples", under=settings_of_run)
