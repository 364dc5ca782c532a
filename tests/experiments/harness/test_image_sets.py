"""Sets of images of any channels, range and size, without a trained run and beside one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from experiments.harness.image_sets import GeneratedSet
from helpers.tiny_runs import call
from train.condition_source import ConditionSource
from train.samplers import ddpm

FID, PRDC = "experiments/calc_FID.py", "experiments/calc_PRDC.py"


@pytest.fixture
def measure(tmp_path, capsys):
    """measure(flags): the results of calc_FID.py, or the line with which it refuses."""
    number = iter(range(99))

    def run_script(flags, script=FID, logs=tmp_path / "logs"):
        name = f"results_{next(number)}"
        capsys.readouterr()
        try:
            call(script, f"--logs_root {logs} --features pixels --log_dir {name} {flags}")
        except SystemExit:
            return capsys.readouterr().err
        return json.loads((logs / name / "results.json").read_text())

    return run_script


def write_arrays(folder, arrays):
    folder.mkdir()
    for i, array in enumerate(arrays):
        np.save(folder / f"{i:02d}.npy", array)
    return folder


@pytest.mark.parametrize("flag", ["hint", "condition_file"])
def test_generated_images_change_with_the_files_of_settings(tmp_path, flag):
    file = tmp_path / ("hint.png" if flag == "hint" else "rows.json")
    options = ddpm.Sampling(**{flag: (str(file),) if flag == "hint" else str(file)})
    model = SimpleNamespace(provenance={"sampler_weights": "a"})
    images = GeneratedSet("run", model, options, ConditionSource(()), count=2, seed=0, size=(8, 8))
    hashes = []
    for level in (1, 2, 1):
        Image.new("L", (4, 4), level).save(file) if flag == "hint" else file.write_text(f'[{{"label": {level}}}]')
        hashes.append(images.content_hash)
    assert hashes[0] == hashes[2] != hashes[1]


def test_channels_are_those_of_the_file_or_the_flag(measure, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {c: rng.integers(0, 255, (6, 9, 8, c), np.uint8) for c in (1, 2, 3, 4, 5)}
    files = {c: tmp_path / f"{c}.npz" for c in arrays}
    for c, path in files.items():
        np.savez(path, arr_0=arrays[c])
        folder = write_arrays(tmp_path / f"folder_{c}", arrays[c])
        results = measure(f"--samples {path} --reference {folder} --n_channels {c}")
        assert results["value"] < 1e-6 and results["size"] == [9, 8]
    assert measure(f"--samples {files[1]} --reference {files[3]}")["value"] > 0  # grey becomes colour
    refused = {
        f"--samples {files[4]} --reference {files[3]}": "of 4 channels and",
        f"--samples {files[3]} --reference {tmp_path / 'folder_4'}": "pass --n_channels 4",
        f"--samples {files[4]} --reference digits:val": "of 4 channels and digits:val of 3 channels, wanted equally",
        f"--samples {files[3]} --reference {files[3]} --sampler ddpm --n_channels 4": "leave it out",
    }
    for flags, message in refused.items():
        error = measure(flags)
        assert message in error and error.count("\n") == 1
    np.savez(tmp_path / "first.npz", arr_0=arrays[3].transpose(0, 3, 1, 2))
    assert "move the channels to the end" in measure(f"--samples {tmp_path / 'first.npz'} --reference {files[3]}")


def test_a_range_counts_for_images_of_more_than_8_bits(measure, tmp_path):
    """The same images with 8 bits, with 12 of 16 bits, and as floats."""
    levels = np.random.default_rng(0).integers(0, 255, (6, 8, 8), np.uint8)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / "pngs" / f"{i:02d}.png")
    scans = write_arrays(tmp_path / "scans", levels.astype(np.uint16) * 16)
    floats = write_arrays(tmp_path / "floats", levels / 255)
    assert measure(f"--samples {tmp_path / 'pngs'} --reference {scans} --data_range 0 4080")["value"] < 1e-6
    assert measure(f"--samples {tmp_path / 'pngs'} --reference {scans} --data_range 0 8160")["value"] > 0.01
    assert measure(f"--samples {floats} --reference {tmp_path / 'pngs'} --data_range 0 1")["value"] < 1e-6
    assert "pass --data_range LOWEST HIGHEST" in measure(f"--samples {floats} --reference {tmp_path / 'pngs'}")
    assert "wanted the lower first" in measure(f"--samples {floats} --reference {scans} --data_range 1 0")


def test_arrays_of_several_sizes_are_no_size(measure, tmp_path):
    sizes = [(8, 8, 3), (8, 9, 3), (7, 8, 3)]
    folder = write_arrays(tmp_path / "mixed", [np.full(size, i * 50, np.uint8) for i, size in enumerate(sizes)])
    assert measure(f"--samples {folder} --reference {folder}")["size"] == [299, 299]


def test_photographs_are_reduced(measure, tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (2048, 1024), colour).save(folder / f"{i}.png")
    results = measure(f"--samples {folder} --reference {folder} --kid_subsets 1")
    assert results["size"] == [512, 1024] and results["value"] < 1e-6


def test_a_file_beside_a_run_is_brought_to_its_size(measure, trained_ddpm, tmp_path, capsys):
    """A folder is named in the report."""
    arrays = np.random.default_rng(0).integers(0, 255, (9, 20, 24, 3), np.uint8)
    np.savez(tmp_path / "file.npz", arr_0=arrays)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(arrays):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    results = {
        name: measure(f"--sampler ddpm --samples {tmp_path / name}", logs=trained_ddpm)
        for name in ("file.npz", "folder")
    }
    assert results["file.npz"]["value"] == results["folder"]["value"]
    assert results["file.npz"]["size"] == [8, 8] and results["folder"]["samples"] == str(tmp_path / "folder")
    assert f"\n{tmp_path / 'folder'} " in capsys.readouterr().out
    np.savez(tmp_path / "same.npz", arr_0=arrays[:, :8, :8])
    assert "size" not in measure(f"--sampler ddpm --samples {tmp_path / 'same.npz'}", logs=trained_ddpm)
    np.savez(tmp_path / "four.npz", arr_0=np.zeros((9, 8, 8, 4), np.uint8))
    error = measure(f"--sampler ddpm --samples {tmp_path / 'four.npz'}", logs=trained_ddpm)
    assert "four.npz of 4 channels and" in error and "of 3 channels" in error and "--n_channels" not in error


def test_unreadable_images_leave_equal_counts(measure, trained_ddpm, tmp_path):
    for name, readable in (("whole", 9), ("damaged", 7)):
        (tmp_path / name).mkdir()
        for i in range(9):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
            if i >= readable:
                (tmp_path / name / f"{i}.png").write_bytes(b"none")
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    pairs = f"--samples {whole} --reference {damaged}", f"--samples {damaged} --reference {whole}"
    with pytest.warns(UserWarning, match="skipped 2 unreadable"):
        for flags in pairs:
            results = measure(f"{flags} --nearest_k 6", PRDC)
            assert (results["n_generated"], results["n_real"]) == (7, 7)
            assert "got 7 generated and real images for --nearest_k 7" in measure(f"{flags} --nearest_k 7", PRDC)
        results = measure(f"{pairs[0]} --sampler ddpm --nearest_k 6", PRDC, trained_ddpm)
    assert results["n_generated"] == results["n_real"] == results["n_held_out"] == 7
