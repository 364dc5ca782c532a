"""Several captions of an image, of which every visit shows one."""

from collections.abc import Sequence
from typing import Any

from diffusion.rng import seed_of


def choose_caption(item: dict[str, Any], seed: int | None = None, position: int = 0) -> dict[str, Any]:
    """Adds to an item with a list `captions` the field `caption`: the first one, "" if there is none, or with a `seed`
    the one of this position. An item that has a caption keeps it."""
    captions = item.get("captions")
    if not isinstance(captions, list) or "caption" in item:
        return item
    number = 0 if seed is None or not captions else seed_of(seed, "caption", position) % len(captions)
    return item | {"caption": captions[number] if captions else ""}


def choose_captions(
    items: Sequence[dict[str, Any]], seed: int | None, positions: Sequence[int]
) -> list[dict[str, Any]]:
    """Applies `choose_caption` to the items at these positions."""
    return [choose_caption(item, seed, position) for item, position in zip(items, positions, strict=True)]
