"""Experiments are a Config, `measure` and `report` under one main; finished experiments are not measured again."""

import ast
import dataclasses
import importlib
import inspect
import json
import pickle
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from experiments import get_samples
from experiments.harness import folders
from experiments.harness.batches import BATCHES_FOLDER, ResumableBatches
from experiments.harness.experiment import (
    ExperimentSetup,
    FirstStageOutputConfig,
    ModelConfig,
    OutputConfig,
    open_results_folder,
    run_experiment,
)
from experiments.harness.first_stage import FirstStageModelConfig
from experiments.harness.results import load_results
from helpers.tiny_runs import ROOT, call
from train.config import SamplingConfig
from train.distributed import DistContext
from train.files import sha256
from train.first_stage import FirstStage, VQGANStage
from train.runs import run_lock
from train.trained_sampler import TrainedSampler

MAINS = ("run_experiment", "run_comparison")
COMMANDS = {path.stem: path.read_text() for path in (ROOT / "experiments").glob("*.py")}
EXPERIMENTS = sorted(name for name, text in COMMANDS.items() if any(f"\n    {main}(" in text for main in MAINS))


def call_in(name: str) -> ast.Call:
    """The call of run_experiment, or of run_comparison, in a script."""
    (call,) = (
        c for c in ast.walk(ast.parse(COMMANDS[name])) if isinstance(c, ast.Call) and ast.unparse(c.func) in MAINS
    )
    return call


def test_most_commands_are_experiments():
    assert {"calc_FID", "calc_PRDC", "get_samples", "reconstruct", "inpaint"} <= set(EXPERIMENTS)
    assert (
        len({call_in(name).args[0].value for name in EXPERIMENTS}) == len(EXPERIMENTS) > 10
    )  # each with its own results folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_config_measure_and_report(name):
    module, call = importlib.import_module(f"experiments.{name}"), call_in(name)
    assert [ast.unparse(arg) for arg in call.args[1:]] == ["Config", "measure", "report"] and module.Config.__doc__
    groups = {field.name: field.type for field in dataclasses.fields(module.Config)}
    first_stage = groups["model"] is FirstStageModelConfig
    models = (VQGANStage, FirstStage) if first_stage else (TrainedSampler,)
    assert issubclass(groups["output"], FirstStageOutputConfig if first_stage else OutputConfig)

    annotations = [parameter.annotation for parameter in inspect.signature(module.measure).parameters.values()]
    model, batches = annotations[-2:]
    assert model in models and batches is ResumableBatches
    assert not {inspect.Parameter.empty, Any, module.Config} & set(annotations)
    if "prepare" in {keyword.arg for keyword in call.keywords}:
        signature = inspect.signature(module.prepare)
        assert [each.annotation for each in signature.parameters.values()] == [module.Config, model, DistContext]
        assert signature.return_annotation is ExperimentSetup
    else:
        assert annotations[:-2] == [kind for key, kind in groups.items() if key not in ("model", "output")]

    signature = inspect.signature(module.report)
    assert list(signature.parameters) == ["results", "folder"] and signature.return_annotation is str
    assert module.measure.__doc__ and module.report.__doc__ and not hasattr(module, "main")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_feature_weights_are_identified_by_content(name):
    groups = (field.type for field in dataclasses.fields(importlib.import_module(f"experiments.{name}").Config))
    flags = {field.name for group in groups for field in dataclasses.fields(group)}
    arguments = {keyword.arg: keyword.value for keyword in call_in(name).keywords}
    files = ast.unparse(arguments["files"]) if "files" in arguments else ""
    assert "inception_weights" not in flags or "inception_weights" in files or files == "files"


# a toy experiment on a tiny model


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Toy."""

    count: int = 5
    """How many."""
    file: str | None = None
    """An input file."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws numbers."""

    toy: ToyConfig
    model: ModelConfig
    output: OutputConfig


class Toy:
    """A toy experiment with its command line; it records its batches and can be interrupted."""

    def __init__(self, logs: Path, monkeypatch, fails_at: int | None = None):
        self.logs, self.patch, self.fails_at, self.requested = logs, monkeypatch, fails_at, []

    def measure(self, toy: ToyConfig, model: TrainedSampler, batches: ResumableBatches) -> dict[str, Any]:
        def make(indices: list[int]) -> dict[str, torch.Tensor]:
            if len(self.requested) == self.fails_at:
                raise KeyboardInterrupt
            self.requested.append(indices)
            return {"number": batches.seed + torch.tensor(indices)}

        numbers = torch.cat([batch["number"] for batch in batches.resume("numbers", range(toy.count), make)])
        return {"numbers": numbers.tolist(), "run": batches.run}

    def report(self, results: dict[str, Any], folder: Path) -> str:
        return f"sum: {sum(results['numbers'])} in {folder}"

    def __call__(self, flags: str = "", folder: str = "toy", **kwargs: Any) -> dict[str, Any]:
        argv = f"toy.py --logs_root {self.logs} --no_amp --batch_size 2 --seed 7 {flags}".split()
        self.patch.setattr(sys, "argv", argv)
        run_experiment("toy", Config, self.measure, self.report, **kwargs)
        return json.loads((self.logs / f"{folder}_absorbing_digits_3" / "results.json").read_text())


@pytest.fixture
def toy(trained, tmp_path, monkeypatch):
    for run in ("vqgan_digits", "absorbing_digits"):
        (tmp_path / run).symlink_to(trained / run)
    return Toy(tmp_path, monkeypatch)


def test_a_finished_experiment_is_not_measured_again(toy, capsys):
    results = toy()
    assert results["numbers"] == [7, 8, 9, 10, 11] and toy.requested == [[0, 1], [2, 3], [4]]
    assert results["run"]["toy"]["count"] == 5 and results["run"]["step"] == 3 and "sampler_weights" in results["run"]
    folder = toy.logs / "toy_absorbing_digits_3"
    first_output = capsys.readouterr().out
    assert toy() == results and len(toy.requested) == 3
    assert (
        first_output.endswith(f"results: {folder}\nsum: 45 in {folder}\n") and capsys.readouterr().out == first_output
    )
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "results.json"]


def test_an_interrupted_experiment_resumes(toy, capsys):
    toy.fails_at = 2
    with pytest.raises(SystemExit):
        toy()
    folder = toy.logs / "toy_absorbing_digits_3"
    assert len(list((folder / BATCHES_FOLDER).iterdir())) == 2 and not (folder / "results.json").exists()
    toy.fails_at, toy.requested = None, []
    assert toy()["numbers"] == [7, 8, 9, 10, 11] and toy.requested == [[4]]
    assert not (folder / BATCHES_FOLDER).exists()


def test_two_experiments_cannot_write_to_one_folder(toy, capsys):
    folder = toy.logs / "toy_absorbing_digits_3"
    with run_lock(folder), pytest.raises(SystemExit) as stop:
        toy()
    assert stop.value.code == 2 and "another process is writing to" in capsys.readouterr().err
    assert not folder.exists() and not toy.requested
    assert toy()["numbers"] == [7, 8, 9, 10, 11]  # the lock is free again


def test_whoever_opens_a_run_locks_it():
    texts = {path: path.read_text() for pattern in ("*.py", "experiments/**/*.py") for path in ROOT.glob(pattern)}
    opens = [path for path, text in texts.items() if "open_run(" in text or "open_or_resume(" in text]
    assert len(opens) > 5
    assert [path for path in opens if "run_lock(" not in texts[path] and "run_context(" not in texts[path]] == []


def test_a_changed_input_file_is_measured_again(toy, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one")
    flags = f"--file {path}"
    assert toy(flags, files=("file",))["run"]["files"] == {"file": sha256(path)}
    toy(flags, files=("file",))
    assert len(toy.requested) == 3
    path.write_text("two")
    assert toy(flags, files=("file",))["run"]["files"] == {"file": sha256(path)} and len(toy.requested) == 6
    path.unlink()  # the saved results stay valid
    toy(flags, files=("file",))
    assert len(toy.requested) == 6


def test_an_interrupted_second_measurement_resumes(toy, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one")
    toy(f"--file {path}", files=("file",))
    path.write_text("two")
    toy.fails_at, toy.requested = 2, []
    with pytest.raises(SystemExit):
        toy(f"--file {path}", files=("file",))
    toy.fails_at, toy.requested = None, []
    toy(f"--file {path}", files=("file",))
    assert toy.requested == [[4]] and not (toy.logs / "toy_absorbing_digits_3" / BATCHES_FOLDER).exists()


def test_every_rank_opens_the_condition_source(tmp_path):
    """The source may encode a data set, a collective."""
    calls, dry_runs = [], []
    model = SimpleNamespace(
        run=tmp_path / "run",
        step=3,
        provenance={},
        condition_source=lambda options: calls.append(options) or "source",
        dry_run=lambda options, source, **kwargs: dry_runs.append(source),
    )
    config = get_samples.Config(
        samples=get_samples.SamplesConfig(),
        model=ModelConfig(),
        sampling=SamplingConfig(),
        output=OutputConfig(logs_root=str(tmp_path)),
    )
    for is_main in (False, True):  # `any` gives the answer of the main rank: the folder does not exist
        world = SimpleNamespace(is_main=is_main, size=1, any=lambda flag: [True], barrier=lambda: None)
        with open_results_folder("samples", config, model, world, ExperimentSetup(())):
            pass
    assert len(calls) == 2 and dry_runs == ["source"]


def test_the_example_of_the_docs_runs(trained, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "extending.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "run_experiment(" in block)
    (tmp_path / "calc_brightness.py").write_text(code)
    monkeypatch.syspath_prepend(ROOT / "experiments")
    call(tmp_path / "calc_brightness.py", f"--logs_root {trained} --no_amp --n_samples 2 --sample_steps 2")
    results = json.loads((trained / "brightness_absorbing_digits_3" / "results.json").read_text())
    assert 0 <= results["value"] <= 255


def test_other_settings_get_a_folder_of_their_own(toy, capsys):
    """The default folder takes the first settings; the same settings find their results wherever they are."""
    first, other = (toy.logs / f"toy_absorbing_digits_3{suffix}" for suffix in ("", "_count_6"))
    toy(), capsys.readouterr()
    toy("--count 6")
    assert f"{first} holds results of other settings (--count 5 -> 6): these get" in capsys.readouterr().out
    assert json.loads((other / "results.json").read_text())["numbers"] == [7, 8, 9, 10, 11, 12]
    toy.requested = []
    assert len(toy("--count 6")["numbers"]) == 5 and toy.requested == []  # of the first folder
    assert f"results: {other}\n" in capsys.readouterr().out
    shutil.rmtree(first)
    with pytest.raises(FileNotFoundError):
        toy("--count 6")  # the first folder is free, but these results are there
    assert toy.requested == [] and not first.exists()
    toy()
    toy("--no_ema --count 6")
    assert (toy.logs / "toy_absorbing_digits_3_count_6_no_ema").is_dir()
    (other / "config.yaml").write_text("[")  # of no run: neither taken nor read
    toy("--count 6")
    assert (toy.logs / "toy_absorbing_digits_3_count_6_2" / "results.json").is_file()


def test_a_folder_that_is_being_written_is_taken(toy, capfd):
    """Also before its first batch: by the settings in its config.yaml."""
    toy()
    first = toy.logs / "toy_absorbing_digits_3"
    for path in first.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink() if path.name != "config.yaml" else None
    with run_lock(first):
        with pytest.raises(FileNotFoundError):  # no results in the first folder
            toy("--count 6")
        with pytest.raises(SystemExit):
            toy()
    assert "another process is writing to" in capfd.readouterr().err
    assert (toy.logs / "toy_absorbing_digits_3_count_6" / "results.json").is_file()


def test_a_neighbour_that_vanishes_does_not_matter(toy, monkeypatch):
    toy(), toy("--count 6")
    neighbour, read = toy.logs / "toy_absorbing_digits_3_count_6", folders.read_complete_run

    def read_vanishing(folder, config):
        shutil.rmtree(neighbour, ignore_errors=True)
        return read(folder, config)

    monkeypatch.setattr(folders, "read_complete_run", read_vanishing)
    toy("--count 7")
    assert (toy.logs / "toy_absorbing_digits_3_count_7" / "results.json").is_file()
    assert not neighbour.exists()


def test_other_settings_in_a_named_folder_are_refused(toy, capfd):
    toy()
    with pytest.raises(SystemExit):
        toy("--count 6 --log_dir toy_absorbing_digits_3")
    message = capfd.readouterr().err
    assert "holds results of other settings (--count 5 -> 6): leave --log_dir out, pass another one, or" in message
    assert len(toy.requested) == 3


def test_timed_results_are_of_one_batch_size(toy, capfd):
    def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
        return ExperimentSetup((config.toy,), timed=True)

    toy()
    toy("--batch_size 3")
    assert len(toy.requested) == 3
    toy("--batch_size 2", prepare=prepare)
    assert "(--batch_size 3 -> 2): these get a folder of their own" in capfd.readouterr().out


def test_a_folder_with_an_earlier_fingerprint_is_accepted(toy, capfd):
    def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
        return ExperimentSetup((config.toy,), {"data_fingerprint": fingerprint})

    results, path = toy(), toy.logs / "toy_absorbing_digits_3" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["origin"] = {key: value for key, value in content["origin"].items() if key != "data_fingerprint"}
    path.write_text(yaml.safe_dump(content | {"origin": content["origin"] | {"images": "a" * 64}}))
    fingerprint = "b" * 64
    assert toy(prepare=prepare) == results and len(toy.requested) == 3
    fingerprint = "c" * 64
    toy(prepare=prepare)
    assert "(--data_dir: other images): these get a folder of their own" in capfd.readouterr().out
    assert (toy.logs / "toy_absorbing_digits_3_other_images").is_dir()


def test_kept_results_that_lack_a_key_are_damaged(toy, capfd):
    toy()
    (toy.logs / "toy_absorbing_digits_3" / "results.json").write_text('{"run": {}}')
    with pytest.raises(SystemExit) as stop:
        toy()
    assert stop.value.code == 2 and "results.json is damaged (it has no numbers): delete it" in capfd.readouterr().err
    (toy.logs / "results.json").write_text('{"images": [{"psnr": 1.0}]}')
    record = pickle.loads(pickle.dumps(load_results(toy.logs)))["images"][0]  # sent to other processes
    with pytest.raises(ValueError, match="damaged .it has no l1"):
        record["l1"]


def test_prepare_names_the_folder_and_may_outdate_results(toy):
    source = ["one"]

    def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
        current = source[0]
        return ExperimentSetup((config.toy,), {"of": "this"}, "prepared", is_current=lambda results: current == "one")

    toy(folder="prepared", prepare=prepare)
    assert "of: this" in (toy.logs / "prepared_absorbing_digits_3" / "config.yaml").read_text()
    toy(folder="prepared", prepare=prepare)
    assert len(toy.requested) == 3
    source[0] = "another"
    toy(folder="prepared", prepare=prepare)
    assert len(toy.requested) == 6


def test_an_error_in_prepare_leaves_no_folder(toy, capfd):
    def refuse(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
        raise ValueError("nothing to measure: pass --count N")

    with pytest.raises(SystemExit) as stop:
        toy(prepare=refuse)
    assert stop.value.code == 2 and "toy.py: nothing to measure" in capfd.readouterr().err
    assert not (toy.logs / "toy_absorbing_digits_3").exists()


def test_one_process_experiments_refuse_several(toy, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        toy(one_process=True)
    assert "start it with python instead of torchrun" in capfd.readouterr().err
