"""The causal transformer: which codes a prediction depends on, and decoding with a KV cache."""

import itertools

import pytest
import torch
from torch import nn

from helpers.labels import label_encoders
from models.attention import record_maps
from models.kv_cache import KVCache
from models.transformer import AttentionConfig, CausalTransformer

CODES, GRID, CLASSES, N = 7, (3, 4), 3, 12
CONFIGS = [
    AttentionConfig(attention_type=kind, position=position)
    for kind, position in itertools.product(["softmax", "diff_v1", "diff_v2"], ["learned", "rope", "none"])
]
every_kind = pytest.mark.parametrize("attention", CONFIGS, ids=lambda a: f"{a.attention_type}-{a.position}")


def random_transformer(n_classes=CLASSES, **changes):
    """A transformer with random weights, in float64."""
    options = {"codes": CODES, "grid": GRID, "width": 16, "heads": 2, "layers": 2}
    network = CausalTransformer(**(options | changes), encoders=label_encoders(n_classes, 16))
    for p in network.parameters():
        nn.init.normal_(p, std=0.4)
    return network.double().eval()


def codes(batch=3):
    return torch.randint(0, CODES, (batch, *GRID), generator=torch.manual_seed(0))


def step_by_step(network, ids, labels, stops, kv_cache=None):
    """Logits of the codes at `stops`, each from those before it: (B, len(stops), K)."""
    kv_cache = KVCache(GRID) if kv_cache is None else kv_cache
    return torch.stack(
        [network(ids.flatten(1)[:, :stop], {} if labels is None else {"label": labels}, kv_cache) for stop in stops], 1
    )


@every_kind
def test_a_code_depends_on_all_codes_before_it_and_no_others(attention):
    network, ids = random_transformer(attention=attention), codes(1)
    before = network(ids).flatten(1, 2)
    for index in range(N):
        changed = ids.clone()
        changed.view(-1)[index] = (changed.view(-1)[index] + 1) % CODES
        change = (network(changed).flatten(1, 2) - before).abs().amax(-1)[0]
        assert not change[: index + 1].any() and (change[index + 1 :] > 1e-7).all()


def test_the_first_code_depends_on_start_token_and_class():
    network, ids = random_transformer(), codes()
    first = network(ids, {"label": torch.arange(3)})[:, 0, 0]
    assert (
        torch.equal(network(codes(3).flip(0), {"label": torch.arange(3)})[:, 0, 0], first)
        and torch.pdist(first).min() > 0.01
    )
    nn.init.zeros_(network.code.weight[CODES])
    assert not torch.allclose(network(ids, {"label": torch.arange(3)})[:, 0, 0], first)


def test_the_input_is_the_previous_code_at_the_current_position():
    network, ids = random_transformer(layers=1), codes(1)
    inputs = []
    network.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    network(ids)
    flat_ids, positions = ids.flatten(), network.position.flatten(0, 1)
    for index, code in enumerate([CODES, *flat_ids[:-1].tolist()]):
        assert torch.equal(inputs[0].flatten(1, 2)[0, index], network.code.weight[code] + positions[index])


@every_kind
@pytest.mark.parametrize("stops", [list(range(N)), [0, 1, 5, 6, 11], [4, 11]], ids=["one by one", "some", "few"])
def test_cached_logits_equal_those_of_the_full_sequence(attention, stops):
    network, ids, labels = random_transformer(attention=attention), codes(), torch.tensor([0, 2, CLASSES])
    expected = network(ids, {"label": labels}).flatten(1, 2)[:, stops]
    assert torch.allclose(step_by_step(network, ids, labels, stops), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"attention": AttentionConfig(qk_norm=True, position="rope")}, {"n_classes": 0}])
def test_cached_logits_agree_with_other_options(options):
    network, ids = random_transformer(tied_head=True, **options), codes()
    expected = network(ids).flatten(1, 2)
    assert torch.allclose(step_by_step(network, ids, None, range(N)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_classes", [0, CLASSES])
def test_a_kv_cache_reads_no_code_twice_and_reallocates_nothing(n_classes):
    network, ids, lengths, addresses = random_transformer(n_classes), codes(), [], set()
    kv_cache = KVCache(GRID)
    network.blocks[1].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    for stop in (2, 3, 7, 11):
        network(ids.flatten(1)[:, :stop], None, kv_cache)
        addresses.add(tuple(x.data_ptr() for cache in kv_cache.layers for x in (cache.keys, cache.values)))
    assert lengths == [3, 1, 4, 4] and len(addresses) == 1 and kv_cache.length == N
    assert [cache.keys.shape for cache in kv_cache.layers] == [(3, N, 2, 8)] * 2


def test_dropping_sequences_from_a_kv_cache_keeps_the_others():
    network, ids, labels = random_transformer(), codes(4), torch.arange(4)
    expected, kv_cache = network(ids, {"label": labels}).flatten(1, 2), KVCache(GRID)
    names = torch.tensor([10, 11, 12, 13])
    for stop, rows in enumerate([[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3], [0, 2, 3], [3, 0], [3, 0], [0]]):
        logits = network(ids.flatten(1)[rows, :stop], {"label": labels[rows]}, kv_cache.keep_rows(names[rows]))
        assert torch.allclose(logits, expected[rows, stop], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"got sequences \[10, 11\], this KV cache holds \[10\]: create a new one"):
        kv_cache.keep_rows(names[:2])


def test_the_map_of_a_step_is_a_row_of_the_full_map():
    network, ids = random_transformer(), codes()
    with record_maps(network) as full_maps:
        network(ids)
    with record_maps(network) as step_maps:
        step_by_step(network, ids, None, [3, 4, 8])
    for name, maps in full_maps.items():
        assert torch.allclose(step_maps[name][1], maps[0][:, :, 4:5, :5], atol=1e-6)
        assert torch.allclose(step_maps[name][2], maps[0][:, :, 5:9, :9], atol=1e-6)


def test_every_weight_is_trained():
    network = random_transformer()
    network(codes(4), {"label": torch.arange(4)}).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("wrong", [{"attention": "neighborhood", "kernel_sizes": (3,)}, {"position": "bias"}])
def test_what_cannot_be_causal_is_refused(wrong):
    with pytest.raises(ValueError, match="for a causal transformer: .*choose full attention"):
        random_transformer(attention=AttentionConfig(**wrong))


def test_a_kv_cache_rejects_too_few_codes_and_other_grids():
    network, flat_ids, kv_cache = random_transformer(), codes().flatten(1), KVCache(GRID)
    network(flat_ids[:, :4], None, kv_cache)
    for count in (4, 3, 12):
        with pytest.raises(ValueError, match=rf"got {count} codes of a grid of \(3, 4\), of which 5 are cached"):
            network(flat_ids[:, :count], None, kv_cache)
    with pytest.raises(ValueError, match=r"grid of \(3, 4\), got \(4, 3\)"):
        network(flat_ids[:, :1], None, KVCache((4, 3)))
