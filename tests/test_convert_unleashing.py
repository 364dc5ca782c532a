"""Conversion of the VQGAN of unleashing-transformers: the same outputs; unfit weights are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from helpers.parametrize import slow_after
from helpers.tiny_runs import call
from helpers.unleashing_layout import CONFIG, SIZE, build_vqgan, to_unleashing_weights
from train.checkpoint import checkpoint_path, load_weights
from train.cli.parse import flatten_group
from train.first_stage import load_vqgan_stage
from vq.autoencoder import VQGAN
from vq.discriminator import PatchDiscriminator

FIXTURE = Path(os.environ.get("UT_FIXTURES", ""))
CPU = torch.device("cpu")


def images(seed=0, size=SIZE):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def discriminator_of(run):
    """Load the discriminator with which a run continues training."""
    config = yaml.safe_load((run / "config.yaml").read_text())["loss"]
    module = PatchDiscriminator(3, config["ndf"], config["disc_layers"], config["disc_norm"], unit_range=True)
    load_weights(run, 1200, {"discriminator": module}, ema=False)
    return module.eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A run converted from plain and averaged weights, its flags, and both networks."""
    folder = tmp_path_factory.mktemp("theirs")
    plain, averaged = build_vqgan(seed=0), build_vqgan(seed=1)
    torch.save(to_unleashing_weights(*plain), folder / "vqgan_1200.th")
    torch.save(to_unleashing_weights(*averaged), folder / "vqgan_ema_1200.th")
    flags = f"--from unleashing --img_size {SIZE} --logs_root {folder}/logs --dataset folder"
    call("convert.py", f"{flags} --weights {folder}/vqgan_1200.th --log_dir converted")
    return folder, flags, plain, averaged


@torch.no_grad()
def test_a_converted_run_gives_the_outputs_of_its_weights(converted):
    folder, _, (plain, discriminator), (averaged, _) = converted
    run = folder / "logs" / "converted"
    first = load_vqgan_stage(run, None, CPU, amp=False)
    assert first.step == 1200 and first.data.img_size == SIZE
    assert torch.equal(first.vqgan.encode(images()), averaged.encode(images()))
    assert len(averaged.encode(images()).unique()) > 3
    assert torch.allclose(first.vqgan(images())[0], averaged(images())[0], atol=1e-5)
    other = VQGAN(CONFIG, (SIZE, SIZE), 3).eval()
    load_weights(run, 1200, {"autoencoder": other}, ema=False)
    assert torch.allclose(other(images())[0], plain(images())[0], atol=1e-5)
    assert (plain(images())[0] - averaged(images())[0]).abs().max() > 0.1
    assert torch.equal(discriminator_of(run)(images()), discriminator(images()))


def test_the_config_describes_the_weights(converted):
    content = yaml.safe_load((converted[0] / "logs/converted/config.yaml").read_text())
    network, loss = content["network"], content["loss"]
    assert network == flatten_group(CONFIG)
    assert (loss["ndf"], loss["disc_layers"], loss["disc_norm"]) == (4, 2, "batch")
    assert list(content) == ["data", "reader", "network", "loss", "training", "logging", "origin"]


def test_either_file_selects_both_and_one_file_serves_as_both(converted, tmp_path, capfd):
    folder, flags, _, (averaged, discriminator) = converted
    call("convert.py", f"{flags} --weights {folder}/vqgan_ema_1200.th --log_dir other")
    output = capfd.readouterr().out
    assert "vqgan_1200.th" in output and "vqgan_ema_1200.th" in output and "never uses" in output and "LPIPS" in output
    for name in ("model", "ema"):
        one, two = (
            checkpoint_path(folder / "logs" / run, 1200) / f"{name}.safetensors" for run in ("converted", "other")
        )
        assert one.read_bytes() == two.read_bytes()
    torch.save(to_unleashing_weights(averaged, discriminator), tmp_path / "vqgan_ema_7.th")
    call("convert.py", f"{flags} --weights {tmp_path}/vqgan_ema_7.th --log_dir alone")
    first = load_vqgan_stage(folder / "logs" / "alone", None, CPU, amp=False)
    assert first.step == 7 and torch.equal(first.vqgan.encode(images()), averaged.encode(images()))


def test_a_converted_vqgan_trains_further(converted, tmp_path):
    folder, _, (plain, _), _ = converted
    data = tmp_path / "images"
    data.mkdir()
    for i in range(30):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(data / f"{i}.png")
    network = "--nf 8 --ch_mult 1 1 2 --attn_resolutions 4 --emb_dim 6 --codebook_size 32 --unit_range --legacy_beta"
    loss = "--ndf 4 --disc_layers 2 --disc_norm batch --disc_start_step 0 --perceptual_net none"
    flags = (
        f"--logs_root {folder}/logs --log_dir on --load_dir converted --train_steps 1 --batch_size 2 --lr 1e-9 --no_amp"
    )
    call("train_vqgan.py", f"--dataset folder --data_dir {data} --img_size {SIZE} {network} {loss} {flags}")
    other = VQGAN(CONFIG, (SIZE, SIZE), 3).eval()
    load_weights(folder / "logs" / "on", 1, {"autoencoder": other}, ema=False)
    assert torch.allclose(other(images())[0], plain(images())[0], atol=1e-3)


REFUSED = {
    "missing": (lambda w: w.pop("ae.encoder.blocks.1.norm2.bias"), ["encoder.1.norm2.bias", "(8,)"]),
    "missing part": (lambda w: [w.pop(k) for k in list(w) if "blocks.1.norm2" in k], ["blocks.1 has", "no block"]),
    "extra": (lambda w: w.update({"ae.more": torch.zeros(2)}), ["ae.more is unexpected"]),
    "other width": (lambda w: w.update({"disc.main.0.bias": torch.zeros(3)}), ["disc.main.0.bias is (3,)", "(4,)"]),
    "no generator": (lambda w: [w.pop(k) for k in list(w) if "generator" in k], ["ae.generator.blocks", "incomplete"]),
    "no discriminator": (lambda w: [w.pop(k) for k in list(w) if "disc." in k], ["disc.main.0.weight is missing"]),
}


@pytest.mark.parametrize("case", slow_after(2, REFUSED))
def test_unfit_weights_are_refused_and_leave_no_files(case, tmp_path, capfd):
    change, expected = REFUSED[case]
    weights = to_unleashing_weights(*build_vqgan())
    change(weights)
    torch.save(weights, tmp_path / "vqgan_1.th")
    flags = f"--from unleashing --img_size {SIZE} --logs_root {tmp_path}/l"
    with pytest.raises(SystemExit) as stop:
        call("convert.py", f"{flags} --weights {tmp_path}/vqgan_1.th")
    message = " ".join(capfd.readouterr().err.split())
    assert stop.value.code == 2 and "Traceback" not in message
    for word in expected:
        assert word in message, message
    assert not (tmp_path / "l").exists()


@pytest.mark.skipif(
    not (FIXTURE / "vqgan_100.th").is_file(), reason="UT_FIXTURES names no folder with vqgan_100.th, public weights"
)
@torch.no_grad()
def test_public_weights_reproduce_their_outputs(tmp_path):
    flags = f"--from unleashing --weights {FIXTURE}/vqgan_100.th --img_size 64 --logs_root {tmp_path} --dataset folder"
    call("convert.py", f"{flags} --log_dir public")
    first = load_vqgan_stage(tmp_path / "public", 100, CPU, amp=False)
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "vqgan_io.npz").items()}
    x = io["images_0_1"] * 2 - 1
    latents = first.vqgan.latents(x)
    assert (latents - io["encoder_out"]).abs().max() < 1e-4
    assert torch.equal(first.vqgan.encode(x).flatten(), io["ids"].flatten().long())
    assert torch.allclose(first.vqgan.quantizer.vectors(first.vqgan.encode(x)), io["quantized"], atol=1e-5)
    rebuilt = (first.vqgan(x)[0] + 1) / 2
    assert (rebuilt - io["reconstruction_0_1"]).abs().max() < 1e-4
