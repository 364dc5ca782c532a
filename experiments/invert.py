"""Inverts images: finds the noise from which a Gaussian model returns to them, and measures how exactly it does."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _root
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion.process import ContinuousProcess
from diffusion.rng import Streams, seed_of
from experiments.harness.batches import ResumableBatches
from experiments.harness.editing import (
    InputImages,
    InputImagesConfig,
    conditions_for,
    encode_images,
    load_input_images,
    save_comparison_grid,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import STRIP_STEPS, save_grid
from experiments.harness.inversion import (
    INVERSIONS,
    DDIMSteps,
    InversionConfig,
    Inverted,
    check_invertible,
    ddim_steps,
    ddim_times,
    in_double_precision,
    round_trip_errors,
)
from experiments.harness.report import progress, table, three_digits
from train.config import SamplingConfig
from train.distributed import DistContext
from train.files import atomic_write, write_errors_as_oserror
from train.trained_sampler import TrainedSampler

ERRORS = {  # headings of the report, by name of the number
    "latent_max": "x_0, largest",
    "latent_rms": "x_0, RMS",
    "pixels_max": "pixels, levels of 255, largest",
    "pixels_rms": "pixels, RMS",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Inverts images with steps of DDIM, whatever the solver; writes inverted.png (original | from data to noise |
    what the noise returns to), a strip of each image to images/, noise.safetensors and results.json to
    <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/invert.py --sampler ddpm --dataset mnist --sample_steps 50",
        "python experiments/invert.py --load_dir ddpm_mnist --image seven.png --label 7 --method bdia",
    )
    NOT_EVERYDAY = ("solver",)

    given: InputImagesConfig
    inversion: InversionConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Loads the images. ValueError: the model cannot be inverted, or does not support the class."""
    sampling = config.sampling
    check_invertible(model, sampling)
    inputs = load_input_images(config.given.image, config.given.n_images, model, sampling.condition_file)
    labels = classes_of(inputs, config.inversion.label, sampling, model)
    _, options = conditions_for(model, inputs, [0], None if labels is None else labels[:1], sampling)
    ddim_times(model, options, 1.0)
    settings = inputs, labels, config.inversion, sampling
    return ExperimentSetup(settings, {"given_images": inputs.fingerprint}, timed=True)


def classes_of(
    inputs: InputImages, label: int | None, sampling: SamplingConfig, model: TrainedSampler
) -> list[int] | None:
    """Returns the class of each image: `label`, or that of held-out images; None: as its row of conditions says."""
    if label is not None:
        return [label] * len(inputs)
    in_rows = sampling.condition_file is not None or not model.sampler.n_classes
    return None if in_rows or not inputs.labels else list(inputs.labels)


def check_finite(inverted: Inverted, method: str) -> None:
    """Raises ValueError if the iterations or the recursion diverged."""
    if not all(x.isfinite().all() for x in (inverted.states[-1], inverted.back)):
        exact = "--no_amp, less --guidance, or weights from before the training diverged"
        remedy = exact if method == "ddpm" else "more --sample_steps, or --method ddpm"
        raise ValueError(f"method {method} gave values that are not finite: pass {remedy}")


def strip(states: list[Tensor], ddim: DDIMSteps, model: TrainedSampler) -> Tensor:
    """Decodes evenly spaced states, from data to noise, to images uint8 (B, states, C, H, W), each divided by
    sqrt(alpha^2 + sigma^2): the noise of edm has another scale than images."""
    last = len(states) - 1
    shown = sorted({round(last * k / (STRIP_STEPS - 1)) for k in range(STRIP_STEPS)})
    images = []
    for i in shown:
        x = states[i].float() / scale(ddim.process, ddim.times[last - i])
        images.append(model.space.decode(x).cpu())
    return torch.stack(images, 1)


def scale(process: ContinuousProcess, t: float) -> float:
    """Returns sqrt(alpha^2 + sigma^2) at t."""
    alpha, sigma = process.scales(torch.tensor(t))
    return torch.hypot(alpha, sigma).item()


def measure(
    inputs: InputImages,
    labels: list[int] | None,
    config: InversionConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Inverts the images, saves noise and strips, and measures the errors. All ranks must call it; only the main rank
    gets the results."""

    def make_batch(numbers: list[int]) -> dict[str, Tensor]:
        x0 = in_double_precision(encode_images(inputs.image[numbers], model))
        own = None if labels is None else [labels[number] for number in numbers]
        conditions, options = conditions_for(model, inputs, numbers, own, sampling)
        rng = Streams([seed_of(batches.seed, "invert", number) for number in numbers], model.device)
        begin = time.perf_counter()
        with model.inference():
            ddim = ddim_steps(model, options, conditions, x0)
            inverted = INVERSIONS[config.method](ddim, x0, config, rng)
            check_finite(inverted, config.method)  # which waits for the device
            seconds = torch.full((len(numbers),), (time.perf_counter() - begin) / len(numbers))
            images = {"strip": strip(inverted.states, ddim, model), "back": model.space.decode(inverted.back.float())}
        counts = {"calls": inverted.calls, "calls_back": torch.full_like(inverted.calls, inverted.calls_back)}
        errors = round_trip_errors(x0, inverted.back, model) | {"residual": inverted.residual}
        times = torch.tensor(ddim.times, dtype=torch.float64).expand(len(numbers), -1)
        return images | inverted.arrays | errors | counts | {"seconds": seconds, "times": times}

    resumed = batches.resume(f"inverted_{config.method}", range(len(inputs)), make_batch)
    parts = list(progress(resumed, len(inputs), "inverted", batches.world.is_main))
    if not batches.world.is_main:
        return None
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_noise(batches.folder / "noise.safetensors", tensors)
    save_strips(batches.folder, inputs, tensors)
    numbers = [*ERRORS, "residual", "calls", "calls_back", "seconds"]
    rows = [{"name": name, **{key: tensors[key][i].item() for key in numbers}} for i, name in enumerate(inputs.names)]
    steps = tensors["times"].shape[1] - 1
    return {"method": config.method, "steps": steps, "n_images": len(inputs), "of_image": rows, "run": batches.run}


def save_noise(path: Path, tensors: dict[str, Tensor]) -> None:
    """Saves what leads back to the images: noise (N, C, H, W), next_noise of bdia, maps (N, steps, C, H, W) of ddpm,
    and the times of the steps."""
    arrays = {name: tensors[name].contiguous() for name in ("noise", "next_noise", "maps") if name in tensors}
    with atomic_write(path) as scratch, write_errors_as_oserror(path):
        save_file(arrays | {"times": tensors["times"][0].clone()}, scratch)


def save_strips(folder: Path, inputs: InputImages, tensors: dict[str, Tensor]) -> None:
    """Saves the original, the states from data to noise and the image they return to, for each image and in a grid."""
    parts = [inputs.image.unsqueeze(1), tensors["strip"], tensors["back"].unsqueeze(1)]
    for i, (name, row) in enumerate(zip(inputs.names, torch.cat(parts, 1), strict=True)):
        save_grid(folder / "images" / f"{i:03d}_{Path(name).stem}_trajectory.png", row, columns=len(row))
    save_comparison_grid(folder / "inverted.png", *parts)


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the errors of the round trip, their network calls and seconds."""
    rows, images = [("error of the round trip", "mean of the images", "worst image")], results["of_image"]
    for name, heading in ERRORS.items():
        values = [row[name] for row in images]
        rows.append((heading, f"{sum(values) / len(values):.2g}", f"{max(values):.2g}"))
    calls, back, seconds = (
        sum(row[name] for row in images) / len(images) for name in ("calls", "calls_back", "seconds")
    )
    summary = f"{results['n_images']} images, method {results['method']}, {results['steps']} steps: {calls:g} network"
    summary += f" calls to the noise, {back:g} back, {three_digits(seconds)} s an image"
    if results["method"] == "fixed_point":
        worst = max(row["residual"] for row in images)
        summary += f"; error of a step when its iterations ended: at most {worst:.2g}"
    return f"\n{summary}\n{table(rows)}\n\n{folder / 'inverted.png'}\n{folder / 'noise.safetensors'}"


if __name__ == "__main__":
    run_experiment("inverted", Config, measure, report, prepare=prepare)
