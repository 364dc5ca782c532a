"""The ddpm sampler: network, process and images together."""

import pytest
import torch

from diffusion.process import append_dims
from helpers.gaussian_recorder import (
    CLASSES,
    SHAPE,
    Recorder,
    draws,
    images,
    perturb,
    record_loss,
    sample_recorded,
    sampler,
)
from models.conditions import image

TWO_CHANNELS = image.Config(condition_channels=2)

# network inputs


def test_gaussian_inputs_are_the_step_index_and_x_t():
    model = sampler()
    loss, call = record_loss(model, n=20)
    assert sorted(call.t.tolist()) == list(range(20))  # low_discrepancy: each of the T steps once in T examples
    i = (loss.outputs["t"] * 20).round().long()
    assert torch.equal(call.t.long(), i - 1)
    assert torch.equal(call.x, loss.outputs["x_t"])
    alpha_bar = model.process.alpha_bar[i].view(-1, 1, 1, 1)
    expected = alpha_bar.sqrt() * loss.outputs["x0"] + (1 - alpha_bar).sqrt() * loss.outputs["noise"]
    assert torch.allclose(call.x, expected.float(), atol=1e-6)


def test_edm_inputs_are_log_sigma_over_4_and_unit_variance_x():
    loss, call = record_loss(sampler(process="edm", sigma_data=0.7))
    sigma = loss.outputs["t"]
    assert torch.allclose(call.t, sigma.log() / 4)
    assert torch.allclose(call.x, loss.outputs["x_t"] / (sigma**2 + 0.7**2).sqrt().view(-1, 1, 1, 1))
    assert torch.allclose(loss.outputs["x_t"], loss.outputs["x0"] + sigma.view(-1, 1, 1, 1) * loss.outputs["noise"])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_time_input_is_the_noise_fraction(shift):
    loss, call = record_loss(sampler(process="flow", time_shift=shift))
    t = loss.outputs["t"]
    assert torch.allclose(call.t, shift * t / (1 + (shift - 1) * t))
    noise, x0, w = loss.outputs["noise"], loss.outputs["x0"], call.t.view(-1, 1, 1, 1)
    assert torch.allclose(call.x, (1 - w) * x0 + w * noise, atol=1e-6)


def test_time_embedding_noise_level_is_alpha():
    model = sampler(time_embedding="noise_level")
    loss, call = record_loss(model, n=20)
    i = (loss.outputs["t"] * 20).round().long()
    assert torch.allclose(call.t, model.process.alpha_bar[i].sqrt().float()) and call.t.dtype == torch.float32
    loss, call = record_loss(sampler(process="flow", time_embedding="noise_level"))
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
def test_times_in_0_to_1_are_scaled_by_1000(settings, scale):
    assert sampler(**settings).network.config.time_scale == scale


@pytest.mark.parametrize(("variance", "channels"), [("auto", 2), ("fixed_small", 1), ("fixed_large", 1)])
def test_a_learned_variance_doubles_the_channels_out(variance, channels):
    model = sampler(variance=variance)
    assert model.network(torch.zeros(2, *SHAPE), torch.zeros(2)).shape == (2, channels, 4, 4)
    assert model.loss_options["kind"] == ("hybrid" if channels == 2 else "simple")  # loss_type auto


def test_every_setting_of_the_network_reaches_it():
    settings = {"dropout": 0.2, "resblock_updown": True, "scale_shift": False, "scale_skip": True, "head_width": 4}
    settings |= {"attn_block_type": "neighborhood", "middle_attn_block_type": "none", "kernel_sizes": (3,)}
    settings |= {"dilations": (2,), "na_backend": "dense", "feed_forward": "gelu", "res_blocks": 2}
    network = sampler(**settings).network
    result = network.config
    assert {name: getattr(result, name) for name in settings} == settings
    assert (result.in_channels, result.out_channels, network.encoders["label"].n_classes) == (1, 2, CLASSES)


def test_betas_follow_first_beta_and_last_beta():
    settings = {"schedule": "linear", "total_steps": 1000}
    published = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al. 2020
    assert torch.allclose(sampler(**settings).process.alpha_bar[1:], (1 - published).cumprod(0))
    betas = torch.linspace(2e-4, 0.01, 1000, dtype=torch.float64)
    result = sampler(first_beta=2e-4, last_beta=0.01, **settings).process.alpha_bar[1:]
    assert torch.allclose(result, (1 - betas).cumprod(0))


# dropped conditions


def test_conditions_are_dropped_independently():
    n, model = 4000, sampler(conditions=("image",), condition_options=TWO_CHANNELS, label_drop=0.4, condition_drop=0.25)
    assert model.conditions == ("condition_image", "label")
    batch = images(n) | {"condition_image": torch.rand(n, 2, 4, 4)}
    _, call = record_loss(model, batch=batch)
    assert set(call.condition) == {"label", "image"}
    assert torch.equal(call.condition["label"], batch["label"])  # raw: the encoders insert the nulls
    assert torch.equal(call.condition["image"], batch["condition_image"])
    label, image = call.drop["label"], call.drop["image"]
    assert label.dtype == image.dtype == torch.bool
    for result, expected in ((label, 0.4), (image, 0.25), (label & image, 0.1)):  # independent
        assert abs(result.double().mean() - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    _, call = record_loss(sampler(label_drop=0.0), n=200)
    assert not call.drop["label"].any()


def test_a_real_network_sees_the_null_where_a_label_is_dropped():
    """Dropped labels have no effect, others have."""
    model, network = perturb(sampler(label_drop=0.9))
    batch, relabelled = images(30), images(30)
    relabelled["label"] = (relabelled["label"] + 1) % CLASSES
    outputs = [model.loss(network, b, draws(b)).outputs["prediction"] for b in (batch, relabelled)]
    equal = (outputs[0] == outputs[1]).flatten(1).all(1)
    dropped = draws(batch)("label").uniform((30,)) < 0.9
    assert torch.equal(equal, dropped) and 0 < dropped.sum() < 30


def test_without_classes_labels_are_not_passed():
    for model in (sampler(n_classes=0), sampler(class_conditional=False)):
        assert model.conditions == () and model.n_classes == 0
        _, call = record_loss(model, n=4)
        assert call.condition == {} and call.drop == {}


def test_a_missing_batch_field_is_named():
    model, batch = sampler(conditions=("image",)), images(2)
    with pytest.raises(ValueError, match="conditions need condition_image.*--adapt"):
        model.loss(Recorder(channels=2), batch, draws(batch))
    with pytest.raises(ValueError, match="conditions need condition_image, label"):
        model.loss(Recorder(channels=2), {"x0": batch["x0"]}, draws(batch))


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
def test_the_loss_is_the_process_loss_at_these_draws(settings):
    model, batch = sampler(**settings), images(12)
    loss, call = record_loss(model, batch=batch, output=0.3)
    noise = draws(batch)("noise").normal(batch["x0"].shape)  # from each position's own stream
    assert torch.equal(noise, loss.outputs["noise"])
    options = {}
    if "process" not in settings:
        auto = "simple" if settings.get("variance", "").startswith("fixed") else "hybrid"
        options = {"kind": settings.get("loss_type", auto), "gamma": settings.get("min_snr_gamma", 5.0)}
    expected = model.process.loss(loss.outputs["prediction"], batch["x0"], noise, loss.outputs["t"], **options)
    assert torch.equal(loss.per_example, expected.per_example)
    assert torch.equal(loss.outputs["loss"], expected.per_example)
    assert loss.metrics.keys() == expected.metrics.keys()
    if options.get("kind") == "simple" and settings["prediction"] == "x0":
        assert torch.allclose(loss.per_example, (batch["x0"] - 0.3).square().flatten(1).mean(1))


def perfect_output(model, x0, noise, t):
    """The output of a network that knows x0 and the noise, by each paper's formula."""
    alpha, sigma = append_dims(model.process.alpha(t), x0), append_dims(model.process.sigma(t), x0)
    data = getattr(model.process, "sigma_data", 1.0)  # only edm has it
    return {
        "eps": noise,
        "x0": x0,
        "v": alpha * noise - sigma * x0,
        "flow": noise - x0,
        "edm": (x0 - data**2 / (data**2 + sigma**2) * (x0 + sigma * noise))
        * (sigma**2 + data**2).sqrt()
        / (sigma * data),
    }[model.config.prediction if model.config.process == "gaussian" else model.config.process]


@pytest.mark.parametrize("settings", PROCESSES)
def test_a_perfect_prediction_has_no_error_and_returns_x0(settings):
    model, batch = sampler(**settings), images(12)
    learned = model.process.variance == "learned_range"
    outputs = record_loss(model, batch=batch)[0].outputs
    pred = perfect_output(model, batch["x0"], outputs["noise"], outputs["t"])
    pred = torch.cat([pred, torch.zeros_like(pred)], 1) if learned else pred
    loss, _ = record_loss(model, batch=batch, output=pred)
    assert loss.metrics["mse"].abs().max() < 1e-6
    assert torch.allclose(model.x0_hat(loss.outputs), batch["x0"], atol=1e-4)


# refused settings

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
    ({"conditions": ("label",)}, "'label' among --conditions.*--class_conditional"),
    ({"conditions": ("imagge",)}, "unknown condition 'imagge', did you mean 'image'"),
    ({"attn_factors": (8,)}, "attn_factors"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_incompatible_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        sampler(**settings)


def test_the_losses_of_edm_and_flow_may_be_called_simple():
    assert sampler(process="edm", loss_type="simple").loss_options == {}


# training


@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "v"},
        pytest.param({"process": "edm"}, marks=pytest.mark.slow),
        pytest.param({"process": "flow", "time_sampler": "uniform"}, marks=pytest.mark.slow),
    ],
)
def test_it_learns_one_image_per_class(settings):
    """Constant images, -0.6 and 0.6 by class: samples of a class are its image."""
    model = sampler(n_classes=2, label_drop=0.0, channels=16, **settings)
    optimizer = torch.optim.Adam(model.network.parameters())
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)
        batch = images(8, 8 * step)
        batch["label"] = batch["position"] % 2
        batch["x0"] = (batch["label"] * 1.2 - 0.6).view(-1, 1, 1, 1).expand(-1, *SHAPE)
        model.loss(model.network.train(), batch, draws(batch)).per_example.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = sample_recorded(model, model.network.eval(), labels=(0, 1) * 4, seeds=range(8), sample_steps=20)
    expected = torch.tensor([-0.6, 0.6] * 4).view(-1, 1, 1, 1)
    # the classes are 1.2 apart: samples that ignore the class have an error of at least 0.6
    assert (x - expected).square().mean().sqrt() < 0.3
