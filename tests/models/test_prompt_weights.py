"""Embeddings of weighted prompts, against those of the web UI and of compel with the same text encoder."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.text_weights import tiny_clip, tiny_openclip
from helpers.tiny_minilm import tiny_bert, use_vocabulary
from models.bert import Bert
from models.conditions.text import CaptionEncoder
from models.prompt_weights import PromptRules, encode_prompts, scale_tokens
from models.text_encoder import TextEncoder, TextEncoderConfig
from models.tokenizer import Tokenizer

PROMPTS = Path(__file__).parents[1] / "fixtures" / "prompts"
CASES = json.loads((PROMPTS / "prompts.json").read_text())
ORACLE = np.load(PROMPTS / "embeddings.npz")  # every fourth of 32 numbers of each token
TINY_IDS = {real: tiny for tiny, real in enumerate(json.loads((PROMPTS / "vocab_ids.json").read_text()))}
TOKENIZER = Tokenizer()


def embed_with(encoder: TextEncoder):
    """The text encoder of a fixture, which has embeddings of some of the real ids; others share them."""

    def embed(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        return encoder(
            torch.tensor([[TINY_IDS.get(each, each % 380) for each in row] for row in ids.tolist()]), seen
        ).tokens

    return embed


CLIP = embed_with(tiny_clip())


def encode(*prompts: str, embed=CLIP, **rules: object) -> tuple[Tensor, Tensor]:
    return encode_prompts(prompts, TOKENIZER, embed, PromptRules(**rules))


@pytest.fixture
def is_close(agrees):
    return lambda got, name: agrees(got[..., ::4], torch.from_numpy(ORACLE[name]), f"prompts: {name}")


@pytest.mark.parametrize("name", CASES["a1111"])
def test_a1111_embeddings_are_those_of_the_web_ui(name, is_close):
    assert is_close(encode(CASES["a1111"][name], syntax="a1111")[0], f"a1111_{name}")


def test_a1111_embeddings_of_other_encoders_and_without_the_mean(is_close):
    prompt, long = CASES["a1111"]["explicit"], CASES["a1111"]["long_weighted"]
    assert is_close(encode(prompt, syntax="a1111", restore_mean=False)[0], "a1111_explicit_nonorm")
    skipping, openclip = embed_with(tiny_clip(clip_skip=2)), embed_with(tiny_openclip(clip_skip=2))
    assert is_close(encode(prompt, embed=skipping, syntax="a1111")[0], "a1111_explicit_clipskip2")
    assert is_close(encode(long, embed=openclip, syntax="a1111", pad_id=0)[0], "a1111_sd2_long_weighted")


@pytest.mark.parametrize("name", CASES["compel"])
def test_compel_embeddings_are_those_of_compel(name, is_close):
    assert is_close(encode(CASES["compel"][name], syntax="compel")[0], f"compel_{name}")


def test_long_plain_prompts_are_those_of_compel_without_rules(is_close):
    assert is_close(encode(CASES["compel"]["long"])[0], "compel_long_brutal")
    assert is_close(encode(CASES["compel"]["long"], syntax="compel", split="length")[0], "compel_long_brutal")


def test_shorter_prompts_may_be_padded_with_the_empty_text(is_close):
    z, mask = encode(CASES["compel"]["long"], CASES["compel_negative"], syntax="compel", pad_with_empty=True)
    assert is_close(z[1:], "compel_negative_padded") and mask.all()


def test_shorter_prompts_of_a_batch_are_masked():
    z, mask = encode("a cat BREAK a dog", "a (cat:1.5)", syntax="a1111")
    assert z.shape == (2, 154, 32) and mask.sum(1).tolist() == [154, 77]
    assert mask[1, :77].all() and (z[1, 77:] == 0).all()
    padded, all_there = encode("a cat BREAK a dog", "a (cat:1.5)", syntax="a1111", pad_with_empty=True)
    assert torch.equal(padded[1, 77:], encode("")[0][0]) and all_there.all()
    assert torch.equal(padded[0], z[0]) and torch.equal(padded[1, :77], z[1, :77])


@pytest.mark.parametrize("syntax", ["plain", "a1111", "compel"])
def test_a_prompt_does_not_depend_on_the_others(syntax):
    """The web UI restores the mean of a batch."""
    prompts = ["a (cat:1.4) and a (dog)1.5 on (grass)0.5", "(a (red hat:1.9)1.8)", "a cat, a dog, " * 12]
    together, mask = encode(*prompts, syntax=syntax)
    for row, prompt in enumerate(prompts):
        alone, there = encode(prompt, syntax=syntax)
        assert torch.equal(together[row, : alone.shape[1]], alone[0]) and mask[row].sum() == there.sum()


def test_weights_of_one_change_nothing():
    plain = encode("a cat and a dog")[0]
    for prompt, syntax in (("a (cat:1) and a dog", "a1111"), ("a (cat)1 and a dog", "compel")):
        assert torch.equal(encode(prompt, syntax=syntax)[0], plain)


def test_the_mean_is_restored_in_each_chunk():
    z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) + 1
    weights = torch.ones(2, 7)
    weights[0, 2:4], weights[1, 1] = 1.6, 0.3
    scaled = scale_tokens(z, weights)
    torch.testing.assert_close(scaled.mean((1, 2)), z.mean((1, 2)))
    ratios = scaled / (z * weights.unsqueeze(-1))
    assert (ratios.std((1, 2)) < 1e-5).all() and abs(ratios[0, 0, 0] - ratios[1, 0, 0]) > 0.1
    assert torch.equal(scale_tokens(z, weights, restore_mean=False), z * weights.unsqueeze(-1))


def test_a_mean_of_about_zero_scales_nothing():
    """The factor would be huge, or negative: the web UI then gives noise."""
    z = torch.tensor([[[2.0], [-1.0], [-1.0 + 1e-4]], [[2.0], [-1.0], [-0.9]], [[1.0], [-1.0], [0.0]]])
    weights = torch.tensor([[1.2, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 1.0]])
    scaled = scale_tokens(z, weights)
    assert torch.equal(scaled, z * weights.unsqueeze(-1))
    assert abs(z[0].mean() / scaled[0].mean()) < 1e-3 and z[1].mean() / scaled[1].mean() < 0


def test_weights_above_one_move_away_from_the_empty_text():
    plain, empty = encode("a cat on grass")[0], encode("")[0]
    got = encode("a (cat)1.5 on grass", syntax="compel")[0]
    torch.testing.assert_close(got[0, 2], empty[0, 2] + 1.5 * (plain[0, 2] - empty[0, 2]))
    others = torch.arange(77) != 2
    assert torch.equal(got[:, others], plain[:, others])


def test_weights_below_one_average_with_the_text_without_words():
    calls = []

    def embed(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        calls.append(seen)
        return CLIP(ids, seen)

    plain, empty = encode("a cat on grass")[0], encode("")[0]
    got = encode("a (cat)0.2 on (grass)0.7", embed=embed, syntax="compel")[0]
    masks = [seen[0] for seen in calls if seen is not None]
    assert [(~mask).nonzero().flatten().tolist() for mask in masks] == [[2], [4]]
    ids = torch.tensor([[TOKENIZER.start_id, *TOKENIZER.encode("a cat on grass"), *[TOKENIZER.end_id] * 72]])
    weights = torch.ones(77, 1)
    weights[2], weights[4] = 0.2, 0.7
    versions = [plain, *(CLIP(ids, mask[None]) for mask in masks)]
    shares = [1, math.tan(0.8 * math.pi / 2), math.tan(0.3 * math.pi / 2)]
    moved = [share * (empty + weights * (each - empty)) for share, each in zip(shares, versions, strict=True)]
    torch.testing.assert_close(got, sum(moved) / sum(shares), atol=1e-5, rtol=0)


def test_a_light_piece_over_two_chunks_hides_no_start_or_end():
    calls = []

    def embed(ids: Tensor, seen: Tensor | None = None) -> Tensor:
        calls.append((ids, seen))
        return torch.zeros(*ids.shape, 2)

    encode("dog " * 70 + "(" + "cat " * 10 + ")0.5", embed=embed, syntax="compel", split="length")
    (ids, seen), *others = [(ids, seen) for ids, seen in calls if seen is not None]
    assert not others and len(ids) == 2
    assert torch.equal(~seen, ids == TOKENIZER.encode("cat")[0]) and (~seen).sum(1).tolist() == [5, 5]


def test_words_of_weight_zero_are_gone():
    got = encode("a cat (red hat)0", syntax="compel")[0]
    assert got.isfinite().all()
    unseen = torch.ones(1, 77, dtype=torch.bool)
    unseen[0, 3:5] = False
    ids = torch.tensor([[TOKENIZER.start_id, *TOKENIZER.encode("a cat red hat"), *[TOKENIZER.end_id] * 72]])
    others = torch.tensor([i for i in range(77) if i not in (3, 4)])
    torch.testing.assert_close(got[:, others], CLIP(ids, unseen)[:, others], atol=1e-3, rtol=0)


def test_an_empty_piece_of_low_weight_changes_nothing():
    assert torch.equal(encode('a cat ""0.5', syntax="compel")[0], encode("a cat")[0])


def test_blend_is_a_mean_and_clauses_are_a_sequence():
    cube, ball = encode("a red cube")[0], encode("a blue ball")[0]
    blend = encode('("a red cube", "a blue ball").blend(1, 3)', syntax="compel")[0]
    torch.testing.assert_close(blend, cube / 4 + ball * 3 / 4)
    assert torch.equal(encode('("a red cube", "a blue ball").and()', syntax="compel")[0], torch.cat([cube, ball], 1))
    long = encode('("a cat, a dog, a cat", "a blue ball").blend(1, 1)', syntax="compel")[0]
    assert long.shape[1] == 77


@pytest.mark.parametrize("texts", [("a cat", "a cat a dog " * 20), ("a cat a dog " * 20, "a cat")])
def test_the_shorter_text_of_a_mean_ends_in_the_empty_text(texts):
    first, second = texts
    got = encode(f'("{first}", "{second}").blend(1, 3)', syntax="compel")[0]
    one, other = encode(first, second, syntax="compel", pad_with_empty=True)[0]
    assert got.shape == (1, 154, 32)
    torch.testing.assert_close(got[0], one / 4 + other * 3 / 4)


def test_a_mean_is_read_as_far_as_the_longest_text():
    mask = encode('("a cat", "a cat on a mat", "a").blend(1, 1, 1)', syntax="compel", mask_padding=True)[1]
    assert mask[0].tolist() == [True] * 7 + [False] * 70


def small_encoder(_) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(TextEncoderConfig(width=16, layers=2, heads=2)).eval()


def small_bert(patch) -> Bert:
    use_vocabulary(patch)
    return tiny_bert()


@pytest.mark.parametrize(("build", "lengths"), [(small_encoder, [94, 4]), (small_bert, [200, 6])])
@pytest.mark.parametrize("syntax", ["plain", "a1111", "compel"])
def test_padding_is_masked_for_encoders_that_are_trained_so(build, lengths, syntax, monkeypatch):
    """As captions in training: the same numbers where the mask is True."""
    network, captions = build(monkeypatch), ["a cat " * 45, "a dog"]
    rules = PromptRules(syntax=syntax, split="length", length=network.config.length, mask_padding=True)
    z, mask = encode_prompts(captions, network.tokenizer, lambda ids, seen=None: network(ids, seen).tokens, rules)
    values, present = CaptionEncoder(network).eval().encode({"caption": captions}, torch.zeros(2, 3, 8, 8))
    assert mask.sum(1).tolist() == present.sum(1).tolist() == lengths
    for row in range(2):
        torch.testing.assert_close(z[row, mask[row]], values[row, present[row]], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_weights_of_prompts_for_bert(monkeypatch):
    """Without weight a piece is gone: the other tokens are those of the text in which none attends to it."""
    network = small_bert(monkeypatch)
    rules = {syntax: PromptRules(syntax=syntax, length=20, mask_padding=True) for syntax in ("a1111", "compel")}

    def encode(prompt: str, syntax: str) -> Tensor:
        return encode_prompts([prompt], network.tokenizer, lambda *args: network(*args).tokens, rules[syntax])[0][0]

    plain, heavier = encode("a red star", "a1111"), encode("a (red:1.4) star", "a1111")
    factors = heavier / plain
    assert torch.allclose(factors[2] / factors[1], torch.tensor(1.4), atol=1e-5)
    ids = torch.tensor([[101, *network.tokenizer.encode("a red star"), 102, *[0] * 15]])
    seen = torch.arange(20) != 2
    without = encode("a (red)0 star", "compel")
    assert torch.allclose(without[[0, 1, 3, 4]], network(ids, seen[None]).tokens[0, [0, 1, 3, 4]], atol=1e-4)
    assert not torch.allclose(without[1], plain[1], atol=1e-3)


def test_other_lengths_of_chunks():
    z, mask = encode("a cat a dog", length=4, mask_padding=True)
    assert z.shape == (1, 8, 32) and mask.all()


def test_the_option_of_another_syntax_is_refused():
    with pytest.raises(ValueError, match="got no restore_mean for prompt_syntax plain"):
        PromptRules(restore_mean=False)
