"""Images with captions: in a CSV, JSON or JSONL file, or in a text file of the same name beside each image.

images/train/a.png   prompts_train.csv     or     images/train/a.png   images/train/a.txt
images/val/b.png     prompts_val.csv              images/val/b.png     images/val/b.txt

An image may have several captions, with shares. They may come from several files, each with a share of the visits, and
long ones may be shown in pieces.
"""

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.tokenizer import Tokenizer
from train.data.captions import SHARES, long_split
from train.data.formats.categories import Categories
from train.data.formats.prompts import Caption, decode_caption_lines, decode_captions
from train.data.sides import Sides
from train.datasets import Ragged, check_split, data_root, require_readable
from train.datasets._pairs import Pairs, RegionConfig, find_split, join, list_files, select_split
from train.datasets._regions import LISTED, Packed, RegionDataset, naming, read_text
from train.datasets.folder import SUFFIXES, walk_files

SIDES = Sides(words=(("left", "right"),))


@dataclass(frozen=True, kw_only=True)
class Config(RegionConfig):
    """Options of captions; data_dir has images, and their captions in files."""

    prompts: str = "prompts_{split}.csv"
    """File of captions, relative to data_dir: CSV with the columns img_name, prompt and perhaps share, .json or .jsonl;
    may contain {split}. Names are those of the files, without folders. A suffix, such as .txt, means the file of the
    same name beside each image, a caption a line."""
    more_prompts: tuple[str, ...] = ()
    """Further files with the share of visits that show their captions, such as short_{split}.csv=0.3 or .txt=0.3; the
    rest of the visits shows those of --prompts. Images that a file leaves out are shown with the other files'
    captions."""
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


class CaptionedImages(RegionDataset):
    """A `Dataset` of images with captions, at least one each; it has no regions."""

    sides = SIDES

    def __init__(self, *args: Any, captions: Packed, weighted: bool, pieces: bool, **options: Any):
        """`captions` are a list of `Caption` for each image; items have their shares if they are `weighted`, and long
        ones are cut into `pieces`."""
        super().__init__(*args, **options)
        self.captions, self.weighted, self.pieces = captions, weighted, pieces

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        captions: list[Caption] = self.captions[index]
        if self.pieces:
            captions = [piece for caption in captions for piece in cut(caption)]
        texts = [caption.text for caption in captions]
        if not self.weighted:
            return {"captions": texts}
        return {"captions": texts, SHARES: Ragged(torch.tensor([caption.share for caption in captions]))}


def cut(caption: Caption) -> list[Caption]:
    """Returns the pieces of a caption that is long, equally often."""
    pieces = long_split(caption.text, Tokenizer().encode) or [caption.text]
    return [Caption(piece, caption.share / len(pieces)) for piece in pieces]


class CaptionSource(NamedTuple):
    """The captions of one file, or of the text files beside images; paths are relative to the folder of the data."""

    captions: dict[str, list[Caption]]  # by path of the image
    files: dict[str, str]  # that have them, by path of the image
    unpaired: set[str]  # names of images that do not exist, or text files beside no image


def build(config: Config, split: str, n_channels: int = 3) -> CaptionedImages:
    """Returns the images of one split that have captions, sorted by path.

    FileNotFoundError for missing folders and files; ValueError for another split, a file of another structure, and if
    no image has a caption.
    """
    check_split(split)
    root = data_root(config, "captions")
    name = find_split(root, config.image_dir, split)
    folder, shares = name.fill(config.image_dir), {name.fill(file): share for file, share in config.files.items()}
    images = list_files(root, folder, SUFFIXES, "--image_dir")
    paths = [join(folder, image) for image in images]
    sources = [
        read_beside(root, folder, file, paths) if is_suffix(file) else read_list(root, file, paths) for file in shares
    ]
    captioned = {path for source in sources for path in source.captions}
    unpaired = {
        "images without a caption": tuple(image for image in images if join(folder, image) not in captioned),
        "captions without an image": tuple(sorted({each for source in sources for each in source.unpaired})),
    }
    if not captioned:
        got = ", ".join(unpaired["captions without an image"][:1]) or "none"
        wanted = f"names of images, such as {images[0]}"
        files = " or ".join(shares)
        raise ValueError(f"no image of {root / folder} has a caption in {files}: got {got}, wanted {wanted}")
    images = [image for image in images if join(folder, image) in captioned]
    pairs = select_split(config, root, split, Pairs(images, [""] * len(images), unpaired), (folder, ""))
    files = dict.fromkeys(source.files[path] for path in pairs.images for source in sources if path in source.files)
    plain = len(sources) == 1 and not config.caption_pieces  # shown as in the file
    dataset = CaptionedImages(
        root,
        pairs,
        Categories((), (), ()),
        split,
        captions=Packed(merge_captions(sources, list(shares.values()), path) for path in pairs.images),
        weighted=not plain or any(caption.share != 1 for each in sources[0].captions.values() for caption in each),
        pieces=config.caption_pieces,
        sources=tuple(files),
        context=() if plain else (config.more_prompts, config.caption_pieces),
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset


def is_suffix(file: str) -> bool:
    """Returns whether the name of a file of captions means the files with this suffix beside images."""
    return file.startswith(".") and "/" not in file


def read_list(root: Path, file: str, images: Sequence[str]) -> CaptionSource:
    """Reads the captions of images by their names, without folders."""
    remedy = "as --prompts or --more_prompts, or .txt for a text file beside each image"
    text = read_text(root / file, f"pass its name, relative to {root}, {remedy}")
    with naming(root / file):
        captions = decode_captions(text, posixpath.splitext(file)[1].lower())
    names = {image: posixpath.basename(image) for image in images}
    own = {image: captions[name] for image, name in names.items() if name in captions}
    return CaptionSource(own, dict.fromkeys(own, file), captions.keys() - set(names.values()))


def read_beside(root: Path, folder: str, suffix: str, images: Sequence[str]) -> CaptionSource:
    """Reads the captions in the files with this suffix, and otherwise the names of images; blank files have none."""
    texts = {join(folder, file) for file in walk_files(root / folder) if file.endswith(suffix)}
    beside = {image: posixpath.splitext(image)[0] + suffix for image in images}
    files = {image: text for image, text in beside.items() if text in texts}
    captions = {image: decode_caption_lines(read_text(root / text, LISTED)) for image, text in files.items()}
    return CaptionSource({image: each for image, each in captions.items() if each}, files, texts - set(files.values()))


def merge_captions(sources: Sequence[CaptionSource], shares: Sequence[float], image: str) -> list[Caption]:
    """Returns the captions of an image from all sources, each with its part of the share of its source."""
    captions = []
    for source, share in zip(sources, shares, strict=True):
        own = source.captions.get(image, [])
        total = sum(caption.share for caption in own)
        captions += [Caption(caption.text, share * caption.share / total) for caption in own]
    return captions
