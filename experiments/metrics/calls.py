"""What sampling costs, whatever the machine: how often a network is called, and for how many examples."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class Calls:
    """Of a network, so far. An evaluation is one grid or image that goes through it; a call takes a batch of them.

    Guidance evaluates each image twice. Of an autoregressive network that remembers, an evaluation is of the new codes.
    """

    calls: int = 0
    evaluations: int = 0


@contextmanager
def counted(network: nn.Module) -> Iterator[Calls]:
    """Counts while it is open: `with counted(network) as cost: ...`, then cost.calls and cost.evaluations.

    Its forward must take the batch first, as all networks here do.
    """
    cost = Calls()

    def count(module: nn.Module, args: tuple, output: object) -> None:
        cost.calls += 1
        cost.evaluations += len(args[0])

    handle = network.register_forward_hook(count)
    try:
        yield cost
    finally:
        handle.remove()
