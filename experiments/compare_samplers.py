"""Compares the solvers of one trained sampler: Fréchet distance, time and NFE against the number of steps.

python experiments/compare_samplers.py
python experiments/compare_samplers.py --sampler ddpm --steps 10 20 50
python experiments/compare_samplers.py --solvers ancestral:256 halton:12:temp=0.9 confidence:8:choice_temp=2
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from diffusion.solvers import Solver, solvers_for
from experiments.harness.batches import ResumableBatches, experiment_world
from experiments.harness.experiment import (
    ExperimentSetup,
    ModelConfig,
    OutputConfig,
    load_model,
    open_batches,
    open_results_folder,
    run_defaults,
)
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import mean_and_deviation, progress, table
from experiments.harness.results import load_results, write_results
from experiments.metrics.cost import count_nfe
from experiments.metrics.distances import (
    batches_name,
    compute_statistics,
    real_statistics,
    statistics_cache,
    with_grid,
)
from experiments.metrics.features import Features, FeaturesConfig
from experiments.metrics.frechet import Statistics, frechet_distance
from models.ranges import MILLION, check_ranges
from train.cli.parse import BaseSettings, parse_arguments, resolve_sampler, run_script
from train.config import SamplingConfig
from train.files import atomic_write
from train.registry import load_plugin
from train.trained_sampler import TrainedSampler

AUTO = (  # in this order, then all other solvers; the first one that the process supports is the baseline
    *("ancestral:256", "ancestral", "halton", "confidence", "remask", "first_hitting", "raster"),
    *("ddpm:250", "ddim", "dpmpp_2m", "unipc", "heun"),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # colour-blind safe
MARKERS = "osD^vPX"
NEAR = 1.1  # times the baseline's distance


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(FeaturesConfig):
    """Comparison."""

    solvers: tuple[str, ...] = ("auto",)
    """Solvers as name, name:steps or name:steps:key=value,key=value (flags of Sampling); the first is the baseline.
    auto: all solvers."""
    steps: tuple[int, ...] = (4, 8, 12, 16, 32, 64)
    """Numbers of steps for solvers given without; first_hitting and raster determine their own."""
    seeds: int = 1
    """Sets of images per solver, with seeds from --seed on, the same for all solvers."""
    n_samples: int = 1000
    """Images per set."""

    EVERYDAY = ("solvers", "steps", "seeds", "n_samples")
    RANGES = {"steps": MILLION, "seeds": "[1, 10000]", "n_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)
        if not self.solvers:
            raise ValueError("got no solvers, wanted at least one: pass --solvers NAME:STEPS, or leave it out")
        for entry in self.solvers:
            parse_entry(entry)
        if not self.steps:
            raise ValueError("got no steps, wanted one or more: pass --steps N N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures every solver; writes results.json, compare_samplers.png and sample grids to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/compare_samplers.py --sampler {sampler} --dataset mnist",
        "python experiments/compare_samplers.py --load_dir {sampler}_mnist --steps 8 16 --seeds 3",
    )
    NOT_EVERYDAY = ("solver", "sample_steps")

    comparison: ComparisonConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def shared_settings(argv: list[str], section: str) -> BaseSettings:
    """Returns the run's settings as flag defaults, without those of its solver."""
    settings = run_defaults(argv, section)
    own = load_plugin(
        "train.samplers", resolve_sampler(argv, settings.values), "sampler"
    ).Sampling.solver_setting_names()
    return settings._replace(values={k: v for k, v in settings.values.items() if k not in {"solver", *own}})


def check_shared(sampling: SamplingConfig) -> None:
    """Raises ValueError for a setting that belongs in an entry of --solvers."""
    own = {"solver"} | sampling.solver_setting_names()
    for field in fields(sampling):
        name, value = field.name, getattr(sampling, field.name)
        if name in own and value != field.default:
            raise ValueError(
                f"got {name} {value}, which a comparison sets for each solver: leave --{name} out and pass "
                "--solvers NAME:STEPS or NAME:STEPS:key=value"
            )


def main(config: Config) -> None:
    check_shared(config.sampling)
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        plan = plan_runs(config.comparison, config.sampling, trained)  # before the folder is created
        with open_results_folder("compare_samplers", config, trained, world, ExperimentSetup((), timed=True)) as folder:
            batches = open_batches(config, trained, world, folder, files=("inception_weights", "clip_dir"))
            compare(config.comparison, trained, plan, statistics_cache(config.output.logs_root), batches)


class SolverRun(NamedTuple):
    """A solver with its number of steps (None: determined by the solver) and its settings, as typed."""

    solver: str
    steps: int | None
    settings: tuple[tuple[str, str], ...] = ()  # (flag, value)

    @property
    def own(self) -> str:
        """The settings as in an entry of --solvers."""
        return ",".join(f"{key}={value}" for key, value in self.settings)

    @property
    def series(self) -> str:
        """The name of its line in the plot: everything but the steps."""
        return " ".join(filter(None, [self.solver, self.own]))

    def __str__(self) -> str:
        steps = "" if self.steps is None else str(self.steps)
        return ":".join(filter(None, [self.solver, steps, self.own]))


def parse_entry(entry: str) -> SolverRun:
    """Parses name, name:steps, name:key=value,key=value or name:steps:key=value,key=value. ValueError: anything
    else."""
    name, *rest = entry.split(":")
    steps = rest.pop(0) if rest and "=" not in rest[0] else None
    settings = tuple(tuple(each.split("=")) for each in rest.pop(0).split(",")) if rest else ()
    valid_steps = steps is None or steps.isdecimal() and int(steps) > 0
    valid_settings = all(len(each) == 2 and all(each) for each in settings)
    if not (name and valid_steps and valid_settings) or rest or (name == "auto" and entry != name):
        wanted = "name, name:steps or name:steps:key=value,key=value, such as halton:12:temp=0.9"
        raise ValueError(f"got solvers entry {entry!r}, wanted {wanted}")
    return SolverRun(name, None if steps is None else int(steps), settings)


def expand_entries(
    entries: Sequence[str], steps: Sequence[int], solvers: Mapping[str, Solver], codes: int
) -> list[SolverRun]:
    """Returns the runs that the entries stand for, without duplicates.

    An entry without steps takes each of `steps`; auto stands for all `solvers`, without numbers of steps beyond the
    number of codes for solvers that could not use them.
    """
    runs, listed = [], [parse_entry(entry) for entry in AUTO]
    auto = [run for run in listed if run.solver in solvers]
    auto += [SolverRun(name, None) for name in sorted({*solvers} - {run.solver for run in listed})]
    for run in map(parse_entry, entries):
        for each in auto if run.solver == "auto" else [run]:
            solver = solvers.get(each.solver)
            fixed = each.steps is not None or solver is not None and not solver.takes_any_steps
            reveals_every_step = solver is not None and solver.reveals_every_step
            most = codes if run.solver == "auto" and reveals_every_step else max(steps)
            runs += [each] if fixed else [each._replace(steps=count) for count in steps if count <= most]
    return list(dict.fromkeys(runs))


Plan = dict[SolverRun, SamplingConfig]
Row = dict[str, Any]  # of the table, from `summarize_runs`


def plan_runs(comparison: ComparisonConfig, sampling: SamplingConfig, trained: TrainedSampler) -> Plan:
    """Returns the runs of --solvers with their options, each tried on one image. ValueError: an unsupported run."""
    plan, codes = {}, trained.space.tokens or 1
    for run in expand_entries(comparison.solvers, comparison.steps, solvers_for(trained.sampler.process), codes):
        options = replace(sampling, solver=run.solver, sample_steps=run.steps)
        flags = [f"--{key}={value}" for key, value in run.settings]
        if flags:
            options = parse_arguments(type(options), flags, default=options, source=f"--solvers {run}")

        try:
            trained.dry_run(options, trained.condition_source(options))
        except ValueError as error:
            raise ValueError(f"--solvers {run}: {error}") from error
        plan[run] = options
    return plan


def compare(
    comparison: ComparisonConfig, trained: TrainedSampler, plan: Plan, cache: Path, batches: ResumableBatches
) -> None:
    """Measures the sets missing in results.json one by one, then prints the table and saves the plot. All ranks must
    call it."""
    folder, world = batches.folder, batches.world
    features = comparison.load(trained.data, trained.device)
    real, size = trained.dataset("train"), batches.batch_size
    reference = real_statistics(real, trained.data, features, comparison.inception_weights, cache, size, world)
    results = load_or_start_results(features, batches)
    for seed in range(batches.seed, batches.seed + comparison.seeds):
        for run, options in plan.items():
            key = f"{run}/{seed}"
            if any(world.any(world.is_main and key in results["sets"])):
                continue
            measured = measure_set(comparison.n_samples, trained, run, options, seed, features, reference, batches)
            if world.is_main:
                results["sets"][key] = measured
                write_results(folder, results)  # an interrupted comparison resumes with the next set
                batches.clear()
    if world.is_main:
        results["summary"] = summarize_runs(results["sets"], list(plan))
        write_results(folder, results)
        title = f"{trained.run.name}, step {trained.step}: {results['metric']} of {comparison.n_samples} samples"
        plot(folder / "compare_samplers.png", results["summary"], results["metric"], title)
        print(f"\n{format_report(results, comparison)}\n\n{folder / 'results.json'}\n{folder / 'compare_samplers.png'}")


def load_or_start_results(features: Features, batches: ResumableBatches) -> dict[str, Any]:
    """Reads the results so far; starts new ones if the features or the files of their weights have changed, which flags
    do not show."""
    results = load_results(batches.folder)
    identity = {"features": features.name, "features_version": features.module.VERSION}
    same_files = results is not None and results.get("feature_files", {}) == batches.files
    if same_files and identity.items() <= results.items():
        return results
    identity |= {"feature_files": batches.files} if batches.files else {}
    return {"metric": features.module.METRIC, **identity, "sets": {}, "run": batches.run}


def measure_set(
    n: int,
    trained: TrainedSampler,
    run: SolverRun,
    options: SamplingConfig,
    seed: int,
    features: Features,
    reference: Statistics,
    batches: ResumableBatches,
) -> dict[str, float] | None:
    """Measures the distance and cost of one set of n images and saves 64 of them as a grid. All ranks must call it;
    only the main rank gets the results.

    Seconds cover sampling and decoding, not features: the median over the batches of all ranks.
    """
    world = batches.world
    source, file = trained.condition_source(options), f"{run}_{seed}".replace(":", "_")

    def make(indices: list[int]) -> dict[str, Tensor]:
        start = time.perf_counter()
        with count_nfe(trained.sampler.network) as nfe:
            images = trained.draw(indices, seed, options, source.draw(seed, indices))["image"]
        seconds = time.perf_counter() - start  # the images are on the CPU: the device has finished
        cost = [nfe.calls, nfe.evaluations, seconds, len(indices)]
        batch = {
            "features": features.extract(images),
            "spent": torch.tensor([cost], dtype=torch.float64),
        }
        return batch | ({"image": images} if indices[0] < GRID_IMAGES else {})

    name = f"{features.name}_{features.module.VERSION}_{file}"
    name = batches_name(name, batches.files) if batches.files else name
    spent = []

    def timed_batches() -> Iterator[dict[str, Tensor]]:
        for batch in progress(batches.resume(name, range(n), make), n, str(run), world.is_main):
            spent.append(batch["spent"])
            yield batch

    generated = compute_statistics(with_grid(timed_batches(), batches.folder / f"{file}.png"))
    if not world.is_main:
        return None
    return {"distance": frechet_distance(generated, reference)} | mean_costs(torch.cat(spent))


def mean_costs(spent: Tensor) -> dict[str, float]:
    """Summarises the cost of batches (B, 4): calls, evaluations, seconds and images of each."""
    calls, evaluations, seconds, images = spent.unbind(1)
    return {
        "calls_per_batch": calls.mean().item(),
        "evaluations_per_image": (evaluations.sum() / images.sum()).item(),
        "seconds_per_image": statistics.median((seconds / images).tolist()),
    }


def summarize_runs(sets: dict[str, dict[str, float]], runs: list[SolverRun]) -> list[Row]:
    """Returns one row per run, over its seeds, with the mean distance relative to that of the first run."""
    rows = []
    for run in runs:
        own = [each for key, each in sets.items() if key.rpartition("/")[0] == str(run)]
        row = {"solver": run.series, "steps": run.steps, "distances": [each["distance"] for each in own]}
        for key in ("calls_per_batch", "evaluations_per_image"):
            row[key] = statistics.mean(each[key] for each in own)
        row["seconds_per_image"] = statistics.median(each["seconds_per_image"] for each in own)
        row["distance"] = statistics.mean(row["distances"])
        row["relative"] = row["distance"] / (rows[0] if rows else row)["distance"]
        rows.append(row)
    return rows


def format_report(results: dict[str, Any], comparison: ComparisonConfig) -> str:
    """Formats the table, and names the cheapest solver whose distance is close to the baseline's."""
    headings = ("network calls per batch", "evaluations per image", "s/image")
    rows = [("solver", "steps", *headings, results["metric"], f"relative to {results['summary'][0]['solver']}")]
    for row in results["summary"]:
        cost = (
            f"{row['calls_per_batch']:.4g}",
            f"{row['evaluations_per_image']:.4g}",
            f"{row['seconds_per_image']:.2g}",
        )
        steps = "-" if row["steps"] is None else str(row["steps"])
        rows.append((row["solver"], steps, *cost, mean_and_deviation(row["distances"]), f"{row['relative']:.3f}"))
    sets = f"{comparison.seeds} sets" if comparison.seeds > 1 else "one set"
    first = results["summary"][0]
    near = [row for row in results["summary"][1:] if row["relative"] <= NEAR]
    best = min(near, key=lambda row: row["evaluations_per_image"], default=None)
    lines = [f"{sets} of {comparison.n_samples} images per solver; lower is better", table(rows)]
    if best is not None:
        speedup = first["seconds_per_image"] / best["seconds_per_image"]
        steps = "" if best["steps"] is None else f" in {best['steps']} steps"
        within = (
            f"fewest evaluations within 10 % of the {results['metric']} of {first['solver']}: {best['solver']}{steps}"
        )
        lines.append(f"{within}, {speedup:.3g} times as fast")
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]], metric: str, title: str) -> None:
    """Plots rows of `summarize_runs`: the baseline's distance as a dashed line, with a band up to 10 % above it.

    Solvers that determine their number of steps are placed at their network calls per batch.
    """
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(1, 2, sharey=True)
    first, lines = rows[0], {}
    for row in rows:
        lines.setdefault(row["solver"], []).append(row)
    axes = (
        ("sampling steps", lambda row: row["calls_per_batch"] if row["steps"] is None else row["steps"]),
        ("seconds per image", lambda row: row["seconds_per_image"]),
    )
    for panel, (name, x_of) in zip(panels, axes, strict=True):
        panel.axhspan(first["distance"], NEAR * first["distance"], color="0.88", zorder=0)
        steps = "" if first["steps"] is None else f" of {first['steps']} steps"
        label = f"{first['solver']}{steps}, band: + 10 %"
        panel.axhline(first["distance"], color="0.3", linestyle="--", linewidth=1, label=label)
        for i, (solver, own) in enumerate(lines.items()):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
            own = sorted(own, key=x_of)
            panel.plot([x_of(row) for row in own], [row["distance"] for row in own], label=solver, **style)
            for row in own:  # a mark per seed, if there are several
                if len(row["distances"]) > 1:
                    panel.plot([x_of(row)] * len(row["distances"]), row["distances"], "_", color=style["color"])
        panel.set(xscale="log", yscale="log", xlabel=name)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
        plain_numbers(panel.xaxis, [x_of(row) for row in rows])
        plain_numbers(panel.yaxis, [row["distance"] for row in rows])
    tick_values = sorted({axes[0][1](row) for row in rows})
    panels[0].set_xticks(tick_values, [f"{x:g}" for x in tick_values])
    panels[0].set_ylabel(f"{metric}, lower is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


def plain_numbers(axis: Any, values: list[float]) -> None:
    """Sets a few round numbers as the ticks of a logarithmic axis of positive values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    wide = max(values) > 10 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    run_script(main, Config, "compare_samplers", base_values=shared_settings)
