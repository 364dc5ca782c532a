"""The benchmark of attention within regions: all ways compute what they say, and ratios are those of their times."""

from functools import partial

import pytest
import torch

from experiments.metrics import fixed_workloads, region_attention_speed
from experiments.metrics.region_attention_speed import (
    FEW_BOXES,
    FUSED_LOOP,
    LOOP,
    OURS,
    OVERLAPS,
    PASSES,
    WHOLE_MAP,
    WITH_PLACES,
    attend_by_region,
    attend_object_by_object,
    attend_to_all,
    attend_to_all_fused,
    compare_ways,
    make_inputs,
    make_layer,
    region_attention_cases,
    run_forward,
    run_forward_backward,
    shapes_boxes,
    small_boxes,
)
from models.attention import Attention

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    for name, size in {"IMAGES": 4, "CHANNELS": 16, "SIDES": (4, 8), "MANY": 12, "FEW": 2}.items():
        monkeypatch.setattr(region_attention_speed, name, size)


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("count", [0, 40])
def test_the_loop_gives_the_same_numbers(small, overlap, side, count):
    """Outputs and gradients, for the scenes of `shapes`, some of whose boxes overlap, and for many small boxes."""
    boxes = small_boxes(4, count, CPU) if count else shapes_boxes(4, CPU)
    assert (boxes.regions().at(side, side).sum(1) > 1).any()
    layer, inputs, slices = make_layer(overlap), make_inputs(side, boxes.boxes.shape[1], CPU), boxes.slices(side)
    ways = [partial(attend_by_region, layer, boxes)]
    for attention in (attend_to_all, attend_to_all_fused):
        ways.append(partial(attend_object_by_object, layer, slices, attention))
    ours, *loops = (run_forward(layer, attend, *inputs) for attend in ways)
    assert all(torch.allclose(ours, loop, rtol=0, atol=1e-5) for loop in loops)
    for first, *rest in zip(*(run_forward_backward(layer, attend, *inputs) for attend in ways), strict=True):
        assert all(torch.allclose(first, each, rtol=1e-4, atol=1e-4) for each in rest)


def test_the_overlaps_differ(small):
    boxes = shapes_boxes(4, CPU)
    inputs = make_inputs(8, boxes.boxes.shape[1], CPU)
    own, mean = (
        attend_object_by_object(make_layer(overlap), boxes.slices(8), attend_to_all, *inputs) for overlap in OVERLAPS
    )
    assert (own - mean).abs().max() > 1e-3


def test_the_whole_map_is_plain_attention(small):
    run = region_attention_cases(CPU)["4x4, overlap mean, forward"][WHOLE_MAP]
    layer = make_layer("mean")
    plain = Attention(16, layer.heads)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if not name.startswith("prompt")})
    assert torch.equal(run(), plain(make_inputs(4, 6, CPU)[0]))


def test_with_places_all_starts_the_same_and_places_learn(small):
    cases = region_attention_cases(CPU)
    for overlap in OVERLAPS:
        forward, both = (cases[f"4x4, overlap {overlap}, {part}"] for part in PASSES)
        assert torch.allclose(forward[WITH_PLACES](), forward[OURS](), rtol=0, atol=1e-6)
        *others, places = both[WITH_PLACES]()
        assert len(others) == len(both[OURS]()) and places.any()


def test_each_case_has_its_rows_and_its_ratios(small, capsys):
    rows = fixed_workloads.measure_region_attention(1, CPU)
    assert len({row["workload"] for row in rows}) == len(rows) == 2 * (4 * 5 + 2)
    lines = capsys.readouterr().out
    assert lines.count("as fast as the loop") == 8 and lines.count("the time of 2") == 2
    seconds = {OURS: 2.0, WITH_PLACES: 2.4, LOOP: 5.0, FUSED_LOOP: 3.0, WHOLE_MAP: 1.6, FEW_BOXES: 0.5}
    way_of = {row["workload"]: way for row in rows for way in seconds if row["workload"].endswith(f", {way}")}
    rows = [{**row, "seconds": seconds[way_of[row["workload"]]]} for row in rows]
    ratios = [*compare_ways(rows, "region attention")]
    faster = "2.50x as fast as the loop (1.50x with fused attention)"
    assert ratios[0] == f"4x4, overlap mean, forward: {faster}, 1.25x the time of the whole map (1.50x with places)"
    assert ratios[4] == "4x4, 12 small boxes, forward and backward: 4.00x the time of 2"
