"""Editing with absorbing models: the masked fraction, strength maps, and windows without masked codes."""

import pytest
import torch

from diffusion.rng import Streams
from helpers.labels import LabelNetwork
from train.samplers.absorbing import AbsorbingSampler, Config, Sampling
from train.spaces import EditInput


def make_sampler(schedule="linear", grid=(8, 8)):
    config = Config(bert_n_emb=8, bert_n_head=2, bert_n_layers=1, total_steps=4, schedule=schedule)
    return AbsorbingSampler(config, codes=5, grid=grid, n_classes=0)


class UniformNetwork(LabelNetwork):
    """A uniform network."""

    def __init__(self):
        super().__init__(n_classes=0)

    def predict(self, ids, labels):
        return torch.zeros(*ids.shape, 5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "arccos", "square"])
def test_strength_is_the_masked_fraction_for_any_schedule(schedule):
    x0, network = torch.zeros(50, 8, 8, dtype=torch.long), UniformNetwork()
    edit = EditInput(x0, torch.zeros(50, 8, 8, dtype=torch.bool), 0.7)
    make_sampler(schedule).sample(network, Streams(list(range(50))), options=Sampling(sample_steps=1), edit=edit)
    fraction = (network.calls[0][0] == 5).float().mean().item()
    assert fraction == pytest.approx(0.7, abs=5 * (0.21 / 3200) ** 0.5)


def test_a_strength_map_is_the_masked_fraction_of_each_place():
    x0, free = torch.zeros(50, 8, 8, dtype=torch.long), torch.zeros(50, 8, 8, dtype=torch.bool)

    def start(strength, strengths=None):
        edit = EditInput(x0, free, strength, strengths)
        return make_sampler().initial_codes(edit, (50, 8, 8), Streams(list(range(50)))) == 5

    assert torch.equal(start(0.7, torch.full((50, 8, 8), 0.7)), start(0.7))
    assert not start(1.0, torch.zeros(50, 8, 8)).any() and start(1.0, torch.ones(50, 8, 8)).all()
    columns = start(0.7, torch.tensor([0.0, 0.2, 0.9, 1.0]).repeat(2).expand(50, 8, 8)).float().mean((0, 1))
    assert columns.tolist() == pytest.approx([0, 0.2, 0.7, 0.7] * 2, abs=5 * (0.25 / 400) ** 0.5)
    assert columns[0] == columns[4] == 0


def test_windows_of_known_codes_are_not_evaluated():
    x0, network = torch.zeros(1, 9, 12, dtype=torch.long), UniformNetwork()
    keep = torch.ones(1, 9, 12, dtype=torch.bool)
    keep[0, 0, 0] = False  # in a single window
    options, canvas = Sampling(sample_steps=2), {"shape": (9, 12), "window_stride": 1}
    make_sampler().sample(network, Streams([0]), options=options, edit=EditInput(x0, keep), **canvas)
    assert [len(ids) for ids, _ in network.calls] == [1]
