"""How the first stage is trained: what one step does with a batch, and what is looked at on the way."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffusion.rng import seed_of
from train.config import DataConfig, TrainingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order, streams
from train.data.transforms import to_float
from train.distributed import DistContext, gradient_sync
from train.execution import (
    autocast,
    nan_grads_if_nonfinite,
    nan_if_nonfinite,
    to_channels_last,
    training_dtype,
    uses_channels_last,
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
from vq.losses import ADVERSARIAL, LeCAM, adaptive_weight
from vq.quantizer import count, perplexity, usage
from vq.quantizers import Codes, Training

VALIDATION_IMAGES = 1024  # enough for two digits, and quick
SHOWN_IMAGES = 16


def build_state(
    network: VQGANConfig, loss: VQGANLossConfig, data: DataConfig, training: TrainingConfig, world: DistContext
) -> TrainState:
    """Autoencoder and discriminator with an optimizer each."""
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
    state = build_train_state(modules, training, world, primary=["autoencoder"], counters=["codes"], extras=extras)
    if loss.adaptive_weight and not autoencoder.decoder.last_layer.requires_grad:
        raise ValueError(
            f"got --train_only {' '.join(training.train_only)} and --adaptive_weight, which compares gradients at the "
            "last layer of the decoder: train that too, or pass --no_adaptive_weight"
        )
    return state


class VQGANStep:
    """One training step: the autoencoder, and, from `disc_start_step` on, the discriminator. A `step_fn` for `fit`.

    Gives the losses and their parts, gradient norms and lr; where someone looks (`keep_outputs`), per example image,
    reconstruction (B, C, H, W) and ids (B, h, w).
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
        self.discriminator_loss_fn, self.generator_loss_fn = ADVERSARIAL[loss.disc_loss]
        self.dtype = training_dtype(training, world.device)
        self.channels_last = uses_channels_last(training, world.device)

    def autocast(self):
        return autocast(self.world.device, self.dtype != torch.float32, self.dtype)

    def __call__(self, state: TrainState, micro_batches: Sequence[Batch]) -> Outputs | None:
        quantizer = state.modules["autoencoder"].quantizer
        buffers = [b for module in state.modules.values() for b in module.buffers()]
        before = [b.clone() for b in buffers]
        discriminates = state.step >= self.loss.disc_start_step
        state.modules["discriminator"].requires_grad_(False)
        totals: Outputs = {}
        seen: list[tuple[Tensor, Codes]] = []
        for i, batch in enumerate(micro_batches):
            with gradient_sync(state.train_module("autoencoder").train(), last=i == len(micro_batches) - 1):
                fake, codes, metrics = self.autoencoder_backward(state, batch, 1 / len(micro_batches))
            seen.append((fake, codes))
            accumulate(totals, metrics, 1 / len(micro_batches))
        if discriminates:
            state.modules["discriminator"].requires_grad_(True)
            for i, (batch, (fake, _)) in enumerate(zip(micro_batches, seen, strict=True)):
                with gradient_sync(state.train_module("discriminator").train(), last=i == len(micro_batches) - 1):
                    accumulate(
                        totals,
                        self.discriminator_backward(state, batch, fake, 1 / len(micro_batches)),
                        1 / len(micro_batches),
                    )
        lr = learning_rate(state.step, **self.training.schedule)
        names = ["autoencoder", "discriminator"] if discriminates else ["autoencoder"]
        norms = clip_and_step(state, names, self.world, lr=lr, clip=self.training.grad_clip)
        if norms is None:
            quantizer.learn(None)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)  # batch norms have seen the bad batch
            return None
        prefixes = self.training.train_only
        learns = any(is_selected(f"quantizer.{name}", prefixes) for name in quantizer.state_dict())
        quantizer.learn(self.step_context(state, None) if learns else None)
        if "lecam" in state.extras and discriminates:
            state.extras["lecam"].follow(*self.world.mean(torch.stack([totals["disc_real"], totals["disc_fake"]])))
        totals |= dict(zip(["grad_norm", "disc_grad_norm"][: len(norms)], norms, strict=True))
        totals["lr"] = torch.tensor(lr, device=self.world.device)
        for batch, (_, codes) in zip(micro_batches, seen, strict=True):
            chosen = count(codes.ids, quantizer.codebook_size)
            state.counters["codes"].add("chosen", chosen)
            state.counters["codes"].add("images", torch.full_like(chosen[0], len(batch["image"])))
        return totals | self.hook_outputs(micro_batches, seen) if self.keep_outputs else totals

    def hook_outputs(self, micro_batches: Sequence[Batch], seen: list[tuple[Tensor, Codes]]) -> Outputs:
        """What users' hooks are shown beside the averages."""
        images = {"image": [batch["image"] for batch in micro_batches], "reconstruction": [fake for fake, _ in seen]}
        return {name: torch.cat(each) for name, each in {**images, "ids": [codes.ids for _, codes in seen]}.items()}

    def step_context(self, state: TrainState, batch: Batch | None) -> Training:
        """What the quantizer is told of a step, and of a part of its batch."""
        seed, device = self.training.seed, self.world.device
        rng = None if batch is None else streams(seed, "quantizer", batch, device)
        return Training(state.step, seed_of(seed, "quantizer", "step", state.step), rng, self.world)

    def augmentation(self, batch: Batch, purpose: str) -> Callable[[Tensor], Tensor]:
        """One draw for real images and reconstructions alike; the identity without --diff_aug."""
        if not self.loss.diff_aug:
            return identity
        return Augmentation.draw(batch["image"], streams(self.training.seed, purpose, batch, self.world.device))

    def autoencoder_backward(self, state: TrainState, batch: Batch, share: float) -> tuple[Tensor, Codes, Outputs]:
        """Gradients of each loss are taken at the image first: what made it is gone through once, with their sum."""
        images = to_channels_last(batch["image"]) if self.channels_last else batch["image"]
        with self.autocast():
            made, codes = state.train_module("autoencoder")(images, self.step_context(state, batch))
        fake = made.detach().requires_grad_()
        reconstruction, metrics = self.reconstruction_loss(images, fake)
        vq = codes.loss.mean()
        scale = state.extras["loss_scale"].value if "loss_scale" in state.extras else 1.0
        (gradient,) = torch.autograd.grad(reconstruction * scale, fake)
        loss, adversarial = (reconstruction + vq).detach(), self.loss.adversarial_share(state.step)
        if adversarial:
            g, of_adversarial = self.adversarial_loss(state, batch, fake, scale)
            metrics["adversarial"], weight = g, self.loss.disc_weight * adversarial
            if self.loss.adaptive_weight:
                metrics["adaptive_weight"] = self.compute_adaptive_weight(state, made, gradient, of_adversarial, scale)
                weight = weight * metrics["adaptive_weight"]
            gradient, loss = gradient + weight * of_adversarial, loss + weight * g
        factor = nan_if_nonfinite(loss) * share
        starts = [(made, gradient * factor), (vq, factor * scale)]
        starts = [start for start in starts if start[0].requires_grad]  # --train_only may leave one of them without
        torch.autograd.backward(*zip(*starts, strict=True))
        return fake.detach(), codes, {"loss": loss, "vq": vq} | metrics | codes.metrics

    def reconstruction_loss(self, images: Tensor, fake: Tensor) -> tuple[Tensor, Outputs]:
        """In float32: the weighted sum, and its parts."""
        c = self.loss
        metrics = {"l1": (images - fake).abs().mean(), "l2": (images - fake).square().mean()}
        loss = c.recon_weight * metrics[c.recon_loss]
        if self.perceptual is not None:
            metrics[self.perceptual_name] = self.perceptual(images, fake).mean()
            loss = loss + c.perceptual_weight * metrics[self.perceptual_name]
        return loss, metrics

    def adversarial_loss(self, state: TrainState, batch: Batch, fake: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The autoencoder's adversarial loss, and its gradient, times `scale`, at the images."""
        augment = self.augmentation(batch, "augment_autoencoder")
        with self.autocast():
            logits = state.modules["discriminator"](augment(fake))
        g = self.generator_loss_fn(logits.float())
        (gradient,) = torch.autograd.grad(g * scale, fake)
        return g.detach(), gradient

    def compute_adaptive_weight(
        self, state: TrainState, made: Tensor, of_reconstruction: Tensor, of_adversarial: Tensor, scale: float
    ) -> Tensor:
        """The adaptive weight, from two gradients at the images on to the last layer, in float32."""
        last = state.modules["autoencoder"].decoder.last_layer
        at_last = [
            self.world.mean(torch.autograd.grad(made, last, gradient, retain_graph=True)[0].float()) / scale
            for gradient in (of_reconstruction, of_adversarial)
        ]
        return adaptive_weight(*at_last, self.loss.disc_weight_max)

    def discriminator_backward(self, state: TrainState, batch: Batch, fake: Tensor, share: float) -> Outputs:
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
        total = nan_grads_if_nonfinite(loss * share)
        (total if scale is None else scale.scale(total)).backward()
        return {"disc_loss": loss} | metrics


def identity(images: Tensor) -> Tensor:
    return images


def accumulate(totals: Outputs, metrics: Outputs, share: float) -> None:
    """Adds a part's metrics to the step's, weighted by its share of the batch."""
    for name, value in metrics.items():
        totals[name] = totals.get(name, 0.0) + value.detach() * share


class VQGANReports:
    """Validation, pictures and codebook usage, as hooks for `fit`. All processes take part.

    `epoch` is how many training images there are: codes are counted over as many before they are told.
    """

    def __init__(self, step: VQGANStep, validation: ImageSource, batch_size: int, epoch: int, logger: Logger):
        self.step, self.validation, self.batch_size, self.logger = step, validation, batch_size, logger
        self.epoch = epoch
        self.on_log = [self.log_code_usage]

    def log_code_usage(self, state: TrainState, outputs: Outputs) -> None:
        """How evenly codes were chosen in the last epoch, once it is over."""
        counts = state.counters["codes"]
        if counts.sums and self.step.world.sum(counts.sums["images"]) >= self.epoch:
            chosen = counts.reduce_and_reset()["chosen"]
            used = {"codes/usage": usage(chosen).item(), "codes/perplexity": perplexity(chosen).item()}
            self.logger.log_scalars(state.step, used)
            self.logger.log_histogram("codes/chosen", state.step, chosen)

    @torch.no_grad()
    def validate(self, state: TrainState, outputs: Outputs) -> None:
        """L1, LPIPS and use of codes on a fixed part of the validation split, with averaged weights where they are."""
        step, world = self.step, self.step.world
        network, sums = state.eval_module("autoencoder").eval(), {}
        chosen = torch.zeros(network.quantizer.codebook_size, device=world.device)
        indices = world.local_items(fixed_subset(len(self.validation), VALIDATION_IMAGES))
        batches = images_in_order(self.validation, self.batch_size, indices)
        for batch, counts in world.padded_batches(
            batches, fallback=lambda: next(images_in_order(self.validation, 1, [0]))
        ):
            images = to_float(batch["image"]).to(world.device)
            with step.autocast():
                fake, codes = network(images)
            fake = fake.float()
            found = {"l1": (images - fake).abs().mean((1, 2, 3))}
            if step.perceptual is not None:
                found[step.perceptual_name] = step.perceptual(images, fake)
            for name, value in found.items():
                value = value.cpu().double()
                sums[name] = sums.get(name, 0) + torch.stack([value.sum(), value.new_tensor(len(value))]) * counts
            chosen += count(codes.ids, len(chosen)) * counts
        totals = world.sum(torch.stack(list(sums.values())))
        means = {f"val/{name}": (total / n).item() for name, (total, n) in zip(sums, totals, strict=True)}
        chosen = world.sum(chosen)
        used = {"val/usage": usage(chosen).item(), "val/perplexity": perplexity(chosen).item()}
        self.logger.log_scalars(state.step, means | used)
        self.logger.log_best(state, "val/l1", means["val/l1"])

    @torch.no_grad()
    def log_images(self, state: TrainState, outputs: Outputs) -> None:
        """A grid of validation images above their reconstructions."""
        shown = fixed_subset(len(self.validation), SHOWN_IMAGES)
        for batch in images_in_order(self.validation, SHOWN_IMAGES, shown):  # few: each process makes them all
            images = to_float(batch["image"]).to(self.step.world.device)
            fake = state.eval_module("autoencoder").eval()(images)[0].clamp(-1, 1)
            self.logger.log_images("reconstructions", state.step, torch.cat([images, fake]), columns=len(images))
