"""Continuous first stages: AutoencoderKL and tiny autoencoders, whose runs hold a network and nothing to train it.

The config.yaml of such a run has a group `autoencoder`: its kind, one of KINDS, and the options of the network.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from train.checkpoint import WEIGHTS, CheckpointData, load_weights, prefixed_state_dicts, resolve_step, write_checkpoint
from train.config import DataConfig, LoggingConfig
from train.data.code_file import CodeTable
from train.data.transforms import to_float, to_uint8
from train.datasets import Dataset
from train.distributed import DistContext
from train.execution import autocast, convert_to_channels_last, has_native_bf16
from train.files import write_text
from train.first_stage import FirstStage, encode_split, load_vqgan_stage
from train.runs import read_run
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiles import Tiles, decode_latents_tiled, encode_latents_tiled
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

KINDS = {"kl": (AutoencoderKLConfig, AutoencoderKL), "tiny": (TinyAutoencoderConfig, TinyAutoencoder)}
GROUP = "autoencoder"  # of config.yaml, and the name of the network in the checkpoint


@dataclass(frozen=True)
class ContinuousStage:
    """A trained, frozen autoencoder with continuous latents, of images of any size that is a multiple of its factor."""

    run: Path
    network: AutoencoderKL | TinyAutoencoder
    step: int
    weights: str  # SHA-256 of the weights file
    device: torch.device
    amp: bool  # in half precision; but not in float16, in which some autoencoders overflow
    latent_cache: Path | None = None  # where latents are kept if the run is read-only
    tiles: Tiles | None = None

    has_codes = False

    @property
    def factor(self) -> int:
        return self.network.config.factor

    @property
    def n_channels(self) -> int:
        return self.network.config.in_channels

    @property
    def is_stochastic(self) -> bool:
        return isinstance(self.network, AutoencoderKL)

    @property
    def latent_scale(self) -> float | None:
        return self.network.config.scaling_factor if self.is_stochastic else None

    @property
    def latent_shift(self) -> float:
        return self.network.config.shift_factor if self.is_stochastic else 0.0

    @property
    def provenance(self) -> dict[str, Any]:
        return {"ae_weights": self.weights, "ae_load_dir": self.run.name, "ae_load_step": self.step}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        height, width = size
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"got images of {height}x{width} pixels, wanted multiples of {self.factor} for the autoencoder in "
                f"{self.run}: pass another --img_size"
            )
        return self.network.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode_latents(self, images: Tensor) -> Tensor:
        if self.is_stochastic:
            return self.encode_moments(images).chunk(2, dim=1)[0].contiguous()
        return self.apply_encoder(self.network.encode, images)

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        if not self.is_stochastic:
            raise ValueError(f"latents of the autoencoder in {self.run} are not random: pass --latent_sampling mode")

        def moments(x: Tensor) -> Tensor:
            posterior = self.network.posterior(x)
            return torch.cat([posterior.mean.float(), posterior.std.float()], 1)

        return self.apply_encoder(moments, images)

    def apply_encoder(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Applies `encode` to images (B, C, H, W) on the device, whole or in tiles: (B, n, h, w) float32."""
        x = images if images.is_floating_point() else to_float(images)
        with self.autocast():
            if self.tiles is None:
                return encode(x.to(self.device)).float().contiguous()
            tiled = encode_latents_tiled(
                lambda part: encode(part.to(self.device)), x, self.factor, **self.tiles._asdict()
            )
            return tiled.to(self.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        with self.autocast():
            if self.tiles is None:
                return to_uint8(self.network.decode(latents.to(self.device)).float().contiguous())
            tiled = decode_latents_tiled(
                lambda part: self.network.decode(part.to(self.device)), latents, self.factor, **self.tiles._asdict()
            )
            return to_uint8(tiled)

    def reconstruct(self, images: Tensor) -> Tensor:
        return self.decode_latents(self.encode_latents(images))

    def latent_values(self, latents: Tensor) -> dict[str, Tensor]:
        """Returns {}: `check_fits` refuses data with a --data_range."""
        return {}

    def autocast(self) -> torch.autocast:
        """Returns a context of bfloat16 if --amp and the device has it."""
        return autocast(self.device, self.amp and has_native_bf16(self.device), torch.bfloat16)

    def check_fits(self, data: DataConfig) -> None:
        if data.n_channels != self.n_channels:
            raise ValueError(
                f"got n_channels {data.n_channels}, but the autoencoder in {self.run} has {self.n_channels}: pass "
                f"--n_channels {self.n_channels}"
            )
        if data.data_range is not None:
            raise ValueError(f"got data_range {data.data_range}, wanted images of 8 bits for {self.run}: leave it out")
        self.latent_shape(data.size)

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
        if not (latents or moments):
            raise ValueError(f"the autoencoder in {self.run} has no codes: pass the run of a VQGAN as --ae_load_dir")
        channels, *grid = self.latent_shape(data.size)
        return encode_split(
            self.encode_moments if moments else self.encode_latents,
            (dataset, split, data),
            batch_size,
            world,
            shape=(2 * channels if moments else channels, *grid),
            codebook_size=None,
            folder=self.run / "codes",
            fallback=self.latent_cache,
            weights=self.weights,
            network=asdict(self.network.config),
            amp=self.amp and has_native_bf16(self.device),
            channels_last=True,
            kind="moments" if moments else "latents",
            **({"tiles": self.tiles[:2]} if self.tiles else {}),
        )


def save_autoencoder(run: Path, network: AutoencoderKL | TinyAutoencoder, origin: Mapping[str, Any]) -> Path:
    """Writes the run of a continuous autoencoder; returns the folder of its checkpoint.

    `origin` is what the run records of its source. ValueError if there is another run.
    """
    if (run / "config.yaml").exists():
        raise ValueError(f"{run} is there already: pass another --log_dir, or delete it")
    kind = next(name for name, (_, network_class) in KINDS.items() if type(network) is network_class)
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(network.config).items()
    }
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in prefixed_state_dicts({GROUP: network}).items()
    }
    path = write_checkpoint(run, CheckpointData(0, {WEIGHTS: tensors}, {"step": 0}))
    content = {GROUP: {"kind": kind} | options, "origin": dict(origin)}
    write_text(run / "config.yaml", yaml.safe_dump(content, sort_keys=False))
    return path


def read_autoencoder(content: Mapping[str, Any], source: Path) -> AutoencoderKL | TinyAutoencoder:
    """Builds the network of a config.yaml; ValueError if its group is damaged."""
    options = dict(content[GROUP])
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{source} has an autoencoder of kind {kind!r}, wanted one of {', '.join(KINDS)}")
    config_class, network_class = KINDS[kind]
    unknown = sorted(options.keys() - {field.name for field in dataclasses.fields(config_class)})
    if unknown:
        raise ValueError(f"{source} was written by another version, with unknown keys: {', '.join(unknown)}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    return network_class(config_class(**options))


def load_first_stage(
    run: Path, step: int | None, device: torch.device, amp: bool, *, logs_root: str = LoggingConfig.logs_root
) -> FirstStage:
    """Loads the first stage of a run: a VQGAN, or a continuous autoencoder. ValueError for other runs."""
    content = read_run(run)
    if GROUP not in content and "network" not in content:
        raise ValueError(f"{run} is not a VQGAN run, nor that of another autoencoder: pass --ae_load_dir")
    if GROUP not in content:
        return load_vqgan_stage(run, step, device, amp, logs_root=logs_root)
    network, step = read_autoencoder(content, run / "config.yaml"), resolve_step(run, step, "--ae_load_step")
    weights = load_weights(run, step, {GROUP: network}, ema=False)
    convert_to_channels_last(network.to(device).eval().requires_grad_(False))  # 2 to 3 times as fast on a CPU
    cache = Path(os.path.expanduser(logs_root)) / ".cache" / "codes"
    return ContinuousStage(run, network, step, weights, device, amp, cache)
