"""Several processes (DDP or FSDP) match one: losses, gradient norms, weights, averages and checkpoints."""

import shutil

import pytest
import torch
import torch.distributed as dist

from helpers.process_pool import ProcessPool
from helpers.run_asserts import (
    assert_close,
    assert_same_checkpoints,
    assert_same_ddpm,
    assert_same_losses,
    checkpoint,
    lines,
    weights,
)
from helpers.tiny_runs import DDPM, GAN, SAMPLER, VQGAN, call, run
from train.distributed import DistContext, raise_once
from train.loop import RunningSums

FLAGS = "--no_amp --weight_decay 0.01 --steps_per_log 1 --ema_profiles 0.1"
STAGE_1 = f"{FLAGS} {VQGAN} {GAN} --disc_weight_max 1000 --lr 1e-4 --steps_per_eval 3 --val_fraction 0.008"
STAGE_2 = f"{FLAGS} {SAMPLER} --warmup_iters 2 --steps_per_eval 2 --train_steps 4 --ae_load_dir whole"
LOW_DISCREPANCY = "--time_sampler low_discrepancy"  # over the global batch
BY_LOSS = "--time_sampler loss_second_moment --loss_type vlb --total_steps 4 --batch_size 8"
REGIONS = "--dataset shapes --shapes_count 24 --conditions objects layout --region_attention v2 --condition_drop 0.3"
PARALLEL = ["ddp", "fsdp"]
STEPS = 6


@pytest.fixture(scope="module")
def two():
    """A pool of two processes."""
    pool = ProcessPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `whole`, a VQGAN, and `codes`, an absorbing sampler, each trained by one process."""
    logs = tmp_path_factory.mktemp("parallel")
    call("train_vqgan.py", f"--logs_root {logs} --log_dir whole --train_steps {STEPS} {STAGE_1}")
    call("train_sampler.py", f"--logs_root {logs} --log_dir codes {STAGE_2}")
    return logs


def assert_same(one, other, step):
    assert_same_losses(one, other)
    assert_same_checkpoints(one, other, step)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_the_same_vqgan_as_one(logs, two, parallel):
    two.run(
        "train_vqgan.py",
        f"--logs_root {logs} --log_dir {parallel} --train_steps {STEPS} {STAGE_1} --parallel {parallel}",
    )
    assert_same(logs / "whole", logs / parallel, STEPS)
    logged = [row for row in lines(logs / parallel) if "adaptive_weight" in row]
    assert logged and 0 < logged[-1]["adaptive_weight"] < 1000  # the clamp must not hide the weight
    assert {"grad_norm", "disc_grad_norm", "disc_loss", "lr"} <= logged[-1].keys()
    assert any("val/l1" in row for row in lines(logs / parallel))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_the_same_absorbing_sampler(logs, two, parallel):
    codes = logs / "whole" / "codes"
    expected = {path.name: path.read_bytes() for path in codes.iterdir()}
    shutil.rmtree(codes)
    two.run("train_sampler.py", f"--logs_root {logs} --log_dir codes_{parallel} {STAGE_2} --parallel {parallel}")
    assert {path.name: path.read_bytes() for path in codes.iterdir()} == expected
    assert_same(logs / "codes", logs / f"codes_{parallel}", 4)
    assert any("val/loss" in row for row in lines(logs / f"codes_{parallel}"))


EXPERTS = "--dataset shapes --shapes_count 24 --conditions layout --condition_drop 0.3 --attn_block_type transformer"
EXPERTS += " --experts disc,square sky --expert_rule share"
WORDS = "--dataset shapes --shapes_count 24 --attn_block_type transformer --text_width 8 --conditions"
PROMPTED = f"{WORDS} text region_words --region_words_gated --experts disc,square sky --condition_drop 0.3"
FEW_WORDS = f"{WORDS} region_words --condition_drop 0.9"  # most batches of a process have none
ROUTED = "--attn_block_type transformer --router_experts 3 --router_top 2 --router_rate 0.1"
DDPM_CASES = [(BY_LOSS, "ddp"), (LOW_DISCREPANCY, "fsdp"), (BY_LOSS, "fsdp"), (LOW_DISCREPANCY, "ddp")]
DDPM_CASES += [(REGIONS, parallel) for parallel in PARALLEL]
DDPM_CASES += [(flags, parallel) for flags in (EXPERTS, ROUTED, PROMPTED, FEW_WORDS) for parallel in PARALLEL]


@pytest.mark.parametrize(
    ("flags", "parallel"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i > 0)) for i, case in enumerate(DDPM_CASES)],
)
def test_two_processes_train_the_same_ddpm_as_one(tmp_path, two, flags, parallel):
    flags = f"--logs_root {tmp_path} --no_amp --steps_per_log 1 --steps_per_eval 0 --train_steps 10 {DDPM} {flags}"
    two.run("train_sampler.py", f"{flags} --log_dir two --parallel {parallel}")
    call("train_sampler.py", f"{flags} --log_dir one")
    assert_same_ddpm(tmp_path / "one", tmp_path / "two", 10)


@pytest.mark.slow
def test_checkpoints_resume_under_every_parallelism(logs, two):
    """One process, FSDP, DDP, one process: two steps each, resumed from the previous checkpoint."""
    flags = f"--logs_root {logs} --log_dir chain {STAGE_1}"
    call("train_vqgan.py", f"{flags} --train_steps 1")
    two.run("train_vqgan.py", f"{flags} --train_steps 4 --parallel fsdp")  # the discriminator starts here
    two.run("train_vqgan.py", f"{flags} --train_steps 5 --parallel ddp")
    call("train_vqgan.py", f"{flags} --train_steps {STEPS}")
    assert_same_checkpoints(logs / "whole", logs / "chain", STEPS, best=False)  # every run validates at its end
    steps = [{row["step"]: row for row in lines(logs / name) if "loss" in row} for name in ("whole", "chain")]
    assert steps[0].keys() == steps[1].keys() == set(range(1, STEPS + 1))
    for step, row in steps[0].items():
        assert row == pytest.approx(steps[1][step], rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_unlogged_averages_resume_in_two_processes(tmp_path, two):
    """A checkpoint between two log lines, saved by one process, and resumed by two."""
    flags = f"--logs_root {tmp_path} --no_amp {VQGAN} --perceptual_net none --steps_per_log 4 --train_steps 4"
    call("train_vqgan.py", f"{flags} --log_dir one --steps_per_checkpoint 2")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(checkpoint(tmp_path / "two", 4))
    two.run("train_vqgan.py", f"{flags} --log_dir two --parallel fsdp")
    assert_same_losses(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_gradients_are_reduced_once_per_batch(tmp_path, two, parallel):
    flags = f"--logs_root {tmp_path} {DDPM} --no_amp --batch_size 8 --train_steps 1 --steps_per_eval 0"
    counts = []
    for parts in (1, 4):
        command = f"train_sampler.py {flags} --parallel {parallel} --log_dir {parallel}_{parts} --accumulate {parts}"
        counts.append(two.call("helpers.per_rank.count_collectives", command)[0])
    for kind in counts[0].keys() | counts[1].keys():
        if "gather" not in kind:  # FSDP gathers parameters for each micro-batch
            assert counts[1].get(kind, 0) == counts[0].get(kind, 0) > 0, counts
    assert any("reduce" in kind for kind in counts[0])
    assert_close(*(weights(tmp_path / f"{parallel}_{parts}", 1) for parts in (1, 4)))


def test_no_ddp_wrapper_outlives_its_process_group(tmp_path, two):
    """On torch 2.11 it would deadlock in its destructor, and the run would never end."""
    flags = f"--logs_root {tmp_path} {DDPM} --no_amp --train_steps 1 --steps_per_eval 0"
    assert two.call("helpers.per_rank.count_ddp_wrappers", f"train_sampler.py {flags}") == [0, 0]


def test_uneven_lists_are_shared_among_processes(two):
    first, second = two.call("helpers.per_rank.share_lists")
    assert (first["own"], second["own"]) == ([0, 2, 4], [1, 3])
    assert first["rounds"] == [[[0], True], [[2], True], [[4], True]]
    assert second["rounds"] == [[[1], True], [[3], True], [[3], False]]  # its last batch again, not counted
    squares = [[i * i, i * i] for i in range(5)]
    expected = {"any": [False, True, True], "none": [], "collected": squares, "one": [[0, 0]], "gathered": [0, 7, 1, 7]}
    for answer in (first, second):
        assert {key: answer[key] for key in expected} == expected
        assert (answer["mean"], answer["share"]) == (0.5, 3)


def test_a_process_without_a_batch_joins_every_round(two):
    first, second = two.call("helpers.per_rank.pad_missing_batches")
    assert len(first) == len(second) == 1  # otherwise the forward pass of a sharded network would hang
    assert [first[0][1], second[0][1]] == [True, False]


def test_booleans_are_gathered(two):
    """User batches may contain masks, which bad steps save."""
    assert two.call("helpers.per_rank.gather_booleans") == [[True, True, True, False]] * 2


def test_running_sums_resume_with_any_number_of_processes(two):
    first, second = two.call("helpers.per_rank.running_sums")
    assert first["state"] == second["state"]
    assert first["state"]["loss"] == [[3.0, 3.0], [33.0, 3.0]]
    assert first["state"]["table"] == [[[0.0, 0.0]] * 2, [[1.0, 1.0]] * 2]
    for answer in (first, second):
        assert answer["again"] == {"loss": True, "table": True}
        assert answer["taken"] == [[36.0, 6.0], [36.0, 6.0], [9.0, 3.0], [7.0, 3.0]]
        assert answer["after"] == [{}, {}]
    assert (first["own"], second["own"]) == ({"one": [9, 3], "three": [7, 3]}, {"one": [0, 0], "three": [0, 0]})
    single = RunningSums(DistContext(torch.device("cpu")))
    single.load_state_dict({name: torch.tensor(value) for name, value in first["state"].items()})
    assert single.reduce_and_reset()["loss"].tolist() == [36.0, 6.0]


COLD = "--entropy_temperature 1"  # lower temperatures amplify rounding errors too much
WARM = "--gumbel_decay_steps 100000"  # so do low temperatures of gumbel, whose default decay ends with the run
QUANTIZERS = ["ema --revive_below 0.5", "l2", f"gumbel {WARM}", "fsq", f"lfq {COLD}", f"ibq {COLD}"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_processes_learn_the_same_codebook_as_one(tmp_path, two, quantizer, parallel):
    """Averages and entropies over the batch include the micro-batches of all processes."""
    flags = f"--logs_root {tmp_path} --train_steps 4 {STAGE_1} --quantizer {quantizer}"
    flags += " --lecam_weight 0.1 --disc_spectral_norm --disc_blur --disc_loss non_saturating"
    call("train_vqgan.py", f"{flags} --log_dir one")
    two.run("train_vqgan.py", f"{flags} --log_dir two --parallel {parallel}")
    assert_same(tmp_path / "one", tmp_path / "two", 4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_four_processes_under_torchrun_match_one(logs, parallel):
    """With four shards, some processes hold nothing of the smaller tensors."""
    flags = f"--logs_root {logs} --parallel {parallel}"
    result = run("train_vqgan.py", f"{flags} --log_dir four_{parallel} --train_steps {STEPS} {STAGE_1}", processes=4)
    assert result.returncode == 0, result.stderr
    assert_same(logs / "whole", logs / f"four_{parallel}", STEPS)
    result = run("train_sampler.py", f"{flags} --log_dir four_codes_{parallel} {STAGE_2}", processes=4)
    assert result.returncode == 0, result.stderr
    assert_same(logs / "codes", logs / f"four_codes_{parallel}", 4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_accumulation_with_a_gan_in_two_processes(tmp_path, two, parallel):
    """Equal until the GAN starts: its adaptive weight is computed per micro-batch, and micro-batches differ."""
    flags = f"--logs_root {tmp_path} {STAGE_1} --accumulate 2"
    call("train_vqgan.py", f"{flags} --log_dir one --train_steps 3")
    two.run("train_vqgan.py", f"{flags} --log_dir two --train_steps 3 --parallel {parallel}")
    assert_same(tmp_path / "one", tmp_path / "two", 3)
    two.run("train_vqgan.py", f"{flags} --log_dir two --train_steps {STEPS} --parallel {parallel}")
    last_row = [row for row in lines(tmp_path / "two") if "adaptive_weight" in row][-1]
    assert last_row["step"] == STEPS and 0 < last_row["adaptive_weight"] < 1000


@pytest.mark.slow
def test_fewer_validation_batches_than_processes(tmp_path, two):
    """All images fit into one batch, so the second process has none."""
    flags = f"--logs_root {tmp_path} {DDPM} --no_amp --batch_size 512 --train_steps 1 --steps_per_eval 1"
    flags += " --timeout_minutes 0.2"
    two.run("train_sampler.py", f"{flags} --log_dir two --parallel fsdp")
    call("train_sampler.py", f"{flags} --log_dir one")
    assert_same_losses(tmp_path / "one", tmp_path / "two")


def test_sharded_sampling_stays_in_lockstep(logs, two):
    """With 40 steps for 16 codes, each process would otherwise call the network only when it has codes to draw."""
    flags = f"--logs_root {logs} {STAGE_2} --sample_steps 40 --seed 3 --timeout_minutes 0.3"
    two.run("train_sampler.py", f"{flags} --log_dir in_step --parallel fsdp")
    call("train_sampler.py", f"{flags} --log_dir alone")
    pictures = [sorted((logs / name).rglob("*.png")) for name in ("in_step", "alone")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]]
    assert_same_losses(logs / "in_step", logs / "alone")


def test_a_refusal_by_the_main_process_is_printed_once(logs, two):
    flags = f"--logs_root {logs} --log_dir codes {STAGE_2} --timeout_minutes 0.2 --seed 4"
    answers = two.ask("run", "train_sampler.py", flags)
    lines = [line for answer in answers for line in answer["stderr"].splitlines()]
    errors = [line for line in lines if "lost another process" not in line]  # if rank 0, which keeps the store, is gone
    assert [answer["code"] for answer in answers] == [2, 2]
    assert len(errors) == 1 and errors[0].startswith("train_sampler.py: ") and "--seed 0 -> 4" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_sampler.py", f"--log_dir new {STAGE_2} --img_size 24", "got img_size 24, but the VQGAN"),
        ("experiments/check_classes.py", "", "this experiment runs in a single process"),
        ("experiments/calc_layout.py", "--dataset shapes --img_size 16", "this experiment runs in a single process"),
        ("experiments/check_digits.py", "", "this experiment runs in a single process"),
    ],
)
def test_torchrun_prints_a_refusal_once(logs, script, flags, message):
    errors = run(script, f"--logs_root {logs} {flags}", processes=2).stderr
    assert errors.count(message) == 1 and errors.count("Traceback") == 1, errors  # torchrun's own


def test_a_lost_connection_without_a_report_is_an_error(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    lost, reported = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), dist.HashStore()
    with pytest.raises(ValueError, match="lost another process .*Connection closed by peer.*: look for its error"):
        raise_once(lost, reported)
    raise_once(RuntimeError("a bug"), reported)
    for error in (lost, RuntimeError("a bug")):
        with pytest.raises(SystemExit):
            raise_once(error, reported)
