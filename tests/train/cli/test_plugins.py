"""Plug-in flags: those of the selected plug-ins are accepted, those of others are refused by name."""

import dataclasses
import sys

import pytest
import torch
import yaml

import vq.quantizers
from helpers.tiny_runs import GAN, ROOT, VQGAN, call, parse_config
from train.cli import parse as cli
from train.cli import plugins
from train.cli.plugins import PLUGIN_GROUPS, PluginGroup, flags_of, make_default_config, merge_configs, plugin_options
from train.cli.values import peek_flag_values
from train.config import DataConfig, SecondStageConfig, VQGANRunConfig
from train.datasets import lsun
from train.first_stage import StoredVQGANConfig
from train.registry import plugin_names
from train.runs import open_run
from train.samplers import ddpm
from vq.config import VQGANConfig
from vq.quantizer import make_quantizer
from vq.quantizers import QuantizerConfig, ema, fsq, gumbel, nearest

MINE = '''"""The nearest code, times a number."""

from dataclasses import dataclass

from vq.quantizers import Quantizer, QuantizerConfig
from vq.quantizers.nearest import NearestQuantizer


@dataclass(frozen=True, kw_only=True)
class Config(QuantizerConfig):
    """Mine."""

    mine_factor: float = 2.0
    """Factor of the code vectors."""


class MineQuantizer(NearestQuantizer):
    factor = 1.0

    def vectors(self, ids):
        return self.factor * super().vectors(ids)


def build(config: Config, codebook_size: int, dim: int) -> Quantizer:
    quantizer = MineQuantizer(codebook_size, dim)
    quantizer.factor = config.mine_factor
    return quantizer
'''


@pytest.fixture
def user_quantizer(tmp_path, monkeypatch):
    """A user's quantizer, importable like those of vq.quantizers."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "mine.py").write_text(MINE)
    monkeypatch.setattr(vq.quantizers, "__path__", [*vq.quantizers.__path__, str(tmp_path / "plugins")])
    monkeypatch.delitem(sys.modules, "vq.quantizers.mine", raising=False)


def error_message(capfd, flags, script="train_vqgan.py"):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    return " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_a_quantizer_with_an_option_is_one_new_file(user_quantizer, tmp_path, capfd, monkeypatch):
    config = parse_config("train_vqgan.py", "--quantizer mine --mine_factor 3", monkeypatch)
    assert (config["quantizer"], config["mine_factor"]) == ("mine", 3.0) and "beta" not in config
    quantizer = make_quantizer(VQGANConfig(quantizer="mine", codebook_size=8, emb_dim=3))
    assert quantizer.factor == 2 and quantizer.vectors(torch.zeros(1, 2, 2, dtype=torch.int64)).shape == (1, 3, 2, 2)
    message = error_message(capfd, f"--logs_root {tmp_path} --mine_factor 3")
    assert "got --mine_factor with --quantizer nearest: it belongs to mine" in message


@pytest.mark.slow
def test_a_run_with_a_user_quantizer_resumes(user_quantizer, tmp_path, capfd):
    flags = f"{VQGAN} {GAN} --logs_root {tmp_path} --no_amp --steps_per_eval 0 --quantizer mine"
    call("train_vqgan.py", f"{flags} --mine_factor 3 --train_steps 1")
    saved = yaml.safe_load((tmp_path / "vqgan_digits" / "config.yaml").read_text())
    assert {*saved["network"]} == cli.flag_names(VQGANConfig) | {"mine_factor"}
    call("train_vqgan.py", f"{flags} --mine_factor 3 --train_steps 2")
    assert "--mine_factor 3.0 -> 4.0" in error_message(capfd, f"{flags} --mine_factor 4 --train_steps 2")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_vqgan.py", "--fsq_levels 8 8", "--fsq_levels with --quantizer nearest: it belongs to fsq"),
        (
            "train_vqgan.py",
            "--quantizer ema --legacy_beta",
            "--legacy_beta with --quantizer ema: it belongs to nearest",
        ),
        (
            "train_vqgan.py",
            "--quantizer fsq --beta=1",
            "with --quantizer fsq: it belongs to ema, ibq, l2, lfq, nearest",
        ),
        (
            "train_vqgan.py",
            "--no-gumbel-straight-through",
            "it belongs to gumbel; leave it out, or pass --quantizer gumbel",
        ),
        ("train_vqgan.py", "--category bedroom", "--category with --reader digits: it belongs to lsun"),
        ("train_sampler.py", "--eta 0.5", "--eta with --sampler absorbing: it belongs to ddpm"),
        (
            "train_sampler.py",
            "--sampler ddpm --temp 1",
            "with --sampler ddpm: it belongs to absorbing, autoregressive",
        ),
    ],
)
def test_a_flag_of_an_unused_plugin_is_refused(script, flags, message, tmp_path, capfd):
    assert message in error_message(capfd, f"{flags} --logs_root {tmp_path}", script)


def test_help_shows_the_flags_of_the_chosen_quantizer(tmp_path, capfd):
    for name, flag in (("fsq", "--fsq_levels"), ("gumbel", "--gumbel_decay_steps")):
        with pytest.raises(SystemExit):
            call("train_vqgan.py", f"--quantizer {name} --help_all")
        help_text = capfd.readouterr().out
        assert [
            option for option in ("--fsq_levels", "--gumbel_decay_steps", "--legacy_beta") if option in help_text
        ] == [flag]
    assert "The temperature is 1 - step / gumbel_decay_steps" in " ".join(help_text.replace("│", " ").split())


def test_a_file_names_the_quantizer_and_a_flag_another(tmp_path, monkeypatch, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text("vqgan:\n  quantizer: ema\n  revive_below: 0.2\n  beta: 0.25\n  fsq_levels: []\n")
    # a default value of another quantizer's flag is ignored
    config = parse_config("train_vqgan.py", f"--config {file}", monkeypatch)
    assert config["quantizer"] == "ema" and config["revive_below"] == 0.2 and "fsq_levels" not in config
    message = error_message(capfd, f"--config {file} --quantizer l2")
    assert "mine.yaml: got revive_below '0.2' with --quantizer l2: it belongs to ema" in message


def old_groups():
    """The config.yaml of an old run, which held the keys of all quantizers."""
    return yaml.safe_load((ROOT / "tests" / "fixtures" / "old_runs/runs/vqgan_digits/config.yaml").read_text())


def groups_of(content):
    return {name: content[name] for name in ("data", "reader", "network")}


def test_a_run_with_the_keys_of_all_quantizers_loads():
    config = cli.from_dict(StoredVQGANConfig, groups_of(old_groups()), "old")
    assert config.network.quantizer_config == ema.Config()
    assert {"legacy_beta", "gumbel_kl_weight", "fsq_levels"} <= old_groups()["network"].keys()
    content = old_groups()
    content["network"] |= {"quantizer": "gumbel", "gumbel_kl_weight": 0.5}
    config = cli.from_dict(StoredVQGANConfig, groups_of(content), "old")
    assert config.network.quantizer_config == gumbel.Config(gumbel_kl_weight=0.5, gumbel_decay_steps=160_000)


def test_a_run_with_options_of_another_quantizer_is_refused():
    content = old_groups()
    content["network"]["gumbel_kl_weight"] = 0.5
    with pytest.raises(ValueError, match="old: got gumbel_kl_weight 0.5 with --quantizer ema: it belongs to gumbel"):
        cli.from_dict(StoredVQGANConfig, groups_of(content), "old")
    config = make_default_config(VQGANRunConfig, {"quantizer": "ema"}).config
    with pytest.raises(ValueError, match="old: got gumbel_kl_weight 0.5"):
        cli.complete_config(content, config, "old")


def test_the_keys_of_other_quantizers_do_not_change_a_run(tmp_path):
    content = old_groups()
    flat = {key: value for group in content.values() for key, value in group.items()}
    config = cli.from_dict(VQGANRunConfig, {k: v for k, v in content.items() if k != "origin"}, "old")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "metrics.jsonl").touch()
    open_run(tmp_path, config, content["origin"])
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["network"] == {key: flat[key] for key in saved["network"]}
    assert flat.keys() - {key for group in saved.values() for key in group} == {
        *("legacy_beta", "fsq_levels", "entropy_weight", "entropy_temperature"),
        *("gumbel_kl_weight", "gumbel_straight_through", "gumbel_decay_steps"),
    }
    network = dataclasses.replace(config.network, quantizer="nearest", quantizer_config=nearest.Config())
    with pytest.raises(ValueError, match="holds another run .*--quantizer ema -> nearest"):
        open_run(tmp_path, dataclasses.replace(config, network=network), content["origin"])


def test_no_plugin_has_a_flag_that_another_group_has():
    """The keys of a run are flat, so each must be unique."""
    for cls in (VQGANRunConfig, SecondStageConfig):
        for group in PLUGIN_GROUPS.values():
            for name in plugin_names(group.package):
                config = make_default_config(cls, {group.flags[0]: name}).config
                parts = [getattr(config, field.name) for field in dataclasses.fields(config)]
                assert sum(len(flags_of(part)) for part in parts) == len(flags_of(config)), name


def test_configs_take_the_groups_of_the_named_plugins():
    config = make_default_config(SecondStageConfig, {"sampler": "ddpm", "dataset": "x", "reader": "lsun"}).config
    assert (type(config.sampler), type(config.sampling)) == (ddpm.Config, ddpm.Sampling)
    assert type(config.reader) is lsun.Config and type(config.data) is DataConfig
    config = make_default_config(VQGANRunConfig, {"dataset": "lsun", "quantizer": "fsq"}).config
    assert type(config.reader) is lsun.Config  # without a reader, the module named after the data set
    assert config.network == VQGANConfig(quantizer="fsq", quantizer_config=fsq.Config())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PluginList:
    """A config group of several plug-ins."""

    quantizers: tuple[str, ...] = ()
    """Names of quantizers."""
    options: QuantizerConfig = QuantizerConfig()


def test_the_flags_of_several_named_plugins_are_merged():
    config = make_default_config(PluginList, {"quantizers": ["ema", "fsq", "ema"]}).config
    assert config.quantizers == ("ema", "fsq", "ema")
    assert cli.flag_names(config) == {"quantizers", "beta", "codebook_decay", "revive_below", "fsq_levels"}
    config = cli.parse_arguments(PluginList, ["--beta", "1", "--fsq_levels", "8", "8"], default=config)
    assert plugin_options(config.options, ema.Config) == ema.Config(beta=1.0)
    assert plugin_options(config.options, fsq.Config) == fsq.Config(fsq_levels=(8, 8))
    with pytest.raises(ValueError, match="got beta -1"):
        dataclasses.replace(config.options, beta=-1.0)
    assert make_default_config(PluginList, {}).config == PluginList()


def test_configs_that_inherit_from_each_other_are_merged():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(ema.Config):
        sharpness: float = 1.0

    for kinds in ([ema.Config, Mine], [Mine, ema.Config], [QuantizerConfig, Mine, fsq.Config]):
        merged = merge_configs(kinds, QuantizerConfig)()
        assert merged.sharpness == 1.0 and merged.codebook_decay == ema.Config().codebook_decay


PARTS = {  # files of two packages: hosts, and parts, which a flag of a host selects
    "hosts/__init__": "",
    "hosts/plain": "from test_plugins import Host\n\nConfig = Host\n",
    "hosts/large": """from dataclasses import dataclass

from test_plugins import Host, Part


@dataclass(frozen=True, kw_only=True)
class Config(Host):
    parts: tuple[str, ...] = ()
    options: Part = Part()
""",
    "parts/__init__": "",
    **{
        f"parts/{name}": f"""from dataclasses import dataclass

from test_plugins import Part


@dataclass(frozen=True, kw_only=True)
class Config(Part):
    {name}_size: int = {size}
"""
        for name, size in (("red", 1), ("blue", 2))
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """Base class of hosts."""

    host: str = "plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Base class of parts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostRun:
    """A run."""

    host: Host


def test_the_flags_of_a_plugin_may_name_other_plugins(tmp_path, monkeypatch, capfd):
    for name, text in PARTS.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_plugins", sys.modules[__name__])
    monkeypatch.setitem(PLUGIN_GROUPS, Host, PluginGroup("hosts", ("host",), "host"))
    monkeypatch.setitem(PLUGIN_GROUPS, Part, PluginGroup("parts", ("parts",), "part"))
    for module in (plugins, cli):
        monkeypatch.setattr(module, "NAMING_FLAGS", plugins.NAMING_FLAGS | {"host", "parts"})
    monkeypatch.setattr(sys, "argv", ["script"])
    config = cli.parse(HostRun, "demo", "--host large --parts red blue --blue_size 5".split())
    assert cli.to_dict(config) == {"host": {"host": "large", "parts": ["red", "blue"], "red_size": 1, "blue_size": 5}}
    assert cli.to_dict(cli.from_dict(HostRun, cli.to_dict(config), "here")) == cli.to_dict(config)
    with pytest.raises(ValueError, match="got --red_size with --parts blue: it belongs to red"):
        cli.parse(HostRun, "demo", "--host large --parts blue --red_size 5".split())
    with pytest.raises(ValueError, match="unknown part 'rde', did you mean 'red'"):
        cli.parse(HostRun, "demo", "--host large --parts rde".split())
    with pytest.raises(ValueError, match="got --parts with --host plain: it belongs to large"):
        cli.parse(HostRun, "demo", "--parts red".split())


def test_merged_flags_keep_their_help(capfd):
    config = make_default_config(PluginList, {"quantizers": ["ema", "fsq"]}).config
    with pytest.raises(SystemExit):
        cli.parse_arguments(PluginList, ["--help"], default=config)
    help_text = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "Decay per step of the moving averages" in help_text and "Number of levels of each channel" in help_text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--seed 1", None),
        ("--quantizers a b --seed 1 c", ["a", "b"]),
        ("--quantizers=a --seed 1", ["a"]),
        ("--quantizers --seed 1", []),
        ("--quantizers a --quantizers b c", ["b", "c"]),
    ],
)
def test_a_list_of_values_ends_at_the_next_flag(line, words):
    assert peek_flag_values(line.split(), "quantizers") == words


@pytest.mark.parametrize("base", PLUGIN_GROUPS)
def test_every_plugin_config_has_the_base_class_of_its_group(base):
    group = PLUGIN_GROUPS[base]
    assert all(issubclass(group.config_of(name), base) for name in plugin_names(group.package))
