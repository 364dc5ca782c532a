"""Inversion of images end to end on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments.harness.editing import encode_images, load_input_images
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.inversion import check_invertible, ddim_steps
from helpers.tiny_runs import call
from train.samplers.ddpm import Sampling
from train.trained_sampler import TrainedSampler

MODEL = "--sampler ddpm --n_images 3 --sample_steps 8"


def invert(logs, flags):
    call("experiments/invert.py", f"--logs_root {logs} --no_amp --device cpu {flags}")


def refused(logs, flags, capsys):
    """The message with which the script refuses the flags, before it creates a folder."""
    with pytest.raises(SystemExit) as stop:
        invert(logs, f"{flags} --log_dir invert_refused")
    assert stop.value.code == 2 and not (logs / "invert_refused").exists()
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.fixture
def labels(monkeypatch):
    """The labels under which denoisers were made."""
    seen, make = [], TrainedSampler.make_denoiser

    def record(self, x, options, conditions, **keywords):
        seen.append(None if conditions is None else conditions["label"].tolist())
        return make(self, x, options, conditions, **keywords)

    monkeypatch.setattr(TrainedSampler, "make_denoiser", record)
    return seen


def trained_model(logs):
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(logs), amp=False, device="cpu"))
    return model, load_input_images((), 3, model)


@pytest.mark.parametrize("method", ["fixed_point", "bdia", "ddpm"])
def test_images_return_from_their_noise(method, trained_ddpm, labels, capsys):
    more = "--iterations 100" if method == "fixed_point" else ""
    invert(trained_ddpm, f"{MODEL} --method {method} {more} --batch_size 2 --log_dir by_{method}")
    folder = trained_ddpm / f"by_{method}"
    results = json.loads((folder / "results.json").read_text())
    most = 1e-4 if method == "fixed_point" else 1e-9
    for row in results["of_image"]:
        assert row["latent_rms"] <= row["latent_max"] <= most and row["pixels_max"] == 0 and row["seconds"] > 0
        assert row["calls"] == 8 or method == "fixed_point" and 8 < row["calls"] <= 800
        assert row["calls_back"] == (7 if method == "bdia" else 8)
    arrays = load_file(folder / "noise.safetensors")
    names = {"fixed_point": set(), "bdia": {"next_noise"}, "ddpm": {"maps"}}[method] | {"noise", "times"}
    assert arrays.keys() == names and arrays["noise"].shape == (3, 1, 8, 8) and len(arrays["times"]) == 9
    assert len(list((folder / "images").glob("*_trajectory.png"))) == 3 and (folder / "inverted.png").is_file()
    assert "error of the round trip" in capsys.readouterr().out
    model, inputs = trained_model(trained_ddpm)
    assert [*labels[0], *labels[1]] == list(inputs.labels) == model.dataset("val").labels[numbers(inputs)].tolist()
    labels.clear()
    invert(trained_ddpm, f"{MODEL} --method {method} {more} --batch_size 2 --log_dir by_{method}")
    assert not labels  # the results are there


def numbers(inputs):
    """The numbers of held-out images."""
    return [int(name.removeprefix("val_")) for name in inputs.names]


def test_the_saved_noise_leads_to_the_image_from_python(trained_ddpm):
    invert(trained_ddpm, f"{MODEL} --label 4 --iterations 100 --log_dir saved")
    model, inputs = trained_model(trained_ddpm)
    noise = load_file(trained_ddpm / "saved" / "noise.safetensors")["noise"]
    x0 = encode_images(inputs.image, model)
    with model.inference():
        ddim = ddim_steps(model, Sampling(sample_steps=8), {"label": torch.tensor([4, 4, 4])}, noise)
        assert torch.allclose(ddim.sample(noise), x0.double(), atol=1e-4)


def test_more_iterations_are_more_exact(trained_ddpm):
    errors = []
    for count in (1, 30):
        invert(trained_ddpm, f"{MODEL} --no_clip --iterations {count} --log_dir iterations_{count}")
        rows = json.loads((trained_ddpm / f"iterations_{count}" / "results.json").read_text())["of_image"]
        errors.append(max(row["latent_rms"] for row in rows))
        assert count > 1 or all(row["calls"] == 8 for row in rows)
    assert errors[0] > 1000 * errors[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method edict", "edict"),
        ("--method bdia --iterations 5", "got iterations 5 for method bdia: pass --method fixed_point"),
        ("--gamma 0.5", "got gamma 0.5 for method fixed_point: pass --method bdia"),
        ("--method bdia --gamma 0", "wanted a number in (0, 1]"),
        ("--solver dpmpp_2m_sde --eta 0.5", "got eta 0.5, but the steps are those of ddim"),
        ("--solver ddim --eta 1", "leave it out, or pass --eta None"),
        ("--repaint_resamplings 3 --repaint_jump 2", "got repaint_resamplings 3"),
        ("--label 3 --guidance 2 --guidance_interval 0.111 0.112", "which holds none of the"),
    ],
)
def test_invalid_settings_are_refused(trained_ddpm, capsys, flags, expected):
    assert expected in refused(trained_ddpm, f"--sampler ddpm --n_images 1 {flags}", capsys)


def test_eta_0_is_ddim(trained_ddpm):
    model, inputs = trained_model(trained_ddpm)
    check_invertible(model, Sampling(solver="ddim", eta=0.0))
    x0, given = encode_images(inputs.image, model).double(), Sampling(solver="ddim", eta=0.0, sample_steps=4)
    with model.inference():
        ends = [ddim_steps(model, options, None, x0).sample(x0) for options in (given, Sampling(sample_steps=4))]
    assert torch.equal(*ends)


def test_remedies_are_other_methods():
    from experiments.invert import Inverted, check_finite

    x = torch.full((1, 1, 8, 8), torch.nan)
    inverted = Inverted([x], x, {}, torch.ones(1), 1, torch.zeros(1))
    for method, remedy in (("bdia", "pass more --sample_steps, or --method ddpm"), ("ddpm", "pass --no_amp, less")):
        with pytest.raises(ValueError, match=f"^method {method} gave values that are not finite: {remedy}"):
            check_finite(inverted, method)


def test_codes_have_no_exact_inversion(trained, capsys):
    assert "a model of codes, which have no exact inversion" in refused(trained, "--n_images 1", capsys)
