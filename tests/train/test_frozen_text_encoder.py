"""A frozen text encoder stays in its file: what checkpoints hold, and where the rest comes from."""

import pytest
import torch
import yaml

import train.finetuning
from helpers.captioned import write_captioned_images, write_encoder
from helpers.run_asserts import assert_equal_bits, saved_state, weights
from helpers.tiny_runs import DDPM, call
from train.files import sha256
from train.inference import load
from train.text_encoder_file import read_text_encoder

FAST = DDPM.replace("--warmup_iters 100", "--warmup_iters 0")
RUN = f"{FAST} --attn_block_type transformer --no_amp --lr 1e-2 --steps_per_eval 0 --keep_last 0"
LORA = "--lora_rank 2 --lora_targets text attention"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_captioned_images(tmp_path_factory.mktemp("data"), ["a dog", "a red hat"])


@pytest.fixture(scope="module")
def logs(tmp_path_factory, data):
    """Logs with `base`, 4 steps with a frozen text encoder whose file is beside it."""
    logs = tmp_path_factory.mktemp("logs")
    train_in(logs, data, "base", f"--train_steps 4 --conditions text --text_encoder {write_encoder(logs / 'a.st')}")
    return logs


def train_in(root, data, name, flags):
    common = f"--logs_root {root} --log_dir {name} {RUN} {data} --steps_per_checkpoint 1"
    call("train_sampler.py", f"{common} {flags}", validation_images=2)
    return root / name


def new_run(root, data, flags="", steps=1):
    """A run of its own with an encoder beside it."""
    file = root / "a.st" if (root / "a.st").exists() else write_encoder(root / "a.st")
    return train_in(root, data, "own", f"--train_steps {steps} --conditions text --text_encoder {file} {flags}"), file


def encoder_state(run):
    return load(run, ema=False).model.sampler.network.encoders["text"].encoder.state_dict()


def of_encoder(tensors):
    return {key for key in tensors if ".text.encoder." in key}


def test_checkpoints_leave_a_frozen_encoder_in_its_file(logs):
    for file in ("model.safetensors", "ema.safetensors"):
        saved = weights(logs / "base", 4, file)
        assert not of_encoder(saved) and "network.encoders.text.null" in saved
    origin = yaml.safe_load((logs / "base" / "config.yaml").read_text())["origin"]
    assert origin["text_encoder"] == "a.st" and origin["text_sha256"] == sha256(logs / "a.st")
    assert_equal_bits(encoder_state(logs / "base"), read_text_encoder(logs / "a.st").state_dict())


def test_a_run_needs_the_file_with_its_content(tmp_path, data):
    (tmp_path / "there").mkdir()
    run, file = new_run(tmp_path / "there", data)
    (tmp_path / "there").rename(tmp_path / "moved")
    run, file = (tmp_path / "moved" / path.name for path in (run, file))
    load(run)
    write_encoder(file, seed=1)
    with pytest.raises(ValueError, match=r"a.st has SHA-256 .*, wanted .*, that of the text encoder of .*own"):
        load(run)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="a.st not found, the frozen text encoder of .*own: put it back"):
        load(run)


def test_full_checkpoints_need_no_file(tmp_path, data):
    run, file = new_run(tmp_path, data, "--save full")
    wanted = read_text_encoder(file).state_dict()
    file.unlink()
    assert len(of_encoder(weights(run, 1))) == len(wanted)
    assert_equal_bits(encoder_state(run), wanted)


def test_runs_of_earlier_versions_go_on_as_they_began(tmp_path, data, monkeypatch):
    """Their checkpoints hold the encoder, and samples need no file."""
    with monkeypatch.context() as patch:
        patch.setattr(train.finetuning, "saves_text_encoder", lambda *args: True)
        new_run(tmp_path, data)
    run, file = new_run(tmp_path, data, steps=2)
    assert len(of_encoder(weights(run, 2))) == len(of_encoder(weights(run, 1))) > 10
    file.unlink()
    load(run)


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, data):
    for name, steps in (("parts", 1), ("parts", 3), ("whole", 3)):
        (tmp_path / name).mkdir(exist_ok=True)
        new_run(tmp_path / name, data, "--lr_schedule constant", steps)
    for file in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(*(weights(tmp_path / name / "own", 3, file) for name in ("parts", "whole")))


@pytest.mark.parametrize("flags", ["", "--save full", "--train_only conv_out", LORA])
def test_training_may_start_from_such_a_run(logs, data, tmp_path, flags):
    run = train_in(tmp_path, data, "next", f"--train_steps 1 --load_dir {logs}/base {flags}")
    saved, wanted = weights(run, 1), read_text_encoder(logs / "a.st").state_dict()
    assert len(of_encoder({key for key in saved if ".adapters." not in key})) == ("full" in flags) * len(wanted)
    state = encoder_state(run)
    assert_equal_bits({key: state[key] for key in wanted}, wanted)


def test_another_encoder_is_refused_with_such_a_run(logs, data, tmp_path, capfd):
    file = write_encoder(tmp_path / "b.st", seed=1)
    with pytest.raises(SystemExit) as stop:
        train_in(tmp_path, data, "next", f"--train_steps 1 --load_dir {logs}/base --text_encoder {file}")
    output = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "was trained with another text encoder, " in output and "/a.st: pass that" in output
    assert not (tmp_path / "next").exists()


def test_adapters_of_a_frozen_encoder_learn(logs, data, tmp_path):
    """Captions are then encoded by the network, not read from the cache."""
    flags = f"--load_dir {logs}/base {LORA} --lora_rank_of text=1 --lr_scale text=0.75"
    run = train_in(tmp_path, data, "lora", f"--train_steps 2 {flags}")
    saved = {key: value for key, value in weights(run, 2).items() if key.endswith(".up")}
    text = of_encoder(saved)
    assert text and all(saved[key].any() for key in text) and not (tmp_path / ".cache" / "text").exists()
    assert {(key in text, value.shape[1]) for key, value in saved.items()} == {(True, 1), (False, 2)}
    groups = saved_state(run, 2)["optimizers"]["network"]["param_groups"]
    assert {group["lr_scale"]: len(group["params"]) // 2 for group in groups} == {
        0.75: len(text),
        1.0: len(saved) - len(text),
    }


def test_an_encoder_that_was_tuned_is_kept(logs, data, tmp_path):
    """Weights that adapters were merged into are no longer those of the file."""
    tuning = "--lora_rank 2 --lora_targets text --save merged --train_steps 2"
    train_in(tmp_path, data, "tuned", f"--load_dir {logs}/base {tuning}")
    assert "text_encoder" not in yaml.safe_load((tmp_path / "tuned_merged" / "config.yaml").read_text())["origin"]
    merged = encoder_state(tmp_path / "tuned_merged")
    run = train_in(tmp_path, data, "next", "--train_steps 1 --load_dir tuned_merged")
    file = read_text_encoder(logs / "a.st").state_dict()
    changed = {key for key in file if not torch.equal(merged[key], file[key])}
    assert {key.partition(".text.encoder.")[2] for key in of_encoder(weights(run, 1))} == changed != set()
    assert_equal_bits(encoder_state(run), merged)
    train_in(tmp_path, data, "next", "--train_steps 2 --load_dir tuned_merged")
    assert_equal_bits(encoder_state(run), merged)
    assert not (tmp_path / ".cache" / "text").exists()
