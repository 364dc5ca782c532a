"""The first stage (VQGAN): autoencoder, quantizers, discriminator, perceptual distance and losses."""

from vq.augment import Augmentation
from vq.autoencoder import VQGAN, Decoder, Encoder
from vq.config import VQGANConfig, VQGANLossConfig
from vq.discriminator import PatchDiscriminator
from vq.losses import LeCAM, adaptive_weight
from vq.perceptual import Perceptual, load_perceptual
from vq.quantizer import make_quantizer
from vq.quantizers import Quantized, Quantizer, QuantizerConfig, StepContext
from vq.tiles import decode_tiled, encode_tiled

__all__ = [
    "Augmentation",
    "Quantized",
    "Decoder",
    "Encoder",
    "LeCAM",
    "PatchDiscriminator",
    "Perceptual",
    "Quantizer",
    "QuantizerConfig",
    "StepContext",
    "VQGAN",
    "VQGANConfig",
    "VQGANLossConfig",
    "adaptive_weight",
    "decode_tiled",
    "encode_tiled",
    "load_perceptual",
    "make_quantizer",
]
