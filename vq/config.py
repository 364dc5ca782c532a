"""The settings of the first stage."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """VQGAN: encoder, codebook, decoder."""

    nf: int = 128
    """Channels of the first level."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each level; every level but the last halves the resolution."""
    res_blocks: int = 2
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions with self-attention (heights, where images are not square)."""
    quantizer: Literal["nearest", "ema", "l2", "gumbel", "fsq", "lfq", "ibq"] = "nearest"
    """How encoder outputs become codes: a file of vq/quantizers."""
    codebook_size: int = 1024
    """Number of codes."""
    emb_dim: int = 256
    """Width of a code vector, for l2 better 8 or 16; fsq has a number for each level instead, lfq one for each bit."""
    beta: float = 0.25
    """Commitment weight: pulls the encoder to its codes (the codebook's own weight is 1); fsq and gumbel have none."""
    legacy_beta: bool = False
    """nearest: beta weighs the codebook instead, and the commitment counts in full, as in taming-transformers."""
    codebook_decay: float = 0.99
    """ema: decay per step of the averages that are the codes."""
    revive_below: float = 0.05
    """ema: a code chosen less than this share of its turn moves to a vector of the batch; 0: never."""
    fsq_levels: tuple[int, ...] = ()
    """fsq: levels of each number; left out, 8s (and 4s) whose product is codebook_size, a power of 2."""
    entropy_weight: float = 0.1
    """lfq, ibq: weight of the entropies that make single codes certain and the whole codebook used."""
    entropy_temperature: float = 0.01
    """lfq, ibq: temperature of the probabilities whose entropies these are."""
    gumbel_kl_weight: float = 1e-8
    """gumbel: weight of the distance of its probabilities to uniform ones."""
    gumbel_straight_through: bool = False
    """gumbel: decode one code per position in training too, not a mixture."""
    gumbel_decay_steps: int = 160_000
    """gumbel: steps in which its temperature falls from 1 towards 0, as far as 1/16."""
    unit_range: bool = False
    """The encoder is given images in [0, 1], as networks of Unleashing Transformers are; all else stays in [-1, 1]."""

    def __post_init__(self):
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(
                f"got ch_mult {self.ch_mult}, wanted one positive multiplier per level, e.g. --ch_mult 1 1 2 2 4"
            )
        for name in ("nf", "res_blocks", "emb_dim", "codebook_size", "gumbel_decay_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")
        for name in ("beta", "revive_below", "entropy_weight", "gumbel_kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted 0 or more: pass --{name} NUMBER")
        if not 0 <= self.codebook_decay < 1 or self.entropy_temperature <= 0:
            got = f"codebook_decay {self.codebook_decay}, entropy_temperature {self.entropy_temperature}"
            raise ValueError(f"got {got}: wanted a decay in [0, 1) and a positive temperature")
        if self.legacy_beta and self.quantizer != "nearest":
            raise ValueError(f"got --legacy_beta with --quantizer {self.quantizer}: it is of nearest alone")
        if self.fsq_levels and self.quantizer != "fsq":
            raise ValueError(f"got --fsq_levels with --quantizer {self.quantizer}: they are of fsq alone")
        self.code_dim  # noqa: B018  refused where the codes do not fit their number

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels of fsq; ValueError where their product is not codebook_size."""
        bits = self.codebook_size.bit_length() - 1
        if not self.fsq_levels and (bits < 2 or 2**bits != self.codebook_size):
            raise ValueError(
                f"got codebook_size {self.codebook_size}, no power of 2 from 4 on, for fsq: pass its --fsq_levels"
            )
        eights, rest = divmod(bits, 3)
        levels = self.fsq_levels or {0: (8,) * eights, 1: (8,) * (eights - 1) + (4, 4), 2: (8,) * eights + (4,)}[rest]
        if min(levels) < 2 or math.prod(levels) != self.codebook_size:
            raise ValueError(
                f"got fsq_levels {levels}, whose product is {math.prod(levels)}, for codebook_size "
                f"{self.codebook_size}: pass --codebook_size {math.prod(levels)}, and levels of 2 at least"
            )
        return levels

    @property
    def code_dim(self) -> int:
        """Width of a code's vector, and of what the encoder gives."""
        if self.quantizer == "fsq":
            return len(self.levels)
        if self.quantizer != "lfq":
            return self.emb_dim
        bits = self.codebook_size.bit_length() - 1
        if bits < 1 or 2**bits != self.codebook_size:
            raise ValueError(f"got codebook_size {self.codebook_size} for lfq, wanted a power of 2: its codes are bits")
        return bits

    @property
    def factor(self) -> int:
        """Image pixels per code, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def grid(self, height: int, width: int | None = None) -> tuple[int, int]:
        """The grid of codes of an image, square without `width`; ValueError where a size does not divide."""
        width = height if width is None else width
        if min(height, width) < self.factor or height % self.factor or width % self.factor:
            raise ValueError(
                f"got images of {height}x{width} for {len(self.ch_mult)} levels, wanted multiples of {self.factor}: "
                "change --img_size or --img_width, or the number of levels with --ch_mult"
            )
        return height // self.factor, width // self.factor


@dataclass(frozen=True, kw_only=True)
class VQGANLossConfig:
    """VQGAN losses: reconstruction, perceptual, adversarial."""

    recon_loss: Literal["l1", "l2"] = "l1"
    """Pixel loss: mean absolute, or mean squared, difference."""
    recon_weight: float = 1.0
    """Weight of the pixel loss."""
    perceptual_net: Literal["auto", "none", "vgg", "alex", "squeeze", "resnet50"] = "auto"
    """Network of the perceptual loss: LPIPS on vgg, alex or squeeze, or the logits of resnet50; auto: vgg where its
    weights can be had, else none, with a warning."""
    perceptual_weights: str | None = None
    """File of its ImageNet weights, as torchvision has them; left out, torch's cache or download."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; 0 leaves it out."""
    disc_start_step: int = 30001
    """First step with a discriminator; none of its work is done before."""
    disc_warmup_steps: int = 0
    """Steps from there on in which the discriminator learns alone; then the autoencoder minds it."""
    disc_ramp_steps: int = 0
    """Steps over which its weight then rises to what it is."""
    disc_loss: Literal["hinge", "non_saturating"] = "hinge"
    """Loss of discriminator and autoencoder against each other."""
    disc_weight: float = 1.0
    """Weight of the adversarial loss, times the adaptive one."""
    adaptive_weight: bool = True
    """Also weigh it so that its gradient at the last layer is as large as that of the reconstruction."""
    disc_weight_max: float = 1.0
    """Upper bound of the adaptive weight; of no effect without it."""
    lecam_weight: float = 0.0
    """Weight of LeCAM's regularization of the discriminator, for small data; 0: none."""
    disc_layers: int = 3
    """Strided layers of the PatchGAN discriminator."""
    ndf: int = 64
    """Channels of the discriminator's first layer."""
    disc_norm: Literal["group", "batch", "none"] = "group"
    """Norm of the discriminator; batch is the reference's, and depends on how a batch is split over processes."""
    disc_spectral_norm: bool = False
    """Divide the discriminator's weights by their largest singular value."""
    disc_blur: bool = False
    """Blur before each of its strides, so that they do not alias."""
    diff_aug: bool = False
    """DiffAugment (colour, translation) on what the discriminator sees; wanted for small data."""

    def __post_init__(self):
        weights = ("recon_weight", "perceptual_weight", "disc_weight", "disc_weight_max", "lecam_weight")
        for name in (*weights, "disc_start_step", "disc_warmup_steps", "disc_ramp_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted 0 or more: pass --{name} NUMBER")
        if self.perceptual_weights is not None and self.perceptual_net == "none":
            raise ValueError(f"got the weights {self.perceptual_weights} of no network: pass --perceptual_net as well")
        for name in ("ndf", "disc_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")

    def adversarial_share(self, step: int) -> float:
        """How much of the adversarial loss the autoencoder minds at a step, in [0, 1]."""
        since = step - self.disc_start_step - self.disc_warmup_steps
        if since < 0:
            return 0.0
        return min(1.0, (since + 1) / (self.disc_ramp_steps + 1))
