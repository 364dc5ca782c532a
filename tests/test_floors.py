"""The floors of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "diffusion": {"diffusion"},
    "vq": {"vq", "models"},
    "train": {"train", "vq", "models", "diffusion"},
    "experiments": {"experiments", "train", "vq", "models", "diffusion"},
}
CANDIDATES = [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]
SCRIPTS = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in CANDIDATES if "__main__" in p.read_text()}
FILES = sorted(path.relative_to(ROOT) for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_there_are_files_to_look_at():
    assert {"train_vqgan", "train_sampler", "experiments.calc_FID", "experiments.reconstruct"} <= SCRIPTS
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_its_own_floor_and_those_below(path):
    floors = {name.partition(".")[0] for name in imported(path)} & MAY_IMPORT.keys()
    assert floors <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_a_script(path):
    assert not imported(path) & SCRIPTS


@pytest.mark.parametrize("path", [f for f in FILES if f.parts[0] == "diffusion"], ids=str)
def test_diffusion_imports_torch_alone(path):
    standard = {"collections", "dataclasses", "hashlib", "importlib", "inspect", "math", "pkgutil", "typing"}
    assert {name.partition(".")[0] for name in imported(path)} <= standard | {"torch", "diffusion"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_utils_and_no_swallowed_errors(path):
    tree = ast.parse((ROOT / path).read_text())
    caught = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if "load_state_dict" in ast.unparse(call.func)]
    assert "utils" not in path.stem
    assert not any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
    assert not any("strict=False" in ast.unparse(call) for call in loads)
