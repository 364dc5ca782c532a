"""A run's config.yaml executes nothing: commands that fetch its data must be typed or allowed, however written."""

import shutil
from pathlib import Path

import pytest
import yaml

import train_sampler
from helpers.tiny_runs import call
from train.cli.parse import first_stage_data, parse_with_sources
from train.datasets.webdataset import Config
from train.datasets.webdataset.shards import list_shards
from train.datasets.webdataset.store import ShardStore, expand_pattern, is_shell_command
from train.sampler_loading import check_allowed

pytest.importorskip("webdataset", reason="needs the optional package webdataset")


def edit_data(run: Path, **keys: object) -> None:
    """Replaces the reader's keys in a run's config.yaml by keys of its data: they are read from any group."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(content | {"data": content["data"] | keys, "reader": {}}))


def test_a_command_is_recognized_however_it_is_written():
    for start in ["pipe:", "a.tar::pipe:", "{p..p}ipe:", "{pi,x}pe:", r"pi\pe:", "a::{{p..p},x}ipe:", "${MINE}"]:
        assert is_shell_command(f"{start}touch b"), start
    assert is_shell_command("{pipe:touch b,c.tar}")
    for shards in ["/data/a", "{000..099}.tar", "https://a/{p..p}ipe:b.tar", "/my pipe:/a.tar", "C:\\data", "{a:,b", 3]:
        assert not is_shell_command(shards), shards


def test_patterns_of_too_many_shards_are_refused():
    assert expand_pattern("{a,b}{08..10}::c") == ["a08", "a09", "a10", "b08", "b09", "b10", "c"]
    for pattern in ["{0..9999999999}", "{1..9999}{1..9999}", "{a..z}" * 9, "{a,b}" * 40, "{" * 5000 + "}" * 5000]:
        with pytest.raises(ValueError, match="may name more than 1000000 shards"):
            expand_pattern(pattern)


@pytest.mark.parametrize("key", ["data_dir", "val_shards"])
def test_a_command_must_be_allowed_as_written(key, tmp_path):
    for shards in ("pipe:cat a.tar", "{p..p}ipe:touch b"):
        reader = Config(**{"data_dir": "a.tar", key: shards})
        with pytest.raises(ValueError, match=f"was trained with --{key} .*, which is code: pass --allow '"):
            check_allowed(tmp_path, reader, ())
        check_allowed(tmp_path, reader, (shards,))


def test_an_edited_run_executes_no_command(trained, tmp_path, capsys):
    canary = tmp_path / "it ran"
    for run in ("vqgan_digits", "absorbing_digits"):
        shutil.copytree(trained / run, tmp_path / run)
        edit_data(tmp_path / run, reader="webdataset", data_dir=f"{{p..p}}ipe:touch '{canary}'")
    for script in ("calc_VQGAN_FID", "reconstruct", "calc_FID", "calc_approximate_ELBO"):
        with pytest.raises(SystemExit) as stop:
            call(f"experiments/{script}.py", f"--logs_root {tmp_path} --no_amp")
        assert stop.value.code == 2 and "which is code: pass --allow" in capsys.readouterr().err
    assert not canary.exists()


def test_a_second_stage_takes_nothing_but_data_from_the_first(trained, tmp_path, capsys):
    shutil.copytree(trained / "vqgan_digits", tmp_path / "vqgan_digits")
    foreign = {"adapt": "my.code", "hooks": ["my.hook"], "log_dir": "../elsewhere"}
    edit_data(tmp_path / "vqgan_digits", **foreign, data_dir="{p..p}ipe:touch b")
    kept, source, _ = first_stage_data(["--logs_root", str(tmp_path)], "absorbing")
    assert source == tmp_path / "vqgan_digits" / "config.yaml"
    assert kept["img_size"] == 16 and not {*foreign, "data_dir"} & {*kept}
    words = ["--logs_root", str(tmp_path)]
    parsed = parse_with_sources(train_sampler.Config, None, words, first_stage_data)
    assert (parsed.sources["img_size"], parsed.sources["lr"]) == ("earlier stage", "preset")
    edit_data(tmp_path / "vqgan_digits", img_size="big")
    with pytest.raises(SystemExit):
        parse_with_sources(train_sampler.Config, None, words, first_stage_data)
    assert f"digits.yaml or {source})" in capsys.readouterr().err


def test_what_is_no_command_as_written_is_none_when_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "pipe:touch b")
    shards = ["file:pipe:touch b", "file:pipe:touch%20b", "file:pipe%3Atouch%20b", "file:{p..p}ipe:touch b"]
    shards += ["FILE:pipe:touch b", "file:file:pipe:b", "PIPE:touch b", " pipe:touch b", "~", "file:~", "./pipe:*"]
    for name in shards:
        assert not is_shell_command(name), name
        with pytest.raises(FileNotFoundError, match="is not a file or folder"):
            list_shards(name, "data_dir")
    (tmp_path / "pipe:touch b").write_bytes(b"")
    for name in ("file:pipe:touch%20b", "file:pipe:*", "./pipe:*", "~"):
        assert list_shards(name, "data_dir") == [str(tmp_path / "pipe:touch b")], name


def test_schemes_that_are_not_known_are_refused():
    for name in ("PIPE://touch b", "nothing://here/0.tar"):
        with pytest.raises(ValueError, match=f"--data_dir names {name}, wanted files, or URLs that begin with pipe:"):
            list_shards(name, "data_dir")


def test_only_downloads_are_evicted_from_a_shard_cache(tmp_path):
    (tmp_path / "0000.tar").write_bytes(b"a user's own shard")
    store = ShardStore(tmp_path, 1)
    for _ in range(2):
        store.download(f"pipe:echo {tmp_path.stat().st_mtime_ns}")[0].close()
    assert (tmp_path / "0000.tar").exists() and len([*tmp_path.glob("*.tar")]) == 2
