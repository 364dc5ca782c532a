"""Training times of the ddpm sampler."""

import pytest
import torch
from torch import Tensor

from diffusion.timesteps import uniform_times
from helpers.gaussian_recorder import Recorder, draws, images, record_loss, sampler


def recorded_times(model, batch, batch_size):
    recorder = Recorder(channels=2 if model.process.variance == "learned_range" else 1)
    return model.loss(recorder, batch, draws(batch, batch_size=batch_size)).outputs["t"]


@pytest.mark.parametrize("parts", [(12,), (4, 4, 4), (3, 1, 8)])
@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_low_discrepancy_covers_every_stratum_whatever_the_split(parts, process):
    model = sampler(process=process, total_steps=12 if process == "gaussian" else 1000)
    for first in (24, 36):
        expected = recorded_times(model, images(12, first), 12)
        result, position = [], first
        for part in parts:
            result.append(recorded_times(model, images(part, position), 12))
            position += part
        assert torch.equal(torch.cat(result), expected)
        quantiles = expected if process == "gaussian" else torch.special.ndtr(expected.logit())  # uniform on (0, 1]
        assert sorted((quantiles.double() * 12 - 1e-4).ceil().int().tolist()) == list(range(1, 13))
    if process == "flow":  # another step, another offset
        assert not torch.equal(recorded_times(model, images(12, 24), 12), expected)


def test_uniform_times_do_not_depend_on_the_batch():
    model = sampler(time_sampler="uniform")
    expected = recorded_times(model, images(12, 24), 12)
    parts = [recorded_times(model, images(1, 24 + i), 12) for i in range(12)]
    assert torch.equal(torch.cat(parts), expected) and len(set(expected.tolist())) > 4


def test_times_of_edm_and_flow_have_the_given_mean_and_std():
    settings = {"time_mean": 0.3, "time_deviation": 0.7}
    for process, start in (("edm", Tensor.log), ("flow", Tensor.logit)):
        numbers = start(record_loss(sampler(process=process, **settings), n=2000)[0].outputs["t"])
        assert numbers.mean() == pytest.approx(0.3, abs=0.01) and numbers.std() == pytest.approx(0.7, abs=0.01)
        default = start(record_loss(sampler(process=process), n=2000)[0].outputs["t"])
        assert default.mean() == pytest.approx(-1.2 if process == "edm" else 0, abs=0.01)


def with_history(model, size=lambda i: i):
    """A sampler whose recorded losses at t = i/T are all `size(i)`."""
    steps = model.process.steps
    t = torch.arange(1, steps + 1).repeat_interleave(10) / steps
    model.observe(t, torch.tensor([float(size(i)) for i in range(1, steps + 1)]).repeat_interleave(10))
    return model


def test_loss_second_moment_samples_large_losses_more_often():
    model, n = with_history(sampler(time_sampler="loss_second_moment", loss_type="vlb")), 4000
    loss, _ = record_loss(model, n=n)
    t, weight = loss.outputs["t"], loss.per_example / loss.outputs["loss"]
    p = torch.arange(1, 21) / 210 * 0.999 + 0.001 / 20
    i = (t * 20).round().long()
    result = torch.bincount(i - 1, minlength=20) / n
    assert (result - p).abs().max() < 4 * (0.1 * 0.9 / n) ** 0.5
    assert torch.allclose(weight, 1 / (20 * p[i - 1]), rtol=1e-4)
    assert torch.allclose(loss.metrics["mse"], weight * loss.outputs["noise"].square().flatten(1).mean(1), rtol=1e-4)
    for power in (1, 2):  # means are those of uniform times
        numbers = weight * t**power
        expected = (torch.arange(1, 21) / 20).pow(power).mean()
        assert abs(numbers.mean() - expected) < 4 * numbers.std() / n**0.5
    assert abs((t**2).mean() - expected) > 0.1  # not without the weights


def test_validation_has_uniform_times_whatever_was_observed():
    settings = {"time_sampler": "loss_second_moment", "loss_type": "vlb"}
    fresh, observed = sampler(**settings), with_history(sampler(**settings))
    batch = images(64)
    expected = uniform_times(observed.process, draws(batch)("time")).t
    for model in (fresh, observed):
        loss, _ = record_loss(model, batch=batch, training=False)
        assert torch.equal(loss.outputs["t"], expected)
        assert torch.equal(loss.per_example, loss.outputs["loss"])
    assert not torch.equal(record_loss(observed, batch=batch)[0].outputs["t"], expected)


def test_observed_losses_exclude_the_importance_weights():
    model = with_history(sampler(time_sampler="loss_second_moment", loss_type="vlb"))
    loss, _ = record_loss(model, n=50)
    model.observe(loss.outputs["t"], loss.outputs["loss"])
    latest = {}
    for t, value in zip(loss.outputs["t"].tolist(), loss.outputs["loss"].tolist(), strict=True):
        latest[round(t * 20)] = value
    times = model.extras["times"]
    assert {i: times.losses[i - 1, -1].item() for i in latest} == pytest.approx(latest)


def test_only_adaptive_time_samplers_are_checkpointed():
    assert sampler().extras == {} and sampler(time_sampler="uniform").extras == {}
    (times,) = sampler(time_sampler="loss_second_moment").extras.values()
    assert times.losses.shape == (20, 10)
