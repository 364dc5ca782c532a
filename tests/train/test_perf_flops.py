"""Operations counted against formulas, and that counting changes nothing."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from helpers.labels import label_encoders
from models.transformer import Transformer
from models.unet import UNet, UNetConfig
from train.execution import checkpoint_activations
from train.perf import FORMULAS, count_flops, matmul_peak
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig


def test_linear_layer():
    """2 B D E forward; backward again for the weight, and again where x asks for a gradient."""
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    product = 2 * 4 * 8 * 16
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == product
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * product
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_convolution():
    """2 B C' H' W' C k^2 forward, twice that backward."""
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    product = 2 * 2 * 5 * 4 * 4 * 3 * 9
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == product
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_attention():
    """Two products of 2 B heads N^2 d forward; backward five, the fused kernel making the first again."""
    q, k, v = torch.randn(3, 2, 4, 16, 8, requires_grad=True).unbind()
    product = 2 * 2 * 4 * 16 * 16 * 8
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_attention_from_n_queries_to_m_keys_of_another_width():
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 12, 8), torch.randn(2, 4, 12, 24)
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    forward, backward = FORMULAS.values()
    pairs = 2 * 2 * 4 * 16 * 12
    assert forward(*shapes) == pairs * (8 + 24)
    assert backward((2, 4, 16, 24), *shapes) == pairs * (3 * 8 + 2 * 24)


@pytest.mark.parametrize("operation", [each for each in FORMULAS if each in flop_registry], ids=str)
def test_the_formulas_are_torchs_where_it_has_them(operation):
    q, k, v, out = (2, 4, 16, 8), (2, 4, 12, 8), (2, 4, 12, 8), (2, 4, 16, 8)
    shapes = (out, q, k, v) if "backward" in str(operation) else (q, k, v)
    tensors = [torch.empty(shape) for shape in shapes]
    assert FORMULAS[operation](*shapes) == flop_registry[operation](*tensors, out_val=None)


def transformer():
    network = Transformer(
        codes=16, grid=(4, 4), width=16, heads=2, layers=2, encoders=label_encoders(3, 16), resid_dropout=0.3
    )
    return network, (torch.randint(0, 16, (2, 4, 4)), {"label": torch.tensor([0, 1])})


def unet():
    config = UNetConfig(channels=8, channel_mults=(1, 2), res_blocks=1, attn_factors=(2,), heads=1, dropout=0.3)
    return UNet(config), (torch.randn(2, 3, 8, 8), torch.rand(2))


def vqgan():
    config = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(4,), emb_dim=8, codebook_size=16)
    return VQGAN(config, (8, 8)), (torch.randn(2, 3, 8, 8),)


def step(network, inputs, half):
    """A function that trains for one step, dropout drawn the same each time, and what came of it."""
    found = {}

    def run():
        network.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = network(*inputs)
        loss = ((out[0] if isinstance(out, tuple) else out).float() - 1).square().mean()
        loss.backward()
        found["loss"] = loss.detach()
        found.update({n: p.grad for n, p in network.named_parameters() if p.grad is not None})

    return run, found


@pytest.fixture(params=[transformer, unet, vqgan])
def case(request):
    torch.manual_seed(0)
    network, inputs = request.param()
    for p in network.parameters():  # what starts at zero would hide what lies behind it
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network, inputs


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_counted_step_is_the_uncounted_one_bit_for_bit(case, half):
    run, found = step(*case, half)
    run()
    before = dict(found)
    assert count_flops(run) > 0
    assert found.keys() == before.keys()
    assert [name for name in found if not torch.equal(found[name], before[name])] == []


def test_torchs_own_counter_agrees_about_the_number(case):
    run, _ = step(*case, half=False)
    missing = {operation: formula for operation, formula in FORMULAS.items() if operation not in flop_registry}
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        run()
    assert count_flops(run) == counter.get_total_flops()


def test_what_is_computed_again_counts_again(case):
    plain, again = case[0], copy.deepcopy(case[0])
    checkpoint_activations(again)
    counts = []
    for network in (plain, again):
        run, _ = step(network, case[1], half=False)
        counts.append(count_flops(run))
    with torch.no_grad():
        forward = count_flops(lambda: plain(*case[1]))
    assert counts[0] < counts[1] <= counts[0] + forward


def test_a_compiled_network_counts_as_the_plain_one():
    plain = nn.Linear(8, 16)
    compiled = copy.deepcopy(plain)
    compiled.compile()  # never called outside, so nothing is compiled here
    counts = [count_flops(lambda net=net: net(torch.ones(4, 8)).sum().backward()) for net in (plain, compiled)]
    assert counts == [2 * 2 * 4 * 8 * 16] * 2


def test_a_failing_step_fails():
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_reached_by_a_large_product_and_found_quickly(dtype):
    began = time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), dtype)
    assert time.perf_counter() - began < 5  # half a second where nothing else runs
    assert 1e8 < peak < 1e14
