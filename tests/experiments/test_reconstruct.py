"""reconstruct.py: images of any size and kind, their pictures and their metrics."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.experiment import vqgan_run_defaults
from experiments.harness.first_stage import FirstStageModelConfig, load_chosen_stage, load_chosen_vqgan
from experiments.reconstruct import (
    THUMBNAIL,
    colour_table,
    error_map,
    images_of_path,
    panels,
    picture_names,
    preprocess,
    thumbnail,
)
from helpers.tiny_runs import call
from train.continuous_stage import save_autoencoder
from train.data.loading import fixed_subset
from train.datasets import FloatImage
from vq.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vq.tiles import seam_ratio, seams

CPU = torch.device("cpu")


def reconstruct(logs, flags):
    call("experiments/reconstruct.py", f"--logs_root {logs} --no_amp {flags}")


def refusal_message(logs, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        reconstruct(logs, flags)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("reconstruct.py: ")]
    return line


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


def pixels(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def noise(height, width, channels=3):
    shape = (height, width, channels)[: 2 if channels == 1 else 3]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of many kinds; the network takes grey ones of multiples of 4."""
    root = tmp_path_factory.mktemp("photographs")
    (root / "sub").mkdir()
    noise(35, 50).save(root / "colour.png")
    noise(16, 16, 1).save(root / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(24, 40, 1).save(root / "sub" / "turned.jpg", exif=exif)
    noise(3, 40).save(root / "thin.png")
    (root / "torn.png").write_bytes((root / "colour.png").read_bytes()[:300])
    return root


@pytest.fixture(scope="module")
def run_folder(trained, folder):
    reconstruct(trained, f"--images {folder} --log_dir reconstructed --compare_whole")
    return trained / "reconstructed"


def test_usable_images_have_pictures_and_others_reasons(trained, run_folder):
    results = read_results(trained, "reconstructed")
    sizes = {record["image"]: (record["width"], record["height"], record["codes"]) for record in results["images"]}
    assert sizes == {  # upright, and cropped to multiples of 4
        "colour.png": (48, 32, [8, 12]),
        "grey.png": (16, 16, [4, 4]),
        "sub/turned.jpg": (24, 40, [10, 6]),
    }
    skipped = {each["image"]: each["reason"] for each in results["skipped"]}
    assert skipped.keys() == {"thin.png", "torn.png"} and "40x3 pixels, wanted at least 4x4" in skipped["thin.png"]
    pictures = sorted(str(path.relative_to(run_folder / "images")) for path in (run_folder / "images").rglob("*.png"))
    assert pictures == ["colour.png", "grey.png", "sub/turned.png"]
    assert (results["tile"], results["overlap"]) == (
        4,
        1,
    )  # the grid of its 16 x 16 training images, and a quarter of it
    _, height, width = pixels(run_folder / "overview.png").shape
    assert width == 6 * (THUMBNAIL + 2) + 2 and height > 2 * THUMBNAIL


def test_a_picture_shows_original_reconstruction_and_error_map(trained, folder, run_folder):
    picture = pixels(run_folder / "images" / "grey.png")
    scale = 64 // 16  # small images are enlarged
    side = 16 * scale
    parts = [picture[:, 2 : 2 + side : scale, x : x + side : scale] for x in (2, side + 4, 2 * side + 6)]
    original = torch.from_numpy(np.array(Image.open(folder / "grey.png")))
    assert torch.equal(parts[0], original.expand(3, -1, -1))
    first = load_chosen_vqgan(FirstStageModelConfig(), str(trained), CPU, False)
    fake = first.decode(first.encode(original[None, None]))[0]
    assert torch.equal(parts[1], fake.expand(3, -1, -1))
    assert torch.equal(parts[2], error_map(original[None], fake))
    (record,) = [each for each in read_results(trained, "reconstructed")["images"] if each["image"] == "grey.png"]
    error = (original.double() - fake[0].double()).abs()
    assert record["l1"] == pytest.approx((error.mean() / 127.5).item(), rel=1e-4)
    assert record["psnr"] == pytest.approx(10 * math.log10(255**2 / error.square().mean().item()), rel=1e-4)


def test_bits_seams_and_untiled_differences_are_reported(trained, run_folder):
    results = read_results(trained, "reconstructed")
    by_name = {record["image"]: record for record in results["images"]}
    assert all(record["bits_per_pixel"] == 4 / 16 for record in by_name.values())  # 16 codes of 4 x 4 pixels
    single_tile, tiled = by_name["grey.png"], by_name["colour.png"]
    assert single_tile["seams"] is single_tile["seams_of_original"] is None  # a single tile
    assert tiled["seams"] > 0 and tiled["seams_of_original"] == pytest.approx(1, abs=0.3)  # noise has no seams
    fake = pixels(run_folder / "images" / "colour.png")[None, :, 2:34, 52:100]
    assert tiled["seams"] == pytest.approx(seam_ratio(fake, seams(8, 4, 1, 4), seams(12, 4, 1, 4), 4))
    assert single_tile["l1_to_whole"] == 0 and single_tile["codes_as_whole"] == 1
    assert tiled["l1_to_whole"] > 0 and tiled["codes_as_whole"] < 1
    assert results["mean"]["psnr"] == pytest.approx(sum(r["psnr"] for r in by_name.values()) / 3)
    measured = [r["seams"] for r in by_name.values() if r["seams"] is not None]
    assert results["mean"]["seams"] == pytest.approx(sum(measured) / 2)
    assert "0.25 of the range" in results["error_map"]


def test_tiles_follow_the_flags(trained, folder):
    reconstruct(trained, f"--images {folder / 'colour.png'} --log_dir large --tile 12 --overlap 2 --compare_whole")
    (record,) = read_results(trained, "large")["images"]
    assert record["l1_to_whole"] == 0 and record["seams"] is None
    reconstruct(trained, f"--images {folder / 'colour.png'} --log_dir small --tile 5 --overlap 0 --batch_size 3")
    small = read_results(trained, "small")
    assert (small["tile"], small["overlap"]) == (5, 0) and small["images"][0]["l1"] != record["l1"]


def test_validation_images_are_preprocessed_as_in_training(trained, capfd):
    reconstruct(trained, "--n_images 3")
    (name,) = [path.name for path in trained.glob("reconstructions_vqgan_digits_*")]
    records = read_results(trained, name)["images"]
    wanted = [(f"val_{i:06d}", 16, 16) for i in sorted(fixed_subset(359, 3))]
    assert [(r["image"], r["width"], r["height"]) for r in records] == wanted
    reconstruct(trained, "--n_images 1 --size 22 --log_dir enlarged")
    (record,) = read_results(trained, "enlarged")["images"]
    assert (record["width"], record["height"]) == (20, 20)
    assert f"{trained / 'vqgan_digits'}, step 5, averaged (EMA) weights" in capfd.readouterr().out


def test_a_repeated_run_prints_the_saved_report(trained, folder, run_folder, capfd):
    before = (run_folder / "images" / "grey.png").stat().st_mtime_ns
    reconstruct(trained, f"--images {folder} --log_dir reconstructed --compare_whole")
    assert (run_folder / "images" / "grey.png").stat().st_mtime_ns == before
    out = capfd.readouterr().out
    assert "mean of 3" in out and "skipped: thin.png" in out and "2 images skipped" in out
    assert str(run_folder / "overview.png") in out


def test_another_experiment_in_the_folder_is_refused(trained, folder, run_folder, tmp_path, capfd):
    assert "--overlap not set -> 2" in refusal_message(
        trained, f"--images {folder} --log_dir reconstructed --compare_whole --overlap 2", capfd
    )
    copy = tmp_path / "mine"
    shutil.copytree(folder, copy)
    reconstruct(trained, f"--images {copy} --log_dir mine")
    noise(8, 8).save(copy / "new.png")
    assert "--data_dir: other images" in refusal_message(trained, f"--images {copy} --log_dir mine", capfd)


def test_a_replaced_image_of_equal_size_is_another(tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    before = images_of_path(image, None, None).fingerprint
    assert images_of_path(tmp_path, None, None).fingerprint == before
    image.write_bytes(b"two")
    os.utime(image, (1, 1))
    assert images_of_path(image, None, None).fingerprint != before


def test_codes_of_a_read_only_run_are_kept_in_logs_root(trained, tmp_path):
    model = FirstStageModelConfig(load_dir=str(trained / "vqgan_digits"))
    vqgan = load_chosen_vqgan(model, str(tmp_path), CPU, amp=False)
    assert vqgan.code_cache == tmp_path / ".cache" / "codes"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--images nowhere", "nowhere not found"),
        ("--images {empty}", "holds no images.*--images"),
        ("--images {torn}", "none of 1 images can be used; the first, torn.png"),
        ("--tile 4 --overlap 4", "tiles of 4 codes with an overlap of 4"),
        ("--load_dir absorbing_digits", "is not a VQGAN run"),
        ("--load_dir none", "no run in"),
        ("--load_step 9", "no checkpoint of step 9.*--load_step"),
        ("--load_dir vqgan_digits --dataset mnist", "was trained with --dataset digits, got mnist"),
    ],
)
def test_bad_input_is_a_one_line_error(trained, folder, tmp_path, capfd, flags, expected):
    flags = flags.format(empty=tmp_path, torn=folder / "torn.png")
    assert re.search(expected, refusal_message(trained, f"{flags} --log_dir never", capfd))
    assert not (trained / "never" / "results.json").exists()
    shutil.rmtree(trained / "never", ignore_errors=True)


@pytest.mark.parametrize("flag", ["n_images", "size", "batch_size", "tile"])
def test_numbers_are_at_least_one(trained, capfd, flag):
    with pytest.raises(SystemExit) as stop:
        reconstruct(trained, f"--{flag} 0")
    assert stop.value.code == 2 and f"got {flag} 0, wanted at least 1" in capfd.readouterr().err


def test_the_data_set_is_read_from_the_run(trained, tmp_path):
    shutil.copytree(trained / "vqgan_digits", tmp_path / "renamed")
    config = tmp_path / "renamed" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("dataset: digits", "dataset: mnist").replace("reader: ''", "reader: digits"))
    argv = f"--logs_root {tmp_path} --load_dir renamed".split()
    assert vqgan_run_defaults(argv, "reconstruct").values == {"dataset": "mnist"}
    noise(8, 8, 1).save(tmp_path / "x.png")
    reconstruct(tmp_path, f"--load_dir renamed --images {tmp_path / 'x.png'}")
    assert read_results(tmp_path, "reconstructions_x_renamed_5")["vqgan"]["ae_load_dir"] == "renamed"


def test_images_are_cropped_at_the_centre():
    image = noise(10, 14)
    scan = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    converted = preprocess(Image.fromarray(scan), None, 1, 4, (0, 4095))
    assert np.abs(converted[0].numpy() - scan / 4095 * 255).max() <= 0.51
    assert preprocess(FloatImage(scan.astype(np.float32), (0, 4095)), 4, 1, 4).shape == (1, 4, 4)
    cropped = preprocess(image, None, 3, 4)
    assert torch.equal(cropped, torch.from_numpy(np.array(image))[1:9, 1:13].permute(2, 0, 1))
    assert preprocess(image, 21, 3, 4).shape == (3, 20, 28)
    assert preprocess(image, None, 1, 4).shape == (1, 8, 12)
    assert preprocess(noise(8, 8, 1), None, 3, 4).shape == (3, 8, 8)


def test_pictures_of_different_images_are_different_files():
    assert picture_names(["a.jpg", "b/a.jpg"]) == ["a.png", "b/a.png"]
    assert picture_names(["a.jpg", "a.png", "a.jpg.png"]) == ["a.jpg.png", "a.png.png", "a.jpg.png.png"]
    assert picture_names(["A.jpg", "a.png"]) == ["A.jpg.png", "a.png.png"]  # one file where case does not matter


def test_the_colours_of_errors_have_a_fixed_scale():
    black = torch.zeros(3, 1, 4, dtype=torch.uint8)
    other = black.clone()
    other[:, 0, 1], other[:, 0, 2], other[0, 0, 3] = 64, 255, 96  # 1/4, all, and an eighth in the mean of channels
    error_image, colours = error_map(black, other), colour_table()
    assert torch.equal(error_map(other, black), error_image)
    assert torch.equal(error_image[:, 0].T, colours[[0, 255, 255, 128]])
    assert torch.equal(error_map(black[:1], other[:1])[:, 0, 1], colours[255])  # grey: the mean of one channel
    assert colours[0].sum() < 30 and colours[255].sum() > 500  # dark to bright
    assert torch.equal(panels(black, other)[2], error_image)


def test_a_thumbnail_shows_the_whole_image():
    wide = torch.zeros(3, 100, 400, dtype=torch.uint8)
    small = thumbnail(wide)
    assert small.shape == (3, THUMBNAIL, THUMBNAIL)
    assert (small == 0).any(2)[0].sum() == THUMBNAIL // 4 and small[:, 0].eq(255).all() and small[:, 96].eq(0).all()
    tiny = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    assert torch.equal(thumbnail(tiny)[:, ::24, ::24], tiny)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """Logs with `kl`, a random autoencoder of grey images with latents of 2 x 2 pixels."""
    logs = tmp_path_factory.mktemp("autoencoders")
    torch.manual_seed(0)
    options = {"in_channels": 1, "channels": 32, "channel_mults": (1, 1), "res_blocks": 1}
    save_autoencoder(logs / "kl", AutoencoderKL(AutoencoderKLConfig(**options)), {})
    return logs


def test_an_autoencoder_of_latents_reconstructs_in_tiles(autoencoder, folder, capfd):
    flags = "--load_dir kl --tile 8 --overlap 4 --compare_whole"
    reconstruct(autoencoder, f"{flags} --images {folder} --log_dir tiled")
    results = read_results(autoencoder, "tiled")
    assert results["autoencoder"]["ae_load_dir"] == "kl" and (results["tile"], results["overlap"]) == (8, 4)
    large, single = (record for record in results["images"] if record["image"] in ("colour.png", "grey.png"))
    assert (large["codes"], single["codes"], large["bits_per_pixel"]) == ([17, 25], [8, 8], None)
    assert single["l1_to_whole"] == single["latents_to_whole"] == 0 and single["l1_at_seams"] is None
    assert 0 < large["l1_at_seams"] < 2 * large["l1_inside"] and large["latents_to_whole"] > 0
    low, high = sorted((large["l1_at_seams"], large["l1_inside"]))
    assert low <= large["l1_to_whole"] <= high
    out = capfd.readouterr().out
    assert f"autoencoder: {autoencoder / 'kl'}, step 0" in out and "L1 to untiled" in out and "equal codes" not in out
    stage = load_chosen_stage(FirstStageModelConfig(load_dir="kl"), str(autoencoder), CPU, False)
    original = torch.from_numpy(np.array(Image.open(folder / "grey.png")))
    picture = pixels(autoencoder / "tiled" / "images" / "grey.png")[:, 2:66:4, 68:132:4]
    assert torch.equal(picture, stage.reconstruct(original[None, None])[0].expand(3, -1, -1))


def test_tiles_of_an_autoencoder_are_64_latents_by_default(autoencoder, folder):
    reconstruct(autoencoder, f"--load_dir kl --images {folder / 'grey.png'} --log_dir default")
    results = read_results(autoencoder, "default")
    assert (results["tile"], results["overlap"]) == (64, 16) and "l1_to_whole" not in results["mean"]


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        ("reconstruct", "", "kl names no data: pass an image or a folder as --images"),
        ("reconstruct", "--dataset mnist", "got --dataset, but the autoencoder in .*kl names no data: leave it out"),
        ("reconstruct", "--load_step 3", "no checkpoint of step 3.*--load_step"),
        ("calc_VQGAN_FID", "", "the autoencoder in .*kl has no codes to measure: pass it to reconstruct.py"),
    ],
)
def test_what_an_autoencoder_lacks_is_named(autoencoder, script, flags, expected, capfd):
    with pytest.raises(SystemExit) as stop:
        call(f"experiments/{script}.py", f"--logs_root {autoencoder} --load_dir kl --no_amp {flags}")
    assert stop.value.code == 2 and re.search(expected, capfd.readouterr().err)
