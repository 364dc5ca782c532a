"""The benchmark of presets: what it runs, counts and prints, independently of the measured times."""

import re
import sys

import pytest
import torch

from experiments.metrics import speed_report, throughput, workloads
from experiments.metrics.speed_results import Figures
from helpers.tiny_runs import ROOT, call, parse_config
from train.cli import parse as cli
from train.config import DataConfig, FineTuningConfig
from train.execution import has_native_bf16
from vq.config import VQGANConfig

SCRIPT = "experiments/benchmark.py"
CPU = torch.device("cpu")
HALVES = ["bfloat16"] * has_native_bf16(CPU)
TINY = """
dataset: digits
img_size: 16
n_channels: 1
vqgan:
  nf: 4
  ch_mult: [1, 2, 2]
  emb_dim: 4
  codebook_size: 16
  attn_resolutions: []
  ndf: 4
  disc_layers: 1
  disc_start_step: 3
  diff_aug: true
  perceptual_net: none
  batch_size: 4
  steps_per_eval: 10
absorbing:
  bert_n_emb: 16
  bert_n_head: 2
  bert_n_layers: 2
  batch_size: 4
  guidance: 1.5
  sample_steps: 3
  log_dir: mine
ddpm:
  channels: 8
  channel_mults: [1, 2]
  res_blocks: 1
  attn_factors: [2]
  heads: 1
  batch_size: 4
  sample_steps: 3
"""


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return f"--config {path} --device cpu --logs_root {tmp_path / 'logs'} --repeats 1"


@pytest.fixture
def run_benchmark(preset, tmp_path, capsys, monkeypatch):
    """The output of the script, and the rows of its table as lists of cells; nothing is written."""
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(throughput, "peak_extra_bytes", lambda run, device: None)

    def read(flags):
        call(SCRIPT, f"{preset} {flags}")
        out = capsys.readouterr().out
        assert not (tmp_path / "logs").exists()
        lines = out.splitlines()
        start = next((i for i, line in enumerate(lines) if line.startswith("---")), 0)
        table = [re.split(r"  +", line) for line in lines[start - 1 : lines.index("", start)]] if start else []
        return out, table

    return read


def test_code_sampler_has_a_row_per_precision_and_other_lines(run_benchmark):
    out, (heading, _, *rows) = run_benchmark("")
    assert heading == [
        *("training step", "median s", "min s", "max s", "speedup", "images/s", "tokens/s"),
        *("TFLOP", "TFLOP/s", "% of peak", "peak extra MiB", "launches"),
    ]
    assert [row[0] for row in rows] == ["float32", *HALVES]
    for row in rows:
        assert (
            len(row) == len(heading)
            and re.fullmatch(r"[\d.]+x", row[4])
            and re.fullmatch(r"[\d.]+", row[9])
            and row[10] == "-"
            and int(row[11]) > 100
        )
    assert "absorbing on digits: 4 images of 1x16x16 per step" in out
    assert "peak (fastest matrix product measured here in float32): 1 TFLOP/s" in out
    cost = r"3 network calls per batch, [\d.]+ evaluations per image, \d+ launches"
    assert re.search(rf"^sampling with ancestral, {rows[-1][0]}, batch of 4: .*, {cost}$", out, re.M)
    assert len(re.findall("^decoding, .* batch of 4: .* images/s$", out, re.M)) == 1 + len(HALVES)
    assert re.search(r"^baseline, 256 float32 steps that evaluate every grid: .* s \(256 x .* s, ", out, re.M)
    assert re.search(r"^speedup of sampling over the baseline: [\d.]+x, with decoding [\d.]+x$", out, re.M)
    assert re.search(r"^loading codes in the main process: .* times what the fastest training step consumes", out, re.M)


def test_vqgan_has_a_row_per_discriminator_phase(run_benchmark):
    out, (heading, _, *rows) = run_benchmark("--stage vqgan")
    assert "tokens/s" not in heading
    kinds = ["no discriminator", "discriminator"]
    assert [row[0] for row in rows] == [f"{name}, {kind}" for name in ["float32", *HALVES] for kind in kinds]
    assert re.search(r"^autoencoder: [\d,]+ parameters$", out, re.M) and re.search("^discriminator: ", out, re.M)
    assert re.search("^encoding, .* batch of 4: .* images/s$", out, re.M) and re.search("^decoding, ", out, re.M)
    assert re.search("^loading images in the main process: ", out, re.M)
    out, table = run_benchmark("--stage vqgan --train_steps 3 --measure loading --no_amp")
    assert not table and "--disc_start_step 3 plus --disc_warmup_steps 0 is not below --train_steps" in out


def test_pixel_sampler_reports_the_nfe_of_its_solver(run_benchmark):
    for solver, calls in {"dpmpp_2m": 3, "heun": 5}.items():  # heun's last step is an Euler step
        out, table = run_benchmark(f"--sampler ddpm --solver {solver} --measure sampling --no_amp")
        cost = f"{calls} network calls per batch, {calls} evaluations per image, "
        assert re.search(rf"^sampling with {solver}, float32, .* {cost}\d+ launches$", out, re.M)
        assert not table and "loading" not in out and "decoding" not in out and "baseline" not in out


@pytest.mark.skipif(not HALVES, reason="this machine has no native half precision")
def test_the_baseline_is_in_float32_and_sampling_is_not(run_benchmark, monkeypatch):
    times = {"float32": [50.0], "bfloat16": [1.0]}
    monkeypatch.setattr(speed_report, "time_repeatedly", lambda run, repeats, device: [2.0])
    monkeypatch.setattr(speed_report, "time_full_steps", lambda trainee, *args: times[trainee.name])
    monkeypatch.setattr(speed_report, "time_decoding", lambda trainee, *args: times[trainee.name])
    out, _ = run_benchmark("--measure sampling --full_steps 10")
    assert "speedup of sampling over the baseline: 250x, with decoding 183x" in out  # 500 / 2 and 550 / 3


def test_the_baseline_is_optional_and_for_absorbing_only(run_benchmark):
    out, _ = run_benchmark("--measure sampling --full_steps 0 --solver halton --no_amp")
    assert "sampling with halton, float32" in out and "baseline" not in out
    out, _ = run_benchmark("--measure sampling --full_steps 10 --solver confidence --choice_temp 1 --no_amp")
    assert "baseline, 10 float32 steps" in out
    out, _ = run_benchmark(
        "--measure sampling --sampler autoregressive --bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1"
    )
    assert "sampling with raster" in out and "baseline" not in out


@pytest.mark.parametrize("sampler, solver", [("absorbing", "halton"), ("ddpm", "unipc")])
def test_the_loop_of_every_solver_has_a_row(run_benchmark, monkeypatch, sampler, solver):
    monkeypatch.setattr(workloads, "LOOP_STEPS", 3)
    out, (heading, _, *rows) = run_benchmark(f"--sampler {sampler} --measure solver_loop --batch_size 1 --no_amp")
    assert heading == ["workload", "ms between network calls", "ms of set-up", "launches"]
    assert "solver loops, batch of 1, apart from the network:" in out
    names = {f"solver loop, {solver}", f"solver loop, {solver}, guided"}
    assert names <= {row[0] for row in rows} and "sampling with" not in out
    assert all(float(row[1]) > 0 and float(row[2]) > 0 and float(row[3]) > 9 for row in rows)


def test_two_runs_are_compared_workload_by_workload(run_benchmark, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    run_benchmark(f"--measure step sampling loading --no_amp --full_steps 1 --out {first}")
    out, _ = run_benchmark(f"--measure step loading --no_amp --batch_size 2 --against {first} --out {second}")
    before, after = Figures.read(first), Figures.read(second)
    assert [row["workload"] for row in before.rows] == [
        *("step, float32", "sampling with ancestral, float32", "decoding, float32", "full step, float32"),
        "loading codes",
    ]
    assert before.threads == torch.get_num_threads() and before.torch == torch.__version__
    compared = out.partition(f"against {first}:")[2].splitlines()
    cells = [re.split(r"  +", line) for line in compared]
    assert [row[0] for row in cells[3:5]] == ["step, float32", "loading codes"]
    old, new = (figures.rows[0] for figures in (before, after))
    ratio, launches = cells[3][3:5]
    assert ratio == f"{old['seconds'] / new['seconds']:.2f}x"
    assert launches == f"{old['launches']} -> {new['launches']}"  # random numbers are drawn image by image
    assert compared[5] == "only before: sampling with ancestral, float32; decoding, float32; full step, float32"
    assert compared[6] == "other settings: --batch_size 4 -> 2, --full_steps 1 -> 256"


def test_nonsquare_images_are_timed_at_their_size(run_benchmark):
    for flags in ("--measure sampling loading", "--stage vqgan --measure sampling loading"):
        out, _ = run_benchmark(f"{flags} --img_width 24 --crop_margin 2 --no_amp")
        assert "on digits: 4 images of 1x16x24 per step" in out


def test_latents_use_the_vqgan_of_the_file_without_reading_a_run(run_benchmark):
    out, (heading, *_) = run_benchmark("--sampler ddpm --ae_load_dir no_such_run --measure step sampling")
    assert "tokens/s" not in heading and "3 network calls" in out and "decoding, float32" in out


def test_missing_data_are_reported_in_one_line(run_benchmark, tmp_path):
    flags = f"--sampler ddpm --dataset mnist --reader mnist --data_dir {tmp_path / 'nowhere'} --no_amp"
    out, table = run_benchmark(f"{flags} --measure step loading")
    assert len(table) == 3
    (line,) = re.findall("^loading .*$", out, re.M)
    assert line.startswith("loading skipped: ") and "nowhere" in line
    # guidance between classes, although the data set is missing
    out, _ = run_benchmark(f"{flags} --guidance 2 --measure sampling")
    assert "6 evaluations per image" in out


REFUSED = {  # flags -> words that the message must contain
    "--repeats 0": ["repeats 0", "--repeats"],
    "--full_steps -1": ["full_steps -1", "--full_steps"],
    "--measure stepp": ["stepp", "sampling"],
    "--measure": ["--measure"],
    "--accumulate 3": ["batch_size 4", "3 micro-batches"],
    "--stage vqgn": ["vqgn", "vqgan"],
    "--img_size 18": ["18x18", "multiples of 4"],
    "--out nowhere/at/all.json": ["nowhere/at/all.json", "create it"],
    "--against nowhere.json": ["nowhere.json"],
    "--stage vqgan --measure solver_loop": ["solver_loop", "no solver"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_flags_give_exit_code_2_and_a_short_message(flags, preset, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"{preset} {flags}")
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message and len(message) < 900
    assert all(word in message for word in REFUSED[flags]), message


def test_stage_in_a_config_file_is_refused(tmp_path, capfd):
    (tmp_path / "mine.yaml").write_text("absorbing:\n  stage: vqgan\n")
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--config {tmp_path / 'mine.yaml'} --device cpu")
    assert "pass --stage on the command line" in capfd.readouterr().err


@pytest.mark.parametrize("preset", ["ffhq", "ddpm_latent_ffhq"])
def test_presets_are_read_as_by_the_training_scripts(preset, monkeypatch, tmp_path):
    flags = f"--config {ROOT / 'configs' / preset}.yaml --batch_size 4 --logs_root {tmp_path}"
    ours = parse_config(SCRIPT, flags, monkeypatch)
    theirs = parse_config("train_sampler.py", flags, monkeypatch)
    tuning = cli.flag_names(FineTuningConfig)  # of loaded networks, which a benchmark has not
    assert {key: value for key, value in theirs.items() if key not in tuning}.items() <= ours.items()
    assert preset != "ffhq" or (ours["bert_n_layers"], ours["bert_n_emb"]) == (24, 512)
    theirs = parse_config("train_vqgan.py", flags, monkeypatch)
    ours = parse_config(SCRIPT, f"--stage vqgan {flags}", monkeypatch)
    assert {key for key in theirs if ours[key] != theirs[key]} <= {"lr", "train_steps"}  # its own defaults


def script_namespace(monkeypatch):
    import runpy

    monkeypatch.setattr(cli, "run_script", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")


def test_the_vqgan_config_comes_from_the_file_or_the_preset(monkeypatch, tmp_path):
    vqgan_config_of = script_namespace(monkeypatch)["vqgan_config_of"]
    with_vqgan, without = tmp_path / "own.yaml", tmp_path / "without.yaml"
    with_vqgan.write_text("dataset: mnist\nvqgan:\n  codebook_size: 77\n")
    without.write_text("dataset: mnist\nabsorbing:\n  bert_n_layers: 3\n")
    mnist = DataConfig(dataset="mnist")
    assert vqgan_config_of(mnist, ["--config", str(with_vqgan)]).codebook_size == 77
    assert vqgan_config_of(mnist, [f"--config={without}"]).codebook_size == 128  # configs/mnist.yaml
    assert vqgan_config_of(mnist, []).ch_mult == (1, 2, 4)
    assert vqgan_config_of(DataConfig(dataset="folder"), ["--config", str(with_vqgan)]).codebook_size == 77
    assert vqgan_config_of(DataConfig(dataset="folder"), []) == VQGANConfig()
