"""Reading of external weight files without executing code that they may contain."""

import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

UNREADABLE = (  # what torch.load raises for damaged files
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OverflowError),
    *(LookupError, AttributeError, AssertionError, TypeError, ValueError),
)
EARLIER = "take weights from before the training diverged (--load_step N, --resume PATH)"


def refuse_nan(tensors: Mapping[str, Tensor], source: Path | str, remedy: str = EARLIER) -> None:
    """Raises ValueError if weights of any shape hold a NaN; `source` is where they are from."""
    broken = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.isnan().any())
    if broken:
        where = f"{len(broken)} of {len(tensors)} tensors, such as {broken[0]}"
        raise ValueError(f"{source} holds NaN in {where}: {remedy}")


def read_tensors(path: Path, wanted: str) -> dict[str, Tensor]:
    """Reads a bare state dict from a file, as named tensors of any shape on the CPU, without executing code.

    `wanted` ends each error message: the expected file and the remedy. FileNotFoundError if there is no file,
    ValueError if it holds anything else.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {wanted}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file: {wanted}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        code = re.search("GLOBAL ([^ ]+)", str(error))
        reason = f"it needs {code[1]}, which is code" if code else "it is damaged, or not a torch file"
        raise ValueError(
            f"{path} cannot be read as plain tensors, and nothing in it was run ({reason}): {wanted}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a bare state dict of named tensors: {wanted}")
    refuse_nan(state, path, wanted)
    return state
