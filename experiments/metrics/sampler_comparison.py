"""One trained sampler, several solvers: the distance of each one's images, and what they cost."""

import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.solvers import solvers_of
from experiments.experiment import write_results
from experiments.images import GRID
from experiments.kept import forget, kept_batches
from experiments.metrics import features as all_features
from experiments.metrics.calls import counted
from experiments.metrics.comparison import mean_and_deviation
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.report import generated_statistics, real_statistics, statistics_cache
from experiments.metrics.solver_plot import plot
from experiments.progress import progress
from experiments.solver_runs import SolverRun, runs_of
from experiments.table import table
from train.cli import interpret, to_dict
from train.config import SamplingConfig
from train.files import sha256
from train.generate import TrainedSampler

Plan = dict[SolverRun, SamplingConfig]
Row = dict[str, Any]  # of the table: what `summed_up` makes


def planned(config: Any, trained: TrainedSampler) -> Plan:
    """Every run of --solvers with its options, each begun on one image. ValueError: one that the sampler cannot do."""
    comparison = config.comparison
    plan, codes = {}, math.prod(trained.space.facts.get("grid", ()))
    for run in runs_of(comparison.solvers, comparison.steps, solvers_of(trained.sampler.process), codes):
        options = replace(config.sampling, solver=run.solver, sample_steps=run.steps)
        words = [f"--{key}={value}" for key, value in run.settings]
        if words:
            options = interpret(type(options), words, default=options, source=f"--solvers {run}")

        try:
            trained.try_out(options)
        except ValueError as error:
            raise ValueError(f"--solvers {run}: {error}") from error
        plan[run] = options
    return plan


def compare(config: Any, trained: TrainedSampler, plan: Plan, folder: Path) -> None:
    """Measures what is missing in results.json, set by set; then the table and the plot. All processes take part."""
    comparison, output, world = config.comparison, config.output, trained.world
    features = all_features.choose(comparison.features, trained.data, trained.device)
    cache, real = statistics_cache(output.logs_root), trained.dataset("train")
    reference = real_statistics(real, trained.data, features, None, cache, output.batch_size, world)
    results = opened(folder, features, config, trained)
    for seed in range(output.seed, output.seed + comparison.seeds):
        for run, options in plan.items():
            key = f"{run}/{seed}"
            if any(world.any(world.is_main and key in results["sets"])):
                continue
            found = measured(config, trained, run, options, seed, features, reference, folder)
            if world.is_main:
                results["sets"][key] = found
                write_results(folder, results)  # a comparison that is cut off goes on with the next set
                forget(folder)
    if world.is_main:
        results["summary"] = summed_up(results["sets"], list(plan))
        write_results(folder, results)
        what = f"{trained.run.name}, step {trained.step}: {results['metric']} of {comparison.n_samples} samples"
        plot(folder / "compare_samplers.png", results["summary"], results["metric"], what)
        print(f"\n{explained(results, comparison)}\n\n{folder / 'results.json'}\n{folder / 'compare_samplers.png'}")


def opened(folder: Path, features: Features, config: Any, trained: TrainedSampler) -> dict[str, Any]:
    """The results so far of these features, or none. Features may have changed though the flags have not."""
    path = folder / "results.json"
    made_of = {"features": features.name, "features_code": code_of(features)}
    if path.is_file():
        results = json.loads(path.read_text())
        if made_of.items() <= results.items():
            return results
    run = to_dict(config) | {"step": trained.step} | trained.origin
    return {"metric": features.module.METRIC, **made_of, "sets": {}, "run": run}


def code_of(features: Features) -> str:
    """SHA-256 of the file that makes them."""
    return sha256(Path(features.module.__file__))


def measured(
    config: Any,
    trained: TrainedSampler,
    run: SolverRun,
    options: SamplingConfig,
    seed: int,
    features: Features,
    reference: Statistics,
    folder: Path,
) -> dict[str, float] | None:
    """Distance and cost of one set of images; 64 of them become a picture. In the main process alone.

    Seconds are those of sampling and decoding, not of features: the median over batches, by process.
    """
    n, size, world = config.comparison.n_samples, config.output.batch_size, trained.world
    held_out, file = trained.held_out(), f"{run}_{seed}".replace(":", "_")

    def make(indices: list[int]) -> dict[str, Tensor]:
        begun = time.perf_counter()
        with counted(trained.sampler.network) as cost:
            images = trained.draw(indices, seed, options, held_out=held_out)["image"]
        seconds = time.perf_counter() - begun  # the images are on the CPU: the device has done its work
        spent = [cost.calls, cost.evaluations, seconds, len(indices)]
        found = {
            "features": features.extract(images.expand(-1, 3, -1, -1)),
            "spent": torch.tensor([spent], dtype=torch.float64),
        }
        return found | ({"image": images} if indices[0] < GRID else {})

    name = f"{features.name}_{code_of(features)[:16]}_{file}"
    batches = kept_batches(folder, name, list(range(n)), size, make, world)
    spent = []

    def noted():
        for batch in progress(batches, n, str(run), world.is_main):
            spent.append(batch["spent"])
            yield batch

    generated, _ = generated_statistics(noted(), 0, folder / f"{file}.png")
    if not world.is_main:
        return None
    return {"distance": frechet_distance(generated, reference)} | costs(torch.cat(spent))


def costs(spent: Tensor) -> dict[str, float]:
    """Of batches (B, 4), each with its calls, evaluations, seconds and images."""
    calls, evaluations, seconds, images = spent.unbind(1)
    return {
        "calls_per_batch": calls.mean().item(),
        "evaluations_per_image": (evaluations.sum() / images.sum()).item(),
        "seconds_per_image": statistics.median((seconds / images).tolist()),
    }


def summed_up(sets: dict[str, dict[str, float]], runs: list[SolverRun]) -> list[Row]:
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


def explained(results: dict[str, Any], comparison: Any) -> str:
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
