"""Code that reads values runs on a fake device (helpers/fake_device.py), with the same results as on the CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.denoisers import guided, windowed
from diffusion.flow import RectifiedFlow
from diffusion.likelihood import bits_per_code
from diffusion.logits_warper import LogitsWarper
from diffusion.rng import Streams
from diffusion.solvers import solvers_for
from experiments.harness import attention_targets
from helpers.fake_device import DEVICE, FakeDeviceMode, FakeDeviceTensor
from helpers.labels import label_encoders
from helpers.parametrize import slow_after
from helpers.solving import solve_in_steps
from models.transformer import Transformer
from train.samplers import absorbing, ddpm
from train.spaces import EditInput

CODES, GRID, CLASSES = 16, (4, 4), 3
PROCESS = AbsorbingDiffusion(CODES, steps=3)
SOLVERS = solvers_for(PROCESS)
GAUSSIAN_SOLVERS = solvers_for(RectifiedFlow())
GAUSSIAN_KINDS = {"gaussian": (0.2, 0.7), "edm": (0.1, 20.0), "flow": None}  # intervals of guidance
UNET = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}


def run_on(device, function):
    """Calls function(to), where to(...) moves a network or tensor to a device, and `to.device` is that device."""

    def to(value):
        return value.to(device)

    to.device = torch.device(device)
    torch.manual_seed(0)
    with FakeDeviceMode():
        result = function(to)
        assert isinstance(result, FakeDeviceTensor) == (to.device == DEVICE)
        return result.cpu()


def assert_same_results(function):
    """Asserts that the results on both devices are equal, up to rounding; returns them on the CPU."""
    on_cpu, on_fake = run_on("cpu", function), run_on(DEVICE, function)
    if on_cpu.dtype == torch.int64:
        assert torch.equal(on_cpu, on_fake)
    else:  # attention may take another path
        assert torch.allclose(on_cpu, on_fake, atol=1e-5)
    return on_cpu


def test_a_tensor_on_the_wrong_device_is_detected():
    with FakeDeviceMode():
        with pytest.raises(RuntimeError, match="more than one device"):
            torch.zeros(3, device=DEVICE) + torch.zeros(3)
        with pytest.raises(RuntimeError, match="more than one device"):
            torch.zeros(3, 2, device=DEVICE)[torch.tensor([0, 1])]
        x = torch.zeros(3, device=DEVICE)
        x[1] = 5
        assert x.tolist() == [0, 5, 0] and (x + torch.tensor(1.0)).device == DEVICE


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("with_callback", slow_after(1, [True, False]))
def test_every_solver_with_guidance_on_a_larger_canvas(name, with_callback):
    on_step = (lambda i, t, s, x, logits: x) if with_callback else None

    def function(to):
        network = to(
            Transformer(codes=CODES, grid=GRID, width=16, heads=2, layers=1, encoders=label_encoders(CLASSES, 16))
        )
        labels = to(torch.tensor([0, 2]))
        chain = [torch.full_like(labels, CLASSES), labels]
        denoise = guided(lambda x, t, label: network(x, {"label": label}), chain, [2.0], schedule="cosine")
        denoise = windowed(denoise, GRID, 2, may_change=lambda x: x == CODES)
        warper = LogitsWarper(temperature=0.9, final_temperature=0.0, top_k=9, top_p=0.95)
        canvas = torch.full((2, 5, 4), PROCESS.mask, device=to.device)
        canvas[1, 2:] = 3
        rng = Streams([1, 2], to.device)
        return solve_in_steps(
            SOLVERS[name].solve,
            denoise,
            PROCESS,
            canvas,
            steps=20 if name == "first_hitting" else 4,
            rng=rng,
            on_step=on_step,
            warper=warper,
        )

    assert (assert_same_results(function)[1, 2:] == 3).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sampler_from_known_codes(name):
    def function(to):
        config = absorbing.Config(bert_n_emb=16, bert_n_head=2, bert_n_layers=1, position="rope")
        built = absorbing.build(config, codes=CODES, grid=GRID, n_classes=CLASSES)
        x0, keep = torch.arange(16).view(1, 4, 4).expand(3, 4, 4), torch.arange(16).view(1, 4, 4).expand(3, 4, 4) < 8
        options = absorbing.Sampling(
            solver=name, guidance=2.0, sample_steps=16 if name == "first_hitting" else 4, temp=0.8
        )
        batch, rng = {"label": to(torch.tensor([0, 0, 2]))}, Streams([1, 2, 3], to.device)
        edit = EditInput(to(x0), to(keep), 0.7)
        return built.sample(to(built.network), rng, batch=batch, options=options, edit=edit)

    assert torch.equal(assert_same_results(function)[:, :2], torch.arange(8).view(1, 2, 4).expand(3, 2, 4))


@pytest.mark.parametrize("solver", GAUSSIAN_SOLVERS)
@pytest.mark.parametrize("kind", slow_after(1, GAUSSIAN_KINDS))
@pytest.mark.parametrize("strength", [None, 0.6])
def test_a_gaussian_sampler(solver, kind, strength):
    def function(to):
        built = ddpm.build(ddpm.Config(**UNET, process=kind), shape=(3, 8, 8), pixels=True, n_classes=CLASSES)
        with torch.no_grad():
            for parameter in built.network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        options = ddpm.Sampling(
            solver=solver, sample_steps=4, guidance=2.0, guidance_interval=GAUSSIAN_KINDS[kind], dynamic_threshold=0.9
        )
        batch, edit = {"label": to(torch.tensor([0, 2]))}, None
        if strength is not None:
            edit = EditInput(to(torch.zeros(2, 3, 4, 6)), to(torch.arange(48).view(2, 4, 6) < 30), strength)
        network, rng = to(built.network).eval(), Streams([1, 2], to.device)
        return built.sample(network, rng, batch=batch, options=options, shape=(4, 6), edit=edit)

    assert assert_same_results(function).abs().max() > 0.1


def corrupted_codes(to):
    """A process, codes, and the same codes partly masked."""
    process, codes = AbsorbingDiffusion(CODES, schedule="arccos"), to(torch.arange(32).view(2, 4, 4) % CODES)
    rng = Streams([1, 2], to.device)
    x_t = process.corrupt(codes, process.times(rng), rng)
    return process, process.corrupt_count(x_t, torch.full((2,), 9, device=to.device), rng), rng


def test_a_draw_of_the_reverse_kernel():
    def function(to):
        process, x_t, rng = corrupted_codes(to)
        return process.reverse(x_t, torch.zeros(2, 4, 4, CODES, device=to.device), 0.5, 0.25, rng)

    assert (assert_same_results(function) == CODES).any()


@pytest.mark.parametrize("sigma", [0.1, torch.linspace(0, 0.1, 32).view(2, 4, 4)])
def test_the_reverse_kernel(sigma):
    def function(to):
        process, x_t, _ = corrupted_codes(to)
        logits = torch.zeros(2, 4, 4, CODES, device=to.device)
        return process.reverse_probabilities(x_t, logits, 0.5, 0.25, to(sigma) if torch.is_tensor(sigma) else sigma)

    assert_same_results(function)


@pytest.mark.parametrize("steps", [3, None])
@pytest.mark.parametrize("calls", [2, None])
def test_likelihoods(steps, calls):
    def function(to):
        network = to(Transformer(codes=CODES, grid=GRID, width=16, heads=2, layers=1))
        x0, rng = to(torch.arange(32).view(2, 4, 4) % CODES), Streams([1, 2], to.device)
        return bits_per_code(lambda x, t: network(x), AbsorbingDiffusion(CODES, steps, "cosine"), x0, rng, calls).total

    assert (assert_same_results(function) > 0).all()


def test_codes_of_real_images_are_noised_at_times_of_training(monkeypatch):
    """On the device of the codes, at times 1/3, 2/3 and 1 of three steps, which denoisers take on the CPU."""
    times = []

    def function(to):
        def denoise(x, t):
            noised.append(x)
            times.append(t.tolist())

        noised = []
        monkeypatch.setattr(
            attention_targets, "encode_images", lambda images, model: to(torch.arange(32).view(2, 4, 4) % CODES)
        )
        model = SimpleNamespace(
            sampler=SimpleNamespace(process=PROCESS, n_classes=0),
            device=to.device,
            conditions_of=lambda item, index: {},
            inference=nullcontext,
            make_denoiser=lambda *_, **__: denoise,
        )
        source = [{"image": torch.zeros(1, 4, 4, dtype=torch.uint8)}] * 2
        images = attention_targets.RealImages(model, source, (0, 1), absorbing.Sampling(), 0, 4)
        images.record([0, 1], None)
        return torch.stack(noised)

    noised = assert_same_results(function)
    assert noised.shape == (4, 2, 4, 4) and (noised == PROCESS.mask).any()
    assert torch.allclose(torch.tensor(times[:4]), torch.tensor([1, 2, 2, 3]).view(4, 1) / 3)
