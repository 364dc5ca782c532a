"""Conversions of weights of other code to runs, one file for each layout that `convert.py --from` may name.

A file `train/conversions/<name>.py` defines the functions of `Layout`. What it knows of the names and shapes of tensors
is in train/converters.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import tyro

from models.ranges import NOT_NEGATIVE, check_ranges
from train.config import LoggingConfig, SecondStageConfig, VQGANRunConfig


class Layout(Protocol):
    """What a file of this folder defines. `argv` is the command line, which names weights."""

    def config_class(self, argv: list[str]) -> type:
        """Returns the class of the config for the kind of network of the weights; it has a field `conversion`."""
        ...

    def flags_from_weights(self, argv: list[str], section: str) -> dict[str, Any]:
        """Returns the flags that follow from the weights and their JSON, which typed flags override; ValueError for
        flags that must be typed. `section` is the section of the config file."""
        ...

    def make_runs(self, config: Any) -> None:
        """Converts the weights of a config of `config_class` to runs and prints their paths."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """What to convert. The weights and their JSON set the flags of network, process and data; typed flags win."""

    source: Annotated[str, tyro.conf.arg(name="from")] = "guided"
    """Layout of the weights, a file of train/conversions. guided: the UNet of improved-diffusion and guided-diffusion;
    unleashing: the VQGAN of unleashing-transformers, then its samplers (pass --bert_n_head if it is not 8); sd: Stable
    Diffusion 1 and 2, their autoencoders and control branches, and TAESD's."""
    weights: str | None = None
    """File of weights (.pt or .th; sd: .safetensors or .ckpt, or a folder of diffusers), read without running code. Of
    NAME_<step>.th and NAME_ema_<step>.th in one folder, either stands for both."""
    variant: str | None = None
    """sd: variant of the files of a folder, such as fp16; default: those without one, or the only one."""
    from_averages: bool = True
    """sd: take the averaged weights of a single file that has them."""
    config_json: str | None = None
    """guided: JSON file of the training flags, or of the arguments of UNetModel."""
    new_attention_order: bool = False
    """guided: attention splits q, k, v before heads (use_new_attention_order in the JSON)."""
    step: int | None = None
    """Training step of the checkpoint; None: the step in the name of a .th file, else 0."""

    EVERYDAY = ("source", "weights", "config_json", "step")
    RANGES = {"step": NOT_NEGATIVE}

    def __post_init__(self):
        check_ranges(self)

    @property
    def checkpoint_step(self) -> int:
        """`step`, else the step in the name of a .th file, else 0."""
        match = re.search(r"_(\d+)\.th$", self.weights)
        return self.step if self.step is not None else int(match[1]) if match else 0


@dataclass(frozen=True, kw_only=True)
class SamplerConversion(SecondStageConfig):
    """Convert weights trained by other code to a run like those of train_sampler.py."""

    EXAMPLES = (
        "python convert.py --from guided --weights unet.pt --config_json unet.json",
        "python convert.py --from unleashing --weights vqgan_ema_2200000.th --dataset churches --img_size 256",
    )
    NOT_EVERYDAY = ("sampler", "reader", "training", "sampling", "num_workers")

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class VQGANConversion(VQGANRunConfig):
    """Convert a VQGAN trained by other code to a run like those of train_vqgan.py."""

    EXAMPLES = (
        "python convert.py --from unleashing --weights vqgan_2200000.th --dataset churches --img_size 256",
        "python convert.py --from unleashing --weights absorbing_2000000.th --dataset churches",
    )
    NOT_EVERYDAY = ("network", "loss", "reader", "training", "num_workers")

    conversion: ConversionConfig


@dataclass(frozen=True, kw_only=True)
class NetworkConversion:
    """Convert a continuous autoencoder to a run that --ae_load_dir may name, or a control branch to a file."""

    EXAMPLES = (
        "python convert.py --from sd --weights taesd_encoder.pth --log_dir taesd",
        "python convert.py --from sd --weights control_v11p_sd15_canny.safetensors --log_dir canny",
    )

    conversion: ConversionConfig
    logging: LoggingConfig
