"""Distance against steps and against time, a line for each solver."""

from pathlib import Path
from typing import Any

from experiments.metrics.atomic import whole_file

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all eyes
MARKERS = "osD^vPX"
NEAR = 1.1  # of the first row's distance


def plot(path: Path, rows: list[dict[str, Any]], metric: str, title: str) -> None:
    """PNG of `summed_up` rows: the first row's distance is a dashed line, and a band reaches 10 % above it.

    Solvers that choose their number of steps stand where their network calls per batch are.
    """
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, and no window is asked for

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(1, 2, sharey=True)
    first, lines = rows[0], {}
    for row in rows:
        lines.setdefault(row["solver"], []).append(row)
    across = (
        ("sampling steps", lambda row: row["calls_per_batch"] if row["steps"] is None else row["steps"]),
        ("seconds per image", lambda row: row["seconds_per_image"]),
    )
    for panel, (name, of) in zip(panels, across, strict=True):
        panel.axhspan(first["distance"], NEAR * first["distance"], color="0.88", zorder=0)
        steps = "" if first["steps"] is None else f" of {first['steps']} steps"
        label = f"{first['solver']}{steps}, + 10 %"
        panel.axhline(first["distance"], color="0.3", linestyle="--", linewidth=1, label=label)
        for i, (solver, mine) in enumerate(lines.items()):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
            mine = sorted(mine, key=of)
            panel.plot([of(row) for row in mine], [row["distance"] for row in mine], label=solver, **style)
            for row in mine:  # each seed's, where there are several
                if len(row["distances"]) > 1:
                    panel.plot([of(row)] * len(row["distances"]), row["distances"], "_", color=style["color"])
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        plain_numbers(panel.xaxis, [of(row) for row in rows])
        plain_numbers(panel.yaxis, [row["distance"] for row in rows])
    shown = sorted({across[0][1](row) for row in rows})
    panels[0].set_xticks(shown, [f"{x:g}" for x in shown])
    panels[0].set_ylabel(f"{metric}, less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")


def plain_numbers(axis: Any, values: list[float]) -> None:
    """Some round numbers as the ticks of a logarithmic axis of positive values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    wide = max(values) > 10 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
