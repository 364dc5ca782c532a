"""The check of generated classes: what is counted, what is compared, the picture, and the command."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from experiments.check_classes import compute_figures, nearest_pairs
from experiments.metrics import image_classifier
from experiments.metrics.image_classifier import LabelledImages
from helpers.tiny_runs import call


class ByBrightness(nn.Module):
    """Classifies an image as its brightness; a tenth of it and a constant are the features."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1)

    def features(self, images):
        mean = images.float().mean((1, 2, 3))
        return torch.stack([mean / 10, torch.rand(len(mean), generator=torch.Generator().manual_seed(0))], 1)

    def forward(self, images):
        return nn.functional.one_hot(images.float().mean((1, 2, 3)).long(), 3).float()


def grey(levels: list[int], labels: list[int]) -> LabelledImages:
    """Flat images of these levels with these labels."""
    return LabelledImages(
        torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.tensor(labels)
    )


def test_shares_weigh_real_classes_as_in_the_samples():
    samples = grey([0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 2])  # 3 of 4, 0 of 1, 1 of 1
    held_out = grey([0, 1, 1, 1], [0, 0, 1, 1])  # 1 of 2, 2 of 2, none
    figures = compute_figures(ByBrightness(), samples, held_out, grey([0, 1, 2], [0, 1, 2]), ["a", "b", "c"])
    assert figures["samples"] == pytest.approx(3 / 5)  # without class c, of which no image is held out
    assert figures["held_out"] == pytest.approx((4 * 0.5 + 1 * 1.0) / 5)
    assert figures["n_compared"] == 4
    assert [row["samples"] for row in figures["classes"]] == [0.75, 0.0, 1.0]
    assert figures["classes"][2] == {"class": "c", "n_samples": 1, "samples": 1.0, "n_held_out": 0, "held_out": None}


def test_each_sample_stands_before_its_nearest_image():
    samples, training = grey([10, 90, 60], [1, 0, 1]), grey([0, 50, 100], [0, 0, 1]).images
    images, captions = nearest_pairs(samples, training, ["hat", "shoe"])
    assert images[:, 0, 0, 0].tolist() == [90, 100, 10, 0, 60, 50]
    assert captions == ["hat", "nearest", "shoe", "nearest", "shoe", "nearest"]


def test_the_command_judges_the_samples_of_a_run(trained, capsys, monkeypatch):
    monkeypatch.setattr(image_classifier, "RECIPE", image_classifier.RECIPE._replace(epochs=1))
    monkeypatch.setattr(image_classifier, "MAX_IMAGES", 64)
    call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 12 --log_dir classes")
    samples = trained / "classes" / "samples.npz"
    call("experiments/check_classes.py", f"--logs_root {trained} --samples {samples} --log_dir judged")
    out = capsys.readouterr().out
    assert "ratio" in out and "Fréchet distance in its features" in out
    results = json.loads((trained / "judged" / "results.json").read_text())
    assert sum(row["n_samples"] for row in results["classes"]) == 12
    assert (trained / "judged" / "classes.png").is_file()


def test_samples_that_cannot_be_judged_are_refused(trained, tmp_path, capfd):
    files = {
        "has no classes: write it with get_samples.py": {"arr_0": np.zeros((3, 16, 16, 3), np.uint8)},
        "got samples of 8x8 pixels, wanted": {
            "arr_0": np.zeros((3, 8, 8, 3), np.uint8),
            "labels": np.zeros(3, np.int64),
        },
    }
    for message, arrays in files.items():
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(SystemExit) as stop:
            call("experiments/check_classes.py", f"--logs_root {trained} --samples {tmp_path / 'x.npz'}")
        assert stop.value.code == 2 and message in capfd.readouterr().err
