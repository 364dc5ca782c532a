"""What a run does in a training step, in a draw and in loading: the real thing, on random weights and random data."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.rng import Streams, seed_of
from experiments.metrics.cost import WARM_UPS
from experiments.metrics.throughput import Workload, time_repeatedly
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import Adapt, BatchSource, ImageSource, TrainingCodes, TrainingImages, build_dataset, to_device
from train.data.transforms import to_uint8
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.execution import training_dtype
from train.first_stage import FirstStage
from train.loop import Batch, TrainState, fit
from train.registry import load_plugin
from train.sampler import SamplerStep
from train.sampler import build_state as build_sampler_state
from train.spaces import Codes, EditInput, Latents, Pixels, Space
from train.vqgan import VQGANStep
from train.vqgan import build_state as build_vqgan_state
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig, VQGANLossConfig
from vq.perceptual import Perceptual

SOME_CODES = 4096  # grids of codes to load batches from: they lie in memory, however many


@dataclass(frozen=True)
class Trainee:
    """One way to train: its step, and the state that it trains."""

    name: str
    step: SamplerStep | VQGANStep
    state: TrainState


def precision_variants(training: TrainingConfig, device: torch.device) -> dict[str, TrainingConfig]:
    """In float32, in half precision if that is asked for and native, and the last of these compiled if asked for."""
    half = training_dtype(training, device)
    found = {"float32": replace(training, amp=False, compile=False)}
    if half != torch.float32:
        found[str(half).removeprefix("torch.")] = replace(training, compile=False)
    if training.compile:
        name, last = list(found.items())[-1]
        found[f"{name}, compiled"] = replace(last, compile=True)
    return found


def try_build_dataset(data: DataConfig, reader: DatasetConfig) -> tuple[Dataset | None, str]:
    """The images to train on, or None and why they are not there."""
    try:
        return build_dataset(data, reader, "train"), ""
    except (ValueError, OSError) as error:
        return None, " ".join(str(error).split())


def random_space(
    sampler: str,
    ae_load_dir: str | None,
    data: DataConfig,
    reader: DatasetConfig,
    network: Callable[[], VQGANConfig],
    device: torch.device,
) -> Space:
    """What a sampler works in, as `open_space` chooses it: pixels, or what a VQGAN with random weights makes of them.
    `network()` is asked for where there is one."""
    of_codes = load_plugin("train.samplers", sampler, "sampler").SPACE == "codes"
    if not of_codes and ae_load_dir is None:
        return Pixels(data)
    autoencoder = VQGAN(network(), data.size, data.n_channels).to(device).eval().requires_grad_(False)
    first = FirstStage(Path(), autoencoder, data, reader, 0, "", device, False)
    return Codes(first) if of_codes else Latents(first, 1.0)


def with_amp(space: Space, amp: bool) -> Space:
    """The space whose VQGAN, if there is one, computes in half precision or not."""
    return space if space.first is None else replace(space, first=replace(space.first, amp=amp))


def sampler_trainees(
    settings: SamplerConfig, training: TrainingConfig, space: Space, n_classes: int, world: DistContext
) -> list[Trainee]:
    """Each way of training the sampler, with a network, an optimizer and averages of its own."""
    found = []
    for name, way in precision_variants(training, world.device).items():
        own = with_amp(space, way.amp)
        sampler, state = build_sampler_state(settings, way, own, n_classes, world)
        found.append(Trainee(name, SamplerStep(sampler, own, way, world), state))
    return found


def vqgan_trainees(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: DistContext
) -> list[Trainee]:
    """Each way of training the VQGAN. The perceptual network has random weights, and costs what trained ones do."""
    net = {"auto": "vgg"}.get(loss.perceptual_net, loss.perceptual_net)
    needed = net != "none" and loss.perceptual_weight
    perceptual = Perceptual(net, trained=False) if needed else None
    found = []
    for name, way in precision_variants(training, world.device).items():
        state = build_vqgan_state(network, loss, data, way, world)
        found.append(Trainee(name, VQGANStep(loss, way, world, perceptual), state))
    return found


def training_phases(loss: VQGANLossConfig, steps: int) -> dict[str, int]:
    """Of so many steps of a VQGAN's training, those that differ in their work, by name."""
    start = loss.disc_start_step
    minded = start + loss.disc_warmup_steps
    found = {"no discriminator": 0, "discriminator alone": start, "discriminator": minded}
    done = {"no discriminator": start > 0, "discriminator alone": start < minded, "discriminator": True}
    return {name: step for name, step in found.items() if done[name] and step < steps}


def step_workload(
    trainee: Trainee, parts: Sequence[Batch], world: DistContext, at: int = 0, when: str = ""
) -> Workload:
    """Step `at` of the training loop, averages included, on these parts of a batch, as often as one likes."""

    def run() -> None:
        trainee.state.step = at
        fit(trainee.state, repeat(parts), trainee.step, steps=at + 1, world=world, seed=trainee.step.training.seed)

    return Workload(", ".join(filter(None, [trainee.name, when])), run, trainee.step.dtype)


def random_batch(space: Space | None, n_classes: int, size: int, data: DataConfig, device: torch.device) -> Batch:
    """What `training_batches` would give a sampler of this space, or a VQGAN (None), of the same shapes."""
    rng = torch.Generator().manual_seed(0)
    batch = {"position": torch.arange(size)}
    if isinstance(space, Codes):
        batch["codes"] = torch.randint(space.model_args["codes"], (size, *space.model_args["grid"]), generator=rng)
    else:
        batch["image"] = 2 * torch.rand(size, *data.shape, generator=rng) - 1
    if n_classes:
        batch["label"] = torch.randint(n_classes, (size,), generator=rng)
    return to_device(batch, device)


def with_conditions(batch: Batch, fields: Sequence[str], source: BatchSource | None, device: torch.device) -> Batch:
    """The batch with the fields of the sampler's conditions; what is no class comes from the images."""
    missing = sorted({*fields} - {*batch})
    if missing and source is None:
        raise ValueError(f"{', '.join(missing)} is made of the images by --adapt, and they are not there")
    real = to_device(source[batch["position"].tolist()], device) if missing else {}
    lacking = sorted({*missing} - {*real})
    if lacking:
        raise ValueError(f"the images have no {', '.join(lacking)}: write it in the function of --adapt")
    return batch | {name: real[name] for name in missing}


def split_batch(batch: Batch, accumulate: int) -> list[Batch]:
    """A batch in as many parts, as a step takes it."""
    size = len(batch["position"])
    if size % accumulate:
        raise ValueError(f"got batch_size {size} in {accumulate} parts: they must divide it")
    starts = range(0, size, size // accumulate)
    return [{name: field[i : i + starts.step] for name, field in batch.items()} for i in starts]


@torch.no_grad()
def draw_samples(trainee: Trainee, batch: Batch, options: SamplingConfig, **how: Any) -> Tensor:
    """As many examples as the batch has, of its conditions, in the sampler's space; `how` is of its `sample`."""
    step, size = trainee.step, len(batch["position"])
    rng = Streams([seed_of(0, "show", i) for i in range(size)], step.world.device)
    conditions = {name: batch[name] for name in step.sampler.conditions} or None
    network = trainee.state.eval_module("network").eval()
    with step.autocast():
        return step.sampler.sample(network, rng, batch=conditions, options=options, **how)


def time_full_steps(trainee: Trainee, batch: Batch, options: SamplingConfig, repeats: int) -> list[float]:
    """Seconds of `repeats` steps of ancestral sampling of codes that evaluate every grid, after two that do not count.

    From half of the batch's codes on, since grids that are equal, as empty ones are, would be evaluated once; watched,
    since one in which nothing is drawn would not be evaluated.
    """
    edit = EditInput(batch["codes"], torch.zeros_like(batch["codes"], dtype=torch.bool), 0.5)
    wait, moments = torch.get_device_module(trainee.step.world.device).synchronize, []

    def clock(i: int, t: float, s: float, x: Tensor, logits: Tensor) -> Tensor:
        wait()
        moments.append(time.perf_counter())
        return x

    options = options.with_solver("ancestral", WARM_UPS + repeats)
    draw_samples(trainee, batch, options, edit=edit, on_step=clock)
    return [after - before for before, after in pairwise(moments)][WARM_UPS - 1 :]


@torch.no_grad()
def time_decoding(trainee: Trainee, x: Tensor, repeats: int) -> list[float]:
    """Seconds of making images of what was sampled, up to `repeats` times, after one that does not count."""
    space = trainee.step.space
    space.decode(x)
    return time_repeatedly(lambda: space.decode(x), repeats, trainee.step.world.device)


def encode_decode_runs(
    trainee: Trainee, data: DataConfig, reader: DatasetConfig, images: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """A VQGAN's two halves as later stages use them: images to codes, codes to images."""
    network = trainee.state.eval_module("autoencoder").eval()
    amp = trainee.step.dtype != torch.float32
    first = FirstStage(Path(), network, data, reader, 0, "", trainee.step.world.device, amp)
    pictures = to_uint8(images)
    codes = first.encode(pictures)
    return {"encoding": lambda: first.encode(pictures), "decoding": lambda: first.decode(codes)}


def image_batches(images: Dataset, data: DataConfig, seed: int, adapt: Adapt = None) -> TrainingImages:
    """Training batches of images."""
    return TrainingImages(ImageSource(images, data, margin=data.crop_margin), seed, adapt)


def code_batches(space: Codes, n_classes: int, seed: int) -> TrainingCodes:
    """Training batches of codes, random ones."""
    ids = torch.randint(space.model_args["codes"], (1, SOME_CODES, *space.model_args["grid"]), dtype=torch.int32)
    return TrainingCodes(ids, torch.randint(n_classes, (SOME_CODES,)) if n_classes else None, seed)
