"""What a learned sampler works in: pixels, or a VQGAN's codes or latents. Each turns images into it, and back."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffusion.rng import Streams
from train.cli.parse import from_dict
from train.config import DataConfig, SecondStageConfig
from train.data.loading import Adapt, BatchSource, ImageSource, TrainingCodes, TrainingImages
from train.data.transforms import from_unit_range, to_float, to_uint8
from train.datasets import Dataset
from train.distributed import DistContext
from train.first_stage import FirstStage, load_first_stage
from train.loop import Batch
from train.registry import load_plugin
from train.runs import read_provenance, run_folder

SCALE_IMAGES = 1024  # whose latents say how large latents are


class EditInput(NamedTuple):
    """Known data that sampling begins from, in the sampler's own space: codes (B, h, w), or x (B, C, H, W)."""

    x0: Tensor
    keep: Tensor  # (B, h, w) bool: places that never change
    strength: float = (
        1.0  # how much of the rest is forgotten first, 0 to 1: the share of codes masked, or of noise in x_t
    )


class Space(Protocol):
    """`model_args` is what a sampler's `build` takes, `origin` what a run notes of it to know it again."""

    first_stage: FirstStage | None
    tokens: int  # codes that an image is; 0 where it is none

    @property
    def factor(self) -> int:
        """Pixels along a side that one place of its grid stands for."""
        ...

    @property
    def model_args(self) -> dict[str, Any]: ...

    @property
    def provenance(self) -> dict[str, Any]: ...

    def source(
        self, images: Dataset, split: str, data: DataConfig, seed: int, world: DistContext, adapt: Adapt
    ) -> BatchSource:
        """Training batches of one split."""
        ...

    def workers(self, data: DataConfig) -> int:
        """Processes that load them."""
        ...

    def encode_batch(self, batch: Batch) -> Batch:
        """The batch with what the sampler learns: "codes" or "x0"."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """What the sampler draws -> uint8 images (B, C, H, W)."""
        ...

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """What of it is worth keeping beside its images."""
        ...

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Images of what a solver has on its way, and of what it predicts."""
        ...

    def encode_masked(self, images: Tensor, hidden: Tensor) -> EditInput:
        """uint8 images (B, C, H, W) of which pixels are hidden, (B, H, W) bool -> what sampling begins from.

        A place is known only if none of its pixels is hidden, and no hidden pixel has a part in it.
        """
        ...

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """What lies between two of its x, (B, ...) each: a where the share of b is 0, b where it is 1."""
        ...


def fill_hidden(images: Tensor, hidden: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) with each hidden pixel, `hidden` (B, H, W) bool, given the nearest visible one's value;
    128 where all are hidden.

    An encoder sees far: of the codes of half-hidden digits, this leaves 63 % as they are in the whole image; a blurred
    continuation 59 %, the mean of the visible pixels 51 %, black 48 %.
    """
    from scipy.ndimage import distance_transform_edt

    made = images.clone()
    for image, unseen in zip(made, hidden.cpu(), strict=True):
        if unseen.all():
            image.fill_(128)
        elif unseen.any():
            nearest = distance_transform_edt(unseen.numpy(), return_distances=False, return_indices=True)
            rows, columns = torch.from_numpy(nearest).long().to(images.device)  # (H, W) each
            image.copy_(image[:, rows, columns])
    return made


def any_in_cells(hidden: Tensor, factor: int) -> Tensor:
    """hidden (B, H, W) -> (B, H / factor, W / factor): whether any pixel of a cell is hidden.

    ValueError for sizes that are no multiples of the factor.
    """
    B, H, W = hidden.shape
    if H % factor or W % factor:
        raise ValueError(f"got a mask of {H}x{W} pixels, wanted multiples of {factor}")
    return hidden.view(B, H // factor, factor, W // factor, factor).any(4).any(2)


class ContinuousSpace:
    """What pixels and latents share: training batches are images."""

    tokens = 0

    def source(
        self, images: Dataset, split: str, data: DataConfig, seed: int, world: DistContext, adapt: Adapt
    ) -> TrainingImages:
        if split == "val":
            data = data.without_augmentation
        return TrainingImages(ImageSource(images, data, margin=data.crop_margin), seed, adapt)

    def workers(self, data: DataConfig) -> int:
        return data.num_workers

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(x), self.decode(predicted)

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """The straight line (Ho et al. 2020, section 4.5)."""
        return torch.lerp(a, b, weight)


@dataclass(frozen=True)
class PixelSpace(ContinuousSpace):
    """Images in [-1, 1] (B, C, H, W)."""

    data: DataConfig
    first_stage: None = None
    factor = 1

    @property
    def model_args(self) -> dict[str, Any]:
        return {"shape": self.data.shape, "pixels": True}

    @property
    def provenance(self) -> dict[str, Any]:
        return {}

    def encode_batch(self, batch: Batch) -> Batch:
        return batch | {"x0": batch["image"]}

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """{"values": (B, C, H, W)} in the units of data with a --data_range, which 8 bits do not hold; {} of others."""
        return {} if self.data.data_range is None else {"values": from_unit_range(x, self.data.data_range).cpu()}

    def encode_masked(self, images: Tensor, hidden: Tensor) -> EditInput:
        return EditInput(to_float(images.masked_fill(hidden.unsqueeze(1), 128)), ~hidden)


@dataclass(frozen=True)
class LatentSpace(ContinuousSpace):
    """What a VQGAN's quantizer is given, times `scale`, so that its variance is 1: (B, D, h, w)."""

    first_stage: FirstStage
    scale: float

    @property
    def factor(self) -> int:
        return self.first_stage.vqgan.config.factor

    @property
    def model_args(self) -> dict[str, Any]:
        vqgan = self.first_stage.vqgan
        return {"shape": (vqgan.quantizer.dim, *vqgan.grid), "pixels": False}

    @property
    def provenance(self) -> dict[str, Any]:
        return self.first_stage.provenance | {"latent_scale": self.scale}

    def encode_batch(self, batch: Batch) -> Batch:
        return batch | {"x0": self.first_stage.encode_latents(batch["image"]) * self.scale}

    def decode(self, x: Tensor) -> Tensor:
        return self.first_stage.decode_latents(x / self.scale)

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        """The values of its images, by way of the nearest codes."""
        return self.first_stage.decode_values(self.first_stage.vqgan.quantizer.assign(x / self.scale))

    def encode_masked(self, images: Tensor, hidden: Tensor) -> EditInput:
        x0 = self.first_stage.encode_latents(to_float(fill_hidden(images, hidden))) * self.scale
        return EditInput(x0, ~any_in_cells(hidden, self.factor).to(x0.device))


@dataclass(frozen=True)
class CodeSpace:
    """Ids of a VQGAN's codes (B, h, w)."""

    first_stage: FirstStage

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
        self, images: Dataset, split: str, data: DataConfig, seed: int, world: DistContext, adapt: Adapt = None
    ) -> TrainingCodes:
        """The shuffled codes, from the cache or encoded now."""
        batch_size = max(1, 2**22 // math.prod(data.shape))  # about 16 MB of float images at once
        table = self.first_stage.encode_dataset(images, split, data, batch_size, world)
        labels = None if images.n_classes == 0 else torch.from_numpy(images.labels)[table.index]
        return TrainingCodes(table.ids, labels, seed, table.annotations)

    def workers(self, data: DataConfig) -> int:
        return 0  # codes need no decoding

    def encode_batch(self, batch: Batch) -> Batch:
        return batch

    def decode(self, x: Tensor) -> Tensor:
        return self.first_stage.decode(x)

    def encode_masked(self, images: Tensor, hidden: Tensor) -> EditInput:
        x0 = self.first_stage.encode(fill_hidden(images, hidden))
        return EditInput(x0, ~any_in_cells(hidden, self.factor).to(x0.device))

    def interpolate(self, a: Tensor, b: Tensor, weight: float, rng: Streams) -> Tensor:
        """Each place takes the code of one of them; for the same `rng`, what is b's stays so as the share grows."""
        return torch.where(rng.uniform(a.shape) < weight, b, a)

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        return {"codes": x.cpu()} | self.first_stage.decode_values(x)

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """Codes that are still masked become grey squares; `predicted` is logits."""
        masked = x == self.first_stage.vqgan.quantizer.codebook_size
        image = self.decode(torch.where(masked, predicted.argmax(-1), x))
        h, w = (size // places for size, places in zip(image.shape[2:], x.shape[1:], strict=True))
        grey = masked.repeat_interleave(h, 1).repeat_interleave(w, 2).unsqueeze(1)
        return torch.where(grey, 128, image), image


def open_space(config: SecondStageConfig, run_provenance: dict[str, Any], images: Dataset, world: DistContext) -> Space:
    """The space that a training script's config asks for.

    The scale of latents is what an earlier start of the run noted, or the run that --load_dir names; else it is
    measured on `images`.
    """
    of_codes = load_plugin("train.samplers", config.sampler.sampler, "sampler").SPACE == "codes"
    name = config.first.ae_load_dir or (f"vqgan_{config.data.dataset}" if of_codes else None)
    if name is None:
        return PixelSpace(config.data)
    run = run_folder(config.logging.logs_root, name)
    first = load_first_stage(run, config.first.ae_load_step, world.device, config.training.amp)
    first.check_fits(config.data)
    if of_codes:
        return CodeSpace(first)
    start = config.training.load_dir  # weights that go on know latents of their scale
    started = read_provenance(run_folder(config.logging.logs_root, start)) if start else {}
    noted = run_provenance.get("latent_scale") or started.get("latent_scale") or 0.0
    noted = world.sum(torch.tensor(noted if world.is_main else 0.0, dtype=torch.float32, device=world.device)).item()
    source = ImageSource(images, config.data, margin=config.data.crop_margin)
    return LatentSpace(first, noted or measure_latent_scale(first, source, world))


@dataclass(frozen=True, kw_only=True)
class PixelsRun:
    """The part of a run's config that says what its pixels are."""

    data: DataConfig


def reopen_space(content: dict[str, Any], first: FirstStage | None) -> Space:
    """The space that a run was trained in, from its config.yaml and the VQGAN that it names, or None for pixels."""
    if first is None:
        return PixelSpace(from_dict(PixelsRun, {"data": content.get("data", {})}, "the run's config.yaml").data)
    scale = content.get("origin", {}).get("latent_scale")
    return CodeSpace(first) if scale is None else LatentSpace(first, scale)


def measure_latent_scale(first: FirstStage, source: ImageSource, world: DistContext) -> float:
    """1 / the deviation of latents, over numbers and images alike (Rombach et al. 2022, appendix G)."""
    latents = []
    images = TrainingImages(source, seed=0)
    for part in torch.arange(min(len(source), SCALE_IMAGES)).split(32):  # already shuffled
        latents.append(first.encode_latents(images[part.tolist()]["image"]).cpu())
    deviation = torch.cat(latents).std()
    if not 0 < deviation < float("inf"):
        raise ValueError(f"the latents of {first.run} deviate by {deviation:.3g}: is that VQGAN trained?")
    return float(world.mean((1 / deviation).to(first.device)))
