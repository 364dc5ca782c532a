"""Guidance with control branches: hints are in both halves of it, except in guess mode."""

import pytest
import torch

from diffusion.rng import Streams
from models.control import HintConfig, add_control, build_branch, guess_strengths
from train.samplers import absorbing, ddpm

SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1, "total_steps": 8}
HINT = HintConfig(hint_channels=1, hint_widths=(4, 6), hint_factor=1)
LABELS = torch.tensor([1, 2])


def build_sampler(n_classes=3, **changes):
    """A sampler of pixels with a control branch whose weights are random."""
    torch.manual_seed(0)
    sampler = ddpm.build(ddpm.Config(**SMALL, **changes), shape=(1, 4, 4), pixels=True, n_classes=n_classes)
    add_control(sampler.network, build_branch(sampler.network, HINT))
    for parameter in sampler.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sampler.network.eval()
    return sampler


def batch(n_classes=3):
    hints = torch.rand(2, 1, 4, 4, generator=torch.manual_seed(1)) * 2 - 1
    return {"hint_image": hints} | ({"label": LABELS} if n_classes else {})


def recorded(sampler, monkeypatch, conditions, **settings):
    """The encoded conditions of the calls of the network in sampling."""
    calls, predict = [], type(sampler).predict

    def record(self, network, x, t, condition, **kwargs):
        calls.append(condition)
        return predict(self, network, x, t, condition, **kwargs)

    monkeypatch.setattr(type(sampler), "predict", record)
    options = ddpm.Sampling(sample_steps=1, **settings)
    sampler.sample(sampler.network, Streams([0, 1]), options=options, batch=conditions)
    monkeypatch.undo()
    return calls


def test_a_hint_is_in_both_halves_of_guidance(monkeypatch):
    sampler = build_sampler()
    (condition,) = recorded(sampler, monkeypatch, batch(), guidance=2.0)
    hint, label = condition.streams["hint"], condition.streams["label"].values
    expected = (batch()["hint_image"] + 1) / 2
    assert torch.equal(hint.values, torch.cat([expected, expected])) and (hint.strengths == 1).all()
    null = sampler.network.encode({}, torch.zeros(2, 1, 4, 4)).streams["label"].values
    assert torch.equal(label[:2], null) and not torch.equal(label[2:], null)


def test_in_guess_mode_guidance_starts_from_no_hint(monkeypatch):
    settings = {"guidance": 2.0, "control_guess": True, "control_strength": (0.5,)}
    (condition,) = recorded(build_sampler(), monkeypatch, batch(), **settings)
    strengths = condition.streams["hint"].strengths
    assert not strengths[:2].any()
    torch.testing.assert_close(strengths[2:], 0.5 * torch.tensor(guess_strengths(5)).expand(2, 5))


def test_only_the_middle_is_controlled(monkeypatch):
    settings = {"guidance": 2.0, "control_guess": True, "control_middle_only": True}
    (condition,) = recorded(build_sampler(), monkeypatch, batch(), **settings)
    assert condition.streams["hint"].strengths[2:].tolist() == [[0, 0, 0, 0, 1]] * 2


def test_guidance_is_that_of_the_formula():
    """With the hint in both halves, from the null to the label; in guess mode, from the base to hint and label."""
    sampler, x, t = build_sampler(), torch.randn(2, 1, 4, 4), torch.tensor([1.0, 1.0])
    network, raw = sampler.network, {"hint": batch()["hint_image"], "label": LABELS}
    for guess in (False, True):
        options = ddpm.Sampling(guidance=3.0, control_guess=guess, sample_steps=1, solver="ddim")
        weak = {} if guess else {"hint": raw["hint"]}
        factors = guess_strengths(5) if guess else 1.0
        halves = []
        for fields in (weak, raw):
            condition = network.encode(fields, x)
            hint = condition.streams.get("hint")
            residuals = network.control["hint"](x, t, condition, hint.values, hint.strengths * torch.tensor(factors))
            branches, network.control = network.control, torch.nn.ModuleDict()
            halves.append(network(x, t, condition, residuals))
            network.control = branches
        expected = halves[0] + 3 * (halves[1] - halves[0])
        denoised = guided_output(sampler, x, t, options)
        torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4)


def guided_output(sampler, x, t, options):
    """The network's output under guidance, as sampling combines it."""
    chain = ddpm.guidance_chain(
        sampler.config, sampler.network.encoders, sampler.fields_of, batch(), options, sampler.n_classes
    )
    encoded = [sampler.network.encode(raw, x) for raw in chain.raw]
    conditions = ddpm.weigh_hints(encoded, sampler.network.control, options)
    outputs = [sampler.network(x, t, condition) for condition in conditions]
    return outputs[0] + chain.scales[0] * (outputs[1] - outputs[0])


def test_a_hint_alone_is_guided_in_guess_mode_only(monkeypatch):
    sampler = build_sampler(n_classes=0)
    with pytest.raises(ValueError, match="got guidance 2.0 for a model without conditions: pass --guidance 1"):
        recorded(sampler, monkeypatch, batch(0), guidance=2.0)
    (condition,) = recorded(sampler, monkeypatch, batch(0), guidance=2.0, control_guess=True)
    assert condition.streams["hint"].strengths[:, 0].tolist() == pytest.approx([0, 0, 0.1, 0.1])


def test_a_hint_needs_no_trained_null(monkeypatch):
    sampler = build_sampler(condition_drop=0.0)
    for guess, half in ((False, 1.0), (True, 0.0)):
        (condition,) = recorded(sampler, monkeypatch, batch(), guidance=2.0, control_guess=guess)
        strengths = condition.streams["hint"].strengths
        assert (strengths[:2] == half).all() and strengths[2:].all()


def test_a_negative_condition_leaves_the_hint(monkeypatch):
    sampler, options = build_sampler(), ddpm.Sampling(guidance=2.0, sample_steps=1)
    chain = ddpm.guidance_chain(
        sampler.config, sampler.network.encoders, sampler.fields_of, batch(), options, 3, {"label": LABELS}
    )
    assert torch.equal(chain.raw[0]["hint"], batch()["hint_image"]) and torch.equal(chain.raw[0]["label"], LABELS)


@torch.no_grad()
def test_windows_of_codes_have_their_part_of_a_hint():
    """A window sees the hint where it is: what lies further away than the encoder of hints sees does not matter."""
    torch.manual_seed(0)
    config = absorbing.Config(bert_n_emb=8, bert_n_head=2, bert_n_layers=1, total_steps=8)
    sampler = absorbing.build(config, codes=5, grid=(2, 2), n_classes=0)
    near = HintConfig(hint_channels=1, hint_widths=(4,), hint_factor=1)  # two convolutions see two pixels around
    add_control(sampler.network, build_branch(sampler.network, near))
    for parameter in sampler.network.parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    sampler.network.eval()

    def sample(hint):
        options = absorbing.Sampling(sample_steps=4)
        conditions = {"hint_image": hint}
        return sampler.sample(
            sampler.network, Streams([3]), options=options, batch=conditions, shape=(2, 6), window_stride=2
        )

    hint = torch.rand(1, 1, 2, 6, generator=torch.manual_seed(2)) * 2 - 1
    other = hint.clone()
    other[..., 4:] = -hint[..., 4:]
    one, changed = sample(hint), sample(other)
    assert torch.equal(one[..., :2], changed[..., :2]) and not torch.equal(one, changed)


def test_in_guess_mode_guidance_scales_the_hint_beside_an_image():
    """--image_guidance leads to the image without the hint, --guidance from there to the hint."""
    sampler = build_sampler(n_classes=0, conditions=("image",))
    raw = batch(0) | {"condition_image": torch.rand(2, 3, 4, 4) * 2 - 1}
    for guess, second in ((False, {"hint", "image"}), (True, {"image"})):
        settings = ddpm.Sampling(guidance=3.0 if guess else 1.0, image_guidance=1.5, control_guess=guess)
        fields = sampler.network.encoders, sampler.fields_of
        chain = ddpm.guidance_chain(sampler.config, *fields, raw, settings, 0)
        assert [{*each} for each in chain.raw][1:] == [second, {"hint", "image"}][: len(chain.raw) - 1]
        assert ("hint" in chain.raw[0]) != guess and chain.scales[0] == 1.5
