"""Attention within regions: against public code, against a loop over objects, and independent of the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode

import models.attention
from experiments.metrics.cost import count_launches
from helpers.fake_device import DEVICE, FakeDeviceMode
from models.attention import record_maps
from models.conditioning import Condition, Tokens
from models.region_attention import (
    LENGTHS,
    OVERLAPS,
    REGION_ATTENTION,
    RegionAttention,
    find_branches,
    layout_of,
    make_layout,
    prompts_of,
)
from models.regions import Regions
from models.unet_attention import AttentionOptions, RegionBlock

FIXTURES = Path(__file__).parents[1] / "fixtures" / "spatial"
C, HEADS, D = 16, 2, 6
every_kind = pytest.mark.parametrize("kind", REGION_ATTENTION)
every_overlap = pytest.mark.parametrize("overlap", OVERLAPS)
CASES = {1: ("none", "apart", "overlap", "null_class"), 4: ("none", "overlap", "tiny", "whole")}


def recorded(name):
    return {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / f"{name}.npz").items()}


def published(f, heads, **options):
    """The layer of recorded weights, and the function from classes to prompts.

    Its null prompt is part of the bias, and prompts are relative to it.
    """
    layer = RegionAttention(32, heads, 16, places=False, **options)

    def reorder(weight):  # channels come head by head, each with its query, key and value
        return rearrange(weight.squeeze(-1), "(heads three d) ... -> (three heads d) ...", heads=heads, three=3)

    table = f["weights.attention.class_embedder.class_embedder.weight"]
    prompt = reorder(f["weights.attention.to_prompt_token.weight"])
    bias = reorder(f["weights.qkv.bias"]) + prompt @ table[-1]
    state = {"qkv.weight": reorder(f["weights.qkv.weight"]), "qkv.bias": bias, "prompt.weight": prompt}
    state |= {"proj.weight": f["weights.proj_out.weight"].squeeze(-1), "proj.bias": f["weights.proj_out.bias"]}
    layer.load_state_dict(state)
    return layer, lambda classes: table[classes] - table[-1]


def run_published(f, cells, classes, heads, **options):
    """The output of the whole block, (B, C, h, w), for cells (B, R, h, w) and classes (B, R)."""
    layer, prompts = published(f, heads, **options)
    x = F.group_norm(f["x"], 8, f["weights.norm.weight"], f["weights.norm.bias"], 1e-5).permute(0, 2, 3, 1)
    u, v = cells[:, :, 0].float(), cells[:, :, :, 0].float()  # not used
    return f["x"] + layer(x, prompts(classes), make_layout(cells, layer.kind, u, v)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("heads", CASES)
@pytest.mark.parametrize("kind", ["v2", "v1", "no_partial"])
def test_layout_attention_equals_the_reference(heads, kind):
    f = recorded(f"layout_attention_heads{heads}")
    for case in CASES[heads]:
        cells, classes = f[f"masks.{case}"].unsqueeze(0), f[f"boxes.{case}"][..., 4].long()
        out = run_published(f, cells, classes, heads, kind=kind, overlap="mean_prompt")
        assert torch.allclose(out, f[f"out_{kind}.{case}"], rtol=0, atol=2e-5), case
        own = run_published(f, cells, classes, heads, kind=kind, overlap="mean")
        if kind == "no_partial" or case == "none":
            assert torch.equal(own, out)
            continue
        assert torch.allclose(own, f[f"right_per_object_{kind}.{case}"].float(), rtol=0, atol=2e-5), case
        assert ((own - out).abs().max() > 0.1) == (case == "overlap")


def test_segmentation_equals_the_reference():
    f = recorded("layout_segmentation")
    maps = f["seg_8x12"]
    cells = maps.unsqueeze(1) == torch.arange(10)[:, None, None]  # 255: of no region
    out = run_published(f, cells, torch.arange(10).expand(2, -1), 2, kind="segmentation")
    assert torch.allclose(out, f["out"], rtol=0, atol=2e-5)


# Against a loop over objects


def random_regions(counts, dtype=torch.float64, seed=0, pad=0):
    """Boxes of very different sizes, so many in each image; the first of many is the whole image."""
    g, most = torch.Generator().manual_seed(seed), max(counts) + pad
    centre = torch.rand(len(counts), most, 2, generator=g, dtype=dtype)
    side = 0.6 * torch.rand(len(counts), most, 2, generator=g, dtype=dtype) ** 2 + 0.02
    boxes = torch.cat([centre - side / 2, centre + side / 2], -1)
    if most > 2:
        boxes[:, 0] = torch.tensor([0.0, 0, 1, 1])
    present = torch.arange(most) < torch.tensor(counts)[:, None]
    return Regions.from_fields({"boxes": boxes, "boxes_mask": present})


def condition_of(regions, seed=0, dtype=torch.float64):
    """Regions with a token for each."""
    batch, count = regions.present.shape
    values = torch.randn(batch, count, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    membership = torch.eye(count, dtype=torch.bool).expand(batch, -1, -1)
    return Condition({"objects": Tokens(values, regions.present, membership)}, regions)


def feature_map(batch, height=9, width=6, dtype=torch.float64, seed=0):
    return torch.randn(batch, C, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def block_of(kind="v2", overlap="mean", dtype=torch.float64, places=True):
    """A block with random weights, since initial zeros would hide errors."""
    options = AttentionOptions(
        heads=HEADS, prompt_width=D, region_attention=kind, overlap=overlap, region_places=places
    )
    block = RegionBlock(C, options).to(dtype)
    for p in block.parameters():
        p.data = 0.4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=dtype)
    return block


def places_of(layer, u, v):
    """What a box adds to queries, keys and values in each cell for its place, (N, 3 C)."""
    height, width, weights = len(v), len(u), layer.places.weight.chunk(2, 1)
    added = torch.zeros(height, width, 3 * C, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for weight, place in zip(weights, (u[x].item(), v[y].item()), strict=True):
                angles = [math.pi * 2**k * place for k in range(4)]
                features = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
                added[y, x] += weight @ torch.tensor(features, dtype=torch.float64)
    return added.flatten(0, 1)


def attention(layer, rows, keys):
    """Of rows (N, 3 C), queries of all cells to those of `keys` (N,) bool."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(0, 1) for part in rows.chunk(3, -1))
    logits = (q @ k.mT / math.sqrt(C / HEADS)).masked_fill(~keys, -math.inf)
    return (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)


def loop(block, x, condition):
    """The block for one image, x (C, h, w), object by object."""
    (height, width), layer, regions = x.shape[1:], block.attention, condition.regions
    qkv = layer.qkv(block.norm(x.unsqueeze(0))[0].flatten(1).T)  # (N, 3 C)
    everywhere, whole = torch.ones(height * width, dtype=torch.bool), [0]
    objects = range(int(regions.present[0].sum()))
    cells = {r: regions.at(height, width)[0, r].flatten() for r in objects}
    if layer.overlap == "front":
        front = regions.front(height, width)[0].flatten()
        cells = {r: front == r for r in objects}
    shares = {r: each.double() for r, each in cells.items()}
    if layer.kind == "segmentation" and layer.overlap != "front":
        shares = {r: regions.visible(height, width)[0, r].flatten().double() for r in objects}
    else:
        count = sum(shares.values()).clamp(min=1) if objects else 1
        shares = {r: each / count for r, each in shares.items()}
    prompts = {}
    for r in objects:
        prompts[r] = layer.prompt(condition.streams["objects"].values[0, r])
        prompts[r] = prompts[r] + places_of(layer, *(place[0, r] for place in regions.places(height, width)))
    mixed = qkv + sum(shares[r][:, None] * prompts[r] for r in objects)
    if layer.kind in ("no_partial", "segmentation"):
        out = attention(layer, mixed, everywhere)
    else:
        whole, total = attention(layer, qkv, everywhere), torch.zeros(height * width, C, dtype=torch.float64)
        for r in objects:
            if cells[r].any():
                rows = mixed if layer.overlap == "mean_prompt" else qkv + prompts[r]
                total += attention(layer, rows, cells[r]).masked_fill(~cells[r][:, None], 0)
        count = sum(cells.values(), torch.zeros(height * width))[:, None]
        out = (total + whole) / (count + 1) if layer.kind == "v1" else torch.where(count > 0, total / count, whole)
    return x + layer.proj(out).T.view_as(x)


@every_kind
@every_overlap
def test_a_block_is_a_loop_over_images_and_objects(kind, overlap):
    counts = [0, 1, 5, 12]
    block, x, condition = block_of(kind, overlap), feature_map(4), condition_of(random_regions(counts))
    out = block(x, condition)
    for i in range(len(counts)):
        assert torch.allclose(out[i], loop(block, x[i], condition[i : i + 1]), rtol=0, atol=1e-5), counts[i]
    assert torch.allclose(out[0], block(x[:1], Condition())[0], rtol=0, atol=1e-12)  # without regions


# The batch


@every_kind
@every_overlap
def test_a_batch_equals_its_images_alone(kind, overlap):
    """To rounding in float64, though alone they have fewer regions; their gradients too."""
    block, counts = block_of(kind, overlap), [0, 1, 5, 100]
    x, regions = feature_map(4).requires_grad_(), random_regions(counts)
    condition = condition_of(regions)
    out = block(x, condition)
    out.square().sum().backward()
    for i, count in enumerate(counts):
        part = condition[i : i + 1]
        tokens = Tokens(*(tensor[:, :count] for tensor in part.streams["objects"][:3]))
        tokens = tokens._replace(membership=tokens.membership[..., :count])
        fewer = part.regions.map_tensors(lambda tensor, n=count: tensor[:, :n] if tensor.ndim > 1 else tensor)
        alone = x[i : i + 1].detach().requires_grad_()
        expected = block(alone, Condition({"objects": tokens}, fewer))
        expected.square().sum().backward()
        assert torch.allclose(out[i], expected[0], rtol=0, atol=1e-12), count
        assert torch.allclose(x.grad[i], alone.grad[0], rtol=0, atol=1e-11), count


@every_kind
@every_overlap
def test_neighbours_in_a_batch_change_no_bit(kind, overlap):
    """Their images, boxes and prompts are others, of the same shapes."""
    block = block_of(kind, overlap, torch.float32)
    outputs = []
    for seed in range(4):
        regions, others = random_regions([7, 3, 1, 9]), random_regions([7, 9 - seed, 9, seed], seed=seed)
        mixed = Regions.cat([regions[:1], others[1:]])
        tokens = torch.cat([condition_of(regions, 0).streams["objects"].values[:1]] * 4)
        tokens[1:] += torch.randn(3, 9, D, generator=torch.Generator().manual_seed(seed))
        condition = condition_of(mixed, dtype=torch.float32)
        stream = condition.streams["objects"]._replace(values=tokens.float())
        x = torch.cat([feature_map(1), feature_map(3, seed=seed)]).float()
        outputs.append(block(x, Condition({"objects": stream}, mixed))[0])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def cells_of(counts, height, width):
    return random_regions(counts).at(height, width).flatten(2)


def test_regions_are_grouped_by_size():
    """A whole image beside a hundred small boxes: few groups, none padded to more than twice its size."""
    cells = cells_of([100, 7], 16, 16)
    branches = find_branches(cells, ~cells.any(1, keepdim=True))
    sizes, shortest = cells.sum(2), 256 // 2 ** (LENGTHS - 1)
    assert len(branches.objects) <= LENGTHS and len(branches.null) <= 2
    assert sum(len(group.owners) for group in branches.objects) == (sizes > 0).sum()
    for owners, places, inside in branches.objects:
        size = sizes.flatten()[owners]
        assert torch.equal(inside.sum(1), size)
        assert (places.shape[1] <= (2 * size).clamp(min=shortest)).all() and places.shape[1] >= size.max()


def test_only_uncovered_cells_attend_to_the_whole_map():
    cells = torch.zeros(3, 2, 256, dtype=torch.bool)
    cells[0, 0, :200], cells[0, 1, 100:250], cells[1, 0] = True, True, True  # 6 cells are left, none, and all
    branches = find_branches(cells, ~cells.any(1, keepdim=True))
    assert [(group.owners.tolist(), group.inside.sum(1).tolist()) for group in branches.null] == [
        ([0], [6]),
        ([2], [256]),
    ]
    assert branches.null[0].cells.shape[1] == 256 // 2 ** (LENGTHS - 1)


def test_the_number_of_calls_does_not_grow_with_regions(monkeypatch):
    calls = []
    attend = models.attention.attend
    monkeypatch.setattr(models.attention, "attend", lambda *args, **kwargs: calls.append(1) or attend(*args, **kwargs))
    numbers = []
    for count in (1, 10, 100):
        calls.clear()
        block_of()(feature_map(3), condition_of(random_regions([count, 1, count])))
        numbers.append(len(calls))
    assert max(numbers) <= 2 * LENGTHS


# Devices and graphs


def test_the_cpu_waits_once_for_a_level():
    with FakeDeviceMode():
        regions, x = random_regions([3, 9]).to(DEVICE), feature_map(2).to(DEVICE)
        condition = condition_of(random_regions([3, 9])).to(DEVICE)
        condition = Condition(condition.streams, regions)
        blocks = [block_of().to(DEVICE) for _ in range(2)]
        with count_launches(DEVICE) as launches:
            for block in blocks:
                x = block(x, condition)
    assert launches.waits == 1


@pytest.mark.slow
def test_a_compiled_block_is_the_same_in_one_graph():
    block, x, condition = block_of(), feature_map(2), condition_of(random_regions([2, 5]))
    run = torch.compile(block, backend="aot_eager", fullgraph=True)
    out = run(x, condition_of(random_regions([2, 5])))
    assert torch.allclose(out, block(x, condition), rtol=0, atol=1e-12)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


@every_kind
def test_fixed_shapes_run_on_a_gpu_without_its_numbers(kind, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    condition = condition_of(random_regions([2, 5]), dtype=torch.float32)
    options = AttentionOptions(heads=HEADS, prompt_width=D, region_attention=kind)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        out = RegionBlock(C, options)(torch.randn(2, C, 9, 6), condition.to("cuda"))
    assert out.device.type == "cuda" and out.shape == (2, C, 9, 6)


def test_fixed_shapes_give_the_same(monkeypatch):
    block, x, condition = block_of(), feature_map(3), condition_of(random_regions([0, 2, 5], pad=3))
    expected = block(x, condition)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(block(x, condition_of(random_regions([0, 2, 5], pad=3))), expected, rtol=0, atol=1e-12)


def test_bfloat16_is_close():
    block, x, condition = block_of(dtype=torch.float32), feature_map(3).float(), random_regions([0, 2, 5])
    condition = condition_of(condition, dtype=torch.float32)
    expected = block(x, condition)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, condition)
    out.float().sum().backward()
    assert (out - expected).abs().mean() < 0.02 * expected.abs().mean()


# Maps, gradients, prompts


@pytest.mark.parametrize("kind", ["v2", "v1"])
@every_overlap
def test_recorded_maps_stay_inside_regions(kind, overlap):
    block, x, regions = block_of(kind, overlap), feature_map(3), random_regions([0, 1, 5])
    condition = condition_of(regions)
    with record_maps(block) as maps:
        out = block(x, condition)
    (weights,) = maps["attention"]  # (B, heads, N, N)
    assert weights.shape == (3, HEADS, 54, 54) and torch.equal(out, block(x, condition))
    assert torch.allclose(weights.sum(-1), torch.ones(1).double(), atol=1e-6)
    cells = regions.at(9, 6).flatten(2)
    if overlap == "front":
        cells = regions.front(9, 6).flatten(1).unsqueeze(1) == torch.arange(5)[:, None]
    together = (cells.unsqueeze(3) & cells.unsqueeze(2)).any(1)  # (B, N, N): in the same region
    free = ~cells.any(1).unsqueeze(2)
    seen = (weights > 0).any(1)
    assert torch.equal(seen, (together | free) if kind == "v2" else torch.ones_like(seen))
    if kind == "v1":  # the whole map is one of the branches
        inside = (weights * together.unsqueeze(1)).sum(-1)
        count = cells.sum(1).unsqueeze(1)
        assert (inside >= count / (count + 1) - 1e-6).all()


def test_a_recorded_map_is_that_of_one_attention():
    block, x = block_of("no_partial"), feature_map(2)
    with record_maps(block) as maps:
        block(x, condition_of(random_regions([1, 2]))), block(x, Condition())
    assert [each.shape for each in maps["attention"]] == [(2, HEADS, 54, 54)] * 2


@every_kind
@every_overlap
@pytest.mark.parametrize("counts", [[0, 0], [2, 0]], ids=str)
def test_every_weight_gets_a_gradient_even_without_regions(kind, overlap, counts):
    """A distributed step waits for all of them."""
    for pad in (0, 2):
        block, condition = block_of(kind, overlap), condition_of(random_regions(counts, pad=pad))
        block(feature_map(2), condition).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
        assert any(counts) == all(p.grad.any() for p in block.parameters())


def test_a_block_starts_as_the_identity_and_its_places_at_zero():
    options = AttentionOptions(heads=HEADS, prompt_width=D)
    block, x, condition = RegionBlock(C, options).double(), feature_map(2), condition_of(random_regions([1, 5]))
    assert torch.equal(block(x, condition), x) and torch.equal(block(x, Condition()), x)
    plain = RegionBlock(C, AttentionOptions(heads=HEADS, prompt_width=D, region_places=False)).double()
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if "places" not in key})
    for each in (block, plain):
        torch.nn.init.normal_(each.attention.proj.weight, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x, condition), plain(x, condition)) and not torch.equal(block(x, condition), x)


def test_a_prompt_is_the_mean_of_the_tokens_of_a_region():
    values = torch.randn(1, 4, D)
    membership = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]]).bool()
    tokens = Tokens(values, torch.tensor([[True, True, True, False]]), membership)
    regions = Regions(present=torch.ones(1, 3).bool(), boxes=torch.rand(1, 3, 4))
    prompts = prompts_of(Condition({"words": tokens}, regions))
    assert torch.allclose(prompts[0, 0], values[0, :2].mean(0)) and torch.equal(prompts[0, 1], values[0, 1])
    assert not prompts[0, 2].any()
    with pytest.raises(ValueError, match="got regions and no tokens that describe them: add a condition"):
        prompts_of(Condition({}, regions))


def test_the_front_region_follows_the_order_of_depth():
    boxes = torch.tensor([[[0, 0, 1, 1], [0, 0, 0.5, 1]]])
    for front_first, seen in ((False, [[1, 0], [1, 0]]), (True, [[0, 0], [0, 0]])):
        regions = Regions(present=torch.ones(1, 2).bool(), boxes=boxes, front_first=front_first)
        weights = layout_of(regions, 2, 2, "v2", "front").weights
        assert weights.argmax(1)[0].tolist() == seen and torch.equal(weights.sum(1), torch.ones(1, 2, 2))


@pytest.mark.parametrize("options", [{"kind": "v3"}, {"overlap": "none"}], ids=str)
def test_unknown_words_are_refused(options):
    with pytest.raises(ValueError, match="got region attention .*, wanted one of v2, v1, no_partial, segmentation and"):
        RegionAttention(C, HEADS, D, **options)


def test_a_block_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without a condition whose tokens describe regions: pass --cond"):
        RegionBlock(C, AttentionOptions(heads=HEADS))
