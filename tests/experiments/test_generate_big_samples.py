"""Canvases larger than the training grid: with windows and natively, their cost, and the settings in the PNG."""

import json

import pytest
import torch
from PIL import Image

from helpers.tiny_runs import SAMPLER, call, run
from models.transformer import Transformer
from train.trained_sampler import TrainedSampler


def big(logs, flags):
    call("experiments/generate_big_samples.py", f"--logs_root {logs} {flags}")


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def call_shapes(monkeypatch):
    """The shape of every grid that goes through a transformer, by call."""
    shapes, forward = [], Transformer.forward

    def record(network, x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return forward(network, x, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", record)
    monkeypatch.setattr(TrainedSampler, "dry_run", lambda *a, **kwargs: None)  # its call is not counted
    return shapes


@pytest.mark.parametrize("solver", ["ancestral", "halton", "confidence", "remask"])
def test_every_solver_fills_a_canvas_by_windows(trained, solver, call_shapes):
    name = f"big_{solver}"
    flags = f"--solver {solver} --sample_steps 3 --shape 5 7 --n_samples 3 --batch_size 2 --log_dir {name}"
    big(trained, flags)
    pictures = sorted((trained / name).glob("big_*.png"))
    assert len(pictures) == 3
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (7 * 4, 5 * 4)
    assert {shape[1:] for shape in call_shapes} == {(4, 4)}
    results = read_results(trained / name)
    assert results["evaluations_per_image"] == pytest.approx(sum(shape[0] for shape in call_shapes) / 3)
    assert not (trained / name / ".kept").exists()


def test_relative_positions_need_one_call_per_step(trained, call_shapes):
    flags = "--attention neighborhood --kernel_sizes 3 1 --attention_type diff_v2 --position rope --log_dir native"
    call("train_sampler.py", f"--logs_root {trained} --train_steps 2 --no_amp {SAMPLER} {flags}")
    call_shapes.clear()
    flags = "--load_dir native --shape 6 9 --n_samples 2 --solver halton --sample_steps 3 --guidance 1"
    big(trained, f"{flags} --log_dir native_big")
    assert [shape[1:] for shape in call_shapes] == [(6, 9)] * 3
    assert read_results(trained / "native_big")["network_calls_per_batch"] == 3
    call_shapes.clear()
    big(trained, f"{flags} --window_stride 2 --log_dir native_windows")
    assert {shape[1:] for shape in call_shapes} == {(4, 4)}  # windows on request


def test_the_png_holds_its_settings(trained):
    big(trained, "--shape 5 4 --n_samples 1 --temp 0.9 --log_dir with_settings")
    with Image.open(trained / "with_settings" / "big_000.png") as picture:
        settings = json.loads(picture.text["settings"])
    assert settings["canvas"]["shape"] == [5, 4] and settings["sampling"]["temp"] == 0.9
    assert settings["number"] == 0 and settings["sampler_weights"]


def test_a_repeated_run_prints_the_saved_report(trained, call_shapes, capsys):
    flags = "--shape 5 4 --n_samples 2 --log_dir big_again"
    big(trained, flags)
    first_output = capsys.readouterr().out
    call_shapes.clear()
    big(trained, flags)
    assert not call_shapes
    assert first_output.splitlines()[-8:] == capsys.readouterr().out.splitlines()[-8:]
    with pytest.raises(SystemExit):
        big(trained, f"{flags} --batch_size 1")
    assert "--batch_size 50 -> 1" in capsys.readouterr().err  # seconds and calls are of this batch size


@pytest.mark.slow
def test_two_processes_make_the_canvases_of_one(trained):
    flags = f"--logs_root {trained} --shape 5 4 --n_samples 3 --batch_size 1 --no_amp --device cpu"
    for processes in (1, 2):
        process = run("experiments/generate_big_samples.py", f"{flags} --log_dir of_{processes}", processes=processes)
        assert process.returncode == 0, process.stderr
    for number in range(3):
        pair = [Image.open(trained / f"of_{n}" / f"big_{number:03d}.png") for n in (1, 2)]
        assert torch.equal(*(torch.tensor(list(image.get_flattened_data())) for image in pair))


def test_a_canvas_smaller_than_the_grid_is_refused(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        big(trained, "--shape 3 8 --log_dir big_small")
    assert stop.value.code == 2
    assert "smaller than the window of 4" in capsys.readouterr().err
