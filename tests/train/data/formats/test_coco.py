"""Run lengths and polygons of COCO: both directions, against strings of the official files and a slow rule."""

import numpy as np
import pytest

from train.data.formats import coco

# From the panoptic sample of cocodataset/panopticapi: segmentation, area and box of two annotations.
OFFICIAL = (
    ({"size": [360, 640], "counts": r"^Pm23V;2M3N1N200O100000N5I\SP4"}, 96, (264, 206, 275, 227)),
    ({"size": [427, 640], "counts": r"b7\1P<VOi001O1O1O4L2N3LokV8"}, 153, (0, 242, 9, 286)),
)


def inside(points, x, y):
    """The even-odd rule at a point, by the crossings of a ray to the right."""
    ends = zip(points, np.roll(points, -1, 0), strict=True)
    return sum((y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0) for (x0, y0), (x1, y1) in ends) % 2


@pytest.mark.parametrize(("rle", "area", "box"), OFFICIAL)
def test_official_strings_have_their_area_and_box(rle, area, box):
    mask = coco.decode_segmentation(rle, tuple(rle["size"]))
    assert mask.dtype == np.uint8 and mask.sum() == area and coco.box_of_mask(mask) == box
    assert coco.encode_rle(mask) == rle


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
def test_masks_survive_run_lengths(compressed, density):
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 9), (7, 1), (13, 40)):
        mask = (rng.random(size) < density).astype(np.uint8)
        assert np.array_equal(coco.decode_rle(coco.encode_rle(mask, compressed), size), mask)


def test_run_lengths_follow_the_columns():
    mask = np.array([[0, 1], [1, 1], [0, 0]], np.uint8)
    assert coco.encode_rle(mask, compressed=False) == {"size": [3, 2], "counts": [1, 1, 1, 2, 1]}


def test_long_runs_survive_the_string():
    counts = np.array([0, 5, 1_000_000, 16, 3, 31, 32, 1023, 0, 7])
    assert coco.decode_counts(coco.encode_counts(counts)).tolist() == counts.tolist()
    assert coco.decode_counts(b"").tolist() == []


def test_damaged_run_lengths_are_refused():
    rle = OFFICIAL[0][0]
    for counts in ("^Pm23V", "^Pm2\x1f", [5, 5], [-5, 230405], "Q"):
        with pytest.raises(ValueError, match="check the annotation file"):
            coco.decode_rle({**rle, "counts": counts})
    with pytest.raises(ValueError, match="360 x 640 pixels, wanted 5 x 6"):
        coco.decode_segmentation(rle, (5, 6))
    with pytest.raises(ValueError, match="size and counts"):
        coco.decode_segmentation({"counts": "a"}, (5, 6))
    with pytest.raises(ValueError, match="polygons or run lengths"):
        coco.decode_segmentation([1, 2, 3], (5, 6))


def test_polygons_are_filled_by_the_even_odd_rule():
    rng = np.random.default_rng(1)
    for n in (3, 4, 9):
        points = rng.uniform(-4, 16, (n, 2))  # crosses itself and leaves the image
        wrong = [
            (y, x)
            for (y, x), value in np.ndenumerate(coco.fill_polygons([points.reshape(-1)], (11, 13)))
            if value != inside(points, x + 0.5, y + 0.5)
        ]
        assert wrong == []


def test_polygons_that_share_edges_share_no_pixel():
    rng = np.random.default_rng(2)
    for _ in range(50):
        centre, corners = rng.integers(1, 15, 2) / 2, np.array([[0, 0], [8, 0], [8, 8], [0, 8]])
        fans = [np.stack([centre, corners[i], corners[(i + 1) % 4]])[:: rng.choice([-1, 1])] for i in range(4)]
        assert (sum(coco.fill_polygons([fan], (8, 8)) for fan in fans) == 1).all()


def test_several_polygons_are_united():
    square, other = [0, 0, 4, 0, 4, 4, 0, 4], [2, 2, 6, 2, 6, 6, 2, 6]
    assert coco.decode_segmentation([square, other], (8, 8)).sum() == 28  # 24 if the overlap were even
    assert coco.decode_segmentation([square, square], (8, 8)).sum() == 16
    assert coco.decode_segmentation([], (2, 3)).sum() == 0
    for polygon in ([0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 0, 1, 1, 2, float("nan")]):
        with pytest.raises(ValueError, match="got a polygon"):
            coco.decode_segmentation([polygon], (8, 8))


def test_boxes_are_converted_both_ways():
    boxes = [[1.5, 2, 3, 4], [0, 0, 0, 0]]
    assert coco.to_xyxy(boxes).tolist() == [[1.5, 2, 4.5, 6], [0, 0, 0, 0]]
    assert coco.to_xywh(coco.to_xyxy(boxes)).tolist() == boxes
    assert coco.to_xyxy([]).shape == (0, 4)
    assert coco.box_of_mask(np.zeros((3, 4))) == (0, 0, 0, 0)
