"""Sampling options of the absorbing sampler: guidance, canvases, known codes, solvers."""

import dataclasses
import inspect
import math

import pytest
import torch

import train.control
import train.samplers
import train.trained_sampler
from diffusion.absorbing import AbsorbingDiffusion
from diffusion.absorbing_solvers import confidence
from diffusion.rng import Streams
from diffusion.solvers import get_solver, solvers_for
from helpers.labels import LabelNetwork
from train.samplers import NotFiniteError, _codes, absorbing, select_solver
from train.sampling_config import GUIDANCE_SCALES
from train.spaces import EditInput

GRID, CODES, CLASSES = (3, 4), 6, 5
SOLVERS = sorted(solvers_for(AbsorbingDiffusion(2)))
LABELS = torch.tensor([1, 4, 1, 0])
BATCH = {"label": LABELS}


class Recorder(LabelNetwork):
    """Logits depend on a row's codes and its label."""

    def __init__(self):
        super().__init__(CLASSES)

    def predict(self, ids, labels):
        positions = torch.arange(float(ids[0].numel() * CODES)).view(*ids.shape[1:], CODES)
        return (positions * (1 + labels + ids.sum((1, 2))).view(-1, 1, 1, 1)).cos()


def make_sampler(n_classes=CLASSES, **settings):
    small = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}
    return absorbing.build(absorbing.Config(**small | settings), codes=CODES, grid=GRID, n_classes=n_classes)


def options(name="ancestral", **settings):
    steps = {"first_hitting": None}.get(name, 4)
    return absorbing.Sampling(**{"solver": name, "sample_steps": steps} | settings)


def random_codes(*shape, seed=0):
    return torch.randint(0, CODES, shape, generator=torch.Generator().manual_seed(seed))


def test_guidance_evaluates_both_conditions_in_one_call():
    recorder = Recorder()
    make_sampler().sample(
        recorder, Streams([0, 1]), batch={"label": LABELS[:2]}, options=options(guidance=2.0, sample_steps=1)
    )
    (ids, labels), *others = recorder.calls
    assert not others and labels.tolist() == [1, 4, CLASSES] and (ids == CODES).all()  # the empty canvas has one null


def test_networks_with_a_time_are_given_that_of_training():
    """With another schedule in sampling, the same t masks another fraction of the codes than it did in training."""
    sampler, t = make_sampler(schedule="square"), torch.tensor([1.0, 0.75, 0.5, 0.25])
    solver, settings = get_solver(sampler.process, "halton"), options("halton", reveal="cosine", sample_steps=4)
    times = sampler.training_time(t, sampler.sampling_process(solver, settings))
    masked = sampler.process.mask_prob(times).tolist()
    assert masked == pytest.approx([math.sin(math.pi / 2 * step / 4) for step in (4, 3, 2, 1)])


def test_without_a_batch_the_null_is_used_and_guidance_refused():
    recorder = Recorder()
    make_sampler().sample(recorder, Streams([0]), options=options())
    assert all((labels == CLASSES).all() for _, labels in recorder.calls)
    for batch in (None, {}):
        with pytest.raises(ValueError, match="got guidance 2.0 without a condition: pass --guidance 1"):
            make_sampler().sample(recorder, Streams([0]), batch=batch, options=options(guidance=2.0))


def test_guidance_follows_its_schedule_and_its_interval():
    ids, t = torch.full((4, *GRID), CODES), torch.tensor([1.0, 0.5, 0.2, 0.0])
    strong, weak = Recorder()(ids, BATCH), Recorder()(ids)
    for settings, scales in (
        ({}, [3, 3, 3, 3]),
        ({"guidance_schedule": "linear"}, [1, 2, 2.6, 3]),
        ({"guidance_interval": (0.1, 0.6)}, [1, 3, 3, 1]),
    ):
        pred = make_sampler().make_denoiser(Recorder(), BATCH, options(guidance=3.0, **settings), ids)(ids, t)
        assert torch.allclose(pred, weak + torch.tensor(scales).view(-1, 1, 1, 1) * (strong - weak), atol=1e-5)


def test_an_interval_that_guides_no_step_is_refused():
    settings = {"guidance": 3.0, "guidance_interval": (0.3, 0.4)}  # the steps start at 1, 0.75, 0.5 and 0.25
    with pytest.raises(ValueError, match="which holds none of the 4 steps"):
        make_sampler().sample(Recorder(), Streams([0]), batch={"label": LABELS[:1]}, options=options(**settings))


@pytest.mark.parametrize("name", ["ancestral", "first_hitting", "confidence"])
def test_logits_that_are_not_numbers_are_refused(name):
    """They gave the last code everywhere."""
    model = make_sampler()
    torch.nn.init.constant_(model.network.head.weight, torch.nan)
    with pytest.raises(NotFiniteError, match=f"solver {name} with .* gave values that are not finite"):
        model.sample(model.network, Streams([0]), options=options(name))


# Larger canvases


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_windows_of_a_larger_canvas_keep_each_image_s_label(guidance):
    """Each window in a call belongs to a canvas with that label."""
    recorder, canvases = Recorder(), []
    ids = make_sampler().sample(
        recorder, Streams([0, 1]), batch={"label": LABELS[:2]}, options=options(guidance=guidance), shape=(5, 7),
        window_stride=1, on_step=lambda i, t, s, x, logits: canvases.append(x) or x,
    )  # fmt: skip
    assert ids.shape == (2, 5, 7) and (ids < CODES).all()
    states = [torch.full_like(ids, CODES), *canvases]
    for windows, labels in recorder.calls:
        assert windows.shape[1:] == GRID and (windows == CODES).flatten(1).any(1).all()
        for window, label in zip(windows, labels.tolist(), strict=True):
            owners = [0, 1] if label == CLASSES else [LABELS[:2].tolist().index(label)]
            crops = torch.stack([x[owners].unfold(1, 3, 1).unfold(2, 4, 1) for x in states])
            assert (crops == window).flatten(-2).all(-1).any()


def test_a_canvas_in_one_pass_takes_an_image_as_condition():
    batch = {"condition_image": torch.zeros(1, 3, 5, 7)}
    sampler = make_sampler(n_classes=0, conditions=("image",), position="rope")
    ids = sampler.sample(sampler.network, Streams([0]), batch=batch, options=options(), shape=(5, 7))
    assert ids.shape == (1, 5, 7)


def test_windows_are_half_a_grid_apart_by_default():
    stride_1 = make_sampler(n_classes=0).sample(
        Recorder(), Streams([0]), options=options(), shape=(5, 7), window_stride=1
    )
    default = make_sampler(n_classes=0).sample(Recorder(), Streams([0]), options=options(), shape=(5, 7))
    assert torch.equal(default, stride_1)  # half of 3, rounded down
    wide = make_sampler(n_classes=0).sample(Recorder(), Streams([0]), options=options(), shape=(5, 7), window_stride=3)
    assert not torch.equal(default, wide)


@pytest.mark.parametrize("position", ["rope", "bias", "none"])
def test_with_relative_positions_a_canvas_is_one_pass_a_step(position):
    recorder, sampler = Recorder(), make_sampler(position=position)
    ids = sampler.sample(
        recorder, Streams([0, 1]), batch={"label": LABELS[:2]}, options=options("halton"), shape=(5, 6)
    )
    assert ids.shape == (2, 5, 6)
    assert len(recorder.calls) == 4 and all(canvas.shape[1:] == (5, 6) for canvas, _ in recorder.calls)
    sampler.sample(recorder, Streams([0]), options=options(), shape=(5, 6), window_stride=1)
    assert recorder.calls[-1][0].shape[1:] == GRID  # window_stride still selects windows


@pytest.mark.parametrize("name", SOLVERS)
def test_a_canvas_of_the_grid_in_windows_is_the_plain_sample(name):
    sampler, sampling = make_sampler(), options(name, guidance=2.0, temp=0.8)
    torch.manual_seed(0)
    network = sampler.network.eval()
    for parameter in network.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    draws = [
        sampler.sample(network, Streams([1, 2, 3, 4]), batch=BATCH, options=sampling, window_stride=stride)
        for stride in (None, 2)
    ]
    assert torch.equal(*draws)


# Samples do not depend on the batch


@pytest.fixture(scope="module")
def network():
    """A transformer in float64 with random weights."""
    torch.manual_seed(0)
    network = make_sampler().network.double().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance": 2.5, "guidance_schedule": "cosine"},
        {"top_k": 3, "temp": 1.3, "last_temp": 0.6},
        {"top_p": 0.7},
    ],
)
def test_codes_do_not_depend_on_the_batch(network, name, settings):
    sampler, seeds = make_sampler(), [11, 12, 13, 14]
    keep = random_codes(4, *GRID, seed=2) < 2
    keep &= (torch.arange(4) > 1).view(4, 1, 1)  # two of the four start with known codes
    edit = EditInput(random_codes(4, *GRID), keep)

    def draw(rows, **kwargs):
        part = EditInput(edit.x0[rows], edit.keep[rows])
        rng = Streams([seeds[row] for row in rows])
        sampling = options(name, **settings)
        return sampler.sample(network, rng, batch={"label": LABELS[rows]}, options=sampling, edit=part, **kwargs)

    together = draw([0, 1, 2, 3])
    assert all(torch.equal(draw([row])[0], together[row]) for row in range(4))
    assert torch.equal(draw([3, 1]), together[[3, 1]])
    assert torch.equal(draw([0, 1, 2, 3], on_step=lambda i, t, s, x, logits: x), together)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1, 0, 1, 1])])
def test_rows_with_equal_codes_and_labels_are_evaluated_once(labels):
    x, t = random_codes(3, *GRID)[[0, 1, 0, 0, 1, 2]], torch.linspace(1, 0.5, 6)  # the network has no time input
    recorder, batch = Recorder(), None if labels is None else {"label": labels}
    pred = make_sampler().make_denoiser(recorder, batch, options(), x)(x, t)
    assert torch.equal(pred, Recorder()(x, {} if labels is None else {"label": labels}))
    assert len(recorder.calls) == 1 and len(recorder.calls[0][0]) == (3 if labels is None else 5)
    different = random_codes(5, *GRID, seed=3)
    assert torch.equal(
        make_sampler().make_denoiser(recorder, None, options(), different)(different, t[:5]), Recorder()(different)
    )
    assert torch.equal(recorder.calls[-1][0], different)  # in their original order


# Known codes


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", [None, (5, 7)])
def test_known_codes_are_kept_and_the_rest_is_drawn(name, shape):
    x0 = random_codes(4, *(shape or GRID))
    keep = random_codes(4, *(shape or GRID), seed=5) > 2
    sampling = options(name, remasking="cap", remask_eta=1.0) if name == "remask" else options(name)
    out = make_sampler().sample(
        Recorder(), Streams([0, 1, 2, 3]), batch=BATCH, options=sampling, edit=EditInput(x0, keep), shape=shape
    )
    assert torch.equal(out[keep], x0[keep]) and (out < CODES).all() and (out[~keep] != x0[~keep]).any()


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_strength_is_the_masked_fraction_of_the_rest(t):
    x0, states, n = random_codes(200, *GRID), [], 200
    recorder, edit = Recorder(), EditInput(x0, torch.zeros_like(x0).bool(), t)
    make_sampler(schedule="cosine", n_classes=0).sample(
        recorder, Streams(list(range(n))), options=options(sample_steps=1), edit=edit,
        on_step=lambda i, t, s, x, logits: states.append(x) or x,
    )  # fmt: skip
    initial = recorder.calls[0][0]
    assert (initial == CODES).float().mean().item() == pytest.approx(t, abs=0.03)  # whatever the schedule
    assert ((initial == x0) | (initial == CODES)).all() and (states[0] < CODES).all()


# Solvers and their settings


AUTO = {
    "ancestral": "square",
    "first_hitting": "square",
    "remask": "square",
    "discrete": "square",
    "halton": "arccos",
    "confidence": "cosine",
}
REVEALS = [(name, "auto", own) for name, own in AUTO.items()] + [(name, "linear", "linear") for name in AUTO]


@pytest.mark.parametrize("name, reveal, expected", REVEALS)
def test_the_reveal_schedule_is_the_chosen_or_the_solver_s_own(name, reveal, expected):
    sampler = make_sampler(schedule="square", total_steps=77)
    process = sampler.sampling_process(get_solver(sampler.process, name), options(name, reveal=reveal))
    assert process == AbsorbingDiffusion(CODES, 77, expected)
    assert sampler.process.schedule == "square"


@pytest.mark.parametrize("name", SOLVERS)
def test_default_steps_are_the_solver_s_own(name):
    steps = []
    make_sampler(total_steps=5).sample(
        Recorder(), Streams([0]), options=options(name, sample_steps=None),
        on_step=lambda i, t, s, x, logits: steps.append(i) or x,
    )  # fmt: skip
    assert len(steps) == (12 if name == "first_hitting" else 5)


def test_the_settings_of_solvers_reach_them():
    process = make_sampler().process
    entry, kwargs = select_solver(process, options("confidence", choice_temp=0.0))
    assert entry.solve is confidence and kwargs == {"choice_temp": 0.0}
    kwargs = select_solver(process, options("remask", remasking="conf", remask_eta=0.2))[1]
    assert kwargs == {"remasking": "conf", "remask_eta": 0.2}


@pytest.mark.parametrize("flag, value", [("choice_temp", 1.0), ("remasking", "cap"), ("remask_eta", 0.1)])
def test_settings_of_another_solver_are_refused(flag, value):
    owner = "confidence" if flag == "choice_temp" else "remask"
    for name in SOLVERS:
        sampling = options(name, **{flag: value})
        if name == owner:
            make_sampler().sample(Recorder(), Streams([0]), options=sampling)
        else:
            with pytest.raises(
                ValueError, match=f"got {flag} {value} for solver {name}, which has no such option: leave --{flag}"
            ):
                make_sampler().sample(Recorder(), Streams([0]), options=sampling)


GREEDY = [{"temp": 1e-4}, {"temp": 0.0}, {"temp": 0.0, "last_temp": 0.0}, {"top_k": 1}, {"top_p": 1e-6}]


@pytest.mark.parametrize("settings", GREEDY)
@pytest.mark.parametrize("name", SOLVERS)
def test_temperature_top_k_and_top_p_reach_every_solver(name, settings):
    class Certain(LabelNetwork):
        def predict(self, ids, labels):
            return torch.tensor([0.0, 0.1, 0.3, 0.2, 0.1, 0.0]).expand(*ids.shape, CODES)

    out = make_sampler().sample(Certain(CLASSES), Streams([0, 1]), options=options(name, **settings))
    assert (out == 2).all()


def test_on_step_receives_the_logits():
    class Flat(LabelNetwork):
        def predict(self, ids, labels):
            return torch.arange(6.0).expand(*ids.shape, CODES)

    recorded = []
    make_sampler().sample(
        Flat(CLASSES), Streams([0]), options=options(temp=2.0, last_temp=0.0, top_k=1),
        on_step=lambda i, t, s, x, logits: recorded.append(logits[0, 0, 0].tolist()) or x,
    )  # fmt: skip
    assert recorded == [[0, 1, 2, 3, 4, 5]] * 4


def test_every_option_is_used_by_the_sampler():
    """No option is silently ignored."""
    modules = absorbing, _codes, train.samplers, train.trained_sampler, train.control
    source = "".join(map(inspect.getsource, modules))
    for field in dataclasses.fields(absorbing.Sampling):
        named = f"options.{field.name}" in source or f"self.{field.name}" in source
        named = named or field.name in GUIDANCE_SCALES  # which the chain of guidance reads by name
        assert named or field.name in absorbing.Sampling.option_names(), field.name
