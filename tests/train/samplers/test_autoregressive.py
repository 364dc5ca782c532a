"""The autoregressive sampler: network, KV cache, process and codes together."""

import json
import shutil

import pytest
import torch
from torch import nn

from diffusion.autoregressive import raster
from diffusion.denoisers import guided
from diffusion.rng import Streams, seed_of
from helpers import tiny_runs
from helpers.labels import LabelNetwork
from helpers.solving import solve_in_steps
from models.transformer import CausalTransformer
from train.samplers import autoregressive
from train.spaces import EditInput

GRID, CODES, N, CLASSES = (2, 3), 4, 6, 5
SMALL = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2}


def make_sampler(n_classes=CLASSES, **settings):
    """A float64 sampler with perturbed weights."""
    torch.manual_seed(0)
    config = autoregressive.Config(**SMALL | settings)
    sampler = autoregressive.build(config, codes=CODES, grid=GRID, n_classes=n_classes)
    for p in sampler.network.parameters():
        nn.init.normal_(p, std=0.5)
    sampler.network.double().eval()
    return sampler


def options(**settings):
    return autoregressive.Sampling(**settings)


def draws(seed, n):
    return lambda purpose: Streams([seed_of(seed, purpose, i) for i in range(n)])


def batch(n):
    codes = torch.randint(CODES, (n, *GRID), generator=torch.manual_seed(1))
    return {"codes": codes, "label": torch.arange(n) % CLASSES}


def sample_codes(sampler, seeds, labels=None, **kwargs):
    conditions = None if labels is None else {"label": torch.tensor(labels)}
    kwargs = {"options": options()} | kwargs
    return sampler.sample(sampler.network, Streams(seeds), batch=conditions, **kwargs)


class Uniform(LabelNetwork):
    """A uniform network."""

    def predict(self, ids, labels):
        return torch.zeros(*ids.shape, CODES)


def test_a_fraction_of_labels_becomes_the_null_class():
    n, network = 4000, Uniform(CLASSES)
    sampler, data = make_sampler(label_drop=0.1), batch(4000)
    loss = sampler.loss(network, data, draws(1, n))
    ids, labels = network.calls[0]
    dropped = labels == CLASSES
    assert torch.equal(ids, data["codes"]) and 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(labels[~dropped], data["label"][~dropped])
    assert torch.allclose(loss.per_example, torch.full((n,), 2.0))  # log2 of four codes
    assert not loss.outputs["t"].any() and not sampler.noise_level(loss.outputs["t"]).any()
    make_sampler(label_drop=0.0).loss(network, data, draws(1, n))
    assert torch.equal(network.calls[1][1], data["label"])


def test_without_classes_labels_are_ignored():
    for sampler in (make_sampler(n_classes=0), make_sampler(class_conditional=False)):
        assert sampler.n_classes == 0 and sampler.conditions == ()
        sampler.loss(sampler.network, batch(2), draws(0, 2))  # would refuse labels
        assert sample_codes(sampler, [0, 1], [3, 4]).shape == (2, *GRID)
        with pytest.raises(ValueError, match="for a model without conditions: pass --guidance 1"):
            sample_codes(sampler, [0], [3], options=options(guidance=2.0))


def sample_without_cache(sampler, seeds, labels, settings):
    """Reference for `sample` without a cache: a pass over the full grid for every code and condition."""
    labels = torch.tensor(labels)

    def denoise(x, t, label):
        ids = torch.cat([x, torch.zeros(len(x), N - x.shape[1], dtype=torch.long)], 1).view(-1, *GRID)
        return sampler.network(ids, {"label": label}).flatten(1, 2)[:, x.shape[1]]

    null = torch.full_like(labels, CLASSES)
    denoiser = guided(denoise, [null, labels], [settings.guidance], schedule=settings.guidance_schedule)
    x = torch.full((len(seeds), *GRID), CODES)
    return solve_in_steps(raster, denoiser, sampler.process, x, rng=Streams(seeds), warper=settings.warper)


SETTINGS = [
    {},
    {"guidance": 3.0},
    {"guidance": 0.0},
    {"guidance": 3.0, "guidance_schedule": "linear"},
    {"temp": 0.5},
    {"temp": 0.0},
    {"temp": 0.5, "last_temp": 3.0},
    {"top_k": 2},
    {"top_p": 0.6},
]


def test_every_option_acts_and_the_kv_cache_changes_no_code():
    sampler, seeds, labels = make_sampler(), list(range(40)), [i % CLASSES for i in range(40)]
    previous = []
    for settings in SETTINGS:
        codes = sample_codes(sampler, seeds, labels, options=options(**settings))
        assert torch.equal(codes, sample_without_cache(sampler, seeds, labels, options(**settings)))
        assert not any(torch.equal(codes, other) for other in previous)
        previous.append(codes)


@pytest.mark.parametrize("kind", ["softmax", "diff_v1", "diff_v2"])
@pytest.mark.parametrize("position", ["learned", "rope", "none"])
def test_samples_of_a_seed_do_not_depend_on_the_batch(kind, position):
    sampler, settings = make_sampler(attention_type=kind, position=position), options(guidance=2.0)
    labels = [i % CLASSES for i in range(7)]
    together = sample_codes(sampler, list(range(7)), labels, options=settings)
    assert torch.equal(together, sample_without_cache(sampler, list(range(7)), labels, settings))
    for rows in ([3], [6, 0], [1, 2, 4, 5]):
        assert torch.equal(sample_codes(sampler, rows, [labels[i] for i in rows], options=settings), together[rows])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_known_codes_stay_and_finished_examples_drop_out(guidance):
    sampler, settings, seeds = make_sampler(), options(guidance=guidance), list(range(6))
    labels, x0 = [i % CLASSES for i in range(6)], batch(6)["codes"]
    keep = torch.rand(6, *GRID, generator=torch.manual_seed(2)) < 0.5
    keep[0], keep[1], keep[2, 1] = True, False, True  # all known, none known, row 1 known
    codes = sample_codes(sampler, seeds, labels, options=settings, edit=EditInput(x0, keep))
    assert torch.equal(codes[keep], x0[keep]) and torch.equal(codes[0], x0[0]) and codes.max() < CODES
    for i in range(6):
        edit = EditInput(x0[i : i + 1], keep[i : i + 1])
        assert torch.equal(sample_codes(sampler, [i], labels[i : i + 1], options=settings, edit=edit)[0], codes[i])


def test_a_fraction_of_unkept_codes_is_masked():
    sampler, x0, seeds = make_sampler(), batch(200)["codes"], list(range(200))
    keep = torch.zeros(200, *GRID, dtype=torch.bool)
    keep[:, 0, 0] = True
    labels = [0] * 200
    assert torch.equal(sample_codes(sampler, seeds, labels, edit=EditInput(x0, keep, 0.0)), x0)
    states = []
    kwargs = {"on_step": lambda i, t, s, x, logits: states.append(x) or x}
    sample_codes(sampler, seeds, labels, edit=EditInput(x0, keep, 0.4), **kwargs)
    # the first step draws nothing beyond position 1: codes masked in row 1 were masked at the start
    assert 0.35 < (states[0][:, 1] == CODES).double().mean() < 0.45 and not (states[0][:, 0, 0] == CODES).any()


def test_the_likelihood_is_exact_and_equals_the_training_loss():
    sampler, data, calls = make_sampler(label_drop=0.0), batch(3), []
    sampler.network.register_forward_hook(lambda *args: calls.append(1))
    bound = sampler.log_likelihood(sampler.network, data, Streams([0, 1, 2]), 5)
    assert len(calls) == 1 and bound.terms.shape == (3, 0) and sampler.likelihood == "exact"
    loss = sampler.loss(sampler.network, data, draws(0, 3))
    assert torch.equal(bound.total, loss.per_example.detach()) and not bound.total.requires_grad
    log_probs = (
        sampler.network(data["codes"], {"label": data["label"]}).log_softmax(-1).gather(-1, data["codes"][..., None])
    )
    assert torch.allclose(bound.total.double(), -log_probs.flatten(1).mean(1) / torch.tensor(2.0).log(), atol=1e-5)
    assert torch.equal(sampler.x0_hat(loss.outputs), loss.outputs["prediction"].argmax(-1))


def test_settings_reach_the_network():
    sampler = make_sampler(qk_norm=True, zero_init=True, tied_head=True, attention_type="diff_v1", position="rope")
    layer = sampler.network.blocks[0].attention
    assert type(sampler.network) is CausalTransformer and sampler.network.head is None
    assert layer.norm_q is not None and layer.rotary is not None and layer.core.causal
    fresh = autoregressive.build(autoregressive.Config(**SMALL, zero_init=True), codes=4, grid=GRID, n_classes=0)
    assert not fresh.network.blocks[0].contract.weight.any()


def test_it_learns_the_next_code():
    torch.manual_seed(0)
    sampler = autoregressive.build(autoregressive.Config(**SMALL), codes=CODES, grid=GRID, n_classes=0)
    optimizer = torch.optim.Adam(sampler.network.parameters(), lr=0.01)
    first_codes = torch.arange(16) % CODES
    data = {"codes": ((first_codes[:, None] + torch.arange(N)) % CODES).view(16, *GRID)}  # each code is one more
    for step in range(60):
        loss = sampler.loss(sampler.network, data, draws(step, 16)).per_example.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.1 * 2 / N  # only the first code is unpredictable, with two bits
    codes = sample_codes(sampler, list(range(32))).flatten(1)
    assert ((codes[:, 1:] - codes[:, :-1]) % CODES == 1).double().mean() > 0.9


REFUSED = {"shape": {"shape": (3, 3)}, "windows": {"window_stride": 1}}


@pytest.mark.parametrize("kwargs", REFUSED)
def test_other_canvases_are_refused(kwargs):
    with pytest.raises(ValueError, match="no other canvases: pass --sampler absorbing"):
        sample_codes(make_sampler(), [0], [0], **REFUSED[kwargs])
    assert sample_codes(make_sampler(), [0], [0], shape=GRID).shape == (1, *GRID)


@pytest.mark.parametrize("settings", [{"attention": "neighborhood"}, {"position": "bias"}, {"bert_n_head": 3}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match="got"):
        autoregressive.Config(**SMALL | settings)


def test_steps_are_the_codes():
    with pytest.raises(ValueError, match="raster takes 6 steps on this grid, got 5"):
        sample_codes(make_sampler(), [0], [0], options=options(sample_steps=5))


@pytest.mark.slow
def test_the_scripts_train_resume_and_evaluate_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    flags = f"--sampler autoregressive --logs_root {tmp_path}"
    size = f"--no_amp --batch_size 4 --bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --steps_per_eval 2 {flags}"
    for steps in (2, 4):
        tiny_runs.call("train_sampler.py", f"--train_steps {steps} --steps_per_save_output 2 {size}")
    run = tmp_path / "autoregressive_digits"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "val/bits_per_code" in line} == {2, 4}
    tiny_runs.call("experiments/get_samples.py", f"--n_samples 3 --save_process {flags}")
    tiny_runs.call("experiments/calc_approximate_ELBO.py", f"--n_images 8 --no_decoder {flags}")
    results = json.loads((tmp_path / "ELBO_autoregressive_digits_4" / "results.json").read_text())
    assert results["method"] == "exact" and results["terms"] == [] and results["n_images"] == 8
    assert (tmp_path / "samples_autoregressive_digits_4" / "process.png").is_file()
