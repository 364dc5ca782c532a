"""Bits per dimension of images given their codes under a VQGAN's decoder, with a log-variance head trained on demand.

An image x has 8 bits. p(x | z) gives each value the mass of a Gaussian within the value's bin, on the scale [-1, 1];
the outermost bins extend to infinity (Ho et al. 2020, eq. 13). It is a discrete probability: no dequantisation.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.gaussian import discretized_log_likelihood
from diffusion.types import Normal
from experiments.harness.experiment import ModelConfig, OutputConfig
from models.ranges import MILLION, NOT_NEGATIVE, POSITIVE, check_ranges
from train.checkpoint import load_weights, resolve_step, saved_steps
from train.cli.files import run_folder
from train.config import DataConfig, LoggingConfig, TrainingConfig
from train.data.codes import TrainingCodes
from train.data.loading import ImageSource, TrainingImages, build_dataset, fixed_subset, images_in_order
from train.data.transforms import check_8_bits, to_float, to_uint8, training_views
from train.datasets import DatasetConfig
from train.distributed import DistContext, gradient_sync
from train.execution import autocast, nan_grads_if_nonfinite, set_tf32
from train.first_stage import VQGANStage
from train.logging import Logger
from train.loop import Batch, Outputs, TrainState
from train.lr_schedule import learning_rate
from train.optim import clip_and_step
from train.runs import open_or_resume, open_run, read_provenance, read_run, run_lock
from train.sampler_loading import check_allowed
from train.trained_sampler import TrainedSampler
from train.trainer import build_train_state, train
from vq.likelihood import Reconstruction, build_head, reconstruct

VALIDATION_IMAGES = 1024
PREVIEW_IMAGES = 16


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Decoder likelihood (samplers of codes)."""

    decoder: bool = True
    """Also report bits per dimension of the images: those of the codes plus those of the image given its codes, under a
    Gaussian around the reconstruction. Its standard deviations come from a head, which is trained first if missing."""
    head_dir: str | None = None
    """Folder of the head's run; if omitted, likelihood_<VQGAN run>_<its step>."""
    train_steps: int = 10_000
    """Training steps of the head; a larger number continues its training."""
    train_batch_size: int = 16
    """Images per training step of the head, over all processes."""
    lr: float = 1e-3
    """Learning rate of the head."""
    steps_per_eval: int = 5_000
    """Training steps between validations of the head; 0: none."""

    EVERYDAY = ("decoder",)
    RANGES = {
        "train_steps": "[1, inf)",
        "train_batch_size": MILLION,
        "lr": POSITIVE,
        "steps_per_eval": NOT_NEGATIVE,
    }

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class HeadRunConfig:
    """Config of a head's training run; the VQGAN is part of its provenance."""

    data: DataConfig
    reader: DatasetConfig
    training: TrainingConfig
    logging: LoggingConfig


@torch.no_grad()
def reconstruct_codes(first_stage: VQGANStage, ids: Tensor) -> Reconstruction:
    """Decodes ids (B, h, w) to the reconstruction and the decoder features that the head takes."""
    with autocast(first_stage.device, first_stage.amp):
        return reconstruct(first_stage.vqgan.decoder, first_stage.vqgan.quantizer.vectors(ids.to(first_stage.device)))


def bits_per_dim(first_stage: VQGANStage, head: nn.Module, ids: Tensor, images: Tensor) -> Tensor:
    """Returns -log2 p(x | z) per dimension, float32 (B,), of 8-bit images x (B, C, H, W) scaled to [-1, 1] given their
    ids z (B, h, w); differentiable with respect to the head."""
    mean, features = reconstruct_codes(first_stage, ids)
    nats = discretized_log_likelihood(images.to(first_stage.device), Normal(mean, head(features)))
    return -nats.flatten(1).mean(1) / math.log(2)


@dataclass(frozen=True)
class TrainedHead:
    """A trained log-variance head and the VQGAN it was trained on."""

    run: Path
    step: int
    weights: str  # SHA-256 of the weights file
    first_stage: VQGANStage
    head: nn.Module

    @torch.no_grad()
    def bits_per_dim(self, ids: Tensor, images: Tensor) -> Tensor:
        """Returns -log2 p(x | z) per dimension: ids (B, h, w), uint8 images (B, C, H, W) -> (B,)."""
        return bits_per_dim(self.first_stage, self.head, ids, to_float(images))


class HeadStep:
    """One training step of the head: a `step_fn` for `fit` that returns loss (bits/dim), grad_norm, lr and finite."""

    def __init__(self, first_stage: VQGANStage, training: TrainingConfig, world: DistContext):
        self.first_stage, self.training, self.world = first_stage, training, world
        self.bar_metrics = {"loss": "loss", "val": "val/bits_per_dim"}

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        head, total = state.train_module("head").train(), 0.0
        for i, batch in enumerate(micro_batches):
            check_8_bits(batch["image"])
            ids = self.first_stage.encode(to_uint8(batch["image"]))
            with gradient_sync(head, last=i == len(micro_batches) - 1):
                loss = bits_per_dim(self.first_stage, head, ids, batch["image"]).mean() / len(micro_batches)
                nan_grads_if_nonfinite(loss).backward()
            total = total + loss.detach()
        lr = learning_rate(state.step, **self.training.schedule)
        result = clip_and_step(state, ["head"], self.world, lr=lr, clip=self.training.grad_clip)
        if result is None:
            return None
        lr = torch.full((), lr, device=self.world.device)
        return {"loss": total, "grad_norm": result.norms[0], "lr": lr, "finite": result.finite}


class HeadReports:
    """Validation and image grids, as hooks for `fit`. All ranks must call them."""

    def __init__(self, step: HeadStep, validation: ImageSource, logger: Logger):
        self.step, self.validation, self.logger = step, validation, logger
        self.on_log = []

    @torch.no_grad()
    def validate(self, state: TrainState, outputs: Outputs) -> None:
        """Logs bits per dimension of a fixed subset of the validation split under the averaged head."""
        first_stage, world, head = self.step.first_stage, self.step.world, state.eval_module("head").eval()
        indices = world.local_items(fixed_subset(len(self.validation), VALIDATION_IMAGES))
        batches = images_in_order(self.validation, self.step.training.batch_size, indices)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            bits = (
                bits_per_dim(first_stage, head, first_stage.encode(batch["image"]), to_float(batch["image"]))
                .cpu()
                .double()
            )
            sums += torch.stack([bits.sum(), torch.tensor(len(bits)).double()])
        total, count = world.sum(sums).tolist()
        self.logger.log_scalars(state.step, {"val/bits_per_dim": total / count})
        self.logger.log_best(state, "val/bits_per_dim", total / count)

    @torch.no_grad()
    def log_images(self, state: TrainState, outputs: Outputs) -> None:
        """Logs a grid of validation images, their reconstructions and the head's standard deviations."""
        first_stage, preview = self.step.first_stage, fixed_subset(len(self.validation), PREVIEW_IMAGES)
        for batch in images_in_order(self.validation, PREVIEW_IMAGES, preview):  # few: every process computes them all
            mean, features = reconstruct_codes(first_stage, first_stage.encode(batch["image"]))
            deviation = (0.5 * state.eval_module("head").eval()(features)).exp()
            rows = [to_float(batch["image"]), mean.clamp(-1, 1).cpu(), (2 * deviation / deviation.amax() - 1).cpu()]
            self.logger.log_images("likelihood", state.step, torch.cat(rows), columns=len(mean))


def build_state(first_stage: VQGANStage, training: TrainingConfig, world: DistContext) -> TrainState:
    """Builds the training state of a new head."""
    torch.manual_seed(training.seed)
    return build_train_state({"head": build_head(first_stage.vqgan.decoder)}, training, world, primary=["head"])


def train_head(run: Path, first_stage: VQGANStage, config: HeadRunConfig, world: DistContext) -> None:
    """Trains a head on the images of `config`, or resumes its training. All ranks must call it.

    ValueError: the folder holds a run with other VQGAN weights, data or settings.
    """
    data, training = config.data, config.training
    with set_tf32(world.device, training.tf32), run_lock(run) if world.is_main else nullcontext():
        images, validation = (
            ImageSource(build_dataset(data, config.reader, split), data, margin=margin)
            for split, margin in (("train", data.crop_margin), ("val", 0))
        )
        state = build_state(first_stage, training, world)
        open_or_resume(run, config, state, world, first_stage.provenance, images.dataset)
        step = HeadStep(first_stage, training, world)
        source = TrainingImages(images, training.seed, balance=training.balance_classes)
        make_reports = partial(HeadReports, step, validation)
        loading = {"workers": data.num_workers, "prefetch": data.prefetch}
        train(run, training, config.logging, state, world, source, step, make_reports, hooks=[], **loading)


def load_head(run: Path, first_stage: VQGANStage) -> TrainedHead:
    """Loads the newest averaged head of a run; ValueError if it was trained on other VQGAN weights."""
    read_run(run)  # raises an error that lists the existing runs if this is none
    origin: dict[str, Any] = read_provenance(run)
    if origin.get("ae_weights") != first_stage.weights:
        raise ValueError(
            f"{run} was trained on other VQGAN weights than those of {first_stage.run} at step {first_stage.step}: "
            "pass another --head_dir to train a head for these"
        )
    step, head = resolve_step(run, None, "--head_dir"), build_head(first_stage.vqgan.decoder)
    weights = load_weights(run, step, {"head": head}, ema=True)
    return TrainedHead(run, step, weights, first_stage, head.to(first_stage.device).eval().requires_grad_(False))


def load_or_train_head(
    decoder: DecoderConfig, model: ModelConfig, output: OutputConfig, trained: TrainedSampler
) -> TrainedHead | None:
    """Loads the head for the VQGAN of a sampler of codes, and trains it first as far as needed. All ranks must call it.

    Returns None without codes or with --no_decoder. ValueError: the data need a function that --allow does not name.
    """
    if not decoder.decoder or not trained.space.tokens:
        return None
    first_stage, world = trained.space.first_stage, trained.world
    run = run_folder(output.logs_root, decoder.head_dir or f"likelihood_{first_stage.run.name}_{first_stage.step}")
    check_allowed(first_stage.run, first_stage.reader, model.allow)
    reader = first_stage.reader if model.data_dir is None else replace(first_stage.reader, data_dir=model.data_dir)
    wanted, done = (
        head_run_config(decoder, output, first_stage.data, reader, run.name),
        max(saved_steps(run), default=0),
    )
    world.barrier()  # all ranks look before training changes the folder
    try:
        if done < wanted.training.train_steps:
            steps = f"{done} of {wanted.training.train_steps} steps done"
            print(f"training the decoder's log-variance head: {steps}", flush=True)
            train_head(run, first_stage, wanted, world)
        elif world.is_main:
            open_run(run, wanted, first_stage.provenance)
        world.barrier()
        return load_head(run, first_stage)
    except ValueError as error:
        raise ValueError(f"the decoder's log-variance head (--head_dir): {error}") from error


def head_run_config(
    decoder: DecoderConfig, output: OutputConfig, data: DataConfig, reader: DatasetConfig, name: str
) -> HeadRunConfig:
    """Returns the config of a head's run, on the images that its VQGAN was trained on."""
    training = TrainingConfig(
        train_steps=decoder.train_steps,
        batch_size=decoder.train_batch_size,
        lr=decoder.lr,
        amp=False,
        device=output.device,
    )
    logging = LoggingConfig(log_dir=name, logs_root=output.logs_root, steps_per_eval=decoder.steps_per_eval)
    return HeadRunConfig(data=data, reader=reader, training=training, logging=logging)


class DecoderBits:
    """Maps batches of a split's codes to bits per dimension of the images, in the encoded views, given these codes."""

    def __init__(self, head: TrainedHead, trained: TrainedSampler, split: str, codes: TrainingCodes):
        dataset, data = trained.dataset(split), trained.data
        if split != "train":
            data = data.without_augmentation
        self.head, self.codes, self.views = head, codes, training_views(data)
        self.images = ImageSource(dataset, data, margin=data.crop_margin)
        self.index = head.first_stage.encode_dataset(dataset, split, data, 1, trained.world).index  # already cached

    def image(self, position: int) -> Tensor:
        """Returns the image at a position of the codes' order, in its view: uint8 (C, H, W)."""
        view, row = divmod(self.codes.order[position], len(self.index))
        return self.views[view](self.images[int(self.index[row])]["image"]).as_subclass(Tensor)

    def __call__(self, batch: Batch) -> Tensor:
        """Returns bits per dimension (B,) of the images of a batch of codes."""
        images = torch.stack([self.image(position) for position in batch["position"].tolist()])
        return self.head.bits_per_dim(batch["codes"], images)


def summarize_image_bits(
    codes: Tensor, decoder: Tensor, tokens: int, dimensions: int, head: TrainedHead
) -> dict[str, Any]:
    """Returns the entries of results.json for images: -log2 p(x) <= -log2 p(x | z) - log2 p(z), z the codes of x.

    codes (n,): bits per code, for `tokens` codes; decoder (n,): bits per dimension, for `dimensions` values.
    """
    code_bits = codes * tokens / dimensions
    total = code_bits + decoder
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_standard_error": total.std().item() / len(total) ** 0.5 if len(total) > 1 else None,
        "codes_bits_per_dim": code_bits.mean().item(),
        "decoder_bits_per_dim": decoder.mean().item(),
        "head": {"run": head.run.name, "step": head.step},
    }


def image_bits_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the table rows of these entries."""
    error = results["bits_per_dim_standard_error"]
    return [
        ("", "bits per dimension, lower is better"),
        ("codes, -log2 p(z) (sampler)", f"{results['codes_bits_per_dim']:.4f}"),
        ("image given its codes, -log2 p(x | z) (decoder)", f"{results['decoder_bits_per_dim']:.4f}"),
        ("image (sum: upper bound)", f"{results['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")),
    ]
