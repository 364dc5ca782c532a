"""Text encoders of Stable Diffusion: public outputs, and the names of the files of both versions."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.text_encoder import CLIP_L, OPENCLIP_H, TextEncoder, TextEncoderConfig
from models.tokenizer import Tokenizer
from train.converters.sd.names import from_layout, to_layout
from train.converters.sd.text import (
    infer_text,
    name_as_in_file,
    split_text,
    text_weights,
    tokenizer_config,
    tokenizer_texts,
    with_last_layer,
)

FIXTURES = Path(os.environ.get("TEXT_FIXTURES", ""))
HAS_FIXTURES = pytest.mark.skipif(
    not (FIXTURES / "text/sd1/io.npz").is_file(),
    reason="TEXT_FIXTURES names no folder with text/sd1/io.npz, outputs of public text encoders",
)
REAL = Path(__file__).parents[2] / "fixtures/sd"
PREFIX = "cond_stage_model."
FILES = {
    "sd1 folder": "text/sd1/model.safetensors",
    "sd2 folder": "text/sd2/model.safetensors",
    "sd1 single": "sd1/ldm_text.safetensors",
    "sd2 single": "sd2/ldm_text.safetensors",
}
TINY = {"heads": 4, "end_id": 383}  # which do not follow from the weights of the fixtures


def read(name):
    """Returns the tensors of a fixture, and the config of a folder."""
    path = FIXTURES / FILES[name]
    tensors = {key.removeprefix(PREFIX): value for key, value in load_file(path).items()}
    config = path.parent / "config.json"
    return tensors, json.loads(config.read_text()) if config.is_file() else None


def load(name, **options):
    """Returns the text encoder of a fixture, its table and its tensors."""
    tensors, config = read(name)
    text = split_text(tensors)
    encoder = TextEncoder(TextEncoderConfig(**infer_text(text, config) | TINY | options)).eval()
    table, shapes = text_weights(encoder), {key: value.shape for key, value in encoder.state_dict().items()}
    encoder.load_state_dict(from_layout(table, text.weights, text.layout, shapes))
    return encoder, table, text


@HAS_FIXTURES
@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_tokens_are_those_of_the_public_encoders(name, agrees):
    version, layout = name.split()
    io = {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / f"text/{version}/io.npz").items()}
    ids = io["tiny_ids"].long()
    features = load(name)[0](ids)
    assert agrees(features.tokens, io["last_with_final_norm"], f"text: {name}, tokens")
    if layout == "single" and version == "sd2":
        last = load(name, clip_skip=1)[0](ids)
        assert agrees(last.tokens, io["openclip_last_with_ln_final"], f"text: {name}, tokens of the last layer")
        assert agrees(last.pooled, io["openclip_pooled_projected"], f"text: {name}, pooled")
    else:
        assert agrees(features.pooled, io["pooled"], f"text: {name}, pooled")


@HAS_FIXTURES
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_back_to_the_bit(name):
    tensors, _ = read(name)
    encoder, table, text = load(name)
    back = to_layout(table, encoder.state_dict(), text.layout, torch.float16)
    back = {text.prefix + key: value for key, value in back.items()} | text.rest
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in tensors.items())


@HAS_FIXTURES
def test_names_without_prefix_are_read():
    tensors, _ = read("sd1 folder")
    bare = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    first, second = split_text(tensors), split_text(bare)
    assert first.weights.keys() == second.weights.keys() and (first.prefix, second.prefix) == ("text_model.", "")


def clip_names(prefix):
    """Returns tensors of CLIP's names, of which the projection has no prefix."""
    names = ("embeddings.token_embedding.weight", "embeddings.position_ids", "final_layer_norm.bias")
    named = {f"{prefix}{name}": torch.full((2, 64), float(i)) for i, name in enumerate(names)}
    return named | {"text_projection.weight": torch.ones(64, 64), "logit_scale": torch.ones(())}


def test_names_with_and_without_prefix_are_written_back():
    tensors = clip_names("text_model.")
    text = split_text(tensors)
    assert text.bare == ("text_projection.weight",) and text.prefix == "text_model."
    assert sorted(text.rest) == ["logit_scale", "text_model.embeddings.position_ids"]
    back = name_as_in_file(text.weights, text.prefix, text.bare) | text.rest
    assert back.keys() == tensors.keys() and all(back[name] is value for name, value in tensors.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("final_layer_norm.bias", "final_layer_norm.bias and text_model.final_layer_norm.bias: take one"),
        (
            "transformer.text_model.final_layer_norm.weight",
            "names of two kinds, text_model. and transformer.text_model.",
        ),
    ],
)
def test_names_that_could_be_of_two_encoders_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        split_text(clip_names("text_model.") | {name: torch.ones(64)})


def test_the_config_of_both_encoders_of_clip_is_read():
    """As in the files of OpenAI's CLIP, which repeat the settings of all models."""
    text = split_text(clip_names("text_model."))
    nested = {"hidden_act": "gelu", "num_attention_heads": 2, "do_sample": False, "id2label": {"0": "LABEL_0"}}
    config = {"model_type": "clip", "logit_scale_init_value": 2.6, "vision_config": {}, "text_config": nested}
    settings = infer_text(text, config)
    assert (settings["activation"], settings["heads"]) == ("gelu", 2)
    assert infer_text(text, config | {"text_config_dict": {"num_attention_heads": 4}})["heads"] == 4
    with pytest.raises(ValueError, match="is_decoder True, wanted False"):
        infer_text(text, config | {"text_config": nested | {"is_decoder": True}})
    with pytest.raises(ValueError, match="unknown setting rope_theta"):
        infer_text(text, config | {"text_config": nested | {"rope_theta": 1}})


@torch.no_grad()
def test_a_last_layer_of_zeros_changes_no_token():
    torch.manual_seed(0)
    options = {"width": 64, "heads": 1, "vocab_size": 100, "end_id": 99}
    encoder = TextEncoder(TextEncoderConfig(**options, layers=2)).eval()
    tensors = with_last_layer(to_layout(text_weights(encoder), encoder.state_dict(), "single"), "", 2)
    longer = TextEncoder(TextEncoderConfig(**options, layers=3, clip_skip=2)).eval()
    shapes = {name: value.shape for name, value in longer.state_dict().items()}
    longer.load_state_dict(from_layout(text_weights(longer), tensors, "single", shapes))
    ids = torch.tensor([[98, 3, 4, 99]])
    assert torch.equal(longer(ids).tokens, encoder(ids).tokens)
    longer.config = TextEncoderConfig(**options, layers=3)
    assert torch.equal(longer(ids).tokens, encoder(ids).tokens)  # of the last layer


def test_the_files_of_the_tokenizer_are_those_of_clip(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizer_texts().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(tokenizer_config("!")))
    public, texts = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"), ["Two dogs' tails, 42.", ""]
    for text in texts:
        ids = public(text, padding="max_length").input_ids
        own = Tokenizer().encode(text)
        assert ids == [49406, *own, 49407, *[0] * (75 - len(own))]


@pytest.mark.parametrize(
    ("name", "part", "expected"),
    [
        ("sd15", "single_file", CLIP_L),
        ("sd15", "text_encoder", CLIP_L),
        ("sd21", "single_file", OPENCLIP_H),
        ("sd21", "text_encoder", None),
    ],
)
def test_each_tensor_of_the_real_files_is_read_and_written(name, part, expected):
    with gzip.open(REAL / f"{name}.json.gz") as file:
        named = json.load(file)[part]
    if part == "single_file":
        named = {key.removeprefix(PREFIX): shape for key, shape in named.items() if key.startswith(PREFIX)}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in named.items()}
    text = split_text(tensors)
    config = {"hidden_act": "gelu", "num_attention_heads": 16} if expected is None else None
    settings = infer_text(text, config)
    wanted = expected or TextEncoderConfig(width=1024, layers=23, heads=16)
    assert TextEncoderConfig(**settings) == wanted
    with torch.device("meta"):
        encoder = TextEncoder(TextEncoderConfig(**settings))
    table, shapes = text_weights(encoder), {key: value.shape for key, value in encoder.state_dict().items()}
    converted = from_layout(table, text.weights, text.layout, shapes)
    assert converted.keys() == shapes.keys()
    back = to_layout(table, converted, text.layout)
    back = {text.prefix + key: value for key, value in back.items()} | text.rest
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu', wanted 'gelu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06, wanted 1e-05"),
        ({"rope_theta": 1}, "unknown setting rope_theta"),
    ],
)
def test_settings_that_are_not_built_are_refused(config, message):
    text = split_text({"text_model.embeddings.token_embedding.weight": torch.ones(2, 64)})
    with pytest.raises(ValueError, match=message):
        infer_text(text, config)


def test_files_of_no_text_encoder_are_refused():
    with pytest.raises(ValueError, match="no embedding of tokens"):
        split_text({"text_model.encoder.layers.0.layer_norm1.bias": torch.ones(2)})
