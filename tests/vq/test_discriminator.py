"""The PatchGAN discriminator: size, receptive field, norms and options."""

import copy
from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from models.blocks import count_parameters
from vq.config import VQGANLossConfig
from vq.discriminator import NORMS, Blur, PatchDiscriminator


def images(batch=4, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def convs_of(discriminator):
    return [m for m in discriminator if isinstance(m, torch.nn.Conv2d)]


def test_the_size_is_the_published_one():
    with torch.device("meta"):
        assert count_parameters(PatchDiscriminator(3, ndf=64, layers=3, norm="batch")) == 2_765_633


def test_names_of_the_default_are_those_of_saved_runs():
    with torch.device("meta"):
        names = list(PatchDiscriminator(3, ndf=4, layers=2).state_dict())
    keys = [f"{i}.{part}" for i in (0, 3, 6, 8) for part in ("weight", "bias")]
    assert sorted(names) == sorted([*keys, "2.weight", "5.weight"])


@pytest.mark.parametrize("layers, side, patches, receptive_field", [(1, 32, 14, 16), (2, 64, 14, 34), (3, 128, 14, 70)])
def test_each_logit_judges_one_patch(layers, side, patches, receptive_field):
    discriminator = PatchDiscriminator(3, ndf=2, layers=layers, norm="batch").eval()
    x = images(1, side).requires_grad_()
    logits = discriminator(x)
    assert logits.shape == (1, 1, patches, patches)
    logits[0, 0, patches // 2, patches // 2].backward()
    affected = x.grad[0].abs().sum(0) > 0
    assert affected.any(0).sum() == affected.any(1).sum() == receptive_field


def test_widths_double_up_to_eight_times_the_first():
    with torch.device("meta"):
        convs = convs_of(PatchDiscriminator(1, ndf=4, layers=5))
    assert [c.out_channels for c in convs] == [4, 8, 16, 32, 32, 32, 1]
    assert [c.stride[0] for c in convs] == [2, 2, 2, 2, 2, 1, 1]
    assert [c.bias is None for c in convs] == [False, True, True, True, True, True, False]  # a norm has its own


def test_batch_norm_depends_on_other_images_and_group_norm_not():
    for norm, independent in [("group", True), ("batch", False), ("none", True)]:
        discriminator = PatchDiscriminator(3, ndf=8, layers=2, norm=norm)
        batched, single = discriminator(images()), discriminator(images()[:1])
        assert torch.allclose(batched[:1], single, atol=1e-5) == independent


def test_every_norm_that_the_flag_names_is_there():
    assert set(get_args(get_type_hints(VQGANLossConfig)["disc_norm"])) == set(NORMS)


def test_without_norms_every_convolution_has_a_bias():
    discriminator = PatchDiscriminator(3, ndf=4, layers=2, norm="none")
    assert all(c.bias is not None for c in convs_of(discriminator))
    kinds = {type(m).__name__ for m in discriminator}
    assert kinds == {"Conv2d", "LeakyReLU"} and discriminator(images()).shape == (4, 1, 6, 6)


def train(discriminator, steps=30):
    """Train for some steps that make the weights large."""
    optimizer = torch.optim.SGD(discriminator.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (-discriminator(images(2, 16)).mean()).backward()
        optimizer.step()
    return discriminator


def largest_singular_values(discriminator):
    return torch.stack([torch.linalg.svdvals(c.weight.flatten(1))[0] for c in convs_of(discriminator)])


@pytest.mark.parametrize("blur", [False, True])
def test_spectral_norm_holds_every_largest_singular_value_at_one(blur):
    unconstrained, constrained = (
        PatchDiscriminator(3, 4, 2, "none", spectral_norm=s, blur=blur) for s in (False, True)
    )
    train(constrained)
    with torch.no_grad():
        for _ in range(20):  # with fixed weights the power iteration converges
            constrained(images(1, 16))
    assert (largest_singular_values(constrained.eval()) - 1).abs().max() < 1e-3
    assert (largest_singular_values(unconstrained) - 1).abs().max() > 0.1
    originals = [c.parametrizations.weight.original for c in convs_of(constrained)]
    assert len(originals) == 4 and all(o.grad is not None for o in originals)


def test_spectral_norm_is_saved_and_goes_on_bit_for_bit():
    saved = train(PatchDiscriminator(3, 4, 2, spectral_norm=True), steps=3)
    loaded = PatchDiscriminator(3, 4, 2, spectral_norm=True)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    for _ in range(3):
        assert torch.equal(saved(images()), loaded(images()))
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())


def test_two_forward_passes_of_spectral_norm_share_one_backward():
    discriminator = PatchDiscriminator(3, 4, 2, spectral_norm=True)
    (discriminator(images()).mean() - discriminator(-images()).mean()).backward()
    assert all(p.grad.isfinite().all() for p in discriminator.parameters())


def test_half_precision_reaches_the_options():
    discriminator = PatchDiscriminator(3, 4, 2, spectral_norm=True, blur=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(images())
    logits.float().mean().backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad is not None for p in discriminator.parameters())


def test_the_blur_keeps_the_mean_and_removes_what_would_alias():
    x = torch.full((2, 3, 12, 12), 1.5)
    interior = Blur()(x)[..., 1:-1, 1:-1]
    assert torch.allclose(interior, torch.full_like(interior, 1.5))
    assert Blur().kernel.sum() == 1 and Blur().kernel[0, 0, 0, 1] == 3 / 64 and Blur().kernel[0, 0, 1, 2] == 9 / 64
    nyquist = (-1.0) ** torch.arange(12) * torch.ones(1, 1, 12, 1)  # +1 -1 +1 ...: subsampling alone makes it constant
    assert Blur()(nyquist)[..., 1:-1].abs().max() == 0 and nyquist[..., ::2].min() == 1
    assert torch.equal(Blur()(nyquist.mT), Blur()(nyquist).mT)


def test_the_blur_is_the_filter_of_every_channel_alone():
    x = torch.randn(2, 3, 9, 10)
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    for c in range(3):
        padded = F.pad(x[:, c : c + 1], (1, 2, 1, 2))
        expected = F.conv2d(F.conv2d(padded, row.view(1, 1, 1, 4) / 8), row.view(1, 1, 4, 1) / 8)[..., ::2, ::2]
        assert torch.allclose(Blur()(x)[:, c : c + 1], expected, atol=1e-6)
    assert Blur()(x).shape == (2, 3, 5, 5) and not Blur().state_dict() and not list(Blur().parameters())


@pytest.mark.parametrize("side", [16, 29, 32, 50])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_grid_of_logits_is_the_same_with_a_blur(side, layers):
    with torch.device("meta"):
        x = torch.empty(1, 3, side, side)
        plain, blurred = (PatchDiscriminator(3, 4, layers, blur=blur) for blur in (False, True))
        if side >> layers > 3:
            assert plain(x).shape == blurred(x).shape
        assert count_parameters(plain) == count_parameters(blurred)
    assert sum(isinstance(m, Blur) for m in blurred) == layers and all(c.stride == (1, 1) for c in convs_of(blurred))
    preceding = [type(blurred[i - 1]).__name__ for i, m in enumerate(blurred) if isinstance(m, Blur)]
    assert preceding == ["LeakyReLU"] * layers


def shift_sensitivity(discriminator, x):
    """Mean squared change of the inner logits when images move by one pixel, relative to their variance."""
    with torch.no_grad():
        logits, shifted = discriminator(x)[..., 2:-2, 2:-2], discriminator(x.roll(1, 3))[..., 2:-2, 2:-2]
    return ((logits - shifted).square().mean() / logits.var()).item()


def test_a_blurred_discriminator_changes_less_when_images_move():
    x = images(8, 48)
    changes = []
    for blur in (False, True):
        torch.manual_seed(0)
        changes.append(shift_sensitivity(PatchDiscriminator(3, 8, 2, blur=blur), x))
    assert changes[1] < 0.5 * changes[0]


@pytest.mark.parametrize(
    "wrong, message", [({"norm": "layer"}, "'layer', wanted one of group, batch, none"), ({"layers": 0}, "got 0")]
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PatchDiscriminator(**wrong)
