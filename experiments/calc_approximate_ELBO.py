"""Likelihood of held-out images under a trained sampler, in bits: variational bound, probability flow, or exact."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor

from diffusion.likelihood import stratified_terms
from diffusion.rng import Streams
from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.report import progress, table
from experiments.metrics.decoder_likelihood import (
    DecoderBits,
    DecoderConfig,
    TrainedHead,
    image_bits_rows,
    load_or_train_head,
    summarize_image_bits,
)
from models.ranges import COUNT, MILLION, check_ranges
from train.data.loading import BatchSource
from train.distributed import DistContext
from train.files import atomic_write
from train.loop import Batch
from train.spaces import LatentSpace
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Likelihood."""

    n_images: int | None = None
    """Number of images, a fixed random subset; if omitted, the whole split. Fewer (--n_images 500) are faster; the
    standard error shows the loss of precision."""
    split: Literal["val", "train"] = "val"
    """Split to measure; train: in the augmented views used in training."""
    calls: int | None = 100
    """Network evaluations (NFE) per image; None: one for each of the bound's T terms (absorbing in continuous time: one
    for each number of masked codes). If T is larger, half of the evaluations cover each of the terms nearest the
    data; the other terms are divided into as many strata as evaluations are left, and one random term per stratum
    and image estimates its sum: unbiased, and covered by the standard error. edm and flow: steps of the ODE (None: 50),
    with two forward and two backward passes each. Exact likelihoods (autoregressive) always take one evaluation."""

    EVERYDAY = ("n_images", "split")
    RANGES = {"n_images": COUNT, "calls": MILLION}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures bits per code and per dimension (absorbing, autoregressive), or per dimension (ddpm).

    absorbing and ddpm's gaussian process: variational bound; ddpm's edm and flow: probability-flow ODE; autoregressive:
    exact. With codes z of an image x, the bound on images is -log2 p(x) <= -log2 p(x | z) - log2 p(z). Writes
    results.json, and the terms of the bound as terms.png, to <logs_root>/<log_dir>.
    """

    EXAMPLES = (
        "python experiments/calc_approximate_ELBO.py --sampler {sampler} --dataset mnist",
        "python experiments/calc_approximate_ELBO.py --load_dir {sampler}_mnist --n_images 500",
    )

    likelihood: LikelihoodConfig
    decoder: DecoderConfig
    model: ModelConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Trains the decoder's head first, as far as needed; results with other weights of it are outdated.

    ValueError: the model is one of latents.
    """
    if isinstance(model.space, LatentSpace):
        why = "latents are continuous and have no likelihood in bits"
        raise ValueError(f"{why}: {model.run} is a model of latents")
    head = load_or_train_head(config.decoder, config.model, config.output, model)
    weights = None if head is None else head.weights

    def is_of_this_head(results: dict[str, Any]) -> bool:
        return results["run"].get("head_weights") == weights

    return ExperimentSetup((config.likelihood, head), is_current=is_of_this_head)


def bound_function(
    trained: TrainedSampler,
    source: BatchSource,
    seed: int,
    calls: int | None,
    decoder: Callable[[Batch], Tensor] | None = None,
) -> Callable[[list[int]], dict[str, Tensor]]:
    """Returns a function from positions to their `Bound`, in float64 on the CPU, with "decoder" (B,) if given; results
    do not depend on the batch size."""

    def compute(positions: list[int]) -> dict[str, Tensor]:
        batch = source[positions]
        bound = trained.log_likelihood(batch, seed, calls)
        parts = bound._asdict() | ({} if decoder is None else {"decoder": decoder(batch)})
        return {name: part.cpu().double() for name, part in parts.items()}

    return compute


def measure(
    settings: LikelihoodConfig, head: TrainedHead | None, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Measures the likelihood and saves terms.png if the bound has terms. All ranks must call it; only the main rank
    gets the results."""
    world, source = model.world, model.batches(settings.split)
    count = min(settings.n_images or len(source), len(source))  # beyond one epoch, images would repeat
    decoder = None if head is None else DecoderBits(head, model, settings.split, source)
    name = "bounds" if head is None else f"bounds_{head.weights[:16]}"  # its training may continue between runs
    make = bound_function(model, source, batches.seed, settings.calls, decoder)
    totals, prior, terms, decoder_bits = [], 0.0, 0.0, []
    for bound in progress(batches.resume(name, range(count), make), count, "measuring", world.is_main):
        totals.append(bound["total"])
        prior += bound["prior"].sum().item() / count
        terms = terms + bound["terms"].sum(0) / count  # (T,)
        if head is not None:
            decoder_bits.append(bound["decoder"])
    if not world.is_main:
        return None
    total, steps, sampler = torch.cat(totals), len(terms), model.sampler
    widths = stratum_widths(steps, settings.calls)
    curve = spread_over_strata(terms, widths).tolist() if steps else []
    of_times = steps > 0 and sampler.process.steps is not None  # continuous time: terms by number of masked codes
    results = {
        "unit": sampler.unit,
        "method": sampler.likelihood,
        "value": total.mean().item(),
        "standard_error": total.std().item() / count**0.5 if count > 1 else None,  # over images and random terms
        "prior": prior,
        "decoder": curve[0] if of_times and widths[:1] == [1] else None,
        "n_images": count,
        "split": settings.split,
        "calls": len(widths) if steps else 1 if sampler.likelihood == "exact" else settings.calls,
        "terms": curve,
        "terms_of": ("times" if of_times else "number of masked codes") if steps else None,
        "run": batches.run | ({} if head is None else {"head_weights": head.weights}),
    }
    if head is not None:
        sizes = model.space.tokens, math.prod(model.data.shape)
        results |= summarize_image_bits(total, torch.cat(decoder_bits), *sizes, head)
    if steps:
        plot(batches.folder / "terms.png", results)
    return results


def stratum_widths(steps: int, calls: int | None) -> list[int]:
    """Returns how many consecutive steps each network call estimates, starting nearest the data."""
    return [width for _, width in stratified_terms(steps, calls, Streams([0]))] if steps else []


def spread_over_strata(terms: Tensor, widths: list[int]) -> Tensor:
    """Spreads the sum of the mean terms (T,) evenly over each stratum: few images sample any single step of it."""
    return torch.cat([part.mean().expand(len(part)) for part in terms.split(widths)])


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of the likelihood and its terms."""
    steps, error, decoder = len(results["terms"]), results["standard_error"], results["decoder"]
    rows = [("", f"{results['unit']}, lower is better")]
    spread = ("", "") if error is None else (" ± standard error", f" ± {error:.4f}")
    rows.append((f"total{spread[0]}", f"{results['value']:.4f}{spread[1]}"))
    if results["method"] != "exact":
        rows.append(("prior term", f"{results['prior']:.4f}"))
    if decoder is not None:
        rows.append((f"reconstruction term (t = 1/{steps})", f"{decoder:.4f}"))
    nfe = f", {results['calls']} of {steps} terms per image" if steps else ""
    lines = [f"\n{results['split']} split, {results['n_images']} images, {results['method']}{nfe}\n{table(rows)}"]
    if "head" in results:
        head = "head: {run}, step {step}".format(**results["head"])
        lines.append(f"\n8-bit images, discretized Gaussian likelihood ({head})\n{table(image_bits_rows(results))}")
    lines.append(f"\n{folder / 'results.json'}")
    return "\n".join([*lines, *([str(folder / "terms.png")] if steps else [])])


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plots the terms of the bound against time or the number of masked codes, as in Nichol & Dhariwal 2021, figure 2;
    flat within a stratum."""
    from matplotlib.figure import Figure  # not pyplot: no display is needed

    terms = torch.tensor(results["terms"], dtype=torch.float64)
    edges, xlabel = torch.arange(len(terms) + 1) / len(terms), "t"
    if results["terms_of"] != "times":  # term i has i + 1 masked codes
        edges, xlabel = torch.arange(len(terms) + 1) + 0.5, results["terms_of"]
    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    positive_terms = terms.where(terms > 0, torch.nan)  # only positive values can be shown on a logarithmic scale
    panel.stairs(positive_terms.numpy(), edges.numpy(), baseline=None, color="#0072b2")
    ylabel = f"term ({results['unit']})"
    panel.set(yscale="log", xlim=(edges[0].item(), edges[-1].item()), xlabel=xlabel, ylabel=ylabel)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    title = f"Terms of the bound: {results['value']:.4g} {results['unit']} in total\n"
    count, calls = results["n_images"], results["calls"]
    title += f"{count} images ({results['split']} split), {calls} of {len(terms)} terms per image"
    panel.set_title(title, fontsize=11, loc="left")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_experiment("ELBO", Config, measure, report, prepare=prepare)
