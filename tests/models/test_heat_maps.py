"""Heat maps of words: DAAM's, on what it recorded, and on rectangles, which it refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.attention_recorder import AttentionMaps
from models.heat_maps import (
    daam_layers,
    enlarge,
    heat_maps,
    intersection_over_union,
    mean_heat,
    share_inside,
    share_of_tokens,
)

FIXTURES = Path(os.environ.get("TEXT_FIXTURES", "")) / "daam"
HAS_FIXTURES = pytest.mark.skipif(
    not (FIXTURES / "daam.npz").is_file(), reason="TEXT_FIXTURES names no folder with daam/daam.npz, maps of daam"
)
LAYERS = {  # ours, by those of the fixture
    "down_0_attentions_0": "down_blocks.0.1.cross",
    "mid_attentions_0": "middle_blocks.1.cross",
    "up_1_attentions_0": "up_blocks.2.1.cross",
    "up_1_attentions_1": "up_blocks.3.1.cross",
}
TOKENS = 7  # of the prompt: "a monkey with hat walking", with start and end


@pytest.fixture(scope="module")
def daam():
    with np.load(FIXTURES / "daam.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


def recorded(daam, suffixes, prefix="", size=(8, 8)):
    """The fixture's maps of all steps, as the sum of a `MapRecorder`."""
    layers = {}
    for theirs, ours in LAYERS.items():
        total = sum(daam[f"{prefix}probs_{theirs}_{suffix}"] for suffix in suffixes)  # (heads, N, 77)
        grid = size if total.shape[1] == size[0] * size[1] else (size[0] // 2, size[1] // 2)
        layers[ours] = total.unflatten(1, grid)[None]
    return AttentionMaps(layers, {"text": slice(0, 77)}, size, torch.tensor([2]))


@HAS_FIXTURES
def test_heat_of_squares_is_that_of_daam(daam, agrees):
    maps = recorded(daam, ("step0", "step1"))
    everything = heat_maps(maps, list(LAYERS.values()))[:, :TOKENS]
    assert agrees(everything[0], daam["global_all_layers"], "daam: all layers", 1e-6)
    assert agrees(heat_maps(maps)[0, :TOKENS], daam["global_default_without_middle"], "daam: its layers", 1e-6)
    head = maps._replace(layers={name: layer[:, 2:3] for name, layer in maps.layers.items()})
    assert agrees(heat_maps(head, list(maps.layers))[0, :TOKENS], daam["global_head2"], "daam: head 2", 1e-6)
    shares = share_of_tokens(everything, range(1, TOKENS - 1))
    assert agrees(shares[0], daam["global_normalized"], "daam: normalized", 1e-6)


@HAS_FIXTURES
def test_heat_of_words_is_that_of_daam(daam, agrees):
    heat = heat_maps(recorded(daam, ("step0", "step1")), list(LAYERS.values()))
    for name, tokens in json.loads((FIXTURES / "words.json").read_text())["indices_in_77"].items():
        wanted = daam[f"word_{name.replace(' ', '_')}"]
        assert agrees(mean_heat(heat, tokens)[0], wanted, f"daam: {name}", 1e-6)
    large = enlarge(mean_heat(heat, [2])[0], (16, 24))
    assert agrees(large, daam["expand_monkey_w24_h16_right"], "daam: enlarged", 1e-6)


@HAS_FIXTURES
def test_heat_of_rectangles_follows_the_same_rule(daam, agrees):
    maps = recorded(daam, ["sum_of_steps"], "rect_", (8, 12))
    heat = heat_maps(maps, list(LAYERS.values()))[0, :TOKENS]
    assert agrees(heat, daam["rect_global_all_layers"], "daam's rule on 8x12", 1e-6)


def random_maps(**grids):
    """Maps of one image and 3 tokens, by the name of the layer with _ for the dots."""
    torch.manual_seed(0)
    layers = {name.replace("__", "."): torch.rand(1, 2, *grid, 3) for name, grid in grids.items()}
    return AttentionMaps(layers, {"text": slice(0, 3)}, (16, 32), torch.tensor([1]))


def test_the_layers_are_up_then_down_without_the_middle():
    grids = {"down_blocks__1__cross": (8, 16), "down_blocks__2__cross": (2, 4), "middle_blocks__1__cross": (4, 8)}
    maps = random_maps(**grids, up_blocks__0__cross=(2, 4), up_blocks__1__cross=(8, 16))
    assert daam_layers(maps) == ["up_blocks.1.cross", "down_blocks.1.cross"]  # 16 x 32 over 2 x 4 is a factor of 8
    assert daam_layers(random_maps(down_blocks__1__cross=(2, 4))) == ["down_blocks.1.cross"]
    assert daam_layers(random_maps(blocks__0__cross=(16, 32), blocks__1__cross=(16, 32))) == [
        *("blocks.0.cross", "blocks.1.cross")
    ]


def test_each_head_of_each_layer_counts_once():
    maps = random_maps(blocks__0__cross=(4, 8), blocks__1__cross=(2, 4))
    large = F.interpolate(maps.layers["blocks.1.cross"][0].permute(0, 3, 1, 2), size=(4, 8), mode="bicubic")
    fine = maps.layers["blocks.0.cross"][0].permute(0, 3, 1, 2)
    wanted = torch.cat([fine, large.clamp(min=0)]).mean(0)
    assert torch.allclose(heat_maps(maps)[0], wanted, atol=1e-6)


def test_signed_maps_keep_what_is_negative():
    maps = random_maps(blocks__0__cross=(4, 8))
    maps = maps._replace(layers={name: layer - 0.5 for name, layer in maps.layers.items()})
    assert heat_maps(maps).min() >= 0 > heat_maps(maps, signed=True).min()
    signed = heat_maps(maps, signed=True)
    assert torch.allclose(signed[0], maps.layers["blocks.0.cross"][0].mean(0).permute(2, 0, 1), atol=1e-6)


def test_unknown_layers_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="got layers blocks.9.cross, wanted some of blocks.0.cross"):
        heat_maps(random_maps(blocks__0__cross=(4, 8)), ["blocks.9.cross"])


def test_overlaps_of_masks_and_heat():
    left = torch.zeros(2, 3, dtype=torch.bool)
    left[:, 0] = True
    both = left | torch.tensor([False, True, False])
    nothing = torch.zeros_like(left)
    values = intersection_over_union(torch.stack([left, left, nothing]), torch.stack([both, left, nothing]))
    assert values.tolist() == [0.5, 1.0, 0.0]
    heat = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    assert share_inside(heat, left).item() == pytest.approx(3 / 8) and share_inside(heat, both).item() == 0.5


def test_even_heat_is_not_enlarged_to_its_rounding():
    noisy = 1 + 1e-6 * torch.rand(3, 4, 4)
    assert torch.equal(enlarge(noisy, (16, 16)), torch.zeros(3, 16, 16))


def test_shares_are_of_the_named_tokens_alone():
    heat = torch.tensor([5.0, 1.0, 3.0]).view(1, 3, 1, 1)
    assert share_of_tokens(heat, [1, 2]).flatten().tolist() == pytest.approx([1.25, 0.25, 0.75], rel=1e-5)


def test_enlarged_heat_runs_from_0_to_1_in_each_map():
    large = enlarge(torch.rand(2, 5, 2, 3), (8, 12))
    assert large.shape == (2, 5, 8, 12)
    assert torch.allclose(large.amin((-2, -1)), torch.zeros(2, 5)) and torch.allclose(
        large.amax((-2, -1)), torch.ones(2, 5), atol=1e-4
    )
