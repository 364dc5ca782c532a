"""BERT's encoder (Devlin et al. 2019): text -> a vector for each token, from the tokens before and after it.

Shapes: B batch, L tokens with start and end, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.blocks import FeedForward, init_normal
from models.ranges import SIZE, check_ranges
from models.text_encoder import TextFeatures
from models.wordpiece import WordPiece

EPS = 1e-12  # of the norms
LAYER = {  # names in a layer of transformers' BertModel, and here
    **{"attention.output.dense": "attention.proj", "attention.output.LayerNorm": "norm1"},
    **{"intermediate.dense": "feed_forward.expand", "output.dense": "feed_forward.contract"},
    **{"output.LayerNorm": "norm2"},
}


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Options of a `Bert`."""

    width: int
    layers: int
    heads: int
    length: int  # L at most
    vocab_size: int = WordPiece.vocab_size

    RANGES = dict.fromkeys(("width", "layers", "heads", "length", "vocab_size"), SIZE)

    def __post_init__(self):
        check_ranges(self)


MINILM_L6 = BertConfig(width=384, layers=6, heads=12, length=256)  # all-MiniLM-L6-v2


class BertBlock(nn.Module):
    """Post-norm transformer block: x = norm(x + attention(x)), then norm(x + feed_forward(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, EPS)
        self.feed_forward = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, D), mask (B, L) bool, False for tokens that none attends to -> (B, L, D)."""
        x = self.norm1(x + self.attention(x, mask=mask))
        return self.norm2(x + self.feed_forward(x))


class Bert(nn.Module):
    """Transformer with learned positions, of one sentence: all tokens are of type 0, whose vector is in the positions.

    No token attends to padding, the id 0.
    """

    tokenizer: ClassVar[WordPiece] = WordPiece()

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.length, config.width))
        self.norm = nn.LayerNorm(config.width, EPS)
        self.blocks = nn.ModuleList(BertBlock(config.width, config.heads) for _ in range(config.layers))
        self.apply(init_normal)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextFeatures:
        """Encodes ids (B, L) int64, which begin with the start token and may end with padding.

        `mask` (B, L) bool is False for further tokens that no other attends to. `pooled` (B, D) is the mean of the
        tokens that are attended to, of length 1. ValueError for more tokens than there are positions.
        """
        if ids.ndim != 2 or ids.shape[1] > self.config.length:
            got = f"got ids {tuple(ids.shape)}, wanted (B, L) with at most {self.config.length} tokens"
            raise ValueError(f"{got}: split a longer text into chunks with a start and an end each")
        present = ids != WordPiece.pad_id
        mask = present if mask is None else present & mask
        x = self.norm(self.token(ids) + self.position[: ids.shape[1]])  # (B, L, D)
        for block in self.blocks:
            x = block(x, mask)
        share = mask / mask.sum(1, keepdim=True).clamp(min=1)  # (B, L)
        return TextFeatures(x, F.normalize((share.unsqueeze(-1) * x).sum(1), dim=-1))


def bert_tensors(weights: Mapping[str, Tensor], config: BertConfig) -> dict[str, Tensor]:
    """Returns the tensors of a `Bert`, of any shapes, from those of transformers' BertModel.

    KeyError if one is missing. The pooler and positions beyond the length are left out.
    """
    positions = weights["embeddings.position_embeddings.weight"][: config.length]
    ours = {
        "token.weight": weights["embeddings.word_embeddings.weight"],
        "position": positions + weights["embeddings.token_type_embeddings.weight"][0],
    }
    for part in ("weight", "bias"):
        ours[f"norm.{part}"] = weights[f"embeddings.LayerNorm.{part}"]
        for i in range(config.layers):
            layer = f"encoder.layer.{i}."
            qkv = [weights[f"{layer}attention.self.{each}.{part}"] for each in ("query", "key", "value")]
            ours[f"blocks.{i}.attention.qkv.{part}"] = torch.cat(qkv)
            ours |= {f"blocks.{i}.{new}.{part}": weights[f"{layer}{old}.{part}"] for old, new in LAYER.items()}
    return ours
