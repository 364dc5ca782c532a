"""Checkpoints are written atomically, and loading them runs no code."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from train import checkpoint
from train.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    load_into_module,
    load_weights,
    resolve_step,
    save_checkpoint,
    saved_steps,
)
from train.ema import EMA
from train.files import sha256
from train.loop import TrainState


def state_of(width: int = 3) -> TrainState:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.randn(4, width)).square().sum().backward()
    optimizer.step()
    return TrainState({"network": network}, {"network": optimizer}, {"network": EMA(network, 0.9)}, step=7)


def write_manifest(path):
    files = [f for f in path.iterdir() if f.name != "manifest.json"]
    content = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    (path / "manifest.json").write_text(json.dumps(content))


def test_save_and_load_round_trip(tmp_path):
    saved, loaded = state_of(), state_of()
    save_checkpoint(tmp_path, saved)
    with torch.no_grad():
        for parameter in loaded.modules["network"].parameters():
            parameter.zero_()
    loaded.step = 0
    load_checkpoint(tmp_path, 7, loaded)
    assert loaded.step == 7
    for name in ("modules", "optimizers"):
        assert str(getattr(saved, name)["network"].state_dict()) == str(getattr(loaded, name)["network"].state_dict())
    assert str(saved.averages["network"].module.state_dict()) == str(loaded.averages["network"].module.state_dict())
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007\n"


def test_a_failed_save_keeps_the_older_checkpoint_alone(tmp_path, monkeypatch):
    state = state_of()
    save_checkpoint(tmp_path, state)
    state.step = 8

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, state)
    assert saved_steps(tmp_path) == [7]
    load_weights(tmp_path, 7, state.modules, ema=False)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
def test_a_truncated_or_flipped_file_is_named(tmp_path, name, damage):
    path = save_checkpoint(tmp_path, state_of())
    (path / name).write_bytes(damage((path / name).read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        load_checkpoint(tmp_path, 7, state_of())


def test_weights_of_another_network_are_refused(tmp_path):
    save_checkpoint(tmp_path, state_of(width=3))
    with pytest.raises(ValueError, match=r"0.weight: \(3, 3\) in the file, \(4, 4\) here"):
        load_checkpoint(tmp_path, 7, state_of(width=4))
    with pytest.raises(ValueError, match="model.safetensors does not fit this network .* keys differ"):
        load_weights(tmp_path, 7, {"network": nn.ModuleDict({"extra": nn.Linear(1, 1)})}, ema=False)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_weights_that_are_not_numbers_are_refused(tmp_path, name):
    state = state_of()
    modules = state.modules if name == "model.safetensors" else {k: v.module for k, v in state.averages.items()}
    nn.init.constant_(next(modules["network"].parameters()).data[:1], torch.nan)
    save_checkpoint(tmp_path, state)
    with pytest.raises(ValueError, match=f"{name} holds NaN in 1 of . tensors, such as network.0.weight"):
        load_checkpoint(tmp_path, 7, state_of())


class Labelled(nn.Module):
    """A user's network with a weight whose name transformers no longer use."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(3, 4)


def test_weights_of_user_modules_keep_their_names(tmp_path):
    saved, loaded = Labelled(), Labelled()
    save_checkpoint(tmp_path, TrainState({"network": saved}, {}, {}, step=7))
    load_weights(tmp_path, 7, {"network": loaded}, ema=False)
    assert torch.equal(loaded.label.weight, saved.label.weight)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    path = save_checkpoint(tmp_path, state_of())
    trace = tmp_path / "it ran"

    class Poison:
        def __reduce__(self):
            return trace.touch, ()

    (path / "state.pt").write_bytes(pickle.dumps(Poison(), protocol=2))
    write_manifest(path)
    with pytest.raises(ValueError, match="no code was run"):
        load_checkpoint(tmp_path, 7, state_of())
    assert not trace.exists()


def test_an_invalid_safetensors_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, state_of())
    (path / "model.safetensors").write_bytes(b"something else")
    write_manifest(path)
    with pytest.raises(ValueError, match="model.safetensors is not a safetensors file"):
        load_checkpoint(tmp_path, 7, state_of())


def test_missing_ema_weights_are_reported(tmp_path):
    state = state_of()
    state.averages = {}
    save_checkpoint(tmp_path, state)
    with pytest.raises(FileNotFoundError, match="--no_ema"):
        load_weights(tmp_path, 7, state.modules, ema=True)


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path):
    path = checkpoint_path(tmp_path, 9)
    path.mkdir(parents=True)
    save_file({"network.x": torch.zeros(1)}, path / "model.safetensors")
    assert saved_steps(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        resolve_step(tmp_path, None, "--load_step")


def test_the_default_step_is_the_newest_and_errors_list_steps(tmp_path):
    state = state_of()
    for state.step in (100, 20, 3):
        save_checkpoint(tmp_path, state)
    assert resolve_step(tmp_path, None, "--load_step") == 100
    assert resolve_step(tmp_path, 20, "--load_step") == 20
    with pytest.raises(FileNotFoundError, match="there are 3, 20, 100"):
        resolve_step(tmp_path, 21, "--load_step")


def test_a_missing_key_is_named_beside_keys_that_may_be_missing():
    network = nn.Linear(3, 2)
    file = {"network.weight": torch.zeros(2, 3)}
    load_into_module(network, file, "network", Path("file"), {"network.bias"})
    assert not network.weight.any() and network.bias.any()  # what was loaded before stays
    with pytest.raises(ValueError, match=r"1 keys differ\): bias"):
        load_into_module(network, file, "network", Path("file"), {"network.other"})
