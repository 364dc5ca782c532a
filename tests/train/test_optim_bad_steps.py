"""A step with a non-finite loss or gradient changes nothing in any process, and its batch is saved."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers.fault_injection import AT, BATCH, LAST, add_to_loss, initial_loss_scale, replace_images_by_nan
from helpers.process_pool import ProcessPool
from helpers.run_asserts import (
    assert_equal_bits,
    assert_same_checkpoints,
    assert_same_losses,
    distance,
    extras,
    lines,
    moments,
    saved_state,
    weights,
)
from helpers.tiny_runs import DDPM, GAN, VQGAN, call
from train.distributed import DistContext
from train.optim import BadStepRecorder

FAULTS = "helpers.fault_injection"
BASE = "--no_amp --steps_per_checkpoint 1 --keep_last 0 --steps_per_eval 0 --steps_per_save_output 100"
SAMPLER = f"{BASE} {DDPM} --time_sampler loss_second_moment --total_steps 4 --loss_type vlb"
STAGE_1 = f"{BASE} {VQGAN} {GAN}"
FULL_BATCH = list(range(BATCH * AT, BATCH * AT + BATCH))


@pytest.fixture(scope="module")
def two():
    pool = ProcessPool(2)
    yield pool
    pool.close()


def assert_skipped(run, step):
    """The checkpoint after the step equals the one before it, except for the step and the averages."""
    model = weights(run, step)
    assert_equal_bits(model, weights(run, step + 1))
    averages = [weights(run, at, "ema.safetensors") for at in (step, step + 1)]
    averaged = {key: model[key] for key in averages[0]}
    assert distance(averages[1], averaged) < distance(averages[0], averaged)
    assert_equal_bits(moments(run, step), moments(run, step + 1))
    before, after = saved_state(run, step), saved_state(run, step + 1)
    for kind in ("extras", "counters"):
        assert before[kind].keys() == after[kind].keys()
        for name in before[kind]:
            assert_equal_bits(before[kind][name], after[kind][name])
    assert (before["step"], after["step"], before["bad_steps"], after["bad_steps"]) == (step, step + 1, [], [step])


def assert_batch_saved(run, positions):
    batch = load_file(run / "bad_steps" / f"step_{AT:08d}.safetensors")
    assert sorted(batch["position"].tolist()) == positions and batch["image"].shape[0] == len(positions)
    return batch


def assert_updated(run, step):
    before, after = weights(run, step), weights(run, step + 1)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(bool(value.isfinite().all()) for value in after.values())


@pytest.mark.parametrize("number", ["nan", *(pytest.param(n, marks=pytest.mark.slow) for n in ("inf", "-inf"))])
def test_a_nonfinite_loss_with_finite_gradients_is_skipped(tmp_path, number, capsys):
    """A constant is added to the loss, so the gradient is unchanged."""
    positions = []
    with add_to_loss(float(number), {LAST}, positions):
        call("train_sampler.py", f"--logs_root {tmp_path} --log_dir bad --train_steps 4 --steps_per_log 4 {SAMPLER}")
    run = tmp_path / "bad"
    assert_skipped(run, AT)
    assert_updated(run, AT + 1)
    assert positions == [list(range(first, first + BATCH)) for first in range(0, 4 * BATCH, BATCH)]  # no repeats
    assert_batch_saved(run, FULL_BATCH)
    assert [row["skipped_steps"] for row in lines(run) if "loss" in row] == [1.0]
    assert f"step {AT} skipped" in capsys.readouterr().out
    assert extras(run, 4)["times"]["count"].sum() == 3 * BATCH  # it has not observed the losses of the bad step


def test_a_nonfinite_gradient_changes_nothing(tmp_path):
    flags = f"--logs_root {tmp_path} --log_dir bad --train_steps 4 {SAMPLER} --hooks {FAULTS}.NanGradient"
    call("train_sampler.py", flags)
    assert_skipped(tmp_path / "bad", AT)
    assert_updated(tmp_path / "bad", AT + 1)
    assert_batch_saved(tmp_path / "bad", FULL_BATCH)


def test_a_bad_image_in_a_micro_batch_is_skipped_and_saved(tmp_path):
    flags = f"--logs_root {tmp_path} --log_dir bad --train_steps 4 {SAMPLER} --accumulate 2 --adapt {FAULTS}.nan_image"
    call("train_sampler.py", flags)
    assert_skipped(tmp_path / "bad", AT)
    assert_updated(tmp_path / "bad", AT + 1)
    batch = assert_batch_saved(tmp_path / "bad", FULL_BATCH)
    bad = batch["position"][batch["image"].flatten(1).isnan().any(1)]
    assert bad.tolist() == [LAST]


@pytest.mark.parametrize("stop", [AT, pytest.param(AT + 1, marks=pytest.mark.slow)])
def test_resuming_around_a_bad_step_is_bitwise_exact(tmp_path, stop):
    flags = f"--logs_root {tmp_path} {SAMPLER} --adapt {FAULTS}.nan_image --dropout 0.1 --steps_per_log 1"
    call("train_sampler.py", f"{flags} --log_dir whole --train_steps 5")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps {stop}")
    call("train_sampler.py", f"{flags} --log_dir parts --train_steps 5")
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(tmp_path / "whole", 5, name), weights(tmp_path / "parts", 5, name))
    assert_equal_bits(moments(tmp_path / "whole", 5), moments(tmp_path / "parts", 5))
    assert saved_state(tmp_path / "whole", 5)["bad_steps"] == saved_state(tmp_path / "parts", 5)["bad_steps"] == [AT]
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("fault", ["loss", "image", "gradient"])
def test_a_bad_step_of_one_process_is_skipped_by_both(tmp_path, two, fault, parallel):
    flags = f"--logs_root {tmp_path} --train_steps 4 --steps_per_log 1 {SAMPLER} --parallel {parallel}"
    if fault == "loss":
        two.call(f"{FAULTS}.run_with_infinite_loss", f"{flags} --log_dir bad")
    else:
        fault_flags = f"--adapt {FAULTS}.nan_image" if fault == "image" else f"--hooks {FAULTS}.NanGradientOnRank1"
        two.run("train_sampler.py", f"{flags} --log_dir bad {fault_flags}")
    assert_skipped(tmp_path / "bad", AT)
    assert_updated(tmp_path / "bad", AT + 1)
    assert_batch_saved(tmp_path / "bad", FULL_BATCH)
    with add_to_loss(float("nan"), {LAST}):
        call("train_sampler.py", f"{flags} --log_dir one")
    assert_same_losses(tmp_path / "one", tmp_path / "bad")
    assert_same_checkpoints(tmp_path / "one", tmp_path / "bad", 4)


@pytest.mark.slow
def test_too_many_bad_steps_end_all_processes_in_one_line(tmp_path, two):
    flags = (
        f"--logs_root {tmp_path} --log_dir bad --train_steps 4 {SAMPLER} --adapt {FAULTS}.nan_image --max_bad_steps 0"
    )
    answers = two.ask("run", "train_sampler.py", flags)
    assert [answer["code"] for answer in answers] == [2, 2]
    (error,) = [line for answer in answers for line in answer["stderr"].splitlines() if "max_bad_steps" in line]
    assert error.startswith("train_sampler.py") and "1 of the last 1000 steps were not finite" in error
    assert "Traceback" not in answers[0]["stderr"] + answers[1]["stderr"]
    assert_batch_saved(tmp_path / "bad", FULL_BATCH)


def test_bad_steps_are_counted_over_the_last_thousand(tmp_path):
    state = SimpleNamespace(bad_steps=[0, 3, 5], extras={})
    parts = [{"position": torch.arange(2), "image": torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)}] * 2
    bad = BadStepRecorder(tmp_path, DistContext(torch.device("cpu")), max_bad_steps=3)
    bad(state, 1000, parts)  # step 0 is no longer counted
    assert state.bad_steps == [0, 3, 5, 1000]
    assert load_file(tmp_path / "bad_steps" / "step_00001000.safetensors")["image"].shape == (4, 3, 4, 4)
    with pytest.raises(ValueError, match="4 of the last 1000 steps"):
        bad(state, 1001, parts)


def test_strings_and_padded_fields_are_saved(tmp_path):
    state = SimpleNamespace(bad_steps=[], extras={})
    parts = [
        {"position": torch.tensor([i]), "ids": torch.full((1, n), 17), "ids_mask": torch.ones(1, n, dtype=torch.bool)}
        | {"caption": ["é" * n], "words": [["a"] * n]}
        for i, n in enumerate((2, 0, 3))
    ]
    BadStepRecorder(tmp_path, DistContext(torch.device("cpu")), max_bad_steps=3)(state, 3, parts)
    batch = load_file(tmp_path / "bad_steps" / "step_00000003.safetensors")
    assert batch["ids"].tolist() == [[17, 17, 0], [0, 0, 0], [17, 17, 17]]
    assert batch["ids_mask"].sum(1).tolist() == [2, 0, 3]
    texts = {name: [bytes(row.tolist()).rstrip(b"\0") for row in batch[name]] for name in ("caption", "words")}
    assert [json.loads(text) for text in texts["caption"]] == ["éé", "", "ééé"]
    assert [json.loads(text) for text in texts["words"]] == [["a", "a"], [], ["a", "a", "a"]]


@pytest.mark.parametrize("network", ["Autoencoder", "Discriminator"])
def test_one_bad_gradient_stops_both_first_stage_networks(tmp_path, network):
    flags = f"--logs_root {tmp_path} --log_dir bad --train_steps 6 {STAGE_1} --hooks {FAULTS}.NanGradientOf{network}"
    call("train_vqgan.py", flags)
    assert_skipped(tmp_path / "bad", 4)
    assert_updated(tmp_path / "bad", 5)


def test_a_bad_step_restores_batch_norm_statistics(tmp_path):
    with replace_images_by_nan({4 * BATCH}):
        flags = f"--logs_root {tmp_path} --log_dir bad --train_steps 6 {STAGE_1} --disc_norm batch --disc_layers 2"
        call("train_vqgan.py", flags)
    assert_skipped(tmp_path / "bad", 4)


FLOAT16 = SAMPLER.replace("--no_amp", "--amp_dtype float16")


def test_a_float16_overflow_lowers_the_scale(tmp_path):
    flags = f"--logs_root {tmp_path} {FLOAT16} --max_bad_steps 0 --train_steps 12"
    with initial_loss_scale(2.0**24):
        call("train_sampler.py", f"{flags} --log_dir half")
    run = tmp_path / "half"
    scales = [extras(run, step)["loss_scale"]["value"].item() for step in range(1, 13)]
    assert scales[0] == 2.0**23 and scales == sorted(scales, reverse=True)
    unchanged = [now == before for before, now in pairwise(scales)]
    assert any(unchanged) and not all(unchanged), scales
    for step, updated in enumerate(unchanged, start=1):
        assert_updated(run, step) if updated else assert_equal_bits(weights(run, step), weights(run, step + 1))
    assert saved_state(run, 12)["bad_steps"] == [] and not (run / "bad_steps").exists()


@pytest.mark.parametrize("stop", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_float16_resumes_exactly(tmp_path, stop):
    flags = f"--logs_root {tmp_path} {FLOAT16} --steps_per_log 1"
    with initial_loss_scale(2.0**24):
        call("train_sampler.py", f"{flags} --log_dir whole --train_steps 12")
        call("train_sampler.py", f"{flags} --log_dir parts --train_steps {stop}")
        call("train_sampler.py", f"{flags} --log_dir parts --train_steps 12")
    assert_equal_bits(weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12))
    assert_equal_bits(*(extras(tmp_path / name, 12)["loss_scale"] for name in ("whole", "parts")))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


def test_a_float16_nan_at_the_lowest_scale_is_a_bad_step(tmp_path):
    with initial_loss_scale(1.0), replace_images_by_nan({LAST}):
        call("train_sampler.py", f"--logs_root {tmp_path} --log_dir bad --train_steps 4 {FLOAT16}")
    assert saved_state(tmp_path / "bad", 4)["bad_steps"] == [AT]
    assert_batch_saved(tmp_path / "bad", FULL_BATCH)


def test_loading_an_optimizer_does_not_load_its_bad_steps(tmp_path):
    """Nor its best validation loss, nor its running sums for the next log line."""
    flags = f"--logs_root {tmp_path} {SAMPLER} --steps_per_log 100"
    call("train_sampler.py", f"{flags} --log_dir bad --train_steps 4 --adapt {FAULTS}.nan_image")
    call("train_sampler.py", f"{flags} --log_dir new --train_steps 1 --load_dir bad --load_step 3 --load_optim")
    assert saved_state(tmp_path / "new", 1)["bad_steps"] == [] and saved_state(tmp_path / "new", 1)["best"] == {}
    (row,) = [row for row in lines(tmp_path / "new") if "loss" in row]
    assert "skipped_steps" not in row
    call("train_sampler.py", f"{flags} --log_dir weights --train_steps 1 --load_dir bad --load_step 3")
    (twin,) = [row for row in lines(tmp_path / "weights") if "loss" in row]
    assert row["loss"] == twin["loss"]  # the mean of one step, not of three
