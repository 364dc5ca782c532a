"""Denoising strips."""

import pytest
import torch

from experiments.harness.images import STRIP_STEPS, StepRecorder


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
