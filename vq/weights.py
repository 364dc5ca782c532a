"""Files of weights from elsewhere, read without running what may be in them."""

import pickle
import re
import struct
from pathlib import Path

import torch
from torch import Tensor

UNREADABLE = (  # what torch.load raises, by the kind of damage
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OverflowError),
    *(LookupError, AttributeError, AssertionError, TypeError, ValueError),
)


def read_tensors(path: Path, wanted: str) -> dict[str, Tensor]:
    """Named tensors of a file (a bare state dict), on the CPU. `wanted` ends each error: what it should be, the remedy.

    FileNotFoundError where there is none, ValueError for one that holds anything else, of which nothing is run.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} not found: {wanted}")
    if not path.is_file():
        raise ValueError(f"{path} is no file: {wanted}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        code = re.search("GLOBAL ([^ ]+)", str(error))
        reason = f"it asks for {code[1]}, which is code" if code else "it is damaged, or of another kind"
        raise ValueError(f"{path} is no file of plain tensors, nothing in it was run ({reason}): {wanted}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = type(state).__name__
        raise ValueError(f"{path} holds a {held}, something else than named tensors (a state dict, bare): {wanted}")
    return state
