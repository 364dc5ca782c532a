"""Measurements of two sets of images without a trained run: folders, files, splits of data sets, generated images."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from experiments.harness import image_sets, images
from experiments.metrics import distances
from experiments.metrics.features import digits, pixels
from helpers.tiny_runs import call
from train.data.loading import fixed_subset
from train.distributed import DistContext
from train.logging import grid_image

FID, PRDC = "experiments/calc_FID.py", "experiments/calc_PRDC.py"
FLAGS = "--features digits --kid_subsets 2 --batch_size 7"


def measure(script, logs, samples, reference, flags=FLAGS):
    """The results of a measurement, with the folder in which they are."""
    before = set(logs.glob("*/results.json"))
    call(script, f"--logs_root {logs} --samples {samples} --reference {reference} {flags}")
    (path,) = set(logs.glob("*/results.json")) - before or {logs / flags.split()[-1] / "results.json"}
    return json.loads(path.read_text()) | {"folder": path.parent}


def write_images(folder, seed, count, low=12, high=40):
    """Smooth noise of random sizes; every third image is grey."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        height, width = rng.integers(low, high, 2)
        noise = Image.fromarray(rng.integers(0, 255 - 40 * seed, (9, 9, 3), np.uint8))
        noise = noise.convert("L") if i % 3 == 0 else noise
        noise.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    monkeypatch.setattr(images, "GRID_IMAGES", 4)  # compressing noise takes seconds


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "a", 0, 40), write_images(root / "b" / "nested", 1, 30).parent


def interrupt_at(count):
    """A method that is interrupted at its n-th call."""
    calls, update = [], distances.Statistics.update

    def interrupted(self, features):
        calls.append(features)
        if len(calls) == count:
            raise KeyboardInterrupt
        return update(self, features)

    return interrupted


def load_by_hand(folder, side=299):
    """Images of a folder (n, 3, side, side) uint8: Pillow's antialiased bicubic, covering, then the centre."""
    arrays = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        scale = side / min(image.size)
        width, height = (side if each == min(image.size) else int(each * scale) for each in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - side) / 2), round((height - side) / 2)
        arrays.append(np.asarray(image.crop((left, top, left + side, top + side))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def naive_prdc(real, fake, k):
    between = np.linalg.norm(real[:, None] - fake[None], axis=2)
    within = [np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k] for x in (real, fake)]
    in_real, in_fake = between < within[0][:, None], between < within[1][None]
    numbers = in_real.any(0).mean(), in_fake.any(1).mean(), in_real.sum(0).mean() / k, in_real.any(1).mean()
    return dict(zip(("precision", "recall", "density", "coverage"), numbers, strict=True))


def test_mixed_folders_agree_with_torch_fidelity(folders, tmp_path, capsys):
    for name, module in (("pixels", pixels), ("digits", digits)):
        a, b = (module.build("cpu")(load_by_hand(folder)) for folder in folders)
        results = measure(FID, tmp_path, *folders, f"--features {name} --kid_subsets 2 --log_dir {name}")
        statistics = [fid_features_to_statistics(each.double()) for each in (a, b)]
        expected = fid_statistics_to_metric(*statistics, False)[KEY_METRIC_FID]
        assert results["value"] == pytest.approx(expected, rel=1e-6)
        assert (results["n_samples"], results["n_reference"], results["size"]) == (40, 30, [299, 299])
        assert results["kernel"]["generated"]["size"] == 30
        results = measure(PRDC, tmp_path, *folders, f"--features {name} --nearest_k 3 --log_dir PRDC_{name}")
        fake, real = a[fixed_subset(40, 30)].double().numpy(), b.double().numpy()
        assert results["generated"] == pytest.approx(naive_prdc(real, fake, 3))
        assert results["n_real"] == results["n_generated"] == 30
    out = capsys.readouterr().out
    assert "lower is better" in out and "higher is better" in out and out.count("resized to 299 x 299") == 4


def test_any_two_kinds_of_sets_can_be_compared(trained_ddpm, folders, tmp_path):
    """The images of the folder and of the file are the same."""
    logs = tmp_path / "logs"
    shutil.copytree(trained_ddpm / "ddpm_digits", logs / "ddpm_digits")
    arrays = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "file.npz", arr_0=arrays)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(arrays):
        Image.fromarray(image).save(tmp_path / "pngs" / f"{i:02d}.png")
    sets = {"folder": tmp_path / "pngs", "file": tmp_path / "file.npz", "data": "digits:val", "run": "ddpm_digits"}
    flags = f"{FLAGS} --n_samples 9 --no_amp --log_dir"
    values = {}
    for one, a in sets.items():
        for two, b in sets.items():
            results = measure(FID, logs, a, b, f"{flags} {one}_{two}")
            values[one, two] = results["value"]
            assert results["size"] == ([32, 32] if one == "data" else [8, 8])
            assert results["n_samples"] == {"data": 359, "run": 9}.get(one, 12)
    for one, two in (("folder", "run"), ("run", "data")):
        flags = f"--features pixels --n_samples 9 --no_amp --log_dir PRDC_{one}_{two}"
        results = measure(PRDC, logs, sets[one], sets[two], flags)
        assert results["n_generated"] == results["n_real"] == 9
    for same in (("folder", "file"), ("file", "folder"), ("folder", "folder"), ("file", "file"), ("data", "data")):
        assert values[same] < 1e-6
    assert values["run", "run"] > 1e-3  # other seeds
    for kind in sets:
        assert values["file", kind] == pytest.approx(values["folder", kind], rel=1e-9)
        assert values[kind, "file"] == pytest.approx(values[kind, "folder"], rel=1e-9)
    assert values["folder", "run"] == pytest.approx(values["file", "run"])


def test_the_size_is_that_of_the_samples_if_they_have_one(folders, tmp_path):
    mixed, uniform = folders[0], write_images(tmp_path / "uniform", 2, 6, low=20, high=21)
    sizes = {(a, b): measure(FID, tmp_path, a, b, f"{FLAGS} --log_dir {a.name}_{b.name}")["size"]
             for a, b in ((mixed, uniform), (uniform, mixed), (uniform, uniform))}  # fmt: skip
    assert all(size == [20, 20] for size in sizes.values())


@pytest.mark.parametrize(("shapes", "size"), [([(8, 6), (8, 6, 3)], (8, 6)), ([(8, 6), (6, 8), (3, 8, 6)], None)])
def test_arrays_have_one_size_or_several(shapes, size, tmp_path):
    for i, shape in enumerate(shapes):
        np.save(tmp_path / f"{i}.npy", np.full(shape, i, np.uint8))
    (tmp_path / "9.npy").write_bytes(b"no array")
    world = DistContext(torch.device("cpu"))
    options = image_sets.SetOptions(world=world, logs_root="logs", split="train", count=2, seed=0, amp=False)
    assert image_sets.open_folder(tmp_path, options).size == size


def test_a_grid_names_the_classes_that_are_known(tmp_path):
    image = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    model = SimpleNamespace(captions=lambda labels: ["bag", "hat", "shoe"][: len(labels)])
    for name, fields in (("plain", {}), ("named", {"label": torch.arange(3)})):
        list(distances.with_grid([{"image": image, **fields}], tmp_path / f"{name}.png", model))
        captions = ["bag", "hat", "shoe"] if fields else []
        expected = np.asarray(grid_image(image, captions=captions))
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), expected)


def test_grey_images_are_measured_as_three_equal_channels(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "colour")
    for path in (tmp_path / "colour").iterdir():
        Image.open(path).convert("RGB").save(path)
    assert measure(FID, tmp_path, tmp_path / "colour", folders[0])["value"] < 1e-6


def test_a_broken_image_is_left_out_with_a_warning(folders, tmp_path):
    damaged = shutil.copytree(folders[0], tmp_path / "damaged")
    (damaged / "000.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipped 1 unreadable images: .*000.png"):
        results = measure(FID, tmp_path, damaged, folders[1], f"{FLAGS} --batch_size 1 --log_dir one_way")
    assert results["n_samples"] == 39 and (results["folder"] / "samples.png").is_file()
    with pytest.warns(UserWarning, match="skipped 1 unreadable images: .*000.png"):
        results = measure(FID, tmp_path, folders[1], damaged, f"{FLAGS} --log_dir other_way")
    assert results["n_reference"] == 39


def test_what_cannot_be_measured_is_refused_in_one_line(folders, tmp_path, capsys, monkeypatch):
    good, logs = folders[0], tmp_path / "logs"
    for name in ("empty", "one", "bad", "logs/vqgan", "digits"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a.png")
    (tmp_path / "bad" / "a.png").write_bytes(b"none")
    (logs / "vqgan" / "config.yaml").write_text("data: {dataset: digits}\n")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    monkeypatch.chdir(tmp_path)
    refused = {
        tmp_path / "empty": "has no image, wanted .jpg",
        tmp_path / "one": "has a single image, wanted at least 2",
        tmp_path / "bad": "none of its 1 images can be read",
        tmp_path / "statistics.npz": "wanted arr_0, uint8",
        "nothing": "nothing not found: wanted a folder of images, an .npz file, a trained run",
        "digits": "may be the folder",
        "digits:test": "no split 'test'",
        "vqgan": "is no sampler's run and no folder of images",
    }
    for word, message in refused.items():
        with pytest.raises(SystemExit) as stop:
            call(FID, f"--logs_root {logs} --samples {good} --reference {word} {FLAGS}")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        call(FID, f"--logs_root {logs} --samples {good} --reference {good} --ref_stats x.npz {FLAGS}")
    assert "got --reference and --ref_stats" in capsys.readouterr().err
    assert {path.name for path in logs.iterdir()} == {"vqgan"}


def test_results_are_identified_by_content(folders, tmp_path, monkeypatch):
    extracted, load = [], image_sets.ImageSet.load
    monkeypatch.setattr(
        image_sets.ImageSet, "load", lambda self, indices: extracted.append(indices) or load(self, indices)
    )
    a = shutil.copytree(folders[0], tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distances.Statistics, "update", interrupt_at(8))  # in the third batch of the samples
        measure(FID, tmp_path, a, folders[1])
    first = measure(FID, tmp_path, a, folders[1])
    assert first["folder"].name == "FID_a_b" and {path.name for path in first["folder"].iterdir()} == {
        "config.yaml", "results.json", "samples.png"
    }  # fmt: skip
    n = len(extracted)
    assert [len(indices) for indices in extracted] == [7, 7, 7, 7, 7, 5]  # each of the samples once
    moved = shutil.move(a, tmp_path / "moved" / "a")
    assert measure(FID, tmp_path, moved, f"{folders[1]}/", f"{FLAGS} --log_dir FID_a_b")["value"] == first["value"]
    assert len(extracted) == n  # nothing is measured again
    (Path(moved) / "000.png").unlink()
    assert measure(FID, tmp_path, moved, folders[1], f"{FLAGS} --log_dir FID_a_b")["n_samples"] == 39


def test_statistics_serve_as_the_reference_without_a_run(folders, tmp_path):
    first = measure(FID, tmp_path, *folders)
    (cached,) = (tmp_path / ".cache" / "statistics").iterdir()
    call(FID, f"--logs_root {tmp_path} --samples {folders[0]} --ref_stats {cached} {FLAGS} --log_dir statistics")
    assert json.loads((tmp_path / "statistics" / "results.json").read_text())["value"] == first["value"]


def test_a_run_keeps_its_yardsticks_with_any_sets(trained_ddpm, folders):
    """A flag that selects a run, here --sampler, also measures held-out images of its data."""
    flags = f"--sampler ddpm {FLAGS} --log_dir yardsticks"
    results = measure(FID, trained_ddpm, *folders, flags)
    assert results["real_vs_real"] > results["value"] > 0 and results["size"] == [8, 8]
    results = measure(PRDC, trained_ddpm, *folders, "--sampler ddpm --features pixels --log_dir PRDC_yardsticks")
    assert results["n_generated"] == results["n_held_out"] == 30 and results["reference"] == str(folders[1])
