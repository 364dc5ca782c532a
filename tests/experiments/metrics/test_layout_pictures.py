"""Pictures of layouts: boxes and segments at their places, in their colours, beside the images drawn for them."""

import numpy as np
import pytest
import torch

from experiments.harness.layout_inputs import LayoutInputs
from experiments.metrics.contact_sheet import STRENGTH
from experiments.metrics.layout_pictures import PAPER, PictureRow, PictureRows, draw_layout, draw_rows
from train.condition_source import ConditionSource
from train.data.formats.categories import Categories
from train.datasets import Ragged
from train.layout_files import LayoutVocabulary
from train.layouts import Layout

CATEGORIES = Categories((0, 1), ("disc", "sky"), (True, False))
PALETTE = (("red", (200, 0, 0)), ("blue", (0, 0, 200)))
VOCABULARY = LayoutVocabulary(CATEGORIES, PALETTE, ("boxes", "box_class", "box_color"), (20, 40))


def box_layout(name="a", boxes=((0.0, 0.0, 0.5, 1.0), (0.25, 0.25, 1.0, 0.75)), colors=(0, 1)):
    count = len(boxes)
    row = {"boxes": Ragged(torch.tensor(boxes).view(count, 4)), "box_class": Ragged(torch.zeros(count).long())}
    return Layout(name, row | {"box_color": Ragged(torch.tensor(colors).long())})


def test_boxes_have_their_places_and_colours():
    picture = np.array(draw_layout(box_layout(), VOCABULARY)).astype(int)
    assert picture.shape == (80, 160, 3)  # enlarged by a whole number
    red, blue = ([round(PAPER + STRENGTH * (level - PAPER)) for level in rgb] for _, rgb in PALETTE)
    assert np.abs(picture[70, 20] - red).max() <= 1 and np.abs(picture[50, 140] - blue).max() <= 1
    assert (picture[75, 120] == PAPER).all()
    front = picture[45, 60]  # both: the later one is in front
    assert front[2] > front[0]


def test_segments_have_the_colours_of_their_classes():
    ids = torch.zeros(20, 40, dtype=torch.int32)
    ids[10:], ids[10:, 20:] = 70_000_001, 70_000_000  # beyond float32
    row = {"panoptic": ids, "segment_id": Ragged([70_000_000, 70_000_001]), "segment_class": Ragged([0, 1])}
    picture = np.array(draw_layout(Layout("a", row), VOCABULARY)).astype(int)
    assert (picture[20, 80] == PAPER).all()
    assert np.abs(picture[44, 6] - picture[44, 154]).max() > 30
    assert np.abs(picture[44, 6] - PAPER).max() > 30


def test_the_first_images_of_the_first_layouts_are_kept():
    layouts = tuple(box_layout(f"layout {number}") for number in range(10))
    rows = PictureRows(LayoutInputs(layouts, VOCABULARY, ConditionSource(()), {}))
    for first in range(0, 96, 6):
        rows.add(torch.arange(first, first + 6).byte().view(6, 1, 1, 1).expand(-1, 3, 20, 40))
    assert [row.layout.name for row in rows.rows] == [f"layout {number}" for number in range(8)]
    for number, row in enumerate(rows.rows):
        assert [int(image[0, 0, 0]) for image in row.images] == [10 * seed + number for seed in range(8)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_has_layouts_and_images_side_by_side(channels):
    images = [torch.full((channels, 20, 40), level, dtype=torch.uint8) for level in (17, 99)]
    sheet = np.array(draw_rows([PictureRow(box_layout(), images), PictureRow(box_layout(boxes=()), [])], VOCABULARY))
    for level in (17, 99):
        assert ((sheet == level).all(2)).sum() >= 0.95 * 80 * 160
    assert sheet.shape[1] > 3 * 160 and sheet.shape[0] > 2 * 80
