"""Words of captions: found as a whole, and at the right tokens of the condition."""

import json
import os
from pathlib import Path

import pytest
import torch

from models.conditions import text
from models.conditions.text import distinct_words, find_words, tokens_of_words
from models.prompt_weights import PromptRules, encode_prompts
from models.tokenizer import Tokenizer

WORDS = Path(os.environ.get("TEXT_FIXTURES", "")) / "daam" / "words.json"
TINY = {"text_width": 8, "text_layers": 1, "text_heads": 2}


def places(caption, phrase):
    return [place for occurrence in find_words(caption, phrase, Tokenizer()) for place in occurrence]


@pytest.mark.skipif(not WORDS.is_file(), reason="TEXT_FIXTURES names no folder with daam/words.json, words of daam")
def test_words_of_the_fixture_are_found_as_a_whole(agrees):
    recorded = json.loads(WORDS.read_text())
    cases = {case: wanted["whole_words_only"] for case, wanted in recorded["search_cases"].items()}
    cases |= {f"{recorded['prompt']} | {phrase}": tokens for phrase, tokens in recorded["indices_in_77"].items()}
    for case, wanted in cases.items():
        found = [place + 1 for place in places(*case.split(" | "))]
        assert agrees(torch.tensor(found), torch.tensor(wanted), f"daam: tokens of {case}", 0), case


def test_phrases_and_words_of_several_pieces_are_found():
    assert places("A red disc, two Red  Discs", "red disc") == [1, 2]
    tokens = Tokenizer().encode("an astrophotographer waits")
    assert len(tokens) > 3 and find_words("an astrophotographer waits", "astrophotographer", Tokenizer()) == [
        range(1, len(tokens) - 1)
    ]
    assert [*map(len, find_words("a dog and a dog", "a dog", Tokenizer()))] == [2, 2]


def test_the_order_of_a_phrase_matters():
    with pytest.raises(ValueError, match="got the word 'disc red', wanted one of 'a red disc': a, red, disc"):
        find_words("a red disc", "disc red", Tokenizer())


def test_parts_of_words_and_nothing_are_refused():
    for phrase in ("hat", "atter"):
        with pytest.raises(ValueError, match=f"got the word '{phrase}', wanted one of"):
            find_words("a hatter", phrase, Tokenizer())
    with pytest.raises(ValueError, match="got the word ' ', wanted letters"):
        find_words("a hatter", " ", Tokenizer())


def test_distinct_words_leave_signs_out():
    assert distinct_words("A disc, a ring. 2 discs!", Tokenizer()) == ["a", "disc", "ring", "2", "discs"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_null": "empty"},
        {"text_null": "empty", "text_padding": "end"},
        {"text_length": 6},
        {"text_length": 6, "text_null": "empty", "text_padding": "zero"},
    ],
    ids=["learned null", "empty null", "padded", "chunks", "padded chunks"],
)
def test_tokens_of_words_are_those_that_the_word_changes(settings):
    """With encoders that do not mix tokens, another word changes the tokens of that word alone."""
    torch.manual_seed(0)
    encoder = text.build(text.Config(**TINY, **settings), 8, 0).eval()
    for block in encoder.encoder.blocks:
        torch.nn.init.zeros_(block.attention.proj.weight)
    caption = "a red disc and two blue rings over sand"
    with torch.no_grad():
        one, other = (
            encoder(each, torch.zeros(2, 1, 4, 4)).values
            for each in ([caption, "a cat"], [caption.replace("blue", "green"), "a cat"])
        )
    changed = (one[0] != other[0]).any(-1).nonzero()[:, 0].tolist()
    assert tokens_of_words(caption, "blue", encoder) == changed


@pytest.mark.parametrize(
    ("syntax", "caption", "phrases"),
    [
        ("a1111", "a (red:1.3) disc, two [blue] rings over sand", ("red", "blue", "red disc")),
        ("a1111", "a (red disc:0.7) BREAK two blue rings", ("red", "blue", "disc")),
        ("a1111", "(a very (red:1.5) disc), one more disc, and two rings of blue over sand", ("red", "blue", "more")),
        ("compel", "a red++ disc, two (blue)0.7 rings", ("red", "blue", "rings")),
        ("compel", '("a red disc", "two blue rings").and()', ("red", "blue", "disc")),
        ("compel", '("a red disc", "two blue rings").blend(0.5, 0.5)', ("red", "blue")),
    ],
)
def test_words_of_weighted_prompts_are_where_they_are_encoded(syntax, caption, phrases):
    """With encoders that do not mix tokens, another word changes the tokens of that word alone."""
    torch.manual_seed(0)
    settings = {"text_null": "empty", "text_padding": "end"} if "++" in caption else {"text_length": 8}
    encoder = text.build(text.Config(**TINY, **settings), 8, 0).eval()
    for block in encoder.encoder.blocks:
        torch.nn.init.zeros_(block.attention.proj.weight)
    rules = PromptRules(
        syntax=syntax,
        length=encoder.length,
        pad_id=encoder.pad_id,
        mask_padding=encoder.pad_id is None,
        restore_mean=syntax != "a1111",  # which scales all tokens
    )

    def embed(ids, mask=None):
        return encoder.encoder(ids).tokens

    def encoded(prompt):
        values, mask = encode_prompts([prompt], encoder.tokenizer, embed, rules)
        return encoder({"caption": values, "caption_mask": mask}, torch.zeros(1, 1, 4, 4)).values[0]

    with torch.no_grad():
        for phrase in phrases:
            other = encoded(caption.replace(phrase.split()[0], "green"))
            changed = (encoded(caption) != other).any(-1).nonzero()[:, 0].tolist()
            found = tokens_of_words(caption, phrase, encoder, syntax)
            first = tokens_of_words(caption, phrase.split()[0], encoder, syntax)
            assert changed == first and found[: len(first)] == first and len(found) == len(phrase.split())
