"""Control branches of a network, which an image, the hint, guides through them (Zhang et al. 2023, ControlNet).

A branch is a part of its network, `network.control`, beside an encoder that passes its hint on as a stream of the
condition. Of a transformer over codes it is an encoder of the hint, whose output is added to the embeddings.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import zero_module
from models.conditioning import Condition, ConditionEncoder, Conditioner
from models.ranges import SIZE, check_ranges
from models.streams import Hint
from models.transformer import Transformer
from models.unet import UNet, UNetEncoder

HINT = "hint"  # the name of the first hint of a network; that of the second is hint_2


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


class HintReader(ConditionEncoder):
    """Passes an image in [-1, 1] on as a Hint in [0, 1], with the channels of the branch; its null has strength 0.

    With `factor`, it is resized to that many times the size of x. A hint is never dropped: without it, the network is
    its base, which needs no training.
    """

    def __init__(self, name: str, channels: int, factor: int | None = None, strength: float = 1.0):
        super().__init__()
        self.fields, self.hint_channels = (hint_field(name),), channels
        self.factor, self.strength = factor, strength

    def forward(self, raw: Tensor | None, x: Tensor, drop: Tensor | None = None) -> Hint:
        factor = self.factor or 1
        size = factor * x.shape[2], factor * x.shape[3]
        if raw is None:
            x = x if x.is_floating_point() else x.float()
            return Hint(x.new_zeros(len(x), self.hint_channels, *size), x.new_zeros(len(x), 1))
        if raw.ndim != 4 or len(raw) != len(x) or raw.shape[1] not in (1, self.hint_channels):
            wanted = f"({len(x)}, {self.hint_channels}, h, w)"
            raise ValueError(f"got {self.fields[0]} {tuple(raw.shape)}, wanted {wanted}, or one channel")
        if self.factor is not None and raw.shape[2:] != size:
            raw = F.interpolate(raw, size=size, mode="bilinear")
        values = (raw.expand(-1, self.hint_channels, -1, -1) + 1) / 2
        return Hint(values, raw.new_full((len(x), 1), self.strength))


class HintEncoder(nn.Module):
    """Encodes a hint by convolutions with SiLU between them: (B, C, f H, f W) -> (B, C', H, W), which is 0 at first."""

    outputs = 1  # see ControlBranch

    def __init__(self, config: HintConfig, channels: int):
        super().__init__()
        self.config = config
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

    def encode(self, hint: Hint, grid: tuple[int, int]) -> Hint:
        """Returns a hint of any size with the encoded values (B, C', *grid)."""
        size = tuple(self.config.hint_factor * cells for cells in grid)
        values = hint.values.to(self.convs[0].weight.dtype)
        if values.shape[2:] != size:
            values = F.interpolate(values, size=size, mode="bilinear")
        return hint._replace(values=self(values))


class ControlBranch(UNetEncoder):
    """A trainable copy of a UNet's way down and middle, whose outputs become `skip_residuals` of the UNet: 0 at first.

    The UNet is not a part of the branch, and encodes the condition of both; hints of other branches are not read.
    """

    takes_time = True

    def __init__(self, unet: UNet, hint: HintConfig | None = None):
        super().__init__()
        self.config, self.hint_config = unet.config, hint or HintConfig()
        self.encoders, hints = Conditioner(), unet.encoders.hints
        self.stream_names = tuple(name for name in unet.encoders.stream_names if name not in hints)
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
        strengths: float | Sequence[float] | Tensor = 1.0,
    ) -> list[Tensor]:
        """Returns the residuals for `UNet.forward`: those of the skips, (B, C, h, w) each, then that of the middle.

        x (B, C, H, W), t (B,) and `condition`, encoded by the UNet, are the UNet's inputs; `hint` is (B, C', f H, f W),
        for Stable Diffusion RGB in [0, 1]. `strengths` multiply the residuals: one number, or `outputs` numbers
        (see `guess_strengths`), or a tensor (B, 1) or (B, outputs) of them. The residuals of several branches are added
        up. ValueError for a condition without a stream of the UNet, another size of the hint, or another number of
        strengths.
        """
        self.check_inputs(x, condition, hint)
        strengths = torch.as_tensor(strengths, dtype=torch.float32, device=x.device)
        count = strengths.shape[-1] if strengths.ndim else 1
        if count not in (1, self.outputs) or strengths.ndim == 1 and count != self.outputs:
            raise ValueError(f"got {count} strengths, wanted one, or {self.outputs}: skips, then the middle")
        strengths = strengths.expand(len(x), self.outputs).unbind(1)  # (B,) each
        emb, condition = self.embed(x, t, condition)
        h, skips = self.down(x, emb, condition, self.hint(hint))
        residuals = [conv(skip) for conv, skip in zip(self.zero_convs, skips, strict=True)]
        residuals.append(self.middle_zero_conv(self.middle(h, emb, condition)))
        return [
            strength.to(residual.dtype).view(-1, 1, 1, 1) * residual
            for strength, residual in zip(strengths, residuals, strict=True)
        ]

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
    return [10 ** (index / (outputs - 1) - 1) for index in range(outputs)] if outputs > 1 else [1.0]


def hint_name(number: int) -> str:
    """Returns the name of the hint of a network's branch with this number, from 1 on: hint, hint_2, hint_3."""
    return HINT if number == 1 else f"{HINT}_{number}"


def hint_field(name: str) -> str:
    """Returns the batch field of the hint of this name: hint_image, hint_2_image."""
    return f"{name}_image"


def is_hint_field(field: str) -> bool:
    """Returns whether a batch field is that of a hint."""
    return re.fullmatch(rf"{HINT}(_\d+)?_image", field) is not None


def build_branch(network: nn.Module, config: HintConfig) -> ControlBranch | HintEncoder:
    """Builds a branch for a network, which changes nothing at first; ValueError for networks of other kinds."""
    if isinstance(network, UNet):
        return ControlBranch(network, config)
    if isinstance(network, Transformer):
        return HintEncoder(config, network.code.weight.shape[1])
    raise ValueError(f"got a {type(network).__name__}, wanted a UNet or a transformer for a control branch")


def add_control(network: nn.Module, branch: ControlBranch | HintEncoder, strength: float = 1.0) -> str:
    """Makes a branch a part of a network, with an encoder that reads its hint; returns the name of the hint."""
    name = hint_name(len(network.control) + 1)
    of_unet = isinstance(branch, ControlBranch)
    config = branch.hint_config if of_unet else branch.config
    reader = HintReader(name, config.hint_channels, config.hint_factor if of_unet else None, strength)
    network.control[name], network.encoders[name] = branch, reader.train(network.training)
    return name


def scale_hints(condition: Condition, strengths: Mapping[str, Sequence[float]]) -> Condition:
    """Returns the condition with the strengths of hints multiplied by `strengths`, by name: one, or one per output."""
    streams = dict(condition.streams)
    for name, factors in strengths.items():
        factors = streams[name].strengths.new_tensor(factors)
        streams[name] = streams[name]._replace(strengths=streams[name].strengths * factors)
    return Condition(streams, condition.regions, condition.keys)


def copy_sides(blocks: nn.ModuleDict) -> nn.ModuleDict:
    """Returns copies of the blocks of a UNet going down and in the middle, by side."""
    return nn.ModuleDict({side: deepcopy(steps) for side, steps in blocks.items() if side != "up"})
