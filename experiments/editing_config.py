"""Flags that scripts which edit images share. Free of torch: `--help` is quick."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """Images to begin from."""

    image: tuple[str, ...] = ()
    """Image files, cut as in training; left out, held-out images of the data set."""
    n_images: int = 64
    """So many held-out images, drawn at random, always the same."""

    def __post_init__(self):
        if self.n_images < 1:
            raise ValueError(f"got n_images {self.n_images}, wanted at least 1: pass --n_images N")


def check_strength(strength: float, least: str = "") -> None:
    """ValueError for a strength outside [0, 1]; with `least`, what 0 would be, for 0 too."""
    if not 0 <= strength <= 1 or (least and strength == 0):
        wanted = f"more than 0 ({least}) and up to 1" if least else "0 (nothing is drawn anew) to 1 (everything)"
        raise ValueError(f"got strength {strength}, wanted {wanted}: pass --strength X")
