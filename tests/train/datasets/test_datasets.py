"""Shared parts of the data sets: checks of the config, random splits, arrays in memory, fingerprints."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.datasets import ArrayDataset, DatasetConfig, files_fingerprint, train_val_split


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_val_fraction_outside_0_1_is_refused(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        DatasetConfig(val_fraction=fraction)


def test_a_negative_split_seed_is_refused():
    with pytest.raises(ValueError, match="got split_seed -1, wanted at least 0"):
        DatasetConfig(split_seed=-1)


@settings(deadline=None)
@given(n=st.integers(2, 200), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_train_val_split_is_a_partition_without_empty_sides(n, fraction, seed):
    train, val = train_val_split(n, fraction, seed)
    assert len(train) and len(val)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(n))
    assert np.array_equal(train, np.sort(train))
    assert abs(len(val) - n * fraction) <= 1


def test_train_val_split_depends_on_its_seed_only():
    assert train_val_split(20, 0.2, 0)[1].tolist() == [2, 4, 6, 19]
    assert train_val_split(20, 0.2, 1)[1].tolist() != train_val_split(20, 0.2, 0)[1].tolist()


@pytest.mark.parametrize("n", [0, 1])
def test_train_val_split_needs_two_images(n):
    with pytest.raises(ValueError, match=f"hold out images of {n}"):
        train_val_split(n, 0.5, 0)


def test_array_fingerprints_depend_on_pixels_labels_and_shape():
    images, labels = np.zeros((4, 2, 3), np.uint8), np.zeros(4, np.int64)
    other_pixel, other_label = images.copy(), labels.copy()
    other_pixel[1, 1, 1], other_label[2] = 1, 1
    datasets = [
        ArrayDataset(images, labels, 2),
        ArrayDataset(other_pixel, labels, 2),
        ArrayDataset(images, other_label, 2),
        ArrayDataset(images.reshape(4, 3, 2), labels, 2),
    ]
    assert len({dataset.fingerprint() for dataset in datasets}) == 4
    assert datasets[0].fingerprint() == ArrayDataset(images.copy(), labels.copy(), 2).fingerprint()


def test_iterating_an_array_dataset_ends():
    assert len(list(ArrayDataset(np.zeros((4, 2, 2), np.uint8), np.zeros(4, np.int64), 1))) == 4


def test_file_fingerprints_depend_on_size_name_and_context(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    fingerprints = [files_fingerprint(tmp_path, ["a.png"], "train"), files_fingerprint(tmp_path, ["a.png"], "val")]
    file.write_bytes(b"12")
    fingerprints.append(files_fingerprint(tmp_path, ["a.png"], "train"))
    file.rename(tmp_path / "b.png")
    fingerprints += [files_fingerprint(tmp_path, ["a.png"], "train"), files_fingerprint(tmp_path, ["b.png"], "train")]
    assert len(set(fingerprints)) == len(fingerprints)
