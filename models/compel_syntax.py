"""The syntax of compel: weights after words and brackets, clauses joined by .and(), texts averaged by .blend().

(x)1.5 is that weight, x++ is 1.1 per sign, x-- is 0.9 per sign; brackets may be nested, weights multiply. A text of
quoted parts is ("a", "b").and(1, 0.5) or ("a", "b").blend(0.25, 0.75). A sign after a backslash is a character.
A bracket that follows a letter, or has no partner, is a character, as in compel's own parser (2.5). Unlike there, text
after .and() and .blend() is an error, and a backslash before any sign is left out.
"""

import re
from collections.abc import Sequence

from models.prompt_syntax import Clause, Piece, Prompt, Text

MORE, LESS = 1.1, 0.9  # factors of each sign + and -
SIGNS = r'()",.+\-='
WORD = re.compile(rf"(?:\\[{SIGNS}]|[+-](?=[^\s{SIGNS}])|[^\s{SIGNS}])+")
ANY_WORD = re.compile(r"\S+")
SPACE = re.compile(r"\s*")
QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
SIGN_WEIGHT = re.compile(r"\++|-+")
WEIGHT = re.compile(r"\++|-+|[+-]?(?:\d+\.\d*|\.\d+)|-?\d+")
ESCAPE = re.compile(rf"\\([{SIGNS}])")
OPERATOR = re.compile(r"(?<!\\)\)\s*\.(and|add|blend)\s*\(([^()]*)\)\s*$")
UNSUPPORTED = re.compile(r"\.swap\s*\(|\.attend\s*\(|\b(?:with|use)Lora\s*\(")
REMEDIES = {
    ".swap": "word swaps (attention control) are not supported: sample each prompt with the same --seed",
    ".attend": "write (word)1.5",
    "withLora": "low-rank weights are not part of a prompt: leave it out",
    "useLora": "low-rank weights are not part of a prompt: leave it out",
}


def parse_compel(prompt: str) -> Prompt:
    """Returns the clauses of a prompt in compel's syntax.

    ValueError for malformed .and() and .blend(), and for .swap(), .attend() and LoRAs, which are not supported.
    """
    if unsupported := UNSUPPORTED.search(prompt):
        name = unsupported[0].rstrip("( \t\n")
        raise ValueError(f"got {name}() in the prompt {prompt!r}: {REMEDIES[name]}")
    text = re.sub(r",(\S)", r", \1", prompt)
    operator = OPERATOR.search(text)
    if operator is None:
        if misplaced := re.search(r"(?<!\\)\)\s*\.(and|add|blend)\b", text):
            got = f"got .{misplaced[1]} inside the prompt {prompt!r}"
            raise ValueError(f'{got}, wanted it at the end: ("one text", "another text").{misplaced[1]}(1, 0.5)')
        return (Clause(texts=(join_pieces(parse_words(text)),)),)
    parts = quoted_parts(text[: operator.start()], prompt)
    texts = [join_pieces(parse_quoted(part) or parse_words(part)) for part in parts]
    weights, normalize = operator_weights(operator[2], len(texts), prompt)
    if operator[1] != "blend":
        return tuple(Clause(texts=(each,), weight=weight) for each, weight in zip(texts, weights, strict=True))
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise ValueError(f"got .blend weights {weights} with the sum 0, wanted another sum, or no_normalize at the end")
    return (Clause(texts=tuple(texts), shares=tuple(weight / total for weight in weights)),)


def quoted_parts(text: str, prompt: str) -> list[str]:
    """Returns the texts in ("a", "b" without its last bracket; ValueError unless they are in double quotes."""
    parts, i = [], SPACE.match(text).end()
    opened = text[i : i + 1] == "("
    while opened:
        found = QUOTED.match(text, SPACE.match(text, i + 1).end())
        if found is None:
            break
        parts.append(found[1])
        i = SPACE.match(text, found.end()).end()
        if i == len(text):
            return parts
        opened = text[i] == ","
    got = f"got .and or .blend after other things than texts in double quotes in the prompt {prompt!r}"
    raise ValueError(f'{got}, wanted ("one text", "another text").and(), and \\" for quotes in a text')


def operator_weights(options: str, count: int, prompt: str) -> tuple[list[float], bool]:
    """Returns the weights in the brackets of .and() or .blend(), 1 each without any, and whether to normalise them."""
    words = [word.strip() for word in options.split(",") if word.strip()]
    normalize = "no_normalize" not in words[-1:]
    words = words if normalize else words[:-1]
    try:
        weights = [float(word) for word in words] or [1.0] * count
    except ValueError as error:
        raise ValueError(f"got weights {options!r} in the prompt {prompt!r}, wanted numbers: .and(1, 0.5)") from error
    if len(weights) != count:
        raise ValueError(f"got {len(weights)} weights for {count} texts in the prompt {prompt!r}, wanted one for each")
    return weights, normalize


def join_pieces(parsed: Sequence[Piece]) -> Text:
    """Returns one section of pieces; neighbours of equal weight are one piece, joined by a space."""
    pieces: list[Piece] = []
    for piece in parsed:
        if pieces and pieces[-1].weight == piece.weight:
            pieces[-1] = Piece(f"{pieces[-1].text} {piece.text}", piece.weight)
        else:
            pieces.append(piece)
    return (tuple(pieces) or (Piece(""),),)


def parse_words(text: str) -> list[Piece]:
    """Parses text outside brackets, where whatever is no weighted part is a word up to the next space."""
    pieces, i = [], SPACE.match(text).end()
    while i < len(text):
        part = parse_part(text, i)
        if part is None:
            word = ANY_WORD.match(text, i)
            part = [Piece(unescape(word[0]))], word.end()
        pieces += part[0]
        i = SPACE.match(text, part[1]).end()
    return pieces


Part = tuple[list[Piece], int]  # pieces, and where the text after them begins


def parse_part(text: str, i: int) -> Part | None:
    """Parses a bracket or quoted text, with or without a weight right behind it, or a word with one; None if there is
    none here."""
    if group := parse_group(text, i):
        weight = WEIGHT.match(text, group[1])
        return group if weight is None else (multiply(group[0], weight[0]), weight.end())
    word = WORD.match(text, i)
    weight = None if word is None else SIGN_WEIGHT.match(text, word.end())
    return None if weight is None else (multiply([Piece(unescape(word[0]))], weight[0]), weight.end())


def parse_group(text: str, i: int) -> Part | None:
    """Parses "(...)" or text in double quotes; None if there is none here."""
    if quoted := QUOTED.match(text, i):
        inside = parse_quoted(quoted[1])
        return None if inside is None else (inside, quoted.end())
    if text[i : i + 1] != "(":
        return None
    inside, stop = parse_inside(text, i + 1)
    return (inside, stop + 1) if text[stop : stop + 1] == ")" else None


def parse_quoted(content: str) -> list[Piece] | None:
    """Parses what stands between double quotes; None if it is not made of words, brackets, commas and full stops."""
    inside, stop = parse_inside(content, 0)
    return (inside or [Piece("")]) if stop == len(content) else None


def parse_inside(text: str, i: int) -> Part:
    """Parses text in brackets or quotes, where commas and full stops are pieces, up to what is none of these."""
    pieces, i = [], SPACE.match(text, i).end()
    while i < len(text):
        part = parse_part(text, i)
        if part is None and (word := WORD.match(text, i)):
            part = [Piece(unescape(word[0]))], word.end()
        if part is None and text[i] in ",.":
            part = [Piece(text[i])], i + 1
        if part is None:
            break
        pieces += part[0]
        i = SPACE.match(text, part[1]).end()
    return pieces, i


def multiply(pieces: Sequence[Piece], weight: str) -> list[Piece]:
    """Multiplies the weights of pieces by "1.5", or by a power of 1.1 or 0.9 for "++" or "--"."""
    bases = {"+": MORE, "-": LESS}
    factor = bases[weight[0]] ** len(weight) if set(weight) <= {"+"} or set(weight) <= {"-"} else float(weight)
    return [Piece(piece.text, piece.weight * factor) for piece in pieces]


def unescape(word: str) -> str:
    """Returns a word without the backslashes before signs."""
    return ESCAPE.sub(r"\1", word)
