"""Solvers of one trained model against each other, and the strips of their way."""

import json

import pytest
import torch
from tiny import call

from experiments.process import MOMENTS, Recorder


def test_every_solver_is_measured_with_every_seed_and_a_comparison_goes_on(trained_ddpm, capfd):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm --n_samples 4 --features pixels --log_dir solvers"
    call("experiments/compare_solvers.py", f"{flags} --solvers ddpm:5 heun:2 --seeds 2")
    path = trained_ddpm / "solvers" / "results.json"
    found = json.loads(path.read_text())
    assert set(found) == {"ddpm:5/0", "heun:2/0", "ddpm:5/1", "heun:2/1"}
    assert len({run["distance"] for run in found.values()}) == 4
    assert "relative to the first" in capfd.readouterr().out
    first, second = found["ddpm:5/0"].pop("distance"), found.pop("heun:2/1")
    path.write_text(json.dumps(found | {"ddpm:5/0": {"distance": first, "seconds": 1e6}}))
    call("experiments/compare_solvers.py", f"{flags} --solvers ddpm:5 heun:2 --seeds 2")
    again = json.loads(path.read_text())
    assert again["ddpm:5/0"]["seconds"] == 1e6  # not measured again
    assert again["heun:2/1"]["distance"] == pytest.approx(second["distance"])


@pytest.mark.parametrize(
    ("solvers", "wanted"), [("ddpm:5 heum:2", "heum"), ("ddpm", "name:steps"), ("ddpm:0", "name:steps")]
)
def test_a_solver_that_is_not_there_is_refused_before_anything_is_sampled(solvers, wanted, trained_ddpm, capfd):
    with pytest.raises(SystemExit) as stop:
        flags = f"--logs_root {trained_ddpm} --sampler ddpm --log_dir refused_solvers"
        call("experiments/compare_solvers.py", f"{flags} --solvers {solvers}")
    assert stop.value.code == 2 and wanted in capfd.readouterr().err
    assert not (trained_ddpm / "refused_solvers").exists()


class Space:
    def shown(self, x, predicted):
        return x, predicted


@pytest.mark.parametrize("steps", [3, 64, 65, 1000])
def test_strips_are_evenly_spaced_and_end_with_the_image_however_many_steps_there_are(steps):
    recorder = Recorder(type("Trained", (), {"space": Space()})())
    for i in range(steps):
        x = torch.full((1,), float(i))
        assert recorder(i, 1 - i / steps, 1 - (i + 1) / steps, x, -x) is x
    kept = [x.item() for x, _ in recorder.steps]
    assert kept[0] == 0 and kept[-1] == steps - 1 and min(steps, MOMENTS) <= len(kept) <= 65
    assert len(set(torch.tensor(kept[:-1]).diff().tolist())) <= 1
