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
from experiments.harness.batches import experiment_world, forget, kept_batches
from experiments.harness.experiment import (
    ModelConfig,
    OutputConfig,
    load_model,
    open_results,
    saved_report,
    settings_of_run,
    write_results,
)
from experiments.harness.report import progress, table
from experiments.metrics.decoder_likelihood import DecoderBits, TrainedHead, head_for, of_images, report_rows
from train.cli.parse import run_script, to_dict
from train.data.loading import Positions
from train.files import whole_file
from train.inference import TrainedSampler
from train.loop import Batch


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
class DecoderConfig:
    """Decoder: of samplers of codes, what the images take beside their codes."""

    decoder: bool = True
    """Also give bits per dimension of the images: those of the codes and, by a Gaussian around the reconstruction,
    those of the image given its codes. Its deviations come from a head that is trained where it is not there yet."""
    head_dir: str | None = None
    """Folder of the head's run; likelihood_<run of the VQGAN>_<its step> if left out."""
    train_steps: int = 10_000
    """Steps that the head is trained; more than it had go on from there."""
    train_batch_size: int = 16
    """Images of such a step, over all processes together."""
    lr: float = 1e-3
    """Its learning rate."""
    steps_per_eval: int = 5_000
    """Steps between its validations; 0 for none."""

    def __post_init__(self):
        for name, low in (("train_steps", 1), ("train_batch_size", 1), ("steps_per_eval", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least {low}: pass --{name} N")
        if self.lr <= 0:
            raise ValueError(f"got lr {self.lr}, wanted a positive one: pass --lr NUMBER")


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


def main(config: Config) -> None:
    with experiment_world(config.output.device) as world:
        trained = load_model(config.model, config.output, world)
        if not getattr(trained.sampler, "pixels", True):
            why = "latents are continuous and have no likelihood in bits"
            raise ValueError(f"{why}: {trained.run} is no model of pixels")
        head = head_for(config, trained)
        folder, weights = open_results("ELBO", config, trained), None if head is None else head.weights
        results = saved_report(folder, world)
        if results is None or results["run"].get("head_weights") != weights:  # the head was trained on since
            results = measure(config, trained, head, folder)
        if world.is_main:
            print_report(results, folder)
            forget(folder)


def bounds(
    trained: TrainedSampler,
    source: Positions,
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


def measure(config, trained: TrainedSampler, head: TrainedHead | None, folder: Path) -> dict[str, Any] | None:
    """All that one report says, written to results.json; terms.png where there are terms. In the main process alone,
    while the others take part. What an earlier start measured is not measured again."""
    c, output, world = config.likelihood, config.output, trained.world
    source = trained.batches(c.split)
    count = len(source) if c.n_images is None else min(c.n_images, len(source))  # beyond an epoch images come again
    totals, prior, terms, of_decoder = [], 0.0, 0.0, []
    decoder = None if head is None else DecoderBits(head, trained, c.split, source)
    name = "bounds" if head is None else f"bounds_{head.weights[:16]}"  # it may be trained on between two starts
    make = bounds(trained, source, output.seed, c.calls, decoder)
    found = kept_batches(folder, name, list(range(count)), output.batch_size, make, world)
    for bound in progress(found, count, "measuring", world.is_main):
        totals.append(bound["total"])
        prior += bound["prior"].sum().item() / count
        terms = terms + bound["terms"].sum(0) / count  # (T,)
        if head is not None:
            of_decoder.append(bound["decoder"])
    if not world.is_main:
        return None
    total, steps = torch.cat(totals), len(terms)
    widths = stretches(steps, c.calls)
    curve = levelled(terms, widths).tolist() if steps else []
    sampler = trained.sampler
    of_times = steps > 0 and sampler.process.steps is not None  # in continuous time, of numbers of masked codes
    results = {
        "unit": sampler.unit,
        "method": sampler.likelihood,
        "value": total.mean().item(),
        "standard_error": total.std().item() / count**0.5 if count > 1 else None,  # over images and draws
        "prior": prior,
        "decoder": curve[0] if of_times and widths[:1] == [1] else None,
        "n_images": count,
        "split": c.split,
        "calls": len(widths) if steps else 1 if sampler.likelihood == "exact" else c.calls,
        "terms": curve,
        "terms_of": ("times" if of_times else "number of masked codes") if steps else None,
        "run": to_dict(config) | {"step": trained.step} | trained.origin,
    }
    if head is not None:
        sizes = trained.space.tokens, math.prod(trained.data.shape)
        results |= of_images(total, torch.cat(of_decoder), *sizes, head)
        results["run"] |= {"head_weights": head.weights}
    if steps:
        plot(folder / "terms.png", results)
    write_results(folder, results)
    return results


def stretches(steps: int, calls: int | None) -> list[int]:
    """From the data on, how many neighbouring steps each network call stands for."""
    return [width for _, width in visits(steps, calls, Streams([0]))] if steps else []


def levelled(terms: Tensor, widths: list[int]) -> Tensor:
    """Mean terms (T,), each stretch's sum spread evenly over it: few images visit any one of its steps."""
    return torch.cat([part.mean().expand(len(part)) for part in terms.split(widths)])


def print_report(results: dict[str, Any], folder: Path) -> None:
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
    print(f"\n{results['split']} split, {results['method']}{way}\n{table(rows)}")
    if "head" in results:
        head = "head: {run}, step {step}".format(**results["head"])
        print(f"\n8-bit images: in each value's bin a Gaussian's mass ({head})\n{table(report_rows(results))}")
    print(f"\n{folder / 'results.json'}")
    if steps:
        print(folder / "terms.png")


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
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")


if __name__ == "__main__":
    run_script(main, Config, "calc_approximate_ELBO", under=settings_of_run)
