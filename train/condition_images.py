"""Condition images: random masks for the training of inpainting, and images as the `image` condition reads them."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditions.image import MASK, ImageEncoder, white_pixels
from train.config import SamplerConfig
from train.data.loading import Adapt, apply_adapt
from train.data.transforms import grey_to_rgb
from train.loop import Batch
from train.registry import import_callable
from train.samplers._conditions import options_of_conditions
from train.spaces import LatentSpace, Space

IMAGE = "condition_image"
WHOLE = 0.25  # of the random masks cover the image, as in the training of Stable Diffusion's inpainting models
MOST_BOXES = 4
SMALLEST, LARGEST = 0.1, 0.7  # sides of boxes, as fractions of the image's
WHITE = 255


def make_adapt(config: SamplerConfig) -> Adapt | None:
    """Returns the function from an item in its view to the fields of a batch: that of --adapt and, for an image
    condition of inpainting, random masks. None without both."""
    adapt = import_callable(config.adapt, "--adapt") if config.adapt else None
    inpaints = getattr(options_of_conditions(config), "image_input", None) == "inpainting"
    return with_random_masks(adapt) if inpaints else adapt


def with_random_masks(adapt: Adapt | None) -> Adapt:
    """Returns a function from items to items that applies `adapt` and adds the fields of inpainting, unless they are
    there: condition_image, the image itself, and mask_image, uint8 (1, H, W), white where it is to be painted.

    Masks come from Python's random generator, which is seeded for each position.
    """

    def add_mask(item: dict[str, Any]) -> dict[str, Any]:
        item = item if adapt is None else apply_adapt(adapt, item)
        mask = {} if MASK in item else {MASK: random_mask(*item["image"].shape[-2:])}
        return {IMAGE: item["image"]} | item | mask

    return add_mask


def random_mask(height: int, width: int) -> Tensor:
    """Draws a mask, uint8 (1, height, width): white in one to MOST_BOXES boxes or, with probability WHOLE, all over."""
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    if random.random() < WHOLE:
        return mask.fill_(WHITE)
    for _ in range(random.randint(1, MOST_BOXES)):
        h, w = (max(1, round(side * random.uniform(SMALLEST, LARGEST))) for side in (height, width))
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        mask[:, top : top + h, left : left + w] = WHITE
    return mask


def encode_condition_images(
    network: nn.Module, space: Space, batch: Batch | None, shape: tuple[int, int] | None = None
) -> Batch | None:
    """Returns a batch with its condition images (B, C, H, W), in [-1, 1], as the image condition reads them.

    These are pixels; or latents on a grid of `shape`, by default that of the training, unscaled (Brooks et al. 2023);
    or, for inpainting, scaled latents, or pixels, of the image in grey where the mask is white (Rombach et al. 2022).
    Latents are the mean of their distribution. ValueError for latents of other channels than the condition has.
    """
    if batch is None or batch.get(IMAGE) is None:
        return batch
    encoder = find_image_encoder(network)
    if encoder is None or encoder.reads == "pixels" or not {*encoder.fields} <= batch.keys():
        return batch
    latents = isinstance(space, LatentSpace)
    channels = space.first_stage.n_channels if latents else encoder.image_channels
    image = grey_to_rgb(batch[IMAGE]) if channels == 3 else batch[IMAGE]
    if image.shape[1] != channels:
        raise ValueError(f"got condition images of {image.shape[1]} channels, wanted {channels}: convert them")
    image = resize(image, tuple(side * space.factor for side in shape or space.model_args["shape"][1:]))
    if encoder.reads == "inpainting":
        image = image * (1 - white_pixels(batch[MASK], image.shape[2:]))
    if latents:
        encoded = space.first_stage.encode_latents(image)
        image = space.normalize(encoded) if encoder.reads == "inpainting" else encoded
    if image.shape[1] != encoder.image_channels:
        wanted = image.shape[1] + encoder.map_channels - encoder.image_channels
        got = f"got condition_channels {encoder.map_channels} for image_input {encoder.reads}"
        raise ValueError(f"{got}, wanted {wanted}: pass --condition_channels {wanted}")
    return batch | {IMAGE: image}


def find_image_encoder(network: nn.Module) -> ImageEncoder | None:
    """Returns the encoder of the image condition of a network; None if it has none."""
    return next((each for each in network.modules() if isinstance(each, ImageEncoder)), None)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes images (B, C, H, W) in [-1, 1] to `size` if they differ."""
    if image.shape[2:] == size:
        return image
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)
