"""Options of the transformer: qk_norm, zero_init and tied_head."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.labels import label_encoders
from models.blocks import count_parameters
from models.transformer import AttentionConfig, Transformer

CODES, GRID, CLASSES = 9, (3, 4), 3
NORMED = AttentionConfig(qk_norm=True)


def transformer(n_classes=0, **changes):
    torch.manual_seed(0)
    options = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 2} | changes
    return Transformer(**options, encoders=label_encoders(n_classes, options["width"]))


def ids(batch=4):
    return torch.randint(0, CODES + 1, (batch, *GRID), generator=torch.manual_seed(0))


@pytest.mark.parametrize("option", [{"attention": NORMED}, {"zero_init": True}, {"tied_head": True}])
def test_options_change_only_their_own_weights(option):
    plain, other = transformer().state_dict(), transformer(**option).state_dict()
    new = {key for key in other if key not in plain}
    removed = {key for key in plain if key not in other}
    differing = {key for key in plain if key in other and not torch.equal(plain[key], other[key])}
    norms = {f"blocks.{i}.attention.norm_{part}.weight" for i in (0, 1) for part in "qk"}
    residual_projections = {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attention.proj", "contract")}
    assert new == (norms if "attention" in option else set())
    assert removed == ({"head.weight"} if "tied_head" in option else set())
    if "zero_init" in option:
        assert differing == residual_projections
    if "attention" in option:
        assert not differing and all((other[key] == 1).all() for key in norms)


@pytest.mark.parametrize("kind", ["softmax", "diff_v1", "diff_v2"])
def test_qk_norm_bounds_the_logits(kind):
    network = transformer(attention=AttentionConfig(qk_norm=True, attention_type=kind))
    layer = network.blocks[0].attention
    with torch.no_grad():
        layer.qkv.weight[: sum(layer.sizes[:2])] *= 1e6
    q, k, _ = layer.project(torch.randn(2, *GRID, 16), None)
    d = layer.layout.key_width
    assert (q.norm(dim=-1) / math.sqrt(d) - 1).abs().max() < 1e-3  # so that |q.k| / sqrt(d) is at most sqrt(d)
    assert (k.norm(dim=-1) / math.sqrt(d) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("n_classes", [0, CLASSES])
def test_zero_init_blocks_add_nothing_and_all_weights_learn(n_classes):
    network = transformer(zero_init=True, n_classes=n_classes)
    embeddings = network.code(ids()) + network.position
    assert torch.equal(network(ids()), network.head(network.norm(embeddings)))
    labels, optimizer = (
        {"label": torch.arange(4) % CLASSES} if n_classes else None,
        torch.optim.Adam(network.parameters(), 1e-3),
    )
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(4):  # in the first step only the last layers have a gradient
        optimizer.zero_grad()
        logits = network(ids(), labels)
        F.cross_entropy(logits.flatten(0, 2), ids().clamp(max=CODES - 1).flatten()).backward()
        optimizer.step()
    unchanged = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_gates_start_at_one_with_zero_init():
    for zero_init in (False, True):
        bias = transformer(zero_init=zero_init, n_classes=CLASSES).blocks[0].modulation.bias.view(6, 16)
        assert [row.unique().tolist() for row in bias] == [[float(zero_init and i in (2, 5))] for i in range(6)]


def test_a_tied_head_is_the_embeddings_of_the_codes():
    network = transformer(tied_head=True)
    assert count_parameters(transformer()) - count_parameters(network) == CODES * 16
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    normed = []
    network.norm.register_forward_hook(lambda norm, args, out: normed.append(out))
    logits = network(ids())
    assert torch.allclose(logits, normed[0] @ network.code.weight[:CODES].T, atol=1e-5)


def test_a_tied_head_starts_as_sure_as_one_of_its_own_weights():
    masked = torch.full((2, *GRID), 64)
    spreads = [transformer(codes=64, width=64, tied_head=tied)(masked).std().item() for tied in (False, True)]
    assert spreads[1] == pytest.approx(spreads[0], rel=0.3) and spreads[1] < 0.3
