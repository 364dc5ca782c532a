"""Spaces that learned samplers work in: pixels, or codes or latents of a first stage, with maps from and to images."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from train.config import DataConfig
from train.data.captions import choose_captions
from train.data.code_file import CodeTable
from train.data.codes import TrainingCodes
from train.data.collate import collate
from train.data.hints import HintedCodes, is_cacheable
from train.data.loading import Adapt, BatchSource, ImageSource, TrainingImages, merge_fields
from train.data.transforms import from_unit_range, to_float, to_uint8
from train.datasets import Dataset
from train.distributed import DistContext
from train.first_stage import FirstStage, VQGANStage
from train.loop import Batch


class EditInput(NamedTuple):
    """Known data to start sampling from, in the sampler's space: codes (B, h, w) or x (B, C, H, W)."""

    x0: Tensor
    keep: Tensor  # (B, h, w) bool: positions that never change
    strength: float = 1.0  # fraction in [0, 1] of the other codes that is masked first, or of noise in x_t


class Space(Protocol):
    """`model_args` are arguments of a sampler's `build`; `provenance` is what a run records of its space."""

    first_stage: FirstStage | None
    tokens: int  # codes per image; 0 if not a space of codes

    @property
    def description(self) -> str:
        """What a point of the space is, such as "8x8 codes of 512"."""
        ...

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels per side of one grid position."""
        ...

    @property
    def model_args(self) -> dict[str, Any]: ...

    @property
    def provenance(self) -> dict[str, Any]: ...

    def source(
        self,
        images: Dataset,
        split: str,
        data: DataConfig,
        seed: int,
        world: DistContext,
        adapt: Adapt | None,
        balance: float = 0.0,
    ) -> BatchSource:
        """Returns the training batches of a split, with rare classes more often if `balance` is not 0."""
        ...

    def workers(self, data: DataConfig) -> int:
        """Returns the number of worker processes that load the batches of `source`."""
        ...

    def encode_batch(self, batch: Batch, seed: int = 0) -> Batch:
        """Adds what the sampler is trained on to a batch: "codes" or "x0". What is random depends on seed and position
        of an example alone."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Decodes samples to uint8 images (B, C, H, W)."""
        ...

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """Returns what to save of samples besides their images, by name."""
        ...

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images of a solver's current x and of its prediction."""
        ...

    def encode_masked(self, images: Tensor, mask: Tensor) -> EditInput:
        """Encodes uint8 images (B, C, H, W) to sample what `mask` (B, H, W) bool covers; True is masked.

        A grid position is known only if none of its pixels is masked. Masked pixels do not affect the result.
        """
        ...

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """Interpolates between a and b (B, ...): a at weight 0, b at weight 1."""
        ...


def fill_masked(images: Tensor, mask: Tensor) -> Tensor:
    """Fills the masked pixels (`mask` (B, H, W) bool) of uint8 images (B, C, H, W) with the nearest visible pixel's
    value.

    An image without visible pixels becomes 128. The receptive field of an encoder is large: of the visible codes of
    half-masked digits, this fill leaves 63 % unchanged, a blurred continuation 59 %, the mean of the visible pixels
    51 %, black 48 %.
    """
    from scipy.ndimage import distance_transform_edt

    filled = images.clone()
    for image, image_mask in zip(filled, mask.cpu(), strict=True):
        if image_mask.all():
            image.fill_(128)
        elif image_mask.any():
            nearest = distance_transform_edt(image_mask.numpy(), return_distances=False, return_indices=True)
            rows, columns = torch.from_numpy(nearest).long().to(images.device)  # (H, W) each
            image.copy_(image[:, rows, columns])
    return filled


def any_in_cells(mask: Tensor, factor: int) -> Tensor:
    """Downsamples a mask (B, H, W) bool to (B, H / factor, W / factor): whether any pixel of a cell is masked.

    ValueError if H or W is not a multiple of the factor.
    """
    B, H, W = mask.shape
    if H % factor or W % factor:
        raise ValueError(f"got a mask of {H}x{W} pixels, wanted multiples of {factor}")
    return mask.view(B, H // factor, factor, W // factor, factor).any(4).any(2)


def encoding_batch(data: DataConfig) -> int:
    """Returns how many images are encoded into a cache at once: about 16 MB of floats."""
    return max(1, 2**22 // math.prod(data.shape))


class ContinuousSpace:
    """Base class of pixels and latents, whose training batches are images."""

    tokens = 0

    def source(
        self,
        images: Dataset,
        split: str,
        data: DataConfig,
        seed: int,
        world: DistContext,
        adapt: Adapt | None,
        balance: float = 0.0,
    ) -> TrainingImages:
        if split == "val":
            data = data.without_augmentation
        source = ImageSource(images, data, margin=data.crop_margin)
        return TrainingImages(source, seed, adapt, balance, first_caption=split == "val")

    def workers(self, data: DataConfig) -> int:
        return data.num_workers

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(x), self.decode(predicted)

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """Interpolates linearly (Ho et al. 2020, section 4.5)."""
        return torch.lerp(a, b, weight)


@dataclass(frozen=True)
class PixelSpace(ContinuousSpace):
    """Images in [-1, 1] (B, C, H, W)."""

    data: DataConfig
    first_stage: None = None
    factor = 1

    @property
    def description(self) -> str:
        channels, height, width = self.data.shape
        return f"{height}x{width}x{channels} pixels"

    @property
    def model_args(self) -> dict[str, Any]:
        return {"shape": self.data.shape, "pixels": True}

    @property
    def provenance(self) -> dict[str, Any]:
        return {}

    def encode_batch(self, batch: Batch, seed: int = 0) -> Batch:
        return batch | {"x0": batch["image"]}

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """Returns {"values": (B, C, H, W)} in the data's units if they have a --data_range, else {}."""
        return {} if self.data.data_range is None else {"values": from_unit_range(x, self.data.data_range).cpu()}

    def encode_masked(self, images: Tensor, mask: Tensor) -> EditInput:
        return EditInput(to_float(images.masked_fill(mask.unsqueeze(1), 128)), ~mask)


class TrainingLatents:
    """Latents of training images, in the order and the views of `images`, which are not read."""

    def __init__(self, images: TrainingImages, table: CodeTable, labels: np.ndarray | None):
        self.images, self.table = images, table
        self.labels = None if labels is None else torch.from_numpy(labels)[table.index]
        self.rows = {image: row for row, image in enumerate(table.index.tolist())}

    def __len__(self) -> int:
        return len(self.images)

    def item_index(self, position: int) -> int:
        """Returns the index in the data set of the image at a position, or of the next readable one."""
        candidates = self.images.candidates(self.images.order[position])
        return next(image for image in candidates if image in self.rows)

    def view_index(self, position: int) -> int:
        """Returns the view, of all training views, of the image at a position."""
        return self.images.view_index(position)

    def __getitem__(self, positions: list[int]) -> Batch:
        views = [self.view_index(each) for each in positions]
        rows = [self.rows[self.item_index(each)] for each in positions]
        batch: Batch = {"latents": self.table.ids[torch.tensor(views), torch.tensor(rows)]}
        batch["position"] = torch.tensor(positions)
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        if self.table.annotations is None:
            return batch
        items = [self.table.annotations[key] for key in zip(views, rows, strict=True)]
        return merge_fields(collate(choose_captions(items, self.images.caption_seed, positions)), batch)


@dataclass(frozen=True)
class LatentSpace(ContinuousSpace):
    """Latents of an autoencoder, of about unit variance: (z - shift) * scale, (B, D, h, w); a VQGAN's unquantized."""

    first_stage: FirstStage
    scale: float
    size: tuple[int, int]  # of the images
    shift: float = 0.0
    cached: bool = False  # whether training reads latents from a file
    sampled: bool = False  # whether training draws latents from their distribution, rather than takes its mean

    @property
    def description(self) -> str:
        channels, height, width = self.model_args["shape"]
        return f"{height}x{width}x{channels} latents"

    @property
    def factor(self) -> int:
        return self.first_stage.factor

    @property
    def model_args(self) -> dict[str, Any]:
        return {"shape": self.first_stage.latent_shape(self.size), "pixels": False}

    @property
    def provenance(self) -> dict[str, Any]:
        shift = {"latent_shift": self.shift} if self.shift else {}
        return self.first_stage.provenance | {"latent_scale": self.scale} | shift

    def source(
        self,
        images: Dataset,
        split: str,
        data: DataConfig,
        seed: int,
        world: DistContext,
        adapt: Adapt | None,
        balance: float = 0.0,
    ) -> BatchSource:
        """Returns the training images, or their latents from the cache or newly encoded."""
        if not self.cached:
            return super().source(images, split, data, seed, world, adapt, balance)
        if not (adapt is None or is_cacheable(adapt)):
            got = "got --cache_latents and --adapt, or --image_input inpainting"
            raise ValueError(f"{got}, which changes images anew each time: leave one out")
        kind = {"moments" if self.sampled else "latents": True}
        table = self.first_stage.encode_dataset(images, split, data, encoding_batch(data), world, **kind)
        unread = replace(data, cache_images=False, in_memory=False)
        ordered = super().source(images, split, unread, seed, world, None, balance)
        latents = TrainingLatents(ordered, table, images.labels if images.n_classes else None)
        return latents if adapt is None else HintedCodes.of(latents, images, split, data, adapt)

    def workers(self, data: DataConfig) -> int:
        return 0 if self.cached else data.num_workers

    def encode_batch(self, batch: Batch, seed: int = 0) -> Batch:
        encode = self.first_stage.encode_moments if self.sampled else self.first_stage.encode_latents
        latents = batch["latents"] if "latents" in batch else encode(batch["image"])
        if self.sampled:
            mean, std = latents.chunk(2, dim=1)
            streams = Streams([seed_of(seed, "latents", k) for k in batch["position"].tolist()], latents.device)
            latents = torch.addcmul(mean, std, streams.normal(mean.shape))
        return batch | {"x0": self.normalize(latents)}

    def normalize(self, latents: Tensor) -> Tensor:
        """Shifts and scales latents (B, D, h, w)."""
        return (latents - self.shift) * self.scale if self.shift else latents * self.scale

    def denormalize(self, x: Tensor) -> Tensor:
        """Inverts `normalize`."""
        return x / self.scale + self.shift if self.shift else x / self.scale

    def decode(self, x: Tensor) -> Tensor:
        return self.first_stage.decode_latents(self.denormalize(x))

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the values of the images in the data's units, if they have a --data_range."""
        return self.first_stage.latent_values(self.denormalize(x))

    def encode_masked(self, images: Tensor, mask: Tensor) -> EditInput:
        x0 = self.normalize(self.first_stage.encode_latents(to_float(fill_masked(images, mask))))
        return EditInput(x0, ~any_in_cells(mask, self.factor).to(x0.device))


@dataclass(frozen=True)
class CodeSpace:
    """A VQGAN's code ids (B, h, w)."""

    first_stage: VQGANStage

    @property
    def description(self) -> str:
        height, width = self.first_stage.vqgan.grid
        return f"{height}x{width} codes of {self.first_stage.vqgan.quantizer.codebook_size:,}"

    @property
    def factor(self) -> int:
        return self.first_stage.vqgan.config.factor

    @property
    def tokens(self) -> int:
        return math.prod(self.first_stage.vqgan.grid)

    @property
    def model_args(self) -> dict[str, Any]:
        return {"codes": self.first_stage.vqgan.quantizer.codebook_size, "grid": self.first_stage.vqgan.grid}

    @property
    def provenance(self) -> dict[str, Any]:
        return self.first_stage.provenance

    def source(
        self,
        images: Dataset,
        split: str,
        data: DataConfig,
        seed: int,
        world: DistContext,
        adapt: Adapt | None = None,
        balance: float = 0.0,
    ) -> BatchSource:
        """Returns the shuffled codes of a split, from the cache or newly encoded."""
        if not (adapt is None or is_cacheable(adapt)):
            raise ValueError("got --adapt for codes, which are cached: leave it out")
        table = self.first_stage.encode_dataset(images, split, data, encoding_batch(data), world)
        labels = None if images.n_classes == 0 else torch.from_numpy(images.labels)[table.index]
        first = split == "val"
        codes = TrainingCodes(
            table.ids, labels, seed, table.annotations, balance, first_caption=first, index=table.index
        )
        return codes if adapt is None else HintedCodes.of(codes, images, split, data, adapt)

    def workers(self, data: DataConfig) -> int:
        return 0  # codes need no loading

    def encode_batch(self, batch: Batch, seed: int = 0) -> Batch:
        return batch

    def decode(self, x: Tensor) -> Tensor:
        return self.first_stage.decode(x)

    def encode_masked(self, images: Tensor, mask: Tensor) -> EditInput:
        x0 = self.first_stage.encode(fill_masked(images, mask))
        return EditInput(x0, ~any_in_cells(mask, self.factor).to(x0.device))

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """Takes each code from a or b at random; with the same `rng`, codes taken from b stay as the weight grows."""
        return torch.where(rng.uniform(a.shape) < weight, b, a)

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        return {"codes": x.cpu()} | self.first_stage.decode_values(x)

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Space`, with masked codes as grey squares; `predicted` are logits."""
        masked = x == self.first_stage.vqgan.quantizer.codebook_size
        image = self.decode(torch.where(masked, predicted.argmax(-1), x))
        h, w = (pixels // codes for pixels, codes in zip(image.shape[2:], x.shape[1:], strict=True))
        grey = masked.repeat_interleave(h, 1).repeat_interleave(w, 2).unsqueeze(1)
        return torch.where(grey, 128, image), image
