"""What scripts that edit images share: the images given, what is hidden of them, how results are made and shown."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from experiments.harness.batches import ResumableBatches
from experiments.harness.images import save_grid, save_with_settings
from experiments.harness.report import progress
from train.condition_source import ConditionSource, Row, read_rows
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.transforms import as_uint8, cover_size, range_for_image, to_item
from train.datasets._decode import DAMAGED, decode, to_grey_or_rgb
from train.loop import Batch
from train.spaces import EditInput
from train.trained_sampler import TrainedSampler

OPAQUE = 255  # of an alpha channel: pixels that are less have lost what they were
ROWS = 8  # images in a grid
MakeImages = Callable[[list[int]], Tensor]  # places in a plan (n,) -> uint8 images (n, C, H, W)


@dataclass(frozen=True, kw_only=True)
class InputImagesConfig:
    """Images to begin from."""

    image: tuple[str, ...] = ()
    """Image files, cut as in training; left out, held-out images of the data set."""
    n_images: int = 64
    """So many held-out images, drawn at random, always the same."""

    def __post_init__(self):
        if self.n_images < 1:
            raise ValueError(f"got n_images {self.n_images}, wanted at least 1: pass --n_images N")


def check_strength(strength: float, least: str = "") -> None:
    """ValueError for a strength outside [0, 1]; with `least`, what 0 would be, for 0 too."""
    if not 0 <= strength <= 1 or (least and strength == 0):
        wanted = f"more than 0 ({least}) and up to 1" if least else "0 (nothing is drawn anew) to 1 (everything)"
        raise ValueError(f"got strength {strength}, wanted {wanted}: pass --strength X")


@dataclass(frozen=True)
class InputImages:
    """uint8 images (N, C, H, W), the pixels of them that are hidden (N, H, W) bool, what they are called, and the
    conditions they have, rows in turn, or none."""

    image: Tensor
    hidden: Tensor
    names: tuple[str, ...]
    rows: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.image)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is seen of them."""
        seen = self.image.masked_fill(self.hidden.unsqueeze(1), 0)
        digest = hashlib.sha256(repr(tuple(seen.shape)).encode())
        for array in (seen, self.hidden):
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()


def load_input_images(
    files: tuple[str, ...], count: int, trained: TrainedSampler, condition_file: str | None = None
) -> InputImages:
    """The images of files, as training would have cut them, or `count` held-out ones; nothing is hidden.

    Their conditions are the rows of a file, in turn; without one, those that held-out items have.

    Held-out ones are drawn at random, always the same. FileNotFoundError, ValueError: a file cannot be used.
    """
    rows = tuple(read_rows(condition_file, trained.data))
    if files:
        images = torch.stack([preprocess(read_image(Path(name)), trained) for name in files])
        names = tuple(Path(name).name for name in files)
    else:
        source = ImageSource(trained.dataset("val"), trained.data)
        batches = list(images_in_order(source, 100, sorted(fixed_subset(len(source), count))))
        images = torch.cat([batch["image"] for batch in batches])
        indices = [i for batch in batches for i in batch["index"].tolist()]
        names = tuple(f"val_{i:06d}" for i in indices)
        if not rows and {*trained.sampler.conditions} - {"label"}:
            rows = tuple(trained.conditions_of(source[i], i) for i in indices)
    return InputImages(images, torch.zeros(len(images), *images.shape[2:], dtype=torch.bool), names, rows)


def read_image(path: Path) -> Image.Image:
    """An image file as it is decoded for training, of mode L, RGB or I;16; FileNotFoundError where there is none."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass image files as --image, a mask as --mask")
    return decode(path)


def preprocess(image: Image.Image, trained: TrainedSampler) -> Tensor:
    """uint8 (C, H, W) of the size that the sampler was trained on."""
    data = trained.data
    item = to_item({"image": image}, data.size, data.n_channels, range_for_image(image, data.data_range))
    return as_uint8(item["image"].as_subclass(Tensor))


def preprocess_mask(mask: Image.Image, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """bool (H, W), True where a mask of any size is white, cut as its image is."""
    from torchvision.transforms.v2 import functional as resizing

    nearest = {"interpolation": resizing.InterpolationMode.NEAREST}
    mask = resizing.resize(mask.convert("L"), [image.height, image.width], **nearest)
    mask = resizing.resize(mask, cover_size(image.height, image.width, size), **nearest)
    return resizing.to_image(resizing.center_crop(mask, [*size])).as_subclass(Tensor)[0] >= 128


def transparency_mask(path: Path) -> Image.Image | None:
    """A mask that is white where an image file is not opaque; None where it has no transparency."""
    try:
        with Image.open(path.expanduser()) as image:
            if not image.has_transparency_data:
                return None
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read ({error}): pass another file as --image") from error
    return alpha.point(lambda level: 0 if level == OPAQUE else 255)


def hide_masked(
    inputs: InputImages, files: tuple[str, ...], masks: tuple[str, ...], size: tuple[int, int]
) -> InputImages:
    """Hidden where masks are white, one for all files or one for each; without masks, where files are transparent.

    ValueError where there is neither, or the numbers do not fit.
    """
    if masks and not files:
        raise ValueError("got --mask without --image: name the images it belongs to, or pass --hide")
    if masks and len(masks) not in (1, len(files)):
        raise ValueError(f"got {len(masks)} masks for {len(files)} images, wanted one, or one for each: see --mask")
    drawn = [to_grey_or_rgb(read_image(Path(name))) for name in masks] or [
        transparency_mask(Path(name)) for name in files
    ]
    drawn = drawn * len(files) if len(drawn) == 1 else drawn
    missing = [name for name, mask in zip(files, drawn, strict=True) if mask is None]
    if missing:
        raise ValueError(f"{missing[0]} is opaque everywhere: say what to fill in by --mask, --hide or --outpaint")
    hidden = [preprocess_mask(mask, read_image(Path(name)), size) for name, mask in zip(files, drawn, strict=True)]
    return dataclasses.replace(inputs, hidden=inputs.hidden | torch.stack(hidden))


def hide_part(inputs: InputImages, part: str) -> InputImages:
    """Half of each image hidden, or the middle: half its height and width."""
    H, W = inputs.hidden.shape[1:]
    places = {
        "left": (slice(None), slice(0, W // 2)),
        "right": (slice(None), slice(W // 2, W)),
        "top": (slice(0, H // 2), slice(None)),
        "bottom": (slice(H // 2, H), slice(None)),
        "centre": (slice(H // 4, H - H // 4), slice(W // 4, W - W // 4)),
    }
    hidden = inputs.hidden.clone()
    hidden[(slice(None), *places[part])] = True
    return dataclasses.replace(inputs, hidden=hidden)


def add_margins(inputs: InputImages, margins: tuple[int, int, int, int]) -> InputImages:
    """Larger canvases with the images on them: so many hidden pixels more at the top, right, bottom and left."""
    top, right, bottom, left = margins
    around = (left, right, top, bottom)
    image, hidden = F.pad(inputs.image, around), F.pad(inputs.hidden, around, value=True)
    return dataclasses.replace(inputs, image=image, hidden=hidden)


def centring_margins(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The margins, in places, that put a grid into the middle of a larger one; ValueError where it is not larger."""
    (h, w), (H, W) = grid, shape
    if H < h or W < w:
        raise ValueError(f"got shape {shape}, wanted one that holds the image, {grid}: pass a larger --shape")
    return (H - h) // 2, W - w - (W - w) // 2, H - h - (H - h) // 2, (W - w) // 2


def conditions_for(
    trained: TrainedSampler, inputs: InputImages, images: list[int], labels: list[int] | None, options: SamplingConfig
) -> tuple[Batch | None, SamplingConfig]:
    """The conditions of images drawn from the given ones of these numbers, and options that go with them.

    The label is the one asked for, else that of the given image's row, else null. Where there are no conditions at
    all, nothing guides. ValueError for a class that there is not, and where a condition is missing.
    """
    fields, rows = trained.sampler.conditions, inputs.rows
    source = ConditionSource(fields, trained.sampler.n_classes).with_rows(rows)
    chosen = [dict(rows[image % len(rows)]) if rows else {} for image in images]
    if labels is not None:
        check_labels(labels, trained.sampler.n_classes)
        chosen = [{**row, "label": label} for row, label in zip(chosen, labels, strict=True)]
    elif not any(chosen) and {*fields} <= {"label"}:
        return None, dataclasses.replace(options, guidance=1.0)
    elif "label" in fields:
        chosen = [{"label": None, **row} for row in chosen]
    return source.with_rows(chosen).draw(0, range(len(chosen))), options


def check_labels(labels: list[int], n_classes: int) -> None:
    """ValueError for a class that there is not."""
    if wrong := [label for label in labels if not 0 <= label < n_classes]:
        there = f"wanted 0 to {n_classes - 1}" if n_classes else "but the sampler has no classes: leave it out"
        raise ValueError(f"got --label {wrong[0]}, {there}")


def draw(
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    edit: EditInput,
    indices: list[int],
    conditions: Batch | None,
    *,
    shape: tuple[int, int] | None = None,
    window_stride: int | None = None,
) -> Tensor:
    """uint8 images (B, C, H, W) drawn from where they start: images of one index get the same noise."""
    how = {"edit": edit, "shape": shape, "window_stride": window_stride}
    return trained.draw(indices, seed, options, conditions, **how)["image"]


def generate_in_batches(name: str, count: int, make: MakeImages, batches: ResumableBatches) -> Tensor | None:
    """What `make` makes of 0 ... count - 1, in batches that all ranks share and that are kept until the results are
    written: uint8 (count, C, H, W) on the main rank, None on others."""

    def made(places: list[int]) -> dict[str, Tensor]:
        return {"image": make(places)}

    is_main = batches.world.is_main
    images = [batch["image"] for batch in progress(batches.resume(name, range(count), made), count, name, is_main)]
    return torch.cat(images) if is_main else None


def redraw_input(x0: Tensor, trained: TrainedSampler, strength: float) -> EditInput:
    """Nothing is kept for certain; `strength` of it is forgotten."""
    grid = x0.shape[-2:]
    return EditInput(x0, torch.zeros(len(x0), *grid, dtype=torch.bool, device=trained.device), strength)


def encode_images(images: Tensor, trained: TrainedSampler) -> Tensor:
    """Images (B, C, H, W) uint8 in the sampler's space."""
    images = images.to(trained.device)
    return trained.space.begun(images, torch.zeros_like(images[:, 0], dtype=torch.bool)).x0


def save_result_images(
    folder: Path, names: tuple[str, ...], images: Tensor, columns: list[str], settings: dict[str, Any]
) -> None:
    """images/<number>_<name>_<column>.png of images (N, columns, C, H, W), each with its settings."""
    for i, (name, row) in enumerate(zip(names, images, strict=True)):
        for column, image in zip(columns, row, strict=True):
            path = folder / "images" / f"{i:03d}_{Path(name).stem}_{column}.png"
            save_with_settings(path, image, settings | {"of": name, "column": column})


def save_comparison_grid(path: Path, *parts: Tensor) -> None:
    """A grid with a row for each of the first images: parts (N, C, H, W), or (N, columns, C, H, W), side by side."""
    wide = [part if part.ndim == 5 else part.unsqueeze(1) for part in parts]
    rows = torch.cat([part[:ROWS] for part in wide], 1)
    save_grid(path, rows.flatten(0, 1), columns=rows.shape[1])


def mean_abs_difference(a: Tensor, b: Tensor) -> float:
    """The mean absolute difference of uint8 images, as a share of the range."""
    return (a.float() - b.float()).abs().mean().item() / 255
