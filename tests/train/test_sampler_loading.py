"""Where a trained sampler finds its VQGAN, and the conditions that it takes from items of its data set."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from train import sampler_loading
from train.cli.parse import flatten_group
from train.identity import results_identity
from train.sampler_loading import load_space


def test_a_vqgan_that_is_found_needs_no_other_places(tmp_path, monkeypatch):
    """The second name could mean two folders, which matters only if the first one is not there."""
    for folder in ("logs/run", "logs/vqgan", "logs/moved/vqgan", "moved/vqgan"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "logs" / "vqgan" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sampler_loading, "load_first_stage", lambda run, *_, **__: SimpleNamespace(weights="w", run=run)
    )
    monkeypatch.setattr(sampler_loading, "reopen_space", lambda content, first_stage: first_stage.run)

    def find(name, other):
        content = {"origin": {"ae_weights": "w", "ae_load_dir": name}, "first": {"ae_load_dir": other}}
        (tmp_path / "logs" / "run" / "config.yaml").write_text(yaml.safe_dump(content))
        return load_space(tmp_path / "logs" / "run", [str(tmp_path / "logs")], torch.device("cpu"), amp=False)

    assert find("vqgan", "moved/vqgan") == find(3, "vqgan") == tmp_path / "logs" / "vqgan"
    with pytest.raises(ValueError, match="which may be"):
        find("gone", "moved/vqgan")
    with pytest.raises(ValueError, match="does not name its first stage: pass --ae_load_dir RUN"):
        find(["vqgan"], None)


def test_adapt_does_not_modify_the_item(trained_ddpm, tmp_path, monkeypatch):
    code = "def darker(item):\n    item['image'] //= 2\n    return item | {'dark_image': item['image']}\n"
    (tmp_path / "my_darker.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(trained_ddpm), amp=False))
    sampler = SimpleNamespace(
        conditions=("label", "dark_image"), optional_conditions=(), config=SimpleNamespace(adapt="my_darker.darker")
    )
    item = {"image": torch.full((1, 8, 8), 100, dtype=torch.uint8), "label": 3}
    row = replace(model, sampler=sampler).conditions_of(item, 0)
    assert row.keys() == {"dark_image"} and row["dark_image"].unique().tolist() == [50]
    assert item["image"].unique().tolist() == [100] and item.keys() == {"image", "label"}


def test_compile_flag_compiles_the_network_of_the_same_results(trained_ddpm, monkeypatch):
    compiled = []
    monkeypatch.setattr("experiments.harness.experiment.compile_for_sampling", compiled.append)
    outputs = [OutputConfig(logs_root=str(trained_ddpm), compile=chosen) for chosen in (False, True)]
    models = [load_model(ModelConfig(sampler="ddpm"), output) for output in outputs]
    assert len(compiled) == 1 and compiled[0] is models[1].sampler.network
    plain, flagged = (results_identity({"output": flatten_group(output)}) for output in outputs)
    assert plain == flagged
