"""Entropies against sums over all codes, in their limits, and over several processes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from vq import entropy as module
from vq.entropy import binary_entropy, code_probs, entropy, mean_code_probs, mean_over_processes
from vq.quantizers import StepContext


class FixedMean:
    """Two processes with a fixed mean; records the tensors to average."""

    rank, size = 0, 2

    def __init__(self, mean):
        self.fixed_mean, self.inputs = mean, []

    def mean(self, x):
        self.inputs.append(x)
        return self.fixed_mean


def all_outcomes(d):
    """(2^d, d) of 0 and 1; bit i of row k is that of k which counts 2^i."""
    return torch.tensor([row[::-1] for row in itertools.product([0, 1], repeat=d)]).view(2**d, d).bool()


def brute_outcomes(logits):
    p = logits.sigmoid()[:, None]  # (N, 1, D)
    return torch.where(all_outcomes(logits.shape[1]), p, 1 - p).prod(2)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_outcomes_are_products_of_their_bits(d):
    logits = 2 * torch.randn(7, d, dtype=torch.float64)
    assert torch.allclose(code_probs(logits), brute_outcomes(logits), rtol=1e-12, atol=0)
    assert torch.allclose(mean_code_probs(logits), brute_outcomes(logits).mean(0), rtol=1e-12, atol=0)


def test_entropy_gradients_match_sums_over_all_codes():
    logits = (2 * torch.randn(9, 7, dtype=torch.float64)).requires_grad_()
    p = brute_outcomes(logits)
    code_entropy, codebook_entropy = torch.special.entr(p).sum(1), torch.special.entr(p.mean(0)).sum()
    actual = binary_entropy(logits).sum(1), entropy(mean_code_probs(logits))
    for a, b in zip(actual, (code_entropy, codebook_entropy), strict=True):
        weights = torch.randn(a.shape, dtype=a.dtype)
        assert torch.allclose(a, b, rtol=1e-12)
        gradients = [torch.autograd.grad((x * weights).sum(), logits, retain_graph=True)[0] for x in (a, b)]
        assert torch.allclose(*gradients, rtol=1e-10, atol=1e-13)


def test_entropies_in_closed_form():
    assert entropy(torch.full((3, 8), 1 / 8)).tolist() == pytest.approx([math.log(8)] * 3)
    assert entropy(torch.tensor([0.5, 0.25, 0.25, 0])) == pytest.approx(1.5 * math.log(2))
    assert entropy(torch.eye(4)).tolist() == [0] * 4
    logits = torch.tensor([0, math.log(3), -math.log(3)])
    h = math.log(4) - 0.75 * math.log(3)
    assert binary_entropy(logits).tolist() == pytest.approx([math.log(2), h, h])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 20, 110, 900, 1e5, 1e30, math.inf])
def test_certain_bits_are_finite_with_their_gradients(dtype, size):
    logits = (size * torch.tensor([[1.0, -1, 1], [1, 1, -1]], dtype=dtype)).requires_grad_()
    total = binary_entropy(logits).sum() + entropy(mean_code_probs(logits))
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.isfinite() and gradient.isfinite().all()
    if size >= 900:
        assert total.item() == pytest.approx(math.log(2)) and not gradient.any()


def test_bit_entropy_is_zero_at_the_logit_limit():
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([-module.MAX_LOGIT, module.MAX_LOGIT], dtype=dtype, requires_grad=True)
        h = binary_entropy(logits)
        h.sum().backward()
        assert h.tolist() == [0, 0] == logits.grad.tolist()


def test_an_unused_code_gets_an_entropy_gradient():
    p = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    entropy(p).backward()
    assert p.grad.isfinite().all() and (p.grad[1:] > 50).all() and p.grad[0] == -1


def test_uncertain_bits_near_one_are_not_lost():
    """1 - sigmoid(20) is 0 in float32, sigmoid(-20) is not."""
    assert code_probs(torch.tensor([[20.0]]))[0, 0] == pytest.approx(math.exp(-20), rel=1e-4)


def test_memory_is_that_of_half_the_bits(monkeypatch):
    """2^16 codes: two factors of N x 256."""
    shapes, original = [], module.code_probs
    monkeypatch.setattr(module, "code_probs", lambda logits: shapes.append(original(logits).shape) or original(logits))
    assert mean_code_probs(torch.randn(10, 16)).shape == (2**16,)
    assert shapes == [(10, 256), (10, 256)]


def test_the_product_is_whole_float32_under_autocast():
    logits = torch.randn(50, 6)
    expected = mean_code_probs(logits.double()).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(mean_code_probs(logits), expected, rtol=1e-5)


def test_products_have_all_bits(monkeypatch):
    precisions, matmul = [], torch.Tensor.__matmul__
    record = lambda a, b: precisions.append(torch.get_float32_matmul_precision()) or matmul(a, b)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", record)
    torch.set_float32_matmul_precision("high")
    try:
        mean_code_probs(torch.randn(5, 4))
        assert precisions == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_without_training_a_process_is_by_itself():
    p = torch.rand(4, requires_grad=True)
    assert mean_over_processes(p, None) is p


def test_the_mean_is_over_all_processes_the_gradient_local():
    p, mean = torch.rand(5, requires_grad=True), torch.rand(5)
    dist = FixedMean(mean)
    result = mean_over_processes(p, StepContext(0, dist=dist))
    assert torch.equal(result, mean) and not dist.inputs[0].requires_grad
    (gradient,) = torch.autograd.grad(result, p, weights := torch.randn(5))
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_averaged_over_processes_match_the_full_batch(size):
    weight = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(size, 4, 3, dtype=torch.float64)
    h = entropy((x.flatten(0, 1) @ weight).softmax(1).mean(0))
    (full_gradient,) = torch.autograd.grad(h, weight)

    def average(step_context):
        gradients = []
        for part in x:
            p = (part @ weight).softmax(1).mean(0)
            gradients.append(torch.autograd.grad(entropy(mean_over_processes(p, step_context)), weight)[0])
        return torch.stack(gradients).mean(0)

    mean = (x.flatten(0, 1) @ weight).softmax(1).mean(0).detach()
    assert torch.allclose(average(StepContext(0, dist=FixedMean(mean))), full_gradient, rtol=1e-10)
    assert not torch.allclose(average(None), full_gradient, rtol=0.1)


def test_entropy_of_softmax_as_torch_has_it():
    p = F.softmax(torch.randn(4, 9, dtype=torch.float64), 1)
    assert torch.allclose(entropy(p), torch.distributions.Categorical(p).entropy())
