"""CLIP's tokenizer, against ids by open_clip 3.3 (tests/fixtures/text/clip_ids.json)."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from helpers.text_weights import TEXTS
from models.tokenizer import Tokenizer

CASES = json.loads((TEXTS / "clip_ids.json").read_text())
TOKENIZER = Tokenizer()


def test_ids_are_those_of_openai_for_every_text(agrees):
    assert len(CASES) == 73
    ids = [[TOKENIZER.start_id, *TOKENIZER.encode(case["text"]), TOKENIZER.end_id] for case in CASES]
    for got, case in zip(ids, CASES, strict=True):
        assert got == case["ids"], case["text"]
    got, wanted = (torch.tensor(sum(each, [])) for each in (ids, [case["ids"] for case in CASES]))
    assert agrees(got, wanted, "tokenizer: ids of 73 texts", 0)


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|startoftext|>", "<start_of_text>", "<end_of_text>", "</w>"])
def test_special_tokens_in_a_text_are_spelled(name):
    """A prompt cannot end itself."""
    ids = TOKENIZER.encode(f"a cat {name} a dog")
    assert max(ids) < TOKENIZER.start_id
    assert ids[:2] == TOKENIZER.encode("a cat") and ids[-2:] == TOKENIZER.encode("a dog")
    assert len(ids) > 6  # in pieces


def test_entities_are_decoded_twice():
    """ftfy leaves them to us where a text has a <."""
    assert TOKENIZER.encode("< &amp;lt;") == TOKENIZER.encode("< <") != TOKENIZER.encode("< &lt ;")


def test_words_tell_where_their_ids_are():
    text = "A supercalifragilistic photo-realistic CAT, 42 don't"
    ids, words = TOKENIZER.encode(text), TOKENIZER.words(text)
    expected = ["a", "supercalifragilistic", "photo", "-", "realistic", "cat", ",", "4", "2", "don", "'t"]
    assert [word for word, _ in words] == expected
    assert [each for _, place in words for each in ids[place]] == ids
    assert {word: ids[place] for word, place in words}["cat"] == TOKENIZER.encode("cat")
    assert words[1][1].stop - words[1][1].start > 2


def test_decoded_texts_have_the_same_ids():
    assert TOKENIZER.decode([TOKENIZER.start_id, *TOKENIZER.encode("A café, 😀!"), TOKENIZER.end_id]) == "a café , 😀!"
    for case in CASES:
        assert TOKENIZER.encode(TOKENIZER.decode(case["ids"])) == case["ids"][1:-1], case["text"]


def test_other_numbers_are_no_ids():
    with pytest.raises(ValueError, match="got id 49408, wanted ids from 0 to 49407"):
        TOKENIZER.decode([320, 49_408])
    with pytest.raises(ValueError, match="got id -1"):
        TOKENIZER.decode([-1])


def test_vocabulary_is_not_read_at_import():
    check = "import models.tokenizer as t; t.Tokenizer(); print(t.load_vocabulary.cache_info().currsize)"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"


def test_tokenizers_travel_to_workers():
    assert pickle.loads(pickle.dumps(TOKENIZER)).encode("a cat") == [320, 2368]
