"""Autocast dtypes, loss scaling and non-finite losses."""

import pytest
import torch
from torch import nn

from train import execution
from train.execution import LossScale, autocast, autocast_dtype, nan_grads_if_nonfinite

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    "device, native, expected",
    [
        (CPU, True, torch.bfloat16),
        (CPU, False, None),
        (CUDA, True, torch.bfloat16),
        (CUDA, False, torch.float16),
        (MPS, False, None),
    ],
)
def test_auto_takes_the_native_dtype(device, native, expected, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bf16", lambda _: native)
    assert autocast_dtype(device) == autocast_dtype(device, "auto") == expected


def test_an_explicit_dtype_is_used(monkeypatch):
    monkeypatch.setattr(execution, "has_native_bf16", lambda _: False)
    assert autocast_dtype(CPU, "bfloat16") == torch.bfloat16
    assert autocast_dtype(CPU, "float16") == torch.float16
    with pytest.raises(ValueError, match="auto, bfloat16, float16"):
        autocast_dtype(CPU, "half")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_given_dtype(dtype, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bf16", lambda _: False)
    x = torch.ones(2, 2)
    with autocast(CPU, True, dtype):
        assert (x @ x).dtype == dtype
    with autocast(CPU, False, dtype):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_autocast_defaults_to_native_bfloat16(native, monkeypatch):
    monkeypatch.setattr(execution, "has_native_bf16", lambda _: native)
    x = torch.ones(2, 2)
    with autocast(CPU, True):
        assert (x @ x).dtype == (torch.bfloat16 if native else torch.float32)
    with autocast(CPU, False):
        assert (x @ x).dtype == torch.float32


def network_and_loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3))
    return network, network(torch.randn(4, 5)).square().mean()


def gradients(network):
    return [p.grad for p in network.parameters()]


def test_a_finite_loss_keeps_its_bits():
    (plain, loss), (checked, checked_loss) = network_and_loss(), network_and_loss()
    loss.backward()
    assert torch.equal(nan_grads_if_nonfinite(checked_loss), checked_loss)
    nan_grads_if_nonfinite(checked_loss).backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(checked), strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_nonfinite_loss_gives_every_parameter_nan(bad):
    network, loss = network_and_loss()
    (loss + bad).backward()  # a term that does not depend on any parameter
    assert all(g.isfinite().all() for g in gradients(network)), "unchecked, it leaves finite gradients"
    network, loss = network_and_loss()
    nan_grads_if_nonfinite(loss + bad).backward()
    assert all(g.isnan().all() for g in gradients(network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_checked_loss_keeps_its_dtype(dtype):
    assert nan_grads_if_nonfinite(torch.ones(3, dtype=dtype)).dtype == dtype


def test_scaling_and_unscaling_changes_no_bit():
    (plain, loss), (scaled, scaled_loss) = network_and_loss(), network_and_loss()
    loss.backward()
    scale = LossScale()
    assert scale.value == 2.0**16
    scale.scale(scaled_loss).backward()
    assert all(torch.equal(a, b / scale.value) for a, b in zip(gradients(plain), gradients(scaled), strict=True))


def test_a_float16_loss_is_scaled_in_float32():
    assert LossScale().scale(torch.tensor(2.0, dtype=torch.float16)).item() == 2.0**17


def test_gradients_below_float16_survive():
    weight = torch.full((1, 1), 1.0, requires_grad=True)
    grads = []
    for scale in (1.0, LossScale().value):
        with autocast(CPU, True, torch.float16):
            loss = (torch.ones(1, 1) @ weight).float().sum() * 1e-9
        grads.append(torch.autograd.grad(loss * scale, weight)[0].item() / scale)
    assert grads == [0.0, pytest.approx(1e-9, rel=1e-3)]


def test_the_scale_halves_down_to_one_and_reports_it():
    scale = LossScale()
    assert [scale.record_overflow() for _ in range(17)] == [True] * 16 + [False]
    assert scale.value == 1


def test_the_scale_doubles_after_2000_finite_steps():
    scale = LossScale()
    for _ in range(1999):
        scale.record_finite()
    assert scale.value == 2.0**16
    scale.record_overflow()
    for _ in range(1999):
        scale.record_finite()
    assert scale.value == 2.0**15, "an overflow restarts the count"
    scale.record_finite()
    assert scale.value == 2.0**16


def test_the_scale_has_a_maximum():
    scale = LossScale()
    for _ in range(20 * 2000):
        scale.record_finite()
    assert scale.value == 2.0**24


def test_a_resumed_scale_continues_identically():
    events = torch.zeros(5000, dtype=torch.bool)  # which steps overflow
    events[[3, 100, 4000]] = True

    def follow(scale, part):
        return [scale.record_overflow() if bad else scale.record_finite() or scale.value for bad in part.tolist()]

    uninterrupted, first, second = LossScale(), LossScale(), LossScale()
    expected = follow(uninterrupted, events)
    values = follow(first, events[:1234])
    state = first.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    second.load_state_dict(state)
    assert values + follow(second, events[1234:]) == expected
    assert second.state_dict() == uninterrupted.state_dict()
