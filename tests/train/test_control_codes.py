"""Runs on codes with a control branch: hints are maps that are added to the embeddings."""

import pytest
import torch

from helpers.run_asserts import weights
from helpers.tiny_runs import GAN, SAMPLER, VQGAN, call
from models.control import HintConfig
from train.inference import load


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `base` on the codes of `vqgan`, and `edges`, which was trained beside it with other edges."""
    logs = tmp_path_factory.mktemp("control_codes")
    stage = f"--dataset digits --logs_root {logs} --log_dir vqgan {VQGAN} {GAN} --steps_per_eval 0"
    call("train_vqgan.py", f"{stage} --train_steps 2 --no_amp")
    common = f"--sampler absorbing --logs_root {logs} {SAMPLER} --no_amp --ae_load_dir vqgan --steps_per_eval 0"
    call("train_sampler.py", f"{common} --dataset digits --log_dir base --train_steps 2")
    flags = "--load_dir base --log_dir edges --control edges --edge_sigma 2 --lr 1e-2 --warmup_iters 0"
    call("train_sampler.py", f"{common} {flags} --train_steps 4")
    return logs


def test_a_branch_of_codes_is_saved_apart_and_samples_as_its_run(logs):
    saved = weights(logs / "edges", 4)
    assert saved and all(key.startswith("network.control.hint.convs.") for key in saved)
    assert saved["network.control.hint.convs.5.weight"].any()  # it was 0
    run, file = load(logs / "edges", amp=False, device="cpu"), logs / "edges/control.safetensors"
    both = load(logs / "base", amp=False, device="cpu", control={file: 1.0})
    assert run.conditions == both.conditions == ("label", "hint_image")
    branch = run.model.sampler.network.control["hint"]
    assert branch.config == HintConfig(hint_channels=1, hint_widths=(16, 32, 96), hint_factor=4)
    assert (
        both.model.hint_makers == run.model.hint_makers and run.model.hint_makers["hint_image"].options.edge_sigma == 2
    )
    assert torch.equal(run.sample(3, seed=1), both.sample(3, seed=1))  # with held-out hints


def test_a_canvas_in_windows_has_a_hint_of_its_size(logs):
    run = load(logs / "edges", amp=False, device="cpu")
    hint = torch.zeros(1, 24, 32, dtype=torch.uint8)
    assert run.sample(1, shape=(6, 8), hint_image=hint, label=3).shape == (1, 1, 24, 32)
    with pytest.raises(ValueError, match="got control_middle_only for a transformer"):
        run.sample(1, hint_image=hint, control_middle_only=True)
