"""--conditions metadata and --metadata, from training to samples and edits, on drawn scenes."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.tiny_runs import DDPM, call
from models.conditions.metadata import MetadataEncoder
from train.config import DataConfig, SamplingConfig
from train.data.hints import HintsConfig
from train.datasets.shapes import Shapes
from train.samplers._metadata import find_metadata
from train.trained_sampler import TrainedSampler

TRAINING = f"{DDPM} --dataset shapes --shapes_count 12 --conditions metadata --no_amp --log_dir scenes"
SAMPLING = "--sampler ddpm --load_dir scenes --no_amp --device cpu --sample_steps 2"
FIELDS = ("camera", "weather", "light", "location")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    call("train_sampler.py", f"--logs_root {logs} {TRAINING} --train_steps 2", validation_images=4)
    return logs


def script(logs, name, flags):
    call(f"experiments/{name}.py", f"--logs_root {logs} {SAMPLING} {flags}")


def test_a_run_keeps_the_values_of_its_data(logs):
    stored = yaml.safe_load((logs / "scenes" / "config.yaml").read_text())["sampler"]
    assert stored["metadata_fields"] == [*FIELDS] == [*Shapes.metadata_values]
    assert stored["metadata_values"][:2] == ["camera=CAM_FRONT", "camera=CAM_FRONT_LEFT"]
    model = load_model(
        ModelConfig(sampler="ddpm", dataset="shapes", load_dir="scenes"), OutputConfig(logs_root=str(logs), amp=False)
    )
    assert find_metadata(model.sampler.network).values == Shapes.metadata_values
    assert model.sampler.conditions == FIELDS


def test_a_run_resumes_with_the_values_of_its_data(logs, capsys):
    call("train_sampler.py", f"--logs_root {logs} {TRAINING} --train_steps 3", validation_images=4)
    assert "resum" in capsys.readouterr().out


def test_samples_have_the_metadata_that_are_given(logs, conditions):
    script(logs, "get_samples", "--n_samples 3 --batch_size 2 --metadata light=night camera=CAM_BACK --log_dir night")
    batches = conditions[:2]
    assert [len(batch["light"]) for batch in batches] == [2, 1]
    for batch in batches:
        assert {name: {*batch[name]} for name in FIELDS} == {
            **{"light": {"night"}, "camera": {"CAM_BACK"}, "weather": {"unknown"}, "location": {"unknown"}}
        }


def test_samples_have_the_metadata_of_held_out_scenes(logs, conditions):
    script(logs, "get_samples", "--n_samples 8 --batch_size 8 --log_dir held_out")
    (batch,) = conditions
    assert all({*batch[name]} <= {*Shapes.metadata_values[name]} for name in FIELDS)
    assert len({*zip(*(batch[name] for name in FIELDS), strict=True)}) > 4


def test_edits_keep_what_is_not_given(logs, conditions):
    script(logs, "inpaint", "--n_images 3 --results 1 --metadata light=night weather=unknown --log_dir inpainted")
    (batch, *_) = conditions
    assert batch["light"] == ["night"] * 3 and batch["weather"] == ["unknown"] * 3
    assert "unknown" not in batch["camera"] + batch["location"]


def test_large_samples_have_the_metadata_that_are_given(logs, conditions):
    script(logs, "generate_big_samples", "--shape 8 16 --n_samples 1 --metadata weather=rain --log_dir large")
    assert conditions[0]["weather"] == ["rain"] and conditions[0]["light"] == ["unknown"]


def test_misspelled_metadata_are_refused_before_any_file_is_made(logs, capsys):
    with pytest.raises(SystemExit) as stop:
        script(logs, "get_samples", "--n_samples 1 --metadata light=nigt --log_dir misspelled")
    assert stop.value.code == 2 and "got light 'nigt', did you mean 'night'?" in capsys.readouterr().err
    assert not (logs / "misspelled").exists()


# Rows of conditions


def with_metadata(rows, metadata=(), *, network=None, fields=("camera", "light"), skip=()):
    network = network or MetadataEncoder({"camera": ("front", "back"), "light": ("daytime", "night")}, 4)
    model = SimpleNamespace(sampler=SimpleNamespace(network=network, conditions=fields), run="logs/run")
    return TrainedSampler.with_metadata(model, rows, SamplingConfig(metadata=metadata), skip)


def test_given_metadata_override_rows_and_complete_them():
    night = {"light": "night"}
    assert with_metadata([], ("light=night",)) == [night | {"camera": "unknown"}]
    rows = [{"light": "daytime", "camera": "back"}, {"light": "unknown", "camera": "front"}]
    assert with_metadata(rows, ("light=night",)) == [night | {"camera": each} for each in ("back", "front")]
    assert with_metadata(rows) == rows and with_metadata([]) == []


def test_metadata_come_with_the_conditions_of_held_out_images():
    fields = ("boxes", "label", "camera", "light")
    assert with_metadata([], ("light=night",), fields=fields) == [{"light": "night"}]
    complete = {"light": "night", "camera": "unknown"}
    assert with_metadata([], ("light=night",), fields=fields, skip=("boxes",)) == [complete]
    boxes = {"boxes": torch.zeros(1, 4)}
    assert with_metadata([boxes], ("light=night",), fields=fields) == [boxes | complete]


def test_words_of_a_table_may_look_like_numbers(tmp_path):
    network = MetadataEncoder({"place": ("7", "007")}, 4)
    sampler = SimpleNamespace(network=network, n_classes=0, conditions=("place", "lon"))
    facts = {"class_names": (), "hints": HintsConfig(), "channels_of_hints": {}}
    model = SimpleNamespace(sampler=sampler, data=DataConfig(), **facts)
    (tmp_path / "rows.csv").write_text("place,lon\n007,1\n7,2.5\n")
    rows = TrainedSampler.read_rows(model, str(tmp_path / "rows.csv"))
    assert rows == [{"place": "007", "lon": 1.0}, {"place": "7", "lon": 2.5}]


def test_rows_with_other_values_are_refused():
    with pytest.raises(ValueError, match="row 1: got light 'dusk', wanted one of daytime, night, or unknown"):
        with_metadata([{"light": "night"}, {"light": "dusk"}])
    with pytest.raises(ValueError, match="row 0: got light 1, wanted"):
        with_metadata([{"light": 1}])
    with pytest.raises(ValueError, match="got metadata light=night, which logs/run is not conditioned on: leave"):
        with_metadata([], ("light=night",), network=nn.Linear(1, 1))
