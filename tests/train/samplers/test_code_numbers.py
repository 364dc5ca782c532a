"""Numbers in transformers of codes: equal rows share a call, missing values, and networks trained without them."""

import math

import pytest
import torch
from torch import nn

from diffusion.rng import Streams
from models.conditions import numbers
from train.data.streams import TrainingStreams
from train.partial_load import load_matching
from train.samplers import absorbing, autoregressive
from train.samplers.absorbing import AbsorbingSampler
from train.samplers.autoregressive import AutoregressiveSampler

GRID, CODES = (4, 4), 5
KINDS = {"absorbing": AbsorbingSampler, "autoregressive": AutoregressiveSampler}
MODULES = {"absorbing": absorbing, "autoregressive": autoregressive}
NAN = math.nan
BATCH = {"year": torch.tensor([2001.0, NAN, 2001, 2017]), "lat": torch.tensor([5.0, 5, 5, 5])}
SMALL = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
NUMBERS = {
    "conditions": ("numbers",),
    "condition_options": numbers.Config(numbers_ranges=("year=2000:2020", "lat=-90:90")),
}


def build_sampler(name, conditions=NUMBERS):
    torch.manual_seed(0)
    sampler = KINDS[name](MODULES[name].Config(**SMALL, **conditions), codes=CODES, grid=GRID, n_classes=0)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def test_equal_rows_share_a_call_if_their_numbers_are_equal():
    sampler, sizes = build_sampler("absorbing"), []
    x, t = torch.full((4, *GRID), CODES), torch.ones(4)  # all codes are masked
    fields = [{name: values[i : i + 1] for name, values in BATCH.items()} for i in range(4)]
    expected = torch.cat([sampler.network(x[:1], {"numbers": each}) for each in fields])
    sampler.network.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    logits = sampler.make_denoiser(sampler.network, BATCH, absorbing.Sampling(), x)(x, t)
    assert sizes == [3]  # the first and the third are equal; a missing year is none of the others
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_missing_ones_change_the_codes(name):
    sampler = build_sampler(name)
    options = MODULES[name].Sampling(guidance=2.0)
    given = sampler.sample(sampler.network, Streams([1, 1, 1, 1]), batch=BATCH, options=options)
    assert torch.equal(given[0], given[2])  # of one seed and condition
    assert not torch.equal(given[0], given[1]) and not torch.equal(given[0], given[3])
    missing = {field: torch.full((4,), NAN) for field in BATCH}
    plain = MODULES[name].Sampling()
    null = sampler.sample(sampler.network, Streams([1, 1, 1, 1]), batch=missing, options=plain)
    assert torch.equal(null, sampler.sample(sampler.network, Streams([1, 1, 1, 1]), batch=None, options=plain))


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_reaches_the_numbers(name):
    sampler = build_sampler(name)
    sampler.network.train()
    batch = {"codes": torch.randint(CODES, (4, *GRID), generator=torch.manual_seed(1)), **BATCH}
    batch["position"] = torch.arange(4)
    loss = sampler.loss(sampler.network, batch, TrainingStreams(0, batch, 4, torch.device("cpu")))
    loss.per_example.mean().backward()
    assert all(p.grad.isfinite().all() for p in sampler.network.parameters() if p.grad is not None)
    assert all(p.grad.any() for p in sampler.network.encoders.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_trained_network_takes_numbers_and_classes_unchanged(name):
    """With norms instead, the blocks of a trained network would become the identity."""
    old = build_sampler(name, conditions={}).network
    config = MODULES[name].Config(**SMALL, **NUMBERS, vectors_into="embeddings")
    new = KINDS[name](config, codes=CODES, grid=GRID, n_classes=3).network.eval()
    report = load_matching(new, {f"net.{key}": value for key, value in old.state_dict().items()}, "net")
    assert report.unexpected == report.misshapen == report.grown == []
    assert all(key.startswith(("net.encoders.", "net.vector_in.")) for key in report.missing)
    ids = torch.randint(CODES, (4, *GRID), generator=torch.manual_seed(1))
    assert torch.equal(new(ids, {"numbers": BATCH, "label": torch.tensor([0, 1, 2, 3])}), old(ids))
