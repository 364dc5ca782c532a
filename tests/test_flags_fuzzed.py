"""Any file and any command line give a config, or a message and exit code 2; never a traceback.

`FUZZ=100 pytest tests/test_flags_fuzzed.py` tries a hundred times as many, different in each run.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import runpy
import sys
from itertools import count

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_runs import ROOT
from train.cli import files as config_files
from train.cli import parse as cli
from train.cli.json_config import read_json
from train.cli.plugins import make_default_config
from train.datasets import DatasetConfig
from train.registry import load_plugin, plugin_names

EXPERIMENTS = sorted(p.name for p in (ROOT / "experiments").glob("*.py") if "run_script(" in p.read_text())
NAMES = ["train_vqgan.py", "train_sampler.py", "convert.py", *(f"experiments/{name}" for name in EXPERIMENTS)]


MORE = int(os.environ.get("FUZZ", 1))


def fuzz(n):
    return settings(derandomize=MORE == 1, deadline=None, max_examples=n * MORE, database=None)


class Scripts:
    """Runs each script's call of run_script with other arguments, and records the config passed to main."""

    def __init__(self, folder):
        self.folder, self.configs, self.calls, self.files = folder, [], {}, count()
        for name in NAMES:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cli, "run_script", lambda *args, name=name, **kw: self.calls.update({name: (args, kw)}))
                patch.setattr(sys, "argv", [str(ROOT / name)])
                patch.setattr(sys, "path", list(sys.path))
                runpy.run_path(sys.argv[0], run_name="__main__")

    def __call__(self, name, argv):
        """The config or the exit code, and the text written to stderr."""
        args, kwargs = self.calls[name]
        self.configs.clear()
        stderr, root = io.StringIO(), [f"--logs_root={self.folder}"]
        groups = [field.type for field in dataclasses.fields(args[1])]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
            patch.setattr(cli, "run_main", lambda main, config: self.configs.append(config))
            has_root = any("logs_root" in cli.flag_names(group) for group in groups)
            patch.setattr(sys, "argv", [name, *(root if has_root else []), *argv])
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    cli.run_script(*args, **kwargs)
                except SystemExit as stop:
                    return stop.code, stderr.getvalue()
        return self.configs[0], stderr.getvalue()

    def check(self, name, argv):
        outcome, message = self(name, argv)
        if outcome == 2:
            assert message.strip() and "Traceback" not in message
            assert len(message) < 4000 + 2 * sum(map(len, argv))
        elif outcome == 0:
            assert any(word.startswith(("-h", "--help", "--tyro")) for word in argv)
        else:
            plain = cli.to_dict(outcome)
            assert all(well_formed(value) for group in plain.values() for value in group.values())
            assert yaml.safe_load(yaml.safe_dump(plain)) == plain

    def file(self, text, suffix=".yaml"):
        path = self.folder / f"{next(self.files)}{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path


def well_formed(value):
    if isinstance(value, list):
        return all(map(well_formed, value))
    return value is None or isinstance(value, str | int) or math.isfinite(value)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return Scripts(tmp_path_factory.mktemp("fuzzed"))


def key_locations(content):
    """Every key of nested objects, with the object that contains it."""
    locations = []
    for key, value in content.items():
        locations += [(content, key), *(key_locations(value) if isinstance(value, dict) else [])]
    return locations


def keys_of(groups):
    return sorted({key for group in groups for key in cli.flag_names(group)})


SAMPLERS = [load_plugin("train.samplers", name, "sampler") for name in plugin_names("train.samplers")]
GROUPS = [cli.DataConfig, DatasetConfig, cli.LoggingConfig]
GROUPS += [group for module in SAMPLERS for group in (module.Config, module.Sampling)]
FLAGS = [*keys_of(GROUPS), *"lr train_steps batch_size ema watch load_dir ae_load_dir n_samples nf ch_mult".split()]
FLAGS += "shape solvers grid from weights step allow seed calls sizes sampler dataset config logs_root".split()
SECTIONS = ["vqgan", *plugin_names("train.samplers"), *(name.removesuffix(".py") for name in EXPERIMENTS)]
ODD = [
    *("", "~", "null", "None", "'None'", "yes", "off", "true", "False", "'16'", "1 2 2", "- a", "a: b", "\t1"),
    *("1", "0", "-1", "1e6", "1.5e1", "2.5", "010", "0x10", "1_000", "1:30", "2024-01-01", "2024-13-45"),
    *(".nan", "nan", ".inf", "-inf", "1e400", "1e-400", "1e999999999", "9" * 30, "9" * 5000, "sNaN"),
    *("[]", "[1, 2]", "[1, 2", "[[1], [2]]", "[-1, --help]", "[a, --lr, 3]", "[null]", "[.nan]", "[-]", "{}", "{a: 1}"),
    *(
        "&a 1",
        "*a",
        "&a [*a]",
        "&a {<<: *a}",
        "<<",
        "!!set {a}",
        "!!binary aGk=",
        "!mine 3",
        "!!null 1",
        "!!omap [a: 1]",
    ),
    *("!!python/object:os.system ls", "!!bool x", "!!timestamp x", "!!int ''", "!!float x", "!!map 1", "!!seq a"),
    *("digits", "ddpm", "absorbing", "folder", "~nobody", "../..", "é", '"\\ud800"', '"a\\nb"', '"\\0"', "x" * 300),
    *("--help", "-h", "--seed", "-", "--", "@", "%", "`", "|", "=", "a=b", "/dev/null", "."),
]
value = st.sampled_from(ODD) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)
key = st.sampled_from(FLAGS) | st.sampled_from([*SECTIONS, "1", "null", "<<", "? [a]", "'lr'", "\tlr", "convert"])
line = st.builds("{}: {}".format, key, value)
lines = st.lists(line, max_size=2)
block = st.builds(lambda name, lines: "\n  ".join([f"{name}:", *lines]), st.sampled_from(SECTIONS), lines)
documents = st.builds(
    lambda mark, parts: mark + "\n".join(parts) + "\n",
    st.sampled_from(["", "\ufeff"]),
    st.lists(line | block, max_size=3),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**400, -1, 0, 1e300]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.sampled_from(FLAGS), below, max_size=3),
)
rubbish = st.binary(max_size=40) | st.text(max_size=20) | st.sampled_from(["[" * 5000, "{a: " * 3000, "- " * 3000])
forms = st.sampled_from([["--{}={}"], ["--{}", "{1}"], ["--{}"], ["-{}", "{1}"], ["{1}"]])
typed = st.builds(
    lambda flag, text, form: [each.format(flag, text) for each in form],
    st.sampled_from(FLAGS) | st.text(max_size=4),
    value,
    forms,
)
commands = st.lists(typed, max_size=3).map(lambda parts: [word for part in parts for word in part])
groups = st.builds(
    lambda name, lines: "\n  ".join([f"{name}:", *lines]),
    st.sampled_from(["data", "reader", "sampler", "sampling", "origin", "network", "data: 3\nx"]),
    st.lists(line, max_size=3),
)


@fuzz(25)
@given(st.sampled_from(NAMES), documents | rubbish)
def test_any_yaml_file(scripts, name, text):
    scripts.check(name, [f"--config={scripts.file(text)}"])


@fuzz(35)
@given(st.data())
def test_any_value_of_a_real_flag(scripts, data):
    """In the section of a file, and on the command line."""
    name = data.draw(st.sampled_from(NAMES))
    sampler = data.draw(st.sampled_from(plugin_names("train.samplers")))
    (_, cls, *section), _ = scripts.calls[name]
    flag = data.draw(st.sampled_from(sorted(cli.flag_names(make_default_config(cls, {"sampler": sampler}).config))))
    text, argv = data.draw(value), [f"--sampler={sampler}"] if "sampler" in cli.flag_names(cls) else []
    file = scripts.file(f"{[*section, sampler][0]}:\n  {flag}: {text}\n")
    scripts.check(name, data.draw(st.sampled_from([[f"--config={file}", *argv], [*argv, f"--{flag}", text]])))


@fuzz(25)
@given(st.sampled_from(NAMES), commands)
def test_any_command_line(scripts, name, argv):
    scripts.check(name, argv)


@fuzz(30)
@given(st.sampled_from(NAMES), st.sampled_from(["vqgan_digits", "absorbing_digits"]), groups | documents | rubbish)
def test_any_config_of_a_run(scripts, name, run, text):
    path = scripts.folder / run / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    scripts.file(text).rename(path)
    scripts.check(name, [])
    path.unlink()


@fuzz(100)
@given(documents | rubbish | st.builds("ffhq: {}".format, value))
def test_any_datasets_yaml(scripts, text):
    scripts.file(text).rename(scripts.folder / "datasets.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_files, "ROOT", scripts.folder)
        try:
            path = config_files.resolve_data_dir("ffhq", None)
        except ValueError as error:
            assert "datasets.yaml" in str(error)
        else:
            assert path is None or path.startswith("/")


@fuzz(75)
@given(plain, st.data())
def test_any_json_file(scripts, new_value, data):
    """A valid file with another value for one key."""
    content = json.loads((ROOT / "configs" / "mnist_unet.json").read_text())
    parent, key = data.draw(st.sampled_from(key_locations(content)))
    parent[key] = new_value
    file = scripts.file(json.dumps(content), ".json")
    try:
        read_json(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        scripts.check("train_sampler.py", [f"--config={file}"])
