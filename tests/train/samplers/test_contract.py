"""The contract of every file of train/samplers, in every space."""

import dataclasses

import pytest
import torch

from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from diffusion.types import Bound, Loss
from models.conditions import image
from models.control import HintConfig, HintEncoder, add_control, build_branch
from train.config import SamplerConfig, SamplingConfig
from train.data.streams import TrainingStreams
from train.registry import load_plugin, plugin_names
from train.samplers import LearnedSampler, Process

SMALL = {  # settings of tiny samplers; add those of new samplers here
    "absorbing": {"bert_n_emb": 8, "bert_n_head": 2, "bert_n_layers": 1, "total_steps": 8},
    "autoregressive": {"bert_n_emb": 8, "bert_n_head": 2, "bert_n_layers": 1},
    "ddpm": {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1}
    | {"total_steps": 8},
}
SPACES = {  # SPACE -> possible arguments of `build`
    "codes": [{"codes": 4, "grid": (2, 4)}],
    "continuous": [{"shape": (1, 4, 8), "pixels": True}, {"shape": (4, 2, 4), "pixels": False}],
}
GREY = image.Config(condition_channels=1)
SAMPLERS = plugin_names("train.samplers")
CASES = [
    (name, model_args) for name in SAMPLERS for model_args in SPACES[load_plugin("train.samplers", name, "").SPACE]
]
CLASSES = 3
STEPS = {"autoregressive": 8}  # fixed number of steps: one per code


def case_id(name, model_args):
    kind = "codes" if "codes" in model_args else "pixels" if model_args["pixels"] else "latents"
    return f"{name}-{kind}"


def make_sampler(name, model_args, n_classes=CLASSES):
    """The sampler with a perturbed network, since initial outputs may be constant 0."""
    torch.manual_seed(0)
    module = load_plugin("train.samplers", name, "sampler")
    sampler = module.build(module.Config(**SMALL.get(name, {})), **model_args, n_classes=n_classes)
    with torch.no_grad():
        for parameter in sampler.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return sampler, module


def data(model_args, n=6, first=0):
    rng = Streams(list(range(n)))
    if "codes" in model_args:
        batch = {"codes": torch.randint(model_args["codes"], (n, *model_args["grid"]), generator=torch.manual_seed(1))}
    else:
        batch = {"x0": (rng.uniform((n, *model_args["shape"])) * 255).round() / 127.5 - 1}
    return batch | {"label": torch.arange(n) % CLASSES, "position": torch.arange(first, first + n)}


def sample_shape(model_args):
    return model_args["grid"] if "codes" in model_args else model_args["shape"]


def draws(batch, seed=0):
    return TrainingStreams(seed, batch, len(batch["position"]), torch.device("cpu"))


@pytest.fixture(params=CASES, ids=lambda c: case_id(*c))
def sampler_case(request):
    name, model_args = request.param
    return *make_sampler(name, model_args), model_args


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_module_has_its_configs_space_and_build(name):
    module = load_plugin("train.samplers", name, "sampler")
    assert issubclass(module.Config, SamplerConfig) and issubclass(module.Sampling, SamplingConfig)
    assert module.SPACE in SPACES and callable(module.build)
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Config().sampler = "other"
    shared = {f.name for f in dataclasses.fields(module.Config)} & {f.name for f in dataclasses.fields(module.Sampling)}
    assert not shared  # flags are one flat list


def test_a_sampler_describes_itself(sampler_case):
    sampler, _, model_args = sampler_case
    assert isinstance(sampler, LearnedSampler) and isinstance(sampler.process, Process)
    assert isinstance(sampler.network, torch.nn.Module) and sampler.n_classes == CLASSES
    assert sampler.conditions == ("label",) and isinstance(sampler.unit, str)
    assert sampler.likelihood in ("exact", "variational bound", "probability flow")
    assert all(hasattr(extra, "state_dict") for extra in sampler.extras.values())


@pytest.mark.parametrize("name", SAMPLERS)
def test_its_settings_have_the_options_of_its_solvers(name):
    for model_args in SPACES[load_plugin("train.samplers", name, "").SPACE]:
        sampler, module = make_sampler(name, model_args)
        options = {option for entry in solvers_for(sampler.process).values() for option in entry.option_names}
        assert {*module.Sampling.option_names()} == options
        assert module.Sampling().solver_options == {}  # each solver's own
        assert module.Sampling().solver in solvers_for(sampler.process)
        assert options | {"sample_steps"} <= module.Sampling.solver_setting_names()


def test_loss_weight_multiplies_the_loss_but_no_metric(sampler_case):
    sampler, _, model_args = sampler_case
    batch = data(model_args)
    plain = sampler.loss(sampler.network, batch, draws(batch))
    weight = torch.arange(6.0)
    key = "codes" if "codes" in model_args else "x0"
    for loss_weight in (weight, weight.view(-1, *[1] * (batch[key].ndim - 1)).expand_as(batch[key])):
        weighted = sampler.loss(sampler.network, batch | {"loss_weight": loss_weight}, draws(batch))
        assert torch.allclose(weighted.per_example, weight * plain.per_example, atol=1e-6)
        for name, metric in plain.metrics.items():
            assert torch.equal(weighted.metrics[name], metric)


def test_without_classes_no_field_is_needed(sampler_case):
    model_args, name = sampler_case[2], sampler_case[1].__name__.rpartition(".")[2]
    sampler, module = make_sampler(name, model_args, n_classes=0)
    assert sampler.conditions == () and sampler.n_classes == 0
    batch = data(model_args)
    del batch["label"]
    assert sampler.loss(sampler.network, batch, draws(batch)).per_example.isfinite().all()
    samples = sampler.sample(sampler.network, Streams([0]), options=module.Sampling(sample_steps=STEPS.get(name, 2)))
    assert samples.shape == (1, *sample_shape(model_args))


def test_a_loss_has_per_example_values_metrics_and_outputs(sampler_case):
    sampler, _, model_args = sampler_case
    batch = data(model_args)
    loss = sampler.loss(sampler.network.train(), batch, draws(batch))
    assert isinstance(loss, Loss) and loss.per_example.shape == (6,) and loss.per_example.requires_grad
    assert loss.metrics and all(v.shape == (6,) and not v.requires_grad for v in loss.metrics.values())
    assert {"x0", "x_t", "t", "prediction", "loss"} <= loss.outputs.keys()
    assert not any(value.requires_grad for value in loss.outputs.values())
    assert torch.equal(loss.outputs["x0"], batch["codes" if "codes" in model_args else "x0"])
    assert loss.outputs["x_t"].shape == loss.outputs["x0"].shape
    assert loss.outputs["t"].shape == loss.outputs["loss"].shape == (6,)
    predicted = sampler.x0_hat(loss.outputs)
    assert predicted.shape == loss.outputs["x0"].shape
    assert predicted.dtype == loss.outputs["x0"].dtype
    sampler.observe(loss.outputs["t"], loss.outputs["loss"])


def test_a_loss_is_a_function_of_the_draws_alone(sampler_case):
    """Needed for resuming; another step has other draws."""
    sampler, _, model_args = sampler_case
    batch, next_batch = data(model_args), data(model_args, first=6)
    losses = [sampler.loss(sampler.network, b, draws(b)).per_example for b in (batch, batch, next_batch)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


def test_gradients_reach_every_parameter(sampler_case):
    sampler, _, model_args = sampler_case
    for first in (0, 6, 12):
        batch = data(model_args, first=first)
        sampler.loss(sampler.network.train(), batch, draws(batch)).per_example.mean().backward()
    without_gradient = [
        n for n, p in sampler.network.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert without_gradient == []
    zero_gradient = [n for n, p in sampler.network.named_parameters() if p.grad.abs().sum() == 0]
    assert zero_gradient == []


def test_samples_have_the_shape_and_the_range_of_the_data(sampler_case):
    sampler, module, model_args = sampler_case
    steps = STEPS.get(module.__name__.rpartition(".")[2], 3)
    options, shape, calls = module.Sampling(sample_steps=steps), sample_shape(model_args), []

    def on_step(i, t, s, x, predicted):
        calls.append((i, t, s, x.shape))
        return x

    batch = {"label": torch.tensor([0, 2])}
    samples = sampler.sample(sampler.network.eval(), Streams([0, 1]), batch=batch, options=options, on_step=on_step)
    assert samples.shape == (2, *shape) and not samples.requires_grad
    assert len(calls) == steps and all(t > s for _, t, s, _ in calls) and calls[-1][2] == 0
    if "codes" in model_args:
        assert samples.dtype == torch.int64 and 0 <= samples.min() and samples.max() < model_args["codes"]
    else:
        assert samples.isfinite().all() and (not model_args["pixels"] or samples.abs().max() <= 1)
    unconditional = sampler.sample(sampler.network, Streams([0, 1]), options=options)  # with the null class
    assert unconditional.shape == samples.shape


@pytest.mark.parametrize("name, model_args", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_image_and_a_label_train_and_guide(name, model_args):
    module = load_plugin("train.samplers", name, "sampler")
    torch.manual_seed(0)
    config = module.Config(**SMALL.get(name, {}), conditions=("image",), condition_options=GREY, condition_drop=0.3)
    sampler = module.build(config, **model_args, n_classes=CLASSES)
    assert sampler.conditions == ("condition_image", "label")
    image = Streams(list(range(6))).normal((6, 1, 4, 8))
    batch = data(model_args) | {"condition_image": image}
    optimizer = torch.optim.Adam(sampler.network.parameters(), 0.02)
    for step in range(3):  # the condition encoders' outputs start at zero
        batch["position"] = torch.arange(6 * step, 6 * step + 6)
        optimizer.zero_grad()
        sampler.loss(sampler.network.train(), batch, draws(batch)).per_example.mean().backward()
        optimizer.step()
    assert sampler.network.encoders["image"].null.grad.any()
    losses = [
        sampler.loss(sampler.network.eval(), batch | {"condition_image": shifted}, draws(batch)).per_example
        for shifted in (image, image + 3)
    ]
    assert (losses[0] != losses[1]).any()
    conditions = {"condition_image": image[:2], "label": torch.tensor([0, 2])}
    for guidance in (1.0, 2.0):
        options = module.Sampling(sample_steps=STEPS.get(name, 2), guidance=guidance)
        samples = sampler.sample(sampler.network, Streams([0, 1]), batch=conditions, options=options)
        single = sampler.sample(
            sampler.network, Streams([1]), batch={key: value[1:] for key, value in conditions.items()}, options=options
        )
        assert samples.shape == (2, *sample_shape(model_args)) and torch.allclose(
            samples[1:].float(), single.float(), atol=1e-4
        )
    with pytest.raises(ValueError, match="conditions need condition_image"):
        sampler.sample(sampler.network, Streams([0, 1]), batch={"label": torch.tensor([0, 2])}, options=options)


def test_guidance_needs_conditions(sampler_case):
    model_args, name = sampler_case[2], sampler_case[1].__name__.rpartition(".")[2]
    sampler, module = make_sampler(name, model_args, n_classes=0)
    with pytest.raises(ValueError, match="--guidance 1"):
        sampler.sample(sampler.network, Streams([0]), options=module.Sampling(guidance=2.0))


def test_a_null_that_was_never_trained_is_refused(sampler_case):
    sampler, module, model_args = sampler_case
    batch = data(model_args, n=2)
    no_label = batch | {"label": torch.full((2,), CLASSES)}
    sampler.config = dataclasses.replace(sampler.config, label_drop=0.0)
    for given, guidance in ((batch, 3.0), (no_label, 1.0), (None, 1.0)):
        options = module.Sampling(guidance=guidance)
        with pytest.raises(ValueError, match="trained with label_drop 0, which leaves the null of label untrained"):
            sampler.sample(sampler.network, Streams([0, 1]), batch=given, options=options)
    options = module.Sampling(sample_steps=STEPS.get(module.__name__.rpartition(".")[2], 2))
    assert len(sampler.sample(sampler.network, Streams([0, 1]), batch=batch, options=options)) == 2


def test_a_likelihood_is_a_bound_per_image(sampler_case):
    sampler, _, model_args = sampler_case
    batch, rng = data(model_args, n=2), Streams([0, 1])
    if not model_args.get("pixels", True):
        with pytest.raises(ValueError, match="latents are continuous and have no likelihood"):
            sampler.log_likelihood(sampler.network, batch, rng)
        return
    bound = sampler.log_likelihood(sampler.network.eval(), batch, rng, 3)
    assert isinstance(bound, Bound) and bound.total.shape == bound.prior.shape == (2,)
    assert bound.total.isfinite().all() and (bound.total > 0).all()
    repeated = sampler.log_likelihood(sampler.network, batch, Streams([0, 1]), 3)
    assert torch.equal(bound.total, repeated.total)


def test_an_unknown_solver_is_refused_with_the_known_ones(sampler_case):
    sampler, module, _ = sampler_case
    with pytest.raises(ValueError, match="unknown solver 'nothing'.*choose one of"):
        sampler.sample(sampler.network, Streams([0]), options=module.Sampling(solver="nothing"))


HINT = HintConfig(hint_channels=1, hint_widths=(4, 6), hint_factor=2)


def add_hints(sampler, batch, randomize=False):
    """Adds a control branch to the network of a sampler; returns the batch with hints."""
    torch.manual_seed(1)
    name = add_control(sampler.network, build_branch(sampler.network, HINT))
    for parameter in sampler.network.control.parameters() if randomize else ():
        torch.nn.init.normal_(parameter, std=0.3)
    height, width = batch["codes" if "codes" in batch else "x0"].shape[-2:]
    hints = torch.rand(len(batch["label"]), 1, 2 * height, 2 * width, generator=torch.manual_seed(2)) * 2 - 1
    return batch | {f"{name}_image": hints}


def test_a_new_control_branch_changes_no_loss_and_learns(sampler_case):
    sampler, _, model_args = sampler_case
    batch = data(model_args)
    plain = sampler.loss(sampler.network, batch, draws(batch)).per_example
    batch = add_hints(sampler, batch)
    loss = sampler.loss(sampler.network, batch, draws(batch)).per_example
    assert sampler.conditions[-1] == "hint_image" and torch.equal(loss, plain)
    loss.mean().backward()
    last = sampler.network.control["hint"]
    zeros = last.convs[-1] if isinstance(last, HintEncoder) else last.zero_convs[0]
    assert zeros.weight.grad.any()
    with pytest.raises(ValueError, match="the conditions need hint_image"):
        sampler.loss(sampler.network, data(model_args), draws(batch))


def test_a_control_branch_acts_in_sampling_by_its_strength(sampler_case):
    sampler, module, model_args = sampler_case
    options = module.Sampling(sample_steps=STEPS.get(module.__name__.rpartition(".")[2], 2), guidance=2.0)
    batch = {"label": torch.tensor([0, 1])}

    def sample(**settings):
        streams, changed = Streams([0, 1]), dataclasses.replace(options, **settings)
        return sampler.sample(sampler.network.eval(), streams, options=changed, batch=batch)

    plain = sample()
    with pytest.raises(ValueError, match="got control_strength for a model without a control branch"):
        sample(control_strength=(0.5,))
    batch = add_hints(sampler, data(model_args, n=2), randomize=True)
    assert torch.equal(sample(control_strength=(0.0,)), plain)
    assert not torch.equal(sample(), plain) and not torch.equal(sample(), sample(control_strength=(-1.0,)))
    with pytest.raises(ValueError, match="got 2 numbers as control_strength, wanted one"):
        sample(control_strength=(1.0, 1.0))
    if "codes" in model_args:
        with pytest.raises(ValueError, match="got control_middle_only for a transformer"):
            sample(control_middle_only=True)
