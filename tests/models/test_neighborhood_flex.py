"""FlexAttention as a backend: its windows, blocks and biases against the dense mask, its results, its refusals.

PyTorch's FlexAttention has no backward on a CPU; its reference has one, which these tests use by skipping that check.
"""

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import neighborhood, neighborhood_flex
from models.attention import ATTENTION_TYPES
from models.neighborhood import Group, HydraAttention, dense_bias_index, dense_visible, make_window
from models.neighborhood import neighborhood_attention_1d as attention_1d
from models.neighborhood import neighborhood_attention_2d as attention_2d
from models.neighborhood_flex import FlexTables, attend_blocks, build_flex_tables
from train.perf import count_flops

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

WINDOWS = [  # grid, windows of all groups: (kernel, dilation, causal)
    ((9,), [(9, 1, False)]),
    ((150,), [(7, 4, False), (3, 1, True), (21, 5, False)]),
    ((300,), [(5, 1, False)]),
    ((8, 8), [(7, 1, False)]),
    ((17, 19), [((3, 5), (2, 3), (False, True)), (7, 2, False)]),
    ((23, 14), [(5, 1, True), ((9, 3), (2, 4), False), (13, 1, False)]),
    ((12, 31), [((11, 3), (1, 5), False)]),
]


def make_windows(grid, windows):
    return [make_window(grid, *window) for window in windows]


def tables_of(grid, windows, heads):
    plain = tuple(tuple(window) for window in make_windows(grid, windows))
    return FlexTables(*build_flex_tables(grid, plain, heads))


@pytest.mark.parametrize("grid, windows", WINDOWS)
def test_ranks_mark_the_same_windows_as_the_dense_mask(grid, windows):
    tables = tables_of(grid, windows, (1,) * len(windows))
    for i, window in enumerate(make_windows(grid, windows)):
        ranks, first, last = tables.ranks[:, i], tables.first[:, i], tables.last[:, i]  # (axes, N)
        visible = ((ranks[:, None] >= first[..., None]) & (ranks[:, None] <= last[..., None])).all(0)
        assert np.array_equal(visible, dense_visible(grid, window)[0])
        rows = tables.origin[i] + tables.rows[i] - tables.rows[i][:, None]  # (query, key)
        start = sum(neighborhood_flex.bias_size(earlier) for earlier in make_windows(grid, windows)[:i])
        assert np.array_equal((rows - start)[visible], dense_bias_index(grid, window)[0][visible])


@pytest.mark.parametrize("grid, windows", WINDOWS)
def test_exactly_the_blocks_with_a_visible_pair_are_visited(grid, windows):
    heads = tuple(range(1, 1 + len(windows)))
    tables, side = tables_of(grid, windows, heads), neighborhood_flex.BLOCK
    assert tables.group.tolist() == [i for i, count in enumerate(heads) for _ in range(count)]
    per_head = tables.group if len(windows) > 1 else [0]
    for head, i in enumerate(per_head):
        (visible,) = dense_visible(grid, make_windows(grid, windows)[i])
        blocks = -(-len(visible) // side)
        padded = np.pad(visible, (0, blocks * side - len(visible)))
        expected = padded.reshape(blocks, side, blocks, side).any((1, 3))
        for counts, order, wanted in (
            (tables.key_counts, tables.key_blocks, expected),
            (tables.query_counts, tables.query_blocks, expected.T),
        ):
            rows = zip(counts[0, head], order[0, head], wanted, strict=True)
            assert all(sorted(row[:count]) == np.flatnonzero(line).tolist() for count, row, line in rows)


def inputs_of(grid, windows, *, heads=1, shared=1, width=4, value_width=3, biased=True, dtype=torch.float64):
    """Queries, keys and values with `heads` key heads per group, then a bias per group."""
    total = heads * len(windows)
    ends = [(total * shared, width), (total, width), (total, value_width)]
    x = [torch.randn(2, *grid, *end).to(dtype).requires_grad_() for end in ends]
    sizes = [[2 * kernel - 1 for kernel in window.kernel] for window in make_windows(grid, windows)]
    return x, [torch.randn(heads * shared, *size).to(dtype).requires_grad_() for size in sizes] if biased else []


def by_flex(grid, windows, x, biases, scale):
    """The backend without its refusal of gradients on a CPU."""
    counts = [x[0].shape[-2] // len(windows)] * len(windows)
    biases = biases or [None] * len(windows)
    return neighborhood_flex.flex_attention(*x, make_windows(grid, windows), counts, scale=scale, biases=biases)


def by_dense(grid, windows, x, biases, scale):
    counts = x[1].shape[-2] // len(windows)
    groups = [
        Group(window, counts, bias)
        for window, bias in zip(make_windows(grid, windows), biases or [None] * len(windows), strict=True)
    ]
    return neighborhood.attend_by_group(*x, groups, scale=scale, backend="dense", dropout=0.0)


def with_gradients(function, x, biases):
    out = function(x, biases)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), [*x, *biases])]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "case, shared, biased, scale",
    [(1, 2, True, None), (2, 1, False, 0.3), (3, 1, True, 0.3), (4, 2, False, None), (5, 1, True, None)],
)
def test_outputs_and_gradients_are_those_of_dense(case, shared, biased, scale, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    grid, windows = WINDOWS[case]
    x, biases = inputs_of(grid, windows, heads=2, shared=shared, biased=biased, dtype=dtype)
    expected = with_gradients(lambda *args: by_dense(grid, windows, *args, scale), x, biases)
    for a, b in zip(
        with_gradients(lambda *args: by_flex(grid, windows, *args, scale), x, biases), expected, strict=True
    ):
        assert a.dtype == dtype and torch.allclose(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))


def test_bfloat16_matches_float64_and_the_bias_may_be_float32(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    grid, windows = WINDOWS[4]
    x, biases = inputs_of(grid, windows, heads=2)
    expected = with_gradients(lambda *args: by_dense(grid, windows, *args, None), x, biases)
    x = [part.detach().bfloat16().requires_grad_() for part in x]
    biases = [bias.detach().float().requires_grad_() for bias in biases]
    results = with_gradients(lambda *args: by_flex(grid, windows, *args, None), x, biases)
    assert [part.dtype for part in results] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for a, b in zip(results, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=0, atol=0.02 * max(1, b.abs().max().item()))


@torch.no_grad()
def test_it_is_a_backend_in_one_and_two_dimensions():
    for grid, attention in (((150,), attention_1d), ((17, 12), attention_2d)):
        x, (bias,) = inputs_of(grid, [(5, 2)], heads=2, shared=2, dtype=torch.float32)
        x = [part.detach() for part in x]
        actual, expected = (attention(*x, 5, 2, backend=backend, bias=bias) for backend in ("flex", "dense"))
        assert torch.allclose(actual, expected, atol=1e-5)


@torch.no_grad()
def test_groups_of_different_sizes_take_one_call(monkeypatch):
    calls, original = [], torch_flex.flex_attention
    monkeypatch.setattr(torch_flex, "flex_attention", lambda *x, **kw: calls.append(1) or original(*x, **kw))
    x = [torch.randn(2, 16, 17, n, 4) for n in (10, 5, 5)]
    biases = [torch.randn(6, 5, 5), None, torch.randn(2, 9, 5)]  # a group without a bias beside others
    windows = [make_window((16, 17), *window) for window in ((3, 4), (15, 1), ((5, 3), (2, 5)))]
    groups = [Group(*group) for group in zip(windows, [3, 1, 1], biases, strict=True)]
    actual, expected = (
        neighborhood.attend_by_group(*x, groups, scale=None, backend=backend, dropout=0.0)
        for backend in ("flex", "dense")
    )
    assert torch.allclose(actual, expected, atol=1e-5) and len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_differential_attention_is_the_same_with_flex_and_dense(kind):
    queries, keys = {"softmax": (1, 1), "diff_v1": (2, 2), "diff_v2": (2, 1)}[kind]
    core = HydraAttention(2, [3, 5], [2, 1], bias=True, queries_per_head=queries, keys_per_head=keys)
    options = {"depth": 1} if kind == "diff_v1" else {}
    layer, x = ATTENTION_TYPES[kind](16, 2, core=core, **options), torch.randn(2, 12, 13, 16)
    results = []
    for core.backend in ("flex", "dense"):
        results.append(layer(x))
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dropout": 0.1}, "has no dropout of weights"),
        ({"requires_grad": True}, "has no backward on cpu"),
        ({"device": "cuda:0", "width": 8}, "needs heads of at least 16 channels on CUDA, not 8"),
        ({"device": "cuda:0", "dtype": torch.float64}, "has no float64 on CUDA"),
    ],
)
def test_what_flex_does_not_support_is_refused(options, message):
    shape = (1, 9, 9, 2, options.pop("width", 16))
    dropout = options.pop("dropout", 0.0)
    with pytest.raises(ValueError, match=f'backend "flex" {message}: choose "tiled", "dense" or "auto"'):
        with FakeTensorMode():
            x = torch.zeros(shape, **options)
            attention_2d(x, x, x, 3, backend="flex", dropout=dropout)


@pytest.mark.parametrize("cause", ["deterministic", "triton"])
def test_what_a_machine_or_a_flag_forbids_is_refused(cause, monkeypatch):
    if cause == "triton":
        monkeypatch.setattr(neighborhood.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    message = {"triton": "needs the package triton", "deterministic": "which --deterministic forbids"}[cause]
    with FakeTensorMode():
        x, bias = torch.zeros(1, 9, 9, 2, 16, device="cuda:0"), torch.zeros(2, 5, 5, device="cuda:0")
        with pytest.raises(ValueError, match=message):
            attention_2d(x, x, x, 3, backend="flex", bias=bias.requires_grad_())


@torch.no_grad()
def test_tiles_stand_in_where_operations_are_counted():
    x = torch.randn(3, 1, 24, 24, 2, 16)
    assert count_flops(lambda: attention_2d(*x, 3, backend="flex")) == count_flops(
        lambda: attention_2d(*x, 3, backend="tiled")
    )
    with FlopCounterMode(display=False):
        counted = attention_2d(*x, 3, backend="flex")
    assert torch.equal(counted, attention_2d(*x, 3, backend="tiled"))


@pytest.mark.slow
def test_windows_of_the_same_shape_share_compiled_code(monkeypatch):
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend_blocks, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(neighborhood_flex, "attend_blocks", compiled)
    runs = [((12, 12), (3, 5), 1), ((12, 12), (5, 3), 2), ((12, 12), (3, 5), (2, 2)), ((12, 13), (3, 5), 1)]
    for grid, *window in runs:
        x, biases = inputs_of(grid, [window], dtype=torch.float32)
        case = grid, [window], [part.detach() for part in x], biases, None
        with torch.no_grad():
            assert torch.allclose(by_flex(*case), by_dense(*case), atol=1e-5)
    assert len(graphs) == 2  # one for each grid


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["aot_eager", "inductor"])
def test_it_compiles_inside_a_network_without_breaks(name):
    torch.compiler.reset()
    core = HydraAttention(2, [3, 5], [2, 1], bias=True, backend="flex")
    layer, x = ATTENTION_TYPES["softmax"](64, 2, core=core), torch.randn(2, 12, 13, 64)
    compiled = torch.compile(layer, backend=name, fullgraph=True)(x)
    core.backend = "dense"
    assert torch.allclose(compiled, layer(x), atol=1e-5)
