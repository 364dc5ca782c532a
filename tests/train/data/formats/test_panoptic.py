"""The three panoptic encodings: a real map in two of them, round trips, and wrong flags."""

import numpy as np
import pytest

from helpers.tiny_runs import ROOT
from train.data.formats import panoptic

REAL = np.load(ROOT / "tests" / "fixtures" / "spatial" / "panoptic_encodings.npz")
THINGS = {category: category in REAL["thing_categories"] for category in range(1, 201)}
SEGMENTS = {int(segment): int(category) for segment, category, _ in REAL["segment_list"]}
CITYSCAPES = {number: number > 10 for number in range(19)}


def random_map(rng, n=6, highest=None):
    """A map of n segments and unlabelled pixels, their ids and classes."""
    ids = rng.permutation(highest or 2 * n)[:n] + 1
    rows = np.sort(rng.integers(0, n + 1, (16, 16)), axis=None).reshape(16, 16)
    return np.array([0, *ids])[rows].astype(np.int32), ids, rng.integers(1, 9, n)


def classes_of(decoded):
    """The class of each pixel of a decoded map; 0: unlabelled."""
    table = dict(zip(decoded.segment_id.tolist(), decoded.segment_class.tolist(), strict=True))
    return np.vectorize(lambda each: table.get(each, 0))(decoded.ids)


def same_partition(one, two):
    """Whether two maps have the same segments, whatever their ids."""
    pairs = np.unique(np.stack([one.ravel(), two.ravel()]), axis=1)
    return len(np.unique(one)) == len(np.unique(two)) == pairs.shape[1]


def test_a_real_map_reads_alike_in_two_encodings():
    of_coco = panoptic.decode(REAL["coco_rgb"], "coco")
    assert np.array_equal(of_coco.ids, REAL["segment_ids"]) and of_coco.segment_class is None
    assert of_coco.segment_id.tolist() == sorted(set(REAL["segment_ids"].ravel().tolist()) - {0})
    two = panoptic.decode(REAL["two_channel_rgb"], "two_channel")
    assert np.array_equal(classes_of(two), REAL["category"])
    assert same_partition(two.ids, of_coco.ids)
    crowds = [segment for segment, _, crowd in REAL["segment_list"] if crowd]
    assert np.array_equal(np.isin(two.ids, two.segment_id[two.segment_crowd == 1]), np.isin(of_coco.ids, crowds))


def test_a_real_map_is_written_as_it_was():
    assert np.array_equal(panoptic.encode(REAL["segment_ids"], "coco"), REAL["coco_rgb"])
    segment_id, segment_class, crowd = REAL["segment_list"].T
    rgb = panoptic.encode(REAL["segment_ids"], "two_channel", segment_id, segment_class, crowd)
    decoded = panoptic.decode(rgb, "two_channel")
    assert np.array_equal(classes_of(decoded), REAL["category"])
    assert same_partition(decoded.ids, REAL["segment_ids"])
    assert np.array_equal(rgb[..., 1] == 255, REAL["two_channel_rgb"][..., 1] == 255)


@pytest.mark.parametrize("encoding", panoptic.ENCODINGS)
def test_maps_survive_each_encoding(encoding):
    rng = np.random.default_rng(0)
    for highest in (None, 2**16 - 1):
        ids, segment_id, segment_class = random_map(rng, highest=highest)
        rgb = panoptic.encode(ids, encoding, segment_id, segment_class)
        assert rgb.dtype == np.uint8 and rgb.shape == (16, 16, 3)
        decoded = panoptic.decode(rgb, encoding)
        assert decoded.ids.dtype == np.int32 and decoded.segment_id.dtype == np.int64
        assert same_partition(decoded.ids, ids) and ((decoded.ids == 0) == (ids == 0)).all()
        if encoding != "two_channel":
            assert np.array_equal(decoded.ids, ids)
        if encoding != "coco":
            order = np.argsort(segment_id)
            wanted = np.array([0, *segment_class[order]])[np.searchsorted([0, *segment_id[order]], ids)]
            assert np.array_equal(classes_of(decoded), wanted)


def test_mamoe_leaves_out_id_0_and_class_19():
    rgb = np.array([[[93, 193, 11], [0, 0, 0], [4, 1, 19], [0, 0, 19]]], np.uint8)
    decoded = panoptic.decode(rgb, "mamoe")
    assert decoded.ids.tolist() == [[256 * 93 + 193, 0, 0, 0]]
    assert decoded.segment_id.tolist() == [24001] and decoded.segment_class.tolist() == [11]
    with pytest.raises(ValueError, match="24001 has two classes.*--panoptic_encoding"):
        panoptic.decode(np.array([[[93, 193, 11], [93, 193, 12]]], np.uint8), "mamoe")


def test_an_empty_map_has_no_segments():
    for encoding in panoptic.ENCODINGS:
        empty = panoptic.encode(np.zeros((2, 3), np.int32), encoding, np.zeros(0, int), np.zeros(0, int))
        assert len(panoptic.decode(empty, encoding).segment_id) == 0


@pytest.mark.parametrize(
    ("written", "read", "options"),
    [
        ("coco", "two_channel", {}),
        ("coco", "mamoe", {}),
        ("two_channel", "coco", {"segment_ids": [SEGMENTS.keys()]}),
        ("two_channel", "mamoe", {}),
    ],
)
def test_a_wrong_flag_for_a_real_map_is_refused(written, read, options):
    rgb = REAL[f"{written}_rgb"]
    panoptic.check_encoding([rgb], written, THINGS, [SEGMENTS.keys()] if written == "coco" else None)
    with pytest.raises(
        ValueError, match=f"not of the encoding {read}.*look like {written}.*panoptic_encoding {written}"
    ):
        panoptic.check_encoding([rgb], read, THINGS, **options)


@pytest.mark.parametrize("read", ["coco", "two_channel"])
def test_a_wrong_flag_for_a_map_of_mamoe_is_refused(read):
    ids = np.repeat([0, 11, 1000, 24001, 26001, 26002], 8).reshape(6, 8)
    rgb = panoptic.encode(ids, "mamoe", [11, 1000, 24001, 26001, 26002], [10, 0, 11, 13, 13])
    segment_ids = [[11, 1000, 24001, 26001, 26002]] if read == "coco" else None
    assert panoptic.possible_encodings([rgb], CITYSCAPES)[0] == "mamoe"
    with pytest.raises(ValueError, match="look like mamoe"):
        panoptic.check_encoding([rgb], read, CITYSCAPES, segment_ids)


def test_ids_that_count_up_are_told_from_categories():
    pictures = [panoptic.encode(np.arange(16).reshape(4, 4) % n, "coco") for n in (3, 5, 7)]
    things = dict.fromkeys(range(11), True)
    panoptic.check_encoding(pictures, "coco", things, [range(1, n) for n in (3, 5, 7)])
    for read in ("two_channel", "mamoe"):
        with pytest.raises(ValueError, match="look like coco"):
            panoptic.check_encoding(pictures, read, things)


def test_what_an_encoding_cannot_hold_is_refused():
    ids = np.array([[1, 70000]])
    with pytest.raises(ValueError, match="ids from 1 to 70000.*mamoe"):
        panoptic.encode(ids, "mamoe", [1, 70000], [1, 2])
    with pytest.raises(ValueError, match="classes from 0 to 3.*two_channel"):
        panoptic.encode(ids, "two_channel", [1, 70000], np.array([0, 3]))
    with pytest.raises(ValueError, match="classes from 19 to 19, wanted 0 to 18"):
        panoptic.encode(np.array([[1]]), "mamoe", [1], [19])
    with pytest.raises(ValueError, match="id 70000, which has no class"):
        panoptic.encode(ids, "mamoe", [1], [2])
    with pytest.raises(ValueError, match="category 3 has two crowds"):
        panoptic.encode(ids, "two_channel", [1, 70000], [3, 3], [1, 1])
