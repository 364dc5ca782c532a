"""Files of adapters that --lora and `load` merge into the weights of a run, above all those of other trainers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.run_asserts import assert_equal_bits
from helpers.tiny_runs import call
from helpers.tiny_sd import write_single_file
from models.lora import merge
from models.transformer import Transformer
from models.unet import UNet, UNetConfig
from train.inference import load
from train.lora_merging import AdapterFile, check_adapter_files, check_base, merge_adapter_files, parse_adapter_files

UNET_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
TEXT_LAYER = "text_model.encoder.layers.0.self_attn.v_proj"
OURS = {  # of each: the weight, and its rows
    UNET_LAYER: ("down_blocks.0.1.attention.qkv.weight", slice(32, 64)),
    TEXT_LAYER: ("encoders.text.encoder.blocks.0.attention.qkv.weight", slice(128, 192)),
}
DATA = "--dataset shapes --shapes_count 20 --img_size 32 --captions templates"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `sd`, a converted Stable Diffusion, and `tuned`, whose adapters were trained on it."""
    logs = tmp_path_factory.mktemp("sd")
    write_single_file(logs / "tiny.safetensors")
    flags = f"--logs_root {logs} --no_amp"
    options = "--log_dir sd --heads 4 --prediction eps --img_size 32"
    call("convert.py", f"--from sd --weights {logs}/tiny.safetensors {options} {flags}")
    options = f"--log_dir tuned --load_dir sd --lora_rank 2 --lora_targets attention text {DATA} --sample_steps 2"
    call("train_sampler.py", f"--sampler ddpm {options} --train_steps 2 --batch_size 2 --warmup_iters 0 {flags}")
    return logs


@pytest.fixture
def changes():
    """Adapters of rank 2 by the names of their layers in a folder: down (2, width) and up (width, 2)."""
    torch.manual_seed(0)
    widths = {UNET_LAYER: 32, TEXT_LAYER: 64}
    return {layer: (torch.randn(2, width), torch.randn(width, 2)) for layer, width in widths.items()}


def write_kohya(path, changes):
    tensors = {}
    for layer, (down, up) in changes.items():
        name = f"{'lora_te' if layer == TEXT_LAYER else 'lora_unet'}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, path)


def write_diffusers(path, changes):
    tensors, settings = {}, {}
    for layer, pair in changes.items():
        part = "text_encoder" if layer == TEXT_LAYER else "unet"
        tensors |= {f"{part}.{layer}.lora_{end}.weight": each for end, each in zip("AB", pair, strict=True)}
        settings |= {f"{part}.r": 2, f"{part}.lora_alpha": 1}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})


def write_peft(path, changes):
    """A folder, of the UNet alone."""
    path.mkdir()
    del changes[TEXT_LAYER]
    pair = zip("AB", changes[UNET_LAYER], strict=True)
    tensors = {f"base_model.model.{UNET_LAYER}.lora_{end}.weight": each for end, each in pair}
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))


def network_of(logs, name, **lora):
    return load(logs / name, device="cpu", amp=False, logs_root=logs, **lora).model.sampler.network


@pytest.mark.parametrize("name", ["sd", "tuned"])
@pytest.mark.parametrize("write", [write_kohya, write_diffusers, write_peft])
def test_files_of_others_change_the_rows_that_they_name(logs, tmp_path, changes, write, name):
    """A change is alpha / rank times up times down, times the strength."""
    write(tmp_path / "style", changes)
    network = network_of(logs, name)
    merge(network)
    wanted = {key: value for key, value in network.state_dict().items() if ".adapters." not in key}
    for layer, (down, up) in changes.items():
        key, rows = OURS[layer]
        wanted[key][rows] += 0.8 / 2 * up @ down
    got = network_of(logs, name, lora={tmp_path / "style": 0.8}).state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[key], wanted[key], rtol=0, atol=1e-5) for key in wanted)


def test_adapters_of_a_frozen_text_encoder_learn(logs):
    """Embeddings of captions are cached for encoders that do not learn, and only for these."""
    tensors = load_file(logs / "tuned" / "lora.safetensors")
    learned = {key for key, value in tensors.items() if key.endswith(".up") and value.any()}
    assert any(key.startswith("encoders.text.encoder.blocks.0.attention.") for key in learned)
    assert any(key.startswith("down_blocks.0.1.attention.") for key in learned)


def test_the_command_line_takes_files_of_others(logs, tmp_path, changes):
    write_kohya(tmp_path / "style.safetensors", changes)
    common = f"--sampler ddpm --load_dir sd --logs_root {logs} --n_samples 1 --sample_steps 2 --prompt dog --no_amp"
    for name, flags in (("without", ""), ("with", f"--lora {tmp_path}/style.safetensors=1")):
        call("experiments/get_samples.py", f"{common} --log_dir {tmp_path / name} {flags}")
    images = [np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("without", "with")]
    assert images[0].shape == images[1].shape and not np.array_equal(*images)


def small_unet(block):
    torch.manual_seed(0)
    options = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
    return UNet(UNetConfig(**options, attn_block_type=block)).eval()


REASONS = {
    r"\(got a Transformer, wanted a UNet\)": lambda: Transformer(codes=5, grid=(2, 2), width=8, heads=2, layers=1),
    r"\(got a SelfAttentionBlock at .*its blocks are of type transformer\)": lambda: small_unet("softmax"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_files_of_others_are_not_for_other_networks(reason, tmp_path, changes):
    write_kohya(tmp_path / "style.safetensors", changes)
    network, message = REASONS[reason](), f"got .*style.safetensors, whose names are .*{reason}: pass a run of convert"
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_adapter_files(network, [AdapterFile(tmp_path / "style.safetensors")], "hash")
    assert_equal_bits(network.state_dict(), before)


def test_the_result_is_identified_by_files_and_strengths(tmp_path):
    hashes = set()
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    for number, alpha in enumerate((1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = {"lora_A.weight": torch.ones(2, 16), "lora_B.weight": torch.ones(16, 2)}
        save_file({f"{layer}.{end}": value for end, value in tensors.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        for base, strength in (("a", 1.0), ("b", 1.0), ("a", 0.5)):
            hashes.add(merge_adapter_files(small_unet("transformer"), [AdapterFile(folder, strength)], base))
    assert len(hashes) == 6  # peft's settings count too


def test_adapters_are_for_the_weights_that_they_name(tmp_path):
    check_base("a" * 64, "a" * 64, tmp_path)
    check_base("", "a" * 64, tmp_path)  # they name none
    with pytest.raises(ValueError, match=r"was trained on weights with SHA-256 bbbbbbbbbbbb\.\.\., got aaaaaaaaaaaa"):
        check_base("b" * 64, "a" * 64, tmp_path)


def test_files_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a=1").write_text("")
    expected = [AdapterFile(tmp_path / "a=1"), AdapterFile(tmp_path / "b", 0.5)]
    assert parse_adapter_files(["~/a=1", "~/b=0.5"]) == expected
    assert check_adapter_files({"~/a=1": 1, Path("~/b"): 0.5}) == expected


def test_words_are_files_with_strengths(tmp_path):
    (tmp_path / "a=0.5").write_text("")
    words = [f"{tmp_path}/a=0.5", f"{tmp_path}/a=0.5=-2", "gone=0.25", "gone"]
    files = parse_adapter_files(words)
    got = [(file.path.name, file.strength) for file in files]
    assert got == [("a=0.5", 1), ("a=0.5", -2), ("gone", 0.25), ("gone", 1)]
    for word in ("gone=much", "gone=nan", "gone="):
        with pytest.raises(ValueError, match=f"got --lora {word}, wanted FILE or FILE=STRENGTH, such as gone=0.8"):
            parse_adapter_files([word])


def test_a_dict_holds_files_with_strengths(tmp_path):
    assert check_adapter_files({"a": 1, tmp_path: 0.5}) == [*parse_adapter_files(["a"]), AdapterFile(tmp_path, 0.5)]
    for wrong in ("a.safetensors", ["a"], {"a": "0.8"}, {"a": True}, {3: 0.8}):
        with pytest.raises(TypeError, match="got lora .*, wanted a dict of strengths by file"):
            check_adapter_files(wrong)
    for strength in (math.nan, -math.inf):
        with pytest.raises(ValueError, match=f"got lora a: {strength}, wanted a finite strength"):
            check_adapter_files({"a": strength})
