"""Explicit randomness: one random stream per example, so results do not depend on how examples are batched."""

import hashlib

import torch
from torch import Tensor


def seed_of(*words: int | str) -> int:
    """Returns a 63-bit seed hashed (SHA-256) from words such as (run seed, "mask", sample position)."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Streams:
    """One random generator per example, with three methods: `uniform`, `normal` and `categorical`.

    Numbers are drawn on the CPU and moved to `device`, so they depend on neither the batch size nor the device.
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
        """Returns independent U[0, 1) numbers (B, ...)."""
        self._check(shape)
        draws = [torch.rand(shape[1:], generator=generator, dtype=dtype) for generator in self.generators]
        u = torch.stack(draws)
        if self.device.type == "mps":  # Metal has no float64; rounding must not give 1
            u = u.float().clamp(max=1 - 2**-24)
        return u.to(self.device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Returns independent N(0, 1) numbers (B, ...)."""
        self._check(shape)
        return torch.stack([torch.randn(shape[1:], generator=generator) for generator in self.generators]).to(
            self.device
        )

    def categorical(self, logits: Tensor) -> Tensor:
        """Samples from softmax(logits) along the last axis: (B, ..., K) -> (B, ...) int64."""
        return sample_categorical(logits, self.uniform(logits.shape[:-1], torch.float64))

    def select(self, rows: list[int]) -> "Streams":
        """Returns the streams of some examples. They share state with the originals."""
        selected = Streams([], self.device)
        selected.generators = [self.generators[row] for row in rows]
        return selected

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[0] != len(self.generators):
            raise ValueError(
                f"got a batch of {shape[0]} for {len(self.generators)} random streams: give one seed per example"
            )


def sample_categorical(logits: Tensor, u: Tensor) -> Tensor:
    """Samples from softmax(logits) by inverse CDF: logits (..., K), u (...) uniform in [0, 1) -> (...) int64.

    Computed in float64: float32 Gumbel noise is truncated and samples rare classes at the wrong rate. Metal has no
    float64 and uses float32.
    """
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    cdf = logits.to(precision).softmax(-1).cumsum(-1)
    u = u.to(precision).unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
