"""Grids of models and settings end to end on tiny models."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion.process import ContinuousProcess
from experiments.harness.editing import encode_images, load_input_images, redraw_input
from experiments.metrics.classifier import classifier_for, predict_classes
from experiments.metrics.features import pixels
from helpers.tiny_runs import call
from train.config import DataConfig
from train.inference import load
from train.samplers import NotFiniteError
from train.trained_sampler import TrainedSampler


@pytest.fixture(scope="module")
def runs(trained, trained_ddpm):
    """The models of both kinds, as a file names them."""
    return {"codes": str(trained / "absorbing_digits"), "pixels": str(trained_ddpm / "ddpm_digits")}


@pytest.fixture
def ablate(tmp_path):
    """Writes a file, runs it, and returns the folder of its results."""

    def run(name="grid", flags="", *, folder=None, **content):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        folder = folder or name
        words = f"--logs_root {tmp_path} --log_dir {folder} --no_amp --device cpu"
        call("experiments/ablate.py", f"{path} {words} {flags}")
        return tmp_path / folder

    return run


@pytest.fixture
def drawn(monkeypatch):
    """(run, options) of every batch that is drawn."""
    calls, draw = [], TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **keywords):
        calls.append((model.run.name, options))
        return draw(model, indices, seed, options, conditions, **keywords)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return calls


def read_rows(folder):
    return json.loads((folder / "results.json").read_text())["cells"]


def images_of(folder, **at):
    """The images of the cell with these labels."""
    (row,) = [row for row in read_rows(folder) if at.items() <= row["at"].items()]
    return np.load(folder / row["file"])["arr_0"]


def test_a_cell_does_not_depend_on_its_neighbours(ablate, runs):
    settings = {"label": 3, "guidance": 2}
    grid = ablate(models=runs, settings=settings, axes={"sample_steps": [2, 3]}, n_images=3)
    assert len({path.name for path in (grid / "cells").iterdir()}) == len(read_rows(grid)) == 4
    alone = {"settings": settings, "axes": {"sample_steps": [3]}, "n_images": 3}
    for model, run in runs.items():
        one = ablate(f"one_{model}", models={"x": run}, **alone)
        (row,) = read_rows(one)
        assert row["file"] in [each["file"] for each in read_rows(grid)]  # the same name: nothing else determines it
        assert np.array_equal(images_of(grid, model=model, sample_steps="steps 3"), np.load(one / row["file"])["arr_0"])


def test_all_cells_start_from_the_same_noise(ablate, runs, monkeypatch):
    noise, prior = [], ContinuousProcess.prior

    def record(process, shape, rng):
        noise.append(prior(process, shape, rng))
        return noise[-1]

    monkeypatch.setattr(ContinuousProcess, "prior", record)
    ways = {"a": {"solver": "ddim", "label": 1}, "b": {"label": 2, "sample_steps": 3}, "c": {"guidance": 2}}
    ablate(models={"x": runs["pixels"]}, axes={"way": ways, "seed": [0, 5]}, n_images=2)
    first, other = (torch.stack(noise[-6:])[i::2] for i in (0, 1))  # after those of dry runs: by seed, the last axis
    assert (first == first[0]).all() and (other == other[0]).all() and not torch.equal(first[0], other[0])


def test_a_killed_grid_goes_on_and_gives_the_same_sheet(ablate, runs, drawn, monkeypatch):
    content = {"models": runs, "axes": {"sample_steps": [2, 3]}, "n_images": 2, "measures": ["evaluations"]}
    whole = ablate("whole", **content)
    count, recorded = len(drawn), TrainedSampler.draw

    def killed(*args, **keywords):
        if len(drawn) == count + 2:
            raise KeyboardInterrupt
        return recorded(*args, **keywords)

    monkeypatch.setattr(TrainedSampler, "draw", killed)
    with pytest.raises(SystemExit) as stop:
        ablate("again", **content)
    folder = whole.parent / "again"
    assert stop.value.code == 130 and len(list((folder / "cells").iterdir())) == 2
    assert not (folder / "sheet.png").exists()
    monkeypatch.setattr(TrainedSampler, "draw", recorded)
    ablate("again", **content)
    assert count == 4 and len(drawn) == 8
    assert (folder / "sheet.png").read_bytes() == (whole / "sheet.png").read_bytes()
    ablate("again", **content)
    assert len(drawn) == 8


def test_other_settings_are_never_mixed_with_old_cells(ablate, runs, drawn):
    pixels = {"models": {"x": runs["pixels"]}, "axes": {"sample_steps": [2, 3]}, "n_images": 2}
    ablate(**pixels)
    folder = ablate(**pixels | {"axes": {"sample_steps": [3, 4]}})
    assert [options.sample_steps for _, options in drawn] == [2, 3, 4]
    assert [row["at"]["sample_steps"] for row in read_rows(folder)] == ["steps 3", "steps 4"]
    for changed, count in ((pixels | {"seed": 1}, 2), (pixels, 0)):
        before = len(drawn)
        ablate(**changed)
        assert len(drawn) - before == count


def test_a_model_without_a_setting_leaves_its_cells_empty(ablate, runs, drawn, capsys):
    folder = ablate(models=runs, axes={"temp": [0.5, 1.0]})
    assert [name for name, _ in drawn] == ["absorbing_digits"] * 2
    by_model = {row["model"]: row for row in read_rows(folder)}
    assert by_model["codes"]["file"] and by_model["pixels"]["file"] is None
    assert by_model["pixels"]["reason"] == "got temp, which the sampler ddpm does not have"
    out = capsys.readouterr().out
    assert "4 cells: 2 drawn now, 2 not possible" in out and "pixels, temperature 0.5: got temp" in out


def test_cells_that_no_model_can_draw_are_refused_before_any(ablate, runs, drawn, capsys, tmp_path):
    for name, axes, words in (
        ("a", {"temp": [0.5]}, "1 of 1 cells can be drawn by no model of the grid: temperature 0.5: got temp"),
        ("b", {"solver": ["ddim", "heun"], "eta": [0.5]}, "1 of 2 cells"),
        ("c", {"sample_steps": [2, 0]}, "got sample_steps 0, wanted at least 1"),
        ("d", {"label": [3, 10]}, "got label 10, wanted a class from 0 to 9"),
        ("e", {"size": [7]}, "size 7"),
    ):
        with pytest.raises(SystemExit) as stop:
            ablate(name, models={"x": runs["pixels"]}, axes=axes)
        assert stop.value.code == 2 and words in capsys.readouterr().err
        assert not drawn and not (tmp_path / name).exists()


def test_samples_that_are_not_finite_leave_their_cell_empty(ablate, runs, drawn, monkeypatch):
    recorded = TrainedSampler.draw

    def diverge(model, indices, seed, options, conditions, **keywords):
        batch = recorded(model, indices, seed, options, conditions, **keywords)
        if options.guidance == 2:
            raise NotFiniteError("values that are not finite", batch["image"])
        return batch

    monkeypatch.setattr(TrainedSampler, "draw", diverge)
    content = {"models": {"x": runs["pixels"]}, "axes": {"guidance": [2, 1]}}
    infinite, finite = read_rows(ablate(**content))
    assert finite["file"] and not infinite["file"] and infinite["reason"] == "values that are not finite"
    ablate(**content)
    assert [options.guidance for _, options in drawn] == [2, 1, 2]  # it is tried again


@pytest.fixture
def noisy_picture(tmp_path):
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("name", ["codes", "pixels"])
def test_an_image_is_redrawn_by_the_strength_of_the_cell(name, ablate, runs, noisy_picture):
    settings = {"image": noisy_picture, "label": 3, "sample_steps": 4}
    folder = ablate(models={"x": runs[name]}, settings=settings, axes={"strength": [0.2, 0.8]}, n_images=2)
    model = load(runs[name], device="cpu", amp=False).model
    image = load_input_images((noisy_picture,), 1, model).image.expand(2, -1, -1, -1)
    options = dataclasses.replace(load(runs[name], device="cpu").settings, sample_steps=4)
    for strength in (0.2, 0.8):
        edit, label = redraw_input(encode_images(image, model), model, strength), torch.tensor([3, 3])
        wanted = model.draw([0, 1], 0, options, {"label": label}, edit=edit)["image"].permute(0, 2, 3, 1)
        assert np.array_equal(images_of(folder, strength=f"strength {strength}"), wanted.expand(-1, -1, -1, 3))


def test_less_strength_changes_less(ablate, runs, noisy_picture):
    settings = {"image": noisy_picture, "label": 3, "sample_steps": 8}
    axes = {"strength": [0.2, 0.5, 1.0]}
    folder = ablate(models={"x": runs["pixels"]}, settings=settings, axes=axes, n_images=4, measures=["mse"])
    errors = [row["mse"] for row in read_rows(folder)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_measures_are_those_of_the_images(ablate, runs):
    content = {"models": runs, "axes": {"label": [8, None]}, "n_images": 6}
    folder = ablate(**content, measures=["classes", "distance", "seconds", "evaluations"], features="pixels")
    classifier = classifier_for(DataConfig(dataset="digits"))
    rows = read_rows(folder)
    assert [row["classes"] for row in rows if row["at"]["label"] == "label none"] == [None, None]
    for row in (row for row in rows if row["at"]["label"] != "label none"):
        arrays = np.load(folder / row["file"])
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)[:, :1]
        assert (arrays["labels"] == 8).all() and images.shape[0] == 6
        assert row["classes"] == (predict_classes(classifier, images) == 8).double().mean().item()
        assert row["distance"] > 0 and row["distance_of"] == "FD(pixels)"
        assert row["seconds"] > 0 and (row["evaluations"] == 4) == (row["model"] == "pixels")  # as many as steps
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["label"] for line in lines] == ["label 8", "label none"] * 2
    assert float(lines[0]["distance"]) == rows[0]["distance"]
    models = json.loads((folder / "results.json").read_text())["models"].values()
    assert [(model["features_name"], model["features_version"]) for model in models] == [("pixels", pixels.VERSION)] * 2


def test_mse_does_not_wrap_at_8_bits(ablate, runs, tmp_path):
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    settings = {"image": str(tmp_path / "white.png"), "strength": 1}
    folder = ablate(models={"x": runs["codes"]}, settings=settings, axes={"label": [1]}, measures=["mse"])
    (row,) = read_rows(folder)
    images = np.load(folder / row["file"])["arr_0"].astype(float)
    assert row["mse"] == pytest.approx(((255 - images) ** 2).mean(), rel=1e-5) and row["mse"] > 300


def test_sizes_are_drawn(ablate, runs):
    folder = ablate(models={"x": runs["pixels"]}, axes={"size": [8, [12, 16]]})
    shapes = [np.load(folder / row["file"])["arr_0"].shape for row in read_rows(folder)]
    assert shapes == [(1, 8, 8, 3), (1, 12, 16, 3)]


def test_flags_override_the_file(ablate, runs):
    folder = ablate(
        "a", "--n_images 3 --seed 4", models={"x": runs["pixels"]}, axes={"guidance": [1, 2]}, n_images=2, seed=1
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["n_images"] == 3 and results["seed"] == 4 and results["models"]["x"]["step"] == 3
    assert yaml.safe_load((folder / "config.yaml").read_text())["grid"]["axes"]["guidance"].keys() == {
        *("guidance scale 1", "guidance scale 2")
    }


def test_mistakes_exit_with_code_2(ablate, runs, capsys, tmp_path):
    pixels = {"models": {"x": runs["pixels"]}, "axes": {"guidance": [1]}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("samples:\n  n_samples: 3\n")
    (tmp_path / "other" / "samples.npz").touch()
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").touch()
    vqgan = runs["codes"].replace("absorbing_digits", "vqgan_digits")
    for changes, words in (
        ({"folder": "other"}, "holds other results: pass another --log_dir"),
        ({"n_imgs": 3}, "got the key 'n_imgs', did you mean 'n_images'?"),
        ({"measures": ["mse"]}, "no cell redraws an image: add image: FILE"),
        ({"measures": ["clases"]}, "got measures 'clases', did you mean 'classes'?"),
        ({"measures": ["distance"]}, "got the measure distance of 1 image: pass --n_images 100"),
        ({"models": {"x": "nothing"}}, "no run in"),
        ({"models": {"x": str(tmp_path / "sd")}}, "python convert.py --from sd --weights"),
        ({"models": {"x": vqgan}}, "is no run of a sampler: wanted one of train_sampler.py as x"),
        (
            {"models": {"x": {"run": runs["pixels"], "load_step": "last"}}},
            "got load_step 'last', wanted a whole number",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            ablate(**pixels | changes)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and words in " ".join(message.replace("│", " ").split()), message
    for words, message in (("", "got no file of a grid"), ("none.yaml", "none.yaml not found: pass a YAML file")):
        with pytest.raises(SystemExit) as stop:
            call("experiments/ablate.py", words)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_cell_says_how_to_draw_it_again(ablate, runs, capsys):
    content = {"models": {"x": runs["pixels"]}, "axes": {"guidance": [1]}}
    (path,) = (ablate(**content) / "cells").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        ablate(**content)
    assert f"{path} cannot be read" in (message := capsys.readouterr().err) and "delete it, and the cell" in message


def test_a_checkpoint_of_a_run_is_a_model(ablate, runs, tmp_path):
    """Plain and averaged weights of one run differ, and so do the names of their cells."""
    shutil.copytree(runs["pixels"], tmp_path / "copy")
    models = {"mean": "copy", "plain": {"run": "copy", "ema": False, "load_step": 3}}
    mean, plain = read_rows(ablate(models=models, axes={"label": [1]}))
    assert mean["file"] != plain["file"]
