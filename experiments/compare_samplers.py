"""One trained sampler drawn from by every solver it has: distance, time and network calls against steps.

python experiments/compare_samplers.py
python experiments/compare_samplers.py --sampler ddpm --steps 10 20 50
python experiments/compare_samplers.py --solvers ancestral:256 halton:12:temp=0.9 confidence:8:choice_temp=2
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from experiments.solver_runs import OF_ONE_SOLVER, read_entry  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import SamplingConfig  # noqa: E402

OWN = ("solver", *OF_ONE_SOLVER)


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
            read_entry(entry)
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
    return {key: value for key, value in settings_of_run(argv, section).items() if key not in OWN}


def check_shared(sampling: SamplingConfig) -> None:
    """ValueError for a setting that belongs into an entry of --solvers."""
    for name in OWN:
        default = sampling.__dataclass_fields__[name].default if hasattr(sampling, name) else None
        value = getattr(sampling, name, None)
        if value != default:
            raise ValueError(
                f"got {name} {value} for a comparison of solvers, which sets it for each: leave --{name} out, and "
                "write --solvers NAME:STEPS or NAME:STEPS:key=value"
            )


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results
    from experiments.metrics.sampler_comparison import compare, planned
    from experiments.processes import experiment_world

    check_shared(config.sampling)
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        runs = planned(config, trained)  # what cannot be is refused before a folder is opened
        compare(config, trained, runs, open_results("compare_samplers", config, trained))


if __name__ == "__main__":
    run_script(main, Config, "compare_samplers", under=shared_settings)
