"""Finite scalar quantization: each channel is rounded to a few levels (Mentzer et al. 2023, FSQ)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ranges import SIZE
from models.sdpa import upcast
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext

BOUND_EPS = 1e-3  # relative margin of the bound inside the outermost levels


@dataclass(frozen=True, kw_only=True)
class Config(QuantizerConfig):
    """FSQ; a code has one channel per entry of fsq_levels, and --emb_dim is not used."""

    fsq_levels: tuple[int, ...] = ()
    """Number of levels of each channel; default: 8s and 4s whose product is codebook_size, a power of 2."""

    RANGES = {"fsq_levels": SIZE}

    def levels(self, codebook_size: int) -> tuple[int, ...]:
        """Returns the number of levels of each channel; ValueError if their product is not codebook_size."""
        bits = codebook_size.bit_length() - 1
        if not self.fsq_levels and (bits < 2 or 2**bits != codebook_size):
            raise ValueError(
                f"got codebook_size {codebook_size} for fsq, wanted a power of 2, at least 4: or pass --fsq_levels"
            )
        eights, rest = divmod(bits, 3)
        levels = self.fsq_levels or {0: (8,) * eights, 1: (8,) * (eights - 1) + (4, 4), 2: (8,) * eights + (4,)}[rest]
        if min(levels) < 2 or math.prod(levels) != codebook_size:
            raise ValueError(
                f"got fsq_levels {levels}, whose product is {math.prod(levels)}, for codebook_size {codebook_size}: "
                f"pass --codebook_size {math.prod(levels)}, and at least 2 levels each"
            )
        return levels

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        return len(self.levels(codebook_size))


class FSQQuantizer(Quantizer):
    """Rounds channel d of z to one of L = levels[d] multiples of 1 / (L // 2) in [-1, 1] (eq. 1, 2); D = len(levels).

    The straight-through gradient passes through the rounding and then through `bound`. There are no parameters, and the
    loss is 0. Ids are in mixed radix with channel 0 as the lowest digit: id = l_0 + L_0 (l_1 + L_1 (l_2 + ...)), where
    l_d in [0, L_d) is the level of channel d.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels, self.codebook_size, self.dim = tuple(levels), math.prod(levels), len(levels)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        bounded = [bound(x, L) for x, L in zip(z.unbind(1), self.levels, strict=True)]
        rounded = [x.detach().round() for x in bounded]
        zeros = [x - x.detach() for x in bounded]  # carry the gradient
        vectors = [(r + zero) / (L // 2) for r, zero, L in zip(rounded, zeros, self.levels, strict=True)]
        loss = z[:, :0].sum((1, 2, 3))  # 0, but differentiable
        return Quantized(self.ids(rounded), torch.stack(vectors, 1), loss, {})

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        z = upcast(z)
        return self.ids([bound(x, L).round() for x, L in zip(z.unbind(1), self.levels, strict=True)])

    def ids(self, rounded: list[Tensor]) -> Tensor:
        """Returns ids (B, h, w) of the integers of each channel (B, h, w), which start at -(L // 2)."""
        ids = torch.zeros_like(rounded[0], dtype=torch.int64)
        for x, L in zip(reversed(rounded), reversed(self.levels), strict=True):
            ids = ids * L + x.long() + L // 2
        return ids

    def vectors(self, ids: Tensor) -> Tensor:
        vectors = []
        for L in self.levels:
            vectors.append((ids % L - L // 2).float() / (L // 2))
            ids = ids // L
        return torch.stack(vectors, 1)

    @torch.no_grad()
    def ids_of(self, vectors: Tensor) -> Tensor:
        channels = zip(upcast(vectors).unbind(1), self.levels, strict=True)
        return self.ids([(x * (L // 2)).round().clamp(-(L // 2), (L - 1) // 2) for x, L in channels])


def bound(z: Tensor, levels: int) -> Tensor:
    """Bounds z, elementwise, so that it rounds to the integers from -(levels // 2) to (levels - 1) // 2 (appendix A.1).

    Returns (L - 1) / 2 (1 - 1e-3) tanh(z + shift) - offset. An even number of levels is offset by half a step, and the
    shift keeps 0 near 0. As in the paper it is a tangent; the exact inverse, artanh, does not exist for two levels.
    """
    half, offset = (levels - 1) / 2 * (1 - BOUND_EPS), 0.0 if levels % 2 else 0.5
    return half * (z + math.tan(offset / half)).tanh() - offset


def build(config: Config, codebook_size: int, dim: int) -> FSQQuantizer:
    """Builds the quantizer, with `codebook_size` codes; its levels set the width."""
    return FSQQuantizer(config.levels(codebook_size))
