"""Painted maps: what is on a canvas or in a picture, pixel by pixel, and the conditions that it gives."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from experiments.harness.painted_maps import (
    UNPAINTED,
    PaintedMap,
    PaintedRegion,
    empty_map,
    nearest_classes,
    painting_in_picture,
    painting_of,
    parse_painting,
    row_of,
)
from experiments.metrics.contact_sheet import class_color
from train.data.collate import collate
from train.data.formats.categories import Categories
from train.layout_files import LayoutVocabulary

SIZE = 6, 8
KNOWN = Categories((3, 90, 7), ("car", "grass", "dog"), (True, False, True))
FIELDS = ("panoptic", "segment_id", "segment_class", "boxes", "box_id", "box_class", "box_words", "caption")
VOCABULARY = LayoutVocabulary(KNOWN, (), FIELDS, SIZE)
COLORS = [class_color(number) for number in range(3)]
CAR, GRASS, DOG = range(3)
GRASS_ALONE = PaintedRegion(GRASS)


def text_of(painted, **changes):
    """The text of the canvas with a map."""
    regions = [region and region._asdict() for region in painted.regions]
    return json.dumps({"size": painted.ids.shape, "runs": painted.runs, "regions": regions, **changes})


@pytest.fixture
def painted():
    """Grass with a hole of a car in it and a dog of one pixel; the first row is not painted, a removed region."""
    ids = np.full(SIZE, 1, np.int32)
    ids[0], ids[2:4, 3:5], ids[5, 7] = 0, 3, 4
    regions = PaintedRegion(GRASS, "a lawn"), None, PaintedRegion(CAR, "a red car"), PaintedRegion(DOG)
    return PaintedMap(ids, regions)


def test_a_canvas_is_read_pixel_by_pixel(painted):
    again = parse_painting(text_of(painted), VOCABULARY)
    assert np.array_equal(again.ids, painted.ids) and again.regions == painted.regions
    assert sum(length for _, length in painted.runs) == 48 and len(painted.runs) == 7
    assert empty_map(SIZE).runs == [(0, 48)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": [8, 6]}, "got a map of 8x6 pixels, wanted 6x8"),
        ({"runs": [[1, 47]]}, "got a map of 6x8 pixels"),
        ({"runs": [[9, 48]]}, "got a pixel of region 9, which is not there"),
        ({"runs": [[2, 48]]}, "got a pixel of region 2, which is not there"),
        ({"regions": [{"number": 3, "words": ""}], "runs": [[1, 48]]}, "got class 3, wanted one of the 3"),
    ],
)
def test_impossible_canvases_are_refused(painted, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_painting(text_of(painted, **changes), VOCABULARY)


def test_a_painted_map_has_the_fields_of_an_item(painted):
    row = row_of(painted, VOCABULARY)
    assert row.keys() == {*FIELDS}
    assert torch.equal(torch.as_tensor(row["panoptic"]), torch.from_numpy(painted.ids))
    assert row["segment_id"].tolist() == [1, 3, 4] and row["segment_class"].tolist() == [GRASS, CAR, DOG]
    assert row["box_id"].tolist() == [3, 4, 1] and row["box_class"].tolist() == [CAR, DOG]
    assert row["box_words"] == ["a red car", "", "a lawn"] and row["caption"] == "grass, car, dog"
    assert torch.equal(
        torch.as_tensor(row["boxes"]), torch.tensor([[3 / 8, 2 / 6, 5 / 8, 4 / 6], [7 / 8, 5 / 6, 1, 1]])
    )


def test_regions_that_are_painted_over_are_not_there(painted):
    covered = PaintedMap(np.where(painted.ids == 3, 1, painted.ids).astype(np.int32), painted.regions)
    assert row_of(covered, VOCABULARY)["box_words"] == ["", "a lawn"]
    row = row_of(empty_map(SIZE), VOCABULARY)
    assert len(row["segment_id"]) == len(row["boxes"]) == 0 and row["box_words"] == [] and row["caption"] == ""


def test_only_what_the_model_reads_is_in_the_row(painted):
    fields = ("panoptic", "segment_id", "segment_class")
    few = LayoutVocabulary(KNOWN, (), fields, SIZE)
    assert row_of(painted, few).keys() == {*fields}


def test_the_conditions_of_a_map_are_the_map_again(painted):
    again = painting_of(collate([row_of(painted, VOCABULARY)]), VOCABULARY)
    kept = [region for region in painted.regions if region]
    assert again.regions == tuple(kept)
    table = np.array([0, 1, 0, 2, 3])
    assert np.array_equal(again.ids, table[painted.ids])
    wider = collate([row_of(painted, VOCABULARY), row_of(PaintedMap(np.full(SIZE, 1), (GRASS_ALONE,)), VOCABULARY)])
    second = {name: values[1:] for name, values in wider.items()}
    assert painting_of(second, VOCABULARY).regions == (GRASS_ALONE,)  # padding is no region


# Pictures


def picture_of(numbers):
    """A picture in the colours of classes; -1: none."""
    return np.array([*COLORS, UNPAINTED], np.uint8)[numbers]


def test_exact_colours_are_their_classes():
    numbers = np.random.default_rng(0).integers(-1, 3, SIZE)
    assert np.array_equal(nearest_classes(picture_of(numbers), COLORS), numbers)


def test_soft_edges_have_the_class_beside_them():
    """Between two classes colours pass by those of a third, which must not appear."""
    numbers = np.full((40, 60), GRASS)
    numbers[:, 30:] = CAR
    soft = picture_of(numbers).astype(float)
    blend = [picture_of(np.array(number)).astype(float) for number in (GRASS, CAR)]
    for column, share in zip(range(28, 32), (0.2, 0.4, 0.6, 0.8), strict=True):
        soft[:, column] = (1 - share) * blend[0] + share * blend[1]
    assert np.array_equal(nearest_classes(soft.round().astype(np.uint8), COLORS), numbers)
    disc = Image.new("RGB", (240, 160), COLORS[GRASS])
    ImageDraw.Draw(disc).ellipse((40, 40, 200, 120), fill=COLORS[DOG])
    small = disc.resize((60, 40), Image.Resampling.LANCZOS)  # soft, and beyond both colours
    found = nearest_classes(np.asarray(small), COLORS)
    assert {*np.unique(found)} == {GRASS, DOG}
    exact = nearest_classes(np.asarray(disc.resize((60, 40), Image.Resampling.NEAREST)), COLORS)
    assert (found != exact).mean() < 0.03


def test_things_are_parted_where_they_do_not_touch():
    numbers = np.full(SIZE, GRASS)
    numbers[1, 1], numbers[3:5, 4:7], numbers[0, 7], numbers[:, 3] = CAR, CAR, DOG, -1
    painted = painting_in_picture(Image.fromarray(picture_of(numbers)), COLORS, VOCABULARY)
    assert painted.regions == (PaintedRegion(CAR), PaintedRegion(CAR), PaintedRegion(GRASS), PaintedRegion(DOG))
    assert painted.ids[1, 1] == 1 and (painted.ids[3:5, 4:7] == 2).all() and painted.ids[0, 7] == 4
    assert (painted.ids[:, 3] == 0).all()
    assert painted.ids[5, 0] == painted.ids[5, 7] == 3  # grass on both sides of the gap is one region


def test_pictures_of_another_size_are_fitted_and_others_refused():
    numbers = np.full(SIZE, GRASS)
    numbers[2:4, 2:6] = CAR
    large = Image.fromarray(picture_of(numbers)).resize((32, 24), Image.Resampling.NEAREST)
    painted = painting_in_picture(large, COLORS, VOCABULARY)
    assert np.array_equal(painted.ids, np.where(numbers == CAR, 1, 2))
    with pytest.raises(ValueError, match="without the colours of classes"):
        painting_in_picture(Image.new("RGB", (8, 6), (1, 2, 3)), COLORS, VOCABULARY)
