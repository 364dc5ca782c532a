"""The VQGAN's training step: gradients of the full loss, without redundant work."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from train import vqgan as module
from train.config import DataConfig, TrainingConfig
from train.distributed import DistContext
from train.execution import LossScale
from train.optim import StepResult
from train.vqgan import VQGANStep, build_state
from vq.config import VQGANConfig, VQGANLossConfig
from vq.losses import ADVERSARIAL_LOSSES

WORLD = DistContext(torch.device("cpu"))
NETWORK = VQGANConfig(nf=8, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(), emb_dim=4, codebook_size=16)
DATA = DataConfig(img_size=16, n_channels=3)
TRAINING = TrainingConfig(amp=False, lr=1e-3, grad_clip=0.0)
LOSS = {"perceptual_net": "none", "disc_start_step": 0, "ndf": 4, "disc_layers": 1, "disc_weight_max": 1e4}


class Distance(nn.Module):
    """A perceptual loss that counts its backward passes."""

    def __init__(self):
        super().__init__()
        self.backward_passes = 0

    def forward(self, images, reconstructions):
        if reconstructions.requires_grad:
            reconstructions = reconstructions * 1
            reconstructions.register_hook(self.count_backward)
        return (images.tanh() - reconstructions.tanh()).square().mean((1, 2, 3))

    def count_backward(self, gradient):
        self.backward_passes += 1


def batch(seed=0, size=4):
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"image": images * 2 - 1, "position": torch.arange(size)}


def build_step(perceptual=None, network=NETWORK, **changes):
    """A state in float64, so that rounding does not hide differences."""
    loss = VQGANLossConfig(**(LOSS | changes))
    state = build_state(network, loss, DATA, TRAINING, WORLD)
    for part in state.modules.values():
        part.double()
    state.modules["autoencoder"].quantizer.codebook.weight.data.normal_()
    return state, VQGANStep(loss, TRAINING, WORLD, perceptual)


def is_close(actual, expected):
    """Equal up to the rounding of the parts that are always computed in float32."""
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-12


def gradients(state, step, parts):
    """The gradients that the optimizers receive, by parameter, and the outputs of the step."""
    grads = {}

    def record_gradients(state, names, world, **kwargs):
        for name in names:
            for key, parameter in state.modules[name].named_parameters():
                grads[f"{name}.{key}"] = parameter.grad.clone()
                parameter.grad = None
        return StepResult([torch.zeros(()) for _ in names], torch.tensor(True))

    with mock.patch.object(module, "clip_and_step", record_gradients):
        return grads, step(state, parts)


def full_loss_gradients(state, step, images):
    """The autoencoder's gradients by definition, with the adaptive weight from two gradients of the last layer."""
    c, autoencoder = step.loss, state.modules["autoencoder"]
    fake, codes = autoencoder(images)
    reconstruction = c.recon_weight * ((images - fake).abs() if c.recon_loss == "l1" else (images - fake) ** 2).mean()
    if step.perceptual is not None:
        reconstruction = reconstruction + c.perceptual_weight * step.perceptual(images, fake).mean()
    loss, ramp = reconstruction + codes.loss.mean(), c.adversarial_ramp(state.step)
    if ramp:
        g = ADVERSARIAL_LOSSES[c.disc_loss][1](state.modules["discriminator"](fake))
        weight = ramp * c.disc_weight
        if c.adaptive_weight:
            last_layer = autoencoder.decoder.last_layer
            recon_norm, adversarial_norm = (
                torch.autograd.grad(term, last_layer, retain_graph=True)[0].norm() for term in (reconstruction, g)
            )
            weight = weight * (recon_norm / (adversarial_norm + 1e-4)).clamp(0, c.disc_weight_max)
        loss = loss + weight * g
    names = [f"autoencoder.{name}" for name, _ in autoencoder.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(autoencoder.parameters())), strict=True)), loss.detach()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adaptive_weight": False, "disc_weight": 0.3},
        {"recon_loss": "l2", "recon_weight": 4.0, "perceptual_weight": 0.1},
        {"disc_loss": "non_saturating", "disc_ramp_steps": 3},
        {"disc_start_step": 5},
        {"disc_warmup_steps": 2},
        {"disc_weight_max": 1e-3},
    ],
)
def test_the_gradients_are_those_of_the_full_loss(changes):
    state, step = build_step(Distance(), **changes)
    data = batch()
    expected, loss = full_loss_gradients(state, step, data["image"])
    grads, outputs = gradients(state, step, [data])
    autoencoder = {name: value for name, value in grads.items() if name.startswith("autoencoder")}
    assert autoencoder.keys() == expected.keys()
    for name, value in expected.items():
        assert is_close(autoencoder[name], value), name
    assert torch.allclose(outputs["loss"].double(), loss)


def test_the_perceptual_network_has_one_backward_pass():
    state, step = build_step(Distance())
    gradients(state, step, [batch()])
    assert step.perceptual.backward_passes == 1


def count_discriminator_calls(state):
    """A list that grows with each call of the discriminator."""
    calls = []
    state.modules["discriminator"].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("at", "autoencoder", "discriminator"), [(2, False, False), (3, False, True), (5, False, True), (6, True, True)]
)
def test_the_discriminator_is_idle_before_its_start(at, autoencoder, discriminator):
    state, step = build_step(disc_start_step=3, disc_warmup_steps=3)
    state.step, calls = at, count_discriminator_calls(state)
    balance = mock.Mock(wraps=step.compute_adaptive_weight)
    with mock.patch.object(step, "compute_adaptive_weight", balance):
        grads, outputs = gradients(state, step, [batch()])
    assert len(calls) == autoencoder + 2 * discriminator and balance.called == autoencoder
    assert ("adversarial" in outputs, "adaptive_weight" in outputs, "disc_loss" in outputs) == (autoencoder,) * 2 + (
        discriminator,
    )
    assert any(name.startswith("discriminator") for name in grads) == discriminator


def test_the_adversarial_weight_warms_up():
    loss = VQGANLossConfig(disc_start_step=10, disc_warmup_steps=5, disc_ramp_steps=4)
    assert [loss.adversarial_ramp(k) for k in (0, 14, 15, 16, 18, 19, 1000)] == [0, 0, 0.2, 0.4, 0.8, 1, 1]
    assert VQGANLossConfig(disc_start_step=2).adversarial_ramp(2) == 1


def test_the_discriminators_gradients_are_those_of_its_loss():
    state, step = build_step(lecam_weight=0.5)
    state.extras["lecam"].update_averages(torch.tensor(3.0), torch.tensor(-2.0))
    data, discriminator = batch(), state.modules["discriminator"]
    fake = state.modules["autoencoder"](data["image"])[0].detach()
    real_logits, fake_logits = discriminator(data["image"]), discriminator(fake)
    loss = ADVERSARIAL_LOSSES["hinge"][0](real_logits, fake_logits) + 0.5 * state.extras["lecam"](
        real_logits, fake_logits
    )
    expected = torch.autograd.grad(loss, list(discriminator.parameters()))
    before = state.extras["lecam"].state_dict()
    grads, outputs = gradients(state, step, [data])
    for (name, _), value in zip(discriminator.named_parameters(), expected, strict=True):
        assert is_close(grads[f"discriminator.{name}"], value), name
    assert outputs["lecam"] > 0 and torch.allclose(outputs["disc_loss"].double(), loss, rtol=1e-5)
    assert state.extras["lecam"].state_dict() != before


def test_a_nonfinite_loss_leaves_no_trace():
    state, step = build_step(lecam_weight=0.5)
    data = batch()
    data["image"][0, 0, 0, 0] = float("inf")
    grads, _ = gradients(state, step, [data])
    assert all(value.isnan().any() for value in grads.values())

    state, step = build_step(lecam_weight=0.5)
    before = copy.deepcopy([state.extras["lecam"].state_dict(), state.modules["autoencoder"].state_dict()])
    assert not step(state, [data])["finite"]
    after = [state.extras["lecam"].state_dict(), state.modules["autoencoder"].state_dict()]
    assert all(torch.equal(old[key], new[key]) for old, new in zip(before, after, strict=True) for key in old)
    assert all((total == 0).all() for total in state.counters["codes"].sums.values())


def test_micro_batches_give_the_gradients_of_the_full_batch():
    state, step = build_step(Distance(), disc_start_step=9)
    full = batch(size=4)
    parts = [{name: value[rows] for name, value in full.items()} for rows in (slice(0, 2), slice(2, 4))]
    expected, _ = gradients(state, step, [full])
    actual, _ = gradients(state, step, parts)
    for name, value in expected.items():
        assert is_close(actual[name], value), name


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_scale_changes_no_gradient(scale):
    """With the float16 loss scale, gradients are scaled by it, and loss weights are unchanged."""
    state, step = build_step(Distance())
    plain, outputs = gradients(state, step, [batch()])
    state.extras["loss_scale"] = LossScale()
    state.extras["loss_scale"].value = scale
    scaled, scaled_outputs = gradients(state, step, [batch()])
    for name, value in plain.items():
        assert is_close(scaled[name] / scale, value), name
    assert torch.allclose(scaled_outputs["adaptive_weight"], outputs["adaptive_weight"])


def test_code_usage_of_an_epoch_counts_all_processes():
    """After a resume, rank 0 may have all the counts, and the others none."""
    state, step = build_step(disc_start_step=9)
    counts = state.counters["codes"]
    counts.add("chosen", torch.zeros(16))
    counts.add("images", torch.tensor(0.0))
    counts.world = step.world = mock.Mock(wraps=WORLD, sum=lambda x: x + (12 if x.ndim == 0 else 1))
    logger = mock.Mock()
    module.VQGANReports(step, [], 4, epoch=12, logger=logger).log_code_usage(state, {})
    assert logger.log_scalars.call_count == 1


def test_code_usage_is_logged_once_per_epoch():
    state, step = build_step(disc_start_step=9)
    logger = mock.Mock()
    reports = module.VQGANReports(step, [], 4, epoch=10, logger=logger)
    for k in range(6):  # 4 images per step: epochs end after the third and sixth step
        outputs = step(state, [batch(seed=k)])
        assert outputs is not None
        reports.log_code_usage(state, {})
        assert logger.log_scalars.call_count == (k + 1) // 3
    (_, used), _ = logger.log_scalars.call_args
    assert 0 < used["codes/usage"] <= 1 <= used["codes/perplexity"] <= 16
    (_, _, chosen), _ = logger.log_histogram.call_args
    assert chosen.sum() == 3 * 4 * 64 and used["codes/usage"] == (chosen > 0).float().mean()
