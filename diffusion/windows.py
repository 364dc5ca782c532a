"""Canvases larger than the grid a network was trained on."""

import torch
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


def windowed(
    denoise: Denoiser, window: tuple[int, int], stride: int = 1, batch: int = 64, mask: int | None = None
) -> Denoiser:
    """A denoiser for any canvas (B, H, W) out of one for `window`.

    The probabilities of all windows over a position are averaged (Bond-Taylor et al. 2022, section 3.4, "mixture").

    The inner denoiser gets up to `batch` windows at a time, (n, h, w), with `rows` (n,), the canvas of each. With
    `mask`, windows in which nothing is masked are left out: what they say of known codes nobody asks for.
    """
    h, w = window

    def on_canvas(x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        B, H, W = x.shape
        rows = torch.arange(B, device=x.device) if rows is None else rows
        places = [(i, j) for i in window_starts(H, h, stride) for j in window_starts(W, w, stride)]
        crops = torch.stack([x[:, i : i + h, j : j + w] for i, j in places])  # (n, B, h, w)
        wanted = crops.new_ones(crops.shape[:2]) if mask is None else (crops == mask).flatten(2).any(2)
        wanted[0, 0] |= not wanted.any()  # someone must say how many codes there are
        total, count = None, x.new_zeros(B, H, W, 1, dtype=torch.float32)
        for part in wanted.nonzero().split(batch):  # (window, canvas)
            of = part[:, 1]
            said = denoise(crops[part[:, 0], of], t[of], rows[of]).float().softmax(-1)  # (n, h, w, K)
            total = said.new_zeros(B, H, W, said.shape[-1]) if total is None else total
            for p, (place, canvas) in zip(said, part.tolist(), strict=True):
                i, j = places[place]
                total[canvas, i : i + h, j : j + w] += p
                count[canvas, i : i + h, j : j + w] += 1
        return (total / count.clamp(min=1)).log()

    return on_canvas
