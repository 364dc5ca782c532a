"""The experiment scripts end to end on a tiny trained model: their files, and images that must not leak in."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import SampleWriter, read_samples
from experiments.metrics.frechet import Statistics, frechet_distance
from helpers.tiny_runs import call


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


@pytest.fixture(scope="module")
def samples(trained):
    flags = "--n_samples 10 --batch_size 4 --log_dir s4 --save_individually"
    call("experiments/get_samples.py", f"--logs_root {trained} {flags}")
    return trained / "s4" / "samples.npz"


def test_samples_have_the_requested_number_and_the_npz_format(samples):
    """The reference draws floor(n / batch) batches."""
    with np.load(samples) as arrays:
        assert arrays["arr_0"].shape == (10, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
        assert arrays["codes"].shape == (10, 4, 4) and arrays["labels"].shape == (10,)
        first = arrays["arr_0"][0]
    files = sorted((samples.parent / "images").glob("*.png"))
    assert len(files) == 10
    with Image.open(files[0]) as picture:
        assert np.array_equal(np.array(picture), first)
    assert (samples.parent / "samples.png").is_file()


def test_images_do_not_depend_on_the_batch_size(trained, samples):
    call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 7 --batch_size 7 --log_dir s7 --no_amp")
    call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 7 --batch_size 2 --log_dir s2 --no_amp")
    call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 7 --log_dir other --seed 1 --no_amp")
    one, two, other = (read_samples(trained / name / "samples.npz") for name in ("s7", "s2", "other"))
    assert torch.equal(one["codes"], two["codes"])
    assert torch.equal(one["labels"], two["labels"])
    assert not torch.equal(one["codes"], other["codes"])


def test_the_report_records_what_the_number_depends_on(trained, samples, capsys):
    call("experiments/calc_FID.py", f"--logs_root {trained} --samples {samples} --features pixels --log_dir f")
    results = read_results(trained, "f")
    assert {"metric", "value", "real_vs_real", "reconstructions", "n_samples", "features", "run"} <= results.keys()
    assert (results["metric"], results["features"]) == ("FD(pixels)", "pixels")
    assert results["n_samples"] == results["n_compared"] == 10
    assert results["value"] > results["real_vs_real"] > 0  # untrained samples are farther than real ones
    assert results["n_reference"] == 1438
    assert results["run"]["sampler_weights"] and results["run"]["ae_weights"]
    assert (trained / "f" / "samples.png").is_file() and (trained / "f" / "reconstructions.png").is_file()
    assert "FID" not in capsys.readouterr().out.replace("/FID", "")
    capsys.readouterr()
    call("experiments/calc_FID.py", f"--logs_root {trained} --samples {samples} --features pixels --log_dir f")
    assert "FD(pixels)" in capsys.readouterr().out  # a repeated run prints the same report


def test_the_reported_value_is_the_distance_of_those_images(trained, samples):
    from experiments.metrics.features import pixels
    from train.data.loading import ImageSource, build_dataset, images_in_order

    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained), amp=False))
    features = pixels.build("cpu")
    source = ImageSource(build_dataset(model.data, model.reader, "train"), model.data)
    real = torch.cat([batch["image"] for batch in images_in_order(source, 500)]).expand(-1, 3, -1, -1)
    expected = frechet_distance(
        Statistics().update(features(read_samples(samples)["image"])), Statistics().update(features(real))
    )
    call("experiments/calc_FID.py", f"--logs_root {trained} --samples {samples} --features pixels --log_dir again")
    assert read_results(trained, "again")["value"] == pytest.approx(expected, rel=1e-6)


def test_reference_statistics_can_be_given_and_split_chosen(trained, samples, tmp_path):
    stats = tmp_path / "ref.npz"
    np.savez(stats, mu=np.zeros(768), sigma=np.eye(768))
    flags = f"--logs_root {trained} --samples {samples} --features pixels"
    call("experiments/calc_FID.py", f"{flags} --ref_stats {stats} --log_dir given")
    call("experiments/calc_FID.py", f"{flags} --split val --log_dir val")
    assert read_results(trained, "given")["n_reference"] is None
    assert read_results(trained, "val")["n_reference"] == 359


def test_images_of_another_experiment_do_not_leak_in(trained, samples, capfd):
    """The reference lists its images folder wholesale; here another experiment in the same folder is refused."""
    with pytest.raises(SystemExit) as stop:
        call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 3 --log_dir s4")
    assert stop.value.code == 2
    assert "--n_samples 10 -> 3" in capfd.readouterr().err


def test_auto_features_fall_back_to_pixels_with_one_warning(trained, samples, monkeypatch):
    import experiments.metrics.features as all_features
    from train.config import DataConfig

    def no_download(device):
        raise FileNotFoundError("the Inception weights could not be downloaded")

    monkeypatch.setattr("experiments.metrics.features.inception.build", no_download)
    with pytest.warns(UserWarning, match="FD\\(pixels\\), which is not an FID") as caught:
        assert all_features.choose_features("auto", DataConfig(dataset="mnist"), torch.device("cpu")).name == "pixels"
    assert len(caught) == 1
    with pytest.raises(FileNotFoundError):  # an explicit choice has no fallback
        all_features.choose_features("inception", DataConfig(), torch.device("cpu"))


def test_check_digits_reports_missed_goals(trained, capsys):
    call("experiments/get_samples.py", f"--logs_root {trained} --n_samples 20")
    call("experiments/check_digits.py", f"--logs_root {trained}")
    out = capsys.readouterr().out
    assert "fraction of samples classified with confidence" in out and "(missed)" in out  # after three training steps
    (folder,) = trained.glob("check_digits_*")
    assert (folder / "digits.png").is_file()


def test_an_interrupted_writer_leaves_no_files(tmp_path):
    with pytest.raises(RuntimeError, match="stopped"), SampleWriter(tmp_path, 2) as writer:
        writer.add({"image": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)})
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_other_archives_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match="get_samples.py"):
        read_samples(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="it is not an .npz file"):
        read_samples(path)
    np.savez(path, arr_0=np.zeros((3, 4, 4, 1), np.uint8))
    with pytest.raises(ValueError, match="wanted arr_0, uint8"):
        read_samples(path)


@pytest.mark.parametrize(
    "words",
    [
        "check_digits.py --samples missing.npz",
        "run_layout_to_image.py --layouts missing.json",
        "calc_FID.py --features pixels --samples missing.npz",
        "compare_samplers.py --n_samples 2 --steps 2 --features pixels --data_dir somewhere",
    ],
)
def test_a_refused_experiment_leaves_no_folder(trained, capfd, words):
    script, _, flags = words.partition(" ")
    with pytest.raises(SystemExit) as stop:
        call(f"experiments/{script}", f"--logs_root {trained} --log_dir refused {flags}")
    assert stop.value.code == 2 and not (trained / "refused").exists(), capfd.readouterr().err


def test_another_data_set_than_the_models_is_refused(trained, capfd):
    with pytest.raises(SystemExit) as stop:
        call("experiments/calc_FID.py", f"--logs_root {trained} --dataset mnist --load_dir absorbing_digits")
    assert stop.value.code == 2
    assert "was trained with --dataset digits, got mnist" in capfd.readouterr().err
