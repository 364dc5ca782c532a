"""The likelihood of held-out images under a trained sampler, in bits: a bound, the probability flow's, or exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import _root
import torch
from torch import Tensor

from diffusion.likelihood import visits
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
from train.data.loading import BatchSource
from train.distributed import DistContext
from train.files import atomic_write
from train.loop import Batch
from train.spaces import Latents
from train.trained_sampler import TrainedSampler


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Likelihood."""

    n_images: int | None = None
    """Images measured, drawn at random, always the same; left out, the whole split. With fewer (--n_images 500) it is
    quicker; the standard error tells what is lost."""
    split: Literal["val", "train"] = "val"
    """Images they are drawn from; train: in the views that training saw."""
    calls: int | None = 100
    """Network calls per image; None: one for each of the bound's T terms (absorbing in continuous time: one for each
    number of masked codes). Where T is larger, half of the calls go to the terms nearest the data, which are all
    computed. The rest of T is cut into as many stretches as calls are left, and in each one term, drawn anew for every
    image, stands for its stretch: unbiased, and within the error stated. Of edm and flow: steps of the ODE (None: 50),
    two calls and two backward passes each. What is exact (autoregressive) takes one call, whatever this says."""

    def __post_init__(self):
        for name in ("n_images", "calls"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"got {name} {value}, wanted at least 1: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures bits per code and per dimension (absorbing, autoregressive), or per dimension (ddpm), into
    <logs_root>/<log_dir>.

    absorbing and ddpm's gaussian: the variational bound; ddpm's edm and flow: the probability-flow ODE; autoregressive:
    exact. A bound on images by way of codes: -log2 p(x) <= -log2 p(x | z) - log2 p(z), where z are the codes of x.
    results.json has the numbers, terms.png the bound's terms.
    """

    likelihood: LikelihoodConfig
    decoder: DecoderConfig
    model: ModelConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Trains the head of the decoder first, as far as it is not; a report of other weights of it is outdated.

    ValueError for a model of latents.
    """
    if isinstance(model.space, Latents):
        why = "latents are continuous and have no likelihood in bits"
        raise ValueError(f"{why}: {model.run} is no model of pixels")
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
    """A function from positions to their Bound, in float64 on the CPU; no image's depends on those beside it.

    With it "decoder" (B,), where there is one.
    """

    def of(positions: list[int]) -> dict[str, Tensor]:
        batch = source[positions]
        bound = trained.log_likelihood(batch, seed, calls)
        found = bound._asdict() | ({} if decoder is None else {"decoder": decoder(batch)})
        return {name: part.cpu().double() for name, part in found.items()}

    return of


def measure(
    settings: LikelihoodConfig, head: TrainedHead | None, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """All that one report says, and terms.png where there are terms. On the main rank alone; the others take part."""
    world, source = model.world, model.batches(settings.split)
    count = min(settings.n_images or len(source), len(source))  # beyond an epoch images come again
    decoder = None if head is None else DecoderBits(head, model, settings.split, source)
    name = "bounds" if head is None else f"bounds_{head.weights[:16]}"  # it may be trained on between two starts
    make = bound_function(model, source, batches.seed, settings.calls, decoder)
    totals, prior, terms, of_decoder = [], 0.0, 0.0, []
    for bound in progress(batches.resume(name, range(count), make), count, "measuring", world.is_main):
        totals.append(bound["total"])
        prior += bound["prior"].sum().item() / count
        terms = terms + bound["terms"].sum(0) / count  # (T,)
        if head is not None:
            of_decoder.append(bound["decoder"])
    if not world.is_main:
        return None
    total, steps, sampler = torch.cat(totals), len(terms), model.sampler
    widths = stratum_widths(steps, settings.calls)
    curve = spread_over_strata(terms, widths).tolist() if steps else []
    of_times = steps > 0 and sampler.process.steps is not None  # in continuous time, of numbers of masked codes
    results = {
        "unit": sampler.unit,
        "method": sampler.likelihood,
        "value": total.mean().item(),
        "standard_error": total.std().item() / count**0.5 if count > 1 else None,  # over images and draws
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
        results |= summarize_image_bits(total, torch.cat(of_decoder), *sizes, head)
    if steps:
        plot(batches.folder / "terms.png", results)
    return results


def stratum_widths(steps: int, calls: int | None) -> list[int]:
    """From the data on, how many neighbouring steps each network call stands for."""
    return [width for _, width in visits(steps, calls, Streams([0]))] if steps else []


def spread_over_strata(terms: Tensor, widths: list[int]) -> Tensor:
    """Mean terms (T,), each stretch's sum spread evenly over it: few images visit any one of its steps."""
    return torch.cat([part.mean().expand(len(part)) for part in terms.split(widths)])


def report(results: dict[str, Any], folder: Path) -> str:
    """The table a person reads."""
    steps, error, decoder = len(results["terms"]), results["standard_error"], results["decoder"]
    rows = [("", results["unit"])]
    rows.append(("total", f"{results['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")))
    if results["method"] != "exact":
        rows.append(("prior term", f"{results['prior']:.4f}"))
    if decoder is not None:
        rows.append((f"decoder's term (t = 1/{steps})", f"{decoder:.4f}"))
    rows.append(("images", str(results["n_images"])))
    way = f", {results['calls']} of {steps} terms per image" if steps else ""
    lines = [f"\n{results['split']} split, {results['method']}{way}\n{table(rows)}"]
    if "head" in results:
        head = "head: {run}, step {step}".format(**results["head"])
        lines.append(
            f"\n8-bit images: in each value's bin a Gaussian's mass ({head})\n{table(image_bits_rows(results))}"
        )
    lines.append(f"\n{folder / 'results.json'}")
    return "\n".join([*lines, *([str(folder / "terms.png")] if steps else [])])


def plot(path: Path, results: dict[str, Any]) -> None:
    """The bound's terms against what they are of, as in Nichol & Dhariwal 2021, figure 2; flat where one stands for
    others."""
    from matplotlib.figure import Figure  # without pyplot: a PNG is drawn by Agg, and no window is asked for

    terms = torch.tensor(results["terms"], dtype=torch.float64)
    edges, xlabel = torch.arange(len(terms) + 1) / len(terms), "t"
    if results["terms_of"] != "times":  # term i is of i + 1 masked codes
        edges, xlabel = torch.arange(len(terms) + 1) + 0.5, results["terms_of"]
    figure = Figure(figsize=(6.5, 4.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    shown = terms.where(terms > 0, torch.nan)  # what is not positive has no place on a logarithmic scale
    panel.stairs(shown.numpy(), edges.numpy(), baseline=None, color="#0072b2")
    ylabel = f"{results['unit']}, per {'step' if results['terms_of'] == 'times' else 'number'}"
    panel.set(yscale="log", xlim=(edges[0].item(), edges[-1].item()), xlabel=xlabel, ylabel=ylabel)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    title = f"Terms of the bound: {results['value']:.4g} {results['unit']} in all\n"
    count, calls = results["n_images"], results["calls"]
    title += f"{count} images ({results['split']} split), {calls} of {len(terms)} terms each"
    panel.set_title(title, fontsize=11, loc="left")
    with atomic_write(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_experiment("ELBO", Config, measure, report, prepare=prepare)
