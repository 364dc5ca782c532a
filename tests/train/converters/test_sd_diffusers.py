"""Networks that diffusers and transformers save, read by our converters: their outputs are those of the originals."""

import pytest
import torch

from helpers.public_sd import (
    SD1,
    SD2,
    TEXT,
    TEXT_WIDTH,
    UNET,
    autoencoder_blocks,
    convert_unet,
    normal,
    randomize,
    token_ids,
)
from models.control import ControlBranch, HintConfig
from train.converters.sd.control import control_weights, infer_control
from train.converters.sd.files import read_source
from train.converters.sd.runs import fill, load_autoencoder, load_text
from train.converters.sd.tiny import load_tiny

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here: pip install diffusers")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install transformers")

TIMES = torch.tensor([7, 981])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SD 1", SD1),
        ("SD 2", SD2),
        ("SD 2, 8 channels", SD2 | {"in_channels": 8}),
        ("SD 1, 9 channels", SD1 | {"in_channels": 9}),
    ],
)
@torch.no_grad()
def test_unet(name, options, agrees, tmp_path):
    theirs = randomize(diffusers.UNet2DConditionModel(**UNET, **options))
    theirs.save_pretrained(tmp_path)
    x, tokens = normal(2, theirs.config.in_channels, 8, 12), normal(2, 77, TEXT_WIDTH, seed=2)
    conditions = {"text": tokens, "image": x[:, 4:]} if x.shape[1] > 4 else {"text": tokens}
    wanted = theirs(x, TIMES, tokens).sample
    assert agrees(convert_unet(tmp_path)(x[:, :4], TIMES, conditions), wanted, f"diffusers: UNet of {name}")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SD", {}),
        ("SD 3", {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}),
    ],
)
@torch.no_grad()
def test_autoencoder(name, options, agrees, tmp_path):
    sizes = {"block_out_channels": (32, 32, 64), "layers_per_block": 2, "scaling_factor": 0.3}
    theirs = randomize(diffusers.AutoencoderKL(**autoencoder_blocks(3), **sizes, **options))
    theirs.save_pretrained(tmp_path)
    network = load_autoencoder(read_source(tmp_path)).network.eval()
    assert (network.config.scaling_factor, network.config.shift_factor) == (0.3, options.get("shift_factor", 0.0))
    images = normal(2, 3, 24, 32).clamp(-1, 1)
    wanted, got = theirs.encode(images).latent_dist, network.posterior(images)
    assert agrees(got.mean, wanted.mean, f"diffusers: autoencoder of {name}, mean")
    assert agrees(got.logvar, wanted.logvar, f"diffusers: autoencoder of {name}, logvar")
    latents = normal(*wanted.mean.shape)
    decoded = theirs.decode(latents).sample
    assert agrees(network.decode(latents), decoded, f"diffusers: autoencoder of {name}, decoded")


@torch.no_grad()
def test_tiny_autoencoder(agrees, tmp_path):
    widths = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    theirs = randomize(diffusers.AutoencoderTiny(**widths))
    theirs.save_pretrained(tmp_path)
    network = load_tiny(tmp_path / "diffusion_pytorch_model.safetensors").eval()
    images, latents = normal(2, 3, 24, 32).clamp(-1, 1), normal(2, 4, 3, 4)
    assert agrees(network.encode(images), theirs.encode(images).latents, "diffusers: tiny autoencoder, latents")
    decoded = theirs.decode(latents).sample.clamp(-1, 1)  # ours are images in this range
    assert (decoded.abs() < 1).float().mean() > 0.1
    assert agrees(network.decode(latents), decoded, "diffusers: tiny autoencoder, decoded")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])  # of SD 1 and 2
@torch.no_grad()
def test_text_encoder(activation, agrees, tmp_path):
    config = transformers.CLIPTextConfig(**TEXT, hidden_act=activation)
    theirs = randomize(transformers.CLIPTextModel(config))
    theirs.save_pretrained(tmp_path)
    wanted, got = theirs(token_ids(3)), load_text(read_source(tmp_path))[0].eval()(token_ids(3))
    assert agrees(got.tokens, wanted.last_hidden_state, f"transformers: CLIP with {activation}, tokens")
    assert agrees(got.pooled, wanted.pooler_output, f"transformers: CLIP with {activation}, pooled")


@torch.no_grad()
def test_text_encoder_with_projection(agrees, tmp_path):
    config = transformers.CLIPTextConfig(**TEXT, projection_dim=20)
    theirs = randomize(transformers.CLIPTextModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    got = load_text(read_source(tmp_path))[0].eval()(token_ids(3))
    assert agrees(got.pooled, theirs(token_ids(3)).text_embeds, "transformers: CLIP with projection, pooled")


@torch.no_grad()
def test_control_branch(agrees, tmp_path):
    unet = randomize(diffusers.UNet2DConditionModel(**UNET, **SD2))
    shared = {name: value for name, value in (UNET | SD2).items() if name not in ("sample_size", "up_block_types")}
    theirs = randomize(diffusers.ControlNetModel(**shared, conditioning_embedding_out_channels=(8, 16, 24, 32)))
    unet.save_pretrained(tmp_path / "unet")
    theirs.save_pretrained(tmp_path / "controlnet")
    network, source = convert_unet(tmp_path / "unet"), read_source(tmp_path / "controlnet")
    settings = infer_control(source.parts["control"], "folder", source.configs["control"])
    branch = ControlBranch(network, HintConfig(**{name: settings[name] for name in HintConfig.__dataclass_fields__}))
    fill(branch, control_weights(branch, settings["conv_projections"]), source.parts["control"], "folder")
    x, tokens, hint = normal(2, 4, 8, 12), normal(2, 77, TEXT_WIDTH, seed=2), normal(2, 3, 64, 96).clamp(0, 1)
    down, middle = theirs(x, TIMES, tokens, hint, conditioning_scale=0.7, return_dict=False)
    condition = network.encode({"text": tokens}, x)
    residuals = branch(x, TIMES, condition, hint, 0.7)
    for i, (got, wanted) in enumerate(zip(residuals, [*down, middle], strict=True)):
        assert agrees(got, wanted, f"diffusers: ControlNet, residual {i}")
    controlled = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    wanted = unet(x, TIMES, tokens, **controlled).sample
    assert agrees(network(x, TIMES, condition, residuals), wanted, "diffusers: ControlNet, UNet")
