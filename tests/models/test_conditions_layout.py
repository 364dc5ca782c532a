"""Maps of layouts, and tokens of objects: shares, places, colours, segments, images without regions."""

import dataclasses

import pytest
import torch

from experiments.metrics.cost import count_launches
from helpers.fake_device import DEVICE, FakeDeviceMode
from models.conditioning import Condition, ConditionConfig, Conditioner
from models.conditions import image, layout, objects
from train.cli.plugins import merge_configs

WIDTH = 12
LAYOUT = {
    "boxes": torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.9, 1]], [[0.1, 0, 1, 1]] * 2] * 2),
    "boxes_mask": torch.tensor([[True, True], [True, False]] * 2),
    "box_class": torch.tensor([[0, 2], [1, 0]] * 2),
}
DROP = torch.tensor([False, True, False, True])


def x():
    return torch.zeros(4, 3, 6, 8)


def build_encoder(module, **options):
    """An encoder with random weights, so that its null is not zero."""
    encoder = module.build(module.Config(**options), WIDTH, 3)
    for p in encoder.parameters():
        p.data += torch.randn_like(p)
    return encoder


# Layouts


def layout_map(raw, size=(6, 8), **options):
    return encode_layout(raw, torch.zeros(len(raw["boxes"]), 3, *size), **options)


def encode_layout(raw, canvas, **options):
    encoder = layout.build(layout.Config(**{"layout_classes": 3} | options), WIDTH, 0)
    return Conditioner({"layout": encoder}).eval()({"layout": raw}, canvas).map()


def test_a_layout_is_the_shares_of_classes_and_places():
    boxes = torch.tensor([[[0, 0, 0.5, 1], [0.25, 0.5, 0.75, 1]]])
    raw = {"boxes": boxes, "boxes_mask": torch.ones(1, 2).bool(), "box_class": torch.tensor([[2, 0]])}
    values = layout_map(raw, (2, 8))[0]
    assert values[0].tolist() == [[0] * 8, [0, 0, 1, 1, 1, 1, 0, 0]] and not values[1].any()
    assert values[2].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]  # in front is the later box
    u, v = values[3:]
    assert u[0].tolist() == [0.125, 0.375, 0.625, 0.875, 0, 0, 0, 0]
    assert u[1].tolist() == [0.125, 0.375, 0.125, 0.375, 0.625, 0.875, 0, 0]
    assert v.tolist() == [[0.25] * 4 + [0] * 4, [0.75] * 2 + [0.5] * 4 + [0] * 2]
    half = layout_map(raw, (1, 2), layout_places=False)[0]
    assert half.shape == (3, 1, 2) and half[:, 0].tolist() == [[0.25, 0.25], [0, 0], [0.75, 0]]


def test_colors_of_boxes_are_shares_like_classes():
    raw = LAYOUT | {"box_color": torch.tensor([[1, 0], [0, 0]] * 2)}
    options = {"layout_colors": 2, "layout_places": False}
    values = layout_map(raw, **options)
    assert values.shape == (4, 5, 6, 8)
    assert torch.equal(values[0, 3], values[0, 2]) and torch.equal(values[0, 4], values[0, 0])
    assert layout.build(layout.Config(layout_classes=3, **options), WIDTH, 0).fields == (
        *("boxes", "box_class", "box_color"),
    )
    with pytest.raises(ValueError, match="got box_color 2 as region 0, wanted 0 to 1"):
        layout_map(raw | {"box_color": torch.full((4, 2), 2)}, **options)


def test_a_layout_of_segments_is_the_shares_of_their_pixels():
    ids = torch.tensor([[[7, 7, 9, 0], [7, 9, 9, 0]]])
    raw = {"panoptic": ids, "segment_id": torch.tensor([[9, 7, 4]]), "segment_class": torch.tensor([[1, 1, 0]])}
    values = encode_layout(raw, torch.zeros(1, 3, 1, 2), layout_regions="segments", layout_places=False)[0]
    assert values[:, 0].tolist() == [[0, 0], [1, 0.5], [0, 0]]
    values = encode_layout(raw, torch.zeros(1, 3, 2, 4), layout_regions="segments")[0]
    assert values[3].tolist() == [[0.25, 0.75, 0.75, 0], [0.25, 0.25, 0.75, 0]]


def test_a_layout_of_masks_has_their_shapes_where_they_overlap():
    masks = torch.zeros(1, 2, 2, 4, dtype=torch.uint8)
    masks[0, 0, :, :2] = masks[0, 1, 0, 1:] = masks[0, 1, 1, 3] = 1  # a block, and a hook in front of it
    raw = {"masks": masks, "masks_mask": torch.ones(1, 2).bool(), "box_class": torch.tensor([[2, 0]])}
    raw["box_color"] = torch.tensor([[0, 1]])
    values = encode_layout(raw, torch.zeros(1, 3, 2, 4), layout_regions="masks", layout_colors=2)[0]
    assert values[0].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]] and values[2].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert torch.equal(values[6], values[0]) and torch.equal(values[5], values[2]) and not values[1].any()
    u, v = values[3:5]  # in the boxes around the masks
    assert torch.allclose(u, torch.tensor([[1 / 4, 1 / 6, 3 / 6, 5 / 6], [1 / 4, 3 / 4, 0, 5 / 6]]))
    assert torch.allclose(v, torch.tensor([[1 / 4] * 4, [3 / 4, 3 / 4, 0, 3 / 4]]))
    half = encode_layout(raw, torch.zeros(1, 3, 1, 2), layout_regions="masks", layout_places=False)[0]
    assert half[:, 0].tolist() == [[0.25, 0.75], [0, 0], [0.75, 0]]


def test_regions_of_no_class_have_no_share():
    numbers = torch.tensor([[-1, 3, 1]])
    assert layout.sum_by_number(torch.ones(1, 3, 1, 1), numbers, 3).flatten().tolist() == [0, 1, 0]


def test_an_image_without_boxes_is_not_the_null():
    raw = {"boxes": torch.zeros(2, 0, 4), "boxes_mask": torch.zeros(2, 0).bool(), "box_class": torch.zeros(2, 0).long()}
    encoder = build_encoder(layout, layout_classes=3)
    empty = Conditioner({"layout": encoder})({"layout": raw}, torch.zeros(2, 3, 4, 4)).map()
    assert empty.shape == (2, 5, 4, 4) and not empty.any() and encoder.null.any()


SEGMENTS = {
    "panoptic": torch.randint(0, 4, (4, 9, 7), generator=torch.manual_seed(5)),
    "segment_id": torch.tensor([[1, 2, 3]] * 4),
    "segment_id_mask": torch.tensor([[True, True, False]] * 4),
    "segment_class": torch.tensor([[2, 1, 0]] * 4),
}
LAYOUTS = {
    "boxes": (LAYOUT | {"box_color": torch.zeros(4, 2).long()}, {"layout_colors": 2}),
    "masks": (
        {
            "masks": torch.rand(4, 2, 9, 7, generator=torch.manual_seed(5)) < 0.4,
            "masks_mask": LAYOUT["boxes_mask"],
            "box_class": LAYOUT["box_class"],
        },
        {"layout_regions": "masks"},
    ),
    "segments": (SEGMENTS, {"layout_regions": "segments"}),
}


def layout_in_training(kind):
    """A layout in a network that trains, the arguments of a call, and what it returns."""
    raw, options = LAYOUTS[kind]
    encoder = layout.build(layout.Config(layout_classes=3, **options), WIDTH, 0)
    conditioner, drop = Conditioner({"layout": encoder}).train(), {"regions": DROP}
    return conditioner, ({"layout": raw}, x(), drop), conditioner({"layout": raw}, x(), drop).map()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_does_not_wait_for_the_device_in_training(kind):
    conditioner, (fields, canvas, drop), expected = layout_in_training(kind)
    with FakeDeviceMode():
        fields = {"layout": {name: value.to(DEVICE) for name, value in fields["layout"].items()}}
        conditioner.to(DEVICE)
        canvas, drop = canvas.to(DEVICE), {"regions": drop["regions"].to(DEVICE)}
        with count_launches(DEVICE) as launches:
            values = conditioner(fields, canvas, drop).map()
        assert torch.allclose(values.detach().cpu(), expected)
    assert launches.waits == 0 and 50 < launches.count < 400, launches.waiting


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_is_compiled_as_one_graph(kind):
    conditioner, arguments, expected = layout_in_training(kind)
    encode = torch.compile(lambda *args: conditioner(*args).map(), fullgraph=True, backend="eager")
    assert torch.equal(encode(*arguments), expected)


def test_the_classes_of_a_layout_are_those_of_the_data():
    assert (
        layout.Config().for_data(7).layout_classes == 7
        and layout.Config(layout_classes=4).for_data(0).layout_classes == 4
    )
    with pytest.raises(ValueError, match="got layout_classes 4, the data set has 7: leave --layout_classes out"):
        layout.Config(layout_classes=4).for_data(7)
    with pytest.raises(ValueError, match="no classes for the condition layout, .*: pass --layout_classes N"):
        layout.build(layout.Config().for_data(0), WIDTH, 0)
    with pytest.raises(ValueError, match="layout_colors for segments"):
        layout.Config(layout_colors=2, layout_regions="segments")
    both = merge_configs([image.Config, layout.Config], ConditionConfig)(condition_channels=2)
    assert both.for_data(5) == dataclasses.replace(both, layout_classes=5)


# Objects


def test_an_object_is_the_sum_of_its_class_and_colour():
    raw = LAYOUT | {"box_color": torch.tensor([[1, 0], [0, 0]] * 2)}
    encoder = objects.build(objects.Config(objects_classes=3, objects_colors=2), WIDTH, 0)
    assert encoder.fields == ("boxes", "box_class", "box_color") and encoder.token_width == WIDTH
    condition = Conditioner({"objects": encoder}).eval()({"objects": raw}, x())
    tokens = condition.streams["objects"]
    assert torch.equal(tokens.values[0, 0], encoder.embedding.weight[0] + encoder.color.weight[1])
    assert torch.equal(tokens.values[0, 1], encoder.embedding.weight[2] + encoder.color.weight[0])
    assert torch.equal(tokens.mask, LAYOUT["boxes_mask"])
    seen = condition.regions.at(2, 2).flatten(2).mT  # each cell sees the tokens of the boxes that cover it
    assert torch.equal(condition.attention_mask(2, 2), seen) and not seen[1, :, 1].any()
    with pytest.raises(ValueError, match="got box_color 2 as region 0, wanted 0 to 1"):
        Conditioner({"objects": encoder}).eval()({"objects": raw | {"box_color": torch.full((4, 2), 2)}}, x())


def test_objects_of_segments_and_none_at_all():
    encoder = objects.build(objects.Config(objects_classes=3, objects_regions="segments"), WIDTH, 0)
    tokens = Conditioner({"objects": encoder})({"objects": SEGMENTS}, x()).streams["objects"]
    assert torch.equal(tokens.values[:, 0], encoder.embedding.weight[2].expand(4, -1)) and not tokens.mask[:, 2].any()
    raw = {"boxes": torch.zeros(4, 0, 4), "boxes_mask": torch.zeros(4, 0).bool(), "box_class": torch.zeros(4, 0).long()}
    empty = Conditioner({"objects": build_encoder(objects, objects_classes=3)})({"objects": raw}, x())
    assert empty.tokens().values.shape == (4, 0, WIDTH) and empty.attention_mask(2, 2).shape == (4, 4, 0)
    null = Conditioner({"objects": build_encoder(objects, objects_classes=3)})({}, x())
    assert null.regions is None and Condition.cat([null, empty]).attention_mask(2, 2).shape == (8, 4, 0)


def test_objects_of_masks_are_read_where_their_shapes_are():
    raw, _ = LAYOUTS["masks"]
    raw = raw | {"box_color": torch.tensor([[1, 0]] * 4)}
    encoder = objects.build(objects.Config(objects_classes=3, objects_colors=2, objects_regions="masks"), WIDTH, 0)
    assert encoder.fields == ("masks", "box_class", "box_color")
    condition = Conditioner({"objects": encoder}).eval()({"objects": raw}, x())
    expected = raw["masks"] & raw["masks_mask"][:, :, None, None]
    assert torch.equal(condition.attention_mask(9, 7), expected.flatten(2).mT)
    with pytest.raises(ValueError, match="got box_class 3 as region 0, wanted 0 to 2"):
        Conditioner({"objects": encoder}).eval()({"objects": raw | {"box_class": torch.full((4, 2), 3)}}, x())


def test_the_classes_of_objects_are_those_of_the_data():
    assert objects.Config().for_data(7).objects_classes == 7
    both = merge_configs([objects.Config, layout.Config], ConditionConfig)()
    assert (both.for_data(5).objects_classes, both.for_data(5).layout_classes) == (5, 5)
    with pytest.raises(ValueError, match="got objects_classes 4, the data set has 7: leave --objects_classes out"):
        objects.Config(objects_classes=4).for_data(7)
    with pytest.raises(ValueError, match="no classes for the condition objects, .*: pass --objects_classes N"):
        objects.build(objects.Config().for_data(0), WIDTH, 0)
    with pytest.raises(ValueError, match="objects_colors for segments"):
        objects.Config(objects_colors=2, objects_regions="segments")
