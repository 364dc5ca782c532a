"""Non-square images, and crops as training views, in both stages."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
import yaml

from experiments.metrics import distances, kid
from experiments.metrics.features import load_features, pixels
from helpers.tiny_runs import DDPM, GAN, SAMPLER, UNET, VQGAN, call, parse_config
from train import spaces
from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.data.transforms import training_views
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage

CPU = torch.device("cpu")
WORLD = DistContext(CPU)
SIZE = "--img_size 16 --img_width 24"
CODES = f"--train_steps 2 --no_amp --steps_per_eval 2 {SAMPLER}"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with a VQGAN trained for three steps on crops of 16x24 digits and their mirror images."""
    folder = tmp_path_factory.mktemp("logs")
    flags = f"{VQGAN} {GAN} {SIZE} --shift 0 --crop_margin 4 --horizontal_flip --train_steps 3 --steps_per_eval 3"
    call("train_vqgan.py", f"--logs_root {folder} --no_amp {flags}")
    return folder


@pytest.fixture(scope="module")
def first_stage(logs):
    return load_vqgan_stage(logs / "vqgan_digits", None, CPU, amp=False)


@pytest.fixture(scope="module")
def digits(first_stage):
    """A few of the training images."""
    dataset = build_dataset(first_stage.data, first_stage.reader, "train")
    return dataclasses.replace(dataset, images=dataset.images[:6], labels=dataset.labels[:6])


# the settings


@pytest.mark.parametrize(
    "settings, size, sides",
    [
        ({"img_size": 16}, (16, 16), (16,)),
        ({"img_size": 16, "img_width": 24}, (16, 24), (16, 24)),
        ({"img_size": 24, "img_width": 16}, (24, 16), (24, 16)),
        ({"img_size": 16, "img_width": 16}, (16, 16), (16,)),
    ],
)
def test_the_size_is_height_and_width(settings, size, sides):
    data = DataConfig(n_channels=1, **settings)
    assert data.size == size and data.shape == (1, *size) and data.side_lengths == sides


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"img_width": 0}, "got img_width 0, wanted at least 1: pass --img_width"),
        ({"img_size": 0}, "got img_size 0, wanted at least 1: pass --img_size"),
        ({"crop_margin": -2}, "got crop_margin -2, wanted at least 0: pass --crop_margin"),
        ({"crop_margin": 1}, "got crop_margin 1, whose centre is a corner"),
        ({"crop_margin": 4, "shift": 2}, "got shift 2 and crop_margin 4: .* leave one of them out"),
    ],
)
def test_invalid_sizes_and_margins_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_a_later_stage_takes_the_size_from_its_vqgan(logs, monkeypatch, tmp_path):
    config = parse_config("train_sampler.py", f"--logs_root {logs}", monkeypatch)
    assert (config["img_size"], config["img_width"], config["crop_margin"], config["shift"]) == (16, 24, 4, 0)
    flags = f"--logs_root {logs} --dataset mnist --ae_load_dir vqgan_digits"  # other images: only their shape is taken
    other = parse_config("train_sampler.py", flags, monkeypatch)
    assert (other["img_size"], other["img_width"], other["crop_margin"]) == (16, 24, 0)
    preset = parse_config("train_sampler.py", f"--logs_root {tmp_path}", monkeypatch)
    assert (preset["img_size"], preset["img_width"]) == (32, None)


def test_a_run_without_a_width_is_square(trained, tmp_path):
    run, old = trained / "vqgan_digits", tmp_path / "old"
    old.mkdir()
    for path in run.iterdir():
        if path.name != "config.yaml":
            (old / path.name).symlink_to(path)
    content = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("img_width", "crop_margin"):
        del content["data"][name]
    (old / "config.yaml").write_text(yaml.safe_dump(content))
    assert load_vqgan_stage(old, None, CPU, amp=False).data.size == (16, 16)


# the first stage


def test_the_first_stage_is_trained_and_validated_at_its_size(logs, first_stage):
    assert first_stage.data.size == (16, 24) and first_stage.vqgan.grid == (4, 6)
    lines = [json.loads(line) for line in (logs / "vqgan_digits" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/l1" in line for line in lines)


@pytest.mark.parametrize("change", [{"img_width": 20}, {"img_width": None}, {"img_size": 24}])
def test_images_of_another_height_or_width_are_refused(first_stage, change):
    (name,) = change
    with pytest.raises(
        ValueError, match="|".join([f"got {name}.*leave --{name} out", "got img_width 16.*trained with 24"])
    ):
        first_stage.check_fits(dataclasses.replace(first_stage.data, **change))
    first_stage.check_fits(dataclasses.replace(first_stage.data, crop_margin=0, horizontal_flip=False))


def test_training_codes_come_from_crops_validation_from_images(first_stage, digits):
    plain, larger = ImageSource(digits, first_stage.data), ImageSource(digits, first_stage.data, margin=4)
    views = training_views(first_stage.data)
    assert len(views) == 10
    table = first_stage.encode_dataset(digits, "train", first_stage.data, 2, WORLD)
    assert table.ids.shape == (10, 6, 4, 6)
    for i, view in enumerate(views):
        crops = torch.stack([view(larger[index])["image"] for index in range(6)])
        assert crops.shape[2:] == (16, 24) and torch.equal(table.ids[i].long(), first_stage.encode(crops))
    validated = first_stage.encode_dataset(digits, "val", first_stage.data, 2, WORLD)
    images = torch.stack([plain[index]["image"] for index in range(6)])
    assert torch.equal(validated.ids[0].long(), first_stage.encode(images)) and len(validated.ids) == 1


def test_each_crop_margin_has_its_own_cache(first_stage, digits):
    def caches():
        return {path.stem for path in (first_stage.run / "codes").glob("*")}

    for change in ({}, {"crop_margin": 6}, {"crop_margin": 0}, {"crop_margin": 0, "horizontal_flip": False}):
        data, before = dataclasses.replace(first_stage.data, **change), caches()
        for _ in range(2):
            assert len(first_stage.encode_dataset(digits, "train", data, 3, WORLD).ids) == len(training_views(data))
            assert not change or len(caches() - before) == 1


# the second stage


@pytest.mark.parametrize("kind", ["Pixels", "Codes", "Latents"])
def test_every_space_has_the_shape_of_its_images(kind, first_stage, digits):
    space = {
        "Pixels": spaces.PixelSpace(first_stage.data),
        "Codes": spaces.CodeSpace(first_stage),
        "Latents": spaces.LatentSpace(first_stage, 2.0, first_stage.data.size),
    }[kind]
    expected = {
        "Pixels": {"shape": (1, 16, 24), "pixels": True},
        "Codes": {"codes": 16, "grid": (4, 6)},
        "Latents": {"shape": (4, 4, 6), "pixels": False},
    }[kind]
    assert space.model_args == expected
    for split in ("train", "val"):
        batch = space.encode_batch(space.source(digits, split, first_stage.data, 0, WORLD, None)[[0, 1, 2]])
        x = batch["codes" if kind == "Codes" else "x0"]
        assert x.shape == (3, 4, 6) if kind == "Codes" else x.shape == (3, *expected["shape"])
        assert space.decode(x).shape == (3, 1, 16, 24)


def test_validation_images_are_not_cropped(first_stage, digits):
    data = dataclasses.replace(first_stage.data, horizontal_flip=False, crop_margin=0)
    plain = TrainingImages(ImageSource(digits, data), 0)[list(range(6))]["image"]
    space = spaces.PixelSpace(first_stage.data)
    validation, training = (
        space.source(digits, split, first_stage.data, 0, WORLD, None)[list(range(6))]["image"]
        for split in ("val", "train")
    )
    assert torch.equal(validation, plain)
    assert training.shape == plain.shape and not torch.equal(training, plain)


def test_masked_codes_are_shown_grey(first_stage):
    x = torch.zeros(1, 4, 6, dtype=torch.int64)
    x[0, 1, 5] = first_stage.vqgan.quantizer.codebook_size
    predicted = torch.nn.functional.one_hot(torch.zeros(1, 4, 6, dtype=torch.int64), 16).float()
    x_image, x0_image = spaces.CodeSpace(first_stage).preview(x, predicted)
    grey = torch.zeros(1, 1, 16, 24, dtype=torch.bool)
    grey[..., 4:8, 20:24] = True
    assert torch.equal(x_image, torch.where(grey, 128, x0_image))


def samples(logs, flags):
    call("experiments/get_samples.py", f"--logs_root {logs} --n_samples 3 --no_amp {flags}")
    (folder,) = (word for i, word in enumerate(flags.split()) if flags.split()[i - 1] == "--log_dir")
    return np.load(logs / folder / "samples.npz")


@pytest.mark.parametrize(
    "name, flags",
    [
        ("learned", ""),
        pytest.param("rope", "--position rope", marks=pytest.mark.slow),
        pytest.param("bias", "--position bias", marks=pytest.mark.slow),
        ("neighbours", "--attention neighborhood --kernel_sizes 3 --position bias"),
    ],
)
def test_a_code_sampler_trains_and_samples_on_a_nonsquare_grid(name, flags, logs):
    call("train_sampler.py", f"--logs_root {logs} --log_dir codes_{name} {CODES} {flags}")
    with samples(logs, f"--load_dir codes_{name} --log_dir s_{name}") as arrays:
        assert arrays["arr_0"].shape == (3, 16, 24, 3) and arrays["codes"].shape == (3, 4, 6)
    shape = "--shape 5 9" if name != "learned" else "--shape 4 8 --window_stride 2"
    call("experiments/generate_big_samples.py", f"--logs_root {logs} --load_dir codes_{name} --n_samples 1 {shape}")


def test_a_window_larger_than_the_height_is_refused(logs, capfd):
    flags = "--attention neighborhood --kernel_sizes 5"
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"--logs_root {logs} --log_dir no {CODES} {flags}")
    assert "height of 4" in capfd.readouterr().err


@pytest.mark.slow
def test_gaussian_samplers_train_and_sample_nonsquare_images(logs):
    latent = f"--sampler ddpm --batch_size 4 --total_steps 20 --sample_steps 3 --ae_load_dir vqgan_digits {UNET}"
    for name, flags in {"latents": latent, "pixels": f"{DDPM} --img_width 12 --shift 0 --crop_margin 2"}.items():
        call("train_sampler.py", f"--logs_root {logs} --log_dir {name} --train_steps 2 --no_amp {flags}")
        with samples(logs, f"--load_dir {name} --log_dir s_{name}") as arrays:
            assert arrays["arr_0"].shape == ((3, 16, 24, 3) if name == "latents" else (3, 8, 12, 3))


def test_an_indivisible_width_is_named(logs, capfd):
    for script, flags, message in [
        ("train_sampler.py", f"{DDPM} --img_width 11 --train_steps 1 --no_amp --log_dir no", "8 x 11 pixels"),
        ("train_vqgan.py", f"{VQGAN} {GAN} --img_width 22 --train_steps 1 --log_dir no", "images of 16x22"),
    ]:
        with pytest.raises(SystemExit) as stop:
            call(script, f"--logs_root {logs} {flags}")
        assert stop.value.code == 2 and message in capfd.readouterr().err


# metrics


def test_real_statistics_are_cached_by_height_and_width(first_stage, digits, tmp_path):
    def cache_key(**size):
        before = set(tmp_path.glob("*"))
        data = dataclasses.replace(first_stage.data, **size)
        statistics = distances.real_statistics(digits, data, load_features("pixels", CPU), None, tmp_path, 4, WORLD)
        assert statistics.count == 6
        (path,) = set(tmp_path.glob("*")) - before
        return path.stem.rpartition("_")[2]

    keys = [
        cache_key(img_size=16, img_width=24),
        cache_key(img_size=24, img_width=16),
        cache_key(img_size=16, img_width=None),
    ]
    assert len(set(keys)) == 3
    content = json.dumps([digits.fingerprint(), 16, 1, pixels.VERSION, None, kid.MAX_FEATURES])
    assert keys[2] == hashlib.sha256(content.encode()).hexdigest()[:16]
