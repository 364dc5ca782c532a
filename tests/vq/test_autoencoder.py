"""The VQGAN autoencoder: size, shapes, and agreement of its parts."""

import dataclasses
import math

import pytest
import torch

from models.blocks import Downsample, ResBlock, Upsample, count_parameters
from vq.autoencoder import VQGAN, AttentionBlock, Decoder
from vq.config import VQGANConfig
from vq.quantizers import ema, fsq, gumbel, ibq, l2, lfq, nearest

SMALL = VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=6, codebook_size=16)


def autoencoder(config=SMALL, size=(16, 16), n_channels=3):
    return VQGAN(config, size, n_channels)


def images(batch=2, channels=3, size=(16, 16)):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def count(network, kind):
    return sum(isinstance(m, kind) for m in network.modules())


def test_the_size_is_as_published_without_unused_layers():
    with torch.device("meta"):
        network = VQGAN(VQGANConfig(), (256, 256))

    def unused(channels):
        """A 1 x 1 convolution: the reference keeps one in every ResBlock, and uses it where the width changes."""
        return channels**2 + channels

    encoder, decoder = 30_349_568, 35_168_262 - 147_971  # without the head for a learned variance
    assert count_parameters(network.encoder) == encoder - 4 * unused(128) - 3 * unused(256) - 3 * unused(512)
    assert count_parameters(network.decoder) == decoder - 3 * unused(128) - 3 * unused(256) - 4 * unused(512)
    assert count_parameters(network.quantizer) == 262_144


def test_levels_have_their_blocks_and_attention_resolutions():
    network = autoencoder(VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=3, attn_resolutions=(8, 4), emb_dim=6))
    resolutions = []
    for side, resize in [(network.encoder, Downsample), (network.decoder, Upsample)]:
        assert count(side, ResBlock) == 3 * 3 + 2  # two in the middle
        assert count(side, resize) == 2
        for block in side:
            if isinstance(block, AttentionBlock):
                block.register_forward_hook(lambda block, args, out: resolutions.append(out.shape[-1]))
    network(images())
    assert resolutions == [8] * 3 + [4] * 4 + [4] * 4 + [8] * 3  # one in each middle


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ch_mult, grid", [((1,), 16), ((1, 2), 8), ((1, 2, 2), 4)])
def test_shapes_make_the_round_trip(channels, ch_mult, grid):
    config = VQGANConfig(nf=8, ch_mult=ch_mult, res_blocks=1, attn_resolutions=(), emb_dim=6, codebook_size=16)
    network = autoencoder(config, (16, 16), channels)
    x = images(channels=channels)
    reconstruction, codes = network(x)
    assert network.grid == (grid, grid) and codes.ids.shape == (2, grid, grid) and codes.vectors.shape[1] == 6
    assert reconstruction.shape == network.decode(network.encode(x)).shape == x.shape


def test_encode_and_decode_agree_with_forward():
    network, x = autoencoder(), images()
    reconstruction, codes = network(x)
    assert torch.equal(network.encode(x), codes.ids)
    assert torch.allclose(network.decode(codes.ids), reconstruction.clamp(-1, 1), atol=1e-5)
    assert not network.decode(codes.ids).requires_grad and reconstruction.requires_grad


def test_decoded_images_stay_in_their_range():
    network = autoencoder()
    network.decoder[-1].bias.data = torch.tensor([5.0, -5.0, 0.0])
    out = network.decode(network.encode(images()))
    assert (out[:, 0] == 1).all() and (out[:, 1] == -1).all() and (out[:, 2].abs() < 1).any()


def test_reconstruction_trains_the_encoder_not_the_codebook():
    network = autoencoder()
    network(images())[0].square().mean().backward()
    assert all(p.grad.any() for p in network.encoder.parameters())
    assert network.quantizer.codebook.weight.grad is None


def test_every_weight_is_trained():
    network = autoencoder()
    reconstruction, codes = network(images())
    (reconstruction.square().mean() + codes.loss.mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_last_layer_makes_the_pixels():
    decoder = autoencoder().decoder
    assert isinstance(decoder, Decoder) and decoder.last_layer is decoder[-1].weight
    assert decoder.last_layer.shape == (3, 8, 3, 3)


@pytest.mark.parametrize("size, grid", [((256,), (16, 16)), ((32,), (2, 2)), ((16, 48), (1, 3)), ((64, 16), (4, 1))])
def test_the_grid_of_an_image(size, grid):
    assert VQGANConfig().factor == 16 and VQGANConfig().grid(*size) == grid


@pytest.mark.parametrize("size", [(8, 8), (0, 16), (16, 0), (100, 100), (256, 250), (250, 256), (-16, 16), (16, 8)])
def test_an_image_that_does_not_divide_is_refused(size):
    message = f"got images of {size[0]}x{size[1]} for 5 levels, wanted multiples of 16: change --img_size"
    with pytest.raises(ValueError, match=message):
        VQGANConfig().grid(*size)
    with pytest.raises(ValueError, match=message):
        VQGAN(VQGANConfig(nf=1, res_blocks=1), size)


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (4, 40)])
def test_images_that_are_not_square_make_the_round_trip(size):
    network, x = autoencoder(size=size), images(size=size)
    grid = size[0] // 4, size[1] // 4
    reconstruction, codes = network(x)
    assert network.grid == grid and codes.ids.shape == (2, *grid) and codes.vectors.shape == (2, 6, *grid)
    assert reconstruction.shape == network.decode(network.encode(x)).shape == x.shape
    assert torch.equal(network.encode(x), codes.ids)


def test_only_multiples_of_the_factor_are_accepted():
    network = autoencoder(size=(16, 24))
    for size in [(16, 16), (4, 4), (32, 20), (16, 24)]:
        x = images(size=size)
        assert network(x)[0].shape == network.decode(network.encode(x)).shape == x.shape
    for size in [(16, 18), (18, 16), (2, 16)]:
        for method in (network, network.encode, network.latents):
            with pytest.raises(ValueError, match=f"got images of {size[0]}x{size[1]} for 3 levels.*multiples of 4"):
                method(images(size=size))


def test_attention_stands_where_the_height_says():
    config = VQGANConfig(nf=8, ch_mult=(1, 2, 2), res_blocks=1, attn_resolutions=(8,), emb_dim=6, codebook_size=16)
    attention_sizes = {}
    for size in [(16, 32), (32, 16)]:
        network, sizes = autoencoder(config, size), []
        for block in [*network.encoder, *network.decoder]:
            if isinstance(block, AttentionBlock):
                block.register_forward_hook(lambda block, args, out, sizes=sizes: sizes.append(tuple(out.shape[2:])))
        network(images(size=size))
        attention_sizes[size] = sizes
    assert attention_sizes[16, 32] == [(8, 16), (4, 8), (4, 8), (8, 16)]  # at height 8, and one in each middle
    assert attention_sizes[32, 16] == [(8, 4)] * 4  # the third and last level is 8 high


def test_unit_range_feeds_the_encoder_0_to_1_and_nothing_else():
    default, unit = autoencoder(), autoencoder(dataclasses.replace(SMALL, unit_range=True))
    unit.load_state_dict(default.state_dict())
    x = images()
    assert torch.equal(unit.latents(2 * x.abs() - 1), default.latents(x.abs()))
    reconstruction, codes = unit(x)
    assert torch.equal(codes.ids, unit.encode(x)) and torch.equal(codes.ids, default.encode((x + 1) / 2))
    assert torch.equal(reconstruction, default((x + 1) / 2)[0])  # the output is not rescaled
    assert not torch.equal(unit.latents(x), default.latents(x))


def test_the_last_layer_is_computed_in_float32_under_autocast():
    network = autoencoder()
    dtypes = {}
    network.encoder[0].register_forward_hook(lambda layer, args, out: dtypes.update(first=out.dtype))
    network.decoder[-1].register_forward_hook(
        lambda layer, args, out: dtypes.update(input=args[0].dtype, last=out.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, _ = network(images())
        assert torch.is_autocast_enabled("cpu")
    assert dtypes == {"first": torch.bfloat16, "input": torch.float32, "last": torch.float32}
    assert reconstruction.dtype == torch.float32
    reconstruction.square().mean().backward()
    assert network.decoder.last_layer.grad.any()


@pytest.mark.parametrize(
    "settings, levels, dim",
    [
        ({"quantizer": "fsq", "codebook_size": 512}, (8, 8, 8), 3),
        ({"quantizer": "fsq", "codebook_size": 1024}, (8, 8, 4, 4), 4),
        ({"quantizer": "fsq", "codebook_size": 256}, (8, 8, 4), 3),
        ({"quantizer": "fsq", "codebook_size": 4}, (4,), 1),
        ({"quantizer": "fsq", "codebook_size": 16}, (4, 4), 2),
        (
            {"quantizer": "fsq", "codebook_size": 1000, "quantizer_config": fsq.Config(fsq_levels=(8, 5, 5, 5))},
            (8, 5, 5, 5),
            4,
        ),
        ({"quantizer": "lfq", "codebook_size": 1024}, None, 10),
        ({"quantizer": "lfq", "codebook_size": 2}, None, 1),
        ({"quantizer": "nearest", "emb_dim": 7, "codebook_size": 11}, None, 7),
        ({"quantizer": "ibq"}, None, 256),
        ({"quantizer": "ema", "nf": 16, "ch_mult": (1, 2, 4)}, None, 32),
        ({"quantizer": "nearest", "nf": 1, "ch_mult": (1,)}, None, 1),
        ({"quantizer": "l2"}, None, 4),
        ({"quantizer": "gumbel"}, None, 4),
        ({"quantizer": "l2", "emb_dim": 64}, None, 64),
    ],
)
def test_the_codes_are_as_wide_as_their_kind_makes_them(settings, levels, dim):
    config = VQGANConfig(**settings)
    assert config.code_dim == dim
    if levels is not None:
        assert config.quantizer_config.levels(config.codebook_size) == levels
        assert math.prod(levels) == config.codebook_size


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantizer": "fsq", "codebook_size": 1000}, "codebook_size 1000 for fsq, wanted a power of 2.*fsq_levels"),
        (
            {"quantizer": "fsq", "codebook_size": 2},
            "codebook_size 2 for fsq, wanted a power of 2, at least 4.*fsq_levels",
        ),
        (
            {"quantizer": "fsq", "quantizer_config": fsq.Config(fsq_levels=(8, 8))},
            "product is 64, for codebook_size 1024: pass --codebook_size 64",
        ),
        ({"quantizer": "fsq", "quantizer_config": fsq.Config(fsq_levels=(1024, 1))}, "at least 2 levels each"),
        ({"quantizer": "lfq", "codebook_size": 1000}, "codebook_size 1000 for lfq, wanted a power of 2"),
        ({"quantizer": "lfq", "codebook_size": 1}, "codebook_size 1 for lfq, wanted a power of 2"),
        ({"quantizer_config": fsq.Config()}, "options of vq.quantizers.fsq for quantizer nearest"),
        ({"quantizer": "fsqq"}, "unknown quantizer 'fsqq', did you mean 'fsq'.*there are: ema, fsq"),
    ],
)
def test_codes_that_do_not_fit_their_kind_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**settings)


@pytest.mark.parametrize(
    "config, wrong",
    [
        *((config, {"beta": -1.0}) for config in (nearest.Config, ema.Config, l2.Config, lfq.Config, ibq.Config)),
        *((ema.Config, wrong) for wrong in ({"codebook_decay": 1.0}, {"codebook_decay": -0.1}, {"revive_below": -0.1})),
        *((lfq.Config, wrong) for wrong in ({"entropy_weight": -0.1}, {"entropy_temperature": 0.0})),
        *((gumbel.Config, wrong) for wrong in ({"gumbel_kl_weight": -1e-8}, {"gumbel_decay_steps": 0})),
    ],
)
def test_options_of_a_quantizer_are_checked_at_birth(config, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"got {name} {value}, wanted .*: pass --{name} "):
        config(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"ch_mult": ()}, {"ch_mult": (1, 0)}, {"nf": 0}, {"res_blocks": 0}, {"emb_dim": 0}, {"codebook_size": 0}]
)
def test_a_config_without_sizes_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"got {name} .*--{name}"):
        VQGANConfig(**wrong)
