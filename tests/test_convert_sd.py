"""Conversion of Stable Diffusion: runs sample and are written back to the bit."""

import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.tiny_runs import ROOT, call
from helpers.tiny_sd import CONFIGS, assert_same_tensors, write_pipeline, write_single_file
from train.converters.sd import runs
from train.converters.sd.files import read_source
from train.inference import load

EPS = "--heads 4 --prediction eps --img_size 32"


def convert(weights, logs, flags=""):
    call("convert.py", f"--from sd --weights {weights} --logs_root {logs} --log_dir sd --no_amp {flags}")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    write_single_file(folder / "tiny.safetensors")
    convert(folder / "tiny.safetensors", folder / "logs", EPS)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    write_pipeline(folder / "tiny")
    convert(folder / "tiny", folder / "logs")
    return folder


def test_settings_of_a_folder_are_those_of_its_files(pipeline):
    config = yaml.safe_load((pipeline / "logs/sd/config.yaml").read_text())
    assert config["sampler"]["prediction"] == "v" and config["sampler"]["heads"] == 4
    assert config["sampling"]["solver"] == "ddim" and config["sampling"]["last_state"] == "first"
    assert config["data"]["img_size"] == 32 and config["origin"]["latent_scale"] == 0.2
    assert config["first"]["ae_load_dir"] == "sd_ae"


def test_a_converted_run_samples_from_prompts(single):
    flags = f"--load_dir {single}/logs/sd --logs_root {single}/logs --n_samples 2 --sample_steps 2 --no_amp"
    call("experiments/get_samples.py", f"{flags} --prompt dog --log_dir samples")
    assert (single / "logs/samples/samples.png").is_file()


def test_a_converted_branch_guides_a_converted_run(single, tmp_path):
    write_single_file(tmp_path / "both.safetensors", control=True)
    call("convert.py", f"--from sd --weights {tmp_path}/both.safetensors --logs_root {tmp_path} --log_dir both {EPS}")
    file, hints = tmp_path / "both/control.safetensors", torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    plain, run, none = (
        load(single / "logs/sd", amp=False, device="cpu", control=control) for control in ({}, {file: 1.0}, {file: 0.0})
    )
    given = {"caption": "dog", "sample_steps": 2, "guidance": 2.0}
    images = [each.sample(2, **given, hint_image=hints).int() for each in (run, none)]
    assert (images[0] - images[1]).abs().max() > 1
    assert (plain.sample(2, **given).int() - images[1]).abs().max() <= 1
    guess = run.sample(2, **given | {"caption": ""}, hint_image=hints, control_guess=True)
    assert guess.shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="whose kind is not known: pass pictures of hints, and --hint_ready"):
        run.sample(1, **given, hint=[str(ROOT / "assets/digits.png")])
    ready = run.sample(1, **given, hint=[str(ROOT / "assets/digits.png")], hint_ready=True)
    assert ready.shape == (1, 3, 32, 32)
    flags = f"--load_dir {single}/logs/sd --logs_root {tmp_path} --n_samples 2 --sample_steps 2 --no_amp --guidance 2"
    flags += f" --control_files {file} --hint {ROOT}/assets/digits.png --hint_ready --log_dir"
    call("experiments/get_samples.py", f"{flags} prompted --prompt dog")
    (tmp_path / "prompts.txt").write_text("dog\ncat\n")
    call("experiments/get_samples.py", f"{flags} listed --prompts {tmp_path}/prompts.txt".replace("--n_samples 2", ""))
    assert (tmp_path / "prompted/samples.png").is_file() and (tmp_path / "listed/samples.png").is_file()


def test_a_single_file_is_written_back_to_the_bit(single):
    output = single / "back.safetensors"
    call("convert.py", f"--to sd --load_dir sd --logs_root {single}/logs --output {output}")
    assert_same_tensors(load_file(single / "tiny.safetensors"), load_file(output))


def test_a_folder_is_written_back_to_the_bit(pipeline):
    output = pipeline / "back"
    call("convert.py", f"--to diffusers --load_dir sd --logs_root {pipeline}/logs --output {output}")
    first, back = read_source(pipeline / "tiny"), read_source(output)
    assert back.configs == first.configs == CONFIGS
    for part, tensors in first.parts.items():
        assert_same_tensors(tensors, back.parts[part])


def test_a_converted_run_is_fine_tuned_by_lora(single):
    data = "--dataset shapes --shapes_count 20 --img_size 32 --captions templates"
    flags = f"--load_dir sd --log_dir tuned --logs_root {single}/logs --lora_rank 2 --save merged {data}"
    training = "--train_steps 2 --batch_size 2 --warmup_iters 0 --sample_steps 2 --no_amp"
    call("train_sampler.py", f"--sampler ddpm {flags} {training}")
    base, tuned = (load_file(path) for path in checkpoints(single / "logs", "sd", "tuned"))
    assert tuned and all(".adapters." in name for name in tuned) and not tuned.keys() & base.keys()
    output = single / "tuned.safetensors"
    call("convert.py", f"--to sd --load_dir tuned --logs_root {single}/logs --output {output}")
    tensors, back = load_file(single / "tiny.safetensors"), load_file(output)
    changed = {name for name, value in tensors.items() if not torch.equal(back[name], value)}
    assert back.keys() == tensors.keys() and changed and all(".attn" in name for name in changed)


def test_tuned_and_merged_runs_are_written(single):
    """A run that learned as a whole holds all its weights; a merged one names the run before it."""
    data = "--dataset shapes --shapes_count 20 --img_size 32 --captions templates"
    training = f"--train_steps 1 --batch_size 2 --warmup_iters 0 --sample_steps 2 --no_amp {data}"
    whole = f"--sampler ddpm --load_dir sd --logs_root {single}/logs {training}"
    call("train_sampler.py", f"{whole} --log_dir whole")
    call("train_sampler.py", f"{whole} --log_dir adapted --lora_rank 1 --save merged")
    for name in ("whole", "adapted_merged"):
        output = single / f"{name}.safetensors"
        call("convert.py", f"--to sd --load_dir {name} --logs_root {single}/logs --output {output}")
        assert load_file(output).keys() == load_file(single / "tiny.safetensors").keys()


def test_averages_of_a_converted_run_are_its_weights(tmp_path):
    write_single_file(tmp_path / "tiny.safetensors")
    convert(tmp_path / "tiny.safetensors", tmp_path, "--heads 4 --prediction eps --img_size 32 --ema --step 7")
    (weights,) = checkpoints(tmp_path, "sd")
    averages = load_file(weights.with_name("ema.safetensors"))
    assert weights.parent.name == "step_00000007"
    assert_same_tensors(load_file(weights), averages)


@pytest.mark.parametrize("flags", ["--config_json a.json", "--new_attention_order", "--load_dir sd"])
def test_flags_without_effect_are_refused(single, flags, capsys):
    with pytest.raises(SystemExit):
        call("convert.py", f"--from sd --weights {single}/tiny.safetensors --heads 4 --prediction eps {flags}")
    assert "leave " in capsys.readouterr().err


def checkpoints(logs, *names):
    """Returns the files of the newest weights of runs."""
    return [max((logs / name / "checkpoints").glob("step_*")) / "model.safetensors" for name in names]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prediction eps", "attention heads do not follow from .*: pass --heads N"),
        ("--heads 4", "predicts eps or v does not follow from .*: pass --prediction v"),
    ],
)
def test_what_does_not_follow_from_a_single_file_is_asked_for(tmp_path, flags, message, capsys):
    write_single_file(tmp_path / "tiny.safetensors")
    with pytest.raises(SystemExit):
        convert(tmp_path / "tiny.safetensors", tmp_path, flags)
    assert re.search(message, capsys.readouterr().err)


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, capsys):
    """The UNet, read last, lacks a tensor; the same command then works with a good file."""
    path, flags = tmp_path / "tiny.safetensors", "--heads 4 --prediction eps --img_size 32"
    tensors = write_single_file(path)
    save_file({name: value for name, value in tensors.items() if name != "model.diffusion_model.out.2.bias"}, path)
    with pytest.raises(SystemExit):
        convert(path, tmp_path / "logs", flags)
    assert "out.2.bias is missing" in capsys.readouterr().err
    assert not [*(tmp_path / "logs").glob("sd*")]
    save_file(tensors, tmp_path / "good.safetensors")
    convert(tmp_path / "good.safetensors", tmp_path / "logs", flags)
    assert sorted(path.name for path in (tmp_path / "logs").glob("sd*")) == ["sd", "sd_ae"]


def test_a_run_that_is_there_stays_as_it_is(pipeline, capsys):
    files = {path: path.read_bytes() for path in (pipeline / "logs").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        convert(pipeline / "tiny", pipeline / "logs", "--ae_load_dir sd_ae")
    assert "logs/sd is not empty: pass another --log_dir, or delete it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (pipeline / "logs").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(("width", "padding"), [(768, "end"), (1024, "zero")])
def test_captions_are_padded_as_in_each_version(width, padding, monkeypatch):
    """The tokenizer of version 1 pads with the end token, that of version 2 with id 0."""
    monkeypatch.setattr(runs, "infer_text", lambda text, config: {"width": width})
    monkeypatch.setattr(runs, "split_text", lambda tensors: tensors)
    source = SimpleNamespace(parts={"text": {}}, configs={})
    assert runs.text_flags(source) == {"text_null": "empty", "text_padding": padding}
