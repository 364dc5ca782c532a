"""What a UNet is like, checked at birth."""

from dataclasses import dataclass

from models.neighborhood import Backend


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """What a UNet is like. It has no size of its own: attention stands at downsample factors, not at resolutions.

    Left as it is, that of Nichol & Dhariwal 2021 for CIFAR-10, where factors 2 and 4 are the resolutions 16 and 8.
    """

    in_channels: int = 3  # of x
    out_channels: int = 3  # of the prediction: 6 for 3 channels and a learned variance
    channels: int = 128
    channel_mults: tuple[float, ...] = (1, 2, 2, 2)  # width of each level, times `channels`
    res_blocks: int = 3  # per level on the way down, one more on the way up
    attn_factors: tuple[int, ...] = (2, 4)  # levels with attention, by how many times smaller than x they are
    heads: int = 4
    head_width: int | None = None  # if given, there are width / head_width heads
    dropout: float = 0.0  # in ResBlocks
    resblock_updown: bool = False  # a ResBlock changes the size between levels, not a convolution
    scale_shift: bool = True  # what the embedding does in a ResBlock; False: it is added
    scale_skip: bool = False  # ResBlocks divide skip + h by sqrt(2)
    n_classes: int = 0
    time_scale: float = 1.0  # t is multiplied by it: 1 where t counts up to 1,000 steps, 1000 where it lies in [0, 1]
    res_block_type: str = "basic"  # or the dotted path of a subclass of EmbedBlock, built as ResBlock is here
    attn_block_type: str = "softmax"  # one of ATTENTION_BLOCKS, or the dotted path of a ConditionBlock or EmbedBlock
    middle_attn_block_type: str | None = None  # the one between down and up, if it is another
    kernel_sizes: tuple[int, ...] = (7,)  # of neighbourhood attention, one per group of heads, or one for all
    dilations: tuple[int, ...] = (1,)
    na_backend: Backend = "auto"
    transformer_attention: str = "softmax"  # self-attention in blocks of type "transformer"
    feed_forward: str = "geglu"  # in blocks of type "transformer"

    def __post_init__(self):
        for name in ("in_channels", "out_channels", "channels", "res_blocks", "heads", "head_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"got {name} {value}, wanted at least 1")
        if self.channels % 2:
            raise ValueError(f"got channels {self.channels}, wanted an even number, for cosines and sines of the time")
        if not self.channel_mults or min(self.widths) < 1:
            raise ValueError(f"got channel_mults {self.channel_mults}, wanted a positive number per level")
        if not set(self.attn_factors) <= set(self.factors):
            known = ", ".join(map(str, self.factors))
            raise ValueError(f"got attn_factors {self.attn_factors}, the factors of the levels are {known}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"got dropout {self.dropout}, wanted a share in [0, 1)")
        if self.n_classes < 0:
            raise ValueError(f"got n_classes {self.n_classes}, wanted 0 (no classes) or more")
        if self.time_scale <= 0:
            raise ValueError(f"got time_scale {self.time_scale}, wanted a positive number")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernel_sizes) or min(self.dilations, default=0) < 1:
            sizes = f"kernel_sizes {self.kernel_sizes}, dilations {self.dilations}"
            raise ValueError(f"got {sizes}: wanted odd kernels, and dilations of at least 1")
        for factor, width in zip(self.factors, self.widths, strict=True):
            if factor in (*self.attn_factors, self.factors[-1]):
                self.heads_of(width)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.channels) for mult in self.channel_mults]

    @property
    def factors(self) -> list[int]:
        """How many times smaller than x each level is."""
        return [2**level for level in range(len(self.channel_mults))]

    @property
    def emb_dim(self) -> int:
        """E, the width of the embedding of time and condition."""
        return 4 * self.channels

    def heads_of(self, width: int) -> int:
        """Attention heads at a level of that width; ValueError where it does not split."""
        heads = self.heads if self.head_width is None else width // self.head_width
        if heads < 1 or width % heads or (self.head_width is not None and width != heads * self.head_width):
            got = f"{self.heads} heads" if self.head_width is None else f"heads of width {self.head_width}"
            raise ValueError(f"a level of {width} channels does not split over {got}: choose a divisor of {width}")
        return heads
