"""Parts of a network by name: those that are here, or a class of the user's own by its dotted path."""

import importlib
import inspect
from collections.abc import Callable, Mapping

from torch import nn


def part(name: str, known: Mapping[str, Callable], contract: tuple[type, ...], option: str) -> Callable[..., nn.Module]:
    """What `name` stands for: an entry of `known`, or the class at `package.module.Class`.

    A class of one's own must be a subclass of one of `contract`. ValueError says what there is, or what is wrong.
    """
    if name in known:
        return known[name]
    wanted = " or ".join(cls.__name__ for cls in contract)
    there_are = f"there are {', '.join(known)}, and any subclass of {wanted} as package.module.Class"
    if "." not in name:
        raise ValueError(f"got {option} {name!r}: {there_are}")
    path, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # something that the user's module needs
        raise ValueError(f"got {option} {name!r}: there is no module {error.name}; {there_are}") from error
    cls = getattr(module, attribute, None)
    if not inspect.isclass(cls) or not issubclass(cls, contract):
        found = "has no such name" if cls is None else f"has {cls!r}, which is no subclass of {wanted}"
        raise ValueError(f"got {option} {name!r}: {path} {found}; {there_are}")
    if inspect.isabstract(cls):
        raise ValueError(f"got {option} {name!r}: {cls.__name__} does not define {', '.join(cls.__abstractmethods__)}")
    return cls
