"""Captions in samplers of pixels and of codes, as tokens and as a pooled vector too: training, guidance, equal rows."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion.rng import Streams
from models.conditions import text
from models.kv_cache import KVCache
from train.data.streams import TrainingStreams
from train.samplers import absorbing, autoregressive, ddpm

OPTIONS = text.Config(text_width=16, text_layers=1, text_heads=2)
CODES = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
UNET = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "heads": 1, "total_steps": 20}
LONG = " ".join(["a red star and a blue ring"] * 25)  # 150 words


def build(kind, pooled=False, **options):
    """A sampler with random weights."""
    torch.manual_seed(0)
    options = {"condition_options": replace(OPTIONS, text_pooled=pooled)} | options | {"conditions": ("text",)}
    if kind == "ddpm":
        config = ddpm.Config(**UNET, attn_block_type="transformer", **options)
        sampler = ddpm.build(config, shape=(3, 4, 4), pixels=True, n_classes=0)
    else:
        module = {"absorbing": absorbing, "autoregressive": autoregressive}[kind]
        sampler = module.build(module.Config(**CODES, **options), codes=7, grid=(4, 4), n_classes=0)
    for parameter in sampler.network.parameters():
        nn.init.normal_(parameter, std=0.3)
    sampler.network.eval()
    return sampler


def sampling(kind, **options):
    if kind == "autoregressive":
        return autoregressive.Sampling(**options)
    return {"ddpm": ddpm, "absorbing": absorbing}[kind].Sampling(sample_steps=4, **options)


def sample(sampler, kind, captions, seeds=None, **options):
    rng = Streams(list(range(len(captions))) if seeds is None else seeds)
    return sampler.sample(sampler.network, rng, options=sampling(kind, **options), batch={"caption": captions})


def data(kind, count):
    generator = torch.manual_seed(1)
    if kind == "ddpm":
        return {"x0": torch.randn(count, 3, 4, 4, generator=generator)}
    return {"codes": torch.randint(7, (count, 4, 4), generator=generator)}


KINDS = pytest.mark.parametrize("kind", ["ddpm", "absorbing", "autoregressive"])
POOLED = pytest.mark.parametrize("pooled", [False, True])


@KINDS
@POOLED
def test_one_field_is_the_condition(kind, pooled):
    sampler = build(kind, pooled)
    assert sampler.conditions == ("caption",) and sampler.network.encoders.token_width == 16


@KINDS
@POOLED
def test_training_teaches_words_of_the_captions_alone(kind, pooled):
    """The embeddings of all words get a gradient, in every chunk; those of other words do not; nor dropped ones."""
    captions = ["a red star", LONG]
    for drop, learns in ((0.0, True), (0.9999, False)):
        sampler = build(kind, pooled, condition_drop=drop)
        ids, mask = text.tokenize(captions, 77)
        batch = {**data(kind, 2), "caption": ids, "caption_mask": mask, "position": torch.arange(2)}
        loss = sampler.loss(sampler.network.train(), batch, TrainingStreams(0, batch, 2, torch.device("cpu")))
        loss.per_example.mean().backward()
        encoder = sampler.network.encoders["text"]
        gradients = encoder.encoder.token.weight.grad.abs().sum(1)
        words = torch.tensor(encoder.tokenizer.encode("a red star and blue ring"))
        other = torch.tensor(encoder.tokenizer.encode("bus"))
        assert (gradients[words] > 0).all() == learns and not gradients[other].any()
        assert bool(encoder.null.grad.any()) == (not learns)


@KINDS
@POOLED
def test_images_follow_their_captions_whatever_the_batch(kind, pooled):
    sampler = build(kind, pooled)
    together = sample(sampler, kind, ["a red star", LONG, "a bus"])
    alone = sample(sampler, kind, [LONG], seeds=[1])
    assert torch.allclose(together[1].double(), alone[0].double(), atol=1e-4)
    first, *others = (sample(sampler, kind, [each] * 8) for each in ("a red star", "a bus", "two owls", "seven", LONG))
    assert not all(torch.equal(first, other) for other in others)


@KINDS
@POOLED
def test_guidance_moves_away_from_the_null(kind, pooled):
    """Guidance 0 ignores captions, 1 leaves out the null, and 3 goes beyond both."""
    sampler = build(kind, pooled)
    zero = [sample(sampler, kind, [each], guidance=0.0) for each in ("a red star", LONG)]
    assert torch.equal(*zero)
    plain, strong = (sample(sampler, kind, ["a red star"] * 4, guidance=scale) for scale in (1.0, 3.0))
    assert not torch.equal(plain, strong)


@KINDS
@POOLED
def test_samplers_read_padding(kind, pooled):
    """Training, with dropped captions, and guidance, whose halves have other numbers of chunks."""
    padded = replace(OPTIONS, text_pooled=pooled, text_null="empty", text_padding="end")
    sampler = build(kind, condition_options=padded, condition_drop=0.5)
    ids, mask = text.tokenize(["a red star", LONG] * 4, 77, pad_id=49407)
    batch = {**data(kind, 8), "caption": ids, "caption_mask": mask, "position": torch.arange(8)}
    loss = sampler.loss(sampler.network.train(), batch, TrainingStreams(0, batch, 8, torch.device("cpu")))
    loss.per_example.mean().backward()
    encoder = sampler.network.encoders["text"].encoder
    assert encoder.token.weight.grad[49407].any() and encoder.position.grad[76].any()
    sampler.network.eval()
    together = sample(sampler, kind, ["a red star", LONG, "a bus"], guidance=3.0)
    alone = sample(sampler, kind, ["a red star"], guidance=3.0)
    assert torch.allclose(together[0].double(), alone[0].double(), atol=1e-4)


@POOLED
def test_cached_codes_have_the_logits_of_whole_grids(pooled):
    sampler, kv_cache = build("autoregressive", pooled), KVCache((4, 4))
    network, codes = sampler.network, data("autoregressive", 2)["codes"]
    condition = network.encode({"text": ["a red star", LONG]}, codes)
    expected = network(codes, condition).flatten(1, 2)
    for place in range(16):
        logits = network(codes.flatten(1)[:, :place], condition, kv_cache)
        assert torch.allclose(logits, expected[:, place], atol=1e-4)


@POOLED
def test_equal_captions_share_a_call_and_different_ones_do_not(pooled):
    """In the first call all codes are masked: rows differ by their captions alone."""
    sampler, rows = build("absorbing", pooled), []
    sampler.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    for captions, expected in ((["a bus"] * 4, 1), (["a bus", "A BUS", LONG, LONG], 2), (["a", "b", "c", LONG], 4)):
        rows.clear()
        sample(sampler, "absorbing", captions)
        assert rows[0] == expected
        rows.clear()
        sample(sampler, "absorbing", captions, guidance=2.0)  # and the null
        assert rows[0] == expected + 1


@KINDS
@POOLED
def test_likelihoods_take_captions(kind, pooled):
    sampler = build(kind, pooled)
    field = "x0" if kind == "ddpm" else "codes"
    batch = {field: data(kind, 1)[field].clamp(-1, 1).expand(2, *[-1] * (3 if kind == "ddpm" else 2))}
    bound = sampler.log_likelihood(sampler.network, batch | {"caption": ["a red star", LONG]}, Streams([0, 0]), 2)
    assert bound.total.shape == (2,) and bound.total[0] != bound.total[1]
