"""The check of numbers, with samplers that draw known images: what is asked for, what is compared, and the command."""

import json

import pytest
import torch

from experiments.check_numbers import SWEEP_ROWS, SWEEP_VALUES, Measurement, figures_of, plan_sweep
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.metrics import numbers
from helpers.tiny_runs import DDPM, call
from models.conditions.numbers import NumberField
from train.data.transforms import as_uint8
from train.trained_sampler import TrainedSampler

DIGITS = "--dataset digits --digits_rotation 40 --digits_thickness"
LARGER = DDPM.replace("--img_size 8", "--img_size 12")  # than the digits of the data, of which thickness is measured
TRAINING = f"{LARGER} {DIGITS} --conditions numbers --no_amp --train_steps 1"
N_HELD_OUT = 359


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    call("train_sampler.py", f"--logs_root {logs} {TRAINING} --log_dir turned", validation_images=4)
    return logs


def check(logs, flags):
    """Runs the command; the tests of the figures need no trained regressor."""
    call("experiments/check_numbers.py", f"--logs_root {logs} --sampler ddpm --load_dir turned --no_amp {flags}")


@pytest.fixture
def draw_held_out(logs, monkeypatch):
    """Returns a function that makes models draw the held-out images, `offset` after those whose numbers they get.

    It returns the list of draws: indices, conditions.
    """
    monkeypatch.setattr(numbers, "RECIPE", numbers.RECIPE._replace(steps=2, batch_size=8))
    model = load_model(
        ModelConfig(sampler="ddpm", dataset="digits", load_dir="turned"), OutputConfig(logs_root=str(logs), amp=False)
    )
    images = as_uint8(model.batches("val")[list(range(N_HELD_OUT))]["image"])

    def start(offset=0):
        draws = []

        def draw(model, indices, seed, options, conditions):
            draws.append((indices, conditions))
            return {"image": images[(torch.tensor(indices) + offset) % N_HELD_OUT]}

        monkeypatch.setattr(TrainedSampler, "draw", draw)
        return draws

    return start


def read_fields(logs, name):
    rows = json.loads((logs / name / "results.json").read_text())["fields"]
    return {(row["name"], row["by"]): row for row in rows}


def test_a_perfect_sampler_agrees_as_real_images_do(logs, draw_held_out, capsys):
    draws = draw_held_out()
    check(logs, f"--n_samples {N_HELD_OUT} --batch_size 200 --log_dir perfect")
    fields = read_fields(logs, "perfect")
    assert [*fields] == [("rotation", "regressor"), ("thickness", "regressor"), ("thickness", "pixels")]
    for row in fields.values():
        assert row["agreement"]["samples"] == pytest.approx(row["agreement"]["real"])
        assert row["spread"]["samples"] == pytest.approx(row["spread"]["real"])
        assert row["spread"]["without numbers"] == pytest.approx(row["spread"]["real"])
    pixels = fields["thickness", "pixels"]
    assert pixels["agreement"]["real"]["r2"] > 0.9
    assert pixels["spread"]["data"]["mean"] == pytest.approx(pixels["spread"]["real"]["mean"], rel=0.02)
    first, report = len(draws), capsys.readouterr().out
    assert {path.name for path in (logs / "perfect").glob("*.png")} == {"numbers.png", "sweep.png"}
    check(logs, f"--n_samples {N_HELD_OUT} --log_dir perfect")  # reports again
    assert len(draws) == first and report.splitlines()[-12:] == capsys.readouterr().out.splitlines()[-12:]


def test_a_sampler_of_other_numbers_does_not_agree(logs, draw_held_out, monkeypatch):
    draw_held_out(offset=1)
    learned_from, train, fit = [], numbers.train_number_regressor, numbers.fit_line

    def record_images(images, *args):
        learned_from.append(len(images))
        return train(images, *args)

    def record_line(quantity, values):
        learned_from.append(len(quantity))
        return fit(quantity, values)

    monkeypatch.setattr(numbers, "train_number_regressor", record_images)
    monkeypatch.setattr(numbers, "fit_line", record_line)
    check(logs, f"--n_samples {N_HELD_OUT} --batch_size 200 --log_dir wrong")
    pixels = read_fields(logs, "wrong")["thickness", "pixels"]
    assert pixels["agreement"]["samples"]["r2"] < -0.5 and pixels["agreement"]["real"]["r2"] > 0.9
    assert pixels["spread"]["samples"] == pytest.approx(pixels["spread"]["real"])
    assert learned_from == [1797 - N_HELD_OUT] * 2  # nothing from the images that are measured


def test_figures_compare_what_is_measured_with_what_was_given():
    given = {"real": torch.tensor([1.0, 2, 3]), "samples": torch.tensor([0.0, 4])}
    measured = {"real": torch.full((3,), 2.0), "samples": torch.tensor([0.0, 2]), "without numbers": torch.ones(2)}
    figures = figures_of(Measurement("year", NumberField(0, 10), "regressor", given, measured))
    real, samples = figures["agreement"]["real"], figures["agreement"]["samples"]
    assert real == {"n": 3, "r2": 0, "error": pytest.approx(2 / 3)} and samples == {"n": 2, "r2": 0.5, "error": 1}
    deviations = {kind: each["deviation"] for kind, each in figures["spread"].items()}
    expected = {"data": (2 / 3) ** 0.5, "real": 0, "samples": 1, "without numbers": 0}
    assert deviations == pytest.approx(expected)


def test_one_number_changes_in_a_sweep(logs, draw_held_out):
    draws = draw_held_out()
    check(logs, "--n_samples 6 --batch_size 6 --log_dir swept")
    (indices, given), (same, without), *rest = draws
    assert indices == same == [*range(6)] and torch.equal(given["label"], without["label"])
    assert not given["rotation"].isnan().any() and not given["thickness"].isnan().any()
    assert without["rotation"].isnan().all() and without["thickness"].isnan().all()
    noise = torch.tensor([index for indices, _ in rest for index in indices]).view(2, SWEEP_ROWS, SWEEP_VALUES)
    rotation, thickness = (
        torch.cat([conditions[name] for _, conditions in rest]).view(2, SWEEP_ROWS, SWEEP_VALUES)
        for name in ("rotation", "thickness")
    )
    assert (noise == torch.arange(SWEEP_ROWS).view(1, -1, 1)).all()
    assert (rotation[0].diff() > 5).all() and (thickness[1].diff() > 0).all()
    for constant, name in ((rotation[1], "rotation"), (thickness[0], "thickness")):
        assert torch.equal(constant, given[name][:SWEEP_ROWS, None].expand(-1, SWEEP_VALUES))


def test_a_sweep_covers_the_values_of_the_training_images():
    fields = {"year": NumberField(1900, 2100), "angle": NumberField(-180, 180, cyclic=True), "sun": NumberField(0, 90)}
    values = {"year": torch.arange(2000.0, 2101), "angle": torch.zeros(101), "sun": torch.full((101,), torch.nan)}
    values["year"][0] = torch.nan
    sweep = plan_sweep(values, fields)
    ends = sweep.value.view(3, SWEEP_ROWS, SWEEP_VALUES)[:, 0, [0, -1]]
    assert torch.allclose(ends, torch.tensor([[2002.98, 2098.02], [-180, 180], [0, 90]]), atol=0.01)


def test_what_cannot_be_compared_is_refused(logs, trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        check(logs, "--metadata rotation=3 --log_dir refused")
    assert stop.value.code == 2 and "got metadata rotation=3, but numbers that differ" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        call("experiments/check_numbers.py", f"--logs_root {trained_ddpm} --sampler ddpm --log_dir refused")
    assert stop.value.code == 2 and "train it with --conditions numbers" in capsys.readouterr().err
    assert not (logs / "refused").exists() and not (trained_ddpm / "refused").exists()
