"""Files of tiny autoencoders: pairs and joint files; and TAEF2's, whose reconstructions are close to photographs.

`TAEF2` names a folder with taef2_encoder.pth and taef2_decoder.pth; `PHOTOGRAPHS` one with .jpg files at any depth.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from train.converters.sd.autoencoder import tiny_weights
from train.converters.sd.names import to_layout
from train.converters.sd.tiny import is_tiny, load_tiny, read_tiny
from train.data.transforms import to_float
from vq.tiles import decode_latents_tiled, encode_latents_tiled, tile_difference
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

TAEF2, PHOTOGRAPHS = (os.environ.get(name, "") for name in ("TAEF2", "PHOTOGRAPHS"))
with_taef2 = pytest.mark.skipif(not TAEF2, reason="TAEF2 names no folder with taef2_encoder.pth and taef2_decoder.pth")
with_photographs = pytest.mark.skipif(not PHOTOGRAPHS, reason="PHOTOGRAPHS names no folder with .jpg files")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return TinyAutoencoder(TinyAutoencoderConfig(channels=8, latent_channels=5, middle_norm=True))


def write_pair(folder, network, suffix):
    """Writes both sides of a network by their public names; returns the path of each."""
    paths = {side: folder / f"tiny_{side}{suffix}" for side in ("encoder", "decoder")}
    for side, path in paths.items():
        state = getattr(network, side).state_dict()
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return paths


def assert_same(network, other):
    assert other.config == network.config
    x = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pair_is_found_from_either_side_and_its_folder(network, suffix, tmp_path):
    paths = write_pair(tmp_path, network, suffix)
    for path in (*paths.values(), tmp_path):
        assert_same(network, load_tiny(path))


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_one_file_has_both_sides(network, layout, tmp_path):
    tensors = to_layout(tiny_weights(network), network.state_dict(), layout)
    save_file(tensors, tmp_path / "tiny.safetensors")
    assert ("encoder.layers.0.weight" in tensors) == (layout == "folder")
    assert_same(network, load_tiny(tmp_path / "tiny.safetensors"))


TINY_CONFIG = {  # as that of TAESD in a folder of diffusers
    **{"_class_name": "AutoencoderTiny", "act_fn": "relu", "latent_channels": 5, "latent_magnitude": 3},
    **{"num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1], "upsampling_scaling_factor": 2},
    **{"encoder_block_out_channels": [8, 8, 8, 8], "scaling_factor": 1.0, "latent_shift": 0.5},
}


def write_folder(folder, network, **changes):
    folder.mkdir()
    tensors = to_layout(tiny_weights(network), network.state_dict(), "folder")
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
    return folder


def test_a_folder_of_diffusers_is_read_with_its_config(network, tmp_path):
    folder = write_folder(tmp_path / "tiny", network)
    assert is_tiny(folder) and not is_tiny(tmp_path)
    assert_same(network, load_tiny(folder))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "gelu", "tiny autoencoder with act_fn 'gelu', wanted 'relu'"),
        ("num_encoder_blocks", [1, 1, 1, 1], r"num_encoder_blocks \[1, 1, 1, 1\], wanted \[1, 3, 3, 3\]"),
        ("scaling_factor", 0.5, "scaling_factor 0.5, wanted 1.0"),
        ("new_setting", 1, "tiny autoencoder with an unknown setting new_setting"),
    ],
)
def test_settings_that_are_not_built_are_refused(network, key, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tiny(write_folder(tmp_path / "tiny", network, **{key: value}))


def test_a_missing_side_is_named(network, tmp_path):
    paths = write_pair(tmp_path, network, ".pth")
    paths["decoder"].unlink()
    for path in (*paths.values(), tmp_path):
        with pytest.raises(FileNotFoundError, match="tiny_decoder.pth not found, the decoder"):
            read_tiny(path)


def test_a_folder_with_several_pairs_or_none_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match=r"0 files of encoders \(none\), wanted one"):
        read_tiny(tmp_path)
    write_pair(tmp_path, network, ".pth"), write_pair(tmp_path, network, ".safetensors")
    with pytest.raises(ValueError, match=r"2 files of encoders \(tiny_encoder.pth, tiny_encoder.safetensors\)"):
        read_tiny(tmp_path)


def test_another_network_is_refused(tmp_path):
    save_file(nn.Conv2d(3, 8, 3).state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="wanted an encoder and a decoder of TAESD"):
        load_tiny(tmp_path / "unet.safetensors")


def photographs(count, size):
    """Returns the centres of photographs, resized, (count, 3, size, size) in [-1, 1]."""
    from torchvision.transforms.v2 import functional as F

    files = sorted(Path(PHOTOGRAPHS).rglob("*.jpg"))
    images = [F.pil_to_tensor(Image.open(file).convert("RGB")) for file in files[:: len(files) // count][:count]]
    squares = [
        F.resize(F.center_crop(image, [min(image.shape[1:])] * 2), [size, size], antialias=True) for image in images
    ]
    return to_float(torch.stack(squares))


def psnr(x, y):
    return -10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()


@with_taef2
@with_photographs
@pytest.mark.slow
@torch.no_grad()
def test_photographs_are_reconstructed_by_taef2():
    network, images = load_tiny(Path(TAEF2)).eval(), photographs(8, 128)
    assert network.config == TinyAutoencoderConfig(latent_channels=32, middle_norm=True)
    right = psnr(images, network(images)).mean().item()
    assert right > 28
    for norm in [module for module in network.modules() if isinstance(module, nn.GroupNorm)]:
        norm.num_groups = 32
    assert psnr(images, network(images)).mean() < right - 0.5


@with_taef2
@with_photographs
@pytest.mark.slow
@torch.no_grad()
def test_tiles_of_a_large_photograph_differ_no_more_at_seams():
    network, image = load_tiny(Path(TAEF2)).eval(), photographs(1, 512)
    latents, factor = network.encode(image), network.config.factor
    tiled_latents = encode_latents_tiled(network.encode, image, factor, 32, 8)
    whole, tiled = network.decode(latents), decode_latents_tiled(network.decode, latents, factor, 32, 8)
    for got, wanted, scale in ((tiled_latents, latents, 1), (tiled, whole, factor)):
        difference = tile_difference(got, wanted, 32, 8, scale)
        assert difference.at_seams < 2 * difference.inside
