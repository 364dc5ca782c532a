"""Solvers of Gaussian processes: with perfect denoisers of known data, and against their papers' formulas."""

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.edm import EDM
from diffusion.flow import RectifiedFlow
from diffusion.gaussian import GaussianDiffusion, cosine, linear, with_zero_terminal_snr
from diffusion.gaussian_solvers import ddim
from diffusion.rng import Streams
from diffusion.solvers import get_solver, solvers_for
from diffusion.spacing import SPACINGS
from helpers.fake_device import DEVICE, FakeDeviceMode
from helpers.parametrize import slow_after
from helpers.solving import solve_in_steps
from helpers.toy_gaussians import NORMAL, TWO, Circle, Mixture, convergence_order, sampled_variance

PROCESS = GaussianDiffusion(linear(1000), variance="fixed_small")
SOLVERS = solvers_for(EDM())  # those of every process
every_solver = pytest.mark.parametrize("name", SOLVERS)
PROCESSES = {
    "linear": PROCESS,
    "cosine": GaussianDiffusion(cosine(1000)),
    "zero_terminal_snr": GaussianDiffusion(with_zero_terminal_snr(cosine(1000)), "v"),
    "circle": Circle(),
    "flow": RectifiedFlow(),
    "edm": EDM(),
}
GRID = torch.linspace(-2, 2, 25, dtype=torch.float64).view(1, 1, 5, 5)


def solve(name, process, data, x, steps, **options):
    return solve_in_steps(
        SOLVERS[name].solve,
        data.denoiser(process),
        process,
        x,
        steps=steps,
        rng=Streams(list(range(len(x)))),
        **options,
    )


# The registry


def test_the_solvers_are_found_and_what_is_none_is_not():
    assert SOLVERS.keys() == {"ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"}
    assert get_solver(PROCESS, "ddim").solve is ddim


def test_a_solver_serves_the_subclasses_of_its_process():
    assert solvers_for(Circle()) == SOLVERS
    assert solvers_for(PROCESS).keys() == SOLVERS.keys() | {"plms", "euler"}
    absorbing = solvers_for(AbsorbingDiffusion(3))
    assert "ancestral" in absorbing and not absorbing.keys() & SOLVERS.keys()
    assert not solvers_for("no process")

    class Child(AbsorbingDiffusion):
        pass

    assert solvers_for(Child(3)) == absorbing


# Properties of every solver


@every_solver
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_one_certain_image_is_met_exactly_from_any_noise(name, process, steps):
    certain = Mixture((1.0,), (0.4,), 0.0)
    for spacing in ("uniform", "logsnr"):
        x = solve(name, process, certain, GRID * process.start, steps, spacing=spacing)
        assert x.dtype == torch.float64 and torch.allclose(x, torch.full_like(x, 0.4))


@every_solver
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("spacing", slow_after(3, SPACINGS))
def test_all_stays_finite_in_float32(name, process, spacing):
    for steps in (2, 3, 40):
        x = solve(name, process, TWO, GRID.float() * process.start, steps, spacing=spacing)
        assert x.dtype == torch.float32 and torch.isfinite(x).all() and x.abs().max() < 5


@pytest.mark.parametrize(
    "name, steps, tolerance",
    [("ddpm", 250, 0.04), ("ddim", 250, 0.02), ("heun", 50, 0.02), ("dpmpp_2m", 50, 0.02), ("dpmpp_2m_sde", 150, 0.02)]
    + [("unipc", 50, 0.02)],
)
def test_samples_have_the_moments_of_a_mixture(name, steps, tolerance):
    x = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    x = solve(name, PROCESS, TWO, x, steps, spacing="uniform" if name == "ddpm" else "logsnr")
    mean, variance = TWO.moments()
    assert x.mean().item() == pytest.approx(mean, abs=0.02)
    assert x.var().item() == pytest.approx(variance, rel=tolerance)
    assert (x < -0.25).float().mean().item() == pytest.approx(0.3, abs=0.015)


@every_solver
def test_an_image_does_not_depend_on_its_batch(name):
    x, denoise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), TWO.denoiser(PROCESS)
    batched = solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, x, steps=4, rng=Streams([5, 6, 7]))
    single = solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, x[2:], steps=4, rng=Streams([7]))
    assert torch.allclose(batched[2:], single, atol=1e-6)


@every_solver
def test_on_step_sees_and_may_change_x(name):
    recorded, calls = [], []

    def denoise(x, t):
        calls.append((t.tolist(), x[0, 0, 0, 0].item()))
        return NORMAL.denoiser(PROCESS)(x, t)

    def on_step(i, t, s, x, x0_hat):
        recorded.append((i, t, s))
        call_index = {"heun": 2 * i}.get(name, i if name != "unipc" else 2 * i)  # unipc evaluates again after a change
        assert calls[call_index][0] == pytest.approx([t, t])
        if i == 0:
            assert torch.allclose(x0_hat, NORMAL.denoiser(PROCESS)(noise, torch.ones(2)).x0)
        x = x.clone()
        x[..., 0, 0] = 7 + i
        return x

    noise = GRID.expand(2, 1, 5, 5)
    x = solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, noise, steps=4, rng=Streams([1, 2]), on_step=on_step)
    assert recorded == [(0, 1, 0.75), (1, 0.75, 0.5), (2, 0.5, 0.25), (3, 0.25, 0)]
    assert (x[..., 0, 0] == 10).all()
    assert {7.0, 8.0, 9.0} <= {value for _, value in calls}  # the next step starts from the returned x


@every_solver
@pytest.mark.parametrize("on_step", [None, lambda i, t, s, x, x0_hat: x], ids=["alone", "watched"])
def test_the_network_is_called_once_per_step_and_by_heun_twice(name, on_step):
    calls = []

    def denoise(x, t):
        calls.append(t.item())
        return TWO.denoiser(PROCESS)(x, t)

    solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, GRID, steps=4, rng=Streams([1]), on_step=on_step)
    assert calls == ([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25] if name == "heun" else [1, 0.75, 0.5, 0.25])


@every_solver
def test_a_solver_leaves_nothing_on_another_device(name):
    def run(device):
        def denoise(x, t):
            assert x.device == device and t.device.type == "cpu" and t.dtype == torch.float32 and t.shape == (2,)
            return PROCESS.to_prediction(x, x, t)

        x, rng = torch.ones(2, 1, 4, 4, device=device), Streams([1, 2], device)
        return solve_in_steps(SOLVERS[name].solve, denoise, PROCESS, x, steps=3, rng=rng)

    with FakeDeviceMode():
        result = run(DEVICE)
        assert result.device == DEVICE and torch.equal(result.cpu(), run(torch.device("cpu")))


# Orders


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_a_deterministic_solver_converges_with_its_order(name, order):
    """In uniform steps of t the second-order error has a logarithmic factor: some log-SNR steps do not shrink."""
    process, exact = Circle(), 0.3 + 0.5 * GRID  # the flow takes N(0, 1) to N(0.3, 0.5^2)
    errors = {n: (solve(name, process, NORMAL, GRID, n) - exact).abs().max().item() for n in (64, 128, 256, 512)}
    assert convergence_order(errors) == pytest.approx(order, abs=0.1 if order == 1 else 0.4)
    assert errors[512] < {1: 3.5e-3, 2: 2e-4}[order]


@pytest.mark.parametrize("process", [PROCESSES["linear"], PROCESSES["edm"], PROCESSES["flow"]])
@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_the_order_holds_to_the_last_step_on_other_processes(name, order, process):
    """With logsnr spacing, whose last step to 0 does not shrink: x is taken before it. UniPC gains one order."""
    start = GRID * process.start

    def error(steps):
        states = {}
        solve(
            name, process, NORMAL, start, steps, spacing="logsnr", on_step=lambda i, t, s, x, _: states.setdefault(s, x)
        )
        last = sorted(states)[1]
        (a, b), (c, d) = (
            (process.alpha(t), (process.alpha(t) ** 2 * 0.25 + process.sigma(t) ** 2).sqrt())
            for t in (torch.tensor(process.start), torch.tensor(last))
        )
        exact = 0.3 * c + d / b * (start - 0.3 * a)
        return (states[last] - exact).abs().max().item()

    assert convergence_order({steps: error(steps) for steps in (41, 81, 161, 321)}) == pytest.approx(order, abs=0.4)


def test_second_order_solvers_beat_ddim_in_forty_steps():
    exact = solve("dpmpp_2m", Circle(), TWO, GRID, 2000)
    error = {name: (solve(name, Circle(), TWO, GRID, 40) - exact).abs().mean() for name in SOLVERS}
    assert all(error[name] < error["ddim"] / 2 for name in ("heun", "dpmpp_2m", "unipc"))


@pytest.mark.parametrize(
    "name, options, order",
    [("ddpm", {}, 1), ("ddim", {"eta": 0.5}, 1), ("ddim", {"eta": 1.0}, 1), ("dpmpp_2m_sde", {}, 1)],
)
def test_the_variance_of_stochastic_solvers_is_first_order(name, options, order):
    data = Mixture((1.0,), (0.0,), 0.25)
    errors = {
        n: abs(sampled_variance(SOLVERS[name].solve, Circle(), data, n, **options) - 0.25) for n in (20, 40, 80, 160)
    }
    assert convergence_order(errors) > order - 0.2
    assert errors[160] < 0.015


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde"])
@pytest.mark.parametrize("eta", [1.5, -1.0])
def test_an_eta_beyond_ancestral_is_refused(name, eta):
    with pytest.raises(ValueError, match=f"got eta {eta}, wanted 0"):
        solve(name, PROCESS, NORMAL, GRID, 3, eta=eta)
