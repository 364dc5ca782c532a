"""Tensors that say they lie on another device and have numbers all the same: what is done with both kinds fails.

FakeTensorMode has no numbers, so code that looks at some (`if`, `nonzero`, `tolist`) cannot run in it.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")  # the name of the other place; a name that needs no driver
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default, torch.ops.aten.to.device)


class FakeDeviceTensor(torch.Tensor):
    """A tensor of that device around one of the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    def tolist(self):
        return self.numbers.tolist()

    def __repr__(self, **_):
        return f"Elsewhere({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_operation(function, args, kwargs or {})


class FakeDeviceMode(TorchDispatchMode):
    """While it is on, DEVICE is that of Elsewhere."""

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
    """torch.tensor(data, device=DEVICE) would lose the numbers on its way to a dispatch mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": None}).to(kwargs["device"])
        return function(*args, **kwargs)


def run_operation(function, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [each for each in given if isinstance(each, FakeDeviceTensor)]
    if there and function not in COPIES and any(each.ndim for each in given if not isinstance(each, FakeDeviceTensor)):
        raise RuntimeError(f"{function}: tensors on more than one device")
    wanted = kwargs.get("device")
    is_there = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    if function is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], FakeDeviceTensor)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(FakeDeviceTensor, lambda each: each.numbers, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if not is_there:
        return result
    itself = {id(each.numbers): each for each in there}  # what is changed in place
    return tree_map_only(torch.Tensor, lambda r: itself[id(r)] if id(r) in itself else FakeDeviceTensor(r), result)
