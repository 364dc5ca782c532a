"""Control branches beside a UNet, which an image, the hint, guides through them (Zhang et al. 2023, ControlNet)."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import zero_module
from models.conditioning import Condition, Conditioner
from models.ranges import SIZE, check_ranges
from models.unet import UNet, UNetEncoder


@dataclass(frozen=True, kw_only=True)
class HintConfig:
    """Architecture of the encoder of a hint. The defaults are those for Stable Diffusion."""

    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    hint_factor: int = 8  # height of the hint over that of x: 8 for latents of images, 1 for pixels

    RANGES = {"hint_channels": SIZE, "hint_widths": SIZE, "hint_factor": SIZE}

    def __post_init__(self):
        check_ranges(self)
        if not self.hint_widths:
            raise ValueError("got no hint_widths, wanted one at least")
        if self.hint_factor & (self.hint_factor - 1) or self.halvings >= len(self.hint_widths):
            got = f"got hint_factor {self.hint_factor} with hint_widths {self.hint_widths}"
            raise ValueError(f"{got}, wanted a power of 2, and one more width than it halves: add widths")

    @property
    def halvings(self) -> int:
        """How often height and width are halved."""
        return self.hint_factor.bit_length() - 1


class HintEncoder(nn.Module):
    """Encodes a hint by convolutions with SiLU between them: (B, C, f H, f W) -> (B, C', H, W), which is 0 at first."""

    def __init__(self, config: HintConfig, channels: int):
        super().__init__()
        convs = [nn.Conv2d(config.hint_channels, config.hint_widths[0], 3, padding=1)]
        for index, (width, wider) in enumerate(pairwise(config.hint_widths)):
            stride = 2 if index < config.halvings else 1
            convs.append(nn.Conv2d(width, width, 3, padding=1))
            convs.append(nn.Conv2d(width, wider, 3, padding=1, stride=stride))
        convs.append(zero_module(nn.Conv2d(config.hint_widths[-1], channels, 3, padding=1)))
        self.convs = nn.ModuleList(convs)

    def forward(self, hint: Tensor) -> Tensor:
        h = self.convs[0](hint)
        for conv in self.convs[1:]:
            h = conv(F.silu(h))
        return h


class ControlBranch(UNetEncoder):
    """A trainable copy of a UNet's way down and middle, whose outputs become `skip_residuals` of the UNet: 0 at first.

    The UNet is not a part of the branch, and encodes the condition of both.
    """

    takes_time = True

    def __init__(self, unet: UNet, hint: HintConfig | None = None):
        super().__init__()
        self.config, self.hint_config = unet.config, hint or HintConfig()
        self.encoders, self.stream_names = Conditioner(), tuple(unet.encoders.stream_names)
        self.time, self.conv_in = deepcopy(unet.time), deepcopy(unet.conv_in)
        self.down_blocks, self.middle_blocks = deepcopy(unet.down_blocks), deepcopy(unet.middle_blocks)
        self.region_blocks, self.gated_blocks = copy_sides(unet.region_blocks), copy_sides(unet.gated_blocks)
        self.spade_blocks = nn.ModuleDict()  # the way down has none
        widths = unet.config.skip_widths
        self.hint = HintEncoder(self.hint_config, widths[0])
        self.zero_convs = nn.ModuleList([zero_module(nn.Conv2d(width, width, 1)) for width in widths])
        self.middle_zero_conv = zero_module(nn.Conv2d(widths[-1], widths[-1], 1))
        self.requires_grad_(True)  # all of it, whatever of the UNet is frozen
        self.train(unet.training)

    @property
    def outputs(self) -> int:
        """The number of residuals: one per skip, and the middle's."""
        return len(self.zero_convs) + 1

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None,
        hint: Tensor,
        strengths: float | Sequence[float] = 1.0,
    ) -> list[Tensor]:
        """Returns the residuals for `UNet.forward`: those of the skips, (B, C, h, w) each, then that of the middle.

        x (B, C, H, W), t (B,) and `condition`, encoded by the UNet, are the UNet's inputs; `hint` is (B, C', f H, f W),
        for Stable Diffusion RGB in [0, 1]. `strengths` multiply the residuals: one number, or `outputs` numbers
        (see `guess_strengths`). The residuals of several branches are added up. ValueError for a condition without a
        stream of the UNet, another size of the hint, or another number of strengths.
        """
        self.check_inputs(x, condition, hint)
        strengths = [strengths] * self.outputs if isinstance(strengths, int | float) else list(strengths)
        if len(strengths) != self.outputs:
            raise ValueError(f"got {len(strengths)} strengths, wanted one, or {self.outputs}: skips, then the middle")
        emb, condition = self.embed(x, t, condition)
        h, skips = self.down(x, emb, condition, self.hint(hint))
        residuals = [conv(skip) for conv, skip in zip(self.zero_convs, skips, strict=True)]
        residuals.append(self.middle_zero_conv(self.middle(h, emb, condition)))
        return [strength * residual for strength, residual in zip(strengths, residuals, strict=True)]

    def check_inputs(self, x: Tensor, condition: Condition | None, hint: Tensor) -> None:
        """Raises ValueError for a condition or a hint that do not fit."""
        streams = {} if condition is None else condition.streams
        missing = [name for name in self.stream_names if name not in streams]
        if missing:
            raise ValueError(f"got a condition without {', '.join(missing)}: create it with encode of the UNet")
        factor = self.hint_config.hint_factor
        wanted = (len(x), self.hint_config.hint_channels, *(factor * size for size in x.shape[2:]))
        if hint.shape != wanted:
            raise ValueError(f"got a hint {tuple(hint.shape)} for x {tuple(x.shape)}, wanted {wanted}: resize it")


def guess_strengths(outputs: int) -> list[float]:
    """Returns the strengths of guess mode, for hints without a prompt: from 0.1 of the first skip to 1 of the middle.

    They rise geometrically: 10^(i / (n - 1) - 1). For 13 outputs this is Zhang et al.'s 0.825^(12 - i), to 1 %.
    """
    return [10 ** (index / (outputs - 1) - 1) for index in range(outputs)]


def copy_sides(blocks: nn.ModuleDict) -> nn.ModuleDict:
    """Returns copies of the blocks of a UNet going down and in the middle, by side."""
    return nn.ModuleDict({side: deepcopy(steps) for side, steps in blocks.items() if side != "up"})
