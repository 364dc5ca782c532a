"""Exponential moving averages of a network's weights during training."""

import copy
from collections.abc import Collection, Iterator
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.distributed import is_sharded, local_shard

MAX_GROUP_ELEMENTS = 2**24  # bounds the temporary memory of a fused operation


class TensorGroup(NamedTuple):
    """Pairs of tensors for one fused operation; the tensors of each list share a dtype and a device."""

    averaged: bool  # otherwise copied: buffers and integer parameters
    ema: list[Tensor]
    source: list[Tensor]

    def local_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the local shards of each pair; averaged sources are cast to the dtype and device of the average."""
        ema, source = [local_shard(e) for e in self.ema], [local_shard(s) for s in self.source]
        if self.averaged and (ema[0].dtype, ema[0].device) != (source[0].dtype, source[0].device):
            cast = [torch.empty_like(e) for e in ema]
            torch._foreach_copy_(cast, source)
            return ema, cast
        return ema, source


class WeightAverage:
    """A moving average of a model's parameters, in `module`, a frozen copy; buffers are copied at every update.

    Tensors of less than float32 precision are averaged in float32, since small updates would be rounded away. The copy
    stays on its own device even if the model moves. Sharded models (FSDP2) are averaged shard by shard: build the
    average before `fully_shard`, then shard `average.module` like the model.

    With `share_frozen` the average has the frozen parameters of the model itself and covers only what learns; they take
    no memory of their own unless they are sharded.
    """

    def __init__(self, model: nn.Module, share_frozen: bool = False):
        shared = {name: p for name, p in model.named_parameters() if share_frozen and not p.requires_grad}
        self.shared = frozenset(shared)
        self.module = copy.deepcopy(model, {id(p): p for p in shared.values()}).eval().requires_grad_(False)
        learned = [p for name, p in self.module.named_parameters() if name not in shared]
        for tensor in [*learned, *self.module.buffers()]:
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
        for buffer in self.module.buffers():
            buffer.data = buffer.data.contiguous()  # expanded tensors are not writable
        self._modules: list[nn.Module] = []  # of the model; these four show whether the groups are still valid
        self._slots: list[tuple[nn.Module, str]] = []
        self._tensors: list[Tensor] = []
        self._layouts: list[tuple[torch.dtype, torch.device]] = []
        self._groups: list[TensorGroup] = []

    def decay(self, step: int) -> float:
        """Returns the decay at a step (the first is 1): the weight of the old average."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Updates every parameter: average <- decay average + (1 - decay) parameter, paired by name."""
        weight = 1 - self.decay(step)
        for group in self.groups(model):
            ema, source = group.local_tensors()
            if group.averaged:
                torch._foreach_lerp_(ema, source, weight)
            else:
                torch._foreach_copy_(ema, source)

    @torch.no_grad()
    def squared_norms(self, model: nn.Module) -> Tensor:
        """Returns the squared norms (2,) of average - model and of model, over all averaged parameters.

        The square root of their ratio is the relative distance. For sharded parameters these are the terms of this
        process: sum them over all processes before dividing.
        """
        sums = torch.zeros(2)
        for group in self.groups(model):
            if group.averaged:
                ema, source = group.local_tensors()
                terms = torch.stack([sum_of_squares(torch._foreach_sub(ema, source)), sum_of_squares(source)])
                sums = sums.to(terms.device) + terms
        return sums

    def groups(self, model: nn.Module) -> list[TensorGroup]:
        """Returns the groups of tensors paired with `model`, rebuilt after a tensor was moved or replaced.

        Each call checks that every tensor is still in its place, in less than a millisecond, since no names are built.
        It does not notice a parameter that was added to a module.
        """
        if not self._groups_are_current(model):
            for module in [*self.module.modules(), *model.modules()]:
                if is_sharded(module):  # FSDP2 leaves the outermost parameters gathered after a forward pass,
                    module.reshard()  # and changes to these copies would be lost
            if not self._groups_are_current(model):
                self._build_groups(model)
        return self._groups

    def _groups_are_current(self, model: nn.Module) -> bool:
        tensors = [getattr(owner, name, None) for owner, name in self._slots]
        return (
            len(self._modules) > 0
            and identical(list(model.modules()), self._modules)
            and identical(tensors, self._tensors)
            and [(t.dtype, t.device) for t in tensors] == self._layouts
        )

    def _build_groups(self, model: nn.Module) -> None:
        pairs = list(pair_tensors(self.module, model, self.shared))
        self._slots = [ours for _, ours, _ in pairs] + [theirs for _, _, theirs in pairs]
        self._tensors = [getattr(owner, name) for owner, name in self._slots]
        self._layouts = [(t.dtype, t.device) for t in self._tensors]
        self._groups, latest = [], {}
        ours, theirs = self._tensors[: len(pairs)], self._tensors[len(pairs) :]
        for (is_parameter, _, _), ema, source in zip(pairs, ours, theirs, strict=True):
            averaged = is_parameter and (ema.is_floating_point() or ema.is_complex())
            kind = (averaged, ema.dtype, ema.device, source.dtype, source.device)
            if kind not in latest or sum(e.numel() for e in latest[kind].ema) > MAX_GROUP_ELEMENTS:
                latest[kind] = TensorGroup(averaged, [], [])
                self._groups.append(latest[kind])
            latest[kind].ema.append(ema)
            latest[kind].source.append(source)
        self._modules = list(model.modules())


class EMA(WeightAverage):
    """An exponential moving average with decay min(beta, (1 + step) / (10 + step)).

    The warm-up lets the average of a short run forget the random initialisation (the schedule of TensorFlow's
    ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, beta: float, share_frozen: bool = False):
        super().__init__(model, share_frozen)
        self.beta = beta

    def decay(self, step: int) -> float:
        return min(self.beta, (1 + step) / (10 + step))


Slot = tuple[nn.Module, str]  # a module and the name of one of its own tensors


def pair_tensors(average: nn.Module, model: nn.Module, skip: Collection[str] = ()) -> Iterator[tuple[bool, Slot, Slot]]:
    """Pairs the parameters (True) and buffers (False) of two modules by name, except parameters in `skip`; shared
    tensors appear once.

    ValueError if their names, shapes or shardings differ.
    """
    parameters = (True, dict(average.named_parameters()), dict(model.named_parameters()))
    buffers = (False, dict(average.named_buffers()), dict(model.named_buffers()))
    for is_parameter, ours, theirs in (parameters, buffers):
        if ours.keys() != theirs.keys():
            raise ValueError(f"EMA of another network: {sorted(ours.keys() ^ theirs.keys())} differ")
        for name, tensor in ours.items():
            if is_parameter and name in skip:
                continue
            if tensor.shape != theirs[name].shape:
                shapes = f"{tuple(tensor.shape)} in the average, {tuple(theirs[name].shape)} in the model"
                raise ValueError(f"EMA of another network: {name} is {shapes}")
            if sharding(tensor) != sharding(theirs[name]):
                raise ValueError(
                    f"EMA got {name} sharded as {sharding(theirs[name])}, its own is sharded as {sharding(tensor)}: "
                    "shard both alike"
                )
            path, _, leaf = name.rpartition(".")
            yield is_parameter, (average.get_submodule(path), leaf), (model.get_submodule(path), leaf)


def identical(a: list, b: list) -> bool:
    """Returns whether two lists hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def sharding(tensor: Tensor) -> tuple | None:
    """Returns the device mesh and placements of a DTensor; None for other tensors."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Returns the sum of squares () over all elements of the tensors."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
