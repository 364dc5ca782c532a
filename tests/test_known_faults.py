"""Faults of the reference code that must not come back, one test each, unless covered elsewhere.

Elsewhere: optimizer, schedule and data order on resume (train/test_runs_resume.py, train/data/test_loading.py);
unreadable files and silently skipped keys (train/test_checkpoint.py); one learning rate for all data sets
(test_flags.py); the commitment weight on the wrong term (vq/test_quantizer.py); images of older runs in a distance, and
fewer images than requested (experiments/test_scripts.py).
"""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers.tiny_runs import GAN, ROOT, SAMPLER, VQGAN, call
from train.cli.parse import from_dict
from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.datasets import digits
from train.execution import autocast
from train.first_stage import StoredVQGANConfig, load_vqgan_stage
from train.samplers import absorbing
from vq.perceptual import load_perceptual


def folder_of_images(root, greys: dict[str, int], n: int = 6):
    for split, grey in greys.items():
        (root / split).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((16, 16), grey + i, np.uint8)).save(root / split / f"{i}.png")
    return root


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_validation_measures_validation_images(tmp_path):
    """The reference drew x_val and then measured the training batch x."""
    data = folder_of_images(tmp_path / "data", {"train": 0, "valid": 240})
    flags = f"--dataset folder --data_dir {data} --n_channels 1 --logs_root {tmp_path} {VQGAN} {GAN} --no_amp --no_ema"
    call("train_vqgan.py", f"{flags} --train_steps 3 --lr 1e-3")
    val_l1 = next(row["val/l1"] for row in rows(tmp_path / "vqgan_folder") if "val/l1" in row)
    first = load_vqgan_stage(tmp_path / "vqgan_folder", None, torch.device("cpu"), False)
    expected = {}
    for split in ("train", "val"):
        source = ImageSource(build_dataset(first.data, first.reader, split), first.data)
        images = torch.stack([source[i]["image"].as_subclass(torch.Tensor) for i in range(len(source))]) / 127.5 - 1
        expected[split] = (first.vqgan(images)[0] - images).abs().mean().item()
    assert val_l1 == pytest.approx(expected["val"], rel=1e-4)
    assert abs(expected["train"] - expected["val"]) > 0.1 * expected["val"]


def test_data_dir_reaches_training_and_validation(tmp_path):
    """The reference never passed --custom_dataset_path to its training loader."""
    data = folder_of_images(tmp_path / "data", {"train": 10, "valid": 200})
    flags = f"--dataset ffhq --data_dir {data} --logs_root {tmp_path} --num_workers 0"
    call("train_vqgan.py", f"{flags} {VQGAN} {GAN} --train_steps 1")
    stored = yaml.safe_load((tmp_path / "vqgan_ffhq" / "config.yaml").read_text())
    config = from_dict(StoredVQGANConfig, {name: stored[name] for name in ("data", "reader", "network")}, "test")
    for split, grey in {"train": 10, "val": 200}.items():
        assert np.array(build_dataset(config.data, config.reader, split)[0]["image"]).max() == grey


@pytest.mark.slow
def test_other_weights_or_data_get_new_codes(tmp_path):
    """The reference's cache was named by data set and width alone."""
    data = folder_of_images(tmp_path / "data", {"train": 0, "valid": 240})
    flags = f"--dataset folder --logs_root {tmp_path}"
    vqgan = f"{flags} --data_dir {data} {VQGAN} {GAN}"
    call("train_vqgan.py", f"{vqgan} --train_steps 1")
    call("train_sampler.py", f"{flags} {SAMPLER} --train_steps 1 --log_dir a")
    tables = tmp_path / "vqgan_folder" / "codes"
    assert len(list(tables.glob("*.codes"))) == 2  # train and val
    call("train_sampler.py", f"{flags} {SAMPLER} --train_steps 1 --log_dir b --lr 1e-5")
    assert len(list(tables.glob("*.codes"))) == 2  # another run reuses the same codes
    call("train_sampler.py", f"{flags} {SAMPLER} --train_steps 1 --log_dir c --horizontal_flip")
    assert len(list(tables.glob("*.codes"))) == 3  # other views
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(data / "train" / "new.png")
    call("train_sampler.py", f"{flags} {SAMPLER} --train_steps 1 --log_dir d")
    assert len(list(tables.glob("*.codes"))) == 4  # one more image
    call("train_vqgan.py", f"{vqgan} --train_steps 2")
    call("train_sampler.py", f"{flags} {SAMPLER} --train_steps 1 --log_dir e")
    assert len(list(tables.glob("*.codes"))) == 6  # other weights


def test_a_missing_average_is_an_error_with_a_remedy(tmp_path, trained, capfd):
    """The reference's message for a missing EMA file was itself a TypeError."""
    logs = tmp_path / "logs"
    shutil.copytree(trained / "vqgan_digits", logs / "vqgan_digits")
    call("train_sampler.py", f"--logs_root {logs} --train_steps 1 --no_ema {SAMPLER}")
    with pytest.raises(SystemExit) as stop:
        call("experiments/get_samples.py", f"--logs_root {logs} --n_samples 2 --ema")
    assert stop.value.code == 2
    assert "--no_ema" in capfd.readouterr().err
    call("experiments/get_samples.py", f"--logs_root {logs} --n_samples 2 --no_ema --log_dir plain")


def test_experiments_load_the_averaged_weights(trained):
    run = trained / "absorbing_digits" / "checkpoints" / "step_00000003"
    plain, averaged = load_file(run / "model.safetensors"), load_file(run / "ema.safetensors")
    assert plain.keys() == averaged.keys()
    assert any(not torch.equal(plain[key], averaged[key]) for key in plain)


def test_the_perceptual_loss_gets_images_in_its_range():
    """The reference gave LPIPS images in [0, 1], but it expects [-1, 1]; ours are in [-1, 1] from data set to loss."""
    source = ImageSource(digits.build(digits.Config(), "train"), DataConfig(img_size=32, n_channels=1))
    images = TrainingImages(source, seed=0)[list(range(8))]["image"]
    assert images.min() == -1 and images.max() > 0.9


def test_perceptual_auto_falls_back_but_a_named_net_does_not(monkeypatch):
    import urllib.error

    def offline(net, weights=None):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("vq.perceptual.Perceptual", offline)
    with pytest.warns(UserWarning, match="without the perceptual loss"):
        assert load_perceptual("auto") == ("none", None)
    with pytest.raises(ValueError, match="--perceptual_net none"):
        load_perceptual("vgg")


def test_no_device_is_hard_coded_below_train():
    for floor in ("models", "diffusion", "vq"):
        for path in (ROOT / floor).rglob("*.py"):
            assert ".cuda(" not in path.read_text() and '"cuda"' not in path.read_text(), path


def test_autocast_leaves_losses_and_distances_in_float32(trained):
    first = load_vqgan_stage(trained / "vqgan_digits", None, torch.device("cpu"), True)
    with autocast(torch.device("cpu"), True):
        codes = first.vqgan.quantizer(first.vqgan.encoder(torch.zeros(1, 1, 16, 16)))
    assert codes.loss.dtype == codes.vectors.dtype == torch.float32


def test_experiments_default_to_the_runs_sampling_settings(trained, monkeypatch):
    """They need not be repeated: the tiny run was trained with 4 sampling steps and the preset's guidance."""
    from train.cli import parse as cli

    sampling_settings = []
    monkeypatch.setattr(cli, "run_main", lambda main, config: sampling_settings.append(config.sampling))
    call("experiments/get_samples.py", f"--logs_root {trained}")
    call("experiments/get_samples.py", f"--logs_root {trained} --guidance 3")
    assert sampling_settings[0] == absorbing.Sampling(sample_steps=4, guidance=1.5)
    assert sampling_settings[1] == absorbing.Sampling(sample_steps=4, guidance=3.0)
