"""Rotary positions and relative-position biases against loops over positions."""

import itertools

import pytest
import torch

from models import tables
from models.embeddings import RelativeBias, Rotary


@pytest.mark.parametrize("grid, width, base", [((7,), 6, 100.0), ((5, 4), 8, 100.0), ((3, 5), 4, 10.0)])
def test_each_pair_of_channels_turns_with_its_axis(grid, width, base):
    x = torch.randn(2, *grid, 3, width)
    rotated, pairs = Rotary(width, len(grid), base)(x), width // (2 * len(grid))
    for position in itertools.product(*map(range, grid)):
        angles = torch.tensor([n * base ** (-pair / pairs) for n in position for pair in range(pairs)])
        before, after = (torch.complex(*part[:, *position].chunk(2, -1)) for part in (x, rotated))
        assert torch.allclose(after, before * torch.polar(torch.ones(width // 2), angles), atol=1e-5)


@pytest.mark.parametrize("grid", [(40,), (12, 9)])
def test_logits_depend_on_offsets_alone(grid):
    rotary, ends = Rotary(16, len(grid)), torch.tensor(grid)
    q, k = (rotary(torch.randn(16).expand(1, *grid, 1, 16))[0, ..., 0, :] for _ in range(2))
    by_offset = {}
    for _ in range(500):
        a, b = (tuple((torch.rand(len(grid)) * ends).long().tolist()) for _ in range(2))
        offset = tuple(x - y for x, y in zip(a, b, strict=True))
        by_offset.setdefault(offset, []).append(q[a] @ k[b])
    repeated = [torch.stack(logits) for logits in by_offset.values() if len(logits) > 1]
    assert len(repeated) > 50 and all(torch.allclose(logits, logits[:1], atol=1e-4) for logits in repeated)
    assert torch.stack([logits[0] for logits in by_offset.values()]).std() > 0.1


def test_rotation_keeps_norms_and_the_origin():
    x = torch.randn(2, 6, 7, 3, 8)
    rotated = Rotary(8)(x)
    assert torch.allclose(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[:, 0, 0], x[:, 0, 0]) and not torch.allclose(rotated[:, 0, 1], x[:, 0, 1], atol=0.1)


def test_rotary_distinguishes_the_axes():
    rotated = Rotary(8)(torch.randn(8).expand(1, 4, 4, 1, 8))[0, :, :, 0]
    assert torch.pdist(rotated.flatten(0, 1)).min() > 0.1  # every position is rotated differently
    origin, down, right = rotated[0, 0], rotated[1, 0], rotated[0, 1]
    assert abs(origin @ down - origin @ right) > 0.01


def test_bfloat16_inputs_resolve_distant_neighbours():
    x = torch.randn(8).bfloat16().expand(1, 3000, 1, 8)
    rotated = Rotary(8, axes=1)(x)
    assert rotated.dtype == torch.bfloat16 and torch.equal(rotated, Rotary(8, axes=1)(x.float()).bfloat16())
    assert (rotated[:, 1:] - rotated[:, :-1]).float().norm(dim=-1).min() > 0.1


def test_rotary_rejects_odd_head_widths_and_other_grid_axes():
    with pytest.raises(ValueError, match="width 6 cannot be rotated along 2 axes.* a multiple of 4"):
        Rotary(6)
    Rotary(6, axes=1)
    with pytest.raises(ValueError, match="a grid of 1 axes, wanted 2: build Rotary with axes=1"):
        Rotary(8)(torch.zeros(1, 5, 2, 8))


@pytest.mark.parametrize("grid, kernel", [((6,), (3,)), ((4, 3), (4, 3)), ((5, 4), (2, 3)), ((3, 2), (4, 5))])
def test_bias_is_by_offset_and_the_outermost_covers_all_beyond(grid, kernel):
    module, positions = RelativeBias(2, kernel), list(itertools.product(*map(range, grid)))
    assert module.table.shape == (2, *(2 * k - 1 for k in kernel))
    bias, used = module(grid), torch.zeros_like(module.table)
    assert bias.shape == (2, len(positions), len(positions))
    for (i, query), (j, key) in itertools.product(enumerate(positions), repeat=2):
        entry = [max(1 - k, min(b - a, k - 1)) + k - 1 for a, b, k in zip(query, key, kernel, strict=True)]
        assert torch.equal(bias[:, i, j], module.table[:, *entry])
        used[:, *entry] += 1
    bias.sum().backward()
    assert torch.equal(module.table.grad, used)  # nothing reaches an entry that no pair uses
    assert (used == 0).any() == (grid == (3, 2))


def test_a_bias_starts_small_and_differs_between_heads():
    table = RelativeBias(8, (15, 15)).table
    assert table.std().item() == pytest.approx(0.02, rel=0.05) and abs(table.mean().item()) < 0.001
    assert torch.pdist(table.flatten(1)).min() > 0.1


@pytest.mark.parametrize("make", [lambda: Rotary(8), lambda: RelativeBias(2, (3, 3))])
def test_positions_compile_whole_and_train_after_inference(make, monkeypatch):
    monkeypatch.setattr(tables, "CACHE", {})
    torch._dynamo.reset()
    module = make()
    graph = torch.compile(module, backend="aot_eager", fullgraph=True)
    for grid in ((5, 4), (6, 4), (7, 9)):
        x = torch.randn(1, *grid, 2, 8, requires_grad=True) if isinstance(module, Rotary) else grid
        with torch.inference_mode():
            module(x)
        leaf = x if isinstance(module, Rotary) else module.table
        result, expected = (call(x) for call in (graph, module))
        (gradient,) = torch.autograd.grad(expected.square().sum(), leaf)
        assert torch.allclose(result, expected)
        assert torch.allclose(torch.autograd.grad(result.square().sum(), leaf)[0], gradient)
