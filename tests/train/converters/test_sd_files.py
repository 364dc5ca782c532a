"""Files of Stable Diffusion: what is read of single files and folders, and what is refused."""

import json
from datetime import timedelta

import pytest
import torch
from safetensors.torch import save_file

from train.converters.sd.files import read_source, write_folder, write_single

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def single_tensors():
    names = [UNET + "input_blocks.0.0.weight", UNET + "input_blocks.11.0.weight", VAE + "encoder.conv_in.weight"]
    names += [TEXT + "transformer.text_model.final_layer_norm.weight", "betas", "sqrt_recip_alphas_cumprod"]
    return {name: torch.full((2,), float(i)) for i, name in enumerate(names)}


def averages(value=7.0):
    names = ("diffusion_modelinput_blocks00weight", "diffusion_modelinput_blocks110weight")
    return {f"model_ema.{name}": torch.full((2,), value) for name in names}


def write(path, tensors):
    save_file(tensors, path)
    return path


def test_a_single_file_is_divided_among_its_networks(tmp_path):
    source = read_source(write(tmp_path / "sd.safetensors", single_tensors()))
    assert source.layout == "single" and source.prefixed
    assert {part: sorted(own) for part, own in source.parts.items()} == {
        "unet": ["input_blocks.0.0.weight", "input_blocks.11.0.weight"],
        "autoencoder": ["encoder.conv_in.weight"],
        "text": ["transformer.text_model.final_layer_norm.weight"],
    }
    assert sorted(source.rest) == ["betas", "sqrt_recip_alphas_cumprod"] and not source.omitted


def test_a_single_file_is_written_back(tmp_path):
    path = write(tmp_path / "sd.safetensors", single_tensors())
    source = read_source(path)
    write_single(tmp_path / "back.safetensors", source.parts, source.rest)
    back = read_source(tmp_path / "back.safetensors")
    assert back.parts.keys() == source.parts.keys() and back.rest.keys() == source.rest.keys()
    for part, own in source.parts.items():
        assert all(torch.equal(own[name], back.parts[part][name]) for name in own | back.parts[part])


@pytest.mark.parametrize("ema", [True, False])
def test_averaged_weights_are_chosen_by_flag(tmp_path, ema):
    tensors = single_tensors() | averages() | {"model_ema.decay": torch.tensor(0.99)}
    source = read_source(write(tmp_path / "sd.safetensors", tensors), ema=ema)
    weight = source.parts["unet"]["input_blocks.11.0.weight"]
    assert weight.tolist() == ([7.0, 7.0] if ema else [1.0, 1.0])
    reasons = {*source.omitted.values()}
    assert reasons == {
        "counters of averaged weights",
        *(["plain weights, of which there are averages"] if ema else ()),
    } | (set() if ema else {"averaged weights"})


def test_averages_of_other_weights_are_refused(tmp_path):
    tensors = single_tensors() | averages()
    del tensors["model_ema.diffusion_modelinput_blocks110weight"]
    with pytest.raises(ValueError, match="diffusion_modelinput_blocks110weight.*pass --no_from_averages"):
        read_source(write(tmp_path / "sd.safetensors", tensors))


def test_unknown_tensors_are_refused(tmp_path):
    path = write(tmp_path / "sd.safetensors", single_tensors() | {"conditioner.embedders.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="1 tensors of no known network .conditioner.embedders.0.weight"):
        read_source(path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("input_blocks.0.0.weight", "unet"),
        ("zero_convs.0.0.weight", "control"),
        ("decoder.conv_in.weight", "autoencoder"),
        ("text_model.final_layer_norm.weight", "text"),
        ("resblocks.0.ln_1.weight", "text"),
    ],
)
def test_a_file_of_one_network_needs_no_prefix(tmp_path, name, part):
    tensors = {name: torch.ones(1), "loss.perceptual.weight": torch.ones(1)}
    source = read_source(write(tmp_path / "one.safetensors", tensors))
    assert source.parts == {part: {name: tensors[name]}} and not source.prefixed
    assert [*source.omitted] == ["loss.perceptual.weight"]


def test_a_checkpoint_may_nest_its_weights(tmp_path):
    torch.save({"state_dict": single_tensors(), "global_step": 3, "epoch": 1}, tmp_path / "sd.ckpt")
    assert len(read_source(tmp_path / "sd.ckpt").parts["unet"]) == 2


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path):
    torch.save({"state_dict": single_tensors(), "callbacks": timedelta(1)}, tmp_path / "sd.ckpt")
    with pytest.raises(ValueError, match="holds a datetime.timedelta, which is code, and nothing in it was run"):
        read_source(tmp_path / "sd.ckpt")


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ValueError, match="is damaged"):
        read_source(tmp_path / name)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found: pass a .safetensors"):
        read_source(tmp_path / "sd.safetensors")
    with pytest.raises(FileNotFoundError, match="has no folder unet"):
        read_source(tmp_path)


def pipeline(folder, files=("diffusion_pytorch_model.safetensors",), tensors=None):
    unet = folder / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    for number, file in enumerate(files):
        save_file(tensors or {"conv_in.weight": torch.full((1,), float(number))}, unet / file)
    return folder


def test_a_folder_has_its_networks_and_configs(tmp_path):
    folder = pipeline(tmp_path)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text('{"beta_end": 0.012}')
    source = read_source(folder)
    assert source.layout == "folder" and [*source.parts["unet"]] == ["conv_in.weight"]
    assert source.configs["scheduler"] == {"beta_end": 0.012}
    assert source.configs["unet"]["_class_name"] == "UNet2DConditionModel"


def test_the_folder_of_one_network_is_read(tmp_path):
    source = read_source(pipeline(tmp_path) / "unet")
    assert [*source.parts] == ["unet"] and not source.prefixed


@pytest.mark.parametrize(("variant", "value"), [(None, 0.0), ("fp16", 1.0)])
def test_the_variant_of_a_folder_is_chosen(tmp_path, variant, value):
    files = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    source = read_source(pipeline(tmp_path, files), variant=variant)
    assert source.parts["unet"]["conv_in.weight"].item() == value


def test_the_only_variant_is_taken(tmp_path):
    folder = pipeline(tmp_path, ("diffusion_pytorch_model.fp16.safetensors",))
    assert read_source(folder).parts["unet"]
    with pytest.raises(FileNotFoundError, match="no weights of variant non_ema, only fp16"):
        read_source(folder, variant="non_ema")


def test_several_variants_must_be_named(tmp_path):
    files = [f"diffusion_pytorch_model.{name}.safetensors" for name in ("fp16", "non_ema")]
    with pytest.raises(ValueError, match="has weights of fp16, non_ema: pass --variant fp16"):
        read_source(pipeline(tmp_path, files))


@pytest.mark.parametrize("index", ["safetensors.index.json", "safetensors.index.fp16.json"])
def test_shards_are_read_together(tmp_path, index):
    infix = ".fp16" if "fp16" in index else ""
    files = [f"diffusion_pytorch_model{infix}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    folder = pipeline(tmp_path, ())
    for number, file in enumerate(files):
        save_file({f"w{number}": torch.ones(1)}, folder / "unet" / file)
    table = {"weight_map": {f"w{number}": file for number, file in enumerate(files)}}
    (folder / f"unet/diffusion_pytorch_model.{index}").write_text(json.dumps(table))
    assert sorted(read_source(folder).parts["unet"]) == ["w0", "w1"]
    table["weight_map"]["w2"] = files[0]
    (folder / f"unet/diffusion_pytorch_model.{index}").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="have other tensors than .*w2"):
        read_source(folder)


def test_a_folder_is_written_back(tmp_path):
    source = read_source(pipeline(tmp_path / "a"))
    write_folder(tmp_path / "b", source.parts, source.configs)
    back = read_source(tmp_path / "b")
    assert back.configs == source.configs and torch.equal(
        back.parts["unet"]["conv_in.weight"], source.parts["unet"]["conv_in.weight"]
    )
    with pytest.raises(ValueError, match="is not empty"):
        write_folder(tmp_path / "b", source.parts, source.configs)


def test_a_second_text_encoder_is_refused(tmp_path):
    (pipeline(tmp_path) / "text_encoder_2").mkdir()
    with pytest.raises(ValueError, match="second text encoder .SDXL.: draw from it with diffusers:"):
        read_source(tmp_path)
