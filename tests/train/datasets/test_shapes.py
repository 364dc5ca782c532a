"""The scenes of `shapes`: fixed for ever, varied as specified, and annotated as they are drawn."""

import hashlib
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from helpers.annotated_images import assert_same_fields
from train.data.annotations import pack, unpack
from train.data.transforms import View, to_item
from train.datasets import Ragged, shapes
from train.datasets._shapes_render import draw_image, draw_masks, draw_segments, draw_semantic, segment_classes
from train.datasets._shapes_scene import (
    CAMERAS,
    GROUNDS,
    KINDS,
    MORE_KINDS,
    NIGHT,
    PALETTE,
    THINGS,
    Thing,
    box_iou,
    choose_grounds,
    choose_kind,
    draw_scene,
    mask_in_window,
)

SPLITS = ("train", "val", "judge")


@cache
def val_scenes():
    return [draw_scene(0, "val", index) for index in range(1000)]


def val_objects():
    return [(scene, thing) for scene in val_scenes() for thing in scene.things]


def share(flags):
    return np.mean(list(flags))


def others(scene, thing):
    return [other for other in scene.things if other is not thing]


def gap(a, b):
    """The larger of the horizontal and the vertical distance of two boxes."""
    return max(max(a[i], b[i]) - min(a[i + 2], b[i + 2]) for i in (0, 1))


def test_pixels_and_annotations_never_change():
    """A change of scenes needs another VERSION, which makes all caches anew."""
    digest = hashlib.sha256()
    for index in range(20):
        for split in SPLITS:
            scene = draw_scene(7, split, index)
            masks = draw_masks(scene, 32)
            for array in (draw_image(scene, 32), masks, draw_segments(scene, masks), scene.visible):
                digest.update(array.tobytes())
            digest.update(f"{scene.things}{scene.file_name}{scene.kind}".encode())
    assert (shapes.VERSION, digest.hexdigest()[:16]) == (1, "05027abbd7f2f0a1")


def test_a_scene_is_the_same_at_every_size():
    dataset = shapes.build(shapes.Config(), "val")
    for index in range(20):
        small, large = dataset.read_at_size(index, (32, 32)), dataset.read_at_size(index, (128, 128))
        assert torch.equal(small["boxes"] * 4, large["boxes"])
        averaged = large["image"].reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(averaged - small["image"]).mean() < 2
        for name in set(small) - {"image", "boxes", "masks", "panoptic", "semantic"}:
            assert_same_fields({name: small[name]}, {name: large[name]})


def test_splits_and_seeds_have_other_scenes():
    scenes = [draw_scene(0, split, 5) for split in SPLITS] + [draw_scene(1, "train", 5), draw_scene(0, "train", 6)]
    assert len({scene.things for scene in scenes}) == 5


def test_annotations_follow_one_ground():
    dataset = shapes.build(shapes.Config(shapes_grounds=("water",), shapes_things=("ring", "bow")), "judge")
    assert dataset.region_classes == THINGS + GROUNDS  # and so the numbers of classes
    for index in range(20):
        item, n = dataset.read_at_size(index, (32, 32)), len(dataset.scene(index).things)
        assert set(item["box_class"].tolist()) <= {4, 5} and item["segment_class"].tolist()[n:] == [9]
        assert set(item["semantic"].unique().tolist()) <= {4, 5, 9, 255}
        assert item["location"] == "water" and item["captions"][0].endswith(", water")
        assert item["file_name"].endswith("__water.png")
        assert all(words.split()[1] in ("ring", "bow") for words in item["box_words"])
    assert {choose_grounds(u / 10, v / 10, [3]) for u in range(10) for v in range(10)} == {(3,)}


def test_the_kinds_have_their_shares():
    counts = Counter(scene.kind for scene in val_scenes())
    assert all(abs(counts[kind] / 1000 - expected) < 0.04 for kind, expected in KINDS.items())
    assert Counter(choose_kind((i + 0.5) / 1000, tuple(KINDS)) for i in range(1000)) == {
        kind: round(1000 * expected) for kind, expected in KINDS.items()
    }


def test_large_things_occur_where_they_are_asked_for():
    assert not {scene.kind for scene in val_scenes()} & {*MORE_KINDS}
    large = shapes.build(shapes.Config(shapes_kinds=("large",)), "val")
    scenes = [large.scene(i) for i in range(200)]
    assert {scene.kind for scene in scenes} == {"large"} and {len(scene.things) for scene in scenes} == {1, 2, 3}
    assert all(0.34 <= thing.box[2] - thing.box[0] <= 0.5 for scene in scenes for thing in scene.things)
    counts = Counter(choose_kind((i + 0.5) / 1400, (*KINDS, *MORE_KINDS)) for i in range(1400))
    assert counts == {kind: round(1000 * share) for kind, share in (KINDS | MORE_KINDS).items()}


def test_objects_are_as_many_small_and_near_as_specified():
    counts = Counter(len(scene.things) for scene in val_scenes())
    objects = val_objects()
    assert set(counts) == {1, 2, 3, 4, 5, 6} and 2.8 < len(objects) / 1000 < 3.3
    areas = [(thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1]) for _, thing in objects]
    assert 0.2 < share(area < 0.05 for area in areas) < 0.3
    near = [any(o.kind == t.kind and gap(o.box, t.box) <= 0.045 for o in others(scene, t)) for scene, t in objects]
    assert 0.25 < share(near) < 0.33
    overlaps = [any(box_iou(o.box, t.box) > 0 for o in others(scene, t)) for scene, t in objects]
    assert 0.45 < share(overlaps) < 0.65


def test_occlusions_are_strong_and_nothing_is_hidden():
    visible = np.concatenate([scene.visible for scene in val_scenes()])
    assert 0.1 < share(visible < 0.8) < 0.15 and visible.min() > 0.3 and visible.max() == 1
    for scene in val_scenes()[:200]:
        masks = draw_masks(scene, 64)
        segments = draw_segments(scene, masks)
        shares = [np.mean(segments[mask == 1] == number) for number, mask in enumerate(masks, 1)]
        np.testing.assert_allclose(scene.visible, shares)


def test_classes_colors_and_metadata_are_even():
    scenes, objects = val_scenes(), val_objects()
    for numbers, n in (([t.kind for _, t in objects], 6), ([t.color for _, t in objects], 6)):
        np.testing.assert_allclose(np.bincount(numbers, minlength=n) / len(objects), 1 / n, atol=0.025)
    table = np.zeros((6, 6))
    for _, thing in objects:
        table[thing.kind, thing.color] += 1
    assert np.abs(table / len(objects) - 1 / 36).max() < 0.012  # colours are independent of classes
    grounds = Counter(number for scene in scenes for number in scene.grounds)
    assert all(abs(count / sum(grounds.values()) - 0.25) < 0.03 for count in grounds.values())
    assert abs(share(len(scene.grounds) == 1 for scene in scenes) - 0.2) < 0.04
    assert abs(share(scene.light == "night" for scene in scenes) - 0.25) < 0.04
    assert abs(share(scene.weather == "rain" for scene in scenes) - 0.25) < 0.04
    cameras = Counter(scene.camera for scene in scenes)
    assert set(cameras) == set(CAMERAS) and min(cameras.values()) > 200


def test_each_kind_of_scene_is_what_its_name_says():
    for scene in val_scenes():
        boxes, kinds = [t.box for t in scene.things], [t.kind for t in scene.things]
        sides = [box[2] - box[0] for box in boxes]
        if scene.kind in ("free", "small"):
            low, high = (0.22, 0.5) if scene.kind == "free" else (0.15, 0.22)
            assert all(low <= side + 1e-9 and side - 1e-9 <= high for side in sides)
            assert all(box_iou(a, b) <= 0.1 for i, a in enumerate(boxes) for b in boxes[:i])
        elif scene.kind == "neighbours":
            assert kinds[0] == kinds[1] and -1e-9 <= gap(boxes[0], boxes[1]) <= 0.04 + 1e-9
            assert kinds.count(kinds[0]) in (2, 3) and len(kinds) - kinds.count(kinds[0]) <= 1
        elif scene.kind == "occlusion":
            assert box_iou(boxes[0], boxes[1]) > 0.1
        else:
            assert kinds[0] != kinds[1] and 2 * sides[1] <= sides[0] + 1e-9
            assert all(boxes[0][i] <= boxes[1][i] and boxes[1][i + 2] <= boxes[0][i + 2] for i in (0, 1))


@pytest.mark.parametrize(("size", "n"), [(32, 1000), (64, 300)])
def test_the_median_colour_of_an_object_is_its_own(size, n):
    palette, right = np.array([color for _, color in PALETTE], float), []
    for scene in val_scenes()[:n]:
        image = draw_image(scene, size)
        segments = draw_segments(scene, draw_masks(scene, size))
        bright = NIGHT if scene.light == "night" else 1
        for number, thing in enumerate(scene.things, 1):
            median = np.median(image[segments == number], axis=0)
            right.append(np.linalg.norm(palette * bright - median, axis=1).argmin() == thing.color)
    assert share(right) >= 0.995


def rain_in(image):
    """The share of pixels on bright slanting lines, at 64 pixels."""
    levels = image.astype(float).min(-1) / image.max()
    ridge = np.zeros_like(levels)
    ridge[:, 3:-3] = levels[:, 3:-3] - np.maximum(levels[:, :-6], levels[:, 6:])
    return np.mean(np.minimum.reduce([ridge[:-6, 6:], ridge[2:-4, 5:-1], ridge[4:-2, 4:-2], ridge[6:, 3:-3]]) > 0.08)


def test_the_metadata_of_a_file_name_is_visible():
    for scene in val_scenes()[:300]:
        image = draw_image(scene, 64)
        bars = tuple(bool(image[:, columns].max() < 30) for columns in (slice(0, 4), slice(60, 64)))
        assert bars == CAMERAS[scene.camera]
        assert (image.max() <= np.ceil(255 * NIGHT)) == (scene.light == "night")
        assert (rain_in(image) > 0.006) == (scene.weather == "rain")
        camera, stem = scene.file_name.removesuffix(".png").split("/")[1:]
        parts = stem.split("__")
        assert camera == parts[1] == scene.camera
        assert parts[2:] == [scene.time, scene.weather, scene.light, scene.location]
        classes = set(np.unique(draw_semantic(scene, draw_segments(scene, draw_masks(scene, 64)))) - len(THINGS))
        assert {GROUNDS.index(ground) for ground in scene.location.split("-")} <= classes


def test_masks_fill_their_boxes():
    for scene in val_scenes()[:100]:
        for thing, mask in zip(scene.things, draw_masks(scene, 128), strict=True):
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(extent, np.multiply(128, thing.box), atol=2.5)  # bows and triangles are pointed
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.4


def test_a_mask_holds_the_pixels_whose_centres_are_covered():
    for kind in ("square", "plus"):  # whose columns are full
        box = (0.1, 0.2, 0.6, 0.7)
        rows, columns, inside = mask_in_window(THINGS.index(kind), box, 10)  # from 1 to 6 and from 2 to 7
        assert (rows, columns) == (slice(2, 7), slice(1, 6)) and inside[2].all()
        rows, columns, inside = mask_in_window(THINGS.index(kind), (0.14, 0.26, 0.64, 0.76), 10)
        assert (rows, columns) == (slice(3, 8), slice(1, 6)) and inside[2].all()


def test_things_that_overlap_have_other_colors():
    for scene, thing in val_objects():
        assert all(o.color != thing.color for o in others(scene, thing) if box_iou(o.box, thing.box) > 0)


def test_the_front_thing_has_the_pixel():
    for scene in val_scenes()[:100]:
        masks = draw_masks(scene, 32)
        segments, classes = draw_segments(scene, masks), segment_classes(scene)
        assert set(np.unique(segments)) - {0} == set(range(1, len(classes) + 1))
        for y, x in np.random.default_rng(0).integers(0, 32, (30, 2)):
            here = [number for number, mask in enumerate(masks, 1) if mask[y, x]]
            if here:
                assert segments[y, x] == here[-1]
            elif segments[y, x]:
                upper = (y + 0.5) / 32 < scene.horizon or len(scene.grounds) == 1
                assert classes[segments[y, x] - 1] == len(THINGS) + scene.grounds[0 if upper else 1]
            else:
                assert CAMERAS[scene.camera][0 if x < 2 else 1] and (x < 2 or x >= 30)
        semantic = draw_semantic(scene, segments)
        assert ((semantic == 255) == (segments == 0)).all()
        assert all((semantic[segments == number] == each).all() for number, each in enumerate(classes, 1))


def test_items_have_all_fields_and_survive_a_cache():
    dataset = shapes.build(shapes.Config(shapes_size=40), "train")
    item = dataset[3]
    assert item["image"].shape == (40, 40, 3) and item["masks"].shape == (len(item["boxes"]), 40, 40)
    assert isinstance(item["boxes"], tv_tensors.BoundingBoxes) and item["boxes"].clamping_mode is None
    for name in ("masks", "panoptic", "semantic"):
        assert isinstance(item[name], tv_tensors.Mask)
    things = dataset.scene(3).things
    for name in ("box_class", "box_id", "box_color", "box_visible"):
        assert isinstance(item[name], Ragged) and item[name].shape == (len(things),)
    assert item["box_words"] == [f"{PALETTE[t.color][0]} {dataset.region_classes[t.kind]}" for t in things]
    assert item["segment_class"][item["box_id"] - 1].tolist() == item["box_class"].tolist()
    assert len(dataset.region_things) == len(dataset.region_classes) == 10 and sum(dataset.region_things) == 6
    fields = {name: value for name, value in item.items() if name != "image"}
    assert_same_fields(unpack(pack(fields)), fields)


def test_metadata_have_the_values_that_are_declared():
    scenes = [shapes.build(shapes.Config(), "train").scene(index) for index in range(400)]
    for field, values in shapes.Shapes.metadata_values.items():
        assert {getattr(scene, field) for scene in scenes} == {*values} and len(values) == len({*values})


def test_items_are_read_at_the_size_of_a_training():
    dataset = shapes.build(shapes.Config(), "train")
    item = to_item(dataset.read_at_size(8, (24, 40)), (24, 40), 3)
    whole = to_item(dataset.read_at_size(8, (40, 40)), (40, 40), 3)
    assert torch.equal(item["image"], whole["image"][:, 8:32])  # drawn at 40, not resized
    assert torch.equal(item["boxes"], whole["boxes"] - torch.tensor([0, 8, 0, 8]))


def test_a_mirrored_camera_is_the_other_one():
    dataset = shapes.build(shapes.Config(), "val")
    swapped = {"CAM_FRONT_LEFT": "CAM_FRONT_RIGHT", "CAM_FRONT_RIGHT": "CAM_FRONT_LEFT"}
    for index in range(12):
        item = to_item(dataset.read_at_size(index, (32, 32)), (32, 32), 3)
        mirrored = View(flip=True, sides=dataset.sides)(item)
        assert mirrored["camera"] == swapped.get(item["camera"], item["camera"])
        bars = tuple(bool(mirrored["image"][:, :, columns].max() < 30) for columns in (slice(0, 2), slice(30, 32)))
        assert bars == CAMERAS[mirrored["camera"]]
        assert mirrored["file_name"] == item["file_name"] and mirrored["captions"] == item["captions"]


def test_captions_count_things():
    scene = replace(val_scenes()[0], grounds=(0, 2), weather="rain", light="night")
    box = (0.1, 0.1, 0.4, 0.4)
    scene = replace(scene, things=(Thing(4, 4, box), Thing(0, 0, box), Thing(4, 4, box)))
    assert shapes.captions_of(scene) == [
        "two blue rings, a red disc, sky over sand",
        "a red disc and two blue rings in front of sky over sand, a rainy night",
    ]
    scene = replace(scene, things=(Thing(3, 1, box),), grounds=(3,), weather="sunny")
    assert shapes.captions_of(scene) == ["an orange plus, water", "an orange plus in front of water, a clear night"]
    scene = replace(scene, things=3 * (Thing(3, 1, box),), light="daytime")
    assert shapes.captions_of(scene)[1] == "three orange pluses in front of water, a sunny day"


def test_counts_and_ends_of_the_splits():
    config = shapes.Config(shapes_count=12)
    assert [len(shapes.build(config, split)) for split in SPLITS] == [12, 1000, 12]
    with pytest.raises(IndexError, match="no scene 12 of 12"):
        shapes.build(config, "train")[12]
    with pytest.raises(IndexError, match="no scene -1"):
        shapes.build(config, "train")[-1]


def test_the_fingerprint_covers_every_option():
    configs = [
        shapes.Config(),
        shapes.Config(shapes_count=3),
        shapes.Config(shapes_size=32),
        shapes.Config(shapes_kinds=("free", "small")),
        shapes.Config(shapes_seed=1),
        shapes.Config(shapes_things=("disc", "bow")),
        shapes.Config(shapes_grounds=("sky", "sand")),
        shapes.Config(shapes_grounds=("sky", "water")),
    ]
    prints = {shapes.build(config, split).fingerprint() for config in configs for split in ("train", "judge")}
    assert len(prints) == 16
    held_out = [shapes.Config(shapes_held_out=pairs) for pairs in (("red-disc",), ("red-disc", "red-bow"))]
    held_out.append(shapes.Config(shapes_held_out=("red-bow", "red-disc"), shapes_val_pairs="held_out"))
    train, val, judge = (
        [shapes.build(c, split).fingerprint() for c in held_out] for split in ("train", "val", "judge")
    )
    plain = [shapes.build(shapes.Config(), split).fingerprint() for split in ("train", "val", "judge")]
    assert train[1] == train[2] and len({plain[0], *train}) == 3
    assert val[0] == val[1] == plain[1] != val[2] and {*judge} == {plain[2]}
    for reordered in ({"shapes_kinds": ("small", "free")}, {"shapes_things": ("bow", "disc")}):
        assert shapes.build(shapes.Config(**reordered), "train").fingerprint() in prints


def test_fingerprints_of_earlier_releases_stay():
    """They name caches and runs: options that are left at their defaults do not change them."""
    given = shapes.Config(shapes_count=64, shapes_size=32, shapes_kinds=("small", "free"), shapes_seed=3)
    found = [shapes.build(config, split).fingerprint()[:16] for config in (shapes.Config(), given) for split in SPLITS]
    assert found == [
        *("6b4b1e02a28bf587", "5c37f28b94e49ec4", "4989d08ff0489721"),
        *("207f4334a8b98abf", "b26823c4ac5b3bf0", "8ed5b25af67cc355"),
    ]


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="got shapes_kinds fre, wanted some of free, neighbours.*free"):
        shapes.Config(shapes_kinds=("fre",))
    with pytest.raises(ValueError, match="no shapes_kinds.*--shapes_kinds"):
        shapes.Config(shapes_kinds=())
    with pytest.raises(ValueError, match="got shapes_things rings, wanted some of disc, square.*ring"):
        shapes.Config(shapes_things=("rings",))
    with pytest.raises(ValueError, match="no shapes_things.*--shapes_things"):
        shapes.Config(shapes_things=())
    with pytest.raises(ValueError, match="got shapes_grounds disc, wanted some of sky, grass"):
        shapes.Config(shapes_grounds=("disc",))
    with pytest.raises(ValueError, match="no shapes_grounds.*--shapes_grounds"):
        shapes.Config(shapes_grounds=())
    with pytest.raises(ValueError, match="shapes_seed 4294967296.*at most"):
        shapes.Config(shapes_seed=2**32)
    with pytest.raises(ValueError, match="shapes reads no folder, got /data: leave --data_dir out"):
        shapes.build(shapes.Config(data_dir="/data"), "train")
