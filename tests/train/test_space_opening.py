"""The space of a run: chosen by its flags, with the scale of its latents, and reopened from its config.yaml."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from helpers.tiny_runs import GAN, SAMPLER, UNET, VQGAN, call
from train.config import DataConfig, FirstStageConfig
from train.data.loading import ImageSource, build_dataset
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage
from train.samplers import absorbing, ddpm
from train.space_opening import measure_latent_scale, open_space, reopen_space
from train.spaces import CodeSpace, LatentSpace, PixelSpace

CPU = torch.device("cpu")
LATENT = f"--sampler ddpm --batch_size 4 --total_steps 20 --sample_steps 3 --no_amp {UNET}"


@pytest.fixture(scope="module")
def first_stage(trained):
    return load_vqgan_stage(trained / "vqgan_digits", None, CPU, amp=False)


@pytest.fixture(scope="module")
def data(first_stage):
    return first_stage.data


@pytest.fixture(scope="module")
def digits(first_stage):
    return build_dataset(first_stage.data, first_stage.reader, "train")


@pytest.fixture(scope="module")
def latent_run(trained):
    """A sampler of the VQGAN's latents, trained for two steps."""
    call("train_sampler.py", f"{LATENT} --logs_root {trained} --train_steps 2 --ae_load_dir vqgan_digits")
    return trained / "ddpm_digits"


def origin(run):
    return yaml.safe_load((run / "config.yaml").read_text())["origin"]


def config(dataset, sampler, trained, **first_stage):
    name = "ddpm" if sampler is ddpm.Config else "absorbing"
    return SimpleNamespace(
        sampler=sampler(sampler=name),
        first=FirstStageConfig(**first_stage),
        data=dataset,
        logging=SimpleNamespace(logs_root=str(trained)),
        training=SimpleNamespace(amp=False, load_dir=None),
    )


def test_latents_that_cannot_be_cached_are_refused(digits, data, trained):
    for sampler, what in ((absorbing.Config, "codes, which"), (ddpm.Config, "pixels")):
        with pytest.raises(ValueError, match=f"got --cache_latents for a sampler of {what}"):
            open_space(config(data, sampler, trained, cache_latents=True), {}, digits, DistContext(CPU))


def test_the_scale_gives_latents_a_deviation_of_1(first_stage, digits, data, trained):
    space = open_space(config(data, ddpm.Config, trained, ae_load_dir="vqgan_digits"), {}, digits, DistContext(CPU))
    assert isinstance(space, LatentSpace)
    source = space.source(digits, "train", data, 9, DistContext(CPU), None)
    x0 = space.encode_batch(source[list(range(len(digits)))])["x0"]  # all images; the scale was measured on a part
    assert x0.std() == pytest.approx(1, abs=0.02)
    assert space.provenance == first_stage.provenance | {"latent_scale": space.scale}
    measured = measure_latent_scale(first_stage, ImageSource(digits, data), DistContext(CPU))
    assert measured == space.scale


def test_an_untrained_vqgans_constant_latents_are_refused(first_stage, digits, data):
    class Constant:
        run, device = first_stage.run, CPU

        def encode_latents(self, images):
            return torch.ones(len(images), 4, 4, 4)

    with pytest.raises(ValueError, match="have standard deviation 0: is that autoencoder trained"):
        measure_latent_scale(Constant(), ImageSource(digits, data), DistContext(CPU))


def test_a_sampler_of_codes_finds_its_vqgan_others_use_pixels(digits, data, trained):
    result = {
        "codes": open_space(config(data, absorbing.Config, trained), {}, digits, DistContext(CPU)),
        "pixels": open_space(config(data, ddpm.Config, trained), {}, digits, DistContext(CPU)),
        "noted": open_space(
            config(data, ddpm.Config, trained, ae_load_dir="vqgan_digits"),
            {"latent_scale": 5.0},
            digits,
            DistContext(CPU),
        ),
    }
    assert isinstance(result["codes"], CodeSpace) and result["codes"].first_stage.run.name == "vqgan_digits"
    assert isinstance(result["pixels"], PixelSpace)
    assert result["noted"].scale == 5.0  # what an earlier start measured


@pytest.mark.parametrize("kind", ["Pixels", "Codes", "Latents"])
def test_a_run_opens_in_the_space_it_was_trained_in(kind, first_stage, data):
    space = {
        "Pixels": PixelSpace(data),
        "Codes": CodeSpace(first_stage),
        "Latents": LatentSpace(first_stage, 0.37, first_stage.data.size),
    }[kind]
    content = yaml.safe_load(yaml.safe_dump({"data": vars(data), "origin": space.provenance}))
    reopened = reopen_space(content, space.first_stage)
    assert reopened == space and reopened.model_args == space.model_args


def test_images_that_the_vqgan_does_not_take_are_refused(digits, trained):
    wrong = DataConfig(img_size=32, n_channels=1)
    with pytest.raises(ValueError, match="got img_size 32.*trained with 16: leave --img_size out"):
        open_space(config(wrong, ddpm.Config, trained, ae_load_dir="vqgan_digits"), {}, digits, DistContext(CPU))


# end to end


def test_the_scale_is_stored_and_reused_on_resume(trained, latent_run, monkeypatch, capfd):
    stored = origin(latent_run)
    assert stored["ae_load_dir"] == "vqgan_digits" and stored["latent_scale"] > 0

    def fail(*args):
        raise AssertionError("the scale was measured again")

    monkeypatch.setattr("train.space_opening.measure_latent_scale", fail)
    flags = f"{LATENT} --logs_root {trained} --ae_load_dir vqgan_digits"
    call("train_sampler.py", f"{flags} --train_steps 3")
    assert origin(latent_run) == stored
    assert "resuming from step 2 of 3" in capfd.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        call("train_sampler.py", f"{flags} --train_steps 1 --log_dir ddpm_new")


def test_a_run_of_pixels_is_no_run_of_latents(trained, latent_run, capfd):
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{LATENT} --logs_root {trained} --train_steps 3 --img_size 16")
    assert stop.value.code == 2
    assert "latent_scale" in capfd.readouterr().err


@pytest.fixture(scope="module")
def other_vqgan(trained):
    flags = f"--train_steps 1 --no_amp --seed 5 --log_dir vqgan_other {VQGAN} {GAN}"
    call("train_vqgan.py", f"--logs_root {trained} {flags}")
    return "vqgan_other"


def test_other_vqgan_weights_are_refused_everywhere(trained, latent_run, other_vqgan, capfd):
    for script, flags, expected in (
        ("train_sampler.py", f"{LATENT} --train_steps 9", "--ae_load_dir: other weights"),
        ("experiments/get_samples.py", "--sampler ddpm --n_samples 2 --log_dir x", "other VQGAN weights"),
        ("experiments/get_samples.py", "--sampler absorbing --n_samples 2 --log_dir x", "other VQGAN weights"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(script, f"{flags} --logs_root {trained} --ae_load_dir {other_vqgan}")
        assert stop.value.code == 2
        assert expected in capfd.readouterr().err
    assert not (trained / "x").exists()


def test_samples_of_latents_are_images(trained, latent_run):
    flags = f"--logs_root {trained} --load_dir ddpm_digits --n_samples 5"
    call("experiments/get_samples.py", f"{flags} --batch_size 5 --log_dir l5 --no_amp --save_process")
    call("experiments/get_samples.py", f"{flags} --batch_size 2 --log_dir l2 --no_amp")
    with np.load(trained / "l5" / "samples.npz") as five, np.load(trained / "l2" / "samples.npz") as two:
        assert five["arr_0"].shape == (5, 16, 16, 3) and "codes" not in five
        assert five["labels"].shape == (5,)
        assert np.array_equal(five["arr_0"], two["arr_0"])
    assert (trained / "l5" / "process.png").is_file()


def test_only_reports_of_latents_have_vqgan_reconstructions(trained, latent_run, trained_ddpm, capsys):
    flags = "--features pixels --n_samples 6"
    call("experiments/calc_FID.py", f"{flags} --logs_root {trained} --load_dir ddpm_digits --log_dir lf")
    call("experiments/calc_FID.py", f"{flags} --logs_root {trained_ddpm} --load_dir ddpm_digits --log_dir pf")
    of_latents, of_pixels = (
        json.loads((logs / name / "results.json").read_text()) for logs, name in ((trained, "lf"), (trained_ddpm, "pf"))
    )
    assert of_latents["reconstructions"] > of_latents["real_vs_real"] > 0
    assert of_latents["run"]["latent_scale"] == origin(latent_run)["latent_scale"]
    assert of_latents["run"]["ae_weights"] and of_latents["run"]["sampler_weights"]
    assert (trained / "lf" / "reconstructions.png").is_file()
    assert of_pixels["reconstructions"] is None and "ae_weights" not in of_pixels["run"]
    assert not (trained_ddpm / "pf" / "reconstructions.png").exists()
    printed = capsys.readouterr().out
    assert printed.count("reconstructions of held-out images") == 1


def test_a_vqgan_for_a_model_of_pixels_is_refused(trained_ddpm, capfd):
    for flag in ("--ae_load_dir vqgan_digits", "--ae_load_step 5"):
        with pytest.raises(SystemExit) as stop:
            call(
                "experiments/get_samples.py",
                f"--logs_root {trained_ddpm} --load_dir ddpm_digits --n_samples 2 --log_dir no {flag}",
            )
        assert stop.value.code == 2
        assert "was trained on pixels: leave --ae_load_dir" in capfd.readouterr().err


def test_the_origin_of_a_code_sampler_has_no_scale(trained):
    """An absorbing run's origin has no scale."""
    stored = origin(trained / "absorbing_digits")
    assert "latent_scale" not in stored and stored["ae_load_dir"] == "vqgan_digits"
    flags = f"--logs_root {trained} --train_steps 3 --no_amp {SAMPLER}"
    call("train_sampler.py", flags)
    assert origin(trained / "absorbing_digits") == stored
