"""The workloads of the benchmark: real training steps, sampling and loading, on random weights and random data."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from diffusion.solvers import solvers_for
from experiments.metrics.cost import WARM_UPS, count_launches
from experiments.metrics.throughput import Workload, time_repeatedly
from train.condition_images import encode_condition_images
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.codes import TrainingCodes
from train.data.loading import Adapt, BatchSource, ImageSource, TrainingImages, build_dataset, to_device
from train.data.transforms import to_uint8
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.execution import frozen_weights_cast_once, training_dtype
from train.first_stage import VQGANStage
from train.loop import Batch, TrainState, fit
from train.registry import load_plugin
from train.sampler import SamplerStep
from train.sampler import build_state as build_sampler_state
from train.samplers import LearnedSampler
from train.spaces import CodeSpace, EditInput, LatentSpace, PixelSpace, Space
from train.vqgan import VQGANStep, choose_memory_format
from train.vqgan import build_state as build_vqgan_state
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig, VQGANLossConfig
from vq.perceptual import Perceptual, net_for_channels

LOOP_STEPS = 32  # enough steps to measure what one costs
SOME_CODES = 4096  # code grids to load batches from: their number does not matter, as codes stay in memory


@dataclass(frozen=True)
class Trainee:
    """A training state and its step, in one precision."""

    name: str
    step: SamplerStep | VQGANStep
    state: TrainState


def precision_variants(training: TrainingConfig, device: torch.device) -> dict[str, TrainingConfig]:
    """Returns the precisions to time: float32; half precision, with --amp and native support; the last of these
    compiled, with --compile."""
    half = training_dtype(training, device)
    variants = {"float32": replace(training, amp=False, compile=False)}
    if half != torch.float32:
        variants[str(half).removeprefix("torch.")] = replace(training, compile=False)
    if training.compile:
        name, last = list(variants.items())[-1]
        variants[f"{name}, compiled"] = replace(last, compile=True)
    return variants


def try_build_dataset(data: DataConfig, reader: DatasetConfig) -> tuple[Dataset | None, str]:
    """Opens the training images; returns None and the reason if they are not available."""
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
    """Returns the sampler's space, chosen as by `open_space`: pixels, or codes or latents of a VQGAN with random
    weights, whose config `network()` returns."""
    of_codes = load_plugin("train.samplers", sampler, "sampler").SPACE == "codes"
    if not of_codes and ae_load_dir is None:
        return PixelSpace(data)
    autoencoder = VQGAN(network(), data.size, data.n_channels).to(device).eval().requires_grad_(False)
    first_stage = VQGANStage(Path(), autoencoder, data, reader, 0, "", device, False)
    return CodeSpace(first_stage) if of_codes else LatentSpace(first_stage, 1.0, first_stage.data.size)


def with_amp(space: Space, amp: bool) -> Space:
    """Returns the space with its VQGAN, if any, in half precision (`amp`) or float32."""
    return space if space.first_stage is None else replace(space, first_stage=replace(space.first_stage, amp=amp))


def sampler_trainees(
    settings: SamplerConfig, training: TrainingConfig, space: Space, n_classes: int, world: DistContext
) -> list[Trainee]:
    """Builds a training state of the sampler for each precision."""
    trainees = []
    for name, way in precision_variants(training, world.device).items():
        own = with_amp(space, way.amp)
        sampler, state = build_sampler_state(settings, way, own, n_classes, world)
        trainees.append(Trainee(name, SamplerStep(sampler, own, way, world), state))
    return trainees


def vqgan_trainees(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: DistContext
) -> list[Trainee]:
    """Builds a training state of the VQGAN for each precision; the perceptual network has random weights."""
    net = net_for_channels(loss.perceptual_net, data.n_channels)
    net = {"auto": "vgg"}.get(net, net)
    needed = net != "none" and loss.perceptual_weight
    perceptual = Perceptual(net, trained=False) if needed else None
    trainees = []
    for name, way in precision_variants(training, world.device).items():
        way = choose_memory_format(way, world, network.nf)
        state = build_vqgan_state(network, loss, data, way, world)
        trainees.append(Trainee(name, VQGANStep(loss, way, world, perceptual), state))
    return trainees


def training_phases(loss: VQGANLossConfig, steps: int) -> dict[str, int]:
    """Returns the first step of each phase of a VQGAN's training that differs in cost, by name."""
    start = loss.disc_start_step
    adversarial = start + loss.disc_warmup_steps  # from here on the autoencoder's loss includes the discriminator
    phases = {"no discriminator": 0, "discriminator warm-up": start, "discriminator": adversarial}
    exists = {"no discriminator": start > 0, "discriminator warm-up": start < adversarial, "discriminator": True}
    return {name: step for name, step in phases.items() if exists[name] and step < steps}


def step_workload(
    trainee: Trainee, parts: Sequence[Batch], world: DistContext, at: int = 0, when: str = ""
) -> Workload:
    """Returns the repeatable workload of step `at` of the training loop, EMA included, on these parts of a batch."""

    def run() -> None:
        trainee.state.step = at
        fit(trainee.state, repeat(parts), trainee.step, steps=at + 1, world=world, seed=trainee.step.training.seed)

    name = ", ".join(filter(None, [trainee.name, when]))
    return Workload(name, run, trainee.step.dtype, trainee.step.training.compile)


def random_batch(space: Space | None, n_classes: int, size: int, data: DataConfig, device: torch.device) -> Batch:
    """Returns a random batch with the shapes of `training_batches`, for a sampler of this space or a VQGAN (None)."""
    rng = torch.Generator().manual_seed(0)
    batch = {"position": torch.arange(size)}
    if isinstance(space, CodeSpace):
        batch["codes"] = torch.randint(space.model_args["codes"], (size, *space.model_args["grid"]), generator=rng)
    else:
        batch["image"] = 2 * torch.rand(size, *data.shape, generator=rng) - 1
    if n_classes:
        batch["label"] = torch.randint(n_classes, (size,), generator=rng)
    return to_device(batch, device)


def with_conditions(batch: Batch, fields: Sequence[str], source: BatchSource | None, device: torch.device) -> Batch:
    """Adds the fields of the sampler's conditions to the batch; those other than the label come from real images."""
    missing = sorted({*fields} - {*batch})
    if missing and source is None:
        raise ValueError(f"{', '.join(missing)} is computed from images by --adapt, but the images were not found")
    real = to_device(source[batch["position"].tolist()], device) if missing else {}
    lacking = sorted({*missing} - {*real})
    if lacking:
        raise ValueError(f"the images have no {', '.join(lacking)}: add it in the function of --adapt")
    return batch | {name: real[name] for name in missing}


def split_batch(batch: Batch, accumulate: int) -> list[Batch]:
    """Splits a batch into the micro-batches that a step accumulates gradients over."""
    size = len(batch["position"])
    if size % accumulate:
        raise ValueError(f"got batch_size {size} in {accumulate} micro-batches: --accumulate must divide --batch_size")
    starts = range(0, size, size // accumulate)
    return [{name: field[i : i + starts.step] for name, field in batch.items()} for i in starts]


@torch.no_grad()
def draw_samples(trainee: Trainee, batch: Batch, options: SamplingConfig, **kwargs: Any) -> Tensor:
    """Samples one example per row of the batch, with its conditions, in the sampler's space; `kwargs` go to
    `sample`."""
    step, size = trainee.step, len(batch["position"])
    rng = Streams([seed_of(0, "show", i) for i in range(size)], step.world.device)
    conditions = {name: batch[name] for name in step.sampler.conditions} or None
    conditions = encode_condition_images(step.sampler.network, step.space, conditions)
    network = trainee.state.eval_module("network").eval()
    with step.autocast(), frozen_weights_cast_once(network):  # as `TrainedSampler.draw`
        return step.sampler.sample(network, rng, batch=conditions, options=options, **kwargs)


def time_full_steps(trainee: Trainee, batch: Batch, options: SamplingConfig, repeats: int) -> list[float]:
    """Times `repeats` ancestral steps that evaluate every code grid, after two warm-ups; returns the seconds of each.

    The steps start from half-masked codes, since equal grids (such as fully masked ones) would be evaluated only once,
    and have an `on_step` callback, since steps that unmask nothing would otherwise be skipped.
    """
    edit = EditInput(batch["codes"], torch.zeros_like(batch["codes"], dtype=torch.bool), 0.5)
    synchronize, ends = torch.get_device_module(trainee.step.world.device).synchronize, []

    def clock(i: int, t: float, s: float, x: Tensor, logits: Tensor) -> Tensor:
        synchronize()
        ends.append(time.perf_counter())
        return x

    options = options.with_solver("ancestral", WARM_UPS + repeats)
    draw_samples(trainee, batch, options, edit=edit, on_step=clock)
    return [after - before for before, after in pairwise(ends)][WARM_UPS - 1 :]


class ConstantNetwork(nn.Module):
    """Takes the place of a sampler's network and returns the same output in each call with a batch of the same size."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.outputs = network, {}
        self.encode = network.encode

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) not in self.outputs:
            self.outputs[len(x)] = self.network(x, *args, **kwargs).clone()
        return self.outputs[len(x)]


@dataclass(frozen=True)
class LoopCost:
    """What sampling costs apart from its network: before the first call, and from each call to the next."""

    setup: float  # seconds
    seconds: float
    launches: float  # operations on the device from call to call
    waits: float  # of the host for the device from call to call


@torch.no_grad()
def solver_loop_cost(
    sampler: LearnedSampler, batch: Batch, options: SamplingConfig, device: torch.device, repeats: int = 3
) -> LoopCost:
    """Measures the loop of a solver by sampling one example per row of the batch with a ConstantNetwork; the seconds
    are medians over `repeats` samplings, after one to warm up; nan for 0 repeats, which only count."""
    network, marks, setups, steps = ConstantNetwork(sampler.network), [], [], []
    conditions = {name: batch[name] for name in sampler.conditions} or None

    def mark(*_: object) -> None:
        marks.append((time.perf_counter(), launches.count, launches.waits))

    def draw() -> list[tuple[float, int, int]]:  # the marks of its start, and of its first and last call
        marks.clear()
        mark()
        rng = Streams([seed_of(0, "show", i) for i in range(len(batch["position"]))], device)
        sampler.sample(network, rng, batch=conditions, options=options)
        return [marks[0], marks[1], marks[-1]]

    network.register_forward_hook(mark)
    with count_launches(device) as launches:
        draw()  # fills the network's outputs
        _, first, last = draw()
    calls = max(1, len(marks) - 2)
    counts = [(after - before) / calls for before, after in zip(first[1:], last[1:], strict=True)]
    for _ in range(1 + repeats if repeats else 0):
        start, first, last = (seconds for seconds, *_ in draw())
        setups.append(first - start)
        steps.append((last - first) / calls)
    setup, step = (statistics.median(each[1:]) if repeats else math.nan for each in (setups, steps))
    return LoopCost(setup, step, *counts)


def solver_loop_options(sampler: LearnedSampler, options: SamplingConfig) -> dict[str, SamplingConfig]:
    """Returns the settings of each solver of a sampler, in LOOP_STEPS steps or one per code, unguided and, if the
    sampler has conditions, guided."""
    settings = {}
    for solver, entry in solvers_for(sampler.process).items():
        steps = LOOP_STEPS if entry.takes_any_steps else None
        settings[solver] = options.with_solver(solver, steps).without_guidance()
        if sampler.conditions:
            settings[f"{solver}, guided"] = replace(settings[solver], guidance=2.0)
    return settings


@torch.no_grad()
def time_decoding(trainee: Trainee, x: Tensor, repeats: int) -> list[float]:
    """Times decoding of samples to images, up to `repeats` times after one warm-up; returns the seconds of each."""
    space = trainee.step.space
    space.decode(x)
    return time_repeatedly(lambda: space.decode(x), repeats, trainee.step.world.device)


def encode_decode_runs(
    trainee: Trainee, data: DataConfig, reader: DatasetConfig, images: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Returns functions that encode images to codes and decode codes to images, as later stages do."""
    network = trainee.state.eval_module("autoencoder").eval()
    amp = trainee.step.dtype != torch.float32
    first_stage = VQGANStage(Path(), network, data, reader, 0, "", trainee.step.world.device, amp)
    pictures = to_uint8(images)
    codes = first_stage.encode(pictures)
    return {"encoding": lambda: first_stage.encode(pictures), "decoding": lambda: first_stage.decode(codes)}


def image_batches(images: Dataset, data: DataConfig, seed: int, adapt: Adapt | None = None) -> TrainingImages:
    """Returns a source of training batches of images."""
    return TrainingImages(ImageSource(images, data, margin=data.crop_margin), seed, adapt)


def code_batches(space: CodeSpace, n_classes: int, seed: int) -> TrainingCodes:
    """Returns a source of training batches of random codes."""
    ids = torch.randint(space.model_args["codes"], (1, SOME_CODES, *space.model_args["grid"]), dtype=torch.int32)
    return TrainingCodes(ids, torch.randint(n_classes, (SOME_CODES,)) if n_classes else None, seed)
