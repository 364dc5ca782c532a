"""Precision, recall, density and coverage of a trained model, end to end."""

import json

import numpy as np
import pytest
import torch

from experiments.harness.batches import BATCHES_FOLDER
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import read_samples
from experiments.metrics.distances import concatenate
from experiments.metrics.features import pixels
from experiments.metrics.prdc import PRDC, prdc
from helpers.tiny_runs import call, keep_few_images, run
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.trained_sampler import TrainedSampler

SCRIPT = "experiments/calc_PRDC.py"


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A samples.npz of 400 noise images of increasing brightness."""
    path = tmp_path_factory.mktemp("noise") / "samples.npz"
    brightness = np.linspace(10, 255, 400).reshape(-1, 1, 1, 1)
    np.savez(path, arr_0=(np.random.default_rng(0).random((400, 8, 8, 3)) * brightness).astype(np.uint8))
    return path


def test_the_numbers_are_those_of_the_images(trained_ddpm, noise, capsys):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --samples {noise} --features pixels --nearest_k 4 --log_dir n"
    call(SCRIPT, flags)
    results, out = read_results(trained_ddpm, "n"), capsys.readouterr().out
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(trained_ddpm)))
    extract = pixels.build("cpu")

    def real(split, count):
        source = ImageSource(model.dataset(split), model.data)
        (batch,) = images_in_order(source, count, fixed_subset(len(source), count))
        return extract(batch["image"].expand(-1, 3, -1, -1))

    real, held_out, fake = real("train", 400), real("val", 359), extract(read_samples(noise)["image"])
    as_many = fake[fixed_subset(400, 359)]  # not the first ones, which are darker
    for kind, features in {"generated": fake, "generated_at_n_held_out": as_many, "held_out": held_out}.items():
        assert results[kind] == pytest.approx(prdc(real, features, 4)._asdict())
    assert (results["n_real"], results["n_generated"], results["n_held_out"], results["k"]) == (400, 400, 359, 4)
    assert results["held_out"]["coverage"] > 0.8 > results["generated"]["coverage"]
    for name in PRDC._fields:
        assert name in out and f"{results['generated'][name]:.3f}" in out and f"{results['held_out'][name]:.3f}" in out
    assert "of digits, train split" in out and (trained_ddpm / "n" / "samples.png").is_file()
    assert not (trained_ddpm / "n" / BATCHES_FOLDER).exists()
    call(SCRIPT, flags)
    assert capsys.readouterr().out.endswith(out[out.index("\nagainst") :])  # a repeated run prints the same report


def test_no_more_images_than_the_split_has(trained_ddpm, noise, capsys):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --samples {noise} --features pixels"
    call(SCRIPT, f"{flags} --split val --log_dir val")
    results = read_results(trained_ddpm, "val")
    assert results["n_real"] == results["n_generated"] == results["n_held_out"] == 359
    assert "using 359 images of each kind: all of digits, val split" in capsys.readouterr().out
    assert results["generated"] == results["generated_at_n_held_out"]


def test_a_list_sorted_by_class_is_measured_as_a_shuffled_one(trained_ddpm, tmp_path):
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(trained_ddpm)))
    source = ImageSource(model.dataset("train"), model.data)
    order = source.dataset.labels.argsort(kind="stable")
    (batch,) = images_in_order(source, len(source), order.tolist())
    np.savez(tmp_path / "sorted.npz", arr_0=batch["image"].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --samples {tmp_path / 'sorted.npz'} --features pixels"
    call(SCRIPT, f"{flags} --split val --log_dir sorted")
    results = read_results(trained_ddpm, "sorted")
    assert results["n_generated"] == 359  # of 1438; the first 359 are the digits 0, 1 and some 2: recall 0.3
    assert results["generated"]["recall"] > 0.9 and results["generated"]["coverage"] > 0.9


def test_few_held_out_images_are_left_out(trained_ddpm, noise, capsys, monkeypatch):
    """With k = 5 and a twentieth held out, that is below 110 images."""
    keep_few_images(monkeypatch, train=60, val=3)
    call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm --samples {noise} --features pixels --log_dir few")
    results = read_results(trained_ddpm, "few")
    assert results["held_out"] is None and results["generated_at_n_held_out"] is None and results["n_held_out"] == 3
    assert results["n_generated"] == results["n_real"] == 60 and results["generated"].keys() == {*PRDC._fields}
    out = capsys.readouterr().out
    assert "No row of held-out images: --nearest_k 5 needs more than 3." in out and "held-out real" not in out


def test_changed_samples_are_measured_again(trained_ddpm, noise, tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(noise.read_bytes())
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --samples {path} --features pixels --log_dir other"
    call(SCRIPT, flags)
    assert read_results(trained_ddpm, "other")["n_generated"] == 400
    np.savez(path, arr_0=np.zeros((30, 8, 8, 3), np.uint8))
    call(SCRIPT, flags)
    assert read_results(trained_ddpm, "other")["n_generated"] == 30


def test_an_interrupted_run_resumes_to_the_same_numbers(trained, monkeypatch):
    flags = f"--logs_root {trained} --n_samples 14 --batch_size 4 --nearest_k 2 --features pixels --no_amp"
    call(SCRIPT, f"{flags} --log_dir prdc_whole")
    draw, calls = TrainedSampler.draw, []

    def failing(model, indices, *args, **kwargs):
        calls.append(indices)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(model, indices, *args, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        call(SCRIPT, f"{flags} --log_dir prdc_cut")
    call(SCRIPT, f"{flags} --log_dir prdc_cut")
    assert [indices[0] for indices in calls] == [0, 4, 8, 8, 12]
    uninterrupted, resumed = read_results(trained, "prdc_whole"), read_results(trained, "prdc_cut")
    assert all(uninterrupted[key] == resumed[key] for key in ("generated", "held_out", "n_generated"))
    assert (trained / "prdc_whole" / "samples.png").read_bytes() == (trained / "prdc_cut" / "samples.png").read_bytes()


@pytest.mark.parametrize("flags, message", [("--nearest_k 20", "nearest_k 20"), ("--nearest_k 0", "at least 1")])
def test_invalid_settings_are_refused_in_one_line(trained, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {trained} --n_samples 9 --features pixels --log_dir refused {flags}")
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_batches_are_concatenated():
    batches = [{"a": torch.full((n, 2), n), "b": torch.arange(n)} for n in (3, 2)]
    concatenated = concatenate(iter(batches), 9, ("a", "b", "missing"))
    assert concatenated["a"].tolist() == [[3, 3]] * 3 + [[2, 2]] * 2 and concatenated["b"].tolist() == [0, 1, 2, 0, 1]
    assert concatenated.keys() == {"a", "b"} and concatenate(iter([]), 4) == {}


@pytest.mark.slow
def test_two_processes_find_what_one_does(trained_ddpm):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --n_samples 30 --batch_size 4 --features pixels --no_amp"
    for name, processes in (("one", 1), ("two", 2)):
        process = run(SCRIPT, f"{flags} --log_dir {name}", processes=processes)
        assert process.returncode == 0, process.stderr
    one, two = read_results(trained_ddpm, "one"), read_results(trained_ddpm, "two")
    assert all(one[key] == two[key] for key in one.keys() - {"run"}) and one["n_generated"] == 30
