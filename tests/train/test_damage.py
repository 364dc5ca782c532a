"""Damaged, foreign and malicious checkpoints are refused with a message that names them, and never run code."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.harness.experiment import load_results
from helpers.run_asserts import assert_equal_bits, checkpoint, manifest_of, weights
from helpers.tiny_runs import DDPM, GAN, SAMPLER, VQGAN, call
from train.checkpoint import load_checkpoint, load_weights, save_checkpoint, saved_steps
from train.condition_source import read_json
from train.config import DataConfig
from train.ema import EMA
from train.logging import truncate_metrics
from train.loop import TrainState
from train.sampler_loading import load_sampler
from train.spaces import PixelSpace

FILES = ["model.safetensors", "ema.safetensors", "state.pt", "manifest.json"]
STAGE_1 = f"--no_amp {VQGAN} {GAN} --shift 1"  # as the fixture `trained`


def state_of(width: int = 3, optimizer_class=torch.optim.AdamW, layers: int = 1) -> TrainState:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = optimizer_class(
        network.parameters(), lr=0.1, **({"momentum": 0.9} if optimizer_class is torch.optim.SGD else {})
    )
    network(torch.randn(4, width)).square().sum().backward()
    optimizer.step()
    return TrainState({"network": network}, {"network": optimizer}, {"network": EMA(network, 0.9)}, step=7)


def seal(path: Path) -> None:
    """Rewrites the manifest to match the files."""
    (path / "manifest.json").write_text(json.dumps(manifest_of(path)))


def rewrite(path: Path, change) -> None:
    """Changes the content of state.pt and updates the manifest."""
    content = torch.load(path / "state.pt", weights_only=True)
    torch.save(change(content), path / "state.pt")
    seal(path)


class Poison:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return self.trace.touch, ()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), state_of())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_changed_byte_is_detected(saved, data):
    file = saved / data.draw(st.sampled_from(FILES))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(1, 255))
    truncate = data.draw(st.booleans())
    damaged = (
        content[:position]
        if truncate
        else content[:position] + bytes([content[position] ^ change]) + content[position + 1 :]
    )
    file.write_bytes(damaged)
    try:
        if file.name != "manifest.json":
            with pytest.raises(ValueError, match=f"{file.name} is damaged"):
                load_checkpoint(saved.parents[1], 7, state_of())
            return
        try:  # white space and some letter cases may change without effect
            load_checkpoint(saved.parents[1], 7, state_of())
        except ValueError as error:
            assert str(saved) in str(error)
        else:
            assert json.loads(damaged) == json.loads(content)
    finally:
        file.write_bytes(content)


MANIFESTS = {
    "no JSON": lambda old: "{",
    "no text": lambda old: b"\xff\xfe\x00",
    "a list": lambda old: "[]",
    "nothing": lambda old: "{}",
    "null": lambda old: "null",
    "deep": lambda old: "[" * 100_000,
    "no numbers": lambda old: json.dumps({name: {} for name in old}),
    "words": lambda old: json.dumps(dict.fromkeys(old, "x")),
    "without weights": lambda old: json.dumps({k: v for k, v in old.items() if k != "model.safetensors"}),
    "without averages": lambda old: json.dumps({k: v for k, v in old.items() if k != "ema.safetensors"}),
    "without state": lambda old: json.dumps({k: v for k, v in old.items() if k != "state.pt"}),
    "outside": lambda old: json.dumps(old | {"../../outside": old["state.pt"]}),
    "absolute": lambda old: json.dumps(old | {"/dev/zero": old["state.pt"]}),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_must_list_the_files(tmp_path, name):
    path = save_checkpoint(tmp_path, state_of())
    shutil.copy(path / "state.pt", tmp_path / "outside")
    content = MANIFESTS[name](json.loads((path / "manifest.json").read_text()))
    (path / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for load in (load_checkpoint, lambda run, step, state: load_weights(run, step, state.modules, ema=True)):
        with pytest.raises(ValueError, match="step_00000007"):
            load(tmp_path, 7, state_of())


STATES = {
    "a list": lambda s: [s],
    "nothing": lambda s: {},
    "no optimizer of that name": lambda s: s | {"optimizers": {"other": s["optimizers"]["network"]}},
    "no groups": lambda s: s | {"optimizers": {"network": {}}},
    "a parameter too many": lambda s: s | {"optimizers": {"network": with_state(s, lambda m: m | {9: m[0]})}},
    "moments of another shape": lambda s: (
        s | {"optimizers": {"network": with_state(s, lambda m: m | {0: m[0] | {"exp_avg": torch.zeros(2)}})}}
    ),
    "a word for moments": lambda s: s | {"optimizers": {"network": with_state(s, lambda m: m | {0: "x"})}},
    "counters that are words": lambda s: s | {"counters": "x"},
    "bad steps that are a number": lambda s: s | {"bad_steps": 3},
    "bad steps that are lists": lambda s: s | {"bad_steps": [[3]]},
    "a best value without its step": lambda s: s | {"best": {"val/l1": 3}},
}


def with_state(saved, change):
    optimizer = saved["optimizers"]["network"]
    return optimizer | {"state": change(optimizer["state"])}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_another_kind_of_training_is_refused(tmp_path, name):
    from train.distributed import DistContext
    from train.loop import RunningSums

    path = save_checkpoint(tmp_path, state_of())
    rewrite(path, STATES[name])
    state = state_of()
    state.counters = {"metrics": RunningSums(DistContext(torch.device("cpu")))}
    with pytest.raises(ValueError, match="state.pt"):
        load_checkpoint(tmp_path, 7, state)


def test_the_momentum_of_another_network_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, state_of(3, torch.optim.SGD))
    other = save_checkpoint(tmp_path / "other", state_of(4, torch.optim.SGD))
    shutil.copy(other / "state.pt", path / "state.pt")
    seal(path)
    with pytest.raises(ValueError, match="state.pt holds the optimizer state of another network"):
        load_checkpoint(tmp_path, 7, state_of(3, torch.optim.SGD))


def test_the_state_of_a_deeper_network_is_refused(tmp_path):
    path, other = save_checkpoint(tmp_path, state_of()), save_checkpoint(tmp_path / "other", state_of(layers=2))
    shutil.copy(other / "state.pt", path / "state.pt")
    seal(path)
    with pytest.raises(ValueError, match="state.pt holds the optimizer state of another network"):
        load_checkpoint(tmp_path, 7, state_of())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")  # torch warns before it refuses
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", FILES)
def test_a_malicious_file_runs_nothing(tmp_path, name, protocol):
    path, trace = save_checkpoint(tmp_path, state_of()), tmp_path / "it ran"
    (path / name).write_bytes(pickle.dumps(Poison(trace), protocol=protocol))
    if name != "manifest.json":
        seal(path)
    with pytest.raises(ValueError, match=str(path)):
        load_checkpoint(tmp_path, 7, state_of())
    assert not trace.exists()


def test_malformed_numbers_in_a_state_name_the_file(tmp_path):
    for key, value in (("bad_steps", ["x"]), ("bad_steps", 3), ("best", {"val/loss": (0.5,)}), ("best", [1])):
        path = save_checkpoint(tmp_path, state_of())
        rewrite(path, lambda content, key=key, value=value: content | {key: value})
        with pytest.raises(ValueError, match=f"{path}/state.pt is damaged: its bad_steps or best"):
            load_checkpoint(tmp_path, 7, state_of())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_damaged_state_with_a_fitting_manifest_is_refused(tmp_path):
    """torch.load raises errors of many types for files whose checksums fit."""
    path = save_checkpoint(tmp_path, state_of())
    content, rng = (path / "state.pt").read_bytes(), random.Random(0)
    pickled = content.index(b"data.pkl") + 64
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(pickled, pickled + 900)] = rng.randrange(256)
        (path / "state.pt").write_bytes(damaged)
        seal(path)
        try:
            load_checkpoint(tmp_path, 7, state_of())
        except ValueError as error:
            assert str(path) in str(error)


def test_a_pickle_inside_a_torch_file_runs_nothing(tmp_path):
    path, trace = save_checkpoint(tmp_path, state_of()), tmp_path / "it ran"
    torch.save({"step": 7, "optimizers": {"network": Poison(trace)}}, path / "state.pt")
    seal(path)
    with pytest.raises(ValueError, match="state.pt holds objects other than tensors and numbers; no code"):
        load_checkpoint(tmp_path, 7, state_of())
    assert not trace.exists()


@pytest.fixture
def run(trained, tmp_path):
    """A copy of a trained VQGAN run, to be damaged."""
    shutil.copytree(trained / "vqgan_digits", tmp_path / "vqgan_digits")
    return tmp_path / "vqgan_digits"


def assert_one_line(capsys, flags, *words, script="train_vqgan.py"):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if f"{script}: " in line]
    assert stop.value.code == 2 and len(errors) == 1
    assert all(word in errors[0] for word in words), errors


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_resuming_run_refuses_a_pickle_in_one_line(run, tmp_path, capsys, name):
    path, trace = checkpoint(run, 5), tmp_path / "it ran"
    (path / name).write_bytes(pickle.dumps(Poison(trace)))
    seal(path)
    flags = f"--logs_root {tmp_path} {STAGE_1}"
    assert_one_line(capsys, f"{flags} --train_steps 6", name)
    assert_one_line(capsys, f"{flags} --train_steps 1 --log_dir new --load_dir {run.name} --load_optim", name)
    if name != "state.pt":
        assert_one_line(capsys, f"{flags} --train_steps 1 --log_dir new2 --load_dir {run.name}", name)
    assert not trace.exists()


def test_a_run_with_only_a_damaged_checkpoint_reports_it(run, tmp_path, capsys):
    file = checkpoint(run, 5) / "state.pt"
    file.write_bytes(file.read_bytes()[:-1])
    flags = f"--logs_root {tmp_path} --train_steps 6 {STAGE_1}"
    with pytest.warns(UserWarning, match="state.pt is damaged"):
        assert_one_line(capsys, flags, "no checkpoint in", "is intact")
    assert_one_line(capsys, f"{flags} --resume {checkpoint(run, 5)}", "state.pt is damaged")


def test_weights_of_another_kind_of_run_are_refused(trained, trained_ddpm, tmp_path, capsys):
    shutil.copytree(trained / "absorbing_digits", tmp_path / "absorbing_digits")
    shutil.copytree(trained_ddpm / "ddpm_digits", tmp_path / "ddpm_digits")
    flags = f"--logs_root {tmp_path} --no_amp --train_steps 1 --log_dir new"
    words = ("does not fit this", "keys differ")
    assert_one_line(capsys, f"{flags} {STAGE_1} --load_dir absorbing_digits", *words)
    script = "train_sampler.py"
    assert_one_line(capsys, f"{flags} {DDPM} --load_dir absorbing_digits", *words, script=script)
    shutil.copytree(trained / "vqgan_digits", tmp_path / "vqgan_digits")
    assert_one_line(capsys, f"{flags} --sampler absorbing {SAMPLER} --load_dir ddpm_digits", *words, script=script)


@pytest.mark.parametrize("damage", ["poison", "cut", "foreign"])
def test_experiments_refuse_damaged_weights(trained, trained_ddpm, tmp_path, damage):
    run, trace = tmp_path / "run", tmp_path / "it ran"
    shutil.copytree(trained_ddpm / "ddpm_digits", run)
    path = checkpoint(run, 3)
    file = path / "ema.safetensors"
    if damage == "poison":
        file.write_bytes(pickle.dumps(Poison(trace)))
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        shutil.copy(checkpoint(trained / "absorbing_digits", 3) / file.name, file)
    seal(path)
    space = PixelSpace(DataConfig(img_size=8))
    with pytest.raises(ValueError, match="ema.safetensors (is not a safetensors file|does not fit this network)"):
        load_sampler(run, None, space, torch.device("cpu"), ema=True, amp=False)
    assert not trace.exists()


@pytest.mark.slow
def test_a_checkpoint_without_counters_resumes(tmp_path):
    flags = f"--logs_root {tmp_path} {STAGE_1}"
    call("train_vqgan.py", f"{flags} --log_dir whole --train_steps 5")
    call("train_vqgan.py", f"{flags} --log_dir old --train_steps 2")
    keys = ("step", "optimizers", "extras")
    rewrite(checkpoint(tmp_path / "old", 2), lambda state: {name: state[name] for name in keys})
    call("train_vqgan.py", f"{flags} --log_dir old --train_steps 5")
    assert_equal_bits(weights(tmp_path / "whole", 5), weights(tmp_path / "old", 5))


def test_folders_that_are_not_checkpoints_are_ignored(tmp_path):
    path = save_checkpoint(tmp_path, state_of())
    for name in ("step_last", "step_7", "step_00000009.bak", "step_²"):
        shutil.copytree(path, path.with_name(name))
    assert saved_steps(tmp_path) == [7]


def test_json_nested_too_deeply_is_a_valueerror(tmp_path):
    """Python raises RecursionError."""
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="rows.json is not JSON: it is nested too deeply"):
        read_json(tmp_path / "rows.json")


@pytest.mark.parametrize("line", ["[" * 100_000, "[1]", "3", '{"loss": 1}', '{"step": "x"}', "\xff"])
def test_a_log_is_kept_up_to_a_damaged_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'.encode("latin-1"))
    truncate_metrics(path, 5)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", "3"])
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json is damaged .*: delete it, and it is measured again"):
        load_results(tmp_path)
