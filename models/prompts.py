"""Prompts of any length for a text encoder of L places: chunks of L - 2 tokens, each with its own start and end.

Shapes: C chunks of L places: start, up to L - 2 tokens, end, padding. CLIP has 77 places.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.compel_syntax import parse_compel
from models.prompt_syntax import Prompt, Section, Text, parse_a1111, parse_plain
from models.registry import did_you_mean
from models.text_encoder import CHUNK

COMMA_REACH = 20  # tokens from the last comma to the end of a full chunk that may move to the next chunk
MARKER = -1  # in place of the number of a piece: start, end and padding
PARSERS: dict[str, Callable[[str], Prompt]] = {"plain": parse_plain, "a1111": parse_a1111, "compel": parse_compel}


class PromptTokenizer(Protocol):
    """A tokenizer such as `models.tokenizer.Tokenizer`."""

    start_id: int
    end_id: int
    pad_id: int  # after the end

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without start and end."""

    def words(self, text: str) -> list[tuple[str, slice]]:
        """Returns the words of a text and where the ids of each are."""


class Token(NamedTuple):
    """A token of a prompt."""

    id: int
    weight: float
    piece: int  # number of the piece it belongs to
    word: str | None  # the word that it ends; None within a word


class Chunks(NamedTuple):
    """The chunks of one text."""

    ids: Tensor  # (C, L) int64
    weights: Tensor  # (C, L) float32, 1 for start, end and padding
    pieces: Tensor  # (C, L) int64, the number of the piece that a token belongs to, or MARKER
    ends: Tensor  # (C,) int64, the place of the first end


def parse_prompt(text: str, syntax: str = "plain") -> Prompt:
    """Returns the clauses of a prompt, by the rules of a syntax: plain, a1111 or compel. Brackets of plain text are
    characters.

    ValueError for another syntax, and for what a syntax has and this project has not: prompts that change from step to
    step, and parts that are sampled apart.
    """
    if syntax not in PARSERS:
        raise ValueError(f"got prompt_syntax {syntax!r}{did_you_mean(syntax, PARSERS)}: choose {', '.join(PARSERS)}")
    return PARSERS[syntax](text)


def plain_words(prompt: Prompt) -> str:
    """Returns the words of a prompt without its syntax, as other text encoders read them: "a red cat" of "a (red:1.4)
    cat". Pieces, which are tokenized alone, are joined by spaces; those of no weight, or less, are left out."""
    words = []
    for clause in prompt:
        for text, share in zip(clause.texts, clause.shares, strict=True):
            pieces = [piece for section in text for piece in section]
            words += [piece.text.strip() for piece in pieces if clause.weight * share * piece.weight > 0]
    return " ".join(word for word in words if word)


class Word(NamedTuple):
    """A word of a prompt."""

    text: str
    places: tuple[int, ...]  # of its tokens among the C L of the prompt


def words_of_prompt(prompt: Prompt, tokenizer: PromptTokenizer, split: str, length: int = CHUNK) -> list[list[Word]]:
    """Returns the words of each text of a prompt, with the places of their tokens in the encoded prompt, (C L, D).

    The texts of a clause, whose mean is taken, have places in common.
    """
    words, first = [], 0
    for clause in prompt:
        texts = [split_text(text, tokenizer, split, length) for text in clause.texts]
        words += [words_of_chunks(chunks, first, length) for chunks in texts]
        first += length * max(map(len, texts))
    return words


def words_of_chunks(chunks: Sequence[Sequence[Token]], first: int, length: int) -> list[Word]:
    """Returns the words of a text whose first chunk begins at the place `first`."""
    words, places = [], []
    for number, chunk in enumerate(chunks):
        for place, token in enumerate(chunk, first + number * length + 1):
            places.append(place)
            if token.word is not None:
                words.append(Word(token.word, tuple(places)))
                places = []
    return words


def chunk_text(
    text: Text, tokenizer: PromptTokenizer, split: str, length: int = CHUNK, pad_id: int | None = None
) -> Chunks:
    """Returns the chunks of a text, at least one, of `length` places; each section begins one, and a last section
    without tokens has none.

    Longer sections are cut by the rule that `split` names, a key of SPLITS. After its end a chunk is filled with the
    tokenizer's padding, or with `pad_id`: 0 for weights of SD 2.
    """
    parts, room = split_text(text, tokenizer, split, length), length - 2
    pad = tokenizer.pad_id if pad_id is None else pad_id
    ids, weights, pieces = [], [], []
    for part in parts:
        empty = room - len(part)
        ids.append([tokenizer.start_id, *(token.id for token in part), tokenizer.end_id, *[pad] * empty])
        weights.append([1.0, *(token.weight for token in part), 1.0, *[1.0] * empty])
        pieces.append([MARKER, *(token.piece for token in part), MARKER, *[MARKER] * empty])
    ends = torch.tensor([1 + len(part) for part in parts])
    return Chunks(torch.tensor(ids), torch.tensor(weights), torch.tensor(pieces), ends)


def split_text(text: Text, tokenizer: PromptTokenizer, split: str, length: int = CHUNK) -> list[list[Token]]:
    """Returns the tokens of each chunk that `chunk_text` makes."""
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}{did_you_mean(split, SPLITS)}: choose {', '.join(SPLITS)}")
    parts, number = [], 0
    for i, section in enumerate(text):
        tokens = tokenize_section(section, tokenizer, number)
        number += len(section)
        if tokens or not parts or i < len(text) - 1:
            parts += SPLITS[split](tokens, length - 2) or [[]]
    return parts


def tokenize_section(section: Section, tokenizer: PromptTokenizer, first: int) -> list[Token]:
    """Returns the tokens of pieces, each tokenized alone; the first one has the number `first`."""
    tokens = []
    for number, piece in enumerate(section, first):
        ids = tokenizer.encode(piece.text)
        ends = {part.stop - 1: word for word, part in tokenizer.words(piece.text)}
        tokens += [Token(each, piece.weight, number, ends.get(i)) for i, each in enumerate(ids)]
    return tokens


def split_evenly(tokens: Sequence[Token], room: int) -> list[list[Token]]:
    """Cuts tokens every `room`, also within words."""
    return [list(tokens[i : i + room]) for i in range(0, len(tokens), room)]


def split_at_commas(tokens: Sequence[Token], room: int) -> list[list[Token]]:
    """Cuts tokens as the web UI does: what follows the last comma of a full chunk moves to the next one, unless that
    comma is more than COMMA_REACH tokens back, or the next token is a comma."""
    parts: list[list[Token]] = [[]]
    comma = None  # the place of the last comma of the chunk
    for token in tokens:
        if len(parts[-1]) == room:
            stop = room
            if comma is not None and room - comma <= COMMA_REACH and token.word != ",":
                stop = comma + 1
            parts[-1:] = [parts[-1][:stop], parts[-1][stop:]]
            comma = None
        elif token.word == ",":
            comma = len(parts[-1])
        parts[-1].append(token)
    return parts


def split_after(tokens: Sequence[Token], room: int, rules: Sequence[Callable[[Token], bool]]) -> list[list[Token]]:
    """Cuts tokens after the last one in reach that fits a rule, the first rule that any token fits; without one, within
    a word."""
    parts, rest = [], list(tokens)
    while len(rest) > room:
        fitting = [[i for i in range(room) if rule(rest[i])] for rule in rules]
        stop = next((places[-1] + 1 for places in fitting if places), room)
        parts.append(rest[:stop])
        rest = rest[stop:]
    return [*parts, rest]


def ends_sentence(token: Token) -> bool:
    """Whether a token is a full stop."""
    return token.word == "."


def ends_phrase(token: Token) -> bool:
    """Whether a token is a full stop, a comma, a semicolon or a colon."""
    return token.word in (".", ",", ";", ":")


def ends_word(token: Token) -> bool:
    """Whether a token is the last one of a word."""
    return token.word is not None


SPLITS: Mapping[str, Callable[[Sequence[Token], int], list[list[Token]]]] = {
    "length": split_evenly,
    "comma": split_at_commas,
    "sentence": partial(split_after, rules=(ends_sentence, ends_phrase, ends_word)),
    "phrase": partial(split_after, rules=(ends_phrase, ends_word)),
    "word": partial(split_after, rules=(ends_word,)),
}
