"""How the second stage is trained: what one step does with a batch, and what is looked at on the way."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.config import SamplerConfig, SamplingConfig, TrainingConfig
from train.data import Draws, Positions, on_device
from train.distributed import World
from train.ema import EMA
from train.logging import Logger
from train.loop import Batch, Metrics, State, optimize, warmed_up
from train.precision import autocast
from train.registry import plugin
from train.spaces import Space
from train.transforms import to_float

Watcher = Callable[[State, dict[str, Tensor]], None]  # at each step, before the weights change

VALIDATION_IMAGES = 1024  # enough for two digits, and quick
SHOWN_IMAGES = 16


def build_state(
    config: SamplerConfig, training: TrainingConfig, space: Space, n_classes: int, world: World
) -> tuple[Any, State]:
    """The sampler that the config names, for x of `space`, and the state that trains its network."""
    torch.manual_seed(training.seed)
    module = plugin("train.samplers", config.sampler, "sampler")
    sampler = module.build(config, **space.facts, n_classes=n_classes)
    network = sampler.network.to(world.device)
    world.broadcast(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True)
    averages = {"network": EMA(network, training.ema_beta)} if training.ema else {}
    return sampler, State({"network": network}, {"network": optimizer}, averages, sampler.extras)


class SamplerStep:
    """One training step of a sampler's network. A `step_fn` for `fit`."""

    def __init__(
        self, sampler: Any, space: Space, training: TrainingConfig, world: World, watchers: Sequence[Watcher] = ()
    ):
        self.sampler, self.space, self.training, self.world = sampler, space, training, world
        self.watchers = watchers

    def __call__(self, state: State, parts: Sequence[Batch]) -> Metrics:
        network, totals, seen = state.modules["network"].train(), {}, []
        for batch in parts:
            draw = Draws(self.training.seed, batch, self.training.batch_size, self.world.device)
            with autocast(self.world.device, self.training.amp):
                loss = self.sampler.loss(network, self.space.prepared(batch), draw)
            (loss.per_example.mean() / len(parts)).backward()
            for name, value in {"loss": loss.per_example, **loss.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.detach().mean() / len(parts)
            seen.append(loss.outputs if self.watchers else {name: loss.outputs[name] for name in ("t", "loss")})
        self.look(state, {name: torch.cat([part[name] for part in seen]) for name in seen[0]})
        lr = warmed_up(self.training.lr, state.step, self.training.warmup_iters)
        totals["grad_norm"] = optimize(state.optimizers["network"], self.world, lr=lr, clip=self.training.grad_clip)
        totals["perf/lr"] = torch.tensor(lr, device=self.world.device)
        return totals

    @torch.no_grad()
    def look(self, state: State, outputs: dict[str, Tensor]) -> None:
        """Shows what was seen and said to the sampler, whose times may depend on it, and to the user's watchers."""
        if self.sampler.extras:
            device = self.world.device
            t, losses = (self.world.gather(outputs[name].float().to(device)) for name in ("t", "loss"))
            self.sampler.observe(t, losses)
        if self.watchers:
            outputs["x0_hat"] = self.sampler.x0_hat(outputs)
            for watch in self.watchers:
                watch(state, outputs)


@torch.no_grad()
def validation_losses(step: SamplerStep, network: torch.nn.Module, source: Positions, count: int) -> dict[str, float]:
    """Loss and metrics over the first `count` validation images, with times and noise that are always the same.

    `network` is in eval mode.
    """
    found, world, training = {}, step.world, step.training
    for positions in torch.arange(count).split(training.batch_size):
        batch = on_device(source[positions.tolist()], world.device)
        draw = Draws(0, batch, len(positions), world.device)  # times spread over the last, smaller batch too
        with autocast(world.device, training.amp):
            loss = step.sampler.loss(network, step.space.prepared(batch), draw)
        for name, value in {"loss": loss.per_example, **loss.metrics}.items():
            found.setdefault(name, []).append(value.float())
    return {name: torch.cat(each).mean().item() for name, each in found.items()}


class SamplerReports:
    """Validation and pictures of samples, as hooks for `fit`."""

    def __init__(self, step: SamplerStep, validation: Positions, sampling: SamplingConfig, logger: Logger):
        self.step, self.validation, self.sampling, self.logger = step, validation, sampling, logger

    @torch.no_grad()
    def validate(self, state: State, metrics: Metrics) -> None:
        """The loss on fixed validation images, times and noise, comparable from step to step and run to run."""
        if not self.step.world.is_main:
            return
        network = state.averaged("network").eval()
        found = validation_losses(self.step, network, self.validation, min(len(self.validation), VALIDATION_IMAGES))
        self.logger.scalars(state.step, {f"val/{name}": value for name, value in found.items()})
        state.modules["network"].train()

    @torch.no_grad()
    def show(self, state: State, metrics: Metrics) -> None:
        """A grid of samples, the same noise each time; the classes in turn, other conditions of validation images."""
        if not self.step.world.is_main:
            return
        sampler, device = self.step.sampler, self.step.world.device
        rng = Streams([seed_of(self.step.training.seed, "show", i) for i in range(SHOWN_IMAGES)], device)
        batch = None
        if set(sampler.fields) == {"label"}:
            batch = {"label": torch.arange(SHOWN_IMAGES, device=device) % sampler.n_classes}
        elif sampler.fields:
            batch = on_device(self.validation[list(range(SHOWN_IMAGES))], device)
        network = state.averaged("network").eval()
        with autocast(device, self.step.training.amp):
            x = sampler.sample(network, rng, batch=batch, options=self.sampling)
        self.logger.images("samples", state.step, to_float(self.step.space.decode(x).cpu()))
        state.modules["network"].train()
