"""Images through a trained VQGAN and back: originals, reconstructions and error maps, at any size."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.first_stage_experiment import (  # noqa: E402
    FirstStageModelConfig,
    FirstStageOutputConfig,
    settings_of_vqgan_run,
)
from train.cli import run_script  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstruction."""

    images: str | None = None
    """An image, or a folder of images in any tree; left out, validation images as the VQGAN was trained on them."""
    n_images: int | None = None
    """The first so many; left out, all of --images, 16 validation images."""
    size: int | None = None
    """Resize the short side to this many pixels; left out, images of --images keep their own size."""
    tile: int | None = None
    """Side of the tiles that larger images are cut into, codes; left out, as large as the images trained on."""
    overlap: int | None = None
    """What neighbouring tiles share, codes; left out, a quarter of a tile."""
    batch_size: int = 1
    """Tiles computed at once: memory grows with it."""
    compare_whole: bool = False
    """Also reconstruct each image whole, and say how far its tiles are from that; memory grows with the image."""

    def __post_init__(self):
        for name in ("n_images", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"got {name} {value}, wanted at least 1: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reconstructs images; overview.png, images/<name>.png and results.json lie in <logs_root>/<log_dir>."""

    reconstruction: ReconstructionConfig
    model: FirstStageModelConfig
    output: FirstStageOutputConfig


def main(config: Config) -> None:
    from experiments.first_stage_experiment import load_vqgan, open_vqgan_results
    from experiments.metrics.reconstructed_images import (
        find_originals,
        print_results,
        reconstruct,
        saved_results,
        tiles_of,
    )
    from experiments.processes import only_process

    wanted, output = config.reconstruction, config.output
    world = only_process(output.device)
    first = load_vqgan(config.model, output.logs_root, world.device, output.amp)
    tiles, originals = tiles_of(wanted, first), find_originals(wanted, first)
    name = "reconstructions" if wanted.images is None else f"reconstructions_{Path(wanted.images).resolve().stem}"
    folder = open_vqgan_results(name, config, first, {"image_files": originals.fingerprint}, world)
    print_results(saved_results(folder) or reconstruct(wanted, tiles, first, originals, folder), folder)


if __name__ == "__main__":
    run_script(main, Config, "reconstruct", under=settings_of_vqgan_run)
