"""Classes by name: what a user may type, what a run records, and that renaming classes keeps a run."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from helpers.tiny_runs import DDPM, ROOT, call
from train.class_names import (
    ClassLabel,
    check_class_order,
    class_captions,
    class_index,
    recorded_class_names,
    with_class_numbers,
)
from train.config import DataConfig
from train.data import loading
from train.data.loading import build_dataset
from train.datasets import ArrayDataset, DatasetConfig
from train.inference import load

OLD_RUN = ROOT / "tests" / "fixtures" / "old_runs" / "runs" / "ddpm_digits"
NAMES = ("bag", "hat", "T-shirt/top")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_a_string_is_a_name_and_otherwise_a_number():
    assert [class_index(each, 3, NAMES) for each in ("hat", "T-shirt/top", "0", 2, None)] == [1, 2, 0, 2, None]
    for names, label, number in (
        (("3", "5", "7"), "7", 2),  # folders named by numbers
        (("0", "2", "1"), "0", 0),
        (("0", "2", "1"), 2, 2),  # what is not a string is a number
        (("one", "two", "three"), "2", 2),
        ((), "2", 2),
    ):
        assert class_index(label, 3, names) == number


def test_what_is_no_class_is_refused_with_the_nearest_name():
    for label, names, message in (
        ("hta", NAMES[:2], "got label 'hta', did you mean 'hat'?, wanted one of bag, hat or a number from 0 to 2"),
        ("hat", (), "got label 'hat', but the classes have no names here, wanted a number from 0 to 2"),
        ("-1", NAMES, "got label -1, wanted a class from 0 to 2"),
        ("crane", ("crane", "owl", "crane"), "got label 'crane', the name of the classes 0, 2: pass a number"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            class_index(label, 3, names)
    many = tuple(f"class {i}" for i in range(1000))
    with pytest.raises(ValueError, match=r"class 19, ... \(1000 names\) or a number from 0 to 999") as error:
        class_index("dog", 1000, many)
    assert len(str(error.value)) < 400
    with pytest.raises(ValueError, match="got label 'hat' for a sampler without classes: leave the label out"):
        class_index("hat", 0, ())


def test_digits_that_may_mean_two_classes_are_refused():
    remedy = "on the command line as a row of a JSON --condition_file"
    for label, names, message in (
        ("2", "021", f"'1' and the name of class 1: pass the number 1 or 2, {remedy}: {{\"label\": 1}}"),
        ("1", "357", f"'5' but not its name: pass its name, or the number 1, {remedy}: {{\"label\": 1}}"),
    ):
        with pytest.raises(ValueError) as error:
            class_index(label, 3, tuple(names))
        assert str(error.value) == f"got label {label!r}, the number of the class {message}"


def test_captions_are_names_or_else_numbers():
    labels = torch.tensor([2, 3, 0])
    assert class_captions(labels, 3, NAMES) == ["T-shirt/top", "no class", "bag"]
    assert class_captions(labels, 3, ()) == ["2", "no class", "0"] and class_captions(None, 3, NAMES) == []


@dataclass(frozen=True)
class LabelGroup:
    label: ClassLabel | None


@dataclass(frozen=True)
class LabelConfig:
    samples: LabelGroup


def test_no_class_is_a_row_of_a_file_and_not_a_label():
    assert with_class_numbers(LabelConfig(LabelGroup("bag")), 3, NAMES).samples.label == NAMES.index("bag")
    assert with_class_numbers(LabelConfig(LabelGroup("none")), 3, ("bag", "hat", "none")).samples.label == 2
    with pytest.raises(ValueError, match="got --label None, wanted a class: pass --condition_file .*, or leave"):
        with_class_numbers(LabelConfig(LabelGroup("None")), 3, NAMES)


def test_damaged_names_of_a_run_are_refused():
    assert recorded_class_names({}, Path("run")) == ()
    assert recorded_class_names({"class_names": [*NAMES]}, Path("run")) == NAMES
    for damaged in (3, "bag", None, [1, 2, 3]):
        with pytest.raises(ValueError, match="run/config.yaml has no list of names .* is it damaged"):
            recorded_class_names({"class_names": damaged}, Path("run"))


def test_a_name_of_another_class_is_refused():
    check_class_order(NAMES, NAMES, Path("run"))
    check_class_order(("bag", "cap", "T-shirt/top"), NAMES, Path("run"))  # renamed
    check_class_order(("crane", "owl", "derrick"), ("crane", "owl", "crane"), Path("run"))  # two told apart
    check_class_order(NAMES, (), Path("run"))  # a run without names
    for names in (("hat", "bag", "T-shirt/top"), ("hat", "cap", "T-shirt/top"), ("hat", *NAMES)):
        with pytest.raises(ValueError, match="^got 'hat' as class 0, which is class 1 in run: .* the order there, or "):
            check_class_order(names, NAMES, Path("run"))


def test_typed_names_replace_those_of_the_data(monkeypatch):
    datasets = [ArrayDataset(np.zeros((3, 4, 4), np.uint8), np.arange(3), 3, ("a", "b", "c"))]
    monkeypatch.setattr(loading, "load_plugin", lambda *_: SimpleNamespace(build=lambda config, split: datasets[-1]))
    data = DataConfig()
    assert build_dataset(data, DatasetConfig(), "train").class_names == ("a", "b", "c")
    assert build_dataset(data, DatasetConfig(class_names=NAMES), "train").class_names == NAMES
    with pytest.raises(ValueError, match="got 2 names of classes, wanted 3, for the numbers 0 to 2"):
        build_dataset(data, DatasetConfig(class_names=NAMES[:2]), "train")
    datasets.append(SimpleNamespace(n_classes=3))  # of a user's file, older than names of classes
    assert build_dataset(data, DatasetConfig(), "train").class_names == ()
    for attributes in ({"__slots__": ()}, {"class_names": property(lambda self: NAMES)}):
        datasets.append(type("Birds", (), {**attributes, "n_classes": 3})())
        with pytest.raises(ValueError, match="Birds whose class_names cannot be set: make it an ordinary attribute"):
            build_dataset(data, DatasetConfig(), "train")


def test_a_run_keeps_the_names_of_its_classes(tmp_path, capfd):
    preset, of_run = tmp_path / "digits.yaml", f"--logs_root {tmp_path} --sampler ddpm --no_amp"

    def train(steps: int, line: str, flags: str = "") -> list[str]:
        preset.write_text(f"dataset: digits\n{line}\n")
        call("train_sampler.py", f"{of_run} {DDPM} --train_steps {steps} --steps_per_eval 0 --config {preset} {flags}")
        return yaml.safe_load((tmp_path / "ddpm_digits" / "config.yaml").read_text())["origin"]["class_names"]

    named = f"class_names: [{', '.join(WORDS)}]"
    assert train(1, "") == list("0123456789")
    assert train(2, named) == list(WORDS)  # renamed: no other run
    with pytest.raises(SystemExit):
        train(3, named, f"--class_names {' '.join(reversed(WORDS))}")
    assert "got 'nine' as class 0, which is class 9 in " in capfd.readouterr().err
    with pytest.raises(SystemExit):
        (checkpoint,) = (tmp_path / "ddpm_digits" / "checkpoints").glob("step_*2")
        other = f"--log_dir branch --resume {checkpoint}"
        train(3, named, f"--class_names {' '.join(reversed(WORDS))} {other}")
    assert f"which is class 9 in {tmp_path / 'ddpm_digits'}: give" in capfd.readouterr().err
    for label in ("seven", "7"):  # the same experiment
        call("experiments/get_samples.py", f"{of_run} --n_samples 2 --label {label} --log_dir sevens")
    assert yaml.safe_load((tmp_path / "sevens" / "config.yaml").read_text())["samples"]["label"] == 7
    with pytest.raises(SystemExit):
        call("experiments/get_samples.py", f"{of_run} --n_samples 2 --label eight --log_dir sevens")
    assert "--label 7 -> 8" in capfd.readouterr().err


def test_an_old_run_without_names_has_numbers():
    run = load(OLD_RUN, device="cpu", amp=False)
    assert run.model.class_names == () and run.model.captions(torch.tensor([3, 10])) == ["3", "no class"]
    assert run.class_names == tuple("0123456789")  # of its data set
    with pytest.raises(ValueError, match="got label 'three', but the classes have no names here"):
        class_index("three", run.n_classes, run.model.class_names)
