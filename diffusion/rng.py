"""Explicit randomness: one random stream per example, so results do not depend on how examples are batched."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(*words: int | str) -> int:
    """Returns a 63-bit seed hashed (SHA-256) from words such as (run seed, "mask", sample position)."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copies values (n, ...) from the CPU to a device without waiting for it; for CUDA, from pinned memory."""
    if values.is_cpu and device.type not in ("cpu", "mps") and torch.cuda.is_available():
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "mps")


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
        return self.move_uniform(self.uniform_on_cpu(shape, dtype))

    def uniform_on_cpu(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the numbers of `uniform` on the CPU, for decisions that must not wait for the device."""
        self._check(shape)
        u = torch.empty(shape, dtype=dtype)
        for row, generator in zip(u.unbind(), self.generators, strict=True):
            row.uniform_(generator=generator)
        return u

    def move_uniform(self, u: Tensor) -> Tensor:
        """Moves numbers in [0, 1) from the CPU to the streams' device."""
        if self.device.type == "mps":  # Metal has no float64; rounding must not give 1
            u = u.float().clamp(max=1 - 2**-24)
        return to_device(u, self.device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Returns independent N(0, 1) numbers (B, ...)."""
        self._check(shape)
        noise = torch.empty(shape)
        for row, generator in zip(noise.unbind(), self.generators, strict=True):
            row.normal_(generator=generator)
        return to_device(noise, self.device)

    def categorical(self, logits: Tensor) -> Tensor:
        """Samples from softmax(logits) along the last axis: (B, ..., K) -> (B, ...) int64."""
        return sample_categorical(logits, self.uniform(logits.shape[:-1], torch.float64))

    def select(self, rows: Sequence[int]) -> "Streams":
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
    return invert_cdf(logits.to(precision).softmax(-1).cumsum(-1), u.to(precision))


def invert_cdf(cdf: Tensor, u: Tensor) -> Tensor:
    """Returns the class of each u (...) in [0, 1): cdf (..., K), whose last number need not be 1 -> (...) int64."""
    u = u.unsqueeze(-1) * cdf[..., -1:]
    return torch.searchsorted(cdf, u, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)
