"""Runs from files of Stable Diffusion: the flags of a sampler, and the networks with their weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.control import ControlBranch
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.unet import UNet
from train.control_file import ControlOrigin, build_control
from train.converters.sd.autoencoder import autoencoder_weights, infer_autoencoder, with_new_names
from train.converters.sd.control import control_weights, infer_control
from train.converters.sd.files import Source, dtype_name
from train.converters.sd.geodiffusion import check_places, generation_settings
from train.converters.sd.metadata import set_nulls
from train.converters.sd.names import Weight, from_layout
from train.converters.sd.scheduler import prediction_hint, process_settings, sampling_settings
from train.converters.sd.text import TextTensors, infer_text, split_text, text_weights
from train.converters.sd.tokenizer import read_added_words
from train.converters.sd.unet import infer_unet, unet_weights
from train.samplers import LearnedSampler
from train.spaces import Space
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

SD_PROCESS = {
    **{"process": "gaussian", "total_steps": 1000, "schedule": "scaled_linear", "first_beta": 0.00085},
    **{"last_beta": 0.012, "variance": "fixed_small"},
}
SD_SAMPLING = {
    **{"solver": "ddim", "spacing": "whole_leading", "steps_offset": 1, "last_state": "first", "clip": False},
    **{"sample_steps": 50, "guidance": 7.5, "guidance_rescale_of": "output"},
}
IMAGE_FLAGS = {  # by the number of channels beside the latents: InstructPix2Pix, and inpainting, which never drops them
    4: {"image_input": "latents", "image_guidance": 1.5},
    5: {"image_input": "inpainting", "image_guidance": 1.0},
}
SIZE = 512  # pixels, unless a folder says something else
LATENT_CHANNELS = 4
VERSION_2_WIDTH = 1024  # of text tokens, which version 2 pads with id 0
NOT_FLAGS = ("in_channels", "out_channels", "text_width", "conv_projections")  # of `infer_unet`


class Loaded(NamedTuple):
    """A network with the weights of a file, and its table."""

    network: nn.Module
    table: list[Weight]


def sampler_flags(source: Source, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of the sampler of a source; those in `typed` were given by the user and need not follow.

    ValueError for what does not follow from the files: heads, and whether the network predicts noise or velocity.
    """
    unet = infer_unet(source.parts["unet"], source.layout, source.configs.get("unet"))
    if not {"heads", "head_width"} & {*unet, *typed}:
        raise ValueError(f"attention heads do not follow from {source.path}: pass --heads N or --head_width N")
    scheduler = source.configs.get("scheduler")
    process = SD_PROCESS if scheduler is None else process_settings(scheduler)
    if "prediction" not in process and "prediction" not in typed:
        if unet["text_width"] != 768:  # version 1 predicts eps
            raise ValueError(
                f"whether the network predicts eps or v does not follow from {source.path}: pass --prediction v for "
                "2.0 and 2.1 at 768 pixels, eps for their base models at 512"
            )
        process = process | {"prediction": "eps"}
    size = (source.configs.get("unet") or {}).get("sample_size")
    extra = unet["in_channels"] - LATENT_CHANNELS
    if extra < 0 or unet["out_channels"] != LATENT_CHANNELS:
        got = f"got a UNet from {unet['in_channels']} to {unet['out_channels']} channels"
        raise ValueError(f"{got}, wanted {LATENT_CHANNELS} or more to {LATENT_CHANNELS}: it works on other latents")
    sampling = {} if scheduler is None else sampling_settings(scheduler)
    others = (*(["numbers"] if "numbers_preset" in unet else []), *(["image"] if extra else []))
    conditions = {"conditions": ("text", *others)} | ({"condition_channels": extra} if extra else {})
    images = IMAGE_FLAGS.get(extra, {})
    own = {name: value for name, value in unet.items() if name not in NOT_FLAGS}
    data = {"img_size": 8 * size if isinstance(size, int) else SIZE, "n_channels": 3}
    flags = {"class_conditional": False, "condition_drop": 0.1, "ema": False, "loss_type": "simple"}
    generation = source.configs.get("generation")
    data |= {} if generation is None else generation_settings(generation)
    return flags | own | conditions | process | SD_SAMPLING | images | sampling | data | text_flags(source)


def text_flags(source: Source) -> dict[str, Any]:
    """Returns the flags of the text condition; ValueError without a text encoder."""
    if "text" not in source.parts:
        raise ValueError(f"{source.path} has no text encoder, whose tokens its UNet reads: pass the whole model")
    text = split_text(source.parts["text"])
    width = infer_text(text, source.configs.get("text"))["width"]
    return {"text_null": "empty", "text_padding": "zero" if width == VERSION_2_WIDTH else "end"}


def load_unet(source: Source, unet: UNet) -> bool:
    """Fills a UNet, except for encoders that are not in its table, with the weights of a source; returns
    `conv_projections` of the table."""
    tensors = source.parts["unet"]
    conv_projections = infer_unet(tensors, source.layout, source.configs.get("unet"))["conv_projections"]
    table = unet_weights(unet, conv_projections)
    state = unet.state_dict()
    converted = from_layout(table, tensors, source.layout, {name: state[name].shape for name, *_ in table})
    own = {name: value for name, value in state.items() if name.startswith("encoders.")}
    unet.load_state_dict(own | converted)
    set_nulls(unet)
    return conv_projections


def load_autoencoder(source: Source) -> Loaded:
    """Returns the autoencoder of a source."""
    tensors = source.parts["autoencoder"]
    tensors = with_new_names(tensors) if source.layout == "folder" else tensors
    settings = infer_autoencoder(tensors, source.layout, source.configs.get("autoencoder"))
    network = AutoencoderKL(AutoencoderKLConfig(**settings))
    return fill(network, autoencoder_weights(network), tensors, source.layout)


def load_text(source: Source) -> tuple[TextEncoder, list[Weight], TextTensors]:
    """Returns the text encoder of a source, with the words that its tokenizer adds, its table, and its tensors."""
    text = split_text(source.parts["text"])
    settings = infer_text(text, source.configs.get("text"))
    words = read_added_words(source.path, settings["end_id"])
    encoder = TextEncoder(TextEncoderConfig(**settings, added_words=words))
    if "generation" in source.configs:
        check_places(source.configs["generation"], encoder.tokenizer)
    return *fill(encoder, text_weights(encoder), text.weights, text.layout), text


def load_control(source: Source, **heads: int | None) -> tuple[ControlBranch, dict[str, Any], ControlOrigin]:
    """Returns the control branch of a source, its settings, and what is needed to write it back.

    `heads` or `head_width` are those of its UNet, if known. ValueError for heads that do not follow from the files.
    """
    tensors, config = source.parts["control"], source.configs.get("control")
    known = {name: value for name, value in heads.items() if value is not None}
    settings = (known if config is None else {}) | infer_control(tensors, source.layout, config)
    if not {"heads", "head_width"} & settings.keys():
        got = f"attention heads of the control branch do not follow from {source.path}"
        raise ValueError(f"{got}: pass its folder of diffusers, whose config.json has them")
    branch, conv_projections = build_control(settings), settings["conv_projections"]
    shapes = {name: value.shape for name, value in branch.state_dict().items()}
    converted = from_layout(control_weights(branch, conv_projections), tensors, source.layout, shapes)
    branch.load_state_dict(converted, assign=True)
    origin = ControlOrigin(source.layout, dtype_name(tensors), conv_projections, source.prefixed, config)
    return branch, settings, origin


def fill(network: nn.Module, table: list[Weight], tensors: Mapping[str, Tensor], layout: str) -> Loaded:
    """Fills a network with the tensors of a file."""
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(from_layout(table, tensors, layout, shapes))
    return Loaded(network, table)


@torch.no_grad()
def print_hint(built: LearnedSampler, space: Space) -> None:
    """Prints what the network seems to predict, by one call on pure noise without a caption."""
    network, shape = built.network.eval(), (1, *space.model_args["shape"])

    def output_of(x: Tensor) -> Tensor:
        return built.predict(network, x, torch.ones(1), network.encode({"text": [""]}, x))

    seems, cosine = prediction_hint(output_of, shape)
    print(f"on pure noise its output has cosine {cosine:.2f} with the noise, as of networks that predict {seems}")
