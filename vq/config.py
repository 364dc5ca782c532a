"""The settings of the first stage. Free of torch, so that `--help` answers at once."""

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
    """Resolutions with self-attention."""
    emb_dim: int = 256
    """Width of a code vector."""
    codebook_size: int = 1024
    """Number of codes."""
    quantizer: Literal["nearest"] = "nearest"
    """How encoder outputs become codes."""
    beta: float = 0.25
    """Commitment weight: pulls the encoder to its codes (the codebook's own weight is 1)."""

    def __post_init__(self):
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(
                f"got ch_mult {self.ch_mult}, wanted one positive multiplier per level, e.g. --ch_mult 1 1 2 2 4"
            )
        for name in ("nf", "res_blocks", "emb_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1: pass --{name} N")

    @property
    def factor(self) -> int:
        """Image pixels per code, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def grid(self, img_size: int) -> tuple[int, int]:
        """The grid of codes of a square image; ValueError where the size does not divide."""
        if img_size < self.factor or img_size % self.factor:
            raise ValueError(
                f"got img_size {img_size} for {len(self.ch_mult)} levels, wanted a multiple of {self.factor}: "
                "change --img_size, or the number of levels with --ch_mult"
            )
        return img_size // self.factor, img_size // self.factor


@dataclass(frozen=True, kw_only=True)
class VQGANLossConfig:
    """VQGAN losses: reconstruction, perceptual, adversarial."""

    perceptual_net: Literal["auto", "none", "vgg", "alex", "squeeze"] = "auto"
    """Network of the perceptual loss (LPIPS); auto: vgg where its weights can be had, else none, with a warning."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss; 0 leaves it out."""
    disc_start_step: int = 30001
    """First step with a discriminator; none of its work is done before."""
    disc_weight_max: float = 1.0
    """Upper bound of the adaptive adversarial weight."""
    disc_layers: int = 3
    """Strided layers of the PatchGAN discriminator."""
    ndf: int = 64
    """Channels of the discriminator's first layer."""
    disc_norm: Literal["group", "batch"] = "group"
    """Norm of the discriminator; batch is the reference's, and depends on how a batch is split over processes."""
    diff_aug: bool = False
    """DiffAugment (colour, translation) on what the discriminator sees; wanted for small data."""
