"""Several captions of an image, of which every visit shows one, and long captions in pieces."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from diffusion.rng import seed_of

SHARES = "caption_shares"  # a field beside `captions`: how often each is shown, in proportion
SEPARATORS = [re.compile(pattern) for pattern in (r"(?<=[.!?])\s+", r"(?<=[,;:])\s+", r"\s+")]  # sentence, phrase, word


def choose_caption(item: dict[str, Any], seed: int | None = None, position: int = 0) -> dict[str, Any]:
    """Adds to an item with a list `captions` the field `caption`: the first one, "" if there is none, or with a `seed`
    the one of this position. An item that has a caption keeps it.

    All captions are equally likely, or as likely as their `caption_shares` (n,), numbers of which one is above 0; a
    caption whose share is 0 is never chosen.
    """
    captions = item.get("captions")
    if not isinstance(captions, list) or "caption" in item:
        return item
    shares, number = item.get(SHARES), 0 if seed is None else seed_of(seed, "caption", position)
    if captions:
        number = number % len(captions) if shares is None else choose_by_share(number, shares)
    rest = {name: value for name, value in item.items() if name != SHARES}
    return rest | {"caption": captions[number] if captions else ""}


def choose_by_share(number: int, shares: Sequence[float]) -> int:
    """Returns the index that a random whole number chooses, each in proportion to its share."""
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + float(share))
    place = number % 2**53 / 2**53 * bounds[-1]  # in [0, total)
    return next(i for i, bound in enumerate(bounds[1:]) if place < bound)


def choose_captions(
    items: Sequence[dict[str, Any]], seed: int | None, positions: Sequence[int]
) -> list[dict[str, Any]]:
    """Applies `choose_caption` to the items at these positions."""
    return [choose_caption(item, seed, position) for item, position in zip(items, positions, strict=True)]


def long_split(text: str, encode: Callable[[str], list[int]], limit: int = 75, level: int = 0) -> list[str]:
    """Cuts a text into pieces of at most `limit` tokens, as long as they can be: after sentences or, in a sentence that
    is too long, after phrases, else words, else within a word.

    `encode` gives the tokens of a text. Without white space the pieces together are the text; of a blank text there are
    none. `level` is the first of SEPARATORS to try.
    """
    text = text.strip()
    if len(encode(text)) <= limit:
        return [text] if text else []
    if level == len(SEPARATORS):
        middle = len(text) // 2
        return long_split(text[:middle], encode, limit, level) + long_split(text[middle:], encode, limit, level)
    pieces: list[str] = []
    for part in SEPARATORS[level].split(text):
        joined = f"{pieces[-1]} {part}" if pieces else part
        if len(encode(joined)) <= limit:
            pieces[-1:] = [joined]
        else:
            pieces += long_split(part, encode, limit, level + 1)
    return pieces
