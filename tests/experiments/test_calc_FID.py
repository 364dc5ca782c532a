"""calc_FID.py on a tiny trained model: distances match those of its images, also after an interruption."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import read_samples
from experiments.metrics import distances, kid
from experiments.metrics import features as all_features
from experiments.metrics.cmmd import cmmd
from experiments.metrics.features import clip, digits
from experiments.metrics.frechet import Reference, Statistics, frechet_distance
from experiments.metrics.kid import kernel_distance
from helpers.tiny_runs import call, keep_few_images
from train.config import DataConfig
from train.data.loading import ImageSource, build_dataset, fixed_subset, images_in_order
from train.datasets import ArrayDataset
from train.distributed import DistContext
from train.logging import grid_image
from train.trained_sampler import TrainedSampler

FLAGS = "--n_samples 90 --batch_size 20 --features digits --kid_subsets 5 --kid_subset_size 50 --no_amp"


@pytest.fixture
def calc(trained):
    """calc(log_dir, flags): the results of the script's run in a folder."""

    def run_script(log_dir, flags=FLAGS):
        call("experiments/calc_FID.py", f"--logs_root {trained} --log_dir {log_dir} {flags}")
        return json.loads((trained / log_dir / "results.json").read_text())

    return run_script


@pytest.fixture(scope="module")
def uninterrupted(trained):
    call("experiments/calc_FID.py", f"--logs_root {trained} --log_dir fid_whole {FLAGS}")
    return json.loads((trained / "fid_whole" / "results.json").read_text())


@pytest.fixture
def sampled_indices(monkeypatch):
    """The indices of every sampled batch."""
    batches, draw = [], TrainedSampler.draw

    def record(model, indices, *args, **kwargs):
        batches.append(indices)
        return draw(model, indices, *args, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


def interrupt():
    raise KeyboardInterrupt


def features_of(images):
    return digits.build("cpu")(images.expand(-1, 3, -1, -1))


def real_features(trained, split):
    """Features (n, D) of a split, in the order of its files."""
    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained), amp=False))
    source = ImageSource(build_dataset(model.data, model.reader, split), model.data)
    return features_of(torch.cat([batch["image"] for batch in images_in_order(source, 500)]))


def test_distances_are_those_of_the_images_of_that_seed(trained, uninterrupted):
    flags = "--n_samples 90 --batch_size 20 --no_amp --log_dir fid_samples"
    call("experiments/get_samples.py", f"--logs_root {trained} {flags}")
    generated = features_of(read_samples(trained / "fid_samples" / "samples.npz")["image"])
    real, held_out = (real_features(trained, split) for split in ("train", "val"))
    reference = Statistics().update(real)
    assert uninterrupted["value"] == pytest.approx(
        frechet_distance(Statistics().update(generated), reference), rel=1e-5
    )
    real = real[sorted(fixed_subset(len(real), 10_000))]
    assert len(real) == 1438  # all of them
    kernel = uninterrupted["kernel"]
    assert kernel["metric"] == "KD(digits)" and kernel.keys() == {
        "metric", "generated", "real_vs_real", "reconstructions"
    }  # fmt: skip
    assert kernel["generated"] == pytest.approx(kernel_distance(generated, real, 5, 50)._asdict(), rel=1e-5)
    held_out_subset = held_out[fixed_subset(len(held_out), 90)]
    expected = kernel_distance(held_out_subset, real, 5, 50)._asdict()
    assert kernel["real_vs_real"] == pytest.approx(expected, rel=1e-4)
    assert abs(kernel["real_vs_real"]["mean"]) < kernel["generated"]["mean"] / 10


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_resumes_to_the_same_report(
    trained, uninterrupted, calc, sampled_indices, monkeypatch, after
):
    name, draw = f"fid_cut_{after}", TrainedSampler.draw

    def interrupted_draw(model, indices, *args, **kwargs):
        if len(sampled_indices) == after:
            raise KeyboardInterrupt
        return draw(model, indices, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(TrainedSampler, "draw", interrupted_draw)
        calc(name)
    assert stop.value.code == 130 and not (trained / name / "results.json").exists()
    sampled_indices.clear()
    resumed = calc(name)
    assert sampled_indices == [list(range(first, min(first + 20, 90))) for first in range(20 * after, 90, 20)]
    for results in (resumed, uninterrupted):
        results["run"]["output"].pop("log_dir", None)
    assert resumed == uninterrupted  # exactly
    assert (trained / name / "samples.png").read_bytes() == (trained / "fid_whole" / "samples.png").read_bytes()
    assert {path.name for path in (trained / name).iterdir()} == {
        "config.yaml", "results.json", "samples.png", "reconstructions.png"
    }  # fmt: skip


def test_saved_features_are_never_mixed_up(calc, uninterrupted, sampled_indices, monkeypatch):
    """`--features auto` may find the Inception weights in one run and not in the next."""
    choose = all_features.choose_features

    def choose_pixels(name, *rest):
        return choose("pixels", *rest)

    flags = FLAGS.replace("--features digits", "--features auto")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(all_features, "choose_features", choose_pixels)
        patch.setattr(distances, "generated_statistics", lambda batches, *args: [*batches, interrupt()])
        calc("fid_auto", flags)
    assert len(sampled_indices) == 5
    monkeypatch.setattr(all_features, "choose_features", lambda name, *rest: choose("digits", *rest))
    assert calc("fid_auto", flags)["value"] == uninterrupted["value"]
    assert len(sampled_indices) == 10


def test_the_table_has_both_distances(calc, uninterrupted, sampled_indices, capsys):
    capsys.readouterr()
    calc("fid_whole")  # a repeated run prints the saved report
    out = capsys.readouterr().out
    assert sampled_indices == []
    (line,) = (line for line in out.splitlines() if line.startswith("generated "))
    kernel = uninterrupted["kernel"]["generated"]
    assert line.split() == [
        "generated", "90", f"{uninterrupted['value']:.4g}", f"{kernel['mean']:.3g}", "±", f"{kernel['deviation']:.2g}"
    ]  # fmt: skip
    assert "FD(digits)" in out and "KD(digits)" in out and "5 subsets of 50 images" in out


def test_a_reference_without_features_has_no_kernel_distance(calc, trained, uninterrupted, tmp_path, capsys):
    stats, full = tmp_path / "stats.npz", tmp_path / "full.npz"
    real = real_features(trained, "train")
    reference = Reference(Statistics().update(real), real)
    reference.statistics.save(stats)
    reference.save(full)
    results = calc("fid_stats", f"{FLAGS} --ref_stats {stats}")
    assert results["kernel"] is None and results["value"] == pytest.approx(uninterrupted["value"], rel=1e-5)
    out = capsys.readouterr().out
    assert "no kernel distance (KID)" in out and "only statistics" in out and "KD(" not in out
    results = calc("fid_full", f"{FLAGS} --ref_stats {full}")
    assert results["kernel"]["generated"] == pytest.approx(uninterrupted["kernel"]["generated"], rel=1e-5)


def test_the_cmmd_is_measured_on_demand(calc, trained, uninterrupted, tmp_path, capsys):
    """Beside the other distances, which stay as they are; of up to 10,000 features of each set."""
    assert "cmmd" not in uninterrupted
    results = calc("fid_cmmd", f"{FLAGS} --cmmd")
    real, held_out = (real_features(trained, split) for split in ("train", "val"))
    held_out = held_out[fixed_subset(len(held_out), 90)]
    assert results["value"] == uninterrupted["value"] and results["kernel"] == uninterrupted["kernel"]
    found = results["cmmd"]
    assert found["metric"] == "CMMD(digits)" and found["n_reference"] == 1438
    assert found["real_vs_real"] == pytest.approx(cmmd(held_out, real), rel=1e-4)
    assert found["real_vs_real"] < found["generated"] / 5
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("generated "))
    assert "CMMD(digits)" in out and line.split()[-1] == f"{found['generated']:.4g}"
    stats = tmp_path / "stats.npz"
    Statistics().update(real).save(stats)
    assert calc("fid_cmmd_stats", f"{FLAGS} --cmmd --ref_stats {stats}")["cmmd"] is None


def test_clip_features_are_those_of_the_folder(calc, tmp_path):
    """Two sets of images are compared without a run; another model in the folder is measured anew."""
    tiny_clip = pytest.importorskip("helpers.tiny_clip")
    rng = np.random.default_rng(0)
    for name, spread in (("a", 256), ("b", 128)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, spread, (6, 24, 20, 3), dtype=np.uint8))
    sets = f"--samples {tmp_path / 'a.npz'} --reference {tmp_path / 'b.npz'} --device cpu --kid_subsets 2"
    flags = f"{sets} --features clip --clip_dir {tmp_path / 'clip'} --cmmd"
    model = tiny_clip.make_clip()
    tiny_clip.save_clip(tmp_path / "clip", model)
    a, b = (
        clip.build("cpu", tmp_path / "clip")(read_samples(tmp_path / f"{name}.npz", None)["image"]) for name in "ab"
    )
    results = calc("fid_clip", flags)
    assert (results["metric"], results["features"], results["cmmd"]["metric"]) == ("FD(clip)", "clip", "CMMD(clip)")
    assert results["cmmd"]["generated"] == pytest.approx(cmmd(a, b), rel=1e-5)
    assert results["value"] == pytest.approx(frechet_distance(Statistics().update(a), Statistics().update(b)), rel=1e-3)
    tiny_clip.save_clip(tmp_path / "clip", tiny_clip.make_clip(seed=1))
    assert calc("fid_clip", flags)["cmmd"]["generated"] != results["cmmd"]["generated"]


def test_a_changed_samples_file_is_measured_again(calc, trained, tmp_path, sampled_indices):
    """The path and the results folder stay the same."""
    path, rng = tmp_path / "samples.npz", np.random.default_rng(0)
    values = []
    for spread in (256, 100):
        np.savez(path, arr_0=rng.integers(0, spread, (30, 16, 16, 3), dtype=np.uint8))
        values += [calc("fid_file", f"--features digits --samples {path} --kid_subsets 2")["value"]] * 2
        assert calc("fid_file", f"--features digits --samples {path} --kid_subsets 2")["value"] == values[-1]
    assert values[0] != values[-1] and sampled_indices == []
    path.unlink()  # the saved results stay valid
    assert calc("fid_file", f"--features digits --samples {path} --kid_subsets 2")["value"] == values[-1]


def test_a_file_changed_before_resuming_is_measured_from_scratch(calc, tmp_path, monkeypatch):
    path, rng = tmp_path / "samples.npz", np.random.default_rng(0)
    flags = f"--features digits --samples {path} --kid_subsets 2"
    np.savez(path, arr_0=rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distances, "generated_statistics", lambda batches, *args: [*batches, interrupt()])
        calc("fid_replaced", flags)
    np.savez(path, arr_0=rng.integers(0, 100, (30, 16, 16, 3), dtype=np.uint8))
    assert calc("fid_replaced", flags)["value"] == calc("fid_fresh", flags)["value"]


def test_a_list_sorted_by_class_is_measured_as_a_shuffled_one(calc, trained, tmp_path, monkeypatch):
    """Every figure of a part of the images takes a random part, not the first class."""
    monkeypatch.setattr(kid, "MAX_FEATURES", 300)
    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained), amp=False))
    source = ImageSource(model.dataset("train"), model.data)
    images = torch.cat([batch["image"] for batch in images_in_order(source, 500)])
    images = images[torch.from_numpy(source.dataset.labels).argsort(stable=True)]
    real, reference = features_of(images), tmp_path / "reference.npz"
    Reference(Statistics().update(real), real).save(reference)
    np.savez(tmp_path / "sorted.npz", arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    results = calc("fid_sorted", f"--features digits --samples {tmp_path / 'sorted.npz'} --ref_stats {reference}")

    def distance(indices):
        return frechet_distance(Statistics().update(real[indices]), Statistics().update(real))

    assert (results["n_samples"], results["n_compared"]) == (1438, 359)
    assert results["value_at_n_compared"] == pytest.approx(distance(fixed_subset(1438, 359)), rel=1e-3)
    assert results["value_at_n_compared"] < distance(range(359)) / 10
    kernel = kernel_distance(real[sorted(fixed_subset(1438, 300))], real, 100, 300)
    assert results["kernel"]["generated"]["mean"] == pytest.approx(kernel.mean, abs=1e-4)
    assert abs(kernel.mean) < kernel_distance(real[:300], real, 100, 300).mean / 10
    grid = grid_image(images[sorted(fixed_subset(1438, 64))].expand(-1, 3, -1, -1))
    assert np.array_equal(np.asarray(Image.open(trained / "fid_sorted" / "samples.png")), np.asarray(grid))


def test_one_held_out_image_is_no_yardstick(calc, sampled_indices, monkeypatch, capsys):
    keep_few_images(monkeypatch, train=23, val=1)
    results = calc("fid_few", "--n_samples 30 --features pixels --kid_subsets 2")
    assert results["value"] > 0 and results["n_compared"] == 1
    assert results["real_vs_real"] is results["reconstructions"] is results["value_at_n_compared"] is None
    assert results["kernel"].keys() == {"metric", "generated"}
    out = capsys.readouterr().out
    assert "a covariance needs at least 2 of them, got 1" in out and "held-out real images" not in out
    sampled_indices.clear()
    with pytest.raises(SystemExit):  # a reference of one image has no distance to anything
        calc("fid_none", "--n_samples 30 --features pixels --split val")
    assert not sampled_indices and "the covariance needs at least 2" in capsys.readouterr().err


def test_a_reference_of_other_features_is_refused_first(calc, sampled_indices, tmp_path, capsys):
    Statistics().update(torch.randn(9, 3)).save(tmp_path / "other.npz")
    with pytest.raises(SystemExit) as stop:
        calc("fid_other", f"{FLAGS} --ref_stats {tmp_path / 'other.npz'}")
    assert stop.value.code == 2 and "both sets need the same features" in capsys.readouterr().err
    assert not sampled_indices


def test_another_experiment_in_the_same_folder_is_refused(calc, uninterrupted, capsys):
    with pytest.raises(SystemExit) as stop:
        calc("fid_whole", FLAGS.replace("90", "80"))
    assert stop.value.code == 2 and "--n_samples 90 -> 80" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "low"), [("n_samples", 2), ("kid_subsets", 1), ("kid_subset_size", 2)])
def test_too_few_are_refused(calc, flag, low, capsys):
    with pytest.raises(SystemExit) as stop:
        calc("fid_few", f"--{flag} {low - 1}")
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"got {flag} {low - 1}, wanted at least {low}: pass --{flag} N" in message


def test_a_random_subset_of_many_real_images_is_kept(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(distances, "MAX_FEATURES", 100)
    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained), amp=False))
    features = all_features.load_features("digits", model.device)
    args = model.dataset("train"), model.data, features, None, tmp_path, 300, model.world
    computed, cached = distances.real_reference(*args), distances.real_reference(*args)
    real = real_features(trained, "train")
    expected = real[sorted(fixed_subset(1438, 100))]
    assert torch.equal(computed.features, cached.features)
    torch.testing.assert_close(computed.features, expected)
    assert computed.statistics.count == cached.statistics.count == 1438
    (path,) = tmp_path.iterdir()
    path.unlink()
    monkeypatch.setattr(distances, "MAX_FEATURES", 50)
    distances.real_statistics(*args)
    assert next(tmp_path.iterdir()).name != path.name  # a reference with fewer features has its own file


def test_another_data_range_has_its_own_statistics(tmp_path):
    class Scans(ArrayDataset):
        def __getitem__(self, index):
            return {"image": self.images[index]}

    images = np.random.default_rng(0).integers(0, 4096, (5, 8, 8), np.uint16)
    world = DistContext(torch.device("cpu"))

    def mean(data_range):
        data = DataConfig(dataset="scans", img_size=8, n_channels=1, data_range=data_range)
        dataset, features = Scans(images, np.zeros(5, int), 0), all_features.load_features("pixels", world.device)
        return distances.real_statistics(dataset, data, features, None, tmp_path, 5, world).mean.mean()

    assert mean((0, 65535)) < 0.9 * mean((0, 4095)) and mean(None) != mean((0, 4095))
    assert len(list(tmp_path.iterdir())) == 3
