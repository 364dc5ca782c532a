"""Images with captions in a CSV file of the columns img_name and prompt: a row for each caption of an image.

images/train/a.png   prompts_train.csv
images/val/b.png     prompts_val.csv

Captions may come from several files, each with a share of the visits, and long ones may be shown in pieces.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.tokenizer import Tokenizer
from train.data.captions import SHARES, long_split
from train.data.formats.categories import Categories
from train.data.formats.prompts import decode_captions
from train.data.sides import Sides
from train.datasets import Ragged, check_split, data_root, require_readable
from train.datasets._pairs import Pairs, RegionConfig, find_split, list_files, select_split
from train.datasets._regions import RegionDataset, naming, read_text
from train.datasets.folder import SUFFIXES

SIDES = Sides(words=(("left", "right"),))


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of captions; data_dir has images, and CSV files with the columns img_name and prompt."""

    prompts: str = "prompts_{split}.csv"
    """CSV file, relative to data_dir; may contain {split}. Names are those of the files, without folders."""

    more_prompts: tuple[str, ...] = ()
    """Further CSV files with the share of visits that show their captions, such as short_{split}.csv=0.3; the rest of
    the visits shows those of --prompts. Images that a file leaves out are shown with the other files' captions."""
    caption_pieces: bool = False
    """Show one piece of at most 75 tokens of a long caption a visit, cut at the ends of sentences, instead of all."""

    EVERYDAY = ("image_dir", "prompts")

    def __post_init__(self):
        super().__post_init__()
        self.files  # noqa: B018 (validates the options)

    @property
    def files(self) -> dict[str, float]:
        """The share of each file of captions; ValueError for shares that are none."""
        shares: dict[str, float] = {}
        for word in self.more_prompts:
            file, sign, number = word.rpartition("=")
            share = float(number) if sign and re.fullmatch(r"\d*\.?\d+", number) else 0.0
            if not file or file in (self.prompts, *shares) or not 0 < share < 1:
                wanted = "another file and a share between 0 and 1, such as short_{split}.csv=0.3"
                raise ValueError(f"got more_prompts {word}, wanted {wanted}")
            shares[file] = share
        if sum(shares.values()) >= 1:
            raise ValueError(f"got shares {sum(shares.values()):g} in more_prompts, wanted less than 1 in all")
        return {self.prompts: 1 - sum(shares.values()), **shares}


@dataclass(frozen=True)
class CaptionFile:
    """The captions of images by name, and the share of visits that show them."""

    captions: dict[str, list[str]]
    share: float


class CaptionedImages(RegionDataset):
    """A `Dataset` of images with captions, at least one, by the name of the image; it has no regions."""

    sides = SIDES

    def __init__(self, *args: Any, caption_files: Sequence[CaptionFile], pieces: bool, **options: Any):
        super().__init__(*args, **options)
        self.caption_files, self.pieces = caption_files, pieces

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        name = posixpath.basename(self.names[index])
        if len(self.caption_files) == 1 and not self.pieces:
            return {"captions": list(self.caption_files[0].captions[name])}
        captions, shares = [], []
        for file in self.caption_files:
            texts = file.captions.get(name, [])
            for text in texts:
                parts = (long_split(text, Tokenizer().encode) if self.pieces else []) or [text]
                captions += parts
                shares += [file.share / len(texts) / len(parts)] * len(parts)
        return {"captions": captions, SHARES: Ragged(torch.tensor(shares))}


def build(config: Config, split: str, n_channels: int = 3) -> CaptionedImages:
    """Returns the images of one split that have captions, sorted by path.

    FileNotFoundError for missing folders and files; ValueError for another split, a CSV file of another structure, and
    if no image has a caption.
    """
    check_split(split)
    root = data_root(config, "captions")
    name = find_split(root, config.image_dir, split)
    folder, shares = name.fill(config.image_dir), {name.fill(file): share for file, share in config.files.items()}
    images = list_files(root, folder, SUFFIXES, "--image_dir")
    caption_files = []
    for file, share in shares.items():
        text = read_text(root / file, f"pass its name, relative to {root}, as --prompts or --more_prompts")
        with naming(root / file):
            caption_files.append(CaptionFile(decode_captions(text), share))
    captions = {image for file in caption_files for image in file.captions}
    names = {posixpath.basename(image) for image in images}
    unpaired = {
        "images without a caption": tuple(image for image in images if posixpath.basename(image) not in captions),
        "captions without an image": tuple(sorted(captions - names)),
    }
    images = [image for image in images if posixpath.basename(image) in captions]
    if not images:
        files = " or ".join(shares)
        raise ValueError(
            f"no image of {root / folder} has a caption in {files}: check its names, such as {sorted(captions)[:1]}"
        )
    pairs = select_split(config, root, split, Pairs(images, [""] * len(images), unpaired), (folder, ""))
    options = {"sources": tuple(shares), "max_pixels": config.max_pixels, "n_channels": n_channels}
    dataset = CaptionedImages(
        root, pairs, Categories((), (), ()), split, caption_files=caption_files, pieces=config.caption_pieces, **options
    )
    require_readable(dataset, root)
    return dataset
