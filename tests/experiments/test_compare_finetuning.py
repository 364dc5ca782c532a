"""The comparison of ways of fine-tuning."""

import pytest
import torch
from safetensors.torch import save_file

from experiments import compare_finetuning
from experiments.compare_finetuning import ComparisonConfig, measure, report
from helpers.tiny_runs import call
from train.checkpoint import checkpoint_path

ROW = {"new": 0.5, "others": 0.25, "parameters": 12_345, "bytes": 50_000, "seconds": 90.0}


def test_samples_are_counted_that_are_what_was_asked_for(tmp_path, monkeypatch):
    path = checkpoint_path(tmp_path, 3)
    path.mkdir(parents=True)
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path / "model.safetensors")
    monkeypatch.setattr(compare_finetuning, "saved_steps", lambda run: [3])
    monkeypatch.setattr(compare_finetuning, "classify", lambda judge, images: images[:, 0, 0, 0].long())
    new = torch.tensor([9, 9, 9, 4]).view(4, 1, 1, 1)
    others = torch.tensor([0, 1, 9, 3, 4, 5, 6, 7, 8, 0, 2]).view(11, 1, 1, 1)  # asked for: 0 to 8, 0, 1
    figures = measure(tmp_path, None, new, others)
    assert figures["new"] == 0.75 and figures["others"] == pytest.approx(9 / 11) and figures["parameters"] == 10
    assert figures["bytes"] == (path / "model.safetensors").stat().st_size


def test_the_table_has_a_row_for_each_run():
    lines = report({"base": ROW, "lora": ROW}, ("base", "lora")).splitlines()
    assert lines[2].split() == ["base", "0.500", "0.250", "12,345", "0.05", "MB", "1.5", "min"] and len(lines) == 5


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="got arms lokr, wanted some of full, lora"):
        ComparisonConfig(arms=("lokr",))


@pytest.mark.slow
def test_runs_are_trained_and_measured_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.metrics.image_classifier.RECIPE", compare_finetuning.RECIPE._replace(epochs=1))
    words = "--base_steps 3 --tuning_steps 2 --n_samples 10 --arms full lora --rank 2"
    for _ in range(2):
        call("experiments/compare_finetuning.py", f"{words} --logs_root {tmp_path}")
    folder, shown = tmp_path / "compare_finetuning_ddpm_digits", capsys.readouterr().out
    assert shown.count("python train_sampler.py") == 3 and (folder / "finetuning.png").is_file()
    assert "lora" in shown
