"""The command line: precedence, defaults from runs, and error messages."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers.parametrize import slow_after
from helpers.tiny_runs import ROOT, call, parse_config, run
from train.config import DataConfig, TrainingConfig
from train.samplers import ddpm

COMMANDS = {  # as in the docs
    "train_vqgan.py": "--dataset ffhq --log_dir vqgan_ffhq --amp --ema --batch_size 4 --diff_aug",
    "train_sampler.py": (
        "--sampler absorbing --dataset ffhq --log_dir absorbing_ffhq --ae_load_dir vqgan_ffhq --ae_load_step 2200000 "
        "--amp --ema"
    ),
    "experiments/calc_FID.py": (
        "--sampler absorbing --dataset churches --log_dir FID_log --ae_load_dir vqgan_churches --ae_load_step 2200000 "
        "--load_dir absorbing_churches --load_step 2000000 --ema --n_samples 50000 --temp 0.9"
    ),
    "experiments/generate_big_samples.py": (
        "--sampler absorbing --dataset churches --log_dir big --ae_load_dir vqgan_churches --ae_load_step 2200000 "
        "--load_dir absorbing_churches --load_step 2000000 --ema --shape 32 16"
    ),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_the_four_commands_parse(script, monkeypatch, tmp_path):
    config = parse_config(script, f"{COMMANDS[script]} --logs_root {tmp_path}", monkeypatch)
    words = COMMANDS[script].split()
    flag_values = {word.removeprefix("--"): words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    for flag in ("dataset", "log_dir", "ae_load_dir", "load_dir", "sampler"):
        assert str(config.get(flag)) == flag_values.get(flag, str(config.get(flag)))
    assert config["ema"] is True


def test_precedence_is_default_then_file_then_flag(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: digits\nimg_size: 16\nvqgan:\n  lr: 1e-4\n  ch_mult: [1, 2]\n  ema: false\n")
    config = parse_config("train_vqgan.py", f"--config {file} --ch_mult 1 1 1", monkeypatch)
    assert config["lr"] == 1e-4  # PyYAML reads 1e-4 as a string; the flag's parser makes it a number
    assert config["ema"] is False
    assert config["ch_mult"] == [1, 1, 1]
    assert config["weight_decay"] == TrainingConfig.weight_decay
    assert config["shift"] == DataConfig.shift  # an explicit file replaces the preset


def test_a_second_stage_takes_its_data_settings_from_its_vqgan(trained, monkeypatch):
    config = parse_config("train_sampler.py", f"--logs_root {trained}", monkeypatch)
    assert config["img_size"] == 16  # the preset has 32, but the VQGAN was trained at 16


def test_a_samplers_preset_is_read_for_that_sampler(monkeypatch, tmp_path):
    by_itself = parse_config("train_sampler.py", f"--sampler ddpm --logs_root {tmp_path}", monkeypatch)
    path = ROOT / "configs" / "ddpm_digits.yaml"
    assert by_itself == parse_config("train_sampler.py", f"--config {path} --logs_root {tmp_path}", monkeypatch)
    preset = yaml.safe_load(path.read_text())
    for key, value in {**preset, **preset["ddpm"]}.items():
        if not isinstance(value, dict):  # PyYAML reads 1e-3 as a string
            assert by_itself[key] == (float(value) if isinstance(by_itself[key], float) else value)
    other = parse_config("train_sampler.py", f"--logs_root {tmp_path}", monkeypatch)
    assert other["sampler"] == "absorbing" and other["img_size"] == 32 and "channels" not in other
    vqgan = parse_config("train_vqgan.py", f"--logs_root {tmp_path}", monkeypatch)
    assert vqgan["img_size"] == 32  # a script without samplers reads the preset of the data set


def test_a_sampler_without_a_preset_takes_the_data_sets(monkeypatch, tmp_path):
    assert not (ROOT / "configs" / "ddpm_fashion_mnist.yaml").exists()
    config = parse_config(
        "train_sampler.py", f"--sampler ddpm --dataset fashion_mnist --logs_root {tmp_path}", monkeypatch
    )
    assert (config["sampler"], config["n_channels"], config["channels"]) == ("ddpm", 1, ddpm.Config.channels)


def test_a_flag_overrides_the_sampler_of_the_config_file(monkeypatch, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "dataset: digits\nimg_size: 16\nsampler: ddpm\n"
        "ddpm:\n  channels: 24\n  solver: ddim\n  eta: 0.5\n  lr: 3e-4\nabsorbing:\n  temp: 0.7\n  lr: 1e-3\n"
        "get_samples:\n  n_samples: 7\n"
    )
    from_file = parse_config("train_sampler.py", f"--config {file} --logs_root {tmp_path}", monkeypatch)
    assert (from_file["sampler"], from_file["channels"], from_file["lr"]) == ("ddpm", 24, 3e-4)
    assert (from_file["solver"], from_file["eta"]) == ("ddim", 0.5) and "temp" not in from_file
    other = parse_config("train_sampler.py", f"--config {file} --sampler absorbing --logs_root {tmp_path}", monkeypatch)
    assert (other["sampler"], other["temp"], other["lr"]) == ("absorbing", 0.7, 1e-3) and "channels" not in other
    samples = parse_config("experiments/get_samples.py", f"--config {file} --logs_root {tmp_path}", monkeypatch)
    assert (samples["sampler"], samples["n_samples"], samples["solver"]) == ("ddpm", 7, ddpm.Sampling.solver)


def test_experiments_read_sampler_and_data_set_from_the_run(trained_ddpm, monkeypatch):
    flags = f"--logs_root {trained_ddpm} --load_dir ddpm_digits"
    for script in ("experiments/get_samples.py", "experiments/calc_FID.py", "experiments/generate_big_samples.py"):
        config = parse_config(script, f"{flags} --shape 8 8" if "big" in script else flags, monkeypatch)
        assert (config["sampler"], config["dataset"], config["load_dir"]) == ("ddpm", "digits", "ddpm_digits")
        assert config["sample_steps"] == 4 and "eta" in config and "temp" not in config  # as in training
    by_name = parse_config("experiments/get_samples.py", f"--logs_root {trained_ddpm} --sampler ddpm", monkeypatch)
    assert by_name["sample_steps"] == 4
    flags = f"{flags} --sample_steps 9 --solver ddim"
    config = parse_config("experiments/get_samples.py", flags, monkeypatch)
    assert (config["sample_steps"], config["solver"]) == (9, "ddim")


def test_a_run_of_another_sampler_is_refused(trained_ddpm, capfd):
    with pytest.raises(SystemExit) as stop:
        call(
            "experiments/get_samples.py",
            f"--logs_root {trained_ddpm} --load_dir ddpm_digits --sampler absorbing --n_samples 2",
        )
    assert stop.value.code == 2
    assert "was trained with --sampler ddpm, got absorbing" in capfd.readouterr().err


REFUSED = {  # script and flags -> words that the message must contain
    "flag": ("train_vqgan.py", "--lrr 1", ["lrr", "--lr"]),
    "value": ("train_vqgan.py", "--lr fast", ["lr", "fast"]),
    "data set": ("train_vqgan.py", "--dataset ffqh", ["ffqh", "ffhq"]),
    "data path": ("train_vqgan.py", "--dataset folder --data_dir /nowhere/at/all", ["/nowhere/at/all", "--data_dir"]),
    "no data path": ("train_vqgan.py", "--dataset ffhq", ["ffhq", "datasets.yaml", "--data_dir"]),
    "size": ("train_vqgan.py", "--img_size 33", ["33x33", "multiples of 8", "--img_size"]),
    "width": ("train_vqgan.py", "--img_width 33", ["32x33", "multiples of 8"]),
    "no width": ("train_vqgan.py", "--img_width 0", ["img_width 0", "at least 1"]),
    "shift and crops": ("train_vqgan.py", "--crop_margin 4", ["shift 1", "crop_margin 4", "leave one of them out"]),
    "width of the VQGAN": ("train_sampler.py", "--img_width 20", ["img_width 20", "trained with 16", "--img_width"]),
    "quantizer": ("experiments/compare_quantizers.py", "--quantizers nearst", ["nearst", "'nearest'"]),
    "heads": ("train_sampler.py", "--bert_n_head 7", ["bert_n_emb", "192", "7"]),
    "kernel": ("train_sampler.py", "--attention neighborhood --kernel_sizes 4", ["kernel_sizes", "(4,)", "odd"]),
    "window": ("train_sampler.py", "--attention neighborhood --kernel_sizes 5", ["5", "height of 4", "up to 3"]),
    "groups": (
        "train_sampler.py",
        "--attention neighborhood --kernel_sizes 3 3 --dilations 1 1 1",
        ["2", "3", "one for"],
    ),
    "variant": ("experiments/compare_attention.py", "--variants ful", ["ful", "full, neighborhood"]),
    "sampler": ("train_sampler.py", "--sampler absorbin", ["absorbin", "'absorbing'"]),
    "config file": ("train_vqgan.py", "--config nowhere.yaml", ["nowhere.yaml", "NAME.yaml", "digits_captions"]),
    "no run": ("train_sampler.py", "--ae_load_dir nothing", ["nothing", "vqgan_digits"]),
    "step": ("train_sampler.py", "--ae_load_step 7", ["7", "there are 5", "--ae_load_step"]),
    "sampler step": ("experiments/calc_FID.py", "--load_step 9", ["9", "there are 3", "--load_step"]),
    "features": ("experiments/calc_FID.py", "--features inceptoin", ["inceptoin", "inception"]),
    "weights": ("experiments/calc_FID.py", "--inception_weights none.pth", ["none.pth", "not found"]),
    "solver": ("experiments/get_samples.py", "--solver ancestrel --n_samples 2", ["ancestrel", "ancestral"]),
    "steps": ("experiments/get_samples.py", "--sample_steps 0 --n_samples 2", ["0", "at least 1", "--sample_steps"]),
    "temperature": ("experiments/get_samples.py", "--temp -1 --n_samples 2", ["-1", "--temp"]),
    "last temperature": (
        "experiments/get_samples.py",
        "--last_temp -1 --n_samples 2",
        ["-1", "at least 0", "--last_temp"],
    ),
    "top-k": ("experiments/get_samples.py", "--top_k 0 --n_samples 2", ["top_k 0", "--top_k"]),
    "top-p": ("experiments/get_samples.py", "--top_p 1.5 --n_samples 2", ["top_p 1.5", "--top_p"]),
    "schedule of masks": ("train_sampler.py", "--schedule cosin", ["schedule", "cosin", "cosine", "arccos"]),
    "reveals": ("experiments/get_samples.py", "--reveal sine", ["reveal", "sine", "auto", "arccos"]),
    "exact steps": (
        "experiments/get_samples.py",
        "--solver first_hitting --sample_steps 5 --n_samples 2",
        ["first_hitting takes 16 steps", "got 5", "--sample_steps 16"],
    ),
    "a choice for none": (
        "experiments/get_samples.py",
        "--choice_temp 1 --n_samples 2",
        ["choice_temp 1", "ancestral", "leave --choice_temp out"],
    ),
    "remasking for none": (
        "experiments/get_samples.py",
        "--solver halton --remasking cap --n_samples 2",
        ["remasking cap", "halton", "leave --remasking out"],
    ),
    "share of remasking": (
        "experiments/get_samples.py",
        "--solver remask --remask_eta 2 --n_samples 2",
        ["eta 2", "[0, 1]", "--remask_eta"],
    ),
    "choice": (
        "experiments/get_samples.py",
        "--solver confidence --choice_temp -1 --n_samples 2",
        ["-1", "at least 0", "--choice_temp"],
    ),
    "times": ("train_sampler.py", "--total_steps 0", ["total_steps 0", "--total_steps"]),
    "temperature of ddpm": ("train_sampler.py", "--sampler ddpm --temp 0.9", ["--temp"]),
    "ddpm's eta": ("train_sampler.py", "--eta 0.5", ["--eta"]),
    "ddpm's process": (
        "train_sampler.py",
        "--sampler ddpm --process edm --zero_terminal_snr",
        ["zero_terminal_snr", "edm", "leave --zero_terminal_snr out"],
    ),
    "ddpm's word": ("train_sampler.py", "--sampler ddpm --prediction noise", ["prediction", "noise", "eps"]),
    "ddpm's attention": ("train_sampler.py", "--sampler ddpm --attn_factors 8", ["attn_factors", "8", "1, 2, 4"]),
    "small canvas": ("experiments/generate_big_samples.py", "--shape 2 8", ["2", "window of 4", "--shape"]),
}


@pytest.mark.parametrize("case", slow_after(24, REFUSED))
def test_errors_exit_with_code_2_and_a_short_message(case, trained, capfd, tmp_path):
    script, flags, expected = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        call(script, f"{flags} --logs_root {trained} --log_dir {tmp_path.name}")
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message
    assert len(message) < 1200  # the longest lists the presets
    for word in expected:
        assert word in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("vqgan:\n  lrr: 1\n", ["lrr", "'lr'"]),
        ("img_sise: 8\n", ["img_sise", "img_size"]),
        ("vqgna:\n  lr: 1\n", ["vqgna", "vqgan"]),
        ("vqgan:\n  lr: quick\n", ["quick", "mine.yaml"]),
        ("- 1\n", ["list", "key: value"]),
        ("vqgan: 3\n", ["section 'vqgan'", "3", "key: value"]),
        ("a: [\n", ["not a YAML file"]),
    ],
)
def test_an_invalid_config_file_is_named_with_the_nearest_key(content, expected, tmp_path, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        call("train_vqgan.py", f"--config {file} --logs_root {tmp_path}")
    assert stop.value.code == 2
    message = capfd.readouterr().err
    assert all(word in message for word in expected), message


def test_an_empty_section_is_ignored(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text("img_size: 8\nvqgan:\nabsorbing:\ncalc_FID:\n")
    for script in ("train_vqgan.py", "train_sampler.py", "experiments/calc_FID.py"):
        assert parse_config(script, f"--config {file} --logs_root {tmp_path}", monkeypatch)["dataset"] == "digits"


SLOW = ("torch._dynamo", "torchvision", "sklearn", "matplotlib", "tensorboard", "scipy")
PROGRAM = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, script.rpartition("/")[0] or ".")
code = None
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    code = stop.code
print("ended with", code, [name for name in %r if name in sys.modules])
"""


@pytest.mark.parametrize(
    "script, flag, code",
    [
        ("train_vqgan.py", "--help", 0),
        ("train_sampler.py", "--no_such_flag", 2),
        pytest.param("experiments/calc_FID.py", "--help", 0, marks=pytest.mark.slow),
        pytest.param("convert.py", "--no_such_flag", 2, marks=pytest.mark.slow),
    ],
)
def test_help_and_errors_import_nothing_slower_than_torch(script, flag, code):
    command = [sys.executable, "-c", PROGRAM % (SLOW,), script, flag]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stdout.strip().endswith(f"ended with {code} []"), process.stdout[-300:] + process.stderr[-300:]


def test_two_checkouts_in_one_environment_never_mix(tmp_path):
    """Another checkout comes first on the import path, as with an editable install."""
    other = tmp_path / "other"
    (other / "experiments").mkdir(parents=True)
    for name in ("__init__.py", "_root.py"):
        shutil.copy(ROOT / "experiments" / name, other / "experiments")
    for checkout, other_checkout in ((ROOT, other), (other, ROOT)):
        code = f"import sys; sys.path[0] = {str(checkout / 'experiments')!r}\nimport _root, experiments\n"
        variables = {**os.environ, "PYTHONPATH": str(other_checkout)}
        command = [sys.executable, "-c", f"{code}print(experiments.__file__)"]  # as a script there would start
        process = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
        assert process.stdout.strip() == str(checkout / "experiments" / "__init__.py"), process.stderr


def test_scripts_run_from_any_folder_by_path(tmp_path):
    process = run("experiments/calc_FID.py", f"--logs_root {tmp_path}", cwd=tmp_path)
    assert process.returncode == 2
    assert "no run in" in process.stderr and "Traceback" not in process.stderr
