"""What --samples and --reference select: two sets or a run, from flags or a file, and the folder of the results."""

import json
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from experiments.harness.comparison import default_name
from helpers.tiny_runs import call, parse_config

FID = "experiments/calc_FID.py"


def write_images(folder, seed):
    folder.mkdir(parents=True)
    for i in range(4):
        pixels = np.random.default_rng(9 * seed + i).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "a" / "val", 0), write_images(tmp_path / "b" / "val", 1)


def test_statistics_are_beside_a_run_for_files_alone(tmp_path, monkeypatch):
    (tmp_path / "absorbing_digits").mkdir()
    (tmp_path / "absorbing_digits" / "config.yaml").write_text("{}")  # the default run

    def has_run(flags):
        return "load_dir" in parse_config(FID, f"--logs_root {tmp_path} --ref_stats s.npz {flags}", monkeypatch)

    assert has_run("--samples x.npz") and has_run("")
    assert not has_run("--samples folder") and not has_run("--samples digits:val")
    (tmp_path / "absorbing_digits" / "config.yaml").unlink()
    assert not has_run("--samples x.npz")


def test_a_run_is_found_where_it_lies(trained_ddpm, tmp_path, monkeypatch):
    """In the working folder, or below the logs."""
    run, logs = tmp_path / "work" / "ddpm_digits", tmp_path / "logs"
    for place in (run, logs / "other"):
        place.mkdir(parents=True)
        shutil.copy(trained_ddpm / "ddpm_digits" / "config.yaml", place)
    monkeypatch.chdir(run.parent)
    for word, found in (("ddpm_digits", run), ("other", logs / "other"), (f"{run}/", run)):
        config = parse_config(FID, f"--logs_root {logs} --samples {word}", monkeypatch)
        assert (config["load_dir"], config["samples"], config["sampler"]) == (str(found), None, "ddpm")


def test_sets_in_a_config_file_count_as_flags(trained_ddpm, tmp_path, monkeypatch):
    def parse(content, flags=""):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
        return parse_config(FID, f"--logs_root {trained_ddpm} --config {tmp_path / 'own.yaml'} {flags}", monkeypatch)

    sets = {"samples": "one", "reference": "two"}
    config = parse({"calc_FID": sets | {"n_channels": 4}})
    assert (config["samples"], config["reference"], config["n_channels"]) == ("one", "two", 4)
    assert "load_dir" not in config
    assert parse({"calc_FID": {"samples": "one"}}, "--reference two").keys() == config.keys()
    assert parse({"calc_FID": {"samples": "ddpm_digits"}})["load_dir"] == str(trained_ddpm / "ddpm_digits")
    config = parse({"dataset": "digits", "calc_FID": sets | {"sampler": "ddpm"}})
    assert config["samples"] == "one" and config["sampler"] == "ddpm"  # beside that run
    assert parse_config(FID, "--samples one --reference two", monkeypatch)["n_channels"] is None  # not the preset's


def test_results_are_named_after_both_sets():
    names = {
        ("photographs", "digits:val"): "FID_photographs_digits_val",
        ("a/val", "/b/val/"): "FID_a_val_b_val",
        ("logs/x/samples.npz", "y.npz"): "FID_x_y",
        ("samples.npz", "y_samples.npz"): "FID_samples_y_samples",
        ("c/a/val", "d/a/val"): "FID_c_a_val_d_a_val",
        ("a/val", "a/val"): "FID_val_val",
    }
    assert {words: default_name("FID", *words) for words in names} == names


def test_other_settings_get_a_folder_of_their_own(folders, tmp_path, capsys):
    logs = tmp_path / "logs"
    flags = f"--logs_root {logs} --samples {folders[0]} --reference {folders[1]} --kid_subsets 2"
    for _ in range(2):
        call(FID, f"{flags} --features pixels")
        call(FID, f"{flags} --features digits")
    assert "these get a folder of their own" in capsys.readouterr().out
    found = {path.parent.name for path in logs.glob("*/results.json")}
    assert found == {"FID_a_val_b_val", "FID_a_val_b_val_features_digits"}
    other = write_images(tmp_path / "else" / "a" / "val", 2)
    call(FID, f"{flags.replace(str(folders[0]), str(other))} --features pixels")
    assert json.loads((logs / "FID_a_val_b_val_samples_val" / "results.json").read_text())["samples"] == str(other)
    moved = shutil.move(folders[1], tmp_path / "moved")
    first = (logs / "FID_a_val_b_val" / "results.json").stat()
    call(FID, f"{flags.replace(str(folders[1]), str(moved))} --features pixels --log_dir FID_a_val_b_val")
    assert (logs / "FID_a_val_b_val" / "results.json").stat() == first  # the same content: reported again
