"""Interpolation end to end on tiny models."""

import json

import pytest
import torch

from diffusion import inversion
from diffusion.inversion import DDIMInversion
from experiments.harness.editing import encode_images, load_input_images
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.tiny_runs import call
from train.data.loading import fixed_subset
from train.trained_sampler import TrainedSampler


def interpolate(logs, flags):
    call("experiments/interpolate.py", f"--logs_root {logs} --no_amp --device cpu {flags}")


@pytest.mark.parametrize("sampler", ["absorbing", "ddpm"])
def test_the_path_leads_from_the_first_to_the_second_image(sampler, request, monkeypatch, capsys):
    logs = request.getfixturevalue("trained" if sampler == "absorbing" else "trained_ddpm")
    batches, draw = [], TrainedSampler.draw

    def record(self, indices, seed, options, conditions, *, edit, **kwargs):
        batches.append((indices, conditions, options, edit))
        return draw(self, indices, seed, options, conditions, edit=edit, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    flags = f"--sampler {sampler} --n_images 4 --points 5 --strength 0.6 --sample_steps 2 --batch_size 7 --log_dir path"
    interpolate(logs, flags)
    indices, x0 = sum((batch[0] for batch in batches), []), torch.cat([batch[3].x0 for batch in batches])
    assert indices == [0] * 5 + [1] * 5  # one noise for all points of a pair
    assert all(not batch[1] and batch[2].guidance == 1 and batch[3].strength == 0.6 for batch in batches)
    model = load_model(ModelConfig(sampler=sampler), OutputConfig(logs_root=str(logs), amp=False, device="cpu"))
    inputs = load_input_images((), 4, model)
    assert inputs.names == tuple(f"val_{i:06d}" for i in fixed_subset(359, 4))  # sorted, pairs would be of one class
    ends = encode_images(inputs.image, model)
    for pair in (0, 1):
        path = x0[5 * pair : 5 * pair + 5]
        assert torch.allclose(path[[0, 4]].double(), ends[2 * pair : 2 * pair + 2].double())
        from_first = (path - path[:1]).double().abs().flatten(1).sum(1)
        assert (from_first.diff() >= 0).all() and from_first[0] < from_first[2] < from_first[4]
        if sampler == "ddpm":
            assert torch.allclose(path[2], (path[0] + path[4]) / 2, atol=1e-6)
        else:  # codes taken from the second image stay
            of_second = path == path[4:]
            assert (of_second[1:] | ~of_second[:-1]).all()
    results = json.loads((logs / "path" / "results.json").read_text())
    assert results["n_pairs"] == 2 and [row["share"] for row in results["points"]] == [0, 0.25, 0.5, 0.75, 1]
    assert len(list((logs / "path" / "images").glob("*.png"))) == 10 and (logs / "path" / "interpolated.png").is_file()
    assert "distance to the first" in capsys.readouterr().out


def test_with_strength_0_the_ends_are_the_images(trained_ddpm):
    interpolate(trained_ddpm, "--sampler ddpm --n_images 2 --points 3 --strength 0 --log_dir ends")
    first, _, last = json.loads((trained_ddpm / "ends" / "results.json").read_text())["points"]
    assert first["to_first"] == last["to_last"] == 0 < first["to_last"]


@pytest.mark.parametrize("batch_size", [3, 50])
def test_the_ends_of_a_path_of_noise_are_the_images(trained_ddpm, batch_size):
    flags = "--sampler ddpm --n_images 4 --points 3 --mix noise --strength 1 --sample_steps 8 --label 2"
    interpolate(trained_ddpm, f"{flags} --batch_size {batch_size} --log_dir noise_{batch_size}")
    results = json.loads((trained_ddpm / f"noise_{batch_size}" / "results.json").read_text())
    first, middle, last = results["points"]
    assert 0 < results["residual"] < 1e-2
    assert first["to_first"] < 0.002 and last["to_last"] < 0.002
    assert middle["to_first"] > 0.02 and middle["to_last"] > 0.02


def test_an_inversion_that_diverged_is_refused(trained_ddpm, capsys, monkeypatch):
    found = DDIMInversion([torch.full((1, 1, 8, 8), torch.nan)], torch.ones(1, 1), torch.ones(1, 1))
    monkeypatch.setattr(inversion, "ddim_inversion", lambda *args: found)
    with pytest.raises(SystemExit) as stop:
        interpolate(trained_ddpm, "--sampler ddpm --n_images 2 --points 3 --mix noise --sample_steps 2 --log_dir nan")
    assert stop.value.code == 2 and "mix noise gave values that are not finite" in capsys.readouterr().err
    assert not (trained_ddpm / "nan" / "results.json").exists()


def test_codes_have_no_noise_to_mix(trained, capsys):
    with pytest.raises(SystemExit) as stop:
        interpolate(trained, "--mix noise --n_images 2 --log_dir mixed_codes")
    assert stop.value.code == 2 and "codes, which have no exact inversion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--repaint_resamplings 2", "got repaint_resamplings 2"), ("--strength 0", "pass a larger --strength")],
)
def test_noise_that_ddim_cannot_lead_to_is_refused(trained_ddpm, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        interpolate(trained_ddpm, f"--sampler ddpm --mix noise --n_images 2 {flags} --log_dir noise_refused")
    assert stop.value.code == 2 and not (trained_ddpm / "noise_refused").exists()
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("flags", "expected"), [("--n_images 3", "--n_images"), ("--points 1", "--points"), ("--strength 2", "--strength")]
)
def test_invalid_settings_are_refused(trained, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        interpolate(trained, f"{flags} --log_dir interpolate_refused")
    assert stop.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (trained / "interpolate_refused").exists()
