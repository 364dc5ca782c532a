"""Where the folder of a run lies."""

import pytest

from train.cli.files import run_folder


def test_a_word_lies_below_logs_root_a_path_may_lie_here(tmp_path, monkeypatch):
    logs, home = tmp_path / "logs", tmp_path / "home"
    for folder in (
        logs / "x",
        logs / "group" / "y",
        tmp_path / "x",
        tmp_path / "here",
        tmp_path / "other" / "z",
        home / "h",
    ):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    wanted = {
        "x": logs / "x",  # not the folder x here
        "x/": logs / "x",
        "logs/x": logs / "x",  # as tab completion types it
        "logs/x/": logs / "x",
        "logs/new": logs / "new",
        "other/z": tmp_path / "other" / "z",
        "group/y": logs / "group" / "y",
        "group/new": logs / "group" / "new",
        "~/h/": home / "h",
        str(tmp_path / "other" / "new"): tmp_path / "other" / "new",
    }
    assert {name: run_folder("logs", name) for name in wanted} == wanted
    assert run_folder("~/logs", "x") == home / "logs" / "x"
    assert run_folder("logs", "./here") == tmp_path / "here"
    assert run_folder("logs", "~nobody_of_this_name/x") == tmp_path / "logs" / "~nobody_of_this_name" / "x"


def test_a_path_of_two_folders_is_refused_naming_both(tmp_path, monkeypatch):
    here, below = tmp_path / "group" / "y", tmp_path / "logs" / "group" / "y"
    for folder in (here, below):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"got group/y, which may be {here} or {below}: pass the whole path"):
        run_folder("logs", "group/y")
    below.rmdir()
    below.symlink_to(here)
    assert run_folder("logs", "group/y") == here
