"""Rejected arguments, the choice of "auto", and NATTEN as reference and backend, also on a GPU."""

import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models import neighborhood
from models.neighborhood import Group, hydra_attention, make_window, natten_is_compiled, resolve_backend
from models.neighborhood import neighborhood_attention_1d as attention_1d
from models.neighborhood import neighborhood_attention_2d as attention_2d
from models.neighborhood_tiles import TileTables, build_tables, keys_per_tile


@pytest.fixture
def natten():
    return pytest.importorskip("natten", reason="natten is not installed: nothing to compare with")


def quiet(test):
    """Ignore natten's warnings on a CPU: it calls flex attention uncompiled and with a deprecated option."""
    test = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")(test)
    return pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")(test)


def query_key_value(grid, width=16, value_width=None, heads=2, **options):
    return [torch.randn(2, *grid, heads, size, **options) for size in (width, width, value_width or width)]


@pytest.mark.parametrize("name, axis, rank", [("height", 0, 2), ("width", 1, 2), ("length", 0, 1)])
@pytest.mark.parametrize(
    "length, kernel, dilation", [(9, 5, 2), (14, 5, 3), (11, 3, 4), (5, 7, 1), (6, 7, 2), (3, 3, 4)]
)
def test_a_window_that_does_not_fit_says_which_does(name, axis, rank, length, kernel, dilation):
    def window(kernel, dilation):
        grid, kernels, dilations = [30] * rank, [3] * rank, [1] * rank
        grid[axis], kernels[axis], dilations[axis] = length, kernel, dilation
        return make_window(tuple(grid), kernels, dilations)

    with pytest.raises(ValueError, match=f"does not fit the {name} of {length}: choose") as error:
        window(kernel, dilation)
    widest, furthest = (
        [int(n) for n in re.findall(rf"{option} up to (\d+)", str(error.value))]
        for option in ("kernel_size", "dilation")
    )
    assert widest or furthest
    for valid, too_large in [((n, dilation), (n + 2, dilation)) for n in widest] + [
        ((kernel, n), (kernel, n + 1)) for n in furthest
    ]:
        window(*valid)
        with pytest.raises(ValueError, match="does not fit"):
            window(*too_large)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kernel_size": 4}, "kernel_size 4 along the height, wanted an odd number"),
        ({"kernel_size": (3, 0)}, "kernel_size 0 along the width, wanted an odd number"),
        ({"kernel_size": (3, -1)}, "kernel_size -1 along the width"),
        ({"dilation": (1, 0)}, "dilation 0 along the width, wanted at least 1"),
        ({"kernel_size": (3, 3, 3)}, "wanted one value or 2, one per axis"),
        ({"dilation": (1,)}, "wanted one value or 2, one per axis"),
        ({"is_causal": [True]}, "wanted one value or 2, one per axis"),
        ({"backend": "sparse"}, "got backend 'sparse', wanted one of auto, dense, tiled, natten, flex"),
        ({"bias": torch.zeros(2, 3, 3)}, r"got bias \(2, 3, 3\), wanted \(2, 5, 5\)"),
        ({"bias": torch.zeros(1, 5, 5)}, r"got bias \(1, 5, 5\), wanted \(2, 5, 5\)"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention_2d(*torch.zeros(3, 1, 9, 9, 2, 4), **{"kernel_size": 3} | options)


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([(1, 9, 2, 4)] * 3, r"wanted \(B, H, W, heads, d\) each"),
        ([(1, 9, 9, 2, 4), (1, 9, 9, 2, 4), (1, 9, 2, 4)], r"value \(1, 9, 2, 4\): wanted \(B, H, W, heads, d\)"),
        ([(1, 9, 9, 2, 4), (1, 9, 8, 2, 4), (1, 9, 8, 2, 4)], "wanted the same batch and grid"),
        ([(2, 9, 9, 2, 4), (2, 9, 9, 2, 4), (1, 9, 9, 2, 4)], "wanted the same batch and grid"),
        ([(1, 9, 9, 3, 4), (1, 9, 9, 2, 4), (1, 9, 9, 2, 4)], "wanted equal numbers of heads, or a multiple in query"),
        ([(1, 9, 9, 2, 4), (1, 9, 9, 2, 4), (1, 9, 9, 1, 4)], "wanted equal numbers of heads"),
        ([(1, 9, 9, 2, 4), (1, 9, 9, 2, 5), (1, 9, 9, 2, 4)], "one width d"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention_2d(*map(torch.zeros, shapes), 3)


def test_images_are_rejected_by_1d_attention():
    with pytest.raises(ValueError, match=r"wanted \(B, L, heads, d\) each"):
        attention_1d(*torch.zeros(3, 1, 9, 9, 2, 4), 3)


@pytest.mark.parametrize(
    "grid, kernel, single, half",
    [
        ((8, 8), 7, "dense", "dense"),
        ((12, 12), 3, "dense", "dense"),  # gathering its 64 keys costs as much as the 80 that a tile saves
        ((14, 14), 7, "dense", "dense"),
        ((16, 16), 3, "tiled", "dense"),  # the unfused dense kernel of bfloat16 is fast up to larger grids
        ((16, 16), 5, "dense", "dense"),
        ((16, 16), 7, "dense", "dense"),
        ((20, 20), 7, "tiled", "dense"),
        ((24, 24), 11, "tiled", "dense"),
        ((32, 32), 7, "tiled", "tiled"),
        ((64,), 3, "dense", "dense"),
        ((130,), 3, "dense", "dense"),
        ((260,), 3, "tiled", "tiled"),
    ],
)
def test_auto_chooses_tiles_where_they_clearly_save_work(grid, kernel, single, half):
    group, q = Group(make_window(grid, kernel, 1), 1), torch.zeros(1, *grid, 1, 1)
    assert (resolve_backend("auto", q, group), resolve_backend("auto", q.bfloat16(), group)) == (single, half)
    assert keys_per_tile(grid, group.window) == TileTables(*build_tables(grid, group.window)).offsets.shape[-1]


@pytest.mark.parametrize("compiled", [True, False])
def test_auto_chooses_natten_on_a_gpu_that_supports_it(compiled, monkeypatch):
    monkeypatch.setattr(neighborhood, "natten_is_compiled", lambda: compiled)
    window = make_window((16, 16), 3, 1)
    with FakeTensorMode():
        on_gpu, on_cpu = (torch.zeros(1, 16, 16, 1, 32, device=device) for device in ("cuda:0", "cpu"))
    assert resolve_backend("auto", on_gpu, Group(window, 1)) == ("natten" if compiled else "tiled")
    assert resolve_backend("auto", on_cpu, Group(window, 1)) == "tiled"
    assert resolve_backend("auto", on_gpu, Group(window, 1), dropout=0.1) == "tiled"
    assert resolve_backend("auto", on_gpu, Group(window, 1, torch.zeros(1, 5, 5))) == "tiled"


def test_without_natten_its_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "natten", None)
    with pytest.raises(ValueError, match="pip install natten, or choose"):
        attention_2d(*torch.zeros(3, 1, 9, 9, 1, 16), 3, backend="natten")
    assert natten_is_compiled.__wrapped__() is False


CASES = [  # grid, kernel_size, dilation, is_causal; natten's own limits: kernels from 2 keys, widths 8, 16, 32, ...
    ((9,), 9, 1, False),
    ((17,), 5, 3, False),
    ((17,), 5, 3, True),
    ((70,), 7, 4, True),
    ((130,), 9, 5, False),
    ((131,), 21, 1, False),
    ((8, 8), 3, 1, False),
    ((9, 7), (7, 7), 1, False),
    ((9, 7), (3, 5), (2, 1), False),
    ((9, 7), (3, 5), (3, 1), (True, False)),
    ((17, 20), (5, 3), (3, 4), (True, True)),
    ((19, 23), 5, (3, 2), (False, True)),
    ((23, 17), (3, 7), (5, 2), False),
    ((31, 16), (7, 5), (1, 3), False),
]


@quiet
@torch.no_grad()
@pytest.mark.parametrize("grid, kernel, dilation, causal", CASES)
def test_it_agrees_with_natten(grid, kernel, dilation, causal, natten):
    x = query_key_value(grid)
    theirs, ours = (natten.na1d, attention_1d) if len(grid) == 1 else (natten.na2d, attention_2d)
    expected = theirs(*x, kernel, dilation=dilation, is_causal=causal)
    for backend in ("dense", "tiled", "natten"):
        assert torch.allclose(ours(*x, kernel, dilation, causal, backend=backend), expected, atol=1e-5)


@quiet
@torch.no_grad()
@pytest.mark.parametrize("value_width", [8, 16, 32, 5])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_natten_supports_grouped_queries_scales_and_value_widths(value_width, scale, natten):
    q, k, v = query_key_value((9, 8), value_width=value_width)
    q = torch.randn(2, 9, 8, 6, 16)
    actual, expected = (attention_2d(q, k, v, 3, 2, scale=scale, backend=backend) for backend in ("natten", "dense"))
    assert actual.shape == (2, 9, 8, 6, value_width) and torch.allclose(actual, expected, atol=1e-5)


@quiet
@torch.no_grad()
def test_natten_takes_a_group_of_heads_at_a_time(natten):
    x = query_key_value((12, 10), heads=5)
    actual, expected = (hydra_attention(*x, [3, 5], [1, 2], backend=backend) for backend in ("natten", "dense"))
    assert torch.allclose(actual, expected, atol=1e-5)


@quiet
@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": torch.zeros(2, 5, 5)}, 'neither bias nor dropout of weights: choose "tiled", "dense" or "auto"'),
        ({"dropout": 0.1}, 'neither bias nor dropout of weights: choose "tiled", "dense" or "auto"'),
        ({"width": 12}, 'choose "tiled", "dense" or "auto"'),
        ({"kernel_size": 1}, "kernel_size"),
        ({"requires_grad": True}, 'no backward on a CPU: choose "tiled", "dense" or "auto"'),
    ],
)
def test_what_natten_does_not_support_is_rejected(options, message, natten):
    tensor_options = {name: options[name] for name in ("width", "requires_grad") if name in options}
    call_options = {"kernel_size": 3} | {name: value for name, value in options.items() if name not in tensor_options}
    with pytest.raises(ValueError, match=message):
        attention_2d(*query_key_value((9, 9), **tensor_options), **call_options, backend="natten")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # by the compiler
@pytest.mark.parametrize("backend", ["dense", "tiled", "natten", "flex"])
def test_every_backend_on_a_gpu_is_dense_in_double_precision(backend, dtype, tolerance):
    if backend == "natten" and not natten_is_compiled():
        pytest.skip("natten has no CUDA kernels here")
    tolerance = max(tolerance, 3e-2 * (backend == "natten"))  # it multiplies in TF32
    inputs = [x.to(dtype) for x in query_key_value((20, 18), width=32)]
    inputs += [] if backend == "natten" else [torch.randn(2, 9, 5)]

    def with_gradients(device, dtype, backend):
        x = [part.to(device, dtype).requires_grad_() for part in inputs]
        bias = x[3] if len(x) == 4 else None
        out = attention_2d(*x[:3], (5, 3), (2, 3), (False, True), backend=backend, bias=bias)
        return [out, *torch.autograd.grad(out.square().sum(), x)]

    results = with_gradients("cuda", dtype, backend)
    for a, b in zip(results, with_gradients("cpu", torch.float64, "dense"), strict=True):
        assert torch.allclose(a.cpu().double(), b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))
