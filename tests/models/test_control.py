"""Control branches: nothing at first, a copy of the UNet's way down, and residuals by their strengths."""

import pytest
import torch
from torch import nn

from models.conditioning import Condition, ConditionEncoder
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from models.control import ControlBranch, HintConfig, HintReader, add_control, guess_strengths, scale_hints
from models.streams import GatedTokens, Hint
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


# Branches that are parts of the network


@pytest.fixture
def fields(unet, inputs):
    """x, t, raw fields without a hint, and two hints in [-1, 1]."""
    generator = torch.Generator().manual_seed(3)
    image, gated = torch.randn(2, 1, 8, 4, generator=generator), torch.randn(2, 5, 6, generator=generator)
    hints = [2 * torch.rand(2, 3, 16, 8, generator=generator) - 1 for _ in range(2)]
    return *inputs[:2], {"label": torch.tensor([0, 2]), "image": image, "gated": gated}, hints


@torch.no_grad()
def test_a_new_branch_of_a_network_changes_nothing_to_the_bit(unet, fields):
    x, t, raw, (hint, _) = fields
    plain, keys = unet(x, t, raw), unet.state_dict().keys()
    assert add_control(unet, ControlBranch(unet, HINT)) == "hint"
    assert torch.equal(unet(x, t, raw | {"hint": hint}), plain)
    assert all(key.startswith("control.hint.") for key in unet.state_dict().keys() - keys)


@torch.no_grad()
def test_without_its_hint_a_branch_changes_nothing_to_the_bit(unet, fields):
    x, t, raw, (hint, _) = fields
    plain = unet(x, t, raw)
    add_control(unet, randomize(ControlBranch(unet, HINT)))
    assert torch.equal(unet(x, t, raw), plain) and not torch.allclose(unet(x, t, raw | {"hint": hint}), plain)


@torch.no_grad()
def test_residuals_of_two_branches_are_added_up(unet, fields):
    x, t, raw, hints = fields
    branches = [randomize(ControlBranch(unet, HINT)) for _ in hints]
    nn.init.normal_(branches[1].middle_zero_conv.weight)
    condition = unet.encode(raw, x)
    parts = [branch(x, t, condition, (hint + 1) / 2) for branch, hint in zip(branches, hints, strict=True)]
    expected = unet(x, t, condition, [sum(each) for each in zip(*parts, strict=True)])
    half = unet(x, t, condition, [one + 0.5 * other for one, other in zip(*parts, strict=True)])
    names = [add_control(unet, branch) for branch in branches]
    raw |= dict(zip(names, hints, strict=True))
    assert names == ["hint", "hint_2"] and unet.encoders["hint_2"].fields == ("hint_2_image",)
    torch.testing.assert_close(unet(x, t, raw), expected)
    weighed = scale_hints(unet.encode(raw, x), {"hint_2": [0.5]})
    torch.testing.assert_close(unet(x, t, weighed), half)
    assert not torch.allclose(expected, half)


@torch.no_grad()
def test_strengths_belong_to_each_skip_of_each_example(unet, fields, inputs):
    x, t, raw, (hint, _) = fields
    branch = randomize(ControlBranch(unet, HINT))
    residuals = branch(*inputs[:2], unet.encode(raw, x), hint)
    strengths = torch.arange(10.0).view(2, 5)
    for i, residual in enumerate(branch(x, t, unet.encode(raw, x), hint, strengths)):
        torch.testing.assert_close(residual, strengths[:, i, None, None, None] * residuals[i])
    with pytest.raises(ValueError, match="got 4 strengths, wanted one, or 5"):
        branch(x, t, unet.encode(raw, x), hint, strengths[:, 1:])


@torch.no_grad()
def test_conditions_with_hints_are_selected_and_concatenated(unet, fields):
    x, t, raw, (hint, _) = fields
    add_control(unet, randomize(ControlBranch(unet, HINT)))
    condition = unet.encode(raw | {"hint": hint}, x)
    expected = unet(x, t, condition)
    torch.testing.assert_close(unet(x[1:], t[1:], condition[1:]), expected[1:])
    null = unet.encode(raw, x)  # another strength
    both = unet(torch.cat([x, x]), torch.cat([t, t]), Condition.cat([null, condition]))
    torch.testing.assert_close(both, torch.cat([unet(x, t, null), expected]))


def test_a_hint_is_read_as_its_branch_needs_it():
    reader, x = HintReader("hint", 3, 2, strength=0.7), torch.zeros(2, 5, 4, 6)
    grey = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 12)
    values, strengths = reader(grey, x, drop=torch.tensor([True, False]))  # never dropped
    assert torch.equal(values, torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 12))
    assert torch.equal(strengths, torch.full((2, 1), 0.7))
    assert reader(grey[..., ::2, ::2], x).values.shape == (2, 3, 8, 12)
    null = reader(None, x)
    assert isinstance(null, Hint) and null.values.shape == (2, 3, 8, 12) and not null.strengths.any()
    with pytest.raises(ValueError, match=r"got hint_image \(2, 2, 8, 12\), wanted \(2, 3, h, w\), or one channel"):
        reader(grey.expand(2, 2, 8, 12), x)
