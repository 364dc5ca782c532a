"""What learns in a fine-tuned run, what its checkpoints hold, and where the rest comes from."""

from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from helpers.run_asserts import assert_equal_bits, saved_state, weights
from helpers.tiny_runs import DDPM, call
from models.differential import KINDS
from models.lora import adapters_of, merge
from train.checkpoint import checkpoint_path, verify_checkpoint
from train.config import FineTuningConfig, SamplerTrainingConfig
from train.distributed import DistContext
from train.ema import EMA
from train.finetuning import Base, add_adapters, find_base, read_base_tensors
from train.inference import load
from train.loop import TrainState
from train.lora_files import read_facts
from train.lora_merging import parse_adapter_files
from train.optim import clip_and_step, is_selected, make_optimizer, parse_scales, scale_learning_rates
from train.posthoc_ema import open_snapshot
from train.sampler_loading import load_trained_sampler

RUN = f"{DDPM} --dataset digits --no_amp --lr 1e-2 --steps_per_eval 0 --keep_last 0 --steps_per_log 1"
PARTS = "up_blocks conv_out"
LORA = "--lora_rank 2 --lora_targets attention time"


def train(logs, name, flags):
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} {RUN} --steps_per_checkpoint 1 {flags}")
    return logs / name


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `base`, 3 steps; `part` trains a part of it further, `lora` adapters, each for 3 steps."""
    logs = tmp_path_factory.mktemp("fine_tuning")
    train(logs, "base", "--train_steps 3")
    profiles = "--ema_profiles 0.1 --steps_per_ema_snapshot 1"
    train(logs, "part", f"--train_steps 3 --load_dir base --train_only {PARTS} {profiles}")
    train(logs, "lora", f"--train_steps 3 --load_dir base {LORA}")
    return logs


def opened(logs, name, **keywords):
    keywords = {"ema": True, "amp": False, "logs_roots": (str(logs),)} | keywords
    keywords["lora"] = parse_adapter_files(keywords.get("lora", ()))
    return load_trained_sampler(logs / name, keywords.pop("step", None), torch.device("cpu"), **keywords)


def network_state(logs, name, **keywords):
    return opened(logs, name, **keywords).sampler.network.state_dict()


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_checkpoints_hold_what_learns(logs, file):
    whole = weights(logs / "base", 3)
    part = {key for key in whole if is_selected(key.removeprefix("network."), PARTS.split())}
    assert weights(logs / "part", 3, file).keys() == part and 0 < len(part) < len(whole)
    adapters = weights(logs / "lora", 3, file)
    assert adapters and all(".adapters.lora." in key for key in adapters)


def test_snapshots_hold_what_learns(logs):
    with open_snapshot(logs / "part", 2) as snapshot:
        assert {key.partition("/")[2] for key in snapshot.checks} == weights(logs / "part", 3).keys()


def test_the_frozen_rest_is_that_of_the_base(logs):
    base = weights(logs / "base", 3, "ema.safetensors")
    for name in ("part", "lora"):
        learned, loaded = weights(logs / name, 3, "ema.safetensors"), network_state(logs, name)
        assert {f"network.{key}" for key in loaded} == base.keys() | learned.keys()
        for key, value in loaded.items():
            assert torch.equal(value, (base | learned)[f"network.{key}"]), key
    loaded = network_state(logs, "part", ema_length=0.1)
    frozen = {key for key in base if key not in weights(logs / "part", 3)}
    assert all(torch.equal(loaded[key.removeprefix("network.")], base[key]) for key in frozen)


def test_the_base_is_named_by_its_content(logs):
    origin = yaml.safe_load((logs / "lora" / "config.yaml").read_text())["origin"]
    assert origin["base"]["path"] == "base" and origin["base"]["step"] == 3
    manifest = (checkpoint_path(logs / "base", 3) / "manifest.json").read_text()
    assert origin["base"]["sha256"] in manifest and origin["load_weights"] in manifest


SCALED = "--train_only conv_out conv_in --lr_scale conv_in=0.5"


@pytest.mark.parametrize(
    "flags", [LORA, f"--train_only {PARTS}", f"{LORA} --save full", SCALED, f"--differential diff_v2 {LORA}"]
)
def test_a_resumed_run_is_an_uninterrupted_one(logs, tmp_path, flags):
    names = ("stopped", "whole")
    for name, steps in zip((*names, names[0]), (2, 4, 4), strict=True):
        call_in(logs, tmp_path, name, f"--train_steps {steps} --lr_schedule constant --load_dir {logs}/base {flags}")
    for file in ("model.safetensors", "ema.safetensors"):
        one, other = (weights(tmp_path / name, 4, file) for name in names)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    moments = [saved_state(tmp_path / name, 4)["optimizers"]["network"]["state"] for name in names]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[1])


def call_in(logs, root, name, flags):
    call("train_sampler.py", f"--logs_root {root} --log_dir {name} {RUN} --steps_per_checkpoint 1 {flags}")


def test_a_whole_network_learns_on_from_a_run_of_parts(logs, tmp_path):
    call_in(logs, tmp_path, "whole", f"--train_steps 1 --load_dir {logs}/part --lr 1e-9")
    saved, started = weights(tmp_path / "whole", 1), network_state(logs, "part")
    assert saved.keys() == weights(logs / "base", 3).keys()
    for key, value in started.items():
        torch.testing.assert_close(saved[f"network.{key}"], value, atol=1e-6, rtol=0)


def test_merged_runs_are_refused_under_fsdp(logs, tmp_path):
    config = FineTuningConfig(lora_rank=2, save="merged")
    with pytest.raises(ValueError, match="got --save merged with --parallel fsdp"):
        find_base(logs / "lora", SamplerTrainingConfig(parallel="fsdp"), config, str(tmp_path))


@pytest.mark.parametrize("flags", ["", LORA, f"{LORA} --save full"])
def test_differential_layers_come_back_whole(logs, tmp_path, flags):
    call_in(logs, tmp_path, "own", f"--train_steps 2 --load_dir {logs}/base --differential diff_v2 {flags}")
    base, learned = weights(logs / "base", 3, "ema.safetensors"), weights(tmp_path / "own", 2, "ema.safetensors")
    gates = {key for key in learned if key.endswith(".attention.gate")}
    assert gates and all(learned[key].any() for key in gates)
    assert {f"{key[:-4]}qkv.weight" for key in gates} <= learned.keys()  # with second queries, which the base lacks
    for key, value in network_state(tmp_path, "own").items():
        assert torch.equal(value, (base | learned)[f"network.{key}"]), key


def test_adapters_are_a_small_file_that_samples_as_the_run(logs, tmp_path):
    call_in(logs, tmp_path, "tuned", f"--train_steps 2 --load_dir {logs}/base {LORA} --lora_trigger_words disc red")
    file = tmp_path / "tuned" / "lora.safetensors"
    facts = read_facts(file)
    assert facts["step"] == "2" and facts["trigger_words"] == '["disc", "red"]'
    wanted, plain = merged_state(tmp_path, "tuned"), network_state(logs, "base")
    found = network_state(logs, "base", lora=(str(file),))
    half = network_state(logs, "base", lora=(f"{file}=0.25", f"{file}=0.5"))
    assert found.keys() == wanted.keys() == plain.keys()
    assert any(not torch.equal(value, plain[key]) for key, value in found.items())
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(half[key] - plain[key], 0.75 * (value - plain[key]), rtol=0, atol=1e-6)
    hashes = {opened(logs, "base", lora=lora).weights for lora in ((), (str(file),), (f"{file}=0.5",))}
    assert len(hashes) == 3


def test_parts_have_ranks_of_their_own(logs, tmp_path):
    call_in(logs, tmp_path, "tuned", f"--train_steps 1 --load_dir {logs}/base {LORA} --lora_rank_of attention=3 time=1")
    tensors = load_file(tmp_path / "tuned" / "lora.safetensors")
    ranks = {key.removesuffix(".down"): len(value) for key, value in tensors.items() if key.endswith(".down")}
    assert {layer: 3 if ".attention." in layer else 1 for layer in ranks} == ranks and {*ranks.values()} == {1, 3}
    assert all(tensors[f"{layer}.alpha"] == rank for layer, rank in ranks.items())
    assert read_facts(tmp_path / "tuned" / "lora.safetensors")["rank"] == "[1, 3]"
    opened(tmp_path, "tuned")


def merged_state(logs, name):
    network = opened(logs, name).sampler.network
    merge(network)
    return {key: value for key, value in network.state_dict().items() if ".adapters." not in key}


def test_adapters_of_other_weights_are_refused(logs):
    file = logs / "lora" / "lora.safetensors"
    bases = [opened(logs, "base", ema=ema).weights[:12] for ema in (True, False)]
    with pytest.raises(ValueError, match=f"trained on weights with SHA-256 {bases[0]}.*got {bases[1]}"):
        opened(logs, "base", ema=False, lora=(str(file),))
    with pytest.raises(ValueError, match="wanted FILE or FILE=STRENGTH"):
        opened(logs, "base", lora=(f"{file}=much",))
    with pytest.raises(FileNotFoundError, match="gone.safetensors not found"):
        opened(logs, "base", lora=("gone.safetensors",))


def test_python_loads_adapters_as_the_command_line_does(logs):
    file = logs / "lora" / "lora.safetensors"
    wanted = opened(logs, "base", lora=(f"{file}=0.5",))
    model = load(logs / "base", lora={file: 0.5}, amp=False, device="cpu").model
    assert model.weights == wanted.weights
    assert_equal_bits(model.sampler.network.state_dict(), wanted.sampler.network.state_dict())
    with pytest.raises(ValueError, match="trained on weights with SHA-256"):
        load(logs / "base", lora={file: 0.5}, ema=False, device="cpu")


def test_experiments_sample_with_files_of_adapters(logs, tmp_path):
    images, file = [], logs / "lora" / "lora.safetensors"
    for flags in ("", f"--lora {file}=1000", f"--lora {file}=0"):  # of two steps, so hardly anything at 1
        out = tmp_path / f"samples{len(images)}"
        common = f"--logs_root {logs} --sampler ddpm --load_dir base --log_dir {out} --n_samples 2 --sample_steps 2"
        call("experiments/get_samples.py", f"{common} --no_amp {flags}")
        images.append(np.load(out / "samples.npz")["arr_0"])
    assert not np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


def test_full_checkpoints_need_no_base(logs, tmp_path):
    call_in(logs, tmp_path, "base", "--train_steps 1")
    call_in(logs, tmp_path, "full", f"--train_steps 1 --load_dir base {LORA} --save full")
    whole = weights(tmp_path / "base", 1)
    (tmp_path / "base").rename(tmp_path / "away")
    assert whole.keys() < weights(tmp_path / "full", 1).keys()
    opened(tmp_path, "full")
    call_in(logs, tmp_path, "full", f"--train_steps 2 {LORA} --save full --load_dir base")
    assert (tmp_path / "full" / "checkpoints" / "step_00000002").is_dir()


def test_a_merged_run_is_a_plain_one_that_computes_the_same(logs, tmp_path):
    call_in(logs, tmp_path, "lora", f"--train_steps 2 --load_dir {logs}/base {LORA} --lora_alpha 4 --save merged")
    assert all(".adapters." in key for key in weights(tmp_path / "lora", 2))
    for ema in (True, False):
        adapted, merged = (opened(tmp_path, name, ema=ema).sampler.network for name in ("lora", "lora_merged"))
        assert merged.state_dict().keys() == {key for key in adapted.state_dict() if ".adapters." not in key}
        merge(adapted)
        for key, value in merged.state_dict().items():
            assert torch.allclose(value, adapted.state_dict()[key], atol=1e-6)
        base = weights(logs / "base", 3, "ema.safetensors")
        assert any(not torch.equal(value, base[f"network.{key}"]) for key, value in merged.state_dict().items())


def test_a_merged_run_keeps_differential_attention(logs, tmp_path):
    flags = "--differential diff_v2 --differential_in both --train_only time --save merged"
    call_in(logs, tmp_path, "lora", f"--train_steps 2 --load_dir {logs}/base {LORA} {flags}")
    wanted, merged = merged_state(tmp_path, "lora"), network_state(tmp_path, "lora_merged")
    assert merged.keys() == wanted.keys() and any(key.endswith(".gate") for key in merged)
    assert all(torch.allclose(merged[key], value, atol=1e-6) for key, value in wanted.items())
    content = yaml.safe_load((tmp_path / "lora_merged" / "config.yaml").read_text())
    assert "base" not in content["origin"] and content["training"]["load_dir"] is None
    assert content["training"]["train_only"] == []  # all of it learns where it is trained on


def test_a_run_with_other_layers_is_no_base(logs, tmp_path):
    call_in(logs, tmp_path, "own", f"--train_steps 1 --load_dir {logs}/base --differential diff_v2")
    manifest = verify_checkpoint(checkpoint_path(tmp_path / "own", 1))
    base = Base(tmp_path / "own", 1, "ema.safetensors", manifest["ema.safetensors"]["sha256"])
    with pytest.raises(ValueError, match="is itself fine-tuned, with differential attention: train that run on"):
        read_base_tensors(base, "network", opened(logs, "base").sampler.network)


def test_a_base_with_full_checkpoints_needs_no_base(logs, tmp_path):
    call_in(logs, tmp_path, "base", "--train_steps 1")
    call_in(logs, tmp_path, "full", "--train_steps 1 --load_dir base --train_only conv_in --save full")
    (tmp_path / "base").rename(tmp_path / "away")
    call_in(logs, tmp_path, "next", f"--train_steps 1 --load_dir full {LORA}")
    full, loaded = network_state(tmp_path, "full"), network_state(tmp_path, "next")
    assert all(torch.equal(loaded[key], value) for key, value in full.items())


def test_adapters_are_as_the_flags_say():
    options = {"lora_rank": 3, "lora_targets": ("0",)}
    for given, alpha in ((None, 3), (6.0, 6)):
        network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        config = FineTuningConfig(**options, lora_alpha=given, lora_dropout=0.25, dora=given is None)
        add_adapters(network, config)
        ((place, adapter),) = adapters_of(network).items()
        assert place[:2] == ("0", "lora") and (adapter.rank, adapter.alpha, adapter.dropout) == (3, alpha, 0.25)
        assert (adapter.magnitude is None) == (given is not None)


def test_another_or_no_base_is_refused(logs, tmp_path, capfd):
    call_in(logs, tmp_path, "base", "--train_steps 1")
    call_in(logs, tmp_path, "lora", f"--train_steps 1 --load_dir base {LORA}")
    file = checkpoint_path(tmp_path / "base", 1) / "ema.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"has SHA-256 .*, wanted .*put that file back"):
        opened(tmp_path, "lora")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds the frozen weights"):
        opened(tmp_path, "lora")


def test_a_part_may_be_trained_after_a_part(logs, tmp_path):
    call_in(logs, tmp_path, "next", f"--train_steps 1 --load_dir {logs}/part --train_only conv_in")
    before, after = network_state(logs, "part"), network_state(tmp_path, "next")
    assert weights(tmp_path / "next", 1).keys() == {"network.conv_in.weight", "network.conv_in.bias"}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"conv_in.weight", "conv_in.bias"}


def one_line(text):
    """An error as one line, without the frame around errors of the command line."""
    return " ".join(text.replace("│", " ").split())


REFUSED = {
    f"--load_dir lora {LORA}": "is itself fine-tuned, with adapters: pass the run that --save merged writes",
    LORA: "without trained weights: pass --load_dir RUN",
    f"--load_dir base --load_partial --differential diff_v2 {LORA}": "got --load_partial with --differential diff_v2",
    "--load_dir base --lora_alpha 2": "got lora_alpha without adapters",
    "--load_dir base --save merged": "without adapters",
    "--load_dir base --lora_rank_of time=4": "got lora_rank_of without adapters",
    f"--load_dir base {LORA} --lora_rank_of text=4": "got --lora_rank_of text, which names no layer",
    f"--load_dir base {LORA} --lora_rank_of convolutions=4": "which has no adapters: name it in --lora_targets too",
    f"--load_dir base {LORA} --lora_rank_of time=0": "a rank of at least 1, each part once: pass text=4",
    "--load_dir base --train_only conv_in --lr_scale conv_out=2": "in which nothing learns; what learns is in: conv_in",
    "--load_dir base --differential diff_v3": "diff_v1_split",
    "--lr_scale conv_out": "wanted a part of the network and a factor above 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_flags_are_refused(logs, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        train(logs, "refused", f"--train_steps 1 {flags}")
    assert stop.value.code == 2 and REFUSED[flags] in one_line(capfd.readouterr().err)
    assert not (logs / "refused").exists()


def test_sharded_weights_are_not_merged(tmp_path):
    training = SamplerTrainingConfig(load_dir="base", parallel="fsdp")
    with pytest.raises(ValueError, match="got --save merged with --parallel fsdp.*: pass --parallel ddp"):
        find_base(tmp_path, training, FineTuningConfig(lora_rank=2, save="merged"), str(tmp_path))


def test_the_flag_names_every_kind_of_differential_attention():
    kinds = get_args(get_type_hints(FineTuningConfig)["differential"])
    assert set(kinds) == {"", *KINDS}


def test_averages_share_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    average, whole = EMA(model, 0.5, share_frozen=True), EMA(model, 0.5)
    assert average.module[0].weight is model[0].weight and average.module[1].weight is not model[1].weight
    assert whole.module[0].weight is not model[0].weight
    before = model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight += 1
    average.update(model, 100)
    torch.testing.assert_close(average.module[1].weight, before + 0.5)
    learned = sum((p**2).sum() for p in [*model[1].parameters(), *model[2].parameters()])
    torch.testing.assert_close(average.squared_norms(model)[1], learned.detach())


def test_averages_leave_the_precision_of_what_is_frozen():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    model[0].requires_grad_(False)
    average = EMA(model, 0.5, share_frozen=True)
    assert [layer.weight.dtype for layer in average.module] == [torch.bfloat16, torch.float32]
    assert model[0].weight.dtype == model[1].weight.dtype == torch.bfloat16


def test_parts_learn_at_their_own_rate():
    """A step of sgd is the rate times the gradient."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1), "encoders": nn.ModuleDict({"text": nn.Linear(1, 1)})})
    optimizer = make_optimizer("sgd", model.parameters(), lr=0.1, betas=(0.0, 0.0))
    scale_learning_rates(optimizer, model, parse_scales(["text=0.75", "a.bias=3"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = TrainState({"m": model}, {"m": optimizer})
    clip_and_step(state, ["m"], DistContext(torch.device("cpu")), lr=0.2, clip=0)
    moved = {name: (before[name] - p).item() for name, p in model.named_parameters()}
    wanted = {"a.weight": 0.2, "a.bias": 0.6, "encoders.text.weight": 0.15, "encoders.text.bias": 0.15}
    assert moved == pytest.approx(wanted, abs=1e-6)
