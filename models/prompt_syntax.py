"""Prompts as pieces with weights, and how plain text and the syntax of the web UI (A1111) become such pieces.

A1111: (x) 1.1 times, [x] 1 / 1.1 times, (x:1.4) that weight; brackets may be nested, weights multiply. A bracket after
a backslash is a character, one without its partner reaches to the end. BREAK, at any depth, starts a new chunk.
"""

import re
from typing import NamedTuple


class Piece(NamedTuple):
    """A piece of text that is tokenized alone, and the weight of its tokens."""

    text: str
    weight: float = 1.0


Section = tuple[Piece, ...]  # pieces that may share a chunk
Text = tuple[Section, ...]  # sections, each of which begins a chunk


class Clause(NamedTuple):
    """A mean of the embeddings of texts, with shares, and the weight of the result beside that of no text."""

    texts: tuple[Text, ...]
    shares: tuple[float, ...] = (1.0,)
    weight: float = 1.0


Prompt = tuple[Clause, ...]  # clauses, whose embeddings are joined to one sequence

ROUND, SQUARE = 1.1, 1 / 1.1  # factors of a pair of brackets
BREAK = re.compile(r"\s*\bBREAK\b\s*")
AND = re.compile(r"\bAND\b")
WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*\)")  # ":1.4)" closes a round bracket
TOKEN = re.compile(rf"\\[\\()\[\]]|\\|[()\[\]]|{WEIGHT.pattern}|[^\\()\[\]:]+|:")
SCHEDULE = re.compile(r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*$")  # the end of [a:b:0.4] and [a:0.4]


def parse_plain(text: str) -> Prompt:
    """Returns the text as it is."""
    return (Clause(texts=(((Piece(text),),),)),)


def parse_a1111(text: str) -> Prompt:
    """Parses the weights and breaks of the web UI; ValueError for AND, [a:b:0.4], [a|b] and malformed weights."""
    refuse_composition(text)
    weighted = _Weighted()
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where the text of each open bracket begins
    for token in TOKEN.finditer(text):
        sign = token[0]
        if sign.startswith("\\"):
            weighted.add(sign[1:])
        elif sign in opened:
            opened[sign].append(len(weighted))
        elif token[1] is not None and opened["("]:
            weighted.multiply(opened["("].pop(), parse_weight(token[1], text))
        elif sign == ")" and opened["("]:
            weighted.multiply(opened["("].pop(), ROUND)
        elif sign == "]" and opened["["]:
            weighted.multiply(opened["["].pop(), SQUARE)
        else:
            weighted.add_with_breaks(sign)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            weighted.multiply(start, factor)
    return (Clause(texts=(weighted.sections(),)),)


class _Weighted:
    """Pieces of text with weights that later brackets multiply, and breaks between them."""

    def __init__(self):
        self.texts: list[str | None] = []  # None: a break
        self.weights: list[float] = []

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str | None) -> None:
        self.texts.append(text)
        self.weights.append(1.0)

    def add_with_breaks(self, text: str) -> None:
        for i, part in enumerate(BREAK.split(text)):
            if i:
                self.add(None)
            self.add(part)

    def multiply(self, start: int, factor: float) -> None:
        for i in range(start, len(self)):
            self.weights[i] *= factor

    def sections(self) -> Text:
        """Returns the pieces between breaks; neighbours of equal weight are one piece."""
        sections: list[list[Piece]] = [[]]
        for text, weight in zip(self.texts, self.weights, strict=True):
            if text is None:
                sections.append([])
            elif sections[-1] and sections[-1][-1].weight == weight:
                sections[-1][-1] = Piece(sections[-1][-1].text + text, weight)
            else:
                sections[-1].append(Piece(text, weight))
        return tuple(tuple(section) or (Piece(""),) for section in sections)


def parse_weight(number: str, prompt: str) -> float:
    """Returns the weight in "(x:1.4)"; ValueError unless it is a number."""
    try:
        return float(number)
    except ValueError as error:
        raise ValueError(f"got weight {number!r} in the prompt {prompt!r}, wanted a number: (word:1.4)") from error


def refuse_composition(prompt: str) -> None:
    """Raises ValueError, with the name, for what the web UI does step by step: AND, [a:b:0.4] and [a|b]."""
    if AND.search(prompt):
        remedy = "write and in lower case, or BREAK for a new chunk"
        raise ValueError(
            f"got AND (composable diffusion) in the prompt {prompt!r}, which samples parts apart: {remedy}"
        )
    opened: list[list[str]] = []  # the open brackets, each with the text directly inside
    for token in TOKEN.finditer(prompt):
        sign = token[0]
        if sign in ("(", "["):
            opened.append([sign, ""])
        elif sign == "]" and opened and opened[-1][0] == "[":
            refuse_schedule(opened.pop()[1], prompt)
        elif sign.endswith(")") and opened and opened[-1][0] == "(":
            opened.pop()
        elif opened:
            opened[-1][1] += "_" if sign.startswith("\\") else sign


def refuse_schedule(content: str, prompt: str) -> None:
    """Raises ValueError if the content of square brackets is a prompt that changes during sampling."""
    found = "[a|b] (alternation)" if "|" in content else "[a:b:0.4] (prompt editing)"
    if "|" in content or SCHEDULE.search(content):
        remedy = "one prompt holds for all steps here; write \\[ for a bracket that is a character"
        raise ValueError(f"got {found} in the prompt {prompt!r}: {remedy}")
