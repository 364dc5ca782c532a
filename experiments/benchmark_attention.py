"""What neighbourhood attention costs on this machine, by backend and grid: one table, one picture.

Every backend of models/neighborhood.py, forward and forward+backward, measured in turn; on CUDA PyTorch's compiled
flex_attention beside them.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.metrics.atomic import whole_file  # noqa: E402
from experiments.table import table  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import LoggingConfig  # noqa: E402

COLORS = {"dense": "#d55e00", "tiled": "#0072b2", "natten": "#009e73", "flex": "#cc79a7"}  # told apart by all eyes
HEADING = (
    *("tokens", "kernel", "dilation", "backend", "forward ms", "fwd+bwd ms", "peak extra MiB"),
    *("forward/dense", "fwd+bwd/dense", "forward/natten", "max error"),
)
LEGEND = """
* what backend "auto" takes; ms: medians; /dense, /natten: its time over theirs, less is faster; dense: PyTorch's
scaled_dot_product_attention under the same mask (bfloat16 on a CPU: models/attend.py writes it out up to 1,024 tokens);
peak extra: of forward+backward, above inputs and the tables that a shape needs once; max error: of the output against
float64, over its largest value; -: left out, or cannot be done"""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Benchmark."""

    sizes: tuple[int, ...] = (16, 32, 64, 128)
    """Sides of the square grids, tokens."""
    kernel_size: int = 7
    """Keys per axis that a query sees, odd."""
    dilations: tuple[int, ...] = (1,)
    """Distances between them."""
    heads: int = 8
    """Heads."""
    head_width: int = 64
    """Width of each."""
    batch_size: int = 1
    """Grids at once."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the inputs."""
    repeats: int = 5
    """Counted runs of each kind, after two that are not counted."""
    dense_limit: int = 4096
    """Most tokens for what compares all pairs: dense, natten without CUDA kernels, and the float64 reference."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""

    def __post_init__(self):
        for name in ("sizes", "dilations"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                got = " ".join(map(str, getattr(self, name))) or "none"
                raise ValueError(f"got {name} {got}, wanted one or more, each at least 1: pass --{name} N N ...")
        for name, low in (("heads", 1), ("head_width", 1), ("batch_size", 1), ("repeats", 1), ("dense_limit", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Results."""

    log_dir: str = "benchmark_attention"
    """Folder of the results, below --logs_root."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Times neighbourhood attention; results.json and times.png lie in <logs_root>/<log_dir>."""

    benchmark: BenchmarkConfig
    results: ResultsConfig


def main(config: Config) -> None:
    import torch

    from experiments.experiment import write_results
    from experiments.metrics.attention_speed import Case, chosen_by_auto, compare, make_inputs
    from experiments.metrics.cost import machine
    from models.neighborhood import window_of
    from train.distributed import pick_device
    from train.runs import open_run, run_folder

    c = config.benchmark
    device = pick_device(c.device)
    for side in c.sizes:
        for dilation in c.dilations:
            window_of((side, side), c.kernel_size, dilation)  # ValueError where it does not fit, before anything runs
    facts = {"machine": machine(device), "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    folder = run_folder(config.results.logs_root, config.results.log_dir)
    open_run(folder, config, facts)
    print(f"results: {folder}", flush=True)
    rows = []
    for side in c.sizes:
        inputs = make_inputs(side, c.batch_size, c.heads, c.head_width, getattr(torch, c.precision), device)
        for dilation in c.dilations:
            case = Case(side, c.kernel_size, dilation)
            print(f"measuring {case.name}", file=sys.stderr, flush=True)
            costs = compare(case, inputs, dense_limit=c.dense_limit, repeats=c.repeats)
            rows += [row(case, name, costs) | {"auto": name == chosen_by_auto(case, inputs)} for name in costs]
            write_results(folder, facts | dataclasses.asdict(c) | {"device": device.type, "rows": rows})
    threads = f", threads: {facts['threads']}" if device.type == "cpu" else ""
    title = (
        f"Neighbourhood attention, kernel {c.kernel_size}x{c.kernel_size}\n"
        f"{facts['machine']}{threads}, torch {facts['torch']}\n"
        f"{c.heads} heads of {c.head_width}, batch {c.batch_size}, {c.precision}, median of {c.repeats}"
    )
    print(f"\n{title}\n\n{table([HEADING, *map(words, rows)])}\n{LEGEND}")
    plot(folder / "times.png", rows, title)
    print(f"\n{folder / 'results.json'}\n{folder / 'times.png'}")


def row(case, name: str, costs: dict) -> dict[str, Any]:
    """One line of results.json: seconds, bytes, and None for what was not measured."""
    cost, dense, natten = costs[name], costs["dense"], costs.get("natten")
    return {
        "tokens": [case.side, case.side],
        "kernel_size": case.kernel,
        "dilation": case.dilation,
        "backend": name,
        "forward_seconds": cost.forward,
        "forward_backward_seconds": cost.both,
        "peak_extra_bytes": cost.peak,
        "forward_over_dense": ratio(cost.forward, dense.forward),
        "forward_backward_over_dense": ratio(cost.both, dense.both),
        "forward_over_natten": ratio(cost.forward, natten.forward if natten else None),
        "max_error": cost.error,
    }


def ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


def words(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of results as a row of the table."""
    first = ("x".join(map(str, row["tokens"])), str(row["kernel_size"]), str(row["dilation"]))
    return (
        *(*first, row["backend"] + "*" * row["auto"]),
        *(short(row[name], 1000) for name in ("forward_seconds", "forward_backward_seconds")),
        short(row["peak_extra_bytes"], 2**-20),
        *(short(row[f"{part}_over_dense"]) for part in ("forward", "forward_backward")),
        short(row["forward_over_natten"]),
        "-" if row["max_error"] is None else f"{row['max_error']:.1e}",
    )


def short(value: float | None, unit: float = 1.0) -> str:
    """Three digits that count, never as a power of ten."""
    return "-" if value is None else f"{float(f'{value * unit:.3g}'):g}"


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Milliseconds against tokens, one panel per dilation: forward+backward solid, forward dashed and hollow."""
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, and no window is asked for
    from matplotlib.lines import Line2D

    dilations = sorted({r["dilation"] for r in rows})
    sides = sorted({r["tokens"][0] for r in rows})
    styles = {
        "forward_backward_seconds": {"label": "forward + backward", "linestyle": "-"},
        "forward_seconds": {"label": "forward", "linestyle": "--", "markerfacecolor": "white"},
    }
    figure = Figure(figsize=(3 + 4.5 * len(dilations), 5.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(dilations), sharey=True, squeeze=False)[0]
    for panel, dilation in zip(panels, dilations, strict=True):
        for name, color in COLORS.items():
            mine = [r for r in rows if (r["backend"], r["dilation"]) == (name, dilation)]
            for part, style in styles.items():
                line = sorted((r["tokens"][0] ** 2, 1000 * r[part]) for r in mine if r[part] is not None)
                panel.plot([x for x, _ in line], [y for _, y in line], color=color, marker="o", **style)
        panel.set(xscale="log", yscale="log", xlabel="tokens")
        panel.set_xticks([side**2 for side in sides], [f"{side}x{side}" for side in sides])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"dilation {dilation}", fontsize=11)
    panels[0].set_ylabel("milliseconds")
    names = [name for name in COLORS if any(r["backend"] == name and r["forward_seconds"] is not None for r in rows)]
    keys = [Line2D([], [], color=COLORS[name], linewidth=4, label=name) for name in names]
    keys += [Line2D([], [], color="0.3", marker="o", **style) for style in styles.values()]
    figure.legend(handles=keys, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_script(main, Config, "benchmark_attention")
