"""Sampling and likelihoods of the ddpm sampler."""

import pytest
import torch
from torch import Tensor

from diffusion.edm import EDM
from diffusion.rng import Streams
from diffusion.spacing import step_times
from helpers.gaussian_recorder import SHAPE, Call, Recorder, images, perturb, sample_recorded, sampler
from train.samplers import NotFiniteError, ddpm
from train.samplers._process import solver_times
from train.spaces import EditInput


def by_label(call: Call) -> Tensor:
    """0.1 for each class from 1 on, 0 for the null."""
    numbers = [0.0 if label is None else 0.1 * (label + 1) for label in call.condition.rows]
    return torch.tensor(numbers).view(-1, 1, 1, 1).expand_as(call.x)


def x0_sampler(**settings):
    return sampler(prediction="x0", variance="fixed_small", **settings)


def test_without_guidance_the_network_is_called_once_a_step():
    recorder = Recorder(by_label)
    sample_recorded(x0_sampler(), recorder, sample_steps=3)
    assert len(recorder.calls) == 3
    assert all(torch.equal(call.condition["fields"]["label"], torch.tensor([2, 2])) for call in recorder.calls)
    assert all(call.drop is None for call in recorder.calls)


def test_guidance_extrapolates_from_one_joint_call():
    recorder, trajectory = Recorder(by_label), []
    sample_recorded(x0_sampler(), recorder, sample_steps=3, guidance=2.0, seen=trajectory)
    assert [call.condition.rows for call in recorder.calls] == 3 * [[None, None, 2, 2]]  # in one call
    for _, predicted in trajectory:
        assert torch.allclose(predicted, torch.tensor(0.6))  # 0 + 2 (0.3 - 0)


def test_guidance_applies_within_its_interval():
    recorder, trajectory = Recorder(by_label), []
    sample_recorded(x0_sampler(), recorder, sample_steps=5, guidance=2.0, guidance_interval=(0.3, 0.7), seen=trajectory)
    assert [round(t, 3) for t, _ in trajectory] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [round(x0.mean().item(), 5) for _, x0 in trajectory] == pytest.approx([0.3, 0.3, 0.6, 0.6, 0.3])
    assert [len(call.x) for call in recorder.calls] == [2, 2, 4, 4, 2]


@pytest.mark.parametrize(
    ("process", "interval", "message"),
    [
        ("gaussian", (30.0, 79.0), "wanted two times from 0 to 1, the lower first"),
        ("gaussian", (0.21, 0.39), "which holds none of the 5 steps from t = 1 on"),
        ("edm", (0.0, 1e-4), "which holds none of the 5 steps from t = 80 on"),
    ],
)
def test_an_interval_that_guides_nothing_is_refused(process, interval, message):
    settings = {"sample_steps": 5, "guidance": 2.0, "guidance_interval": interval}
    with pytest.raises(ValueError, match=message):
        sample_recorded(sampler(process=process), Recorder(), **settings)
    sample_recorded(sampler(process="edm"), Recorder(), **settings | {"guidance_interval": (30.0, 80.0)})


def test_samples_that_are_not_finite_name_the_settings():
    network = Recorder(lambda call: call.x.new_full(call.x.shape, torch.nan if call.t.min() < 500 else 0.0))
    with pytest.raises(NotFiniteError, match="solver ddim with sample_steps 5, guidance 1.0, eta 0.5 gave") as error:
        sample_recorded(x0_sampler(), network, solver="ddim", sample_steps=5, eta=0.5)
    assert error.value.x.isnan().all()


def test_a_rescaled_guidance_has_the_spread_of_the_condition():
    pattern = torch.linspace(-0.1, 0.1, 16).view(1, 1, 4, 4).expand(2, -1, -1, -1)
    recorder, trajectory = Recorder(lambda call: call.condition.scaled(pattern[:1], {True: 3, False: 1})), []
    sample_recorded(x0_sampler(), recorder, sample_steps=1, guidance=2.0, guidance_rescale=1.0, seen=trajectory)
    assert torch.allclose(trajectory[0][1], 3 * pattern, atol=1e-6)  # 5 times, rescaled to 3
    sample_recorded(x0_sampler(), recorder, sample_steps=1, guidance=2.0, seen=trajectory)
    assert torch.allclose(trajectory[1][1], 5 * pattern, atol=1e-6)


@pytest.mark.parametrize(
    ("pixels", "options", "largest"),
    [
        (True, {}, 1.0),
        (True, {"clip": False}, 3.0),
        (True, {"clip": False, "dynamic_threshold": 1.0}, 1.0),
        (False, {}, 3.0),
        (False, {"dynamic_threshold": 1.0}, 3.0),
    ],
)
def test_pixels_are_clipped_on_request_and_latents_never(pixels, options, largest):
    trajectory = []
    pattern = torch.linspace(-3, 3, 16).view(1, 1, 4, 4).expand(2, -1, -1, -1)
    sample_recorded(x0_sampler(pixels=pixels), Recorder(pattern), sample_steps=2, seen=trajectory, **options)
    for _, x0 in trajectory:
        assert x0.abs().max() == pytest.approx(largest)
        expected = pattern if largest == 3 else pattern / 3 if "dynamic_threshold" in options else pattern.clamp(-1, 1)
        assert torch.allclose(x0, expected, atol=1e-5)


def test_clipping_comes_after_guidance():
    trajectory = []
    sample_recorded(x0_sampler(), Recorder(by_label), sample_steps=2, guidance=10.0, seen=trajectory)
    assert all((x0 == 1).all() for _, x0 in trajectory)


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m", "unipc"])
def test_eta_is_refused_by_solvers_without(solver):
    with pytest.raises(ValueError, match=f"got eta 0.5 for solver {solver}.*--eta"):
        sample_recorded(x0_sampler(), Recorder(), solver=solver, eta=0.5)


@pytest.mark.parametrize(("solver", "default"), [("ddim", 0.0), ("dpmpp_2m_sde", 1.0)])
def test_eta_defaults_to_the_solvers_own(solver, default):
    model, options = x0_sampler(), {"solver": solver, "sample_steps": 4, "clip": False}
    images = {
        eta: sample_recorded(model, Recorder(lambda call: 0.5 * call.x), eta=eta, **options) for eta in (None, 0.0, 1.0)
    }
    assert torch.equal(images[None], images[default])
    assert not torch.allclose(images[0.0], images[1.0], atol=1e-3)


@pytest.mark.parametrize("process", ["gaussian", "edm", "flow"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_default_steps_and_spacing_follow_solver_and_process(process, solver):
    model = sampler(process=process, total_steps=30)
    steps = 30 if (solver, process) == ("ddpm", "gaussian") else 20
    spacing = "karras" if process == "edm" else "uniform"
    options = ddpm.Sampling(solver=solver)
    assert solver_times(model.process, model.process, options, 64) == step_times(model.process, steps, spacing)
    options = ddpm.Sampling(solver=solver, sample_steps=7, spacing="logsnr")
    custom = solver_times(model.process, model.process, options, 64)
    assert custom == step_times(model.process, 7, "logsnr")
    trajectory = []
    sample_recorded(model, Recorder(channels=2 if process == "gaussian" else 1), solver=solver, seen=trajectory)
    times = [t for t, _ in trajectory]
    assert len(times) == steps and times[0] == pytest.approx(80 if process == "edm" else 1)
    if process == "edm":  # equal steps in sigma^(1/7)
        roots = torch.tensor(times, dtype=torch.float64) ** (1 / 7)
        assert torch.allclose(roots.diff(), roots.diff().mean().expand(19), rtol=1e-4)
    else:
        assert times == pytest.approx([1 - k / steps for k in range(steps)])


def test_a_canvas_of_another_size_is_sampled_in_one_pass():
    recorder = Recorder(channels=1)
    batch, options = {"label": torch.tensor([1])}, ddpm.Sampling(sample_steps=2)
    x = x0_sampler().sample(recorder, Streams([0]), batch=batch, options=options, shape=(6, 10))
    assert x.shape == (1, 1, 6, 10) and all(call.x.shape == x.shape for call in recorder.calls)
    with pytest.raises(ValueError, match="window_stride 2.*leave it out"):
        x0_sampler().sample(recorder, Streams([0]), batch=batch, options=options, window_stride=2)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("process", ["gaussian", "edm", "flow"])
def test_samples_do_not_depend_on_the_batch(solver, process):
    model, network = perturb(sampler(process=process))
    options = {"solver": solver, "sample_steps": 4, "guidance": 1.5}
    together = sample_recorded(model, network, labels=(0, 3, 4), seeds=(7, 8, 9), **options)
    single = [sample_recorded(model, network, labels=(k,), seeds=(s,), **options) for k, s in ((0, 7), (3, 8), (4, 9))]
    assert torch.allclose(together, torch.cat(single), atol=1e-3)  # rounding, which the solver enlarges
    assert (together[0] - together[1]).abs().max() > 0.01


def test_edm_starts_from_noise_of_its_own_scale():
    recorder = Recorder()
    sample_recorded(sampler(process="edm"), recorder, labels=(0,) * 64, seeds=range(64), sample_steps=1)
    assert recorder.calls[0].x.std() == pytest.approx(1, rel=0.05)  # 80 over sqrt(80^2 + 0.5^2)


def test_the_noise_levels_of_edm_are_settings_of_sampling():
    model, recorder, levels = sampler(process="edm"), Recorder(), {"sigma_min": 0.01, "sigma_max": 50.0, "rho": 5.0}
    sample_recorded(model, recorder, labels=(0,) * 64, seeds=range(64), sample_steps=7, **levels)
    expected = step_times(EDM(start=50.0, end=0.01), 7, "karras", 5.0)
    sigmas = [(4 * call.t[0]).exp().item() for call in recorder.calls]
    assert sigmas == pytest.approx(expected[:-1], rel=1e-4)
    assert (sigmas[0], sigmas[-1]) == pytest.approx((50, 0.01), rel=1e-4)
    assert recorder.calls[0].x.std() == pytest.approx(1, rel=0.05)  # 50 over sqrt(50^2 + 0.5^2)
    same = ddpm.Sampling(sigma_min=EDM.end, sigma_max=EDM.start, rho=7.0)
    by_default, same = (solver_times(model.process, model.process, each, 64) for each in (ddpm.Sampling(), same))
    assert same == by_default
    sample_recorded(model, Recorder(), sample_steps=2, guidance=2.0, guidance_interval=(0.0, 90.0), sigma_max=100.0)


def test_editing_takes_the_steps_below_its_own_noise_level():
    model, recorder = sampler(process="edm"), Recorder()
    x0, keep = torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE[1:], dtype=torch.bool)
    options = ddpm.Sampling(sample_steps=7, sigma_max=50.0, rho=5.0)
    model.sample(recorder, Streams([0]), options=options, edit=EditInput(x0, keep, 0.5))  # sigma = alpha = 1
    times = step_times(EDM(start=50.0), 7, "karras", 5.0)
    assert len(recorder.calls) == sum(0 < t <= 1 for t in times) and recorder.calls[0].t.item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        ("gaussian", {"sigma_max": 50.0}, "got sigma_max 50.0 for process gaussian.*leave --sigma_max out"),
        ("flow", {"sigma_min": 0.1}, "got sigma_min 0.1 for process flow.*leave --sigma_min out"),
        ("flow", {"last_state": "first"}, "got last_state first for process flow: pass --last_state clean"),
        ("gaussian", {"sigma_max": 0.5, "guidance_interval": (0.0, 1.0)}, "got sigma_max 0.5 for process gaussian"),
        (
            "edm",
            {"sigma_min": 90.0},
            r"got sigma_min 90.0, wanted .* below sigma_max \(default: 80.0\)",
        ),
        (
            "edm",
            {"sigma_min": 0.1, "spacing": "uniform"},
            "got sigma_min 0.1 for spacing uniform.*--sigma_min out",
        ),
        ("edm", {"rho": 5.0, "spacing": "logsnr"}, "got rho 5.0 for spacing logsnr.*--rho"),
        ("edm", {"rho": 0.5}, r"got rho 0.5, wanted a number in \[1, 1000\]"),
        ("edm", {"s_churn": 40.0, "solver": "unipc"}, "got s_churn 40.0 for solver unipc.*--s_churn"),
        ("flow", {"s_churn": 40.0, "solver": "heun"}, "got s_churn 40.0 for RectifiedFlow.*--s_churn"),
    ],
)
def test_settings_of_edm_are_refused_elsewhere(process, options, message):
    with pytest.raises(ValueError, match=message):
        sample_recorded(sampler(process=process), Recorder(), **options)


def test_churn_changes_samples_of_heun():
    model, network = perturb(sampler(process="edm"))
    plain, churned, again = (
        sample_recorded(model, network, solver="heun", sample_steps=4, s_churn=s_churn)
        for s_churn in (None, 10.0, 10.0)
    )
    assert torch.equal(churned, again) and (plain - churned).abs().max() > 0.01


# likelihood


def test_the_likelihood_is_conditional_and_takes_nfe_calls():
    for calls, expected in ((None, 20), (6, 6)):
        recorder, batch = Recorder(channels=2), images(3)
        bound = sampler().log_likelihood(recorder, batch, Streams([0, 1, 2]), calls)
        assert bound.total.shape == (3,) and len(recorder.calls) == expected
        assert all(torch.equal(call.condition["fields"]["label"], batch["label"]) for call in recorder.calls)


def test_the_bound_clips_predictions_as_sampling_does():
    batch = images(3)
    settings = {"prediction": "x0", "variance": "fixed_small"}
    bounds = [
        sampler(**settings).log_likelihood(Recorder(answer), batch, Streams([0, 1, 2]), 6).total for answer in (1, 9)
    ]
    assert torch.equal(*bounds)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_processes_without_steps_are_measured_along_their_flow(process):
    recorder, batch = Recorder(lambda call: 0.1 * call.x), images(3)
    result = sampler(process=process).log_likelihood(recorder, batch, Streams([0, 1, 2]), 5)
    assert result.total.shape == (3,) and result.terms.shape == (3, 0) and result.total.isfinite().all()
    assert len(recorder.calls) == 10  # Heun
    times = torch.stack([call.t for call in recorder.calls])
    sigma = (4 * times).exp() if process == "edm" else times / (1 - times)  # relative to the data
    assert sigma.min() == pytest.approx(1 / 255, rel=1e-4)  # not lower: networks recognise the levels of 8-bit images
    assert all(torch.equal(call.condition["fields"]["label"], batch["label"]) for call in recorder.calls)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_the_flow_of_a_known_gaussian_has_its_entropy(process):
    """For data N(0, 0.25) the optimal network and the bits of 8-bit images are known."""
    model = sampler(process=process, n_classes=0)
    variance = 0.25

    def optimal_output(call: Call) -> Tensor:
        if process == "edm":  # sigma_data is that of the data: the skip connection alone gives the mean of x0
            return 0 * call.x
        w = call.t.view(-1, 1, 1, 1)
        x0 = (1 - w) * variance / ((1 - w) ** 2 * variance + w**2) * call.x
        return (call.x - x0) / w

    n = 64
    x0 = (Streams(list(range(n))).normal((n, *SHAPE)) * variance**0.5).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    result = model.log_likelihood(Recorder(optimal_output), {"x0": x0}, Streams(list(range(n))), 40).total
    density = torch.distributions.Normal(0.0, variance**0.5).log_prob(x0).flatten(1).mean(1)
    expected = -(density / torch.tensor(2.0).log()) - torch.log2(torch.tensor(2 / 255))
    assert result.mean() == pytest.approx(expected.mean().item(), abs=0.03)
    assert torch.corrcoef(torch.stack([result, expected]))[0, 1] > 0.99
