"""Samplers of codes that read words of regions and have experts, from training to images, and in two processes."""

import numpy as np
import pytest
import torch

from helpers.process_pool import ProcessPool
from helpers.run_asserts import assert_close, assert_same_losses, lines, weights
from helpers.tiny_runs import SAMPLER, VQGAN, call

DATA = "--dataset shapes --shapes_count 24 --no_amp --steps_per_eval 0"
READS = "--conditions text region_words --text_width 16 --text_layers 1 --text_heads 2 --experts disc,ring sky"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("codes")
    vqgan = f"{VQGAN} --perceptual_net none --disc_start_step 9 --train_steps 2"
    call("train_vqgan.py", f"--logs_root {logs} --log_dir vqgan {DATA} {vqgan}")
    return logs


def flags_of(logs, sampler, steps, name):
    sizes = SAMPLER.replace("steps 4", "steps 16")  # codes of a grid, which an autoregressive sampler draws one by one
    run = f"--ae_load_dir {logs}/vqgan --lr 0.01 --steps_per_checkpoint 1 --keep_last 0 --ema_beta 0"
    run += f" --train_steps {steps} --log_dir {name}"
    return f"--logs_root {logs} --sampler {sampler} {DATA} {sizes} {run} {READS}"


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_codes_are_trained_resumed_and_sampled_from_maps(logs, sampler):
    for name, steps in (("stopped", 1), ("stopped", 3), ("whole", 3)):
        call("train_sampler.py", flags_of(logs, sampler, steps, f"{sampler}_{name}"))
    one, other = (weights(logs / f"{sampler}_{name}", 3) for name in ("stopped", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    used = [row for row in lines(logs / f"{sampler}_whole") if "experts/0" in row]
    assert used and all(abs(sum(row[f"experts/{i}"] for i in range(3)) - 1) < 1e-6 for row in used)
    drawn = {}
    for scale in (0, 9):
        options = f"--guidance 1 --region_guidance {scale} --n_samples 4 --batch_size 2 --log_dir {sampler}_{scale}"
        call(
            "experiments/get_samples.py", f"--logs_root {logs} --sampler {sampler} --load_dir {sampler}_whole {options}"
        )
        drawn[scale] = np.load(logs / f"{sampler}_{scale}" / "samples.npz")["arr_0"]
    assert drawn[0].shape == (4, 16, 16, 3) and (drawn[0] != drawn[9]).any()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_same_sampler_as_one(logs, parallel):
    pool = ProcessPool(2)
    try:
        pool.run("train_sampler.py", f"{flags_of(logs, 'absorbing', 4, parallel)} --parallel {parallel}")
    finally:
        pool.close()
    call("train_sampler.py", flags_of(logs, "absorbing", 4, f"one_{parallel}"))
    assert_same_losses(logs / f"one_{parallel}", logs / parallel)
    assert_close(weights(logs / f"one_{parallel}", 4), weights(logs / parallel, 4))
