"""make_panoptic.py: semantic maps and instances of every form to panoptic maps, and things cut out on black."""

import json

import make_panoptic
import numpy as np
import pytest
from make_panoptic import Instance, Segment, merge
from PIL import Image

from train.cli import parse as cli
from train.data.formats.categories import Categories, encode_categories
from train.data.formats.coco import encode_rle
from train.data.formats.panoptic import ENCODINGS, check_encoding, decode
from train.data.formats.prompts import decode_instance_prompts
from train.datasets import panoptic_folder

CATEGORIES = Categories((1, 2, 7, 8), ("sky", "road", "car", "person"), (False, False, True, True))
SIZE = (12, 20)


def box_mask(left, top, right, bottom):
    mask = np.zeros(SIZE, bool)
    mask[top:bottom, left:right] = True
    return mask


CAR, PERSON, HIDDEN, FAR = box_mask(2, 4, 12, 10), box_mask(8, 3, 11, 11), box_mask(4, 5, 6, 7), box_mask(15, 5, 18, 8)


def street():
    """Sky over road, with what is in front of them; a car at the left is in no instance."""
    semantic = np.full(SIZE, 1, np.uint8)
    semantic[6:] = 2
    for mask, category in ((CAR, 7), (FAR, 7), (PERSON, 8), (box_mask(0, 7, 2, 9), 7)):
        semantic[mask] = category
    semantic[0, :3] = 255
    return semantic


INSTANCES = [Instance(CAR, 7), Instance(PERSON, 8), Instance(HIDDEN, 7), Instance(FAR, 7)]


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def areas(ids, segments):
    return [(each.category, each.crowd, int((ids == i).sum())) for i, each in enumerate(segments, 1)]


def test_segments_are_disjoint_and_cover_what_is_labelled():
    ids, segments = merge(street(), INSTANCES, CATEGORIES, "small", (255,))
    assert ((ids == 0) == (street() == 255)).all() and ids.dtype == np.int32
    assert np.unique(ids).tolist() == list(range(len(segments) + 1))
    named = [(each.category, each.crowd) for each in segments]
    assert named == [(7, False), (8, False), (7, False), (7, False), (1, False), (2, False), (7, True)]
    assert (ids == 7).sum() == 4  # the car of no instance


@pytest.mark.parametrize(
    "front, car, person, hidden",
    [
        ("small", 60 - 18 - 4, 24, 4),
        ("large", 60, 24 - 18, 0),
        ("first", 60, 24 - 18, 0),
        ("last", 60 - 18 - 4, 24, 4),
    ],
)
def test_the_front_one_keeps_the_overlap(front, car, person, hidden):
    ids, segments = merge(street(), INSTANCES, CATEGORIES, front, (255,))
    expected = [(7, False, car), (8, False, person), *([(7, False, hidden)] if hidden else []), (7, False, 9)]
    assert areas(ids, segments)[: len(expected)] == expected


def test_small_and_listed_orders_differ():
    instances = [Instance(HIDDEN, 7), Instance(CAR, 7)]
    covered = {
        front: merge(street(), instances, CATEGORIES, front, (255,))[0] for front in ("small", "large", "first", "last")
    }
    assert {front: int(ids[5, 4]) for front, ids in covered.items()} == {"small": 1, "large": 1, "first": 1, "last": 1}
    hidden = {front: len(merge(street(), instances, CATEGORIES, front, (255,))[1]) for front in covered}
    assert hidden["small"] == hidden["first"] == hidden["large"] + 1 == hidden["last"] + 1


def test_a_mask_without_category_takes_the_one_below():
    ids, segments = merge(
        street(), [Instance(CAR, None), Instance(box_mask(0, 1, 9, 3), None)], CATEGORIES, "small", (255,)
    )
    assert [each.category for each in segments if not each.crowd] == [7, 1, 2]  # sky is no thing
    nothing = merge(np.full(SIZE, 255), [Instance(CAR, None)], CATEGORIES, "small", (255,))
    assert nothing[1] == [] and not nothing[0].any()


def test_what_is_left_of_things_joins_their_crowd():
    ids, segments = merge(street(), [Instance(FAR, 7, True)], CATEGORIES, "small", (255,))
    assert segments.count(Segment(7, True)) == 1
    assert ids[0, 19] == segments.index(Segment(1, False)) + 1 and ids[5, 3] == ids[6, 16]


@pytest.mark.parametrize(
    "semantic, instances, message",
    [
        (np.full(SIZE, 3), [], "got the id 3, which is no category"),
        (np.full(SIZE, 1), [Instance(CAR, 30)], "got an instance of category 30"),
    ],
)
def test_unknown_numbers_are_refused(semantic, instances, message):
    with pytest.raises(ValueError, match=message):
        merge(semantic, instances, CATEGORIES, "small", (255,))


# the command


def write_street(root, kind):
    """The street as files, the instances in one of the forms."""
    save(root / "semantic/a/street_seg.png", street())
    image = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), np.uint8)
    save(root / "images/a/street_img.png", image)
    (root / "categories.json").write_text(encode_categories(CATEGORIES))
    masks = [each.mask for each in INSTANCES]
    if kind == "polygons":
        lines = []
        for each in INSTANCES:
            rows, columns = np.flatnonzero(each.mask.any(1)), np.flatnonzero(each.mask.any(0))
            x1, x2, y1, y2 = columns[0] / 20, (columns[-1] + 1) / 20, rows[0] / 12, (rows[-1] + 1) / 12
            lines.append(f"{each.category} {x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2}")
        (root / "instances/a").mkdir(parents=True)
        (root / "instances/a/street_ids.txt").write_text("\n".join(lines))
    elif kind == "masks":
        for i, mask in enumerate(masks):
            save(root / f"instances/a/street_ids/{i}.png", mask.astype(np.uint8) * 255)
    elif kind == "map":
        numbers = np.zeros(SIZE, np.uint16)
        for i, mask in enumerate(masks):
            numbers[mask] = 26_000 + i
        save(root / "instances/a/street_ids.png", numbers)
    else:
        rows = [
            {"image_id": 5, "category_id": each.category, "segmentation": encode_rle(each.mask)} for each in INSTANCES
        ]
        content = {"images": [{"id": 5, "file_name": "x/street.jpg"}], "annotations": rows}
        (root / "coco.json").write_text(json.dumps(content))


def run(root, *words, instances="instances"):
    flags = {"semantic": "semantic", "instances": instances, "categories": "categories.json", "out": "panoptic"}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(root / value))]
    endings = ["--semantic_ending", "_seg", "--instance_ending", "_ids", "--image_ending", "_img"]
    make_panoptic.main(cli.parse(make_panoptic.Config, "make_panoptic", [*argv, *endings, *words]))


def read_pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["polygons", "masks", "map", "coco.json"])
def test_every_form_of_instances_gives_the_same_map(tmp_path, kind, encoding):
    write_street(tmp_path, kind)
    run(tmp_path, "--encoding", encoding, instances="coco.json" if kind == "coco.json" else "instances")
    colors = read_pixels(tmp_path / "panoptic/a/street.png")
    made = decode(colors, encoding)
    wanted, segments = merge(street(), INSTANCES, CATEGORIES, "small", (255,))
    if kind == "map":  # where one number hides the other, front is what it was when the map was made
        wanted, segments = merge(street(), [*INSTANCES[:1], *INSTANCES[1:]], CATEGORIES, "last", (255,))
    pairs = set(zip(made.ids.flat, wanted.flat, strict=True))
    assert len(pairs) == len(segments) + 1 and (0, 0) in pairs  # the same partition
    if encoding != "coco":
        category = dict(zip(made.segment_id.tolist(), made.segment_class.tolist(), strict=True))
        assert all(category[ours] == segments[theirs - 1].category for ours, theirs in pairs if theirs)
    check_encoding(
        [colors],
        encoding,
        dict(zip(CATEGORIES.ids, CATEGORIES.things, strict=True)),
        [range(1, 99)] if encoding == "coco" else None,
    )


def test_the_json_file_of_coco_describes_the_maps(tmp_path):
    write_street(tmp_path, "polygons")
    run(tmp_path, "--encoding", "coco", "--images", str(tmp_path / "images"))
    content = json.loads((tmp_path / "panoptic.json").read_text())
    ids = decode(read_pixels(tmp_path / "panoptic/a/street.png"), "coco").ids
    infos = content["annotations"][0]["segments_info"]
    assert [each["id"] for each in infos] == [*range(1, 8)] and content["images"][0]["file_name"] == "street_img.png"
    assert all(each["area"] == (ids == each["id"]).sum() for each in infos)
    assert infos[1]["bbox"] == [8, 3, 3, 8] and infos[6]["iscrowd"] == 1
    assert content["categories"][2] == {"id": 7, "name": "car", "isthing": 1}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_things_are_cut_out_on_black_and_captions_kept(tmp_path, encoding):
    write_street(tmp_path, "polygons")
    words = ["--encoding", encoding, "--images", str(tmp_path / "images"), "--crops", str(tmp_path / "crops")]
    run(tmp_path, *words)
    path = tmp_path / "crops/instance_prompts.json"
    prompts = decode_instance_prompts(path.read_text())["street_img.png"]
    assert sorted(prompts.values()) == ["car", "car", "car", "person"]  # no crowd, no stuff
    ids = decode(read_pixels(tmp_path / "panoptic/a/street.png"), encoding).ids
    image = read_pixels(tmp_path / "images/a/street_img.png")
    for number in prompts:
        rows, columns = np.nonzero(ids == number)
        place = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        crop = read_pixels(tmp_path / f"crops/a/street/{number}.png")
        assert np.array_equal(crop, np.where((ids == number)[..., None], image, 0)[place])
    first = next(iter(prompts))
    path.write_text(json.dumps({"street_img.png": {str(first): "a red car"}, "other.png": {"1": "a dog"}}))
    run(tmp_path, *words)
    again = decode_instance_prompts(path.read_text())
    assert again["street_img.png"] == prompts | {first: "a red car"} and again["other.png"] == {1: "a dog"}


@pytest.mark.parametrize(
    "change, message",
    [
        (["--instances", "nowhere"], "nowhere does not exist: check --instances"),
        (["--semantic_ending", "_no"], "has no image whose name ends in _no"),
        (["--unlabelled", "0"], "street_seg.png: got the id 255, which is no category"),
        (["--images", "semantic", "--image_ending", ""], "semantic has no image a/street"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, monkeypatch, change, message):
    write_street(tmp_path, "polygons")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, *change)
    assert not (tmp_path / "panoptic").exists()


def test_missing_flags_are_named():
    with pytest.raises(ValueError, match="pass their folder as --images"):
        make_panoptic.PanopticConfig(crops="crops")
    with pytest.raises(ValueError, match="wanted --semantic PATH"):
        make_panoptic.main(cli.parse(make_panoptic.Config, "make_panoptic", []))


def test_the_layout_of_cityscapes_needs_no_list_of_classes(tmp_path):
    """Maps, instances and images are in folders by city and differ in their endings."""
    semantic = np.where(CAR, 13, 0).astype(np.uint8)
    instances = np.where(CAR, 26_000, 7).astype(np.uint16)  # 7: the road, which is no thing
    folder = tmp_path / "gtFine/train/aachen"
    save(folder / "aachen_000001_gtFine_labelTrainIds.png", semantic)
    save(folder / "aachen_000001_gtFine_instanceIds.png", instances)
    save(folder / "aachen_000001_gtFine_color.png", np.zeros((*SIZE, 3), np.uint8))
    save(tmp_path / "leftImg8bit/train/aachen/aachen_000001_leftImg8bit.png", np.full((*SIZE, 3), 90, np.uint8))
    train = str(tmp_path / "gtFine/train")
    words = ["--semantic", train, "--semantic_ending", "_gtFine_labelTrainIds", "--instances", train]
    words += ["--instance_ending", "_gtFine_instanceIds", "--out", str(tmp_path / "panoptic/train")]
    make_panoptic.main(cli.parse(make_panoptic.Config, "make_panoptic", words))
    config = panoptic_folder.Config(
        data_dir=str(tmp_path),
        image_dir="leftImg8bit/train",
        image_ending="_leftImg8bit",
        panoptic_dir="panoptic/train",
    )
    with pytest.raises(ValueError, match="hold out"):  # of one image
        panoptic_folder.build(config, "train")
    save(tmp_path / "leftImg8bit/train/bonn/bonn_1_leftImg8bit.png", np.full((*SIZE, 3), 90, np.uint8))
    save(tmp_path / "panoptic/train/bonn/bonn_1.png", read_pixels(tmp_path / "panoptic/train/aachen/aachen_000001.png"))
    item = panoptic_folder.build(config, "train")[0]
    assert item["box_class"].tolist() == [13] and item["boxes"].tolist() == [[2, 4, 12, 10]]
    assert item["segment_class"].tolist() == [13, 0]


def test_an_interrupted_run_leaves_no_half_file(tmp_path, monkeypatch):
    write_street(tmp_path, "polygons")
    run(tmp_path)
    before = (tmp_path / "panoptic/a/street.png").read_bytes()

    def break_off(picture, file, **options):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--front", "large")
    assert (tmp_path / "panoptic/a/street.png").read_bytes() == before
    assert [path.name for path in (tmp_path / "panoptic/a").iterdir()] == ["street.png"]
