"""CLIP's tokenizer, against ids by open_clip 3.3 (tests/fixtures/text/clip_ids.json)."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

from helpers.text_weights import TEXTS
from models.tokenizer import Tokenizer, contract_words, expand_words

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


# Added words

PLACES = [f"<l{number}>" for number in range(20)]
ADDED = Tokenizer(added_ids={word: 49_408 + place for place, word in enumerate([*PLACES, "sks", "sks-toy"])})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("car <l0> <l19>", ["car", 49_408, 49_427]),
        ("a car<l1><L12>.", ["a", "car", 49_409, 49_420, "."]),  # without white space, in any case
        ("<l20> <l>", ["<l20>", "<l>"]),  # none of them
        ("a SKS, and asks", ["a", 49_428, ",", "and", "asks"]),  # not within a word
        ("sks-toy sks-toys", [49_429, 49_428, "-", "toys"]),  # the longest
        ("<|endoftext|> <l3>", ["<|endoftext|>", 49_411]),  # an end is spelled as before
    ],
)
def test_added_words_have_an_id_each(text, words):
    expected = [each if isinstance(each, int) else TOKENIZER.encode(each) for each in words]
    expected = [own for each in expected for own in (each if isinstance(each, list) else [each])]
    assert ADDED.encode(text) == expected
    places = [place for _, place in ADDED.words(text)]
    assert [own for place in places for own in expected[place]] == expected and places[-1].stop == len(expected)


def test_texts_without_added_words_keep_their_ids():
    for case in CASES:
        assert ADDED.encode(case["text"]) == TOKENIZER.encode(case["text"])


def test_added_words_are_decoded():
    text = "car <l0> <l19> sks-toy ."
    assert ADDED.decode(ADDED.encode(text)) == text
    with pytest.raises(ValueError, match="got id 49430"):
        ADDED.decode([49_430])


def test_added_words_may_have_several_ids():
    tokenizer = Tokenizer(added_ids={"<toy>": range(49_408, 49_411), "sks": 49_411, "<toy>_1": (49_412, 49_413)})
    (a,) = TOKENIZER.encode("a")
    assert tokenizer.encode("a <TOY>sks <toy>_1") == [a, 49_408, 49_409, 49_410, 49_411, 49_412, 49_413]
    expected = [("a", slice(0, 1)), ("<toy>", slice(1, 4)), ("sks", slice(4, 5)), ("<toy>_1", slice(5, 7))]
    assert tokenizer.words("a <toy>sks <toy>_1") == expected
    assert tokenizer.decode(tokenizer.encode("a <toy> sks")) == "a <toy> sks"


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<|endoftext|>": 49_407}, "got id 49407 for the added word"),
        ({"toy": (49_408, 49_407)}, "got id 49407 for the added word 'toy'"),
        ({"toy": ()}, "got no id for the added word 'toy'"),
        ({"toy": (49_408, 49_409), "cat": (49_409, 49_410)}, "share an id"),
        ({"two words": 49_408}, "got the added word 'two words', which no text has"),
        ({"": 49_408}, "got the added word ''"),
        ({"ﬁne": 49_408}, "got the added word 'ﬁne'"),  # its ligature is repaired in texts
        ({"Toy": 49_408, "toy": 49_409}, "equal apart from case"),
        ({"toy": 49_408, "cat": 49_408}, "share an id"),
    ],
)
def test_words_that_cannot_be_added_are_refused(added, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(added_ids=added)


@pytest.mark.parametrize(
    ("words", "short"),
    [
        ([f"<l{number}>" for number in range(65_536)], ("<l{0..65535}>",)),
        (["<l1>", "<l0>", "<l1x>", "<l2x>"], ("<l1>", "<l0>", "<l{1..2}x>")),
        (["sks", "a2b3", "a2b4", "l007"], ("sks", "a2b{3..4}", "l007")),
        ([], ()),
    ],
)
def test_numbered_words_are_written_as_one(words, short):
    assert contract_words(words) == short and expand_words(short) == words


def test_numbered_words_without_a_number_are_refused():
    with pytest.raises(ValueError, match=r"got the words '<l\{3..2\}>', wanted the lower number first"):
        expand_words(["<l{3..2}>"])
