"""Canvases larger than the grid a network was trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.guidance import Denoiser


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Offsets of windows that cover [0, length): every `stride`, and one flush with the end."""
    if length < window:
        raise ValueError(
            f"a canvas of {length} is smaller than the window of {window}: pass a --shape of at least {window} per side"
        )
    if not 1 <= stride <= window:
        raise ValueError(f"got window stride {stride}, wanted 1..{window}, or windows leave gaps: pass --window_stride")
    return sorted({*range(0, length - window + 1, stride), length - window})


def windowed(denoise: Denoiser, window: tuple[int, int], stride: int = 1, batch: int = 64) -> Denoiser:
    """A denoiser for any canvas (B, H, W) out of one for `window`.

    The probabilities of all windows over a position are averaged (Bond-Taylor et al. 2022, section 3.4, "mixture").

    Windows are evaluated about `batch` at a time, always as whole copies of the canvas batch: the inner denoiser gets
    (n B, h, w), row i belonging to canvas i mod B.
    """

    def on_canvas(x: Tensor, t: Tensor) -> Tensor:
        B, H, W = x.shape
        h, w = window
        places = [(i, j) for i in window_starts(H, h, stride) for j in window_starts(W, w, stride)]
        together = max(1, batch // B)
        total, count = 0.0, x.new_zeros(H, W, 1, dtype=torch.float32)
        for first in range(0, len(places), together):
            part = places[first : first + together]
            crops = torch.cat([x[:, i : i + h, j : j + w] for i, j in part])  # (n B, h, w)
            probabilities = denoise(crops, t.repeat(len(part))).float().softmax(-1)  # (n B, h, w, K)
            for (i, j), p in zip(part, probabilities.split(B), strict=True):
                total = total + F.pad(p, (0, 0, j, W - w - j, i, H - h - i))
                count[i : i + h, j : j + w] += 1
        return (total / count).log()

    return on_canvas
