"""--condition_file: the conditions of generated images from a user's file, in samples, edits and results."""

import json

import numpy as np
import pytest
import torch

from experiments.harness.images import read_samples
from helpers.tiny_runs import call


def sample(logs, flags):
    call("experiments/get_samples.py", f"--logs_root {logs} --no_amp --device cpu --sample_steps 2 {flags}")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label\n3\n7\n1\n")
    return path


def test_rows_are_assigned_cyclically(trained, file, conditions):
    sample(trained, f"--n_samples 5 --batch_size 2 --condition_file {file} --log_dir in_turn")
    assert torch.cat([batch["label"] for batch in conditions]).tolist() == [3, 7, 1, 3, 7]
    assert read_samples(trained / "in_turn" / "samples.npz")["labels"].tolist() == [3, 7, 1, 3, 7]


def test_a_changed_condition_file_is_another_experiment(trained, file, capsys):
    sample(trained, f"--n_samples 1 --condition_file {file} --log_dir by_content")
    file.write_text("label\n4\n")
    with pytest.raises(SystemExit):
        sample(trained, f"--n_samples 1 --condition_file {file} --log_dir by_content")
    assert "--condition_file: other content" in capsys.readouterr().err


def test_an_invalid_row_is_refused_before_the_folder_is_created(trained, file, capsys):
    file.write_text("label,colour\n3,red\n")
    with pytest.raises(SystemExit) as stop:
        sample(trained, f"--n_samples 1 --condition_file {file} --log_dir odd")
    assert stop.value.code == 2 and "this sampler takes: label" in capsys.readouterr().err
    assert not (trained / "odd").exists()


@pytest.mark.parametrize("script, flags", [("inpaint", "--results 2"), ("interpolate", "--points 2")])
def test_edits_use_the_condition_row_of_their_image(trained, file, conditions, script, flags):
    call(
        f"experiments/{script}.py",
        f"--logs_root {trained} --no_amp --device cpu --sample_steps 2 --n_images 4 {flags} --condition_file {file} "
        f"--log_dir by_file_{script}",
    )
    labels = conditions[0]["label"].tolist()
    assert labels == {"inpaint": [3, 3, 7, 7, 1, 1, 3, 3], "interpolate": [3, 3, 1, 1]}[script]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["inpaint", "edit", "interpolate"])
def test_edits_with_an_image_condition(trained_ddpm, conditions, monkeypatch, script):
    """Held-out images have their own conditions; other image files need a condition file."""
    folder = trained_ddpm / "own_code"
    folder.mkdir(exist_ok=True)
    code = "def dark(item):\n    return item | {'condition_image': item['image'] // 2}\n"
    (folder / "my_dark.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    run = f"--logs_root {trained_ddpm} --no_amp --device cpu --sampler ddpm"
    if not (trained_ddpm / "dark").exists():
        from helpers.tiny_runs import DDPM

        flags = f"{DDPM} --adapt my_dark.dark --conditions image --condition_channels 1 --log_dir dark --train_steps 1"
        call("train_sampler.py", f"--logs_root {trained_ddpm} --no_amp {flags}")
    flags = f"{run} --load_dir dark --allow my_dark.dark --sample_steps 2 --n_images 2 --log_dir dark_{script}"
    call(f"experiments/{script}.py", flags)
    assert conditions and all(batch["condition_image"].shape[1:] == (1, 8, 8) for batch in conditions)
    assert all("label" in batch for batch in conditions)
    assert json.loads((trained_ddpm / f"dark_{script}" / "results.json").read_text())
    assert np.isfinite(conditions[0]["condition_image"].numpy()).all()
