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
    """Codes between windows; if left out, the whole canvas at once where positions are relative, else half the grid."""
    n_samples: int = 4
    """Number of images."""

    def __post_init__(self):
        if min(self.shape) < 1 or self.n_samples < 1:
            raise ValueError(f"got shape {self.shape}, n_samples {self.n_samples}: wanted at least 1 of each")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Samples larger canvases; each becomes <logs_root>/<log_dir>/big_<number>.png."""

    canvas: CanvasConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results, write_results
    from experiments.images import save_grid
    from experiments.progress import progress
    from train.cli import to_dict

    trained = load_model(config.model, config.output)
    folder = open_results("big_samples", config, trained)
    canvas, output = config.canvas, config.output

    batches = trained.sample(
        canvas.n_samples,
        output.seed,
        config.sampling,
        batch_size=output.batch_size,
        shape=canvas.shape,
        window_stride=canvas.window_stride,
    )
    written = 0
    for batch in progress(batches, canvas.n_samples, "sampling"):
        for image in batch["image"]:
            save_grid(folder / f"big_{written:03d}.png", image[None])
            written += 1
    write_results(folder, {"n_samples": canvas.n_samples, "run": to_dict(config)})
    print(f"{canvas.n_samples} images of {canvas.shape[0]} x {canvas.shape[1]}: {folder}")


if __name__ == "__main__":
    run_script(main, Config, "generate_big_samples", under=settings_of_run)
