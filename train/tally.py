"""Sums that grow from step to step and survive a resume."""

import torch
from torch import Tensor

from train.distributed import World


class Tally:
    """Named sums over steps and processes; all of one dtype, the same names in each process."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor, always of one shape, to what this process has under a name."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def take(self) -> dict[str, Tensor]:
        """The sums over all processes since the last call."""
        if not self.sums:
            return {}
        flat = self.world.sum(torch.cat([value.flatten() for value in self.sums.values()]))
        parts = flat.split([value.numel() for value in self.sums.values()])
        found = {name: part.view_as(value) for (name, value), part in zip(self.sums.items(), parts, strict=True)}
        self.sums = {}
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """What each process has, by rank: (size, ...). All processes must ask."""
        return {name: self.world.gather(value.unsqueeze(0)) for name, value in self.sums.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """As many processes as then get their own sums again; of another number, the first has all of them."""
        self.sums = {}
        for name, rows in state.items():
            own = rows[self.world.rank] if len(rows) == self.world.size else rows.sum(0) * self.world.is_main
            self.sums[name] = own.to(self.world.device)
