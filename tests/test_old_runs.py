"""Runs from before the code was restructured (commit f133647) load, sample and resume with the same results.

tests/fixtures/old_runs/runs holds a run of each kind at step 4, from the commands below; the other fixtures are the
weights and metrics of the same commands at step 8, and six samples of each run at step 4.
"""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.labels import label_encoders
from helpers.run_asserts import assert_close, assert_equal_bits, saved_state, weights
from helpers.tiny_runs import ROOT, call
from models.transformer import CausalTransformer, Transformer
from train.checkpoint import load_weights, saved_steps

OLD = ROOT / "tests" / "fixtures" / "old_runs"
COMMON = (
    "--no_amp --steps_per_log 1 --steps_per_eval 4 --steps_per_save_output 100 --checkpoint_minutes 0 "
    "--val_fraction 0.03"
)
CODES = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --batch_size 4 --resid_pdrop 0.1"
UNET = (
    "--sampler ddpm --channels 4 --channel_mults 1 2 --res_blocks 1 --attn_factors 2 --heads 1 --batch_size 4 "
    "--sample_steps 4 --total_steps 20"
)
COMMANDS = {
    "vqgan": (
        "train_vqgan.py",
        "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --shift 0 --ndf 4 "
        "--disc_layers 1 --disc_start_step 3 --diff_aug --perceptual_net none --quantizer ema --lecam_weight 0.1 "
        "--ema_profiles 0.1",
    ),
    "absorbing": ("train_sampler.py", f"{CODES} --sample_steps 4"),
    "autoregressive": ("train_sampler.py", f"--sampler autoregressive {CODES}"),
    "ddpm": ("train_sampler.py", f"{UNET} --img_size 8 --time_sampler loss_second_moment --loss_type vlb"),
    "latents": ("train_sampler.py", f"{UNET} --log_dir latents_digits --ae_load_dir vqgan_digits"),
}
SAMPLED = {
    "absorbing": "",
    "autoregressive": "--sampler autoregressive",
    "ddpm": "--sampler ddpm",
    "latents": "--sampler ddpm --load_dir latents_digits",
}

NAME = "encoders.label.embedding.weight"  # the current name of the label's weight in transformers
NOW = {"network.label.weight": f"network.{NAME}"}


@pytest.fixture
def logs(tmp_path):
    """A copy of the old runs, to be resumed."""
    shutil.copytree(OLD / "runs", tmp_path / "logs")
    return tmp_path / "logs"


@pytest.mark.parametrize("kind", COMMANDS)
def test_an_old_run_resumes(kind, logs):
    script, flags = COMMANDS[kind]
    run = logs / f"{kind}_digits"
    call(script, f"{flags} {COMMON} --logs_root {logs} --train_steps 8", validation_images=54)
    assert saved_steps(run) == [4, 8]
    expected = {k.partition(".")[2]: v for k, v in load_file(OLD / "later.safetensors").items() if k.startswith(kind)}
    expected = {NOW.get(name, name): value for name, value in expected.items()}
    assert_close(expected, weights(run, 8), rtol=1e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]
    for line, old in zip(lines, json.loads((OLD / "metrics.json").read_text())[kind], strict=True):
        assert line == pytest.approx(old, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", SAMPLED)
def test_an_old_run_can_be_sampled(kind, logs):
    call(
        "experiments/get_samples.py",
        f"{SAMPLED[kind]} --logs_root {logs} --n_samples 6 --batch_size 6 --no_amp --log_dir samples",
    )
    with np.load(logs / "samples" / "samples.npz") as samples, np.load(OLD / "samples.npz") as old:
        assert np.array_equal(samples["labels"], old[f"{kind}_labels"])
        if "codes" in samples.files:
            assert np.array_equal(samples["codes"], old[kind])
        else:
            assert np.abs(samples["arr_0"].astype(int) - old[kind]).max() <= 1  # of 255: rounding


def test_recomputed_codes_match_the_old_ones(logs):
    script, flags = COMMANDS["absorbing"]
    old = {path: path.read_bytes() for path in (logs / "vqgan_digits" / "codes").glob("*.codes")}
    for path in (logs / "vqgan_digits" / "codes").iterdir():
        path.unlink()
    call(script, f"{flags} {COMMON} --logs_root {logs} --train_steps 5")
    for split in ("train", "val"):
        (recomputed,) = (logs / "vqgan_digits" / "codes").glob(f"digits_{split}_*.codes")
        (expected,) = (content for path, content in old.items() if f"_{split}_" in path.name)
        assert recomputed.read_bytes() == expected


TRANSFORMERS = {"absorbing": Transformer, "autoregressive": CausalTransformer}


def transformer_of(kind):
    return TRANSFORMERS[kind](codes=16, grid=(4, 4), width=16, heads=2, layers=2, encoders=label_encoders(10, 16))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_an_old_transformer_keeps_its_parameter_order(kind):
    """Optimizer states refer to parameters by position; only the label's weight has a new name."""
    run, network = OLD / "runs" / f"{kind}_digits", transformer_of(kind)
    names = [f"network.{name}" for name, _ in network.named_parameters()]
    assert set(names) == {NOW.get(name, name) for name in weights(run, 4)}
    assert names[:4] == [f"network.{n}" for n in ("position", "code.weight", NAME, "blocks.0.attention.qkv.weight")]
    state = saved_state(run, 4)["optimizers"]["network"]["state"]
    assert [state[i]["exp_avg"].shape for i in range(len(names))] == [p.shape for p in network.parameters()]


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_an_old_transformer_loads_its_weights(kind, file):
    run, network = OLD / "runs" / f"{kind}_digits", transformer_of(kind)
    load_weights(run, 4, {"network": network}, ema=file.startswith("ema"))
    stored = {NOW.get(name, name): value for name, value in weights(run, 4, file).items()}
    assert_equal_bits(stored, {f"network.{name}": value for name, value in network.state_dict().items()})
