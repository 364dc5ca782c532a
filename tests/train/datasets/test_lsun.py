"""LSUN from its LMDB and from exported folders."""

import multiprocessing
import pickle
import random

import pytest

from train.datasets import UnreadableImage
from train.datasets.lsun import Config, build, iter_records


@pytest.fixture
def church(tmp_path, tiny):
    tiny.save_lmdb(tmp_path / "church_outdoor_train_lmdb", [tiny.png(i) for i in range(3)])
    tiny.save_lmdb(tmp_path / "church_outdoor_val_lmdb", [tiny.png(i) for i in range(2)])
    return Config(data_dir=str(tmp_path))


def reds(dataset):
    return [dataset[i]["image"].getpixel((0, 0))[0] for i in range(len(dataset))]


def test_the_lmdb_is_read_in_key_order(church):
    assert reds(build(church, "train")) == [0, 1, 2]
    assert reds(build(church, "val")) == [0, 1]


def test_two_data_sets_share_one_lmdb(church, tmp_path):
    detour = Config(data_dir=str(tmp_path / "church_outdoor_val_lmdb" / ".."))
    assert reds(build(church, "train")) == reds(build(detour, "train"))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns if other tests left threads
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_workers_read_with_the_parent(church, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    dataset = build(church, "train")
    with multiprocessing.get_context(method).Pool(1) as pool:
        images = pool.map(dataset.__getitem__, range(3))
    assert [item["image"].getpixel((0, 0))[0] for item in images] == reds(dataset) == [0, 1, 2]


def test_an_open_data_set_can_be_pickled(church):
    dataset = build(church, "train")
    dataset[0]
    assert reds(pickle.loads(pickle.dumps(dataset))) == [0, 1, 2]


def test_a_broken_image_is_reported_by_its_key(tmp_path, tiny):
    tiny.save_lmdb(tmp_path / "tower_train_lmdb", [b"broken", tiny.png(1)])
    dataset = build(Config(data_dir=str(tmp_path), category="tower"), "train")
    with pytest.raises(UnreadableImage, match=f"tower_train_lmdb key {0:040x}: "):
        dataset[0]


def test_an_lmdb_without_a_readable_image_is_refused(tmp_path, tiny):
    tiny.save_lmdb(tmp_path / "tower_train_lmdb", [b"broken", b"too"])
    with pytest.raises(ValueError, match="tower_train_lmdb: none of its 2 images"):
        build(Config(data_dir=str(tmp_path), category="tower"), "train")


def test_an_empty_and_a_damaged_lmdb_are_refused(tmp_path, tiny):
    tiny.save_lmdb(tmp_path / "tower_train_lmdb", [])
    with pytest.raises(ValueError, match="tower_train_lmdb is an empty LMDB"):
        build(Config(data_dir=str(tmp_path), category="tower"), "train")
    (tmp_path / "bridge_train_lmdb").mkdir()
    for content in (b"", b"no LMDB" * 100):
        (tmp_path / "bridge_train_lmdb/data.mdb").write_bytes(content)
        with pytest.raises(ValueError, match="bridge_train_lmdb cannot be read .*download it again"):
            build(Config(data_dir=str(tmp_path), category="bridge"), "train")


def test_the_records_are_those_that_the_library_reads(tmp_path):
    """Values within a page and in pages of their own, in a tree of several levels with deleted keys."""
    lmdb, rng = pytest.importorskip("lmdb", reason="needs the package lmdb"), random.Random(0)
    with lmdb.open(str(tmp_path), map_size=1 << 26) as environment:
        for first in (0, 1500):
            with environment.begin(write=True) as transaction:
                for _ in range(1500):
                    transaction.put(f"{rng.getrandbits(160):040x}".encode(), rng.randbytes(rng.choice([5, 500, 5000])))
                for key in list(transaction.cursor().iternext(values=False))[first % 7 :: 7]:
                    transaction.delete(key)
        with environment.begin() as transaction:
            wanted = list(transaction.cursor())
    content = (tmp_path / "data.mdb").read_bytes()
    read = [(key, content[offset : offset + size]) for key, offset, size in iter_records(tmp_path / "data.mdb")]
    assert len(wanted) > 2000 and read == wanted


def test_a_damaged_lmdb_is_refused_or_read(tmp_path, tiny):
    """The library would end the process with SIGBUS or SIGSEGV."""
    path, rng = (
        tiny.save_lmdb(tmp_path / "tower_train_lmdb", [tiny.png(i, (40, 40)) for i in range(300)]),
        random.Random(0),
    )
    content, config = (path / "data.mdb").read_bytes(), Config(data_dir=str(tmp_path), category="tower")
    (path / "data.mdb").write_bytes(content[:-4096])
    with pytest.raises(ValueError, match=f"it has {len(content) - 4096} of {len(content)} bytes"):
        build(config, "train")
    for _ in range(200):
        damaged, page = bytearray(content), 4096 * rng.choice([0, 1, rng.randrange(len(content) // 4096)])
        for _ in range(rng.randint(1, 5)):
            damaged[page + rng.randrange(160)] = rng.randrange(256)
        (path / "data.mdb").write_bytes(damaged)
        try:
            dataset = build(config, "train")
            [dataset[i] for i in range(0, len(dataset), 50)]
        except ValueError as error:
            assert "tower_train_lmdb" in str(error)


def test_a_missing_lmdb_names_its_download(tmp_path, tiny):
    tiny.save_lmdb(tmp_path / "church_outdoor_train_lmdb", [tiny.png()])
    with pytest.raises(FileNotFoundError, match="val_lmdb is missing: download http.*church_outdoor_val_lmdb.zip"):
        build(Config(data_dir=str(tmp_path)), "val")


def test_exported_folders_of_the_category_are_the_split(tmp_path, tiny):
    folders = [f"{category}_{split}" for category in ("bedroom", "tower") for split in ("train", "val")]
    tiny.save_images(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
    config = Config(data_dir=str(tmp_path), category="bedroom")
    assert [build(config, split).root.name for split in ("train", "val")] == ["bedroom_train", "bedroom_val"]


def test_an_exported_train_folder_alone_is_split(tmp_path, tiny):
    tiny.save_images(tmp_path, *(f"bedroom_train/{i}.png" for i in range(4)))
    config = Config(data_dir=str(tmp_path), category="bedroom", val_fraction=0.5)
    assert [len(build(config, split)) for split in ("train", "val")] == [2, 2]


def test_any_other_tree_is_read_as_a_folder(tmp_path, tiny):
    tiny.save_images(tmp_path, "train/0.png", "val/0.png")
    dataset = build(Config(data_dir=str(tmp_path)), "val")
    assert dataset.root.name == "val" and dataset.labels is None


def test_another_category_is_refused(tmp_path, tiny):
    tiny.save_images(tmp_path, "bedroom_train/0.png", "bedroom_val/0.png")
    with pytest.raises(FileNotFoundError, match="has bedroom_train, bedroom_val but no church_outdoor_train"):
        build(Config(data_dir=str(tmp_path)), "train")
