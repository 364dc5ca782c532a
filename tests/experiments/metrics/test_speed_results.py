"""Files of figures, and the comparison of two."""

import dataclasses
import json

import pytest

from experiments.metrics.speed_results import Figures, compare, timing_row

BEFORE = Figures(
    machine="M",
    processor="P",
    torch="2",
    threads=2,
    commit="abc",
    settings={"batch_size": 4},
    rows=[timing_row("a", [2.0, 3.0, 7.0], launches=300, waits=4), timing_row("b", [1.0]), timing_row("c", [1.0])],
)


def test_figures_are_read_as_they_were_written(tmp_path):
    BEFORE.write(tmp_path / "figures.json")
    assert Figures.read(tmp_path / "figures.json") == BEFORE
    assert BEFORE.rows[0] == {
        **{"workload": "a", "seconds": 3.0, "min_seconds": 2.0, "max_seconds": 7.0, "runs": 3},
        **{"launches": 300, "waits": 4},
    }
    assert "waits" not in timing_row("a", [1.0], waits=None)


def test_a_comparison_names_ratios_and_differences():
    rows = [timing_row("a", [1.5], launches=200, waits=0), timing_row("c", [2.0]), timing_row("d", [1.0])]
    after = dataclasses.replace(BEFORE, threads=4, commit="def", settings={"batch_size": 8, "new": 1}, rows=rows)
    assert [line.split() for line in compare(BEFORE, after).splitlines()[2:4]] == [
        ["a", "3", "1.5", "2.00x", "300", "->", "200", "4", "->", "0"],
        ["c", "1", "2", "0.50x", "-", "-"],
    ]
    assert compare(BEFORE, after).splitlines()[4:] == [
        *("only before: b", "only after: d", "not the same: threads 2 -> 4, commit abc -> def"),
        "other settings: --batch_size 4 -> 8",
    ]
    assert len(compare(BEFORE, BEFORE).splitlines()) == 2 + 3


@pytest.mark.parametrize("content", ["", "[]", "{}", "1", '{"rows": []}', "changed"])
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / "other.json").write_text(
        json.dumps(dataclasses.asdict(BEFORE) | {"rows": [{"workload": "a", "seconds": 0}]})
        if content == "changed"
        else content
    )
    with pytest.raises(ValueError, match="holds no figures.*--out"):
        Figures.read(tmp_path / "other.json")
