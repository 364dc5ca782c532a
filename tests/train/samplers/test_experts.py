"""Experts of runs: their settings, the balance of routers over a step, and their start from a trained run."""

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.run_asserts import checkpoint, lines, weights
from helpers.tiny_runs import DDPM, call
from models.conditions import layout, objects
from models.experts import ExpertOptions, add_experts, experts_of
from models.router import ClassRouter
from models.transformer import Transformer
from models.unet import UNet, UNetConfig
from train.distributed import DistContext
from train.ema import EMA
from train.partial_load import load_matching
from train.samplers import absorbing, ddpm
from train.samplers._conditions import ConditionsConfig, with_declared_values
from train.samplers._experts import PRESETS, describe_use, settle_experts

ONE = DistContext(torch.device("cpu"))
REGIONS = {"boxes": torch.tensor([[[0.1, 0, 0.6, 1]]] * 2), "box_class": torch.tensor([[1], [2]])}
WRONG = {
    "leave one of them out": {"experts": ("0",), "router_experts": 2},
    "got expert_rule without experts: pass --experts": {"expert_rule": "share"},
    "got router_top without router_experts: pass --router_experts": {"router_top": 2},
    "got router_rate without router_experts": {"router_rate": 0.1},
    "got router_top 3 of 2 experts, wanted at most as many: pass --router_top 1": {
        "router_top": 3,
        "router_experts": 2,
    },
}


def unet(**changes):
    sizes = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
    options = {**sizes, "attn_block_type": "transformer", **changes}
    return UNet(UNetConfig(**options), {"layout": layout.build(layout.Config(layout_classes=3), 32, 0)})


def transformer():
    encoders = {"objects": objects.build(objects.Config(objects_classes=3), 16, 0)}
    return Transformer(codes=5, grid=(4, 4), width=16, heads=2, layers=2, encoders=encoders)


def open_all(network):
    """Perturb every weight, since initial zeros would hide errors."""
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network.eval()


def call_network(network):
    fields, g = {name: REGIONS for name in network.encoders}, torch.Generator().manual_seed(0)
    if isinstance(network, UNet):
        return network(torch.randn(2, 3, 8, 8, generator=g), torch.tensor([3.0, 700.0]), fields)
    return network(torch.randint(0, 5, (2, 4, 4), generator=g), fields)


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_do_not_fit_together_are_refused(message):
    for kind in (ddpm.Config, absorbing.Config):
        with pytest.raises(ValueError, match=message):
            kind(**WRONG[message])


def test_groups_are_named_for_other_data_where_names_are_clear():
    config = ConditionsConfig(experts=("2,0", "1"))
    assert config.with_class_names(("road", "sky", "a car")).experts == ("a car,road", "sky")
    for names in (
        (),
        ("road", "sky"),
        ("3", "1", "2"),
        ("a,b", "sky", "car"),
        ("car", "sky", "car"),
        ("sky", " ", "x"),
    ):
        assert config.with_class_names(names) == config


def test_a_run_keeps_the_numbers_of_classes():
    data = SimpleNamespace(region_classes=("disc", "traffic light", "sky"))
    config = ConditionsConfig(experts=("sky, disc", "1"))
    assert with_declared_values(config, data).experts == ("2,0", "1")
    assert with_declared_values(config, data).with_class_numbers(()).experts == ("2,0", "1")
    numbered = SimpleNamespace(region_classes=("1", "2", "3"))  # a number is that of a class, not its name
    first = with_declared_values(ConditionsConfig(experts=("2",)), numbered)
    assert first.experts == ("2",) and with_declared_values(first, numbered) == first
    for preset, count in (("cityscapes_2", 2), ("cityscapes_5", 5), ("cityscapes_10", 10)):
        groups = ConditionsConfig(experts=(preset,)).with_class_numbers(data.region_classes).experts
        assert groups == PRESETS[preset] and len(groups) == count - 1
    with pytest.raises(ValueError, match="got the class skye in --experts, did you mean 'sky'.*wanted one of disc, "):
        with_declared_values(ConditionsConfig(experts=("skye",)), data)
    with pytest.raises(ValueError, match="got the class sky in --experts, wanted a number"):
        with_declared_values(config, SimpleNamespace())


def test_the_config_builds_its_experts():
    network = unet()
    ConditionsConfig(experts=("0,2", "1"), expert_rule="share").add_experts(network)
    router = experts_of(network)["down_blocks.2.1.feed_forward"].router
    assert isinstance(router, ClassRouter) and router.groups == ((0, 2), (1,)) and router.rule == "share"
    network = unet()
    ConditionsConfig(router_experts=4, router_top=2, router_rate=0.5).add_experts(network)
    router = experts_of(network)["middle_blocks.1.feed_forward"].router
    assert (router.count, router.top, router.rate) == (4, 2, 0.5)
    with pytest.raises(ValueError, match="got class 3 in a group of experts, wanted 0 to 2"):
        ConditionsConfig(experts=("3",)).add_experts(unet())


@pytest.mark.parametrize("make", [unet, transformer])
def test_experts_start_as_copies_of_a_trained_network(make):
    """By --load_partial; a transformer's own layers become those of its experts."""
    old, new = open_all(make()), make()
    add_experts(new, ExpertOptions(groups=((0,), (1,))))
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    layers = experts_of(new)
    assert len(report.grown) == 4 * len(layers) and report.missing == report.unexpected == report.misshapen == []
    assert all(
        torch.equal(each, w) for layer in layers.values() for w in layer.expand.weight for each in layer.expand.weight
    )
    with torch.no_grad():
        assert (call_network(new.eval()) - call_network(old)).abs().max() < 1e-5
    again = make()
    add_experts(again, ExpertOptions(groups=((0,), (1,))))
    report = load_matching(again, {f"net.{key}": value for key, value in new.state_dict().items()}, "net")
    assert report.grown == report.missing == [] and len(report.taken) == len(new.state_dict())
    other = make()
    add_experts(other, ExpertOptions(groups=((0,),)))
    assert load_matching(other, {f"net.{key}": v for key, v in new.state_dict().items()}, "net").misshapen


def routed():
    network = open_all(unet())
    add_experts(network, ExpertOptions(groups=(), learned=3, rate=0.1))
    return network.train()


def test_the_balance_does_not_depend_on_how_a_batch_is_cut():
    """One batch of four, or four of one, or two processes of two: the same balance after a step, to the bit."""
    torch.manual_seed(3)
    network, x, t = routed(), torch.randn(4, 3, 8, 8), torch.arange(4.0)
    others = {}
    for parts in (1, 2, 4):
        for layer in experts_of(network).values():
            layer.router.balance.zero_()
        for part in range(parts):
            network(x.chunk(parts)[part], t.chunk(parts)[part])
        rows = settle_experts(network, ONE, torch.tensor(True))
        assert all(each[-1] == each[:-1].sum() == 4 * 16 for each in rows.values())
        others[parts] = [layer.router.balance.clone() for layer in experts_of(network).values()]
        assert all(not layer.rows.any() for layer in experts_of(network).values())
    assert any(balance.any() for balance in others[1])
    assert all(map(torch.equal, others[1], others[2])) and all(map(torch.equal, others[1], others[4]))
    halves = iter(zip(x.chunk(2), t.chunk(2), strict=True))

    class Two(DistContext):
        def sum(self, value):
            """As if another process had the other half."""
            network(*next(halves))
            own = [layer.rows[:-1] - before for layer, before in zip(experts_of(network).values(), value, strict=True)]
            return value + torch.stack(own)

    for layer in experts_of(network).values():
        layer.router.balance.zero_()
    network(*next(halves))
    settle_experts(network, Two(torch.device("cpu")), True)
    assert all(map(torch.equal, others[1], [layer.router.balance for layer in experts_of(network).values()]))


def test_a_step_that_is_not_taken_moves_no_balance():
    network = routed()
    for finite in (False, torch.tensor(False)):
        network(torch.randn(2, 3, 8, 8), torch.zeros(2))
        rows = settle_experts(network, ONE, finite)
        assert not any(each.any() for each in rows.values())
        assert not any(layer.router.balance.any() or layer.rows.any() for layer in experts_of(network).values())


def test_the_balance_of_a_frozen_router_stays():
    network = routed()
    first, *others = experts_of(network).values()
    first.router.requires_grad_(False)
    network(torch.randn(2, 3, 8, 8), torch.zeros(2))
    settle_experts(network, ONE, True)
    assert not first.router.balance.any() and any(layer.router.balance.any() for layer in others)


def test_averages_have_the_balance_itself():
    network = routed()
    average = EMA(network, 0.9)
    for layer in experts_of(network).values():
        layer.router.move_balance(torch.tensor([5, 1, 0]))
    average.update(network, 1000)
    for own, averaged in zip(experts_of(network).values(), experts_of(average.module).values(), strict=True):
        assert own.router.balance.any() and torch.equal(own.router.balance, averaged.router.balance)


def test_the_use_of_experts_is_logged_as_shares():
    rows = {"a": torch.tensor([3, 1, 0, 4]), "b": torch.tensor([1, 2, 1, 2])}
    expected = {"experts/0": 0.5, "experts/1": 0.375, "experts/2": 0.125, "experts/per_place": 8 / 6}
    assert describe_use(rows) == expected
    assert describe_use({}) == describe_use({"a": torch.zeros(4)}) == {}


@pytest.mark.slow
def test_a_run_with_experts_starts_from_a_plain_one(tmp_path):
    """At the same loss; it logs the use of its experts, resumes, and its experts alone learn."""
    flags = (
        f"--logs_root {tmp_path} {DDPM} --dataset shapes --shapes_count 24 --conditions layout --no_amp "
        "--attn_block_type transformer --steps_per_eval 0 --steps_per_log 1 --lr 1e-3"
    )
    parts = " ".join(f"{side}.*.*.feed_forward" for side in ("down_blocks", "up_blocks"))
    call("train_sampler.py", f"{flags} --log_dir plain --train_steps 2")
    experts = f"--load_dir plain --load_partial --experts disc,ring sky --expert_rule share --train_only {parts}"
    call("train_sampler.py", f"{flags} --log_dir plain_on --load_dir plain --train_steps 1")
    for steps in (1, 3):
        call("train_sampler.py", f"{flags} {experts} --log_dir groups --train_steps {steps}")
    first, same = lines(tmp_path / "groups")[0], lines(tmp_path / "plain_on")[0]
    assert first["loss"] == pytest.approx(same["loss"], rel=1e-5)
    (used, *_) = [row for row in lines(tmp_path / "groups") if "experts/0" in row]
    assert sum(used[f"experts/{i}"] for i in range(3)) == pytest.approx(1) and used["experts/per_place"] >= 1
    old, new = weights(tmp_path / "plain", 2), weights(tmp_path / "groups", 3)
    for key, value in new.items():
        learned = ".feed_forward." in key and "middle" not in key
        assert torch.equal(value, old[key].expand_as(value)) != learned, key
    config = (tmp_path / "groups" / "config.yaml").read_text()
    assert "0,4" in config and json.dumps("disc,ring") not in config
    assert checkpoint(tmp_path / "groups", 3).is_dir()
