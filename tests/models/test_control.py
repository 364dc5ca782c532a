"""Control branches: nothing at first, a copy of the UNet's way down, and residuals by their strengths."""

import pytest
import torch
from torch import nn

from models.conditioning import Condition, ConditionEncoder
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from models.control import ControlBranch, HintConfig, guess_strengths
from models.streams import GatedTokens
from models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    in_channels=2, out_channels=2, channels=8, channel_mults=(1, 2), res_blocks=1, attn_factors=(2,), heads=1
)
HINT = HintConfig(hint_channels=3, hint_widths=(4, 6), hint_factor=2)


class GatedStub(ConditionEncoder):
    """Passes gated tokens on."""

    gated_width = 6

    def forward(self, raw, x, drop=None):
        return GatedTokens(raw)


def randomize(module):
    """Perturbs every weight, since initial zeros would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def unet():
    encoders = {"label": LabelEncoder(3, CONFIG.emb_dim), "image": ImageEncoder(1), "gated": GatedStub()}
    return randomize(UNet(CONFIG, encoders)).eval()


@pytest.fixture
def inputs(unet):
    """x, t, the encoded condition and the hint."""
    generator = torch.Generator().manual_seed(2)
    shapes = (2, 2, 8, 4), (2, 1, 8, 4), (2, 5, 6), (2, 3, 16, 8)
    x, image, gated, hint = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        condition = unet.encode({"label": torch.tensor([0, 2]), "image": image, "gated": gated}, x)
    return x, torch.tensor([3.0, 500.0]), condition, hint


def pass_through(branch):
    """Makes the residuals of a branch its features."""
    for conv in (*branch.zero_convs, branch.middle_zero_conv):
        nn.init.dirac_(conv.weight)
    return branch


@torch.no_grad()
def test_a_new_branch_changes_nothing_to_the_bit(unet, inputs):
    x, t, condition, hint = inputs
    branch = ControlBranch(unet, HINT)
    residuals = branch(x, t, condition, hint)
    assert len(residuals) == branch.outputs == 5 and not any(residual.any() for residual in residuals)
    assert torch.equal(unet(x, t, condition, skip_residuals=residuals), unet(x, t, condition))


@torch.no_grad()
def test_features_of_a_new_branch_are_those_of_the_unet(unet, inputs):
    x, t, condition, hint = inputs
    residuals = pass_through(ControlBranch(unet, HINT))(x, t, condition, hint)
    emb, _ = unet.embed(x, t, condition)
    h, skips = unet.down(x, emb, condition)
    for residual, expected in zip(residuals, [*skips, unet.middle(h, emb, condition)], strict=True):
        torch.testing.assert_close(residual, expected)


@torch.no_grad()
def test_the_hint_is_added_behind_the_first_convolution(unet, inputs):
    x, t, condition, hint = inputs
    branch = pass_through(ControlBranch(unet, HINT))
    randomize(branch.hint)
    residuals = branch(x, t, condition, hint)
    emb, _ = unet.embed(x, t, condition)
    _, skips = unet.down(x, emb, condition)
    torch.testing.assert_close(residuals[0], skips[0] + branch.hint(hint))
    assert not torch.allclose(residuals[-1], pass_through(ControlBranch(unet, HINT))(x, t, condition, hint)[-1])


def test_all_of_a_branch_learns_beside_a_frozen_unet(unet, inputs):
    x, t, condition, hint = inputs
    before = {name: value.clone() for name, value in unet.requires_grad_(False).state_dict().items()}
    branch = ControlBranch(unet, HINT)
    optimizer = torch.optim.SGD(branch.parameters(), lr=0.1)
    for _ in range(3):  # the hint's first layers are behind two layers of zeros
        optimizer.zero_grad()
        unet(x, t, condition, branch(x, t, condition, hint)).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in branch.parameters())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


@torch.no_grad()
def test_strengths_multiply_residuals(unet, inputs):
    branch = randomize(ControlBranch(unet, HINT))
    residuals = branch(*inputs)
    for half, residual in zip(branch(*inputs, 0.5), residuals, strict=True):
        assert torch.equal(half, 0.5 * residual)
    only_middle = branch(*inputs, [0, 0, 0, 0, 1])
    assert not any(residual.any() for residual in only_middle[:-1]) and torch.equal(only_middle[-1], residuals[-1])
    with pytest.raises(ValueError, match="got 2 strengths, wanted one, or 5"):
        branch(*inputs, [1.0, 1.0])


def test_strengths_of_guess_mode_rise_from_a_tenth_to_one():
    assert guess_strengths(5) == pytest.approx([0.1, 0.1 * 10**0.25, 0.1 * 10**0.5, 0.1 * 10**0.75, 1.0])
    assert guess_strengths(13) == pytest.approx([0.825 ** (12 - i) for i in range(13)], rel=0.01)


def test_inputs_that_do_not_fit_are_refused(unet, inputs):
    x, t, condition, hint = inputs
    branch = ControlBranch(unet, HINT)
    with pytest.raises(ValueError, match=r"got a hint \(2, 3, 8, 4\) .* wanted \(2, 3, 16, 8\)"):
        branch(x, t, condition, hint[:, :, ::2, ::2])
    with pytest.raises(ValueError, match="a condition without label, image, gated"):
        branch(x, t, None, hint)
    with pytest.raises(ValueError, match="a condition without image, gated"):
        branch(x, t, Condition({"label": condition.streams["label"]}), hint)


@pytest.mark.parametrize(
    ("factor", "widths", "message"),
    [(3, (4, 6, 8), "a power of 2"), (4, (4, 6), "one more width than it halves"), (1, (), "no hint_widths")],
)
def test_hints_that_do_not_halve_to_x_are_refused(factor, widths, message):
    with pytest.raises(ValueError, match=message):
        HintConfig(hint_factor=factor, hint_widths=widths)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_hints_are_a_factor_larger_than_x(unet, inputs, factor):
    x, t, condition, _ = inputs
    branch = ControlBranch(unet, HintConfig(hint_widths=(4, 6, 8), hint_factor=factor))
    hint = torch.rand(2, 3, 8 * factor, 4 * factor)
    assert branch.hint(hint).shape == (2, 8, 8, 4)
    assert [residual.shape[1] for residual in branch(x, t, condition, hint)] == [8, 8, 8, 16, 16]
