"""Attention maps of samplers, against the network called for one image and one condition at a time."""

from functools import cache

import pytest
import torch

from diffusion.rng import Streams
from helpers.prompted import CODES, TEXT, TRANSFORMER, UNET
from models.attention import record_maps
from models.attention_recorder import MapRecorder
from models.conditioning import ConditionConfig
from models.conditions import boxes, text
from train.cli.plugins import merge_configs
from train.samplers import absorbing, autoregressive, ddpm

GRID = (4, 6)
CAPTIONS = ["a hat", "a monkey with a very tall hat", "a hat"]
BATCH = {
    "caption": CAPTIONS,
    "boxes": torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 1]]).expand(3, 2, 4),
    "box_class": torch.tensor([[0, 1], [1, 1], [0, 1]]),
    "boxes_mask": torch.tensor([[True, True], [True, False], [True, True]]),
    "box_class_mask": torch.tensor([[True, True], [True, False], [True, True]]),
}
LONGER = "something else that is quite a bit longer than all of the captions here, by so many words"  # other padding
NEGATIVE = {"caption": [LONGER] * 3}


@cache
def make_sampler(kind):
    """A sampler of captions and boxes with random weights, also in layers that start at zero."""
    torch.manual_seed(0)
    options = merge_configs([text.Config, boxes.Config], ConditionConfig)(**TEXT, boxes_classes=2, boxes_width=16)
    settings = {"conditions": ("text", "boxes"), "condition_options": options}
    if kind == "ddpm":
        config = {**UNET, "channel_mults": (1, 2), "attn_factors": (1, 2), "attn_block_type": "transformer"}
        sampler = ddpm.build(ddpm.Config(**config, **settings), shape=(1, *GRID), pixels=True, n_classes=0)
    else:
        module = {"absorbing": absorbing, "autoregressive": autoregressive}[kind]
        sampler = module.build(module.Config(**TRANSFORMER, **settings), codes=CODES, grid=GRID, n_classes=0)
    for parameter in sampler.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sampler.network.eval().requires_grad_(False)
    return sampler


def options_of(kind, **settings):
    return {"ddpm": ddpm, "absorbing": absorbing}[kind].Sampling(**{"sample_steps": 3} | settings)


def states(kind, count=3):
    torch.manual_seed(1)
    if kind == "ddpm":
        return torch.randn(count, 1, *GRID)
    x = torch.randint(0, CODES + 1, (count, *GRID))
    return x.where(torch.arange(count).view(-1, 1, 1) == 1, CODES)  # all but one are masked, so two rows are equal


def one_row(batch, row):
    return {name: values[row : row + 1] for name, values in batch.items()}


def map_alone(kind, x, t, row, fields, layer):
    """The map of a layer for one image under some fields of its condition, (heads, h, w, M)."""
    sampler, x = make_sampler(kind), x[row : row + 1]
    raw = {"text": one_row(fields, row)["caption"]} if fields else {}
    if "boxes" in fields:
        raw["boxes"] = {name: one_row(fields, row)[name] for name in BATCH if name != "caption"}
    with record_maps(sampler.network, [layer]) as maps:
        sampler.predict(sampler.network, x, torch.tensor([t]), sampler.network.encode(raw, x))
    (recorded,) = maps[layer]
    return recorded[0].unflatten(1, GRID if recorded.shape[2] == GRID[0] * GRID[1] else (GRID[0] // 2, GRID[1] // 2))


LAYERS = {"ddpm": ["down_blocks.2.1.cross", "up_blocks.3.1.cross"], "absorbing": ["blocks.0.cross"]}


def agree(kind, recorder, x, times, fields):
    """Whether recorded means are those of the images alone, in each layer; keys of padding have no weight."""
    maps = recorder.maps()
    width = {"text": 0, "boxes": 0} | {name: span.stop - span.start for name, span in maps.spans.items()}
    for layer in LAYERS[kind]:
        for row in range(len(x)):
            alone = torch.stack([map_alone(kind, x, t, row, fields, layer) for t in times]).mean(0)
            recorded = maps.layers[layer][row]
            words = alone.shape[-1] - (width["boxes"] if "boxes" in fields else 1)  # of the text
            parts = recorded.split([width["text"], width["boxes"]], -1)
            wanted = alone[..., :words], alone[..., words:]
            for part, own in zip(parts, wanted, strict=True):
                assert torch.allclose(part[..., : own.shape[-1]], own, atol=1e-6), (layer, row)
                assert not part[..., own.shape[-1] :].any(), (layer, row)
    return True


def record(kind, x, times, recorder, rows=None, negative=None, **settings):
    sampler = make_sampler(kind)
    options = options_of(kind, **settings)
    denoise = sampler.make_denoiser(sampler.network, BATCH, options, x, negative=negative, recorder=recorder)
    for t in times:
        if kind == "ddpm":
            denoise(x, torch.full((len(x),), t))
        else:
            denoise(x if rows is None else x[rows], torch.full((len(x if rows is None else rows),), t), rows)
    return recorder


@pytest.mark.parametrize("kind", ["ddpm", "absorbing"])
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 1.0},
        {"guidance": 3.0},
        {"guidance": 3.0, "region_guidance": 2.0},
        {"guidance": 3.0, "region_guidance": 2.0, "guidance_interval": (0.3, 0.6)},
        {"guidance": 0.0, "region_guidance": 2.0},  # the middle of the chain is not dropped
    ],
    ids=["no guidance", "guidance", "chain of three", "interval", "first of three"],
)
def test_means_are_those_of_images_alone(kind, settings):
    x, times = states(kind), [0.9, 0.5, 0.25]
    for negative in (None, NEGATIVE) if settings["guidance"] not in (0, 1) else (None,):
        recorder = record(kind, x, times, MapRecorder(), negative=negative, **settings)
        assert agree(kind, recorder, x, times, BATCH)
        assert recorder.maps().counts.tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["ddpm", "absorbing"])
def test_each_part_of_a_chain_has_its_own_maps(kind):
    x, times, settings = states(kind), [0.9, 0.4], {"guidance": 3.0, "region_guidance": 2.0}
    weaker = {"caption": CAPTIONS}
    assert agree(kind, record(kind, x, times, MapRecorder(part=1), **settings), x, times, weaker)
    null = record(kind, x, times, MapRecorder(part=0), negative=NEGATIVE, **settings)
    assert agree(kind, null, x, times, NEGATIVE)


@pytest.mark.parametrize("kind", ["ddpm", "absorbing"])
def test_calls_that_leave_a_part_out_are_not_counted(kind):
    x, settings = states(kind), {"guidance": 3.0, "guidance_interval": (0.3, 0.6)}
    recorder = record(kind, x, [0.9, 0.5, 0.25], MapRecorder(part=0, per_step=True), **settings)
    assert recorder.maps().counts.tolist() == [1, 1, 1]
    assert [step.times.tolist() for step in recorder.steps] == [[0.5] * 3]
    with pytest.raises(ValueError, match="no call evaluated part 0 of the chain: pass the recorder"):
        record(kind, x, [0.9], MapRecorder(part=0), guidance=1.0).maps()


def test_codes_of_some_steps_alone_have_their_own_counts():
    x, recorder = states("absorbing"), MapRecorder(per_step=True)
    sampler = make_sampler("absorbing")
    denoise = sampler.make_denoiser(sampler.network, BATCH, options_of("absorbing", guidance=2.0), x, recorder=recorder)
    for t, rows in ((0.9, [0, 1, 2]), (0.5, [1]), (0.25, [0, 1])):
        denoise(x[rows], torch.full((len(rows),), t), torch.tensor(rows))
    maps = recorder.maps()
    assert maps.counts.tolist() == [2, 3, 1] and [step.images.tolist() for step in recorder.steps][1:] == [[1], [0, 1]]
    (layer,) = LAYERS["absorbing"]
    for row in range(3):  # without a time in the network, its map is the same in each step
        alone = map_alone("absorbing", x, 0.5, row, BATCH, layer)
        assert torch.allclose(maps.layers[layer][row].sum(-1), torch.ones(2, *GRID), atol=1e-6)
        assert torch.allclose(maps.layers[layer][row, ..., 0], alone[..., 0], atol=1e-6)
    total = recorder.maps(mean=False).layers[layer]
    assert torch.allclose(total, maps.layers[layer] * torch.tensor([2, 3, 1]).view(3, 1, 1, 1, 1), atol=1e-6)


def test_rows_that_are_evaluated_once_count_in_each_image():
    x, recorder = states("absorbing"), MapRecorder()
    sampler, batches = make_sampler("absorbing"), []
    hook = sampler.network.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    record("absorbing", x, [0.9], recorder, guidance=2.0)
    hook.remove()
    assert batches == [4]  # 2 of 3 images are equal, and all nulls of these
    assert recorder.maps().counts.tolist() == [1, 1, 1]
    (weights,) = recorder.maps().layers.values()
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1])


@pytest.mark.parametrize("kind", ["ddpm", "absorbing"])
def test_recording_does_not_change_the_samples(kind):
    sampler, solvers = make_sampler(kind), {"ddpm": ("ddim", "heun"), "absorbing": ("ancestral", "confidence")}
    for solver in solvers[kind]:
        options = options_of(kind, solver=solver, guidance=2.0, guidance_interval=(0.0, 0.6))
        samples = []
        for recorder in (None, MapRecorder(per_step=True), MapRecorder("self")):
            rng = Streams([3, 4, 5], "cpu")
            arguments = {"options": options, "batch": BATCH, "recorder": recorder}
            samples.append(sampler.sample(sampler.network, rng, **arguments))
        assert torch.equal(samples[0], samples[1]) and torch.equal(samples[0], samples[2])
        assert recorder.maps().counts.min() >= 3 - (kind == "absorbing") * 2


def test_maps_of_windows_and_of_autoregression_are_refused():
    sampler, options = make_sampler("absorbing"), options_of("absorbing")
    arguments = {"options": options, "batch": BATCH, "recorder": MapRecorder()}
    with pytest.raises(ValueError, match="drawn in windows: leave --window_stride out"):
        sampler.sample(sampler.network, Streams([0, 1, 2], "cpu"), window_stride=2, **arguments)
    sampler = make_sampler("autoregressive")
    with pytest.raises(ValueError, match="each of whose calls sees one code: pass --sampler absorbing"):
        sampler.sample(sampler.network, Streams([0, 1, 2], "cpu"), **arguments | {"options": autoregressive.Sampling()})


def test_memory_does_not_grow_with_the_steps():
    x, sizes = states("ddpm"), []
    for times in ([0.9], [0.9, 0.7, 0.5, 0.3, 0.1]):
        recorder = record("ddpm", x, times, MapRecorder(), guidance=2.0)
        held = [value for value in vars(recorder).values() if isinstance(value, torch.Tensor)]
        sizes.append(sum(part.numel() for part in (*held, *recorder.sums.values())))
        assert not recorder.steps
    assert sizes[0] == sizes[1] > 0
