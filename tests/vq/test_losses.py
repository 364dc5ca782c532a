"""The adversarial losses of the first stage against their formulas."""

import math
from typing import get_args, get_type_hints

import pytest
import torch

from vq.config import VQGANLossConfig
from vq.losses import (
    ADVERSARIAL_LOSSES,
    adaptive_weight,
    hinge_generator_loss,
    hinge_loss,
    non_saturating_generator_loss,
    non_saturating_loss,
)


def logits():
    """Real (2, 3, 3, 1) and fake (5,) logits, some on each side of every margin."""
    real = torch.randn(2, 3, 3, 1, dtype=torch.float64).mul(3).requires_grad_()
    fake = torch.randn(5, dtype=torch.float64).mul(3).requires_grad_()
    return real, fake


def test_the_hinge_loss_by_hand():
    real = torch.tensor([2.0, 0.5, -1.0])  # 1 - D: -1, 1/2, 2
    fake = torch.tensor([-2.0, 0.0, 3.0])  # 1 + D: -1, 1, 4
    assert hinge_loss(real, fake) == pytest.approx(0.5 * (2.5 / 3 + 5 / 3))
    assert hinge_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])) == 0


def test_the_hinge_loss_pushes_logits_up_to_the_margin():
    real, fake = (torch.tensor([-2.0, 2.0], requires_grad=True) for _ in range(2))
    hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0] and fake.grad.tolist() == [0, 0.25]


def test_the_non_saturating_loss_is_binary_cross_entropy():
    real, fake = logits()
    loss = non_saturating_loss(real, fake)
    s = [[1 / (1 + math.exp(-x)) for x in values.flatten().tolist()] for values in (real, fake)]
    expected = -sum(math.log(p) for p in s[0]) / 18 - sum(math.log(1 - p) for p in s[1]) / 5
    assert loss.item() == pytest.approx(expected / 2, rel=1e-12)
    loss.backward()
    assert torch.allclose(real.grad.flatten(), torch.tensor([(p - 1) / 36 for p in s[0]], dtype=torch.float64))
    assert torch.allclose(fake.grad, torch.tensor([p / 10 for p in s[1]], dtype=torch.float64))


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_gradients_are_those_of_the_values(name):
    discriminator_loss, generator_loss = ADVERSARIAL_LOSSES[name]
    real, fake = logits()
    assert torch.autograd.gradcheck(discriminator_loss, (real, fake))
    assert torch.autograd.gradcheck(generator_loss, fake)


def test_the_autoencoder_raises_the_logits_of_its_images():
    assert hinge_generator_loss(torch.tensor([1.0, 2.0, -6.0])) == 1
    fake = torch.tensor([0.0, -50.0], dtype=torch.float64, requires_grad=True)
    loss = non_saturating_generator_loss(fake)
    assert loss.item() == pytest.approx((math.log(2) + 50) / 2)
    loss.backward()
    assert fake.grad.tolist() == pytest.approx([-0.25, -0.5])  # log(1 - s), which saturates, has e^-50 there


@pytest.mark.parametrize("x", [1e4, -1e4])
def test_large_logits_stay_finite(x):
    real, fake = (torch.tensor([x], requires_grad=True) for _ in range(2))
    loss = non_saturating_loss(real, fake) + non_saturating_generator_loss(fake)
    loss.backward()
    assert loss.isfinite() and real.grad.isfinite() and fake.grad.isfinite()


def test_every_loss_that_the_flag_names_is_there_in_both_parts():
    assert set(get_args(get_type_hints(VQGANLossConfig)["disc_loss"])) == set(ADVERSARIAL_LOSSES)
    assert ADVERSARIAL_LOSSES["hinge"] == (hinge_loss, hinge_generator_loss)
    assert ADVERSARIAL_LOSSES["non_saturating"] == (non_saturating_loss, non_saturating_generator_loss)


def weight_from(reconstruction_grad, adversarial_grad, maximum):
    return adaptive_weight(torch.tensor(reconstruction_grad), torch.tensor(adversarial_grad), maximum)


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    assert weight_from([3.0, 4.0], [0.0, 2.0], maximum=10) == pytest.approx(5 / (2 + 1e-4))
    assert weight_from([[3.0], [4.0]], [[0.0], [2.0]], maximum=10).shape == ()
    assert weight_from([0.0, 0.0], [0.0, 2.0], maximum=10) == 0


def test_the_adaptive_weight_is_capped():
    assert weight_from([3.0, 4.0], [0.0, 2.0], maximum=1) == 1
    assert weight_from([3.0, 4.0], [0.0, 0.0], maximum=1e9) == pytest.approx(5 / 1e-4)
