"""Transformers that encode text: those of CLIP (Radford et al. 2021) and OpenCLIP (Cherti et al. 2023), of any size.

Shapes: B batch, L tokens with start and end, D width, C chunks of a long text.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, starmap
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, FullAttention
from models.blocks import FeedForward, init_normal
from models.ranges import COUNT_OR_ZERO, SIZE, SIZE_OR_ZERO, check_ranges
from models.tokenizer import Tokenizer, expand_words

VOCABULARY = "[1, 1048576]"  # of the number of ids
CHUNK = 77  # tokens that CLIP's encoders have learned positions for, start and end included


class TextFeatures(NamedTuple):
    """Encoded text."""

    tokens: Tensor  # (B, L, D)
    pooled: Tensor  # (B, D), or (B, projection): the whole text


class QuickGELU(FeedForward):
    """Two-layer perceptron with x sigmoid(1.702 x) for GELU, (..., D) -> (..., D), as OpenAI's CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        return self.contract(hidden * torch.sigmoid(1.702 * hidden))


ACTIVATIONS = {"gelu": FeedForward, "quick_gelu": QuickGELU}


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Options of a text encoder; the defaults suit one trained from scratch. ValueError if they do not fit together."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    vocab_size: int = Tokenizer.vocab_size
    length: int = CHUNK  # L at most
    end_id: int = Tokenizer.end_id  # whose first token stands for the whole text
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    clip_skip: int = 1  # layer of the tokens, from the last: 1 is the last, 2 the one before it
    final_norm: bool = True  # of the tokens; the pooled vector always has it
    projection: int = 0  # width of the pooled vector's projection; 0: none
    added_words: tuple[str, ...] = ()  # of the tokenizer, whose ids follow the end; <l{0..9}> are ten of them

    RANGES = {
        **dict.fromkeys(("width", "layers", "heads", "length", "clip_skip"), SIZE),
        "vocab_size": VOCABULARY,
        "end_id": COUNT_OR_ZERO,
        "projection": SIZE_OR_ZERO,
    }

    def __post_init__(self):
        check_ranges(self)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"got activation {self.activation}, wanted one of {', '.join(ACTIVATIONS)}")
        if self.clip_skip > self.layers:
            raise ValueError(f"got clip_skip {self.clip_skip} of {self.layers} layers, wanted 1 to {self.layers}")
        if self.added_words and (last := max(self.added_ids.values())) >= self.vocab_size:
            got = f"got {len(self.added_ids)} added words after the end, {self.end_id}, and vocab_size"
            raise ValueError(f"{got} {self.vocab_size}, wanted an id for each: pass vocab_size {last + 1}")

    @property
    def added_ids(self) -> dict[str, int]:
        """The ids of the added words."""
        return {word: place for place, word in enumerate(expand_words(self.added_words), self.end_id + 1)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the options by name, as files and keys of caches have them: added words only if there are any."""
        return {name: value for name, value in asdict(self).items() if name != "added_words" or value}


CLIP_L = TextEncoderConfig(width=768, layers=12, heads=12, activation="quick_gelu")  # of Stable Diffusion 1
OPENCLIP_H = TextEncoderConfig(width=1024, layers=24, heads=16, clip_skip=2, projection=1024)  # 2


class TextBlock(nn.Module):
    """Pre-norm transformer block, causal: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, feed_forward: FeedForward):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, core=FullAttention(causal=True))
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), mask (B, L) bool, False for tokens that no other attends to -> (B, L, D)."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.feed_forward(self.norm2(x))


class ExtendedEmbedding(nn.Embedding):
    """An embedding with further rows, a parameter of their own: (...) ids -> (..., D).

    The table of the embedding (V, D) keeps its name and may stay frozen; the new rows (N, D), `new_tokens`, have the
    ids from V on.
    """

    def __init__(self, embedding: nn.Embedding, new_tokens: Tensor):
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        self.weight, self.new_tokens = embedding.weight, nn.Parameter(new_tokens)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids - self.num_embeddings
        known = super().forward(ids.clamp(max=self.num_embeddings - 1))
        return torch.where((rows >= 0).unsqueeze(-1), F.embedding(rows.clamp(min=0), self.new_tokens), known)


class TextEncoder(nn.Module):
    """Causal transformer with learned positions: ids (B, L) -> a vector for each token, and one for the text.

    A token does not depend on those after it, hence not on padding after the end.
    """

    tokenizer: ClassVar[Tokenizer] = Tokenizer()

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.end_id, config.added_ids)
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.length, config.width))
        feed_forward = ACTIVATIONS[config.activation]
        self.blocks = nn.ModuleList(
            TextBlock(config.width, config.heads, feed_forward(config.width)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None
        self.apply(init_normal)
        # Not N(0, 0.02^2): a few steps of Adam would add more to all texts alike than what tells them apart
        nn.init.normal_(self.token.weight)
        nn.init.normal_(self.position, std=0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> TextFeatures:
        """Encodes ids (B, L) int64, which begin with the start token and have an end token.

        `mask` (B, L) bool is False for tokens that no other attends to. `pooled` is the last layer at the first end
        token, or at the last token of a text without one. ValueError for more tokens than there are positions.
        """
        x = self.embed(ids)  # (B, L, D)
        hidden = []
        for block in self.blocks:
            x = block(x, mask)
            hidden.append(x)
        tokens, last = hidden[-self.config.clip_skip], self.norm(x)
        if self.config.final_norm:
            tokens = last if self.config.clip_skip == 1 else self.norm(tokens)
        return TextFeatures(tokens, self.pool(last, ids))

    def embed(self, ids: Tensor) -> Tensor:
        """Sums the embeddings of ids (B, L) and of their positions: (B, L, D)."""
        if ids.ndim != 2 or ids.shape[1] > self.config.length:
            raise ValueError(
                f"got ids {tuple(ids.shape)}, wanted (B, L) with at most {self.config.length} tokens: split a longer "
                "text into chunks with a start and an end each, and use encode_chunks"
            )
        return self.token(ids) + self.position[: ids.shape[1]]

    def new_embedding(self, like: str = "") -> Tensor:
        """Returns an embedding (D,) for a new word to start from: that of the word `like` or, without one, a random
        direction, from the global generator, with the mean norm of the embeddings that there are.

        ValueError for a word that is not a single token.
        """
        if like:
            ids = self.tokenizer.encode(like)
            if len(ids) != 1:
                raise ValueError(f"got {like!r} to start from, which is {len(ids)} tokens: wanted a word of one token")
            return self.token(torch.tensor(ids, device=self.position.device))[0].detach().clone()
        table = self.token.weight.detach()
        direction = torch.randn(table.shape[1]).to(table)
        return direction * (table.norm(dim=1).mean() / direction.norm())

    def add_words(self, words: Mapping[str, Tensor]) -> None:
        """Adds words with these embeddings to the vocabulary, (D,) for a word of one token, (N, D) for one of N; their
        ids follow those that there are.

        The embeddings are a parameter of their own, `token.new_tokens`. Other words keep their vectors to the bit.
        ValueError for words that are single tokens already, words that no text has, and another D.
        """
        known = self.token.new_tokens if isinstance(self.token, ExtendedEmbedding) else self.token.weight[:0]
        rows = {word: torch.atleast_2d(row) for word, row in words.items()}
        if wrong := [word for word, row in rows.items() if not len(row) or row.shape[1:] != known.shape[1:]]:
            got = f"got an embedding {tuple(words[wrong[0]].shape)} of {wrong[0]}"
            width = known.shape[1]
            raise ValueError(f"{got}, wanted ({width},) or (N, {width}): it is of another text encoder")
        stops = accumulate(map(len, rows.values()), initial=self.config.vocab_size + len(known))
        ids = dict(zip(words, starmap(range, pairwise(stops)), strict=True))
        added = self.tokenizer.added_ids
        tokenizer = Tokenizer(self.config.end_id, {**added, **ids})
        lower = {word: word.lower() for word in words}
        if there := [word for word, own in lower.items() if own in added or len(self.tokenizer.ids_of(own)) == 1]:
            got = f"got the new word {there[0]!r}, which is in the vocabulary"
            raise ValueError(f"{got}: choose another, such as <{there[0]}-1>")
        table = torch.cat([known.detach(), *(row.to(known) for row in rows.values())])
        self.token, self.tokenizer = ExtendedEmbedding(self.token, table), tokenizer

    def pool(self, last: Tensor, ids: Tensor) -> Tensor:
        """Returns the vectors (B, D) of the first end tokens, projected if there is a projection."""
        ends = ids == self.config.end_id
        place = torch.where(ends.any(1), ends.int().argmax(1), ids.shape[1] - 1)  # argmax: of the first
        pooled = last[torch.arange(len(ids), device=ids.device), place]
        return pooled if self.projection is None else self.projection(pooled)

    def encode_chunks(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encodes the chunks (B, C, L) of long texts, each with its own start and end: (B, C L, D).

        `mask` (B, C, L) as in `forward`; a chunk does not see the others.
        """
        chunks = self(ids.flatten(0, 1), None if mask is None else mask.flatten(0, 1)).tokens  # (B C, L, D)
        return chunks.view(len(ids), -1, chunks.shape[-1])
