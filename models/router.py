"""Routers, which name the experts of each row of a layer's input: by the classes of a map, or learned.

Shapes: N rows (the cells of a batch), E experts, K experts of a row at most, P pairs of a row and one of its experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditions.layout import sum_by_number
from models.regions import SLIVER, Regions, to_double
from models.sdpa import upcast
from models.streams import Cells

Rule = Literal["nearest", "share"]


class Choice(NamedTuple):
    """The experts of each cell of a grid."""

    experts: Tensor  # (B, h w, K) int64 in [0, E]; E: none
    weights: Tensor | None = None  # (B, h w, K), whose sum is 1, 0 for none; None: 1, and K is 1


class Routing(NamedTuple):
    """The pairs of N rows and their experts, sorted by expert."""

    rows: Tensor  # (P,) int64 in [0, N): the row of each pair
    experts: Tensor  # (P,) int64 in [0, E): its expert; E for padding, at the end
    ends: Tensor  # (E,) int32: where the pairs of each expert end
    slots: Tensor  # (N, K) int64 in [0, P]: the pairs of each row; P: none
    weights: Tensor | None = None  # (N, K): of each pair in the output of its row; None: 1, and K is 1
    padded: bool = False  # there is perhaps padding

    @property
    def counts(self) -> Tensor:
        """The number of rows of each expert, (E,) int32."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def sort_by_expert(experts: Tensor, count: int, weights: Tensor | None = None) -> Routing:
    """Sorts the pairs of rows and their experts (N, K), each of `count`, by expert, those of an expert by row."""
    of_pairs, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(count, device=order.device)
    ends = torch.searchsorted(of_pairs, numbers, right=True, out_int32=True)
    places = torch.arange(len(order), device=order.device)
    slots = torch.empty_like(order).scatter_(0, order, places).view_as(experts)
    return Routing(order // experts.shape[1], of_pairs, ends, slots, weights)


def leave_out_padding(routing: Routing) -> Routing:
    """Returns the routing of rows with fewer than K experts without the pairs that have none.

    The host waits for the device once, to learn how many are left. Compiled graphs have fixed shapes: they keep them.
    """
    if torch.compiler.is_compiling():
        none = routing.slots >= routing.ends[-1]
        return routing._replace(slots=routing.slots.masked_fill(none, len(routing.rows)), padded=True)
    total = int(routing.ends[-1])
    slots = routing.slots.clamp(max=total)
    return routing._replace(rows=routing.rows[:total], experts=routing.experts[:total], slots=slots)


class Router(nn.Module, ABC):
    """Names the experts of the rows of a layer's input."""

    count: int  # E

    @abstractmethod
    def forward(self, x: Tensor, cells: Cells) -> Routing:
        """x (B, *shape, D), whose rows are of `cells` -> their routing, N = B * shape."""


class ClassRouter(Router):
    """Sends the cells of each group of classes to an expert of its own, and all others to the last one.

    The others are those without a region, of dropped regions, and of regions of any other class. `rule` is

    - nearest: a cell has the expert of the region in front at its centre.
    - share: a cell has the experts of all regions that are seen in it, weighted by their shares of the cell.

    ValueError for a class that is in two groups, or not in [0, classes).
    """

    def __init__(self, groups: Sequence[Sequence[int]], classes: int, rule: Rule = "nearest"):
        super().__init__()
        self.groups, self.rule, self.count = tuple(map(tuple, groups)), rule, len(groups) + 1
        check_groups(self.groups, classes)
        if rule not in ("nearest", "share"):
            raise ValueError(f"got rule {rule!r}, wanted nearest or share")
        experts = torch.full((classes + 1,), len(groups))
        for expert, group in enumerate(self.groups):
            experts[list(group)] = expert
        self.register_buffer("experts", experts, persistent=False)  # of each class; the last: of the unknown one, -1

    def forward(self, x: Tensor, cells: Cells) -> Routing:
        if cells.regions is None:
            rest = torch.full((x.shape[:-1].numel(), 1), self.count - 1, device=x.device)
            return sort_by_expert(rest, self.count)
        key = ("experts", self.groups, self.rule, *cells.grid)
        choice = cells.regions.compute_once((*key, "choice"), lambda: self.choose(cells.regions, *cells.grid))
        if cells.positions is not None:
            part = Choice(*(each if each is None else each[:, cells.positions] for each in choice))
            return self.sort(part)
        return cells.regions.compute_once(key, lambda: self.sort(choice))

    def sort(self, choice: Choice) -> Routing:
        """Returns the routing of a choice."""
        weights = None if choice.weights is None else choice.weights.flatten(0, 1)
        routing = sort_by_expert(choice.experts.flatten(0, 1), self.count, weights)
        return routing if weights is None else leave_out_padding(routing)

    def choose(self, regions: Regions, height: int, width: int) -> Choice:
        """Returns the experts of each cell of a grid."""
        if self.rule == "nearest":
            front = regions.front(height, width, "nearest").flatten(1) + 1  # (B, N) in [0, R]; 0: none
            classes = F.pad(regions.class_ids, (1, 0), value=-1).gather(1, front)
            return Choice(self.experts[classes].unsqueeze(-1))
        seen = regions.visible(height, width)  # (B, R, h, w)
        shares = to_double(sum_by_number(seen, self.experts[regions.class_ids], self.count))
        shares[:, -1] += 1 - shares.sum(1)  # where no region is
        shares = shares.flatten(2).mT  # (B, N, E)
        shares, experts = shares.where(shares > SLIVER, 0).sort(dim=-1, descending=True, stable=True)
        most = self.most_in_a_cell(shares, regions)
        shares, experts = shares[..., :most], experts[..., :most]
        return Choice(experts.where(shares > 0, self.count), shares / shares.sum(-1, keepdim=True))

    def most_in_a_cell(self, shares: Tensor, regions: Regions) -> int:
        """Returns how many experts a cell has at most; the host waits for the device, except in compiled graphs, where
        that is any number that there can be."""
        if torch.compiler.is_compiling():
            return min(self.count, regions.present.shape[1] + 1)
        return int((shares > 0).sum(-1).amax())


class LearnedRouter(Router):
    """Sends each row to the `top` experts of the largest probabilities, softmax of a linear layer (Fedus et al. 2022).

    The outputs of a row's experts are added up by their probabilities, scaled to a sum of 1, times p / p.detach(),
    which is 1 and passes the gradient on: equal experts give the output of one. `balance` (E,) is added to the
    probabilities where experts are chosen; `move_balance` adapts it to their load (Wang et al. 2024), in steps of
    `rate`. It is part of the state, and no parameter.
    """

    def __init__(self, width: int, count: int, top: int = 1, rate: float = 1e-3):
        super().__init__()
        if not 1 <= top <= count:
            raise ValueError(f"got {top} experts for each row of {count}, wanted 1 to {count}")
        self.count, self.top, self.rate = count, top, rate
        self.logits = nn.Linear(width, count, bias=False)
        self.register_buffer("balance", torch.zeros(count))

    def forward(self, x: Tensor, cells: Cells) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            rows = upcast(x).flatten(0, -2)
            log_p = F.linear(rows, self.logits.weight.to(rows.dtype)).log_softmax(-1)  # (N, E)
        experts = (log_p.detach().exp() + self.balance).topk(self.top, -1).indices  # (N, K)
        own = log_p.gather(1, experts)
        weights = own.detach().softmax(-1) * (own - own.detach()).exp()
        return sort_by_expert(experts, self.count, weights)

    @torch.no_grad()
    def move_balance(self, counts: Tensor) -> None:
        """Moves the balance of each expert by `rate`, up if it had fewer rows than the mean; counts (E,) integers of a
        step, of all processes and micro-batches."""
        self.balance += self.rate * (counts.sum() - self.count * counts).sign()


def check_groups(groups: Sequence[Sequence[int]], classes: int) -> None:
    """Raises ValueError for groups that are empty, share a class, or have one that is not in [0, classes)."""
    flat = [each for group in groups for each in group]
    if not all(groups) or not groups:
        raise ValueError("got a group of classes without any, wanted one class in each at least")
    if twice := sorted({each for each in flat if flat.count(each) > 1}):
        raise ValueError(f"got class {twice[0]} in two groups of experts, wanted it in one")
    if wrong := [each for each in flat if not 0 <= each < classes]:
        raise ValueError(f"got class {wrong[0]} in a group of experts, wanted 0 to {classes - 1}")
