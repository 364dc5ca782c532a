"""Configuration of the first stage."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from models.ranges import COUNT, NOT_NEGATIVE, SIZE, check_ranges
from models.registry import load_plugin
from vq.quantizers import QuantizerConfig


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """VQGAN: encoder, codebook, decoder."""

    nf: int = 128
    """Channels of the first level (full resolution)."""
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each level; every level but the last halves the resolution."""
    res_blocks: int = 2
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions with self-attention (heights, if images are not square)."""
    quantizer: str = "nearest"
    """Quantizer of the encoder outputs: a file of vq/quantizers."""
    codebook_size: int = 1024
    """Number of codes."""
    emb_dim: int | None = None
    """Width of a code vector; default: half the channels of the last level, l2 and gumbel 4; fsq and lfq derive it from
    codebook_size."""
    quantizer_config: QuantizerConfig = QuantizerConfig()
    unit_range: bool = False
    """Feed the encoder images in [0, 1], as in Unleashing Transformers, instead of [-1, 1]."""

    EVERYDAY = ("quantizer", "codebook_size")
    RANGES = {
        "nf": SIZE, "ch_mult": "[1, 1024]", "res_blocks": "[1, 1000]", "attn_resolutions": SIZE,
        "codebook_size": COUNT, "emb_dim": SIZE,
    }  # fmt: skip

    def __post_init__(self):
        check_ranges(self)
        if not self.ch_mult:
            raise ValueError(f"got ch_mult {self.ch_mult}, wanted a multiplier per level: pass --ch_mult 1 1 2 2 4")
        kind = load_plugin("vq.quantizers", self.quantizer, "quantizer").Config
        if type(self.quantizer_config) is QuantizerConfig:  # default: the defaults of the selected quantizer
            object.__setattr__(self, "quantizer_config", kind())
        if not isinstance(self.quantizer_config, kind):
            got = type(self.quantizer_config).__module__
            raise ValueError(f"got options of {got} for quantizer {self.quantizer}: pass {kind.__module__}.Config")
        self.code_dim  # noqa: B018 (validates codebook_size)

    @property
    def code_dim(self) -> int:
        """Width D of the code vectors and of the encoder output."""
        emb_dim = self.emb_dim or self.quantizer_config.default_emb_dim(self.nf * self.ch_mult[-1])
        return self.quantizer_config.code_dim(self.codebook_size, emb_dim)

    def for_run(self, train_steps: int, stored: Mapping[str, Any] = MappingProxyType({})) -> "VQGANConfig":
        """Returns the config with a value for every setting that was not given.

        It is that of the run that is continued, by its `stored` settings, or else follows from the quantizer and the
        number of training steps.
        """
        default = self.quantizer_config.default_emb_dim(self.nf * self.ch_mult[-1])
        emb_dim = self.emb_dim or stored.get("emb_dim") or default
        return replace(self, emb_dim=emb_dim, quantizer_config=self.quantizer_config.for_run(train_steps, stored))

    @property
    def factor(self) -> int:
        """Downsampling factor: image pixels per code along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def grid(self, height: int, width: int | None = None) -> tuple[int, int]:
        """Returns the code grid (h, w) of an image, square without `width`.

        ValueError if a side is not a multiple of the factor.
        """
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
    """Pixel loss: mean absolute (l1) or mean squared (l2) error."""
    recon_weight: float = 1.0
    """Weight of the pixel loss."""
    perceptual_net: Literal["auto", "none", "vgg", "alex", "squeeze", "resnet50"] = "auto"
    """Network of the perceptual loss: LPIPS on vgg, alex or squeeze, or the logits of resnet50; auto: vgg if its
    weights are available, else none, with a warning."""
    perceptual_weights: str | None = None
    """File with torchvision's ImageNet weights of that network; default: torch's cache, or a download."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; 0 disables it."""
    disc_start_step: int = 30001
    """First step with a discriminator, which costs nothing before."""
    disc_warmup_steps: int = 0
    """Steps after disc_start_step in which only the discriminator learns; the adversarial loss starts after them."""
    disc_ramp_steps: int = 0
    """Steps over which the adversarial weight then rises linearly from 0."""
    disc_loss: Literal["hinge", "non_saturating"] = "hinge"
    """Adversarial loss of discriminator and autoencoder."""
    disc_weight: float = 1.0
    """Weight of the adversarial loss, multiplied by the adaptive weight."""
    adaptive_weight: bool = True
    """Scale the adversarial loss so that its gradient at the last layer matches that of the reconstruction loss."""
    disc_weight_max: float = 1.0
    """Upper bound of the adaptive weight; unused without it."""
    lecam_weight: float = 0.0
    """Weight of LeCAM regularisation of the discriminator, for small data sets; 0 disables it."""
    disc_layers: int = 3
    """Strided convolutions of the PatchGAN discriminator."""
    ndf: int = 64
    """Channels of the discriminator's first layer."""
    disc_norm: Literal["group", "batch", "none"] = "group"
    """Norm of the discriminator; batch is the original, but depends on how a batch is split over processes."""
    disc_spectral_norm: bool = False
    """Spectral normalisation of the discriminator's convolutions."""
    disc_blur: bool = False
    """Blur before each stride of the discriminator, to avoid aliasing (BlurPool)."""
    diff_aug: bool = False
    """DiffAugment (colour, translation) on the discriminator's inputs; recommended for small data sets."""

    EVERYDAY = ("perceptual_net", "disc_start_step")
    RANGES = {
        "recon_weight": NOT_NEGATIVE, "perceptual_weight": NOT_NEGATIVE, "disc_weight": NOT_NEGATIVE,
        "disc_weight_max": NOT_NEGATIVE, "lecam_weight": NOT_NEGATIVE, "disc_start_step": NOT_NEGATIVE,
        "disc_warmup_steps": NOT_NEGATIVE, "disc_ramp_steps": NOT_NEGATIVE, "ndf": SIZE, "disc_layers": "[1, 100]",
    }  # fmt: skip

    def __post_init__(self):
        check_ranges(self)
        if self.perceptual_weights is not None and self.perceptual_net == "none":
            raise ValueError(
                f"got perceptual_weights {self.perceptual_weights} and no network: pass --perceptual_net as well"
            )

    def adversarial_ramp(self, step: int) -> float:
        """Returns the factor of the adversarial loss at a step, in [0, 1], from warm-up and ramp."""
        ramp_step = step - self.disc_start_step - self.disc_warmup_steps
        if ramp_step < 0:
            return 0.0
        return min(1.0, (ramp_step + 1) / (self.disc_ramp_steps + 1))
