"""Pairs of images: a source and a target, which is to be made of it, paired by name or by a list with prompts.

source/a.png   target/a.png     or     prompt.json: {"source": "source/0.png", "target": "target/0.png", "prompt": ...}
source/b.png   target/b.jpg            with one object a line, as in fill50k; paths are relative to its folder
"""

import json
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.data.formats.categories import Categories
from train.datasets import DatasetConfig, check_split, data_root, require_readable
from train.datasets._pairs import (
    AnnotationFiles,
    Pairs,
    describe_unpaired,
    find_split,
    join,
    list_files,
    list_folders,
    pair_files,
)
from train.datasets._regions import Packed, RegionDataset, naming, read_source, read_text
from train.datasets.captions import SIDES
from train.datasets.folder import SUFFIXES

PROMPTS = "prompt.json"  # the list that is read if there is one


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of pairs; data_dir has two folders of images, or a list of pairs with prompts."""

    source_dir: str = "source"
    """Folder of the images to start from, relative to data_dir; may contain {split}, as target_dir."""
    target_dir: str = "target"
    """Folder of the images to make. {split} stands for train, and for the first of valid, val, validation and test that
    exists; without it, or without a second folder, val_fraction of the pairs is held out."""
    pair_file: str | None = None
    """List of pairs instead of the two folders, relative to data_dir: a JSON object a line with source, target and
    prompt; may contain {split}. By default prompt.json, if there is one."""

    EVERYDAY = ("source_dir", "target_dir", "pair_file")


class ImagePairs(RegionDataset):
    """A `Dataset` of images with their `source_image`, and perhaps a caption; it has no regions."""

    sides = SIDES

    def __init__(self, *args: Any, captions: Packed | None, **options: Any):
        super().__init__(*args, **options)
        self.captions = captions

    def annotations(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        paths = self.root / self.names[index], self.root / self.files[index]
        source = read_source(*paths, size, self.n_channels, self.max_pixels)
        return {"source_image": source} | ({} if self.captions is None else {"captions": [self.captions[index]]})


class PairList(NamedTuple):
    """The rows of a file of pairs, with paths relative to the folder of the data."""

    sources: list[str]
    targets: list[str]
    prompts: list[str]


def read_pairs(root: Path, file: str) -> PairList:
    """Reads a JSON object a line; ValueError, with the number of the line, for another structure."""
    text, rows = read_text(root / file, f"pass its name, relative to {root}, as --pair_file"), PairList([], [], [])
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        with naming(f"{root / file}, line {number}"):
            row = json.loads(line)
            words = [row.get(each) for each in ("source", "target", "prompt")] if isinstance(row, dict) else [None]
            if not all(isinstance(word, str) for word in words):
                raise ValueError(
                    f"got {line.strip()[:80]}, wanted an object with the strings source, target and prompt"
                )
        for column, word in zip(rows, words, strict=True):
            column.append(word if column is rows.prompts else join(posixpath.dirname(file), word))
    if not rows.targets:
        raise ValueError(f"{root / file} has no pairs, wanted a JSON object a line: pass another --pair_file")
    return rows


def list_pairs(root: Path, file: str) -> tuple[Pairs, dict[str, str]]:
    """Returns the pairs of a list that exist, sorted by target, and their prompts by target; ValueError if there are
    none, and for a target that is listed twice."""
    rows = read_pairs(root, file)
    existing = list_folders(root, {*rows.sources, *rows.targets}, "--data_dir")
    prompts = dict(zip(rows.targets, rows.prompts, strict=True))
    if len(prompts) < len(rows.targets):
        twice = next(each for index, each in enumerate(rows.targets) if each in rows.targets[:index])
        raise ValueError(f"{root / file} has the target {twice} twice, wanted it once: remove a line")
    pairs = sorted(zip(rows.targets, rows.sources, strict=True))
    complete = [pair for pair in pairs if {*pair} <= existing]
    if not complete:
        target, source = pairs[0]
        raise ValueError(f"{root / file}: no pair exists in {root}: got {target} and {source}: check --pair_file")
    missing = {
        f"{noun}s that are listed and do not exist": tuple(pair[i] for pair in pairs if pair[i] not in existing)
        for i, noun in enumerate(("target", "source"))
    }
    return Pairs([target for target, _ in complete], [source for _, source in complete], missing), prompts


def pair_folders(root: Path, target_dir: str, source_dir: str) -> Pairs:
    """Pairs the images of two folders by name, with paths relative to `root`."""
    targets = list_files(root, target_dir, SUFFIXES, "--target_dir")
    sources = list_files(root, source_dir, SUFFIXES, "--source_dir")
    files = AnnotationFiles(source_dir, "--source_dir", SUFFIXES, "source", image_flag="--target_dir")
    pairs = pair_files(targets, sources, files)
    unpaired = dict(zip(("targets without a source", "sources without a target"), pairs.unpaired.values(), strict=True))
    images = [join(target_dir, each) for each in pairs.images]
    return Pairs(images, [join(source_dir, each) for each in pairs.annotations], unpaired)


def build(config: Config, split: str, n_channels: int = 3) -> ImagePairs:
    """Returns the pairs of one split, sorted by the path of the target.

    FileNotFoundError for missing folders and files; ValueError for another split, and images that cannot be paired.
    """
    check_split(split)
    root, file, prompts = data_root(config, "pairs"), config.pair_file, None
    if file is None and (root / PROMPTS).is_file():
        file = PROMPTS
    template, flag = (config.target_dir, "--target_dir") if file is None else (file, "--pair_file")
    name = find_split(root, template, split, flag)
    if file is None:
        pairs = pair_folders(root, name.fill(config.target_dir), name.fill(config.source_dir))
    else:
        file = name.fill(file)
        pairs, prompts = list_pairs(root, file)
    rows = list(zip(pairs.images, pairs.annotations, strict=True))
    rows = name.select(rows, split, config.val_fraction, config.split_seed)
    notes = name.describe(root, template, split, config.val_fraction), *describe_unpaired(pairs.unpaired)
    targets, sources = ([row[i] for row in rows] for i in range(2))
    dataset = ImagePairs(
        root,
        Pairs(targets, sources, pairs.unpaired, notes),
        Categories((), (), ()),
        split,
        captions=None if prompts is None else Packed(prompts[target] for target in targets),
        sources=() if file is None else (file,),
        max_pixels=config.max_pixels,
        n_channels=n_channels,
    )
    require_readable(dataset, root)
    return dataset
