"""One trained sampler drawn from by every solver it has: distance, time and network calls against steps.

python experiments/compare_samplers.py
python experiments/compare_samplers.py --sampler ddpm --steps 10 20 50
python experiments/compare_samplers.py --solvers ancestral:256 halton:12:temp=0.9 confidence:8:choice_temp=2
"""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor

from diffusion.solvers import Solver, solvers_of
from experiments.harness.batches import ResumableBatches, experiment_world
from experiments.harness.experiment import (
    ExperimentSetup,
    ModelConfig,
    OutputConfig,
    load_model,
    open_batches,
    open_results_folder,
    run_defaults,
    write_results,
)
from experiments.harness.images import GRID_IMAGES
from experiments.harness.report import mean_and_deviation, progress, table
from experiments.metrics import features as all_features
from experiments.metrics.cost import count_nfe
from experiments.metrics.distances import generated_statistics, real_statistics, statistics_cache
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from train.cli.parse import parse_arguments, resolve_sampler, run_script
from train.config import SamplingConfig
from train.files import atomic_write
from train.registry import load_plugin
from train.trained_sampler import TrainedSampler

AUTO = (  # in this order, and after them any other; the first that a process has is the yardstick
    *("ancestral:256", "ancestral", "halton", "confidence", "remask", "first_hitting", "raster"),
    *("ddpm:250", "ddim", "dpmpp_2m", "unipc", "heun"),
)
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all eyes
MARKERS = "osD^vPX"
NEAR = 1.1  # of the first row's distance


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    solvers: tuple[str, ...] = ("auto",)
    """name, name:steps or name:steps:key=value,key=value with flags of Sampling; ratios are to the first. auto: all."""
    steps: tuple[int, ...] = (4, 8, 12, 16, 32, 64)
    """Steps of each solver that is named without; first_hitting and raster have their own."""
    seeds: int = 1
    """Sets of images of each, from --seed on: the same seeds for all."""
    n_samples: int = 1000
    """Images of each set."""
    features: str = "auto"
    """Features of the distance: a file of experiments/metrics/features, or auto."""

    def __post_init__(self):
        if not self.solvers:
            raise ValueError("got no solvers, wanted at least one: pass --solvers NAME:STEPS, or leave it out")
        for entry in self.solvers:
            parse_entry(entry)
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"got steps {list(self.steps)}, wanted numbers of at least 1: pass --steps N N")
        for name, low in (("seeds", 1), ("n_samples", 2)):
            value = getattr(self, name)
            if value < low:
                raise ValueError(f"got {name} {value}, wanted at least {low}: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures every solver: results.json, compare_samplers.png and a picture of each lie in <logs_root>/<log_dir>."""

    comparison: ComparisonConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def shared_settings(argv: list[str], section: str) -> dict:
    """What a run was trained with, without what is of its own solver."""
    settings = run_defaults(argv, section)
    own = load_plugin("train.samplers", resolve_sampler(argv, settings), "sampler").Sampling.solver_setting_names()
    return {key: value for key, value in settings.items() if key not in {"solver", *own}}


def check_shared(sampling: SamplingConfig) -> None:
    """ValueError for a setting that belongs into an entry of --solvers."""
    own = {"solver"} | sampling.solver_setting_names()
    for field in fields(sampling):
        name, value = field.name, getattr(sampling, field.name)
        if name in own and value != field.default:
            raise ValueError(
                f"got {name} {value} for a comparison of solvers, which sets it for each: leave --{name} out, and "
                "write --solvers NAME:STEPS or NAME:STEPS:key=value"
            )


def main(config: Config) -> None:
    check_shared(config.sampling)
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        plan = plan_runs(config.comparison, config.sampling, trained)  # refuses what cannot be before there is a folder
        folder = open_results_folder("compare_samplers", config, trained, world, ExperimentSetup(()))
        batches = open_batches(config, trained, world, folder, files=())
        compare(config.comparison, trained, plan, statistics_cache(config.output.logs_root), batches)


class SolverRun(NamedTuple):
    """One solver with its steps (None: its own number) and its own settings, as they were typed."""

    solver: str
    steps: int | None
    settings: tuple[tuple[str, str], ...] = ()  # (flag, value)

    @property
    def own(self) -> str:
        """The settings as --solvers has them."""
        return ",".join(f"{key}={value}" for key, value in self.settings)

    @property
    def series(self) -> str:
        """What stays the same when the steps change: the name of a line in a plot."""
        return " ".join(filter(None, [self.solver, self.own]))

    def __str__(self) -> str:
        steps = "" if self.steps is None else str(self.steps)
        return ":".join(filter(None, [self.solver, steps, self.own]))


def parse_entry(entry: str) -> SolverRun:
    """name, name:steps, name:key=value,key=value or name:steps:key=value,key=value. ValueError: anything else."""
    name, *rest = entry.split(":")
    steps = rest.pop(0) if rest and "=" not in rest[0] else None
    settings = tuple(tuple(each.split("=")) for each in rest.pop(0).split(",")) if rest else ()
    counted = steps is None or steps.isdecimal() and int(steps) > 0
    told = all(len(each) == 2 and all(each) for each in settings)
    if not (name and counted and told) or rest or (name == "auto" and entry != name):
        wanted = "name, name:steps or name:steps:key=value,key=value, such as halton:12:temp=0.9"
        raise ValueError(f"got solvers entry {entry!r}, wanted {wanted}")
    return SolverRun(name, None if steps is None else int(steps), settings)


def expand_entries(
    entries: Sequence[str], steps: Sequence[int], there: Mapping[str, Solver], codes: int
) -> list[SolverRun]:
    """Every run that entries mean, each once: one without steps takes each of `steps`, and auto is all solvers that
    are `there`, none with more steps than `codes` where it would make no use of them."""
    found, known = [], [parse_entry(entry) for entry in AUTO]
    every = [run for run in known if run.solver in there]
    every += [SolverRun(name, None) for name in sorted({*there} - {run.solver for run in known})]
    for run in map(parse_entry, entries):
        for each in every if run.solver == "auto" else [run]:
            known_by = there.get(each.solver)
            alone = each.steps is not None or known_by is not None and not known_by.takes_any_steps
            in_turn = known_by is not None and known_by.in_turn
            most = codes if run.solver == "auto" and in_turn else max(steps)
            found += [each] if alone else [each._replace(steps=count) for count in steps if count <= most]
    return list(dict.fromkeys(found))


Plan = dict[SolverRun, SamplingConfig]
Row = dict[str, Any]  # of the table: what `summarize_runs` makes


def plan_runs(comparison: ComparisonConfig, sampling: SamplingConfig, trained: TrainedSampler) -> Plan:
    """Every run of --solvers with its options, each begun on one image. ValueError: one that the sampler cannot do."""
    plan, codes = {}, trained.space.tokens or 1
    for run in expand_entries(comparison.solvers, comparison.steps, solvers_of(trained.sampler.process), codes):
        options = replace(sampling, solver=run.solver, sample_steps=run.steps)
        words = [f"--{key}={value}" for key, value in run.settings]
        if words:
            options = parse_arguments(type(options), words, default=options, source=f"--solvers {run}")

        try:
            trained.dry_run(options, trained.condition_source(options))
        except ValueError as error:
            raise ValueError(f"--solvers {run}: {error}") from error
        plan[run] = options
    return plan


def compare(
    comparison: ComparisonConfig, trained: TrainedSampler, plan: Plan, cache: Path, batches: ResumableBatches
) -> None:
    """Measures what is missing in results.json, set by set; then the table and the plot. All ranks take part."""
    folder, world = batches.folder, batches.world
    features = all_features.choose_features(comparison.features, trained.data, trained.device)
    real, size = trained.dataset("train"), batches.batch_size
    reference = real_statistics(real, trained.data, features, None, cache, size, world)
    results = load_or_start_results(features, batches)
    for seed in range(batches.seed, batches.seed + comparison.seeds):
        for run, options in plan.items():
            key = f"{run}/{seed}"
            if any(world.any(world.is_main and key in results["sets"])):
                continue
            found = measure_set(comparison.n_samples, trained, run, options, seed, features, reference, batches)
            if world.is_main:
                results["sets"][key] = found
                write_results(folder, results)  # a comparison that is cut off goes on with the next set
                batches.clear()
    if world.is_main:
        results["summary"] = summarize_runs(results["sets"], list(plan))
        write_results(folder, results)
        what = f"{trained.run.name}, step {trained.step}: {results['metric']} of {comparison.n_samples} samples"
        plot(folder / "compare_samplers.png", results["summary"], results["metric"], what)
        print(f"\n{format_report(results, comparison)}\n\n{folder / 'results.json'}\n{folder / 'compare_samplers.png'}")


def load_or_start_results(features: Features, batches: ResumableBatches) -> dict[str, Any]:
    """The results so far of these features, or none. Features may have changed though the flags have not."""
    path = batches.folder / "results.json"
    made_of = {"features": features.name, "features_version": features.module.VERSION}
    if path.is_file():
        results = json.loads(path.read_text())
        if made_of.items() <= results.items():
            return results
    return {"metric": features.module.METRIC, **made_of, "sets": {}, "run": batches.run}


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
    """Distance and cost of one set of n images; 64 of them become a picture. On the main rank alone.

    Seconds are those of sampling and decoding, not of features: the median over batches, by rank.
    """
    world = batches.world
    source, file = trained.condition_source(options), f"{run}_{seed}".replace(":", "_")

    def make(indices: list[int]) -> dict[str, Tensor]:
        begun = time.perf_counter()
        with count_nfe(trained.sampler.network) as nfe:
            images = trained.draw(indices, seed, options, source.draw(seed, indices))["image"]
        seconds = time.perf_counter() - begun  # the images are on the CPU: the device has done its work
        spent = [nfe.calls, nfe.evaluations, seconds, len(indices)]
        found = {
            "features": features.extract(images.expand(-1, 3, -1, -1)),
            "spent": torch.tensor([spent], dtype=torch.float64),
        }
        return found | ({"image": images} if indices[0] < GRID_IMAGES else {})

    name = f"{features.name}_{features.module.VERSION}_{file}"
    spent = []

    def timed_batches() -> Iterator[dict[str, Tensor]]:
        for batch in progress(batches.resume(name, range(n), make), n, str(run), world.is_main):
            spent.append(batch["spent"])
            yield batch

    generated, _ = generated_statistics(timed_batches(), 0, batches.folder / f"{file}.png")
    if not world.is_main:
        return None
    return {"distance": frechet_distance(generated, reference)} | mean_costs(torch.cat(spent))


def mean_costs(spent: Tensor) -> dict[str, float]:
    """Of batches (B, 4), each with its calls, evaluations, seconds and images."""
    calls, evaluations, seconds, images = spent.unbind(1)
    return {
        "calls_per_batch": calls.mean().item(),
        "evaluations_per_image": (evaluations.sum() / images.sum()).item(),
        "seconds_per_image": statistics.median((seconds / images).tolist()),
    }


def summarize_runs(sets: dict[str, dict[str, float]], runs: list[SolverRun]) -> list[Row]:
    """A row for each run over its seeds; ratios are of mean distances, to the first run's."""
    rows = []
    for run in runs:
        mine = [found for key, found in sets.items() if key.rpartition("/")[0] == str(run)]
        row = {"solver": run.series, "steps": run.steps, "distances": [found["distance"] for found in mine]}
        for key in ("calls_per_batch", "evaluations_per_image"):
            row[key] = statistics.mean(found[key] for found in mine)
        row["seconds_per_image"] = statistics.median(found["seconds_per_image"] for found in mine)
        row["distance"] = statistics.mean(row["distances"])
        row["relative"] = row["distance"] / (rows[0] if rows else row)["distance"]
        rows.append(row)
    return rows


def format_report(results: dict[str, Any], comparison: ComparisonConfig) -> str:
    """The table that a person reads."""
    cost = ("network calls per batch", "evaluations per image", "s per image")
    rows = [("solver", "steps", *cost, results["metric"], f"relative to {results['summary'][0]['solver']}")]
    for row in results["summary"]:
        spent = (
            f"{row['calls_per_batch']:.4g}",
            f"{row['evaluations_per_image']:.4g}",
            f"{row['seconds_per_image']:.2g}",
        )
        steps = "-" if row["steps"] is None else str(row["steps"])
        rows.append((row["solver"], steps, *spent, mean_and_deviation(row["distances"]), f"{row['relative']:.3f}"))
    sets = f"{comparison.seeds} sets" if comparison.seeds > 1 else "one set"
    first = results["summary"][0]
    near = [row for row in results["summary"][1:] if row["relative"] <= 1.1]
    best = min(near, key=lambda row: row["evaluations_per_image"], default=None)
    lines = [f"{sets} of {comparison.n_samples} images of each", table(rows)]
    if best is not None:
        times = first["seconds_per_image"] / best["seconds_per_image"]
        steps = "" if best["steps"] is None else f" in {best['steps']} steps"
        within = f"at most 10 % above {first['solver']} for the fewest evaluations: {best['solver']}{steps}"
        lines.append(f"{within}, {times:.3g} times as fast")
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]], metric: str, title: str) -> None:
    """PNG of `summarize_runs` rows: the first row's distance is a dashed line, and a band reaches 10 % above it.

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
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


def plain_numbers(axis: Any, values: list[float]) -> None:
    """Some round numbers as the ticks of a logarithmic axis of positive values."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    wide = max(values) > 10 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    run_script(main, Config, "compare_samplers", base_values=shared_settings)
