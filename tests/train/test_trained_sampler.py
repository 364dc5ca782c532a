"""Conditions that a trained sampler takes from items of its data set."""

from dataclasses import replace
from types import SimpleNamespace

import torch

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model


def test_adapt_does_not_modify_the_item(trained_ddpm, tmp_path, monkeypatch):
    code = "def darker(item):\n    item['image'] //= 2\n    return item | {'dark_image': item['image']}\n"
    (tmp_path / "my_darker.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(trained_ddpm), amp=False))
    sampler = SimpleNamespace(conditions=("label", "dark_image"), config=SimpleNamespace(adapt="my_darker.darker"))
    item = {"image": torch.full((1, 8, 8), 100, dtype=torch.uint8), "label": 3}
    row = replace(model, sampler=sampler).conditions_of(item, 0)
    assert row.keys() == {"dark_image"} and row["dark_image"].unique().tolist() == [50]
    assert item["image"].unique().tolist() == [100] and item.keys() == {"image", "label"}
