"""How network, process and codes meet in the absorbing sampler."""

import pytest
import torch
from torch import nn

from diffusion.rng import Streams, seed_of
from models.attention import KINDS as KIND_CLASSES
from train.samplers import absorbing

GRID = (2, 3)
SMALL = {"bert_n_emb": 8, "bert_n_head": 2, "bert_n_layers": 1}


class Recorder(nn.Module):
    """In the place of a network: remembers what it was asked, answers with logits that prefer code 0."""

    def __init__(self, codes: int = 4):
        super().__init__()
        self.codes, self.asked = codes, []

    def forward(self, ids, labels=None):
        self.asked.append((ids.clone(), None if labels is None else labels.clone()))
        return torch.zeros(*ids.shape, self.codes).index_fill(-1, torch.tensor(0), 3.0)


def sampler(n_classes: int = 5, **settings):
    return absorbing.build(absorbing.Config(**SMALL, **settings), codes=4, grid=GRID, n_classes=n_classes)


def draws(seed: int, n: int):
    return lambda purpose: Streams([seed_of(seed, purpose, i) for i in range(n)])


def test_a_share_of_labels_becomes_the_null_class_and_the_rest_stay():
    n, recorder = 4000, Recorder()
    batch = {"codes": torch.zeros(n, *GRID, dtype=torch.long), "label": torch.arange(n) % 5}
    sampler(label_drop=0.1).loss(recorder, batch, draws(1, n))
    labels = recorder.asked[0][1]
    dropped = labels == 5
    assert 0.08 < dropped.float().mean() < 0.12
    assert torch.equal(labels[~dropped], batch["label"][~dropped])
    sampler(label_drop=0.0).loss(recorder, batch, draws(1, n))
    assert torch.equal(recorder.asked[1][1], batch["label"])


def test_without_classes_labels_are_not_looked_at():
    for built in (sampler(n_classes=0), sampler(class_conditional=False)):
        recorder = Recorder()
        batch = {"codes": torch.zeros(2, *GRID, dtype=torch.long), "label": torch.tensor([3, 4])}
        built.loss(recorder, batch, draws(0, 2))
        assert recorder.asked[0][1] is None and built.n_classes == 0
        with pytest.raises(ValueError, match="without classes"):
            built.sample(built.network, Streams([0]), options=absorbing.Sampling(guidance=2.0))


@pytest.mark.parametrize(("schedule", "counts"), [("fixed", {3}), ("random", {0, 1, 2, 3, 4, 5, 6})])
def test_the_mask_schedule_is_the_one_asked_for(schedule, counts):
    built, recorder, n = sampler(mask_schedule=schedule), Recorder(), 300
    half = torch.full((n,), 0.5)
    built.process = type("Half", (type(built.process),), {"times": lambda self, rng: half})(4, 256)
    batch = {"codes": torch.zeros(n, *GRID, dtype=torch.long), "label": torch.zeros(n, dtype=torch.long)}
    built.loss(recorder, batch, draws(2, n))
    assert set((recorder.asked[0][0] == 4).sum((1, 2)).tolist()) == counts


def test_guidance_asks_with_and_without_the_label():
    recorder, labels = Recorder(), torch.tensor([1, 4])
    options = absorbing.Sampling(guidance=2.0, sample_steps=1)
    sampler().sample(recorder, Streams([0, 1]), batch={"label": labels}, options=options)
    asked = [label for _, label in recorder.asked]
    assert len(asked) == 2 and any(label is None for label in asked)
    assert any(label is not None and torch.equal(label, labels) for label in asked)


def test_a_larger_canvas_is_asked_for_in_windows_that_keep_each_images_label():
    recorder, labels = Recorder(), torch.tensor([1, 4])
    options = absorbing.Sampling(sample_steps=1)
    batch, rng = {"label": labels}, Streams([0, 1])
    ids = sampler().sample(recorder, rng, batch=batch, options=options, shape=(3, 5), window_stride=1)
    assert ids.shape == (2, 3, 5)
    for windows, label in recorder.asked:
        assert windows.shape[1:] == GRID
        assert torch.equal(label, labels.repeat(len(windows) // 2))


@pytest.mark.parametrize("position", ["rope", "bias", "none"])
def test_with_relative_positions_a_canvas_is_one_pass_a_step(position):
    recorder, options = Recorder(), absorbing.Sampling(sample_steps=2)
    built = sampler(position=position)
    batch = {"label": torch.tensor([1, 4])}
    ids = built.sample(recorder, Streams([0, 1]), batch=batch, options=options, shape=(5, 4))
    assert ids.shape == (2, 5, 4)
    assert [tuple(asked.shape) for asked, _ in recorder.asked] == [(2, 5, 4)] * 2
    batch = {"label": torch.tensor([1])}
    built.sample(recorder, Streams([0]), batch=batch, options=options, shape=(5, 4), window_stride=1)
    assert recorder.asked[-1][0].shape[1:] == GRID  # windows are still to be had


KINDS = [
    {"attention": "neighborhood", "kernel_sizes": (1, 3), "dilations": (2, 1)},
    {"attention": "neighborhood", "kernel_sizes": (3,), "na_backend": "dense", "position": "bias"},
    {"attention_type": "diff_v1", "position": "rope"},
    {"attention_type": "diff_v2", "mlp_ratio": 3.5},
    {"attention_type": "diff_v2", "attention": "neighborhood", "kernel_sizes": (3, 1), "position": "rope"},
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_reaches_the_network_and_learns_to_copy_what_it_sees(kind):
    """Images of one code each: a masked code is known as soon as another one is seen."""
    torch.manual_seed(0)
    settings = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 2, "loss_type": "mlm"}
    built = absorbing.build(absorbing.Config(**settings | kind), codes=4, grid=(3, 4), n_classes=0)
    layer = built.network.blocks[1].attention
    assert type(layer) is KIND_CLASSES[kind.get("attention_type", "softmax")]
    assert type(layer.core).__name__ == ("HydraAttention" if "attention" in kind else "FullAttention")
    assert (built.network.position is None) == ("position" in kind) and (layer.rotary is None) == (
        kind.get("position") != "rope"
    )
    optimizer = torch.optim.Adam(built.network.parameters(), lr=0.02)
    batch, losses = {"codes": (torch.arange(16) % 4).view(16, 1, 1).expand(16, 3, 4)}, []
    for step in range(100):
        loss = built.loss(built.network, batch, draws(step, 16)).per_example.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(
    "wrong",
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
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        absorbing.Config(**{**SMALL, **wrong})
