"""Config files and flags: what is parsed, what is refused, and how a script exits."""

import dataclasses
import errno

import pytest
import torch
import yaml

from helpers.tiny_runs import call, parse_config
from train.cli import files as config_files
from train.cli import parse as cli
from train.config import DataConfig
from train.datasets.digits import Config as Digits
from train.first_stage import StoredVQGANConfig
from train.samplers import absorbing, ddpm
from vq.config import VQGANConfig

READ = {  # text of a file, and the key and value that train_vqgan.py reads
    "a float that is whole": ("vqgan:\n  train_steps: 1e6\n", "train_steps", 1_000_000),
    "no float that YAML knows": ("vqgan:\n  lr: 1e-4\n", "lr", 1e-4),
    "a quoted number": ("vqgan:\n  nf: '16'\n", "nf", 16),
    "no octal number": ("vqgan:\n  seed: 010\n", "seed", 10),
    "a name of digits": ("vqgan:\n  log_dir: 007\n", "log_dir", "007"),
    "a name with a point": ("vqgan:\n  log_dir: 1.10\n", "log_dir", "1.10"),
    "a name that is a date": ("vqgan:\n  log_dir: 2024-13-45\n", "log_dir", "2024-13-45"),
    "a name that means true": ("vqgan:\n  log_dir: yes\n", "log_dir", "yes"),
    "a name like a flag": ("vqgan:\n  log_dir: --help\n", "log_dir", "--help"),
    "a name with an equals sign": ("vqgan:\n  log_dir: a=b\n", "log_dir", "a=b"),
    "a switch": ("vqgan:\n  ema: off\n", "ema", False),
    "nothing, where that is a value": ("vqgan:\n  log_dir:\n", "log_dir", None),
    "one number for a list": ("vqgan:\n  attn_resolutions: 8\n", "attn_resolutions", [8]),
    "an empty list": ("vqgan:\n  attn_resolutions: []\n", "attn_resolutions", []),
    "a section goes above the top": ("vqgan:\n  img_size: 16\nimg_size: 32\n", "img_size", 16),
    "a data set in the section": ("vqgan:\n  dataset: fashion_mnist\n", "dataset", "fashion_mnist"),
    "a byte order mark": ("\ufeffimg_size: 16\n", "img_size", 16),
    "a merge": ("absorbing: &a\n  seed: 5\n  lr: 1\nvqgan:\n  <<: *a\n  lr: 2\n", "seed", 5),
    "a tag that fits": ("vqgan:\n  lr: !!float 1e-3\n", "lr", 1e-3),
}
REFUSED = {  # text of a file -> words in the message
    "a word for a number": ("vqgan:\n  lr: yes\n", ["lr", "yes", "number"]),
    "nan": ("vqgan:\n  lr: .nan\n", ["lr", ".nan", "finite"]),
    "nan as Python says it": ("vqgan:\n  lr: nan\n", ["lr", "nan", "finite"]),
    "inf": ("vqgan:\n  lr: inf\n", ["lr", "inf", "finite"]),
    "too large": ("vqgan:\n  lr: 1e400\n", ["lr", "1e400", "finite"]),
    "too large for a tensor": ("vqgan:\n  seed: 99999999999999999999\n", ["seed", "whole number"]),
    "no whole number": ("vqgan:\n  train_steps: 1.5\n", ["train_steps", "1.5", "whole number"]),
    "nothing for a number": ("vqgan:\n  lr:\n", ["lr", "None", "number"]),
    "nothing for a word": ("vqgan:\n  logs_root: null\n", ["logs_root", "None", "word"]),
    "nothing for data": ("img_size:\n", ["img_size", "None", "whole number"]),
    "a list in a word": ("vqgan:\n  ch_mult: 1 2 2\n", ["ch_mult", "1 2 2", "[1, 2]"]),
    "a list for one": ("vqgan:\n  nf: [1, 2]\n", ["nf", "whole number"]),
    "a list of lists": ("vqgan:\n  ch_mult: [[1], 2]\n", ["ch_mult", "list"]),
    "a flag in a list": ("vqgan:\n  ch_mult: [1, --seed, 3]\n", ["ch_mult", "--seed", "list"]),
    "a list of itself": ("vqgan:\n  ch_mult: &a [*a]\n", ["ch_mult", "list"]),
    "keys for a value": ("vqgan:\n  lr: {a: 1}\n", ["lr", "number"]),
    "a number for a switch": ("vqgan:\n  ema: 1\n", ["ema", "true or false"]),
    "a key twice": ("vqgan:\n  lr: 1\n  lr: 2\n", ["'lr'", "duplicate key", "line 3"]),
    "a section twice": ("vqgan:\n  lr: 1\nvqgan:\n  seed: 2\n", ["'vqgan'", "duplicate key"]),
    "a key that is none": ("null: 1\n", ["key: value"]),
    "a key that is none, in a section": ("vqgan:\n  null: 1\n", ["unknown key None"]),
    "a number for a key": ("vqgan:\n  1: 1\n", ["unknown key '1'"]),
    "a list for a key": ("vqgan:\n  ? [a]\n  : 1\n", ["not a YAML file"]),
    "a list for a name": ("dataset: [digits]\n", ["dataset", "a word"]),
    "keys for a name": ("vqgan:\n  logs_root: {a: 1}\n", ["logs_root", "a word"]),
    "code": ("vqgan: !!python/object/apply:os.system [ls]\n", ["not a YAML file", "python/object"]),
    "a tag that does not fit": ("vqgan:\n  lr: !!set {a}\n", ["lr", "number"]),
    "nesting": ("[" * 5000, ["not a YAML file", "recursion"]),
    "a tab": ("vqgan:\n\tlr: 1\n", ["not a YAML file"]),
    "bytes": (b"\xff\xfe\x00", ["not a YAML file"]),
}


@pytest.fixture(autouse=True)
def no_main(monkeypatch):
    monkeypatch.setattr(cli, "run_main", lambda main, config: None)


def write_file(tmp_path, content, name="mine.yaml"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_message(capfd, script, flags):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "Traceback" not in message and len(message) < 1200
    return message


@pytest.mark.parametrize("case", READ)
def test_a_value_is_read_as_written(case, tmp_path, monkeypatch):
    text, key, value = READ[case]
    config = parse_config("train_vqgan.py", f"--config {write_file(tmp_path, text)}", monkeypatch)
    assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_of_the_wrong_type_is_named(case, tmp_path, capfd):
    text, words = REFUSED[case]
    message = error_message(capfd, "train_vqgan.py", f"--config {write_file(tmp_path, text)}")
    assert "mine.yaml" in message and all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr nan", ["--lr", "nan", "finite"]),
        ("--lr=-inf", ["--lr", "-inf", "finite"]),
        ("--seed 1e30", ["--seed", "whole number"]),
        ("--train_steps 1e6.", ["--train_steps", "1e6.", "whole number"]),
        ("--config --lr 1", ["--config alone", "one file or several"]),
        ("__config a.yaml", ["__config"]),
        ("--lr 1 --config", ["--config alone", "one file or several"]),
        ("--config .", ["is not a file"]),
        ("--dataset=", ["unknown data set ''"]),
    ],
)
def test_a_flag_of_the_wrong_type_is_named(flags, words, capfd):
    message = error_message(capfd, "train_vqgan.py", flags)
    assert all(word in message for word in words), message


def test_whole_numbers_may_be_written_as_floats(monkeypatch):
    config = parse_config("train_vqgan.py", "--train_steps 1.5e3 --disc_start_step 1_000 --n_channels 1", monkeypatch)
    assert (config["train_steps"], config["disc_start_step"], config["n_channels"]) == (1500, 1000, 1)


@pytest.mark.parametrize(
    ("command", "section", "flag", "there", "typed"),
    [
        ("train_vqgan.py", "vqgan", "quantizer", "ema", "gumbel"),
        ("train_sampler.py --sampler ddpm", "ddpm", "process", "edm", "flow"),
    ],
)
def test_a_typed_plugin_overrides_that_of_a_file(command, section, flag, there, typed, tmp_path, monkeypatch):
    path = write_file(tmp_path, yaml.safe_dump({"dataset": "digits", section: {flag: there}}))
    script, *flags = command.split()
    config = parse_config(script, " ".join([*flags, f"--config {path} --{flag} {typed}"]), monkeypatch)
    assert config[flag] == typed


SEVERAL = {  # texts of files, in order -> settings of train_vqgan.py
    "key by key": (["vqgan:\n  lr: 1\n  nf: 16\n", "vqgan:\n  lr: 2\n"], {"lr": 2.0, "nf": 16}),
    "data too": (["img_size: 16\nn_channels: 1\n", "img_size: 32\n"], {"img_size": 32, "n_channels": 1}),
    "top over an earlier section": (
        ["vqgan:\n  img_size: 16\n  nf: 16\n", "img_size: 32\n"],
        {"img_size": 32, "nf": 16},
    ),
    "section over an earlier top": (["img_size: 16\n", "vqgan:\n  img_size: 32\n"], {"img_size": 32}),
    "an empty section": (["vqgan:\n  lr: 2\n", "vqgan:\n"], {"lr": 2.0}),
    "nothing, where that is a value": (["vqgan:\n  log_dir: a\n", "vqgan:\n  log_dir:\n"], {"log_dir": None}),
    "a quantizer and its options": (
        ["vqgan:\n  quantizer: ema\n", "vqgan:\n  revive_below: 2\n"],
        {"revive_below": 2.0},
    ),
    "another quantizer": (
        ["vqgan:\n  quantizer: gumbel\n", "vqgan:\n  quantizer: ema\n  revive_below: 2\n"],
        {"quantizer": "ema", "revive_below": 2.0},
    ),
    "another reader": (
        ["vqgan:\n  reader: folder\n", "reader: digits\ndigits_rotation: 30\n"],
        {"reader": "digits", "digits_rotation": 30.0},
    ),
    "the first again": (["vqgan:\n  lr: 2\n", "vqgan:\n  lr: 1\n", "vqgan:\n  lr: 2\n"], {"lr": 2.0}),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_later_files_win(case, tmp_path, monkeypatch):
    texts, wanted = SEVERAL[case]
    files = [str(write_file(tmp_path, text, f"{texts.index(text)}.yaml")) for text in texts]
    for flags in (f"--config {' '.join(files)}", " ".join(f"--config={file}" for file in files)):
        config = parse_config("train_vqgan.py", f"--seed 3 {flags} --grad_clip 2", monkeypatch)
        assert {key: config[key] for key in wanted} == wanted
        assert (config["seed"], config["grad_clip"]) == (3, 2.0)
    config = parse_config("train_vqgan.py", f"--lr 7 --config {' '.join(files)}", monkeypatch)
    assert config["lr"] == 7


def test_a_later_file_may_name_the_sampler(tmp_path, monkeypatch):
    first = write_file(
        tmp_path, "sampler: absorbing\nddpm:\n  channels: 24\nabsorbing:\n  bert_n_layers: 3\n", "a.yaml"
    )
    later = write_file(tmp_path, "sampler: ddpm\nddpm:\n  heads: 3\n", "b.yaml")
    config = parse_config("train_sampler.py", f"--config {first} {later} --logs_root {tmp_path}", monkeypatch)
    assert (config["sampler"], config["channels"], config["heads"]) == ("ddpm", 24, 3)
    config = parse_config("train_sampler.py", f"--config {later} {first} --logs_root {tmp_path}", monkeypatch)
    assert (config["sampler"], config["bert_n_layers"]) == ("absorbing", 3)
    flags = f"--config {first} {later} --logs_root {tmp_path}"
    assert parse_config("experiments/get_samples.py", flags, monkeypatch)["sampler"] == "ddpm"


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vqgan:\n  lrr: 1\n", ["unknown key 'lrr'", "'lr'"]),
        ("img_sise: 1\n", ["unknown key 'img_sise'"]),
        ("vqgna:\n  lr: 1\n", ["unknown section 'vqgna'"]),
        ("dataset: [digits]\n", ["dataset", "a word"]),
        ("vqgan: 3\n", ["section 'vqgan'"]),
    ],
)
def test_an_error_names_the_file_it_is_in(wrong, text, words, tmp_path, capfd):
    names = ["right.yaml", "right.yaml"]
    names[wrong] = "wrong.yaml"
    write_file(tmp_path, "img_size: 16\nvqgan:\n  lr: 1\n", "right.yaml"), write_file(tmp_path, text, "wrong.yaml")
    message = error_message(capfd, "train_vqgan.py", f"--config {' '.join(str(tmp_path / name) for name in names)}")
    assert "wrong.yaml" in message and "right.yaml" not in message and all(word in message for word in words), message


def test_a_section_cannot_name_another_sampler(tmp_path, capfd, monkeypatch):
    file = write_file(tmp_path, "sampler: ddpm\nddpm:\n  sampler: absorbing\n")
    assert "'ddpm'" in error_message(capfd, "train_sampler.py", f"--config {file} --logs_root {tmp_path}")
    file = write_file(tmp_path, "calc_FID:\n  sampler: ddpm\n")  # but an experiment's section may
    config = parse_config("experiments/calc_FID.py", f"--config {file} --logs_root {tmp_path}", monkeypatch)
    assert config["sampler"] == "ddpm" and "eta" in config
    assert "unknown sampler ''" in error_message(capfd, "train_sampler.py", "--sampler=")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: 3\n", ["config.yaml", "'data'", "key: value"]),
        ("data:\n  dataset: digits\n  img_size: .nan\n", ["img_size", "whole number", "vqgan_digits/config.yaml)"]),
        ("reader: []\n", ["'reader'"]),
        ("data: !!bool x\n", ["config.yaml", "not a YAML file"]),
        ("data: 2024-13-45\n", ["config.yaml", "not a YAML file"]),
    ],
)
def test_a_damaged_config_of_a_first_stage_is_named(text, words, tmp_path, capfd):
    (tmp_path / "vqgan_digits").mkdir()
    write_file(tmp_path / "vqgan_digits", text, "config.yaml")
    message = error_message(capfd, "train_sampler.py", f"--logs_root {tmp_path}")
    assert all(word in message for word in words), message


def test_datasets_yaml_holds_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(config_files, "ROOT", tmp_path)
    paths = 'ffhq: 2024\nchurches: ~nobody_of_that_name/x\nfaces: [a]\nbedrooms:\nmnist: "\\0"\n'
    write_file(tmp_path, paths, "datasets.yaml")
    assert config_files.resolve_data_dir("ffhq", None) == str(tmp_path / "2024")
    assert config_files.resolve_data_dir("churches", None) == str(tmp_path / "~nobody_of_that_name" / "x")
    assert config_files.resolve_data_dir("lsun", None) is None
    for name in ("faces", "bedrooms", "mnist"):
        with pytest.raises(ValueError, match=f"datasets.yaml.* for {name}"):
            config_files.resolve_data_dir(name, None)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"max_epochs": 1' + "0" * 400 + "}", "[" * 100_000, "\ufeff{}"])
def test_invalid_json_is_refused_with_a_message(text, tmp_path, capfd):
    message = error_message(capfd, "train_sampler.py", f"--config {write_file(tmp_path, text, 'mine.json')}")
    assert "mine.json" in message and "BOM" not in message


def saved_groups(config):
    return yaml.safe_load(yaml.safe_dump(cli.to_dict(config)))


def test_a_run_older_than_a_flag_takes_its_default():
    config = StoredVQGANConfig(data=DataConfig(img_size=16), reader=Digits(), network=VQGANConfig(nf=4))
    content = saved_groups(config)
    del content["network"]["beta"], content["data"]["shift"], content["reader"]
    assert cli.to_dict(cli.from_dict(StoredVQGANConfig, content, "old")) == cli.to_dict(config)


def test_a_run_with_a_removed_flag_is_refused():
    content = saved_groups(StoredVQGANConfig(data=DataConfig(), reader=Digits(), network=VQGANConfig()))
    content["network"]["gone"] = 3
    with pytest.raises(ValueError, match="old was written by another version.*unknown now: gone"):
        cli.from_dict(StoredVQGANConfig, content, "old")
    with pytest.raises(ValueError, match="old: group 'data' holds 3"):
        cli.from_dict(StoredVQGANConfig, content | {"data": 3}, "old")
    with pytest.raises(ValueError, match="old: got nf None, wanted a whole number"):
        cli.from_dict(StoredVQGANConfig, content | {"network": {"nf": None}}, "old")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    sampler: absorbing.Config | ddpm.Config
    data: DataConfig


def test_an_old_config_is_completed_with_defaults():
    now = Run(sampler=absorbing.Config(bert_n_layers=3), data=DataConfig(shift=2))
    old = saved_groups(now) | {"origin": {"ae_weights": "abc"}}
    assert cli.complete_config(old, now, "old") == old
    del old["data"]["shift"]
    assert cli.complete_config(old, now, "old")["data"]["shift"] == 0  # the flag's default, not its current value
    assert "shift" not in old["data"]
    assert cli.complete_config({"origin": old["origin"]}, now, "old") == saved_groups(
        Run(sampler=absorbing.Config(), data=DataConfig())
    ) | {"origin": old["origin"]}
    other = saved_groups(Run(sampler=ddpm.Config(sampler="ddpm"), data=DataConfig()))
    assert cli.complete_config(other, now, "old") == other  # no keys of absorbing are added to those of ddpm


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "train_vqgan.py: Permission denied: /a/b\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), 2, "train_vqgan.py: Is a directory: /a\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 2, "train_vqgan.py: Not a directory: /a/b\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 2, "train_vqgan.py: No space left on device: /a\n"),
        (FileNotFoundError("x not found: make it"), 2, "train_vqgan.py: x not found: make it\n"),
        (ValueError("two\nlines"), 2, "train_vqgan.py: two lines\n"),
        (ValueError(), 2, "train_vqgan.py: ValueError\n"),
        (KeyboardInterrupt(), 130, "train_vqgan.py: interrupted\n"),
    ],
)
def test_user_errors_are_one_line(error, code, words, monkeypatch, capfd):
    def fails(main, config):
        raise error

    monkeypatch.setattr(cli, "run_main", fails)
    with pytest.raises(SystemExit) as stop:
        call("train_vqgan.py", "")
    assert (stop.value.code, capfd.readouterr().err) == (code, words)


def test_internal_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "run_main", lambda main, config: {}["key"])
    with pytest.raises(KeyError):
        call("train_vqgan.py", "")


@pytest.mark.parametrize("flags", ["--lr fast", "--dataset nothing", "--help"])
def test_only_rank_0_reports_command_line_errors(flags, monkeypatch, capfd):
    outputs = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            call("train_vqgan.py", flags)
        assert stop.value.code == (0 if flags == "--help" else 2)
        outputs.append("".join(capfd.readouterr()))
    assert outputs[0] and not outputs[1]


def test_each_rank_reports_its_own_later_errors(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli, "run_main", lambda main, config: open("/nowhere/at/all"))
    with pytest.raises(SystemExit):
        call("train_vqgan.py", "")
    assert capfd.readouterr().err == "train_vqgan.py (rank 3): No such file or directory: /nowhere/at/all\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you\ntrace"),
        RuntimeError("Storage size calculation overflowed with sizes=[4, 4]"),
    ],
)
def test_too_little_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop, cli.one_line_errors("train.py"):
        raise error
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("train.py: out of memory (") and "pass a smaller --batch_size" in lines[0]


def test_other_errors_of_torch_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), cli.one_line_errors("train.py"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
