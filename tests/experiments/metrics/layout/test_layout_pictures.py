"""Pictures of layouts: boxes and segments at their places, in their colours, beside the images drawn for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments.harness.layout_inputs import LayoutInputs
from experiments.metrics.contact_sheet import STRENGTH, class_color
from experiments.metrics.layout.layout_pictures import (
    GAP,
    LINE,
    PAPER,
    PictureRow,
    PictureRows,
    draw_layout,
    draw_rows,
    pair_images,
    panel_size,
)
from experiments.metrics.layout.layouts import UNLABELLED, Layouts
from train.condition_source import ConditionSource
from train.data.formats.categories import Categories
from train.datasets import Ragged
from train.layout_files import LayoutVocabulary
from train.layouts import Layout

NAMES = ("disc", "sky")
PALETTE = (("red", (200, 0, 0)), ("blue", (0, 0, 200)))
SIZE, PANEL = (20, 40), (80, 160)
VOCABULARY = LayoutVocabulary(Categories((0, 1), NAMES, (True, False)), PALETTE, ("boxes", "box_class"), SIZE)
BOXES = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.25, 0.25, 1.0, 0.75]])


def box_row(boxes=BOXES, colors=(0, 1)):
    classes = torch.zeros(len(boxes)).long()
    return {"boxes": Ragged(boxes), "box_class": Ragged(classes), "box_color": Ragged(torch.tensor(colors).long())}


def draw(row, names=NAMES, palette=PALETTE):
    return np.array(draw_layout(row, PANEL, names, palette)).astype(int)


def on_paper(color):
    return PAPER + STRENGTH * (np.array(color) - PAPER)


def test_small_images_are_enlarged_by_a_whole_number():
    assert panel_size(SIZE) == PANEL
    assert [panel_size((side, side))[0] for side in (32, 64, 256)] == [160, 192, 256]


def test_boxes_have_their_places_and_colours():
    picture = draw(box_row())
    assert picture.shape == (*PANEL, 3)
    assert np.abs(picture[70, 20] - on_paper((200, 0, 0))).max() <= 1
    assert np.abs(picture[50, 140] - on_paper((0, 0, 200))).max() <= 1
    assert (picture[75, 120] == PAPER).all()
    assert (picture[79, :80] == 0).all() and (picture[70, 79] == 0).all() and (picture[40, 159] == 0).all()
    front = picture[45, 60]  # both: the later one is in front
    assert front[2] > front[0]
    assert (picture[:16, :20] == (200, 0, 0)).all(2).sum() > 100  # behind its name


def test_boxes_without_colours_have_those_of_their_classes():
    row = box_row() | {"box_class": Ragged(torch.tensor([1, 0]))}
    picture = draw(row, palette=())
    assert np.abs(picture[70, 20] - on_paper(class_color(1))).max() <= 1
    assert np.abs(picture[50, 140] - on_paper(class_color(0))).max() <= 1
    del row["box_color"]
    assert np.array_equal(draw(row), picture)


def test_boxes_outside_the_image_are_not_drawn():
    outside = torch.tensor([[-0.5, 0.1, -0.1, 0.4], [0.2, 1.2, 0.4, 1.5]])
    assert (draw(box_row(outside)) == PAPER).all()
    assert (draw(box_row(torch.zeros(0, 4), ())) == PAPER).all()


def test_names_do_not_cover_each_other_and_long_ones_are_cut():
    twice = torch.tensor([[0.1, 0.1, 0.5, 0.7], [0.1, 0.1, 0.5, 0.7]])
    picture = draw(box_row(twice))
    for color in ((200, 0, 0), (0, 0, 200)):
        assert ((picture == color).all(2)).sum() > 100
    long = draw(box_row(BOXES[:1], (0,)), names=["disc " * 20, "sky"])
    assert 90 < ((long[:16] == (200, 0, 0)).all(2).any(0)).sum() < 0.75 * 160
    assert np.array_equal(long, draw(box_row(BOXES[:1], (0,)), names=["disc " * 20 + "x", "sky"]))


def test_segments_have_the_colours_of_their_classes():
    ids = torch.zeros(20, 40, dtype=torch.int32)
    ids[10:], ids[10:, 20:] = 70_000_001, 70_000_000  # beyond float32
    picture = draw({"panoptic": ids, "segment_id": Ragged([70_000_000, 70_000_001]), "segment_class": Ragged([0, 1])})
    assert (picture[20, 80] == PAPER).all()
    assert np.abs(picture[44, 6] - on_paper(class_color(1))).max() <= 1
    assert np.abs(picture[44, 154] - on_paper(class_color(0))).max() <= 1


def test_masks_have_their_shapes_and_later_ones_are_in_front():
    masks = torch.zeros(2, *SIZE, dtype=torch.uint8)
    masks[0, :10], masks[1, 5:, 30:] = 1, 1
    picture = draw({"masks": masks, "box_class": Ragged([0, 1])})
    assert (picture[60, 80] == PAPER).all()
    assert np.abs(picture[36, 90] - on_paper(class_color(0))).max() <= 1
    assert np.abs(picture[30, 150] - on_paper(class_color(1))).max() <= 1
    assert (draw({"masks": masks[:0], "box_class": Ragged([])}) == PAPER).all()


def layouts_of(boxes, pixels=None):
    """The layouts of three images, of which the second has no box and the third has `boxes`."""
    boxes = torch.cat([BOXES[:1], boxes]).double()
    n = len(boxes)
    image = torch.tensor([0] + [2] * (n - 1))
    colors = torch.tensor([1] + [0] * (n - 1))
    return Layouts(3, image, boxes, torch.zeros(n).long(), torch.ones(n), torch.zeros(n).bool(), colors, None, pixels)


def test_each_layout_of_a_table_stands_beside_its_images():
    columns = [torch.arange(3).byte().view(3, 1, 1, 1).expand(-1, 3, *SIZE) + shift for shift in (10, 20)]
    rows = pair_images(layouts_of(BOXES), columns)
    assert [[int(image[0, 0, 0]) for image in row.images] for row in rows] == [[10, 20], [11, 21], [12, 22]]
    expected = [box_row(BOXES[:1], (1,)), box_row(torch.zeros(0, 4), ()), box_row(BOXES, (0, 0))]
    for row, boxes in zip(rows, expected, strict=True):
        assert np.array_equal(draw(row.layout.row), draw(boxes))


def test_a_table_without_boxes_shows_the_map_of_each_image():
    pixels = torch.full((3, *SIZE), UNLABELLED, dtype=torch.uint8)
    pixels[2, :, 20:] = 1
    nothing = replace(
        layouts_of(BOXES[:0], pixels), image=torch.zeros(0).long(), boxes=torch.zeros(0, 4), classes=torch.zeros(0)
    )
    first, _, third = (draw(row.layout.row) for row in pair_images(nothing, []))
    assert (first == PAPER).all() and (third[:, :70] == PAPER).all()
    assert np.abs(third[70, 150] - on_paper(class_color(1))).max() <= 1


def test_the_first_images_of_the_first_layouts_are_kept():
    layouts = tuple(Layout(f"layout {number}", box_row()) for number in range(10))
    rows = PictureRows(LayoutInputs(layouts, VOCABULARY, ConditionSource(()), {}))
    for first in range(0, 96, 6):
        rows.add(torch.arange(first, first + 6).byte().view(6, 1, 1, 1).expand(-1, 3, *SIZE))
    assert [row.layout.name for row in rows.rows] == [f"layout {number}" for number in range(8)]
    for number, row in enumerate(rows.rows):
        assert [int(image[0, 0, 0]) for image in row.images] == [10 * seed + number for seed in range(8)]
    assert rows.draw().size == (GAP + 9 * (160 + GAP), GAP + 8 * (80 + LINE + GAP))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_layouts_and_images_side_by_side(channels):
    images = [torch.full((channels, *SIZE), level, dtype=torch.uint8) for level in (17, 99)]
    rows = [PictureRow(Layout("a", box_row()), images), PictureRow(Layout("b", box_row()), [])]
    sheet = np.array(draw_rows(rows, SIZE, NAMES, PALETTE))
    assert sheet.shape == (GAP + 2 * (80 + LINE + GAP), GAP + 3 * (160 + GAP), 3)
    for number, level in enumerate((17, 99), 1):
        left = GAP + number * (160 + GAP)
        assert (sheet[GAP + LINE : GAP + LINE + 80, left : left + 160] == level).all()
    assert np.array_equal(sheet[-80 - GAP : -GAP, GAP : GAP + 160], draw(box_row()))


def test_headings_stand_above_their_columns():
    rows = [PictureRow(Layout("", box_row()), [torch.zeros(3, *SIZE, dtype=torch.uint8)])]
    sheet = np.array(draw_rows(rows, SIZE, NAMES, PALETTE, ("layout", "samples " * 9)))
    assert sheet.shape[0] == GAP + LINE + 80 + GAP
    above = (sheet[: GAP + LINE] < 128).any(2).any(0)
    assert above[GAP : GAP + 160].any() and above[GAP + 160 + GAP :].any()
    assert not above[: GAP - 1].any() and not above[-GAP + 1 :].any()  # it is cut
