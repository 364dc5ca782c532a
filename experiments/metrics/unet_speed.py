"""Training steps of this project's UNet and of one of equal shape in diffusers, timed in turn."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.gaussian import GaussianDiffusion
from diffusion.rng import Streams
from diffusion.schedules import cosine
from experiments.metrics.cost import WARM_UPS
from models.unet import UNet
from models.unet_config import UNetConfig
from train.distributed import World
from train.loop import State
from train.precision import autocast, has_native_bf16
from train.update import update

Step = Callable[[], Tensor]  # one training step -> its loss, which the device may still be computing
PROCESS = GaussianDiffusion(cosine(1000), variance="learned_range")


def networks(config: UNetConfig, img_size: int) -> dict[str, nn.Module]:
    """Ours, and diffusers' where it is installed."""
    found = {"ours": UNet(config)}
    if importlib.util.find_spec("diffusers") is not None:
        found["diffusers"] = in_diffusers(config, img_size)
    return found


def in_diffusers(config: UNetConfig, img_size: int) -> nn.Module:
    """diffusers' network of the same shape: heads of one width, as `head_width` makes ours."""
    from diffusers import UNet2DModel

    attends = [factor in config.attn_factors for factor in config.factors]
    groups = math.gcd(32, *config.widths)
    return UNet2DModel(
        sample_size=img_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.res_blocks,
        block_out_channels=tuple(config.widths),
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        attention_head_dim=config.head_width,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # left out, the attention in the middle has no norm
        dropout=config.dropout,
    )


def training_steps(network: nn.Module, shape: tuple[int, ...], world: World) -> dict[str, Step]:
    """A step of one network by precision, which share its weights; bfloat16 where the machine computes it natively."""
    network = network.to(world.device).train()
    state = State({"network": network}, {"network": torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)})
    step = partial(training_step, network, state, shape, Streams(list(range(shape[0])), world.device), world)
    precisions = {"float32": False} | ({"bfloat16": True} if has_native_bf16(world.device) else {})
    return {name: partial(step, amp) for name, amp in precisions.items()}


def training_step(
    network: nn.Module,
    state: State,
    shape: tuple[int, ...],
    rng: Streams,
    world: World,
    amp: bool,
) -> Tensor:
    """Corrupt, forward, the hybrid loss, backward, clip, AdamW."""
    x0, noise, t = rng.normal(shape).clamp(-1, 1), rng.normal(shape), PROCESS.times(rng).cpu()
    with autocast(world.device, amp):
        output = network(PROCESS.corrupt(x0, t, noise), PROCESS.network_time(t).to(world.device))
    output = output if isinstance(output, Tensor) else output.sample  # diffusers names what it returns
    loss = PROCESS.loss(output, x0, noise, t, "hybrid").per_example.mean()
    loss.backward()
    update(state, ["network"], world, lr=1e-4, clip=1.0)
    return loss.detach()


def timed(steps: dict[tuple[str, str], Step], repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of `repeats` runs of each, after some that do not count; in turn, so that noise hits all alike."""
    seconds = {name: [] for name in steps}
    for i in range(WARM_UPS + repeats):
        for name, step in steps.items():
            begun = time.perf_counter()
            step().item()  # waits for the device
            if i >= WARM_UPS:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def rows(seconds: dict[tuple[str, str], list[float]], images: int) -> Iterator[tuple[str, ...]]:
    """Of a table for people: a heading, and each kind of step against our float32."""
    yield "network", "precision", "median s/step", "min", "max", "images/s", "against our float32"
    medians = {name: torch.tensor(times, dtype=torch.float64).quantile(0.5).item() for name, times in seconds.items()}
    for name, times in seconds.items():
        spread = (f"{medians[name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}", f"{images / medians[name]:.2f}")
        yield *name, *spread, f"{medians['ours', 'float32'] / medians[name]:.2f}x"
