"""Regions: the cells that boxes, masks and segments cover, against public code and against brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.conditioning import Condition, Tokens
from models.regions import Regions, check_region_fields

FIXTURES = Path(__file__).parents[1] / "fixtures" / "spatial"
RULES = ("touched", "share", "nearest", "half")
SIZES = [(1, 1), (1, 7), (3, 5), (8, 8), (10, 4), (16, 24), (64, 64)]


def recorded(name):
    return {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / f"{name}.npz").items()}


def random_boxes(batch, count, dtype=torch.float64, seed=0):
    """Boxes of very different sizes, some thin, some partly or wholly outside the image."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, count, 2, generator=g, dtype=dtype) * 1.4 - 0.2
    side = torch.rand(batch, count, 2, generator=g, dtype=dtype).pow(4) + 1e-7
    return torch.cat([centre - side / 2, centre + side / 2], -1)


def of_boxes(boxes, **values):
    batch, count = boxes.shape[:2]
    fields = {"boxes": boxes, "boxes_mask": torch.ones(batch, count).bool(), **values}
    return Regions.from_fields(fields)


def random_ids(batch=2, height=12, width=20, count=5, seed=0):
    """Id maps of the segments 10, 20, ... and 0."""
    blocks = torch.randint(0, count + 1, (batch, 5, 4), generator=torch.manual_seed(seed)) * 10
    noise = torch.rand(batch, height, width, generator=torch.manual_seed(seed)) < 0.2
    maps = F.interpolate(blocks[:, None].double(), (height, width), mode="nearest-exact")[:, 0].long()
    return maps * ~noise


def of_segments(ids, count=5):
    segments = (10 * torch.arange(count, 0, -1)).expand(len(ids), -1)
    return Regions.from_fields({"panoptic": ids, "segment_id": segments, "segment_class": segments // 10})


def as_masks(ids, segments):
    return Regions(present=segments.present, masks=ids[:, None] == segments.instance_ids[..., None, None])


def kinds(batch=3, seed=1):
    """Regions of every kind, by name."""
    ids = random_ids(batch, seed=seed)
    segments = of_segments(ids)
    boxes = random_boxes(batch, 6, seed=seed)
    return {"boxes": of_boxes(boxes), "masks": as_masks(ids, segments), "segments": segments}


# Against recorded cells


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (8, 12), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_touch_the_cells_that_exact_arithmetic_gives(grid, dtype):
    expected = recorded("boxes_to_cells")
    start, extent = expected["boxes_xywh"].double().split(2, -1)
    regions = of_boxes(torch.cat([start, start + extent], -1).to(dtype)[None])
    nothing = ~regions.present[0]
    assert nothing.nonzero().flatten().tolist() == [7, 10, 11]  # without extent, and outside on both sides
    touched = expected[f"touched_{grid[0]}x{grid[1]}"]
    assert torch.equal(regions.at(*grid)[0][~nothing], touched[~nothing]) and not regions.at(*grid)[0][nothing].any()
    assert regions.outside.tolist() == [3]


@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (2, 4), (1, 2)])
@pytest.mark.parametrize("kind", ["masks", "segments"])
def test_levels_are_those_of_public_code(kind, grid):
    levels, size = recorded("levels"), f"{grid[0]}x{grid[1]}"
    ids, present = levels["ids"][None].long(), torch.ones(1, 8).bool()
    shape = {"id_maps": levels["id_map"][None], "instance_ids": ids}
    if kind == "masks":
        shape = {"masks": levels["id_map"][None, None] == ids[..., None, None]}
    regions = Regions(present=present, **shape)
    assert torch.equal(regions.at(*grid, "nearest")[0], levels[f"nearest_{size}"])
    assert torch.equal(regions.at(*grid, "share")[0], levels[f"pooled_{size}"])
    assert torch.equal(regions.at(*grid, "half")[0], levels[f"pooled_over_half_{size}"])
    assert regions.at(*grid).flatten(2).any(-1).all()  # unlike by the other two rules, nothing vanishes
    assert torch.equal(regions.at(*grid)[0], levels[f"pooled_{size}"] > 0)


@pytest.mark.parametrize(("mode", "rule"), [("all", "nearest"), ("all_avg_pool", "half")])
@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (2, 4), (1, 2)])
def test_equal_prompts_are_seen_where_any_of_their_segments_is(mode, rule, grid, agrees):
    """Each class is one token, of all its segments; public code leaves out tokens that a level does not show at all."""
    prompts, count = recorded("prompts_of_segments"), grid[0] * grid[1]
    ids = prompts["instance_ids"].unique()
    ids = ids[ids != 0].long()
    classes = torch.stack([prompts["class_ids"][prompts["instance_ids"] == each][0].long() for each in ids])
    words = classes.unique()
    present, maps = torch.ones(1, len(ids)).bool(), prompts["instance_ids"][None]
    regions = Regions(present=present, id_maps=maps, instance_ids=ids[None])
    tokens = Tokens(torch.zeros(1, len(words), 2), None, (words[:, None] == classes)[None])
    seen = Condition({"words": tokens}, regions).attention_mask(*grid, rule)[0]
    expected = torch.zeros_like(seen)
    columns = torch.searchsorted(words, prompts[f"{mode}.class_of_token.{count}"])
    expected[:, columns] = prompts[f"{mode}.seen.{count}"]
    assert agrees(seen.float(), expected.float(), f"mamoe masks, {mode}", 0)
    assert not seen[:, words == 17].any()  # a motorcycle of 3 x 3 pixels is lost
    assert Condition({"words": tokens}, regions).attention_mask(*grid)[0].any(0).all()  # by default nothing is


# Against brute force


def supersampled(regions, height, width, factor=8):
    """Shares counted at the centres of `factor` x `factor` points in each cell."""
    points = regions.at(height * factor, width * factor, "nearest").double()
    return F.avg_pool2d(points, factor)


@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (30, 33)])
def test_shares_are_counted_points(kind, size):
    regions, factor = kinds()[kind], 60
    expected = supersampled(regions, *size, factor)
    error = (regions.at(*size, "share") - expected).abs().max()
    assert error < (
        0.04 if kind == "boxes" else 1e-6
    )  # 60 cells have all the edges of 12 or 20 pixels at points' edges


def test_shares_of_boxes_on_a_fine_grid_are_exact():
    boxes = torch.randint(0, 9, (4, 10, 4), generator=torch.manual_seed(3)).double() / 24
    boxes = torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:] + 1 / 24], -1)
    regions = of_boxes(boxes)
    for size in [(3, 3), (6, 9), (3, 12)]:
        assert torch.allclose(regions.at(*size, "share").double(), supersampled(regions, *size), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (7, 5), (15, 9), (45, 24)])
def test_boxes_are_the_masks_of_the_same_rectangles(size):
    """At any size, also finer than the mask; edges are rounded to float32, as in a batch."""
    g = torch.Generator().manual_seed(5)
    top, left = torch.randint(0, 12, (2, 1, 40), generator=g)
    bottom, right = top + torch.randint(1, 4, (1, 40), generator=g), left + torch.randint(1, 5, (1, 40), generator=g)
    y, x = torch.arange(15)[:, None], torch.arange(17)
    masks = torch.stack([(top <= y[..., None]) & (y[..., None] < bottom)], 0)[0]  # (15, 1, 40)
    masks = masks.permute(1, 2, 0)[..., None] & ((left[..., None] <= x) & (x < right[..., None])).unsqueeze(-2)
    boxes = torch.stack([left / 17, top / 15, right / 17, bottom / 15], -1)
    assert boxes.dtype == torch.float32
    of_masks = Regions(present=torch.ones(1, 40).bool(), masks=masks)
    rectangles = of_boxes(boxes)
    assert torch.allclose(rectangles.at(*size, "share"), of_masks.at(*size, "share"), rtol=0, atol=1e-5)
    assert torch.equal(rectangles.at(*size), of_masks.at(*size))
    assert torch.allclose(of_masks.bounds().double(), boxes.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_segments_are_their_masks(size):
    ids = random_ids()
    segments = of_segments(ids)
    masks = as_masks(ids, segments)
    for rule in RULES:
        assert torch.equal(segments.at(*size, rule), masks.at(*size, rule)), rule
    assert torch.equal(segments.front(*size), masks.front(*size))
    assert torch.equal(segments.bounds(), masks.bounds())


@pytest.mark.parametrize("size", SIZES)
def test_shares_of_disjoint_segments_add_up_to_one(size):
    ids = random_ids().clamp(min=10)  # without a gap
    total = of_segments(ids).at(*size, "share").sum(1)
    assert torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6)
    assert torch.allclose(of_segments(ids).visible(*size).sum(1), total)


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (2, 3), (5, 7), (8, 8), (16, 16), (33, 20), (64, 64)])
@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
def test_every_region_touches_a_cell_at_every_size(kind, size):
    if kind == "boxes":
        regions = of_boxes(random_boxes(4, 50, torch.float32))
    else:
        ids = torch.zeros(4, 40, 30, dtype=torch.long)
        for i, k in enumerate(range(0, 30, 7)):
            ids[:, k, k] = 10 * (i + 1)  # a pixel each
        regions = of_segments(ids) if kind == "segments" else as_masks(ids, of_segments(ids))
    touched = regions.at(*size).flatten(2).any(-1)
    assert torch.equal(touched, regions.present) and touched.any()


def test_a_sliver_is_not_touched_but_the_largest_cell_is():
    boxes = torch.tensor([[[0.5 - 1e-7, 0, 1, 1], [0.5 - 1e-7, 0.1, 0.5, 0.1001]]], dtype=torch.float64)
    assert of_boxes(boxes).at(1, 2).tolist() == [[[[False, True]], [[True, False]]]]
    line = torch.tensor([[[0.3, 0.2, 0.3 + 1e-9, 0.7]]], dtype=torch.float64)
    assert of_boxes(line).at(2, 1).tolist() == [[[[True], [False]]]]  # the first of two equal ones
    assert of_boxes(line).at(10, 10).sum() == 1
    half = torch.tensor(0.5)
    line = torch.stack([half.nextafter(torch.tensor(0.0)), 0 * half, half, 2 * half])  # as thin as float32 allows
    assert of_boxes(line[None, None]).at(1, 2).tolist() == [[[[True, False]]]]


@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
def test_regions_that_are_not_present_cover_nothing(kind):
    regions = kinds()[kind]
    shape, gone = regions.shapes[0], regions.present & (torch.arange(regions.present.shape[1]) % 2 == 0)
    shapes = {shape: getattr(regions, shape), "instance_ids": regions.instance_ids}
    raw = Regions(present=regions.present & ~gone, **shapes)  # their shapes and ids are still there
    for rule in RULES:
        assert regions.at(4, 5)[gone].any() and not raw.at(4, 5, rule)[gone].any()
        assert torch.equal(raw.at(4, 5, rule), regions.keep(~gone).at(4, 5, rule))


def test_an_absent_segment_takes_no_pixels_of_another():
    ids = torch.tensor([[3, 3, 5]])
    present = torch.tensor([[False, True, True]])
    regions = Regions(present=present, id_maps=torch.full((1, 2, 2), 3), instance_ids=ids)
    assert regions.at(1, 1, "share").flatten().tolist() == [0, 1, 0]


# Depth and places


@pytest.mark.parametrize("front_first", [False, True])
def test_the_front_region_is_the_last_of_the_list(front_first):
    fields = {"boxes": torch.tensor([[[0, 0, 1, 1], [0, 0, 0.5, 1], [0.25, 0, 0.75, 0.5]]])}
    regions = Regions.from_fields(fields, front_first=front_first)
    expected = [[0] * 4] * 2 if front_first else [[1, 2, 2, 0], [1, 1, 0, 0]]
    assert regions.front(2, 4).tolist() == [expected]
    kept = regions.keep(torch.tensor([[False, True, True]]))
    expected = [[1, 1, 2, -1], [1, 1, -1, -1]] if front_first else [[1, 2, 2, -1], [1, 1, -1, -1]]
    assert kept.front(2, 4).tolist() == [expected]
    assert (kept.keep(torch.zeros(1, 3).bool()).front(2, 4) == -1).all()


def test_regions_in_front_hide_those_behind():
    boxes = torch.tensor([[[0, 0, 1, 1], [0, 0, 0.25, 1], [0, 0, 1, 0.5]]])
    seen = Regions.from_fields({"boxes": boxes}).visible(2, 2)[0]
    assert seen[2].tolist() == [[1, 1], [0, 0]] and seen[1].tolist() == [[0, 0], [0.5, 0]]
    assert seen[0].tolist() == [[0, 0], [0.5, 1]]
    seen = Regions.from_fields({"boxes": boxes}, front_first=True).visible(2, 2)[0]
    assert seen[0].all() and not seen[1:].any()
    assert (kinds()["boxes"].visible(9, 7).sum(1) <= 1 + 1e-6).all()


def test_places_run_from_one_edge_of_a_box_to_the_other():
    u, v = of_boxes(torch.tensor([[[0.25, 0, 0.75, 0.5], [2.0, 0, 3, 1]]])).places(4, 8)
    assert u[0, 0].tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1] and v[0, 0].tolist() == [0.25, 0.75, 1, 1]
    assert not u[0, 1].any() and not v[0, 1].any()
    ids = torch.zeros(1, 4, 8, dtype=torch.long)
    ids[0, :2, 2:6] = 10
    of_pixels = of_segments(ids).places(4, 8)
    assert torch.equal(of_pixels[0][0, 4], u[0, 0]) and torch.equal(of_pixels[1][0, 4], v[0, 0])


# Batches


@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
def test_an_image_does_not_depend_on_its_batch(kind):
    regions = kinds()[kind]
    for i in range(3):
        alone = regions[i : i + 1]
        for size in SIZES:
            for rule in RULES:
                together = regions.at(*size, rule)[i : i + 1]
                assert torch.allclose(alone.at(*size, rule).double(), together.double(), rtol=0, atol=1e-12)
            assert torch.equal(alone.front(*size), regions.front(*size)[i : i + 1])


def test_batches_of_0_1_and_100_regions():
    boxes, counts = random_boxes(3, 100), torch.tensor([0, 1, 100])
    mask = torch.arange(100) < counts[:, None]
    fields = {"boxes": boxes * mask[..., None], "boxes_mask": mask, "box_class": torch.zeros(3, 100).long()}
    regions = Regions.from_fields(fields)
    assert (regions.present.sum(1) + regions.outside).tolist() == [0, 1, 100]
    for i, count in enumerate(counts.tolist()):
        alone = Regions.from_fields({name: value[i : i + 1, :count] for name, value in fields.items()})
        assert alone.present.shape == (1, count) and torch.equal(alone.outside, regions.outside[i : i + 1])
        for rule in RULES:
            assert alone.at(3, 4, rule).shape == (1, count, 3, 4)
            assert torch.equal(alone.at(3, 4, rule), regions.at(3, 4, rule)[i : i + 1, :count])
        assert torch.equal(alone.front(3, 4), regions.front(3, 4)[i : i + 1])
        assert alone.visible(3, 4).shape == (1, count, 3, 4) and alone.places(3, 4)[0].shape == (1, count, 4)
        assert torch.equal(alone.pad_to(100).at(3, 4), regions.at(3, 4)[i : i + 1])


@pytest.mark.parametrize("kind", ["masks", "segments"])
def test_no_regions_at_all(kind):
    shape = {"masks": torch.zeros(2, 0, 5, 6).bool()}
    if kind == "segments":
        shape = {"id_maps": torch.ones(2, 5, 6).int(), "instance_ids": torch.zeros(2, 0).long()}
    regions = Regions(present=torch.zeros(2, 0).bool(), **shape)
    for rule in RULES:
        assert regions.at(3, 4, rule).shape == (2, 0, 3, 4)
    assert (regions.front(3, 4) == -1).all() and regions.bounds().shape == (2, 0, 4)
    assert regions.window(0, 1, 2, 2, (3, 4)).at(2, 2).shape == (2, 0, 2, 2)


def test_coverage_is_computed_once_for_each_size_and_rule():
    regions = kinds()["boxes"]
    assert regions.at(4, 4) is regions.at(4, 4) and regions.at(4, 4) is not regions.at(4, 4, "half")
    assert regions[:1].at(4, 4).shape[0] == 1
    with pytest.raises(ValueError, match="got rule 'any', wanted touched, share, nearest or half"):
        regions.at(4, 4, "any")


@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
def test_cat_is_the_inverse_of_rows_and_pads(kind):
    regions = kinds()[kind]
    joined = Regions.cat([regions[:1], regions[1:]])
    for name, tensor in regions.tensors().items():
        assert torch.equal(joined.tensors()[name], tensor)
    more = Regions.cat([regions.pad_to(9), regions, regions.empty(2)])
    count = regions.present.shape[1]
    assert torch.equal(more.at(3, 5)[3:6, :count], regions.at(3, 5)) and not more.at(3, 5)[:, count:].any()
    assert torch.equal(more.at(3, 5)[:3], regions.pad_to(9).at(3, 5)) and not more.present[6:].any()
    assert (more.class_ids[6:] == -1).all() and more.outside[6:].tolist() == [0, 0]


def test_regions_of_different_kinds_are_not_concatenated():
    boxes, masks = kinds()["boxes"], kinds()["masks"]
    with pytest.raises(ValueError, match="got regions as boxes; and as masks: wanted the same in all"):
        Regions.cat([boxes, masks])
    front_first = Regions(present=boxes.present, boxes=boxes.boxes, front_first=True)
    with pytest.raises(ValueError, match="boxes; and as boxes, front first"):
        Regions.cat([boxes, front_first])


# Windows


@pytest.mark.parametrize("kind", ["boxes", "masks", "segments"])
@pytest.mark.parametrize(
    ("grid", "window"), [((6, 10), (1, 2, 3, 4)), ((5, 7), (2, 0, 3, 5)), ((24, 40), (3, 11, 9, 8))]
)
def test_a_window_covers_the_same_cells(kind, grid, window):
    """The grid need not divide the pixels: 12 x 20 here."""
    regions, (top, left, height, width) = kinds()[kind], window
    part = regions.window(*window, grid)
    for rule in ("share", "half", "nearest"):
        expected = regions.at(*grid, rule)[..., top : top + height, left : left + width]
        assert torch.allclose(part.at(height, width, rule).double(), expected.double(), rtol=0, atol=1e-6), rule
    inside = regions.at(*grid, "share")[..., top : top + height, left : left + width].flatten(2).any(-1)
    assert torch.equal(part.present, regions.present & inside)
    assert torch.equal(part.outside - regions.outside, regions.present.sum(1) - part.present.sum(1))
    again = part.window(1, 1, 2, 2, (height, width))
    expected = regions.at(*grid, "share")[..., top + 1 : top + 3, left + 1 : left + 3]
    assert torch.allclose(again.at(2, 2, "share"), expected, rtol=0, atol=1e-5)
    assert again.at(2, 2).flatten(2).any(-1).equal(again.present)


# Fields of a batch


def test_boxes_are_clipped_and_what_is_outside_is_counted():
    boxes = torch.tensor([[[-1, 0.5, 0.5, 2], [1.2, 0, 1.5, 1], [0, -1, 1, 0], [0.1, 0.2, 0.3, 0.4]]])
    regions = of_boxes(boxes, box_class=torch.tensor([[3, 4, 5, 6]]), box_id=torch.tensor([[1, 2, 3, 4]]))
    assert regions.present.tolist() == [[True, False, False, True]] and regions.outside.tolist() == [2]
    assert regions.boxes[0, 0].tolist() == [0, 0.5, 0.5, 1] and not regions.boxes[0, 1:3].any()
    assert regions.class_ids.tolist() == [[3, -1, -1, 6]] and regions.instance_ids.tolist() == [[1, -1, -1, 4]]


def test_boxes_with_panoptic_maps_cover_their_pixels():
    ids = torch.zeros(1, 4, 4, dtype=torch.int32)
    ids[0, 1, 1:3] = 8
    fields = {
        "boxes": torch.tensor([[[0.0, 0, 1, 1], [0, 0, 1, 1]]]),
        "box_id": torch.tensor([[8, 9]]),
        "panoptic": ids,
    }
    regions = Regions.from_fields(fields)
    assert regions.present.tolist() == [[True, False]] and regions.outside.tolist() == [1]
    assert torch.equal(regions.at(4, 4, "nearest")[0, 0], ids[0] == 8)
    assert regions.bounds().tolist() == [[[0, 0, 1, 1], [0, 0, 0, 0]]]


def test_masks_of_0_and_1_may_come_without_boxes():
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    masks[0, 0, 2:, 1:3] = 1
    regions = Regions.from_fields({"masks": masks, "masks_mask": torch.ones(1, 2).bool()})
    assert regions.present.tolist() == [[True, False]] and regions.bounds()[0, 0].tolist() == [0.25, 0.5, 0.75, 1]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box",
    [[NAN, 0, 1, 1], [0, 0, INF, 1], [0.5, 0, 0.5, 1], [0.5, 0, 0.2, 1], [0, 0.7, 1, 0.3], [0, 1.0, 1, 0]],
    ids=str,
)
def test_a_box_that_cannot_be_is_refused_by_its_image(box):
    boxes = torch.tensor([[[0, 0, 1, 1.0]] * 3, [[0, 0, 1, 1.0], [-0.5, 0.2, 1.5, 0.3], box]])
    mask = torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match=r"^image 1 of the batch: got boxes \[.*\] as region 2, wanted .* x0 < x1 and"):
        check_region_fields({"boxes": boxes, "boxes_mask": mask})
    with pytest.raises(ValueError, match=r"^b/7.png: got boxes"):
        check_region_fields({"boxes": boxes, "boxes_mask": mask}, names=["a.png", "b/7.png"])
    mask[1, 2] = False  # padding
    check_region_fields({"boxes": boxes, "boxes_mask": mask})


def test_boxes_that_were_clamped_at_the_border_are_outside():
    boxes = torch.tensor([[[0.0, 0.1, 0, 0.4], [0.2, 1, 0.4, 1], [1, 1, 1, 1]]])
    check_region_fields({"boxes": boxes})
    assert of_boxes(boxes).outside.tolist() == [3]


def test_classes_beyond_their_number_are_refused():
    fields = {"boxes": torch.tensor([[[0, 0, 1, 1.0]] * 2]), "box_class": torch.tensor([[0, 4]])}
    check_region_fields(fields, {"box_class": 5, "box_color": 2})
    with pytest.raises(ValueError, match="got box_class 4 as region 1, wanted 0 to 3"):
        check_region_fields(fields, {"box_class": 4})
    with pytest.raises(ValueError, match="got box_class -1 as region 0, wanted 0 to 4"):
        check_region_fields(fields | {"box_class": torch.tensor([[-1, 4]])}, {"box_class": 5})


def test_a_segment_has_one_row():
    fields = {"panoptic": torch.zeros(1, 2, 2).int(), "segment_id": torch.tensor([[3, 5, 3]])}
    with pytest.raises(ValueError, match="got segment_id 3 as region 2, which an earlier one has"):
        check_region_fields(fields)
    check_region_fields(fields | {"segment_id_mask": torch.tensor([[True, True, False]])})


def test_boxes_and_segments_are_not_mixed():
    fields = {
        "boxes": torch.zeros(1, 1, 4),
        "panoptic": torch.zeros(1, 2, 2).int(),
        "segment_id": torch.zeros(1, 1).long(),
    }
    with pytest.raises(ValueError, match="got boxes, segment_id as regions, wanted either boxes or masks, or panoptic"):
        Regions.from_fields(fields)
    with pytest.raises(ValueError, match="got no fields as regions"):
        Regions.from_fields({"caption": ["a"]})


def test_regions_of_other_shapes_are_refused():
    present = torch.ones(2, 3).bool()
    for message, shapes in {
        "without shapes, wanted boxes, masks or id_maps": {},
        "got id_maps without instance_ids": {"id_maps": torch.zeros(2, 4, 4)},
        r"got boxes \(2, 3, 5\) of regions, wanted \(2, 3, 4\)": {"boxes": torch.zeros(2, 3, 5)},
        r"got masks \(2, 2, 4, 4\) of regions, wanted \(2, 3, H, W\)": {"masks": torch.zeros(2, 2, 4, 4)},
        r"got id_maps \(2, 4\) of regions, wanted \(2, H, W\)": {"id_maps": torch.ones(2, 4), "instance_ids": present},
        r"got class_ids \(2, 4\)": {"boxes": torch.zeros(2, 3, 4), "class_ids": torch.zeros(2, 4)},
    }.items():
        with pytest.raises(ValueError, match=message):
            Regions(present=present, **shapes)
