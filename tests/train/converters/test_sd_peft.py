"""Files of adapters that peft and diffusers write, read by us: outputs are those of the adapted originals."""

import pytest
import torch
from torch import nn

from helpers.public_sd import SD1, SD2, TEXT, TEXT_WIDTH, UNET, convert_unet, normal, randomize, token_ids
from models.lora import merge, remove_adapters
from train.converters.sd.files import read_source
from train.converters.sd.runs import load_text
from train.converters.sd.unet import unet_weights
from train.lora_files import Part, read_lora

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here: pip install diffusers")
peft = pytest.importorskip("peft", reason="peft is the oracle here: pip install peft")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle here: pip install transformers")

X, TIMES, TOKENS = normal(2, 4, 8, 8), torch.tensor([7, 981]), normal(2, 77, TEXT_WIDTH, seed=2)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LAYERS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"]
LAYERS += ["time_emb_proj", "conv"]  # the last: of down- and up-sampling


def make_unets(folder, options):
    """Returns a UNet of diffusers, ours with its weights, and the names of these in files."""
    theirs = randomize(diffusers.UNet2DConditionModel(**UNET, **options))
    theirs.save_pretrained(folder / "unet")
    ours = convert_unet(folder / "unet")
    return theirs, ours, Part("", "lora_unet", "unet", unet_weights(ours, not theirs.config.use_linear_projection))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LoRA", {"rank_pattern": {"attn2.to_v": 2}, "alpha_pattern": {"attn2.to_v": 6, "conv1": 1}}),
        ("LoRA with rsLoRA", {"use_rslora": True}),
        ("DoRA", {"use_dora": True}),
    ],
)
@pytest.mark.parametrize(("version", "unet_options"), [("SD 1", SD1), ("SD 2", SD2)])
@torch.no_grad()
def test_a_folder_of_peft(version, unet_options, name, options, agrees, tmp_path):
    theirs, ours, part = make_unets(tmp_path, unet_options)
    base = theirs(X, TIMES, TOKENS).sample
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS, init_lora_weights=False, **options)
    adapted = peft.get_peft_model(theirs, config)
    randomize(nn.ParameterList(each for each_name, each in adapted.named_parameters() if ".lora_" in each_name))
    adapted.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    wanted = adapted(X, TIMES, TOKENS).sample
    assert (wanted - base).abs().max() > 0.1
    read_lora(tmp_path / "adapters", ours, [part])
    condition = {"text": TOKENS}
    assert agrees(ours(X, TIMES, condition), wanted, f"peft: {name}, UNet of {version}")
    merge(ours)
    remove_adapters(ours)
    assert agrees(ours(X, TIMES, condition), wanted, f"peft: {name}, UNet of {version}, merged")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of peft with transformers
@torch.no_grad()
def test_a_file_of_diffusers_for_unet_and_text_encoder(agrees, tmp_path):
    theirs, ours, part = make_unets(tmp_path, SD1)
    encoder = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)))
    encoder.save_pretrained(tmp_path / "text_encoder")
    own_encoder, table, _ = load_text(read_source(tmp_path / "text_encoder"))
    options = {"lora_alpha": 6, "init_lora_weights": False}
    theirs.add_adapter(peft.LoraConfig(r=4, target_modules=ATTENTION, **options))
    adapted = peft.get_peft_model(
        encoder, peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], **options)
    )
    own_names = {
        name.removeprefix("base_model.model."): value for name, value in peft.get_peft_model_state_dict(adapted).items()
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(theirs),
        text_encoder_lora_layers=own_names,
        unet_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=adapted.peft_config["default"].to_dict(),
    )
    both = nn.ModuleDict({"unet": ours, "text": own_encoder.eval()})
    parts = [part._replace(path="unet"), Part("text", "lora_te", "text_encoder", table, "text_model.")]
    plain = both["text"](token_ids(2)).tokens
    layers = read_lora(tmp_path / "pytorch_lora_weights.safetensors", both, parts)
    assert {name.partition(".")[0] for name in layers} == {"unet", "text"}
    wanted, tokens = encoder.eval()(token_ids(2)).last_hidden_state, both["text"](token_ids(2)).tokens
    assert (wanted - plain).abs().max() > 0.01
    assert agrees(tokens, wanted, "diffusers: save_lora_weights, text encoder")
    wanted = theirs.eval()(X, TIMES, TOKENS).sample
    assert agrees(ours(X, TIMES, {"text": TOKENS}), wanted, "diffusers: save_lora_weights, UNet")
