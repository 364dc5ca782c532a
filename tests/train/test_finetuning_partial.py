"""Adapters of a network that is larger than its base: a model of captions that also gets regions and experts."""

import re

import pytest
import torch
import yaml

from helpers.run_asserts import checkpoint, lines, saved_state, weights
from helpers.tiny_runs import DDPM, call
from models.experts import StackedLinear, experts_of
from models.lora import merge
from train.finetuning import read_base
from train.sampler_loading import load_trained_sampler

RUN = (
    f"{DDPM} --dataset shapes --shapes_count 24 --no_amp --lr 1e-2 --warmup_iters 0 --attn_block_type transformer "
    "--text_width 8 --steps_per_log 1 --steps_per_eval 2 --steps_per_checkpoint 1 --keep_last 0"
)
PANOPTIC = "--conditions text region_words --region_words_gated --experts disc,ring sky"
LORA = "--lora_rank 2 --load_partial"


def train(logs, name, flags):
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} {RUN} {flags}")
    return logs / name


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `text`, a model of captions; `tuned` has words of regions, experts and adapters, in 2 steps."""
    logs = tmp_path_factory.mktemp("partial")
    train(logs, "text", "--conditions text --train_steps 2")
    train(logs, "tuned", f"{PANOPTIC} {LORA} --load_dir text --train_steps 2 --save merged")
    return logs


def opened(logs, name, ema=True, step=None):
    model = load_trained_sampler(logs / name, step, torch.device("cpu"), ema=ema, amp=False, logs_roots=(str(logs),))
    return model.sampler.network


def learns_anew(key):
    """Whether a text model lacks a weight, or has one layer where there are experts now."""
    return key.startswith("gated_blocks.") or (".feed_forward." in key and "text" not in key)


def test_a_larger_network_starts_at_the_loss_of_its_base(logs):
    """At step 0, on the same images, noise and times, to the rounding of float32."""
    (before,) = [row["val/loss"] for row in lines(logs / "text") if "val/loss" in row]
    first, *others = [row for row in lines(logs / "tuned") if "val/loss" in row]
    assert first["step"] == 0 and [row["step"] for row in others] == [2]
    assert first["val/loss"] == pytest.approx(before, rel=1e-5) and others[0]["val/loss"] != first["val/loss"]
    assert saved_state(logs / "tuned", 2)["best"]["val/loss"][1] == 2  # of step 0 there is no checkpoint


def test_its_experts_are_copies_of_the_layers_of_the_base(logs, tmp_path):
    """To the bit, where nothing is learned: with a learning rate of almost 0, in which float32 rounds each step."""
    flags = f"{PANOPTIC} {LORA} --load_dir {logs}/text --train_steps 1 --lr 1e-30 --save full"
    train(tmp_path, "copies", flags)
    network, base = opened(tmp_path, "copies"), weights(logs / "text", 2, "ema.safetensors")
    for name, layer in experts_of(network).items():
        for part in ("expand", "contract"):
            stacked = layer.get_submodule(part)
            assert isinstance(stacked, StackedLinear) and len(stacked.weight) == 3
            for key, value in stacked.named_parameters():
                assert all(torch.equal(each, base[f"network.{name}.{part}.{key}"]) for each in value)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_what_the_base_lacks_learns_and_is_saved(logs, file):
    saved, base = weights(logs / "tuned", 2, file), weights(logs / "text", 2, "ema.safetensors")
    new = {key for key in saved if learns_anew(key.removeprefix("network."))}
    assert new and {key for key in saved if ".adapters.lora." not in key} == new
    assert new < {f"network.{key}" for key in opened(logs, "tuned").state_dict()}
    (gate,) = {key.rpartition(".")[2] for key in new if key.endswith(".gate")}
    assert all(saved[key].any() for key in new if key.endswith(gate))
    kept = {key for key in base if not learns_anew(key.removeprefix("network."))}
    loaded = opened(logs, "tuned", ema=file.startswith("ema")).state_dict()
    assert all(torch.equal(loaded[key.removeprefix("network.")], base[key]) for key in kept)


def test_the_base_and_what_it_gave_are_recorded(logs):
    origin = yaml.safe_load((logs / "tuned" / "config.yaml").read_text())["origin"]
    assert origin["base"]["partial"] and origin["base"]["path"] == "text" and origin["load_report"]["taken"]
    assert all(".feed_forward." in key for key in origin["load_report"]["grown"])
    base = read_base(logs / "tuned")
    assert base.partial and base.report._asdict() == origin["load_report"]
    assert not (logs / "tuned" / "lora.safetensors").exists()  # adapters alone would not be the network


def test_a_merged_run_of_a_larger_network_is_a_plain_one(logs):
    for ema in (True, False):
        adapted, merged = (opened(logs, name, ema) for name in ("tuned", "tuned_merged"))
        merge(adapted)
        own = {key: value for key, value in adapted.state_dict().items() if ".adapters." not in key}
        assert own.keys() == merged.state_dict().keys()
        assert all((value - merged.state_dict()[key]).abs().max() < 1e-6 for key, value in own.items())
    content = yaml.safe_load((logs / "tuned_merged" / "config.yaml").read_text())
    assert not content["training"]["load_partial"] and "load_report" not in content["origin"]


ROUTED = "--conditions text region_words --region_words_gated --router_experts 3 --router_rate 0.1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--save full", "--train_only gated_blocks", "--train_only experts gated_blocks", ROUTED]
)
def test_a_resumed_larger_network_is_an_uninterrupted_one(logs, tmp_path, flags):
    own = f"{PANOPTIC if flags != ROUTED else ''} {LORA} --load_dir {logs}/text --steps_per_eval 0 {flags}"
    for name, steps in (("stopped", 1), ("whole", 3), ("stopped", 3)):
        train(tmp_path, name, f"{own} --train_steps {steps}")
    for file in ("model.safetensors", "ema.safetensors"):
        one, other = (weights(tmp_path / name, 3, file) for name in ("stopped", "whole"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    gates = [value for key, value in one.items() if key.endswith(".gate")]
    assert gates and all(value.any() for value in gates)
    balances = [value for key, value in one.items() if key.endswith(".balance")]
    assert bool(balances) == (flags == ROUTED) and all(value.any() for value in balances)
    branch = f"--logs_root {tmp_path} --log_dir on --resume {checkpoint(tmp_path / 'whole', 3)} --train_steps 4"
    call("train_sampler.py", branch)
    assert weights(tmp_path / "on", 4).keys() == one.keys() and read_base(tmp_path / "on").partial


@pytest.mark.parametrize("lora", [LORA, "--load_partial"])
def test_gates_that_would_stay_closed_are_refused(logs, capsys, lora):
    flags = f"{PANOPTIC} {lora} --load_dir text --train_steps 1 --train_only experts"
    with pytest.raises(SystemExit) as stop:
        train(logs, "closed", flags)
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "add gated_blocks to --train_only" in error and not (logs / "closed").exists()
    run = train(logs, f"open{len(lora)}", f"{flags} gated_blocks")
    assert re.search(r"^experts: 3 in each of \d+ layers, computed \d+ in a loop$", capsys.readouterr().out, re.M)
    adapted = [key for key in weights(run, 1) if ".adapters." in key]
    assert bool(adapted) == (lora == LORA) and not [key for key in adapted if "gated" in key or "experts" in key]
