"""The absorbing sampler: network, process and codes together."""

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.rng import Streams, seed_of
from helpers.labels import LabelNetwork
from helpers.parametrize import slow_after
from models.attention import ATTENTION_TYPES
from train.data.streams import TrainingStreams
from train.samplers import absorbing

GRID = (2, 3)
SMALL = {"bert_n_emb": 8, "bert_n_head": 2, "bert_n_layers": 1}


class Recorder(LabelNetwork):
    """Returns logits that prefer code 0."""

    def __init__(self):
        super().__init__(n_classes=5)

    def predict(self, ids, labels):
        return torch.zeros(*ids.shape, 4).index_fill(-1, torch.tensor(0), 3.0)


def make_sampler(n_classes: int = 5, **settings):
    return absorbing.build(absorbing.Config(**SMALL, **settings), codes=4, grid=GRID, n_classes=n_classes)


def draws(seed: int, n: int):
    return lambda purpose: Streams([seed_of(seed, purpose, i) for i in range(n)])


def test_a_fraction_of_labels_becomes_the_null_class():
    n, recorder = 4000, Recorder()
    batch = {"codes": torch.zeros(n, *GRID, dtype=torch.long), "label": torch.arange(n) % 5}
    make_sampler(label_drop=0.1).loss(recorder, batch, draws(1, n))
    labels = recorder.calls[0][1]
    dropped = labels == 5
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(labels[~dropped], batch["label"][~dropped])
    make_sampler(label_drop=0.0).loss(recorder, batch, draws(1, n))
    assert torch.equal(recorder.calls[1][1], batch["label"])


def test_without_classes_labels_are_ignored():
    for sampler in (make_sampler(n_classes=0), make_sampler(class_conditional=False)):
        recorder = Recorder()
        batch = {"codes": torch.zeros(2, *GRID, dtype=torch.long), "label": torch.tensor([3, 4])}
        sampler.loss(recorder, batch, draws(0, 2))
        assert sampler.conditions == ()
        assert recorder.calls[0][1].tolist() == [5, 5] and sampler.n_classes == 0  # the null
        with pytest.raises(ValueError, match="for a model without conditions: pass --guidance 1"):
            sampler.sample(sampler.network, Streams([0]), options=absorbing.Sampling(guidance=2.0))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "arccos", "square"])
@pytest.mark.parametrize("total_steps", [8, None])
def test_the_process_has_the_configured_schedule(schedule, total_steps):
    sampler = make_sampler(schedule=schedule, total_steps=total_steps)
    assert sampler.process == AbsorbingDiffusion(4, total_steps, schedule)
    t = torch.tensor([0.25, 0.5, 1.0])
    assert torch.equal(sampler.noise_level(t), sampler.process.mask_prob(t))


def test_times_do_not_depend_on_the_split_of_the_batch():
    def times(kind, first, count=6):
        batch = {"position": torch.arange(first, first + count)}
        return make_sampler(time_sampler=kind, total_steps=None).times(
            TrainingStreams(0, batch, 12, torch.device("cpu")), count
        )

    stratified = torch.cat([times("low_discrepancy", 24), times("low_discrepancy", 30)])
    assert torch.allclose(stratified.sort().values.diff(), torch.tensor(1 / 12), atol=1e-6)
    assert torch.equal(stratified, times("low_discrepancy", 24, 12))
    assert not torch.equal(times("low_discrepancy", 36, 12), stratified)
    uniform = times("uniform", 24)
    assert torch.equal(uniform, times("uniform", 24, 12)[:6]) and not torch.allclose(
        uniform.sort().values.diff(), torch.tensor(1 / 12), atol=1e-3
    )


def test_the_loss_matches_the_process_on_the_recorded_inputs():
    sampler = make_sampler(n_classes=0, loss_type="elbo", schedule="square", total_steps=None)
    recorder, n = Recorder(), 64
    batch = {"codes": torch.arange(n * 6).view(n, *GRID) % 4}
    loss = sampler.loss(recorder, batch, draws(3, n))
    outputs = loss.outputs
    assert torch.equal(outputs["x_t"], recorder.calls[0][0]) and torch.equal(outputs["x0"], batch["codes"])
    expected = sampler.process.loss(
        outputs["prediction"], outputs["x0"], outputs["x_t"], outputs["t"], "elbo"
    ).per_example
    assert torch.equal(loss.per_example, expected)
    x0_hat = sampler.x0_hat(outputs)  # code 0 is the likeliest everywhere
    assert torch.equal(x0_hat, torch.where(outputs["x_t"] == 4, 0, outputs["x_t"]))


@pytest.mark.parametrize(("schedule", "counts"), [("fixed", {3}), ("random", {0, 1, 2, 3, 4, 5, 6})])
def test_the_mask_schedule_sets_the_number_of_masked_codes(schedule, counts):
    sampler, recorder, n = make_sampler(mask_schedule=schedule), Recorder(), 300
    half = torch.full((n,), 0.5)
    sampler.process = type("Half", (type(sampler.process),), {"times": lambda self, rng: half})(4, 256)
    batch = {"codes": torch.zeros(n, *GRID, dtype=torch.long), "label": torch.zeros(n, dtype=torch.long)}
    sampler.loss(recorder, batch, draws(2, n))
    assert set((recorder.calls[0][0] == 4).sum((1, 2)).tolist()) == counts


KINDS = [
    {"attention": "neighborhood", "kernel_sizes": (1, 3), "dilations": (2, 1)},
    {"attention": "neighborhood", "kernel_sizes": (3,), "na_backend": "dense", "position": "bias"},
    {"attention_type": "diff_v1", "position": "rope"},
    {"attention_type": "diff_v2", "mlp_ratio": 3.5},
    {"attention_type": "diff_v2", "attention": "neighborhood", "kernel_sizes": (3, 1), "position": "rope"},
]


@pytest.mark.parametrize("kind", slow_after(1, KINDS))
def test_every_attention_type_learns_to_copy_what_it_sees(kind):
    """Images of a single code each, so any visible code determines the masked ones."""
    torch.manual_seed(0)
    settings = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2, "loss_type": "mlm"}
    sampler = absorbing.build(absorbing.Config(**settings | kind), codes=4, grid=(3, 4), n_classes=0)
    layer = sampler.network.blocks[1].attention
    assert type(layer) is ATTENTION_TYPES[kind.get("attention_type", "softmax")]
    assert type(layer.core).__name__ == ("HydraAttention" if "attention" in kind else "FullAttention")
    assert (sampler.network.position is None) == ("position" in kind) and (layer.rotary is None) == (
        kind.get("position") != "rope"
    )
    optimizer = torch.optim.Adam(sampler.network.parameters(), lr=0.02)
    batch, losses = {"codes": (torch.arange(16) % 4).view(16, 1, 1).expand(16, 3, 4)}, []
    for step in range(100):
        loss = sampler.loss(sampler.network, batch, draws(step, 16)).per_example.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    "settings",
    [
        {"bert_n_head": 3},
        {"total_steps": 0},
        {"label_drop": 1.0},
        {"resid_pdrop": -0.1},
        {"kernel_sizes": (2,)},
        {"dilations": (0,)},
        {"dilations": (1, 1, 1)},
    ],
)
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValueError, match="got"):
        absorbing.Config(**{**SMALL, **settings})
