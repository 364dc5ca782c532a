"""The same trained sampler drawn from by several solvers, several seeds each: distance and time.

python experiments/compare_solvers.py --sampler ddpm
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    solvers: tuple[str, ...] = ("ddpm:250", "dpmpp_2m:20")
    """Each solver with its steps, as name:steps; distances are told relative to the first. These are ddpm's."""
    seeds: int = 3
    """Sets of images per solver, each of a seed of its own from --seed on."""
    n_samples: int = 1000
    """Images of each set."""
    features: str = "auto"
    """Features of the distance: a file of experiments/metrics/features, or auto."""

    def __post_init__(self):
        for entry in self.solvers:
            name, _, steps = entry.partition(":")
            if not name or not steps.isdigit() or int(steps) < 1:
                raise ValueError(f"got solvers entry {entry!r}, wanted name:steps, such as dpmpp_2m:20")
        if self.seeds < 1 or self.n_samples < 2:
            raise ValueError(f"got seeds {self.seeds}, n_samples {self.n_samples}: wanted at least 1 and 2")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures every solver with every seed: results.json and a picture of each lie in <logs_root>/<log_dir>."""

    comparison: ComparisonConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def main(config: Config) -> None:
    from diffusion.solvers import solver
    from experiments.experiment import load_model, open_results, write_results
    from experiments.metrics import features as all_features
    from experiments.metrics.report import real_statistics, statistics_cache
    from experiments.metrics.solver_comparison import measured, summary

    comparison, output = config.comparison, config.output
    trained = load_model(config.model, output)
    for entry in comparison.solvers:
        solver(trained.sampler.process, entry.partition(":")[0])  # refused before anything is sampled
    folder = open_results("compare_solvers", config, trained)
    features = all_features.choose(comparison.features, trained.data, trained.device)
    cache, real = statistics_cache(output.logs_root), trained.dataset("train")
    reference = real_statistics(real, trained.data, features, None, cache, output.batch_size, trained.world)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    own_eta = {"eta": None} if hasattr(config.sampling, "eta") else {}  # each solver's own
    for seed in range(output.seed, output.seed + comparison.seeds):
        for entry in comparison.solvers:
            name, _, steps = entry.partition(":")
            run = f"{entry}/{seed}"
            if run not in results:
                options = dataclasses.replace(config.sampling, solver=name, sample_steps=int(steps), **own_eta)
                grid = folder / f"{name}_{steps}_{seed}.png"
                results[run] = measured(
                    trained, options, seed, comparison.n_samples, output.batch_size, features, reference, grid
                )
                write_results(folder, results)  # a comparison that is cut off goes on with the next set
    print(f"\n{comparison.n_samples} images a set, {comparison.seeds} seeds")
    print(f"{summary(results, comparison.solvers, features.module.METRIC)}\n\n{path}")


if __name__ == "__main__":
    run_script(main, Config, "compare_solvers", under=settings_of_run)
