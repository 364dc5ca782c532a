"""A UNet that was trained on images of one size goes on with those of another."""

import numpy as np
import pytest
import torch

from helpers.run_asserts import weights
from helpers.tiny_runs import UNET, call
from train.continuous_stage import save_autoencoder
from train.runs import read_run
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

SETTINGS = f"--sampler ddpm --batch_size 4 --total_steps 20 --sample_steps 3 --warmup_iters 100 --no_amp {UNET}"
LATENTS = "--ae_load_dir tiny --dataset digits"
LORA = "--lora_rank 2 --differential diff_v2"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with an autoencoder of factor 8."""
    logs = tmp_path_factory.mktemp("sizes")
    torch.manual_seed(0)
    save_autoencoder(logs / "tiny", TinyAutoencoder(TinyAutoencoderConfig(in_channels=1, channels=8)), {})
    return logs


def train(logs, name, size, flags):
    call("train_sampler.py", f"--logs_root {logs} --log_dir {name} --img_size {size} {SETTINGS} {flags}")


@pytest.mark.parametrize(
    ("name", "sizes", "space"),
    [("pixels", (16, 8), ""), pytest.param("latents", (64, 32), LATENTS, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_at_a_smaller_size(name, sizes, space, logs):
    large, small = (f"{name}_{size}" for size in sizes)
    train(logs, large, sizes[0], f"--train_steps 2 {space}")
    before = weights(logs / large, 2)
    train(logs, small, sizes[1], f"--train_steps 1 --lr 1e-12 --load_dir {large} {space}")
    after = weights(logs / small, 1)
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[key], before[key], rtol=0, atol=1e-7) for key in before)
    contents = [read_run(logs / name) for name in (large, small)]
    assert [content["data"]["img_size"] for content in contents] == list(sizes)
    scales = [content["origin"].get("latent_scale") for content in contents]  # measured on the larger images alone
    assert scales[0] == scales[1] and (scales[0] is not None) == (name == "latents")
    flags = f"--logs_root {logs} --sampler ddpm --load_dir {small} --log_dir s_{small} --n_samples 2 --no_amp"
    call("experiments/get_samples.py", flags)
    assert np.load(logs / f"s_{small}" / "samples.npz")["arr_0"].shape[1:3] == (sizes[1], sizes[1])


def test_adapters_of_another_size_leave_the_base_in_its_run(logs):
    train(logs, "base", 16, "--train_steps 1")
    train(logs, "adapted", 8, f"--train_steps 1 --load_dir base {LORA}")
    learned, base = weights(logs / "adapted", 1), weights(logs / "base", 1)
    assert any(".adapters." in key for key in learned) and "network.conv_in.weight" in base.keys() - learned.keys()
