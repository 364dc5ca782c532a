"""docs/coming_from.md: each row has our counterpart or a reason, and each command of ours parses and runs."""

from collections import Counter

import pytest

from helpers.page_workspace import Workspace, words
from helpers.pages import comparison_rows
from helpers.tiny_runs import ROOT, parse_config

PAGE = ROOT / "docs" / "coming_from.md"
ROWS = comparison_rows(PAGE.read_text())
CASES = [pytest.param(row, id=row.id) for row in ROWS if row.commands]
PACKAGES = {"sd_curriculum": "bitsandbytes", "--logger wandb": "wandb"}  # optional ones, by a word of a command
KINDS = ("here", "not here yet", "not here, because")


def kind(row) -> str:
    """Which of `KINDS` a row is."""
    return next((each for each in KINDS[1:] if row.ours.startswith(each)), "here")


def summary(rows) -> str:
    """How many rows have a counterpart of ours, of how many, with how many commands, and what the others are."""
    counts = Counter(map(kind, rows))
    commands = sum(len(row.commands) for row in rows)
    others = ", ".join(f"{counts[each]} {each}" for each in KINDS[1:])
    return f"{PAGE.name}: {counts['here']} of {len(rows)} rows covered, by {commands} commands ({others} ...)"


def test_each_row_has_a_counterpart_or_a_reason(record_property):
    record_property("summary", summary(ROWS))
    for row in ROWS:
        assert row.theirs and row.ours, row
        if "not here" in row.ours:
            assert row.ours == "not here yet" or row.ours.startswith("not here, because "), row
            assert not row.commands, row


def test_the_summary_counts_each_row_once():
    table = "## A\n\n| theirs | ours | note |\n|---|---|---|\n"
    here, later = '| `a` | `python b.py --c "d e"`, `make f` | |\n', "| g | not here yet | |\n"
    rows = comparison_rows(table + here + later + "| h | not here, because i | |\n\nm | n | o\n")
    assert [kind(row) for row in rows] == ["here", "not here yet", "not here, because"]
    assert rows[0].commands == ('python b.py --c "d e"',) and rows[0].id == "a-1-b" and rows[1].id == "a-2"
    assert "1 of 3 rows covered, by 1 commands (1 not here yet, 1 not here, because ...)" in summary(rows)


@pytest.mark.parametrize("row", CASES)
def test_commands_of_a_row_parse(row, monkeypatch, tmp_path):
    for command in row.commands:
        script, *flags = words(command)
        assert (ROOT / script).is_file()
        if script == "convert.py":  # reads the weights first: it is parsed where it runs
            continue
        logs = [] if script.endswith("make_panoptic.py") else ["--logs_root", str(tmp_path)]
        assert parse_config(script, [*flags, *logs], monkeypatch)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("coming_from"))


@pytest.mark.slow
@pytest.mark.parametrize("row", CASES)
def test_commands_of_a_row_run(row, workspace):
    if "demo.py" in row.ours:
        pytest.skip("needs a browser")
    for word, package in PACKAGES.items():
        if word in row.ours:
            pytest.importorskip(package)
    for command in row.commands:
        workspace.run(command)
