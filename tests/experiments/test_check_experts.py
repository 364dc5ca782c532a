"""Swapped experts: what is computed with them, what is counted, and the command on a tiny run."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from experiments.check_experts import (
    REST,
    SwapConfig,
    changes,
    counted_rows,
    distances,
    expert_names,
    groups_of,
    swapped_experts,
)
from experiments.metrics.layout.layouts import Layouts
from helpers.tiny_runs import UNET, call
from models.blocks import GEGLU
from models.experts import Experts
from models.regions import Regions
from models.router import ClassRouter, LearnedRouter
from models.streams import Cells

SCRIPT = "experiments/check_experts.py"
NAMES = ("disc", "ring", "sky")
GRID = (2, 4)


def make_network(router=None, spread=1.0) -> nn.ModuleDict:
    """Two layers of experts of width 8, copies at first, or `spread` apart."""
    layers = {}
    for name in ("first", "second"):
        layer = GEGLU(8)
        experts = Experts(layer.expand, GEGLU.activate, layer.contract, router or ClassRouter(((0,), (1,)), 3))
        for p in [*experts.expand.parameters(), *experts.contract.parameters()]:
            p.data += spread * torch.randn_like(p)
        layers[name] = experts
    return nn.ModuleDict(layers).requires_grad_(False)


def cells() -> Cells:
    """A row of two columns of each of three classes, but the last column of none."""
    maps = torch.tensor([[1, 2, 3, 0]] * 2)[None]
    fields = {"panoptic": maps, "segment_id": torch.tensor([[1, 2, 3]]), "segment_class": torch.tensor([[0, 1, 2]])}
    return Cells(Regions.from_fields(fields), GRID)


def test_swapped_experts_compute_each_others_cells():
    network, x = make_network(), torch.randn(1, *GRID, 8).repeat_interleave(4, 2)[:, :, :4]  # equal in all columns
    before = network["second"](x, cells())
    with swapped_experts(network, 0, 1):
        swapped = network["second"](x, cells())
    assert torch.equal(swapped[:, :, 2:], before[:, :, 2:])  # of the third expert
    assert torch.allclose(swapped[:, :, 0], before[:, :, 1]) and torch.allclose(swapped[:, :, 1], before[:, :, 0])
    assert not torch.allclose(swapped[:, :, 0], before[:, :, 0])


def test_experts_return_to_their_places_also_after_an_error():
    network = make_network()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(RuntimeError), swapped_experts(network, 2, 0):
        for layer in network.values():
            name = f"{'first' if layer is network['first'] else 'second'}.contract.bias"
            assert torch.equal(layer.contract.bias, state[name][[2, 1, 0]])
        raise RuntimeError
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_copies_swap_without_any_change():
    network, x = make_network(spread=0), torch.randn(1, *GRID, 8)
    before = network["first"](x, cells())
    with swapped_experts(network, 0, 1):
        assert torch.equal(network["first"](x, cells()), before)
    assert (distances(network) == 0).all()


def test_rows_of_all_layers_are_counted_while_open():
    network, x = make_network(), torch.randn(1, *GRID, 8)
    with counted_rows(network) as rows:
        for layer in network.values():
            layer(x, cells())
        network["first"](x, Cells(None, GRID))  # dropped: all of them are of the last
    assert rows.tolist() == [4, 4, 8 + 8]
    network["first"](x, cells())
    assert rows.sum() == 24


def test_distances_are_those_of_all_weights():
    network = make_network(spread=0)
    for layer in network.values():
        for part in (layer.expand, layer.contract):
            part.weight[1], part.weight[2] = -part.weight[0], 2 * part.weight[0]
    expected = torch.tensor([[0, 2, 0.4**0.5], [2, 0, 3 * 0.4**0.5], [0.4**0.5, 3 * 0.4**0.5, 0]])
    assert torch.allclose(distances(network), expected.double(), atol=1e-6)


def test_changes_are_means_inside_the_regions_of_a_group():
    pixels = torch.full((2, 2, 2), 2, dtype=torch.uint8)
    pixels[0, 0], pixels[1, 0, 0] = 0, 1
    nothing = torch.zeros(0)
    layouts = Layouts(2, nothing.long(), nothing.view(0, 4), nothing.long(), nothing, nothing > 0, pixels=pixels)
    difference = torch.zeros(2, 3, 2, 2)
    difference[0, :, 0, 0], difference[1, 0] = 255, 51
    figures = changes(difference, layouts, {"all": (0, 1, 2), "disc": (0,), "ring": (1,), "sky": (2,), "no": ()})
    values = {name: None if each is None else round(each.value, 9) for name, each in figures.items()}
    own = 51 / 255 / 3
    assert values == pytest.approx({"all": (1 + 4 * own) / 8, "disc": 0.5, "ring": own, "sky": 3 * own / 5, "no": None})


def test_groups_are_those_of_the_experts_or_the_classes():
    network = make_network(ClassRouter(((0, 2),), 3))
    assert groups_of(network, NAMES) == {"all": (0, 1, 2), "disc, sky": (0, 2), REST: (1,)}
    assert expert_names(network, NAMES) == ["disc, sky", REST]
    network = make_network(LearnedRouter(8, 2))
    assert [*groups_of(network, NAMES)] == ["all", *NAMES] and expert_names(network, NAMES) == ["expert 0", "expert 1"]


def test_an_expert_is_not_swapped_with_itself():
    with pytest.raises(ValueError, match="wanted two different ones"):
        SwapConfig(swap_experts=(1, 1))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A tiny run with three experts on maps of 16 x 16."""
    folder = tmp_path_factory.mktemp("logs")
    data = "--dataset shapes --img_size 16 --shapes_count 24 --shapes_kinds large --no_amp"
    model = "--conditions text region_words --text_width 16 --text_layers 1"
    experts = "--attn_block_type transformer --experts disc,square sky,sand"
    steps = "--total_steps 20 --batch_size 4 --train_steps 4 --lr 0.02 --warmup_iters 0 --steps_per_eval 0 --no_ema"
    flags = f"--sampler ddpm {UNET} {data} {model} {experts} {steps} --log_dir tiny"
    call("train_sampler.py", f"--logs_root {folder} {flags}")
    return folder


@pytest.mark.usefixtures("tiny_judges")
def test_the_command_measures_a_run(logs, capsys):
    flags = "--sampler ddpm --dataset shapes --load_dir tiny --no_amp --n_images 6 --batch_size 4 --sample_steps 4"
    call(SCRIPT, f"--logs_root {logs} {flags} --swap_experts 0 2 --log_dir out")
    results, out = json.loads((logs / "out" / "results.json").read_text()), capsys.readouterr().out
    groups = ["all", "disc, square", "sky, sand", REST]
    assert results["experts"] == groups[1:] and results["swapped"] == [0, 2]
    assert list(results["change"]) == groups and 0 < results["change"]["all"][0] < 1
    assert results["maps"].keys() == {"samples", "swapped", "real scenes"}
    assert sum(results["rows"]) == pytest.approx(1) and min(results["rows"]) > 0
    assert results["distances"][0][1] > 0 == results["distances"][1][1]
    assert results["maps"]["real scenes"]["all"]["colour"][0] > 0.9
    assert f"swapped: disc, square and {REST}" in out and "change" in out
    with Image.open(logs / "out" / "experts.png") as picture:
        assert picture.width == 12 + 4 * (160 + 12)  # map, samples, swapped, difference


def test_what_has_no_such_experts_is_refused(logs, capfd):
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--logs_root {logs} --sampler ddpm --dataset shapes --load_dir tiny --swap_experts 0 3")
    assert "got swap_experts 0 3 of 3 experts, wanted two numbers from 0 to 2" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--logs_root {logs} --sampler ddpm --dataset shapes --load_dir tiny --n_images 1001")
    assert "got n_images 1001 of 1000 held-out maps: pass a number up to 1000" in capfd.readouterr().err
