"""Training of the second stage: the training step, validation and sample images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.rng import Streams, seed_of
from diffusion.rng import to_device as copy_to_device
from diffusion.types import OnStep
from models.experts import experts_of
from train.class_names import class_captions
from train.condition_images import encode_condition_images
from train.condition_source import ConditionSource, Row
from train.config import FineTuningConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import BatchSource, ImageSource, TrainingImages, merge_fields, to_device
from train.data.streams import TrainingStreams
from train.data.transforms import to_float
from train.datasets import Dataset
from train.distributed import DistContext, gradient_sync, interruptible_sampling
from train.execution import (
    autocast,
    nan_grads_if_nonfinite,
    to_channels_last,
    training_dtype,
    uses_channels_last,
    weight_casts_shared,
)
from train.finetuning import Base, fine_tune
from train.logging import Logger
from train.loop import Batch, Outputs, TrainState
from train.lr_schedule import learning_rate
from train.optim import clip_and_step, parse_scales, scale_learning_rates
from train.progress import print_above
from train.registry import load_plugin
from train.samplers import LearnedSampler, NotFiniteError
from train.samplers._conditions import options_of_conditions
from train.samplers._experts import describe_use, settle_experts
from train.spaces import Space
from train.text_encoder_file import load_text_encoder
from train.trained_sampler import TrainedSampler
from train.trainer import build_train_state

VALIDATION_IMAGES = 1024  # enough for two digits of the loss, and fast
PREVIEW_IMAGES = 16
DEFAULT_FINE_TUNING = FineTuningConfig()  # changes nothing
NOISE_LEVELS = 5  # whose losses are logged separately


def build_state(
    config: SamplerConfig,
    training: TrainingConfig,
    space: Space,
    n_classes: int,
    world: DistContext,
    fine_tuning: FineTuningConfig = DEFAULT_FINE_TUNING,
    base: Base | None = None,
    save_text: bool = True,
) -> tuple[LearnedSampler, TrainState]:
    """Builds the sampler of a config for a space, and the training state of its network, with the weights of `base` and
    the layers of `fine_tuning`, if any. Checkpoints are without a frozen text encoder unless `save_text`."""
    torch.manual_seed(training.seed)
    module = load_plugin("train.samplers", config.sampler, "sampler")
    sampler = module.build(config, **space.model_args, n_classes=n_classes)
    keys = load_text_encoder(sampler.network, options_of_conditions(config))
    if fine_tuning.text_new_tokens and base is None and not keys:
        got = "got --text_new_tokens without a trained text encoder"
        raise ValueError(f"{got}: pass --load_dir RUN or --text_encoder FILE")
    tuning = sampler.network, fine_tuning, training.train_only, base
    changed = fine_tune(*tuning, text_keys=keys, save_text=save_text)
    state = build_train_state(
        {"network": sampler.network},
        training,
        world,
        primary=["network"],
        counters=["loss_by_level", *(["experts"] if experts_of(sampler.network) else [])],
        extras=sampler.extras,
        learned=changed.learned,
        left_out=changed.left_out,
        share_frozen=base is not None,
    )
    state.loaded = changed.loaded
    scales = parse_scales(fine_tuning.lr_scale)
    scale_learning_rates(state.optimizers["network"], state.modules["network"], scales)
    return sampler, state


class SamplerStep:
    """One training step of a sampler's network. A `step_fn` for `fit`.

    Returns loss, grad_norm, lr, finite and the sampler's metrics, losses (B,) and t (B,) per example, and with
    `keep_outputs` also x0, x_t, prediction and x0_hat.
    """

    def __init__(
        self,
        sampler: LearnedSampler,
        space: Space,
        training: TrainingConfig,
        world: DistContext,
        keep_outputs: bool = False,
    ):
        self.sampler, self.space, self.training, self.world = sampler, space, training, world
        self.keep_outputs = keep_outputs
        self.dtype = training_dtype(training, world.device)
        self.channels_last = uses_channels_last(training, world.device)
        self.bar_metrics = {"loss": "loss", "val": "val/loss"}

    def autocast(self):
        return autocast(self.world.device, self.dtype != torch.float32, self.dtype)

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        network, scale = state.train_module("network").train(), state.extras.get("loss_scale")
        means, examples = {}, []
        with weight_casts_shared(self.training, self.world.device):
            for i, batch in enumerate(micro_batches):
                with gradient_sync(network, last=i == len(micro_batches) - 1):
                    loss = self.loss(network, batch)
                    mean = nan_grads_if_nonfinite(loss.per_example.mean() / len(micro_batches))
                    (mean if scale is None else scale.scale(mean)).backward()
                for name, value in {"loss": loss.per_example, **loss.metrics}.items():
                    means[name] = means.get(name, 0.0) + value.detach().mean() / len(micro_batches)
                kept = loss.outputs if self.keep_outputs else {name: loss.outputs[name] for name in ("t", "loss")}
                examples.append(kept)
        lr = learning_rate(state.step, **self.training.schedule)
        result = clip_and_step(state, ["network"], self.world, lr=lr, clip=self.training.grad_clip)
        if "experts" in state.counters:
            finite = False if result is None else result.finite
            for name, rows in settle_experts(state.modules["network"], self.world, finite).items():
                state.counters["experts"].add(name, rows)
        if result is None or self.sampler.extras and not result.finite:  # the sampler's times depend on the losses
            return None
        tensors = {name: torch.cat([outputs[name] for outputs in examples]) for name in examples[0]}
        tensors["losses"] = tensors.pop("loss")
        self.observe(state, tensors, result.finite)
        lr = torch.full((), lr, device=self.world.device)
        return tensors | means | {"grad_norm": result.norms[0], "lr": lr, "finite": result.finite}

    def loss(self, network: torch.nn.Module, batch: Batch, validation_size: int | None = None):
        """Returns the sampler's loss on a micro-batch, or on a validation batch of `validation_size`, whose random
        numbers do not depend on the run."""
        seed, size = (self.training.seed, self.training.batch_size) if validation_size is None else (0, validation_size)
        streams = TrainingStreams(seed, batch, size, self.world.device)
        batch = self.space.encode_batch(batch, seed)
        batch = encode_condition_images(self.sampler.network, self.space, batch)
        if self.channels_last:
            batch = {name: to_channels_last(value) for name, value in batch.items()}
        with self.autocast():
            return self.sampler.loss(network, batch, streams)

    @torch.no_grad()
    def observe(self, state: TrainState, outputs: Outputs, finite: Tensor) -> None:
        """Passes t and losses to the sampler, whose times may depend on them, and sums losses by noise level.

        The sums do not change unless `finite` () is true.
        """
        if self.sampler.extras:
            device = self.world.device
            t, losses = (self.world.gather(outputs[name].float().to(device)) for name in ("t", "losses"))
            self.sampler.observe(t, losses)
        level = (NOISE_LEVELS * self.sampler.noise_level(outputs["t"])).long().clamp(max=NOISE_LEVELS - 1)
        one_hot = F.one_hot(copy_to_device(level, self.world.device), NOISE_LEVELS).float()  # (B, NOISE_LEVELS)
        sums = torch.stack([(outputs["losses"].float().unsqueeze(1) * one_hot).sum(0), one_hot.sum(0)])
        state.counters["loss_by_level"].add("loss", sums.where(finite, 0))
        if self.keep_outputs:
            outputs["x0_hat"] = self.sampler.x0_hat(outputs)


@dataclass(frozen=True)
class WithNoise:
    """Adds to the batches of a source the Gaussian noise (B, *shape) that the loss would draw, under "noise".

    Loading processes then draw it ahead of the training step: the same numbers, from the streams of (seed, "noise").
    """

    source: BatchSource
    seed: int
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, positions: list[int]) -> Batch:
        batch = self.source[positions]
        streams = Streams([seed_of(self.seed, "noise", position) for position in positions])
        return merge_fields(batch, {"noise": streams.normal((len(positions), *self.shape))})


@torch.no_grad()
def validation_losses(step: SamplerStep, network: torch.nn.Module, source: BatchSource, count: int) -> dict[str, float]:
    """Returns mean loss and metrics over the first `count` validation images, at fixed times and noise.

    A metric is NaN for images that it says nothing about, which are left out of its mean.
    `network` must be in eval mode. The batches are divided among the ranks, and every rank gets the result.
    """
    size, world = step.training.batch_size, step.world
    lists = [positions.tolist() for positions in torch.arange(count).split(size)]
    batches = (source[positions] for positions in world.local_items(lists))
    sums: dict[str, Tensor] = {}
    for batch, counts in world.padded_batches(batches, fallback=lambda: source[lists[0]]):
        batch = to_device(batch, world.device)
        size = len(batch["position"])  # low-discrepancy times also cover a smaller last batch
        loss = step.loss(network, batch, validation_size=size)
        for name, value in {"loss": loss.per_example, **loss.metrics}.items():
            value = value.float().cpu().double()
            value = value if name == "loss" else value[~value.isnan()]
            total_and_count = torch.stack([value.sum(), torch.tensor(value.numel()).double()]) * counts
            sums[name] = sums.get(name, 0) + total_and_count
    totals = world.sum(torch.stack(list(sums.values())))
    return {name: (total / n).item() for name, (total, n) in zip(sums, totals, strict=True)}


def preview_source(sampler: LearnedSampler, rows: Sequence[Row], held_out: BatchSource) -> ConditionSource:
    """Returns the conditions of sample images during training: `rows` or, without them, the classes or those of
    held-out items, in turn."""
    fields = sampler.conditions, sampler.n_classes
    source = ConditionSource(*fields, held_out=held_out, optional=sampler.optional_conditions)
    class_rows = [{"label": label} for label in range(sampler.n_classes)]
    return source.with_rows(rows or class_rows) if rows or {*sampler.conditions} == {"label"} else source


def check_sampling(
    model: TrainedSampler, state: TrainState, sampling: SamplingConfig, rows: Sequence[Row], held_out: Dataset
) -> None:
    """Samples one image up to its first step. ValueError, before the run folder is written rather than at the first
    images, for settings that the sampler cannot sample with."""
    data = replace(model.data.without_augmentation, cache_images=False)
    items = TrainingImages(ImageSource(held_out, data), 0, model.adapt, first_caption=True)
    source = preview_source(model.sampler, rows, items)
    model.dry_run(sampling, source, network=state.eval_module("network").eval())


class SamplerReports:
    """Validation, losses by noise level and sample images, as hooks for `fit`. All ranks must call them.

    `rows` are conditions of the sample images (see `preview_source`), `class_names` the captions of their classes.
    """

    def __init__(
        self,
        step: SamplerStep,
        validation: BatchSource,
        sampling: SamplingConfig,
        rows: Sequence[Row],
        class_names: Sequence[str],
        logger: Logger,
    ):
        self.step, self.validation, self.sampling, self.logger = step, validation, sampling, logger
        self.source, self.class_names = preview_source(step.sampler, rows, validation), class_names
        self.on_log = [self.log_loss_by_level, self.log_expert_use]

    @torch.no_grad()
    def validate(self, state: TrainState, outputs: Outputs) -> None:
        """Logs the loss on fixed validation images, times and noise, comparable across steps and runs."""
        network = state.eval_module("network").eval()
        losses = validation_losses(self.step, network, self.validation, min(len(self.validation), VALIDATION_IMAGES))
        known = {f"val/{name}": value for name, value in losses.items() if name == "loss" or not math.isnan(value)}
        self.logger.log_scalars(state.step, known)
        self.logger.log_best(state, "val/loss", losses["loss"])

    def log_loss_by_level(self, state: TrainState, outputs: Outputs) -> None:
        """Logs the mean loss since the last call for each fifth of the noise levels."""
        for sums, counts in state.counters["loss_by_level"].reduce_and_reset().values():
            means = (sums / counts).tolist()
            scalars = {f"loss_by_level/{i / NOISE_LEVELS:.1f}": mean for i, mean in enumerate(means) if mean == mean}
            self.logger.log_scalars(state.step, scalars)

    def log_expert_use(self, state: TrainState, outputs: Outputs) -> None:
        """Logs how many rows each expert computed since the last call, if the network has any."""
        if "experts" not in state.counters:
            return
        rows = state.counters["experts"].reduce_and_reset()
        for name, counts in rows.items():
            self.logger.log_histogram(f"experts/{name}", state.step, counts[:-1])
        self.logger.log_scalars(state.step, describe_use(rows))

    @torch.no_grad()
    def log_images(self, state: TrainState, outputs: Outputs) -> None:
        """Logs a grid of samples, with the same noise and conditions each time."""
        world = self.step.world
        own_indices = world.local_items(list(range(PREVIEW_IMAGES)))
        ((indices, counts),) = world.padded_batches([own_indices] if own_indices else [], fallback=lambda: [0])
        with interruptible_sampling(state.eval_module("network"), world) as on_step:
            images = self.draw(state, indices, on_step)
        grid = world.gather_items(images if counts else images[:0], PREVIEW_IMAGES)
        conditions = self.source.draw(self.step.training.seed, list(range(PREVIEW_IMAGES))) if world.is_main else None
        labels = None if conditions is None else conditions.get("label")
        captions = class_captions(labels, self.step.sampler.n_classes, self.class_names)
        self.logger.log_images("samples", state.step, to_float(grid.cpu()), captions=captions)

    def draw(self, state: TrainState, indices: list[int], on_step: OnStep | None) -> Tensor:
        """Samples the uint8 images (B, C, H, W) of these indices with the EMA network."""
        sampler, world = self.step.sampler, self.step.world
        rng = Streams([seed_of(self.step.training.seed, "show", i) for i in indices], world.device)
        conditions = self.source.draw(self.step.training.seed, indices)
        batch = None if conditions is None else to_device(conditions, world.device)
        batch = encode_condition_images(sampler.network, self.step.space, batch)
        with self.step.autocast():
            network = state.eval_module("network").eval()
            kwargs = {"batch": batch, "options": self.sampling, "on_step": on_step}
            try:
                x = sampler.sample(network, rng, **kwargs)
            except NotFiniteError as error:  # no reason to end the training
                if world.is_main:
                    print_above(f"samples at step {state.step}: {error}")
                x = error.x.nan_to_num()
        return self.step.space.decode(x)
