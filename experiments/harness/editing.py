"""Shared by the scripts that edit images: input images, their masks, batched generation, saving of results."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from experiments.harness.batches import ResumableBatches
from experiments.harness.images import save_grid, save_with_settings
from experiments.harness.report import progress
from models.ranges import COUNT, check_ranges
from train.condition_source import ConditionSource, Row
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.transforms import as_uint8, cover_size, range_for_image, to_item, trim
from train.datasets._channels import PICTURES, decode_channels, image_size
from train.datasets._decode import DAMAGED, decode, open_image, to_grey_or_rgb
from train.loop import Batch
from train.spaces import EditInput, max_in_cells
from train.trained_sampler import TrainedSampler

OPAQUE = 255  # alpha value; less opaque pixels count as masked
ROWS = 8  # of the overview grid, one per input image
MakeImages = Callable[[list[int]], Tensor]  # numbers of results (n,) -> uint8 images (n, C, H, W)


@dataclass(frozen=True, kw_only=True)
class InputImagesConfig:
    """Input images."""

    image: tuple[str, ...] = ()
    """Image files, resized and cropped as in training; if omitted, held-out images of the data set."""
    n_images: int = 64
    """Number of held-out images, a fixed random subset."""

    EVERYDAY = ("image",)
    RANGES = {"n_images": COUNT}

    def __post_init__(self):
        check_ranges(self)


class StrengthMaps(NamedTuple):
    """How much of each pixel of a batch of images may change."""

    maps: Tensor  # float32 (B, H, W) in [0, 1]
    largest: float  # in the maps of all images: so all start from the same noise level, whatever batch they are in


@dataclass(frozen=True)
class InputImages:
    """Images to edit, with their masks, names and conditions."""

    image: Tensor  # uint8 (N, C, H, W)
    mask: Tensor  # bool (N, H, W): pixels to fill in
    names: tuple[str, ...]  # N
    rows: tuple[Row, ...] = ()  # of conditions, assigned to the images cyclically; may be empty
    labels: tuple[int, ...] = ()  # N, the classes of held-out images; empty if there are none
    strength_map: Tensor | None = None  # float32 (N, H, W) in [0, 1]: how much of each pixel may change

    def __len__(self) -> int:
        return len(self.image)

    def strengths_of(self, rows: list[int]) -> StrengthMaps | None:
        """Returns the strength maps of the images of these numbers; None if there are none."""
        return (
            None if self.strength_map is None else StrengthMaps(self.strength_map[rows], self.strength_map.max().item())
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the masks, the visible pixels and the strength maps."""
        visible = self.image.masked_fill(self.mask.unsqueeze(1), 0)
        digest = hashlib.sha256(repr(tuple(visible.shape)).encode())
        for array in (visible, self.mask) if self.strength_map is None else (visible, self.mask, self.strength_map):
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()


def load_input_images(
    files: tuple[str, ...], count: int, trained: TrainedSampler, condition_file: str | None = None
) -> InputImages:
    """Loads image files, preprocessed as in training, or a fixed random subset of `count` held-out images.

    No pixel is masked yet. The conditions are the rows of `condition_file`, assigned cyclically, or else those of the
    held-out items themselves. FileNotFoundError, ValueError: a file cannot be used.
    """
    rows, labels = tuple(trained.read_rows(condition_file)), ()
    if files:
        images = torch.stack([preprocess(read_image(Path(name), trained.data.n_channels), trained) for name in files])
        names = tuple(Path(name).name for name in files)
    else:
        source = ImageSource(trained.dataset("val"), trained.data)
        subset = fixed_subset(len(source), count)  # not sorted: interpolation pairs neighbours
        batches = list(images_in_order(source, 100, subset))
        images = torch.cat([batch["image"] for batch in batches])
        indices = [i for batch in batches for i in batch["index"].tolist()]
        names = tuple(f"val_{i:06d}" for i in indices)
        if not rows and {*trained.sampler.conditions} - {"label"}:
            rows = tuple(trained.conditions_of(source[i], i) for i in indices)
        if source.dataset.n_classes:
            labels = tuple(source.dataset.labels[indices].tolist())
    return InputImages(images, torch.zeros(len(images), *images.shape[2:], dtype=torch.bool), names, rows, labels)


def read_image(path: Path, n_channels: int = 3) -> Image.Image | np.ndarray:
    """Decodes an image file as for training, see `decode_channels`; FileNotFoundError if it does not exist."""
    return decode_channels(find_image(path), n_channels)


def find_image(path: Path) -> Path:
    """Returns the path of an image file; FileNotFoundError if it does not exist."""
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass image files as --image, masks as --mask")
    return path


def preprocess(image: Image.Image | np.ndarray, trained: TrainedSampler) -> Tensor:
    """Resizes, crops and converts an image as in training: uint8 (C, H, W)."""
    data = trained.data
    item = to_item({"image": image}, data.size, data.n_channels, range_for_image(image, data.data_range))
    return as_uint8(item["image"].as_subclass(Tensor))


def preprocess_mask(mask: Image.Image, image: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes and crops a mask of any size like its image: bool (H, W), True where it is white."""
    return preprocess_grey(mask, image, size) >= 128


def preprocess_grey(grey: Image.Image, image: Image.Image | np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes and crops a grey picture of any size like its image, without new levels of grey: uint8 (H, W)."""
    from torchvision.transforms.v2 import functional as resizing

    nearest = {"interpolation": resizing.InterpolationMode.NEAREST}
    grey = trim(resizing.resize(grey.convert("L"), [*image_size(image)], **nearest), size)
    grey = resizing.resize(grey, cover_size(grey.height, grey.width, size), **nearest)
    return resizing.to_image(resizing.center_crop(grey, [*size])).as_subclass(Tensor)[0]


def transparency_mask(path: Path) -> Image.Image | None:
    """Returns a mask that is white where an image file is not opaque; None if it has no transparency."""
    try:
        with open_image(Path(os.path.expanduser(path))) as image:
            if not image.has_transparency_data:
                return None
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read ({error}): pass another file as --image") from error
    return alpha.point(lambda level: 0 if level == OPAQUE else 255)


def apply_masks(
    inputs: InputImages, files: tuple[str, ...], masks: tuple[str, ...], size: tuple[int, int]
) -> InputImages:
    """Masks pixels where the masks are white (one for all files, or one each) or, without masks, the files transparent.

    ValueError: a file has neither, or the number of masks does not match.
    """
    if masks and not files:
        raise ValueError("got --mask without --image: pass the images it belongs to, or --hide instead")
    if masks and len(masks) not in (1, len(files)):
        raise ValueError(f"got {len(masks)} masks for {len(files)} images, wanted one, or one per image: see --mask")
    n_channels = inputs.image.shape[1]
    drawn = [to_grey_or_rgb(decode(find_image(Path(name)))) for name in masks] or [
        transparency_mask(Path(name)) if n_channels in PICTURES else None for name in files
    ]
    drawn = drawn * len(files) if len(drawn) == 1 else drawn
    missing = [name for name, mask in zip(files, drawn, strict=True) if mask is None]
    if missing:
        raise ValueError(f"{missing[0]} is fully opaque: choose what to fill in with --mask, --hide or --outpaint")
    added = [
        preprocess_mask(mask, read_image(Path(name), n_channels), size) for name, mask in zip(files, drawn, strict=True)
    ]
    return dataclasses.replace(inputs, mask=inputs.mask | torch.stack(added))


def add_strength_maps(inputs: InputImages, files: tuple[str, ...], maps: tuple[str, ...]) -> InputImages:
    """Adds strength maps from grey pictures, one for all images or one each.

    They are resized and cropped like the image `files`, or to the size of held-out images. ValueError: their number
    does not match, or all of them are black.
    """
    if len(maps) not in (1, len(inputs)):
        got = f"got {len(maps)} strength maps for {len(inputs)} images"
        raise ValueError(f"{got}, wanted one, or one per image: see --strength_map")
    n_channels, size = inputs.image.shape[1], tuple(inputs.image.shape[2:])
    images = [read_image(Path(name), n_channels) for name in files] or [np.empty(size)] * len(inputs)
    greys = [to_grey_or_rgb(decode(find_image(Path(name)))) for name in maps]
    greys = greys * len(inputs) if len(greys) == 1 else greys
    levels = [preprocess_grey(grey, image, size) for grey, image in zip(greys, images, strict=True)]
    strength = torch.stack(levels).float() / 255
    if not strength.any():
        raise ValueError(f"got {maps[0]}, which is black: strength maps are brighter where images are to change")
    return dataclasses.replace(inputs, strength_map=strength)


def mask_part(inputs: InputImages, part: str) -> InputImages:
    """Masks one half of each image, or its centre (half its height and width), as well."""
    H, W = inputs.mask.shape[1:]
    places = {
        "left": (slice(None), slice(0, W // 2)),
        "right": (slice(None), slice(W // 2, W)),
        "top": (slice(0, H // 2), slice(None)),
        "bottom": (slice(H // 2, H), slice(None)),
        "centre": (slice(H // 4, H - H // 4), slice(W // 4, W - W // 4)),
    }
    mask = inputs.mask.clone()
    mask[(slice(None), *places[part])] = True
    return dataclasses.replace(inputs, mask=mask)


def add_margins(inputs: InputImages, margins: tuple[int, int, int, int]) -> InputImages:
    """Pads the images with masked margins of (top, right, bottom, left) pixels."""
    top, right, bottom, left = margins
    around, strengths = (left, right, top, bottom), inputs.strength_map
    image, mask = F.pad(inputs.image, around), F.pad(inputs.mask, around, value=True)
    strengths = None if strengths is None else F.pad(strengths, around, value=1.0)
    return dataclasses.replace(inputs, image=image, mask=mask, strength_map=strengths)


def centring_margins(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the margins (top, right, bottom, left), in grid cells, that centre a grid (h, w) on a canvas `shape`.

    ValueError: the canvas is smaller than the grid.
    """
    (h, w), (H, W) = grid, shape
    if H < h or W < w:
        raise ValueError(f"got shape {shape}, wanted at least that of the image, {grid}: pass a larger --shape")
    return (H - h) // 2, W - w - (W - w) // 2, H - h - (H - h) // 2, (W - w) // 2


def conditions_for(
    trained: TrainedSampler,
    inputs: InputImages,
    images: list[int],
    labels: list[int] | None,
    options: SamplingConfig,
    fields: Sequence[Row] = (),
) -> tuple[Batch | None, SamplingConfig]:
    """Returns the conditions of results that start from the input images of these numbers, and matching options.

    A result's label is the requested one, else that of its image's row of conditions, else null; `fields`, if given, of
    each result and values of --metadata override those of the row. Without any condition, guidance is turned off.
    ValueError: a condition is missing.
    """
    source = condition_source_for(trained, inputs, images, labels, options, fields)
    if source is None:
        return None, options.without_guidance()
    return source.draw(0, range(len(images))), options


def condition_source_for(
    trained: TrainedSampler,
    inputs: InputImages,
    images: list[int],
    labels: list[int] | None,
    options: SamplingConfig,
    fields: Sequence[Row] = (),
) -> ConditionSource | None:
    """Returns the source of the conditions that `conditions_for` returns, with a row for each of `images`; None without
    any condition."""
    names, rows = trained.sampler.conditions, inputs.rows
    source = ConditionSource(names, trained.sampler.n_classes, metadata=trained.metadata_fields).with_rows(rows)
    conditions = [dict(rows[image % len(rows)]) if rows else {} for image in images]
    if fields:
        conditions = [{**row, **changed} for row, changed in zip(conditions, fields, strict=True)]
    conditions = trained.with_metadata(conditions, options)
    if hints := trained.with_hints([], options):
        conditions = [{**row, **hints[image % len(hints)]} for image, row in zip(images, conditions, strict=True)]
    if labels is not None:
        conditions = [{**row, "label": label} for row, label in zip(conditions, labels, strict=True)]
    elif not any(conditions) and {*names} <= {"label"}:
        return None
    elif "label" in names:
        conditions = [{"label": None, **row} for row in conditions]
    return source.with_rows(conditions)


def draw(
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    edit: EditInput | None,
    indices: list[int],
    conditions: Batch | None,
    *,
    shape: tuple[int, int] | None = None,
    window_stride: int | None = None,
) -> Tensor:
    """Samples uint8 images (B, C, H, W) from an edit's starting point, or from noise; equal indices get equal noise."""
    batch = trained.draw(indices, seed, options, conditions, edit=edit, shape=shape, window_stride=window_stride)
    return batch["image"]


def generate_in_batches(name: str, count: int, make: MakeImages, batches: ResumableBatches) -> Tensor | None:
    """Generates results 0 to count - 1 on all ranks in resumable batches: uint8 (count, C, H, W) on the main rank, else
    None."""

    def make_batch(numbers: list[int]) -> dict[str, Tensor]:
        return {"image": make(numbers)}

    is_main = batches.world.is_main
    resumed = batches.resume(name, range(count), make_batch)
    images = [batch["image"] for batch in progress(resumed, count, name, is_main)]
    return torch.cat(images) if is_main else None


def redraw_input(x0: Tensor, trained: TrainedSampler, strength: float) -> EditInput:
    """Returns the `EditInput` that masks or noises all of x0 (B, ...) by `strength`; no position is certain to stay."""
    grid = x0.shape[-2:]
    return EditInput(x0, torch.zeros(len(x0), *grid, dtype=torch.bool, device=trained.device), strength)


def scale_strength(start: EditInput, strengths: StrengthMaps | None, trained: TrainedSampler) -> EditInput:
    """Returns the `EditInput` with its strength multiplied by the strength maps of its images, if there are any."""
    if strengths is None:
        return start
    maps = max_in_cells(strengths.maps.to(trained.device), trained.space.factor)
    return start._replace(strength=start.strength * strengths.largest, strength_map=start.strength * maps)


def expand_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Expands masks of grid cells (..., h, w) to pixels (..., H, W)."""
    (h, w), (H, W) = mask.shape[-2:], size
    return mask.repeat_interleave(H // h, -2).repeat_interleave(W // w, -1)


def encode_images(images: Tensor, trained: TrainedSampler) -> Tensor:
    """Encodes uint8 images (B, C, H, W) into the sampler's space."""
    images = images.to(trained.device)
    return trained.space.encode_masked(images, torch.zeros_like(images[:, 0], dtype=torch.bool)).x0


def save_result_images(
    folder: Path,
    names: tuple[str, ...],
    images: Tensor,
    columns: list[str],
    settings: dict[str, Any],
    subfolder: str = "images",
) -> None:
    """Writes images (N, columns, C, H, W) to images/<number>_<name>_<column>.png, with the settings as metadata."""
    for i, (name, row) in enumerate(zip(names, images, strict=True)):
        for column, image in zip(columns, row, strict=True):
            path = folder / subfolder / f"{i:03d}_{Path(name).stem}_{column}.png"
            save_with_settings(path, image, settings | {"of": name, "column": column})


def save_comparison_grid(path: Path, *parts: Tensor, headings: Sequence[str] = ()) -> None:
    """Saves a grid with one row for each of the first images: parts (N, C, H, W) or (N, columns, C, H, W), side by
    side, below the headings of the columns."""
    wide = [part if part.ndim == 5 else part.unsqueeze(1) for part in parts]
    rows = torch.cat([part[:ROWS] for part in wide], 1)
    save_grid(path, rows.flatten(0, 1), columns=rows.shape[1], captions=headings)


def mean_abs_difference(a: Tensor, b: Tensor) -> float:
    """Returns the mean absolute difference of uint8 images, as a fraction of the range of values, in [0, 1]."""
    return (a.float() - b.float()).abs().mean().item() / 255


def change_within(original: Tensor, edited: Tensor, inside: Tensor) -> float:
    """Returns the mean absolute change of the pixels `inside` (N, 1, 1, H, W) bool, as a fraction of the range of
    values; 0 if there are none. Images are uint8 (N, 1, C, H, W) and (N, results, C, H, W)."""
    chosen = inside.expand_as(edited)
    return mean_abs_difference(original.expand_as(edited)[chosen], edited[chosen]) if chosen.any() else 0.0
