"""Colours of objects: the median of what is seen, at equal brightness, to the nearest of the palette."""

import torch

from experiments.metrics.layout.colors import NOT_SEEN, nearest_colors
from experiments.metrics.layout.layouts import Layouts

PALETTE = (("red", (220, 30, 40)), ("orange", (250, 130, 15)), ("blue", (30, 80, 220)))
GREYS = (("black", (0, 0, 0)), ("grey", (120, 120, 120)), ("white", (255, 255, 255)))


def two_objects() -> Layouts:
    """An image of 4 x 4 pixels: the left half shows the first of two objects, the right one the second."""
    owner = torch.tensor([0, 0, 1, 1], dtype=torch.int16).expand(1, 4, 4)
    ones = torch.ones(2)
    return Layouts(1, torch.zeros(2).long(), torch.zeros(2, 4), ones.long(), ones, ones < 0, owner=owner)


def painted(left, right) -> torch.Tensor:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    image[0, :, :, :2] = torch.tensor(left, dtype=torch.uint8)[:, None, None]
    image[0, :, :, 2:] = torch.tensor(right, dtype=torch.uint8)[:, None, None]
    return image


def test_the_nearest_colour_by_day_and_at_night():
    assert nearest_colors(painted((210, 40, 40), (40, 90, 210)), two_objects(), PALETTE).tolist() == [0, 2]
    dark = painted((112, 58, 7), (14, 36, 99))  # .45 of orange and blue; red is nearer to the first as it is
    assert nearest_colors(dark, two_objects(), PALETTE).tolist() == [1, 2]


def test_streaks_over_less_than_half_change_nothing():
    image = painted((220, 30, 40), (30, 80, 220))
    image[0, :, :3, 0] = 240  # 3 of 8 pixels: their mean is nearer to orange
    assert nearest_colors(image, two_objects(), PALETTE).tolist() == [0, 2]


def test_a_palette_of_greys_is_compared_with_its_brightness():
    assert nearest_colors(painted((10, 10, 10), (230, 240, 235)), two_objects(), GREYS).tolist() == [0, 2]


def test_an_object_that_is_not_seen_has_no_colour():
    layouts = two_objects()
    hidden = Layouts(**{**layouts.__dict__, "owner": torch.full((1, 4, 4), 1, dtype=torch.int16)})
    assert nearest_colors(painted((220, 30, 40), (30, 80, 220)), hidden, PALETTE)[0] == NOT_SEEN
