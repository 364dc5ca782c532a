"""Power-function averages against explicit sums, and reconstructed averages against tracked ones."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import posthoc_ema
from train.posthoc_ema import (
    MAX_STD,
    PosthocEMA,
    buffer_names,
    drop_snapshots_after,
    fit_profile,
    gamma_from_std,
    inner_product,
    reconstruct_ema,
    save_snapshot,
    snapshot_path,
    snapshot_steps,
    std_from_gamma,
)

STEPS, WIDTH, TRACKED = 600, 400, (0.05, 0.1)


class Walker(nn.Module):
    """A random walk of weights around 3, in float64, and buffers of two kinds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH,), 3.0, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(2))

    def walk(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.weight += torch.randn(WIDTH, dtype=torch.float64, generator=generator) / STEPS**0.5
            self.count += 1
            self.seen.fill_(self.count)


def tensors_of(profiles: dict[str, PosthocEMA]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, p in profiles.items() for key, value in p.module.state_dict().items()}


@functools.cache
def random_walk() -> tuple[dict[int, dict[str, Tensor]], dict[tuple[int, float], Tensor], Tensor]:
    """Snapshots every 25 steps, directly tracked averages, and the last weights."""
    walker, generator = Walker(), torch.Generator().manual_seed(0)
    stds = [*TRACKED, 0.07, 0.15, 0.2]
    profiles = {f"{std}/network": PosthocEMA(walker, std) for std in stds}
    snapshots, tracked = {}, {}
    for step in range(1, STEPS + 1):
        walker.walk(generator)
        for profile in profiles.values():
            profile.update(walker, step)
        if step % 25 == 0:
            tensors = tensors_of({f"{std}/network": profiles[f"{std}/network"] for std in TRACKED})
            snapshots[step] = {key: value.clone() for key, value in tensors.items()}
            tracked |= {(step, std): profiles[f"{std}/network"].module.weight.data.clone() for std in stds}
    assert buffer_names({"0.05/network": profiles["0.05/network"]}) == {"0.05/network.count", "0.05/network.seen"}
    return snapshots, tracked, walker.weight.data.clone()


COPIED = {f"{std}/network.{key}" for std in TRACKED for key in ("count", "seen")}


def run_with(folder, every: int, **settings):
    for step, tensors in random_walk()[0].items():
        if step % every == 0:
            save_snapshot(folder, step, tensors, copied=COPIED, **settings)
    return folder


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_gamma_and_std_match_the_published_pairs(std, gamma):
    assert gamma_from_std(std) == pytest.approx(gamma, abs=0.005)


@given(st.floats(0.001, MAX_STD))
def test_gamma_is_the_greatest_root(std):
    gamma = gamma_from_std(std)
    assert std_from_gamma(gamma) == pytest.approx(std, rel=1e-9)
    assert gamma > (math.sqrt(5) - 3) / 2 - 1e-6


@pytest.mark.parametrize("std", [0.0, -0.1, 0.301, 1.0, math.nan])
def test_impossible_lengths_are_refused(std):
    bounds = "wanted more than 0 and at most 0.3003"
    with pytest.raises(ValueError, match=f"got a relative length of {std} for an average, {bounds}"):
        gamma_from_std(std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_the_average_is_the_profile_weighted_sum(std):
    """The weights equal the profile's integrals over (n - 1, n], and their standard deviation is std."""
    steps, gamma = 50, gamma_from_std(std)
    model = nn.Linear(1, 1, bias=False).double()
    average = PosthocEMA(model, std)
    values = torch.randn(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values.tolist(), 1):
        model.weight.data.fill_(value)
        average.update(model, step)
        if step == 1:
            assert average.module.weight.item() == value
    n = torch.arange(steps + 1, dtype=torch.float64) / steps
    weights = (n ** (gamma + 1)).diff()
    assert average.module.weight.item() == pytest.approx((weights @ values).item(), rel=1e-12)
    middle = (n[1:] + n[:-1]) / 2
    spread = (weights @ middle**2 - (weights @ middle) ** 2).sqrt()
    assert spread.item() == pytest.approx(average.std, rel=0.02)
    with pytest.raises(ValueError, match="step 0"):
        average.update(model, 0)


@given(st.floats(0.05, 1), st.floats(0.02, 0.28), st.floats(0.05, 1), st.floats(0.02, 0.28))
def test_inner_products_are_integrals(t_a, std_a, t_b, std_b):
    a, b = gamma_from_std(std_a), gamma_from_std(std_b)
    tau = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000 * min(t_a, t_b)
    product = (a + 1) * (tau / t_a) ** a / t_a * (b + 1) * (tau / t_b) ** b / t_b
    numeric = product.mean().item() * min(t_a, t_b)
    assert inner_product(*map(torch.tensor, (t_a, a, t_b, b))).item() == pytest.approx(numeric, rel=2e-3)


def test_a_tracked_profile_fits_itself_and_weights_sum_to_one():
    steps = [step for step in (100, 200, 300, 400) for _ in TRACKED]
    stds = TRACKED * 4
    weights, error = fit_profile(steps, stds, 300, 0.1)
    assert error < 1e-6
    torch.testing.assert_close(weights, torch.eye(8, dtype=torch.float64)[5], rtol=0, atol=1e-9)
    weights, error = fit_profile(steps, stds, 400, 0.15)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert 0.05 < error < 0.15
    assert fit_profile(steps[:-2], stds[:-2], 400, 0.15).error > error


def test_the_system_stays_solvable_with_many_snapshots():
    steps = [step for step in range(10, 3001, 10) for _ in TRACKED]
    weights, error = fit_profile(steps, TRACKED * 300, 3000, 0.07)
    assert error < 1e-4
    assert weights.abs().sum() < 3


@pytest.mark.parametrize(
    ("every", "std", "bound"),
    [(150, 0.07, 0.04), (75, 0.07, 0.008), (75, 0.15, 0.008), (75, 0.2, 0.03), (25, 0.07, 0.0005), (25, 0.2, 0.003)],
)
def test_a_reconstructed_average_is_close_to_a_tracked_one(tmp_path, every, std, bound):
    """Errors relative to the distance between average and weights, for snapshots every 1/4, 1/8 and 1/24 of the run.

    The bounds are about twice the measured errors.
    """
    _, tracked, last_weights = random_walk()
    reconstructed = reconstruct_ema(run_with(tmp_path, every, dtype=torch.float64), None, "network", std)
    expected = tracked[STEPS, std]
    error = ((reconstructed["weight"] - expected).norm() / (expected - last_weights).norm()).item()
    assert bound / 10 < error < bound
    torch.testing.assert_close(reconstructed["frozen"], torch.arange(3.0, dtype=torch.float64))  # weights of sum 1


@pytest.mark.parametrize("std", TRACKED)
@pytest.mark.parametrize("step", [300, 600, None])
def test_a_tracked_length_is_reconstructed_exactly(tmp_path, step, std):
    reconstructed = reconstruct_ema(run_with(tmp_path, 75), step, "network", std)
    torch.testing.assert_close(
        reconstructed["weight"], random_walk()[1][step or STEPS, std].float(), rtol=1e-6, atol=1e-6
    )


def test_any_length_loads_with_the_buffers_of_its_step(tmp_path):
    reconstructed = reconstruct_ema(run_with(tmp_path, 75), 300, "network", 0.08)
    Walker().load_state_dict(reconstructed)
    assert {key: value.dtype for key, value in reconstructed.items()} == {
        "weight": torch.float32,
        "frozen": torch.float32,
        "count": torch.int64,
        "seen": torch.float32,
    }
    assert reconstructed["count"] == 300
    assert reconstructed["seen"].tolist() == [300.0, 300.0]
    tracked = [random_walk()[1][300, s].float() for s in TRACKED]
    assert not any(torch.equal(reconstructed["weight"], average) for average in tracked)


def test_half_precision_and_shared_tensors_are_saved(tmp_path):
    shared = torch.randn(4)
    tensors = {
        "0.1/network.a": shared,
        "0.1/network.b": shared,
        "0.1/network.c": shared.view(2, 2).T,
        "0.1/d.x": shared,
    }
    path = save_snapshot(tmp_path, 3, tensors, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}
    reconstructed = reconstruct_ema(tmp_path, 3, "network", 0.1)
    assert reconstructed.keys() == {"a", "b", "c"}
    torch.testing.assert_close(reconstructed["c"], shared.view(2, 2).T.bfloat16().float())
    save_snapshot(tmp_path, 3, tensors)
    torch.testing.assert_close(reconstruct_ema(tmp_path, None, "d", 0.1)["x"], shared)


def test_missing_snapshots_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train with --ema_profiles 0.05 0.1"):
        reconstruct_ema(tmp_path, None, "network", 0.07)
    run_with(tmp_path, 300)
    with pytest.raises(FileNotFoundError, match="of step 450; there are 300, 600: pass one"):
        reconstruct_ema(tmp_path, 450, "network", 0.07)
    with pytest.raises(ValueError, match="no profile of a module 'work'"):
        reconstruct_ema(tmp_path, 600, "work", 0.07)
    with pytest.raises(ValueError, match=r"length 0.25 .* from lengths \[0.05, 0.1\] saved at 2 steps.* error is 7\d%"):
        reconstruct_ema(tmp_path, None, "network", 0.25)
    with pytest.raises(ValueError, match="at most 0.3003"):
        reconstruct_ema(tmp_path, None, "network", 0.5)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b"x" * 99]
)
def test_a_damaged_snapshot_is_named(tmp_path, damage):
    path = snapshot_path(run_with(tmp_path, 300), 300)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*delete it"):
        reconstruct_ema(tmp_path, None, "network", 0.07)
    path.unlink()
    reconstruct_ema(tmp_path, None, "network", 0.07)


def test_a_foreign_snapshot_is_refused(tmp_path):
    path = snapshot_path(run_with(tmp_path, 300), 300)
    path.rename(snapshot_path(tmp_path, 299))
    with pytest.raises(ValueError, match="step_00000299.* holds the profiles of step 300"):
        reconstruct_ema(tmp_path, None, "network", 0.07)
    snapshot_path(tmp_path, 299).unlink()
    for metadata in (None, {"step": "300", "copied": "{", "crc32": "{}"}):
        save_file({"0.05/network.weight": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match="is not a snapshot of EMA profiles"):
            reconstruct_ema(tmp_path, None, "network", 0.07)
    save_file({"0.05/network.weight": torch.zeros(1)}, path, {"step": "300", "copied": "[]", "crc32": "{}"})
    with pytest.raises(ValueError, match="its tensors are not those it lists"):
        reconstruct_ema(tmp_path, None, "network", 0.07)
    keys = [key for key in random_walk()[0][300] if key.endswith(".weight")]
    save_snapshot(tmp_path, 300, {key: torch.zeros(2) for key in keys})
    with pytest.raises(ValueError, match="step_00000300.* is of another network than step 600"):
        reconstruct_ema(tmp_path, None, "network", 0.07)
    wider = {key: value.expand(1, *value.shape) for key, value in random_walk()[0][300].items()}
    save_snapshot(tmp_path, 300, wider, copied=COPIED)
    with pytest.raises(ValueError, match="in another shape"):
        reconstruct_ema(tmp_path, None, "network", 0.07)


def test_snapshots_with_old_weight_names_combine_with_new_ones(tmp_path):
    old, new = "label.weight", "encoders.label.embedding.weight"  # of transformers
    for run, names in {"mixed": (old, new), "later": (new, new), "earlier": (old, old)}.items():
        for step, name in zip((300, 600), names, strict=True):
            tensors = {
                f"{std}/network.{key}": torch.full((2,), step + std) for std in TRACKED for key in (name, "code")
            }
            save_snapshot(tmp_path / run, step, tensors)
    mixed, later, earlier = (
        reconstruct_ema(tmp_path / run, None, "network", 0.07) for run in ("mixed", "later", "earlier")
    )
    assert mixed.keys() == later.keys() == {new, "code"} and earlier.keys() == {old, "code"}
    assert torch.equal(mixed[new], later[new]) and torch.equal(mixed[new], earlier[old])


def test_a_resumed_run_drops_later_snapshots(tmp_path):
    assert drop_snapshots_after(tmp_path, 0) == []
    run_with(tmp_path, 150)
    (tmp_path / "ema_profiles" / "step_notes.safetensors").write_text("mine")
    assert drop_snapshots_after(tmp_path, 300) == [450, 600]
    assert snapshot_steps(tmp_path) == [150, 300]
    assert (tmp_path / "ema_profiles" / "step_notes.safetensors").exists()


def test_a_failed_save_keeps_the_older_snapshot(tmp_path, monkeypatch):
    path = snapshot_path(run_with(tmp_path, 600), 600)
    content = path.read_bytes()

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(posthoc_ema, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        run_with(tmp_path, 600, dtype=torch.float16)
    assert path.read_bytes() == content
    (path.parent / ".step_00000001.safetensors.new").touch()  # left by a killed process
    monkeypatch.undo()
    run_with(tmp_path, 600)
    assert [f.name for f in path.parent.iterdir()] == [path.name]


def test_the_reconstruction_can_be_modified_in_place(tmp_path):
    """The tensors are not views of the files."""
    reconstructed = reconstruct_ema(run_with(tmp_path, 300), None, "network", 0.05)
    for value in reconstructed.values():
        value.add_(1)
    reloaded = reconstruct_ema(tmp_path, None, "network", 0.05)
    for key, value in reloaded.items():
        torch.testing.assert_close(value + 1, reconstructed[key])
