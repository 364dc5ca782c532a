"""Counted FLOPs agree with formulas, and counting changes no result."""

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


def test_flops_of_a_linear_layer():
    """2 B D E forward; the same backward for the weight, and for x if it needs a gradient."""
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    product = 2 * 4 * 8 * 16
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == product
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * product
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_flops_of_a_convolution():
    """2 B C' H' W' C k^2 forward, twice as much backward."""
    layer, x = nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8, requires_grad=True)
    product = 2 * 2 * 5 * 4 * 4 * 3 * 9
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == product
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_flops_of_grouped_products():
    """Those of one product of all rows."""
    x, weights = torch.randn(12, 8, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    ends, product = torch.tensor([4, 4, 12], dtype=torch.int32), 2 * 12 * 8 * 16
    with torch.no_grad():
        assert count_flops(lambda: F.grouped_mm(x, weights, offs=ends)) == product
    assert count_flops(lambda: F.grouped_mm(x, weights, offs=ends).square().sum().backward()) == 3 * product


def test_flops_of_attention():
    """Two products of 2 B heads N^2 d forward, five backward (the fused kernel recomputes the first)."""
    q, k, v = torch.randn(3, 2, 4, 16, 8, requires_grad=True).unbind()
    product = 2 * 2 * 4 * 16 * 16 * 8
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * product
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == (2 + 5) * product


def test_flops_of_attention_with_other_key_and_value_sizes():
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, 4, 12, 8), torch.randn(2, 4, 12, 24)
    shapes = tuple(q.shape), tuple(k.shape), tuple(v.shape)
    forward, backward, _ = FORMULAS.values()
    pairs = 2 * 2 * 4 * 16 * 12
    assert forward(*shapes) == pairs * (8 + 24)
    assert backward((2, 4, 16, 24), *shapes) == pairs * (3 * 8 + 2 * 24)


ATTENTION = [operation for operation in FORMULAS if operation in flop_registry and "attention" in str(operation)]


@pytest.mark.parametrize("operation", ATTENTION, ids=str)
def test_our_formulas_agree_with_torchs(operation):
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
    """A function that runs one training step with fixed dropout masks, and the dict that it fills with results."""
    results = {}

    def train_step():
        network.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = network(*inputs)
        loss = ((out[0] if isinstance(out, tuple) else out).float() - 1).square().mean()
        loss.backward()
        results["loss"] = loss.detach()
        results.update({n: p.grad for n, p in network.named_parameters() if p.grad is not None})

    return train_step, results


@pytest.fixture(params=[transformer, unet, vqgan])
def case(request):
    torch.manual_seed(0)
    network, inputs = request.param()
    for p in network.parameters():  # zero-initialised layers would hide the layers before them
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return network, inputs


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_counting_changes_no_bit_of_a_step(case, half):
    train_step, results = step(*case, half)
    train_step()
    expected = dict(results)
    assert count_flops(train_step) > 0
    assert results.keys() == expected.keys()
    assert [name for name in results if not torch.equal(results[name], expected[name])] == []


def test_torchs_own_counter_agrees(case):
    train_step, _ = step(*case, half=False)
    missing = {operation: formula for operation, formula in FORMULAS.items() if operation not in flop_registry}
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        train_step()
    assert count_flops(train_step) == counter.get_total_flops()


def test_recomputed_activations_count_again(case):
    plain, recomputed = case[0], copy.deepcopy(case[0])
    checkpoint_activations(recomputed)
    counts = []
    for network in (plain, recomputed):
        train_step, _ = step(network, case[1], half=False)
        counts.append(count_flops(train_step))
    with torch.no_grad():
        forward = count_flops(lambda: plain(*case[1]))
    assert counts[0] < counts[1] <= counts[0] + forward


def test_a_compiled_network_counts_like_an_eager_one():
    plain = nn.Linear(8, 16)
    compiled = copy.deepcopy(plain)
    compiled.compile()  # never called outside count_flops, so nothing is compiled here
    counts = [count_flops(lambda net=net: net(torch.ones(4, 8)).sum().backward()) for net in (plain, compiled)]
    assert counts == [2 * 2 * 4 * 8 * 16] * 2


def test_errors_of_the_counted_step_are_raised():
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 / 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matmul_peak_is_measured_quickly(dtype):
    began = time.perf_counter()
    peak = matmul_peak(torch.device("cpu"), dtype)
    assert time.perf_counter() - began < 5  # half a second on an idle machine
    assert 1e8 < peak < 1e14
