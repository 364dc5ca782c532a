"""Are generated digits good? A classifier of real digits, class balance, memorization: one table, one picture.

It reads a samples.npz of experiments/get_samples.py and holds its figures against goals.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig  # noqa: E402
from train.cli import run_script  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check."""

    samples: str | None = None
    """The samples.npz to check; left out, that of get_samples.py with the same model."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks generated digits; results.json and digits.png lie in <logs_root>/<log_dir>."""

    check: CheckConfig
    model: ModelConfig
    output: OutputConfig


def main(config: Config) -> None:
    from experiments.experiment import load_model, open_results, results_folder, write_results
    from experiments.images import read_samples, save_grid
    from experiments.metrics.digits import GOALS, figures, picture
    from experiments.table import table

    trained = load_model(config.model, config.output)
    folder = open_results("check_digits", config, trained)
    default = results_folder("samples", config.model, config.output, trained) / "samples.npz"
    samples = read_samples(Path(config.check.samples or default))
    found = figures(samples, trained)
    save_grid(folder / "digits.png", picture(samples, trained), columns=20)
    write_results(folder, found)
    rows = [("figure", "found", "goal")]
    for name in found:
        sign, goal = GOALS[name]
        met = found[name] >= goal if sign == ">=" else found[name] <= goal
        rows.append((name, f"{found[name]:.3f}", f"{sign} {goal:.3g}{'' if met else '  (missed)'}"))
    print(f"\n{len(samples['image'])} generated digits\n{table(rows)}")
    print(f"\n{folder / 'results.json'}\n{folder / 'digits.png'}")


if __name__ == "__main__":
    run_script(main, Config, "check_digits")
