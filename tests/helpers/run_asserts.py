"""Comparisons of two runs: weights, metrics and checkpoint files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.files import sha256


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def weights(run, step, name="model.safetensors"):
    return load_file(checkpoint(run, step) / name)


def saved_state(run, step):
    """The content of state.pt."""
    return torch.load(checkpoint(run, step) / "state.pt", weights_only=True)


def extras(run, step):
    return saved_state(run, step)["extras"]


def manifest_of(path):
    files = [f for f in path.iterdir() if f.name != "manifest.json"]
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}


def lines(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def assert_equal_bits(one, other):
    assert one.keys() == other.keys()
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    assert not differing, differing


def assert_close(one, other, rtol=1e-5):
    """Compares all weights by their overall relative distance, since Adam amplifies the rounding of zero gradients."""
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].shape != other[key].shape or one[key].dtype != other[key].dtype] == []
    difference = distance(one, other) / sum(one[key].double().square().sum() for key in one).sqrt()
    assert difference <= rtol, difference


def distance(one, other):
    return sum((one[key].double() - other[key].double()).square().sum() for key in one).sqrt()


def assert_same_losses(one, other):
    """Compares metrics.jsonl line by line, to 1e-5 relative or a few float32 roundings of 1; learning rates exactly."""
    assert len(lines(one)) == len(lines(other)) > 0
    for row, twin in zip(lines(one), lines(other), strict=True):
        assert row == pytest.approx(twin, rel=1e-5, abs=5e-7), (row, twin)
        assert row.get("lr") == twin.get("lr")


def moments(run, step):
    """All tensors in the optimizer states, by optimizer, parameter and name."""
    return {
        f"{name}/{i}/{key}": value
        for name, optimizer in saved_state(run, step)["optimizers"].items()
        for i, values in optimizer["state"].items()
        for key, value in values.items()
    }


def assert_same_checkpoints(one, other, step, best=True):
    """Compares the files, keys, shapes and values; `best` too if both runs validated at the same steps."""
    first, second = checkpoint(one, step), checkpoint(other, step)
    assert sorted(f.name for f in first.iterdir()) == sorted(f.name for f in second.iterdir())
    for file in first.glob("*.safetensors"):
        assert_close(weights(one, step, file.name), weights(other, step, file.name))
    assert_close(moments(one, step), moments(other, step), rtol=1e-3)  # some gradients are pure rounding
    first, second = saved_state(one, step), saved_state(other, step)
    assert (
        first.keys() == second.keys() and first["step"] == second["step"] and first["bad_steps"] == second["bad_steps"]
    )
    for name, (value, at) in first["best"].items() if best else ():
        assert second["best"][name] == (pytest.approx(value, rel=1e-5), at)


def assert_same_ddpm(one, other, step):
    """Compares weights, losses, and the statistics of the time sampler."""
    assert_close(weights(one, step), weights(other, step))
    assert_same_losses(one, other)
    first, second = extras(one, step), extras(other, step)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name]["count"], second[name]["count"]) and (first[name]["count"] >= 10).all()
        assert torch.allclose(first[name]["losses"], second[name]["losses"], rtol=1e-4)
