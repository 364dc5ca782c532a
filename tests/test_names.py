"""Names and docstrings: standard terms, test names that fit on a line, and shapes in docstrings of tensor functions."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.tiny_runs import ROOT

PACKAGES = ("models", "diffusion", "vq", "train", "experiments")
# Words that do not say what they name; each has a standard term (`kept` -> mask, `told` -> labels, ...).
PRIVATE_WORDS = frozenset(
    "added along apart ask begin begun begun_at blend both closeness counting dealt divided drawn drawn_at filled "
    "follow forget forgotten found full go_on highest how kept known learn likeliest looked_up made masked_at "
    "owned own_substitutes part picked poisoned prepared processes promoted said seen shared shown staying surest "
    "survival tallied tempered told told_apart told_in_words toward turn turns unborn walk watched widened "
    "workplace".split()
)
DOCUMENTED = ("models", "diffusion", "vq")  # every public function and class, with the shapes of its tensors
LONGEST_TEST_NAME = 60


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Every function and class of a file, including nested ones."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    arguments = function.args
    optional = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *optional]


@pytest.mark.parametrize("path", python_files(*PACKAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_or_parameter_has_a_private_name(path):
    names = []
    for node in definitions(ast.parse(path.read_text())):
        names.append((node.lineno, node.name))
        if isinstance(node, ast.FunctionDef):
            names += [(each.lineno, each.arg) for each in parameters(node)]
    assert [(line, name) for line, name in names if name.strip("_") in PRIVATE_WORDS] == []


@pytest.mark.parametrize("path", python_files("tests"), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_tests_fit_on_a_line(path):
    names = [node.name for node in definitions(ast.parse(path.read_text())) if node.name.startswith("test_")]
    assert [name for name in names if len(name) > LONGEST_TEST_NAME] == []


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions, classes and methods of a file; properties and forward passes are covered by their class."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", python_files(*DOCUMENTED), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_and_classes_have_docstrings(path):
    missing = [node.name for node in public_definitions(ast.parse(path.read_text())) if not ast.get_docstring(node)]
    assert missing == []


SHAPE = re.compile(r"\((?:\.\.\.|[A-Z1-9]|[a-z] ?·|n|n_\w+)[^()]*,[^()]*\)|\(B,?\)|\(N,?\)|\(K,?\)|shape")


@pytest.mark.parametrize("path", python_files(*DOCUMENTED), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_of_tensors_name_their_shapes(path):
    text = path.read_text()
    silent = []
    for node in public_definitions(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            annotations = [ast.unparse(each.annotation) for each in parameters(node) if each.annotation]
            returned = ast.unparse(node.returns) if node.returns else ""
            if any(re.search(r"\bTensor\b", each) for each in [*annotations, returned]):
                if not SHAPE.search("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])):
                    silent.append(node.name)
    assert silent == []
