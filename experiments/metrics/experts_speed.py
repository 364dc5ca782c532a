"""Speed and memory of feed-forward layers with experts, beside one layer and beside all experts everywhere.

All experts everywhere is the published form (Küchler 2025, MaMoE): each expert computes every row, and a row adds up
the outputs by its weights, of which all but one are 0. Rows have experts of random sizes, as segments of images have.
Weights and inputs are float32; bfloat16 is mixed precision, with casts of the weights as in training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from experiments.metrics.speed_results import Row
from models.blocks import GEGLU
from models.experts import Experts
from models.router import Router, Routing, sort_by_expert
from models.streams import Cells

WIDTH, RATIO = 320, 4.0  # 320 -> 1280, of Stable Diffusion's first level
ROWS = (1024, 4096)
COUNT, MANY = 10, 64
PRECISIONS = ("float32", "bfloat16")
PASSES = ("forward", "forward and backward")
OURS, ONE_LAYER, MANY_EXPERTS, EVERYWHERE = "10 experts", "one layer", "64 experts", "10 experts everywhere"
BYTES_PER_MIB = 2**20

Layer = Callable[[Tensor], Tensor]  # x (N, D) -> (N, D)


class RandomRouter(Router):
    """Sends each row to one expert, drawn once: the k-th with a probability proportional to 1 / k."""

    def __init__(self, rows: int, count: int):
        super().__init__()
        self.count, rng = count, torch.Generator().manual_seed(0)
        shares = 1 / torch.arange(1, count + 1)
        self.register_buffer("experts", torch.multinomial(shares, rows, replacement=True, generator=rng).unsqueeze(1))

    def forward(self, x: Tensor, cells: Cells) -> Routing:
        return sort_by_expert(self.experts, self.count)


def make_experts(rows: int, count: int) -> Experts:
    """Returns experts for rows (N, D), with weights of their own."""
    torch.manual_seed(0)
    layer = GEGLU(WIDTH, RATIO)
    experts = Experts(layer.expand, GEGLU.activate, layer.contract, RandomRouter(rows, count))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def compute_everywhere(experts: Experts, x: Tensor) -> Tensor:
    """Computes all experts in each row, and adds up their outputs by weights: x (N, D) -> (N, D)."""
    routing = experts.router(x, Cells(None, (1, len(x))))
    chosen = routing.experts[routing.slots]  # (N, 1)
    weights = x.new_zeros(len(x), experts.router.count).scatter_(1, chosen, 1)
    inputs = torch.einsum("nd,ne->end", x, weights)
    hidden = torch.baddbmm(experts.expand.bias.unsqueeze(1), inputs, experts.expand.weight.mT)
    outputs = torch.baddbmm(experts.contract.bias.unsqueeze(1), experts.activate(hidden), experts.contract.weight.mT)
    return torch.einsum("end,ne->nd", outputs, weights.to(outputs.dtype))


def compute_routed(experts: Experts, x: Tensor) -> Tensor:
    """Computes experts where they are routed: x (N, D) -> (N, D)."""
    return experts(x, Cells(None, (1, len(x))))


def ways_to_compute(rows: int, device: torch.device) -> dict[str, tuple[nn.Module, Layer]]:
    """Returns a module and its function of x (N, D), by way."""
    ours, many = (make_experts(rows, count).to(device) for count in (COUNT, MANY))
    torch.manual_seed(0)
    one = GEGLU(WIDTH, RATIO).to(device)
    return {
        OURS: (ours, partial(compute_routed, ours)),
        ONE_LAYER: (one, one),
        MANY_EXPERTS: (many, partial(compute_routed, many)),
        EVERYWHERE: (ours, partial(compute_everywhere, ours)),
    }


def precision_context(precision: str, device: torch.device) -> AbstractContextManager:
    """Returns the context of one of PRECISIONS."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, dtype=torch.bfloat16)


def make_rows(rows: int, device: torch.device) -> Tensor:
    """Draws x (N, D)."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)


def run_forward(layer: Layer, module: nn.Module, precision: str, x: Tensor) -> Tensor:
    """Runs the forward pass."""
    with torch.no_grad(), precision_context(precision, x.device):
        return layer(x)


def run_forward_backward(layer: Layer, module: nn.Module, precision: str, x: Tensor) -> Sequence[Tensor]:
    """Runs forward and backward; returns the gradients of x and of the parameters."""
    leaf = x.detach().requires_grad_()
    with precision_context(precision, x.device):
        out = layer(leaf)
    return torch.autograd.grad(out, [leaf, *module.parameters()], torch.ones_like(out))


def experts_cases(device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns what to time, by case and way."""
    cases = {}
    for rows in ROWS:
        ways, x = ways_to_compute(rows, device), make_rows(rows, device)
        for precision in PRECISIONS:
            for part, run in zip(PASSES, (run_forward, run_forward_backward), strict=True):
                cases[case_name(rows, precision, part)] = {
                    way: partial(run, layer, module, precision, x) for way, (module, layer) in ways.items()
                }
    return cases


def case_name(rows: int, precision: str, part: str) -> str:
    """The name of a case."""
    return f"{rows} rows, {precision}, {part}"


def stored_bytes(layer: Layer, module: nn.Module, precision: str, x: Tensor) -> int:
    """Returns the bytes that a forward pass keeps for its backward pass, without those of the parameters and of x."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *module.parameters()]}
    stored: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision_context(precision, x.device):
        out = layer(x.detach().requires_grad_())
    total = sum(stored.values())
    del out  # until here its graph keeps the storages, whose addresses would be used again
    return total


def compare_experts(rows: Sequence[Row], name: str) -> Iterator[str]:
    """Yields the ratios to one layer in rows of results whose workloads are `name`, case and way."""
    ratios = {row["workload"]: row["ratio"] for row in rows}
    for case in (case_name(n, precision, part) for n in ROWS for precision in PRECISIONS for part in PASSES):
        ours, many, all_of_them = (ratios[f"{name}, {case}, {way}"] for way in (OURS, MANY_EXPERTS, EVERYWHERE))
        words = f"{ours:.2f}x the time of one layer, {many:.2f}x with {MANY} experts"
        yield f"{case}: {words}, {all_of_them:.2f}x computed everywhere"


def compare_memory(device: torch.device) -> Iterator[str]:
    """Yields the memory that each way keeps for its backward pass."""
    for rows in ROWS:
        x = make_rows(rows, device)
        for precision in PRECISIONS:
            sizes = {
                way: stored_bytes(layer, module, precision, x) / BYTES_PER_MIB
                for way, (module, layer) in ways_to_compute(rows, device).items()
            }
            parts = ", ".join(f"{way} {size:.0f} MiB" for way, size in sizes.items())
            yield f"{rows} rows, {precision}, kept for backward: {parts}"
