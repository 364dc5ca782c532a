"""The benchmark times real training and sampling, on random weights and data."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.metrics import throughput, workloads
from experiments.metrics.cost import count_nfe
from experiments.metrics.throughput import measure_speeds
from helpers.weight_casts import WeightCasts
from train.config import DataConfig, TrainingConfig
from train.datasets import digits
from train.distributed import DistContext
from train.sampler import SamplerStep
from train.samplers import absorbing
from train.spaces import CodeSpace, LatentSpace, PixelSpace
from vq.config import VQGANConfig, VQGANLossConfig
from vq.perceptual import Perceptual

CPU = torch.device("cpu")
WORLD = DistContext(CPU)


def second_stage(sampler="absorbing", accumulate=1, **settings):
    """The parts of a config that workloads use."""
    config = absorbing.Config(bert_n_emb=16, bert_n_head=2, bert_n_layers=2, **settings)
    return SimpleNamespace(
        sampler=replace(config, sampler=sampler),
        first=SimpleNamespace(ae_load_dir=None),
        data=DataConfig(img_size=16, n_channels=1),
        reader=None,
        training=TrainingConfig(batch_size=4, accumulate=accumulate, amp=False, warmup_iters=0, lr=1e-2),
    )


def space_of(config, network):
    first = config.first.ae_load_dir
    return workloads.random_space(config.sampler.sampler, first, config.data, config.reader, network, CPU)


def build_trainee(config, n_classes=0):
    space = space_of(config, lambda: VQGANConfig(nf=4, ch_mult=(1, 2, 2), codebook_size=16))
    *_, trainee = workloads.sampler_trainees(config.sampler, config.training, space, n_classes, WORLD)
    batch = workloads.random_batch(space, n_classes, config.training.batch_size, config.data, CPU)
    work = workloads.step_workload(trainee, workloads.split_batch(batch, config.training.accumulate), WORLD)
    return space, trainee, batch, work


def test_the_space_matches_that_of_training():
    config, network = second_stage(), lambda: VQGANConfig(nf=4, ch_mult=(1, 2), codebook_size=16)
    assert isinstance(space_of(config, network), CodeSpace)
    config.sampler = replace(config.sampler, sampler="ddpm")
    assert isinstance(space_of(config, None), PixelSpace)  # needs no VQGAN
    config.first.ae_load_dir = "a_run"
    latents = space_of(config, network)
    assert isinstance(latents, LatentSpace) and latents.model_args["shape"] == (4, 8, 8)
    assert workloads.with_amp(latents, True).first_stage.amp and not latents.first_stage.amp


def test_nonsquare_and_cropped_images_match_training():
    data = DataConfig(dataset="digits", img_size=8, img_width=12, n_channels=1, crop_margin=2)
    assert workloads.random_batch(None, 0, 2, data, CPU)["image"].shape == (2, 1, 8, 12)
    images, _ = workloads.try_build_dataset(data, digits.Config())
    assert workloads.image_batches(images, data, 0)[[0, 1, 2]]["image"].shape == (3, 1, 8, 12)
    config = second_stage()
    config.data = replace(config.data, img_width=24)
    assert build_trainee(config)[0].model_args["grid"] == (4, 6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_timed_step_trains_and_its_flops_match_the_formula(accumulate, monkeypatch):
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e12)
    space, trainee, batch, work = build_trainee(second_stage(accumulate=accumulate))
    assert isinstance(trainee.step, SamplerStep) and space.tokens == 16
    network, average = trainee.state.modules["network"], trainee.state.averages["network"].module
    before = [p.detach().clone() for p in (*network.parameters(), *average.parameters())]
    (speed,) = measure_speeds([work], 1, CPU)
    pairs = zip(before, (*network.parameters(), *average.parameters()), strict=True)
    assert sum(not torch.equal(old, new) for old, new in pairs) > 0.8 * len(before)
    assert trainee.state.step == 1
    tokens, weights = 4 * 16, sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
    attention = 2 * 4 * 16 * 16 * 16  # one product of all queries and keys of a layer: 2 B N^2 D
    assert speed.flops == 3 * 2 * tokens * weights + 2 * (2 + 5) * attention  # backward twice forward; 2 layers


def test_phases_follow_the_discriminators_schedule():
    network = VQGANConfig(nf=4, ch_mult=(1, 2), emb_dim=4, codebook_size=16, attn_resolutions=())
    loss = VQGANLossConfig(perceptual_net="none", disc_start_step=3, ndf=4, disc_layers=1)
    data = DataConfig(img_size=8, n_channels=1)
    times = workloads.training_phases(loss, 9)
    assert times == {"no discriminator": 0, "discriminator": 3}
    training = TrainingConfig(batch_size=2, amp=False, train_steps=9)
    (trainee,) = workloads.vqgan_trainees(network, loss, data, training, WORLD)
    batch = workloads.random_batch(None, 0, 2, data, CPU)
    assert batch["image"].shape == (2, 1, 8, 8) and batch["image"].abs().max() <= 1
    calls, autoencoder_backward = [], trainee.step.autoencoder_backward
    trainee.step.autoencoder_backward = lambda *args: calls.append(args[0].step) or autoencoder_backward(*args)
    weight, changed = next(trainee.state.modules["discriminator"].parameters()), []
    for name, step in times.items():
        work, before = workloads.step_workload(trainee, [batch], WORLD, step, name), weight.detach().clone()
        for _ in range(2):
            work.run()
        assert (work.name, trainee.state.step) == (f"float32, {name}", step + 1)
        changed.append(not torch.equal(before, weight))
    assert changed == [False, True] and calls == [0, 0, 3, 3]  # each run is one step
    assert list(workloads.training_phases(loss, 3)) == ["no discriminator"]
    assert list(workloads.training_phases(replace(loss, disc_start_step=0), 3)) == ["discriminator"]
    loss = replace(loss, disc_start_step=0, disc_warmup_steps=1)
    assert workloads.training_phases(loss, 3) == {"discriminator warm-up": 0, "discriminator": 1}


def test_labels_are_used_if_there_are_classes():
    _, trainee, batch, _ = build_trainee(second_stage(), n_classes=3)
    assert batch["label"].max() < 3 and trainee.step.sampler.conditions == ("label",)
    codes = workloads.draw_samples(trainee, batch, absorbing.Sampling(guidance=2.0, sample_steps=2))
    image = trainee.step.space.decode(codes)
    assert image.shape == (4, 1, 16, 16) and image.dtype == torch.uint8


def test_split_batch_keeps_the_content():
    batch = {"position": torch.arange(6), "image": torch.randn(6, 1, 2, 2)}
    parts = workloads.split_batch(batch, 3)
    assert [part["position"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert torch.equal(torch.cat([part["image"] for part in parts]), batch["image"])


def test_precision_variants_follow_the_flags():
    training = TrainingConfig(amp_dtype="bfloat16", compile=True)
    variants = workloads.precision_variants(training, CPU)
    assert list(variants) == ["float32", "bfloat16", "bfloat16, compiled"]
    assert [(each.amp, each.compile) for each in variants.values()] == [(False, False), (True, False), (True, True)]
    assert list(workloads.precision_variants(replace(training, amp=False), CPU)) == ["float32", "float32, compiled"]
    assert list(workloads.precision_variants(TrainingConfig(amp=False), CPU)) == ["float32"]


class PositionSource:
    """A source whose batches are their positions."""

    def __getitem__(self, positions):
        return {"position": torch.tensor(positions)}


def test_conditions_other_than_the_class_come_from_images():
    batch, source = {"position": torch.arange(3), "label": torch.zeros(3)}, PositionSource()
    assert workloads.with_conditions(batch, ("label",), None, CPU) == batch
    with pytest.raises(ValueError, match="condition_image is computed from images"):
        workloads.with_conditions(batch, ("label", "condition_image"), None, CPU)
    with pytest.raises(ValueError, match="have no condition_image"):
        workloads.with_conditions(batch, ("condition_image",), source, CPU)
    conditioned = workloads.with_conditions({"position": torch.arange(3)}, ("position",), source, CPU)
    assert conditioned["position"].tolist() == [0, 1, 2]


def test_an_untrained_perceptual_network_downloads_nothing(monkeypatch):
    pytest.importorskip("lpips")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *args, **kwargs: pytest.fail("a download"))
    torch.manual_seed(0)
    perceptual = Perceptual("squeeze", trained=False)
    x = torch.rand(2, 1, 64, 64, requires_grad=True)
    distance = perceptual(x, torch.zeros_like(x))
    assert distance.shape == (2,)
    distance.sum().backward()
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in perceptual.parameters())


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 5 * 4), (2.0, 5 * 8)])
def test_full_steps_evaluate_every_grid_and_skip_warm_ups(guidance, evaluations, monkeypatch):
    sampling_options, draw_samples = [], workloads.draw_samples
    monkeypatch.setattr(
        workloads,
        "draw_samples",
        lambda *args, **kwargs: sampling_options.append(args[2]) or draw_samples(*args, **kwargs),
    )
    _, trainee, batch, _ = build_trainee(second_stage(), n_classes=3)
    options = absorbing.Sampling(solver="confidence", choice_temp=2.0, sample_steps=50, guidance=guidance)
    with count_nfe(trainee.state.eval_module("network")) as nfe:
        seconds = workloads.time_full_steps(trainee, batch, options, repeats=3)
    assert (nfe.calls, nfe.evaluations) == (5, evaluations)
    assert len(seconds) == 3 and min(seconds) > 0
    assert (sampling_options[0].solver, sampling_options[0].guidance) == ("ancestral", guidance)


def test_timed_sampling_casts_each_weight_once_as_sampling_does():
    config = second_stage()
    config.training = replace(config.training, amp=True, amp_dtype="bfloat16")
    _, trainee, batch, _ = build_trainee(config)
    with WeightCasts(trainee.state.eval_module("network")) as casts:
        workloads.draw_samples(trainee, batch, absorbing.Sampling(sample_steps=3))
    assert len(casts.counts) > 10 and casts.per_weight() == {1}


class TimedSampler:
    """A sampler that calls its network four times: 100 seconds before the first call, 2 between two, 50 at the end."""

    conditions = ()

    def __init__(self, clock):
        self.clock, self.network = clock, nn.Identity()
        self.network.encode = None

    def sample(self, network, rng, *, batch, options):
        self.clock.now += 100
        for pause in (2, 2, 2, 50):
            network(torch.zeros(len(rng), 1))
            self.clock.now += pause


def test_a_solvers_steps_cost_neither_its_set_up_nor_its_end(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(workloads, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    cost = workloads.solver_loop_cost(TimedSampler(clock), {"position": torch.arange(2)}, None, CPU)
    assert (cost.setup, cost.seconds) == (100, 2)
