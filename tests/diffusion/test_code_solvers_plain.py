"""Solvers of codes, which plan on the CPU, equal the plain formulas with masks bit by bit, on both devices."""

import pytest
import torch

from diffusion import absorbing_solvers, autoregressive, discrete_solvers
from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import find_left, num_unmasked
from diffusion.autoregressive import Autoregression
from diffusion.discrete_solvers import even_times
from diffusion.logits_warper import LogitsWarper
from diffusion.rng import Streams
from helpers import plain_code_solvers
from helpers.fake_device import DEVICE, FakeDeviceMode
from helpers.parametrize import slow_after

K, SHAPE = 5, (6, 3, 4)
SOLVERS = {
    **{name: getattr(absorbing_solvers, name) for name in ("ancestral", "confidence", "remask")},
    **{"discrete": discrete_solvers.discrete, "raster": autoregressive.raster},
}
OPTIONS = [
    *[("ancestral", {}), ("confidence", {}), ("confidence", {"choice_temp": 0.0}), ("remask", {}), ("discrete", {})],
    *[("remask", {"remasking": kind, "remask_eta": 0.7}) for kind in ("cap", "conf")],
    ("raster", {}),
]
WARPERS = [LogitsWarper(), LogitsWarper(temperature=1.4, final_temperature=0.5, top_k=4, top_p=0.9)]


def grids():
    """All mask, complete, one code left, and some codes known."""
    x = torch.randint(0, 2 * K, SHAPE, generator=torch.Generator().manual_seed(0)).clamp(max=K)
    x[0], x[1], x[2] = K, 0, 1
    x[2, 1, 1] = K
    return x


def denoise(x, t, rows=None):
    """Logits (B, H, W, K), or (B, K) for the codes before one, that depend on all codes and the example."""
    device = x.device
    rows, count = torch.arange(len(x), device=device) if rows is None else rows, x[0].numel()
    key = (x.flatten(1) * torch.arange(1, count + 1, device=device)).sum(1) + 7 * rows + count
    places = torch.arange(K, device=device)
    if x.ndim == 3:
        places = torch.arange(count * K, device=device).view(*x.shape[1:], K)
    return 3 * (key.view(-1, *[1] * places.ndim) * 0.37 + places * 1.3).sin()


def fill(i, t, s, x, logits):
    """An on_step that reveals codes in two of the steps."""
    known = torch.where(x == K, 2, x)
    return torch.cat([x[:, :1], known[:, 1:2], x[:, 2:]], 1) if i in (1, 3) else x


def run(solve, name, device, **options):
    process = Autoregression(K) if name == "raster" else AbsorbingDiffusion(K, None, "cosine")
    rng, x = Streams(list(range(SHAPE[0])), device), grids().to(device)
    times = even_times(12 if name == "raster" else 5)
    return solve(denoise, process, x, times, rng=rng, **options).cpu()


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.parametrize("warper", slow_after(1, WARPERS))
@pytest.mark.parametrize("on_step", [None, lambda i, t, s, x, logits: x, fill], ids=["alone", "watched", "filled"])
def test_a_solver_equals_its_plain_formula(name, options, warper, on_step):
    plain = run(getattr(plain_code_solvers, name), name, "cpu", warper=warper, on_step=on_step, **options)
    assert torch.equal(run(SOLVERS[name], name, "cpu", warper=warper, on_step=on_step, **options), plain)
    assert (plain < K).all()
    with FakeDeviceMode():
        elsewhere = run(SOLVERS[name], name, DEVICE, warper=warper, on_step=on_step, **options)
    assert torch.equal(elsewhere, plain)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_the_numbers_of_revealed_codes_are_those_of_the_formula(steps, schedule):
    process, times, num_masked = AbsorbingDiffusion(K, None, schedule), even_times(steps), torch.arange(40)
    plain = [plain_code_solvers.num_unmasked(process, num_masked, times, i + 1) for i in range(steps)]
    assert torch.equal(num_unmasked(process, num_masked, times), torch.stack(plain, 1))


def test_codes_left_are_those_after_the_most_confident():
    order = torch.tensor([[3, 1, 0, 2], [2, 0, 1, 3], [0, 1, 2, 3]])
    places = find_left(order, torch.tensor([1, 2, 2]), torch.tensor([3, 2, 4]))
    assert places.tolist() == [1, 0, 4 + 2, 4 + 3]  # the second grid has none left
