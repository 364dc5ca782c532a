"""How long a training step takes on this machine, in float32 and in bfloat16: one table, the two measured in turn."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.table import table  # noqa: E402
from train.cli import run_script  # noqa: E402
from train.config import TrainingConfig  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Benchmark."""

    bert_n_layers: int = 24
    """Blocks of the transformer."""
    bert_n_emb: int = 512
    """Its width."""
    bert_n_head: int = 8
    """Its heads."""
    codebook_size: int = 1024
    """Number of codes."""
    grid: tuple[int, int] = (16, 16)
    """Codes per image."""
    batch_size: int = 4
    """Images per step."""
    repeats: int = 7
    """Counted steps of each kind, after two that are not counted."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda, else mps, else cpu."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Times the absorbing sampler's training step: corrupt, forward, loss, backward, clip, AdamW."""

    benchmark: BenchmarkConfig


def main(config: Config) -> None:
    import torch

    from experiments.metrics.cost import machine
    from train.distributed import World, pick_device
    from train.loop import State
    from train.precision import has_native_bf16
    from train.samplers import absorbing
    from train.second_stage import SamplerStep
    from train.spaces import Codes

    c = config.benchmark
    world = World(pick_device(c.device))
    settings = absorbing.Config(bert_n_layers=c.bert_n_layers, bert_n_emb=c.bert_n_emb, bert_n_head=c.bert_n_head)
    sampler = absorbing.build(settings, codes=c.codebook_size, grid=c.grid, n_classes=0)
    network = sampler.network.to(world.device)
    state = State({"network": network}, {"network": torch.optim.AdamW(network.parameters(), fused=True)})
    batch = {
        "codes": torch.randint(c.codebook_size, (c.batch_size, *c.grid), device=world.device),
        "position": torch.arange(c.batch_size),
    }
    precisions = {"float32": TrainingConfig(amp=False)}
    if has_native_bf16(world.device):
        precisions["bfloat16"] = TrainingConfig(amp=True)
    else:
        print("bfloat16 is not native to this machine, and left out")
    steps = {name: SamplerStep(sampler, Codes(first=None), training, world) for name, training in precisions.items()}
    seconds = {name: [] for name in steps}
    for i in range(c.repeats + 2):
        for name, step in steps.items():
            begun = time.perf_counter()
            metrics = step(state, [batch])
            metrics["loss"].item()  # waits for the device
            if i >= 2:
                seconds[name].append(time.perf_counter() - begun)
    tokens = c.batch_size * c.grid[0] * c.grid[1]
    print(f"{machine(world.device)}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{c.bert_n_layers} layers x {c.bert_n_emb}, {tokens} tokens a step, {c.repeats} steps of each kind in turn\n"
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [("precision", "median s/step", "min", "max", "tokens/s", "against float32")]
    for name, times in seconds.items():
        spread = (f"{medians[name]:.3f}", f"{min(times):.3f}", f"{max(times):.3f}")
        rows.append((name, *spread, f"{tokens / medians[name]:.0f}", f"{medians['float32'] / medians[name]:.2f}x"))
    print(table(rows))


if __name__ == "__main__":
    run_script(main, Config, "benchmark")
