"""Backends of neighbourhood attention against each other on one grid: seconds, memory and error."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from experiments.metrics.cost import median_seconds, peak_extra_bytes
from models.neighborhood import Group, choose, natten_is_compiled, neighborhood_attention_2d, window_of

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
REFUSALS = {  # what those that are not ours raise for a shape or a machine that they do not serve
    "natten": (NotImplementedError, ValueError, RuntimeError),
    "flex": (NotImplementedError, ValueError, TorchDynamoException),
}


class Case(NamedTuple):
    """One grid and one window, both square."""

    side: int  # tokens
    kernel: int
    dilation: int

    @property
    def name(self) -> str:
        return f"{self.side}x{self.side}, dilation {self.dilation}"


class Inputs(NamedTuple):
    """(B, H, W, heads, d) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor  # of the output


class Cost(NamedTuple):
    """What one backend takes; None where it was left out or cannot do it."""

    forward: float | None = None  # seconds
    both: float | None = None  # seconds, forward and backward
    peak: int | None = None  # bytes, of both
    error: float | None = None  # max |out - float64| / max |float64|


def make_inputs(side: int, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normal draws, the same on every device."""
    draws = torch.randn(4, batch, side, side, heads, width, generator=torch.Generator().manual_seed(0))
    return Inputs(*(x.clone() for x in draws.to(device, dtype)))


def chosen_by_auto(case: Case, inputs: Inputs) -> str:
    window = window_of((case.side, case.side), case.kernel, case.dilation)
    return choose("auto", inputs.query, Group(window, inputs.key.shape[-2]))


def compare(case: Case, inputs: Inputs, *, dense_limit: int, repeats: int) -> dict[str, Cost]:
    """Each backend's cost. Memory is measured after the times, when all that a shape needs once has been made."""
    device, tokens = inputs.query.device, case.side**2
    wanted = reference(case, inputs) if tokens <= dense_limit else None
    costs, runs = {}, {}
    with warnings.catch_warnings():
        for module in ("natten", r"torch\.nn\.attention\.flex_attention"):
            warnings.filterwarnings("ignore", module=module)
        for name, make in contestants(case, device).items():
            costs[name] = Cost()
            if tokens > dense_limit and is_quadratic(name, device):
                continue
            try:
                attention = make()
                forward, both = partial(run_forward, attention, inputs), partial(run_both, attention, inputs)
                out = forward()
                if has_backward(name, device):
                    both()
            except (torch.OutOfMemoryError, *REFUSALS.get(name, ())) as error:
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                print(f"{name} is left out at {case.name}: {reason[:200]}", flush=True)
                continue
            costs[name] = Cost(error=None if wanted is None else relative_error(out, wanted))
            runs[name, "forward"] = forward
            if has_backward(name, device):
                runs[name, "both"] = both
        seconds = median_seconds(runs, repeats, device)
        for name, part in runs:
            costs[name] = costs[name]._replace(**{part: seconds[name, part]})
            if part == "both":
                costs[name] = costs[name]._replace(peak=peak_extra_bytes(runs[name, part], device))
    return costs


def contestants(case: Case, device: torch.device) -> dict[str, Callable[[], Attention]]:
    """What makes each backend's function, by name."""
    names = ["dense", "tiled"] + ["natten"] * (importlib.util.find_spec("natten") is not None)
    window = {"kernel_size": case.kernel, "dilation": case.dilation}
    makers = {name: partial(partial, neighborhood_attention_2d, **window, backend=name) for name in names}
    if device.type == "cuda":
        makers["flex"] = partial(flex, case, device)
    return makers


def is_quadratic(name: str, device: torch.device) -> bool:
    """Whether it compares all pairs of tokens: natten does where its CUDA kernels are missing."""
    return name == "dense" or name == "natten" and not (device.type == "cuda" and natten_is_compiled())


def has_backward(name: str, device: torch.device) -> bool:
    return name != "natten" or device.type != "cpu"


@torch.no_grad()
def run_forward(attention: Attention, inputs: Inputs) -> Tensor:
    return attention(*inputs[:3])


def run_both(attention: Attention, inputs: Inputs) -> None:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    torch.autograd.grad(attention(*leaves), leaves, inputs.gradient)


@torch.no_grad()
def reference(case: Case, inputs: Inputs) -> Tensor:
    """The dense result for the same inputs in float64, on the CPU: not every device has float64."""
    query, key, value = (x.cpu().double() for x in inputs[:3])
    return neighborhood_attention_2d(query, key, value, case.kernel, case.dilation, backend="dense")


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return ((out.cpu().double() - wanted).abs().max() / wanted.abs().max()).item()


def flex(case: Case, device: torch.device) -> Attention:
    """PyTorch's flex_attention, compiled for this case alone, with the window as its mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(window_mask(case), None, None, case.side**2, case.side**2, device=str(device))
    torch.compiler.reset()  # past a limit on what is compiled, PyTorch would run it uncompiled
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))  # (B, heads, N, d)
        return compiled(q, k, v, block_mask=blocks).transpose(1, 2).unflatten(1, query.shape[1:3])

    return attention


def window_mask(case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The window as flex_attention asks for it: whether a query sees a key, by their places in the flattened grid."""
    side, kernel, step = case

    def axis_sees(query: Tensor, key: Tensor) -> Tensor:
        count = (side - 1 - query % step) // step + 1  # positions of the query's residue
        start = torch.minimum((query // step - kernel // 2).clamp(min=0), count - kernel)
        return (query % step == key % step) & (key // step >= start) & (key // step < start + kernel)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return axis_sees(query // side, key // side) & axis_sees(query % side, key % side)

    return mask
