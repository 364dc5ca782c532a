"""DiffAugment: each operation against its formula, equal for real images and reconstructions."""

import pytest
import torch

from diffusion.rng import Streams
from vq.augment import Augmentation


def images(batch=3, height=16, width=24, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def augmentation(x, **changes):
    """The identity augmentation with `changes`, one value per example."""
    B = len(x)
    ones = torch.ones(B, 1, 1, 1)
    identity = Augmentation(0 * ones, ones, ones, torch.zeros(B, 2, dtype=torch.long))
    return identity._replace(
        **{name: torch.tensor(value).view(B, *getattr(identity, name).shape[1:]) for name, value in changes.items()}
    )


def test_an_augmentation_of_nothing_is_the_identity():
    assert torch.allclose(augmentation(images())(images()), images(), atol=1e-5)


def test_brightness_is_added():
    x = images()
    out = augmentation(x, brightness=[0.5, -0.25, 0.0])(x)
    assert torch.allclose(out - x, torch.tensor([0.5, -0.25, 0.0]).view(3, 1, 1, 1).expand_as(x), atol=1e-5)


def test_saturation_scales_the_distance_to_grey():
    x = images()
    out, grey = augmentation(x, saturation=[0.0, 2.0, 0.5])(x), x.mean(1, keepdim=True)
    assert torch.allclose(out[0], grey[0].expand_as(out[0]), atol=1e-5)
    assert torch.allclose(out[1], 2 * x[1] - grey[1], atol=1e-5)
    assert torch.allclose(out[2], (x[2] + grey[2]) / 2, atol=1e-5)


def test_contrast_scales_the_distance_to_the_mean_of_each_image():
    x = images()
    out, mean = augmentation(x, contrast=[0.5, 1.5, 1.0])(x), x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(out[0], (x[0] + mean[0]) / 2, atol=1e-5)
    assert torch.allclose(out[1], 1.5 * x[1] - 0.5 * mean[1], atol=1e-5)
    assert torch.allclose(out.mean((1, 2, 3)), mean.flatten(), atol=1e-5)


def test_translation_against_a_loop():
    x, shifts = images(4), [[2, 0], [-1, 3], [0, -3], [-2, -2]]
    expected = torch.zeros_like(x)
    for b, (down, right) in enumerate(shifts):
        for i in range(16):
            for j in range(24):
                if 0 <= i - down < 16 and 0 <= j - right < 24:
                    expected[b, :, i, j] = x[b, :, i - down, j - right]
    assert torch.equal(augmentation(x, shift=shifts).translate(x), expected)


def test_colour_comes_before_translation():
    x = images(1)
    out = augmentation(x, brightness=[0.5], shift=[[2, 0]])(x)
    assert (out[:, :, :2] == 0).all()  # pixels shifted in are zero
    assert torch.allclose(out[:, :, 2:], x[:, :, :-2] + 0.5, atol=1e-5)


@pytest.mark.parametrize("height, width, limits", [(16, 24, (2, 3)), (32, 8, (4, 1)), (12, 3, (2, 0))])
def test_shifts_are_uniform_integers_up_to_an_eighth_of_a_side(height, width, limits):
    x = torch.zeros(1, 1, height, width).expand(3000, -1, -1, -1)
    shift = Augmentation.draw(x, Streams(list(range(3000)))).shift
    for axis, limit in enumerate(limits):
        counts = (shift[:, axis] + limit).bincount(minlength=2 * limit + 1)
        assert len(counts) == 2 * limit + 1
        expected = 3000 / len(counts)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_colours_are_uniform_in_their_ranges():
    sampled = Augmentation.draw(torch.zeros(3000, 1, 8, 8), Streams(list(range(3000))))
    for values, low, high in [
        (sampled.brightness, -0.5, 0.5),
        (sampled.saturation, 0, 2),
        (sampled.contrast, 0.5, 1.5),
    ]:
        assert values.shape == (3000, 1, 1, 1) and low <= values.min() and values.max() < high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
        assert values.std() == pytest.approx((high - low) / 12**0.5, rel=0.03)


def test_real_and_fake_images_get_the_same_draw():
    x = images()
    sampled = Augmentation.draw(x, Streams([1, 2, 3]))
    assert torch.equal(sampled(x), sampled(x.clone()))
    # affine: nothing is redrawn
    assert torch.allclose(sampled(x) - sampled(0 * x), sampled(2 * x) - sampled(x), atol=1e-5)
    assert not torch.equal(sampled(x), Augmentation.draw(x, Streams([4, 5, 6]))(x))


def test_an_image_is_augmented_by_its_own_seed():
    x = images()
    batched, single = Augmentation.draw(x, Streams([1, 2, 3])), Augmentation.draw(x[1:2], Streams([2]))
    assert torch.allclose(batched(x)[1:2], single(x[1:2]), atol=1e-5)


def test_the_generator_gets_a_gradient_through_it():
    x = images(2, 8, 8).double().requires_grad_()
    sampled = Augmentation.draw(x, Streams([1, 2]))
    weight = torch.randn(x.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((sampled(x) * weight).sum(), x)
    step = torch.randn(x.shape, dtype=torch.float64)
    change = ((sampled(x + step) - sampled(x)) * weight).sum()  # exact: the augmentation is affine
    assert torch.allclose((gradient * step).sum(), change)
