"""Fine-tuning by two processes, of which each holds all of the network (DDP) or a part of it (FSDP), matches one."""

import pytest
from safetensors.torch import load_file

from helpers.process_pool import ProcessPool
from helpers.run_asserts import assert_close, assert_same_checkpoints, assert_same_losses
from helpers.tiny_runs import DDPM, call

RUN = f"{DDPM} --dataset digits --no_amp --steps_per_eval 0 --steps_per_log 1 --ema_profiles 0.1"
CASES = {
    "lora": "--lora_rank 2 --lora_targets attention time",
    "dora": "--lora_rank 2 --dora --lora_targets attention convolutions --lr_scale lora=2",
    "part": "--train_only up_blocks conv_out",
    "differential": "--differential diff_v2 --lora_rank 2",
    "control": "--control grey --hint_widths 4 6",
}


@pytest.fixture(scope="module")
def two():
    """A pool of two processes."""
    pool = ProcessPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `base`."""
    logs = tmp_path_factory.mktemp("fine_tuning")
    call("train_sampler.py", f"--logs_root {logs} --log_dir base {RUN} --train_steps 2")
    return logs


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_fine_tune_as_one(logs, two, case, parallel):
    """The two stop after two steps and resume; their checkpoints and files are those of one process."""
    flags = f"--logs_root {logs} {RUN} --load_dir base {CASES[case]}"
    one, other = logs / case, logs / f"{case}_{parallel}"
    if not one.exists():
        call("train_sampler.py", f"{flags} --log_dir {one.name} --train_steps 4")
    for steps in (2, 4):
        two.run("train_sampler.py", f"{flags} --log_dir {other.name} --train_steps {steps} --parallel {parallel}")
    assert_same_losses(one, other)
    assert_same_checkpoints(one, other, 4)
    if case != "part":
        name = "control" if case == "control" else "lora"
        assert_close(*(load_file(run / f"{name}.safetensors") for run in (one, other)))
