"""Fashion-MNIST (Xiao et al. 2017): 70,000 images of clothes, 28x28 grey, in MNIST's file format."""

from dataclasses import dataclass

from train.datasets import ArrayDataset, DatasetConfig, check_split, data_root
from train.datasets.mnist import read_split

DOWNLOAD = "https://github.com/zalandoresearch/fashion-mnist/tree/master/data/fashion"
CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of Fashion-MNIST; data_dir has the IDX files (raw or .gz), directly, in raw/ or FashionMNIST/raw/."""


def build(config: Config, split: str) -> ArrayDataset:
    """Returns images (N, H, W) uint8 with labels 0..9: the 60,000 training images, or the 10,000 test images for val.

    FileNotFoundError for missing files; ValueError for damaged ones or another split.
    """
    check_split(split)
    root, folders = data_root(config, "fashion_mnist"), ("", "raw", "FashionMNIST/raw")
    return read_split(root, split, folders=folders, download=DOWNLOAD, class_names=CLASS_NAMES)
