"""A run that was stopped and resumed equals one that never stopped; two processes equal one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import GAN, SAMPLER, VQGAN, call, run

from train.checkpoint import sha256


def weights(folder, step, name="model.safetensors"):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / name)


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


@pytest.mark.parametrize("stop", [2, 5])
def test_vqgan_resumed_is_bitwise_the_one_that_never_stopped(tmp_path, stop):
    flags = f"{VQGAN} {GAN} --steps_per_log 1 --warmup_iters 5"
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir whole --train_steps 7 {flags}")
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir parts --train_steps {stop} {flags}")
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir parts --train_steps 7 {flags}")
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(tmp_path / "whole", 7, name), weights(tmp_path / "parts", 7, name))
    training_lines = [[row for row in lines(tmp_path / run) if "loss" in row] for run in ("whole", "parts")]
    assert training_lines[0] == training_lines[1]


def test_sampler_resumed_is_bitwise_the_one_that_never_stopped_with_dropout(trained):
    flags = f"--logs_root {trained} {SAMPLER} --resid_pdrop 0.1 --attn_pdrop 0.1 --warmup_iters 5"
    call("train_sampler.py", f"--log_dir whole --train_steps 5 {flags}")
    call("train_sampler.py", f"--log_dir parts --train_steps 2 {flags}")
    call("train_sampler.py", f"--log_dir parts --train_steps 5 {flags}")
    assert_equal_bits(weights(trained / "whole", 5), weights(trained / "parts", 5))


def test_resume_needs_the_optimizer(tmp_path):
    """The fault of the reference: without the optimizer's state the next weights are others."""
    flags = f"--logs_root {tmp_path} {VQGAN} {GAN}"
    call("train_vqgan.py", f"--log_dir whole --train_steps 4 {flags}")
    call("train_vqgan.py", f"--log_dir half --train_steps 2 {flags}")
    path = tmp_path / "half" / "checkpoints" / "step_00000002"
    state = torch.load(path / "state.pt", weights_only=True)
    for optimizer in state["optimizers"].values():
        for moments in optimizer["state"].values():
            moments["exp_avg"].zero_()
    torch.save(state, path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest_of(path)))
    call("train_vqgan.py", f"--log_dir half --train_steps 4 {flags}")
    whole, half = weights(tmp_path / "whole", 4), weights(tmp_path / "half", 4)
    assert any(not torch.equal(whole[key], half[key]) for key in whole)


def manifest_of(path):
    files = [f for f in path.iterdir() if f.name != "manifest.json"]
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def assert_close(one, other):
    """All weights together, relative: Adam turns the rounding of a zero gradient (a bias before a norm) into steps."""
    assert one.keys() == other.keys()
    difference = sum((one[key] - other[key]).square().sum() for key in one).sqrt()
    assert difference <= 1e-5 * sum(one[key].square().sum() for key in one).sqrt()


def assert_same_losses(one, other):
    """Every number of metrics.jsonl to 1e-5 relative, line by line."""
    assert len(lines(one)) == len(lines(other)) > 0
    for row, twin in zip(lines(one), lines(other), strict=True):
        assert row == pytest.approx(twin, rel=1e-5, abs=1e-7)


def test_two_processes_equal_one_in_both_stages(tmp_path):
    flags = f"--logs_root {tmp_path} --no_amp --weight_decay 0.01 --steps_per_log 1"
    vqgan = f"{flags} {VQGAN} {GAN} --train_steps 5 --disc_weight_max 1000 --lr 1e-4"
    sampler = f"{flags} {SAMPLER} --train_steps 4 --ae_load_dir one"
    one = run("train_vqgan.py", f"{vqgan} --log_dir one")
    two = run("train_vqgan.py", f"{vqgan} --log_dir two", processes=2)
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert_close(weights(tmp_path / "one", 5), weights(tmp_path / "two", 5))
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    logged = [row for row in lines(tmp_path / "two") if "adaptive_weight" in row]
    assert logged and 0 < logged[-1]["adaptive_weight"] < 1000  # the clamp must not hide the weight
    two = run("train_sampler.py", f"{sampler} --log_dir sampler_two", processes=2)
    codes = tmp_path / "one" / "codes"
    encoded_by_two = {path.name: path.read_bytes() for path in codes.iterdir()}
    shutil.rmtree(codes)
    one = run("train_sampler.py", f"{sampler} --log_dir sampler_one")
    assert encoded_by_two == {path.name: path.read_bytes() for path in codes.iterdir()}
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert_close(weights(tmp_path / "sampler_one", 4), weights(tmp_path / "sampler_two", 4))
    assert_same_losses(tmp_path / "sampler_one", tmp_path / "sampler_two")


def test_accumulation_equals_the_whole_batch_without_gan(tmp_path):
    flags = f"--logs_root {tmp_path} --train_steps 3 --no_amp {VQGAN} --perceptual_net none"
    call("train_vqgan.py", f"{flags} --log_dir whole")
    call("train_vqgan.py", f"{flags} --log_dir parts --accumulate 2")
    assert_close(weights(tmp_path / "whole", 3), weights(tmp_path / "parts", 3))


def test_load_dir_starts_from_weights_and_not_from_the_step(tmp_path):
    flags = f"--logs_root {tmp_path} {VQGAN} --perceptual_net none"
    call("train_vqgan.py", f"{flags} --log_dir first --train_steps 2")
    call("train_vqgan.py", f"{flags} --log_dir second --train_steps 1 --load_dir first --lr 1e-12")
    start, after = weights(tmp_path / "first", 2), weights(tmp_path / "second", 1)
    assert all(torch.allclose(start[key], after[key], atol=1e-6) for key in start)
