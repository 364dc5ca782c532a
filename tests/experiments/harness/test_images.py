"""Denoising strips."""

import numpy as np
import pytest
import torch

from experiments.harness.images import STRIP_STEPS, StepRecorder, save_with_settings


class Space:
    def preview(self, x, predicted):
        return x, predicted


@pytest.mark.parametrize("steps", [3, 64, 65, 1000])
def test_recorded_steps_are_evenly_spaced_and_include_the_last(steps):
    recorder = StepRecorder(type("Trained", (), {"space": Space()})())
    for i in range(steps):
        x = torch.full((1,), float(i))
        assert recorder(i, 1 - i / steps, 1 - (i + 1) / steps, x, -x) is x
    recorded = [x.item() for x, _ in recorder.steps]
    assert recorded[0] == 0 and recorded[-1] == steps - 1 and min(steps, STRIP_STEPS) <= len(recorded) <= 65
    assert len(set(torch.tensor(recorded[:-1]).diff().tolist())) <= 1


def test_an_interrupted_write_keeps_the_earlier_array(tmp_path, monkeypatch):
    """Images of 4 channels are also saved as .npy."""
    images = [torch.full((4, 2, 3), value, dtype=torch.uint8) for value in (1, 2)]
    save_with_settings(tmp_path / "a.png", images[0], {})

    def fill_the_disk(file, array):
        with open(file, "wb") as opened:
            opened.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(np, "save", fill_the_disk)
        save_with_settings(tmp_path / "a.png", images[1], {})
    assert (np.load(tmp_path / "a.npy") == 1).all() and {*tmp_path.iterdir()} == {
        tmp_path / "a.png", tmp_path / "a.npy"
    }  # fmt: skip
