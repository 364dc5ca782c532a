"""Half precision: bfloat16 where the machine computes it natively, float16 with a loss scale where it does not."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def half_dtype(device: torch.device, choice: str = "auto") -> torch.dtype | None:
    """The type that autocast computes in; None: float32.

    auto: bfloat16 where it is native, else float16 on CUDA (whose tensor cores had it first), else None. A type that
    is named is taken as it is, also where it is emulated. float16 trains with a `LossScale`.
    """
    if choice in HALF_DTYPES:
        return HALF_DTYPES[choice]
    if choice != "auto":
        raise ValueError(f"unknown amp dtype {choice!r}; there are: auto, {', '.join(HALF_DTYPES)}")
    if has_native_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def autocast(device: torch.device, enabled: bool, dtype: torch.dtype | None = None) -> AbstractContextManager:
    """Autocast to `dtype`; without one, to bfloat16 where `has_native_bf16`, so that nothing is emulated unasked."""
    if dtype is None:
        dtype, enabled = torch.bfloat16, enabled and has_native_bf16(device)
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def poisoned(loss: Tensor) -> Tensor:
    """The loss, its gradients bit for bit the same; where it is not finite, the gradients of all it reaches are NaN.

    An infinite term that no parameter moves leaves finite gradients behind: then the process that saw it would be the
    only one to know. A NaN survives the average over processes, so all see it in the gradients' norm. Nothing waits
    for the device.
    """
    return loss * poison(loss)


def poison(loss: Tensor) -> Tensor:
    """The factor () that does so: 1, or NaN where a loss of any shape is not finite."""
    return torch.where(loss.detach().isfinite().all(), 1.0, float("nan")).to(loss.dtype)


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2) for float16.

    The loss is multiplied by `value` and the gradients divided by it before they are used, which lifts small ones out
    of float16's zeros (below 6e-8). Values are powers of two, so nothing is rounded. A step whose gradients' norm is
    not finite halves it, 2,000 good ones in a row double it, within [1, 2^24]. All processes decide by the same global
    norm, so all keep the same value.
    """

    FIRST, FLOOR, CEILING, PATIENCE = 2.0**16, 1.0, 2.0**24, 2000

    def __init__(self):
        self.value = self.FIRST
        self.good_steps = 0  # since the value last changed
        self.exhausted = False  # whether the last step that was not finite met the floor

    def scale(self, loss: Tensor) -> Tensor:
        """The loss, in float32 at least, for `backward`."""
        return loss.to(torch.promote_types(loss.dtype, torch.float32)) * self.value

    def good(self) -> None:
        """Counts a step whose gradients were finite."""
        self.good_steps += 1
        if self.good_steps == self.PATIENCE:
            self.value, self.good_steps = min(2 * self.value, self.CEILING), 0

    def overflowed(self) -> bool:
        """Counts a step whose gradients were not finite, and halves the value.

        True: a smaller value may serve, the step is skipped and nothing is wrong. False: it stood at its floor, so the
        fault is not the scale's.
        """
        self.exhausted, self.good_steps = self.value == self.FLOOR, 0
        self.value = max(self.value / 2, self.FLOOR)
        return not self.exhausted

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "value": torch.tensor(self.value, dtype=torch.float64),
            "good_steps": torch.tensor(self.good_steps, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value, self.good_steps = state["value"].item(), int(state["good_steps"].item())
