"""Experts in place of feed-forward layers: their flags, the groups of classes, and what a training step does with them.

A step counts the rows of each expert, which are logged, and moves the balance of learned routers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from models.experts import ExpertOptions, add_experts, experts_of
from models.ranges import NOT_NEGATIVE, SIZE_OR_ZERO
from models.registry import did_you_mean
from models.router import LearnedRouter
from train.distributed import DistContext
from train.samplers._foreground import ForegroundConfig

# Train ids of Cityscapes; what is in no group has one more expert: 2, 5 and 10 experts (Küchler 2025, MaMoE).
PRESETS = {
    "cityscapes_2": ("0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18",),
    "cityscapes_5": ("13", "11,12", "14,15", "17,18"),
    "cityscapes_10": ("13", "11,12", "14", "15", "17,18", "8,9", "3,4", "0,1", "2"),
}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ForegroundConfig):
    """A sampler whose network may have experts."""

    experts: tuple[str, ...] = ()
    """Feed-forward layers of their own for groups of classes of regions, in transformer blocks: the classes of each, by
    name or number, as in disc,ring square; all other places have one more. cityscapes_2, _5 or _10: published groups
    of that data set's training ids."""
    expert_rule: Literal["nearest", "share"] = "nearest"
    """experts: a place has that of the region at its centre, or those of all regions in it, by their shares."""
    router_experts: int = 0
    """Number of experts behind a learned router, which needs no regions; 0: none."""
    router_top: int = 1
    """router_experts: experts of each place."""
    router_rate: float = 0.001
    """router_experts: how fast the router evens out their use in training; 0: not at all."""

    RANGES = {"router_experts": SIZE_OR_ZERO, "router_top": "[1, 65536]", "router_rate": NOT_NEGATIVE}

    def __post_init__(self):
        super().__post_init__()
        if self.experts and self.router_experts:
            raise ValueError("got experts and router_experts, which replace the same layers: leave one of them out")
        needed = {"expert_rule": "experts", "router_top": "router_experts", "router_rate": "router_experts"}
        defaults = {field.name: field.default for field in fields(ExpertsConfig)}
        for name, other in needed.items():
            if getattr(self, name) != defaults[name] and not getattr(self, other):
                raise ValueError(f"got {name} without {other}: pass --{other}, or leave --{name} out")
        if self.router_experts and self.router_top > self.router_experts:
            got = f"got router_top {self.router_top} of {self.router_experts} experts"
            raise ValueError(f"{got}, wanted at most as many: pass --router_top 1")

    def with_class_numbers(self, names: Sequence[str]) -> Self:
        """Returns the settings with the numbers of the classes of regions of a data set instead of their names, to be
        saved with the run. ValueError for other names."""
        groups = read_groups(self.experts, names)
        return replace(self, experts=tuple(",".join(map(str, group)) for group in groups))

    def with_class_names(self, names: Sequence[str]) -> Self:
        """Returns the settings with the names of classes instead of their numbers, for another data set; as they are if
        not all have one, or one that would be read as something else."""
        groups = read_groups(self.experts, ())
        clear = {i for i, name in enumerate(names) if names.count(name) == 1 and name == name.strip() != ""}
        clear = {i for i in clear if "," not in names[i] and not names[i].isdecimal()}
        if not {number for group in groups for number in group} <= clear:
            return self
        return replace(self, experts=tuple(",".join(names[number] for number in group) for group in groups))

    def add_experts(self, network: nn.Module) -> None:
        """Replaces the feed-forward layers of a network by its experts, if it has any."""
        if self.experts:
            add_experts(network, ExpertOptions(groups=read_groups(self.experts, ()), rule=self.expert_rule))
        if self.router_experts:
            options = {"groups": (), "learned": self.router_experts}
            options |= {"top": self.router_top, "rate": self.router_rate}
            add_experts(network, ExpertOptions(**options))


def read_groups(words: Sequence[str], names: Sequence[str], flag: str = "experts") -> tuple[tuple[int, ...], ...]:
    """Returns the numbers of the classes of groups: words such as disc,ring of names or numbers, or that of a preset.

    ValueError for other words, given to a `flag`.
    """
    words = PRESETS.get(words[0], words) if len(words) == 1 else words
    groups = ([word.strip() for word in group.split(",") if word.strip()] for group in words)
    return tuple(tuple(class_number(word, names, flag) for word in group) for group in groups)


def class_number(word: str, names: Sequence[str], flag: str) -> int:
    """Returns the number of a class, given as a number or a name; ValueError for another word. A number is that of a
    class also where others have numbers for names, since runs are saved with numbers."""
    if word.isdecimal():
        return int(word)
    if word in names:
        return names.index(word)
    known = f"one of {', '.join(names)}" if names else "a number: the data set names no classes of regions"
    raise ValueError(f"got the class {word} in --{flag}{did_you_mean(word, names)}, wanted {known}")


@torch.no_grad()
def settle_experts(network: nn.Module, world: DistContext, finite: Tensor | bool) -> dict[str, Tensor]:
    """Ends a training step: returns the rows of this process by layer, see `Experts.rows`, and moves the balance of
    routers that learn by those of all processes. Nothing moves if the step was not taken, `finite` () bool. All ranks
    must call it."""
    layers = experts_of(network)
    own = {name: layer.rows * finite for name, layer in layers.items()}
    routers = {name: layer.router for name, layer in layers.items() if isinstance(layer.router, LearnedRouter)}
    routed = {name: router for name, router in routers.items() if router.logits.weight.requires_grad}
    if routed:
        counts = world.sum(torch.stack([own[name][:-1] for name in routed]))
        for router, each in zip(routed.values(), counts, strict=True):
            router.move_balance(each)
    for layer in layers.values():
        layer.rows.zero_()
    return own


def describe_use(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the share of each expert in the rows that all layers computed, see `Experts.rows`, and how many experts
    a place had on average."""
    *used, places = sum(rows.values()).tolist() if rows else [0]
    if not places:
        return {}
    shares = {f"experts/{number}": count / sum(used) for number, count in enumerate(used)}
    return shares | {"experts/per_place": sum(used) / places}
