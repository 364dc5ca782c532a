"""Images with captions in a CSV file of the columns img_name and prompt: a row for each caption of an image.

images/train/a.png   prompts_train.csv
images/val/b.png     prompts_val.csv
"""

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.formats.categories import Categories
from train.data.formats.prompts import decode_captions
from train.data.sides import Sides
from train.datasets import check_split, data_root, require_readable
from train.datasets._pairs import Pairs, RegionConfig, find_split, list_files, select_split
from train.datasets._regions import RegionDataset, naming, read_text
from train.datasets.folder import SUFFIXES

SIDES = Sides(words=(("left", "right"),))


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of captions; data_dir has images, and CSV files with the columns img_name and prompt."""

    prompts: str = "prompts_{split}.csv"
    """CSV file, relative to data_dir; may contain {split}. Names are those of the files, without folders."""

    EVERYDAY = ("image_dir", "prompts")


class CaptionedImages(RegionDataset):
    """A `Dataset` of images with captions, at least one, by the name of the image; it has no regions."""

    sides = SIDES

    def __init__(self, *args: Any, captions: Mapping[str, Sequence[str]], **options: Any):
        super().__init__(*args, **options)
        self.captions = captions

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        return {"captions": list(self.captions[posixpath.basename(self.names[index])])}


def build(config: Config, split: str, n_channels: int = 3) -> CaptionedImages:
    """Returns the images of one split that have captions, sorted by path.

    FileNotFoundError for missing folders and files; ValueError for another split, a CSV file of another structure, and
    if no image has a caption.
    """
    check_split(split)
    root = data_root(config, "captions")
    name = find_split(root, config.image_dir, split)
    file, folder = name.fill(config.prompts), name.fill(config.image_dir)
    images = list_files(root, folder, SUFFIXES, "--image_dir")
    text = read_text(root / file, f"pass its name, relative to {root}, as --prompts")
    with naming(root / file):
        captions = decode_captions(text)
    names = {posixpath.basename(image) for image in images}
    unpaired = {
        "images without a caption": tuple(image for image in images if posixpath.basename(image) not in captions),
        "captions without an image": tuple(sorted(captions.keys() - names)),
    }
    images = [image for image in images if posixpath.basename(image) in captions]
    if not images:
        raise ValueError(
            f"no image of {root / folder} has a caption in {file}: check its names, such as {[*captions][:1]}"
        )
    pairs = select_split(config, root, split, Pairs(images, [""] * len(images), unpaired), (folder, ""))
    options = {"sources": (file,), "max_pixels": config.max_pixels, "n_channels": n_channels}
    dataset = CaptionedImages(root, pairs, Categories((), (), ()), split, captions=captions, **options)
    require_readable(dataset, root)
    return dataset
