"""Layouts for codes: keys of condition tokens, equal rows, and windows that each get their part of the layout."""

import json

import pytest
import torch
from torch import nn

from diffusion.rng import Streams
from models.attention import CrossAttention
from models.conditioning import Condition
from models.conditions import boxes, image, layout
from models.kv_cache import KVCache
from models.streams import GatedTokens, Tokens
from models.transformer import AttentionConfig, CausalTransformer, Transformer
from train.data.collate import collate
from train.data.formats.categories import Categories
from train.layout_files import LayoutVocabulary
from train.layouts import read_layouts
from train.samplers import absorbing, autoregressive
from train.samplers.absorbing import AbsorbingSampler
from train.samplers.autoregressive import AutoregressiveSampler

GRID, CANVAS, CODES, CLASSES = (4, 4), (6, 10), 5, 3
SMALL = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
OPTIONS = {
    "boxes": boxes.Config(boxes_classes=CLASSES),
    "gated": boxes.Config(boxes_classes=CLASSES, boxes_gated=True, boxes_width=12),
    "layout": layout.Config(layout_classes=CLASSES, layout_places=False),
    "image": image.Config(condition_channels=CLASSES),
}
KINDS = {"absorbing": AbsorbingSampler, "autoregressive": AutoregressiveSampler}
CONFIGS = {"absorbing": absorbing.Config, "autoregressive": autoregressive.Config}
# rows and columns of the canvas that two objects cover, one of them cut by every window, and their classes
OBJECTS = [((0, 6), (3, 5), 1), ((1, 3), (7, 10), 2)]


def build_sampler(name, condition):
    """A sampler of codes with random weights."""
    torch.manual_seed(0)
    named = "boxes" if condition == "gated" else condition
    config = CONFIGS[name](**SMALL, conditions=(named,), condition_options=OPTIONS[condition])
    sampler = KINDS[name](config, codes=CODES, grid=GRID, n_classes=0)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def layouts(*images):
    """Boxes (x0, y0, x1, y1) and classes of images, as the fields of a batch."""
    most = max(map(len, images))
    padded = [[*image, *[(0.0, 0.0, 0.0, 0.0, 0)] * (most - len(image))] for image in images]
    numbers = torch.tensor(padded).view(len(images), most, 5)
    mask = torch.arange(most) < torch.tensor([len(image) for image in images])[:, None]
    return {"boxes": numbers[..., :4], "boxes_mask": mask, "box_class": numbers[..., 4].long()}


def canvas_layout(objects=OBJECTS):
    """The boxes of objects on the canvas."""
    height, width = CANVAS
    return [(x[0] / width, y[0] / height, x[1] / width, y[1] / height, number) for y, x, number in objects]


def painted(objects=OBJECTS):
    """Codes of the canvas with the objects in it: 1 + class, 0 elsewhere."""
    codes = torch.zeros(CANVAS, dtype=torch.long)
    for (top, bottom), (left, right), number in objects:
        codes[top:bottom, left:right] = 1 + number
    return codes


A, B = (0.0, 0.0, 0.5, 0.5, 0), (0.5, 0.25, 1.0, 1.0, 2)
BATCH = layouts([A], [A, B], [A], [B, A])


def count_calls(network, counts):
    """Counts the calls of the layers that project condition tokens to keys and values."""
    for layer in network.modules():
        if isinstance(layer, CrossAttention):
            layer.kv.register_forward_hook(lambda *_: counts.append(1))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_computed_before_give_the_same_logits(qk_norm):
    encoders = {"boxes": boxes.BoxEncoder(CLASSES, 12)}
    options = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 2, "encoders": encoders}
    network = Transformer(**options, attention=AttentionConfig(qk_norm=qk_norm))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids, calls = torch.randint(CODES, (4, *GRID)), []
    condition = network.encode({"boxes": BATCH}, ids)
    expected = network(ids, condition)
    kept = network.with_keys(condition)
    count_calls(network, calls)
    torch.testing.assert_close(network(ids, kept), expected, rtol=0, atol=1e-6)
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(network(ids[rows], kept[rows]), expected[rows], rtol=0, atol=1e-5)
    assert not calls
    other = Transformer(**options, attention=AttentionConfig(qk_norm=qk_norm))
    torch.testing.assert_close(other(ids, kept), other(ids, condition))  # keys are those of the other's layers


def test_the_next_code_takes_keys_computed_before():
    encoders = {"boxes": boxes.BoxEncoder(CLASSES, 12, everywhere=False)}
    network = CausalTransformer(codes=CODES, grid=GRID, width=16, heads=2, layers=2, encoders=encoders)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids, calls = torch.randint(CODES, (4, *GRID)), []
    condition = network.encode({"boxes": BATCH}, ids)
    whole, kept, kv_cache = network(ids, condition).flatten(1, 2), network.with_keys(condition), KVCache(GRID)
    count_calls(network, calls)
    for count in range(16):
        logits = network(ids.flatten(1)[:, :count], kept, kv_cache)
        torch.testing.assert_close(logits, whole[:, count], rtol=0, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("condition", ["boxes", "gated"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_sampling_run_computes_token_keys_once(name, condition, guidance):
    sampler, calls = build_sampler(name, condition), []
    count_calls(sampler.network, calls)
    module = {"absorbing": absorbing, "autoregressive": autoregressive}[name]
    sampler.sample(sampler.network, Streams([1, 2, 3, 4]), batch=BATCH, options=module.Sampling(guidance=guidance))
    assert len(calls) == SMALL["bert_n_layers"]


@pytest.mark.parametrize("name", ["boxes", "layout"])
def test_equal_rows_share_a_call_if_their_layouts_are_equal(name):
    sampler, sizes = build_sampler("absorbing", name), []
    x, t = torch.full((4, *GRID), CODES), torch.ones(4)  # all codes are masked
    expected = torch.cat([sampler.network(x[:1], {name: layouts(image)}) for image in ([A], [A, B], [A], [B, A])])
    sampler.network.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    logits = sampler.make_denoiser(sampler.network, BATCH, absorbing.Sampling(), x)(x, t)
    assert sizes == [3]  # the first and the third are equal; in the others, the order is the depth
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    moved = layouts([A], [A, B], [(0.0, 0.0, 0.5, 0.51, 0)], [B, (*A[:4], 1)])
    sampler.make_denoiser(sampler.network, moved, absorbing.Sampling(), x)(x, t)
    assert sizes == [3, 4]


def paints(sampler, what):
    """Lets the network paint what it is given: the largest share of its map, or the regions of its condition."""

    def forward(ids, condition):
        if what == "regions":
            number = condition.regions.front(*ids.shape[1:], "half")
            index = number.clamp(min=0).flatten(1)
            painted = condition.regions.class_ids.gather(1, index).view_as(number).where(number >= 0, -1)
            given = nn.functional.one_hot(painted + 1, CODES)
        else:
            shares = condition.map()
            given = torch.cat([0.5 - shares.sum(1, keepdim=True), shares, shares[:, :1] * 0 - 1], 1).movedim(1, -1)
        return 1000.0 * given

    sampler.network.forward = forward
    return sampler


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["layout", "boxes", "image"])
def test_windows_paint_each_object_once(name, stride):
    sampler = paints(build_sampler("absorbing", name), "regions" if name == "boxes" else "map")
    others = [((2, 5), (0, 3), 0)]
    batch = layouts(canvas_layout(), canvas_layout(others))
    if name == "image":
        codes = torch.stack([painted(), painted(others)])
        batch = {"condition_image": torch.stack([(codes == 1 + number).float() for number in range(CLASSES)], 1)}
    options = absorbing.Sampling(solver="halton", sample_steps=4, guidance=1.0)
    codes = sampler.sample(
        sampler.network, Streams([1, 2]), batch=batch, options=options, shape=CANVAS, window_stride=stride
    )
    assert torch.equal(codes[0], painted()) and torch.equal(codes[1], painted(others))


@pytest.mark.parametrize("stride", [2, 4])
def test_a_file_of_a_whole_canvas_is_painted_once(tmp_path, stride):
    boxes = [[x[0], y[0], x[1], y[1]] for y, x, _ in OBJECTS]
    entry = {"boxes": boxes, "classes": [number for *_, number in OBJECTS], "size": list(CANVAS)}
    (tmp_path / "canvas.json").write_text(json.dumps([entry]))
    categories = Categories((0, 1, 2), ("a", "b", "c"), (True,) * CLASSES)
    (read,) = read_layouts(tmp_path / "canvas.json", LayoutVocabulary(categories, (), layout.FIELDS, CANVAS))
    sampler = paints(build_sampler("absorbing", "layout"), "map")
    options = absorbing.Sampling(solver="halton", sample_steps=4, guidance=1.0)
    codes = sampler.sample(
        sampler.network,
        Streams([1]),
        batch=collate([read.row]),
        options=options,
        shape=CANVAS,
        window_stride=stride,
    )
    assert torch.equal(codes[0], painted())


def test_guidance_leads_windows_to_their_part_of_a_layout():
    sampler = paints(build_sampler("absorbing", "layout"), "map")
    nn.init.constant_(sampler.network.encoders["layout"].null, 0.01)
    calls, forward = [], sampler.network.forward
    sampler.network.forward = lambda ids, condition: calls.append(condition.map()) or forward(ids, condition)
    options = absorbing.Sampling(solver="halton", sample_steps=1, guidance=2.0)
    batch = layouts(canvas_layout())
    codes = sampler.sample(sampler.network, Streams([1]), batch=batch, options=options, shape=CANVAS, window_stride=4)
    assert torch.equal(codes[0], painted())
    (maps,) = calls  # 2 x 3 windows, without and with their condition; equal ones once
    null = sampler.network.encoders["layout"].null.flatten()
    assert sum(torch.equal(each, null[:, None, None].expand_as(each)) for each in maps) == 1 and 2 < len(maps) <= 7


@pytest.mark.parametrize("condition, kind", [("boxes", Tokens), ("gated", GatedTokens)])
def test_tokens_of_a_window_are_those_of_the_boxes_in_it(condition, kind):
    network = build_sampler("absorbing", condition).network
    canvas, ids, raw = torch.zeros(1, *CANVAS).long(), torch.zeros(1, *GRID).long(), layouts(canvas_layout())
    whole = network.encode({"boxes": raw}, canvas)
    for corner in [(0, 0), (2, 3), (1, 6)]:
        window = network.encode_window({"boxes": raw}, whole, ids, corner, CANVAS)
        inside = []
        for y, x, number in OBJECTS:
            top, bottom = (sorted((0, edge - corner[0], 4))[1] / 4 for edge in y)
            left, right = (sorted((0, edge - corner[1], 4))[1] / 4 for edge in x)
            inside += [(left, top, right, bottom, number)] if left < right and top < bottom else []
        expected = network.encode({"boxes": layouts(inside)}, ids)
        assert torch.allclose(read(window, kind), read(expected, kind), atol=1e-5)
        assert len(read(window, kind)) == len(inside)
    null = network.encode({}, canvas)
    window = network.encode_window({}, null, ids, (0, 0), CANVAS)
    assert torch.equal(window.tokens(kind).values, null.tokens(kind).values)


def read(condition: Condition, kind: type[Tokens]):
    """The tokens of the only image that are no padding."""
    tokens = condition.tokens(kind)
    return tokens.values[0][tokens.mask[0]]
