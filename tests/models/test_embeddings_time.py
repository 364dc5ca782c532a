"""The time embedding against its formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.embeddings import TimeEmbedding, sinusoidal_embedding


def test_sinusoids_are_cosines_then_sines_at_falling_frequencies():
    t, embedding = torch.tensor([0.0, 3.0, 250.5]), sinusoidal_embedding(torch.tensor([0.0, 3.0, 250.5]), 8)
    for j in range(4):
        frequency = 10_000 ** (-j / 4)
        for i in range(3):
            assert embedding[i, j].item() == pytest.approx(math.cos(t[i].item() * frequency), abs=1e-5)
            assert embedding[i, 4 + j].item() == pytest.approx(math.sin(t[i].item() * frequency), abs=1e-5)


def test_integer_steps_embed_like_real_times():
    steps = torch.tensor([0, 7, 999])
    assert torch.equal(sinusoidal_embedding(steps, 6), sinusoidal_embedding(steps.float(), 6))
    assert (
        sinusoidal_embedding(steps, 6).dtype == torch.float32
        and sinusoidal_embedding(steps.double(), 6).dtype == torch.float64
    )


def test_neighbouring_steps_of_four_thousand_differ():
    embedding = sinusoidal_embedding(torch.arange(4000), 32)
    assert (embedding[1:] - embedding[:-1]).norm(dim=1).min() > 0.5


def test_the_embedding_is_two_layers_of_the_sinusoids():
    embed, t = TimeEmbedding(8, 20), torch.tensor([1.0, 500.0])
    assert torch.allclose(embed(t), embed.contract(F.silu(embed.expand(sinusoidal_embedding(t, 8)))))
    assert embed(t).shape == (2, 20)


def test_the_scale_serves_times_in_the_unit_interval():
    embed, t = TimeEmbedding(8, 20, scale=1000.0), torch.tensor([0.001, 0.5])
    unscaled = TimeEmbedding(8, 20)
    unscaled.load_state_dict(embed.state_dict())
    assert torch.allclose(embed(t), unscaled(1000 * t))


def test_times_are_embedded_in_the_type_of_the_weights():
    embed, t = TimeEmbedding(8, 20), torch.tensor([1, 500])
    for dtype in (torch.bfloat16, torch.float64):
        assert embed.to(dtype)(t).dtype == embed(t.double()).dtype == dtype


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="got width 7, wanted an even number"):
        sinusoidal_embedding(torch.zeros(1), 7)
