"""No step of a solver waits for the device: counted on a fake device (helpers/fake_device.py)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion.solvers import solvers_for
from experiments.metrics.cost import count_launches
from experiments.metrics.workloads import solver_loop_cost, solver_loop_options
from helpers.fake_device import DEVICE, FakeDeviceMode
from helpers.parametrize import slow_after
from models.conditions import image
from train.samplers import absorbing, autoregressive, ddpm

CODES, GRID, CLASSES, BATCH = 8, (3, 4), 3, 3
NETWORK = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 1}
UNET = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 2}
SAMPLERS = {
    "absorbing": (absorbing, NETWORK),
    "autoregressive": (autoregressive, NETWORK),
    "iddpm": (ddpm, UNET | {"total_steps": 12}),
    "edm": (ddpm, UNET | {"process": "edm"}),
    "flow": (ddpm, UNET | {"process": "flow", "time_embedding": "noise_level"}),
    "absorbing, cosine": (absorbing, NETWORK | {"position": "rope", "schedule": "cosine"}),
    "ddpm, v": (ddpm, UNET | {"total_steps": 12, "variance": "fixed_large", "prediction": "v"}),
    "image": (
        ddpm,
        UNET | {"process": "flow", "conditions": ("image",), "condition_options": image.Config(condition_channels=1)},
    ),
}
SETTINGS = {  # of sampling, by the settings' class
    absorbing: {"temp": 0.9, "last_temp": 0.5, "top_k": 6, "top_p": 0.95, "guidance_interval": (0.2, 0.8)},
    autoregressive: {"temp": 0.9, "last_temp": 0.5, "top_k": 6, "guidance_schedule": "linear"},
    ddpm: {"dynamic_threshold": 0.9, "guidance_rescale": 0.5, "guidance_interval": (0.2, 0.8)},
}


def build(name):
    module, settings = SAMPLERS[name]
    space = {"shape": (1, 4, 4), "pixels": True} if module is ddpm else {"codes": CODES, "grid": GRID}
    torch.manual_seed(0)
    return module, module.build(module.Config(**settings), **space, n_classes=CLASSES)


def batch_of(sampler):
    batch = {"label": torch.arange(BATCH) % CLASSES, "condition_image": torch.rand(BATCH, 1, 4, 4)}
    return {name: batch[name].to(DEVICE) for name in sampler.conditions} | {"position": torch.arange(BATCH)}


def cost_on_device(sampler, options):
    with FakeDeviceMode():
        sampler.network.to(DEVICE).eval()
        return solver_loop_cost(sampler, batch_of(sampler), options, DEVICE, repeats=0)


@pytest.mark.parametrize("name", slow_after(5, SAMPLERS))
def test_no_step_of_a_solver_waits(name):
    module, sampler = build(name)
    for setting, options in solver_loop_options(sampler, module.Sampling()).items():
        if solvers_for(sampler.process)[options.solver].takes_any_steps:
            options = replace(options, sample_steps=4)
        cost = cost_on_device(sampler, options)
        assert cost.waits == 0 and 0 < cost.launches < 120, setting


@pytest.mark.parametrize("name", ["absorbing", "autoregressive", "iddpm"])
def test_no_step_waits_with_every_setting(name):
    module, sampler = build(name)
    for solver, entry in solvers_for(sampler.process).items():
        steps = 6 if entry.takes_any_steps else None
        options = module.Sampling(solver=solver, sample_steps=steps, guidance=2.0, **SETTINGS[module])
        assert cost_on_device(sampler, options).waits == 0, solver


def test_remasking_by_confidence_waits_once_a_step():
    _, sampler = build("absorbing")
    options = absorbing.Sampling(solver="remask", sample_steps=6, remasking="conf", remask_eta=0.5)
    assert cost_on_device(sampler, options).waits == pytest.approx(1, abs=0.21)  # a step may reveal nothing


# The counter


def test_waits_are_counted_by_what_they_read():
    with FakeDeviceMode():
        x, mask = torch.arange(6.0, device=DEVICE), torch.arange(6, device=DEVICE) > 2
        for wait in (
            *(lambda: x.sum().item(), lambda: bool(mask.any()), lambda: x.tolist(), lambda: x.nonzero()),
            *(lambda: x[mask], lambda: x.unique(), lambda: x.cpu(), lambda: torch.zeros(3).to(DEVICE)),
            *(lambda: x.masked_select(mask), lambda: x.copy_(torch.zeros(6)), lambda: torch.equal(x, x)),
            lambda: x.index_put_((mask,), torch.tensor(1.0)),
        ):
            with count_launches(DEVICE) as launches:
                wait()
            assert launches.waits == 1, launches.waiting
        with count_launches(DEVICE) as launches:
            x[torch.tensor([2, 1]).to(DEVICE, non_blocking=True)], torch.where(mask, x, 2 * x), x * torch.tensor(2.0)
            x.masked_fill(mask, 0), x.masked_scatter(mask, x), torch.full((3,), 2.0, device=DEVICE)
            x.copy_(torch.zeros(6), non_blocking=True)
        assert launches.waits == 0


def test_launches_are_operations_on_the_device_without_views():
    with FakeDeviceMode(), count_launches(DEVICE) as launches:
        x = torch.empty(2, 3, device=DEVICE).fill_(1.0)
        x.view(3, 2).t()[0].unsqueeze(0).expand(4, -1)
        torch.ones(3) + 1
        x + 1
    assert launches.operations == {"fill_": 1, "add": 1}
    with count_launches(torch.device("cpu")) as launches:
        torch.ones(3) + 1
    assert launches.count == 2 and launches.waits == 0


def test_a_training_step_runs_on_the_fake_device_and_is_counted():
    network, data = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)), torch.rand(5, 4)

    def train(device):
        torch.manual_seed(0)
        for module in network:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        network.to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        x = data.to(device)
        with count_launches(torch.device(device)) as launches:
            for _ in range(2):
                optimizer.zero_grad()
                loss = network(x).square().mean()
                loss.backward()
                optimizer.step()
        with count_launches(torch.device(device)) as reading:
            loss.item()
        return loss.detach().cpu(), launches, reading

    expected, *_ = train("cpu")
    with FakeDeviceMode():
        loss, launches, reading = train(DEVICE)
    assert torch.allclose(loss, expected)
    assert launches.waits == 0 and launches.count > 40 and reading.waits == 1
