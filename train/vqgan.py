"""Training of the first stage: the step of a VQGAN with its discriminator, and its evaluation hooks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.rng import seed_of
from train.config import DataConfig, TrainingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.streams import sample_streams
from train.data.transforms import to_float
from train.distributed import DistContext, gradient_sync
from train.execution import (
    autocast,
    has_amx,
    nan_grads_if_nonfinite,
    nan_if_nonfinite,
    to_channels_last,
    training_dtype,
    uses_channels_last,
    weight_casts_shared,
)
from train.logging import Logger
from train.loop import Batch, Outputs, TrainState
from train.lr_schedule import learning_rate
from train.optim import clip_and_step, is_selected
from train.trainer import build_train_state
from vq.augment import Augmentation
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig, VQGANLossConfig
from vq.discriminator import PatchDiscriminator
from vq.losses import ADVERSARIAL_LOSSES, LeCAM, adaptive_weight
from vq.quantizer import count_codes, perplexity, usage
from vq.quantizers import Quantized, StepContext

VALIDATION_IMAGES = 1024  # quick, and accurate to about two digits
SHOWN_IMAGES = 16
WIDE = 64  # channels at full resolution, from which channels-last format is faster on CPUs with AMX


def build_state(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: DistContext
) -> TrainState:
    """Builds an autoencoder and a discriminator, each with its own optimizer."""
    training = choose_memory_format(training, world, network.nf)
    torch.manual_seed(training.seed)
    autoencoder = VQGAN(network, data.size, data.n_channels)
    discriminator = PatchDiscriminator(
        data.n_channels,
        loss.ndf,
        loss.disc_layers,
        loss.disc_norm,
        spectral_norm=loss.disc_spectral_norm,
        blur=loss.disc_blur,
        unit_range=network.unit_range,
    )
    modules = {"autoencoder": autoencoder, "discriminator": discriminator}
    extras = {"lecam": LeCAM(world.device)} if loss.lecam_weight else {}
    starts = loss.disc_start_step < training.train_steps
    if starts and min(data.size) >> loss.disc_layers < 3:  # two more convolutions take one position each
        raise ValueError(
            f"got disc_layers {loss.disc_layers} for images of {data.img_size} pixels, of which the discriminator "
            "leaves none, wanted fewer layers: pass --disc_layers N, or a larger --img_size"
        )
    state = build_train_state(modules, training, world, primary=["autoencoder"], counters=["codes"], extras=extras)
    if loss.adaptive_weight and not autoencoder.decoder.last_layer.requires_grad:
        raise ValueError(
            f"got --train_only {' '.join(training.train_only)} and --adaptive_weight, which compares gradients at the "
            "last layer of the decoder: train that layer too, or pass --no_adaptive_weight"
        )
    return state


def choose_memory_format(
    training: TrainingConfig, world: DistContext, nf: int, origin: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """Returns the settings of the training of a VQGAN of width `nf` with `channels_last` decided: as typed, else as in
    the `origin` of the run that is resumed, else by rule, alike in all processes.

    The rule is yes in half precision on CUDA and, from a width of WIDE on, on CPUs with AMX: there a step at 256x256
    and width 128 is 1.29 times as fast, and one at 64x64 1.04 (width 64), 0.91 (48) or 0.73 times (32). Earlier
    versions, which recorded nothing, had it on CUDA alone.
    """
    if training.channels_last != "auto" or training.parallel == "fsdp":
        return training
    suits = uses_channels_last(training, world.device)
    if origin is None:
        half = training_dtype(training, world.device) == torch.bfloat16
        suits = suits or (has_amx(world.device) and half and nf >= WIDE)
    else:
        suits = origin.get("channels_last", suits)
    return replace(training, channels_last="no" if any(world.any(not suits)) else "yes")


class VQGANStep:
    """A `step_fn` for `fit`: trains the autoencoder and, from `disc_start_step` on, the discriminator.

    Returns the losses and their terms, gradient norms and the learning rate. With `keep_outputs` it also returns image
    and reconstruction (B, C, H, W) and ids (B, h, w) of every example, for the user's hooks.
    """

    def __init__(
        self,
        loss: VQGANLossConfig,
        training: TrainingConfig,
        world: DistContext,
        perceptual: nn.Module | None,
        keep_outputs: bool = False,
    ):
        self.loss, self.training, self.world, self.keep_outputs = loss, training, world, keep_outputs
        self.perceptual = None if perceptual is None else perceptual.to(world.device)
        self.perceptual_name = "logits" if loss.perceptual_net == "resnet50" else "lpips"
        self.discriminator_loss_fn, self.generator_loss_fn = ADVERSARIAL_LOSSES[loss.disc_loss]
        self.dtype = training_dtype(training, world.device)
        self.channels_last = uses_channels_last(training, world.device)
        self.bar_metrics = {"loss": "loss", loss.recon_loss: loss.recon_loss, "usage": "codes/usage"}

    def autocast(self):
        return autocast(self.world.device, self.dtype != torch.float32, self.dtype)

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        quantizer = state.modules["autoencoder"].quantizer
        buffers = [b for module in state.modules.values() for b in module.buffers()]
        old_buffers = [b.clone() for b in buffers]
        discriminates = state.step >= self.loss.disc_start_step
        last, weight = len(micro_batches) - 1, 1 / len(micro_batches)
        state.modules["discriminator"].requires_grad_(False)
        totals: Outputs = {}
        outputs: list[tuple[Tensor, Quantized]] = []
        with weight_casts_shared(self.training, self.world.device):
            for i, batch in enumerate(micro_batches):
                with gradient_sync(state.train_module("autoencoder").train(), last=i == last):
                    fake, codes, metrics = self.autoencoder_backward(state, batch, weight)
                outputs.append((fake, codes))
                accumulate(totals, metrics, weight)
            if discriminates:
                state.modules["discriminator"].requires_grad_(True)
                for i, (batch, (fake, _)) in enumerate(zip(micro_batches, outputs, strict=True)):
                    with gradient_sync(state.train_module("discriminator").train(), last=i == last):
                        accumulate(totals, self.discriminator_backward(state, batch, fake, weight), weight)
        lr = learning_rate(state.step, **self.training.schedule)
        names = ["autoencoder", "discriminator"] if discriminates else ["autoencoder"]
        result = clip_and_step(state, names, self.world, lr=lr, clip=self.training.grad_clip)
        prefixes = self.training.train_only
        learns = any(is_selected(f"quantizer.{name}", prefixes) for name in quantizer.state_dict())
        quantizer.update_codebook(self.step_context(state, None) if learns and result is not None else None)
        finite = torch.zeros((), dtype=torch.bool, device=self.world.device) if result is None else result.finite
        for buffer, old in zip(buffers, old_buffers, strict=True):  # of the codebook, and statistics of batch norms
            torch.where(finite, buffer, old, out=buffer)
        if result is None:
            return None
        if "lecam" in state.extras and discriminates:
            lecam = state.extras["lecam"]
            means = self.world.mean(torch.stack([totals["disc_real"], totals["disc_fake"]]))
            lecam.update_averages(*means.where(finite, torch.stack([lecam.real, lecam.fake])))  # else unchanged
        totals |= dict(zip(["grad_norm", "disc_grad_norm"][: len(names)], result.norms, strict=True))
        totals |= {"lr": torch.full((), lr, device=self.world.device), "finite": finite}
        for batch, (_, codes) in zip(micro_batches, outputs, strict=True):
            chosen = count_codes(codes.ids, quantizer.codebook_size) * finite
            state.counters["codes"].add("chosen", chosen)
            state.counters["codes"].add("images", torch.full_like(chosen[0], len(batch["image"])) * finite)
        return totals | self.hook_outputs(micro_batches, outputs) if self.keep_outputs else totals

    def hook_outputs(self, micro_batches: Sequence[Batch], outputs: list[tuple[Tensor, Quantized]]) -> Outputs:
        """Returns the per-example outputs for the user's hooks."""
        tensors = {
            "image": [batch["image"] for batch in micro_batches],
            "reconstruction": [fake for fake, _ in outputs],
            "ids": [codes.ids for _, codes in outputs],
        }
        return {name: torch.cat(parts) for name, parts in tensors.items()}

    def step_context(self, state: TrainState, batch: Batch | None) -> StepContext:
        """Returns the quantizer's view of a training step, with random streams if a micro-batch is given."""
        seed, device = self.training.seed, self.world.device
        rng = None if batch is None else sample_streams(seed, "quantizer", batch, device)
        return StepContext(state.step, seed_of(seed, "quantizer", "step", state.step), rng, self.world)

    def augmentation(self, batch: Batch, purpose: str) -> Callable[[Tensor], Tensor]:
        """Draws one augmentation for both real images and reconstructions; the identity without --diff_aug."""
        if not self.loss.diff_aug:
            return identity
        return Augmentation.draw(batch["image"], sample_streams(self.training.seed, purpose, batch, self.world.device))

    def autoencoder_backward(self, state: TrainState, batch: Batch, weight: float) -> tuple[Tensor, Quantized, Outputs]:
        """Runs forward and backward of the autoencoder for a micro-batch, which counts `weight` in its batch.

        Gradients of the losses are taken with respect to the reconstruction first, so that one backward pass through
        the autoencoder, with their weighted sum, is enough.
        """
        images = to_channels_last(batch["image"]) if self.channels_last else batch["image"]
        with self.autocast():
            reconstruction, codes = state.train_module("autoencoder")(images, self.step_context(state, batch))
        fake = reconstruction.detach().requires_grad_()
        reconstruction_loss, metrics = self.reconstruction_loss(images, fake)
        vq = codes.loss.mean()
        scale = state.extras["loss_scale"].value if "loss_scale" in state.extras else 1.0
        (gradient,) = torch.autograd.grad(reconstruction_loss * scale, fake)
        loss, warm_up = (reconstruction_loss + vq).detach(), self.loss.adversarial_ramp(state.step)
        if warm_up:
            g, g_gradient = self.adversarial_loss(state, batch, fake, scale)
            metrics["adversarial"], g_weight = g, self.loss.disc_weight * warm_up
            if self.loss.adaptive_weight:
                metrics["adaptive_weight"] = self.compute_adaptive_weight(
                    state, reconstruction, gradient, g_gradient, scale
                )
                g_weight = g_weight * metrics["adaptive_weight"]
            gradient, loss = gradient + g_weight * g_gradient, loss + g_weight * g
        factor = nan_if_nonfinite(loss) * weight
        roots = [(reconstruction, gradient * factor), (vq, factor * scale)]
        roots = [root for root in roots if root[0].requires_grad]  # --train_only may leave only one of them
        torch.autograd.backward(*zip(*roots, strict=True))
        return fake.detach(), codes, {"loss": loss, "vq": vq} | metrics | codes.metrics

    def reconstruction_loss(self, images: Tensor, fake: Tensor) -> tuple[Tensor, Outputs]:
        """Returns the weighted sum of the reconstruction losses, and its terms, in float32; the features of vgg are
        computed in half precision if the step is."""
        c = self.loss
        metrics = {"l1": (images - fake).abs().mean(), "l2": (images - fake).square().mean()}
        loss = c.recon_weight * metrics[c.recon_loss]
        if self.perceptual is not None:
            with self.autocast():
                metrics[self.perceptual_name] = self.perceptual(images, fake).mean()
            loss = loss + c.perceptual_weight * metrics[self.perceptual_name]
        return loss, metrics

    def adversarial_loss(self, state: TrainState, batch: Batch, fake: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Returns the adversarial loss of the autoencoder, and its gradient with respect to `fake`, times `scale`."""
        augment = self.augmentation(batch, "augment_autoencoder")
        with self.autocast():
            logits = state.modules["discriminator"](augment(fake))
        g = self.generator_loss_fn(logits.float())
        (gradient,) = torch.autograd.grad(g * scale, fake)
        return g.detach(), gradient

    def compute_adaptive_weight(
        self, state: TrainState, reconstruction: Tensor, gradient: Tensor, g_gradient: Tensor, scale: float
    ) -> Tensor:
        """Computes the adaptive weight in float32, from the gradients of both losses at the decoder's last layer."""
        last = state.modules["autoencoder"].decoder.last_layer
        at_last = [
            self.world.mean(torch.autograd.grad(reconstruction, last, g, retain_graph=True)[0].float()) / scale
            for g in (gradient, g_gradient)
        ]
        return adaptive_weight(*at_last, self.loss.disc_weight_max)

    def discriminator_backward(self, state: TrainState, batch: Batch, fake: Tensor, weight: float) -> Outputs:
        """Runs forward and backward of the discriminator for a micro-batch, which counts `weight` in its batch."""
        augment = self.augmentation(batch, "augment_discriminator")
        with self.autocast():
            real_logits, fake_logits = (
                state.train_module("discriminator")(augment(x)).float() for x in (batch["image"], fake)
            )
        loss = self.discriminator_loss_fn(real_logits, fake_logits)
        metrics = {"disc_real": real_logits.mean(), "disc_fake": fake_logits.mean()}
        if "lecam" in state.extras:
            metrics["lecam"] = state.extras["lecam"](real_logits, fake_logits)
            loss = loss + self.loss.lecam_weight * metrics["lecam"]
        scale = state.extras.get("loss_scale")
        total = nan_grads_if_nonfinite(loss * weight)
        (total if scale is None else scale.scale(total)).backward()
        return {"disc_loss": loss} | metrics


def identity(images: Tensor) -> Tensor:
    return images


def accumulate(totals: Outputs, metrics: Outputs, weight: float) -> None:
    """Adds the metrics of a micro-batch to those of the step."""
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + value.detach() * weight


class VQGANReports:
    """Evaluation hooks of a VQGAN: validation, images and codebook usage. All ranks must call them.

    `epoch` is the number of training images; codebook usage is counted over one epoch before it is logged.
    """

    def __init__(self, step: VQGANStep, validation: ImageSource, batch_size: int, epoch: int, logger: Logger):
        self.step, self.validation, self.batch_size, self.logger = step, validation, batch_size, logger
        self.epoch = epoch
        self.on_log = [self.log_code_usage]

    def log_code_usage(self, state: TrainState, outputs: Outputs) -> None:
        """Logs usage and perplexity of the codebook at the end of each epoch."""
        counts = state.counters["codes"]
        if counts.sums and self.step.world.sum(counts.sums["images"]) >= self.epoch:
            code_counts = counts.reduce_and_reset()["chosen"]
            metrics = {"codes/usage": usage(code_counts).item(), "codes/perplexity": perplexity(code_counts).item()}
            self.logger.log_scalars(state.step, metrics)
            self.logger.log_histogram("codes/chosen", state.step, code_counts)

    @torch.no_grad()
    def validate(self, state: TrainState, outputs: Outputs) -> None:
        """Logs L1, LPIPS and codebook usage on a fixed subset of the validation split, with EMA weights if kept."""
        step, world = self.step, self.step.world
        network, sums = state.eval_module("autoencoder").eval(), {}
        code_counts = torch.zeros(network.quantizer.codebook_size, device=world.device)
        indices = world.local_items(fixed_subset(len(self.validation), VALIDATION_IMAGES))
        batches = images_in_order(self.validation, self.batch_size, indices)
        for batch, counts in world.padded_batches(
            batches, fallback=lambda: next(images_in_order(self.validation, 1, [0]))
        ):
            images = to_float(batch["image"]).to(world.device)
            with step.autocast():
                fake, codes = network(images)
            fake = fake.float()
            losses = {"l1": (images - fake).abs().mean((1, 2, 3))}
            if step.perceptual is not None:
                losses[step.perceptual_name] = step.perceptual(images, fake)
            for name, value in losses.items():
                value = value.cpu().double()
                sums[name] = sums.get(name, 0) + torch.stack([value.sum(), value.new_tensor(len(value))]) * counts
            code_counts += count_codes(codes.ids, len(code_counts)) * counts
        totals = world.sum(torch.stack(list(sums.values())))
        means = {f"val/{name}": (total / n).item() for name, (total, n) in zip(sums, totals, strict=True)}
        code_counts = world.sum(code_counts)
        codes = {"val/usage": usage(code_counts).item(), "val/perplexity": perplexity(code_counts).item()}
        self.logger.log_scalars(state.step, means | codes)
        self.logger.log_best(state, "val/l1", means["val/l1"])

    @torch.no_grad()
    def log_images(self, state: TrainState, outputs: Outputs) -> None:
        """Logs a grid of validation images above their reconstructions."""
        indices = fixed_subset(len(self.validation), SHOWN_IMAGES)
        batches = images_in_order(self.validation, SHOWN_IMAGES, indices)
        for batch, _ in self.step.world.padded_batches(batches):  # few: every process computes them all
            images = to_float(batch["image"]).to(self.step.world.device)
            fake = state.eval_module("autoencoder").eval()(images)[0].clamp(-1, 1)
            self.logger.log_images("reconstructions", state.step, torch.cat([images, fake]), columns=len(images))
