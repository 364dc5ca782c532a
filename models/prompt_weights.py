"""Embeddings of prompts with weights, by the rules of the web UI (A1111) and of compel.

Shapes: B prompts, C chunks of L places, D width; a text encoder of 77 places gives (B, 77 C, D).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from models.prompt_syntax import Clause, Piece, Text
from models.prompts import MARKER, Chunks, PromptTokenizer, chunk_text, parse_prompt
from models.text_encoder import CHUNK

LARGEST_FACTOR = 4.0  # by which the mean of a chunk is restored; beyond, its mean is about 0, and it stays as it is
SMALLEST_WEIGHT = 1e-5  # of down-weighted pieces: the tangent of a weight of 0 is infinite
EMPTY: Text = ((Piece(""),),)
DEFAULT_SPLITS = {"plain": "length", "a1111": "comma", "compel": "sentence"}


class Embed(Protocol):
    """A text encoder: ids (N, L), and which of them others attend to, (N, L) bool or None for all -> (N, L, D)."""

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PromptRules:
    """How prompts become embeddings. ValueError for options of another syntax."""

    syntax: Literal["plain", "a1111", "compel"] = "plain"
    split: Literal["length", "comma", "sentence", "phrase", "word"] | None = None  # default: that of the syntax
    restore_mean: bool = True  # a1111: scale each chunk so that weights leave the mean of its numbers as it was
    length: int = CHUNK  # L
    pad_id: int | None = None  # after the end of a chunk; default: that of the tokenizer
    mask_padding: bool = False  # the mask leaves padding of chunks out, as encoders trained here need it
    pad_with_empty: bool = False  # shorter prompts of a batch get embeddings of the empty text, instead of a mask

    def __post_init__(self):
        if not self.restore_mean and self.syntax != "a1111":
            raise ValueError(f"got no restore_mean for prompt_syntax {self.syntax}, wanted a1111: leave it out")


DEFAULT_RULES = PromptRules()


class Encoded(NamedTuple):
    """An encoded text or prompt."""

    z: Tensor  # (C, L, D)
    mask: Tensor  # (C, L) bool, which places are read


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str], tokenizer: PromptTokenizer, embed: Embed, rules: PromptRules = DEFAULT_RULES
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings of B prompts of any length, (B, C L, D), and which of them are read, (B, C L) bool.

    C is the number of chunks of the longest prompt. Shorter ones end with zeros that the mask leaves out or, with
    `pad_with_empty`, with chunks of the empty text. The embeddings of a prompt do not depend on the others.
    ValueError: a prompt that its syntax does not allow.
    """
    empty = encode_text(EMPTY, tokenizer, embed, rules, None)
    parsed = {prompt: parse_prompt(prompt, rules.syntax) for prompt in prompts}
    encoded = {
        prompt: cat_encoded([encode_clause(clause, tokenizer, embed, rules, empty) for clause in clauses])
        for prompt, clauses in parsed.items()
    }
    longest = max(len(each.z) for each in encoded.values())
    if rules.pad_with_empty:
        encoded = {prompt: pad_with_empty(each, empty, longest) for prompt, each in encoded.items()}
    z = [pad(encoded[prompt].z, (0, 0, 0, 0, 0, longest - len(encoded[prompt].z))) for prompt in prompts]
    mask = [pad(encoded[prompt].mask, (0, 0, 0, longest - len(encoded[prompt].mask))) for prompt in prompts]
    return torch.stack(z).flatten(1, 2), torch.stack(mask).flatten(1)


def encode_clause(
    clause: Clause, tokenizer: PromptTokenizer, embed: Embed, rules: PromptRules, empty: Encoded
) -> Encoded:
    """Encodes the texts of a clause, shorter ones followed by the empty text, and takes their mean."""
    texts = [encode_text(text, tokenizer, embed, rules, empty.z) for text in clause.texts]
    longest = max(len(text.z) for text in texts)
    texts = [pad_with_empty(text, empty, longest) for text in texts]
    z = texts[0].z
    if len(texts) > 1 or clause.shares != (1.0,):
        z = sum(share * text.z for share, text in zip(clause.shares, texts, strict=True))
    if clause.weight != 1:
        z = empty.z + clause.weight * (z - empty.z)
    return Encoded(z, torch.stack([text.mask for text in texts]).any(0))


def encode_text(
    text: Text, tokenizer: PromptTokenizer, embed: Embed, rules: PromptRules, empty: Tensor | None
) -> Encoded:
    """Encodes a text with its weights; `empty` (1, L, D) is the empty text, None for itself."""
    split = rules.split or DEFAULT_SPLITS[rules.syntax]
    chunks = chunk_text(text, tokenizer, split, rules.length, rules.pad_id)
    z = embed(chunks.ids)  # (C, L, D)
    if rules.syntax == "a1111":
        z = scale_tokens(z, chunks.weights, rules.restore_mean)
    if rules.syntax == "compel" and empty is not None:
        z = weight_from_empty(z, empty, chunks, embed)
    places = torch.arange(rules.length)
    last = chunks.ends if rules.mask_padding else torch.full_like(chunks.ends, rules.length - 1)
    return Encoded(z, (places <= last[:, None]).to(z.device))


def cat_encoded(parts: Sequence[Encoded]) -> Encoded:
    """Joins the chunks of parts."""
    return Encoded(torch.cat([part.z for part in parts]), torch.cat([part.mask for part in parts]))


def pad_with_empty(text: Encoded, empty: Encoded, count: int) -> Encoded:
    """Appends the empty text up to a number of chunks."""
    return cat_encoded([text, *[empty] * (count - len(text.z))])


def scale_tokens(z: Tensor, weights: Tensor, restore_mean: bool = True) -> Tensor:
    """Multiplies the embeddings z (C, L, D) of tokens by weights (C, L), as the web UI does.

    Each chunk is then scaled so that the mean of its numbers is as before. Where that needs a factor outside
    1 / LARGEST_FACTOR to LARGEST_FACTOR, as with a mean of about 0, the chunk is not scaled. (The web UI takes the mean
    over all prompts of a batch, and any factor.)
    """
    weights = weights.to(z).unsqueeze(-1)
    scaled = z * weights
    if not restore_mean:
        return scaled
    factor = z.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True)  # (C, 1, 1); NaN for 0 / 0
    usable = (factor >= 1 / LARGEST_FACTOR) & (factor <= LARGEST_FACTOR)
    return scaled * torch.where(usable, factor, 1.0)


def weight_from_empty(z: Tensor, empty: Tensor, chunks: Chunks, embed: Embed) -> Tensor:
    """Weights the embeddings z (C, L, D) of a text as compel does.

    Each token moves along the line from the `empty` text (1, L, D) through z, to w times its distance. For each piece
    with a weight w < 1, the result is then averaged with the same text in which no token attends to that piece, with
    the share tan((1 - w) pi / 2) beside 1. (Compel also masks the ends of chunks that such a piece crosses.)
    """
    weights = chunks.weights.to(z).unsqueeze(-1)

    def move(z: Tensor) -> Tensor:
        return torch.where(weights == 1, z, empty + weights * (z - empty))

    total, shares = move(z), 1.0
    light = chunks.pieces[(chunks.weights < 1) & (chunks.pieces != MARKER)]
    for piece in light.unique().tolist():
        seen = chunks.pieces != piece  # (C, L)
        rows = ~seen.all(1)
        without = z.clone()
        without[rows.to(z.device)] = embed(chunks.ids[rows], seen[rows])
        weight = chunks.weights[~seen][0].item()
        share = math.tan((1 - max(weight, SMALLEST_WEIGHT)) * math.pi / 2)
        total, shares = total + share * move(without), shares + share
    return total / shares
