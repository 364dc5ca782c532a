"""Syntax of prompts: pieces and weights, against those of the web UI and of compel for the same texts."""

import json
from pathlib import Path

import pytest

from models.prompt_syntax import Clause, Piece, parse_a1111, parse_plain
from models.prompts import parse_prompt, plain_words

PROMPTS = Path(__file__).parents[1] / "fixtures" / "prompts"
CASES = json.loads((PROMPTS / "prompts.json").read_text())
COMPEL = json.loads((PROMPTS / "compel_parses.json").read_text())  # by compel 2.5: [texts, shares, weight] of clauses


def sections(prompt: str) -> list[list[Piece]]:
    """The sections of a prompt of one text."""
    ((texts, *_),) = parse_a1111(prompt)
    (text,) = texts
    return [list(section) for section in text]


def pieces(prompt: str) -> list[tuple[str, float]]:
    """The pieces of a prompt of one section."""
    (section,) = sections(prompt)
    return [tuple(piece) for piece in section]


@pytest.mark.parametrize("name", CASES["a1111"])
def test_a1111_pieces_are_those_of_the_web_ui(name):
    parsed = sections(CASES["a1111"][name])
    wanted = CASES["a1111_pieces"][name]
    breaks = [i for i, (text, weight) in enumerate(wanted) if weight == -1]
    wanted = [wanted[i:j] for i, j in zip([0, *(b + 1 for b in breaks)], [*breaks, None], strict=True)]
    assert [[list(piece) for piece in section] for section in parsed] == wanted


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a ((b) c)", [("a ", 1), ("b", 1.21), (" c", 1.1)]),
        ("((b:1.5) c)", [("b", 1.65), (" c", 1.1)]),
        ("[b] [[c]]", [("b", 1 / 1.1), (" ", 1), ("c", 1 / 1.21)]),
        ("(a", [("a", 1.1)]),
        ("[a", [("a", 1 / 1.1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("a:1.4) b", [("a:1.4) b", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a: 0.5 )b", [("a", 0.5), ("b", 1)]),
        ("(a:-1)", [("a", -1)]),
        (r"\(a\) \[b\] \\ c\d", [("(a) [b] \\ cd", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("[a:b] [a: 1 b]", [("a:b", 1 / 1.1), (" ", 1), ("a: 1 b", 1 / 1.1)]),
    ],
)
def test_a1111_brackets(prompt, wanted):
    assert [text for text, _ in pieces(prompt)] == [text for text, _ in wanted]
    assert [weight for _, weight in pieces(prompt)] == pytest.approx([weight for _, weight in wanted])


def test_a1111_break_is_a_break_at_any_depth():
    assert sections("a BREAK b") == [[Piece("a")], [Piece("b")]]
    assert sections("(a BREAK b)") == [[Piece("a", 1.1)], [Piece("b", 1.1)]]
    assert sections("(x [a\n BREAK b] (c BREAK:2)") == [
        [Piece("x ", 1.1), Piece("a", 1.1 / 1.1)],
        [Piece("b", 1.1 / 1.1), Piece(" ", 1.1), Piece("c", 2.2)],
        [Piece("", 2.2)],
    ]
    assert sections("BREAKFAST, unBREAKable, break") == [[Piece("BREAKFAST, unBREAKable, break")]]
    assert sections("a BREAK BREAK") == [[Piece("a")], [Piece("")], [Piece("")]]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a cat AND a dog", "got AND"),
        ("a [cat:dog:0.4]", "prompt editing"),
        ("a [cat:10]", "prompt editing"),
        ("a [(big) cat::.5]", "prompt editing"),
        ("a [(big:1.2) cat:dog: 0.5 ]", "prompt editing"),
        ("a [cat|dog]", "alternation"),
        ("(a [b [cat|dog]])", "alternation"),
    ],
)
def test_a1111_what_changes_during_sampling_is_refused_by_name(prompt, name):
    with pytest.raises(ValueError, match=name) as error:
        parse_a1111(prompt)
    assert prompt in str(error.value).replace("\\\\", "\\")


def test_a1111_what_only_looks_like_it_is_text():
    assert pieces(r"\[cat:dog:0.4\] and a|b, land ANDes (a|b:1.2) \[a|b\]")[0][0].startswith("[cat:dog:0.4] and a|b")


def test_a1111_malformed_weight():
    with pytest.raises(ValueError, match=r"got weight '1\.2\.3' in the prompt"):
        parse_a1111("(a:1.2.3)")


@pytest.mark.parametrize("prompt", COMPEL)
def test_compel_clauses_are_those_of_compel(prompt):
    parsed = parse_prompt(prompt, "compel")
    assert len(parsed) == len(COMPEL[prompt])
    for clause, (texts, shares, weight) in zip(parsed, COMPEL[prompt], strict=True):
        assert [[piece.text for piece in text] for (text,) in clause.texts] == [[t for t, _ in text] for text in texts]
        got = [piece.weight for (text,) in clause.texts for piece in text]
        assert got == pytest.approx([w for text in texts for _, w in text], rel=1e-12)
        assert clause.shares == pytest.approx(shares) and clause.weight == weight


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('("a", "b").and() more', 'got .and inside the prompt .* wanted it at the end: \\("one text"'),
        ('a ("b", "c").blend(1, 1)', "other things than texts in double quotes"),
        ("('a', 'b').and()", "wanted .* double|other things than texts in double quotes"),
        ('("a" "b").and()', "other things than texts in double quotes"),
        ('("a", "b").and(1)', "got 1 weights for 2 texts"),
        ('("a", "b").and(1, much)', "wanted numbers"),
        ('("a", "b").blend(1, -1)', r"weights \[1.0, -1.0\] with the sum 0"),
        ("a cat.swap(dog)", r"got \.swap\(\) .* --seed"),
        ("a (cat).attend(1.5)", r"got \.attend\(\) .* write \(word\)1.5"),
        ("a cat withLora(cats, 0.5)", r"got withLora\(\)"),
    ],
)
def test_compel_what_does_not_fit_is_an_error(prompt, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(prompt, "compel")


def test_compel_backslash_before_any_sign_is_left_out():
    assert parse_prompt(r"C\+\+ and (1\.5\, x)2 \= y", "compel") == (
        Clause(texts=(((Piece("C++ and"), Piece("1.5, x", 2.0), Piece("= y")),),)),
    )


def test_deep_brackets_take_no_exponential_time():
    assert parse_prompt("(" * 60 + "a" + ")" * 60, "compel")[0].texts[0][0][0].text == "a"
    assert parse_prompt("( " * 60 + "a", "compel")[0].texts[0][0][0].text.endswith("( a")


def test_brackets_of_plain_text_are_characters():
    text = "a (cat:1.4) [dog|bird] AND (x)++ BREAK"
    assert parse_plain(text) == parse_prompt(text) == (Clause(texts=(((Piece(text),),),)),)


def test_an_unknown_syntax_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="got prompt_syntax 'a111', did you mean 'a1111'"):
        parse_prompt("a", "a111")


@pytest.mark.parametrize(
    ("syntax", "prompt", "words"),
    [
        ("plain", "a (red:1.4) cat", "a (red:1.4) cat"),
        ("a1111", "a (red:1.4) [cat] BREAK on \\(the\\) mat", "a red cat on (the) mat"),
        ("a1111", "a cat (dog:0)", "a cat"),
        ("compel", "a (red)1.4 cat++", "a red cat"),
        ("compel", '("a cat", "a dog").blend(0.5, 0.5)', "a cat a dog"),
        ("compel", '("a cat", "a dog").and(1, -0.5)', "a cat"),
        ("compel", "", ""),
    ],
)
def test_plain_words_are_those_without_the_syntax(syntax, prompt, words):
    assert plain_words(parse_prompt(prompt, syntax)) == words
