"""Captions of an image: which one a visit shows, and pieces of long ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.tokenizer import Tokenizer
from train.data.captions import choose_by_share, choose_caption, long_split
from train.datasets import Ragged
from train.datasets.captions import Config, build

encode = Tokenizer().encode


def by_letter(text: str) -> list[int]:
    """A token for each character that is no space."""
    return [ord(character) for character in text if not character.isspace()]


def test_short_captions_are_one_piece():
    assert long_split(" a cat. ", encode) == ["a cat."]
    assert long_split(" \n", encode) == []


def test_sentences_stay_together_as_long_as_they_fit():
    assert long_split("ab cd. ef! gh? ij.", by_letter, 7) == ["ab cd.", "ef! gh?", "ij."]
    assert long_split("ab cd. ef! gh? ij.", by_letter, 8) == ["ab cd. ef!", "gh? ij."]


def test_a_long_sentence_is_cut_at_phrases_else_at_words():
    assert long_split("ab, cd ef, gh. ij.", by_letter, 7) == ["ab,", "cd ef,", "gh. ij."]
    assert long_split("ab cd ef gh", by_letter, 5) == ["ab cd", "ef gh"]
    assert long_split("abcdefgh", by_letter, 4) == ["abcd", "efgh"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab.,;! \n", max_size=80), st.integers(1, 9))
def test_pieces_are_the_text_and_fit(text, limit):
    pieces = long_split(text, by_letter, limit)
    assert all(0 < len(by_letter(piece)) <= limit for piece in pieces)
    assert by_letter("".join(pieces)) == by_letter(text)


def test_pieces_of_a_caption_have_at_most_75_tokens():
    text = ("A wide photograph of a river, with boats; people walk along the shore. " * 12).strip()
    pieces = long_split(text, encode)
    assert " ".join(pieces) == text and max(len(encode(piece)) for piece in pieces) <= 75
    assert all(piece.endswith("shore.") for piece in pieces)
    assert [each for piece in pieces for each in encode(piece)] == encode(text)


def test_shares_say_how_often_a_caption_is_shown():
    item = {"captions": ["a", "b", "c"], "caption_shares": Ragged([0.6, 0.0, 0.2])}
    shown = Counter(choose_caption(item, 1, position)["caption"] for position in range(2000))
    assert shown.keys() == {"a", "c"} and abs(shown["a"] / 2000 - 0.75) < 0.04
    assert choose_caption(item)["caption"] == "a"
    assert "caption_shares" not in choose_caption(item, 1, 0)


def test_numbers_choose_in_proportion():
    size = 2**53
    numbers = [0, size // 4 - 1, size // 4, size - 1, size + size // 4, 2**63 - 1]
    assert [choose_by_share(number, [1, 3]) for number in numbers] == [0, 0, 1, 1, 1, 1]
    assert choose_by_share(size - 1, [1, 0]) == 0


@pytest.fixture
def folder(tmp_path):
    """Three images, of which the second has no short caption, and a validation image."""
    for name in ("train/a", "train/b", "train/c", "val/d"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    long = "A cat on a mat. " * 20
    rows = ["img_name,prompt", f"a.png,{long}", "a.png,a long caption of a", "b.png,a long caption of b"]
    (tmp_path / "prompts_train.csv").write_text("\n".join(rows))
    (tmp_path / "short_train.csv").write_text("img_name,prompt\na.png,short a\nc.png,short c\n")
    return tmp_path


def test_captions_of_several_files(folder):
    dataset = build(Config(data_dir=str(folder), more_prompts=("short_{split}.csv=0.4",)), "train")
    first, second, third = (dataset.annotations(i, (8, 8)) for i in range(3))
    assert len(first["captions"]) == 3 and first["captions"][2] == "short a"
    assert first["caption_shares"].tolist() == pytest.approx([0.3, 0.3, 0.4])
    assert second["captions"] == ["a long caption of b"] and third["captions"] == ["short c"]
    assert "short_train.csv" in dataset.sources


def test_long_captions_in_pieces(folder):
    dataset = build(Config(data_dir=str(folder), caption_pieces=True), "train")
    annotations = dataset.annotations(0, (8, 8))
    *pieces, last = annotations["captions"]
    assert len(pieces) > 1 and last == "a long caption of a" and " ".join(pieces) == ("A cat on a mat. " * 20).strip()
    assert annotations["caption_shares"].tolist() == pytest.approx([0.5 / len(pieces)] * len(pieces) + [0.5])


def test_captions_of_one_file_are_as_ever(folder):
    dataset = build(Config(data_dir=str(folder)), "train")
    assert len(dataset.names) == 2 and dataset.annotations(1, (8, 8)) == {"captions": ["a long caption of b"]}


@pytest.mark.parametrize(
    "words", [("a.csv",), ("a.csv=0",), ("a.csv=1",), ("=0.5",), ("a.csv=x",), ("prompts_{split}.csv=0.1",)]
)
def test_shares_that_are_none(words):
    with pytest.raises(ValueError, match="wanted another file and a share between 0 and 1"):
        Config(more_prompts=words)
    with pytest.raises(ValueError, match="got shares 1.1 in more_prompts"):
        Config(more_prompts=("a.csv=0.6", "b.csv=0.5"))
