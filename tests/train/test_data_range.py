"""16-bit and float images: trained on in [-1, 1], sampled in the units of the data."""

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import train.datasets
from helpers.tiny_runs import DDPM, SAMPLER, VQGAN, call
from train.data.transforms import to_item
from train.datasets._decode import decode

DATA = "--dataset folder --n_channels 1 --val_fraction 0.5 --no_amp --horizontal_flip"
RANGE = "--data_range 0 4095"


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder of 12-bit grey images."""
    root = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 4096, (16, 16), np.uint16)).save(root / f"{i}.png")
    return root


def error_message(script, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    return capfd.readouterr().err


@pytest.fixture(scope="module")
def trained(scans, tmp_path_factory):
    """A pixel sampler trained for two steps on cached images."""
    root = tmp_path_factory.mktemp("logs")
    flags = f"{DDPM} {DATA} {RANGE} --data_dir {scans} --logs_root {root} --log_dir pixels --steps_per_eval 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.data.image_cache.CACHE_DIR", root / "images")
        call("train_sampler.py", f"{flags} --train_steps 2 --cache_images")
    return root


def test_samples_are_in_the_units_of_the_data(trained, scans):
    assert yaml.safe_load((trained / "pixels" / "config.yaml").read_text())["data"]["data_range"] == [0, 4095]
    flags = f"--logs_root {trained} --load_dir pixels --data_dir {scans} --n_samples 3 --sample_steps 2 --no_amp"
    call("experiments/get_samples.py", f"{flags} --log_dir samples")
    with np.load(trained / "samples" / "samples.npz") as arrays:
        values, pixels = arrays["values"], arrays["arr_0"][..., 0]
    assert values.shape == (3, 1, 8, 8) and values.dtype == np.float32
    assert values.min() >= 0 and 255 < values.max() <= 4095
    assert np.abs(values[:, 0] / 4095 * 255 - pixels).max() <= 0.51


def test_bits_per_dimension_are_refused(trained, scans, capfd):
    flags = f"--logs_root {trained} --load_dir pixels --data_dir {scans} --n_images 2 --no_amp --log_dir elbo"
    assert "not 8-bit" in error_message("experiments/calc_approximate_ELBO.py", flags, capfd)


def test_another_range_is_another_run(trained, scans, capfd):
    flags = (
        f"{DDPM} {DATA} --data_dir {scans} --logs_root {trained} --log_dir pixels --train_steps 3 --steps_per_eval 1"
    )
    with pytest.warns(UserWarning, match="nearly black in 8 bits: .* pass --data_range 0 4095"):
        call("train_sampler.py", flags.replace("--log_dir pixels", "--log_dir dark"))
    message = error_message("train_sampler.py", f"{flags} --data_range 0 255", capfd)
    assert "--data_range 0.0 4095.0 -> 0.0 255.0" in message
    assert "data_range" in error_message("train_sampler.py", f"{flags} --data_range 3 3", capfd)
    call("train_sampler.py", f"{flags} {RANGE}")


def test_eight_bit_images_take_no_range(tmp_path, capfd):
    flags = f"{DDPM} --n_channels 1 --no_amp --logs_root {tmp_path} --train_steps 1 {RANGE}"
    assert "leave --data_range out" in error_message("train_sampler.py", flags, capfd)


def test_codes_take_the_range_of_their_vqgan(scans, tmp_path, capfd):
    vqgan = f"{VQGAN} {DATA} --data_dir {scans} --logs_root {tmp_path} --perceptual_net none"
    call("train_vqgan.py", f"{vqgan} {RANGE} --train_steps 1")
    flags = f"{SAMPLER} --dataset folder --data_dir {scans} --logs_root {tmp_path} --no_amp --train_steps 1"
    call("train_sampler.py", f"{flags} --log_dir codes")
    assert yaml.safe_load((tmp_path / "codes" / "config.yaml").read_text())["data"]["data_range"] == [0, 4095]
    message = error_message("train_sampler.py", f"{flags} --data_range 0 65535 --log_dir other", capfd)
    assert "trained with (0.0, 4095.0): leave --data_range out" in message
    for name, flags in {"held_out": "", "resized": "--size 12", "files": f"--images {scans}"}.items():
        flags = f"--logs_root {tmp_path} --load_dir vqgan_folder --data_dir {scans} --no_amp --n_images 1 {flags}"
        call("experiments/reconstruct.py", f"{flags} --log_dir {name}")
        (image,) = json.loads((tmp_path / name / "results.json").read_text())["images"]
        assert image["width"] == (12 if name == "resized" else 16)
        with Image.open(tmp_path / name / image["picture"]) as picture:
            pixels = np.asarray(picture)[2:60, 2:60]  # the original
        assert 100 < pixels.mean() < 155 and (pixels == 255).mean() < 0.05  # neither darkened nor clipped


@pytest.fixture(scope="module")
def common_flags(trained, scans):
    return f"--logs_root {trained} --data_dir {scans} --no_amp --device cpu"


def test_edits_read_files_in_the_data_range(trained, scans, common_flags):
    model = f"--load_dir pixels --sample_steps 2 {common_flags} --hide left --results 1"
    call("experiments/inpaint.py", f"{model} --image {scans}/0.png --log_dir filled")
    with Image.open(next((trained / "filled" / "images").glob("*.png"))) as picture:
        pixels = np.asarray(picture)[:, 4:, 0]  # visible pixels are restored
    expected = to_item({"image": decode(scans / "0.png")}, (8, 8), 1, (0, 4095))["image"][0, :, 4:]
    assert np.abs(pixels - (expected.numpy() + 1) * 127.5).max() <= 0.51


def test_neighbours_are_ranked_in_8_bits(trained, common_flags):
    flags = f"{common_flags} --load_dir pixels --sample_steps 2 --n_samples 2 --candidates 3 --neighbours 2"
    call("experiments/calc_nearest_neighbours.py", f"{flags} --features pixels --rerank pixels --log_dir near")
    results = json.loads((trained / "near" / "results.json").read_text())
    assert 0 < results["median_held_out"] and len(results["neighbours"]) == 2


FLOATS = """
from dataclasses import dataclass

import numpy as np

from train.datasets import DatasetConfig, FloatImage


@dataclass(frozen=True, kw_only=True)
class Config(DatasetConfig):
    pass


class Heights:
    n_classes, labels = 0, None

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {"image": FloatImage(rng.uniform(-50, 2000, (8, 8)).astype(np.float32), (-50.0, 2000.0))}

    def fingerprint(self):
        return "heights"


def build(config, split):
    return Heights()
"""


@pytest.fixture
def heights(tmp_path, monkeypatch):
    """A data set of floats that declares their range."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "heights.py").write_text(FLOATS)
    monkeypatch.setattr(train.datasets, "__path__", [*train.datasets.__path__, str(tmp_path / "plugins")])
    yield f"--dataset heights --n_channels 1 --img_size 8 --no_amp --logs_root {tmp_path} --steps_per_eval 0"
    monkeypatch.delitem(sys.modules, "train.datasets.heights", raising=False)


def test_a_run_stores_the_range_declared_by_its_data(heights, tmp_path, capfd):
    call("train_sampler.py", f"{DDPM} {heights} --log_dir own --train_steps 1")
    assert yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["data"]["data_range"] == [-50.0, 2000.0]
    call("train_sampler.py", f"{DDPM} {heights} --log_dir own --train_steps 2")
    assert "resuming from step 1 of 2" in capfd.readouterr().out
    flags = f"--sampler ddpm --dataset heights --logs_root {tmp_path} --load_dir own --no_amp --log_dir samples"
    call("experiments/get_samples.py", f"{flags} --n_samples 2 --sample_steps 2")
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        values = arrays["values"]
    assert values.min() >= -50 and 255 < values.max() <= 2000


def test_codes_and_latents_with_a_range_give_values_too(heights, tmp_path):
    call("train_vqgan.py", f"{VQGAN} {heights} --perceptual_net none --log_dir vqgan --train_steps 1 --img_size 16")
    for name, sampler in (("codes", f"--sampler absorbing {SAMPLER}"), ("latents", DDPM.replace("--img_size 8", ""))):
        flags = f"{heights.replace('--img_size 8', '')} --ae_load_dir vqgan --log_dir {name} --train_steps 1"
        call("train_sampler.py", f"{sampler} {flags}")
        flags = f"--dataset heights --logs_root {tmp_path} --load_dir {name} --n_samples 2 --sample_steps 2 --no_amp"
        sampler = "absorbing" if name == "codes" else "ddpm"
        call("experiments/get_samples.py", f"--sampler {sampler} {flags} --log_dir of_{name}")
        with np.load(tmp_path / f"of_{name}" / "samples.npz") as arrays:
            values, pixels = arrays["values"], arrays["arr_0"][..., 0]
        assert np.abs((values[:, 0] + 50) / 2050 * 255 - pixels).max() <= 0.51 and values.max() > 255
