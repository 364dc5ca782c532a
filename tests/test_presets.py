"""Every preset in configs/ reaches the scripts, and its settings fit together."""

import pytest
import torch
import yaml

from experiments.compare_attention import VARIANTS
from helpers.parametrize import slow_after
from helpers.tiny_runs import ROOT, parse_config
from train.cli import parse as cli
from train.samplers import absorbing
from vq.config import VQGANConfig


def test_presets_reach_both_stages_and_match_the_reference(monkeypatch, tmp_path):
    """The reference's `dataset == "churches" or "bedrooms"` gave every data set one learning rate."""
    rates = {}
    for name in ("ffhq", "churches", "bedrooms", "faces140k"):
        vqgan = parse_config("train_vqgan.py", f"--dataset {name} --logs_root {tmp_path}", monkeypatch)
        sampler = parse_config("train_sampler.py", f"--dataset {name} --logs_root {tmp_path}", monkeypatch)
        assert (vqgan["nf"], vqgan["ch_mult"], vqgan["codebook_size"]) == (128, [1, 1, 2, 2, 4], 1024)
        assert (sampler["bert_n_layers"], sampler["bert_n_emb"], sampler["bert_n_head"]) == (24, 512, 8)
        rates[name] = (sampler["lr"], sampler["warmup_iters"])
    assert rates["ffhq"] == rates["faces140k"] == (1e-4, 30_000)
    assert rates["churches"] == rates["bedrooms"] == (2e-4, 10_000)
    assert parse_config("train_vqgan.py", "--dataset faces140k", monkeypatch)["only_folders"] == ["real"]
    assert parse_config("train_vqgan.py", "--dataset bedrooms", monkeypatch)["category"] == "bedroom"


PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
OF_CODES = [path for path in PRESETS if "sampler: ddpm" not in path.read_text()]


@pytest.mark.parametrize("path", slow_after(4, PRESETS), ids=lambda p: p.stem)
def test_every_preset_parses_in_every_script(path, monkeypatch, tmp_path):
    flags = f"--config {path} --logs_root {tmp_path}"
    content = yaml.safe_load(path.read_text())
    dataset, sampler = content["dataset"], content.get("sampler", "absorbing")
    assert (ROOT / "configs" / f"{dataset}.yaml").is_file() and dataset in path.stem
    scripts = ["train_vqgan.py", "train_sampler.py", "experiments/calc_FID.py", "experiments/calc_VQGAN_FID.py"]
    compared = [f"experiments/compare_{what}.py" for what in ("attention", "quantizers")]
    of_pixels = ["experiments/compare_layouts.py"]
    for script in [*scripts, *(of_pixels if sampler == "ddpm" else compared)]:
        assert parse_config(script, flags, monkeypatch)["dataset"] == dataset


DEBUG = sorted((ROOT / "configs" / "debug").glob("*.yaml"))


@pytest.mark.parametrize("path", slow_after(3, PRESETS), ids=lambda p: p.stem)
def test_debug_presets_follow_every_preset(path, monkeypatch, tmp_path):
    sampler = yaml.safe_load(path.read_text()).get("sampler", "absorbing")
    scripts = ["train_sampler.py", "experiments/calc_FID.py", *(["train_vqgan.py"] if sampler != "ddpm" else [])]
    for script in scripts:
        alone = parse_config(script, f"--config {path} --logs_root {tmp_path}", monkeypatch)
        for debug in DEBUG:
            config = parse_config(script, f"--config {path} {debug} --logs_root {tmp_path}", monkeypatch)
            assert config["dataset"] == alone["dataset"]
            if script != "experiments/calc_FID.py":
                assert config["train_steps"] <= 500 < alone["train_steps"]
                assert config["subset"] == {"limit": 256, "overfit": 16}.get(debug.stem, 0)
                assert config["profile"] == (debug.stem == "profile")


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_sampler.py"])
def test_data_and_experiment_compose_to_a_preset(script, monkeypatch, tmp_path):
    folder = ROOT / "configs"
    parts = f"--config {folder / 'data' / 'digits.yaml'} {folder / 'experiment' / 'small_codes.yaml'}"
    whole = f"--config {folder / 'digits.yaml'}"
    config = parse_config(script, f"{parts} --logs_root {tmp_path}", monkeypatch)
    assert config == parse_config(script, f"{whole} --logs_root {tmp_path}", monkeypatch)


@pytest.mark.parametrize("data", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("experiment", sorted((ROOT / "configs" / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_any_data_compose_with_any_experiment(data, experiment, monkeypatch, tmp_path):
    flags = f"--config {data} {experiment} --logs_root {tmp_path}"
    config = parse_config("train_sampler.py", flags, monkeypatch)
    wanted = yaml.safe_load(data.read_text())
    assert {key: config[key] for key in wanted} == wanted
    assert config["lr"] == 1e-3 and config["sampler"] in experiment.read_text()


def grid_of(path, monkeypatch, tmp_path):
    """The grid of codes of a preset, from its own VQGAN settings or those of its data set."""
    has_vqgan = "vqgan" in yaml.safe_load(path.read_text())
    preset = path if has_vqgan else ROOT / "configs" / f"{yaml.safe_load(path.read_text())['dataset']}.yaml"
    config = parse_config("train_vqgan.py", f"--config {preset} --logs_root {tmp_path}", monkeypatch)
    return VQGANConfig(ch_mult=tuple(config["ch_mult"])).grid(config["img_size"])


@pytest.mark.parametrize("path", slow_after(7, OF_CODES), ids=lambda p: p.stem)
def test_the_attention_of_every_preset_fits_its_grid(path, monkeypatch, tmp_path):
    grid, content = grid_of(path, monkeypatch, tmp_path), yaml.safe_load(path.read_text())
    script = "train_sampler.py" if "absorbing" in content else "experiments/compare_attention.py"
    flat = parse_config(script, f"--config {path} --logs_root {tmp_path}", monkeypatch)
    settings = {key: flat[key] for key in cli.flag_names(absorbing.Config)}
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    compared = VARIANTS.values() if "compare_attention" in content else [{}]
    for changes in compared:
        with torch.device("meta"):
            built = absorbing.build(absorbing.Config(**settings | changes), codes=8, grid=grid, n_classes=0)
        assert built.network.grid == grid
