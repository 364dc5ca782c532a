"""Source images of those to generate, for a run with --conditions image: a file, or all pictures in a folder."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from models.conditions.image import MASK
from train.condition_images import IMAGE, find_image_encoder
from train.condition_source import ConditionSource, Row
from train.config import SamplingConfig
from train.data.hints import with_hint_of_source
from train.data.transforms import range_for_image, to_item
from train.datasets._channels import decode_channels
from train.datasets.folder import SUFFIXES, walk_files
from train.files import sha256
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True)
class SourceImages:
    """The images as rows of conditions, with the names of their files."""

    rows: tuple[Row, ...]  # {"condition_image": (C, H, W)}
    names: tuple[str, ...]
    provenance: dict[str, str]  # identifies the files

    def __len__(self) -> int:
        return len(self.rows)

    def for_prompts(self, count: int) -> "SourceImages":
        """Returns one image for each of `count` prompts: the only one, or as many; ValueError for other numbers."""
        if len(self) not in (1, count):
            raise ValueError(f"got {len(self)} images as --source for {count} prompts, wanted one for all, or one each")
        times = count // len(self)
        return replace(self, rows=self.rows * times, names=self.names * times)


def open_source_images(path: str, trained: TrainedSampler, options: SamplingConfig) -> SourceImages:
    """Reads source images, resized and cropped as in training, and makes the hints of them that the sampler reads.

    FileNotFoundError, ValueError: there are none, they cannot be read, the sampler has no image condition or fills in
    masks, or `options` name a --condition_file.
    """
    conditions = trained.sampler.conditions
    if options.condition_file is not None:
        raise ValueError("got --source and --condition_file: pass one of them")
    if IMAGE not in conditions:
        reads = ", ".join(conditions) or "no conditions"
        raise ValueError(f"got a source for {trained.run}, which reads {reads}: pass a run with --conditions image")
    if MASK in conditions:
        got = f"got a source for {trained.run}, which fills in masks"
        raise ValueError(f"{got}: use experiments/inpaint.py --image FILE --mask FILE")
    files, encoder = list_sources(Path(path).expanduser()), find_image_encoder(trained.sampler.network)
    reads_pixels = encoder.reads == "pixels" and not trained.hints.condition_image
    channels = encoder.image_channels if reads_pixels else trained.data.n_channels
    digests = "/".join(sha256(file) for file in files)
    return SourceImages(
        tuple(read_source(file, channels, trained) for file in files),
        tuple(file.name for file in files),
        {"source_sha256": hashlib.sha256(digests.encode()).hexdigest()},
    )


def source_of(sources: SourceImages, trained: TrainedSampler, options: SamplingConfig) -> ConditionSource:
    """Returns the source of the conditions of images that have these source images in turn, and the metadata in
    `options`. All ranks must call it."""
    rows = trained.with_hints(trained.with_metadata(sources.rows, options), options)
    return trained.condition_source(options, skip=rows[0]).with_rows(rows)


def list_sources(path: Path) -> list[Path]:
    """Returns a file, or the pictures in a folder, sorted; FileNotFoundError, ValueError if there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} not found: pass a picture, or a folder of pictures, as --source")
    names = sorted(name for name in walk_files(path) if name.lower().endswith(SUFFIXES))
    if not names:
        raise ValueError(f"{path} has no {', '.join(SUFFIXES)} file: pass another folder as --source")
    return [path / name for name in names]


def read_source(file: Path, channels: int, trained: TrainedSampler) -> Row:
    """Reads an image of `channels` channels, or makes the hint of it, as a row of conditions.

    ValueError if it cannot be read, or has no such hint.
    """
    image, data, maker = decode_channels(file, channels), trained.data, trained.makers.get(IMAGE)
    image = to_item({"image": image}, data.size, channels, range_for_image(image, data.data_range))["image"]
    return {IMAGE: image} if maker is None else with_hint_of_source({"source_image": image}, IMAGE, maker)
