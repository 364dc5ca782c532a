"""Speed of the backends of neighbourhood attention by grid size: a table and a plot of time, memory and error.

The backends of models/neighborhood.py, forward and forward+backward, are timed in turn; flex on CUDA only.
"""

import dataclasses
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.harness.report import table, three_digits
from experiments.harness.results import write_results
from experiments.metrics.cost import device_name, median_seconds, peak_extra_bytes
from experiments.metrics.speed_results import Row, timing_row
from models.neighborhood import Group, make_window, natten_is_compiled, neighborhood_attention_2d, resolve_backend
from models.ranges import MILLION, NOT_NEGATIVE, SIZE, check_ranges
from train.cli.files import run_folder
from train.config import LoggingConfig
from train.distributed import pick_device
from train.files import atomic_write
from train.runs import open_run, run_lock

COLORS = {"dense": "#d55e00", "tiled": "#0072b2", "natten": "#009e73", "flex": "#cc79a7"}  # colour-blind safe
HEADING = (
    *("tokens", "kernel", "dilation", "backend", "forward ms", "fwd+bwd ms", "peak extra MiB"),
    *("forward/dense", "fwd+bwd/dense", "forward/natten", "max error"),
)
LEGEND = """
*: chosen by backend "auto". ms: median milliseconds, lower is better. /dense, /natten: time relative to that backend.
dense: PyTorch's scaled_dot_product_attention with the same mask (bfloat16 on CPU: models/sdpa.py, up to 1,024 tokens).
peak extra: memory of forward+backward beyond the inputs and tables computed once per shape. max error: maximum absolute
error of the output relative to its largest float64 value. -: skipped or not supported"""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Benchmark."""

    sizes: tuple[int, ...] = (16, 32, 64, 128)
    """Side lengths of the square grids, in tokens."""
    kernel_size: int = 7
    """Window size per axis, in tokens; odd."""
    dilations: tuple[int, ...] = (1,)
    """Dilations of the window."""
    heads: int = 8
    """Attention heads."""
    head_width: int = 64
    """Channels per head."""
    batch_size: int = 1
    """Grids per batch."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type of the inputs."""
    repeats: int = 5
    """Timed runs of each kind, after two warm-ups."""
    dense_limit: int = 4096
    """Largest number of tokens for quadratic attention: dense, natten without CUDA kernels, the float64 reference."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""

    EVERYDAY = ("sizes", "kernel_size", "dilations", "heads", "head_width", "batch_size", "precision", "device")
    RANGES = {
        "sizes": SIZE,
        "kernel_size": SIZE,
        "dilations": SIZE,
        "heads": SIZE,
        "head_width": SIZE,
        "batch_size": MILLION,
        "repeats": MILLION,
        "dense_limit": NOT_NEGATIVE,
    }

    def __post_init__(self):
        check_ranges(self)
        for name in ("sizes", "dilations"):
            if not getattr(self, name):
                raise ValueError(f"got no {name}, wanted one or more: pass --{name} N N ...")


@dataclass(frozen=True, kw_only=True)
class ResultsConfig:
    """Output."""

    log_dir: str = "benchmark_attention"
    """Results folder, below --logs_root."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""

    EVERYDAY = ("log_dir",)


@dataclass(frozen=True, kw_only=True)
class AttentionResults:
    """What config.yaml of the results folder holds."""

    benchmark: AttentionConfig
    results: ResultsConfig


class Case(NamedTuple):
    """A square grid and a square window."""

    side: int  # tokens
    kernel: int
    dilation: int

    @property
    def name(self) -> str:
        """The case as printed."""
        return f"{self.side}x{self.side}, dilation {self.dilation}"


class Inputs(NamedTuple):
    """Inputs of attention, (B, H, W, heads, d) each."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor  # with respect to the output


class Cost(NamedTuple):
    """Time, memory and error of one backend; None if skipped or not supported."""

    forward: float | None = None  # seconds
    forward_backward: float | None = None  # seconds
    peak: int | None = None  # bytes, of forward and backward
    error: float | None = None  # max |out - float64| / max |float64|


def save_attention(settings: AttentionConfig, results: ResultsConfig) -> list[Row]:
    """Measures attention; writes results.json, after each case, and times.png to <logs_root>/<log_dir>."""
    device = pick_device(settings.device)
    check_windows(settings)
    facts = machine_facts(device)
    folder = run_folder(results.logs_root, results.log_dir)

    def write(rows: list[dict[str, Any]]) -> None:
        write_results(folder, facts | dataclasses.asdict(settings) | {"device": device.type, "rows": rows})

    with run_lock(folder):
        open_run(folder, AttentionResults(benchmark=settings, results=results), facts)
        print(f"results: {folder}", flush=True)
        rows = measure_attention(settings, device, write)
    plot(folder / "times.png", rows, describe_attention(settings, device))
    print(f"\n{folder / 'results.json'}\n{folder / 'times.png'}")
    return attention_timings(rows)


def measure_attention(
    settings: AttentionConfig, device: torch.device, write: Callable[[list[dict[str, Any]]], None] = lambda rows: None
) -> list[dict[str, Any]]:
    """Measures each backend at each size and dilation, and prints a table; `write` is called with the rows so far."""
    c, rows = settings, []
    for side, dilation in product(c.sizes, c.dilations):
        inputs = make_inputs(side, c.batch_size, c.heads, c.head_width, getattr(torch, c.precision), device)
        case = Case(side, c.kernel_size, dilation)
        print(f"timing {case.name}", file=sys.stderr, flush=True)
        costs = compare(case, inputs, dense_limit=c.dense_limit, repeats=c.repeats)
        rows += [result_row(case, name, costs) | {"auto": name == auto_backend(case, inputs)} for name in costs]
        write(rows)
    print(f"\n{describe_attention(c, device)}\n\n{table([HEADING, *map(table_row, rows)])}\n{LEGEND}")
    return rows


def check_windows(settings: AttentionConfig) -> None:
    """Raises ValueError for a window that does not fit a grid, before anything runs."""
    for side, dilation in product(settings.sizes, settings.dilations):
        make_window((side, side), settings.kernel_size, dilation)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Returns what results.json says of the machine."""
    return {"machine": device_name(device), "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def describe_attention(settings: AttentionConfig, device: torch.device) -> str:
    """Returns the title of the table and the plot."""
    c, facts = settings, machine_facts(device)
    threads = f", threads: {facts['threads']}" if device.type == "cpu" else ""
    return (
        f"Neighbourhood attention, kernel {c.kernel_size}x{c.kernel_size}\n"
        f"{facts['machine']}{threads}, torch {facts['torch']}\n"
        f"{c.heads} heads of {c.head_width} channels, batch size {c.batch_size}, {c.precision}, median of {c.repeats}"
    )


def attention_timings(rows: list[dict[str, Any]]) -> list[Row]:
    """Returns the rows of results.json as figures of workloads."""
    return [
        timing_row(
            f"attention {'x'.join(map(str, row['tokens']))}, kernel {row['kernel_size']}, dilation {row['dilation']}, "
            f"{row['backend']}, {part.replace('_', ' and ')}",
            [row[f"{part}_seconds"]],
        )
        for row in rows
        for part in ("forward", "forward_backward")
        if row[f"{part}_seconds"] is not None
    ]


def result_row(case: Case, name: str, costs: dict[str, Cost]) -> dict[str, Any]:
    """Returns one row of results.json: seconds, bytes, and None for what was not measured."""
    cost, dense, natten = costs[name], costs["dense"], costs.get("natten")
    return {
        "tokens": [case.side, case.side],
        "kernel_size": case.kernel,
        "dilation": case.dilation,
        "backend": name,
        "forward_seconds": cost.forward,
        "forward_backward_seconds": cost.forward_backward,
        "peak_extra_bytes": cost.peak,
        "forward_over_dense": ratio(cost.forward, dense.forward),
        "forward_backward_over_dense": ratio(cost.forward_backward, dense.forward_backward),
        "forward_over_natten": ratio(cost.forward, natten.forward if natten else None),
        "max_error": cost.error,
    }


def ratio(part: float | None, whole: float | None) -> float | None:
    """Returns part / whole, None if one is missing."""
    return None if part is None or whole is None else part / whole


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats a row of results as a row of the table."""
    first = ("x".join(map(str, row["tokens"])), str(row["kernel_size"]), str(row["dilation"]))
    return (
        *(*first, row["backend"] + "*" * row["auto"]),
        *(three_digits(row[name], 1000) for name in ("forward_seconds", "forward_backward_seconds")),
        three_digits(row["peak_extra_bytes"], 2**-20),
        *(three_digits(row[f"{part}_over_dense"]) for part in ("forward", "forward_backward")),
        three_digits(row["forward_over_natten"]),
        "-" if row["max_error"] is None else f"{row['max_error']:.1e}",
    )


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plots time against tokens, one panel per dilation: forward+backward solid, forward dashed with hollow markers."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed
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
            own = [r for r in rows if (r["backend"], r["dilation"]) == (name, dilation)]
            for part, style in styles.items():
                line = sorted((r["tokens"][0] ** 2, 1000 * r[part]) for r in own if r[part] is not None)
                panel.plot([x for x, _ in line], [y for _, y in line], color=color, marker="o", **style)
        panel.set(xscale="log", yscale="log", xlabel="grid size (tokens)")
        panel.set_xticks([side**2 for side in sides], [f"{side}x{side}" for side in sides])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"dilation {dilation}", fontsize=11)
    panels[0].set_ylabel("time (ms), lower is better")
    names = [name for name in COLORS if any(r["backend"] == name and r["forward_seconds"] is not None for r in rows)]
    keys = [Line2D([], [], color=COLORS[name], linewidth=4, label=name) for name in names]
    keys += [Line2D([], [], color="0.3", marker="o", **style) for style in styles.values()]
    figure.legend(handles=keys, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


def make_inputs(side: int, batch: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draws normal inputs, the same on every device."""
    draws = torch.randn(4, batch, side, side, heads, width, generator=torch.Generator().manual_seed(0))
    return Inputs(*(x.clone() for x in draws.to(device, dtype)))


def auto_backend(case: Case, inputs: Inputs) -> str:
    """Returns the backend that "auto" chooses."""
    window = make_window((case.side, case.side), case.kernel, case.dilation)
    return resolve_backend("auto", inputs.query, Group(window, inputs.key.shape[-2]))


def compare(case: Case, inputs: Inputs, *, dense_limit: int, repeats: int) -> dict[str, Cost]:
    """Measures each backend. Memory is measured after the times, when tables computed once per shape exist."""
    device, tokens = inputs.query.device, case.side**2
    expected = reference(case, inputs) if tokens <= dense_limit else None
    costs, runs = {}, {}
    with warnings.catch_warnings():
        for module in ("natten", r"torch\.nn\.attention\.flex_attention"):
            warnings.filterwarnings("ignore", module=module)
        for name, make in backends(case, device).items():
            costs[name] = Cost()
            if tokens > dense_limit and is_quadratic(name, device):
                continue
            try:
                attention = make()
                forward, forward_backward = (
                    partial(run_forward, attention, inputs),
                    partial(run_forward_backward, attention, inputs),
                )
                out = forward()
                if has_backward(name, device):
                    forward_backward()
            except unsupported_errors(name) as error:
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                print(f"{name} skipped at {case.name}: {reason[:200]}", flush=True)
                continue
            costs[name] = Cost(error=None if expected is None else relative_error(out, expected))
            runs[name, "forward"] = forward
            if has_backward(name, device):
                runs[name, "forward_backward"] = forward_backward
        seconds = median_seconds(runs, repeats, device)
        for name, part in runs:
            costs[name] = costs[name]._replace(**{part: seconds[name, part]})
            if part == "forward_backward":
                costs[name] = costs[name]._replace(peak=peak_extra_bytes(runs[name, part], device))
    return costs


def unsupported_errors(name: str) -> tuple[type[Exception], ...]:
    """Returns the exceptions that a backend raises for shapes or machines that it does not support."""
    if name == "natten":
        return NotImplementedError, ValueError, RuntimeError
    if name == "flex":
        from torch._dynamo.exc import TorchDynamoException

        return torch.OutOfMemoryError, NotImplementedError, ValueError, TorchDynamoException
    return (torch.OutOfMemoryError,)


def backends(case: Case, device: torch.device) -> dict[str, Callable[[], Attention]]:
    """Returns the factory of each backend's attention function, by name."""
    names = ["dense", "tiled"] + ["natten"] * (importlib.util.find_spec("natten") is not None)
    names += ["flex"] * (device.type == "cuda")  # elsewhere it computes all pairs, uncompiled
    window = {"kernel_size": case.kernel, "dilation": case.dilation}
    return {name: partial(partial, neighborhood_attention_2d, **window, backend=name) for name in names}


def is_quadratic(name: str, device: torch.device) -> bool:
    """Returns whether the backend is quadratic in the tokens, as is natten without its CUDA kernels."""
    return name == "dense" or name == "natten" and not (device.type == "cuda" and natten_is_compiled())


def has_backward(name: str, device: torch.device) -> bool:
    """Returns whether the backend supports gradients on this device."""
    return name != "natten" or device.type != "cpu"


@torch.no_grad()
def run_forward(attention: Attention, inputs: Inputs) -> Tensor:
    """Runs the forward pass without gradients."""
    return attention(*inputs[:3])


def run_forward_backward(attention: Attention, inputs: Inputs) -> None:
    """Runs the forward and the backward pass."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    torch.autograd.grad(attention(*leaves), leaves, inputs.gradient)


@torch.no_grad()
def reference(case: Case, inputs: Inputs) -> Tensor:
    """Computes dense attention in float64, on the CPU: not every device has float64."""
    query, key, value = (x.cpu().double() for x in inputs[:3])
    return neighborhood_attention_2d(query, key, value, case.kernel, case.dilation, backend="dense")


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute error over the largest absolute value."""
    return ((out.cpu().double() - expected).abs().max() / expected.abs().max()).item()
