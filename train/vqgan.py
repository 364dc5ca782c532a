"""How the first stage is trained: what one step does with a batch, and what is looked at on the way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.assembly import assemble, in_channels_last, training_dtype
from train.config import DataConfig, TrainingConfig
from train.data import ImageSource, fixed_subset, images_in_order, streams
from train.distributed import World
from train.execution import to_channels_last
from train.logging import Logger
from train.loop import Batch, Outputs, State
from train.parallel import synchronized
from train.precision import autocast, poisoned
from train.schedule import learning_rate
from train.transforms import to_float
from train.update import update
from vq.augment import Augmentation
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig, VQGANLossConfig
from vq.discriminator import PatchDiscriminator
from vq.losses import adaptive_weight, generator_loss, hinge_loss
from vq.perceptual import Perceptual
from vq.quantize import Codes, perplexity, usage

VALIDATION_IMAGES = 1024  # enough for two digits, and quick
SHOWN_IMAGES = 16


def build_state(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: World
) -> State:
    """Autoencoder and discriminator with an optimizer each."""
    torch.manual_seed(training.seed)
    autoencoder = VQGAN(network, data.img_size, data.n_channels)
    discriminator = PatchDiscriminator(data.n_channels, loss.ndf, loss.disc_layers, loss.disc_norm)
    modules = {"autoencoder": autoencoder, "discriminator": discriminator}
    return assemble(modules, training, world, averaged=["autoencoder"], counters=["codes"])


class VQGANStep:
    """One training step: the autoencoder, and, from `disc_start_step` on, the discriminator. A `step_fn` for `fit`.

    Gives the losses and their parts, gradient norms and lr; where someone looks (`watched`), per example image,
    reconstruction (B, C, H, W) and ids (B, h, w).
    """

    def __init__(
        self,
        loss: VQGANLossConfig,
        training: TrainingConfig,
        world: World,
        perceptual: Perceptual | None,
        watched: bool = False,
    ):
        self.loss, self.training, self.world, self.watched = loss, training, world, watched
        self.perceptual = None if perceptual is None else perceptual.to(world.device)
        self.dtype = training_dtype(training, world.device)
        self.channels_last = in_channels_last(training, world.device)

    def autocast(self):
        return autocast(self.world.device, self.dtype != torch.float32, self.dtype)

    def __call__(self, state: State, parts: Sequence[Batch]) -> Outputs | None:
        buffers = [b for module in state.modules.values() for b in module.buffers()]
        before = [b.clone() for b in buffers]
        adversarial = state.step >= self.loss.disc_start_step
        state.modules["discriminator"].requires_grad_(False)
        totals: Outputs = {}
        seen: list[tuple[Tensor, Codes]] = []
        for i, batch in enumerate(parts):
            with synchronized(state.replica("autoencoder").train(), last=i == len(parts) - 1):
                fake, codes, metrics = self.autoencoder_backward(state, batch, adversarial, 1 / len(parts))
            seen.append((fake, codes))
            add(totals, metrics, 1 / len(parts))
        if adversarial:
            state.modules["discriminator"].requires_grad_(True)
            for i, (batch, (fake, _)) in enumerate(zip(parts, seen, strict=True)):
                with synchronized(state.replica("discriminator").train(), last=i == len(parts) - 1):
                    add(totals, self.discriminator_backward(state, batch, fake, 1 / len(parts)), 1 / len(parts))
        lr = learning_rate(state.step, **self.training.schedule)
        names = ["autoencoder", "discriminator"] if adversarial else ["autoencoder"]
        norms = update(state, names, self.world, lr=lr, clip=self.training.grad_clip)
        if norms is None:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)  # batch norms have seen the bad batch
            return None
        totals |= dict(zip(["grad_norm", "disc_grad_norm"][: len(norms)], norms, strict=True))
        totals["lr"] = torch.tensor(lr, device=self.world.device)
        for _, codes in seen:
            state.counters["codes"].add("chosen", codes.counts)
        return totals | self.looked_at(parts, seen) if self.watched else totals

    def looked_at(self, parts: Sequence[Batch], seen: list[tuple[Tensor, Codes]]) -> Outputs:
        """What users' hooks are shown beside the averages."""
        images = {"image": [batch["image"] for batch in parts], "reconstruction": [fake for fake, _ in seen]}
        return {name: torch.cat(each) for name, each in {**images, "ids": [codes.ids for _, codes in seen]}.items()}

    def augmentation(self, batch: Batch, purpose: str) -> Callable[[Tensor], Tensor]:
        """One draw for real images and reconstructions alike; the identity without --diff_aug."""
        if not self.loss.diff_aug:
            return identity
        return Augmentation.draw(batch["image"], streams(self.training.seed, purpose, batch, self.world.device))

    def autoencoder_backward(
        self, state: State, batch: Batch, adversarial: bool, share: float
    ) -> tuple[Tensor, Codes, Outputs]:
        images = to_channels_last(batch["image"]) if self.channels_last else batch["image"]
        with self.autocast():
            fake, codes = state.replica("autoencoder")(images)
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
            with self.autocast():
                logits = state.modules["discriminator"](augment(fake))
            g = generator_loss(logits.float())
            last_layer = state.modules["autoencoder"].decoder.last_layer
            scale = state.extras["loss_scale"].value if "loss_scale" in state.extras else 1.0
            weight = adaptive_weight(
                reconstruction * scale,
                g * scale,
                last_layer,
                self.loss.disc_weight_max,
                lambda gradient: self.world.mean(gradient) / scale,
            )
            loss = loss + weight * g
            metrics |= {"adversarial": g, "adaptive_weight": weight}
        self.backward(state, loss * share)
        return fake.detach(), codes, {"loss": loss} | metrics

    def backward(self, state: State, loss: Tensor) -> None:
        """Gradients that are NaN in every process where the loss is not finite in one."""
        scale = state.extras.get("loss_scale")
        loss = poisoned(loss)
        (loss if scale is None else scale.scale(loss)).backward()

    def discriminator_backward(self, state: State, batch: Batch, fake: Tensor, share: float) -> Outputs:
        augment = self.augmentation(batch, "augment_discriminator")
        with self.autocast():
            real_logits, fake_logits = (
                state.replica("discriminator")(augment(x)).float() for x in (batch["image"], fake)
            )
        loss = hinge_loss(real_logits, fake_logits)
        self.backward(state, loss * share)
        return {"disc_loss": loss, "disc_real": real_logits.mean(), "disc_fake": fake_logits.mean()}


def identity(images: Tensor) -> Tensor:
    return images


def add(totals: Outputs, metrics: Outputs, share: float) -> None:
    """Adds a part's metrics to the step's, weighted by its share of the batch."""
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + value.detach() * share


class VQGANReports:
    """Validation, pictures and codebook usage, as hooks for `fit`. All processes take part."""

    def __init__(self, step: VQGANStep, validation: ImageSource, batch_size: int, logger: Logger):
        self.step, self.validation, self.batch_size, self.logger = step, validation, batch_size, logger
        self.tallied = []

    @torch.no_grad()
    def validate(self, state: State, outputs: Outputs) -> None:
        """L1 and LPIPS on a fixed part of the validation split, with the averaged weights where they are kept."""
        step, world = self.step, self.step.world
        network, sums = state.averaged("autoencoder").eval(), {}
        indices = world.share_of(fixed_subset(len(self.validation), VALIDATION_IMAGES))
        batches = images_in_order(self.validation, self.batch_size, indices)
        for batch, counts in world.rounds(batches, spare=lambda: next(images_in_order(self.validation, 1, [0]))):
            images = to_float(batch["image"]).to(world.device)
            with step.autocast():
                fake = network(images)[0].float()
            found = {"l1": (images - fake).abs().mean((1, 2, 3))}
            if step.perceptual is not None:
                found["lpips"] = step.perceptual(images, fake)
            for name, value in found.items():
                value = value.cpu().double()
                sums[name] = sums.get(name, 0) + torch.stack([value.sum(), value.new_tensor(len(value))]) * counts
        totals = world.sum(torch.stack(list(sums.values())))
        means = {f"val/{name}": (total / n).item() for name, (total, n) in zip(sums, totals, strict=True)}
        self.logger.scalars(state.step, means)
        self.logger.best(state, "val/l1", means["val/l1"])

    @torch.no_grad()
    def show(self, state: State, outputs: Outputs) -> None:
        """A grid of validation images above their reconstructions, and how evenly the codes are used."""
        for counts in state.counters["codes"].take().values():
            used = {"codes/usage": usage(counts).item(), "codes/perplexity": perplexity(counts).item()}
            self.logger.scalars(state.step, used)
            self.logger.histogram("codes/chosen", state.step, counts)
        shown = fixed_subset(len(self.validation), SHOWN_IMAGES)
        for batch in images_in_order(self.validation, SHOWN_IMAGES, shown):  # few: each process makes them all
            images = to_float(batch["image"]).to(self.step.world.device)
            fake = state.averaged("autoencoder").eval()(images)[0].clamp(-1, 1)
            self.logger.images("reconstructions", state.step, torch.cat([images, fake]), columns=len(images))
