"""calc_VQGAN_FID.py end to end on a tiny VQGAN, in one process and in two."""

import json
import shutil

import pytest
import torch
from PIL import Image

from experiments.harness.first_stage import FirstStageModelConfig, load_chosen_vqgan
from experiments.metrics.image_pairs import l1, psnr, ssim
from helpers.process_pool import ProcessPool
from helpers.tiny_runs import call, keep_few_images
from train.data.loading import ImageSource, build_dataset, images_in_order

SCRIPT = "experiments/calc_VQGAN_FID.py"
FILES = {"config.yaml", "results.json", "reconstructions.png", "codes.png"}


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


@pytest.fixture(scope="module")
def logs(trained, tmp_path_factory):
    """The tiny VQGAN in a separate logs folder."""
    folder = tmp_path_factory.mktemp("rebuilt") / "logs"
    shutil.copytree(trained / "vqgan_digits", folder / "vqgan_digits", ignore=shutil.ignore_patterns("codes"))
    return folder


@pytest.fixture(scope="module")
def val_results(logs):
    """The results of the whole validation split."""
    call(SCRIPT, f"--logs_root {logs} --no_amp")
    return read_results(logs, "VQGAN_FID_val_vqgan_digits_5")


@pytest.fixture(scope="module")
def originals(logs):
    """The VQGAN, and all validation images."""
    first = load_chosen_vqgan(FirstStageModelConfig(), str(logs), torch.device("cpu"), amp=False)
    source = ImageSource(build_dataset(first.data, first.reader, "val"), first.data)
    return first, torch.cat([batch["image"] for batch in images_in_order(source, 100)])


def test_the_metrics_are_those_of_all_validation_images(val_results, originals):
    first, real = originals
    ids = first.encode(real)
    fake = first.decode(ids)
    assert val_results["n_images"] == val_results["n_reference"] == len(real) == 359
    for name, value in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
        assert val_results[name] == pytest.approx(value(real, fake).double().mean().item(), rel=1e-4)
    shares = torch.bincount(ids.flatten(), minlength=16).double() / ids.numel()
    assert val_results["codebook_usage"] == (shares > 0).double().mean().item()
    assert val_results["perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-5)
    assert val_results["bits_per_pixel"] == 16 * 4 / 256 > val_results["entropy_coded_bits_per_pixel"]
    assert val_results["metric"] == "FD(digits)" and val_results["features"] == "digits" and val_results["rfd"] > 100
    assert (val_results["lpips"], val_results["lpips_net"], val_results["split"]) == (None, "none", "val")
    assert val_results["run"]["ae_weights"] == first.weights and val_results["run"]["step"] == 5


def test_the_pictures_are_there(val_results, logs):
    folder = logs / "VQGAN_FID_val_vqgan_digits_5"
    assert {path.name for path in folder.iterdir()} == FILES
    with Image.open(folder / "reconstructions.png") as grid:
        assert grid.size == (
            16 * 66 + 2,
            2 * 66 + 2,
        )  # 16 images above their reconstructions, enlarged from 16 to 64 pixels
    with Image.open(folder / "codes.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_a_repeated_run_prints_the_saved_report(val_results, logs, capsys, monkeypatch):
    monkeypatch.setattr("train.first_stage.VQGANStage.encode", None)  # nothing is measured
    capsys.readouterr()
    call(SCRIPT, f"--logs_root {logs} --no_amp")
    out = capsys.readouterr().out
    assert read_results(logs, "VQGAN_FID_val_vqgan_digits_5") == val_results
    assert f"rFD(digits)     {val_results['rfd']:.4g}" in out and f"{val_results['psnr']:.4g} dB" in out
    assert "359 images" in out and "codes.png" in out and "reconstructions.png" in out


def test_a_subset_of_images_is_fixed_and_keeps_the_reference(val_results, logs):
    flags = f"--logs_root {logs} --no_amp --features pixels --n_images 20"
    for name, size in (("some", 7), ("again", 20)):
        call(SCRIPT, f"{flags} --batch_size {size} --log_dir {name}")
    subset, rebatched = read_results(logs, "some"), read_results(logs, "again")
    assert (subset["n_images"], subset["n_reference"], subset["metric"]) == (20, 359, "FD(pixels)")
    for name in ("rfd", "psnr", "ssim", "l1", "perplexity", "codebook_usage"):
        assert subset[name] == pytest.approx(rebatched[name], rel=1e-5, abs=1e-4)  # pixels may round differently
    assert subset["l1"] != val_results["l1"]


def test_one_image_has_no_distance_but_all_other_figures(val_results, logs, monkeypatch, capsys):
    keep_few_images(monkeypatch, val=1)
    call(SCRIPT, f"--logs_root {logs} --no_amp --log_dir one")
    results, out = read_results(logs, "one"), capsys.readouterr().out
    assert results["rfd"] is results["n_reference"] is None and results["n_images"] == 1 and results["psnr"] > 0
    assert "rFD(digits)     -" in out and "a covariance needs at least 2 images, got 1" in out


def test_the_training_split_can_be_measured(val_results, logs):
    call(SCRIPT, f"--logs_root {logs} --no_amp --split train --features pixels --n_images 100000")
    results = read_results(logs, "VQGAN_FID_train_vqgan_digits_5")
    assert (results["split"], results["n_images"], results["n_reference"]) == ("train", 1438, 1438)
    assert results["l1"] != val_results["l1"]


class Mean(torch.nn.Module):
    def forward(self, images, others):
        return (images - others).abs().mean((1, 2, 3))


def test_lpips_is_measured_with_the_chosen_network(val_results, logs, monkeypatch):
    monkeypatch.setattr("experiments.metrics.reconstruction.load_perceptual", lambda net, weights: (net, Mean()))
    call(SCRIPT, f"--logs_root {logs} --no_amp --lpips_net squeeze --log_dir with_lpips")
    results = read_results(logs, "with_lpips")
    assert results["lpips"] == pytest.approx(results["l1"]) and results["lpips_net"] == "squeeze"


def test_a_failed_run_leaves_no_results(logs, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            call(SCRIPT, f"--logs_root {logs} --no_amp --n_images 4 --log_dir stopped")
    assert not (logs / "stopped" / "results.json").exists()
    call(SCRIPT, f"--logs_root {logs} --no_amp --n_images 4 --log_dir stopped")  # the next run succeeds
    assert {path.name for path in (logs / "stopped").iterdir()} == FILES


@pytest.mark.slow
def test_two_processes_measure_what_one_does(val_results, logs, tmp_path):
    """With a number of batches that does not divide by two, and statistics that are not cached yet."""
    shutil.copytree(logs / "vqgan_digits", tmp_path / "vqgan_digits")
    pool = ProcessPool(2)
    try:
        main, other = pool.run(SCRIPT, f"--logs_root {tmp_path} --no_amp")
    finally:
        pool.close()
    results = read_results(tmp_path, "VQGAN_FID_val_vqgan_digits_5")
    for name in val_results.keys() - {"run"}:
        assert results[name] == (pytest.approx(val_results[name], rel=1e-6) if name == "rfd" else val_results[name])
    assert "perplexity" in main["stdout"] and other["stdout"] == ""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--n_images 1", "got n_images 1, wanted at least 2: pass --n_images N"),
        ("--batch_size 0", "got batch_size 0"),
        ("--lpips_net none --perceptual_weights x.pth", "leave one of them out"),
        ("--load_dir nothing", "no run in"),
        ("--split test", "test"),
    ],
)
def test_invalid_flags_are_refused(flags, expected, logs, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {logs} {flags}")
    assert stop.value.code == 2 and expected in " ".join(capfd.readouterr().err.replace("│", " ").split())
