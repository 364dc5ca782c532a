"""The UNet of Gaussian diffusion (Ho et al. 2020; Dhariwal & Nichol 2021)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import (
    SPADE,
    ConditionBlock,
    Downsample,
    EmbedBlock,
    Resample,
    ResBlock,
    Upsample,
    group_norm,
    zero_module,
)
from models.conditioning import Condition, ConditionEncoder, Conditioner
from models.embeddings import TimeEmbedding
from models.neighborhood import Backend
from models.ranges import POSITIVE, SIZE, check_ranges
from models.region_attention import OVERLAPS, REGION_ATTENTION
from models.registry import resolve_class
from models.streams import DecoderMap
from models.unet_attention import ATTENTION_BLOCKS, EPS, AttentionOptions, GatedBlock, RegionBlock

RES_BLOCKS = {"basic": ResBlock}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Architecture of a UNet, for any image size: attention is placed by downsampling factor, not by resolution.

    The defaults are the UNet of Nichol & Dhariwal 2021 for CIFAR-10, where factors 2 and 4 are resolutions 16 and 8.
    """

    in_channels: int = 3  # of x
    out_channels: int = 3  # of the prediction: 6 for 3 channels with a learned variance
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)  # width of each level, times `channels`
    res_blocks: int = 3  # per level going down; one more going up
    attn_factors: tuple[int, ...] = (2, 4)  # levels with attention, by downsampling factor
    heads: int = 4
    head_width: int | None = None  # overrides heads: a level has width / head_width heads
    dropout: float = 0.0  # in ResBlocks
    resblock_updown: bool = False  # resample between levels by ResBlocks instead of convolutions
    scale_shift: bool = True  # the embedding scales and shifts in ResBlocks; False: it is added
    scale_skip: bool = False  # ResBlocks divide skip + h by sqrt(2)
    time_scale: float = 1.0  # multiplies t: 1 for t in steps (of about 1,000), 1000 for t in [0, 1]
    res_block_type: str = "basic"  # or the dotted path of an EmbedBlock with the arguments of ResBlock
    attn_block_type: str = "softmax"  # one of ATTENTION_BLOCKS, or the dotted path of a ConditionBlock or EmbedBlock
    middle_attn_block_type: str | None = None  # of the middle, if it differs
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention: one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    transformer_attention: str = "softmax"  # self-attention in blocks of type "transformer"
    feed_forward: str = "geglu"  # in blocks of type "transformer"
    qkv_bias: bool = True  # in blocks of type "transformer": queries, keys and values have a bias
    transformer_eps: float = EPS  # in blocks of type "transformer": of the norm at their entry
    attn_places: bool = False  # blocks of type "transformer" know where in the image a cell lies
    region_attention: str = "none"  # or one of REGION_ATTENTION: a block after each attention block but the middle one
    overlap: str = "mean"  # region attention: one of OVERLAPS
    region_places: bool = True  # region attention: prompts know where in the box a pixel lies

    RANGES = {
        **{"in_channels": SIZE, "out_channels": SIZE, "channels": SIZE, "channel_mults": "(0, 1000]"},
        **{"res_blocks": "[1, 1000]", "attn_factors": SIZE, "heads": SIZE, "head_width": SIZE, "dropout": "[0, 1)"},
        **{"time_scale": POSITIVE, "kernel_sizes": SIZE, "dilations": SIZE, "transformer_eps": POSITIVE},
    }

    def __post_init__(self):
        check_ranges(self)
        if self.channels % 2:
            raise ValueError(
                f"got channels {self.channels}, wanted an even number: half are cosines of the time, half sines"
            )
        if not self.channel_mults or min(self.widths) < 1:
            raise ValueError(f"got channel_mults {self.channel_mults}, wanted a positive number per level")
        if not set(self.attn_factors) <= set(self.factors):
            factors = ", ".join(map(str, self.factors))
            raise ValueError(f"got attn_factors {self.attn_factors}, the factors of the levels are {factors}")
        if any(kernel % 2 == 0 for kernel in self.kernel_sizes) or not self.dilations:
            sizes = f"kernel_sizes {self.kernel_sizes}, dilations {self.dilations}"
            raise ValueError(f"got {sizes}: wanted odd kernels, and at least one dilation")
        if self.region_attention not in ("none", *REGION_ATTENTION) or self.overlap not in OVERLAPS:
            wanted = f"none, {', '.join(REGION_ATTENTION)}; {', '.join(OVERLAPS)}"
            got = f"region_attention {self.region_attention!r}, overlap {self.overlap!r}"
            raise ValueError(f"got {got}, wanted {wanted}")
        for factor, width in zip(self.factors, self.widths, strict=True):
            if factor in (*self.attn_factors, self.factors[-1]):
                self.num_heads(width)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.channels) for mult in self.channel_mults]

    @property
    def factors(self) -> list[int]:
        """Downsampling factor of each level."""
        return [2**level for level in range(len(self.channel_mults))]

    @property
    def skip_widths(self) -> list[int]:
        """Channels of each skip: the first convolution's and those of each step going down."""
        last = len(self.widths) - 1
        steps = [[width] * (self.res_blocks + (level < last)) for level, width in enumerate(self.widths)]
        return [self.widths[0], *(width for level in steps for width in level)]

    @property
    def emb_dim(self) -> int:
        """E, the width of the embedding of time and condition."""
        return 4 * self.channels

    def num_heads(self, width: int) -> int:
        """Returns the number of attention heads at a level of `width` channels; ValueError if they do not divide."""
        heads = self.heads if self.head_width is None else width // self.head_width
        if heads < 1 or width % heads or (self.head_width is not None and width != heads * self.head_width):
            got = f"{self.heads} heads" if self.head_width is None else f"heads of width {self.head_width}"
            raise ValueError(f"a level of {width} channels does not split over {got}: choose a divisor of {width}")
        return heads


class BlockFactory:
    """Builds the blocks of a UNet and counts its attention blocks: differential attention depends on the depth."""

    def __init__(self, config: UNetConfig, encoders: Conditioner):
        self.config, self.encoders, self.depth = config, encoders, 0
        self.attended: dict[nn.Module, int] = {}  # the channels of each attention block
        self.res_blocks: dict[nn.Module, int] = {}  # those out of each residual block
        self.res_block = resolve_class(config.res_block_type, RES_BLOCKS, (EmbedBlock,), "res_block_type")

    def res(self, in_channels: int, out_channels: int, resample: Resample | None = None) -> nn.Module:
        """Builds a residual block."""
        block = self.res_block(
            in_channels,
            out_channels,
            emb_dim=self.config.emb_dim,
            dropout=self.config.dropout,
            zero_init=True,
            scale_shift=self.config.scale_shift,
            resample=resample,
            scale_skip=self.config.scale_skip,
            eps=EPS,
        )
        self.res_blocks[block] = out_channels
        return block

    def attention(self, channels: int, kind: str | None = None) -> nn.Module:
        """Builds an attention block of `kind` (default: the config's attn_block_type)."""
        config, bases = self.config, (ConditionBlock, EmbedBlock)
        block = resolve_class(kind or config.attn_block_type, ATTENTION_BLOCKS, bases, "attn_block_type")
        block = block(channels, self.options(channels))
        self.attended[block] = channels
        self.depth += 1
        return block

    def options(self, channels: int) -> AttentionOptions:
        """Returns the options of an attention block."""
        config = self.config
        return AttentionOptions(
            heads=config.num_heads(channels),
            emb_dim=config.emb_dim,
            depth=self.depth,
            context_width=self.encoders.token_width,
            gated_width=self.encoders.gated_width,
            prompt_width=self.encoders.prompt_width,
            kernel_sizes=config.kernel_sizes,
            dilations=config.dilations,
            na_backend=config.na_backend,
            transformer_attention=config.transformer_attention,
            feed_forward=config.feed_forward,
            qkv_bias=config.qkv_bias,
            transformer_eps=config.transformer_eps,
            places=config.attn_places,
            region_attention=config.region_attention,
            overlap=config.overlap,
            region_places=config.region_places,
        )

    def at_attention(self, steps: Sequence[nn.ModuleList], kind: type[ConditionBlock]) -> nn.ModuleDict:
        """Builds a block for each step with attention, by the index of the step."""
        blocks = nn.ModuleDict()
        for index, step in enumerate(steps):
            for channels in (self.attended[block] for block in step if block in self.attended):
                blocks[str(index)] = kind(channels, self.options(channels))
        return blocks

    def spade(self, steps: Sequence[nn.ModuleList]) -> nn.ModuleDict:
        """Builds a SPADE for each residual block, by the indices of its step and of the block in it."""
        blocks = nn.ModuleDict()
        for index, step in enumerate(steps):
            for i, block in enumerate(step):
                if block in self.res_blocks:
                    if not isinstance(block, ResBlock):
                        kind = f"res_block_type {self.config.res_block_type}, which takes no map"
                        raise ValueError(f"got a condition into the decoder and {kind}: pass --res_block_type basic")
                    blocks[f"{index}_{i}"] = SPADE(self.res_blocks[block], self.encoders.decoder_channels)
        return blocks

    def step(self, in_channels: int, out_channels: int, level: int) -> nn.ModuleList:
        """Builds a residual block, followed by attention if the level has it."""
        blocks = [self.res(in_channels, out_channels)]
        if self.config.factors[level] in self.config.attn_factors:
            blocks.append(self.attention(out_channels))
        return nn.ModuleList(blocks)

    def downsample(self, channels: int) -> nn.Module:
        """Builds the layer that halves height and width."""
        return self.res(channels, channels, "down") if self.config.resblock_updown else Downsample(channels, True)

    def upsample(self, channels: int) -> nn.Module:
        """Builds the layer that doubles height and width."""
        return self.res(channels, channels, "up") if self.config.resblock_updown else Upsample(channels)


class UNetEncoder(nn.Module):
    """The way down and the middle of a UNet, which a control branch has too; subclasses build the parts."""

    config: UNetConfig
    encoders: Conditioner
    time: TimeEmbedding
    conv_in: nn.Conv2d
    down_blocks: nn.ModuleList
    middle_blocks: nn.ModuleList
    region_blocks: nn.ModuleDict  # by side ("down", "middle", "up") and step, as the next two
    gated_blocks: nn.ModuleDict
    spade_blocks: nn.ModuleDict

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | Mapping[str, Any] | None = None,
        drop: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Condition]:
        """Returns the embedding (B, E) and the condition for `down`, `middle` and `up`; arguments as in `forward`."""
        if t.shape != x.shape[:1]:
            raise ValueError(f"got t {tuple(t.shape)} for {len(x)} images, wanted ({len(x)},): t.expand(len(x))")
        condition = self.encoders.resolve(condition, x, drop)
        emb, vector = self.time(t), condition.vector()
        return emb if vector is None else emb + vector, condition

    def down(
        self, x: Tensor, emb: Tensor, condition: Condition, hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, H, W) -> h at the last level, and the skips: outputs of the first convolution and of each step.

        `hint` (B, C', H, W) is added to the output of the first convolution.
        """
        height, width, factor = *x.shape[2:], self.config.factors[-1]
        if height % factor or width % factor:
            raise ValueError(
                f"got {height} x {width} pixels for {len(self.config.factors)} levels, wanted multiples of {factor}: "
                f"resize or pad to {-height % factor + height} x {-width % factor + width}, or use fewer channel_mults"
            )
        maps = condition.map()
        h = self.conv_in(x if maps is None else torch.cat([x, maps], 1))
        skips = [h if hint is None else h + hint]
        for index, blocks in enumerate(self.down_blocks):
            skips.append(self.run_blocks(blocks, skips[-1], emb, condition, ("down", index)))
        return skips[-1], skips

    def middle(self, h: Tensor, emb: Tensor, condition: Condition) -> Tensor:
        """Applies the middle blocks: h (B, C, h, w) -> the same shape."""
        return self.run_blocks(self.middle_blocks, h, emb, condition, ("middle", 0))

    def run_blocks(
        self, blocks: nn.ModuleList, h: Tensor, emb: Tensor, condition: Condition, step: tuple[str, int]
    ) -> Tensor:
        """Applies the blocks of a step ("up", 3) to h (B, C, h, w), each with the arguments of its base classes.

        Beside attention, the second block, is gated attention of the same input; after both is region attention.
        """
        side, index = step
        region, gated = (find_block(each, side, str(index)) for each in (self.region_blocks, self.gated_blocks))
        for i, block in enumerate(blocks):
            inputs = [emb] * isinstance(block, EmbedBlock) + [condition] * isinstance(block, ConditionBlock)
            spade = find_block(self.spade_blocks, side, f"{index}_{i}")
            if spade is not None:
                inputs.append(partial(spade, layout=condition.map(DecoderMap)))
            branch = None if i != 1 or gated is None else gated(h, condition)
            h = block(h, *inputs)
            h = h if branch is None else h + branch
            if i == 1 and region is not None:
                h = region(h, condition)
        return h


class UNet(UNetEncoder):
    """Maps x_t, t and a condition to a prediction: (B, C, H, W), (B,) -> (B, C', H, W). Its output starts at zero.

    `encoders` encode raw fields, by name, as the streams of a `Condition` (see models/conditions); vectors have width
    `config.emb_dim`. An EmbedBlock is called with the embedding, a ConditionBlock with the condition, a block that is
    both with the embedding and the condition. Height and width are multiples of the last factor.

    Gated tokens are read beside each attention block, and decoder maps modulate each ResBlock going up; both change
    nothing at first.
    """

    takes_time = True

    def __init__(self, config: UNetConfig, encoders: Mapping[str, ConditionEncoder] | None = None):
        super().__init__()
        self.config = config
        self.encoders = Conditioner(encoders)
        self.time = TimeEmbedding(config.channels, config.emb_dim, config.time_scale)
        factory, widths = BlockFactory(config, self.encoders), config.widths
        self.conv_in = build_input(config.in_channels, self.encoders, widths[0])
        self.down_blocks, skips = build_down(factory)
        self.middle_blocks = nn.ModuleList(
            [
                factory.res(widths[-1], widths[-1]),
                factory.attention(widths[-1], config.middle_attn_block_type),
                factory.res(widths[-1], widths[-1]),
            ]
        )
        self.up_blocks = build_up(factory, skips)
        self.norm = group_norm(widths[0], eps=EPS)
        self.conv_out = zero_module(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))
        # The last: all other weights start as without
        self.region_blocks, self.gated_blocks, self.spade_blocks = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        sides = {"down": self.down_blocks, "middle": [self.middle_blocks], "up": self.up_blocks}
        if config.region_attention != "none":
            self.region_blocks.update({side: factory.at_attention(sides[side], RegionBlock) for side in ("down", "up")})
        if self.encoders.gated_width:
            self.gated_blocks.update({side: factory.at_attention(steps, GatedBlock) for side, steps in sides.items()})
        if self.encoders.decoder_channels:
            self.spade_blocks["up"] = factory.spade(self.up_blocks)
        self.control = nn.ModuleDict()  # control branches, by the names of their hints: see `add_control`

    def encode(
        self, fields: Mapping[str, Any] | None, x: Tensor, drop: Mapping[str, Tensor] | None = None
    ) -> Condition:
        """Encodes raw fields, by name, for a batch x (B, C, H, W); see `Conditioner.forward`."""
        return self.encoders(fields, x, drop)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | Mapping[str, Any] | None = None,
        skip_residuals: Sequence[Tensor] | None = None,
        *,
        drop: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,) -> the prediction (B, C', H, W).

        `condition` comes from `encode`, or holds raw fields, which are encoded here with `drop`; None: all null.
        `skip_residuals` are added to the skips, in the order of `down`; an optional last one is added to the output of
        the middle. So are the residuals of the network's own control branches.
        """
        emb, condition = self.embed(x, t, condition, drop)
        h, skips = self.down(x, emb, condition)
        h = self.middle(h, emb, condition)
        if skip_residuals is not None:
            h, skips = add_residuals(h, skips, skip_residuals)
        for name, branch in self.control.items():
            h, skips = add_residuals(h, skips, branch(x, t, condition, *condition.streams[name]))
        return self.up(h, skips, emb, condition)

    def up(self, h: Tensor, skips: Sequence[Tensor], emb: Tensor, condition: Condition) -> Tensor:
        """h at the last level and the skips of `down` -> the prediction (B, C', H, W)."""
        for index, (blocks, skip) in enumerate(zip(self.up_blocks, reversed(skips), strict=True)):
            h = self.run_blocks(blocks, torch.cat([h, skip], 1), emb, condition, ("up", index))
        return self.conv_out(F.silu(self.norm(h)))


def find_block(blocks: nn.ModuleDict, side: str, key: str) -> nn.Module | None:
    """Returns the block of a side and step, None where there is none."""
    return blocks[side][key] if side in blocks and key in blocks[side] else None


def build_input(in_channels: int, encoders: Conditioner, width: int) -> nn.Conv2d:
    """Builds the first convolution, of x and the maps of the encoders.

    Weights of maps of regions start at zero, and all others as without them: they change nothing at first.
    """
    parts = [(in_channels, False)]
    parts += [(encoder.map_channels, name in encoders.region_encoders) for name, encoder in encoders.items()]
    conv = nn.Conv2d(sum(channels for channels, zero in parts if not zero), width, 3, padding=1)
    columns, start = [], 0
    for channels, zero in parts:
        columns.append(conv.weight.new_zeros(width, channels, 3, 3) if zero else conv.weight[:, start:][:, :channels])
        start += 0 if zero else channels
    conv.weight, conv.in_channels = nn.Parameter(torch.cat(columns, 1).detach()), in_channels + encoders.map_channels
    return conv


def build_down(factory: BlockFactory) -> tuple[nn.ModuleList, list[int]]:
    """Builds the steps going down; returns them and the channels of each skip."""
    widths = factory.config.widths
    steps, skips = [], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(factory.config.res_blocks):
            steps.append(factory.step(skips[-1], width, level))
            skips.append(width)
        if level < len(widths) - 1:
            steps.append(nn.ModuleList([factory.downsample(width)]))
            skips.append(width)
    return nn.ModuleList(steps), skips


def build_up(factory: BlockFactory, skips: list[int]) -> nn.ModuleList:
    """Builds the steps going up; each takes one skip, and the last of a level doubles height and width."""
    steps, channels, skips = [], skips[-1], list(skips)
    for level, width in reversed(list(enumerate(factory.config.widths))):
        for i in range(factory.config.res_blocks + 1):
            blocks = factory.step(channels + skips.pop(), width, level)
            if level > 0 and i == factory.config.res_blocks:
                blocks.append(factory.upsample(width))
            steps.append(blocks)
            channels = width
    return nn.ModuleList(steps)


def add_residuals(h: Tensor, skips: list[Tensor], residuals: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Adds residuals (B, C, H, W) to the skips, and an optional last one to h; ValueError for any other number."""
    if len(residuals) not in (len(skips), len(skips) + 1):
        raise ValueError(f"got {len(residuals)} skip_residuals, wanted {len(skips)}, or one more for the middle")
    h = h + residuals[-1] if len(residuals) > len(skips) else h
    return h, [skip + residual for skip, residual in zip(skips, residuals[: len(skips)], strict=True)]
