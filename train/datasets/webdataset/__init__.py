"""WebDataset: images in tar shards, local or at URLs, for data sets larger than a disk."""

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.ranges import MILLION
from train.config import ROOT
from train.data.formats.prompts import decode_caption_lines
from train.data.sides import Sides
from train.datasets import (
    MAX_PIXELS,
    SPLITS,
    Blocks,
    DatasetConfig,
    Ragged,
    UnreadableImage,
    check_split,
    limit_context,
    require_readable,
    train_val_split,
)
from train.datasets._channels import decode_channels, image_size
from train.datasets._decode import DAMAGED, open_image
from train.datasets.webdataset.shards import Shard, index_shards, list_shards, require_distinct
from train.datasets.webdataset.store import ShardStore, import_webdataset, is_remote
from train.datasets.webdataset.tar import SampleSpec

VAL_NAME = re.compile(r"(val|valid|validation|test)(?![a-z])")  # the beginning of a shard's name
NAMES_FILES = ("classes.txt", "classnames.txt")  # beside local shards: class names, a line each, by number
CACHE_DIR = ROOT / "logs" / ".cache" / "webdataset"


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    """Options of webdataset; data_dir is a folder of .tar shards, a glob, a brace pattern ('shards-{000..099}.tar'), or
    URLs with such a pattern: https:, gs:, hf:, or pipe:COMMAND, which runs the command and reads its output.

    Without val_shards, val_fraction is held out: whole shards if that is at least one shard, single images otherwise.
    A file classes.txt or classnames.txt beside local shards names the classes, a line each.
    """

    val_shards: str | None = None
    """Validation shards, in the same notation as data_dir; they are left out of training."""
    image_ext: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp")
    """Extensions of image members (everything after the first dot of the name)."""
    label_from: Literal["none", "cls", "json"] = "none"
    """Where the class id is stored: cls: in a member .cls; json: in the field label_field of the .json member."""
    label_field: str = "label"
    """Field of the .json members that contains the class id."""
    json_fields: tuple[str, ...] = ()
    """Fields of the .json members to add to items: numbers, strings, or lists of them."""
    id_fields: tuple[str, ...] = ()
    """Fields of the .json members that are lists of integers of any length, such as the class ids of boxes."""
    box_fields: tuple[str, ...] = ()
    """Fields of the .json members that are lists of boxes: left, top, right, bottom in pixels."""
    mask_ext: tuple[str, ...] = ()
    """Extensions of members that are label maps (grey or palette), such as seg.png, which becomes the field seg."""
    caption_ext: tuple[str, ...] = ()
    """Extensions of members with captions of the image, such as txt: a caption a line."""
    skip_incomplete: bool = False
    """Leave out samples without image, label or annotations, and say how many; they are refused otherwise."""
    dots_in_names: bool = False
    """Sample names may contain dots: the extension is the longest that is asked for, or what follows the last dot."""
    keys_per_shard: bool = False
    """Sample names are unique within a shard only: the same name in two shards means two images."""
    mix_shards: int = 8
    """Number of shards whose images are shuffled together; each epoch groups the shards at random."""
    shards_on_disk: int = 32
    """Maximum number of downloaded shards kept on disk; at least twice mix_shards."""
    shard_cache: str | None = None
    """Folder for downloaded shards and the index of all shards; None: logs/.cache/webdataset."""

    EVERYDAY = ("label_from",)
    RANGES = {"mix_shards": MILLION, "shards_on_disk": "[2, 10000000]"}

    def __post_init__(self):
        super().__post_init__()
        if self.shards_on_disk < 2 * self.mix_shards:
            raise ValueError(
                f"got mix_shards {self.mix_shards} and shards_on_disk {self.shards_on_disk}, wanted at least "
                "twice as many: the next shards are downloaded while the current ones are read"
            )
        names = [*self.json_fields, *self.id_fields, *self.box_fields, *map(field_name, self.mask_ext)]
        names += ["captions"] if self.caption_ext else []
        if {*names} & {"image", "label"}:
            raise ValueError("got image or label as an extra field: items have them already, see --label_from")
        if len({*names}) < len(names):
            raise ValueError(f"got {', '.join(names)} as extra fields, wanted each once")
        if not self.image_ext:
            raise ValueError("got no image_ext: pass the extensions of the images, such as --image_ext jpg png")


class TarImages:
    """A `Dataset` of images in tar shards, each read from its shard on access.

    `row_indices` (n,) are the sorted indices of its samples among the concatenated rows of all shards.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        row_indices: np.ndarray,
        split: str,
        config: Config,
        store: ShardStore,
        n_channels: int = 3,
    ):
        self.store, self.split, self.config, self.n_channels = store, split, config, n_channels
        n_skipped = sum(shard.n_skipped for shard in shards)
        first_skipped = next((shard.first_skipped for shard in shards if shard.n_skipped), "")
        self.notes = (f"incomplete samples left out: {n_skipped:,}, such as: {first_skipped}",) if n_skipped else ()
        self.json_fields = (*config.json_fields, *config.id_fields, *config.box_fields)
        ends = np.cumsum([len(shard.rows) for shard in shards])
        shard_of, sizes = np.unique(np.searchsorted(ends, row_indices, side="right"), return_counts=True)
        self.rows = np.concatenate([shard.rows for shard in shards])[row_indices]
        self.shards = [(shards[i].name, shards[i].stamp) for i in shard_of]
        self.blocks = Blocks(tuple(sizes.tolist()), config.mix_shards)
        self.ends = np.cumsum(sizes)
        has_words = config.caption_ext or "box_words" in config.json_fields
        self.sides = Sides(words=(("left", "right"),)) if has_words else None
        self.n_classes, self.labels, self.class_names = 0, None, ()
        if config.label_from != "none":
            self.n_classes = 1 + max(int(shard.rows["label"].max()) for shard in shards)
            self.labels = self.rows["label"].astype(np.int64)
            self.class_names = config.class_names or read_class_names(shards[0].name, self.n_classes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        name, stamp = self.shards[np.searchsorted(self.ends, index, side="right")]
        with self.store.open(name, stamp) as file:
            file.seek(row["offset"])
            data = file.read(row["size"])
            extra = {}
            for ending in extra_members(self.config):
                file.seek(row[f"{ending}_offset"])
                extra[ending] = file.read(row[f"{ending}_size"])
        where = f"{name} sample {row['key'].decode(errors='replace')}"
        image = decode_channels(io.BytesIO(data), self.n_channels, where, self.config.max_pixels)
        item: dict[str, Any] = {"image": image}
        if self.labels is not None:
            item["label"] = int(self.labels[index])
        if self.json_fields:
            fields = read_json_fields(extra["json"], self.json_fields, where)
            item |= {name: parse_value(fields[name], f"{where}: field {name!r}") for name in self.config.json_fields}
            item |= {name: parse_ids(fields[name], f"{where}: field {name!r}") for name in self.config.id_fields}
            item |= {name: parse_boxes(fields[name], item["image"], where) for name in self.config.box_fields}
        if self.config.caption_ext:
            item["captions"] = [
                text for ending in self.config.caption_ext for text in parse_lines(extra[ending], where)
            ]
        return item | {
            field_name(ending): decode_mask(extra[ending], where, self.config.max_pixels)
            for ending in self.config.mask_ext
        }

    def fingerprint(self) -> str:
        return self.digest(f"{name if is_remote(name) else Path(name).name!r} {stamp}\n" for name, stamp in self.shards)

    def content_fingerprint(self) -> str:
        return self.digest(())

    def digest(self, shards: Iterable[str]) -> str:
        """Returns a digest of the list of samples (key, place in its shard, size, label) and of `shards`."""
        fields = (
            *self.json_fields,
            *self.config.mask_ext,
            *self.config.caption_ext,
            *limit_context(self.config.max_pixels),
        )
        content = hashlib.sha256(repr((self.split, self.n_classes, self.blocks.sizes, *fields)).encode())
        for shard in shards:
            content.update(shard.encode())
        content.update(np.ascontiguousarray(self.rows).data)
        return content.hexdigest()


def read_json_fields(content: bytes, names: Sequence[str], where: str) -> dict[str, Any]:
    """Reads fields of a .json member; ValueError if one is missing."""
    try:
        fields = json.loads(content)
        return {name: fields[name] for name in names}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{where}: its .json does not have all of {', '.join(names)} ({error}): see --json_fields"
        ) from error


def parse_value(value: Any, what: str) -> Any:
    """Converts a JSON value to a field of an item."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
        return to_tensor(value, what)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        wanted = "a number, a string, or a list of them (boxes: --box_fields; lists of varying length: --id_fields)"
        raise ValueError(f"{what} is {str(value)[:60]}, wanted {wanted}")
    return value


def parse_lines(content: bytes, where: str) -> list[str]:
    """Decodes captions, a line each; ValueError unless they are UTF-8."""
    try:
        return [caption.text for caption in decode_caption_lines(content.decode("utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its captions are not UTF-8 ({error}): write the shard again") from error


def parse_ids(value: Any, what: str) -> Tensor:
    """Converts a list of integers to a `Ragged` tensor (n,) int64."""
    if not isinstance(value, list) or not all(type(each) is int for each in value):
        raise ValueError(f"{what} is {str(value)[:60]}, wanted a list of integers")
    return Ragged(to_tensor(value, what, torch.int64))


def to_tensor(value: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Converts a JSON value to a tensor; ValueError for anything but numbers of the dtype's range."""
    try:
        return torch.tensor(value, dtype=dtype)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{what} is {str(value)[:60]}, wanted numbers ({error})") from error


def parse_boxes(value: Any, image: Image.Image | np.ndarray, where: str) -> Tensor:
    """Converts boxes (n, 4), left, top, right, bottom in pixels, to `BoundingBoxes`; n may be 0."""
    from torchvision import tv_tensors

    boxes = to_tensor(value, f"{where}: a field of boxes", torch.float32)
    if boxes.numel() and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ValueError(f"{where}: got boxes {tuple(boxes.shape)}, wanted (n, 4): left, top, right, bottom in pixels")
    return tv_tensors.BoundingBoxes(boxes.reshape(-1, 4), format="XYXY", canvas_size=image_size(image))


def decode_mask(content: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decodes a label map (H, W): grey levels or palette indices, uint8 or int64."""
    from torchvision import tv_tensors

    try:
        with open_image(io.BytesIO(content), max_pixels) as image:
            if image.mode not in ("1", "L", "P", "I;16", "I"):
                raise ValueError(f"{where}: its mask has mode {image.mode}, wanted grey or a palette")
            levels = np.array(image)
    except DAMAGED as error:
        raise UnreadableImage(f"{where}: its mask cannot be read ({error})") from error
    return tv_tensors.Mask(torch.from_numpy(levels if levels.dtype == np.uint8 else levels.astype(np.int64)))


def field_name(ending: str) -> str:
    """Returns the name of the field of an extra member: seg.png -> seg."""
    return ending.partition(".")[0]


def extra_members(config: Config) -> tuple[str, ...]:
    """Returns the extensions of the members to read with each image."""
    json_members = ["json"] if config.json_fields or config.id_fields or config.box_fields else []
    return (*json_members, *config.mask_ext, *config.caption_ext)


def build(config: Config, split: str, n_channels: int = 3) -> TarImages:
    """Returns the images of one split, of `n_channels` channels, in the order of the shards and of the members in them.

    FileNotFoundError for shards that are missing or cannot be downloaded; ValueError for another split, a missing
    webdataset package, incomplete or malformed shards, and duplicate samples.
    """
    check_split(split)
    if config.data_dir is None:
        raise ValueError("data set webdataset has no shards: pass --data_dir FOLDER, 'shards-{000..099}.tar' or URLs")
    import_webdataset()
    cache = Path(os.path.expanduser(config.shard_cache)).absolute() if config.shard_cache else CACHE_DIR
    store = ShardStore(cache / "shards", config.shards_on_disk)
    val = list_shards(config.val_shards, "val_shards") if config.val_shards else []
    train = [name for name in list_shards(config.data_dir, "data_dir") if name not in set(val)]
    looks_like_val = [name for name in train if VAL_NAME.match(Path(name).name.lower())]
    if not val and 0 < len(looks_like_val) < len(train):
        raise ValueError(f"{looks_like_val[0]} is among the training shards: name validation shards with --val_shards")
    if not train:
        raise ValueError(
            f"--val_shards {config.val_shards} are all shards of {config.data_dir}: leave some for training"
        )
    endings = tuple(ext.lower().lstrip(".") for ext in config.image_ext)
    spec = SampleSpec(
        endings,
        config.label_from,
        config.label_field,
        extra=extra_members(config),
        skip_incomplete=config.skip_incomplete,
        dots_in_names=config.dots_in_names,
    )
    shards = index_shards([*train, *val], store, cache / "index", spec)
    if not config.keys_per_shard:
        require_distinct(shards)
    dataset = TarImages(shards, select_rows(shards, len(train), config, split), split, config, store, n_channels)
    dataset.notes += note_other_files(Path(os.path.expanduser(config.data_dir)))
    require_readable(dataset, Path(dataset.shards[0][0]))
    return dataset


def note_other_files(folder: Path) -> tuple[str, ...]:
    """Returns a note on what a folder holds besides shards."""
    names = sorted(path.name for path in folder.glob("[!.]*") if path.suffix != ".tar" and path.name not in NAMES_FILES)
    if not names:
        return ()
    return (f"left out of {folder}: files and folders not named .tar: {len(names)}, such as {names[0]}",)


def read_class_names(shard: str, n_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes in the file beside a local shard, () without one; ValueError if it is too
    short. Lines beyond the largest number in use are ignored."""
    files = [] if is_remote(shard) else [Path(shard).with_name(name) for name in NAMES_FILES]
    path = next((path for path in files if path.is_file()), None)
    if path is None:
        return ()
    names = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if len(names) < n_classes:
        raise ValueError(
            f"{path} has {len(names)} lines, wanted the names of classes 0 to {n_classes - 1}: add the others, a line "
            "each, or pass --class_names"
        )
    return tuple(names[:n_classes])


def select_rows(shards: Sequence[Shard], n_train: int, config: Config, split: str) -> np.ndarray:
    """Returns the sorted indices of a split's samples among the rows of all shards.

    Shards from `n_train` on are for validation; if there are none, shards or samples are held out.
    """
    sizes = [len(shard.rows) for shard in shards]
    shard_of = np.repeat(np.arange(len(shards)), sizes)
    if n_train < len(shards):
        return np.flatnonzero((shard_of < n_train) == (split == "train"))
    side = SPLITS.index(split)
    if len(shards) * config.val_fraction >= 1:
        return np.flatnonzero(
            np.isin(shard_of, train_val_split(len(shards), config.val_fraction, config.split_seed)[side])
        )
    return train_val_split(len(shard_of), config.val_fraction, config.split_seed)[side]
