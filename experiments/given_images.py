"""The images that editing begins from, and which pixels of them are hidden."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as resizing

from train.data import ImageSource, fixed_subset, images_in_order
from train.generate import TrainedSampler
from train.images import DAMAGED, decode
from train.transforms import covering, to_item

OPAQUE = 255  # of an alpha channel: pixels that are less have lost what they were


@dataclass(frozen=True)
class Given:
    """uint8 images (N, C, H, W), the pixels of them that are hidden (N, H, W) bool, and what they are called."""

    image: Tensor
    hidden: Tensor
    names: tuple[str, ...]

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


def given_images(files: tuple[str, ...], count: int, trained: TrainedSampler) -> Given:
    """The images of files, as training would have cut them, or `count` held-out ones; nothing is hidden.

    Held-out ones are drawn at random, always the same. FileNotFoundError, ValueError: a file cannot be used.
    """
    if files:
        images = torch.stack([fitted(upright(Path(name)), trained) for name in files])
        names = tuple(Path(name).name for name in files)
    else:
        source = ImageSource(trained.dataset("val"), trained.data)
        batches = list(images_in_order(source, 100, sorted(fixed_subset(len(source), count))))
        images = torch.cat([batch["image"] for batch in batches])
        names = tuple(f"val_{i:06d}" for batch in batches for i in batch["index"].tolist())
    return Given(images, torch.zeros(len(images), *images.shape[2:], dtype=torch.bool), names)


def upright(path: Path) -> Image.Image:
    """An image file as it is decoded for training; FileNotFoundError where there is none."""
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: pass image files as --image, a mask as --mask")
    return decode(path)


def fitted(image: Image.Image, trained: TrainedSampler) -> Tensor:
    """uint8 (C, H, W) of the size that the sampler was trained on."""
    return to_item({"image": image}, trained.data.size, trained.data.n_channels)["image"].as_subclass(Tensor)


def fitted_mask(mask: Image.Image, image: Image.Image, size: tuple[int, int]) -> Tensor:
    """bool (H, W), True where a mask of any size is white, cut as its image is."""
    nearest = {"interpolation": InterpolationMode.NEAREST}
    mask = resizing.resize(mask.convert("L"), [image.height, image.width], **nearest)
    mask = resizing.resize(mask, covering(image.height, image.width, size), **nearest)
    return resizing.to_image(resizing.center_crop(mask, [*size])).as_subclass(Tensor)[0] >= 128


def transparent(path: Path) -> Image.Image | None:
    """A mask that is white where an image file is not opaque; None where it has no transparency."""
    try:
        with Image.open(path.expanduser()) as image:
            if not image.has_transparency_data:
                return None
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read ({error}): pass another file as --image") from error
    return alpha.point(lambda level: 0 if level == OPAQUE else 255)


def with_masks(given: Given, files: tuple[str, ...], masks: tuple[str, ...], size: tuple[int, int]) -> Given:
    """Hidden where masks are white, one for all files or one for each; without masks, where files are transparent.

    ValueError where there is neither, or the numbers do not fit.
    """
    if masks and not files:
        raise ValueError("got --mask without --image: name the images it belongs to, or pass --hide")
    if masks and len(masks) not in (1, len(files)):
        raise ValueError(f"got {len(masks)} masks for {len(files)} images, wanted one, or one for each: see --mask")
    drawn = [upright(Path(name)) for name in masks] or [transparent(Path(name)) for name in files]
    drawn = drawn * len(files) if len(drawn) == 1 else drawn
    missing = [name for name, mask in zip(files, drawn, strict=True) if mask is None]
    if missing:
        raise ValueError(f"{missing[0]} is opaque everywhere: say what to fill in by --mask, --hide or --outpaint")
    hidden = [fitted_mask(mask, upright(Path(name)), size) for name, mask in zip(files, drawn, strict=True)]
    return Given(given.image, given.hidden | torch.stack(hidden), given.names)


def with_part(given: Given, part: str) -> Given:
    """Half of each image hidden, or the middle: half its height and width."""
    H, W = given.hidden.shape[1:]
    places = {
        "left": (slice(None), slice(0, W // 2)),
        "right": (slice(None), slice(W // 2, W)),
        "top": (slice(0, H // 2), slice(None)),
        "bottom": (slice(H // 2, H), slice(None)),
        "centre": (slice(H // 4, H - H // 4), slice(W // 4, W - W // 4)),
    }
    hidden = given.hidden.clone()
    hidden[(slice(None), *places[part])] = True
    return Given(given.image, hidden, given.names)


def with_margins(given: Given, margins: tuple[int, int, int, int]) -> Given:
    """Larger canvases with the images on them: so many hidden pixels more at the top, right, bottom and left."""
    top, right, bottom, left = margins
    around = (left, right, top, bottom)
    image, hidden = F.pad(given.image, around), F.pad(given.hidden, around, value=True)
    return Given(image, hidden, given.names)


def centred(grid: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """The margins, in places, that put a grid into the middle of a larger one; ValueError where it is not larger."""
    (h, w), (H, W) = grid, shape
    if H < h or W < w:
        raise ValueError(f"got shape {shape}, wanted one that holds the image, {grid}: pass a larger --shape")
    return (H - h) // 2, W - w - (W - w) // 2, H - h - (H - h) // 2, (W - w) // 2
