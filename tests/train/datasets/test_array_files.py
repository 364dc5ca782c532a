"""Data sets held in memory: digits, MNIST and Fashion-MNIST (IDX), CIFAR-10 (pickles)."""

import gzip
import os
import pickle

import numpy as np
import pytest

from train.datasets import cifar10, digits, fashion_mnist, mnist


def test_digits_are_complete_and_use_the_full_range():
    splits = [digits.build(digits.Config(), split) for split in ("train", "val")]
    assert [len(split) for split in splits] == [1438, 359]
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    assert images.shape == (1797, 8, 8)
    assert np.unique(images).tolist() == [round(level * 255 / 16) for level in range(17)]
    from sklearn.datasets import load_digits

    original = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert pairs(images, labels) == pairs(original, load_digits().target)


def pairs(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_digits_read_no_folder(tmp_path):
    with pytest.raises(ValueError, match="digits reads no folder"):
        digits.build(digits.Config(data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize(
    "module, folder",
    [
        (mnist, ""),
        (mnist, "raw"),
        (mnist, "MNIST/raw"),
        (fashion_mnist, ""),
        (fashion_mnist, "raw"),
        (fashion_mnist, "FashionMNIST/raw"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_raw_and_gzipped_in_every_folder(module, folder, packed, tmp_path, tiny):
    tiny.save_mnist(tmp_path / folder)
    if packed:
        for path in list((tmp_path / folder).iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    train, val = (module.build(module.Config(data_dir=str(tmp_path)), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (5, 3)
    assert train.images[2, 3, 4] == (2 * 28 * 28 + 3 * 28 + 4) % 256
    assert train.images.flags.writeable
    assert train.labels.tolist() == [0, 1, 2, 3, 4]


def damage_idx(path, damage, idx):
    """Damage the file of training images at `path`."""
    content = path.read_bytes()
    gz_path = path.with_name(f"{path.name}.gz")
    if damage == "wrong magic":
        path.write_bytes(b"\x00\x00\x0d\x03" + content[4:])
    elif damage == "too short for a header":
        path.write_bytes(content[:6])
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "too long":
        path.write_bytes(content + b"\x00")
    elif damage == "no images":
        path.write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
        path.with_name("train-labels-idx1-ubyte").write_bytes(idx(np.zeros(0, np.uint8)))
    else:
        path.unlink()
        truncated = gzip.compress(content)[:-9]
        gz_path.write_bytes(
            {"truncated gzip": truncated, "no gzip": content, "broken gzip": truncated[:10] + b"\xff" * 50}[damage]
        )


@pytest.mark.parametrize(
    "damage, message",
    [
        ("wrong magic", r"begins with 00000d03, wanted 00000803 \(IDX\)"),
        ("too short for a header", "begins with"),
        ("truncated", r"3919 bytes for shape \(5, 28, 28\)"),
        ("too long", r"3921 bytes for shape \(5, 28, 28\)"),
        ("no images", "has no pixels"),
        ("truncated gzip", "not a complete gzip file"),
        ("no gzip", "not a complete gzip file"),
        ("broken gzip", "not a complete gzip file"),
    ],
)
def test_a_damaged_idx_file_is_reported_with_the_reason(damage, message, tmp_path, tiny):
    tiny.save_mnist(tmp_path)
    damage_idx(tmp_path / "train-images-idx3-ubyte", damage, tiny.idx)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}.*download it again"):
        mnist.build(mnist.Config(data_dir=str(tmp_path)), "train")


def test_idx_labels_must_match_the_images(tmp_path, tiny):
    labels = tiny.save_mnist(tmp_path) / "train-labels-idx1-ubyte"
    labels.write_bytes(tiny.idx(np.zeros(4, np.uint8)))
    with pytest.raises(ValueError, match="5 images but .* 4 labels"):
        mnist.build(mnist.Config(data_dir=str(tmp_path)), "train")
    labels.write_bytes(tiny.idx(np.full(5, 10, np.uint8)))
    with pytest.raises(ValueError, match="label 10, wanted 0 to 9"):
        mnist.build(mnist.Config(data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_missing_idx_files_name_folders_and_download(module, tmp_path):
    with pytest.raises(FileNotFoundError, match="no t10k-images-idx3-ubyte or .*gz in .*raw: download it from https"):
        module.build(module.Config(data_dir=str(tmp_path)), "val")


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_cifar_is_read_channels_last_in_every_folder(folder, tmp_path, tiny):
    tiny.save_cifar(tmp_path / folder)
    train, val = (cifar10.build(cifar10.Config(data_dir=str(tmp_path)), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 4)
    assert train.images.shape == (20, 32, 32, 3)
    planes = tiny.cifar_batch()[b"data"].reshape(4, 3, 32, 32)
    assert val.images[1, 5, 6].tolist() == planes[1, :, 5, 6].tolist()
    assert val.labels.tolist() == [0, 1, 2, 3]


def python2_batch(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch pickled as by Python 2: byte strings, numpy.core, dtype('u1', 0, 1)."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + b"".join(b"M" + size.to_bytes(2, "little") for size in data.shape)
        + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + b"T"
        + data.nbytes.to_bytes(4, "little")
        + data.tobytes()
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x06labels" + numbers + b"U\x04data" + array + b"u."


def test_python_2_cifar_batches_are_read_without_a_warning(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
    path = tmp_path / "test_batch"
    path.write_bytes(python2_batch(data, [1, 2, 9]))
    dataset = cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "val")
    assert dataset.labels.tolist() == [1, 2, 9]
    assert np.array_equal(dataset.images, data.reshape(3, 3, 32, 32).transpose(0, 2, 3, 1))


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_malicious_cifar_batch_is_refused_and_not_run(tmp_path, tiny):
    target = tmp_path / "taken"
    batch = tiny.cifar_batch() | {b"extra": Payload(target)}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(
        ValueError, match=r"test_batch is not a CIFAR-10 batch \(it refers to .*mkdir, which is not data"
    ):
        cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "val")
    assert not target.exists()
    pickle.loads((tmp_path / "test_batch").read_bytes())
    assert target.exists()  # without the check, the payload runs


@pytest.mark.parametrize("name", ["builtins eval", "os system", "numpy load", "_codecs encode", "builtins getattr"])
def test_the_unpickler_refuses_functions(name, tmp_path):
    module, attribute = name.split()
    (tmp_path / "test_batch").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match="which is not data"):
        cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "val")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"\x80\x04\x8e" + (1 << 55).to_bytes(8, "little"),  # announces more bytes than there is memory
        pickle.dumps([1, 2], protocol=4),
        pickle.dumps({b"labels": [1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 100), np.uint8), b"labels": [1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, protocol=4),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["cat"]}, protocol=4),
        pickle.dumps({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, protocol=4),
    ],
)
def test_a_malformed_cifar_batch_is_refused(content, tmp_path):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match="test_batch .*unpack http"):
        cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "val")


def test_a_truncated_cifar_batch_is_refused(tmp_path, tiny):
    content = pickle.dumps(tiny.cifar_batch(), protocol=4)
    for length in range(0, len(content), 500):
        (tmp_path / "test_batch").write_bytes(content[:length])
        with pytest.raises(ValueError, match="test_batch is not a CIFAR-10 batch"):
            cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "val")


def test_missing_cifar_batches_name_folders_and_download(tmp_path, tiny):
    (tiny.save_cifar(tmp_path) / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="no data_batch_3 in .*cifar-10-batches-py: unpack https"):
        cifar10.build(cifar10.Config(data_dir=str(tmp_path)), "train")
