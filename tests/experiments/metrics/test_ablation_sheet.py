"""The sheet of a grid: every cell is in its place, at its size."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.ablation_file import Axis, Point
from experiments.metrics.ablation_sheet import EMPTY, SheetCell, draw_sheet, fit_image, montage, save_sheet


def make_axes(*counts):
    return [Axis(f"axis{k}", tuple(Point(f"{k}.{i}", {}) for i in range(n))) for k, n in enumerate(counts)]


def colors_in_order(sheet, colors):
    """The colours in reading order of the first of their pixels."""
    pixels = np.asarray(sheet)
    first = {c: tuple(np.argwhere((pixels == np.array(c)).all(-1))[0]) for c in colors}
    return sorted(colors, key=first.get)


@pytest.mark.parametrize("counts", [(3,), (2, 3), (2, 2, 2), (1, 2, 2, 2)])
def test_every_cell_is_in_its_place(counts):
    """Blocks of the further axes are below each other; within one, the first axis is rows, the second columns."""
    places = list(np.ndindex(*counts))
    color = {place: (255, 10 * k, 7) for k, place in enumerate(places)}
    cells = {
        place: SheetCell(torch.tensor(color[place], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8), ("line",))
        for place in places
    }
    sheet = draw_sheet(make_axes(*counts), cells, {}, 64)
    wanted = [color[place] for place in sorted(places, key=lambda place: (place[2:], place[:2]))]
    assert colors_in_order(sheet, list(color.values())) == wanted
    assert (np.asarray(sheet) == np.array(wanted[0])).all(-1).sum() == 64 * 64


def test_a_cell_without_images_is_grey_with_its_reason():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    cells = {(0,): SheetCell(image, ()), (1,): SheetCell(None, ("not possible: no such setting",))}
    sheet = np.asarray(draw_sheet(make_axes(2), cells, {}, 64))
    grey = (sheet == np.array(tuple(bytes.fromhex(EMPTY[1:])))).all(-1)
    assert grey.sum() > 1000 and draw_sheet(make_axes(1), {(0,): cells[(1,)]}, {}, 64).size[0] > 0


def test_small_images_are_enlarged_and_large_ones_reduced():
    small = torch.randint(0, 255, (1, 5, 7), dtype=torch.uint8)
    assert np.array_equal(np.asarray(fit_image(small, 16))[::2, ::2, 0], small[0])
    assert fit_image(small, 16).size == (14, 10)
    assert fit_image(torch.zeros(3, 100, 50, dtype=torch.uint8), 40).size == (20, 40)


def test_several_images_stand_in_reading_order():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 4, 4) * 50
    pixels = np.asarray(montage(images, 4))[..., 0]
    assert pixels.shape == (10, 16)
    assert pixels[0, [0, 6, 12]].tolist() == [0, 50, 100] and pixels[6, [0, 6, 12]].tolist() == [150, 200, 255]


def test_the_images_that_are_redrawn_are_above_the_grid(tmp_path):
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
    cells = {(0,): SheetCell(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ())}
    save_sheet(tmp_path / "sheet.png", make_axes(1), cells, {"before.png": red}, 64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (np.asarray(sheet) == np.array([255, 0, 0])).all(-1).sum() == 64 * 64
