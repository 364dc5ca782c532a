"""Annotations of items survive both caches unchanged, and are read without decoding images."""

import dataclasses
import pickle
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from helpers.annotated_images import (
    FIELDS,
    AnnotatedDataset,
    annotated_dataset,
    assert_same_fields,
    count_reads,
    plain_dataset,
)
from helpers.region_images import face_dataset
from helpers.toy_encoding import COUNT, captions, load_codes, run_two_ranks
from train.config import DataConfig
from train.data.annotations import Records, pack, unpack, write_records
from train.data.captions import choose_caption
from train.data.code_file import CodeFile
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.datasets import DatasetConfig, FloatImage, Ragged, UnreadableImage
from train.distributed import DistContext
from train.first_stage import VQGANStage
from train.spaces import CodeSpace
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig

WORLD = DistContext(torch.device("cpu"))
DATA = DataConfig(dataset="mine", img_size=8, n_channels=1)
VIEWS = [{}, {"horizontal_flip": True, "shift": 1}, {"horizontal_flip": True, "crop_margin": 2}]
NETWORK = VQGANConfig(nf=4, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(), codebook_size=16, emb_dim=4)


def fields_of(item):
    return {name: value for name, value in item.items() if name != "image"}


# records


def test_records_hold_every_type_of_field(tmp_path):
    items = [fields_of(annotated_dataset()[i]) for i in range(4)]
    items.append({"nan": float("inf"), "big": 2**60, "yes": True, "half": torch.ones(2, dtype=torch.float16), "no": []})
    items.append(
        {"sketch": tv_tensors.Image(torch.zeros(1, 2, 2)), "flat": torch.zeros(2, 3).t(), "one": torch.tensor(3)}
    )
    grid = torch.arange(6).view(2, 3)
    items.append({"grid": grid, "row": grid[0], "mask": tv_tensors.Mask(grid)})  # share memory
    items.append({})
    write_records(tmp_path / "records", map(pack, items))
    records = Records(tmp_path / "records", len(items))
    for i, item in [*enumerate(items), *reversed(list(enumerate(items)))]:
        assert_same_fields(records[i], item)
        assert list(records[i]) == list(item)
    records[1]["vector"].zero_()  # a copy
    size = len(pickle.dumps(records))
    assert_same_fields(pickle.loads(pickle.dumps(records))[1], items[1])
    assert len(pickle.dumps(records)) == size < 1000


@pytest.mark.parametrize("value", [None, np.zeros(2), ("a",), {"b": 1}, [1, 2]])
def test_types_that_cannot_be_batched_cannot_be_recorded(value):
    with pytest.raises(ValueError, match="field 'odd' of an item is .*, which cannot be cached"):
        pack({"odd": value})


def test_a_record_runs_no_code():
    assert unpack(b"") == {} and b"pickle" not in pack(fields_of(annotated_dataset()[2]))
    with pytest.raises(ValueError):
        unpack(pickle.dumps({"a": 1}) + bytes(8))


# the image cache


@pytest.mark.parametrize("workers", [0, 2])
def test_the_image_cache_stores_every_field_and_decodes_once(tmp_path, workers):
    dataset, read_indices = count_reads(annotated_dataset())
    config = dataclasses.replace(DATA, cache_images=True, num_workers=workers, img_width=12)
    plain = ImageSource(annotated_dataset(), dataclasses.replace(config, cache_images=False))
    for source in (ImageSource(annotated_dataset(), config, tmp_path), ImageSource(dataset, config, tmp_path)):
        for i in (6, *range(7)):
            assert_same_fields(source[i], plain[i])
    assert read_indices == []
    source[2]["classes"].zero_()  # a copy
    assert_same_fields(source[2], plain[2])


@pytest.mark.parametrize("changes", VIEWS)
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_and_decoded_items_give_equal_batches(tmp_path, changes, workers):
    config, margin = dataclasses.replace(DATA, **changes), changes.get("crop_margin", 0)
    cached = ImageSource(annotated_dataset(), dataclasses.replace(config, cache_images=True), tmp_path, margin=margin)
    plain = ImageSource(annotated_dataset(), config, margin=margin)
    options = {"start": 1, "steps": 5, "batch_size": 3, "accumulate": 1, "world": WORLD}
    cached_batches = training_batches(TrainingImages(cached, seed=0), workers=workers, **options)
    batches = training_batches(TrainingImages(plain, seed=0), workers=0, **options)
    for (batch,), (expected,) in zip(cached_batches, batches, strict=True):
        assert_same_fields(batch, expected)


class SharedCaptions(AnnotatedDataset):
    """Each image has a caption that is never shown, one that is seldom, and one that is often."""

    def __getitem__(self, index):
        item = {name: value for name, value in super().__getitem__(index).items() if name != "caption"}
        captions = [f"{how} {index}" for how in ("never", "seldom", "often")]
        return item | {"captions": captions, "caption_shares": Ragged(torch.tensor([0.0, 1, 3]))}


def shared_captions():
    return SharedCaptions(**vars(annotated_dataset()))


def test_shares_of_captions_survive_the_image_cache(tmp_path):
    cached, plain = (
        TrainingImages(ImageSource(shared_captions(), dataclasses.replace(DATA, cache_images=each), tmp_path), seed=0)
        for each in (True, False)
    )
    batch = cached[list(range(70))]
    assert_same_fields(batch, plain[list(range(70))])
    shown = Counter(caption.split()[0] for caption in batch["caption"])
    assert shown.keys() == {"seldom", "often"} and 10 < shown["seldom"] < 25


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_cache_without_its_records_is_rebuilt(tmp_path, damage):
    config = dataclasses.replace(DATA, cache_images=True)
    path = ImageSource(annotated_dataset(), config, tmp_path).disk_cache.path.with_suffix(".records")
    path.write_bytes(path.read_bytes()[:-1]) if damage == "cut" else path.unlink()
    assert_same_fields(ImageSource(annotated_dataset(), config, tmp_path)[2], ImageSource(annotated_dataset(), DATA)[2])


def test_images_with_only_labels_have_no_records(tmp_path):
    source = ImageSource(plain_dataset(), dataclasses.replace(DATA, cache_images=True), tmp_path)
    assert source[3].keys() == {"image", "label"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock", ".pixels"]


def test_items_with_differing_fields_cannot_be_cached(tmp_path):
    class MissingCaption(AnnotatedDataset):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item if index < 2 else {name: value for name, value in item.items() if name != "caption"}

    with pytest.raises(ValueError, match="item 2 and the first differ in field caption"):
        ImageSource(MissingCaption(**vars(annotated_dataset())), dataclasses.replace(DATA, cache_images=True), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


class Depths(AnnotatedDataset):
    """Floats from 0 to 3; the first image cannot be read."""

    def __getitem__(self, index):
        if index == 0:
            raise UnreadableImage("image 0: cut short")
        return super().__getitem__(index) | {"image": FloatImage(self.images[index] / np.float32(60), (0.0, 3.0))}


def test_float_images_are_cached_as_floats(tmp_path):
    dataset = Depths(**vars(annotated_dataset()))
    cached, plain = (ImageSource(dataset, dataclasses.replace(DATA, cache_images=c), tmp_path) for c in (True, False))
    assert_same_fields(cached[3], plain[3])
    assert cached[6]["image"].dtype == torch.float32 and cached.disk_cache.path.stat().st_size == 7 * 64 * 4
    with pytest.raises(UnreadableImage, match="image 0"):
        cached[0]


# the code cache


def make_first_stage(folder, data=DATA):
    torch.manual_seed(0)
    vqgan = VQGAN(NETWORK, data.size, 1).eval()
    torch.nn.init.normal_(vqgan.quantizer.codebook.weight)
    return VQGANStage(folder, vqgan, data, DatasetConfig(), 0, device=WORLD.device, weights="abc", amp=False)


def code_source(folder, dataset, data=DATA, split="train"):
    return CodeSpace(make_first_stage(folder, data)).source(dataset, split, data, 3, WORLD)


@pytest.mark.parametrize("changes", VIEWS)
def test_codes_come_with_the_annotations_of_their_view(tmp_path, changes, monkeypatch):
    monkeypatch.setattr("train.first_stage.CodeFile", partial(CodeFile, chunk=3))
    data = dataclasses.replace(DATA, **changes)
    images = ImageSource(annotated_dataset(side=8 + data.crop_margin), data, margin=data.crop_margin)
    code_source(tmp_path, images.dataset, data)
    dataset, decoded = count_reads(images.dataset)
    source = code_source(tmp_path, dataset, data)
    views = TrainingImages(images, 0).views
    for positions in ([0, 3, 50], list(range(len(source)))[:40]):
        batch = source[positions]
        assert batch.keys() == FIELDS | {"codes", "position", "boxes_mask", "ids_mask", "parts_mask"}
        for i, position in enumerate(positions):
            view, row = divmod(source.order[position], 7)
            item, n = views[view](images[row]), row % 3
            assert torch.equal(batch["classes"][i], item["classes"])
            assert torch.equal(item["image"][0], 10 * item["classes"])  # transformed like their image
            assert torch.equal(8 * batch["boxes"][i, :n], item["boxes"]) and batch["boxes_mask"][i].sum() == n
            assert torch.equal(batch["parts"][i, :n], item["parts"]) and batch["label"][i] == row
            assert batch["caption"][i] == item["caption"] and batch["words"][i] == item["words"]
            assert batch["ids"][i, :n].tolist() == item["ids"].tolist() and batch["score"][i] == item["score"]
    assert decoded == []
    validation = code_source(tmp_path, dataset, data, "val")
    assert validation[[1, 2]]["caption"] and len(decoded) == 7  # another split is encoded


def test_codes_of_mirrored_views_swap_sides_and_take_turns(tmp_path):
    """A VQGAN's codes come with what has sides swapped, and with one caption at each visit."""
    data = dataclasses.replace(DATA, img_width=12, horizontal_flip=True)
    batch = code_source(tmp_path, face_dataset(), data)[list(range(40))]
    assert sorted(batch["camera"]) == ["CAM_FRONT_LEFT"] * 20 + ["CAM_FRONT_RIGHT"] * 20
    for camera, words, classes in zip(batch["camera"], batch["box_words"], batch["box_class"].tolist(), strict=True):
        assert words[:1] in ([], ["left eye" if camera.endswith("LEFT") else "right eye"])
        assert classes[0] == (0 if not words else 1 if camera.endswith("LEFT") else 2)
    assert all(
        each in [*every, ""] and (each or not every)
        for each, every in zip(batch["caption"], batch["captions"], strict=True)
    )
    assert batch["caption"] != [(every or [""])[0] for every in batch["captions"]]
    validation = code_source(tmp_path, face_dataset(), data, "val")[list(range(20))]
    assert validation["caption"] == [(every or [""])[0] for every in validation["captions"]]


def test_shares_of_captions_survive_the_code_cache(tmp_path):
    dataset, positions = shared_captions(), range(70)
    source = code_source(tmp_path, dataset)
    batch = source[list(positions)]
    uncached = [choose_caption(dataset[source.item_index(k)], 3, k)["caption"] for k in positions]
    assert batch["caption"] == uncached and "caption_shares" not in batch


def test_codes_of_images_with_only_labels_have_no_annotations(tmp_path):
    source = code_source(tmp_path, plain_dataset())
    assert source[[0, 1]].keys() == {"codes", "position", "label"}


def test_batches_of_codes_survive_pickling_and_resuming(tmp_path):
    source = code_source(tmp_path, annotated_dataset())
    options = {"steps": 6, "batch_size": 3, "accumulate": 1, "world": WORLD}
    uninterrupted = list(training_batches(source, start=0, workers=0, **options))[3:]
    resumed = training_batches(pickle.loads(pickle.dumps(source)), start=3, workers=2, **options)
    for (expected,), (batch,) in zip(uninterrupted, resumed, strict=True):
        assert_same_fields(expected, batch)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_annotations_are_encoded_again(tmp_path, damage, monkeypatch):
    monkeypatch.setattr("train.first_stage.CodeFile", partial(CodeFile, chunk=3))
    expected = code_source(tmp_path, annotated_dataset())[list(range(7))]
    path = sorted(tmp_path.rglob("*.records"))[1]
    path.write_bytes(path.read_bytes()[:-9]) if damage == "cut" else path.unlink()
    dataset, decoded = count_reads(annotated_dataset())
    with pytest.warns(UserWarning, match="1 of 3 chunks are encoded again"):
        assert_same_fields(code_source(tmp_path, dataset)[list(range(7))], expected)
    assert decoded == [3, 4, 5]


def test_annotations_stay_aligned_when_images_are_unreadable(tmp_path):
    @dataclasses.dataclass(frozen=True, eq=False)
    class Broken(AnnotatedDataset):
        def __getitem__(self, index):
            if index in (0, 4):
                raise UnreadableImage(f"image {index}: cut short")
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match="skipped 2 unreadable"):
        batch = code_source(tmp_path, Broken(**vars(annotated_dataset())))[list(range(5))]
    assert all(
        caption == f"image {i}, été" for caption, i in zip(batch["caption"], batch["label"].tolist(), strict=True)
    )
    assert sorted(batch["label"].tolist()) == [1, 2, 3, 5, 6]


def test_two_ranks_store_the_same_annotations_as_one(tmp_path):
    results = run_two_ranks(tmp_path, annotated=True)
    assert [result["images"] for result in results] == [6, 5]
    assert all(result["captions"] == [f"image {i}, été" for i in range(COUNT)] for result in results)
    failed = run_two_ranks(tmp_path / "again", fails_at=(2, None), annotated=True)
    assert all("error" in result for result in failed)
    assert captions(load_codes(tmp_path / "again", annotated=True)) == results[0]["captions"]
