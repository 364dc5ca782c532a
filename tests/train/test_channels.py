"""Images of 1 to 5 channels through both stages, to samples and pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.images import read_samples
from experiments.metrics.features import choose_features
from experiments.playground import Playground, Request, enlarge_to_picture
from helpers.parametrize import slow_after
from helpers.tiny_runs import DDPM, SAMPLER, VQGAN, call
from train.condition_source import ConditionSource
from train.config import DataConfig
from train.data.transforms import to_picture
from train.datasets._channels import decode_channels
from train.inference import load
from train.logging import grid_image
from vq.perceptual import net_for_channels

PLAIN = "--no_amp --train_steps 1 --steps_per_eval 1 --steps_per_save_output 1"
ABSORBING = f"--sampler absorbing {SAMPLER}"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Folders of four .npy files of 1 to 5 channels."""
    root, rng = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)
    for n in range(1, 6):
        (root / str(n)).mkdir()
        for i in range(4):
            np.save(root / str(n) / f"{i}.npy", rng.integers(0, 256, (18, 16, n), np.uint8))
    return root


def train_both(logs, folder, n):
    """Trains a VQGAN, a sampler of its codes and one of pixels, for a step each."""
    data = f"--dataset folder --data_dir {folder} --val_fraction 0.5 --logs_root {logs} {PLAIN}"
    name, gan = f"vqgan{n}", "--disc_start_step 0 --diff_aug --perceptual_net none"
    call("train_vqgan.py", f"{VQGAN} {gan} {data} --n_channels {n} --log_dir {name}")
    call("train_sampler.py", f"{ABSORBING} {data} --ae_load_dir {name} --log_dir codes{n}")
    call("train_sampler.py", f"{DDPM} {data} --n_channels {n} --horizontal_flip --log_dir pixels{n}")


@pytest.mark.parametrize("n", slow_after(2, (2, 5, 4, 3, 1)))
def test_every_number_of_channels_trains_and_samples(n, logs, arrays):
    train_both(logs, arrays / str(n), n)
    for kind, sampler, size in (("codes", "absorbing", 16), ("pixels", "ddpm", 8)):
        flags = f"--sampler {sampler} --logs_root {logs} --load_dir {kind}{n} --no_amp --sample_steps 2"
        folder = logs / f"{kind}{n}_samples"
        call("experiments/get_samples.py", f"{flags} --n_samples 3 --save_individually --log_dir {folder.name}")
        images = read_samples(folder / "samples.npz", n)["image"]
        assert images.shape == (3, 3 if n == 1 else n, size, size)
        first = decode_channels(folder / "images" / f"000000.{'png' if n in (1, 3) else 'npy'}", images.shape[1])
        assert np.array_equal(first, images[0].permute(1, 2, 0))


@pytest.mark.slow
def test_experiments_take_five_channels(logs, arrays, capfd):
    if not (logs / "pixels5").is_dir():
        train_both(logs, arrays / "5", 5)
    common = f"--logs_root {logs} --no_amp"
    model = f"{common} --load_dir pixels5 --sample_steps 2"
    with pytest.warns(UserWarning, match="Inception features take grey or RGB images, not 5 channels. Measuring FD"):
        call("experiments/calc_FID.py", f"{model} --n_samples 4 --log_dir FD")
    near = f"{model} --n_samples 2 --candidates 2 --neighbours 2 --features pixels --log_dir near"
    call("experiments/calc_nearest_neighbours.py", near)
    assert "by pixels, not by LPIPS: it takes grey or RGB images, not 5 channels" in capfd.readouterr().out
    Image.new("L", (16, 18), 255).save(arrays / "mask.png")
    inputs = f"--image {arrays}/5/0.npy --mask {arrays}/mask.png --results 1"
    call("experiments/inpaint.py", f"{model} {inputs} --log_dir filled")
    (result,) = (logs / "filled/images").glob("*.npy")
    assert np.load(result).shape == (8, 8, 5)
    with Image.open(result.with_suffix(".png")) as picture:
        assert picture.size == (5 * 8 + 4, 8)
    vqgan = f"{common} --load_dir vqgan5"
    call("experiments/reconstruct.py", f"{vqgan} --images {arrays}/5 --log_dir rebuilt")
    assert len(json.loads((logs / "rebuilt/results.json").read_text())["images"]) == 4
    call("experiments/calc_VQGAN_FID.py", f"{vqgan} --features pixels --n_images 2 --log_dir rFD")
    assert "LPIPS skipped: it takes grey or RGB images" in capfd.readouterr().out
    run = load("pixels5", logs_root=logs, device="cpu")
    assert run.sample(2, sample_steps=2).shape == (2, 5, 8, 8)
    bits = run.log_likelihood(torch.zeros(2, 5, 8, 8, dtype=torch.uint8), nfe=2)
    assert bits.total.shape == (2,) and bits.total.isfinite().all()
    with pytest.raises(ValueError, match=r"got grey images \(1 channel\), the model takes images of 5 channels$"):
        run.log_likelihood(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    page, picture = Playground(run.model, run.settings, ConditionSource(())), Image.new("L", (8, 8))
    assert enlarge_to_picture(page.draw(Request(options=run.settings))[0]).size == (5 * 256 + 4, 256)
    with pytest.raises(ValueError, match="of 5 channels takes no pictures: use experiments/inpaint.py"):
        page.inpaint(Request(options=run.settings), picture, picture)


def test_features_of_pictures_refuse_other_channels():
    data, cpu = DataConfig(dataset="folder", n_channels=5), torch.device("cpu")
    for name in ("inception", "digits"):
        with pytest.raises(ValueError, match=f"{name} features take grey or RGB images, not 5 channels: use pixels"):
            choose_features(name, data, cpu)
    features = choose_features("pixels", data, cpu)
    for channels, width in ((5, 5 * 256), (1, 3 * 256), (3, 3 * 256)):
        assert features.extract(torch.zeros(2, channels, 8, 8, dtype=torch.uint8)).shape == (2, width)


def test_perceptual_networks_are_refused_and_auto_is_none():
    for net in ("auto", "vgg", "none"):
        assert net_for_channels(net, 1) == net_for_channels(net, 3) == net
    assert net_for_channels("none", 5) == "none"
    with pytest.warns(UserWarning, match="without the perceptual loss: it takes grey or RGB images, not 2 channels"):
        assert net_for_channels("auto", 2) == "none"
    with pytest.raises(ValueError, match="vgg, but it takes .*, not 5 channels: pass --perceptual_net none"):
        net_for_channels("vgg", 5)


def test_floats_without_a_range_are_refused_before_a_folder_is(logs, arrays, tmp_path, capfd):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.load(arrays / f"2/{i}.npy").astype(np.float32))
    flags = (
        f"{DDPM} --dataset folder --data_dir {tmp_path} --val_fraction 0.5 --logs_root {logs} --log_dir floats {PLAIN}"
    )
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{flags} --n_channels 2")
    assert "float image of unknown range: pass --data_range LOWEST HIGHEST" in capfd.readouterr().err
    assert not (logs / "floats").exists()
    call("train_sampler.py", f"{flags} --n_channels 2 --data_range 0 255")
    flags = f"--sampler ddpm --logs_root {logs} --load_dir floats --no_amp --sample_steps 2 --n_samples 2"
    call("experiments/get_samples.py", f"{flags} --log_dir values")
    with np.load(logs / "values/samples.npz") as content:
        assert content["values"].shape == (2, 2, 8, 8) and content["arr_0"].shape == (2, 8, 8, 2)


def test_channels_are_shown_as_grey_panels():
    images = torch.arange(6 * 5 * 2 * 3, dtype=torch.uint8).view(6, 5, 2, 3)
    picture = to_picture(images)
    assert picture.shape == (6, 3, 2, 5 * 3 + 4) and (picture[..., 3::4] == 255).all()
    for channel in range(5):
        assert torch.equal(picture[:, 1, :, 4 * channel : 4 * channel + 3], images[:, channel])
    assert torch.equal(to_picture(images[:, :3]), images[:, :3]) and to_picture(images[:, :1]).shape[1] == 3
    assert grid_image(images, columns=3).size[0] > 3 * grid_image(images[:, :1], columns=3).size[0]
