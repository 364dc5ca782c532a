"""Chunks of prompts: where long ones are cut, and what fills a chunk."""

import pytest
import torch

from models.prompt_syntax import Piece
from models.prompts import MARKER, chunk_text, parse_prompt
from models.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
START, END, COMMA = Tokenizer.start_id, Tokenizer.end_id, 267


def words_of(prompt: str, split: str, syntax: str = "plain", length: int = 77) -> list[str]:
    """The text of each chunk."""
    (clause,) = parse_prompt(prompt, syntax)
    return [TOKENIZER.decode(ids.tolist()) for ids in chunk_text(clause.texts[0], TOKENIZER, split, length).ids]


def test_a_chunk_has_a_start_an_end_and_padding():
    chunks = chunk_text(((Piece("a "), Piece("cat", 1.5)),), TOKENIZER, "length", 7)
    assert chunks.ids.tolist() == [[START, 320, 2368, END, END, END, END]]
    assert chunks.weights.tolist() == [[1, 1, 1.5, 1, 1, 1, 1]]
    assert chunks.pieces.tolist() == [[MARKER, 0, 1, MARKER, MARKER, MARKER, MARKER]]
    assert chunks.ends.tolist() == [3]
    assert chunk_text(((Piece("a cat"),),), TOKENIZER, "length", 6, pad_id=0).ids.tolist() == [
        [START, 320, 2368, END, 0, 0]
    ]


def test_an_empty_text_is_one_chunk_without_tokens():
    chunks = chunk_text(((Piece(""),),), TOKENIZER, "comma")
    assert chunks.ids.tolist() == [[START] + [END] * 76] and chunks.ends.tolist() == [1]


@pytest.mark.parametrize("split", ["length", "comma", "sentence", "phrase", "word"])
@pytest.mark.parametrize("count", [75, 76, 150, 151])
def test_no_token_is_lost_and_no_chunk_is_more_than_needed(split, count):
    chunks = chunk_text(((Piece("cat " * count),),), TOKENIZER, split)
    assert len(chunks.ids) == -(-count // 75)
    assert (chunks.ids == 2368).sum() == count


def test_words_are_cut_by_length_alone():
    text = "a unbelievableness"  # a unbeliev ab leness
    assert words_of(text, "length", length=5) == ["a unbelievab", "leness"]
    assert words_of(text, "word", length=5) == ["a", "unbelievableness"]
    assert words_of("unbelievableness", "word", length=4) == ["unbelievab", "leness"]  # no place to cut


def test_the_last_sentence_phrase_or_word_ends_a_chunk():
    text = "one. two: three, four five six"
    assert words_of(text, "sentence", length=9) == ["one .", "two : three , four five six"]
    assert words_of(text, "phrase", length=9) == ["one . two : three ,", "four five six"]
    assert words_of(text, "word", length=9) == ["one . two : three , four", "five six"]
    assert words_of("two: three, four five six one", "sentence", length=7) == ["two : three ,", "four five six one"]


def test_what_follows_a_comma_in_reach_moves_to_the_next_chunk():
    near = "cat " * 54 + "a, " + "dog " * 25  # the comma is token 56 of 75
    assert words_of(near, "comma") == ["cat " * 54 + "a ,", "dog " * 24 + "dog"]
    far = "cat " * 53 + "a, " + "dog " * 25
    assert words_of(far, "comma") == ["cat " * 53 + "a ," + " dog" * 20, "dog " * 4 + "dog"]


def test_a_comma_of_an_earlier_chunk_moves_nothing():
    dogs = words_of("cat " * 60 + "a, " + "dog " * 100, "comma")[1:]
    assert [len(chunk.split()) for chunk in dogs] == [75, 25]


def test_a_comma_after_a_full_chunk_moves_nothing():
    first, second = words_of("cat " * 70 + "a, b c d, e", "comma")  # the second comma is token 76
    assert first.endswith("a , b c d") and second == ", e"


def test_breaks_begin_chunks():
    assert words_of("a BREAK b", "comma", "a1111") == ["a", "b"]
    assert words_of("a BREAK BREAK b", "comma", "a1111") == ["a", "", "b"]
    assert words_of("a BREAK", "comma", "a1111") == ["a"]
    assert words_of("BREAK", "comma", "a1111") == [""]
    assert words_of("cat " * 75 + "BREAK b", "comma", "a1111")[1:] == ["b"]


def test_pieces_are_numbered_across_sections():
    (clause,) = parse_prompt("a (b BREAK c) d", "a1111")
    chunks = chunk_text(clause.texts[0], TOKENIZER, "comma", 5)
    assert chunks.pieces.tolist() == [[MARKER, 0, 1, MARKER, MARKER], [MARKER, 2, 3, MARKER, MARKER]]


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="got split 'sentences', did you mean 'sentence'"):
        chunk_text(((Piece("a"),),), TOKENIZER, "sentences")


def test_special_tokens_in_a_prompt_are_spelled():
    ids = chunk_text(((Piece("<|endoftext|> a"),),), TOKENIZER, "length").ids
    assert (ids[0] == END).int().argmax() > 5 and torch.equal((ids == START).sum(), torch.tensor(1))
