"""Nearest training images of a trained model's images, end to end."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.batches import BATCHES_FOLDER
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import match_data_channels
from experiments.metrics import nearest_neighbours
from experiments.metrics.nearest_neighbours import PictureRow, display_size, save_neighbour_picture
from helpers.tiny_runs import call, run
from train.config import DataConfig
from train.data.loading import ImageSource, images_in_order

SCRIPT = "experiments/calc_nearest_neighbours.py"
MANY = "--features pixels --rerank pixels --candidates 200 --neighbours 3"
QUICK = "--features pixels --rerank pixels --candidates 5 --neighbours 3"


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


def training_images(logs, sampler):
    model = load_model(ModelConfig(sampler=sampler), OutputConfig(logs_root=str(logs)))
    source = ImageSource(model.dataset("train"), model.data)
    return torch.cat([batch["image"] for batch in images_in_order(source, 500)])


def save_samples(path, images):
    """Writes grey images uint8 (N, 1, H, W) as a samples.npz."""
    np.savez(path, arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    return path


def test_copies_are_found_and_reported(trained_ddpm, tmp_path, capsys):
    images = training_images(trained_ddpm, "ddpm")
    samples = torch.cat([images[[5, 700]], 255 - images[[5, 700]]])
    path = save_samples(tmp_path / "samples.npz", samples)
    call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm --samples {path} {MANY} --log_dir copies")
    results, out = read_results(trained_ddpm, "copies"), capsys.readouterr().out
    assert [row[0] for row in results["neighbours"][:2]] == [5, 700]
    assert results["distances"][0][0] == results["distances"][1][0] == results["feature_distances"][1][0] == 0
    assert all(len(row) == 3 and row == sorted(row) for row in results["distances"])
    distances = (samples[2].double() - images.double()).square().sum((1, 2, 3)).sqrt() / 255
    assert results["distances"][2] == pytest.approx(distances.sort().values[:3].tolist())
    assert (results["equal_pixels"], results["equal_codes"], results["n_samples"]) == (0.5, None, 4)
    assert (results["n_held_out"], results["n_training"], results["candidates"]) == (4, 1438, 200)
    assert "exact copies (pixels)" in out and "50.0 %" in out and "copies (codes)" not in out
    assert not (trained_ddpm / "copies" / BATCHES_FOLDER).exists()
    with Image.open(trained_ddpm / "copies" / "neighbours.png") as picture:
        pixels = np.asarray(picture).reshape(-1, 3)
    assert (pixels == (210, 0, 0)).all(1).sum() > 2 * 64 * 4  # two copies are framed


def test_codes_in_samples_are_ignored_by_pixel_models(trained_ddpm, tmp_path):
    images = training_images(trained_ddpm, "ddpm")[:3].expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    path = tmp_path / "coded.npz"
    np.savez(path, arr_0=images.numpy(), codes=np.zeros((3, 2, 2), int))
    call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm --samples {path} {QUICK} --log_dir coded")
    assert read_results(trained_ddpm, "coded")["equal_codes"] is None


def test_codes_of_a_model_of_codes_are_compared(trained, capsys):
    flags = f"--logs_root {trained} --n_samples 6 --batch_size 4 --no_amp {QUICK}"
    call(SCRIPT, f"{flags} --log_dir codes")
    results, out = read_results(trained, "codes"), capsys.readouterr().out
    assert 0 <= results["equal_codes"] <= 1 and "exact copies (codes)" in out
    assert results["ranked_by"] == "pixels" and len(results["views"]) == 9  # those of its training
    assert results["ratio"] == pytest.approx(results["median"] / results["median_held_out"])
    call(SCRIPT, f"{flags} --log_dir codes")
    assert capsys.readouterr().out.endswith(out[out.index("\n6 generated") :])  # a repeated run prints the same report


def test_an_interrupted_run_resumes_to_the_same_results(trained_ddpm, monkeypatch):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --n_samples 5 --batch_size 2 --no_amp {QUICK}"
    call(SCRIPT, f"{flags} --log_dir whole")
    rank_candidates, calls = nearest_neighbours.rank_candidates, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return rank_candidates(*args)

    monkeypatch.setattr(nearest_neighbours, "rank_candidates", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        call(SCRIPT, f"{flags} --log_dir cut")
    monkeypatch.setattr("train.trained_sampler.TrainedSampler.draw", None)  # nothing is drawn again
    call(SCRIPT, f"{flags} --log_dir cut")
    assert len(calls) == 6 + 6  # 10 images in batches of 2, of which two were done
    uninterrupted, resumed = read_results(trained_ddpm, "whole"), read_results(trained_ddpm, "cut")
    assert all(uninterrupted[key] == resumed[key] for key in uninterrupted.keys() - {"run"})


@pytest.mark.skipif("LPIPS_SQUEEZE" not in os.environ, reason="LPIPS_SQUEEZE names no folder with squeeze.backbone.pth")
def test_lpips_ranks_with_the_weights_of_a_file(trained_ddpm):
    flags = "--n_samples 2 --candidates 4 --neighbours 2 --features pixels --perceptual_net squeeze --log_dir lpips"
    weights = f"{os.environ['LPIPS_SQUEEZE']}/squeeze.backbone.pth"
    call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm {flags} --perceptual_weights {weights}")
    results = read_results(trained_ddpm, "lpips")
    assert results["ranked_by"] == "LPIPS (squeeze)" and results["run"]["files"].keys() == {"perceptual_weights"}
    assert all(0 < row[0] <= row[1] for row in results["distances"])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--candidates 2", "candidates 2, wanted at least 10"),
        ("--rerank pixels --perceptual_weights x.pth", "uses none"),
        ("--perceptual_weights missing.pth", "missing.pth"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(trained_ddpm, capfd, flags, message):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm --features pixels --log_dir refused {flags}")
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_samples_are_converted_to_the_channels_of_the_data():
    colour = torch.randint(0, 256, (2, 3, 4, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    grey = match_data_channels(colour, DataConfig(img_size=4, img_width=6, n_channels=1))
    assert torch.equal(grey, colour.float().mean(1, keepdim=True).round().byte())
    assert torch.equal(match_data_channels(colour, DataConfig(img_size=4, img_width=6)), colour)
    assert match_data_channels(grey, DataConfig(img_size=4, img_width=6)).shape == colour.shape
    with pytest.raises(ValueError, match="4x6 pixels, wanted 6x4"):
        match_data_channels(colour, DataConfig(img_size=6, img_width=4))


@pytest.mark.parametrize(
    "size, displayed", [((8, 8), (64, 64)), ((28, 20), (40, 56)), ((100, 90), (90, 100)), ((256, 128), (64, 128))]
)
def test_images_are_displayed_at_a_readable_size(size, displayed):
    assert display_size(torch.zeros(3, *size)) == displayed


def test_the_picture_has_an_image_and_its_neighbours_in_a_row(tmp_path):
    near = torch.tensor([10, 200, 30])[:, None, None].expand(5, 3, 64, 64).byte()
    row = PictureRow(torch.zeros(1, 64, 64).byte(), "sample 0", near, [0.5] * 5)
    save_neighbour_picture(tmp_path / "p.png", {"one": [row], "two": [row, row]}, "title")
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture)
    green = (pixels == (10, 200, 30)).all(-1)
    assert green.sum() == 15 * 64 * 64 and green.any(1).sum() == 3 * 64 and green.any(0).sum() == 5 * 64
    assert not (pixels == (210, 0, 0)).all(-1).any()


def test_classes_stand_below_images_where_they_are_known(tmp_path):
    near, heights = torch.zeros(2, 1, 64, 64).byte(), []
    for classes in ([], ["", "", ""], ["hat", "bag", "hat"]):
        row = PictureRow(near[0], "sample 0", near, [0.5] * 2, classes)
        save_neighbour_picture(tmp_path / "p.png", {"one": [row, row]}, "title")
        with Image.open(tmp_path / "p.png") as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1] == heights[2] - 2 * 15


@pytest.mark.slow
def test_two_processes_find_what_one_does(trained):
    for name, processes in (("one", 1), ("two", 2)):
        flags = f"--logs_root {trained} --n_samples 9 --batch_size 2 --no_amp {QUICK} --log_dir {name}"
        process = run(SCRIPT, flags, processes=processes)
        assert process.returncode == 0, process.stderr
    one, two = read_results(trained, "one"), read_results(trained, "two")
    assert all(one[key] == two[key] for key in one.keys() - {"run"}) and len(one["neighbours"]) == 9
    pictures = [(trained / name / "neighbours.png").read_bytes() for name in ("one", "two")]
    assert pictures[0] == pictures[1]
