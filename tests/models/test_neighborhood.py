"""Neighbourhood attention against its definition, query by query; precision, memory and cached tables.

Rejected arguments and the choice of a backend: test_neighborhood_natten.py.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import neighborhood, neighborhood_tiles, tables
from models.neighborhood import Group, dense_mask, make_window
from models.neighborhood import neighborhood_attention_1d as attention_1d
from models.neighborhood import neighborhood_attention_2d as attention_2d

CPU = torch.device("cpu")
with_backends = pytest.mark.parametrize("backend", ["dense", "tiled"])
with_bias = pytest.mark.parametrize("bias", [False, True])


class Case(NamedTuple):
    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    batch: int = 1
    heads: int = 2
    shared: int = 1  # queries per key
    value_width: int = 3
    scale: float | None = None
    bias: bool = True

    def inputs(self, dtype=torch.float64, width=4):
        heads = self.heads * self.shared
        ends = [(heads, width), (self.heads, width), (self.heads, self.value_width)]
        shapes = [(self.batch, *self.grid, *end) for end in ends]
        shapes += [(heads, *(2 * k - 1 for k in self.kernel))] * self.bias
        return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]

    def attend(self, backend, q, k, v, bias=None):
        attention = attention_1d if len(self.grid) == 1 else attention_2d
        return attention(q, k, v, self.kernel, self.dilation, self.causal, self.scale, backend, bias=bias)


def neighbours(position, length, kernel, dilation, causal):
    """The keys that a query attends to along an axis."""
    row = range(position % dilation, length, dilation)
    index = row.index(position)
    if causal:
        return row[max(index - kernel + 1, 0) : index + 1]
    first = min(max(index - kernel // 2, 0), len(row) - kernel)
    return row[first : first + kernel]


def reference(case, q, k, v, bias=None):
    rows, key_of = [], [head // case.shared for head in range(case.heads * case.shared)]
    for query in itertools.product(*map(range, case.grid)):
        axes = [neighbours(*axis) for axis in zip(query, *case[:4], strict=True)]
        keys = torch.tensor(list(itertools.product(*axes)))  # (K, axes)
        near, values = (x[:, *keys.T][:, :, key_of] for x in (k, v))  # (B, K, heads, d)
        scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
        logits = scale * torch.einsum("bhd,bkhd->bhk", q[:, *query], near)
        if bias is not None:
            offset = (keys - torch.tensor(query)) // torch.tensor(case.dilation) + torch.tensor(case.kernel) - 1
            logits = logits + bias[:, *offset.T]
        rows.append(torch.einsum("bhk,bkhe->bhe", logits.softmax(-1), values))
    return torch.stack(rows, 1).unflatten(1, case.grid)


def with_gradients(function, inputs):
    out = function(*inputs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def close(actual, expected, tolerance):
    return all(
        torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * max(1, b.abs().max().item()))
        for a, b in zip(actual, expected, strict=True)
    )


@st.composite
def cases(draw):
    n = draw(st.integers(1, 2))
    axes = [(draw(st.sampled_from([1, 3, 3, 5])), draw(st.integers(1, 3)), draw(st.booleans())) for _ in range(n)]
    kernel, dilation, causal = zip(*axes, strict=True)
    grid = tuple(k * d + draw(st.integers(0, 7 if n == 2 else 20)) for k, d, _ in axes)
    sizes = [draw(st.integers(1, limit)) for limit in (2, 2, 3, 6)]
    return Case(grid, kernel, dilation, causal, *sizes, draw(st.sampled_from([None, 0.3])), draw(st.booleans()))


@given(cases())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_every_backend_is_the_definition(case):
    inputs = case.inputs()
    expected = with_gradients(lambda *x: reference(case, *x), inputs)
    for backend in ("dense", "tiled", "auto"):
        assert close(with_gradients(lambda *x, name=backend: case.attend(name, *x), inputs), expected, 1e-10)


MANY_TILES = [
    Case((17, 19), (3, 5), (1, 1), (False, False), batch=2, shared=2),
    Case((23, 17), (5, 3), (2, 3), (False, False), bias=False),
    Case((19, 23), (7, 5), (1, 4), (True, False)),
    Case((23, 5), (9, 5), (1, 1), (False, True), shared=2),
    Case((70,), (5,), (1,), (False,), batch=2),
    Case((150,), (7,), (4,), (False,), shared=3),
    Case((131,), (9,), (2,), (True,), bias=False),
    Case((127,), (21,), (1,), (False,)),
]


@pytest.mark.parametrize("case", MANY_TILES)
def test_backends_agree_with_many_tiles_in_both_precisions(case):
    inputs = case.inputs()
    expected = with_gradients(lambda *x: reference(case, *x), inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    for backend in ("dense", "tiled"):
        assert close(with_gradients(lambda *x, name=backend: case.attend(name, *x), inputs), expected, 1e-10)
        assert close(with_gradients(lambda *x, name=backend: case.attend(name, *x), single), expected, 1e-5)


@pytest.mark.parametrize("tiles", [1, 3, 16])
def test_the_number_of_tiles_per_chunk_changes_nothing(tiles, monkeypatch):
    case = Case((23, 19), (5, 3), (1, 2), (False, True), batch=2, shared=2)
    inputs, results = case.inputs(), []
    for size in (tiles, 10**6):
        monkeypatch.setattr(neighborhood_tiles, "TILES_PER_CHUNK", size)
        results.append(with_gradients(lambda *x: case.attend("tiled", *x), inputs))
    assert close(*results, 1e-12)


@with_backends
@pytest.mark.parametrize(
    "case",
    [
        Case((9, 4), (3, 3), (2, 1), (False, True), heads=1, shared=2, value_width=1),
        Case((70,), (3,), (2,), (False,), heads=1, value_width=1),
    ],
)
def test_its_gradients_are_those_of_finite_differences(case, backend):
    assert torch.autograd.gradcheck(lambda *x: case.attend(backend, *x), case.inputs(width=1))


@with_backends
def test_bfloat16_matches_float64_and_the_bias_may_be_float32(backend):
    case = Case((17, 19), (3, 5), (1, 2), (False, False), shared=2)
    *x, bias = case.inputs(torch.float32)
    inputs = [*(part.detach().bfloat16().requires_grad_() for part in x), bias]
    results = with_gradients(lambda *x: case.attend(backend, *x), inputs)
    assert [part.dtype for part in results] == [torch.bfloat16] * 4 + [torch.float32]
    assert close(results, with_gradients(lambda *x: case.attend(backend, *x), [x.double() for x in inputs]), 0.02)


@with_backends
def test_away_from_the_borders_the_output_moves_with_the_input(backend):
    q, k, v = torch.randn(3, 1, 20, 21, 2, 4)
    out = attention_2d(q, k, v, (5, 3), (2, 3), backend=backend)
    shifted = attention_2d(*(x.roll((3, 2), (1, 2)) for x in (q, k, v)), (5, 3), (2, 3), backend=backend)
    assert torch.allclose(shifted[:, 7:-4, 5:-3], out[:, 4:-7, 3:-5], atol=1e-6)
    # the windows at the borders do not move
    assert not torch.allclose(shifted[:, 6:-4], out.roll((3, 2), (1, 2))[:, 6:-4], atol=1e-2)


def weights(grid, *window, backend, dropout=0.0):
    """Attention weights of each query when all keys are equal: (N, N)."""
    equal, one_hot = torch.zeros(1, *grid, 1, 1), torch.eye(torch.Size(grid).numel()).view(1, *grid, 1, -1)
    return attention_2d(equal, equal, one_hot, *window, backend=backend, dropout=dropout).flatten(0, 3)


@with_backends
def test_every_query_sees_kernel_size_keys_per_axis(backend):
    grid, window = (11, 9), ((5, 3), (2, 3))
    attention = weights(grid, *window, backend=backend)
    visible = attention > 0
    assert (visible.sum(-1) == 15).all() and torch.allclose(attention[visible], torch.tensor(1 / 15))
    assert (visible.view(-1, *grid).any(2).sum(-1) == 5).all() and (visible.view(-1, *grid).any(1).sum(-1) == 3).all()
    assert torch.equal(visible, dense_mask(grid, [Group(make_window(grid, *window), 1)], 1, CPU)[0])


@with_backends
def test_a_causal_axis_hides_the_future_and_shrinks_at_0(backend):
    visible = (weights((11, 9), 3, 2, (True, False), backend=backend) > 0).view(11, 9, 11, 9)
    rows = torch.arange(11)
    assert torch.equal(visible.any(3).sum(-1), (rows // 2 + 1).clamp(max=3)[:, None].expand(11, 9))
    assert (visible.any(2).sum(-1) == 3).all()
    assert not visible.any(3)[rows[None, None] > rows[:, None, None].expand(11, 9, 1)].any()


@with_backends
def test_dropout_acts_on_the_weights(backend):
    dropped = weights((24, 24), 5, backend=backend, dropout=0.25) * 25  # 1 in every window, before dropout
    visible = weights((24, 24), 5, backend=backend) > 0
    assert torch.allclose(dropped[visible].unique(), torch.tensor([0, 4 / 3])) and not dropped[~visible].any()
    assert (dropped[visible] == 0).float().mean() == pytest.approx(0.25, abs=0.02)


@with_bias
@pytest.mark.parametrize("grid", [(8, 8), (20, 20)])  # dense, tiled
def test_auto_works_under_autocast(grid, bias):
    case = Case(grid, (5, 5), (1, 1), (False, False), shared=2, bias=bias)
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(lambda *x: case.attend("auto", *x), inputs)
    assert results[0].dtype == torch.bfloat16
    assert close(results, with_gradients(lambda *x: case.attend("auto", *x), inputs), 0.02)


@pytest.mark.slow
@with_bias
@with_backends
def test_it_compiles_without_breaks_for_any_batch_and_grid(backend, bias):
    torch._dynamo.reset()
    graph = torch.compile(
        lambda *x: attention_2d(*x[:3], 3, 2, backend=backend, bias=x[3] if bias else None),
        backend="aot_eager",
        fullgraph=True,
    )
    for batch, grid in ((2, (16, 16)), (3, (16, 16)), (2, (18, 20))):
        case = Case(grid, (3, 3), (2, 2), (False, False), batch=batch, bias=bias)
        inputs = case.inputs(torch.float32)
        expected = with_gradients(lambda *x, case=case: case.attend(backend, *x), inputs)
        assert close(with_gradients(graph, inputs), expected, 1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        sizes = (leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        self.bytes = max(self.bytes, *sizes, 0)
        return out


@with_bias
@pytest.mark.parametrize("backend, growth", [("tiled", 4), ("dense", 16)])
def test_memory_is_linear_with_tiles_and_quadratic_without(backend, growth, bias, monkeypatch):
    monkeypatch.setattr(neighborhood_tiles, "TILES_PER_CHUNK", 10**6)  # all tiles at once
    sizes = []
    for side in (16, 32, 64)[: 3 if backend == "tiled" else 2]:
        monkeypatch.setattr(tables, "CACHE", {})  # count the tables as well
        case = Case((side, side), (5, 5), (1, 1), (False, False), shared=2, bias=bias)
        inputs = case.inputs(torch.float32)
        with LargestTensor() as largest:
            with_gradients(lambda *x, case=case: case.attend(backend, *x), inputs)
        sizes.append(largest.bytes)
    assert [b / a for a, b in itertools.pairwise(sizes)] == pytest.approx([growth] * (len(sizes) - 1), rel=0.1)


@pytest.mark.parametrize(
    "module, builder, backend",
    [(neighborhood, "dense_visible", "dense"), (neighborhood_tiles, "build_tables", "tiled")],
)
def test_tables_are_made_once_per_shape(module, builder, backend, monkeypatch):
    monkeypatch.setattr(tables, "CACHE", {})
    original, calls = getattr(module, builder), []
    monkeypatch.setattr(module, builder, lambda *shape: calls.append(shape) or original(*shape))
    for grid, dilation in (((9, 9), 1), ((9, 9), 1), ((9, 8), 1), ((9, 9), 2), ((9, 9), 1)):
        x = torch.randn(2, *grid, 1, 2)
        attention_2d(x, x, x, 3, dilation, backend=backend)
    assert len(calls) == 3


def test_the_oldest_tables_make_room(monkeypatch):
    monkeypatch.setattr(tables, "CACHE", {})
    built, latest = [], tables.MAX_CACHED + 1

    def table(grid):
        built.append(grid[0])
        return (np.full(2, grid[0]),)

    for n in [*range(latest + 1), latest, 2, 0]:
        assert tables.cached_tables(table, (n,), device=CPU)[0].tolist() == [n, n]
    assert built == [*range(latest + 1), 0] and len(tables.CACHE) == tables.MAX_CACHED
    (on_meta,) = tables.cached_tables(table, (0,), device=torch.device("meta"))
    assert on_meta.is_meta  # tables are cached per device


@with_backends
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fake_tensors_are_never_cached(device, backend, monkeypatch):
    monkeypatch.setattr(tables, "CACHE", {})
    case = Case((16, 16), (3, 3), (1, 1), (False, False))
    inputs = [x.detach() for x in case.inputs()]
    for _ in range(2):  # before the real tables are cached, and after
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = case.attend(backend, *(mode.from_tensor(x).to(device) for x in inputs))
        assert isinstance(fake, FakeTensor) and fake.shape == (1, 16, 16, 2, 3) and str(fake.device) == device
        assert not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(list(tables.CACHE.values())))
        assert torch.allclose(case.attend(backend, *inputs), reference(case, *inputs))


@with_backends
def test_training_may_follow_inference_mode(backend, monkeypatch):
    monkeypatch.setattr(tables, "CACHE", {})
    case = Case((16, 16), (3, 3), (1, 1), (False, False))
    inputs = case.inputs()
    with torch.inference_mode():
        case.attend(backend, *inputs)
    assert len(with_gradients(lambda *x: case.attend(backend, *x), inputs)) == 5
