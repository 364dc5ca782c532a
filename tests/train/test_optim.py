"""Optimizers against their formulas, and their states in other memory formats and shards."""

import copy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.checkpoint import load_optimizer
from train.distributed import DistContext
from train.loop import TrainState
from train.optim import OPTIMIZERS, clip_and_step, make_optimizer

WORLD = DistContext(torch.device("cpu"))
LR, DECAY, BETAS = 0.01, 0.1, (0.8, 0.95)
START, GRADIENT = 2.0, 0.5
WITH_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
UNSHARDED = {"adafactor", "adamw8bit"}  # not with --parallel fsdp
EVERY = [pytest.param(name, marks=WITH_BITSANDBYTES if name == "adamw8bit" else ()) for name in OPTIMIZERS]


def after_one_step(name):
    p = nn.Parameter(torch.tensor([[START]], dtype=torch.float64))
    optimizer = make_optimizer(name, [p], lr=LR, weight_decay=DECAY, betas=BETAS)
    p.grad = torch.full_like(p, GRADIENT)
    optimizer.step()
    return p.item()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("adamw", START * (1 - LR * DECAY) - LR),  # the first step is lr times the gradient's sign
        ("adam", START - LR),
        ("sgd", START - LR * (GRADIENT + DECAY * START)),
        ("radam", START * (1 - LR * DECAY) - LR * GRADIENT),  # not yet rectified: the averaged gradient
        ("torch.optim.Adagrad", START - LR),
    ],
)
def test_the_first_step_follows_the_formula(name, expected):
    assert after_one_step(name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_minimizes(name):
    torch.manual_seed(0)
    target, p = torch.randn(4, 3), nn.Parameter(torch.zeros(4, 3))
    optimizer = make_optimizer(name, [p], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    assert (p - target).square().sum() < 0.05 * target.square().sum()


def test_betas_reach_the_optimizer():
    def options(name):
        return make_optimizer(name, [nn.Parameter(torch.zeros(1))], lr=LR, betas=BETAS).param_groups[0]

    for name in ("adamw", "adam", "radam", "nadam"):
        assert options(name)["betas"] == BETAS
    assert options("sgd")["momentum"] == BETAS[0]


@WITH_BITSANDBYTES
def test_large_moments_have_8_bits():
    large, small = (nn.Parameter(torch.full((64, width), START)) for width in (64, 63))
    optimizer = make_optimizer("adamw8bit", [large, small], lr=LR, weight_decay=DECAY, betas=BETAS)
    for p in (large, small):
        p.grad = torch.full_like(p, GRADIENT)
    optimizer.step()
    assert optimizer.param_groups[0]["betas"] == BETAS
    expected = START * (1 - LR * DECAY) - LR
    for p, dtype in ((large, torch.uint8), (small, torch.float32)):
        assert optimizer.state[p]["state1"].dtype == optimizer.state[p]["state2"].dtype == dtype
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected), rtol=1e-5, atol=0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="adamw8bit, which needs the package bitsandbytes: pip install bitsandbytes"):
        make_optimizer("adamw8bit", [nn.Parameter(torch.zeros(1))], lr=LR)


@WITH_BITSANDBYTES
@pytest.mark.parametrize("saved_as", [torch.contiguous_format, torch.channels_last])
def test_8_bit_moments_resume_to_the_bit_in_any_format(saved_as, tmp_path):
    """Moments in the order of their elements: a file of one memory format continues in another."""
    torch.manual_seed(0)
    network, x = nn.Conv2d(32, 32, 3).to(memory_format=saved_as), torch.randn(2, 32, 6, 6)
    optimizer = make_optimizer("adamw8bit", network.parameters(), lr=LR)
    train(network, x, optimizer, 3)
    assert optimizer.state[network.weight]["state1"].dtype == torch.uint8
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = copy.deepcopy(network).to(memory_format=torch.channels_last)
    other = make_optimizer("adamw8bit", resumed.parameters(), lr=LR)
    assert resumed.weight.is_contiguous()  # its kernels on CUDA take flat memory
    load_optimizer(other, torch.load(tmp_path / "state.pt", weights_only=True), tmp_path / "state.pt")
    for i in range(3):
        gradient = network.weight.detach() * (i - 1)
        for each, own in ((network, optimizer), (resumed, other)):
            each.weight.grad, each.bias.grad = gradient.clone(), None
            own.step()
        assert torch.equal(network.weight, resumed.weight), i


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_fused_kernel_is_used_where_it_exists(name):
    assert make_optimizer(name, [nn.Parameter(torch.zeros(1))], lr=LR).param_groups[0]["fused"] is True
    on_meta = make_optimizer(name, [nn.Parameter(torch.zeros(1, device="meta"))], lr=LR)
    assert not on_meta.param_groups[0]["fused"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nadan", "did you mean 'nadam'.*there are: adamw, adam, radam"),
        ("zzz", "unknown optimizer 'zzz'; there are"),
        ("torch.optim.Nothing", "no function Nothing"),
        ("no_such_module.Adam", "no module no_such_module"),
        ("collections.Counter", "which returned a Counter"),
    ],
)
def test_unknown_optimizers_are_refused(name, message, monkeypatch):
    monkeypatch.setattr("collections.Counter.__init__", lambda self, parameters, **options: None)
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, [nn.Parameter(torch.zeros(1))], lr=LR)


def train(network, x, optimizer, steps):
    for i in range(steps):
        optimizer.zero_grad()
        network(x * (i + 1)).square().mean().backward()
        optimizer.step()
    return network.weight.detach().clone()


@pytest.mark.parametrize("name", EVERY)
def test_a_state_resumes_in_another_memory_format(name):
    """Fused kernels pair elements by memory position, so a loaded state must have the strides of its parameter."""
    torch.manual_seed(0)
    network, x = nn.Conv2d(4, 8, 3), torch.randn(2, 4, 8, 8)
    optimizer = make_optimizer(name, network.parameters(), lr=LR)
    train(network, x, optimizer, 3)
    converted = copy.deepcopy(network).to(memory_format=torch.channels_last)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = train(network, x, optimizer, 3)
    resumed = make_optimizer(name, converted.parameters(), lr=LR)
    resumed.load_state_dict(saved)
    actual = train(converted, x.to(memory_format=torch.channels_last), resumed, 3)
    assert (actual - expected).abs().max() < 1e-5  # three wrong steps of 0.01 would be far off


@WITH_BITSANDBYTES
def test_8_bit_moments_are_not_taken_from_another_optimizer():
    network = nn.Linear(2, 3)
    optimizers = [make_optimizer(name, network.parameters(), lr=LR) for name in ("adamw", "adamw8bit")]
    train(network, torch.randn(4, 2), optimizers[0], 1)
    with pytest.raises(ValueError, match="holds the state of another optimizer: pass the --optimizer of that run"):
        load_optimizer(optimizers[1], optimizers[0].state_dict(), Path("state.pt"))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(module):
    return fully_shard(copy.deepcopy(module), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - UNSHARDED))
def test_shards_are_updated_like_full_parameters(name, one_process):
    torch.manual_seed(0)
    plain, x = nn.Linear(6, 4), torch.randn(5, 6)
    shards = sharded(plain)
    assert isinstance(shards.weight, DTensor)
    networks = {net: make_optimizer(name, net.parameters(), lr=LR, weight_decay=DECAY) for net in (plain, shards)}
    for network, optimizer in networks.items():
        for _ in range(2):
            network(x).square().mean().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad()
    assert torch.allclose(plain.weight, shards.weight.full_tensor(), atol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", pytest.param("adamw8bit", marks=WITH_BITSANDBYTES)])
def test_these_optimizers_refuse_shards(name, one_process):
    with pytest.raises(ValueError, match="pass --optimizer adamw or --parallel ddp"):
        make_optimizer(name, sharded(nn.Linear(6, 4)).parameters(), lr=LR)


def take_steps(name, norms, clip, fused):
    """Takes a step at each of these gradient norms; returns the weights, the moments and the reported norms."""
    torch.manual_seed(0)
    network = nn.Linear(3, 4)
    optimizer = make_optimizer(name, network.parameters(), lr=LR, weight_decay=DECAY, betas=BETAS)
    for group in optimizer.param_groups:
        group["fused"] = fused
    state, reported = TrainState({}, {"network": optimizer}), []
    for norm in norms:
        for i, parameter in enumerate(network.parameters()):
            gradient = torch.linspace(-1, 1 + i, parameter.numel()).view_as(parameter)
            parameter.grad = gradient
        total = nn.utils.get_total_norm([p.grad for p in network.parameters()])
        for parameter in network.parameters():
            parameter.grad = parameter.grad / total * norm
        result = clip_and_step(state, ["network"], WORLD, lr=LR, clip=clip)
        reported.append(result and (result.norms[0].item(), result.finite.item()))
    moments = [value for p in network.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [p.detach() for p in network.parameters()], moments, reported


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_fused_kernel_clips_like_the_formula(name, clip):
    fused, plain = (take_steps(name, [0.5, 3.0, 2.0], clip, fused) for fused in (True, False))
    for a, b in zip(fused[0] + fused[1], plain[0] + plain[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert [norm for norm, _ in fused[2]] == pytest.approx([0.5, 3.0, 2.0])


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_nothing_on_the_device(bad, first):
    norms = [0.5, 2.0]
    expected = take_steps("adamw", norms, 1.0, fused=True)
    norms.insert(0 if first else 1, bad)
    actual = take_steps("adamw", norms, 1.0, fused=True)
    assert all(map(torch.equal, expected[0] + expected[1], actual[0] + actual[1]))
    assert [finite for _, finite in actual[2]] == [norm != bad and norm == norm for norm in norms]


@pytest.mark.parametrize("name", ["radam", "sgd"])
def test_other_optimizers_wait_and_take_no_bad_step(name):
    expected, actual = (take_steps(name, norms, 1.0, fused=None) for norms in ([0.5, 2.0], [0.5, torch.inf, 2.0]))
    assert all(map(torch.equal, expected[0], actual[0])) and actual[2][1] is None
