"""Networks on their way to be trained: placed, averaged, spread over processes, given optimizers."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn

from train.config import TrainingConfig
from train.distributed import World
from train.ema import EMA
from train.execution import channels_last, checkpoint_activations, compile_network
from train.loop import HOOK, Hook, State, Stateful
from train.optimizers import make_optimizer
from train.parallel import replicate, shard
from train.power_ema import PowerEMA
from train.precision import LossScale, half_dtype
from train.registry import dotted
from train.tally import Tally


def assemble(
    modules: dict[str, nn.Module],
    training: TrainingConfig,
    world: World,
    *,
    averaged: Sequence[str],
    counters: Sequence[str] = (),
    extras: dict[str, Stateful] | None = None,
) -> State:
    """The state that trains these modules, each with an optimizer of its own name, the same in every process.

    Those in `averaged` are followed by what averages the config asks for.
    """
    for module in modules.values():
        module.to(world.device)
        if in_channels_last(training, world.device):
            channels_last(module)
        world.broadcast(module)
    averages = {name: EMA(modules[name], training.ema_beta) for name in averaged if training.ema}
    profiles = {f"{std}/{name}": PowerEMA(modules[name], std) for name in averaged for std in training.ema_profiles}
    if training.activation_checkpointing:
        for name in averaged:
            checkpoint_activations(modules[name])
    if training.compile:
        for name in averaged:
            compile_network(modules[name])
    if training.parallel == "fsdp" and world.size > 1:
        for module in [*modules.values(), *(a.module for a in [*averages.values(), *profiles.values()])]:
            shard(module, world)
    optimizers = {
        name: make_optimizer(
            training.optimizer,
            module.parameters(),
            lr=training.lr,
            weight_decay=training.weight_decay,
            betas=training.betas,
        )
        for name, module in modules.items()
    }
    replicas = {name: replicate(module, world) for name, module in modules.items()}
    extras = dict(extras or {})
    if training_dtype(training, world.device) == torch.float16:
        extras["loss_scale"] = LossScale()
    tallies = {name: Tally(world) for name in ("metrics", *counters)}
    return State(modules, optimizers, averages, profiles, extras, tallies, replicas=replicas)


def training_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype:
    """What matrix products of the forward pass are computed in."""
    half = half_dtype(device, training.amp_dtype) if training.amp else None
    return torch.float32 if half is None else half


def in_channels_last(training: TrainingConfig, device: torch.device) -> bool:
    """Whether convolutions are given images channels last; ValueError together with shards, which it does not suit."""
    if training.parallel == "fsdp":
        if training.channels_last == "yes":
            raise ValueError("got --channels_last yes with --parallel fsdp, whose shards are rows: leave it out")
        return False
    if training.channels_last == "auto":
        return device.type == "cuda" and training_dtype(training, device) != torch.float32
    return training.channels_last == "yes"


def make_hooks(paths: Sequence[str], state: State) -> list[tuple[str, int, Hook]]:
    """The user's own hooks, called after every step, or every `hook.every` steps.

    A class is made without arguments. A hook with `state_dict` and `load_state_dict` is saved and resumed with the run.
    """
    hooks = []
    for path in paths:
        found: Callable = dotted(path, "--hooks")
        hook = found() if inspect.isclass(found) else found
        if not callable(hook):
            raise ValueError(f"got --hooks {path}, whose objects have no __call__(self, state, outputs): give it one")
        if hasattr(hook, "state_dict"):
            state.extras[f"{HOOK}{path}"] = hook
        hooks.append(("hooks", getattr(hook, "every", 1), hook))
    return hooks
