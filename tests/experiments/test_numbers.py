"""--conditions numbers and --metadata, from training to samples and edits, on rotated digits."""

import csv
import math

import pytest
import torch
import yaml

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.tiny_runs import DDPM, call
from models.conditions.numbers import NumberField
from train.inference import load
from train.samplers._metadata import find_numbers

DIGITS = "--dataset digits --digits_rotation 40 --digits_thickness"
TRAINING = f"{DDPM} {DIGITS} --conditions numbers --no_class_conditional --no_amp --log_dir turned"
SAMPLING = "--sampler ddpm --load_dir turned --no_amp --device cpu --sample_steps 2"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    call("train_sampler.py", f"--logs_root {logs} {TRAINING} --train_steps 2", validation_images=4)
    return logs


def script(logs, name, flags):
    call(f"experiments/{name}.py", f"--logs_root {logs} {SAMPLING} {flags}")


def test_a_run_keeps_the_ranges_of_its_data(logs):
    stored = yaml.safe_load((logs / "turned" / "config.yaml").read_text())["sampler"]
    assert stored["numbers_ranges"] == ["rotation=-40:40", "thickness=0:4"]
    assert stored["numbers_fields"] == ["rotation", "thickness"]
    model = load_model(
        ModelConfig(sampler="ddpm", dataset="digits", load_dir="turned"), OutputConfig(logs_root=str(logs), amp=False)
    )
    assert find_numbers(model.sampler.network).ranges["rotation"] == NumberField(-40, 40)
    assert model.sampler.conditions == model.metadata_fields == ("rotation", "thickness")


def test_a_run_resumes_with_the_ranges_of_its_data(logs, capsys):
    call("train_sampler.py", f"--logs_root {logs} {TRAINING} --train_steps 3 --num_workers 1", validation_images=4)
    assert "resum" in capsys.readouterr().out


def test_samples_have_the_numbers_that_are_given(logs, conditions):
    script(logs, "get_samples", "--n_samples 3 --batch_size 2 --metadata rotation=-20.5 --log_dir turned_left")
    assert [batch["rotation"].tolist() for batch in conditions[:2]] == [[-20.5, -20.5], [-20.5]]
    assert all(batch["thickness"].isnan().all() for batch in conditions)
    conditions.clear()
    script(logs, "get_samples", "--n_samples 1 --metadata thickness=2 rotation=30 --log_dir both")
    assert (conditions[0]["rotation"].item(), conditions[0]["thickness"].item()) == (30, 2)


def test_samples_have_the_numbers_of_held_out_digits(logs, conditions):
    script(logs, "get_samples", "--n_samples 8 --batch_size 8 --log_dir held_out")
    (batch,) = conditions
    assert len({*batch["rotation"].tolist()}) == 8 and ((batch["thickness"] > 1) & (batch["thickness"] < 3)).all()


def test_a_file_gives_numbers_and_leaves_some_out(logs, conditions, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("rotation", "thickness"), (10, 1.5), ("", 2), ("unknown", 2.5)])
    script(logs, "get_samples", f"--n_samples 3 --condition_file {tmp_path}/rows.csv --log_dir from_file")
    (batch,) = conditions
    assert batch["rotation"][0] == 10 and batch["rotation"][1:].isnan().all()
    assert batch["thickness"].tolist() == [1.5, 2, 2.5]


def test_edits_keep_the_numbers_that_are_not_given(logs, conditions):
    script(logs, "inpaint", "--n_images 3 --results 1 --metadata rotation=30 --log_dir inpainted")
    (batch, *_) = conditions
    assert batch["rotation"].tolist() == [30] * 3 and not batch["thickness"].isnan().any()


def test_wrong_numbers_are_refused_before_any_file_is_made(logs, capsys):
    with pytest.raises(SystemExit) as stop:
        script(logs, "get_samples", "--n_samples 1 --metadata rotatoin=3 --log_dir misspelled")
    assert stop.value.code == 2
    assert "got metadata rotatoin=3, did you mean 'rotation'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script(logs, "get_samples", "--n_samples 1 --metadata rotation=left --log_dir misspelled")
    assert "got rotation 'left', wanted a finite number" in capsys.readouterr().err
    assert not (logs / "misspelled").exists()


def test_numbers_are_keywords_in_python(logs):
    run = load(str(logs / "turned"), device="cpu")
    options = {"seed": 1, "sample_steps": 2, "thickness": 2}
    images = run.sample(2, rotation=[-20, 20.5], **options)
    assert torch.equal(images[:1], run.sample(1, rotation=-20.0, **options))
    assert torch.equal(run.sample(1, rotation=math.nan, **options), run.sample(1, metadata=("thickness=2",), **options))
