"""Resumed runs match uninterrupted ones, and micro-batches match the full batch."""

import json

import pytest
import torch

from helpers.run_asserts import (
    assert_close,
    assert_equal_bits,
    assert_same_ddpm,
    extras,
    lines,
    manifest_of,
    saved_state,
    weights,
)
from helpers.tiny_runs import DDPM, GAN, SAMPLER, VQGAN, call

EMA_QUANTIZER = "--quantizer ema --revive_below 0.5 --lecam_weight 0.1 --disc_spectral_norm --disc_blur"
GUMBEL = "--quantizer gumbel --gumbel_decay_steps 20"  # the default is the length at which a run starts
RESUMED = [
    (5, EMA_QUANTIZER),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, ""), (5, ""), (2, GUMBEL))),
]


@pytest.mark.parametrize(("stop", "extra_flags"), RESUMED)
def test_a_resumed_vqgan_is_bitwise_equal(tmp_path, stop, extra_flags):
    flags = f"{VQGAN} {GAN} --steps_per_log 1 --warmup_iters 5 {extra_flags}"
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir whole --train_steps 7 {flags}")
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir parts --train_steps {stop} {flags}")
    call("train_vqgan.py", f"--logs_root {tmp_path} --log_dir parts --train_steps 7 {flags}")
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(tmp_path / "whole", 7, name), weights(tmp_path / "parts", 7, name))
    training_lines = [[row for row in lines(tmp_path / run) if "loss" in row] for run in ("whole", "parts")]
    assert training_lines[0] == training_lines[1]


def test_a_resumed_sampler_with_dropout_is_bitwise_equal(trained):
    flags = f"--logs_root {trained} {SAMPLER} --resid_pdrop 0.1 --attn_pdrop 0.1 --warmup_iters 5"
    call("train_sampler.py", f"--log_dir whole --train_steps 5 {flags}")
    call("train_sampler.py", f"--log_dir parts --train_steps 2 {flags}")
    call("train_sampler.py", f"--log_dir parts --train_steps 5 {flags}")
    assert_equal_bits(weights(trained / "whole", 5), weights(trained / "parts", 5))


def test_a_resumed_run_with_8_bit_moments_is_bitwise_equal(tmp_path):
    pytest.importorskip("bitsandbytes")
    flags = f"--logs_root {tmp_path} {DDPM} --channels 32 --optimizer adamw8bit --warmup_iters 5 --steps_per_eval 0"
    call("train_sampler.py", f"{flags} --log_dir whole --train_steps 5")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps 2")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps 5")
    assert_equal_bits(weights(tmp_path / "whole", 5), weights(tmp_path / "parts", 5))
    states = saved_state(tmp_path / "whole", 5)["optimizers"]["network"]["state"].values()
    moments = [tensor for state in states for tensor in flatten(state) if tensor.dtype == torch.uint8]
    assert len(moments) > 4 and all(tensor.any() for tensor in moments)


def flatten(state):
    """The tensors in nested dicts."""
    for value in state.values():
        if isinstance(value, dict):
            yield from flatten(value)
        elif isinstance(value, torch.Tensor):
            yield value


LOW_DISCREPANCY = "--time_sampler low_discrepancy"  # over the global batch
BY_LOSS = "--time_sampler loss_second_moment --loss_type vlb --total_steps 4 --batch_size 8"
RESUMED_DDPM = [
    (BY_LOSS, 9, 11),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("--dropout 0.1", 2, 5), (BY_LOSS, 4, 11))),
]


@pytest.mark.parametrize(("flags", "stop", "steps"), RESUMED_DDPM)
def test_a_resumed_ddpm_is_bitwise_equal(tmp_path, flags, stop, steps):
    flags = f"--logs_root {tmp_path} {DDPM} --warmup_iters 5 --steps_per_log 1 --steps_per_eval 0 {flags}"
    call("train_sampler.py", f"{flags} --log_dir whole --train_steps {steps}")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps {stop}")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps {steps}")
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(tmp_path / "whole", steps, name), weights(tmp_path / "parts", steps, name))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    expected, resumed = (extras(tmp_path / name, steps) for name in ("whole", "parts"))
    assert expected.keys() == resumed.keys() == ({"times"} if "loss_second_moment" in flags else set())
    for name in expected:
        assert_equal_bits(expected[name], resumed[name])
        assert expected[name]["count"].sum() == 8 * steps  # every loss was observed
        assert (expected[name]["count"] >= 10).all()  # so the last times were sampled by their losses


@pytest.mark.slow
def test_resuming_needs_the_time_samplers_losses(tmp_path):
    """Without them times are uniform again, and the weights differ."""
    flags = f"--logs_root {tmp_path} {DDPM} --steps_per_eval 0 {BY_LOSS}"
    call("train_sampler.py", f"{flags} --log_dir whole --train_steps 11")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps 9")
    path = tmp_path / "parts" / "checkpoints" / "step_00000009"
    state = torch.load(path / "state.pt", weights_only=True)
    for values in state["extras"]["times"].values():
        values.zero_()
    torch.save(state, path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest_of(path)))
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps 11")
    uninterrupted, resumed = weights(tmp_path / "whole", 11), weights(tmp_path / "parts", 11)
    assert any(not torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)


@pytest.mark.slow
def test_resuming_needs_the_optimizer(tmp_path):
    """The reference did not save the optimizer state, so its weights differ after a resume."""
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
    uninterrupted, resumed = weights(tmp_path / "whole", 4), weights(tmp_path / "half", 4)
    assert any(not torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted)


@pytest.mark.parametrize("flags", [pytest.param(LOW_DISCREPANCY, marks=pytest.mark.slow), BY_LOSS])
def test_accumulation_equals_the_full_batch_for_ddpm(tmp_path, flags):
    flags = f"--logs_root {tmp_path} --no_amp --steps_per_log 1 --steps_per_eval 0 --train_steps 10 {DDPM} {flags}"
    call("train_sampler.py", f"{flags} --log_dir one")
    call("train_sampler.py", f"{flags} --log_dir parts --accumulate 4")
    assert_same_ddpm(tmp_path / "one", tmp_path / "parts", 10)


def test_accumulation_equals_the_full_batch_without_gan(tmp_path):
    flags = f"--logs_root {tmp_path} --train_steps 3 --no_amp {VQGAN} --perceptual_net none"
    call("train_vqgan.py", f"{flags} --log_dir whole")
    call("train_vqgan.py", f"{flags} --log_dir parts --accumulate 2")
    assert_close(weights(tmp_path / "whole", 3), weights(tmp_path / "parts", 3))


def test_load_dir_loads_weights_but_not_the_step(tmp_path):
    flags = f"--logs_root {tmp_path} {VQGAN} --perceptual_net none"
    call("train_vqgan.py", f"{flags} --log_dir first --train_steps 2")
    call("train_vqgan.py", f"{flags} --log_dir second --train_steps 1 --load_dir first --lr 1e-12")
    source, loaded = weights(tmp_path / "first", 2), weights(tmp_path / "second", 1)
    assert all(torch.allclose(source[key], loaded[key], atol=1e-6) for key in source)
