"""First stages of other models: trained autoencoders that map images to codes or latents, and back.

`FirstStage` is the contract; a VQGAN is here, continuous autoencoders are in train/continuous_stage.py.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from train.checkpoint import EMA_WEIGHTS, checkpoint_path, load_weights, resolve_step, verify_checkpoint
from train.cli.files import run_folder
from train.cli.parse import from_dict
from train.config import DataConfig, LoggingConfig
from train.data import image_cache
from train.data.code_cache import code_cache_key, load_or_encode
from train.data.code_file import CHUNK_SIZE, CodeFile, CodeTable
from train.data.loading import ImageSource, sides_of
from train.data.transforms import from_unit_range, to_float, to_uint8, training_views
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.execution import autocast, convert_to_channels_last, has_amx, has_native_bf16
from train.runs import read_run
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig
from vq.tiles import Tiles, decode_tiled, encode_latents_tiled, encode_tiled

NARROWEST = 32  # channels at full resolution, from which channels-last format encodes faster on CPUs with AMX


@dataclass(frozen=True, kw_only=True)
class StoredVQGANConfig:
    """The part of a VQGAN run's config that later stages need."""

    data: DataConfig
    reader: DatasetConfig
    network: VQGANConfig


class FirstStage(Protocol):
    """A trained, frozen autoencoder. Latents are (B, D, h, w) float32, D `latent_channels`, h = H / `factor`."""

    run: Path
    step: int
    weights: str  # SHA-256 of the weights file
    device: torch.device
    tiles: Tiles | None  # in which it encodes and decodes larger images; None: in one piece

    @property
    def factor(self) -> int:
        """Pixels per side of one latent position, or of one code."""
        ...

    @property
    def n_channels(self) -> int:
        """Channels of its images."""
        ...

    @property
    def latent_scale(self) -> float | None:
        """The factor that diffusion multiplies shifted latents by; None: it is measured, for unit variance."""
        ...

    @property
    def latent_shift(self) -> float:
        """What is subtracted from latents first."""
        ...

    @property
    def has_codes(self) -> bool:
        """Whether latents are quantized; `encode` and `decode` then map images to codes, and back."""
        ...

    @property
    def is_stochastic(self) -> bool:
        """Whether latents of an image are a distribution, from which --latent_sampling sample draws."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """What a second-stage run records of its first stage, to find it and to check that it is unchanged."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Returns the shape of the latents of an image (H, W); ValueError for other sizes than it can encode."""
        ...

    def encode_latents(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W), uint8 or float in [-1, 1], to latents, or to their means."""
        ...

    def encode_moments(self, images: Tensor) -> Tensor:
        """Encodes images to the means and standard deviations of their latents (B, 2 D, h, w), if it is stochastic."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes latents, neither shifted nor scaled, to uint8 images (B, C, H, W)."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encodes and decodes images (B, C, H, W), uint8 or float in [-1, 1]; returns uint8 images."""
        ...

    def latent_values(self, latents: Tensor) -> dict[str, Tensor]:
        """Returns {"values": (B, C, H, W)} in the data's units if they have a --data_range, else {}."""
        ...

    def check_fits(self, data: DataConfig) -> None:
        """Raises ValueError if it cannot encode the images of `data`."""
        ...

    def encode_dataset(
        self,
        dataset: Dataset,
        split: str,
        data: DataConfig,
        batch_size: int,
        world: DistContext,
        latents: bool = False,
        moments: bool = False,
    ) -> CodeTable:
        """Returns the codes, or latents, or `moments` of a split in all views of `data`, from the cache or encoded by
        all ranks together."""
        ...


@dataclass(frozen=True)
class VQGANStage:
    """A trained, frozen VQGAN and the data configuration it was trained with: a `FirstStage` of codes."""

    run: Path
    vqgan: VQGAN
    data: DataConfig
    reader: DatasetConfig
    step: int
    weights: str  # SHA-256 of the weights file
    device: torch.device
    amp: bool
    code_cache: Path | None = None  # where codes are kept if the run is read-only
    channels_last: bool = False  # the memory format of the weights, which the layers take over
    tiles: Tiles | None = None

    latent_scale = None
    latent_shift = 0.0
    has_codes = True
    is_stochastic = False

    @property
    def factor(self) -> int:
        return self.vqgan.config.factor

    @property
    def n_channels(self) -> int:
        return self.data.n_channels

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return self.vqgan.quantizer.dim, *self.vqgan.config.grid(*size)

    @property
    def provenance(self) -> dict[str, Any]:
        """What a second-stage run records of its first stage, to find it and to check that it is unchanged."""
        return {"ae_weights": self.weights, "ae_load_dir": self.run.name, "ae_load_step": self.step}

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W), uint8 or float in [-1, 1], to ids (B, h, w) int64."""
        floats = images if images.is_floating_point() else to_float(images)
        with autocast(self.device, self.amp):
            if self.tiles is None:
                return self.vqgan.encode(floats.to(self.device))
            return encode_tiled(self.vqgan, floats, **self.tiles._asdict()).to(self.device)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Decodes ids (B, h, w) to uint8 images (B, C, H, W)."""
        return to_uint8(self.decode_floats(ids))

    @torch.no_grad()
    def decode_floats(self, ids: Tensor) -> Tensor:
        """Decodes ids (B, h, w) to float images (B, C, H, W) in about [-1, 1], not clipped."""
        with autocast(self.device, self.amp):
            if self.tiles is None:
                return self.vqgan.decode(ids.to(self.device)).contiguous()
            return decode_tiled(self.vqgan, ids, **self.tiles._asdict())

    def reconstruct(self, images: Tensor) -> Tensor:
        """As in `FirstStage`, by way of the codes."""
        return self.decode(self.encode(images))

    def decode_values(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns {"values": (B, C, H, W)} in the data's units if they have a --data_range, else {}."""
        if self.data.data_range is None:
            return {}
        return {"values": from_unit_range(self.decode_floats(ids), self.data.data_range).cpu()}

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W), uint8 or float in [-1, 1], to latents before quantization (B, D, h, w)
        float32."""
        floats = images if images.is_floating_point() else to_float(images)
        with autocast(self.device, self.amp):
            if self.tiles is None:
                return self.vqgan.latents(floats.to(self.device)).float().contiguous()
            latents = encode_latents_tiled(
                lambda part: self.vqgan.latents(part.to(self.device)), floats, self.factor, **self.tiles._asdict()
            )
            return latents.to(self.device)

    def encode_moments(self, images: Tensor) -> Tensor:
        raise ValueError(f"latents of the VQGAN in {self.run} are not random: pass --latent_sampling mode")

    def latent_values(self, latents: Tensor) -> dict[str, Tensor]:
        """As in `FirstStage`, decoded from the nearest codes."""
        return self.decode_values(self.vqgan.quantizer.assign(latents))

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Quantizes latents (B, D, h, w) to the nearest codes and decodes them to uint8 images (B, C, H, W)."""
        return self.decode(self.vqgan.quantizer.assign(latents.to(self.device)))

    def check_fits(self, data: DataConfig) -> None:
        """Raises ValueError if the images of `data` do not have the VQGAN's size, channels or range."""
        names = ("n_channels", "img_size", "img_width", "data_range")
        trained, requested = (*self.data.shape, self.data.data_range), (*data.shape, data.data_range)
        for name, wanted, got in zip(names, trained, requested, strict=True):
            if got != wanted:
                raise ValueError(
                    f"got {name} {got}, but the VQGAN in {self.run} was trained with {wanted}: leave --{name} out"
                )

    def encode_dataset(
        self,
        dataset: Dataset,
        split: str,
        data: DataConfig,
        batch_size: int,
        world: DistContext,
        latents: bool = False,
        moments: bool = False,
    ) -> CodeTable:
        quantizer, grid = self.vqgan.quantizer, self.vqgan.grid
        return encode_split(
            self.encode_latents if latents else self.encode,
            (dataset, split, data),
            batch_size,
            world,
            shape=(*((quantizer.dim,) if latents else ()), *grid),
            codebook_size=None if latents else quantizer.codebook_size,
            folder=self.run / "codes",
            fallback=self.code_cache,
            weights=self.weights,
            network=asdict(self.vqgan.config),
            amp=self.amp and has_native_bf16(self.device),
            channels_last=self.channels_last,
            **({"kind": "latents"} if latents else {}),
            **({"tiles": self.tiles[:2]} if self.tiles else {}),
        )


def encode_split(
    encode: Callable[[Tensor], Tensor],
    images: tuple[Dataset, str, DataConfig],
    batch_size: int,
    world: DistContext,
    *,
    shape: tuple[int, ...],
    codebook_size: int | None,
    folder: Path,
    fallback: Path | None,
    **key: Any,
) -> CodeTable:
    """Encodes a split of a data set, in all views of its config, or reads it from the cache in `folder`.

    `encode` maps images (B, C, H, W) to codes, or to latents without a `codebook_size`, of `shape` each; `key` is what
    they depend on besides the images.
    """
    dataset, split, data = images
    if split != "train":
        data = data.without_augmentation
    views, margin = training_views(data, sides_of(dataset)), data.crop_margin
    larger = data.n_channels, data.size[0] + margin, data.size[1] + margin
    key = code_cache_key(
        images=image_cache.image_cache_key(dataset, larger, data.data_range),
        views=[view.to_list() for view in views],
        chunk=CHUNK_SIZE,
        **key,
    )
    name, shape = f"{data.dataset}_{split}", (len(views), *shape)
    return load_or_encode(
        CodeFile(folder, name, key, len(dataset), shape, codebook_size, views=tuple(views), fallback=fallback),
        lambda: ImageSource(dataset, data, margin=margin),
        lambda images: torch.stack([encode(view(images)) for view in views], 1),
        batch_size,
        world,
    )


def find_vqgan_run(
    run: Path, content: dict[str, Any], logs_roots: Sequence[str], ae_load_dir: str | None = None
) -> Path:
    """Returns the folder of the first stage that the sampler in `run`, with this config.yaml, was trained on.

    It is the first that exists of the names recorded, or of `ae_load_dir`, in each of `logs_roots`.
    """
    origin, first = content.get("origin", {}), content.get("first", {})
    names = [ae_load_dir] if ae_load_dir else [origin.get("ae_load_dir"), first.get("ae_load_dir")]
    places = [(root, name) for name in names if name and isinstance(name, str) for root in logs_roots]
    if not places:
        raise ValueError(f"{run / 'config.yaml'} does not name its first stage: pass --ae_load_dir RUN")
    candidates = (run_folder(*place) for place in places)  # lazily: a later one may be ambiguous
    return next((path for path in candidates if (path / "config.yaml").is_file()), None) or run_folder(*places[0])


def suits_channels_last(device: torch.device, amp: bool, nf: int) -> bool:
    """Returns whether a frozen VQGAN of width `nf` is faster with its weights in channels-last format, by rule.

    It is 1.1 to 1.3 times as fast in float32 with AVX2, and 1.1 to 2.5 times in bfloat16 with AMX from a width of
    NARROWEST on; narrower ones take twice as long there.
    """
    return device.type in ("cpu", "cuda") and not (amp and has_amx(device) and nf < NARROWEST)


def load_vqgan_stage(
    run: Path,
    step: int | None,
    device: torch.device,
    amp: bool,
    *,
    ema: bool | None = None,
    logs_root: str = LoggingConfig.logs_root,
) -> VQGANStage:
    """Loads the VQGAN of a run: with its EMA weights if it has them, or as `ema` asks.

    Its weights are in channels-last format where that is faster. If the run is on a read-only disk, codes are kept in
    <logs_root>/.cache/codes.
    """
    content = read_run(run)
    groups = StoredVQGANConfig.__dataclass_fields__
    missing = [name for name in groups if name not in content]
    if missing:
        raise ValueError(f"{run} is not a VQGAN run (its config has no {', '.join(missing)}): pass --ae_load_dir")
    step = resolve_step(run, step, "--ae_load_step")
    config = from_dict(StoredVQGANConfig, {name: content[name] for name in groups}, str(run / "config.yaml"))
    vqgan = VQGAN(config.network, config.data.size, config.data.n_channels)
    ema = EMA_WEIGHTS in verify_checkpoint(checkpoint_path(run, step)) if ema is None else ema
    weights = load_weights(run, step, {"autoencoder": vqgan}, ema=ema)
    vqgan.to(device).eval().requires_grad_(False)
    channels_last = suits_channels_last(device, amp, config.network.nf)
    if channels_last:
        convert_to_channels_last(vqgan)
    code_cache = Path(os.path.expanduser(logs_root)) / ".cache" / "codes"
    return VQGANStage(run, vqgan, config.data, config.reader, step, weights, device, amp, code_cache, channels_last)
