"""The image cache: cached items equal decoded ones, and damaged caches are rebuilt."""

import dataclasses
import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from train.config import ROOT, DataConfig
from train.data import image_cache
from train.data.loading import ImageSource, TrainingImages
from train.datasets import ArrayDataset, UnreadableImage, webdataset

CONFIG = DataConfig(dataset="mine", img_size=8, n_channels=3, cache_images=True)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 11, 9, 3), np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class Counted(ArrayDataset):
    """Counts decoded images in a file; images in `broken` are unreadable."""

    log: str = ""
    broken: tuple[int, ...] = ()

    def __getitem__(self, index):
        with open(self.log, "a") as file:
            file.write(f"{index}\n")
        if index in self.broken:
            raise UnreadableImage(f"image {index}: cut short")
        return super().__getitem__(index)

    def count_decoded(self) -> int:
        return len(Path(self.log).read_text().split())


@pytest.fixture
def dataset(tmp_path):
    return Counted(PIXELS, np.arange(6), 6, log=str(tmp_path / "log"))


def same_as_decoded(source: ImageSource) -> bool:
    plain = ImageSource(source.dataset, dataclasses.replace(source.config, cache_images=False), margin=source.margin)
    items = [(source[i], plain[i]) for i in range(len(plain))]
    return all(
        torch.equal(a["image"], b["image"]) and type(a["image"]) is type(b["image"]) and a["label"] == b["label"]
        for a, b in items
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_items_equal_decoded_ones_and_are_decoded_once(dataset, tmp_path, workers):
    config = dataclasses.replace(CONFIG, num_workers=workers)
    source = ImageSource(dataset, config, tmp_path)
    assert dataset.count_decoded() == 6
    reopened = ImageSource(dataset, config, tmp_path)
    assert (
        list(reopened[3]) == ["image", "label"]
        and type(reopened[3]["label"]) is int
        and reopened[3]["image"].shape[0] == 3
    )
    assert dataset.count_decoded() == 6
    assert same_as_decoded(source) and same_as_decoded(reopened)


def test_changing_an_item_does_not_change_the_cache(dataset, tmp_path):
    source = ImageSource(dataset, CONFIG, tmp_path)
    source[2]["image"].zero_()
    assert same_as_decoded(source)


def test_a_cache_with_a_damaged_note_is_rebuilt(dataset, tmp_path):
    note = ImageSource(dataset, CONFIG, tmp_path).disk_cache.path.with_suffix(".json")
    intact = json.loads(note.read_text())
    changes = [intact | {key: value} for key, value in (("numbers", 3), ("unreadable", None), ("count", "x"))]
    changes += [intact | {"numbers": {"label": value}} for value in (3, [0, 1], {"0": 1}, "012345")]
    for damaged in ["[]", "null", "{}", "[" * 99_999, *map(json.dumps, changes)]:
        note.write_text(damaged)
        assert same_as_decoded(ImageSource(dataset, CONFIG, tmp_path))


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "note cut", "note gone"])
def test_an_incomplete_cache_is_rebuilt(dataset, tmp_path, damage):
    path = ImageSource(dataset, CONFIG, tmp_path).disk_cache.path
    note = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"1")
    elif damage == "note cut":
        note.write_text(note.read_text()[:-9])
    else:
        (path if damage == "gone" else note).unlink()
    assert same_as_decoded(ImageSource(dataset, CONFIG, tmp_path))
    assert dataset.count_decoded() == 6 + 6 + 6


def test_an_interrupted_build_leaves_no_files(dataset, tmp_path, monkeypatch):
    def interrupt(numbers, index, item, first):
        if index == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_cache, "store_numbers", interrupt)
        ImageSource(dataset, CONFIG, tmp_path)
    assert not list(tmp_path.glob("*.p*")) and not list(tmp_path.glob("*.json"))
    assert same_as_decoded(ImageSource(dataset, CONFIG, tmp_path))


def test_data_size_channels_and_version_have_separate_caches(dataset, tmp_path, monkeypatch):
    changed = PIXELS.copy()
    changed[0, 0, 0, 0] ^= 1
    variants = [
        (dataset, CONFIG),
        (dataclasses.replace(dataset, images=changed), CONFIG),
        (dataset, dataclasses.replace(CONFIG, img_size=7)),
        (dataset, dataclasses.replace(CONFIG, n_channels=1)),
    ]
    paths = {ImageSource(data, config, tmp_path).disk_cache.path for data, config in variants}
    monkeypatch.setattr(image_cache, "VERSION", image_cache.VERSION + 1)
    paths.add(ImageSource(dataset, CONFIG, tmp_path).disk_cache.path)
    assert len(paths) == 5
    ranges = [(0.0, 255.0), (0.0, 4095.0)]
    assert len({image_cache.image_cache_key(dataset, (3, 8, 8), data_range) for data_range in (None, *ranges)}) == 3


def test_caches_of_earlier_versions_are_listed_once_as_removable(dataset, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "VERSION", 1)
        old = ImageSource(dataset, CONFIG, tmp_path).disk_cache.path
    note = old.with_suffix(".json")
    note.write_text(json.dumps({key: value for key, value in json.loads(note.read_text()).items() if key != "version"}))
    capfd.readouterr()
    for listed in (True, False):  # the second time nothing is built
        new = ImageSource(dataset, CONFIG, tmp_path).disk_cache.path
        output = capfd.readouterr().out
        assert (f"to free {6 * 3 * 8 * 8 / 1e9:.3g} GB, delete {old}" in output) == listed
    assert old.is_file() and new != old and image_cache.outdated_caches(tmp_path, CONFIG.dataset) == [old]
    ImageSource(dataset, dataclasses.replace(CONFIG, dataset="my"), tmp_path)
    assert "delete" not in capfd.readouterr().out  # caches of other data sets are not listed


def test_caches_of_non_square_sizes_and_margins_are_correct(dataset, tmp_path):
    wide = dataclasses.replace(CONFIG, img_width=12)
    cropped = dataclasses.replace(wide, crop_margin=4)
    sources = [
        *(ImageSource(dataset, config, tmp_path) for config in (CONFIG, wide, cropped)),
        ImageSource(dataset, cropped, tmp_path, margin=4),
        ImageSource(dataset, dataclasses.replace(CONFIG, img_size=12, img_width=16), tmp_path),
    ]
    shapes = [source[0]["image"].shape[1:] for source in sources]
    assert shapes == [(8, 8), (8, 12), (8, 12), (12, 16), (12, 16)]
    paths = [source.disk_cache.path for source in sources]
    assert paths[1] == paths[2] and paths[3] == paths[4] and len(set(paths)) == 3  # equal sizes share a cache
    assert dataset.count_decoded() == 3 * 6 and all(same_as_decoded(source) for source in sources)
    batch = TrainingImages(sources[3], 0)[list(range(6))]
    assert batch["image"].shape == (6, 3, 8, 12)


def test_a_square_has_one_cache_with_or_without_a_width(dataset, tmp_path):
    configs = [CONFIG, dataclasses.replace(CONFIG, img_width=8)]
    assert len({ImageSource(dataset, config, tmp_path).disk_cache.path for config in configs}) == 1
    assert image_cache.image_cache_key(dataset, (3, 8, 12)) != image_cache.image_cache_key(dataset, (3, 12, 8))


def test_the_cache_reports_unreadable_images_like_the_file(dataset, tmp_path):
    broken = dataclasses.replace(dataset, broken=(0, 4))
    for _ in range(2):
        source = ImageSource(broken, CONFIG, tmp_path)
        with pytest.raises(UnreadableImage, match="^image 4: cut short$"):
            source[4]
        assert source[5]["label"] == 5
    assert broken.count_decoded() == 6
    with pytest.warns(UserWarning, match="skipped unreadable"):
        TrainingImages(source, 0)[list(range(6))]
    unreadable = dataclasses.replace(dataset, images=PIXELS[:2], labels=np.arange(2), broken=(0, 1))
    with pytest.raises(ValueError, match="none of 2 images can be read; first error: image 0"):
        ImageSource(unreadable, CONFIG, tmp_path)


def test_fields_that_cannot_be_batched_cannot_be_cached(dataset, tmp_path):
    class Arrays(Counted):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"boxes": np.zeros(4)}

    with pytest.raises(ValueError, match="'boxes' of an item is ndarray, which cannot be cached: wanted a tensor"):
        ImageSource(Arrays(**vars(dataset)), CONFIG, tmp_path)


def test_too_little_disk_space_is_refused_before_decoding(dataset, tmp_path, monkeypatch):
    class DiskUsage:
        free = 3

    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: DiskUsage)
    with pytest.raises(ValueError, match="free disk space"):
        ImageSource(dataset, CONFIG, tmp_path)
    assert not (tmp_path / "log").exists()


def open_together(barrier, dataset, folder, results):
    barrier.wait()
    source = ImageSource(dataset, CONFIG, folder)
    results.put([source[i]["image"].sum().item() for i in range(6)])


def test_processes_that_start_together_build_it_once(dataset, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_together, args=(barrier, dataset, tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert dataset.count_decoded() == 6
    source = ImageSource(dataset, CONFIG, tmp_path)
    assert sums == [[source[i]["image"].sum().item() for i in range(6)]] * 3


def test_a_pickled_cache_contains_no_pixels(dataset, tmp_path):
    cache = ImageSource(dataset, CONFIG, tmp_path).disk_cache
    size = len(pickle.dumps(cache))
    assert torch.equal(cache[1]["image"], pickle.loads(pickle.dumps(cache))[1]["image"])
    assert len(pickle.dumps(cache)) == size


def test_images_and_shards_are_cached_below_the_same_logs():
    assert image_cache.CACHE_DIR.parent == webdataset.CACHE_DIR.parent == ROOT / "logs" / ".cache"


def test_the_metadata_describe_the_pixels(dataset, tmp_path):
    path = ImageSource(dataset, CONFIG, tmp_path).disk_cache.path
    note = json.loads(path.with_suffix(".json").read_text())
    assert note["count"] == 6 and path.stat().st_size == 6 * 3 * 8 * 8
    assert note["numbers"] == {"label": list(range(6))}
