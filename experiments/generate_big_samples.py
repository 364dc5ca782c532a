"""Images larger than those a sampler was trained on: one pass over a larger canvas of codes, or windows of its grid."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, sampling_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """Canvas."""

    shape: tuple[int, int] = (32, 16)
    """Height and width in codes."""
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

    def batches():
        for first in range(0, canvas.n_samples, output.batch_size):
            indices = list(range(first, min(first + output.batch_size, canvas.n_samples)))
            codes = trained.sample(
                output.seed,
                indices,
                config.sampling,
                labels=trained.labels(output.seed, indices),
                shape=canvas.shape,
                window_stride=canvas.window_stride,
            )
            yield {"image": trained.first.decode(codes).cpu(), "index": indices}

    for batch in progress(batches(), canvas.n_samples, "sampling"):
        for i, image in zip(batch["index"], batch["image"], strict=True):
            save_grid(folder / f"big_{i:03d}.png", image[None])
    write_results(folder, {"n_samples": canvas.n_samples, "run": to_dict(config)})
    print(f"{canvas.n_samples} images of {canvas.shape[0]} x {canvas.shape[1]} codes: {folder}")


if __name__ == "__main__":
    run_script(main, Config, "generate_big_samples", under=sampling_of_run)
