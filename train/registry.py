"""The file name is the registry: `--dataset birds` is train/datasets/birds.py."""

import difflib
import pkgutil
from collections.abc import Callable, Iterable

from models.registry import import_attribute, import_file
from train.config import ROOT


def names_in(package: str) -> list[str]:
    """The files of a package that serves as a registry."""
    return sorted(
        m.name for m in pkgutil.iter_modules([str(ROOT / package.replace(".", "/"))]) if not m.name.startswith("_")
    )


def plugin(package: str, name: str, flag: str):
    """The module `<package>.<name>`, or ValueError with the names there are."""
    names = names_in(package)
    if name not in names:
        raise ValueError(f"unknown {flag} {name!r}{did_you_mean(name, names)}; there are: {', '.join(names)}")
    return import_file(f"{package}.{name}", f"{flag} {name!r}")


def dotted(path: str, flag: str) -> Callable:
    """The function or class at `package.module.name`, the user's own; ValueError says what is missing."""
    if not path.rpartition(".")[0]:
        raise ValueError(f"got {flag} {path!r}, wanted package.module.function")
    found = import_attribute(path, flag, "is it on PYTHONPATH?")
    if not callable(found):
        module_name, _, name = path.rpartition(".")
        raise ValueError(f"got {flag} {path!r}: {module_name} has no function {name}")
    return found


def did_you_mean(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
