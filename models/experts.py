"""Feed-forward layers of several experts, of which each row of the input takes those that a router names.

Rows are sorted by expert, and each expert computes its own rows alone, not all of them. All experts start as copies of
one layer, with which the layer computes the same as that one at first.

Shapes: N rows (the cells of a batch), E experts, P pairs of a row and one of its experts, D width, H hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.blocks import FEED_FORWARDS, RoutedFeedForward
from models.conditioning import Conditioner
from models.ranges import NOT_NEGATIVE, SIZE_OR_ZERO, check_ranges
from models.router import ClassRouter, LearnedRouter, Router, Routing, Rule
from models.sdpa import upcast
from models.streams import Cells
from models.transformer_block import TransformerBlock
from models.unet_attention import SpatialTransformer

LEAST_ROWS = 16  # of a product: for fewer, the sums of float32 on a CPU have another order
ROW_COUNTS = 8  # of products of 16 bits on a CPU, from n to 2 n rows: each new shape costs a compilation of about 1 ms


class StackedLinear(nn.Module):
    """E linear layers, copies of one at first: weight (E, out, in), bias (E, out)."""

    def __init__(self, layer: nn.Linear, count: int):
        super().__init__()
        weight, bias = layer.weight.detach(), layer.bias.detach()
        self.weight = nn.Parameter(weight.repeat(count, 1, 1))
        self.bias = nn.Parameter(bias.repeat(count, 1))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Applies to each pair the layer of its expert, in one product: x (P, in) -> (P, out)."""
        dtype = product_dtype(x)
        out = F.grouped_mm(x.to(dtype), self.weight.to(dtype).mT, offs=routing.ends)
        last = len(self.bias) - 1
        return out + F.embedding(routing.experts.clamp(max=last), self.bias).to(dtype)

    def in_loop(self, x: Tensor, ends: Sequence[int]) -> Tensor:
        """The same, expert by expert, of which each has the rows up to one of the `ends`; the rows after the last one
        are 0."""
        return LoopProducts.apply(x.to(product_dtype(x)), self.weight, self.bias, ends)


class LoopProducts(torch.autograd.Function):
    """The products of a `StackedLinear`, one expert after the other: x (P, in) -> (P, out), in the dtype of x.

    With few rows, moving the weights of all experts takes longer than multiplying. So those of each are cast when they
    are used, in memory that stays in the CPU's cache, and its gradient is written where it belongs among all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ends: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ends, ctx.bias_dtype = ends, bias.dtype
        out, scratch, bias = x.new_empty(len(x), weight.shape[1]), scratch_like(weight, x), bias.to(x.dtype)
        for expert, rows in spans(ends):
            own, transposed = x[rows], cast_into(scratch, weight[expert]).mT
            padded = pad_rows(own)
            if padded is own:
                torch.addmm(bias[expert], own, transposed, out=out[rows])
            else:
                out[rows] = torch.addmm(bias[expert], padded, transposed)[: len(own)]
        out[ends[-1] :] = 0
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), (needs_x, needs_weight, needs_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        own_rows, scratch = dict(spans(ctx.ends)), scratch_like(weight, x)
        of_x = torch.empty_like(x) if needs_x else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_bias = weight.new_zeros(weight.shape[:2], dtype=ctx.bias_dtype) if needs_bias else None
        if needs_x:
            of_x[ctx.ends[-1] :] = 0
        if needs_weight:
            of_weight[[expert for expert in range(len(weight)) if expert not in own_rows]] = 0
        for expert, rows in own_rows.items():
            own = grad[rows]
            padded = pad_rows(own)
            if needs_x and padded is own:
                torch.mm(own, cast_into(scratch, weight[expert]), out=of_x[rows])
            elif needs_x:
                of_x[rows] = torch.mm(padded, cast_into(scratch, weight[expert]))[: len(own)]
            if needs_weight:
                product = torch.mm(padded.mT, pad_rows(x[rows]), out=of_weight[expert] if scratch is None else scratch)
                if scratch is not None:
                    of_weight[expert] = product
            if needs_bias:
                of_bias[expert] = own.sum(0)
        return of_x, of_weight, of_bias, None


def spans(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields each expert that has rows, with these, from the `ends` of all."""
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            yield expert, slice(start, end)


def pad_rows(x: Tensor) -> Tensor:
    """Returns rows (n, D) with zeros below, as many as a product of them has; the same tensor if they are enough."""
    count = max(len(x), LEAST_ROWS)
    if x.is_cpu and x.element_size() == 2:
        step = max(LEAST_ROWS, 2 ** (count - 1).bit_length() // 2 // ROW_COUNTS)
        count += -count % step
    return x if count == len(x) else F.pad(x, (0, 0, 0, count - len(x)))


def scratch_like(weight: Tensor, x: Tensor) -> Tensor | None:
    """Returns memory for the weights (out, in) of one expert in the dtype of x; None if they have it."""
    return None if weight.dtype == x.dtype else torch.empty_like(weight[0], dtype=x.dtype)


def cast_into(scratch: Tensor | None, weight: Tensor) -> Tensor:
    """Returns a weight (out, in) in the dtype of `scratch` (out, in), in its memory; as it is without."""
    return weight if scratch is None else scratch.copy_(weight)


class Experts(RoutedFeedForward):
    """E feed-forward layers, copies of one at first, behind a router: x (B, *shape, D) -> the same shape.

    `expand`, `activate` and `contract` are those of the layer. In training, `rows` (E + 1,) int64 counts the rows of
    each expert and, last, those of the input; whoever reads it sets it to zero.
    """

    rows: Tensor

    def __init__(self, expand: nn.Linear, activate: Callable[[Tensor], Tensor], contract: nn.Linear, router: Router):
        super().__init__()
        self.activate, self.router = activate, router
        self.expand, self.contract = StackedLinear(expand, router.count), StackedLinear(contract, router.count)
        self.register_buffer("rows", torch.zeros(router.count + 1, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        routing, inputs = self.router(x, cells), x.flatten(0, -2)
        if self.training:
            self.rows += torch.cat([routing.counts.long(), self.rows.new_full((1,), len(inputs))])
        compute = self.compute_grouped if self.products(x) == "grouped" else self.compute_in_loop
        return combine(compute(inputs.index_select(0, routing.rows), routing), routing).view_as(x)

    def products(self, x: Tensor) -> Literal["grouped", "loop"]:
        """Returns how products with the weights of all experts are computed for an input x (..., D).

        grouped: by one kernel, from offsets that stay on the device. loop: expert by expert, for which the host waits
        for the device, where that kernel is missing (it multiplies bfloat16, in rows of whole 16 bytes, on CUDA from
        Ampere on, and in compiled graphs), and on a CPU, on which it is no faster.
        """
        hidden, width = self.contract.weight.shape[2], x.shape[-1]
        fits = product_dtype(x) == torch.bfloat16 and hidden % 8 == 0 and width % 8 == 0
        if x.is_cuda:
            return "grouped" if fits and torch.cuda.get_device_capability(x.device) >= (8, 0) else "loop"
        return "grouped" if fits and x.is_cpu and torch.compiler.is_compiling() else "loop"

    def compute_grouped(self, x: Tensor, routing: Routing) -> Tensor:
        """Applies to each pair x (P, D) its expert, in one product for each of the two layers: (P, D)."""
        real = (routing.experts < self.router.count).unsqueeze(1) if routing.padded else None
        x = x if real is None else x.where(real, 0)  # products leave padding undefined, also in gradients
        hidden = self.expand(x, routing)
        return self.contract(self.activate(hidden if real is None else hidden.where(real, 0)), routing)

    def compute_in_loop(self, x: Tensor, routing: Routing) -> Tensor:
        """The same, expert by expert.

        A row of float32 has the same bits however many others its expert has, on CPUs on which that holds for linear
        layers of `LEAST_ROWS` rows and more: where several threads share a product, it may not.
        """
        ends = routing.ends.tolist()
        return self.contract.in_loop(self.activate(self.expand.in_loop(x, ends)), ends)


def combine(outputs: Tensor, routing: Routing) -> Tensor:
    """Adds up the outputs of the pairs of each row by their weights: (P, D) -> (N, D)."""
    if routing.slots.shape[1] == 1:
        out = outputs.index_select(0, routing.slots.flatten())
        return out if routing.weights is None else (out * routing.weights).to(out.dtype)
    table = upcast(torch.cat([outputs, outputs.new_zeros(1, outputs.shape[1])]))
    weights = routing.weights.to(table.dtype)
    return F.embedding_bag(routing.slots, table, per_sample_weights=weights, mode="sum").to(outputs.dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which x (..., D) is multiplied: that of autocast, where it is enabled."""
    kind = x.device.type
    half = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if half else x.dtype


# Networks


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Options of experts: those of groups of classes of regions, or `learned` of them behind a learned router."""

    groups: tuple[tuple[int, ...], ...]  # classes of regions; what is in no group has one more expert; (): learned
    rule: Rule = "nearest"  # groups: how cells of several regions are routed, see ClassRouter
    learned: int = 0
    top: int = 1  # learned: experts of each row
    rate: float = 1e-3  # learned: steps of the balance

    RANGES = {"learned": SIZE_OR_ZERO, "top": "[1, 65536]", "rate": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)
        if bool(self.groups) == bool(self.learned):
            raise ValueError("got experts of groups and learned ones, or neither: wanted one of them")

    def build_router(self, width: int, classes: int) -> Router:
        """Builds a router for rows of a width, and regions of so many classes."""
        if self.learned:
            return LearnedRouter(width, self.learned, self.top, self.rate)
        return ClassRouter(self.groups, classes, self.rule)


def add_experts(network: nn.Module, options: ExpertOptions) -> list[str]:
    """Replaces the feed-forward layers in the transformer blocks of a network by experts, in place, which start as
    copies of them; returns their names.

    The encoders of conditions stay as they are. ValueError, before anything is replaced, for a network without such
    layers or with those of a user's class, and for experts of groups of classes in a network without regions.
    """
    encoders = dict(network.named_children()).get("encoders")
    classes = count_classes(encoders) if isinstance(encoders, Conditioner) else 0
    if options.groups and isinstance(encoders, Conditioner) and encoders.region_encoders and not classes:
        got = "got experts of groups of classes for regions whose classes have no names"
        raise ValueError(f"{got}: pass --region_words_names NAME ...")
    if options.groups and not classes:
        got = "got experts of groups of classes without a condition of regions"
        raise ValueError(f"{got}: pass --conditions layout, objects, boxes or region_words")
    blocks = {
        name: block
        for name, block in network.named_modules()
        if isinstance(block, TransformerBlock | SpatialTransformer) and not name.startswith("encoders.")
    }
    if not blocks:
        raise ValueError("got experts for a UNet without transformer blocks: pass --attn_block_type transformer")
    for name, block in blocks.items():
        if block.feed_forward is not None and type(block.feed_forward) not in FEED_FORWARDS.values():
            kind = type(block.feed_forward).__name__
            raise ValueError(f"got experts for {name} with a {kind}, wanted one of {', '.join(FEED_FORWARDS)}")
    for block in blocks.values():
        replace_feed_forward(block, options, classes)
    return [f"{name}.feed_forward" for name in blocks]


def replace_feed_forward(block: TransformerBlock | SpatialTransformer, options: ExpertOptions, classes: int) -> None:
    """Replaces the feed-forward layer of a block by experts; `classes` counts those of regions."""
    layer = block if block.feed_forward is None else block.feed_forward
    activate = FEED_FORWARDS["gelu"].activate if block.feed_forward is None else layer.activate
    expand, contract = layer.expand, layer.contract
    router = options.build_router(contract.out_features, classes).to(expand.weight.device)
    experts = Experts(expand, activate, contract, router).train(block.training)
    if block.feed_forward is None:
        del block.expand, block.contract
    block.feed_forward = experts.to(expand.weight.device)


def count_classes(encoders: Conditioner) -> int:
    """Returns the number of classes of the regions that a network reads, 0 without regions."""
    return max((n for field, n in encoders.region_limits.items() if field.endswith("_class")), default=0)


def experts_of(network: nn.Module) -> dict[str, Experts]:
    """Returns the layers of experts of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Experts)}
