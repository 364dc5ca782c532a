"""Guidance along the chain of null, class, class and regions: its formula in every sampler, and what it refuses."""

from itertools import product

import pytest
import torch
from torch import nn

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.denoisers import lerp_chain, windowed
from diffusion.rng import Streams, seed_of
from diffusion.solvers import solvers_for
from experiments.metrics.cost import count_nfe
from models.conditioning import Conditioner
from models.conditions import boxes, layout, location_words, objects
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from models.conditions.layout import LayoutEncoder
from train.samplers import absorbing, autoregressive, ddpm
from train.samplers._conditions import ConditionsConfig, draw_drops, fields_by_condition
from train.samplers._guidance import check_nulls, guidance_chain
from train.spaces import EditInput

CLASSES, CODES, GRID, CANVAS = 3, 5, (4, 4), (4, 6)
UNET = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "heads": 1, "total_steps": 20}
TRANSFORMER = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
MODULES = {"absorbing": absorbing, "autoregressive": autoregressive, "ddpm": ddpm}
OPTIONS = {
    "boxes": boxes.Config(boxes_classes=CLASSES),
    "layout": layout.Config(layout_classes=CLASSES),
    "location_words": location_words.Config(location_words_classes=CLASSES),
    "objects": objects.Config(objects_classes=CLASSES),
}
BATCH = {  # two boxes, and one
    "label": torch.tensor([2, 0]),
    "boxes": torch.tensor([[[0.0, 0, 0.5, 0.5], [0.25, 0.5, 1, 1]], [[0.5, 0, 1, 1], [0, 0, 0, 0]]]),
    "boxes_mask": torch.tensor([[True, True], [True, False]]),
    "box_class": torch.tensor([[1, 2], [0, 0]]),
}
REGIONS_ALONE = {name: value for name, value in BATCH.items() if name != "label"}
SCALES = [(3.0, 1.5), (1.0, 4.0), (0.0, 2.0), (2.0, 0.0), (2.5, 1.0)]


def build(name, condition="boxes", n_classes=CLASSES, **settings):
    """A sampler with random weights, conditioned on classes and boxes."""
    torch.manual_seed(0)
    settings |= {"conditions": (condition,), "condition_options": OPTIONS[condition]}
    if name == "ddpm":
        attention = {"region_attention": "v2"} if condition == "objects" else {"attn_block_type": "transformer"}
        config = ddpm.Config(**UNET | attention | settings)
        sampler = ddpm.build(config, shape=(1, *GRID), pixels=True, n_classes=n_classes)
    else:
        config = MODULES[name].Config(**TRANSFORMER | settings)
        sampler = MODULES[name].build(config, codes=CODES, grid=GRID, n_classes=n_classes)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def sample(sampler, batch=BATCH, **settings):
    name = type(sampler).__module__.rpartition(".")[2]
    edit, shape, negative = (settings.pop(each, None) for each in ("edit", "shape", "negative"))
    options = MODULES[name].Sampling(**({"sample_steps": 2} if name == "ddpm" else {}) | settings)
    inputs = {"batch": batch, "negative": negative, "edit": edit, "shape": shape}
    return sampler.sample(sampler.network, Streams([1, 2]), options=options, **inputs)


def raw_chain(sampler, batch=BATCH):
    """What the network gets at each place of the chain."""
    regions = {name: batch[name] for name in ("boxes", "boxes_mask", "box_class")}
    (condition,) = sampler.config.conditions
    return [{}, {"label": batch["label"]}, {"label": batch["label"], condition: regions}]


def by_formula(null, others, everything, scale, region_scale):
    return null + scale * (others - null) + region_scale * (everything - others)


# The formula


def test_equal_scales_are_plain_guidance():
    """The formula telescopes, with numbers and with a scale for each example."""
    null, others, everything = torch.randn(3, 4, 6, dtype=torch.float64)
    for scale in (2.7, torch.tensor([0.3, 1.0, 2.0, 9.0], dtype=torch.float64)):
        plain = lerp_chain([null, everything], [scale])
        assert torch.allclose(lerp_chain([null, others, everything], [scale, scale]), plain, rtol=0, atol=1e-12)
        expected = by_formula(null, others, everything, torch.as_tensor(scale, dtype=torch.float64).view(-1, 1), 1.0)
        assert torch.allclose(lerp_chain([null, others, everything], [scale, 1.0]), expected, rtol=0, atol=1e-12)


class LinearUNet(nn.Module):
    """Predicts 0.1 for the image, 0.2 more for a class k, k times, 0.4 more for each box, and 0.8 for both."""

    def __init__(self, network):
        super().__init__()
        self.encode = network.encode
        self.rows = []

    def forward(self, x, t, condition):
        label = condition.streams["label"].values
        classes = torch.tensor([0.0, 1, 2, 0])[(label[:, None] - self.table).abs().sum(2).argmin(1)]
        known = ((label - self.table[-1]).abs().sum(1) > 1e-6).float()
        count = torch.zeros(len(x)) if condition.regions is None else condition.regions.present.sum(1).float()
        self.rows.append(len(x))
        return (0.1 + 0.2 * classes + 0.4 * count + 0.8 * known * count).view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize(("scale", "region_scale"), SCALES)
def test_a_linear_network_is_guided_as_the_formula_says(scale, region_scale):
    sampler, seen = build("ddpm", prediction="x0", variance="fixed_small"), []
    network = LinearUNet(sampler.network)
    network.table = sampler.network.encoders["label"].embedding.weight
    options = ddpm.Sampling(sample_steps=1, clip=False, guidance=scale, region_guidance=region_scale)

    def on_step(i, t, s, x, predicted):
        seen.append(predicted)
        return x

    sampler.sample(network, Streams([1, 2]), batch=BATCH, options=options, on_step=on_step)
    for predicted, k, count in zip(seen[0], (2, 0), (2, 1), strict=True):
        null, others, everything = 0.1, 0.1 + 0.2 * k, 0.1 + 0.2 * k + 0.4 * count + 0.8 * count
        expected = by_formula(null, others, everything, scale, region_scale)
        assert torch.allclose(predicted, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "region_scale"), SCALES)
def test_logits_are_guided_as_the_formula_says(scale, region_scale):
    sampler, x, t = build("absorbing"), torch.randint(CODES + 1, (2, *GRID)), torch.ones(2)
    options = absorbing.Sampling(guidance=scale, region_guidance=region_scale)
    logits = sampler.make_denoiser(sampler.network, BATCH, options, x)(x, t)
    expected = by_formula(*(sampler.network(x, raw) for raw in raw_chain(sampler)), scale, region_scale)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)
    last = sampler.make_denoiser(sampler.network, BATCH, options, x)(x[1:], t[1:], torch.tensor([1]))
    assert torch.allclose(last, expected[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("condition", ["boxes", "layout"])
def test_each_window_has_its_part_of_the_chain(condition):
    sampler, x, t = build("absorbing", condition), torch.randint(CODES, (2, *CANVAS)), torch.ones(2)
    x[:, :2] = CODES  # masked
    network, stride = sampler.network, 2
    options = absorbing.Sampling(guidance=3.0, region_guidance=1.5)
    parts = []
    for corner in ((0, 0), (0, 2)):  # the windows
        ids = x[:, :, corner[1] : corner[1] + 4]
        whole = [(raw, network.encode(raw, x)) for raw in raw_chain(sampler)]
        chain = [network(ids, network.encode_window(*each, ids, corner, CANVAS)) for each in whole]
        parts.append(by_formula(*chain, 3.0, 1.5))
    stack = torch.stack(parts).flatten(0, 1)  # by window, then by canvas
    expected = windowed(lambda x, t, rows: stack[rows], GRID, stride, canvases=2)(x, t)
    out = sampler.make_windowed(network, BATCH, options, x, stride)(x, t)
    assert torch.allclose(out, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize(("scale", "region_scale"), SCALES)
def test_the_cache_holds_the_sequences_of_a_chain(scale, region_scale, is_negative):
    """Known codes finish an example early, which then drops out; the other keeps what guidance moves away from."""
    sampler = build("autoregressive")
    keep = torch.zeros(2, *GRID, dtype=torch.bool)
    keep[0, 2:] = True
    x0, settings = torch.randint(CODES, (2, *GRID)), {"guidance": scale, "region_guidance": region_scale}
    x = sampler.initial_codes(EditInput(x0, keep), (2, *GRID), Streams([1, 2]))
    chain, negative = raw_chain(sampler), NEGATIVE if is_negative else None
    if is_negative:
        chain[0] = raw_chain(sampler, NEGATIVE)[-1]
    options = autoregressive.Sampling(**settings)
    logits = sampler.make_denoiser(sampler.network, BATCH, options, x, negative=negative)
    for count in range(12):
        rows = None if count < 8 else torch.tensor([1])
        codes = x0.flatten(1) if rows is None else x0.flatten(1)[1:]
        whole = [sampler.network(x0, raw).flatten(1, 2)[:, count] for raw in chain]
        expected = by_formula(*whole, scale, region_scale)
        out = logits(codes[:, :count], torch.zeros(len(codes)), rows)
        assert torch.allclose(out, expected if rows is None else expected[1:], rtol=0, atol=1e-4), count


# Samples


@pytest.mark.parametrize("name", MODULES)
def test_equal_scales_give_the_samples_of_one_scale(name):
    sampler = build(name)
    one = sample(sampler, guidance=2.0)
    assert torch.equal(sample(sampler, guidance=2.0, region_guidance=2.0), one)
    assert not torch.equal(sample(sampler, guidance=2.0, region_guidance=40.0), one)


@pytest.mark.parametrize("solver", sorted(solvers_for(AbsorbingDiffusion(CODES))))
def test_solvers_that_plan_their_calls_take_a_chain(solver):
    """An image is the same in any batch, whatever its conditions."""
    sampler, options = build("absorbing"), absorbing.Sampling(solver=solver, guidance=3.0, region_guidance=1.5)
    x = sample(sampler, solver=solver, guidance=3.0, region_guidance=1.5)
    assert ((x >= 0) & (x < CODES)).all()
    alone = {name: value[1:] for name, value in BATCH.items()}
    assert torch.equal(sampler.sample(sampler.network, Streams([2]), batch=alone, options=options)[0], x[1])


COUNTS = [  # scales, and how often each image is evaluated
    *[((3.0, 1.5), 3), ((1.0, 3.0), 2), ((3.0, 3.0), 2), ((3.0, 0.0), 2)],
    *[((3.0, None), 2), ((1.0, None), 1), ((1.0, 1.0), 1)],
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("scales", "evaluations"), COUNTS)
def test_conditions_without_weight_are_not_evaluated(name, scales, evaluations):
    sampler = build(name)
    settings = {"solver": "halton", "sample_steps": 1} if name == "absorbing" else {}
    calls = {"ddpm": 2, "autoregressive": 16, "absorbing": 1}[name]
    with count_nfe(sampler.network) as nfe:
        sample(sampler, guidance=scales[0], region_guidance=scales[1], **settings)
    same = int(name == "absorbing" and scales[0] != 1)  # both images begin with masks alone, equal under the null
    assert (nfe.calls, nfe.evaluations) == (calls, 2 * evaluations * calls - same)


@pytest.mark.parametrize("name", MODULES)
def test_models_of_regions_alone_have_the_region_scale_alone(name):
    sampler = build(name, n_classes=0)
    expected = sample(sampler, REGIONS_ALONE, guidance=3.0)
    assert torch.equal(sample(sampler, REGIONS_ALONE, region_guidance=3.0), expected)
    with pytest.raises(ValueError, match="2.0 and region_guidance 3.0 for a model of regions alone.*guidance 1"):
        sample(sampler, REGIONS_ALONE, guidance=2.0, region_guidance=3.0)


# What is refused


@pytest.mark.parametrize("name", MODULES)
def test_a_scale_needs_conditions_that_it_can_scale(name):
    sampler, remedy = build(name), "leave --region_guidance out"
    for scale in (1.0, 2.0):
        with pytest.raises(ValueError, match=f"region_guidance {scale} for a model without cond.* of reg.*{remedy}"):
            sample(build_with_classes_alone(name), {"label": BATCH["label"]}, region_guidance=scale)
    with pytest.raises(ValueError, match=f"got region_guidance 2.0 without a condition: {remedy}"):
        sample(sampler, None, region_guidance=2.0)
    with pytest.raises(ValueError, match="got guidance 2.0 without a condition: pass --guidance 1"):
        sample(sampler, None, guidance=2.0)
    sample(sampler, None, region_guidance=1.0)


def build_with_classes_alone(name):
    if name == "ddpm":
        return ddpm.build(ddpm.Config(**UNET), shape=(1, *GRID), pixels=True, n_classes=CLASSES)
    return MODULES[name].build(MODULES[name].Config(**TRANSFORMER), codes=CODES, grid=GRID, n_classes=CLASSES)


@pytest.mark.parametrize("name", MODULES)
def test_nulls_that_training_never_used_are_refused(name):
    never = build(name, condition_drop=0.0)
    for settings in ({"region_guidance": 2.0}, {"guidance": 2.0}, {"guidance": 2.0, "region_guidance": 2.0}):
        with pytest.raises(ValueError, match="trained with condition_drop 0, which leaves the null of boxes untrained"):
            sample(never, **settings)
    sample(never, guidance=1.0, region_guidance=1.0)
    labelled = build(name, label_drop=0.0)
    sample(labelled, region_guidance=2.0)  # the class is never null
    with pytest.raises(ValueError, match="got guidance 2.0, .* label_drop 0, .* null of label untrained: pass --guid"):
        sample(labelled, guidance=2.0, region_guidance=2.0)


def test_each_condition_needs_its_own_null():
    fields, batch = ["condition_image", "label"], {"label": torch.tensor([0, 3])}
    drops = ConditionsConfig(label_drop=0.1, condition_drop=0.0)
    check_nulls(drops, ["label"], None, n_classes=3)
    check_nulls(drops, fields, batch, n_classes=3)
    with pytest.raises(ValueError, match="condition_drop 0, .* null of condition_image untrained: pass a cond"):
        check_nulls(drops, fields, None, 3)
    with pytest.raises(ValueError, match="got no label, .* label_drop 0, .*: pass a label"):
        check_nulls(ConditionsConfig(label_drop=0.0), ["label"], batch, n_classes=3)


@pytest.mark.parametrize("name", ["absorbing", "ddpm"])
def test_an_interval_of_a_region_scale_holds_a_step(name):
    settings = {"guidance_interval": (0.6, 0.7), "sample_steps": 2}
    with pytest.raises(ValueError, match="which holds none of the 2 steps"):
        sample(build(name), region_guidance=2.0, **settings)
    sample(build(name), region_guidance=1.0, **settings)


def test_settings_without_guidance_scale_nothing():
    settings = ddpm.Sampling(guidance=2.0, region_guidance=3.0, clip=False)
    assert settings.is_guided and ddpm.Sampling(region_guidance=0.0).is_guided and ddpm.Sampling(guidance=0.0).is_guided
    assert not ddpm.Sampling(region_guidance=1.0).is_guided
    assert settings.without_guidance() == ddpm.Sampling(clip=False)


# Training


def test_training_drops_classes_and_regions_independently():
    """So that it sees each place of the chain: neither, the class without regions, both."""
    config = ConditionsConfig(label_drop=0.25, condition_drop=0.4)
    drops = draw_drops(config, build("absorbing").network.encoders, streams, 4000)
    for label, regions in product((True, False), repeat=2):
        share = ((drops["label"] == label) & (drops["regions"] == regions)).float().mean().item()
        expected = (0.25 if label else 0.75) * (0.4 if regions else 0.6)
        assert abs(share - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def streams(purpose):
    return Streams([seed_of(0, purpose, i) for i in range(4000)])


@pytest.mark.parametrize("condition", OPTIONS)
def test_the_chain_holds_what_training_sees(condition):
    """Examples whose regions, and labels, are dropped give what the chain's weaker conditions do."""
    sampler = build("ddpm", condition)
    network, x, t = sampler.network, torch.randn(2, 1, *GRID), torch.tensor([3.0, 7.0])
    options = ddpm.Sampling(guidance=3.0, region_guidance=2.0)
    chain = guidance_chain(
        sampler.config, network.encoders, fields_by_condition(network.encoders), BATCH, options, CLASSES
    )
    everything, outputs = chain.raw[-1], []
    for raw, (label, regions) in zip(chain.raw, [(True, True), (False, True), (False, False)], strict=True):
        drop = {"label": torch.full((2,), label), "regions": torch.full((2,), regions)}
        outputs.append(network(x, t, raw))
        assert torch.allclose(network(x, t, everything, drop=drop), outputs[-1], rtol=0, atol=1e-4)
    assert all((a - b).abs().amax((1, 2, 3)).min() > 1e-3 for a, b in zip(outputs[1:], outputs[:-1], strict=True))
    assert chain.scales == [3.0, 2.0]


def test_all_conditions_of_regions_share_one_scale():
    encoders = Conditioner({"layout": LayoutEncoder(3), "image": ImageEncoder(2), "label": LabelEncoder(3, 4)})
    encoders["boxes"] = boxes.BoxEncoder(3, 4)
    fields_of = fields_by_condition(encoders)
    batch = BATCH | {"condition_image": torch.zeros(2, 2, *GRID)}
    options = absorbing.Sampling(guidance=3.0, region_guidance=2.0)
    chain = guidance_chain(ConditionsConfig(), encoders, fields_of, batch, options, CLASSES)
    assert [{*raw} for raw in chain.raw] == [set(), {"image", "label"}, {"image", "label", "boxes", "layout"}]


# Negative conditions

NEGATIVE = {
    "label": torch.tensor([1, 1]),
    "boxes": torch.tensor([[[0.0, 0, 1, 1]], [[0.5, 0.5, 1, 1]]]),
    "boxes_mask": torch.ones(2, 1, dtype=torch.bool),
    "box_class": torch.tensor([[0], [2]]),
}
NULL = {"label": torch.full((2,), CLASSES)}  # the number of the null class
SOLVERS = {"absorbing": {"solver": "halton", "sample_steps": 2}, "autoregressive": {}, "ddpm": {}}


@pytest.mark.parametrize("name", MODULES)
def test_a_negative_null_gives_the_same_samples(name):
    sampler = build(name)
    for settings in ({"guidance": 3.0}, {"guidance": 3.0, "region_guidance": 2.0}):
        expected = sample(sampler, **settings, **SOLVERS[name])
        for negative in ({}, NULL):
            assert torch.equal(sample(sampler, negative=negative, **settings, **SOLVERS[name]), expected)
        assert not torch.equal(sample(sampler, negative=NEGATIVE, **settings, **SOLVERS[name]), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_negative_condition_without_guidance_is_ignored(name):
    sampler = build(name)
    expected = sample(sampler, guidance=1.0, **SOLVERS[name])
    assert torch.equal(sample(sampler, negative=NEGATIVE, guidance=1.0, **SOLVERS[name]), expected)
    fields_of, options = sampler.fields_of, MODULES[name].Sampling(guidance=1.0)
    chain = guidance_chain(sampler.config, sampler.network.encoders, fields_of, BATCH, options, CLASSES, NEGATIVE)
    assert chain.raw[0] == {}  # longer tokens of the negative do not pad those of the condition


@pytest.mark.parametrize("name", MODULES)
def test_guidance_away_from_the_condition_itself_is_none(name):
    sampler = build(name)
    expected = sample(sampler, guidance=1.0, **SOLVERS[name])
    guided = sample(sampler, negative=BATCH, guidance=3.0, **SOLVERS[name])
    assert torch.allclose(guided.float(), expected.float(), atol=1e-4)


@pytest.mark.parametrize("negative", [NEGATIVE, {"label": torch.tensor([1, 0])}])
@pytest.mark.parametrize("region_scale", [None, 1.5])
def test_negative_logits_are_guided_as_the_formula_says(negative, region_scale):
    sampler, x, t = build("absorbing"), torch.randint(CODES + 1, (2, *GRID)), torch.ones(2)
    options = absorbing.Sampling(guidance=3.0, region_guidance=region_scale)
    _, others, everything = (sampler.network(x, raw) for raw in raw_chain(sampler))
    raw = {"label": negative["label"]}
    if "boxes" in negative:
        raw["boxes"] = {field: negative[field] for field in ("boxes", "boxes_mask", "box_class")}
    away = sampler.network(x, raw)
    logits = sampler.make_denoiser(sampler.network, BATCH, options, x, negative=negative)(x, t)
    if region_scale is None:
        expected = away + 3 * (everything - away)
    else:
        expected = by_formula(away, others, everything, 3.0, region_scale)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)


def test_windows_take_negative_conditions():
    sampler, x, t = build("absorbing", "layout"), torch.full((2, *CANVAS), CODES), torch.ones(2)
    options = absorbing.Sampling(guidance=3.0)
    out = [
        sampler.make_windowed(sampler.network, BATCH, options, x, 2, negative)(x, t)
        for negative in (None, NULL, NEGATIVE)
    ]
    assert torch.equal(out[0], out[1]) and not torch.allclose(out[0], out[2])


@pytest.mark.parametrize("name", MODULES)
def test_nulls_that_are_replaced_need_no_training(name):
    never = build(name, condition_drop=0.0, label_drop=0.0)
    sample(never, guidance=2.0, negative=NEGATIVE, **SOLVERS[name])
    with pytest.raises(ValueError, match="the null of boxes untrained"):
        sample(never, guidance=2.0, negative={"label": torch.tensor([0, 0])})
    with pytest.raises(ValueError, match="the null of boxes untrained"):
        sample(never, guidance=2.0, region_guidance=3.0, negative=NEGATIVE)


@pytest.mark.parametrize("name", MODULES)
def test_negative_fields_that_do_not_fit_are_refused(name):
    sampler = build(name)
    with pytest.raises(
        ValueError, match="got the negative condition caption, this sampler takes: boxes, box_class, la"
    ):
        sample(sampler, guidance=2.0, negative={"caption": ["a"] * 2})
    with pytest.raises(ValueError, match="the conditions need box_class"):
        sample(sampler, guidance=2.0, negative={"boxes": BATCH["boxes"], "boxes_mask": BATCH["boxes_mask"]})
