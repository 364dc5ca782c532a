"""--ema_length: experiments on an average whose length is chosen after training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.tiny_runs import DDPM, call
from train.posthoc_ema import reconstruct_ema, snapshot_path

POSTHOC_WEIGHTS = "--ema_profiles 0.05 0.1 --steps_per_ema_snapshot 2 --keep_last 0"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run of five steps with snapshots of 2, 4 and 5, and one without snapshots."""
    logs = tmp_path_factory.mktemp("ema_length")
    call("train_sampler.py", f"--logs_root {logs} --train_steps 5 --no_amp --lr 0.01 {DDPM} {POSTHOC_WEIGHTS}")
    call("train_sampler.py", f"--logs_root {logs} --train_steps 2 --no_amp {DDPM} --log_dir without")
    return logs


def model(logs, **options):
    return load_model(ModelConfig(sampler="ddpm", **options), OutputConfig(logs_root=str(logs), amp=False))


def weights(trained):
    return trained.sampler.network.state_dict()


@pytest.mark.parametrize(
    ("load_step", "step"), [(None, 5), *(pytest.param(n, n, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_the_weights_are_the_reconstructed_average(logs, load_step, step, capfd):
    trained = model(logs, ema_length=0.08, load_step=load_step)
    expected = reconstruct_ema(logs / "ddpm_digits", step, "network", 0.08)
    assert trained.step == step
    assert all(torch.equal(value, expected[key]) for key, value in weights(trained).items())
    assert f"step {step}, EMA reconstructed at relative length 0.08; pixels" in capfd.readouterr().out
    other = weights(model(logs))
    assert not all(torch.equal(other[key], expected[key]) for key in expected)


def test_a_tracked_length_is_reproduced_exactly(logs):
    tracked = load_file(snapshot_path(logs / "ddpm_digits", 5))
    for key, value in weights(model(logs, ema_length=0.05)).items():
        torch.testing.assert_close(value, tracked[f"0.05/network.{key}"])


def test_the_default_step_is_the_newest_usable_snapshot(logs):
    run = logs / "ddpm_digits"
    checkpoint = run / "checkpoints" / "step_00000005"
    aside, snapshot = run / "aside", snapshot_path(run, 5)
    older = run / "checkpoints" / "step_00000003"
    checkpoint.rename(older)  # as if the run had stopped between a snapshot and a checkpoint
    try:
        assert model(logs, ema_length=0.05).step == 2
    finally:
        older.rename(checkpoint)
    snapshot.rename(aside)
    try:
        assert model(logs, ema_length=0.05).step == 4
    finally:
        aside.rename(snapshot)


def test_weights_are_identified_by_length_and_snapshots(logs):
    run = logs / "ddpm_digits"
    models = [
        model(logs, ema_length=length, load_step=step) for length, step in ((0.08, 5), (0.08, 5), (0.07, 5), (0.08, 4))
    ]
    digests = [trained.weights for trained in models]
    assert digests[0] == digests[1] and len({*digests, model(logs).weights}) == 4
    assert all(len(digest) == 64 for digest in digests)
    assert models[0].provenance["sampler_weights"] == digests[0]
    first = snapshot_path(run, 2)
    first.rename(run / "aside")  # another set of snapshots
    try:
        assert model(logs, ema_length=0.08, load_step=5).weights != digests[0]
    finally:
        (run / "aside").rename(first)


def test_each_ema_length_has_its_own_results_folder(logs, capfd):
    flags = f"--logs_root {logs} --sampler ddpm --n_samples 2 --sample_steps 2 --no_amp"
    call("experiments/get_samples.py", f"{flags} --ema_length 0.08")
    call("experiments/get_samples.py", f"{flags} --ema_length 0.06")
    call("experiments/get_samples.py", f"{flags} --ema_length 0.08")  # a repeated run
    assert (logs / "samples_ddpm_digits_5_ema0.08" / "samples.npz").is_file()
    assert (logs / "samples_ddpm_digits_5_ema0.06" / "samples.npz").is_file()
    assert json.loads((logs / "samples_ddpm_digits_5_ema0.06" / "results.json").read_text())["n_samples"] == 2
    capfd.readouterr()
    with pytest.raises(SystemExit):
        call("experiments/get_samples.py", f"{flags} --ema_length 0.07 --log_dir samples_ddpm_digits_5_ema0.08")
    assert "--ema_length 0.08 -> 0.07" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--load_dir without --ema_length 0.08", "kept no EMA profiles: train with --ema_profiles"),
        ("--ema_length 0.08 --load_step 3", "kept no EMA profiles of step 3; there are 2, 4, 5"),
        ("--ema_length 0", "got ema_length 0.0, wanted a number in (0, 0.3003]"),
    ],
)
def test_invalid_ema_lengths_are_refused(logs, flags, message, capfd):
    with pytest.raises(SystemExit) as stop:
        call("experiments/get_samples.py", f"--logs_root {logs} --sampler ddpm --n_samples 2 {flags}")
    assert stop.value.code == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_no_ema_with_ema_length_is_refused():
    with pytest.raises(ValueError, match="got --no_ema and --ema_length 0.08"):
        ModelConfig(ema=False, ema_length=0.08)
