"""How UNet, process and images meet in the Gaussian sampler: a network that records stands in the UNet's place."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from diffusion.kernels import like
from diffusion.rng import Streams, seed_of
from diffusion.solvers import solvers_of
from diffusion.timesteps import uniform
from train.data import Draws
from train.samplers import ddpm

SHAPE, CLASSES = (1, 4, 4), 5
SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1, "total_steps": 20}
CPU = torch.device("cpu")


class Call(NamedTuple):
    x: Tensor
    t: Tensor
    condition: Any
    drop: Any


class Recorder(nn.Module):
    """Remembers what it was shown and told. Answers with `answer`: a number, a tensor, or a function of the call."""

    def __init__(self, answer=0.0, channels: int = 1):
        super().__init__()
        self.answer, self.channels, self.calls = answer, channels, []

    def encode(self, fields, x, drop=None):
        return {"told": dict(fields)}

    def forward(self, x, t, condition=None, drop=None):
        self.calls.append(Call(x.clone(), t.clone(), condition, drop))
        answer = self.answer(self.calls[-1]) if callable(self.answer) else self.answer
        if isinstance(answer, Tensor):
            return answer
        return torch.full((len(x), self.channels, *x.shape[2:]), float(answer))


def sampler(n_classes: int = CLASSES, pixels: bool = True, **settings):
    torch.manual_seed(0)
    return ddpm.build(ddpm.Config(**SMALL | settings), shape=SHAPE, pixels=pixels, n_classes=n_classes)


def moved(built):
    """Its network off the constant 0 that it begins as."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built, built.network.eval()


def images(n: int, first: int = 0) -> dict[str, Tensor]:
    """A batch at those positions; an image is a function of its position."""
    places = range(first, first + n)
    x0 = Streams([seed_of("image", i) for i in places]).uniform((n, *SHAPE)) * 2 - 1
    return {"x0": x0, "label": torch.tensor(places) % CLASSES, "position": torch.tensor(places)}


def draws(batch, seed: int = 0, batch_size: int | None = None):
    return Draws(seed, batch, batch_size or len(batch["position"]), CPU)


def recorded(built, n=40, training=True, answer=0.0, batch=None):
    """A loss at a recording network, and its one call."""
    channels = 2 if built.process.variance == "learned_range" else 1
    recorder, batch = Recorder(answer, channels).train(training), batch or images(n)
    loss = built.loss(recorder, batch, draws(batch))
    (call,) = recorder.calls
    return loss, call


# what the network is told and shown


def test_gaussian_counts_its_steps_from_0_and_shows_x_t():
    built = sampler()
    loss, call = recorded(built, n=20)
    assert sorted(call.t.tolist()) == list(range(20))  # low_discrepancy: each of the T steps once in T examples
    i = (loss.outputs["t"] * 20).round().long()
    assert torch.equal(call.t.long(), i - 1)
    assert torch.equal(call.x, loss.outputs["x_t"])
    abar = built.process.abar[i].view(-1, 1, 1, 1)
    wanted = abar.sqrt() * loss.outputs["x0"] + (1 - abar).sqrt() * loss.outputs["noise"]
    assert torch.allclose(call.x, wanted.float(), atol=1e-6)


def test_edm_is_told_a_quarter_of_log_sigma_and_shown_x_of_unit_size():
    loss, call = recorded(sampler(process="edm", sigma_data=0.7))
    sigma = loss.outputs["t"]
    assert torch.allclose(call.t, sigma.log() / 4)
    assert torch.allclose(call.x, loss.outputs["x_t"] / (sigma**2 + 0.7**2).sqrt().view(-1, 1, 1, 1))
    assert torch.allclose(loss.outputs["x_t"], loss.outputs["x0"] + sigma.view(-1, 1, 1, 1) * loss.outputs["noise"])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_told_the_share_of_noise(shift):
    loss, call = recorded(sampler(process="flow", time_shift=shift))
    t = loss.outputs["t"]
    assert torch.allclose(call.t, shift * t / (1 + (shift - 1) * t))
    noise, x0, w = loss.outputs["noise"], loss.outputs["x0"], call.t.view(-1, 1, 1, 1)
    assert torch.allclose(call.x, (1 - w) * x0 + w * noise, atol=1e-6)


def test_time_embedding_noise_level_tells_what_is_left_of_the_data():
    built = sampler(time_embedding="noise_level")
    loss, call = recorded(built, n=20)
    i = (loss.outputs["t"] * 20).round().long()
    assert torch.allclose(call.t, built.process.abar[i].sqrt().float()) and call.t.dtype == torch.float32
    loss, call = recorded(sampler(process="flow", time_embedding="noise_level"))
    assert torch.allclose(call.t, 1 - loss.outputs["t"], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1),
        ({"time_embedding": "noise_level"}, 1000),
        ({"process": "edm"}, 1),
        ({"process": "flow"}, 1000),
        ({"process": "flow", "time_embedding": "noise_level"}, 1000),
        ({"process": "edm", "time_scale": 2.5}, 2.5),
        ({"process": "flow", "time_scale": 1.0}, 1),
    ],
)
def test_what_lies_in_0_to_1_is_embedded_as_if_it_counted_to_1000(settings, scale):
    assert sampler(**settings).network.config.time_scale == scale


@pytest.mark.parametrize(("variance", "channels"), [("auto", 2), ("fixed_small", 1), ("fixed_large", 1)])
def test_a_learned_variance_doubles_the_channels_out(variance, channels):
    built = sampler(variance=variance)
    assert built.network(torch.zeros(2, *SHAPE), torch.zeros(2)).shape == (2, channels, 4, 4)
    assert built.loss_options["kind"] == ("hybrid" if channels == 2 else "simple")  # loss_type auto


def test_every_setting_of_the_network_reaches_it():
    settings = {"dropout": 0.2, "resblock_updown": True, "scale_shift": False, "scale_skip": True, "head_width": 4}
    settings |= {"attn_block_type": "neighborhood", "middle_attn_block_type": "none", "kernel_sizes": (3,)}
    settings |= {"dilations": (2,), "na_backend": "dense", "feed_forward": "gelu", "res_blocks": 2}
    found = sampler(activation_checkpointing=True, **settings).network.config
    assert {name: getattr(found, name) for name in settings} == settings
    assert found.checkpoint and (found.in_channels, found.out_channels, found.n_classes) == (1, 2, CLASSES)
    assert not sampler().network.config.checkpoint


def test_betas_are_those_asked_for():
    settings = {"schedule": "linear", "total_steps": 1000}
    papers = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al. 2020
    assert torch.allclose(sampler(**settings).process.abar[1:], (1 - papers).cumprod(0))
    asked = torch.linspace(2e-4, 0.01, 1000, dtype=torch.float64)
    found = sampler(first_beta=2e-4, last_beta=0.01, **settings).process.abar[1:]
    assert torch.allclose(found, (1 - asked).cumprod(0))


# what is dropped


def test_each_condition_is_dropped_apart_in_its_own_share():
    n, built = 4000, sampler(conditions=("image",), condition_channels=2, label_drop=0.4, condition_drop=0.25)
    assert built.fields == ("condition_image", "label")
    batch = images(n) | {"condition_image": torch.rand(n, 2, 4, 4)}
    _, call = recorded(built, batch=batch)
    assert set(call.condition) == {"label", "image"}
    assert torch.equal(call.condition["label"], batch["label"])  # raw: the encoders put the nulls in
    assert torch.equal(call.condition["image"], batch["condition_image"])
    label, image = call.drop["label"], call.drop["image"]
    assert label.dtype == image.dtype == torch.bool
    for found, wanted in ((label, 0.4), (image, 0.25), (label & image, 0.1)):  # independent
        assert abs(found.double().mean() - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5
    _, call = recorded(sampler(label_drop=0.0), n=200)
    assert not call.drop["label"].any()


def test_a_real_network_sees_the_null_where_a_label_is_dropped():
    """Where a label is dropped, another label changes nothing; elsewhere it does."""
    built, network = moved(sampler(label_drop=0.9))
    one, other = images(30), images(30)
    other["label"] = (other["label"] + 1) % CLASSES
    outputs = [built.loss(network, b, draws(b)).outputs["prediction"] for b in (one, other)]
    same = (outputs[0] == outputs[1]).flatten(1).all(1)
    dropped = draws(one)("label").uniform((30,)) < 0.9
    assert torch.equal(same, dropped) and 0 < dropped.sum() < 30


def test_without_classes_labels_are_not_told():
    for built in (sampler(n_classes=0), sampler(class_conditional=False)):
        assert built.fields == () and built.n_classes == 0
        _, call = recorded(built, n=4)
        assert call.condition == {} and call.drop == {}


def test_a_field_that_a_batch_lacks_is_named():
    built, batch = sampler(conditions=("image",)), images(2)
    with pytest.raises(ValueError, match="conditions need condition_image.*--adapt"):
        built.loss(Recorder(channels=2), batch, draws(batch))
    with pytest.raises(ValueError, match="conditions need condition_image, label"):
        built.loss(Recorder(channels=2), {"x0": batch["x0"]}, draws(batch))


# the loss

PROCESSES = [
    {"prediction": "eps"},
    {"prediction": "x0", "variance": "fixed_small"},
    {"prediction": "v", "variance": "fixed_large", "loss_type": "min_snr", "min_snr_gamma": 2.0},
    {"prediction": "v", "schedule": "linear", "last_beta": 0.01, "loss_type": "vlb"},
    {"prediction": "v", "zero_terminal_snr": True, "loss_type": "simple"},
    {"process": "edm", "time_sampler": "uniform"},
    {"process": "flow", "time_shift": 2.0},
]


@pytest.mark.parametrize("settings", PROCESSES)
def test_the_loss_is_the_processs_at_these_draws(settings):
    built, batch = sampler(**settings), images(12)
    loss, call = recorded(built, batch=batch, answer=0.3)
    noise = draws(batch)("noise").normal(batch["x0"].shape)  # from each position's own stream
    assert torch.equal(noise, loss.outputs["noise"])
    options = {}
    if "process" not in settings:
        auto = "simple" if settings.get("variance", "").startswith("fixed") else "hybrid"
        options = {"kind": settings.get("loss_type", auto), "gamma": settings.get("min_snr_gamma", 5.0)}
    wanted = built.process.loss(loss.outputs["prediction"], batch["x0"], noise, loss.outputs["t"], **options)
    assert torch.equal(loss.per_example, wanted.per_example)
    assert torch.equal(loss.outputs["loss"], wanted.per_example)
    assert loss.metrics.keys() == wanted.metrics.keys()
    if options.get("kind") == "simple" and settings["prediction"] == "x0":
        assert torch.allclose(loss.per_example, (batch["x0"] - 0.3).square().flatten(1).mean(1))


def truth(built, x0, noise, t):
    """What a network that knows x0 and the noise would say, in the words of each paper."""
    alpha, sigma = like(built.process.alpha(t), x0), like(built.process.sigma(t), x0)
    data = getattr(built.process, "sigma_data", 1.0)  # edm's alone
    return {
        "eps": noise,
        "x0": x0,
        "v": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "edm": (x0 - data**2 / (data**2 + sigma**2) * (x0 + sigma * noise))
        * (sigma**2 + data**2).sqrt()
        / (sigma * data),
    }[built.config.prediction if built.config.process == "gaussian" else built.config.process]


@pytest.mark.parametrize("settings", PROCESSES)
def test_who_says_the_truth_has_no_error_and_means_x0(settings):
    built, batch = sampler(**settings), images(12)
    learned = built.process.variance == "learned_range"
    outputs = recorded(built, batch=batch)[0].outputs
    said = truth(built, batch["x0"], outputs["noise"], outputs["t"])
    said = torch.cat([said, torch.zeros_like(said)], 1) if learned else said
    loss, _ = recorded(built, batch=batch, answer=said)
    assert loss.metrics["mse"].abs().max() < 1e-6
    assert torch.allclose(built.x0_hat(loss.outputs), batch["x0"], atol=1e-4)


# the times


@pytest.mark.parametrize("parts", [(12,), (4, 4, 4), (3, 1, 8)])
@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_low_discrepancy_covers_every_stratum_whatever_the_split(parts, process):
    built = sampler(process=process, total_steps=12 if process == "gaussian" else 1000)
    for first in (24, 36):
        whole = recorded_times(built, images(12, first), 12)
        found, place = [], first
        for part in parts:
            found.append(recorded_times(built, images(part, place), 12))
            place += part
        assert torch.equal(torch.cat(found), whole)
        share = whole if process == "gaussian" else torch.special.ndtr(whole.logit())  # uniform on (0, 1]
        assert sorted((share.double() * 12 - 1e-4).ceil().int().tolist()) == list(range(1, 13))
    if process == "flow":  # another step, another offset
        assert not torch.equal(recorded_times(built, images(12, 24), 12), whole)


def recorded_times(built, batch, batch_size):
    recorder = Recorder(channels=2 if built.process.variance == "learned_range" else 1)
    return built.loss(recorder, batch, draws(batch, batch_size=batch_size)).outputs["t"]


def test_uniform_times_are_each_examples_own():
    built = sampler(time_sampler="uniform")
    whole = recorded_times(built, images(12, 24), 12)
    parts = [recorded_times(built, images(1, 24 + i), 12) for i in range(12)]
    assert torch.equal(torch.cat(parts), whole) and len(set(whole.tolist())) > 4


def test_the_times_of_edm_and_flow_have_the_mean_and_the_deviation_asked_for():
    settings = {"time_mean": 0.3, "time_deviation": 0.7}
    for process, start in (("edm", Tensor.log), ("flow", Tensor.logit)):
        numbers = start(recorded(sampler(process=process, **settings), n=2000)[0].outputs["t"])
        assert numbers.mean() == pytest.approx(0.3, abs=0.01) and numbers.std() == pytest.approx(0.7, abs=0.01)
        papers = start(recorded(sampler(process=process), n=2000)[0].outputs["t"])
        assert papers.mean() == pytest.approx(-1.2 if process == "edm" else 0, abs=0.01)


def with_history(built, size=lambda i: i):
    """A sampler whose losses were `size(i)` at t = i/T, each as often as is remembered."""
    steps = built.process.steps
    t = torch.arange(1, steps + 1).repeat_interleave(10) / steps
    built.observe(t, torch.tensor([float(size(i)) for i in range(1, steps + 1)]).repeat_interleave(10))
    return built


def test_loss_second_moment_prefers_large_losses_and_weighs_them_less():
    built, n = with_history(sampler(time_sampler="loss_second_moment", loss_type="vlb")), 4000
    loss, _ = recorded(built, n=n)
    t, weight = loss.outputs["t"], loss.per_example / loss.outputs["loss"]
    p = torch.arange(1, 21) / 210 * 0.999 + 0.001 / 20
    i = (t * 20).round().long()
    found = torch.bincount(i - 1, minlength=20) / n
    assert (found - p).abs().max() < 4 * (0.1 * 0.9 / n) ** 0.5
    assert torch.allclose(weight, 1 / (20 * p[i - 1]), rtol=1e-4)
    assert torch.allclose(loss.metrics["mse"], weight * loss.outputs["noise"].square().flatten(1).mean(1), rtol=1e-4)
    for power in (1, 2):  # means are those of uniform times
        numbers = weight * t**power
        wanted = (torch.arange(1, 21) / 20).pow(power).mean()
        assert abs(numbers.mean() - wanted) < 4 * numbers.std() / n**0.5
    assert abs((t**2).mean() - wanted) > 0.1  # without the weight they are not


def test_validation_has_uniform_times_whatever_was_observed():
    settings = {"time_sampler": "loss_second_moment", "loss_type": "vlb"}
    fresh, seen = sampler(**settings), with_history(sampler(**settings))
    batch = images(64)
    wanted = uniform(seen.process, draws(batch)("time")).t
    for built in (fresh, seen):
        loss, _ = recorded(built, batch=batch, training=False)
        assert torch.equal(loss.outputs["t"], wanted)
        assert torch.equal(loss.per_example, loss.outputs["loss"])
    assert not torch.equal(recorded(seen, batch=batch)[0].outputs["t"], wanted)


def test_what_is_observed_are_losses_without_their_weights():
    built = with_history(sampler(time_sampler="loss_second_moment", loss_type="vlb"))
    loss, _ = recorded(built, n=50)
    built.observe(loss.outputs["t"], loss.outputs["loss"])
    last = {}
    for t, value in zip(loss.outputs["t"].tolist(), loss.outputs["loss"].tolist(), strict=True):
        last[round(t * 20)] = value
    times = built.extras["times"]
    assert {i: times.losses[i - 1, -1].item() for i in last} == pytest.approx(last)


def test_only_times_that_learn_are_kept_in_a_checkpoint():
    assert sampler().extras == {} and sampler(time_sampler="uniform").extras == {}
    (times,) = sampler(time_sampler="loss_second_moment").extras.values()
    assert times.losses.shape == (20, 10)


# sampling


def by_label(call: Call) -> float:
    """0.1 for each class from 1 on, 0 for the null."""
    label = call.condition["told"].get("label")
    return 0.0 if label is None else 0.1 * (float(label[0]) + 1)


def drawn(built, recorder, labels=(2, 2), seeds=(0, 1), seen=None, **options):
    """What it samples; `seen` is filled with (t, predicted x0) of each step."""

    def on_step(i, t, s, x, predicted):
        if seen is not None:
            seen.append((t, predicted.clone()))
        return x

    batch = {"label": torch.tensor(labels)}
    options = ddpm.Sampling(**options)
    return built.sample(recorder, Streams(list(seeds)), batch=batch, options=options, on_step=on_step)


def x0_sampler(**settings):
    return sampler(prediction="x0", variance="fixed_small", **settings)


def test_without_guidance_the_condition_is_told_once_a_step():
    recorder = Recorder(by_label)
    drawn(x0_sampler(), recorder, sample_steps=3)
    assert len(recorder.calls) == 3
    assert all(torch.equal(call.condition["told"]["label"], torch.tensor([2, 2])) for call in recorder.calls)
    assert all(call.drop is None for call in recorder.calls)


def test_guidance_asks_twice_and_goes_beyond_the_condition():
    recorder, seen = Recorder(by_label), []
    drawn(x0_sampler(), recorder, sample_steps=3, guidance=2.0, seen=seen)
    told = [call.condition["told"] for call in recorder.calls]
    assert len(told) == 6 and sum(not each for each in told) == 3  # the null is what encode makes of nothing
    for _, predicted in seen:
        assert torch.allclose(predicted, torch.tensor(0.6))  # 0 + 2 (0.3 - 0)


def test_guidance_is_for_the_times_of_its_interval():
    recorder, seen = Recorder(by_label), []
    drawn(x0_sampler(), recorder, sample_steps=5, guidance=2.0, guidance_interval=(0.3, 0.7), seen=seen)
    assert [round(t, 3) for t, _ in seen] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert [round(x0.mean().item(), 5) for _, x0 in seen] == pytest.approx([0.3, 0.3, 0.6, 0.6, 0.3])
    assert len(recorder.calls) == 5 + 2


def test_a_rescaled_guidance_has_the_spread_of_the_condition():
    pattern = torch.linspace(-0.1, 0.1, 16).view(1, 1, 4, 4).expand(2, -1, -1, -1)
    recorder, seen = Recorder(lambda call: pattern * (3 if call.condition["told"] else 1)), []
    drawn(x0_sampler(), recorder, sample_steps=1, guidance=2.0, guidance_rescale=1.0, seen=seen)
    assert torch.allclose(seen[0][1], 3 * pattern, atol=1e-6)  # 5 times, pulled back to 3
    drawn(x0_sampler(), recorder, sample_steps=1, guidance=2.0, seen=seen)
    assert torch.allclose(seen[1][1], 5 * pattern, atol=1e-6)


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
def test_pixels_are_clipped_where_asked_and_latents_never(pixels, options, largest):
    seen = []
    pattern = torch.linspace(-3, 3, 16).view(1, 1, 4, 4).expand(2, -1, -1, -1)
    drawn(x0_sampler(pixels=pixels), Recorder(pattern), sample_steps=2, seen=seen, **options)
    for _, x0 in seen:
        assert x0.abs().max() == pytest.approx(largest)
        wanted = pattern if largest == 3 else pattern / 3 if "dynamic_threshold" in options else pattern.clamp(-1, 1)
        assert torch.allclose(x0, wanted, atol=1e-5)


def test_clipping_comes_after_guidance():
    seen = []
    drawn(x0_sampler(), Recorder(by_label), sample_steps=2, guidance=10.0, seen=seen)
    assert all((x0 == 1).all() for _, x0 in seen)


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m", "unipc"])
def test_eta_is_refused_by_solvers_without(solver):
    with pytest.raises(ValueError, match=f"got eta 0.5 for solver {solver}.*--eta"):
        drawn(x0_sampler(), Recorder(), solver=solver, eta=0.5)


@pytest.mark.parametrize(("solver", "own"), [("ddim", 0.0), ("dpmpp_2m_sde", 1.0)])
def test_eta_left_out_is_the_solvers_own(solver, own):
    built, options = x0_sampler(), {"solver": solver, "sample_steps": 4, "clip": False}
    images = {eta: drawn(built, Recorder(lambda call: 0.5 * call.x), eta=eta, **options) for eta in (None, 0.0, 1.0)}
    assert torch.equal(images[None], images[own])
    assert not torch.allclose(images[0.0], images[1.0], atol=1e-3)


@pytest.mark.parametrize("process", ["gaussian", "edm", "flow"])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_steps_and_spacing_left_out_are_those_of_solver_and_process(process, solver):
    built = sampler(process=process, total_steps=30)
    steps = 30 if (solver, process) == ("ddpm", "gaussian") else 20
    spacing = "karras" if process == "edm" else "uniform"
    solve, settings = built.solver(ddpm.Sampling(solver=solver))
    assert solve is solvers_of(built.process)[solver]
    assert settings == {"steps": steps, "spacing": spacing}
    given = built.solver(ddpm.Sampling(solver=solver, sample_steps=7, spacing="logsnr"))[1]
    assert given == {"steps": 7, "spacing": "logsnr"}
    seen = []
    drawn(built, Recorder(channels=2 if process == "gaussian" else 1), solver=solver, seen=seen)
    times = [t for t, _ in seen]
    assert len(times) == steps and times[0] == pytest.approx(80 if process == "edm" else 1)
    if process == "edm":  # equal steps in sigma^(1/7)
        roots = torch.tensor(times, dtype=torch.float64) ** (1 / 7)
        assert torch.allclose(roots.diff(), roots.diff().mean().expand(19), rtol=1e-4)
    else:
        assert times == pytest.approx([1 - k / steps for k in range(steps)])


def test_a_canvas_of_another_size_is_drawn_whole():
    recorder = Recorder(channels=1)
    batch, options = {"label": torch.tensor([1])}, ddpm.Sampling(sample_steps=2)
    x = x0_sampler().sample(recorder, Streams([0]), batch=batch, options=options, shape=(6, 10))
    assert x.shape == (1, 1, 6, 10) and all(call.x.shape == x.shape for call in recorder.calls)
    with pytest.raises(ValueError, match="window_stride 2.*leave it out"):
        x0_sampler().sample(recorder, Streams([0]), batch=batch, options=options, window_stride=2)


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("process", ["gaussian", "edm", "flow"])
def test_an_image_is_the_same_whatever_batch_it_is_drawn_in(solver, process):
    built, network = moved(sampler(process=process))
    options = {"solver": solver, "sample_steps": 4, "guidance": 1.5}
    together = drawn(built, network, labels=(0, 3, 4), seeds=(7, 8, 9), **options)
    alone = [drawn(built, network, labels=(k,), seeds=(s,), **options) for k, s in ((0, 7), (3, 8), (4, 9))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-3)  # rounding, which the solver enlarges
    assert (together[0] - together[1]).abs().max() > 0.01


def test_edm_begins_with_its_own_noise():
    recorder = Recorder()
    drawn(sampler(process="edm"), recorder, labels=(0,) * 64, seeds=range(64), sample_steps=1)
    assert recorder.calls[0].x.std() == pytest.approx(1, rel=0.05)  # 80 over sqrt(80^2 + 0.5^2)


# likelihood


def test_a_likelihood_tells_the_condition_and_calls_as_often_as_asked():
    for calls, wanted in ((None, 20), (6, 6)):
        recorder, batch = Recorder(channels=2), images(3)
        bound = sampler().log_likelihood(recorder, batch, Streams([0, 1, 2]), calls)
        assert bound.total.shape == (3,) and len(recorder.calls) == wanted
        assert all(torch.equal(call.condition["told"]["label"], batch["label"]) for call in recorder.calls)


def test_the_bound_clips_what_is_predicted_as_sampling_does():
    batch = images(3)
    settings = {"prediction": "x0", "variance": "fixed_small"}
    bounds = [
        sampler(**settings).log_likelihood(Recorder(answer), batch, Streams([0, 1, 2]), 6).total for answer in (1, 9)
    ]
    assert torch.equal(*bounds)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_processes_without_steps_are_measured_along_their_flow(process):
    recorder, batch = Recorder(lambda call: 0.1 * call.x), images(3)
    found = sampler(process=process).log_likelihood(recorder, batch, Streams([0, 1, 2]), 5)
    assert found.total.shape == (3,) and found.terms.shape == (3, 0) and found.total.isfinite().all()
    assert len(recorder.calls) == 10  # Heun
    told = torch.stack([call.t for call in recorder.calls])
    sigma = (4 * told).exp() if process == "edm" else told / (1 - told)  # relative to the data
    assert sigma.min() == pytest.approx(1 / 255, rel=1e-4)  # no nearer: networks know the levels of 8-bit images
    assert all(torch.equal(call.condition["told"]["label"], batch["label"]) for call in recorder.calls)


@pytest.mark.parametrize("process", ["edm", "flow"])
def test_the_flow_of_a_known_gaussian_has_its_entropy(process):
    """Data N(0, 0.25): the best network is known, and so are the bits of 8-bit images of it."""
    built = sampler(process=process, n_classes=0)
    variance = 0.25

    def best(call: Call) -> Tensor:
        if process == "edm":  # sigma_data is the data's: the skip alone is the mean of x0
            return 0 * call.x
        w = call.t.view(-1, 1, 1, 1)
        x0 = (1 - w) * variance / ((1 - w) ** 2 * variance + w**2) * call.x
        return (call.x - x0) / w

    n = 64
    x0 = (Streams(list(range(n))).normal((n, *SHAPE)) * variance**0.5).clamp(-1, 1)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    found = built.log_likelihood(Recorder(best), {"x0": x0}, Streams(list(range(n))), 40).total
    density = torch.distributions.Normal(0.0, variance**0.5).log_prob(x0).flatten(1).mean(1)
    wanted = -(density / torch.tensor(2.0).log()) - torch.log2(torch.tensor(2 / 255))
    assert found.mean() == pytest.approx(wanted.mean().item(), abs=0.03)
    assert torch.corrcoef(torch.stack([found, wanted]))[0, 1] > 0.99


# what is refused

REFUSED = [
    ({"process": "edm", "zero_terminal_snr": True}, "zero_terminal_snr True for process edm.*--zero_terminal_snr"),
    ({"process": "flow", "variance": "learned_range"}, "variance learned_range for process flow.*--variance"),
    ({"process": "flow", "schedule": "linear"}, "--schedule"),
    ({"process": "edm", "prediction": "v"}, "--prediction"),
    ({"process": "edm", "loss_type": "vlb"}, "--loss_type"),
    ({"process": "edm", "time_sampler": "loss_second_moment"}, "time_sampler loss_second_moment for process edm"),
    ({"process": "edm", "time_embedding": "noise_level"}, "time_embedding"),  # its alpha is 1 at every sigma
    ({"loss_type": "hybrid", "variance": "fixed_small"}, "hybrid.*variance.*fixed_small"),
    ({"schedule": "cosine", "first_beta": 1e-4}, "first_beta.*schedule cosine"),
    ({"schedule": "sigmoid", "last_beta": 1e-2}, "last_beta.*schedule sigmoid"),
    ({"prediction": "eps", "zero_terminal_snr": True}, "eps .*zero terminal SNR.*choose v or x0"),
    ({"total_steps": 1}, "total_steps 1"),
    ({"process": "edm", "sigma_data": 0.0}, "sigma_data 0.0"),
    ({"process": "flow", "time_deviation": -1.0}, "time_deviation -1.0"),
    ({"first_beta": -1e-4, "schedule": "scaled_linear"}, "first_beta -0.0001"),
    ({"min_snr_gamma": 0.0}, "min_snr_gamma 0.0"),
    ({"sigma_data": 1.0}, "sigma_data 1.0 for process gaussian.*--sigma_data"),
    ({"label_drop": 1.0}, "label_drop"),
    ({"condition_drop": -0.1}, "condition_drop"),
    ({"conditions": ("label",)}, "condition 'label'.*--class_conditional"),
    ({"conditions": ("imagge",)}, "unknown condition 'imagge', did you mean 'image'"),
    ({"attn_factors": (8,)}, "attn_factors"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_what_does_not_go_together_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(**settings)


def test_the_losses_of_edm_and_flow_may_be_called_simple():
    assert sampler(process="edm", loss_type="simple").loss_options == {}


# and it learns


@pytest.mark.parametrize(
    "settings", [{"prediction": "v"}, {"process": "edm"}, {"process": "flow", "time_sampler": "uniform"}]
)
def test_it_learns_one_image_per_class(settings):
    """Constant images, -0.6 and 0.6 by class: samples of a class are its image."""
    built = sampler(n_classes=2, label_drop=0.0, channels=16, **settings)
    optimizer = torch.optim.Adam(built.network.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)
        batch = images(8, 8 * step)
        batch["label"] = batch["position"] % 2
        batch["x0"] = (batch["label"] * 1.2 - 0.6).view(-1, 1, 1, 1).expand(-1, *SHAPE)
        built.loss(built.network.train(), batch, draws(batch)).per_example.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = drawn(built, built.network.eval(), labels=(0, 1) * 4, seeds=range(8), sample_steps=20)
    wanted = torch.tensor([-0.6, 0.6] * 4).view(-1, 1, 1, 1)
    assert (x - wanted).square().mean().sqrt() < 0.3  # 1.2 apart; without its class an image is 0.6 away or more
