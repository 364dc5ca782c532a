"""How long a training step of the UNet takes on this machine, and of diffusers' of equal shape: one table."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.table import table  # noqa: E402
from train.cli import run_script  # noqa: E402

HEADS = 4


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Benchmark."""

    channels: int = 128
    """Width of the first level."""
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    """Width of each level, times --channels."""
    res_blocks: int = 3
    """Residual blocks per level on the way down, one more on the way up."""
    attn_factors: tuple[int, ...] = (2, 4)
    """Levels with attention, by how many times smaller than the image they are; 4 heads in the last level."""
    img_size: int = 32
    """Side of the images, pixels."""
    batch_size: int = 8
    """Images per step."""
    repeats: int = 7
    """Counted steps of each kind, after two that are not counted."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""

    def __post_init__(self):
        for name in ("img_size", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Times a UNet's training step: corrupt, forward, hybrid loss with learned variances, backward, clip, AdamW."""

    benchmark: BenchmarkConfig


def main(config: Config) -> None:
    import torch

    from experiments.metrics.cost import machine
    from experiments.metrics.unet_speed import networks, rows, timed, training_steps
    from models.blocks import count_parameters
    from models.unet_config import UNetConfig
    from train.distributed import World, pick_device

    c = config.benchmark
    world = World(pick_device(c.device))
    shape = UNetConfig(
        out_channels=6,  # and a variance for each of 3
        channels=c.channels,
        channel_mults=c.channel_mults,
        res_blocks=c.res_blocks,
        attn_factors=c.attn_factors,
        head_width=max(1, c.channels * c.channel_mults[-1] // HEADS),
    )
    found = networks(shape, c.img_size)
    print(f"{machine(world.device)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{c.batch_size} images of {c.img_size}x{c.img_size} a step, {c.repeats} steps of each kind in turn")
    for name, network in found.items():
        print(f"{name}: {count_parameters(network):,} parameters")
    if "diffusers" not in found:
        print("diffusers is not installed, and left out: pip install diffusers")
    batch = (c.batch_size, 3, c.img_size, c.img_size)
    steps = {(n, kind): step for n in found for kind, step in training_steps(found[n], batch, world).items()}
    if len(steps) == len(found):
        print("bfloat16 is not native to this machine, and left out")
    print(f"\n{table(list(rows(timed(steps, c.repeats), c.batch_size)))}")


if __name__ == "__main__":
    run_script(main, Config, "benchmark_unet")
