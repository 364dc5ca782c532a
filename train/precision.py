"""bfloat16 where the machine computes it natively."""

from contextlib import AbstractContextManager

import torch


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    """bfloat16 autocast on `device`; enabled only where `has_native_bf16`, so nothing is emulated."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled and has_native_bf16(device))
