"""Edits of layouts: their text, what they change, which pixels are drawn anew, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision import tv_tensors

from experiments.harness.layout_edits import (
    EditedLayout,
    LayoutNames,
    Region,
    apply_edits,
    changed_pixels,
    format_layout,
    layout_fields,
    parse_edit,
    parse_layout,
    read_layout,
    read_layout_names,
)
from models.conditioning import Conditioner
from models.conditions.boxes import BoxEncoder
from models.conditions.layout import LayoutEncoder
from train.data.collate import collate
from train.datasets import Ragged

NAMES = LayoutNames(("disc", "ring", "stop sign"), ("red", "blue"))
PLAIN = LayoutNames(("disc", "ring"))
LAYOUT = (Region((0.0, 0.0, 0.5, 0.5), 0, 0), Region((0.25, 0.25, 1.0, 0.75), 1, 1), Region((0.5, 0.0, 1.0, 0.5), 2, 0))


def edited(*texts, layout=LAYOUT, names=NAMES):
    return apply_edits(layout, [parse_edit(text, names) for text in texts], "a.png")


def test_each_edit_changes_one_region_and_the_order_stays():
    moved = Region((0.1, 0.2, 0.4, 0.6), 1, 1)
    assert edited("move 1 0.1 0.2 0.4 0.6").after == (LAYOUT[0], moved, LAYOUT[2])
    assert edited("move 0 by 0.25 0.5").after[0].box == (0.25, 0.5, 0.75, 1.0)
    assert edited("remove 1").after == (LAYOUT[0], LAYOUT[2])
    assert edited("add ring blue 0 0 1 1").after == (*LAYOUT, Region((0, 0, 1, 1), 1, 1))  # in front
    assert edited("relabel 0 ring").after[0] == LAYOUT[0]._replace(number=1)
    assert edited("relabel 0 blue").after[0] == LAYOUT[0]._replace(color=1)
    assert edited("relabel 0 ring blue").after[0] == LAYOUT[0]._replace(number=1, color=1)


def test_names_may_be_quoted_or_numbers():
    assert edited("add 'stop sign' red 0 0 1 1").after[-1] == edited("add 2 0 0 0 1 1").after[-1]
    assert edited("add ring 0 0 1 1", layout=(), names=PLAIN).after == (Region((0, 0, 1, 1), 1),)


def test_several_edits_know_regions_by_the_numbers_before():
    layout = edited("remove 0", "move 2 0 0 0.5 0.5", "add disc red 0 0.5 0.5 1", "relabel 3 ring")
    assert layout.regions == (None, LAYOUT[1], LAYOUT[2]._replace(box=(0, 0, 0.5, 0.5)), Region((0, 0.5, 0.5, 1), 1, 0))
    assert layout.after == layout.regions[1:]


def test_changed_boxes_are_those_before_and_after():
    assert edited("move 0 0.5 0.5 1 1").changed_boxes == [LAYOUT[0].box, (0.5, 0.5, 1, 1)]
    assert edited("remove 2").changed_boxes == [LAYOUT[2].box]
    assert edited("add disc red 0 0 0.1 0.1").changed_boxes == [(0, 0, 0.1, 0.1)]
    assert edited("relabel 1 disc").changed_boxes == [LAYOUT[1].box] * 2
    there_and_back = ("move 0 by 0.5 0", "move 0 by -0.5 0", "relabel 1 ring", "relabel 1 blue")
    assert edited(*there_and_back).changed_boxes == []


def test_every_cell_that_a_box_touches_is_drawn_anew():
    mask = changed_pixels([(0.26, 0.0, 0.5, 0.24)], (8, 12), factor=2)  # 4 x 6 cells
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[:2, 2:6] = True
    assert torch.equal(mask, expected)
    wider = changed_pixels([(0.26, 0.0, 0.5, 0.24)], (8, 12), factor=2, margin=1)
    expected[:4, :8] = True
    assert torch.equal(wider, expected)
    two = changed_pixels([(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 2.0, 2.0)], (4, 4))  # clipped to the image
    assert torch.equal(two, torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool())


def test_a_layout_survives_as_fields_of_a_batch():
    batch = collate([layout_fields(LAYOUT, True), layout_fields((), True)])
    assert batch["boxes_mask"].tolist() == [[True] * 3, [False] * 3] and batch["box_color"][0].tolist() == [0, 1, 0]
    assert read_layout({name: batch[name][0] for name in ("boxes", "box_class", "box_color")}) == LAYOUT
    assert layout_fields(LAYOUT, False).keys() == {"boxes", "box_class"}


def test_boxes_in_pixels_become_fractions():
    boxes = tv_tensors.BoundingBoxes([[2.0, 0, 4, 8]], format="XYXY", canvas_size=(8, 4))
    layout = read_layout({"boxes": boxes, "box_class": Ragged([1]), "camera": "front"})
    assert layout == (Region((0.5, 0.0, 1.0, 1.0), 1),)
    assert read_layout({"boxes": torch.zeros(0), "box_class": torch.zeros(0)}) == ()
    with pytest.raises(ValueError, match="got 1 boxes and 2 of box_class"):
        read_layout({"boxes": boxes, "box_class": Ragged([1, 2])})
    with pytest.raises(ValueError, match="got label as conditions, wanted boxes and box_class"):
        read_layout({"label": 3})


def network_with(**encoders):
    return nn.ModuleDict({"encoders": Conditioner(encoders)})


def test_names_are_those_of_the_data_and_numbers_without():
    data = SimpleNamespace(region_classes=("disc", "ring", "sky"), palette=(("red", (9, 0, 0)), ("blue", (0, 0, 9))))
    names = read_layout_names(network_with(layout=LayoutEncoder(3, colors=2)), data, "run")
    assert names == LayoutNames(("disc", "ring", "sky"), ("red", "blue"), ((9, 0, 0), (0, 0, 9)))
    assert names.describe(Region((0, 0, 1, 1), 1, 0)) == "red ring"
    assert read_layout_names(network_with(boxes=BoxEncoder(4, 8)), data, "run").classes == ("disc", "ring", "sky", "3")
    assert read_layout_names(network_with(boxes=BoxEncoder(2, 8)), object(), "run") == LayoutNames(("0", "1"))
    with pytest.raises(ValueError, match="run reads no boxes"):
        read_layout_names(network_with(layout=LayoutEncoder(3, "segments")), data, "run")
    with pytest.raises(ValueError, match="run reads masks: pass a run .* of boxes"):
        read_layout_names(network_with(boxes=BoxEncoder(3, 8), layout=LayoutEncoder(3, "masks")), data, "run")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "wanted an edit that begins with move, add, remove, relabel"),
        ("mvoe 0 0 0 1 1", "did you mean 'move'"),
        ("add 'disc red 0 0 1 1", "wanted an edit that begins with"),
        ("move 7 0 0 1 1", "'move 7 0 0 1 1', but a.png has regions 0 to 2"),
        ("move -1 0 0 1 1", "wanted move REGION LEFT TOP RIGHT BOTTOM, or move REGION by DX DY"),
        ("move 0 0 0 1", "wanted move REGION"),
        ("move 0 0 0 1 x", "wanted move REGION"),
        ("move 0 by 0.1", "wanted move REGION"),
        ("move 0 0.5 0 0.2 1", "wanted a box LEFT TOP RIGHT BOTTOM with LEFT < RIGHT"),
        ("move 0 0 0 nan 1", "with LEFT < RIGHT"),
        ("move 0 by 2 0", "a box at 2 0 2.5 0.5, wanted one in the image"),
        ("add disc red 1.5 0 2 1", "wanted one in the image"),
        ("add disk red 0 0 1 1", "unknown class 'disk', did you mean 'disc'\\?; wanted a class: disc, ring, stop sign"),
        ("add disc rod 0 0 1 1", "unknown colour 'rod', did you mean 'red'\\?; wanted a colour: red, blue"),
        ("add disc 0 0 1 1", "wanted a colour after the class, one of red, blue"),
        ("add red 0 0 1 1", "with a class before the colour"),
        ("add 0 0 1 1", "wanted add CLASS \\[COLOR\\] LEFT TOP RIGHT BOTTOM"),
        ("remove", "wanted remove REGION"),
        ("relabel 1 square", "unknown class or colour 'square'; wanted a class: .*; colour: red, blue"),
        ("relabel 3 disc", "but a.png has regions 0 to 2"),
    ],
)
def test_bad_edits_are_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        edited(text)


def test_edits_against_each_other_or_the_model_are_refused():
    with pytest.raises(ValueError, match="'relabel 0 ring', but an earlier edit removes region 0"):
        edited("remove 0", "relabel 0 ring")
    with pytest.raises(ValueError, match="a.png has no regions: add one instead"):
        edited("remove 0", layout=())
    with pytest.raises(ValueError, match="a.png has region 0 only"):
        edited("remove 1", layout=LAYOUT[:1])
    with pytest.raises(ValueError, match="the model reads no colours: leave red out"):
        edited("add disc red 0 0 1 1", names=PLAIN)


def test_a_layout_without_edits_is_unchanged():
    assert EditedLayout(LAYOUT, LAYOUT).changed_boxes == [] and EditedLayout(LAYOUT, LAYOUT).after == LAYOUT


def test_a_layout_is_written_a_region_a_line():
    names = LayoutNames(("disc", "big ring"), ("red", "blue"))
    layout = (Region((0.0, 0.125, 0.5, 0.75), 1, 0), Region((0.25, 0.0, 1.0, 1.0), 0, 1))
    text = "'big ring' red 0 0.125 0.5 0.75\ndisc blue 0.25 0 1 1"
    assert format_layout(layout, names) == text and parse_layout(f"\n{text}\n ", names) == layout
    plain = LayoutNames(("disc", "big ring"))
    assert parse_layout("disc 0 0 1 1", plain) == (Region((0.0, 0.0, 1.0, 1.0), 0),) and parse_layout("", plain) == ()
    for line, message in (
        ("disc 0 0 1 1", "got the box 'disc 0 0 1 1', wanted CLASS COLOR LEFT TOP RIGHT BOTTOM"),
        ("disk red 0 0 1 1", "unknown class 'disk', did you mean 'disc'"),
        ("disc green 0 0 1 1", "unknown colour 'green'.*; wanted one of red, blue"),
        ("disc red 0 1 1 0", "TOP < BOTTOM"),
        ("'disc red 0 0 1 1", "names of several words in quotes"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_layout(line, names)
