"""IBQ: gradients through the index to every code, against the formula with an explicit one-hot matrix."""

import pytest
import torch

import vq.quantizer
from helpers.peak_tensor import LargestTensor
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import StepContext, ibq
from vq.quantizers.ibq import IBQQuantizer

K, D = 12, 5
BETA, WEIGHT, TEMPERATURE = 0.3, 0.7, 2.0


def quantizer(**options):
    return IBQQuantizer(K, D, **{"beta": BETA, "entropy_weight": WEIGHT, "temperature": TEMPERATURE} | options)


def z_for(batch=3, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(batch, D, 4, 3, dtype=torch.float64)).to(dtype).requires_grad_()


def reference(q, z):
    """z_q (B, D, h, w), the three squares and the two entropies of each example, with Ind (B, h w, K)."""
    c, flat = q.codebook.weight, z.movedim(1, -1).flatten(1, 2)
    logits = flat @ c.t()
    soft, hard = logits.softmax(-1), torch.nn.functional.one_hot(logits.argmax(-1), K).to(z)
    z_q, e = (hard - soft.detach() + soft) @ c, hard @ c
    first, second, third = (z_q - flat).square(), (e.detach() - flat).square(), (e - flat.detach()).square()
    squares = (first + second + BETA * third).mean((1, 2))
    p = (logits / TEMPERATURE).softmax(-1)
    entropies = torch.special.entr(p).sum(-1).mean(1), torch.special.entr(p.mean((0, 1))).sum()
    return z_q.mT.view_as(z), squares, *entropies


def set_block(monkeypatch, scores):
    """Makes ibq work in blocks if there are more scores of positions and codes."""
    monkeypatch.setattr(ibq, "WHOLE_SCORES", scores)
    monkeypatch.setattr(ibq, "BLOCK_SCORES", scores)


def test_the_code_is_that_of_the_largest_product():
    q, z = quantizer(), z_for(50, dtype=torch.float32)
    codes = q(z)
    products = torch.einsum("bdhw,kd->bkhw", z, q.codebook.weight)
    assert torch.equal(codes.ids, products.argmax(1)) and torch.equal(codes.ids, q.assign(z))
    assert torch.equal(codes.vectors, q.vectors(codes.ids)) and codes.vectors.dtype == torch.float32


def test_all_codes_can_be_chosen():
    q = quantizer()
    q.codebook.weight.data = torch.nn.functional.normalize(q.codebook.weight.data)
    assert len(q.assign(z_for(200, dtype=torch.float32)).unique()) == K


def test_ids_and_vectors_are_inverse_for_all_codes():
    q, ids = IBQQuantizer(512, D), torch.arange(512).view(1, 16, 32)
    assert torch.equal(q.ids_of(q.vectors(ids)), ids)
    assert not torch.equal(q.assign(q.vectors(ids)), ids), "longer codes have the larger product, not the distance 0"


@pytest.mark.parametrize("block", [2**20, 7 * K + 1, 1], ids=["whole", "blocks of 7", "single positions"])
@pytest.mark.parametrize("part", ["vectors", "loss"])
def test_gradients_through_the_index_are_those_of_the_formula(part, block, monkeypatch):
    set_block(monkeypatch, block)  # of 36 positions, the last block is smaller
    q, z = quantizer().double(), z_for()
    z_q, squares, code_entropy, codebook_entropy = reference(q, z)
    expected = {"vectors": z_q, "loss": squares + WEIGHT * (code_entropy - codebook_entropy)}[part]
    actual = getattr(q(z), part)
    assert torch.allclose(actual, expected, rtol=1e-10) and actual.dtype == torch.float64
    weights = torch.randn_like(expected)
    actual_grads, expected_grads = (
        torch.autograd.grad((x * weights).sum(), (z, q.codebook.weight), retain_graph=True) for x in (actual, expected)
    )
    assert torch.allclose(actual_grads[0], expected_grads[0], rtol=1e-8, atol=1e-12)
    assert torch.allclose(actual_grads[1], expected_grads[1], rtol=1e-8, atol=1e-12)


def test_every_code_gets_a_gradient_also_those_not_chosen():
    q, z = quantizer().double(), z_for(1)
    codes = q(z[..., :1, :1])
    codes.vectors.square().sum().backward()
    assert codes.ids.numel() == 1 and (q.codebook.weight.grad != 0).any(1).all()
    assert (z.grad[..., :1, :1] != 0).all()


def test_metrics_are_the_parts_of_the_loss():
    q, z = quantizer().double(), z_for()
    codes, (_, _, code_entropy, codebook_entropy) = q(z), reference(q, z)
    assert codes.metrics["entropy"] == pytest.approx(code_entropy.mean().item())
    assert codes.metrics["codebook_entropy"] == pytest.approx(codebook_entropy.item())
    assert codes.metrics["commitment"] == pytest.approx((z - q.vectors(codes.ids)).square().mean().item())


class TwoProcesses:
    """Simulates the first of two processes, given the mean of the other."""

    rank, size = 0, 2

    def __init__(self, other):
        self.other = other

    def mean(self, x):
        return (x + self.other) / 2


def test_two_processes_have_the_loss_and_the_gradient_of_one():
    q, z = quantizer().double(), z_for(4).detach()
    weight = q.codebook.weight
    full = q(z, StepContext(0)).loss
    (expected,) = torch.autograd.grad(full.mean(), weight)
    parts = z.chunk(2)
    means = [
        (torch.einsum("bdhw,kd->bhwk", part, weight) / TEMPERATURE).softmax(-1).mean((0, 1, 2)).detach()
        for part in parts
    ]
    losses, gradients = [], []
    for part, other in zip(parts, reversed(means), strict=True):
        codes = q(part, StepContext(0, dist=TwoProcesses(other)))
        losses.append(codes.loss.detach())
        gradients.append(torch.autograd.grad(codes.loss.mean(), weight)[0])
    assert torch.allclose(torch.cat(losses), full, rtol=1e-10)
    assert torch.allclose(sum(gradients) / 2, expected, rtol=1e-8)
    local = [torch.autograd.grad(q(part).loss.mean(), weight)[0] for part in parts]
    assert not torch.allclose(sum(local) / 2, expected, rtol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("scale, dtype", [(1e15, torch.float32), (1e6, torch.bfloat16), (1, torch.bfloat16)])
def test_large_and_half_precision_vectors_are_finite(scale, dtype, temperature):
    q, z = quantizer(temperature=temperature), z_for(scale=scale, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        codes = q(z, StepContext(0))
    (codes.loss.sum() + codes.vectors.sum()).backward()
    assert codes.loss.isfinite().all() and codes.loss.dtype == torch.float32
    assert z.grad.isfinite().all() and q.codebook.weight.grad.isfinite().all()


def test_products_are_float32_under_autocast():
    q, z = quantizer(), z_for(20, dtype=torch.float32)
    expected = q(z)
    with torch.autocast("cpu", torch.bfloat16):
        codes = q(z)
    assert torch.equal(codes.loss, expected.loss) and torch.equal(codes.vectors, expected.vectors)
    q, z = q.bfloat16(), z.bfloat16()
    assert torch.equal(q(z).loss, q.float()(z).loss)


def test_blocks_are_as_exact_as_the_whole_in_float32(monkeypatch):
    q, z = IBQQuantizer(512, 16, entropy_weight=WEIGHT), torch.randn(2, 16, 8, 8, requires_grad=True)
    results = []
    for dtype, block in ((torch.float64, 2**20), (torch.float32, 2**20), (torch.float32, 2**12)):
        set_block(monkeypatch, block)
        codes = q.to(dtype)(z.to(dtype))
        results.append(torch.autograd.grad(codes.loss.sum() + codes.vectors.square().sum(), (z, q.codebook.weight)))
    for expected, whole, blocks in zip(*results, strict=True):
        scale = expected.abs().max()
        assert (blocks - whole).abs().max() < 1e-6 * scale and (blocks - expected).abs().max() < 1e-5 * scale


def test_nothing_holds_positions_times_codes(monkeypatch):
    q, z = IBQQuantizer(2**8, 2), torch.randn(1, 2, 16, 16, requires_grad=True)
    monkeypatch.setattr(vq.quantizer, "MAX_SCORES", 2**12)
    set_block(monkeypatch, 2**12)
    with LargestTensor() as peak:
        codes = q(z)
        (codes.loss.sum() + codes.vectors.sum()).backward()
    assert peak.made == 2**12 and q.codebook.weight.grad.abs().sum() > 0


def test_codes_start_spread():
    weight = IBQQuantizer(512, 32).codebook.weight
    assert weight.std().item() == pytest.approx(1, rel=0.05)
    q, z = IBQQuantizer(512, 32), 0.3 * torch.randn(8, 32, 8, 8)
    assert len(q.assign(z).unique()) > 150


def test_the_config_gives_size_weights_and_temperature():
    options = ibq.Config(beta=0.5, entropy_weight=0.2, entropy_temperature=0.3)
    q = make_quantizer(VQGANConfig(quantizer="ibq", codebook_size=9, emb_dim=4, quantizer_config=options))
    assert isinstance(q, IBQQuantizer) and (q.codebook_size, q.dim, q.codebook.weight.shape) == (9, 4, (9, 4))
    assert (q.beta, q.entropy_weight, q.temperature) == (0.5, 0.2, 0.3)
