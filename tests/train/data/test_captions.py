"""Captions of an image: which one a visit shows, and pieces of long ones."""

import json
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.tokenizer import Tokenizer
from train.data.captions import choose_by_share, choose_caption, long_split
from train.data.formats.prompts import Caption, decode_caption_lines, decode_captions
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
    assert choose_caption({**item, "caption_shares": Ragged([0.0, 1.0, 1.0])})["caption"] == "b"  # the first with one


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


def test_a_text_file_beside_each_image(folder):
    train, texts = folder / "images" / "train", {"a": "\ufeffthe first\r\n\n  another \n", "b": " \n", "d": "elsewhere"}
    for name, text in texts.items():
        (train / f"{name}.txt").write_text(text, encoding="utf-8")
    dataset = build(Config(data_dir=str(folder), prompts=".txt"), "train")
    assert dataset.names == ["images/train/a.png"] and dataset[0]["captions"] == ["the first", "another"]
    assert dataset.unpaired == {
        "images without a caption": ("b.png", "c.png"),  # one file is blank, the other missing
        "captions without an image": ("images/train/d.txt",),
    }
    assert any("left out: 2 images without a caption (b.png, c.png)" in note for note in dataset.notes)
    (train / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="train/c.txt: 'utf-8' codec"):
        build(Config(data_dir=str(folder), prompts=".txt"), "train")


def test_texts_in_subfolders_belong_to_the_image_beside_them(tmp_path):
    for name in ("x/a", "y/a", "y/b.c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.caption").write_text(f"of {name}")
    options = {"data_dir": str(tmp_path), "image_dir": ".", "prompts": ".caption", "val_fraction": 0.4}
    train, val = (build(Config(**options), split) for split in ("train", "val"))
    captions = {
        name: each.annotations(i, (8, 8))["captions"] for each in (train, val) for i, name in enumerate(each.names)
    }
    assert captions == {f"{name}.png": [f"of {name}"] for name in ("x/a", "y/a", "y/b.c")}
    assert len(train) == 2 and sorted(train.sources) == sorted(name.replace(".png", ".caption") for name in train.names)


def test_texts_beside_images_may_be_shown_in_a_share_of_visits(folder):
    (folder / "images" / "train" / "a.txt").write_text("one\ntwo")
    dataset = build(Config(data_dir=str(folder), prompts="short_{split}.csv", more_prompts=(".txt=0.2",)), "train")
    item = dataset.annotations(0, (8, 8))
    assert item["captions"] == ["short a", "one", "two"]
    assert item["caption_shares"].tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert dataset.sources == ("short_train.csv", "images/train/a.txt")


def test_fingerprints_notice_other_texts_and_options(folder):
    text = folder / "images" / "train" / "a.txt"
    text.write_text("a cat")

    def fingerprints(**options):
        dataset = build(Config(data_dir=str(folder), **options), "train")
        return dataset.fingerprint(), dataset.content_fingerprint()

    before = fingerprints(prompts=".txt")
    os.utime(text, ns=(1, 1))
    touched = fingerprints(prompts=".txt")
    assert touched[0] != before[0] and touched[1] == before[1]
    text.write_text("a dog on a mat")
    assert fingerprints(prompts=".txt")[1] != before[1]
    seen = {
        fingerprints(**options)
        for options in ({}, {"caption_pieces": True}, *({"more_prompts": (f".txt={share}",)} for share in (0.2, 0.3)))
    }
    assert len(seen) == 4  # items that are cached on disk have captions and shares


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_captions_of_an_image_may_have_shares(folder, suffix):
    texts = {
        "csv": "img_name,prompt,share\na.png,often,3\na.png,never,0\na.png,seldom,1\nb.png,b,1\n",
        "json": json.dumps({"a.png": {"often": 3, "never": 0, "seldom": 1}, "b.png": "b"}),
        "jsonl": '{"img_name": "a.png", "prompt": {"often": 3, "never": 0}}\n\n'
        '{"img_name": "b.png", "prompt": ["b"]}\n{"img_name": "a.png", "prompt": "seldom"}\n',
    }
    (folder / f"mine.{suffix}").write_text("\ufeff" + texts[suffix], encoding="utf-8")
    dataset = build(Config(data_dir=str(folder), prompts=f"mine.{suffix}"), "train")
    first, second = (dataset.annotations(i, (8, 8)) for i in range(2))
    assert first["captions"] == ["often", "never", "seldom"] and second["captions"] == ["b"]
    assert first["caption_shares"].tolist() == [0.75, 0, 0.25] and second["caption_shares"].tolist() == [1]


def test_lists_without_shares_are_equally_likely(folder):
    (folder / "mine.json").write_text(json.dumps({"a.png": ["one", "two"], "b.png": "b", "d.png": "elsewhere"}))
    dataset = build(Config(data_dir=str(folder), prompts="mine.json"), "train")
    assert dataset.annotations(0, (8, 8)) == {"captions": ["one", "two"]}
    assert dataset.unpaired["captions without an image"] == ("d.png",)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.csv", "img_name,prompt,share\na.png,x,1\na.png,y,-1\n", "row 2, a.png: got the share '-1'"),
        ("a.csv", "img_name,prompt,share\na.png,x,nan\n", "row 1, a.png: got the share 'nan'"),
        ("a.csv", "img_name,prompt,share\na.png,x,\n", "row 1, a.png: got the share ''"),
        ("a.csv", "img_name,prompt,share\na.png,x,0\na.png,y,0\n", "a.png: .*the shares 0, 0, wanted"),
        ("a.json", '{"a.png": {"x": Infinity}}', "a.png: got the share inf"),
        ("a.json", '{"a.png": {"x": 0}}', "a.png: .*the shares 0, wanted"),
        ("a.json", '{"a.png": {"x": null}}', "a.png: got the share None"),
        ("a.json", '{"a.png": []}', r"a.png: got \[\], wanted a caption, a list"),
        ("a.json", '{"a.png": ["x", 3]}', r'a.png: got \["x", 3\], wanted a caption, a list'),
        ("a.json", '["a.png"]', 'wanted {"a.png": "a cat"'),
        ("a.json", "{", "Expecting property name"),
        ("a.jsonl", '{"img_name": "a.png", "prompt": "x"}\n{"img_name": "a.png"}', "line 2 is .*wanted"),
        ("a.jsonl", '{"img_name": "a.png", "prompt": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", '{"img_name": "a.png", "prompt": {"x": -1}}', "line 1, a.png: got the share -1"),
        (
            "a.json",
            '{"a.png": "x",\n"a.png": "y"}',
            "line 2 column 13: got the key 'a.png' twice .*leave one of them out",
        ),
        ("a.json", '{"a.png": {"x": 1, "x": 2}}', "line 1 column 26: got the key 'x' twice"),
        (
            "a.jsonl",
            '{"img_name": "b.png", "prompt": "x"}\n{"img_name": "a", "prompt": "x", "prompt": ""}',
            "line 2 .* 'prompt' twice",
        ),
        ("a.csv", "img_name,prompt,prompt\na.png,x,y\n", "got the column 'prompt' twice in the first line: leave one"),
    ],
)
def test_broken_files_of_captions_name_file_and_row(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: .*{message}"):
        build(Config(data_dir=str(folder), prompts=file), "train")


def test_files_that_do_not_exist_name_the_remedy(folder):
    with pytest.raises(FileNotFoundError, match="as --prompts .*or .txt for a text file beside each image"):
        build(Config(data_dir=str(folder), prompts="nothing.csv"), "train")
    with pytest.raises(ValueError, match="has a caption in .txt: got none, wanted names of images, such as a.png"):
        build(Config(data_dir=str(folder), prompts=".txt"), "train")


def test_only_line_feeds_end_a_line():
    text = "one\u2028two\x85three"
    assert decode_caption_lines(f"{text}\n") == [Caption(text)]
    line = json.dumps({"img_name": "a.png", "prompt": text}, ensure_ascii=False)
    assert decode_captions(f"{line}\n", ".jsonl") == {"a.png": [Caption(text)]}
