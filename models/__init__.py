"""Networks and layers: tensors in, tensors out."""

from models.attention import (
    Attention,
    CrossAttention,
    DiffAttentionV1,
    DiffAttentionV2,
    GatedCrossAttention,
    differential_from_softmax,
    record_maps,
)
from models.blocks import ConditionBlock, Downsample, EmbedBlock, ResBlock, Upsample, count_parameters
from models.conditioning import Condition, ConditionEncoder, Conditioner, Regions
from models.control import ControlBranch, HintConfig
from models.experts import ExpertOptions, Experts, add_experts
from models.neighborhood import HydraAttention, hydra_attention, neighborhood_attention_1d, neighborhood_attention_2d
from models.streams import Context, DecoderMap, GatedTokens, Map, Tokens, Vector
from models.transformer import CausalTransformer, Transformer
from models.transformer_block import AttentionConfig, TransformerBlock, build_attention
from models.unet import UNet, UNetConfig

__all__ = [
    "Attention",
    "AttentionConfig",
    "CausalTransformer",
    "Condition",
    "ConditionBlock",
    "ConditionEncoder",
    "Conditioner",
    "Context",
    "ControlBranch",
    "CrossAttention",
    "DecoderMap",
    "DiffAttentionV1",
    "DiffAttentionV2",
    "Downsample",
    "EmbedBlock",
    "ExpertOptions",
    "Experts",
    "GatedCrossAttention",
    "GatedTokens",
    "HintConfig",
    "HydraAttention",
    "Map",
    "Regions",
    "ResBlock",
    "Tokens",
    "Transformer",
    "TransformerBlock",
    "UNet",
    "UNetConfig",
    "Upsample",
    "Vector",
    "add_experts",
    "build_attention",
    "count_parameters",
    "differential_from_softmax",
    "hydra_attention",
    "neighborhood_attention_1d",
    "neighborhood_attention_2d",
    "record_maps",
]
