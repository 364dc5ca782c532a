"""The transformer of samplers of codes: its config and its builder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from models.conditioning import ConditionEncoder
from models.ranges import SIZE
from models.transformer import CausalTransformer, Transformer
from models.transformer_block import AttentionConfig
from train.samplers._conditions import ConditionsConfig


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ConditionsConfig):
    """A transformer over a grid of codes."""

    bert_n_emb: int = 512
    """Width of the transformer."""
    bert_n_head: int = 8
    """Attention heads."""
    bert_n_layers: int = 24
    """Number of blocks."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layers, as a multiple of the transformer's."""
    attention: Literal["full", "neighborhood"] = "full"
    """Whether a code attends to all codes or to a neighbourhood."""
    kernel_sizes: tuple[int, ...] = (7,)
    """Neighbourhood attention: window size in codes per side (odd), one number per group of heads or one for all."""
    dilations: tuple[int, ...] = (1,)
    """Neighbourhood attention: spacing of the codes in a window, one number per group of heads or one for all."""
    na_backend: Literal["auto", "dense", "tiled", "natten", "flex"] = "auto"
    """Neighbourhood attention: implementation; all are equivalent."""
    attention_type: Literal["softmax", "diff_v1", "diff_v2"] = "softmax"
    """Softmax or differential attention; diff_v1 pairs the heads, diff_v2 gives each a second query."""
    position: Literal["learned", "rope", "bias", "none"] = "learned"
    """Position encoding; all but learned also work on canvases larger than the grid."""
    qk_norm: bool = False
    """Normalize queries and keys, so that attention logits stay bounded."""
    zero_init: bool = False
    """Initialize the last layers of attention and feed-forward to zero, so that each block starts as the identity."""
    tied_head: bool = False
    """Tie the output layer to the code embeddings."""
    vectors_into: Literal["norms", "embeddings"] = "norms"
    """Class, numbers, metadata and pooled captions go to adaptive norms, or are added to the embeddings of the codes: a
    network trained without them, loaded by --load_partial, then starts unchanged."""
    attn_pdrop: float = 0.0
    """Dropout on attention weights."""
    embd_pdrop: float = 0.0
    """Dropout on embeddings."""
    resid_pdrop: float = 0.0
    """Dropout on the outputs of each block."""

    EVERYDAY = ("bert_n_emb", "bert_n_layers")
    RANGES = {
        "bert_n_emb": SIZE, "bert_n_head": SIZE, "bert_n_layers": "[1, 10000]", "mlp_ratio": "(0, 1000]",
        "kernel_sizes": SIZE, "dilations": SIZE, "attn_pdrop": "[0, 1)", "embd_pdrop": "[0, 1)",
        "resid_pdrop": "[0, 1)",
    }  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if not (self.kernel_sizes and self.dilations):
            raise ValueError(f"got {self.kernel_sizes=}, {self.dilations=}: wanted at least 1 of each")
        if self.bert_n_emb % self.bert_n_head:
            raise ValueError(
                f"got bert_n_emb {self.bert_n_emb} and bert_n_head {self.bert_n_head}: the heads must divide it"
            )
        if int(self.mlp_ratio * self.bert_n_emb) < 1:
            raise ValueError(f"got mlp_ratio {self.mlp_ratio}, which leaves no width: pass --mlp_ratio 4")
        if any(kernel % 2 == 0 for kernel in self.kernel_sizes):
            raise ValueError(f"got kernel_sizes {self.kernel_sizes}: wanted odd kernels")
        groups = max(len(self.kernel_sizes), len(self.dilations))
        if {len(self.kernel_sizes), len(self.dilations)} - {1, groups} or groups > self.bert_n_head:
            sizes = f"{len(self.kernel_sizes)} kernel_sizes, {len(self.dilations)} dilations, {self.bert_n_head} heads"
            raise ValueError(f"got {sizes}: wanted equally many of both, or one for all, and at least one head each")


def make_network(
    config: TransformerConfig,
    *,
    codes: int,
    grid: tuple[int, int],
    encoders: Mapping[str, ConditionEncoder],
    causal: bool = False,
    time_scale: float | None = None,
) -> Transformer:
    """Builds the transformer of a config; if `causal`, each code is predicted from those before it.

    With `time_scale`, the network has an embedding of the time multiplied by it.
    """
    network = (CausalTransformer if causal else Transformer)(
        codes=codes,
        grid=grid,
        width=config.bert_n_emb,
        heads=config.bert_n_head,
        layers=config.bert_n_layers,
        encoders=encoders,
        vectors_into=config.vectors_into,
        time_scale=time_scale,
        mlp_ratio=config.mlp_ratio,
        attention=AttentionConfig(
            attention=config.attention,
            attention_type=config.attention_type,
            position=config.position,
            kernel_sizes=config.kernel_sizes,
            dilations=config.dilations,
            na_backend=config.na_backend,
            dropout=config.attn_pdrop,
            qk_norm=config.qk_norm,
        ),
        embd_dropout=config.embd_pdrop,
        resid_dropout=config.resid_pdrop,
        zero_init=config.zero_init,
        tied_head=config.tied_head,
    )
    config.add_experts(network)
    return network
