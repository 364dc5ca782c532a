"""Bits that a VQGAN's decoder takes for images given their codes: a log-variance head, trained where it is missing.

An image x is 8-bit. p(x | z) gives each of its values the mass that a Gaussian has in the value's bin, in [-1, 1], the
outermost bins reaching to infinity (Ho et al. 2020, eq. 13): a probability of what is stored, without dequantisation.
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
from train.checkpoint import load_weights, resolve_step, saved_steps
from train.cli.parse import flatten_group
from train.config import DataConfig, LoggingConfig, TrainingConfig
from train.data.loading import ImageSource, TrainingCodes, TrainingImages, build_dataset, fixed_subset, images_in_order
from train.data.transforms import check_8_bits, to_float, to_uint8, training_views
from train.datasets import DatasetConfig
from train.distributed import DistContext, gradient_sync
from train.execution import autocast, nan_grads_if_nonfinite, set_tf32
from train.first_stage import FirstStage
from train.logging import Logger
from train.loop import Batch, Outputs, TrainState
from train.lr_schedule import learning_rate
from train.optim import clip_and_step
from train.runs import open_or_resume, open_run, read_provenance, read_run, run_folder, run_lock
from train.trained_sampler import TrainedSampler, check_allowed
from train.trainer import build_train_state, train
from vq.likelihood import Reconstruction, build_head, reconstruct

VALIDATION_IMAGES = 1024
SHOWN_IMAGES = 16


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
class HeadRunConfig:
    """All that a run of a head is made of, beside the VQGAN."""

    data: DataConfig
    reader: DatasetConfig
    training: TrainingConfig
    logging: LoggingConfig


@torch.no_grad()
def reconstruct_codes(first: FirstStage, ids: Tensor) -> Reconstruction:
    """What the VQGAN's decoder makes of ids (B, h, w)."""
    with autocast(first.device, first.amp):
        return reconstruct(first.vqgan.decoder, first.vqgan.quantizer.vectors(ids.to(first.device)))


def bits_per_dim(first: FirstStage, head: nn.Module, ids: Tensor, images: Tensor) -> Tensor:
    """-log2 p(x | z) of 8-bit images x (B, C, H, W), given scaled to [-1, 1], and ids z (B, h, w), by number of the
    image: (B,) float32, with gradients to the head."""
    mean, features = reconstruct_codes(first, ids)
    nats = discretized_log_likelihood(images.to(first.device), Normal(mean, head(features)))
    return -nats.flatten(1).mean(1) / math.log(2)


@dataclass(frozen=True)
class TrainedHead:
    """A head as a run left it, for the VQGAN it was trained on."""

    run: Path
    step: int
    weights: str  # SHA-256 of the file they came from
    first: FirstStage
    head: nn.Module

    @torch.no_grad()
    def bits_per_dim(self, ids: Tensor, images: Tensor) -> Tensor:
        """ids (B, h, w) and uint8 images (B, C, H, W) -> (B,), as the function of this name."""
        return bits_per_dim(self.first, self.head, ids, to_float(images))


class HeadStep:
    """One training step of the head. A `step_fn` for `fit`; gives the loss, bits per dimension, grad_norm and lr."""

    def __init__(self, first: FirstStage, training: TrainingConfig, world: DistContext):
        self.first, self.training, self.world = first, training, world

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        head, total = state.train_module("head").train(), 0.0
        for i, batch in enumerate(micro_batches):
            check_8_bits(batch["image"])
            ids = self.first.encode(to_uint8(batch["image"]))
            with gradient_sync(head, last=i == len(micro_batches) - 1):
                loss = bits_per_dim(self.first, head, ids, batch["image"]).mean() / len(micro_batches)
                nan_grads_if_nonfinite(loss).backward()
            total = total + loss.detach()
        lr = learning_rate(state.step, **self.training.schedule)
        norms = clip_and_step(state, ["head"], self.world, lr=lr, clip=self.training.grad_clip)
        if norms is None:
            return None
        return {"loss": total, "grad_norm": norms[0], "lr": torch.tensor(lr, device=self.world.device)}


class HeadReports:
    """Validation and pictures, as hooks for `fit`. All processes take part."""

    def __init__(self, step: HeadStep, validation: ImageSource, logger: Logger):
        self.step, self.validation, self.logger = step, validation, logger
        self.on_log = []

    @torch.no_grad()
    def validate(self, state: TrainState, outputs: Outputs) -> None:
        """Bits per dimension of a fixed part of the validation split, by the averaged head."""
        first, world, head = self.step.first, self.step.world, state.eval_module("head").eval()
        indices = world.local_items(fixed_subset(len(self.validation), VALIDATION_IMAGES))
        batches = images_in_order(self.validation, self.step.training.batch_size, indices)
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            bits = bits_per_dim(first, head, first.encode(batch["image"]), to_float(batch["image"])).cpu().double()
            sums += torch.stack([bits.sum(), torch.tensor(len(bits)).double()])
        total, count = world.sum(sums).tolist()
        self.logger.log_scalars(state.step, {"val/bits_per_dim": total / count})
        self.logger.log_best(state, "val/bits_per_dim", total / count)

    @torch.no_grad()
    def log_images(self, state: TrainState, outputs: Outputs) -> None:
        """A grid of validation images, their reconstructions, and the deviations that the head gives these."""
        first, shown = self.step.first, fixed_subset(len(self.validation), SHOWN_IMAGES)
        for batch in images_in_order(self.validation, SHOWN_IMAGES, shown):  # few: each process makes them all
            mean, features = reconstruct_codes(first, first.encode(batch["image"]))
            deviation = (0.5 * state.eval_module("head").eval()(features)).exp()
            rows = [to_float(batch["image"]), mean.clamp(-1, 1).cpu(), (2 * deviation / deviation.amax() - 1).cpu()]
            self.logger.log_images("likelihood", state.step, torch.cat(rows), columns=len(mean))


def build_state(first: FirstStage, training: TrainingConfig, world: DistContext) -> TrainState:
    """A new head and its optimizer."""
    torch.manual_seed(training.seed)
    return build_train_state({"head": build_head(first.vqgan.decoder)}, training, world, primary=["head"])


def train_head(run: Path, first: FirstStage, config: HeadRunConfig, world: DistContext) -> None:
    """Trains a head on the images that `config` names, or goes on; all processes of `world` take part.

    ValueError where the run in that folder is another: of other weights of the VQGAN, data or settings.
    """
    data, training = config.data, config.training
    with set_tf32(world.device, training.tf32), run_lock(run) if world.is_main else nullcontext():
        images, validation = (
            ImageSource(build_dataset(data, config.reader, split), data, margin=margin)
            for split, margin in (("train", data.crop_margin), ("val", 0))
        )
        state = build_state(first, training, world)
        open_or_resume(run, config, state, world, first.origin)
        step = HeadStep(first, training, world)
        source, reports = TrainingImages(images, training.seed), partial(HeadReports, step, validation)
        loading = {"workers": data.num_workers, "prefetch": data.prefetch}
        train(run, training, config.logging, state, world, source, step, reports, hooks=[], **loading)


def load_head(run: Path, first: FirstStage) -> TrainedHead:
    """The newest head of a run, its averaged weights; ValueError where it was trained on another VQGAN's weights."""
    read_run(run)  # says what runs there are, where this is none
    origin: dict[str, Any] = read_provenance(run)
    if origin.get("ae_weights") != first.weights:
        raise ValueError(
            f"{run} was trained on other VQGAN weights than those of {first.run} at step {first.step}: "
            "pass another --head_dir, to train a head for these"
        )
    step, head = resolve_step(run, None, "--head_dir"), build_head(first.vqgan.decoder)
    weights = load_weights(run, step, {"head": head}, ema=True)
    return TrainedHead(run, step, weights, first, head.to(first.device).eval().requires_grad_(False))


def load_or_train_head(
    decoder: DecoderConfig, model: ModelConfig, output: OutputConfig, trained: TrainedSampler
) -> TrainedHead | None:
    """The head of the VQGAN that a sampler of codes stands on, trained first as far as it is not; None without codes,
    or where none is asked for. All ranks take part.

    ValueError where the images to train on are brought by a command that --allow does not name.
    """
    if not decoder.decoder or not trained.space.tokens:
        return None
    first, world = trained.space.first, trained.world
    run = run_folder(output.logs_root, decoder.head_dir or f"likelihood_{first.run.name}_{first.step}")
    reader = first.reader if model.data_dir is None else replace(first.reader, data_dir=model.data_dir)
    check_allowed(first.run, {"sampler": {}, "reader": flatten_group(reader)}, model.allow)
    wanted, done = head_run_config(decoder, output, first.data, reader, run.name), max(saved_steps(run), default=0)
    world.barrier()  # all have looked before one trains
    try:
        if done < wanted.training.train_steps:
            print(f"training the decoder's head, {done} of {wanted.training.train_steps} steps are done", flush=True)
            train_head(run, first, wanted, world)
        elif world.is_main:
            open_run(run, wanted, first.origin)
        world.barrier()
        return load_head(run, first)
    except ValueError as error:
        raise ValueError(f"the decoder's head, whose folder is --head_dir: {error}") from error


def head_run_config(
    decoder: DecoderConfig, output: OutputConfig, data: DataConfig, reader: DatasetConfig, name: str
) -> HeadRunConfig:
    """The run of a head, on the images that its VQGAN was trained on."""
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
    """Bits per dimension of the images, in their views, that codes of a split were made of, given these codes."""

    def __init__(self, head: TrainedHead, trained: TrainedSampler, split: str, codes: TrainingCodes):
        dataset, data = trained.dataset(split), trained.data
        if split != "train":
            data = data.without_augmentation
        self.head, self.codes, self.views = head, codes, training_views(data)
        self.images = ImageSource(dataset, data, margin=data.crop_margin)
        self.index = head.first.codes(dataset, split, data, 1, trained.world).index  # in the cache already

    def image(self, position: int) -> Tensor:
        """uint8 (C, H, W)."""
        view, row = divmod(self.codes.order[position], len(self.index))
        return self.views[view](self.images[int(self.index[row])]["image"]).as_subclass(Tensor)

    def __call__(self, batch: Batch) -> Tensor:
        """A batch of the codes -> (B,)."""
        images = torch.stack([self.image(position) for position in batch["position"].tolist()])
        return self.head.bits_per_dim(batch["codes"], images)


def summarize_image_bits(
    codes: Tensor, decoder: Tensor, tokens: int, dimensions: int, head: TrainedHead
) -> dict[str, Any]:
    """What results.json says of whole images: -log2 p(x) <= -log2 p(x | z) - log2 p(z), z the codes of x.

    codes (n,) bits per code, of `tokens` codes; decoder (n,) bits per dimension, of `dimensions` numbers.
    """
    of_codes = codes * tokens / dimensions
    total = of_codes + decoder
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_standard_error": total.std().item() / len(total) ** 0.5 if len(total) > 1 else None,
        "codes_bits_per_dim": of_codes.mean().item(),
        "decoder_bits_per_dim": decoder.mean().item(),
        "head": {"run": head.run.name, "step": head.step},
    }


def image_bits_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows that a person reads of it."""
    error = results["bits_per_dim_standard_error"]
    return [
        ("", "bits per dimension"),
        ("codes, by the sampler", f"{results['codes_bits_per_dim']:.4f}"),
        ("image given its codes, by the decoder", f"{results['decoder_bits_per_dim']:.4f}"),
        ("image", f"{results['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")),
    ]
