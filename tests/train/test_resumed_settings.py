"""`--log_dir RUN` alone resumes a run: with its settings, wherever it is now, and without running what it names."""

import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import train_sampler
import train_vqgan
from helpers.run_asserts import assert_close, weights
from helpers.tiny_runs import ROOT, call
from models.conditions import metadata, region_words, text
from train.checkpoint import checkpoint_path, saved_steps
from train.cli import parse as cli
from train.config import TrainingConfig
from train.resumed_settings import NOT_TAKEN_OVER, find_code, read_base_settings, read_resumed_settings
from train.samplers import ddpm

OLD = ROOT / "tests" / "fixtures" / "old_runs"
RENAMED = {"network.label.weight": "network.encoders.label.embedding.weight"}  # since these runs


@pytest.fixture
def logs(tmp_path) -> Path:
    """Runs at step 4 that were trained on another machine, in /old/logs."""
    return Path(shutil.copytree(OLD / "runs", tmp_path / "moved"))


def edit(run: Path, **settings) -> Path:
    """Changes settings in a run's config.yaml."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in settings.items():
        next((group for group in content.values() if key in group), content["training"])[key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    return run


def parse(flags: str) -> cli.ParsedConfig:
    """The config of train_sampler.py."""
    base_values = partial(read_base_settings, train_sampler.Config)
    return cli.parse_with_sources(train_sampler.Config, None, flags.split(), base_values, read_resumed_settings)


def error_message(script: str, flags: str, capfd) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("kind", ["vqgan", "absorbing", "ddpm", "latents"])
def test_a_moved_run_goes_on_by_its_folder_alone(kind, logs, monkeypatch):
    """The presets of digits would have other networks, and two of the samplers would be other ones."""
    monkeypatch.chdir(logs)
    script = "train_vqgan.py" if kind == "vqgan" else "train_sampler.py"
    call(script, f"--log_dir ./{kind}_digits --train_steps 8")
    run = logs / f"{kind}_digits"
    assert saved_steps(run) == [4, 8]
    later = {
        name.partition(".")[2]: value
        for name, value in load_file(OLD / "later.safetensors").items()
        if name.partition(".")[0] == kind
    }
    assert_close({RENAMED.get(name, name): value for name, value in later.items()}, weights(run, 8), rtol=1e-4)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["training"]["train_steps"] == 8 and config["training"]["lr"] == 1e-3


def test_settings_come_from_preset_run_config_and_flags(logs, tmp_path):
    run = edit(logs / "ddpm_digits", lr=0.5, seed=3, weight_decay=0.5, steps_per_log=3)
    file = tmp_path / "mine.yaml"
    file.write_text("ddpm:\n  seed: 4\n  weight_decay: 0.25\n")
    parsed = parse(f"--log_dir {run} --config {file} --weight_decay 0.125 --no_ema")
    training = parsed.config.training
    assert (training.lr, training.seed, training.weight_decay, training.ema) == (0.5, 4, 0.125, False)
    assert parsed.config.sampler.sampler == "ddpm" and parsed.config.logging.logs_root == cli.LoggingConfig.logs_root
    expected = {"lr": "run", "seed": "config", "weight_decay": "flag", "ema": "flag", "device": "default"}
    assert {key: parsed.sources[key] for key in expected} == expected
    parsed = parse("--sampler ddpm --seed=1")
    expected = {"lr": "preset", "seed": "flag", "warmup_iters": "preset", "compile": "default"}
    assert {key: parsed.sources[key] for key in expected} == expected


def test_what_belongs_to_one_start_or_machine_is_not_taken_over(logs):
    own = {"device": "cuda", "resume": "never", "change": ["lr"], "profile": True, "log_dir": "old"}
    run = edit(logs / "ddpm_digits", **own, logs_root="/old", compile=True)
    config = parse(f"--log_dir {run}").config
    training, logging = config.training, config.logging
    assert (training.device, training.resume, training.change, logging.profile) == ("auto", "auto", (), False)
    assert training.compile and logging.log_dir == str(run) and logging.logs_root != "/old"
    assert own.keys() | {"logs_root"} == NOT_TAKEN_OVER.keys()
    text = (ROOT / "docs" / "training.md").read_text()
    (section,) = re.findall(r"### Settings of a resumed run\n(.*?)\n### ", text, re.S)
    assert {f"`--{key}`" for key in NOT_TAKEN_OVER} <= {*re.findall(r"`--\w+`", section)}


def test_a_folder_without_a_checkpoint_is_not_read(logs):
    shutil.rmtree(logs / "ddpm_digits" / "checkpoints")
    (logs / "ddpm_digits" / "config.yaml").write_text("[")
    config = parse(f"--log_dir {logs / 'ddpm_digits'}").config
    assert config.sampler.sampler == "absorbing" and config.training.lr == 1e-3  # the preset of digits


def test_a_branch_starts_with_the_settings_of_its_source(logs):
    edit(logs / "ddpm_digits", lr=0.5)
    path = checkpoint_path(logs / "ddpm_digits", 4)
    config = parse(f"--logs_root {logs} --log_dir new --resume {path} --seed 3").config
    assert (config.sampler.sampler, config.training.lr, config.training.seed) == ("ddpm", 0.5, 3)
    assert config.training.resume == str(path) and config.logging.log_dir == "new"
    edit(logs / "ddpm_digits", reader="folder", load_dir="gone", data_dir="/digits")
    config = parse(f"--logs_root {logs} --log_dir new --resume {path} --dataset cifar10 --data_dir /cifar10").config
    assert type(config.reader).__module__.endswith("cifar10") and config.data.reader != "folder"
    assert (config.reader.data_dir, config.training.load_dir) == ("/cifar10", None)


def test_the_vqgan_is_found_beside_the_run_or_where_it_was(logs, tmp_path):
    run = logs / "latents_digits"
    first = parse(f"--log_dir {run}").config.first
    assert (first.ae_load_dir, first.ae_load_step) == (str(logs / "vqgan_digits"), 4)
    (tmp_path / "elsewhere").mkdir()
    run = run.rename(tmp_path / "elsewhere" / "latents")
    assert parse(f"--log_dir {run} --logs_root {logs}").config.first == first
    assert parse(f"--log_dir {run} --ae_load_dir here").config.first.ae_load_dir == "here"


def test_another_solver_has_its_own_settings(logs):
    run = edit(logs / "ddpm_digits", solver="ddim", sample_steps=7, eta=0.5, guidance=3.0)
    same, other = parse(f"--log_dir {run}").config, parse(f"--log_dir {run} --solver heun").config
    assert (same.sampling.sample_steps, same.sampling.eta, same.sampling.guidance) == (7, 0.5, 3.0)
    assert other.sampling.sample_steps != 7 and other.sampling.eta is None and other.sampling.guidance == 3.0


def test_a_file_counts_in_the_section_of_the_run_found(logs, tmp_path):
    """Also if no sampler is typed: `absorbing`, the default, is not that of the run."""
    run = edit(logs / "ddpm_digits", solver="ddim", sample_steps=7, eta=0.5)
    file = tmp_path / "mine.yaml"
    file.write_text("ddpm: {solver: heun}\n")
    sampling = parse(f"--log_dir {run} --config {file}").config.sampling
    assert (sampling.solver, sampling.sample_steps, sampling.eta) == ("heun", None, None)
    file.write_text("absorbing: {ae_load_dir: other}\n")
    first = parse(f"--log_dir {logs / 'latents_digits'} --config {file}").config.first
    assert (first.ae_load_dir, first.ae_load_step) == (str(logs / "vqgan_digits"), 4)


def test_resume_in_a_file_is_read(logs, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"sampler: ddpm\nddpm: {{resume: {checkpoint_path(logs / 'ddpm_digits', 4)}}}\n")
    parsed = parse(f"--logs_root {logs} --log_dir new --config {file}")
    assert parsed.config.training.lr == 1e-3 and parsed.sources["channels"] == "run"


def test_another_reader_or_quantizer_has_its_own_settings(logs, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    run = edit(logs / "ddpm_digits", dataset="birds", reader="folder", data_dir="/birds", label_from="folder")
    reader = parse(f"--log_dir {run} --reader webdataset").config.reader
    assert (reader.data_dir, reader.label_from) == ("/birds", "none")
    run = edit(logs / "vqgan_digits", quantizer="ema", beta=0.125, emb_dim=32)
    for quantizer, beta, emb_dim in (("ema", 0.125, 32), ("nearest", 0.25, None)):
        words = ["--log_dir", str(run), "--quantizer", quantizer]
        parsed = cli.parse_with_sources(train_vqgan.Config, "vqgan", words, None, read_resumed_settings)
        network = parsed.config.network
        assert (network.quantizer_config.beta, network.emb_dim) == (beta, emb_dim)


def test_weights_that_fit_are_trained_with_their_settings(logs, capfd):
    """The command that the refusal of another network names is true as it is printed."""
    run = edit(logs / "ddpm_digits", seed=3)
    message = error_message("train_sampler.py", f"--log_dir {run} --channels 8", capfd)
    (flags,) = re.findall(r"in a new folder with (--load_dir .* --load_partial --log_dir NEW)", message)
    for sampler in ("", "--sampler ddpm"):
        config = parse(f"--logs_root {logs} {flags} {sampler} --channels 8").config
        assert (config.sampler.sampler, config.data.img_size, config.training.seed) == ("ddpm", 8, 3)
        assert (config.sampler.channels, config.sampler.channel_mults) == (8, (1.0, 2.0))
        assert config.training.load_dir == str(run) and config.training.load_partial
    for other in ("--sampler absorbing", "--dataset mnist"):
        assert parse(f"--logs_root {logs} {flags} {other}").config.training.seed == 0


def test_a_run_begins_with_the_network_and_data_of_another(logs):
    base = edit(logs / "ddpm_digits", lr=0.5, seed=3, schedule="cosine", shift=1, solver="ddim", guidance=3.0)
    parsed = parse(f"--logs_root {logs} --load_dir ddpm_digits --lora_rank 2")
    config, source = parsed.config, parse(f"--log_dir {base}").config
    assert (config.sampler, config.data, config.reader) == (source.sampler, source.data, source.reader)
    assert config.sampler.schedule == "cosine" and config.data.shift == 1
    assert (config.training.seed, config.sampling.guidance) == (0, 1.0) and config.training.lr != 0.5
    assert config.run == logs / "ddpm_digits_tuned" and parsed.sources["channels"] == "earlier stage"
    assert parse(f"--logs_root {logs} --load_dir ddpm_digits --log_dir mine").config.run == logs / "mine"


def test_typed_settings_and_files_win_over_those_of_the_base(logs, tmp_path):
    edit(logs / "ddpm_digits", schedule="cosine", dropout=0.5, shift=1)
    file = tmp_path / "mine.yaml"
    file.write_text("ddpm: {dropout: 0.25, load_dir: ddpm_digits}\n")
    config = parse(f"--logs_root {logs} --sampler ddpm --config {file} --img_size 16").config
    assert (config.sampler.schedule, config.sampler.dropout) == ("cosine", 0.25)
    assert (config.data.img_size, config.data.shift, config.sampler.channels) == (16, 1, 4)


def test_data_that_are_given_are_not_those_of_the_base(logs):
    """But for their size, where no preset gives it: that of digits does."""
    edit(logs / "ddpm_digits", schedule="cosine", shift=1, img_size=24, n_channels=4, data_dir="/old")
    for dataset, size, channels in (("digits", 16, 1), ("folder", 24, 4)):
        config = parse(f"--logs_root {logs} --load_dir ddpm_digits --dataset {dataset}").config
        assert (config.data.img_size, config.data.n_channels) == (size, channels)
        assert config.reader.data_dir is None and config.sampler.schedule == "cosine"
        assert config.data.dataset == dataset and (dataset == "digits" or config.data.shift == 0)


def test_names_of_classes_are_those_of_the_data_that_are_given(logs):
    run = logs / "ddpm_digits"
    content = yaml.safe_load((run / "config.yaml").read_text())
    words = {"names": ["road", "car"], "classes": ["road", "car"], "stuff": [0], "mode": "things"}
    content["sampler"] |= {f"region_words_{name}": value for name, value in words.items()}
    content["sampler"] |= {"conditions": ["region_words"], "attn_block_type": "transformer"}
    content["sampler"]["experts"] = ["1", "0"]
    content["data"]["dataset"] = "panoptic_folder"
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    for flags, names, stuff in (("", ("road", "car"), (0,)), ("--dataset shapes", (), ())):
        sampler = parse(f"--logs_root {logs} --load_dir ddpm_digits {flags}").config.sampler
        options = sampler.condition_options
        assert sampler.experts == (("car", "road") if flags else ("1", "0"))
        assert (options.region_words_names, options.region_words_classes) == (names, names)
        assert (options.region_words_stuff, options.region_words_mode) == (stuff, "things")


def test_the_first_stage_is_that_of_the_base(logs):
    edit(logs / "vqgan_digits", img_size=24)
    own = (str(logs / "vqgan_digits"), 4)
    for flags, stage, size in (("", own, 16), ("--dataset folder", own, 24), ("--ae_load_dir x", ("x", None), 16)):
        config = parse(f"--logs_root {logs} --load_dir latents_digits {flags}").config
        assert (config.first.ae_load_dir, config.first.ae_load_step) == stage
        assert config.data.img_size == size and config.sampler.sampler == "ddpm"


def test_other_samplers_and_partial_loads_take_nothing_over(logs, tmp_path):
    edit(logs / "ddpm_digits", schedule="cosine", img_size=8)
    for flags in ("--sampler absorbing", "--load_partial --dataset folder"):
        config = parse(f"--logs_root {logs} --load_dir ddpm_digits {flags}").config
        assert config.data.img_size != 8 and getattr(config.sampler, "schedule", "") != "cosine"
    adapters = "--load_partial --lora_rank 2 --dataset folder"  # what they are added to is the network of the base
    config = parse(f"--logs_root {logs} --load_dir ddpm_digits {adapters}").config
    assert config.data.img_size == 8 and config.sampler.schedule == "cosine" and config.training.load_partial
    (file := tmp_path / "mine.yaml").write_text("dataset: folder\nddpm: {lora_rank: 2}\n")
    config = parse(f"--logs_root {logs} --load_dir ddpm_digits --sampler ddpm --config {file} --load_partial").config
    assert config.data.img_size == 8 and config.sampler.schedule == "cosine"


def test_code_of_the_base_must_be_given_again(logs, tmp_path, monkeypatch, capfd):
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(logs / "ddpm_digits", adapt="canary.adapt", res_block_type="canary.run")
    message = error_message("train_sampler.py", f"--logs_root {logs} --load_dir ddpm_digits", capfd)
    assert (
        f"{logs / 'ddpm_digits'} was trained with --res_block_type canary.run, which is code: pass it again" in message
    )
    assert parse(f"--logs_root {logs} --load_dir ddpm_digits --res_block_type canary.run").config.sampler.adapt == ""


def test_a_misspelled_run_is_not_begun(logs, tmp_path, capfd):
    flags = f"--logs_root {logs} --train_steps 9 --device cpu --log_dir"
    message = error_message("train_sampler.py", f"{flags} ddpm_digts", capfd)
    assert f"no run {logs / 'ddpm_digts'}, did you mean 'ddpm_digits'?" in message
    for accepted in ("ddpm_digts --sampler ddpm", "ddpm_digts --seed 1", "ddpm_digts --resume never", "quite_new"):
        assert parse(f"{flags} {accepted}").config.training.train_steps == 9


def test_a_run_without_a_group_has_its_defaults(logs):
    path = logs / "ddpm_digits" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    del content["logging"], content["first"]
    path.write_text(yaml.safe_dump(content))
    config = parse(f"--log_dir {path.parent}").config
    assert (config.sampler.sampler, config.sampler.channels, config.logging.keep_last) == ("ddpm", 4, 3)


def test_runs_of_other_scripts_and_results_are_refused(logs, capfd):
    message = error_message("train_vqgan.py", f"--log_dir {logs / 'ddpm_digits'}", capfd)
    assert "ddpm_digits is a run of another script (its config.yaml has no network)" in message
    message = error_message("train_sampler.py", f"--log_dir {logs / 'vqgan_digits'}", capfd)
    assert "vqgan_digits is a run of another script (its config.yaml has no sampler)" in message
    (logs / "results").mkdir()
    shutil.rmtree(logs / "vqgan_digits")
    (logs / "results" / "config.yaml").write_text("samples: {n_samples: 3}\n")
    for script in ("train_vqgan.py", "train_sampler.py"):  # of codes, without a VQGAN here
        message = error_message(script, f"--logs_root {logs} --log_dir results", capfd)
        assert message.endswith("results holds results: pass another --log_dir")
    message = error_message("train_sampler.py", f"--log_dir {logs / 'ddpm_digits'} --sampler absorbing", capfd)
    assert message.endswith("was trained with --sampler ddpm, got absorbing: pass that, or another --log_dir")


def test_data_that_moved_are_named(logs, capfd):
    run = edit(logs / "ddpm_digits", dataset="folder", data_dir="/old/images")
    message = error_message("train_sampler.py", f"--log_dir {run}", capfd)
    assert "/old/images" in message and "--data_dir" in message


# code


CODE = {  # by group and key
    ("sampler", "adapt"): "canary.run",
    ("sampler", "res_block_type"): "canary.run",
    ("sampler", "attn_block_type"): "canary.run",
    ("training", "optimizer"): "canary.run",
    ("reader", "data_dir"): "{p..p}ipe:touch 'it ran'",
}


def test_code_of_a_run_must_be_given_again(logs, tmp_path, monkeypatch, capfd):
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for (group, key), code in CODE.items():
        run = Path(shutil.copytree(logs / "ddpm_digits", logs / key))
        edit(run, **{key: code}, dataset="webdataset" if key == "data_dir" else "digits")
        message = error_message("train_sampler.py", f"--log_dir {run}", capfd)
        assert f"{run} was trained with --{key} " in message and message.endswith("is code: pass it again to run it")
        words = ["--log_dir", str(run), f"--{key}", code]
        parsed = cli.parse_with_sources(train_sampler.Config, None, words, None, read_resumed_settings)
        assert cli.to_dict(parsed.config)[group][key] == code
    assert not (tmp_path / "it ran").exists() and "canary" not in sys.modules


def test_hooks_of_a_run_are_left_out_with_a_message(logs, capsys):
    run = edit(logs / "ddpm_digits", hooks=["canary.run", "canary.Walk"])
    assert parse(f"--log_dir {run}").config.training.hooks == ()
    assert "without --hooks canary.run canary.Walk" in capsys.readouterr().out
    assert parse(f"--log_dir {run} --hooks canary.run").config.training.hooks == ("canary.run",)
    assert capsys.readouterr().out == ""


def test_every_flag_that_takes_a_dotted_path_is_code():
    files = [ROOT / "train" / "config.py", *(ROOT / "train" / "samplers").glob("*.py"), ROOT / "vq" / "config.py"]
    pattern = r'^    (\w+): [^\n]*\n    """[^"]*dotted path'
    flags = {flag for path in files for flag in re.findall(pattern, path.read_text(), re.M | re.I)}
    assert {"adapt", "optimizer", "hooks"} <= flags
    sampler = ddpm.Config(**dict.fromkeys(flags & cli.flag_names(ddpm.Config), "my.Own"))
    training = TrainingConfig(optimizer="my.Own", hooks=("my.Own",))
    assert find_code([sampler, training, ddpm.Config(), TrainingConfig()]).keys() == flags


def test_files_and_values_of_conditions_are_no_code():
    words = dict.fromkeys(("region_words_names", "region_words_classes"), ("St. Bernard", "sky"))
    for module, options in (
        (text, text.Config(text_encoder="my.safetensors")),
        (metadata, metadata.Config(metadata_values=("lens=f1.8", "lens=f2.0"))),
        (region_words, region_words.Config(region_words_everywhere="in the zoo of St. Gallen.", **words)),
    ):
        name = module.__name__.rpartition(".")[2]
        named = {"conditions": (name,), "condition_options": options, "experts": ("St. Bernard", "sky")}
        sampler = ddpm.Config(**named, attn_block_type="my.Own")
        assert find_code([sampler]).keys() == {"attn_block_type"}
