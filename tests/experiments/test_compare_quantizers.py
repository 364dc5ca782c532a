"""compare_quantizers.py: tiny runs, interrupted and resumed; the table and the plot."""

import json
import math

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image

from experiments.compare_quantizers import VARIANTS, format_mean_std, networks, plot, summary
from experiments.metrics import reconstruction
from helpers.parametrize import slow_after
from helpers.tiny_runs import ROOT, VQGAN, call, parse_config
from train.cli import parse as cli
from train.registry import load_plugin, plugin_names
from vq.config import VQGANConfig
from vq.quantizers import ema, fsq, lfq

SCRIPT = "experiments/compare_quantizers.py"
TINY = f"{VQGAN} --train_steps 3 --perceptual_net none --features pixels --no_amp --quantizers nearest ema"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The results of two quantizers with two seeds each."""
    logs = tmp_path_factory.mktemp("compared")
    call(SCRIPT, f"--logs_root {logs} {TINY} --seeds 2")
    return logs / "compare_quantizers_digits"


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_quantizer_is_measured_with_every_seed(compared):
    results = read_results(compared)
    assert list(results) == ["nearest_0", "ema_0", "nearest_1", "ema_1"]
    for result in results.values():
        assert result["n_images"] == 359 and result["codebook_size"] == 16
        assert result["rfd"] > 0 and result["psnr"] > 0 and result["l1"] > 0 and result["parameters"] > 1000
        assert 1 <= result["perplexity"] <= 16 and 0 < result["codebook_usage"] <= 1
        assert result["bits_per_pixel"] == 16 * 4 / 256 and result["lpips"] is None
        assert 0 < result["seconds_per_step"] < result["seconds"]
    assert len({result["l1"] for result in results.values()}) == 4
    pictures = {path.name for path in compared.glob("*.png")}
    assert pictures == {"comparison.png", *(f"{name}.png" for name in results)}
    settings = yaml.safe_load((compared / "config.yaml").read_text())["origin"]["own_settings"]
    assert settings == {name: VARIANTS[name] for name in ("nearest", "ema")}
    with Image.open(compared / "nearest_0.png") as grid:
        assert grid.size == (16 * 66 + 2, 2 * 66 + 2)


@pytest.mark.slow
def test_an_interrupted_comparison_runs_what_is_missing(compared, capsys):
    """The second run of ema is repeated from the same seed, with the same numbers; the others are unchanged."""
    results = read_results(compared)
    partial = {name: results[name] | {"seconds": 1e6} for name in ("nearest_0", "ema_0", "nearest_1")}
    (compared / "results.json").write_text(json.dumps(partial))
    (compared / "comparison.png").unlink()
    call(SCRIPT, f"--logs_root {compared.parent} {TINY} --seeds 2")
    resumed = read_results(compared)
    assert [resumed[name]["seconds"] for name in partial] == [1e6] * 3
    assert resumed.keys() == results.keys() and (compared / "comparison.png").is_file()
    for name in ("rfd", "psnr", "l1", "perplexity"):
        assert resumed["ema_1"][name] == pytest.approx(results["ema_1"][name], rel=1e-6)
    out = capsys.readouterr().out
    assert "rFD(pixels)" in out and "3 steps of 4 images" in out and "359 validation images" in out


def test_results_are_written_after_each_run(tmp_path, monkeypatch):
    batch_counts = []

    def measure_once(batches, *args):
        if batch_counts:
            raise KeyboardInterrupt
        batch_counts.append(len(list(batches)))
        return {"rfd": 1.0}, None

    monkeypatch.setattr(reconstruction, "summarize_reconstructions", measure_once)
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {tmp_path} {TINY} --log_dir cut")
    assert stop.value.code == 130 and list(read_results(tmp_path / "cut")) == ["nearest_0"]


def test_other_images_or_features_are_another_comparison(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(reconstruction, "summarize_reconstructions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(SCRIPT, f"--logs_root {tmp_path} {TINY} --log_dir old --quantizers nearest")
    origin = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())["origin"]
    assert origin["features_name"] == "pixels" and len(origin["data_fingerprint"]) == 64
    monkeypatch.setattr("experiments.metrics.features.pixels.VERSION", origin["features_version"] + 1)
    (tmp_path / "old" / "results.json").write_text("{}")
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--logs_root {tmp_path} {TINY} --log_dir old --quantizers nearest")
    assert "features_version 1 -> 2" in capfd.readouterr().err


@pytest.mark.slow
def test_other_steps_or_settings_are_another_comparison(compared, capfd):
    """A training run may be continued with more steps; a comparison may not, as its runs had fewer."""
    for flags in ("--train_steps 4", "--beta 0.5"):
        with pytest.raises(SystemExit) as stop:
            call(SCRIPT, f"--logs_root {compared.parent} {TINY} --seeds 2 {flags}")
        assert stop.value.code == 2 and "results of other settings" in capfd.readouterr().err


class Zero(torch.nn.Module):
    def forward(self, images, others):
        return images.flatten(1)[:, 0] * 0


@pytest.mark.parametrize("net", slow_after(1, ["resnet50", "squeeze"]))
def test_lpips_is_measured_with_the_training_network(net, tmp_path, monkeypatch):
    """The logits of resnet50 are another distance."""
    monkeypatch.setattr("vq.perceptual.load_perceptual", lambda net, weights: (net, Zero()))
    flags = TINY.replace("nearest ema", "nearest").replace("--perceptual_net none", f"--perceptual_net {net}")
    call(SCRIPT, f"--logs_root {tmp_path} {flags} --log_dir lpips")
    assert read_results(tmp_path / "lpips")["nearest_0"]["lpips"] == (0.0 if net == "squeeze" else None)


@pytest.mark.slow
def test_the_averaged_weights_are_measured(tmp_path, monkeypatch):
    """With an EMA decay of 1 the measured weights are the initial ones."""
    weights, measure_reconstructions = [], reconstruction.measure_reconstructions

    def record(first, *args):
        weights.append([p.detach().clone() for p in first.vqgan.parameters()])
        return measure_reconstructions(first, *args)

    monkeypatch.setattr(reconstruction, "measure_reconstructions", record)
    monkeypatch.setattr("train.ema.EMA.decay", lambda self, step: 1.0)
    flags = TINY.replace("nearest ema", "nearest")
    call(SCRIPT, f"--logs_root {tmp_path} {flags} --log_dir one")
    call(SCRIPT, f"--logs_root {tmp_path} {flags} --log_dir plain --no_ema")
    call(SCRIPT, f"--logs_root {tmp_path} {flags} --log_dir longer --train_steps 5")
    first, plain, longer = weights
    assert all(torch.equal(a, b) for a, b in zip(first, longer, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, plain, strict=True))


def test_each_quantizer_has_its_own_settings(monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(cli, "run_main", lambda main, config: configs.append(config))
    call(SCRIPT, f"--config {ROOT / 'configs' / 'mnist_quantizers.yaml'} --train_steps 777 --logs_root {tmp_path}")
    (config,) = configs
    vqgans = networks(config.network, config.comparison.quantizers, config.training.train_steps)
    assert list(vqgans) == list(VARIANTS) and set(vqgans) == set(plugin_names("vq.quantizers"))
    for name, network in vqgans.items():
        assert network.quantizer == name and network.codebook_size == 512
        assert type(network.quantizer_config) is load_plugin("vq.quantizers", name, "quantizer").Config
        assert (network.nf, network.ch_mult) == (config.network.nf, config.network.ch_mult)
    widths = {name: network.code_dim for name, network in vqgans.items()}
    assert widths == {"nearest": 32, "ema": 32, "l2": 4, "gumbel": 4, "fsq": 3, "lfq": 9, "ibq": 32}
    options = {name: network.quantizer_config for name, network in vqgans.items()}
    assert options["fsq"].levels(512) == (8, 8, 8)
    assert (options["gumbel"].gumbel_decay_steps, options["gumbel"].gumbel_kl_weight) == (777, 1e-8)
    assert {options[name].entropy_weight for name in ("lfq", "ibq")} == {0.05}


def test_a_flag_that_quantizers_share_reaches_each_of_them(monkeypatch, tmp_path):
    configs = []
    monkeypatch.setattr(cli, "run_main", lambda main, config: configs.append(config))
    flags = "--quantizers ema lfq fsq --beta 0.5 --revive_below 0.2 --fsq_levels 8 8 4 4 --entropy_temperature 1"
    call(SCRIPT, f"{flags} --logs_root {tmp_path}")
    (config,) = configs
    vqgans = networks(config.network, config.comparison.quantizers, config.training.train_steps)
    options = {name: network.quantizer_config for name, network in vqgans.items()}
    assert options["ema"] == ema.Config(beta=0.5, revive_below=0.2)
    assert options["lfq"] == lfq.Config(beta=0.5, entropy_temperature=1.0, entropy_weight=0.05)
    assert options["fsq"] == fsq.Config(fsq_levels=(8, 8, 4, 4))


def test_the_preset_reaches_the_script(monkeypatch, tmp_path):
    flat = parse_config(
        SCRIPT, f"--config {ROOT / 'configs' / 'mnist_quantizers.yaml'} --logs_root {tmp_path}", monkeypatch
    )
    assert flat["dataset"] == "mnist" and (flat["img_size"], flat["n_channels"]) == (32, 1)
    grid = VQGANConfig(ch_mult=tuple(flat["ch_mult"])).grid(32)
    assert grid == (8, 8) and flat["codebook_size"] == 512 and flat["disc_start_step"] > flat["train_steps"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--quantizers nearst", "unknown quantizer 'nearst', did you mean 'nearest'"),
        ("--quantizers ema ema", "each once"),
        ("--seeds 0", "got seeds 0"),
        ("--quantizer ema", "pass --quantizers ema"),
        ("--quantizers lfq --codebook_size 500", "got codebook_size 500 for lfq, wanted a power of 2"),
    ],
)
def test_invalid_flags_are_refused_before_anything_is_read(flags, expected, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {tmp_path} --img_size 16 {flags}")
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    assert expected in " ".join(capfd.readouterr().err.replace("│", " ").split())


def make_result(**numbers):
    result = {"rfd": 2.0, "psnr": 20.0, "l1": 0.1, "codebook_usage": 0.5, "perplexity": 4.0, "bits_per_pixel": 0.25}
    result |= {"entropy_coded_bits_per_pixel": 0.2, "codebook_size": 16, "seconds_per_step": 0.5}
    return result | numbers


def test_the_table_has_means_and_deviations_over_seeds():
    results = {"l2_0": make_result(rfd=1.0, seconds_per_step=1.0), "l2_1": make_result(rfd=3.0, seconds_per_step=2.0)}
    results |= {"l2_2": make_result(rfd=5.0, seconds_per_step=30.0), "lfq_0": make_result(psnr=None)}
    lines = summary(results, ["l2", "lfq"], "FID").splitlines()
    assert "rFID" in lines[0] and len(lines) == 4
    assert "3.000 ± 2.000" in lines[2] and lines[2].split()[1] == "3" and lines[2].endswith("2.000")
    assert "50.0" in lines[2] and "±" not in lines[3]
    assert lines[3].split()[3] == "-"  # no PSNR
    assert format_mean_std([1.0, 2.0], 100, 1) == "150.0 ± 70.7" and format_mean_std([2.0, 2.0], 1, 2) == "2.00"


@pytest.mark.parametrize("quantizers", [["l2"], list(VARIANTS)])
def test_the_plot_is_drawn_of_one_and_of_all(quantizers, tmp_path):
    results = {f"{name}_{seed}": make_result(rfd=seed + i) for seed in (0, 1) for i, name in enumerate(quantizers)}
    plot(tmp_path / "comparison.png", results, quantizers, "FID", "title")
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.size[0] > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_a_metric_left_out_has_no_bar(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (figures.append(self), save(self, *a, **kw)))
    results = {"l2_0": make_result(rfd=None), "ema_0": make_result(rfd=None), "ema_1": make_result(rfd=4.0)}
    plot(tmp_path / "comparison.png", results, ["l2", "ema"], "FID", "title")
    panel = figures[0].axes[0]
    assert [text.get_text() for text in panel.texts] == ["-", "4"]
    assert math.isnan(panel.patches[0].get_width()) and panel.patches[1].get_width() == 4
