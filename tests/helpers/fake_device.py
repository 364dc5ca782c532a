"""A fake device whose tensors have values: operations that mix its tensors with CPU tensors fail.

FakeTensorMode has no values, so code that reads them (`if`, `nonzero`, `tolist`) cannot run in it.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # needs no driver
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.to.device)


class FakeDeviceTensor(torch.Tensor):
    """A tensor on the fake device, wrapping one on the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE
        )
        tensor.numbers = numbers
        return tensor

    def tolist(self):
        return self.cpu().tolist()  # a copy, which launches.count_launches sees

    def __repr__(self, **_):
        return f"Elsewhere({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_operation(function, args, kwargs or {})


class FakeDeviceMode(TorchDispatchMode):
    """A mode in which DEVICE creates instances of FakeDeviceTensor."""

    def __enter__(self):
        self.data = KeepValues()
        self.data.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.data.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_operation(function, args, kwargs or {})


class KeepValues(TorchFunctionMode):
    """Keeps the values in torch.tensor(data, device=DEVICE), which a dispatch mode would lose."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": None}).to(kwargs["device"])
        return function(*args, **kwargs)


def run_operation(function, args, kwargs):
    """Runs an operation on the wrapped CPU tensors; RuntimeError if its tensors are on more than one device."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    fake = [tensor for tensor in tensors if isinstance(tensor, FakeDeviceTensor)]
    if fake and function not in COPIES and any(t.ndim for t in tensors if not isinstance(t, FakeDeviceTensor)):
        raise RuntimeError(f"{function}: tensors on more than one device")
    device = kwargs.get("device")
    is_fake = bool(fake) if device is None else torch.device(device) == DEVICE
    if function is torch.ops.aten.copy_.default:
        is_fake = isinstance(args[0], FakeDeviceTensor)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(FakeDeviceTensor, lambda tensor: tensor.numbers, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if not is_fake:
        return result
    inputs = {id(tensor.numbers): tensor for tensor in fake}  # returned by in-place operations
    return tree_map_only(torch.Tensor, lambda r: inputs[id(r)] if id(r) in inputs else FakeDeviceTensor(r), result)
