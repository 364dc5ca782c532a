"""Continuous autoencoders as first stages: runs, latents, what they refuse, and training on them."""

import dataclasses
import re

import pytest
import torch

from diffusion.rng import Streams, seed_of
from helpers.tiny_runs import call
from train.checkpoint import read_tensors
from train.config import DataConfig
from train.continuous_stage import load_first_stage, save_autoencoder
from train.spaces import LatentSpace
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig

CPU = torch.device("cpu")
NETWORKS = {
    "kl": lambda: AutoencoderKL(
        AutoencoderKLConfig(
            in_channels=1, channels=32, channel_mults=(1, 1), res_blocks=1, scaling_factor=0.5, shift_factor=0.25
        )
    ),
    "tiny": lambda: TinyAutoencoder(TinyAutoencoderConfig(in_channels=1, channels=8)),
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder of runs of both autoencoders."""
    folder = tmp_path_factory.mktemp("logs")
    for kind, build in NETWORKS.items():
        torch.manual_seed(0)
        save_autoencoder(folder / kind, build(), {"source": "a test"})
    return folder


def open_stage(logs, kind):
    return load_first_stage(logs / kind, None, CPU, amp=False)


def images(size=(16, 24)):
    return torch.randint(0, 256, (3, 1, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_saved_autoencoder_is_the_same(logs, kind):
    torch.manual_seed(0)
    network, stage = NETWORKS[kind]().eval(), open_stage(logs, kind)
    assert stage.network.config == network.config and not stage.has_codes
    x = images().float() / 127.5 - 1
    with torch.no_grad():
        latents = network.posterior(x).mean if kind == "kl" else network.encode(x)
        assert torch.equal(stage.encode_latents(images()), latents)
        wanted = ((network.decode(latents).clamp(-1, 1) + 1) * 127.5).round()
    assert latents.shape[1:] == stage.latent_shape((16, 24))
    assert (stage.decode_latents(latents).float() - wanted).abs().max() <= 1


@pytest.mark.parametrize(("kind", "scale", "shift"), [("kl", 0.5, 0.25), ("tiny", 2.0, 0.0)])
def test_latents_are_shifted_scaled_and_restored(logs, kind, scale, shift):
    stage = open_stage(logs, kind)
    assert (stage.latent_scale, stage.latent_shift) == ((scale, shift) if kind == "kl" else (None, 0.0))
    space = LatentSpace(stage, scale, (16, 24), shift)
    x0 = space.encode_batch({"image": images()})["x0"]
    assert torch.allclose(x0, (stage.encode_latents(images()) - shift) * scale, atol=1e-6)
    assert (space.decode(x0).int() - stage.decode_latents(stage.encode_latents(images())).int()).abs().max() <= 1


def test_sampled_latents_depend_on_the_position_alone(logs):
    space = LatentSpace(open_stage(logs, "kl"), 0.5, (16, 24), 0.25, sampled=True)
    mean, std = space.first_stage.encode_moments(images()).chunk(2, dim=1)
    x0 = space.encode_batch({"image": images(), "position": torch.tensor([5, 6, 7])})["x0"]
    noise = Streams([seed_of(0, "latents", k) for k in (5, 6, 7)]).normal(mean.shape)
    assert torch.allclose(x0, (mean + std * noise - 0.25) * 0.5, atol=1e-6) and std.min() > 0
    alone = space.encode_batch({"image": images()[1:2], "position": torch.tensor([6])})["x0"]
    assert torch.allclose(alone, x0[1:2], atol=1e-5)
    cached = space.encode_batch({"latents": torch.cat([mean, std], 1), "position": torch.tensor([5, 6, 7])})["x0"]
    assert torch.equal(cached, x0)
    noise = Streams([seed_of(3, "latents", 6)]).normal((1, *mean.shape[1:]))
    other = space.encode_batch({"image": images()[1:2], "position": torch.tensor([6])}, seed=3)["x0"]
    assert torch.allclose(other, (mean[1:2] + std[1:2] * noise - 0.25) * 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_channels": 3}, "got n_channels 3, but the autoencoder in .* has 1: pass --n_channels 1"),
        ({"img_size": 15}, "15x15 pixels, wanted multiples of 2"),
        ({"data_range": (0.0, 9.0)}, "got data_range .*, wanted images of 8 bits"),
    ],
)
def test_other_images_are_refused(logs, changes, message):
    data = dataclasses.replace(DataConfig(dataset="digits", img_size=16, n_channels=1), **changes)
    with pytest.raises(ValueError, match=message):
        open_stage(logs, "kl").check_fits(data)


def test_a_run_is_not_overwritten(logs):
    with pytest.raises(ValueError, match="kl is there already: pass another --log_dir"):
        save_autoencoder(logs / "kl", NETWORKS["kl"](), {})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: kl", "kind: new", "of kind 'new', wanted one of kl, tiny"),
        ("kind: kl", "kind: kl\n  depth: 1", "with unknown keys: depth"),
        ("channels: 32", "channels: 0", "got channels 0"),
    ],
)
def test_damaged_settings_are_refused(logs, tmp_path, old, new, message):
    text = (logs / "kl/config.yaml").read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_first_stage(tmp_path, None, CPU, amp=False)


TINY = "--sampler ddpm --dataset digits --img_size 32 --n_channels 1 --channels 8 --channel_mults 1 1 --res_blocks 1"
TINY += " --attn_factors 2 --heads 1 --train_steps 2 --batch_size 4 --warmup_iters 0 --no_amp --sample_steps 2"


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_sampler_trains_on_latents_and_samples(logs, kind, tmp_path):
    options = "--latent_sampling sample" if kind == "kl" else ""
    flags = f"{TINY} --ae_load_dir {logs / kind} --logs_root {tmp_path}"
    call("train_sampler.py", f"{flags} {options} --log_dir plain")
    call("train_sampler.py", f"{flags} {options} --cache_latents --log_dir cached")
    plain, cached = (
        read_tensors(tmp_path / name / "checkpoints/step_00000002/model.safetensors") for name in ("plain", "cached")
    )
    for name, value in plain.items():
        assert torch.allclose(value, cached[name], atol=1e-3), name  # latents in the cache have half precision
    call("experiments/get_samples.py", f"--load_dir {tmp_path}/plain --logs_root {tmp_path} --n_samples 2 --no_amp")


def test_sampled_latents_follow_the_seed_of_the_run(logs, tmp_path, monkeypatch):
    seeds, encode = [], LatentSpace.encode_batch
    monkeypatch.setattr(LatentSpace, "encode_batch", lambda *args: seeds.append(args[2]) or encode(*args))
    flags = f"{TINY} --ae_load_dir {logs / 'kl'} --logs_root {tmp_path} --latent_sampling sample --seed 5"
    call("train_sampler.py", f"{flags} --log_dir run --steps_per_eval 2", validation_images=4)
    assert seeds == [5, 5, 0]  # two steps, and a validation, which is the same for all runs


def test_a_run_goes_on_with_latents_of_its_own_scale(logs, tmp_path, capfd):
    other = dataclasses.replace(open_stage(logs, "kl").network.config, scaling_factor=0.4, shift_factor=0.0)
    save_autoencoder(tmp_path / "other", AutoencoderKL(other), {})
    flags = f"{TINY} --logs_root {tmp_path}"
    call("train_sampler.py", f"{flags} --log_dir base --ae_load_dir {logs / 'kl'}")
    start = f"{flags} --log_dir next --load_dir base --ae_load_dir"
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{start} other")
    error = " ".join(capfd.readouterr().err.split())
    assert stop.value.code == 2 and "got latents of scale 0.4 and shift 0.0" in error
    assert "wanted 0.5 and 0.25, those that base was trained on: pass its --ae_load_dir" in error
    assert not (tmp_path / "next").exists()
    for way, stage in (("", logs / "kl"), ("--load_partial", "other")):
        call("train_sampler.py", f"{start} {stage} {way} --log_dir next{way.strip('-')}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--sampler absorbing",
            "sampler absorbing, which models codes, but the autoencoder in .* has continuous latents",
        ),
        ("--sampler ddpm --latent_sampling sample", "got --latent_sampling sample, but .* encodes images to no"),
    ],
)
def test_what_has_no_meaning_is_refused(logs, flags, message, tmp_path, capsys):
    words = f"--dataset digits --img_size 16 --n_channels 1 --train_steps 2 --warmup_iters 0 --logs_root {tmp_path}"
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{flags} {words} --ae_load_dir {logs / 'tiny'}")
    assert re.search(message, capsys.readouterr().err)
