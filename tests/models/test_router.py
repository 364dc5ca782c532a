"""Routers: the experts of cells by the classes of a map, against public code, and learned ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.regions import Regions
from models.router import ClassRouter, LearnedRouter, leave_out_padding, sort_by_expert
from models.streams import Cells

SPATIAL = Path(__file__).parents[1] / "fixtures" / "spatial"
GROUPS = {  # of the training ids of Cityscapes, beside the rest
    "things": (tuple(range(19)),),
    "extreme_things": ((13,), (11, 12), (14, 15), (17, 18)),
    "extreme": ((13,), (11, 12), (14,), (15,), (17, 18), (8, 9), (3, 4), (0, 1), (2,)),
}


def recorded(name):
    return {key: torch.from_numpy(value) for key, value in np.load(SPATIAL / f"{name}.npz").items()}


def segments(batch=1):
    """The segments of a recorded id map; class 19 is none."""
    levels, classes = recorded("levels"), recorded("mamoe_experts")["class_of_id"]
    ids, present = (each.expand(batch, -1) for each in (levels["ids"][None].long(), torch.ones(1, 8).bool()))
    maps, classes = levels["id_map"].expand(batch, -1, -1), classes.expand(batch, -1)
    return Regions(present=present, id_maps=maps, instance_ids=ids, class_ids=classes)


def weights_of(routing, count):
    """The weight of each expert in each row, (N, E)."""
    n, k = routing.slots.shape
    weights = torch.ones(n, k).double() if routing.weights is None else routing.weights
    experts = torch.cat([routing.experts, torch.tensor([count])])[routing.slots]  # E: none
    return torch.zeros(n, count + 1).double().scatter_add_(1, experts, weights.double())[:, :count]


def route(router, regions, grid, positions=None, width=3):
    rows = grid[0] * grid[1] if positions is None else len(range(grid[0] * grid[1])[positions])
    return router(torch.zeros(len(regions.present), rows, width), Cells(regions, grid, positions))


@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("scheme", GROUPS)
def test_nearest_routes_as_public_code(scheme, grid, agrees):
    """Their dispatch is ours, and their weights, shared by the segments of an expert, are 1."""
    router = ClassRouter(GROUPS[scheme], 20)
    expected = recorded("mamoe_experts")[f"{scheme}.nearest.dispatch.{grid[0] * grid[1]}"]
    dispatch = weights_of(route(router, segments(), grid), router.count).float()
    assert agrees(dispatch, expected, f"mamoe dispatch, nearest, {scheme}", 0)


@pytest.mark.parametrize("grid", [(8, 16), (4, 8), (2, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("scheme", GROUPS)
def test_shares_route_as_public_code(scheme, grid, agrees):
    public, name = recorded("mamoe_experts"), f"{scheme}.avg_pool"
    router, size = ClassRouter(GROUPS[scheme], 20, "share"), grid[0] * grid[1]
    routing = route(router, segments(), grid)
    weights = weights_of(routing, router.count)
    assert agrees((weights > 0).float(), public[f"{name}.dispatch.{size}"], f"mamoe dispatch, share, {scheme}", 0)
    assert agrees(weights.float(), public[f"{name}.combine.{size}"], f"mamoe combine, share, {scheme}", 1e-6)
    assert (weights.sum(1) - 1).abs().max() < 1e-12
    assert len(routing.rows) == routing.ends[-1] == public[f"{name}.dispatch.{size}"].sum()  # nothing else is computed


def test_pairs_are_sorted_and_found_again():
    experts = torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]])  # of three; 3: none
    routing = leave_out_padding(sort_by_expert(experts, 3, torch.ones(4, 2)))
    assert routing.rows.tolist() == [0, 1, 3, 0, 2, 3] and routing.experts.tolist() == [0, 0, 0, 2, 2, 2]
    assert routing.ends.tolist() == [3, 3, 6] and routing.counts.tolist() == [3, 0, 3]
    assert routing.slots.tolist() == [[3, 0], [1, 6], [4, 6], [2, 5]] and routing.ends.dtype == torch.int32


@pytest.mark.parametrize("rule", ["nearest", "share"])
def test_the_rest_has_what_no_group_and_no_region_has(rule):
    boxes = torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 0.75, 1]]])
    regions = Regions.from_fields({"boxes": boxes, "box_class": torch.tensor([[1, 2]])})
    router = ClassRouter([[1], [0]], 3, rule)  # class 2 is in no group, the last quarter in no region
    expected = torch.tensor([0, 0, 2, 2])
    assert torch.equal(weights_of(route(router, regions, (2, 4)), 3).argmax(1).view(2, 4), expected.expand(2, 4))
    for none in (regions.drop(torch.tensor([True])), None):
        routing = router(torch.zeros(1, 2, 4, 5), Cells(none, (2, 4)))
        assert routing.counts.tolist() == [0, 0, 8]


@pytest.mark.parametrize("rule", ["nearest", "share"])
def test_regions_without_a_class_have_the_rest(rule):
    regions = Regions(present=torch.tensor([[True]]), boxes=torch.tensor([[[0, 0, 1, 1.0]]]))
    assert route(ClassRouter([[0], [1]], 2, rule), regions, (2, 2)).counts.tolist() == [0, 0, 4]


def test_the_front_region_has_the_cell():
    boxes = torch.tensor([[[0, 0, 1, 1], [0.5, 0, 1, 1.0]]])
    regions = Regions.from_fields({"boxes": boxes, "box_class": torch.tensor([[0, 1]])})
    for rule in ("nearest", "share"):
        routing = route(ClassRouter([[0], [1]], 2, rule), regions, (1, 4))
        assert torch.equal(weights_of(routing, 3).argmax(1), torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize("rule", ["nearest", "share"])
def test_positions_are_cells_in_raster_order(rule):
    router, regions = ClassRouter(GROUPS["extreme"], 20, rule), segments(2)
    whole = weights_of(route(router, regions, (4, 8)), 10).view(2, 32, 10)
    part = weights_of(route(router, regions, (4, 8), slice(5, 13)), 10).view(2, 8, 10)
    assert torch.equal(part, whole[:, 5:13])


def test_a_map_is_routed_once_for_each_grid():
    router, regions = ClassRouter(GROUPS["extreme"], 20, "share"), segments()
    other = ClassRouter(GROUPS["things"], 20, "share")
    first = route(router, regions, (4, 8))
    assert route(router, regions, (4, 8)) is first and route(router, regions, (2, 4)) is not first
    assert len(route(other, regions, (4, 8)).ends) == 2


@pytest.mark.parametrize("top", [1, 2])
def test_learned_weights_are_one_and_have_a_gradient(top):
    router = LearnedRouter(8, 4, top).double()
    x = torch.randn(2, 5, 8).double()
    routing = router(x, Cells(None, (1, 5)))
    p = (x.flatten(0, 1) @ router.logits.weight.T).softmax(-1)
    values, experts = p.topk(top, -1)
    found = torch.cat([routing.experts, torch.tensor([4])])[routing.slots]
    assert torch.equal(found, experts) and (routing.weights.sum(1) - 1).abs().max() < 1e-12
    assert torch.allclose(routing.weights, values / values.sum(1, keepdim=True))
    own = values / values.sum(1, keepdim=True)
    weight = torch.randn(10, top).double()
    (expected,) = torch.autograd.grad((own.detach() * values.log() * weight).sum(), router.logits.weight)
    (grad,) = torch.autograd.grad((routing.weights * weight).sum(), router.logits.weight)
    assert torch.allclose(grad, expected) and grad.any()


def test_a_tiny_probability_has_a_finite_gradient():
    router = LearnedRouter(1, 2)
    router.logits.weight.data[:] = torch.tensor([[300.0], [-300.0]])
    router.balance[1] = 2.0  # sends the row to the expert of probability 0
    routing = router(torch.ones(1, 1, 1), Cells(None, (1, 1)))
    routing.weights.sum().backward()
    assert routing.experts.tolist() == [1] and routing.weights.tolist() == [[1.0]]
    assert router.logits.weight.grad.isfinite().all()


def test_the_balance_moves_towards_an_even_use():
    router = LearnedRouter(4, 3, rate=0.5)
    router.move_balance(torch.tensor([7, 1, 4]))
    assert router.balance.tolist() == [-0.5, 0.5, 0.0]
    assert "balance" in router.state_dict() and "balance" not in dict(router.named_parameters())
    x = torch.randn(1, 512, 4)
    router = LearnedRouter(4, 3, rate=0.01)
    router.logits.weight.data[0] += 1

    def spread():
        counts = router(x, Cells(None, (1, 512))).counts
        router.move_balance(counts)
        return int(counts.max() - counts.min())

    first = spread()
    for _ in range(60):
        last = spread()
    assert first > 60 and last < 30


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0], [1, 0]], "class 0 in two groups"),
        ([[3]], "class 3 .* 0 to 2"),
        ([[]], "without any"),
        ([], "without any"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, message):
    with pytest.raises(ValueError, match=f"got .*{message}"):
        ClassRouter(groups, 3)


@pytest.mark.parametrize("top", [0, 5])
def test_more_experts_than_there_are_are_refused(top):
    with pytest.raises(ValueError, match=f"got {top} experts for each row of 4, wanted 1 to 4"):
        LearnedRouter(8, 4, top)
