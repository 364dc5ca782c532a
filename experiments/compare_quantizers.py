"""What quantizers are worth: the same encoder and decoder trained with each, on the same images, for the same steps.

python experiments/compare_quantizers.py --config configs/mnist_quantizers.yaml
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.comparison_config import BriefTrainingConfig, FolderConfig  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import DataConfig  # noqa: E402
from train.datasets import DatasetConfig  # noqa: E402
from vq.config import VQGANConfig, VQGANLossConfig  # noqa: E402

# What each quantizer changes of the settings that all share. fsq and lfq choose their own width of a code.
VARIANTS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "ema": {},
    "l2": {"emb_dim": 4},  # of few codes fewer are left unused in fewer dimensions
    "gumbel": {"gumbel_kl_weight": 5e-4},
    "fsq": {},
    "lfq": {"entropy_weight": 0.05},  # reconstructions count little beside more, where networks are small
    "ibq": {"entropy_weight": 0.05},
}


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    quantizers: tuple[str, ...] = tuple(VARIANTS)
    """Which of nearest, ema, l2, gumbel, fsq, lfq, ibq."""
    seeds: int = 1
    """Runs of each, of seeds from --seed on."""
    features: str = "auto"
    """Features of the distance: a file of experiments/metrics/features, or auto."""
    rebuilt_at_once: int = 100
    """Validation images rebuilt together; no number depends on it."""

    def __post_init__(self):
        unknown = [name for name in self.quantizers if name not in VARIANTS]
        if unknown or not self.quantizers or len(set(self.quantizers)) < len(self.quantizers):
            raise ValueError(f"got quantizers {list(self.quantizers)}, wanted some of {', '.join(VARIANTS)}, each once")
        if self.seeds < 1 or self.rebuilt_at_once < 1:
            got = f"seeds {self.seeds}, rebuilt_at_once {self.rebuilt_at_once}"
            raise ValueError(f"got {got}: wanted at least 1 of each")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a VQGAN with every quantizer and seed and measures it on the whole validation split: results.json,
    comparison.png and a picture of reconstructions of each run lie in <logs_root>/<log_dir>."""

    comparison: ComparisonConfig
    network: VQGANConfig
    loss: VQGANLossConfig
    data: DataConfig
    reader: DatasetConfig
    training: BriefTrainingConfig
    output: FolderConfig


def networks(config: Config) -> dict[str, VQGANConfig]:
    """The autoencoder with each quantizer; gumbel's temperature falls over the whole run.

    ValueError where a single quantizer was asked for, or one does not fit the number of codes.
    """
    if config.network.quantizer != VQGANConfig.quantizer:
        got = config.network.quantizer
        raise ValueError(f"got --quantizer {got}, but a comparison has several: pass --quantizers {got}")
    changes = {"gumbel_decay_steps": config.training.train_steps}
    return {
        name: dataclasses.replace(config.network, quantizer=name, **changes | VARIANTS[name])
        for name in config.comparison.quantizers
    }


def main(config: Config) -> None:
    from experiments.experiment import write_results
    from experiments.metrics.quantizer_comparison import plot, prepare, summary
    from train.runs import open_run, perceptual_origin, run_folder

    autoencoders, c, training = networks(config), config.comparison, config.training
    if training.load_dir is not None or training.hooks or training.resume != "auto":
        raise ValueError(
            "every run of a comparison begins anew, and is not watched: leave --load_dir, --hooks, --resume"
        )
    steps, at_once = training.train_steps, training.batch_size
    folder = run_folder(config.output.logs_root, config.output.log_dir or f"compare_quantizers_{config.data.dataset}")
    bench = prepare(config, folder)
    same = {"own_settings": {name: VARIANTS[name] for name in c.quantizers}, "steps_of_each": steps}
    same |= perceptual_origin(None if bench.perceptual is None else config.loss.perceptual_weights)
    open_run(folder, config, same | {"images": bench.images.dataset.fingerprint()})
    print(f"results: {folder}", flush=True)
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for seed in range(config.training.seed, config.training.seed + c.seeds):
        for name, network in autoencoders.items():
            if f"{name}_{seed}" not in results:
                results[f"{name}_{seed}"] = bench.run(f"{name}_{seed}", network, seed)
                write_results(folder, results)  # a comparison that is cut off goes on with the next run
    metric = bench.features.module.METRIC
    title = f"{config.data.dataset}, {config.network.codebook_size} codes, {steps} steps of {at_once} images"
    plot(folder / "comparison.png", results, c.quantizers, metric, f"{title}, seeds: {c.seeds}")
    print(f"\n{title}, seeds: {c.seeds}; measured on {len(bench.held_out)} validation images")
    print(f"{summary(results, c.quantizers, metric)}\n\n{path}\n{folder / 'comparison.png'}")


if __name__ == "__main__":
    run_script(main, Config, "compare_quantizers")
