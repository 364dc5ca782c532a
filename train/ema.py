"""Averages of a network's weights that follow it while it trains."""

import copy
from collections.abc import Iterator
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.distributed import is_sharded, local_shard

MAX_GROUP_ELEMENTS = 2**24  # elements, after which a group is full: what an operation needs beside it stays small


class TensorGroup(NamedTuple):
    """Tensors that one fused operation takes: on either side all of one dtype and on one device."""

    averaged: bool  # else copied: buffers, and parameters of whole numbers
    slow: list[Tensor]
    fast: list[Tensor]

    def local_tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this process holds of each pair, to average in the precision and on the device of the average."""
        slow, fast = [local_shard(s) for s in self.slow], [local_shard(f) for f in self.fast]
        if self.averaged and (slow[0].dtype, slow[0].device) != (fast[0].dtype, fast[0].device):
            near = [torch.empty_like(s) for s in slow]
            torch._foreach_copy_(near, fast)
            return slow, near
        return slow, fast


class WeightAverage:
    """A frozen copy that follows a module with the decay of a step; buffers, the part nobody learns, are copied.

    What the module keeps in less than float32 is kept in float32 here: small steps would round to nothing. The copy
    stays on its own device, wherever the module goes. Sharded modules (FSDP2) are averaged shard by shard: build the
    average before `fully_shard`, then shard `average.module` as the module.
    """

    def __init__(self, model: nn.Module):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                tensor.data = tensor.data.float()
        for buffer in self.module.buffers():
            buffer.data = buffer.data.contiguous()  # an expanded one cannot be written to
        self._modules: list[nn.Module] = []  # of the followed one: these four say whether the groups still stand
        self._slots: list[tuple[nn.Module, str]] = []
        self._tensors: list[Tensor] = []
        self._layouts: list[tuple[torch.dtype, torch.device]] = []
        self._groups: list[TensorGroup] = []

    def decay(self, step: int) -> float:
        """The share of itself that the average keeps at a step, the first being 1."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """One step behind `model`: w <- decay w + (1 - decay) followed, for parameters paired by name."""
        weight = 1 - self.decay(step)
        for group in self.groups(model):
            slow, fast = group.local_tensors()
            if group.averaged:
                torch._foreach_lerp_(slow, fast, weight)
            else:
                torch._foreach_copy_(slow, fast)

    @torch.no_grad()
    def squared_norms(self, model: nn.Module) -> Tensor:
        """(2,): the sums of squares of average - followed and of followed, over all averaged parameters.

        The root of their ratio is the relative distance. Of sharded parameters these are this process's terms: sum
        them over all processes before dividing.
        """
        sums = torch.zeros(2)
        for group in self.groups(model):
            if group.averaged:
                slow, fast = group.local_tensors()
                terms = torch.stack([sum_of_squares(torch._foreach_sub(slow, fast)), sum_of_squares(fast)])
                sums = sums.to(terms.device) + terms
        return sums

    def groups(self, model: nn.Module) -> list[TensorGroup]:
        """The pairs with `model`, worked out by name once, and again after anything was moved or replaced.

        Every step each tensor is looked up where it hangs, which takes less than a millisecond: names need not be built
        for that. A parameter added beside others of its module is the one change that goes unseen.
        """
        if not self._groups_are_current(model):
            for module in [*self.module.modules(), *model.modules()]:
                if is_sharded(module):  # FSDP2 leaves the outermost parameters whole after a forward pass, as
                    module.reshard()  # copies: what was written to them would be lost
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
        found = list(pair_tensors(self.module, model))
        self._slots = [ours for _, ours, _ in found] + [theirs for _, _, theirs in found]
        self._tensors = [getattr(owner, name) for owner, name in self._slots]
        self._layouts = [(t.dtype, t.device) for t in self._tensors]
        self._groups, latest = [], {}
        ours, theirs = self._tensors[: len(found)], self._tensors[len(found) :]
        for (is_parameter, _, _), slow, fast in zip(found, ours, theirs, strict=True):
            averaged = is_parameter and (slow.is_floating_point() or slow.is_complex())
            kind = (averaged, slow.dtype, slow.device, fast.dtype, fast.device)
            if kind not in latest or sum(s.numel() for s in latest[kind].slow) > MAX_GROUP_ELEMENTS:
                latest[kind] = TensorGroup(averaged, [], [])
                self._groups.append(latest[kind])
            latest[kind].slow.append(slow)
            latest[kind].fast.append(fast)
        self._modules = list(model.modules())


class EMA(WeightAverage):
    """An average with decay min(beta, (1 + step) / (10 + step)).

    The warm-up lets short runs forget their random start (the schedule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, beta: float):
        super().__init__(model)
        self.beta = beta

    def decay(self, step: int) -> float:
        return min(self.beta, (1 + step) / (10 + step))


Slot = tuple[nn.Module, str]  # a module and the name of a tensor right in it


def pair_tensors(slow: nn.Module, fast: nn.Module) -> Iterator[tuple[bool, Slot, Slot]]:
    """Each parameter (True) and buffer (False) of both by name, one shared by several modules once.

    ValueError where names, shapes or, of sharded ones, the ways they are split differ.
    """
    parameters = (True, dict(slow.named_parameters()), dict(fast.named_parameters()))
    buffers = (False, dict(slow.named_buffers()), dict(fast.named_buffers()))
    for is_parameter, ours, theirs in (parameters, buffers):
        if ours.keys() != theirs.keys():
            raise ValueError(f"EMA follows another network: {sorted(ours.keys() ^ theirs.keys())} differ")
        for name, kept in ours.items():
            if kept.shape != theirs[name].shape:
                shapes = f"{tuple(kept.shape)} here, {tuple(theirs[name].shape)} there"
                raise ValueError(f"EMA follows another network: {name} is {shapes}")
            if sharding(kept) != sharding(theirs[name]):
                raise ValueError(
                    f"EMA got {name} split as {sharding(theirs[name])}, its own as {sharding(kept)}: shard both alike"
                )
            path, _, leaf = name.rpartition(".")
            yield is_parameter, (slow.get_submodule(path), leaf), (fast.get_submodule(path), leaf)


def identical(some: list, others: list) -> bool:
    """Whether two lists hold the very same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def sharding(tensor: Tensor) -> tuple | None:
    """How a DTensor lies over processes; None for other tensors."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """() over all elements of a group."""
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
