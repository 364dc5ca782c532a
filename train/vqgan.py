"""How the first stage is trained: what one step does with a batch, and what is looked at on the way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.config import DataConfig, TrainingConfig
from train.data import ImageSource, fixed_subset, images_in_order, streams
from train.distributed import World
from train.ema import EMA
from train.logging import Logger
from train.loop import Batch, Metrics, State, optimize, warmed_up
from train.precision import autocast
from train.transforms import to_float
from vq.augment import Augmentation
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig, VQGANLossConfig
from vq.discriminator import PatchDiscriminator
from vq.losses import adaptive_weight, generator_loss, hinge_loss
from vq.perceptual import Perceptual
from vq.quantize import perplexity, usage

VALIDATION_IMAGES = 1024  # enough for two digits, and quick
SHOWN_IMAGES = 16


def build_state(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: World
) -> State:
    """Autoencoder and discriminator with an Adam each, on the world's device, the same in every process."""
    torch.manual_seed(training.seed)
    autoencoder = VQGAN(network, data.img_size, data.n_channels)
    discriminator = PatchDiscriminator(data.n_channels, loss.ndf, loss.disc_layers, loss.disc_norm)
    modules = {"autoencoder": autoencoder.to(world.device), "discriminator": discriminator.to(world.device)}
    optimizers = {}
    for name, module in modules.items():
        world.broadcast(module)
        optimizers[name] = torch.optim.AdamW(
            module.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
    averages = {"autoencoder": EMA(autoencoder, training.ema_beta)} if training.ema else {}
    return State(modules, optimizers, averages)


class VQGANStep:
    """One training step: the autoencoder, then, from `disc_start_step` on, the discriminator. A `step_fn` for `fit`."""

    def __init__(self, loss: VQGANLossConfig, training: TrainingConfig, world: World, perceptual: Perceptual | None):
        self.loss, self.training, self.world = loss, training, world
        self.perceptual = None if perceptual is None else perceptual.to(world.device)
        self.counts: Tensor | None = None  # (K,) how often each code was chosen since it was last looked at

    def __call__(self, state: State, parts: Sequence[Batch]) -> Metrics:
        adversarial = state.step >= self.loss.disc_start_step
        state.modules["discriminator"].requires_grad_(False)
        totals: Metrics = {}
        reconstructions = []
        for batch in parts:
            fake, metrics = self.autoencoder_backward(state, batch, adversarial, 1 / len(parts))
            reconstructions.append(fake)
            add(totals, metrics, 1 / len(parts))
        lr = warmed_up(self.training.lr, state.step, self.training.warmup_iters)
        totals["grad_norm"] = optimize(state.optimizers["autoencoder"], self.world, lr=lr, clip=self.training.grad_clip)
        if adversarial:
            state.modules["discriminator"].requires_grad_(True)
            for batch, fake in zip(parts, reconstructions, strict=True):
                add(totals, self.discriminator_backward(state, batch, fake, 1 / len(parts)), 1 / len(parts))
            optimize(state.optimizers["discriminator"], self.world, lr=lr, clip=self.training.grad_clip)
        totals["perf/lr"] = torch.tensor(lr, device=self.world.device)
        return totals

    def augmentation(self, batch: Batch, purpose: str) -> Callable[[Tensor], Tensor]:
        """One draw for real images and reconstructions alike; the identity without --diff_aug."""
        if not self.loss.diff_aug:
            return identity
        return Augmentation.draw(batch["image"], streams(self.training.seed, purpose, batch, self.world.device))

    def autoencoder_backward(
        self, state: State, batch: Batch, adversarial: bool, share: float
    ) -> tuple[Tensor, Metrics]:
        autoencoder, images = state.modules["autoencoder"], batch["image"]
        with autocast(self.world.device, self.training.amp):
            fake, codes = autoencoder(images)
        fake = fake.float()
        l1 = (images - fake).abs().mean()
        metrics = {"l1": l1, "vq": codes.loss.mean()}
        reconstruction = l1
        if self.perceptual is not None:
            metrics["lpips"] = self.perceptual(images, fake).mean()
            reconstruction = l1 + self.loss.perceptual_weight * metrics["lpips"]
        loss = reconstruction + codes.loss.mean()
        if adversarial:
            augment = self.augmentation(batch, "augment_autoencoder")
            with autocast(self.world.device, self.training.amp):
                logits = state.modules["discriminator"](augment(fake))
            g = generator_loss(logits.float())
            last_layer = autoencoder.decoder.last_layer
            weight = adaptive_weight(reconstruction, g, last_layer, self.loss.disc_weight_max, self.world.mean)
            loss = loss + weight * g
            metrics |= {"adversarial": g, "adaptive_weight": weight}
        (loss * share).backward()
        self.counts = codes.counts if self.counts is None else self.counts + codes.counts
        return fake.detach(), {"loss": loss} | metrics

    def discriminator_backward(self, state: State, batch: Batch, fake: Tensor, share: float) -> Metrics:
        augment = self.augmentation(batch, "augment_discriminator")
        with autocast(self.world.device, self.training.amp):
            real_logits, fake_logits = (
                state.modules["discriminator"](augment(x)).float() for x in (batch["image"], fake)
            )
        loss = hinge_loss(real_logits, fake_logits)
        (loss * share).backward()
        return {"disc_loss": loss, "disc_real": real_logits.mean(), "disc_fake": fake_logits.mean()}

    def take_counts(self) -> Tensor:
        """Code counts (K,) since the last call, summed over all processes."""
        counts, self.counts = self.world.sum(self.counts), None
        return counts


def identity(images: Tensor) -> Tensor:
    return images


def add(totals: Metrics, metrics: Metrics, share: float) -> None:
    """Adds a part's metrics to the step's, weighted by its share of the batch."""
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + value.detach() * share


class VQGANReports:
    """Validation, pictures and codebook usage, as hooks for `fit`."""

    def __init__(self, step: VQGANStep, validation: ImageSource, batch_size: int, logger: Logger):
        self.step, self.validation, self.batch_size, self.logger = step, validation, batch_size, logger

    @torch.no_grad()
    def validate(self, state: State, metrics: Metrics) -> None:
        """L1 and LPIPS on a fixed part of the validation split, with the averaged weights where they are kept."""
        step = self.step
        if not step.world.is_main:
            return
        network, l1, lpips = state.averaged("autoencoder").eval(), [], []
        indices = fixed_subset(len(self.validation), VALIDATION_IMAGES)
        for batch in images_in_order(self.validation, self.batch_size, indices):
            images = to_float(batch["image"]).to(step.world.device)
            with autocast(step.world.device, step.training.amp):
                fake = network(images)[0].float()
            l1.append((images - fake).abs().mean((1, 2, 3)))
            if step.perceptual is not None:
                lpips.append(step.perceptual(images, fake))
        found = {"val/l1": l1, "val/lpips": lpips}
        self.logger.scalars(state.step, {name: torch.cat(each).mean().item() for name, each in found.items() if each})
        state.modules["autoencoder"].train()

    @torch.no_grad()
    def show(self, state: State, metrics: Metrics) -> None:
        """A grid of validation images above their reconstructions, and how evenly the codes are used."""
        counts = self.step.take_counts()
        used = {"codes/usage": usage(counts).item(), "codes/perplexity": perplexity(counts).item()}
        self.logger.scalars(state.step, used)
        self.logger.histogram("codes/chosen", state.step, counts)
        if not self.step.world.is_main:
            return
        for batch in images_in_order(self.validation, SHOWN_IMAGES, fixed_subset(len(self.validation), SHOWN_IMAGES)):
            images = to_float(batch["image"]).to(self.step.world.device)
            fake = state.averaged("autoencoder").eval()(images)[0].clamp(-1, 1)
            self.logger.images("reconstructions", state.step, torch.cat([images, fake]), columns=len(images))
        state.modules["autoencoder"].train()
