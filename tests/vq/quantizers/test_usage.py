"""Codes in use after a short training with the default width and temperature."""

import pytest
import torch
from torch import Tensor, nn

from vq.config import VQGANConfig
from vq.quantizer import count_codes, make_quantizer, usage
from vq.quantizers import StepContext

STEPS, CODES, AT_ONCE = 150, 64, 256


class UniformRng:
    """Draws from one stream, which is faster than from one per example."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape)


def train_usage(config: VQGANConfig) -> float:
    """Trains an autoencoder of 16 correlated numbers; returns the fraction of codes that new ones use."""
    config, mixing = config.for_run(STEPS), torch.randn(6, 16)
    quantizer, decoder = make_quantizer(config), nn.Linear(config.code_dim, 16)
    encoder = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, config.code_dim))
    optimizer = torch.optim.Adam(nn.ModuleList([encoder, quantizer, decoder]).parameters(), 5e-3)

    def encode(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 6) @ mixing
        return x, encoder(x)[:, :, None, None]

    for step in range(STEPS):
        x, z = encode(AT_ONCE)
        codes = quantizer(z, StepContext(step, rng=UniformRng()))
        optimizer.zero_grad()
        ((decoder(codes.vectors.flatten(1)) - x).abs().mean() + codes.loss.mean()).backward()
        optimizer.step()
    return usage(count_codes(quantizer.assign(encode(4000)[1]), CODES)).item()


@pytest.mark.parametrize("name, wanted", [("l2", 0.9), ("gumbel", 0.8)])
def test_default_widths_keep_the_codes_in_use(name, wanted):
    assert train_usage(VQGANConfig(quantizer=name, codebook_size=CODES)) >= wanted
    assert train_usage(VQGANConfig(quantizer=name, codebook_size=CODES, emb_dim=32)) < 0.7
