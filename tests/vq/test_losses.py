"""The adversarial losses of the first stage against their formulas."""

import pytest
import torch

from vq.losses import adaptive_weight, generator_loss, hinge_loss


def test_the_hinge_loss_by_hand():
    real = torch.tensor([2.0, 0.5, -1.0])  # 1 - D: -1, 1/2, 2
    fake = torch.tensor([-2.0, 0.0, 3.0])  # 1 + D: -1, 1, 4
    assert hinge_loss(real, fake) == pytest.approx(0.5 * (2.5 / 3 + 5 / 3))
    assert hinge_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])) == 0


def test_the_hinge_loss_raises_real_and_lowers_fake_logits_until_the_margin():
    real, fake = (torch.tensor([-2.0, 2.0], requires_grad=True) for _ in range(2))
    hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0] and fake.grad.tolist() == [0, 0.25]


def test_the_generator_raises_the_logits_of_its_images():
    assert generator_loss(torch.tensor([1.0, 2.0, -6.0])) == 1


def linear_losses(of_reconstruction, of_adversarial):
    """A last layer W and two losses whose gradients with respect to it are given."""
    W = torch.tensor([0.3, -0.2], requires_grad=True)
    return W @ torch.tensor(of_reconstruction), W @ torch.tensor(of_adversarial), W


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = adaptive_weight(*linear_losses([3.0, 4.0], [0.0, 2.0]), maximum=10)
    assert weight == pytest.approx(5 / (2 + 1e-4)) and not weight.requires_grad


def test_the_adaptive_weight_is_capped():
    assert adaptive_weight(*linear_losses([3.0, 4.0], [0.0, 2.0]), maximum=1) == 1
    assert adaptive_weight(*linear_losses([3.0, 4.0], [0.0, 0.0]), maximum=1e9) == pytest.approx(5 / 1e-4)


def test_the_losses_can_still_be_trained_on():
    reconstruction, adversarial, W = linear_losses([3.0, 4.0], [0.0, 2.0])
    (reconstruction + adaptive_weight(reconstruction, adversarial, W, 1) * adversarial).backward()
    assert W.grad.tolist() == [3, 6]


def test_gradients_are_averaged_over_processes_before_their_norm():
    elsewhere = {(3.0, 4.0): (1.0, 0.0), (0.0, 2.0): (0.0, -2.0)}  # what another process found; the second cancels

    def average(gradient):
        return (gradient + torch.tensor(elsewhere[tuple(gradient.tolist())])) / 2

    weight = adaptive_weight(*linear_losses([3.0, 4.0], [0.0, 2.0]), maximum=1e9, average=average)
    assert weight == pytest.approx(8**0.5 / 1e-4)
    mean_of_norms = (5 + 1) / 2 / ((2 + 2) / 2 + 1e-4)
    assert weight > 1000 * mean_of_norms
