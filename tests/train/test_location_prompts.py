"""Layouts as prompts, against those that GeoDiffusion's code wrote."""

import pytest
import torch

from train.datasets import Ragged
from train.location_prompts import LocationPrompt

CLASSES = ("car", "truck", "traffic-light", "cone")
BOXES = [[10, 20, 200, 180], [100, 60, 300, 250], [250, 120, 262, 131]]  # in pixels, of 512 x 256
OBJECTS = "car <l5125> <l45924> truck <l15410> <l63893> cone <l30845> <l33410>"
CAMERA = LocationPrompt("A driving scene image of {camera} camera with {bbox}", (256, 256), 22)


def layout(boxes, classes, **fields):
    """Returns the row of a layout with boxes as fractions."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": Ragged(boxes), "box_class": Ragged(torch.tensor(classes, dtype=torch.int64)), **fields}


def published(**fields):
    """Returns the layout of the published prompts."""
    return layout(torch.tensor(BOXES).double().div(torch.tensor([512, 256] * 2)).tolist(), [0, 1, 3], **fields)


def test_prompts_are_those_of_the_published_code():
    row = published(camera="front left", time="night")
    assert CAMERA.write(row, CLASSES) == f"A driving scene image of front left camera with {OBJECTS}"
    two = LocationPrompt("A {time} image of {camera} camera with {objs}", (256, 256))
    assert two.write(row, CLASSES) == f"A night image of front left camera with {OBJECTS}"
    assert two.fields == ("time", "camera")


def test_corners_are_rounded_as_the_digits_of_a_file():
    """0.3 of 255 is 76.5, which goes to 76; 0.3 in float32 is more."""
    prompt = LocationPrompt("with {bbox}", (256, 256))
    assert prompt.write(layout([[0.3, 0.0, 0.5, 0.1]], [0]), CLASSES) == f"with car <l76> <l{26 * 256 + 128}>"


def test_columns_come_first_and_boxes_keep_their_order():
    prompt = LocationPrompt("with {boxes}", (4, 3))
    row = layout([[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1]], [2, 0, 2])
    assert prompt.write(row, CLASSES) == "with traffic light <l0> <l11> car <l3> <l11> traffic light <l8> <l11>"
    assert prompt.write(layout([], []), CLASSES) == "with "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (published(), "got no text camera for the prompt .*: pass --metadata camera=..., or camera in each layout"),
        (published(camera=3), "got no text camera"),
        (layout([[0, 0, 1, 1]], [4], camera="front"), "got the class 4, wanted the words of classes"),
        (layout([[0, 0, 1, 1]] * 23, [0] * 23, camera="front"), "got 23 boxes, wanted at most 22"),
    ],
)
def test_layouts_that_make_no_prompt_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        CAMERA.write(row, CLASSES)


@pytest.mark.parametrize(
    ("template", "grid", "message"),
    [
        ("An image", (4, 3), "and once {bbox}, the boxes"),
        ("{bbox} and {objs}", (4, 3), "and once {bbox}, the boxes"),
        ("{} {bbox}", (4, 3), "wanted names of fields in braces"),
        ("{camera.__class__} {bbox}", (4, 3), "wanted names of fields in braces"),
        ("{bbox", (4, 3), "wanted a text with fields"),
        (None, (4, 3), "wanted a text with fields"),
        ("{bbox}", (4, 0), r"got places in a grid of \(4, 0\)"),
        ("{bbox}", (4, "3"), "got places in a grid"),
    ],
)
def test_templates_without_boxes_are_refused(template, grid, message):
    with pytest.raises(ValueError, match=message):
        LocationPrompt(template, grid)
