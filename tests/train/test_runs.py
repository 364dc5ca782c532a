"""A run is identified by its config and by the content of the weights that it starts from."""

import json
import shutil

import pytest
import torch
import torchvision
import yaml

from helpers.tiny_runs import GAN, SAMPLER, VQGAN, call
from train.config import TrainingConfig
from train.runs import read_continued_network


def error_message(capfd, script, flags):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    return capfd.readouterr().err


def test_a_run_that_goes_on_keeps_settings_that_are_defaults_now(tmp_path):
    stored = {"quantizer": "gumbel", "emb_dim": 32, "gumbel_decay_steps": 160_000}
    for name in ("old", "no_checkpoint"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"network": stored}))
    checkpoint = tmp_path / "old" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()

    def read(name, quantizer="gumbel", **training):
        return read_continued_network(tmp_path / name, TrainingConfig(**training), str(tmp_path), quantizer)

    assert read("old") == read("new", resume=str(checkpoint)) == read("old", load_dir="other") == stored
    assert read("new", load_dir="old") == {"emb_dim": 32}  # its temperature starts again
    assert read("new") == read("no_checkpoint") == read("old", "l2") == {}


@pytest.mark.slow
def test_the_same_command_resumes_and_others_name_differences(tmp_path, capfd):
    flags = f"--logs_root {tmp_path} {VQGAN} {GAN}"
    call("train_vqgan.py", f"{flags} --train_steps 2")
    call("train_vqgan.py", f"{flags} --train_steps 2")
    assert "nothing left to do" in capfd.readouterr().out
    message = error_message(capfd, "train_vqgan.py", f"{flags} --train_steps 2 --beta 0.5 --seed 4")
    assert "--beta 0.25 -> 0.5" in message and "--seed 0 -> 4" in message and "--log_dir" in message
    call("train_vqgan.py", f"{flags} --train_steps 3 --steps_per_log 1")  # the same run
    assert yaml.safe_load((tmp_path / "vqgan_digits" / "config.yaml").read_text())["training"]["train_steps"] == 3
    assert "--train_steps 3 -> 1" in error_message(capfd, "train_vqgan.py", f"{flags} --train_steps 1")


@pytest.mark.slow
def test_other_vqgan_weights_make_another_run(tmp_path, capfd):
    call("train_vqgan.py", f"--logs_root {tmp_path} {VQGAN} {GAN} --train_steps 1")
    call("train_sampler.py", f"--logs_root {tmp_path} {SAMPLER} --train_steps 1")
    call("train_vqgan.py", f"--logs_root {tmp_path} {VQGAN} {GAN} --train_steps 2")
    assert "other weights" in error_message(
        capfd, "train_sampler.py", f"--logs_root {tmp_path} {SAMPLER} --train_steps 1"
    )
    flags = f"--logs_root {tmp_path} --ae_load_dir vqgan_digits --n_samples 2"
    message = error_message(capfd, "experiments/get_samples.py", flags)
    assert "other VQGAN weights" in message
    call("experiments/get_samples.py", f"--logs_root {tmp_path} --n_samples 2")  # finds the weights it was trained on


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    flags = f"--logs_root {tmp_path} {VQGAN} {GAN} --steps_per_log 1"
    call("train_vqgan.py", f"{flags} --train_steps 2")
    path = tmp_path / "vqgan_digits" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')
    call("train_vqgan.py", f"{flags} --train_steps 4")
    steps = [row["step"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
    assert steps == [1, 2, 3, 4]


def test_the_files_that_a_run_writes(trained):
    for name in ("vqgan_digits", "absorbing_digits"):
        run = trained / name
        assert (run / "config.yaml").is_file() and (run / "metrics.jsonl").is_file()
        assert list(run.glob("events.out.tfevents.*")) and list((run / "images").glob("*.png"))
        assert list((run / "checkpoints").glob("step_*/manifest.json"))
    rows = [json.loads(line) for line in (trained / "vqgan_digits" / "metrics.jsonl").read_text().splitlines()]
    logged = set().union(*rows)
    assert {"loss", "l1", "vq", "adversarial", "adaptive_weight", "disc_loss", "val/l1", "val/usage"} <= logged
    assert {"perf/images_per_second", "lr"} <= logged


def test_the_discriminator_costs_nothing_before_its_start(tmp_path):
    from safetensors.torch import load_file

    flags = f"--logs_root {tmp_path} {VQGAN} --perceptual_net none --steps_per_log 1 --steps_per_checkpoint 1"
    call("train_vqgan.py", f"{flags} --disc_start_step 2 --train_steps 3")
    saved = [load_file(p / "model.safetensors") for p in sorted((tmp_path / "vqgan_digits/checkpoints").glob("step_*"))]
    changed = [
        any(not (a[key] == b[key]).all() for key in a if key.startswith("discriminator"))
        for a, b in zip(saved[:-1], saved[1:], strict=True)
    ]
    assert changed == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "vqgan_digits/metrics.jsonl").read_text().splitlines()]
    assert [("disc_loss" in row) for row in rows if "loss" in row] == [False, False, True]


@pytest.mark.slow
def test_perceptual_weights_are_identified_by_content(tmp_path, capfd):
    for name in ("one", "other"):
        torch.save(torchvision.models.squeezenet1_1(weights=None).features.state_dict(), tmp_path / f"{name}.pth")
    shutil.copy(tmp_path / "one.pth", tmp_path / "moved.pth")
    flags = f"--logs_root {tmp_path} {VQGAN} --img_size 32 --perceptual_net squeeze --perceptual_weights {tmp_path}"
    call("train_vqgan.py", f"{flags}/one.pth --train_steps 1")
    call("train_vqgan.py", f"{flags}/moved.pth --train_steps 2")
    with pytest.raises(SystemExit) as stop:
        call("train_vqgan.py", f"{flags}/other.pth --train_steps 2")
    assert stop.value.code == 2 and "perceptual_sha256" in capfd.readouterr().err
    call("train_vqgan.py", f"{flags}/nowhere.pth --train_steps 1 --perceptual_weight 0 --log_dir without")
    report = f"--logs_root {tmp_path} --n_images 4 --log_dir report"
    call("experiments/calc_VQGAN_FID.py", f"{report} --perceptual_weights {tmp_path}/one.pth")
    with pytest.raises(SystemExit):
        call("experiments/calc_VQGAN_FID.py", f"{report} --perceptual_weights {tmp_path}/other.pth")
    assert "perceptual_sha256" in capfd.readouterr().err
