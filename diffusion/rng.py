"""Randomness as an argument: one stream of numbers per example, the same whatever batch the example is drawn in."""

import hashlib

import torch
from torch import Tensor


def seed_of(*words: int | str) -> int:
    """A 63-bit seed from any words, such as (run seed, "mask", sample position): SHA-256, so streams do not overlap."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Streams:
    """One generator per example, with three verbs: `uniform`, `normal`, `categorical`.

    Numbers are drawn on the CPU and moved to `device`, so neither the batch size nor the device changes them.
    Shapes include the batch: `shape[0] == len(seeds)`.
    """

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def random(cls, count: int, device: torch.device | str = "cpu") -> "Streams":
        """`count` streams, with seeds drawn from torch's global generator: `torch.manual_seed` fixes them."""
        return cls(torch.randint(2**63 - 1, (count,)).tolist(), device)

    def __len__(self) -> int:
        return len(self.generators)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent U[0, 1) numbers (B, ...)."""
        self._check(shape)
        draws = [torch.rand(shape[1:], generator=generator, dtype=dtype) for generator in self.generators]
        u = torch.stack(draws)
        if self.device.type == "mps":  # Metal has no float64; rounding must not reach 1
            u = u.float().clamp(max=1 - 2**-24)
        return u.to(self.device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent N(0, 1) numbers (B, ...)."""
        self._check(shape)
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in self.generators]).to(
            self.device
        )

    def categorical(self, logits: Tensor) -> Tensor:
        """One draw from softmax(logits) along the last axis: (B, ..., K) -> (B, ...) int64."""
        return sample_categorical(logits, self.uniform(logits.shape[:-1], torch.float64))

    def select(self, rows: list[int]) -> "Streams":
        """The streams of some examples, going on where they are."""
        some = Streams([], self.device)
        some.generators = [self.generators[row] for row in rows]
        return some

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[0] != len(self.generators):
            raise ValueError(
                f"got a batch of {shape[0]} for {len(self.generators)} random streams: give one seed per example"
            )


def sample_categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Draws from softmax(logits) along the last axis, by uniform numbers u: (..., K), (...) in [0, 1) -> (...) int64.

    Inverts the cumulative distribution in float64: float32 Gumbel noise is truncated and draws rare classes at a wrong
    rate. Metal has no float64 and gets float32.
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    cdf = logits.to(precision).softmax(-1).cumsum(-1)
    u = u.to(precision).unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
