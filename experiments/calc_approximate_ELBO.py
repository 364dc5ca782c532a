"""The likelihood of held-out images under a trained sampler, in bits: a bound, the probability flow's, or exactly."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.experiment import ModelConfig, OutputConfig, settings_of_run  # noqa: E402
from train.cli import run_script  # noqa: E402


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
    from experiments.experiment import load_model, open_results
    from experiments.kept import forget
    from experiments.metrics.image_likelihood import head_for
    from experiments.metrics.likelihood import measure, print_report
    from experiments.metrics.report import saved_report
    from experiments.processes import experiment_world

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


if __name__ == "__main__":
    run_script(main, Config, "calc_approximate_ELBO", under=settings_of_run)
