"""Weight averages against their closed form, for all kinds of tensors, dtypes, devices and shards."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from train.ema import EMA


def scalar(value: float) -> nn.Module:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.tensor([value], dtype=torch.float64)))
    module.register_buffer("seen", torch.tensor(0))
    return module


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def disturb_with(module: nn.Module, value: float) -> None:
    """Multiplies all parameters, which gives the same result when sharded."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 + value)


def expected_averages(average: EMA, model: nn.Module, step: int) -> list[torch.Tensor]:
    """The expected averages, one parameter at a time."""
    weight = 1 - average.decay(step)
    pairs = zip(average.module.parameters(), model.parameters(), strict=True)
    return [slow + weight * (fast.detach().to(slow) - slow) for slow, fast in pairs]


def check_update(average: EMA, model: nn.Module, step: int) -> None:
    disturb(model)
    expected = expected_averages(average, model, step)
    average.update(model, step)
    for actual, target in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.detach(), target)


def test_closed_form_with_warm_up_and_copied_buffers():
    """w_t = sum_n (1 - d_n) d_(n + 1) ... d_t x_n + d_1 ... d_t x_0."""
    start, steps = 0.3, 19
    model = scalar(start)
    average = EMA(model, beta=0.5)
    decays = [min(0.5, (1 + step) / (10 + step)) for step in range(1, steps + 1)]
    assert decays[0] < decays[5] < decays[-1] == 0.5
    for step in range(1, steps + 1):
        model.w.data.fill_(step**0.5)
        model.seen.fill_(step)
        average.update(model, step)
        later = torch.tensor(decays[:step], dtype=torch.float64).flip(0).cumprod(0).flip(0).tolist() + [1.0]
        weights = [(1 - decays[n - 1]) * later[n] for n in range(1, step + 1)]
        expected = start * later[0] + sum(weight * n**0.5 for n, weight in enumerate(weights, 1))
        assert average.module.w.item() == pytest.approx(expected, rel=1e-12)
        assert average.module.seen.item() == step


def test_the_decay_reaches_beta():
    assert EMA(scalar(0.0), 0.999).decay(10**6) == 0.999


def test_tensors_are_paired_by_name():
    other = nn.Module()
    other.register_parameter("v", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="'v'"):
        EMA(scalar(0.0), 0.9).update(other, 1)
    wide = scalar(0.0)
    wide.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))  # would broadcast
    with pytest.raises(ValueError, match=r"w is \(1,\) in the average, \(5,\) in the model"):
        EMA(scalar(0.0), 0.9).update(wide, 1)


def test_the_copy_is_frozen_and_independent():
    model = scalar(1.0)
    average = EMA(model, 0.9)
    model.w.data.fill_(5.0)
    assert average.module.w.item() == 1.0
    assert not average.module.w.requires_grad


def test_every_kind_of_buffer_is_copied():
    kinds = {
        "whole": torch.tensor([1, 2]),
        "byte": torch.tensor([7], dtype=torch.uint8),
        "flag": torch.tensor(False),
        "real": torch.zeros(2, 3),
        "wide": torch.zeros(2, dtype=torch.float64),
        "narrow": torch.zeros(2, dtype=torch.float16),
        "phase": torch.zeros(2, dtype=torch.complex64),
        "empty": torch.zeros(0),
        "spread": torch.zeros(1).expand(3),
        "turned": torch.zeros(2, 3).T,
        "nothing": None,
    }
    model = nn.Linear(2, 2)
    for name, value in kinds.items():
        model.register_buffer(name, value, persistent=name != "real")
    average = EMA(model, 0.9)
    changed = {name: torch.ones_like(value, memory_format=torch.contiguous_format) for name, value in kinds.items()
               if value is not None}  # fmt: skip
    for name, value in changed.items():
        setattr(model, name, value)
    average.update(model, 1)
    buffers = dict(average.module.named_buffers())
    assert buffers.keys() == changed.keys()
    for name, value in changed.items():
        torch.testing.assert_close(buffers[name], value.float() if name == "narrow" else value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_averaged_in_float32(dtype):
    model = nn.Linear(3, 3).to(dtype)
    model.register_parameter("codes", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))  # copied
    average = EMA(model, 0.999)
    assert {p.dtype for p in (average.module.weight, average.module.bias)} == {torch.float32}
    nn.init.ones_(model.weight)
    nn.init.zeros_(average.module.weight)
    model.codes.add_(1)
    for step in range(10**6, 10**6 + 20):
        average.update(model, step)
    torch.testing.assert_close(average.module.weight, torch.full((3, 3), 1 - 0.999**20))
    assert average.module.codes.tolist() == [2, 3]
    assert average.module(torch.zeros(1, 3)).dtype == torch.float32


def test_shared_and_complex_parameters_are_averaged_once():
    model = nn.Module()
    model.first = nn.Linear(2, 2, bias=False)
    model.second = nn.Linear(2, 2, bias=False)
    model.second.weight = model.first.weight
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    average = EMA(model, 0.9)
    assert average.module.second.weight is average.module.first.weight
    for step in (1, 2):
        check_update(average, model, step)


def test_pairing_happens_once(monkeypatch):
    model = network()
    average = EMA(model, 0.9)
    average.update(model, 1)

    def never(*args):
        raise AssertionError("names were built again")

    monkeypatch.setattr(model, "named_parameters", never)
    monkeypatch.setattr(model, "named_buffers", never)
    disturb(model[0])
    before = average.module[0].weight.clone()
    average.update(model, 2)
    assert not torch.equal(before, average.module[0].weight)


def replaced_parameter(model, average):
    model[0].weight = nn.Parameter(torch.randn(4, 3))


def replaced_module(model, average):
    model[2] = nn.Sequential(nn.Linear(4, 2))


def replaced_in_the_average(model, average):
    average.module[0].weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)


def new_data(model, average):
    model[0].weight.data = torch.randn(4, 3)


def moved_to_float64(model, average):
    model.double()


def moved_to_bfloat16(model, average):
    model.bfloat16()


def moved_in_part(model, average):
    model[2].bfloat16()


def both_moved(model, average):
    model.double()
    average.module.double()


CHANGES = [replaced_parameter, replaced_module, replaced_in_the_average, new_data]
CHANGES += [moved_to_float64, moved_to_bfloat16, moved_in_part, both_moved]


@pytest.mark.parametrize("change", CHANGES)
def test_moved_and_replaced_tensors_are_followed(change):
    model = network()
    average = EMA(model, 0.9)
    check_update(average, model, 1)
    change(model, average)
    check_update(average, model, 2)
    check_update(average, model, 3)


def test_a_changed_network_is_refused_at_every_later_step():
    model = network()
    average = EMA(model, 0.9)
    average.update(model, 1)
    model[2].append(nn.Linear(2, 2))
    for step in (2, 3):
        with pytest.raises(ValueError, match=r"2\.1\.bias"):
            average.update(model, step)
    check_update(average, network(), 4)  # another network with the same names


def test_squared_norms_sum_over_all_averaged_parameters():
    model = network()
    model[2].bfloat16()
    average = EMA(model, 0.9)
    start = copy.deepcopy(model)
    torch.testing.assert_close(average.squared_norms(model)[0], torch.tensor(0.0))
    disturb(model)
    model[1].running_mean.fill_(1e6)  # not a parameter
    pairs = [(a.float(), b.float()) for a, b in zip(start.parameters(), model.parameters(), strict=True)]
    expected = [sum((a - b).square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)]
    torch.testing.assert_close(average.squared_norms(model), torch.stack(expected).detach())
    assert not average.squared_norms(model).requires_grad


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_averaged_in_place(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    def shard(name, module, mesh):
        for key, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))

    model, plain = network(), network()
    average, plain_average = EMA(model, 0.9), EMA(plain, 0.9)
    average.update(model, 1)
    plain_average.update(plain, 1)
    distribute_module(model, mesh, shard)
    with pytest.raises(ValueError, match="0.weight sharded as .*Shard.* its own is sharded as None: shard both alike"):
        average.update(model, 2)
    distribute_module(average.module, mesh, shard)
    with torch.no_grad():
        for module in (model, plain):
            module[0].weight.mul_(2)
    average.update(model, 2)
    plain_average.update(plain, 2)
    for actual, expected in zip(average.module.parameters(), plain_average.module.parameters(), strict=True):
        torch.testing.assert_close(actual.full_tensor(), expected.data)
    torch.testing.assert_close(average.squared_norms(model), plain_average.squared_norms(plain))
    model[0].weight = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()]))
    with pytest.raises(ValueError, match="Replicate.* its own is sharded as .*Shard"):
        average.update(model, 3)


def test_parameters_unsharded_by_forward_are_averaged(mesh):
    """FSDP2 reshards the outermost parameters only after a backward pass, which an average never has."""
    from torch.distributed.fsdp import fully_shard

    model, plain = network(), network()
    average, plain_average = EMA(model, 0.9), EMA(plain, 0.9)
    for module in (model, average.module):
        fully_shard(module[2], mesh=mesh)
        fully_shard(module, mesh=mesh)
    for step in range(1, 4):
        for module, slow in ((model, average), (plain, plain_average)):
            disturb_with(module, step)
            slow.update(module, step)
            with torch.no_grad():
                slow.module(torch.ones(2, 3))
                module.eval()(torch.ones(2, 3))
    average.update(model, 4)
    plain_average.update(plain, 4)
    for actual, expected in zip(average.module.parameters(), plain_average.module.parameters(), strict=True):
        torch.testing.assert_close(actual.full_tensor(), expected.data)
