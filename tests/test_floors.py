"""The layers of the code: which may import which, where imports are, and which small files may exist."""

import ast
from pathlib import Path

import pytest

from helpers.measure_structure import inner_imports, reached, read_source, single_importers

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "models": {"models"},
    "diffusion": {"diffusion"},
    "vq": {"vq", "models"},
    "train": {"train", "vq", "models", "diffusion"},
    "experiments": {"experiments", "train", "vq", "models", "diffusion"},
}
SLOW = {  # packages imported inside functions: optional ones, and those slower than torch or that load its compiler
    *("torchvision", "sklearn", "scipy", "matplotlib", "tensorboard", "torchmetrics", "torch_fidelity", "lpips"),
    *("natten", "gradio", "starlette", "webdataset", "diffusers", "peft", "h5py", "bitsandbytes", "transformers"),
    *("wandb", "skimage"),
}
SLOW_OF_TORCH = (  # and parts of torch: its compiler, its sharding (half a second), tensorboard
    *("torch._dynamo", "torch.nn.attention.flex_attention", "torch.utils.tensorboard"),
    *("torch.distributed.device_mesh", "torch.distributed.fsdp", "torch.distributed.tensor"),
)
# Files of less than 150 lines with a single importer, and why each exists. The list may only shrink.
CONCEPTS = {
    "diffusion.flow": "a process",
    "diffusion.sd_solvers": "solvers, a plug-in",
    "experiments.metrics.edges": "a metric",
    "models.differential": "differential attention on a loaded network",
    "train.converters._unleashing_sampler": "the second half of a layout, 330 lines with the first",
    "train.converters.sd.tiny": "one part of a layout of 1,300 lines: TAESD's files",
    "train.datasets.webdataset.shards": "one part of a plug-in of 520 lines",
    "vq.augment": "DiffAugment",
    "vq.discriminator": "a network",
    "vq.likelihood": "a network: the log-variance head",
    "vq.losses": "the adversarial losses",
}
COMMANDS_THAT_MAY_BE_IMPORTED = {  # the page of demo.py
    *("experiments.playground", "experiments.page_components", "experiments.layout_page", "experiments.page"),
    *("experiments.edit_descriptions", "experiments.edit_page", "experiments.look_page", "experiments.panoptic_page"),
}
CANDIDATES = [*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")]
SCRIPTS = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in CANDIDATES if "__main__" in p.read_text()}
FILES = sorted(path.relative_to(ROOT) for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))
SOURCE = read_source(ROOT)


def imports_of(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """(module, names) of each import statement in a piece of code."""
    statements = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            statements += [(alias.name, []) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            statements.append((node.module, [alias.name for alias in node.names]))
    return statements


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at the top or in functions."""
    names = set()
    for module, parts in imports_of(ast.parse((ROOT / path).read_text())):
        names |= {module, *(f"{module}.{part}" for part in parts)}
    return names


def is_slow(module: str) -> bool:
    return module.partition(".")[0] in SLOW or any(f"{module}.".startswith(f"{each}.") for each in SLOW_OF_TORCH)


def layer_of(module: str) -> str:
    """The layer of a file of experiments: commands, metrics or harness."""
    below = module.split(".")[1:2]
    return below[0] if below and below[0] in ("metrics", "harness") else "commands"


def test_the_tests_find_files():
    assert {"train_vqgan", "train_sampler", "experiments.calc_FID", "experiments.reconstruct"} <= SCRIPTS
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_import_their_own_layer_and_lower_ones(path):
    floors = {name.partition(".")[0] for name in imported(path)} & MAY_IMPORT.keys()
    assert floors <= MAY_IMPORT[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_a_script(path):
    assert not imported(path) & SCRIPTS


def test_there_are_no_circular_imports():
    """`__init__` files are excluded, since they re-export names of files that may import each other."""
    files = {module for module, path in SOURCE.files.items() if path.name != "__init__.py"}
    rings = {module for module in files if module in reached(module, files, SOURCE.imports)}
    assert rings == set()


@pytest.mark.parametrize("path", [f for f in FILES if f.parts[0] == "diffusion"], ids=str)
def test_diffusion_imports_only_torch_and_the_standard_library(path):
    standard = {"abc", "collections", "dataclasses", "functools", "hashlib", "importlib", "itertools", "math"}
    standard |= {"pkgutil", "typing"}
    assert {name.partition(".")[0] for name in imported(path)} <= standard | {"torch", "diffusion"}


@pytest.mark.parametrize("path", [*FILES, *(p.relative_to(ROOT) for p in ROOT.glob("*.py"))], ids=str)
def test_only_slow_packages_are_imported_inside_functions(path):
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inside = {module for function in functions for module, _ in imports_of(function)}
    top = {
        module
        for node in tree.body
        for module, _ in imports_of(node)
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert {module for module in inside if not is_slow(module)} == set()
    assert {module for module in top if is_slow(module)} == set()


def test_small_files_with_one_importer_are_listed():
    single = single_importers(SOURCE).keys() - COMMANDS_THAT_MAY_BE_IMPORTED
    small = {module for module in single if SOURCE.files[module].read_text().count("\n") < 150}
    assert small == CONCEPTS.keys()  # remove files that no longer qualify


@pytest.mark.parametrize("module", [m for m in SOURCE.files if m.startswith("experiments.")])
def test_experiments_import_downwards(module):
    """Commands import metrics, metrics import the harness."""
    order = ["harness", "metrics", "commands"]
    level = order.index(layer_of(module))
    imports = {name for name in SOURCE.imports[module] if name.startswith("experiments.")}
    above = {name for name in imports if order.index(layer_of(name)) > level}
    beside = {
        name for name in imports if layer_of(name) == layer_of(module) == "commands"
    } - COMMANDS_THAT_MAY_BE_IMPORTED
    assert above == set() and beside - {"experiments._root"} == set()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_utils_and_no_swallowed_errors(path):
    tree = ast.parse((ROOT / path).read_text())
    caught = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [call for call in calls if "load_state_dict" in ast.unparse(call.func)]
    assert "utils" not in path.stem
    assert not any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
    assert not any("strict=False" in ast.unparse(call) for call in loads)


# Each rule detects violations, in checkouts of two or three files


def checkout(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tmp_path / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_circular_import_is_detected(tmp_path):
    ring = {"train__a": "import train.b\n", "train__b": "from train import c\n", "train__c": "import train.a\n"}
    source = read_source(checkout(tmp_path, **ring))
    assert all(module in reached(module, set(source.files), source.imports) for module in source.files)


def test_a_single_importer_is_detected_inside_functions_too(tmp_path):
    files = {"vq__a": "X = 1\n", "vq__b": "def f():\n    from vq.a import X\n", "vq__c": "import vq.b\nimport vq.a\n"}
    assert single_importers(read_source(checkout(tmp_path, **files))) == {"vq.b": "vq.c"}
    (tmp_path / "vq" / "c.py").write_text("")
    assert single_importers(read_source(tmp_path)) == {"vq.a": "vq.b"}
    assert inner_imports(tmp_path / "vq" / "b.py") == 1


def test_slow_packages_are_matched_by_prefix():
    assert is_slow("torchvision.transforms.v2") and is_slow("torch._dynamo.exc") and is_slow("torch.distributed.fsdp")
    assert not is_slow("torch") and not is_slow("torch.distributed") and not is_slow("train.distributed")


def test_the_layers_of_experiments_are_distinguished():
    rooms = ["experiments.calc_FID", "experiments.metrics.features.digits", "experiments.harness", "experiments"]
    assert [layer_of(name) for name in rooms] == ["commands", "metrics", "harness", "commands"]


# Full configs are passed only to main, to an experiment's `prepare`, which runs before its results folder exists,
# and to these functions, mains of layouts among them. The list may only shrink.
TAKE_A_FULL_CONFIG = {
    "experiments.benchmark.measure_sampler": "the main of one of two stages",
    "experiments.benchmark.measure_vqgan": "the main of one of two stages",
    "experiments.harness.experiment.open_batches": "records it as the settings of the results",
    "experiments.harness.experiment.config_groups": "splits it into groups",
    "experiments.harness.experiment.open_results_folder": "writes config.yaml",
    "experiments.harness.experiment.run_experiment.main": "the main of every experiment",
    "experiments.harness.experiment.measure_settings": "splits it into groups",
    "experiments.metrics.decoder_likelihood.train_head": "the main of a run within an experiment",
    "train.cli.help.answer_help": "shows the flags of configs of any kind",
    "train.cli.help.everyday_flags": "shows the flags of configs of any kind",
    "train.cli.help.format_help": "shows the flags of configs of any kind",
    "train.cli.parse.complete_config": "reads and writes configs of any kind",
    "train.cli.parse.to_dict": "reads and writes configs of any kind",
    "train.cli.parse.to_arguments": "reads and writes configs of any kind",
    "train.cli.parse.file_values": "reads and writes configs of any kind",
    "train.cli.parse.reject_foreign": "reads and writes configs of any kind",
    "train.cli.parse.drop_foreign": "reads and writes configs of any kind",
    "train.cli.plugins.find_foreign_flag": "reads and writes configs of any kind",
    "train.cli.plugins.iter_plugin_groups": "reads and writes configs of any kind",
    "train.conversions.Layout.make_runs": "the main of a layout",
    "train.conversions._runs.save_run": "writes config.yaml",
    "train.conversions.guided.make_runs": "the main of a layout",
    "train.conversions.sd.make_runs": "the main of a layout",
    "train.conversions.sd.make_sampler_run": "the main of one of its runs",
    "train.conversions.unleashing.make_code_sampler_run": "the main of one of its runs",
    "train.conversions.unleashing.make_runs": "the main of a layout",
    "train.conversions.unleashing.make_vqgan_run": "the main of one of its runs",
    "train.runs.open_or_resume": "opens a run",
    "train.space_opening.open_space": "opens the first stage of a second stage",
}


def full_configs(trees: dict[str, ast.Module]) -> set[str]:
    """Dotted names of classes whose fields are all groups of flags (`...Config`), and of their subclasses."""
    configs, bases = set(), {}
    for module, tree in trees.items():
        names = names_in(tree, module)
        for each in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            kinds = [ast.unparse(field.annotation) for field in each.body if isinstance(field, ast.AnnAssign)]
            if kinds and all(kind.endswith("Config") for word in kinds for kind in word.split(" | ")):
                configs.add(f"{module}.{each.name}")
            bases[f"{module}.{each.name}"] = {names.get(ast.unparse(base)) for base in each.bases}
    return configs | {name for name, base_names in bases.items() if base_names & configs}


def names_in(tree: ast.Module, module: str) -> dict[str, str]:
    """The dotted paths of the classes and imports of a file, by name."""
    classes = {each.name: f"{module}.{each.name}" for each in tree.body if isinstance(each, ast.ClassDef)}
    return {name: f"{other}.{name}" for other, names in imports_of(tree) for name in names} | classes


def takers_of_full_configs(trees: dict[str, ast.Module]) -> set[str]:
    """Dotted names of functions with a parameter of a full config class, or an untyped one called `config`."""
    configs, takers = full_configs(trees), set()

    def visit(node: ast.AST, path: str, names: dict[str, str]) -> None:
        for child in ast.iter_child_nodes(node):
            name = f"{path}.{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else path
            if isinstance(child, ast.FunctionDef):
                parameters = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                kinds = {p.arg: None if p.annotation is None else ast.unparse(p.annotation) for p in parameters}
                words = {names.get(word) for kind in kinds.values() if kind for word in kind.split(" | ")}
                if words & configs or kinds.get("config", "typed") in (None, "Any"):
                    takers.add(name)
            visit(child, name, names)

    for module, tree in trees.items():
        visit(tree, module, names_in(tree, module))
    return takers


def test_only_main_takes_a_full_config():
    floors = ("experiments", "train")
    trees = {m: ast.parse(p.read_text()) for m, p in SOURCE.files.items() if m.partition(".")[0] in floors}
    takers = takers_of_full_configs(trees)
    commands = {f"{module}.{name}" for module in SCRIPTS for name in ("main", "prepare")}
    assert len(takers & commands) > 5 and takers - commands - TAKE_A_FULL_CONFIG.keys() == set()
    assert TAKE_A_FULL_CONFIG.keys() <= takers  # remove functions that no longer qualify


@pytest.mark.parametrize("path", [f for f in FILES if f.parts[0] == "experiments"], ids=str)
def test_every_parameter_of_an_experiment_is_annotated(path):
    functions = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)]
    parameters = [(f.name, p) for f in functions for p in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]]
    assert [(name, p.arg) for name, p in parameters if p.annotation is None and p.arg not in ("self", "cls")] == []


def test_full_configs_are_detected_by_fields_and_by_name():
    source = """
from train.config import SecondStageConfig, DataConfig

class Config:
    data: DataConfig
    other: VQGANConfig | UNetConfig

class Longer(SecondStageConfig):
    seed: int

class Group:
    data: DataConfig
    seed: int

def main(config: Config): ...
def longer(settings: Longer | None): ...
def untyped(config): ...
def typed(config: Group, data: DataConfig): ...
def outer(x: int):
    def inner(config: Config): ...

class Bench:
    def run(self, *, config: SecondStageConfig): ...
"""
    config = "class SecondStageConfig:\n    data: DataConfig\n"
    trees = {"experiments.a": ast.parse(source), "train.config": ast.parse(config)}
    assert full_configs(trees) == {"experiments.a.Config", "experiments.a.Longer", "train.config.SecondStageConfig"}
    names = {"main", "longer", "untyped", "outer.inner", "Bench.run"}
    assert takers_of_full_configs(trees) == {f"experiments.a.{name}" for name in names}
