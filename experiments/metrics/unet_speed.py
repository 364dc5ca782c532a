"""Speed of a training step of the UNet, beside diffusers' UNet of the same shape: a table of seconds per step."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion.gaussian import GaussianDiffusion, cosine
from diffusion.rng import Streams
from experiments.harness.report import table, three_digits
from experiments.metrics.cost import WARM_UPS, count_launches
from experiments.metrics.speed_results import COUNTS, Row, timing_row
from experiments.metrics.throughput import launch_counts
from models.blocks import count_parameters
from models.ranges import MILLION, SIZE, check_ranges
from models.unet import UNet, UNetConfig
from train.distributed import DistContext
from train.execution import autocast, has_native_bf16
from train.loop import TrainState
from train.optim import clip_and_step

HEADS = 4
PROCESS = GaussianDiffusion(cosine(1000), variance="learned_range")
Step = Callable[[], Tensor]  # runs one training step and returns its loss, possibly still being computed


@dataclass(frozen=True, kw_only=True)
class UNetBenchmarkConfig:
    """Benchmark."""

    channels: int = 128
    """Channels of the first level."""
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, as multiples of --channels."""
    res_blocks: int = 3
    """Residual blocks per level of the down path; the up path has one more."""
    attn_factors: tuple[int, ...] = (2, 4)
    """Downsampling factors of the levels with attention; 4 heads in the last level."""
    img_size: int = 32
    """Side of the images, in pixels."""
    batch_size: int = 8
    """Images per step."""
    repeats: int = 7
    """Timed steps of each kind, after two warm-ups."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""

    EVERYDAY = (
        "channels",
        "channel_mults",
        "res_blocks",
        "attn_factors",
        "img_size",
        "batch_size",
        "repeats",
        "device",
    )
    RANGES = {name: UNetConfig.RANGES[name] for name in ("channels", "channel_mults", "res_blocks", "attn_factors")}
    RANGES |= {"img_size": SIZE, "batch_size": MILLION, "repeats": MILLION}

    def __post_init__(self):
        check_ranges(self)


def measure_unet(settings: UNetBenchmarkConfig, world: DistContext) -> list[Row]:
    """Times the UNet's training step: noising, forward, hybrid loss, backward, clipping, AdamW; prints a table."""
    c = settings
    shape = UNetConfig(
        out_channels=6,  # 3 predictions and 3 variances
        channels=c.channels,
        channel_mults=c.channel_mults,
        res_blocks=c.res_blocks,
        attn_factors=c.attn_factors,
        head_width=1,  # until the widths are checked
    )
    shape = replace(shape, head_width=max(1, shape.widths[-1] // HEADS))
    unets = networks(shape, c.img_size)
    print(f"UNets: {c.batch_size} images of {c.img_size}x{c.img_size} per step, {c.repeats} steps, interleaved")
    for name, network in unets.items():
        print(f"{name}: {count_parameters(network):,} parameters")
    if "diffusers" not in unets:
        print("diffusers skipped: not installed (pip install diffusers)")
    batch = (c.batch_size, 3, c.img_size, c.img_size)
    steps = {(n, kind): step for n in unets for kind, step in training_steps(unets[n], batch, world).items()}
    if len(steps) == len(unets):
        print("bfloat16 skipped: no native support on this machine")
    rows = time_steps(steps, c.repeats, world.device)
    print(f"\n{table(list(table_rows(rows, c.batch_size)))}")
    return [row | {"images": c.batch_size} for row in rows]


def networks(config: UNetConfig, img_size: int) -> dict[str, nn.Module]:
    """Builds our UNet, and diffusers' if it is installed."""
    unets = {"ours": UNet(config)}
    if importlib.util.find_spec("diffusers") is not None:
        unets["diffusers"] = diffusers_unet(config, img_size)
    return unets


def diffusers_unet(config: UNetConfig, img_size: int) -> nn.Module:
    """Builds diffusers' network of the same shape; like ours with `head_width`, all its heads have the same width."""
    from diffusers import UNet2DModel

    attends = [factor in config.attn_factors for factor in config.factors]
    groups = math.gcd(32, *config.widths)
    return UNet2DModel(
        sample_size=img_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.res_blocks,
        block_out_channels=tuple(config.widths),
        down_block_types=tuple("AttnDownBlock2D" if attn else "DownBlock2D" for attn in attends),
        up_block_types=tuple("AttnUpBlock2D" if attn else "UpBlock2D" for attn in reversed(attends)),
        attention_head_dim=config.head_width,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # without it, the attention of the middle block has no norm
        dropout=config.dropout,
    )


def training_steps(network: nn.Module, shape: tuple[int, ...], world: DistContext) -> dict[str, Step]:
    """Returns a training step of the network per precision (shared weights); bfloat16 only with native support."""
    network = network.to(world.device).train()
    state = TrainState({"network": network}, {"network": torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)})
    step = partial(training_step, network, state, shape, Streams(list(range(shape[0])), world.device), world)
    precisions = {"float32": False} | ({"bfloat16": True} if has_native_bf16(world.device) else {})
    return {name: partial(step, amp) for name, amp in precisions.items()}


def training_step(
    network: nn.Module,
    state: TrainState,
    shape: tuple[int, ...],
    rng: Streams,
    world: DistContext,
    amp: bool,
) -> Tensor:
    """Runs one training step: noising, forward, hybrid loss, backward, clipping, AdamW."""
    x0, noise, t = rng.normal(shape).clamp(-1, 1), rng.normal(shape), PROCESS.times(rng).cpu()
    with autocast(world.device, amp):
        output = network(PROCESS.corrupt(x0, t, noise), PROCESS.network_time(t).to(world.device))
    output = output if isinstance(output, Tensor) else output.sample  # diffusers returns an output object
    loss = PROCESS.loss(output, x0, noise, t, "hybrid").per_example.mean()
    loss.backward()
    clip_and_step(state, ["network"], world, lr=1e-4, clip=1.0)
    return loss.detach()


def time_steps(steps: dict[tuple[str, str], Step], repeats: int, device: torch.device) -> list[Row]:
    """Times `repeats` runs of each step after warm-ups, interleaved so that disturbances affect all alike."""
    seconds = {name: [] for name in steps}
    for i in range(WARM_UPS + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step().item()  # waits for the device
            if i >= WARM_UPS:
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, step in steps.items():
        with count_launches(device) as launches:
            step()
        rows.append(timing_row(f"unet step, {', '.join(name)}", seconds[name], **launch_counts(launches, device)))
    return rows


def table_rows(rows: list[Row], images: int) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the table: a heading, then each kind of step; the first is ours in float32."""
    counts = [name for name in COUNTS if name in rows[0]]
    yield ("network", "precision", "median s/step", "min s", "max s", "images/s", "speedup over our float32", *counts)
    for row in rows:
        spread = (f"{row[name]:.3f}" for name in ("seconds", "min_seconds", "max_seconds"))
        rates = f"{images / row['seconds']:.2f}", f"{rows[0]['seconds'] / row['seconds']:.2f}x"
        yield *row["workload"].split(", ")[1:], *spread, *rates, *(three_digits(row[name]) for name in counts)
