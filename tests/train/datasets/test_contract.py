"""Every data set in train/datasets fulfils the contract of the package, new ones included."""

import dataclasses
import importlib
import pickle
import pkgutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import train.datasets
from helpers import tiny_regions
from train.datasets import SPLITS, DatasetConfig

NAMES = sorted(module.name for module in pkgutil.iter_modules(train.datasets.__path__) if module.name[0] != "_")
EMBEDDED = {"digits", "digit_pairs", "shapes"}
KINDS = ("png", "cls")  # members of a sample in a tar shard
LABELLED = {"folder": "folder", "webdataset": "cls"}  # --label_from


def make_files(name, root, tiny):
    """Write files for the data set `name`; for unknown names, a tree of images."""
    if name in ("mnist", "fashion_mnist"):
        tiny.save_mnist(root)
    elif name == "cifar10":
        tiny.save_cifar(root)
    elif name == "lsun":
        for split in SPLITS:
            tiny.save_lmdb(root / f"church_outdoor_{split}_lmdb", [tiny.png(i) for i in range(3)])
    elif name == "webdataset":
        pytest.importorskip("webdataset", reason="needs the optional package webdataset")
        for shard in range(3):
            members = {
                f"{shard}{i}.{kind}": tiny.png(i) if kind == "png" else b"%d" % i for i in range(3) for kind in KINDS
            }
            tiny.save_shard(root / f"{shard}.tar", members)
    elif name == "visual_genome":
        tiny_regions.save_visual_genome(root, tiny.save_h5)
    elif name == "fmow":
        tiny_regions.save_fmow(root)
    elif name in tiny_regions.WRITERS:
        tiny_regions.WRITERS[name](root)
    else:
        tiny.save_images(root, *(f"{split}/{label}/{i}.png" for split in SPLITS for label in "ab" for i in range(3)))


@pytest.fixture(params=NAMES)
def module_and_config(request, tmp_path, tiny):
    module = importlib.import_module(f"train.datasets.{request.param}")
    if request.param in EMBEDDED:
        return module, module.Config()
    make_files(request.param, tmp_path, tiny)
    config = module.Config(data_dir=str(tmp_path))
    if request.param in LABELLED:
        config = dataclasses.replace(config, label_from=LABELLED[request.param])
    return module, config


def test_a_config_is_a_frozen_keyword_dataclass(module_and_config):
    module, config = module_and_config
    assert issubclass(module.Config, DatasetConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.split_seed = 1
    with pytest.raises(TypeError):
        module.Config("positional")


@pytest.mark.parametrize("split", SPLITS)
def test_items_are_eight_bit_images_with_labels_in_range(module_and_config, split):
    module, config = module_and_config
    dataset = module.build(config, split)
    assert len(dataset) > 0
    assert isinstance(dataset.n_classes, int)
    for index in (0, len(dataset) - 1):
        item = dataset[index]
        if isinstance(item["image"], Image.Image):
            assert item["image"].mode in ("L", "RGB")
        else:
            assert item["image"].dtype == np.uint8
            assert item["image"].ndim == 2 or item["image"].shape[2:] == (3,)
        if dataset.n_classes:
            assert type(item["label"]) is int
            assert item["label"] == dataset.labels[index]
        else:
            assert "label" not in item
    if dataset.n_classes:
        assert dataset.labels.dtype == np.int64
        assert dataset.labels.shape == (len(dataset),)
        assert 0 <= dataset.labels.min() and dataset.labels.max() < dataset.n_classes
        assert dataset.class_names == () or len(dataset.class_names) == dataset.n_classes
    else:
        assert dataset.labels is None and dataset.class_names == ()


def test_a_dataset_survives_pickling_and_rebuilding(module_and_config):
    module, config = module_and_config
    dataset = module.build(config, "train")
    for twin in (pickle.loads(pickle.dumps(dataset)), module.build(config, "train")):
        assert len(twin) == len(dataset)
        assert np.array_equal(np.asarray(twin[1]["image"]), np.asarray(dataset[1]["image"]))
        assert twin.fingerprint() == dataset.fingerprint()


def test_fingerprints_are_hexadecimal_and_differ_by_split(module_and_config):
    module, config = module_and_config
    fingerprints = {module.build(config, split).fingerprint() for split in SPLITS}
    assert len(fingerprints) == len(SPLITS)
    assert all(int(fingerprint, 16) for fingerprint in fingerprints)


def test_another_split_is_refused(module_and_config):
    module, config = module_and_config
    with pytest.raises(ValueError, match="no split 'test'.*train, val"):
        module.build(config, "test")


@pytest.mark.parametrize("name", sorted(set(NAMES) - EMBEDDED))
def test_no_folder_and_a_missing_folder_are_refused(name, tmp_path):
    if name == "webdataset":
        pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    module = importlib.import_module(f"train.datasets.{name}")
    with pytest.raises(ValueError, match="--data_dir"):
        module.build(module.Config(), "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        module.build(module.Config(data_dir=str(tmp_path / "nowhere")), "train")


def test_no_data_set_imports_anything_slower_than_torch():
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(f'train.datasets.{name}').Config()\n"
        "heavy = ('torchvision', 'sklearn', 'scipy', 'lmdb', 'webdataset', 'h5py')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script, *NAMES], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
