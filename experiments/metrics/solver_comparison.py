"""One trained sampler, several solvers: the distance of each one's images, and the time they took."""

import statistics
import time
from pathlib import Path

from experiments.metrics.comparison import mean_and_deviation
from experiments.metrics.features import Features
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.report import generated_statistics, with_features
from experiments.progress import progress
from experiments.table import table
from train.config import SamplingConfig
from train.generate import TrainedSampler


def measured(
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    n: int,
    batch_size: int,
    features: Features,
    reference: Statistics,
    grid: Path,
) -> dict[str, float]:
    """{distance, seconds} of n images of one seed; the first of them become the picture `grid`."""
    begun = time.perf_counter()
    batches = trained.sample(n, seed, options, batch_size=batch_size)
    name = f"{options.solver}, {options.sample_steps} steps, seed {seed}"
    found = with_features(features, progress(batches, n, name), trained.world)
    generated, _ = generated_statistics(found, 0, grid)
    return {"distance": frechet_distance(generated, reference), "seconds": time.perf_counter() - begun}


def summary(results: dict[str, dict[str, float]], solvers: tuple[str, ...], metric: str) -> str:
    """`results` by "solver:steps/seed" -> a table; ratios are of mean distances, to the first solver's."""
    rows = [("solver", "steps", "sets", metric, "relative to the first", "s per set (median)")]
    means = {}
    for entry in solvers:
        runs = [found for name, found in results.items() if name.rpartition("/")[0] == entry]
        distances = [run["distance"] for run in runs]
        means[entry] = statistics.mean(distances)
        name, _, steps = entry.partition(":")
        seconds = statistics.median(run["seconds"] for run in runs)
        ratio = f"{means[entry] / means[solvers[0]]:.3f}"
        rows.append((name, steps, str(len(runs)), mean_and_deviation(distances), ratio, f"{seconds:.1f}"))
    return table(rows)
