"""CLIP's tokenizer: text -> ids of pieces of words, by byte-pair encoding (Sennrich et al. 2016; Radford et al. 2021).

The rule is that of OpenAI's release: text is repaired (ftfy), HTML entities are decoded, white space is collapsed,
letters become lower case. Words are runs of letters, single digits and runs of other signs. Names of special tokens
that a user types, such as <|endoftext|>, are text like any other. Words that were added to the vocabulary have ids of
their own: places (GeoDiffusion) one each, those of textual inversion one or several.
"""

import gzip
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import ClassVar

import ftfy
import regex

VOCABULARY = Path(__file__).parents[1] / "assets" / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 48_894  # the file has more; CLIP uses the first ones
WORD_END = "</w>"  # marks the last piece of a word
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
NUMBERED = regex.compile(r"(.*?)(0|[1-9]\d*)(\D*)")  # a word with a number: what is before it, and behind it
RANGE = regex.compile(r"(.*)\{(\d+)\.\.(\d+)\}(.*)")  # numbered words, the first and the last number


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


def expand_words(words: Iterable[str]) -> list[str]:
    """Returns words in their order, where <l{0..99}> stands for <l0>, <l1>, ..., <l99>; ValueError for no numbers."""
    expanded: list[str] = []
    for word in words:
        match = RANGE.fullmatch(word)
        if match is not None and int(match[2]) > int(match[3]):
            raise ValueError(f"got the words {word!r}, wanted the lower number first")
        numbers = range(int(match[2]), int(match[3]) + 1) if match else ()
        expanded += [f"{match[1]}{number}{match[4]}" for number in numbers] if match else [word]
    return expanded


def contract_words(words: Sequence[str]) -> tuple[str, ...]:
    """Returns words so that `expand_words` returns them, those with successive numbers as one."""

    def kind(place: int) -> tuple[object, ...]:
        match = NUMBERED.fullmatch(words[place])
        return (words[place],) if match is None else (match[1], int(match[2]) - place, match[3])

    runs = [[*places] for _, places in groupby(range(len(words)), key=kind)]
    contracted = []
    for first, *others in runs:
        match = NUMBERED.fullmatch(words[first])
        numbers = f"{{{match[2]}..{int(match[2]) + len(others)}}}" if others else ""
        contracted.append(f"{match[1]}{numbers}{match[3]}" if others else words[first])
    return tuple(contracted)


def is_within_word(text: str, place: int) -> bool:
    """Returns whether the characters on both sides of a place are letters or digits."""
    return 0 < place < len(text) and text[place - 1 : place + 1].isalnum()


class Tokenizer:
    """CLIP's byte-pair encoding with 49,408 ids. The vocabulary is read when it is first needed.

    With another `end_id`, the vocabulary ends before its start, the id before the end. `added_ids` are those of further
    words, one or several a word, all of them after the end, in any case of their letters: they are found before a text
    is split, the longest first, and not within other words. ValueError for others.
    """

    start_id: int = 49_406
    end_id: int = 49_407
    pad_id: int = 49_407  # after the end
    vocab_size: ClassVar[int] = 49_408

    def __init__(self, end_id: int = 49_407, added_ids: Mapping[str, int | Sequence[int]] | None = None):
        self.start_id, self.end_id, self.pad_id = end_id - 1, end_id, end_id
        added_ids = added_ids or {}
        self.added_ids = {word.lower(): (own,) if isinstance(own, int) else (*own,) for word, own in added_ids.items()}
        self.lengths = sorted({*map(len, self.added_ids)}, reverse=True)  # of added words
        for word, own in self.added_ids.items():
            if not own or min(own) <= end_id:
                got = f"got id {min(own)}" if own else "got no id"
                raise ValueError(f"{got} for the added word {word!r}, wanted one after the end, {end_id}")
            if word.split() != [word] or not word.isascii() and clean_text(word) != word:
                raise ValueError(f"got the added word {word!r}, which no text has: wanted one without white space")
        all_ids = [each for own in self.added_ids.values() for each in own]
        if len(self.added_ids) < len(added_ids) or len({*all_ids}) < len(all_ids):
            raise ValueError("got added words that are equal apart from case, or that share an id")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of any length, without start and end; ValueError for words without an id."""
        ids: list[int] = []
        for word in self.split(clean_text(text)):
            own = self.ids_of(word)
            if word not in self.added_ids and max(own) >= self.start_id:
                got = f"got id {max(own)} in {text!r}, but the vocabulary ends before the start, {self.start_id}"
                raise ValueError(f"{got}: pass ids of the text encoder, or another --text_encoder")
            ids += own
        return ids

    def words(self, text: str) -> list[tuple[str, slice]]:
        """Returns the words of a text, as they are read, and where the ids of each are in `encode(text)`."""
        words, stop = [], 0
        for word in self.split(clean_text(text)):
            start, stop = stop, stop + len(self.ids_of(word))
            words.append((word, slice(start, stop)))
        return words

    def ids_of(self, word: str) -> tuple[int, ...]:
        """Returns the ids of an added word, or those of the pieces of another."""
        return self.added_ids[word] if word in self.added_ids else word_ids(word)

    def split(self, text: str) -> Iterator[str]:
        """Yields the words of a cleaned text."""
        done = place = 0  # what is before `done` has been yielded
        while self.added_ids and place < len(text):
            stop = self.added_stop(text, place)
            if stop is None:
                place += 1
            else:
                yield from WORD.findall(text[done:place])
                yield text[place:stop]
                done = place = stop
        yield from WORD.findall(text[done:])

    def added_stop(self, text: str, place: int) -> int | None:
        """Returns the end of the longest added word that begins at a place of a text, None without one."""
        if is_within_word(text, place):
            return None
        stops = [place + length for length in self.lengths if text[place : place + length] in self.added_ids]
        return next((stop for stop in stops if not is_within_word(text, stop)), None)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, its words separated by spaces; start and end are left out, and all ids but the first
        of an added word.

        ValueError for other numbers. Bytes that are no text, as of half a character, become U+FFFD.
        """
        vocabulary, ids = load_vocabulary(), list(ids)
        added = {each: "" for own in self.added_ids.values() for each in own}
        added |= {own[0]: f"{word} " for word, own in self.added_ids.items()}
        if wrong := [each for each in ids if not 0 <= each < self.vocab_size and each not in added]:
            raise ValueError(f"got id {wrong[0]}, wanted ids from 0 to {self.vocab_size - 1}, or those of added words")
        byte_of = {symbol: byte for byte, symbol in enumerate(vocabulary.byte_symbols)}
        text = bytearray()
        for each in ids:
            if each in added:
                text += added[each].encode()
            elif each < self.start_id:
                symbol = vocabulary.symbols[each]
                text += bytes(byte_of[character] for character in symbol.removesuffix(WORD_END))
                text += b" " if symbol.endswith(WORD_END) else b""
        return text.decode("utf-8", errors="replace").strip()
