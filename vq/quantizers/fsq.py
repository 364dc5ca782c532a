"""A few numbers, each rounded to one of a few levels: no codebook at all (Mentzer et al. 2023, FSQ)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vq.quantizer import upcast
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext

BOUND_EPS = 1e-3  # share by which bounds stay within the outermost levels


@dataclass(frozen=True, kw_only=True)
class Config(QuantizerConfig):
    """FSQ. A code has a number for each level: --emb_dim is not used."""

    fsq_levels: tuple[int, ...] = ()
    """Levels of each number; left out, 8s (and 4s) whose product is codebook_size, a power of 2."""

    def levels(self, codebook_size: int) -> tuple[int, ...]:
        """The levels of each number, whose product is codebook_size; ValueError where it is not."""
        bits = codebook_size.bit_length() - 1
        if not self.fsq_levels and (bits < 2 or 2**bits != codebook_size):
            raise ValueError(
                f"got codebook_size {codebook_size}, no power of 2 from 4 on, for fsq: pass its --fsq_levels"
            )
        eights, rest = divmod(bits, 3)
        levels = self.fsq_levels or {0: (8,) * eights, 1: (8,) * (eights - 1) + (4, 4), 2: (8,) * eights + (4,)}[rest]
        if min(levels) < 2 or math.prod(levels) != codebook_size:
            raise ValueError(
                f"got fsq_levels {levels}, whose product is {math.prod(levels)}, for codebook_size {codebook_size}: "
                f"pass --codebook_size {math.prod(levels)}, and levels of 2 at least"
            )
        return levels

    def code_dim(self, codebook_size: int, emb_dim: int) -> int:
        return len(self.levels(codebook_size))


class FSQQuantizer(Quantizer):
    """Number d of z (D = len(levels)) becomes one of levels[d] multiples of 1 / (levels[d] // 2) in [-1, 1] (eq. 1, 2).

    The gradient passes straight through the rounding, and so through `bound`. There is nothing to learn: loss = 0.
    The id has the levels as digits, the first number's last: id = l_0 + L_0 (l_1 + L_1 (l_2 + ...)), l_d from 0.
    """

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels, self.codebook_size, self.dim = tuple(levels), math.prod(levels), len(levels)

    def forward(self, z: Tensor, context: StepContext | None = None) -> Quantized:
        z = upcast(z)
        numbers = [bound(each, of) for each, of in zip(z.unbind(1), self.levels, strict=True)]
        rounded = [x.detach().round() for x in numbers]
        passed = [x - x.detach() for x in numbers]  # 0, with the gradient
        vectors = [(r + p) / (of // 2) for r, p, of in zip(rounded, passed, self.levels, strict=True)]
        nothing = z[:, :0].sum((1, 2, 3))  # 0, and training can go through it backwards
        return Quantized(self.ids(rounded), torch.stack(vectors, 1), nothing, {})

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        z = upcast(z)
        return self.ids([bound(each, of).round() for each, of in zip(z.unbind(1), self.levels, strict=True)])

    def ids(self, rounded: list[Tensor]) -> Tensor:
        """Whole numbers, from -(L // 2) on, of each level (B, h, w) -> ids (B, h, w)."""
        ids = torch.zeros_like(rounded[0], dtype=torch.int64)
        for each, of in zip(reversed(rounded), reversed(self.levels), strict=True):
            ids = ids * of + each.long() + of // 2
        return ids

    def vectors(self, ids: Tensor) -> Tensor:
        vectors = []
        for of in self.levels:
            vectors.append((ids % of - of // 2).float() / (of // 2))
            ids = ids // of
        return torch.stack(vectors, 1)

    @torch.no_grad()
    def ids_of(self, vectors: Tensor) -> Tensor:
        numbers = zip(upcast(vectors).unbind(1), self.levels, strict=True)
        return self.ids([(x * (of // 2)).round().clamp(-(of // 2), (of - 1) // 2) for x, of in numbers])


def bound(z: Tensor, levels: int) -> Tensor:
    """z of any range -> within half a step of whole numbers from -(levels // 2) to (levels - 1) // 2 (appendix A.1).

    (L - 1) / 2 (1 - 1e-3) tanh(z + shift) - offset: an even number of levels lies half a step to one side, and the
    shift keeps 0 near 0. It is the tangent, as in the paper: the inverse, artanh, does not exist for two levels.
    """
    half, offset = (levels - 1) / 2 * (1 - BOUND_EPS), 0.0 if levels % 2 else 0.5
    return half * (z + math.tan(offset / half)).tanh() - offset


def build(config: Config, codebook_size: int, dim: int) -> FSQQuantizer:
    return FSQQuantizer(config.levels(codebook_size))
