"""Measures the import structure of checkouts: `python tests/helpers/measure_structure.py [ROOT ...]`.

An arrow is an import of one file by another, at the top or in a function, except the imports of an `__init__` from its
own folder. A file's floor is the length of the longest chain of imports below it, 1 for a file that imports nothing of
its folder; files in an import cycle share a floor. A single-importer file is imported by exactly one other file of the
project; plug-ins, scripts and `__init__` are excluded.
"""

import ast
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("models", "diffusion", "vq", "train", "experiments")
PLUGINS = ("conditions", "quantizers", "datasets", "samplers", "conversions", "features")  # loaded by file name


class Source(NamedTuple):
    """The files of a checkout by module name, and the modules that each imports."""

    files: dict[str, Path]
    imports: dict[str, set[str]]


def read_source(root: Path) -> Source:
    """Reads the scripts in the root and the five folders, without the tests."""
    paths = [*root.glob("*.py"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))]
    files = {module_of(path.relative_to(root)): path for path in sorted(paths)}
    imports = {module: imported(path, files) - {module} for module, path in files.items()}
    for module in FOLDERS:
        imports[module] = {name for name in imports.get(module, ()) if not name.startswith(f"{module}.")}
    return Source(files, imports)


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, files: dict[str, Path]) -> set[str]:
    """The modules of `files` that a file imports, at the top or in functions."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in files else node.module for name in names}
    return modules & files.keys()


def single_importers(source: Source) -> dict[str, str]:
    """The files that exactly one other file imports, with that file."""
    importer_of = {}
    for module, path in source.files.items():
        importers = [other for other, names in source.imports.items() if module in names]
        plugin = path.parent.name in PLUGINS and not path.stem.startswith("_")
        if len(importers) == 1 and path.stem != "__init__" and not plugin:
            importer_of[module] = importers[0]
    return importer_of


def floors(modules: set[str], imports: dict[str, set[str]]) -> int:
    """The number of floors of these modules."""
    reach = {module: reached(module, modules, imports) for module in modules}
    ring = {m: frozenset(n for n in modules if n in reach[m] and m in reach[n]) or frozenset({m}) for m in modules}

    @cache
    def floor(members: frozenset[str]) -> int:
        below = {ring[other] for m in members for other in imports[m] & modules} - {members}
        return 1 + max(map(floor, below), default=0)

    return max((floor(members) for members in ring.values()), default=0)


def reached(start: str, modules: set[str], imports: dict[str, set[str]]) -> set[str]:
    modules_reached, stack = set(), [start]
    while stack:
        for other in imports[stack.pop()] & modules - modules_reached:
            modules_reached.add(other)
            stack.append(other)
    return modules_reached


def inner_imports(path: Path) -> int:
    """The number of import statements inside functions."""
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    inner = {id(n) for function in functions for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)}
    return len(inner)


def table_of(root: Path) -> list[str]:
    source = read_source(root)
    single = single_importers(source)
    lines = [f"{'folder':12} files  lines  single-importer  arrows within  floors  imports inside functions"]
    for folder in (*FOLDERS, "(root)", "all"):
        modules = {m for m in source.files if folder in ("all", m.partition(".")[0])}
        if folder == "(root)":
            modules = {m for m in source.files if m.partition(".")[0] not in FOLDERS}
        arrows = sum(len(source.imports[m] & modules) for m in modules)
        texts = [source.files[m].read_text() for m in modules]
        inner = sum(inner_imports(source.files[m]) for m in modules)
        n_single = len(single.keys() & modules)
        numbers = (sum(map(bool, texts)), sum(text.count("\n") for text in texts), n_single, arrows)
        lines.append(
            f"{folder:12} {numbers[0]:5}  {numbers[1]:5}  {numbers[2]:15}  {numbers[3]:13}  "
            f"{floors(modules, source.imports):6}  {inner:24}"
        )
    return lines


if __name__ == "__main__":
    for name in sys.argv[1:] or ["."]:
        print(name, *table_of(Path(name)), "", sep="\n")
