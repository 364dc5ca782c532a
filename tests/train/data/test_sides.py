"""What has sides changes places in mirrored views of items, in pixels and in cached codes; captions take turns."""

import dataclasses
import pickle

import pytest
import torch

from helpers.annotated_images import annotated_dataset, assert_same_fields
from helpers.region_images import SIDES, face_dataset, mirrored_face
from train.config import DataConfig
from train.data.captions import choose_caption
from train.data.code_cache import load_or_encode
from train.data.code_file import CodeFile
from train.data.codes import TrainingCodes
from train.data.collate import collate
from train.data.loading import ImageSource, TrainingImages, annotation_fields, training_batches
from train.data.sides import Sides, swap_words
from train.data.transforms import View, to_item, training_views
from train.distributed import DistContext
from train.spaces import PixelSpace, TrainingLatents

WORLD = DistContext(torch.device("cpu"))
DATA = DataConfig(dataset="faces", img_size=8, img_width=12, n_channels=1)
VIEWS = [{"horizontal_flip": True}, {"horizontal_flip": True, "shift": 1}, {"horizontal_flip": True, "crop_margin": 2}]


def load_faces(folder, data=DATA, **options):
    """The "codes", zeros, of faces in all views, with their annotations."""
    dataset, margin = face_dataset(size=(8 + data.crop_margin, 12 + data.crop_margin), **options), data.crop_margin
    views = tuple(training_views(data, dataset.sides))
    file = CodeFile(folder, "faces", "key", len(dataset), (len(views), 1, 1), 4, views=views)
    source = ImageSource(dataset, data, margin=margin)
    encode = lambda images: torch.zeros(len(images), len(views), 1, 1, dtype=torch.int64)  # noqa: E731
    return source, load_or_encode(file, lambda: source, encode, 3, WORLD)


@pytest.mark.parametrize("index", range(5))
def test_a_mirrored_item_is_the_item_of_the_mirrored_scene(index):
    """Boxes, masks, classes, words and camera equal those of the scene drawn as a mirror shows it."""
    item = to_item(face_dataset()[index], (8, 12), 1)
    before = pickle.dumps(item)
    mirrored = View(flip=True, sides=SIDES)(item)
    assert_same_fields(mirrored, to_item(mirrored_face(index), (8, 12), 1))
    assert pickle.dumps(item) == before  # a copy
    assert_same_fields(View(flip=True, sides=SIDES)(mirrored), item)
    shifted = View(dx=1, sides=SIDES)(item)
    assert shifted["box_words"] == item["box_words"] and shifted["camera"] == "CAM_FRONT_LEFT"


@pytest.mark.parametrize("changes", VIEWS)
def test_cached_annotations_are_those_of_each_view(tmp_path, changes):
    data = dataclasses.replace(DATA, **changes)
    source, table = load_faces(tmp_path, data)
    views = TrainingImages(source, 0).views
    assert any(view.flip for view in views) and all(view.sides == SIDES for view in views)
    for number, view in enumerate(views):
        for row in range(len(source)):
            expected = annotation_fields(view(source[row]))
            assert_same_fields(table.annotations[number, row], expected)
            assert expected["camera"] == ("CAM_FRONT_RIGHT" if view.flip else "CAM_FRONT_LEFT")
            shown = torch.tensor([0, 1, 1, 3])[expected["semantic"]] * 10  # eyes look alike
            assert torch.equal(view(source[row])["image"][0], shown.to(torch.uint8))


def test_batches_of_pixels_have_the_sides_of_their_view():
    data = dataclasses.replace(DATA, horizontal_flip=True)
    images = TrainingImages(ImageSource(face_dataset(), data), seed=1)
    positions = list(range(40))
    batch = images[positions]
    flipped = [images.views[images.view_index(position)].flip for position in positions]
    assert 0 < sum(flipped) < 40
    assert batch["camera"] == ["CAM_FRONT_RIGHT" if flip else "CAM_FRONT_LEFT" for flip in flipped]
    for i, position in enumerate(positions):
        draw = mirrored_face if flipped[i] else face_dataset().__getitem__
        item = choose_caption(to_item(draw(images.order[position]), (8, 12), 1), 1, position)
        n = len(item["box_class"])
        assert batch["box_class"][i, :n].tolist() == item["box_class"].tolist()
        assert batch["caption"][i] == item["caption"] and batch["box_words"][i] == item["box_words"]
        assert torch.equal(batch["masks"][i, :n], item["masks"].as_subclass(torch.Tensor))


def test_data_without_sides_are_unchanged():
    item = to_item(face_dataset()[3], (8, 12), 1)
    mirrored = View(flip=True)(item)
    assert mirrored["box_class"].tolist() == item["box_class"].tolist() and mirrored["camera"] == item["camera"]
    assert View(True, 1, 2) == View(True, 1, 2, None, None)
    assert View(True, sides=SIDES).to_list() == View(True).to_list()  # the key of cached codes
    annotated = TrainingImages(ImageSource(annotated_dataset(), DataConfig(img_size=8, n_channels=1)), 0)
    assert "captions" not in annotated[[0, 1]] and annotated[[0]]["caption"] == [f"image {annotated.order[0]}, été"]


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("a car on the left, a dog on the right", "a car on the right, a dog on the left"),
        ("Left and RIGHT", "Right and LEFT"),
        ("leftover, bright, left_side, left-most", "leftover, bright, left_side, right-most"),
        ("CAM_FRONT_LEFT and front left", "CAM_FRONT_RIGHT and front right"),
        ("l'œil left.", "l'œil right."),
        ("", ""),
    ],
)
def test_only_whole_words_change_places(text, swapped):
    assert swap_words(text, SIDES.words) == swapped
    assert swap_words(swapped, SIDES.words) == text


def test_longer_words_are_found_first():
    pairs = (("left", "right"), ("left hand", "other hand"))
    assert swap_words("left hand, left", pairs) == "other hand, right"


@pytest.mark.parametrize("options", [{"classes": ((1, 2), (2, 3))}, {"words": (("left", "right"), ("Right", "top"))}])
def test_a_member_of_two_pairs_is_refused(options):
    with pytest.raises(ValueError, match="(2|right) twice, wanted each in one pair"):
        Sides(**options)


# captions


def captions_of(source, positions):
    return [caption for position in positions for caption in source[[position]]["caption"]]


def test_captions_take_turns_over_the_visits():
    images = TrainingImages(ImageSource(face_dataset(), DATA), seed=3)
    visits = {}
    for position in range(20 * 30):
        visits.setdefault(images.order[position], []).append(images[[position]]["caption"][0])
    assert set(visits[4]) == {""}  # it has none
    numbers = torch.tensor([int(caption[-1]) for index in (3, 7, 11, 15, 19) for caption in visits[index]])
    assert torch.bincount(numbers).min() > 30  # 150 visits of images with three captions
    assert images[[5]]["captions"][0] == face_dataset()[images.order[5]]["captions"]


@pytest.mark.parametrize("kind", ["pixels", "codes", "latents"])
def test_captions_depend_on_the_position_alone(tmp_path, kind):
    """They are the same after a resume, for any number of workers and of ranks; validation takes the first."""
    source, table = load_faces(tmp_path)

    def build(seed, first=False):
        images = TrainingImages(source, seed, first_caption=first)
        codes = TrainingCodes(table.ids, None, seed, table.annotations, first_caption=first)
        return {"pixels": images, "codes": codes, "latents": TrainingLatents(images, table, None)}[kind]

    options = {"steps": 8, "batch_size": 10, "accumulate": 1}
    full, other = (
        [batch["caption"] for (batch,) in training_batches(build(seed), start=0, workers=0, world=WORLD, **options)]
        for seed in (3, 4)
    )
    assert full != other
    for rank in range(2):
        world = DistContext(torch.device("cpu"), rank, 2)
        half = training_batches(build(3), start=5, workers=2, world=world, **options)
        assert [batch["caption"] for (batch,) in half] == [each[5 * rank : 5 * rank + 5] for each in full[5:]]
    validation = build(3, first=True)[list(range(20))]
    assert validation["caption"] == [(each or [""])[0] for each in validation["captions"]]


def test_validation_takes_the_first_caption():
    validation = PixelSpace(DATA).source(face_dataset(), "val", DATA, 0, WORLD, None)
    batch = validation[list(range(20))]
    assert batch["caption"] == [(each or [""])[0] for each in batch["captions"]]
    training = PixelSpace(DATA).source(face_dataset(), "train", DATA, 0, WORLD, None)
    assert training[list(range(20))]["caption"] != [(each or [""])[0] for each in training[list(range(20))]["captions"]]


def test_an_item_keeps_its_own_caption():
    item = {"captions": ["a", "b"], "caption": "mine"}
    assert choose_caption(item, 0, 1) is item
    assert choose_caption({"captions": ["a", "b"]})["caption"] == "a"
    assert collate([choose_caption({"captions": []}, 0, 1)] * 2) == {"captions": [[], []], "caption": ["", ""]}
