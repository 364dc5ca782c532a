"""calc_pairs.py: metrics of pairs equal recorded ones, images are matched by name, and the worst pairs are drawn."""

import csv
import json
import math
import os
from pathlib import Path

import calc_pairs
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from experiments.metrics import contact_sheet
from experiments.metrics.image_pairs import luma
from helpers.tiny_runs import ROOT, call
from train.datasets.folder import ImageFolder
from vq.perceptual import Perceptual

SCRIPT = "experiments/calc_pairs.py"
RECORDED = ROOT / "tests" / "fixtures" / "metrics" / "paired.npz"  # torchmetrics and scikit-image, in float64
REAL_LPIPS = pytest.mark.skipif("LPIPS_SQUEEZE" not in os.environ, reason="LPIPS_SQUEEZE names no folder of weights")


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def measure(logs: Path, flags: str, name: str = "pairs") -> tuple[dict, dict[str, dict[str, str]]]:
    """The results, and the rows of the table by name."""
    call(SCRIPT, f"{flags} --logs_root {logs} --log_dir {name}")
    with (logs / name / "pairs.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return json.loads((logs / name / "results.json").read_text()), rows


def refused(logs: Path, flags: str, capfd) -> str:
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{flags} --logs_root {logs}")
    assert stop.value.code == 2 and not list(logs.glob("pairs*"))
    return " ".join(capfd.readouterr().err.replace("│", " ").split())


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def test_metrics_equal_recorded_ones(recorded, tmp_path):
    for folder, suffix in (("a", "png"), ("b", "bmp")):
        for number, pixels in enumerate(recorded[folder]):
            save(tmp_path / folder / f"{number}.{suffix}", pixels.transpose(1, 2, 0))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")
    names = {"mse": "mse_0_255", "psnr": "psnr_rgb_db", "psnr_y": "psnr_y_db"}
    names |= {"ssim": "ssim_gauss11", "ssim_y": "ssim_gauss11_y"}
    for metric, key in names.items():
        got = [float(rows[str(number)][metric]) for number in range(3)]
        assert got == pytest.approx(recorded[key], rel=1e-5), metric
        assert results["metrics"][metric]["mean"] == pytest.approx(recorded[key].mean(), rel=1e-5)
    assert float(rows["0"]["mse"]) > 4 * recorded["mse_uint8_wrapped_WRONG"][0]  # differences do not wrap at 8 bits
    difference = np.abs(recorded["a"].astype(float) - recorded["b"])
    assert results["metrics"]["l1"]["mean"] == pytest.approx(difference.mean() / 127.5, rel=1e-5)
    assert results["metrics"]["lpips"] == {"mean": None, "n": 0, "infinite": 0} and results["n_pairs"] == 3


def test_luma_has_the_range_of_a_studio():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]], dtype=torch.uint8).view(4, 3, 1, 1)
    assert luma(colours).flatten().tolist() == pytest.approx([16, 235, 81.481, 40.966], abs=1e-9)


def test_images_are_matched_by_name_and_the_rest_is_named(tmp_path, capsys):
    for name in ("x.png", "y.png", "only_here.png"):
        save(tmp_path / "a" / name, noise(0, 12, 12, 3))
    for name in ("y.jpg", "x.bmp", "only_there.png"):
        save(tmp_path / "b" / "deeper" / name, noise(1, 12, 12, 3))
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    save(tmp_path / "b" / "deeper" / "broken.png", noise(2, 12, 12, 3))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")
    assert {name: (row["sample"], row["reference"]) for name, row in rows.items()} == {
        "x": ("x.png", "deeper/x.bmp"),
        "y": ("y.png", "deeper/y.jpg"),
    }
    left_out = results["left_out"]
    assert (left_out["samples"], left_out["reference"]) == (["only_here.png"], ["deeper/only_there.png"])
    assert len(left_out["unreadable"]) == 1 and "broken.png" in left_out["unreadable"][0]
    printed = capsys.readouterr().out
    assert "1 samples without a reference (only_here.png)" in printed and "1 pairs that cannot be read" in printed
    assert results["metrics"]["mse"]["n"] == results["n_pairs"] == 2


def test_equal_images_are_counted_apart(tmp_path):
    for folder, last in (("a", 0), ("b", 40)):
        for number in range(3):
            save(tmp_path / folder / f"{number}.png", np.full((12, 12, 3), last if number == 2 else 9, np.uint8))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")
    assert results["metrics"]["psnr"] == {
        "mean": pytest.approx(20 * math.log10(255 / 40), rel=1e-5),
        "n": 1,
        "infinite": 2,
    }
    assert rows["0"]["psnr"] == "inf" and results["metrics"]["mse"]["mean"] == pytest.approx(1600 / 3)
    assert results["worst"]["names"][0] == "2"


def test_all_kinds_of_pictures_are_read(tmp_path):
    grey = np.full((12, 12), 100, np.uint8)
    transparent = np.zeros((12, 12, 4), np.uint8)  # which is white
    save(tmp_path / "a" / "grey.png", grey)
    save(tmp_path / "a" / "alpha.png", transparent)
    save(tmp_path / "a" / "deep.png", np.full((12, 12), 100 * 257, np.uint16))
    save(tmp_path / "a" / "float.tif", np.full((12, 12), 0.5, np.float32))
    for name in ("grey", "alpha", "deep", "float"):
        save(tmp_path / "b" / f"{name}.png", np.full((12, 12, 3), 255 if name == "alpha" else 100, np.uint8))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")
    assert {name: float(row["mse"]) for name, row in rows.items()} == {"grey": 0, "alpha": 0, "deep": 0}
    assert "float.tif" in results["left_out"]["unreadable"][0]


def test_pairs_that_cannot_be_read_stop_no_others_by_their_size(tmp_path):
    for folder in "ab":
        save(tmp_path / folder / "good.png", noise(0, 12, 12, 3))
    save(tmp_path / "a" / "cut.png", noise(1, 24, 36, 3))
    cut = tmp_path / "a" / "cut.png"
    cut.write_bytes(cut.read_bytes()[:300])  # whose header tells another size
    save(tmp_path / "b" / "cut.png", noise(2, 12, 18, 3))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")
    assert [*rows] == ["good"] and "cut.png" in results["left_out"]["unreadable"][0]


def test_other_sizes_are_refused_or_resized(tmp_path, capfd):
    save(tmp_path / "a" / "0.png", np.full((24, 36, 3), 60, np.uint8))
    save(tmp_path / "b" / "0.png", np.full((12, 18, 3), 50, np.uint8))
    message = refused(tmp_path / "logs", f"{tmp_path}/a {tmp_path}/b --lpips none", capfd)
    assert "a/0.png has 24x36 pixels, wanted 12x18 as" in message and "--resize" in message
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none --resize")
    assert results["resized"] == 1 and float(rows["0"]["mse"]) == 100
    assert (rows["0"]["height"], rows["0"]["width"]) == ("12", "18")


def test_all_sizes_are_checked_before_anything_is_measured(tmp_path, capfd, monkeypatch):
    for folder, sizes in {"a": [(9, 8), (12, 18), (9, 8), (9, 8)], "b": [(9, 8), (9, 8), (9, 8), (18, 24)]}.items():
        for number, size in enumerate(sizes):
            save(tmp_path / folder / f"{number}.png", np.zeros((*size, 3), np.uint8))
    reads, read = [], ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda folder, index: reads.append(index) or read(folder, index))
    message = refused(tmp_path / "logs", f"{tmp_path}/a {tmp_path}/b --lpips none", capfd)
    assert "2 of 4 pairs differ in size: " in message and "a/1.png has 12x18 pixels, wanted 9x8 as" in message
    assert {*reads} == {1, 3}  # of the others headers tell


def test_an_image_that_its_header_turns_fits_its_reference(tmp_path, capfd):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "a/0.jpg", exif=turned)
    save(tmp_path / "b/0.png", np.zeros((12, 8, 3), np.uint8))
    assert measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none")[0]["n_pairs"] == 1
    save(tmp_path / "b/0.png", np.zeros((8, 12, 3), np.uint8))  # as the header of the other, which is turned
    message = refused(tmp_path / "logs", f"{tmp_path}/a {tmp_path}/b --lpips none", capfd)
    assert "a/0.jpg has 12x8 pixels, wanted 8x12 as" in message


@pytest.mark.parametrize(
    "files, flags, words",
    [
        ({"a/0.png", "b/1.png"}, "{}/a {}/b", ["no image has a partner", "0.png", "1.png"]),
        ({"a/0.png", "a/0.jpg", "b/0.png"}, "{}/a {}/b", ["0.jpg", "0.png", "have the same name"]),
        ({"a/0.png"}, "{}/a", ["got no reference", "calc_pairs.py SAMPLES REFERENCE"]),
        ({"a/0.png"}, "{}/a {}/none", ["none not found"]),
        ({"a/0.png"}, "{}/a digits", ["digits, the data set", "the folder that has the images"]),
        ({"a/0.png"}, "{}/a {}/a --worst_by lpips", ["worst_by lpips with --lpips none", "--worst_by psnr"]),
    ],
)
def test_what_cannot_be_compared_is_refused(files, flags, words, tmp_path, capfd):
    for file in files:
        save(tmp_path / file, noise(0, 12, 12, 3))
    message = refused(tmp_path / "logs", f"{flags.replace('{}', str(tmp_path))} --lpips none", capfd)
    assert all(word in message for word in words) and "Traceback" not in message, message


def test_samples_of_a_run_are_compared_with_their_files(tmp_path):
    images = noise(0, 3, 12, 12, 3)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    for number in (0, 2):
        save(tmp_path / "b" / f"{number:06d}.png", images[number])
    results, rows = measure(tmp_path, f"{tmp_path}/samples.npz {tmp_path}/b --lpips none")
    assert {*rows} == {"000000", "000002"} and results["metrics"]["mse"]["mean"] == 0
    assert results["left_out"]["samples"] == ["000001.png"]


def test_small_images_have_no_ssim(tmp_path):
    for folder in "ab":
        save(tmp_path / folder / "0.png", noise(ord(folder), 8, 30, 3))
        save(tmp_path / folder / "1.png", noise(ord(folder), 16, 16, 3))
    results, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b --lpips none --worst_by ssim")
    assert rows["0"]["ssim"] == "" and results["metrics"]["ssim"]["n"] == 1 and results["metrics"]["psnr"]["n"] == 2
    assert results["worst"]["names"] == ["1"]


def test_the_sheet_has_the_worst_pairs_and_their_differences(tmp_path):
    for number, level in enumerate((10, 200, 60)):  # the second is the worst, and its difference would wrap
        save(tmp_path / "a" / f"{number}.png", np.zeros((12, 12, 3), np.uint8))
        save(tmp_path / "b" / f"{number}.png", np.full((12, 12, 3), level, np.uint8))
    flags = f"{tmp_path}/a {tmp_path}/b --lpips none --sheet_pairs 2 --sheet_size 48"
    results, _ = measure(tmp_path, flags)
    assert results["worst"] == {"by": "psnr", "names": ["1", "2"]}
    with Image.open(tmp_path / "pairs" / "worst.png") as sheet:
        pixels = np.asarray(sheet)
    gap, line = contact_sheet.GAP, contact_sheet.LINE
    tops = [2 * gap + 2 * line, 3 * gap + 3 * line + 48]  # of the images, below the heading and their names
    for top, level in zip(tops, (200, 60), strict=True):
        row = pixels[top + 24]
        middles = [row[gap + i * (48 + gap) + 24, 0] for i in range(3)]
        assert middles == [0, level, min(255, contact_sheet.GAIN * level)]
    assert (pixels[tops[1] - line : tops[1]] < 100).any()  # its name


def test_a_command_typed_again_reports_its_results(tmp_path, capsys):
    for folder in "ab":
        save(tmp_path / folder / "0.png", noise(ord(folder), 12, 12, 3))
    flags = f"{tmp_path}/a {tmp_path}/b --lpips none --logs_root {tmp_path}"
    call(SCRIPT, flags)
    first = capsys.readouterr().out
    (tmp_path / "pairs_a_b" / "pairs.csv").unlink()
    call(SCRIPT, flags)
    assert capsys.readouterr().out == first and not (tmp_path / "pairs_a_b" / "pairs.csv").exists()
    save(tmp_path / "b" / "0.png", noise(9, 12, 12, 3))
    os.utime(tmp_path / "b" / "0.png", ns=(1, 1))
    call(SCRIPT, flags)  # other images
    assert len(list(tmp_path.glob("pairs_a_b*/pairs.csv"))) == 1


def test_lpips_takes_values_from_minus_1_to_1():
    torch.manual_seed(0)
    network, (image, other) = Perceptual("squeeze", trained=False), torch.from_numpy(noise(0, 2, 3, 32, 40))
    values = calc_pairs.measure_pair(image, other, network)
    wanted = network(image[None].float() / 127.5 - 1, other[None].float() / 127.5 - 1)
    assert values["lpips"] == pytest.approx(wanted.item(), rel=1e-5) and wanted != 0  # of random weights
    assert calc_pairs.measure_pair(image[:, :16], other[:, :16], network)["lpips"] is None  # too small for it


@REAL_LPIPS
def test_lpips_with_real_weights_orders_pairs(tmp_path):
    images = {name: noise(0, 4, 4, 3).repeat(16, 0).repeat(16, 1) for name in ("same", "noisy", "other")}
    for name, pixels in images.items():
        save(tmp_path / "b" / f"{name}.png", pixels)
    images["noisy"] = np.clip(images["noisy"] + np.random.default_rng(1).normal(0, 9, (64, 64, 3)), 0, 255).astype("u1")
    images["other"] = 255 - images["other"]
    for name, pixels in images.items():
        save(tmp_path / "a" / f"{name}.png", pixels)
    weights = f"--perceptual_weights {os.environ['LPIPS_SQUEEZE']}/squeeze.backbone.pth"
    _, rows = measure(tmp_path, f"{tmp_path}/a {tmp_path}/b {weights}")
    same, noisy, other = (float(rows[name]["lpips"]) for name in images)
    assert same == 0 and 0 < noisy < other
