"""Speed of attention within regions, beside a loop over images and objects, and beside attention to the whole map.

The loop is the published form (Cheng et al. 2023, LayoutDiffuse): the cells of each object are cut out of the map,
attend to each other with a prompt, and are put back; each cell gets the mean over its objects, and cells without an
object attend to the whole map. Attention there is two products and a softmax; the loop is also timed with the fused
attention of ours. Both give the same numbers as ours. Places in boxes, which the loop does not have, are timed as well.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from experiments.metrics.speed_results import Row
from models.region_attention import RegionAttention, layout_of
from models.regions import Regions
from train.datasets import shapes

IMAGES, CHANNELS, HEADS = 8, 128, 4
SIDES = (16, 32)  # of square maps
OVERLAPS = ("mean", "mean_prompt")  # own prompts where objects overlap, and their mean as published
MANY, FEW, SMALL = 100, 6, 0.1  # small boxes in an image, and their side
OURS, WITH_PLACES, FEW_BOXES = "ours", "ours, with places", "ours, few boxes"
LOOP, FUSED_LOOP, WHOLE_MAP = "loop", "loop, fused attention", "whole map"
PASSES = ("forward", "forward and backward")
Slices = tuple[slice, slice]  # the rows and columns of an object
AttendToAll = Callable[[RegionAttention, Tensor], Tensor]  # (h, w, 3 C) -> (h, w, C)
Attend = Callable[[Tensor, Tensor], Tensor]  # x (B, h, w, C), prompts (B, R, D) -> (B, h, w, C)


@dataclass(frozen=True)
class Boxes:
    """Boxes of a batch of images, as the fields of a batch."""

    boxes: Tensor  # (B, R, 4)
    boxes_mask: Tensor  # (B, R) bool

    def regions(self) -> Regions:
        """Returns the regions, of which nothing has been computed yet."""
        return Regions.from_fields(vars(self))

    def slices(self, side: int) -> list[list[Slices]]:
        """Returns the rows and columns that each object of each image touches on a square map."""
        cells = self.regions().at(side, side).cpu()
        images = [[each for each in image if each.any()] for image in cells]
        return [[(slice_of(each.any(1)), slice_of(each.any(0))) for each in image] for image in images]


def slice_of(covered: Tensor) -> slice:
    """Returns the slice from the first to the last True of (n,)."""
    places = covered.nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1)


def shapes_boxes(images: int, device: torch.device) -> Boxes:
    """Returns the boxes of the first validation scenes of `shapes`, up to six in each."""
    scenes = shapes.build(shapes.Config(), "val")
    boxes = [torch.tensor([thing.box for thing in scenes.scene(i).things]).view(-1, 4).float() for i in range(images)]
    masks = [torch.ones(len(each), dtype=torch.bool) for each in boxes]
    return Boxes(*(pad_sequence(each, batch_first=True).to(device) for each in (boxes, masks)))


def small_boxes(images: int, count: int, device: torch.device) -> Boxes:
    """Returns boxes of one size at random places."""
    corner = torch.rand(images, count, 2, generator=torch.Generator().manual_seed(0)) * (1 - SMALL)
    boxes = torch.cat([corner, corner + SMALL], 2).to(device)
    return Boxes(boxes, torch.ones_like(boxes[..., 0], dtype=torch.bool))


# Ways to attend


def attend_by_region(layer: RegionAttention, boxes: Boxes, x: Tensor, prompts: Tensor) -> Tensor:
    """Attends within regions, from boxes on: x (B, h, w, C), prompts (B, R, D) -> (B, h, w, C)."""
    return layer(x, prompts, layout_of(boxes.regions(), x.shape[1], x.shape[2], layer.kind, layer.overlap))


def attend_object_by_object(
    layer: RegionAttention, slices: Sequence[Sequence[Slices]], attend: AttendToAll, x: Tensor, prompts: Tensor
) -> Tensor:
    """The same of kind v2 without places, in a loop over images and their objects.

    Mean prompts, as published, are a map that is projected in every cell.
    """
    images, together = [], layer.overlap == "mean_prompt"
    for source, own, objects in zip(layer.qkv(x), prompts, slices, strict=True):
        total, count = torch.zeros_like(source[..., : x.shape[-1]]), torch.zeros_like(source[..., :1])
        for rows, columns in objects:
            count[rows, columns] += 1
        mixed = source + layer.prompt(prompt_map(own, objects, count)) if together else source
        for prompt, (rows, columns) in zip(own[: len(objects)], objects, strict=True):  # the rest is padding
            part = mixed[rows, columns] if together else mixed[rows, columns] + layer.prompt(prompt)
            total[rows, columns] += attend(layer, part)
        images.append(torch.where(count > 0, total / count.clamp(min=1), attend(layer, source)))
    return layer.proj(torch.stack(images))


def prompt_map(prompts: Tensor, objects: Sequence[Slices], count: Tensor) -> Tensor:
    """Returns the mean of the prompts (R, D) of the objects in each cell, count (h, w, 1) of them: (h, w, D)."""
    total = prompts.new_zeros(*count.shape[:2], prompts.shape[-1])
    for prompt, (rows, columns) in zip(prompts[: len(objects)], objects, strict=True):
        total[rows, columns] += prompt
    return total / count.clamp(min=1)


def attend_to_all(layer: RegionAttention, qkv: Tensor) -> Tensor:
    """Attends from all cells to all with two products and a softmax: (h, w, 3 C) -> (h, w, C)."""
    q, k, v = (part.flatten(0, 1).transpose(0, 1) for part in layer.split_heads(qkv))  # (heads, N, d)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(*qkv.shape[:2], -1)


def attend_to_all_fused(layer: RegionAttention, qkv: Tensor) -> Tensor:
    """The same with the fused attention of the layer."""
    return layer.core(*layer.split_heads(qkv.unsqueeze(0)), scale=layer.scale)[0].flatten(-2)


def attend_to_whole_map(layer: RegionAttention, x: Tensor, prompts: Tensor) -> Tensor:
    """Attends from all cells to all, without prompts: x (B, h, w, C) -> the same shape."""
    return layer(x)


# What is timed


def region_attention_cases(device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """Returns what to time, by case and way: boxes of `shapes` in five ways, and many small boxes beside few.

    Ours and the whole map begin with x and boxes, the loop with x and the cells of its objects.
    """
    boxes, cases = shapes_boxes(IMAGES, device), {}
    many, few = (small_boxes(IMAGES, count, device) for count in (MANY, FEW))
    for side in SIDES:
        slices = boxes.slices(side)
        for overlap in OVERLAPS:
            layer, placed = (make_layer(overlap, places).to(device) for places in (False, True))
            ways = {
                OURS: (layer, attend_by_region, boxes),
                WITH_PLACES: (placed, attend_by_region, boxes),
                LOOP: (layer, attend_object_by_object, slices, attend_to_all),
                FUSED_LOOP: (layer, attend_object_by_object, slices, attend_to_all_fused),
                WHOLE_MAP: (layer, attend_to_whole_map),
            }
            inputs = make_inputs(side, boxes.boxes.shape[1], device)
            for part, run in zip(PASSES, (run_forward, run_forward_backward), strict=True):
                cases[case_name(side, overlap, part)] = {
                    way: partial(run, used, partial(attend, used, *how), *inputs)
                    for way, (used, attend, *how) in ways.items()
                }
        layer = make_layer(OVERLAPS[0]).to(device)
        cases[many_name(side)] = {
            way: partial(
                run_forward_backward,
                layer,
                partial(attend_by_region, layer, each),
                *make_inputs(side, each.boxes.shape[1], device),
            )
            for way, each in ((OURS, many), (FEW_BOXES, few))
        }
    return cases


def case_name(side: int, overlap: str, part: str) -> str:
    """The name of a case with boxes of `shapes`, of one of PASSES."""
    return f"{side}x{side}, overlap {overlap}, {part}"


def many_name(side: int) -> str:
    """The name of the case with many boxes."""
    return f"{side}x{side}, {MANY} small boxes, {PASSES[1]}"


def make_layer(overlap: str, places: bool = False) -> RegionAttention:
    """Returns a layer of kind v2 with random weights."""
    torch.manual_seed(0)
    return RegionAttention(CHANNELS, HEADS, CHANNELS, kind="v2", overlap=overlap, places=places)


def make_inputs(side: int, prompts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draws x (B, side, side, C) and prompts (B, R, C)."""
    rng = torch.Generator().manual_seed(0)
    shapes_of = (IMAGES, side, side, CHANNELS), (IMAGES, prompts, CHANNELS)
    return tuple(torch.randn(shape, generator=rng).to(device) for shape in shapes_of)


@torch.no_grad()
def run_forward(layer: RegionAttention, attend: Attend, x: Tensor, prompts: Tensor) -> Tensor:
    """Runs the forward pass."""
    return attend(x, prompts)


def run_forward_backward(layer: RegionAttention, attend: Attend, x: Tensor, prompts: Tensor) -> list[Tensor | None]:
    """Runs forward and backward; returns the gradients of x, the prompts, and the layer's parameters."""
    leaves = [x.detach().requires_grad_(), prompts.detach().requires_grad_()]
    return torch.autograd.grad(attend(*leaves).sum(), [*leaves, *layer.parameters()], allow_unused=True)


def compare_ways(rows: Sequence[Row], name: str) -> Iterator[str]:
    """Yields the ratios of the ways in rows of results whose workloads are `name`, case and way."""
    seconds = {row["workload"]: row["seconds"] for row in rows}
    for side in SIDES:
        for case in (case_name(side, overlap, part) for overlap in OVERLAPS for part in PASSES):
            ours, placed, loop, fused, whole = (
                seconds[f"{name}, {case}, {way}"] for way in (OURS, WITH_PLACES, LOOP, FUSED_LOOP, WHOLE_MAP)
            )
            faster = f"{loop / ours:.2f}x as fast as the loop ({fused / ours:.2f}x with fused attention)"
            slower = f"{ours / whole:.2f}x the time of the whole map ({placed / whole:.2f}x with places)"
            yield f"{case}: {faster}, {slower}"
        many, few = (seconds[f"{name}, {many_name(side)}, {way}"] for way in (OURS, FEW_BOXES))
        yield f"{many_name(side)}: {many / few:.2f}x the time of {FEW}"
