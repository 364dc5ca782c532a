"""Autoencoders of Stable Diffusion and TAESD: public outputs, both layouts, and the names of the real files."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train.converters.sd.autoencoder import (
    autoencoder_weights,
    infer_autoencoder,
    infer_tiny,
    tiny_weights,
    with_new_names,
)
from train.converters.sd.names import from_layout, to_layout
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior, sample_posterior
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

FIXTURES = Path(os.environ.get("TEXT_FIXTURES", ""))
HAS_FIXTURES = pytest.mark.skipif(
    not (FIXTURES / "vae/io.npz").is_file(),
    reason="TEXT_FIXTURES names no folder with vae/io.npz, outputs of a public autoencoder",
)
REAL = Path(__file__).parents[2] / "fixtures/sd"
PREFIX = "first_stage_model."
LAYOUTS = ("single", "folder")


def read(layout):
    """Returns the tensors of the fixture, in their own precision, and its config."""
    config = json.loads((FIXTURES / "vae/config.json").read_text())
    if layout == "folder":
        return load_file(FIXTURES / "vae/diffusion_pytorch_model.safetensors"), config
    tensors = load_file(FIXTURES / "vae/ldm_vae.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, config


def load(layout):
    """Returns the autoencoder of the fixture, and its table."""
    tensors, config = read(layout)
    settings = infer_autoencoder(tensors, layout, config if layout == "folder" else None)
    network = AutoencoderKL(AutoencoderKLConfig(**settings)).eval()
    table = autoencoder_weights(network)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    network.load_state_dict(from_layout(table, tensors, layout, shapes))
    return network, table


@HAS_FIXTURES
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_outputs_are_those_of_the_public_autoencoder(layout, agrees):
    network, _ = load(layout)
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURES / "vae/io.npz").items()}
    for image, ending in (("image", ""), ("image_rect", "_rect")):
        posterior = network.posterior(io[image])
        assert agrees(posterior.mean, io[f"mean{ending}"], f"autoencoder: {layout}, mean{ending}")
        clamped = io[f"logvar{ending}"].clamp(-30, 20)
        assert agrees(posterior.logvar, clamped, f"autoencoder: {layout}, logvar{ending}")
    decoded = network.decode(network.posterior(io["image_rect"]).mean)
    assert agrees(decoded, io["decoded_rect_of_mean"], f"autoencoder: {layout}, decoded_rect")
    posterior = network.posterior(io["image"])
    assert torch.allclose(posterior.kl(), io["kl"], rtol=1e-5)
    scaled = sample_posterior(posterior, io["noise"]) * network.config.scaling_factor
    assert agrees(scaled, io["latent_scaled"], f"autoencoder: {layout}, latent_scaled")
    decoded = network.decode(io["latent_scaled"] / network.config.scaling_factor)
    assert agrees(decoded, io["decoded"], f"autoencoder: {layout}, decoded")


@HAS_FIXTURES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_is_written_back_to_the_bit(layout):
    tensors, _ = read(layout)
    network, table = load(layout)
    back = to_layout(table, network.state_dict(), layout, torch.float16)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@HAS_FIXTURES
def test_older_names_of_attention_are_read():
    tensors, _ = read("folder")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, former in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{former}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys() and with_new_names(renamed).keys() == tensors.keys()


def test_each_tensor_of_the_real_files_is_read_and_written():
    with gzip.open(REAL / "sd15.json.gz") as file:
        parts = json.load(file)
    single = {key.removeprefix(PREFIX): shape for key, shape in parts["single_file"].items() if key.startswith(PREFIX)}
    for layout, named in (("single", single), ("folder", parts["vae"])):
        tensors = {key: torch.empty(shape, device="meta") for key, shape in named.items()}
        settings = infer_autoencoder(tensors, layout)
        assert AutoencoderKLConfig(**settings) == AutoencoderKLConfig()
        with torch.device("meta"):
            network = AutoencoderKL(AutoencoderKLConfig(**settings))
        assert sum(p.numel() for p in network.parameters()) == 83_653_863
        table = autoencoder_weights(network)
        shapes = {key: value.shape for key, value in network.state_dict().items()}
        back = to_layout(table, from_layout(table, tensors, layout, shapes), layout)
        assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in tensors.items()}


def test_sizes_need_not_be_multiples_of_the_factor():
    config = AutoencoderKLConfig(channels=32, channel_mults=(1, 1, 1), res_blocks=1)
    network = AutoencoderKL(config)
    assert config.factor == 4 and network.posterior(torch.zeros(1, 3, 18, 22)).mean.shape == (1, 4, 4, 5)
    assert network.decode(torch.zeros(1, 4, 4, 5)).shape == (1, 3, 16, 20)


def test_the_divergence_is_that_of_the_formula():
    mean, logvar = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0)).double().chunk(2, dim=1)
    p = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    assert torch.allclose(Posterior(mean, logvar).kl(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mid_block_add_attention", False, "mid_block_add_attention False, wanted True"),
        ("latents_mean", [0.0], r"latents_mean \[0.0\], wanted None"),
        ("batch_norm_eps", 1e-4, "unknown setting batch_norm_eps"),
    ],
)
def test_settings_that_are_not_built_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        infer_autoencoder({}, "folder", {key: value})


@pytest.mark.parametrize("middle_norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiny_autoencoder_is_written_and_read(layout, middle_norm):
    config = TinyAutoencoderConfig(channels=8, latent_channels=5, middle_norm=middle_norm)
    network, other = TinyAutoencoder(config), TinyAutoencoder(config)
    table = tiny_weights(network)
    tensors = to_layout(table, network.state_dict(), layout)
    assert ("decoder.layers.0.weight" in tensors) == (layout == "folder")
    assert TinyAutoencoderConfig(**infer_tiny(tensors, layout)) == config
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    other.load_state_dict(from_layout(table, tensors, layout, shapes))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert torch.equal(network(images), other(images)) and network.encode(images).shape == (2, 5, 2, 3)
