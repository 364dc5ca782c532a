"""Continuous autoencoders as first stages: runs, latents, what they refuse, and training on them."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion.rng import Streams, seed_of
from helpers.tiny_runs import call
from train.checkpoint import read_tensors
from train.config import DataConfig
from train.continuous_stage import load_first_stage, save_autoencoder
from train.converters.sd.tiny import load_tiny
from train.data.loading import build_dataset
from train.data.transforms import to_float
from train.datasets import digits
from train.distributed import DistContext
from train.inference import load
from train.runs import read_run
from train.spaces import LatentSpace
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiles import make_tiles, tile_difference
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
        torch.testing.assert_close(stage.encode_latents(images()), latents)  # in another memory format
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


def in_tiles(stage, *lengths):
    return dataclasses.replace(stage, tiles=make_tiles(*lengths))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_sees_no_more_than_the_tiles(logs, kind):
    stage = in_tiles(open_stage(logs, kind), 6, 2, 2)
    inputs, factor = {"encoder": set(), "decoder": set()}, stage.factor
    for name, seen in inputs.items():
        hook = lambda _, args, seen=seen: seen.add(tuple(args[0].shape))  # noqa: E731
        getattr(stage.network, name).register_forward_pre_hook(hook)
    x = images((10 * factor, 14 * factor))
    latents = stage.encode_latents(x)
    assert latents.shape[2:] == (10, 14) and stage.decode_latents(latents).shape == x.shape
    channels = stage.network.config.latent_channels
    assert inputs["encoder"] == {(6, 1, 6 * factor, 6 * factor)}  # two tiles of three images
    assert inputs["decoder"] == {(6, channels, 6, 6)}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_single_tile_is_the_whole_to_the_bit(logs, kind):
    stage = open_stage(logs, kind)
    latents = stage.encode_latents(images((64, 48)))
    tiled = in_tiles(stage, 64)
    assert tiled.tiles == (64, 16, 1) and torch.equal(tiled.encode_latents(images((64, 48))), latents)
    assert torch.equal(tiled.decode_latents(latents), stage.decode_latents(latents))
    assert torch.equal(tiled.reconstruct(images((64, 48))), stage.decode_latents(latents))


def differences(stage, x, tile, overlap):
    """The differences of tiles to the whole in latents and in decoded images, each with the whole."""
    tiled, latents = in_tiles(stage, tile, overlap), stage.encode_latents(x)
    yield tile_difference(tiled.encode_latents(x), latents, tile, overlap, 1), latents
    whole, blended = (to_float(each.decode_latents(latents)) for each in (stage, tiled))
    yield tile_difference(blended, whole, tile, overlap, stage.factor), whole


def test_tiles_differ_no_more_at_seams_than_twice_inside(logs):
    """Group norm and attention see one tile at a time, so tiles differ from the whole inside, too."""
    for got, whole in differences(open_stage(logs, "kl"), images((96, 128)), 16, 8):
        assert 0 < got.at_seams < 2 * got.inside and got.mean < 0.5 * whole.std()


TAEF2 = os.environ.get("TAEF2", "")


@pytest.mark.skipif(not TAEF2, reason="TAEF2 names no folder with taef2_encoder.pth and taef2_decoder.pth")
@pytest.mark.slow
def test_tiles_of_taef2_are_close_to_the_whole(tmp_path):
    save_autoencoder(tmp_path / "taef2", load_tiny(Path(TAEF2)), {})
    coarse = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = F.interpolate(coarse, scale_factor=32, mode="bicubic").clamp(-1, 1)
    for got, whole in differences(open_stage(tmp_path, "taef2"), x, 32, 8):
        assert 0 < got.at_seams < 2 * got.inside and got.mean < 0.1 * whole.std()


def test_latents_of_tiles_have_a_cache_of_their_own(logs):
    stage, data = open_stage(logs, "kl"), DataConfig(dataset="digits", img_size=16, n_channels=1)
    dataset = build_dataset(data, digits.Config(), "val")
    tables = [
        each.encode_dataset(dataset, "val", data, 50, DistContext(CPU), latents=True).ids[:]
        for each in (stage, in_tiles(stage, 4, 2), stage)
    ]
    assert torch.equal(tables[0], tables[2]) and not torch.equal(tables[0], tables[1])


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


@pytest.fixture(scope="module")
def sampler(logs, tmp_path_factory):
    """Logs with `plain`, a sampler of the latents of `kl`."""
    folder = tmp_path_factory.mktemp("samplers")
    call("train_sampler.py", f"{TINY} --ae_load_dir {logs / 'kl'} --logs_root {folder} --log_dir plain")
    return folder


def sampled(folder, name, flags):
    common = f"--load_dir plain --logs_root {folder} --log_dir {name} --no_amp --device cpu"
    call("experiments/get_samples.py", f"{common} --n_samples 2 {flags}")
    return np.load(folder / name / "samples.npz")["arr_0"]


def correlation(one, other):
    """Of an untrained autoencoder, whose group norm and attention see one tile at a time, tiles differ much."""
    return np.corrcoef(one.ravel(), other.ravel())[0, 1]


def test_samples_are_decoded_in_tiles(sampler, logs, capsys):
    whole = sampled(sampler, "whole", "")
    assert f"autoencoder: {logs / 'kl'}" in capsys.readouterr().out
    assert np.array_equal(whole, sampled(sampler, "single", "--tile 16"))
    tiled = sampled(sampler, "tiled", "--tile 8 --overlap 4")
    assert 0.5 < correlation(tiled, whole) < 1


def test_a_canvas_of_latents_is_decoded_in_tiles(sampler):
    pictures = []
    for name, flags in (("big", ""), ("big_tiled", "--tile 8")):
        common = f"--load_dir plain --logs_root {sampler} --log_dir {name} --no_amp --n_samples 1 --shape 24 32"
        call("experiments/generate_big_samples.py", f"{common} {flags}")
        pictures.append(np.array(Image.open(sampler / name / "big_000.png")).astype(int))
    assert pictures[0].shape[:2] == (48, 64)
    assert 0.5 < correlation(*pictures) < 1


def test_a_distance_is_reported_beside_that_of_reconstructions(sampler):
    common = f"--load_dir plain --logs_root {sampler} --log_dir distance --no_amp --n_samples 8 --features pixels"
    call("experiments/calc_FID.py", common)
    assert (sampler / "distance" / "reconstructions.png").is_file()


def test_messages_name_the_autoencoder(sampler, logs, tmp_path, capsys):
    run = load(sampler / "plain", device="cpu")
    assert run.vqgan is None and "autoencoder='kl'" in repr(run)
    shutil.copytree(sampler / "plain", tmp_path / "plain")
    config = tmp_path / "plain" / "config.yaml"
    weights = read_run(tmp_path / "plain")["origin"]["ae_weights"]
    config.write_text(config.read_text().replace(weights, "0" * 64))
    with pytest.raises(ValueError, match="was trained on other autoencoder weights than those of .*kl"):
        load(tmp_path / "plain", device="cpu")
    for script, flags, message in (
        ("get_samples.py", "--overlap 2", "got overlap 2 without tiles: pass --tile 64"),
        ("get_samples.py", "--tile 4 --overlap 4", "got tiles of 4 codes with an overlap of 4"),
    ):
        with pytest.raises(SystemExit):
            call(f"experiments/{script}", f"--load_dir plain --logs_root {sampler} --n_samples 2 {flags}")
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain is not a VQGAN run, nor that of another autoencoder"):
        load_first_stage(sampler / "plain", None, CPU, amp=False)
