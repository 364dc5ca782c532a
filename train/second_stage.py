"""How the second stage is trained: what one step does with a batch of codes, and what is looked at on the way."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from diffusion.rng import Streams, seed_of
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data import TrainingCodes, on_device, streams
from train.datasets import Dataset
from train.distributed import World
from train.ema import EMA
from train.generate import FirstStage
from train.logging import Logger
from train.loop import Batch, Metrics, State, optimize, warmed_up
from train.precision import autocast
from train.registry import plugin
from train.transforms import to_float

VALIDATION_IMAGES = 1024  # enough for two digits, and quick
SHOWN_IMAGES = 16


def build_state(
    config: SamplerConfig, training: TrainingConfig, first: FirstStage, n_classes: int, world: World
) -> tuple[Any, State]:
    """The sampler that the config names, for the codes of `first`, and the state that trains its network."""
    torch.manual_seed(training.seed)
    module = plugin("train.samplers", config.sampler, "sampler")
    sampler = module.build(
        config, codes=first.vqgan.quantizer.codebook_size, grid=first.vqgan.grid, n_classes=n_classes
    )
    network = sampler.network.to(world.device)
    world.broadcast(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)
    averages = {"network": EMA(network, training.ema_beta)} if training.ema else {}
    return sampler, State({"network": network}, {"network": optimizer}, averages)


def code_source(
    first: FirstStage, images: Dataset, split: str, data: DataConfig, seed: int, world: World
) -> TrainingCodes:
    """The shuffled codes of one split, from the cache or encoded now."""
    batch_size = max(1, 2**22 // (data.img_size**2 * data.n_channels))  # about 16 MB of float images at once
    table = first.codes(images, split, data, batch_size, world)
    labels = None if images.n_classes == 0 else torch.from_numpy(images.labels)[table.index]
    return TrainingCodes(table.ids, labels, seed)


class SamplerStep:
    """One training step of a sampler's network. A `step_fn` for `fit`."""

    def __init__(self, sampler: Any, training: TrainingConfig, world: World):
        self.sampler, self.training, self.world = sampler, training, world

    def __call__(self, state: State, parts: Sequence[Batch]) -> Metrics:
        network, totals = state.modules["network"].train(), {}
        for batch in parts:
            draw = partial(streams, self.training.seed, batch=batch, device=self.world.device)
            with autocast(self.world.device, self.training.amp):
                loss = self.sampler.loss(network, batch, draw)
            (loss.per_example.mean() / len(parts)).backward()
            for name, value in {"loss": loss.per_example, **loss.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().mean() / len(parts)
        lr = warmed_up(self.training.lr, state.step, self.training.warmup_iters)
        totals["grad_norm"] = optimize(state.optimizers["network"], self.world, lr=lr, clip=self.training.grad_clip)
        totals["perf/lr"] = torch.tensor(lr, device=self.world.device)
        return totals


@torch.no_grad()
def validation_losses(
    sampler: Any, network: torch.nn.Module, codes: TrainingCodes, count: int, training: TrainingConfig, world: World
) -> dict[str, float]:
    """Loss and metrics over the first `count` validation codes, with times and masks that are always the same.

    `network` is in eval mode.
    """
    found = {}
    for positions in torch.arange(count).split(training.batch_size):
        batch = on_device(codes[positions.tolist()], world.device)
        draw = partial(streams, 0, batch=batch, device=world.device)
        with autocast(world.device, training.amp):
            loss = sampler.loss(network, batch, draw)
        for name, value in {"loss": loss.per_example, **loss.metrics}.items():
            found.setdefault(name, []).append(value.float())
    return {name: torch.cat(each).mean().item() for name, each in found.items()}


class SamplerReports:
    """Validation and pictures of samples, as hooks for `fit`."""

    def __init__(
        self, step: SamplerStep, first: FirstStage, validation: TrainingCodes, sampling: SamplingConfig, logger: Logger
    ):
        self.step, self.first, self.validation, self.sampling, self.logger = step, first, validation, sampling, logger

    @torch.no_grad()
    def validate(self, state: State, metrics: Metrics) -> None:
        """The loss on fixed validation codes, times and masks, comparable from step to step and run to run."""
        world, training = self.step.world, self.step.training
        if not world.is_main:
            return
        count = min(len(self.validation.ids), VALIDATION_IMAGES)
        network = state.averaged("network").eval()
        found = validation_losses(self.step.sampler, network, self.validation, count, training, world)
        self.logger.scalars(state.step, {f"val/{name}": value for name, value in found.items()})
        state.modules["network"].train()

    @torch.no_grad()
    def show(self, state: State, metrics: Metrics) -> None:
        """A grid of samples, the same noise each time; the classes in turn."""
        if not self.step.world.is_main:
            return
        sampler, device = self.step.sampler, self.step.world.device
        rng = Streams([seed_of(self.step.training.seed, "show", i) for i in range(SHOWN_IMAGES)], device)
        labels = torch.arange(SHOWN_IMAGES, device=device) % sampler.n_classes if sampler.n_classes else None
        network = state.averaged("network").eval()
        with autocast(device, self.step.training.amp):
            codes = sampler.sample(network, rng, labels=labels, options=self.sampling)
        self.logger.images("samples", state.step, to_float(self.first.decode(codes).cpu()))
        state.modules["network"].train()
