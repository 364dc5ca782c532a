"""The likelihood of images given their codes: it is normalised, the head learns deviations, its training resumes."""

import dataclasses
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusion.gaussian import discretized_log_likelihood
from diffusion.types import Normal
from experiments.harness.experiment import ModelConfig, OutputConfig
from experiments.metrics.decoder_likelihood import (
    DecoderConfig,
    HeadRunConfig,
    HeadStep,
    TrainedHead,
    bits_per_dim,
    build_state,
    load_head,
    load_or_train_head,
    reconstruct_codes,
    train_head,
)
from helpers.run_asserts import assert_equal_bits, lines, weights
from train.config import LoggingConfig, TrainingConfig
from train.data.loading import ImageSource, build_dataset, images_in_order
from train.data.transforms import to_float, to_uint8
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage
from vq.autoencoder import Decoder
from vq.likelihood import INITIAL_LOG_VARIANCE, MAX_LOG_VARIANCE, MIN_LOG_VARIANCE

CPU = torch.device("cpu")
LEVELS = torch.arange(256).float() / 127.5 - 1


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def first(trained):
    return load_vqgan_stage(trained / "vqgan_digits", None, CPU, amp=False)


# the likelihood


@pytest.mark.parametrize("log_variance", [MIN_LOG_VARIANCE, -8.0, INITIAL_LOG_VARIANCE, 0.0, MAX_LOG_VARIANCE])
@pytest.mark.parametrize("mean", [-1.4, -1.0, -0.5, 0.0031, 0.77, 1.0, 3.0])
def test_the_masses_of_all_levels_sum_to_one(mean, log_variance):
    nats = discretized_log_likelihood(LEVELS, Normal(torch.full((256,), mean), torch.tensor(log_variance)))
    assert nats.exp().double().sum() == pytest.approx(1, abs=2e-4)  # float32
    assert (nats <= 0).all()


def test_likelihood_and_gradients_stay_finite_far_out():
    mean = torch.tensor([-30.0, -2.0, -1.0, 0.0, 1.0, 30.0]).view(-1, 1, 1)
    log_variance = torch.tensor([MIN_LOG_VARIANCE, INITIAL_LOG_VARIANCE, MAX_LOG_VARIANCE]).view(-1, 1).requires_grad_()
    nats = discretized_log_likelihood(LEVELS, Normal(mean, log_variance))
    nats.sum().backward()
    assert nats.isfinite().all() and log_variance.grad.isfinite().all()


def test_likelihood_is_the_mass_of_the_levels_bin(first):
    ids = torch.randint(16, (3, *first.vqgan.grid))
    mean, _ = reconstruct_codes(first, ids)
    images = to_uint8(mean + 0.1 * torch.randn_like(mean))
    images[0] = 255 * torch.randint(2, images[0].shape)
    bits = bits_per_dim(first, lambda features: torch.full_like(mean, 2 * math.log(0.3)), ids, to_float(images))
    borders = (torch.arange(255).double() + 0.5) / 127.5 - 1
    below = torch.special.ndtr((borders - mean.double().unsqueeze(-1)) / 0.3)
    below = torch.cat([torch.zeros_like(below[..., :1]), below, torch.ones_like(below[..., :1])], -1)
    mass = below.diff().gather(-1, images.long().unsqueeze(-1)).squeeze(-1)
    assert bits.shape == (3,)
    assert torch.allclose(bits.double(), -mass.log2().mean((1, 2, 3)), rtol=1e-3)


class PlainDecoder(Decoder):
    """A decoder of the given layers."""

    def __init__(self, *layers):
        nn.Sequential.__init__(self, *layers)


class Flat:
    """A first stage of images 1 x width: code 0 where the left half is darker than the right half, else code 1."""

    device, amp, weights = CPU, False, "flat"

    def __init__(self, width, channels=2):
        self.vqgan = SimpleNamespace(quantizer=self, decoder=PlainDecoder(nn.Identity(), nn.Conv2d(channels, 1, 1)))
        self.width = width

    def encode(self, images):
        left, right = images.float().flatten(1).chunk(2, 1)
        return (left.mean(1) >= right.mean(1)).long().view(-1, 1, 1)

    def vectors(self, ids):
        return nn.functional.one_hot(ids, 2).float().movedim(-1, 1).expand(-1, -1, 1, self.width)


def test_code_bits_plus_decoder_bits_are_a_likelihood_bound():
    """One code per image: the probabilities of all 65,536 two-pixel images sum to at most one, so the mean number of
    bits is at least the entropy of the images."""
    first, prior = Flat(2), torch.tensor([0.25, 0.75]).double()
    with torch.no_grad():
        first.vqgan.decoder[-1].weight.zero_()
        first.vqgan.decoder[-1].bias.zero_()
    dark, bright = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    images = torch.stack([dark, bright], -1).view(-1, 1, 1, 2).to(torch.uint8)
    ids = first.encode(images)
    head = TrainedHead(None, 0, "", first, lambda features: torch.full_like(features[:, :1], -1))
    decoder_bits, code_bits = 2 * head.bits_per_dim(ids, images).double(), -prior.log2()[ids.flatten()]
    halves = torch.stack(
        [(-decoder_bits[ids.flatten() == code]).exp2().sum() for code in (0, 1)]
    )  # of the images of each code
    assert halves[0] == pytest.approx(0.5, abs=0.01) and halves.sum() == pytest.approx(1, abs=1e-4)
    total = (-code_bits - decoder_bits).exp2().sum()
    assert total == pytest.approx((halves * prior).sum().item()) and total <= 1


# training


class Noise(Flat):
    """Code 0 is mean 0 and deviation 0.1, code 1 mean 0.2 and deviation 0.4; the codes alternate."""

    def __init__(self):
        super().__init__(16)
        with torch.no_grad():
            self.vqgan.decoder[-1].weight.copy_(torch.tensor([0.0, 0.2]).view(1, 2, 1, 1))
            self.vqgan.decoder[-1].bias.zero_()

    def encode(self, images):
        return (torch.arange(len(images)) % 2).view(-1, 1, 1)

    def draw(self, n):
        mean, deviation = (torch.tensor(each).repeat(n // 2).view(-1, 1, 1, 1) for each in ((0.0, 0.2), (0.1, 0.4)))
        return to_float(to_uint8(mean + deviation * torch.randn(n, 1, 1, 16)))


def test_the_head_finds_the_true_deviations():
    first, training = Noise(), TrainingConfig(train_steps=300, batch_size=64, lr=2e-2, amp=False, ema_beta=0.9)
    state, step = build_state(first, training, DistContext(CPU)), HeadStep(first, training, DistContext(CPU))
    losses = []
    for state.step in range(300):
        losses.append(step(state, [{"image": first.draw(32)}, {"image": first.draw(32)}])["loss"].item())
    head, images = state.modules["head"].eval(), first.draw(2000)
    ids = first.encode(images)
    deviations = (0.5 * head(reconstruct_codes(first, ids[:2]).features)).exp()[..., 1:-1]
    assert torch.allclose(deviations[0], torch.tensor(0.1), rtol=0.1)
    assert torch.allclose(deviations[1], torch.tensor(0.4), rtol=0.1)
    bits = bits_per_dim(first, head, ids, images).mean().item()
    entropy = sum(math.log2(d * 127.5 * math.sqrt(2 * math.pi * math.e)) for d in (0.1, 0.4)) / 2  # of the levels
    assert bits == pytest.approx(entropy, abs=0.08)
    for constant in (0.0, 2 * math.log(0.29)):  # the second is the best constant
        worse = bits_per_dim(first, lambda features, c=constant: torch.full_like(features[:, :1], c), ids, images)
        assert bits < worse.mean().item() - 0.1
    assert losses[-1] < losses[0] and losses[-1] == pytest.approx(bits, abs=0.3)


def test_the_loss_is_that_of_images_and_their_own_codes():
    first, training = Flat(4), TrainingConfig(train_steps=3, batch_size=3, amp=False)
    state, step = build_state(first, training, DistContext(CPU)), HeadStep(first, training, DistContext(CPU))
    images = to_float(torch.tensor([[9, 8, 200, 190], [90, 80, 7, 6], [255, 255, 255, 0]]).view(3, 1, 1, 4).byte())
    ids = torch.tensor([0, 1, 1]).view(3, 1, 1)
    expected = bits_per_dim(first, state.modules["head"], ids, images).mean().item()
    assert step(state, [{"image": images}])["loss"].item() == pytest.approx(expected, rel=1e-6)
    assert step(state, [{"image": images}])["loss"].item() < expected


def test_a_nonfinite_step_changes_no_weights():
    first, training = Noise(), TrainingConfig(train_steps=3, batch_size=4, amp=False)
    state, step = build_state(first, training, DistContext(CPU)), HeadStep(first, training, DistContext(CPU))
    before = {name: value.clone() for name, value in state.modules["head"].state_dict().items()}
    good = first.draw(4)
    first.vqgan.decoder[-1].bias.data.fill_(float("nan"))
    assert not step(state, [{"image": good}])["finite"]
    assert_equal_bits(before, state.modules["head"].state_dict())


def head_run(first, run, steps, **changes):
    settings = {"batch_size": 4, "lr": 1e-3, "amp": False, "device": "cpu"} | changes
    training = TrainingConfig(train_steps=steps, **settings)
    logging = LoggingConfig(log_dir=run.name, logs_root=str(run.parent), steps_per_eval=2, steps_per_log=1)
    return HeadRunConfig(data=first.data, reader=first.reader, training=training, logging=logging)


def trained_head(first, run, steps, **changes):
    train_head(run, first, head_run(first, run, steps, **changes), DistContext(CPU))
    return load_head(run, first)


@pytest.fixture(scope="module")
def uninterrupted(first, tmp_path_factory):
    """A head trained for five steps."""
    return trained_head(first, tmp_path_factory.mktemp("heads") / "whole", 5)


def test_training_changes_only_the_head_and_validates(first, uninterrupted, tmp_path):
    assert uninterrupted.step == 5 and not any(p.requires_grad or p.grad is not None for p in first.vqgan.parameters())
    assert not uninterrupted.head.training and not any(p.requires_grad for p in uninterrupted.head.parameters())
    reloaded = load_vqgan_stage(first.run, None, CPU, amp=False)
    assert_equal_bits(reloaded.vqgan.state_dict(), first.vqgan.state_dict())
    assert [row["step"] for row in lines(uninterrupted.run) if "val/bits_per_dim" in row] == [2, 4, 5]
    assert {path.name for path in (uninterrupted.run / "images").iterdir()} == {"likelihood_00000005.png"}
    held_out, bits = ImageSource(build_dataset(first.data, first.reader, "val"), first.data), []
    for batch in images_in_order(held_out, 100):
        bits.append(uninterrupted.bits_per_dim(first.encode(batch["image"]), batch["image"]))
    logged = [row["val/bits_per_dim"] for row in lines(uninterrupted.run) if "val/bits_per_dim" in row]
    assert logged[-1] == pytest.approx(torch.cat(bits).double().mean().item(), abs=1e-5)
    assert logged[-1] < logged[0]


def test_the_averaged_weights_are_loaded(uninterrupted):
    averaged, plain = (weights(uninterrupted.run, 5, name) for name in ("ema.safetensors", "model.safetensors"))
    assert_equal_bits({f"head.{name}": value for name, value in uninterrupted.head.state_dict().items()}, averaged)
    assert any(not torch.equal(averaged[name], plain[name]) for name in plain)


@pytest.mark.slow
def test_resumed_head_training_is_bitwise_uninterrupted(first, uninterrupted, tmp_path):
    trained_head(first, tmp_path / "parts", 2)
    resumed = trained_head(first, tmp_path / "parts", 5)
    assert resumed.step == 5
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(uninterrupted.run, 5, name), weights(resumed.run, 5, name))
    assert [row for row in lines(uninterrupted.run) if "loss" in row] == [
        row for row in lines(resumed.run) if "loss" in row
    ]


@pytest.mark.slow
def test_gradient_accumulation_matches_the_whole_batch(first, uninterrupted, tmp_path):
    accumulated = trained_head(first, tmp_path / "parts", 5, accumulate=2)
    rows = zip(lines(uninterrupted.run), lines(accumulated.run), strict=True)
    assert all(row == pytest.approx(twin, rel=1e-4, abs=1e-6) for row, twin in rows)


def test_the_stored_reader_is_what_must_be_allowed(first):
    """Not the folder that was typed: that of the stored command must not hide it, and a typed command is meant."""
    shards = importlib.import_module("train.datasets.webdataset").Config
    stored = dataclasses.replace(first, reader=shards(data_dir="pipe:cat stored.tar"))
    trained = SimpleNamespace(space=SimpleNamespace(tokens=16, first_stage=stored), world=None)
    with pytest.raises(ValueError, match="--allow 'pipe:cat stored.tar'"):
        load_or_train_head(DecoderConfig(), ModelConfig(data_dir="/moved"), OutputConfig(), trained)


def test_a_head_with_other_weights_or_settings_is_refused(first, uninterrupted, trained):
    other_vqgan = dataclasses.replace(first, weights="0" * 64)
    with pytest.raises(ValueError, match="other VQGAN weights than those of .* at step 5: pass another --head_dir"):
        load_head(uninterrupted.run, other_vqgan)
    with pytest.raises(ValueError, match="holds another run .--ae_load_dir: other weights"):
        trained_head(other_vqgan, uninterrupted.run, 5)
    with pytest.raises(ValueError, match="holds another run .*--lr 0.001 -> 0.002"):
        trained_head(first, uninterrupted.run, 5, lr=2e-3)
    with pytest.raises(ValueError, match="does not fit this head"):
        load_head(trained / "absorbing_digits", first)  # built on the same VQGAN
    with pytest.raises(ValueError, match="other VQGAN weights"):
        load_head(trained / "vqgan_digits", first)
    with pytest.raises(FileNotFoundError, match="no run in"):
        load_head(trained / "nowhere", first)
