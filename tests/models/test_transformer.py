"""The transformer over codes: size, initialisation, classes, positions and canvases."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.labels import label_encoders
from models.attention import Attention
from models.blocks import count_parameters
from models.transformer import AttentionConfig, Transformer, TransformerBlock

CODES, GRID, CLASSES = 9, (3, 4), 3


def transformer(n_classes=0, **changes):
    options = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 2} | changes
    return Transformer(**options, encoders=label_encoders(n_classes, options["width"]))


def random_transformer(**changes):
    """A transformer with random weights, since initial zeros would hide errors."""
    network = transformer(**changes)
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    return network.eval()


def partly_masked(batch=4):
    return torch.randint(0, CODES + 1, (batch, *GRID), generator=torch.Generator().manual_seed(0))


def test_the_size_is_as_published_without_the_start_token():
    with torch.device("meta"):
        network = Transformer(codes=1024, grid=(16, 16), width=512, heads=8, layers=24)
    assert count_parameters(network) == 76_838_912 - 512


def test_every_id_up_to_the_mask_has_logits_over_the_codes():
    network = random_transformer()
    assert network(torch.full((2, *GRID), CODES)).shape == (2, *GRID, CODES)
    with pytest.raises(IndexError):
        network(torch.full((2, *GRID), CODES + 1))


def test_training_starts_at_the_loss_of_a_uniform_guess():
    logits = transformer(codes=64, width=64)(torch.full((2, *GRID), 64))
    assert logits.logsumexp(-1).mean().sub(logits.mean()).item() == pytest.approx(math.log(64), rel=0.02)


def test_residual_projections_start_smaller_with_depth():
    network = transformer(width=64, layers=8)
    for block in network.blocks:
        for projection in (block.attention.proj, block.contract):
            assert projection.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert block.expand.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_block_adds_attention_then_an_mlp_of_normed_inputs():
    block, x = TransformerBlock(Attention(16, 2), adaptive=False), torch.randn(2, 5, 16)
    h = x + block.attention(block.norm1(x))
    assert torch.allclose(block(x), h + block.contract(F.gelu(block.expand(block.norm2(h)))), atol=1e-5)


def test_an_adaptive_block_shifts_scales_and_gates():
    block, x, condition = TransformerBlock(Attention(16, 2), adaptive=True), torch.randn(2, 5, 16), torch.randn(2, 16)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(condition)).unsqueeze(1).split(16, dim=-1)
    normed = F.layer_norm(x, (16,))
    h = x + gate1 * block.attention((1 + scale1) * normed + shift1)
    expected = h + gate2 * block.mlp((1 + scale2) * F.layer_norm(h, (16,)) + shift2)
    assert torch.allclose(block(x, condition), expected, atol=1e-5)


def test_adaptive_blocks_start_as_the_identity():
    network, x = transformer(n_classes=CLASSES), torch.randn(2, 12, 16)
    for block in network.blocks:
        assert torch.equal(block(x, torch.randn(2, 16)), x)
    assert not torch.equal(transformer().blocks[0](x), x)


def test_no_label_is_the_null_class():
    network, ids = random_transformer(n_classes=CLASSES), partly_masked()
    assert torch.equal(network(ids), network(ids, {"label": torch.full((4,), CLASSES)}))
    assert not torch.allclose(network(ids), network(ids, {"label": torch.full((4,), CLASSES - 1)}), atol=1e-3)


def test_each_example_follows_its_own_label():
    network, ids, labels = random_transformer(n_classes=CLASSES), partly_masked(4), torch.arange(4)
    batched = network(ids, {"label": labels})
    for i in range(4):
        assert torch.allclose(batched[i : i + 1], network(ids[i : i + 1], {"label": labels[i : i + 1]}), atol=1e-4)
    outputs = network(ids[:1].expand(4, -1, -1), {"label": labels})
    assert torch.pdist(outputs.flatten(1)).min() > 0.1  # the logits of all classes differ, those of the null class too


def test_only_positions_distinguish_masked_codes():
    network, masks = random_transformer(), torch.full((1, *GRID), CODES)
    assert torch.pdist(network(masks)[0].flatten(0, 1)).min() > 0.1
    nn.init.zeros_(network.position)
    assert torch.allclose(network(masks), network(masks)[:, :1, :1].expand(-1, *GRID, -1), atol=1e-4)


def test_without_positions_it_is_permutation_equivariant():
    network, ids, order = (
        random_transformer(),
        partly_masked(),
        torch.randperm(12, generator=torch.Generator().manual_seed(1)),
    )
    permuted = ids.flatten(1)[:, order].view_as(ids)
    assert not torch.allclose(network(permuted).flatten(1, 2), network(ids).flatten(1, 2)[:, order], atol=0.1)
    nn.init.zeros_(network.position)
    assert torch.allclose(network(permuted).flatten(1, 2), network(ids).flatten(1, 2)[:, order], atol=1e-4)


def test_every_code_sees_every_other():
    network, ids = random_transformer(), partly_masked(1)
    for index in range(12):
        changed = ids.clone()
        changed.view(-1)[index] = (changed.view(-1)[index] + 1) % CODES
        assert ((network(changed) - network(ids)).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("n_classes", [0, CLASSES])
def test_every_weight_is_trained(n_classes):
    network, ids = random_transformer(n_classes=n_classes), partly_masked()
    network(ids, {"label": torch.arange(4)} if n_classes else None).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


DROPOUTS = {
    "weights": {"attention": AttentionConfig(dropout=0.5)},
    "embeddings": {"embd_dropout": 0.5},
    "residuals": {"resid_dropout": 0.5},
}


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("n_classes", [0, CLASSES])
def test_each_dropout_acts_while_training_only(dropout, n_classes):
    network, ids = random_transformer(n_classes=n_classes, **DROPOUTS[dropout]), partly_masked()
    assert torch.equal(network(ids), network(ids))
    network.train()
    assert not torch.equal(network(ids), network(ids))


def test_a_canvas_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"grid of \(3, 4\), got \(4, 3\): sample larger canvases by windows"):
        transformer()(partly_masked().mT)


RELATIVE = [
    AttentionConfig(position="rope"),
    AttentionConfig(position="bias"),
    AttentionConfig(position="none"),
    AttentionConfig(position="rope", attention="neighborhood", kernel_sizes=(3,), attention_type="diff_v1"),
    AttentionConfig(position="bias", attention="neighborhood", kernel_sizes=(3, 1), attention_type="diff_v2"),
]


@pytest.mark.parametrize("attention", RELATIVE, ids=lambda a: f"{a.attention}-{a.attention_type}-{a.position}")
def test_with_relative_positions_any_canvas_is_one_pass(attention):
    network = random_transformer(attention=attention, width=32, heads=4)
    assert network.position is None
    assert network(torch.full((1, 5, 9), CODES)).shape == (1, 5, 9, CODES)


@pytest.mark.parametrize("position", ["rope", "bias"])
def test_away_from_borders_shifted_ids_give_shifted_logits(position):
    """Two layers of 3 x 3 windows: codes four or more from every border cannot tell their position."""
    attention = AttentionConfig(position=position, attention="neighborhood", kernel_sizes=(3,))
    network, canvas = random_transformer(attention=attention), torch.randint(0, CODES + 1, (1, 13, 14))
    logits, shifted = network(canvas[:, :12, :12]), network(canvas[:, 1:, 2:])
    assert torch.allclose(logits[:, 5:8, 6:8], shifted[:, 4:7, 4:6], atol=1e-4)
    assert not torch.allclose(logits[:, 0:1, 2:4], shifted[:, 0:1, 0:2], atol=1e-2)


@pytest.mark.parametrize("position", ["rope", "bias", "none"])
def test_relative_positions_distinguish_offsets_none_does_not(position):
    network, ids = random_transformer(attention=AttentionConfig(position=position)), partly_masked(1)
    shifted = ids.roll(1, dims=2)
    equivariant = torch.allclose(network(shifted), network(ids).roll(1, dims=2), atol=1e-3)
    assert equivariant == (position == "none")


def test_layers_know_their_depth_and_diff_v1_halves_the_heads():
    network = transformer(attention=AttentionConfig(attention_type="diff_v1"), layers=3, width=16, heads=4)
    depths = [block.attention.lambda_init for block in network.blocks]
    assert depths == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-0.6)])
    assert network.blocks[0].attention.heads == 2
    with pytest.raises(ValueError, match="got 3 heads, diff_v1 pairs them"):
        transformer(attention=AttentionConfig(attention_type="diff_v1"), width=18, heads=3)


def test_the_feed_forward_ratio_makes_up_for_the_second_query():
    plain = count_parameters(transformer(width=64, heads=4))
    v2 = AttentionConfig(attention_type="diff_v2")
    larger = count_parameters(transformer(width=64, heads=4, attention=v2))
    matched = count_parameters(transformer(width=64, heads=4, attention=v2, mlp_ratio=3.5))
    assert larger - plain == 2 * (64 * 64 + 64 + 64 * 4)  # two layers: queries, their biases, lambda
    assert abs(matched - plain) < 0.01 * plain


def test_a_window_larger_than_the_grid_is_rejected_at_build_time():
    with pytest.raises(ValueError, match="does not fit the height of 3"):
        transformer(attention=AttentionConfig(attention="neighborhood", kernel_sizes=(5,)))


def test_labels_without_classes_are_refused():
    with pytest.raises(ValueError, match=r"got conditions \['label'\], this network takes: none"):
        transformer()(partly_masked(), {"label": torch.zeros(4, dtype=torch.long)})
