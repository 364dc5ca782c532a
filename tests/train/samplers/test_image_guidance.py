"""Guidance of images beside other conditions: the chain of Brooks et al. 2023, in every place of it."""

import pytest
import torch
from torch import nn

from diffusion.rng import Streams, seed_of
from models.conditioning import Conditioner
from models.conditions import image, images
from models.conditions.boxes import BoxEncoder
from models.conditions.image import ImageEncoder
from models.conditions.label import LabelEncoder
from train.samplers import absorbing, ddpm
from train.samplers._conditions import ConditionsConfig, draw_drops, fields_by_condition
from train.samplers._guidance import guidance_chain

CLASSES, CODES, GRID = 3, 5, (4, 4)
UNET = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "heads": 1, "total_steps": 20}
TRANSFORMER = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
OPTIONS = {"image": image.Config(condition_channels=2), "images": images.Config(images_width=4)}
BATCH = {"label": torch.tensor([2, 0]), "condition_image": torch.linspace(-1, 1, 64).view(2, 2, *GRID)}
SEVERAL = {  # of which the second example has one
    "condition_images": torch.linspace(-1, 1, 192).view(2, 2, 3, *GRID),
    "condition_dates": torch.tensor([[-3.0, -1.0], [-2.0, torch.nan]]),
}
SCALES = [(7.5, 1.5), (1.0, 4.0), (4.0, 1.0), (0.0, 2.0), (2.0, 0.0), (2.5, 2.5)]  # of the text, of the image


def build(module, condition="image", n_classes=CLASSES, **settings):
    """A sampler with random weights, conditioned on classes and images."""
    torch.manual_seed(0)
    settings |= {"conditions": (condition,), "condition_options": OPTIONS[condition]}
    if module is ddpm:
        sampler = ddpm.build(ddpm.Config(**UNET | settings), shape=(1, *GRID), pixels=True, n_classes=n_classes)
    else:
        sampler = module.build(module.Config(**TRANSFORMER | settings), codes=CODES, grid=GRID, n_classes=n_classes)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def by_formula(null, of_image, everything, scale, image_scale):
    return null + image_scale * (of_image - null) + scale * (everything - of_image)


class LinearUNet(nn.Module):
    """Predicts 0.1, 0.2 more for each class number, 0.4 times the mean of the image more, and 0.8 more for both."""

    def __init__(self, network):
        super().__init__()
        self.encode, self.table = network.encode, network.encoders["label"].embedding.weight

    def forward(self, x, t, condition):
        label = condition.streams["label"].values
        number = (label[:, None] - self.table).abs().sum(2).argmin(1)
        picture = condition.streams["image"].values
        is_image = (picture.flatten(1).std(1) > 0).float()  # the null is flat
        known = (number != CLASSES).float()
        out = 0.1 + 0.2 * number * known + 0.4 * picture.mean((1, 2, 3)) * is_image + 0.8 * known * is_image
        return out.view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize(("scale", "image_scale"), SCALES)
def test_a_linear_network_is_guided_as_the_formula_says(scale, image_scale):
    sampler, seen = build(ddpm, prediction="x0", variance="fixed_small"), []
    nn.init.zeros_(sampler.network.encoders["image"].null)
    options = ddpm.Sampling(sample_steps=1, clip=False, guidance=scale, image_guidance=image_scale)

    def on_step(i, t, s, x, predicted):
        seen.append(predicted)
        return x

    network = LinearUNet(sampler.network)
    sampler.sample(network, Streams([1, 2]), batch=BATCH, options=options, on_step=on_step)
    for predicted, k, picture in zip(seen[0], (2, 0), BATCH["condition_image"], strict=True):
        of_image = 0.1 + 0.4 * picture.mean().item()
        expected = by_formula(0.1, of_image, of_image + 0.2 * k + 0.8, scale, image_scale)
        assert torch.allclose(predicted, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("condition", OPTIONS)
@pytest.mark.parametrize(("scale", "image_scale"), SCALES)
def test_logits_are_guided_as_the_formula_says(scale, image_scale, condition):
    sampler, x, t = build(absorbing, condition), torch.randint(CODES + 1, (2, *GRID)), torch.ones(2)
    own = BATCH["condition_image"] if condition == "image" else SEVERAL
    batch = BATCH if condition == "image" else {"label": BATCH["label"]} | SEVERAL
    options = absorbing.Sampling(guidance=scale, image_guidance=image_scale)
    logits = sampler.make_denoiser(sampler.network, batch, options, x)(x, t)
    chain = [{}, {condition: own}, {condition: own, "label": batch["label"]}]
    expected = by_formula(*(sampler.network(x, raw) for raw in chain), scale, image_scale)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-4)


def chain_of(options, batch, negative=None, config=ConditionsConfig()):  # noqa: B008 (frozen)
    encoders = Conditioner({"label": LabelEncoder(3, 4), "image": ImageEncoder(2)})
    encoders["boxes"] = BoxEncoder(3, 4)
    return guidance_chain(config, encoders, fields_by_condition(encoders), batch, options, CLASSES, negative)


BOXES = {"boxes": torch.rand(2, 1, 4), "boxes_mask": torch.ones(2, 1).bool(), "box_class": torch.ones(2, 1).long()}


def test_images_come_before_other_conditions_and_regions_last():
    chain = chain_of(absorbing.Sampling(guidance=3.0, image_guidance=1.5, region_guidance=2.0), BATCH | BOXES)
    assert [{*raw} for raw in chain.raw] == [set(), {"image"}, {"image", "label"}, {"image", "label", "boxes"}]
    assert chain.scales == [1.5, 3.0, 2.0]
    chain = chain_of(absorbing.Sampling(guidance=3.0, image_guidance=1.5), BATCH | BOXES)
    assert [{*raw} for raw in chain.raw] == [set(), {"image"}, {"image", "label", "boxes"}]
    assert chain.scales == [1.5, 3.0]


def test_a_negative_condition_stands_for_the_null_with_the_image():
    """As in the pipeline of diffusers: what the text is compared with has the negative text, and the image."""
    negative = {"label": torch.tensor([1, 1])}
    chain = chain_of(absorbing.Sampling(guidance=3.0, image_guidance=1.5), BATCH | BOXES, negative)
    assert torch.equal(chain.raw[0]["label"], negative["label"]) and {*chain.raw[0]} == {"label"}
    assert torch.equal(chain.raw[1]["label"], negative["label"]) and {*chain.raw[1]} == {"label", "image"}
    assert torch.equal(chain.raw[2]["label"], BATCH["label"])
    assert chain_of(absorbing.Sampling(image_guidance=1.5), BATCH | BOXES, negative).raw[0] == {}


def test_equal_scales_give_the_samples_of_one_scale():
    sampler = build(ddpm)

    def sample(**settings):
        options = ddpm.Sampling(sample_steps=2, **settings)
        return sampler.sample(sampler.network, Streams([1, 2]), batch=BATCH, options=options)

    one = sample(guidance=2.0)
    assert torch.equal(sample(guidance=2.0, image_guidance=2.0), one)
    assert not torch.equal(sample(guidance=2.0, image_guidance=9.0), one)


def test_models_of_images_alone_have_the_image_scale_alone():
    sampler = build(ddpm, n_classes=0)
    batch = {"condition_image": BATCH["condition_image"]}

    def sample(**settings):
        options = ddpm.Sampling(sample_steps=2, **settings)
        return sampler.sample(sampler.network, Streams([1, 2]), batch=batch, options=options)

    assert torch.equal(sample(image_guidance=3.0), sample(guidance=3.0))
    with pytest.raises(ValueError, match="2.0 and image_guidance 3.0 for a model of images alone.*pass --guidance 1"):
        sample(guidance=2.0, image_guidance=3.0)


def test_an_image_scale_needs_an_image_and_its_null():
    options, settings = absorbing.Sampling(image_guidance=2.0), {"batch": None, "rng": Streams([1, 2])}
    sampler = build(absorbing)
    with pytest.raises(ValueError, match="got image_guidance 2.0 without a condition: leave --image_guidance out"):
        sampler.sample(sampler.network, options=options, **settings)
    settings["batch"] = BATCH
    never = build(absorbing, condition_drop=0.0)
    with pytest.raises(ValueError, match="image_guidance 2.0, but .* condition_drop 0.*null of condition_image untr"):
        never.sample(never.network, options=options, **settings)
    kept = absorbing.Sampling(guidance=3.0, image_guidance=1.0, solver="halton", sample_steps=1)
    never.sample(never.network, options=kept, **settings)  # the image is never null
    with pytest.raises(ValueError, match="image_guidance 1.0 for a model without conditions of images: leave --image"):
        labelled = absorbing.build(absorbing.Config(**TRANSFORMER), codes=CODES, grid=GRID, n_classes=CLASSES)
        labelled.sample(labelled.network, options=kept, **settings)


def test_training_drops_the_image_and_the_class_independently():
    """The shares of Brooks et al. 2023 are 5 % for each alone and both; here both are the product."""
    config = ConditionsConfig(label_drop=0.25, condition_drop=0.4)
    encoders = build(absorbing).network.encoders
    drops = draw_drops(config, encoders, lambda name: Streams([seed_of(0, name, i) for i in range(4000)]), 4000)
    both = (drops["label"] & drops["image"]).float().mean().item()
    assert abs(both - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    assert abs((drops["image"] & ~drops["label"]).float().mean().item() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_settings_without_guidance_scale_no_image():
    settings = ddpm.Sampling(guidance=2.0, image_guidance=3.0, clip=False)
    assert settings.is_guided and ddpm.Sampling(image_guidance=0.0).is_guided
    assert not ddpm.Sampling(image_guidance=1.0).is_guided
    assert settings.without_guidance() == ddpm.Sampling(clip=False)
