"""CLIP's tokenizer: text -> ids of pieces of words, by byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021).

The rule is that of OpenAI's release: text is repaired (ftfy), HTML entities are decoded, white space is collapsed,
letters become lower case. Words are runs of letters, single digits and runs of other signs. Names of special tokens
that a user types, such as <|endoftext|>, are text like any other.
"""

import gzip
import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import ClassVar

import ftfy
import regex

VOCABULARY = Path(__file__).parents[1] / "assets" / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # the file has more; CLIP uses the first ones
WORD_END = "</w>"  # marks the last piece of a word
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of words, and which pairs of them are merged first."""

    byte_symbols: tuple[str, ...]  # a printable character for each byte
    symbols: tuple[str, ...]  # the piece of each id, without start and end
    ids: Mapping[str, int]  # of the pieces
    ranks: Mapping[tuple[str, str], int]  # pairs to merge; the lowest first


@lru_cache(maxsize=1)
def load_vocabulary() -> Vocabulary:
    """Reads CLIP's merges, once; FileNotFoundError if the file is missing."""
    if not VOCABULARY.is_file():
        raise FileNotFoundError(f"{VOCABULARY} not found, a file of this project: restore it from its repository")
    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in islice(file, 1, MERGES + 1)]  # the first line is a header
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    byte_symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    single = list(byte_symbols.values())
    symbols = (*single, *(symbol + WORD_END for symbol in single), *map("".join, merges))
    return Vocabulary(
        byte_symbols=tuple(byte_symbols[byte] for byte in range(256)),
        symbols=symbols,
        ids={symbol: i for i, symbol in enumerate(symbols)},
        ranks={pair: rank for rank, pair in enumerate(merges)},
    )


@lru_cache(maxsize=65_536)
def word_ids(word: str) -> tuple[int, ...]:
    """Returns the ids of the pieces of a word."""
    vocabulary = load_vocabulary()
    pieces = [vocabulary.byte_symbols[byte] for byte in word.encode("utf-8")]
    pieces[-1] += WORD_END
    last = len(vocabulary.ranks)
    while len(pieces) > 1:
        pair = min(pairwise(pieces), key=lambda pair: vocabulary.ranks.get(pair, last))
        if pair not in vocabulary.ranks:
            break
        pieces = merge_pair(pieces, pair)
    return tuple(vocabulary.ids[piece] for piece in pieces)


def merge_pair(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of a pair of neighbours, from the left."""
    merged: list[str] = []
    i = 0
    while i < len(pieces):
        found = tuple(pieces[i : i + 2]) == pair
        merged.append("".join(pair) if found else pieces[i])
        i += 2 if found else 1
    return merged


def clean_text(text: str) -> str:
    """Repairs text, decodes HTML entities (twice, as written twice), collapses white space; returns lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """CLIP's byte-pair encoding with 49,408 ids. The vocabulary is read when it is first needed.

    With another `end_id`, the vocabulary ends before its start, the id before the end.
    """

    start_id: int = 49_406
    end_id: int = 49_407
    pad_id: int = 49_407  # after the end
    vocab_size: ClassVar[int] = 49_408

    def __init__(self, end_id: int = 49_407):
        self.start_id, self.end_id, self.pad_id = end_id - 1, end_id, end_id

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of any length, without start and end; ValueError for words without an id."""
        ids = [each for word in WORD.findall(clean_text(text)) for each in word_ids(word)]
        if (largest := max(ids, default=0)) >= self.start_id:
            got = f"got id {largest} in {text!r}, but the vocabulary ends before the start, {self.start_id}"
            raise ValueError(f"{got}: pass ids of the text encoder, or another --text_encoder")
        return ids

    def words(self, text: str) -> list[tuple[str, slice]]:
        """Returns the words of a text, as they are read, and where the ids of each are in `encode(text)`."""
        words, stop = [], 0
        for word in WORD.findall(clean_text(text)):
            start, stop = stop, stop + len(word_ids(word))
            words.append((word, slice(start, stop)))
        return words

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, its words separated by spaces; start and end are left out.

        ValueError for other numbers. Bytes that are no text, as of half a character, become U+FFFD.
        """
        vocabulary, ids = load_vocabulary(), list(ids)
        if wrong := [each for each in ids if not 0 <= each < self.vocab_size]:
            raise ValueError(f"got id {wrong[0]}, wanted ids from 0 to {self.vocab_size - 1}")
        byte_of = {symbol: byte for byte, symbol in enumerate(vocabulary.byte_symbols)}
        text = bytearray()
        for symbol in (vocabulary.symbols[each] for each in ids if each < self.start_id):
            text += bytes(byte_of[character] for character in symbol.removesuffix(WORD_END))
            text += b" " if symbol.endswith(WORD_END) else b""
        return text.decode("utf-8", errors="replace").strip()
