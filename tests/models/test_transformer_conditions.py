"""Conditions of transformers: vectors, tokens, maps, hints and the time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.labels import label_encoders
from models.attention import Attention, CrossAttention
from models.blocks import FeedForward, init_normal
from models.conditioning import Condition, ConditionEncoder, Context, Map, Regions, Tokens
from models.conditions.image import ImageEncoder
from models.control import HintConfig, HintEncoder, add_control, scale_hints
from models.kv_cache import KVCache
from models.transformer import AttentionConfig, CausalTransformer, Transformer, TransformerBlock
from models.unet import UNet

B, CODES, GRID, WIDTH, CLASSES, D = 3, 9, (3, 4), 16, 3, 5
NETWORKS = pytest.mark.parametrize("kind", [Transformer, CausalTransformer])
INTO = pytest.mark.parametrize("into", ["norms", "embeddings"])


class Words(ConditionEncoder):
    """Embeds ids (B, M), -1 for padding, as tokens of width D; id 9 is the null."""

    token_width = D

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, D)

    def forward(self, raw, x, drop=None):
        ids = torch.full((len(x), 1), 9, device=x.device) if raw is None else raw
        ids = (
            ids if drop is None else torch.where(drop[:, None], F.pad(ids[:, :0] + 9, (0, ids.shape[1]), value=9), ids)
        )
        return Tokens(self.embedding(ids.clamp(min=0)), ids >= 0)


def all_encoders():
    return {"words": Words(), "image": ImageEncoder(2)} | label_encoders(CLASSES, WIDTH)


def build_network(kind=Transformer, encoders=None, **changes):
    torch.manual_seed(0)
    options = {"codes": CODES, "grid": GRID, "width": WIDTH, "heads": 2, "layers": 2} | changes
    return kind(**options, encoders=all_encoders() if encoders is None else encoders)


def randomize(network):
    """Randomize every weight, in float64."""
    for p in network.parameters():
        nn.init.normal_(p, std=0.4)
    return network.double().eval()


def codes(batch=B):
    return torch.randint(0, CODES, (batch, *GRID), generator=torch.manual_seed(1))


def fields():
    torch.manual_seed(2)
    words = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]])
    return {"words": words, "image": torch.randn(B, 2, *GRID).double(), "label": torch.tensor([0, 2, 1])}


# Initialisation


def reference(classes):
    """Initial weights of the network of earlier versions: (name, tensor) in the order of its parameters."""
    code, label = nn.Embedding(CODES + 1, WIDTH), nn.Embedding(classes + 1, WIDTH) if classes else None
    blocks = [TransformerBlock(Attention(WIDTH, 2), adaptive=classes > 0) for _ in range(2)]
    head, position = nn.Linear(WIDTH, CODES, bias=False), nn.Parameter(torch.empty(*GRID, WIDTH))
    for module in [code, *([label] if classes else []), *blocks, head]:
        module.apply(init_normal)
    nn.init.normal_(position, std=0.02)
    for block in blocks:
        for projection in (block.attention.proj, block.contract):
            nn.init.normal_(projection.weight, std=0.02 / 2)
        if classes:
            nn.init.zeros_(block.modulation.weight)
    parameters = [("position", position), ("code.weight", code.weight)]
    parameters += [("encoders.label.embedding.weight", label.weight)] if classes else []
    parameters += [(f"blocks.{i}.{name}", p) for i, block in enumerate(blocks) for name, p in block.named_parameters()]
    return [
        *parameters,
        ("norm.weight", torch.ones(WIDTH)),
        ("norm.bias", torch.zeros(WIDTH)),
        ("head.weight", head.weight),
    ]


@NETWORKS
@pytest.mark.parametrize("classes", [0, CLASSES])
def test_weight_names_order_and_initial_values_are_stable(kind, classes):
    torch.manual_seed(0)
    expected = reference(classes)
    torch.manual_seed(0)
    sizes = {"codes": CODES, "grid": GRID, "width": WIDTH, "heads": 2, "layers": 2}
    parameters = list(kind(**sizes, encoders=label_encoders(classes, WIDTH)).named_parameters())
    assert [name for name, _ in parameters] == [name for name, _ in expected]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(parameters, expected, strict=True))


@NETWORKS
@INTO
def test_words_images_and_labels_change_nothing_at_first(kind, into):
    network, inputs = build_network(kind, vectors_into=into), fields() | {"image": torch.randn(B, 2, *GRID)}
    assert torch.equal(network(codes(), inputs), network(codes()))
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(4):  # in the first step only the last layers have a gradient
        optimizer.zero_grad()
        network(codes(), inputs, drop={"image": torch.arange(B) < 1}).square().sum().backward()
        optimizer.step()
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []


def test_encoders_keep_the_weights_that_they_name():
    torch.manual_seed(0)
    encoders = {"words": Words(), "mine": Words()}
    encoders["words"].kept_modules = lambda: {*encoders["words"].modules()}
    before = {name: encoder.embedding.weight.clone() for name, encoder in encoders.items()}
    build_network(encoders=encoders)
    unchanged = {name: torch.equal(encoder.embedding.weight, before[name]) for name, encoder in encoders.items()}
    assert unchanged == {"words": True, "mine": False}


# Cross-attention


def region_condition(dtype=torch.float64):
    """Two words: one of the left half of a 6 x 8 image, one of a pixel in the lower right corner."""
    masks = torch.zeros(1, 2, 6, 8, dtype=torch.bool)
    masks[0, 0, :, :4], masks[0, 1, 5, 7] = True, True
    words = torch.randn(1, 2, D, dtype=dtype, generator=torch.manual_seed(3))
    regions = Regions(present=torch.ones(1, 2).bool(), masks=masks)
    return Condition({"words": Tokens(words, None, torch.eye(2).bool()[None])}, regions)


def visible_cells():
    visible = torch.zeros(GRID, dtype=torch.bool)
    visible[:, :2], visible[2, 3] = True, True
    return visible


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_block_attends_to_tokens_between_attention_and_mlp(adaptive):
    cross = CrossAttention(WIDTH, 2, context_width=D)
    block = randomize(TransformerBlock(Attention(WIDTH, 2), adaptive=adaptive, cross=cross))
    x, emb, words = torch.randn(B, 5, WIDTH).double(), torch.randn(B, WIDTH).double(), torch.randn(B, 4, D).double()
    parts = block.modulation(F.silu(emb)).unsqueeze(1).chunk(6, -1) if adaptive else [0, 0, 1, 0, 0, 1]
    h = x + parts[2] * block.attention((1 + parts[1]) * block.norm1(x) + parts[0])
    h = h + cross(block.cross_norm(h), words)
    expected = h + parts[5] * block.mlp((1 + parts[4]) * block.norm2(h) + parts[3])
    assert torch.allclose(block(x, emb, Context(words)), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="got no tokens for a block with cross-attention"):
        block(x, emb)


def test_cells_attend_to_the_words_of_their_regions_only():
    block, condition = randomize(build_network(encoders={"words": Words()})).blocks[0], region_condition()
    x = torch.randn(1, *GRID, WIDTH, dtype=torch.float64)
    added = block.cross_attend(x, condition.context(*GRID)) - x
    blind = torch.isclose(added[0], block.cross.proj.bias, rtol=0, atol=1e-12).all(-1)
    assert torch.equal(~blind, visible_cells())
    left, corner = (block.cross_attend(x, Context(condition.tokens().values[:, i : i + 1])) - x for i in (0, 1))
    assert torch.allclose(added[0, :, :2], left[0, :, :2]) and torch.allclose(added[0, 2, 3], corner[0, 2, 3])


def test_gradients_are_finite_where_places_see_nothing():
    network = randomize(build_network(encoders={"words": Words()}))
    values = region_condition().tokens().values.requires_grad_()
    condition = Condition({"words": region_condition().tokens()._replace(values=values)}, region_condition().regions)
    network(codes(1), condition).square().sum().backward()
    assert values.grad.isfinite().all() and values.grad.any(-1).all()
    assert all(p.grad.isfinite().all() for name, p in network.named_parameters() if not name.startswith("encoders"))


@NETWORKS
def test_without_words_and_regions_only_a_bias_is_added(kind, monkeypatch):
    network = randomize(build_network(kind, {"words": Words()}))
    words = Tokens(torch.zeros(B, 0, D).double(), torch.zeros(B, 0).bool(), torch.zeros(B, 0, 0).bool())
    regions = Regions(present=torch.zeros(B, 0).bool(), masks=torch.zeros(B, 0, 6, 8).bool())
    masked = Tokens(torch.randn(B, 2, D).double(), torch.zeros(B, 2).bool())
    outputs = [network(codes(), Condition({"words": words}, regions)), network(codes(), Condition({"words": masked}))]
    for block in network.blocks:
        monkeypatch.setattr(block.cross, "forward", lambda *args, bias=block.cross.proj.bias: bias)
    assert all(torch.equal(output, network(codes())) for output in outputs)


@NETWORKS
def test_an_example_does_not_depend_on_the_padding_of_its_batch(kind):
    network, inputs = randomize(build_network(kind)), fields()
    batched = network(codes(), inputs)
    for i, count in enumerate((3, 1, 2)):
        example = {name: value[i : i + 1] for name, value in inputs.items()}
        single = network(codes()[i : i + 1], example | {"words": example["words"][:, :count]})
        assert torch.allclose(single, batched[i : i + 1], rtol=0, atol=1e-10)


@NETWORKS
def test_regions_of_batch_mates_change_nothing(kind):
    network, with_regions = randomize(build_network(kind, {"words": Words()})), region_condition()
    without_regions = Condition({"words": Tokens(torch.randn(1, 4, D).double())})
    batched = network(codes(2), Condition.cat([with_regions, without_regions]))
    assert torch.allclose(batched[:1], network(codes(2)[:1], with_regions), rtol=0, atol=1e-10)
    assert torch.allclose(batched[1:], network(codes(2)[1:], without_regions), rtol=0, atol=1e-10)


# Maps, the time


def test_an_image_counts_with_all_its_pixels():
    """Lines that bilinear sampling would miss are averaged; an encoded condition equals its raw fields."""
    network = randomize(build_network(encoders={"image": ImageEncoder(1)}))
    ids, image = codes(), torch.zeros(B, 1, 8 * GRID[0], 8 * GRID[1]).double()
    image[:, :, ::8] = 1.0
    condition = network.encode({"image": image}, ids)
    assert torch.allclose(condition.map(), torch.full((B, 1, *GRID), 1 / 8).to(condition.map()))
    assert torch.equal(network(ids, {"image": image}), network(ids, condition))
    null = network.encode({}, ids)
    assert Condition.cat([null, condition]).map().shape == (2 * B, 1, *GRID)


def test_a_map_is_averaged_over_cells_and_added_to_embeddings():
    network, image = randomize(build_network(encoders={"image": ImageEncoder(2)})), torch.randn(B, 2, *GRID).double()
    inputs = []
    network.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    network(codes(), {"image": image})
    expected = network.code(codes()) + network.position + network.map_in(image.permute(0, 2, 3, 1))
    assert torch.allclose(inputs[0], expected)
    network(codes(), Condition({"image": Map(image.repeat_interleave(2, 2).repeat_interleave(3, 3))}))
    assert torch.allclose(inputs[1], expected)


@NETWORKS
def test_a_vector_is_added_to_embeddings_instead_of_norms(kind):
    network = randomize(build_network(kind, label_encoders(CLASSES, WIDTH), vectors_into="embeddings"))
    assert all(block.modulation is None for block in network.blocks)
    labels, inputs = fields()["label"], []
    network.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    for condition in (None, {"label": labels}):
        network(codes(), condition)
    null, vectors = (network.vector_in(network.encoders["label"].embedding(each)) for each in (labels * 0 + 3, labels))
    assert torch.allclose(inputs[1] - inputs[0], (vectors - null)[:, None, None].expand_as(inputs[0]))
    with pytest.raises(ValueError, match="got vectors_into embeddings, and no class or other condition that is a vec"):
        build_network(kind, {"image": ImageEncoder(2)}, vectors_into="embeddings")


@NETWORKS
def test_the_time_is_an_option_of_its_own(kind):
    plain, with_time = build_network(kind, {}), build_network(kind, {}, time_scale=1000.0)
    assert (plain.takes_time, with_time.takes_time, UNet.takes_time) == (False, True, True)
    new = with_time.state_dict().keys() - plain.state_dict().keys()
    adaptive = {f"blocks.{i}.modulation.{name}" for i in (0, 1) for name in ("weight", "bias")}
    assert new == {f"time.{layer}.{name}" for layer in ("expand", "contract") for name in ("weight", "bias")} | adaptive
    t = torch.tensor([0.1, 0.5, 0.9])
    randomize(with_time)
    output, later = (with_time(codes(), t=each) for each in (t, torch.tensor([0.1, 0.5, 1.0])))
    assert torch.equal(output[:2], later[:2]) and (output[2] - later[2]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"got no t for 3 grids, wanted \(3,\)"):
        with_time(codes())
    with pytest.raises(ValueError, match=r"got t \(1,\) for 3 grids"):
        with_time(codes(), t=t[:1])
    with pytest.raises(ValueError, match="got t for a transformer without a time input"):
        plain(codes(), t=t)


@INTO
def test_the_time_joins_the_vectors_of_norms(into):
    network = randomize(build_network(encoders=label_encoders(CLASSES, WIDTH), time_scale=1.0, vectors_into=into))
    embeddings, t, labels = [], torch.tensor([3.0, 5.0, 7.0]), torch.tensor([0, 1, 2])
    network.blocks[1].register_forward_pre_hook(lambda block, args: embeddings.append(args[1]))
    network(codes(), {"label": labels}, t=t)
    vectors = network.encoders["label"].embedding(labels)
    assert torch.equal(embeddings[0], network.time(t) + vectors if into == "norms" else network.time(t))


# Hints


def hinted(network):
    """Adds an encoder of hints whose output is not 0."""
    add_control(network, HintEncoder(HintConfig(hint_channels=2, hint_widths=(4, 6), hint_factor=2), WIDTH).double())
    return torch.rand(B, 2, 6, 8, generator=torch.manual_seed(3)).double() * 2 - 1


@NETWORKS
@torch.no_grad()
def test_a_new_encoder_of_hints_changes_nothing_to_the_bit(kind):
    network = randomize(build_network(kind))
    plain, hint = network(codes(), fields()), hinted(network)
    assert torch.equal(network(codes(), fields() | {"hint": hint}), plain)
    for parameter in network.control.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(network(codes(), fields()), plain)  # without a hint
    assert not torch.allclose(network(codes(), fields() | {"hint": hint}), plain)


@NETWORKS
@torch.no_grad()
def test_an_encoded_hint_is_added_to_the_embeddings(kind):
    network = randomize(build_network(kind, {}))
    hint = hinted(network)
    for parameter in network.control.parameters():
        nn.init.normal_(parameter)
    condition = network.encode({"hint": hint}, codes())
    added = network.control["hint"]((hint + 1) / 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(condition.streams["hint"].values, added.permute(0, 3, 1, 2))
    half = network(codes(), scale_hints(condition, {"hint": [0.5]}))
    network.position += 0.5 * added[1]
    torch.testing.assert_close(network(codes(), {})[1], half[1])


def test_a_window_has_its_part_of_an_encoded_hint():
    network = randomize(build_network(Transformer, {}, attention=AttentionConfig(position="rope")))
    hint = hinted(network)
    for parameter in network.control.parameters():
        nn.init.normal_(parameter)
    whole = network.encode({"hint": hint}, codes())
    window = network.encode_window({"hint": hint}, whole, codes()[:, 1:, 1:], (1, 1), GRID)
    assert torch.equal(window.streams["hint"].values, whole.streams["hint"].values[:, :, 1:, 1:])
    assert torch.equal(window.streams["hint"].strengths, whole.streams["hint"].strengths)


# All conditions together


def all_conditions(network):
    hint = hinted(network)
    for parameter in network.control.parameters():
        nn.init.normal_(parameter)
    condition = network.encode(fields() | {"hint": hint}, codes())
    masks, index = torch.rand(B, 2, 6, 8, generator=torch.manual_seed(4)) < 0.3, torch.arange(2)
    regions, region = (
        Regions(present=torch.ones(B, 2).bool(), masks=masks),
        torch.tensor([[-1, 0, 1], [1, 0, 0], [0, 1, -1]]),
    )
    words = condition.streams["words"]._replace(membership=region.unsqueeze(-1) == index, everywhere=region < 0)
    condition = Condition(dict(condition.streams) | {"words": words}, regions)
    return condition, {"t": torch.tensor([0.2, 0.4, 0.6])}


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("stops", [list(range(12)), [0, 1, 5, 6, 11]], ids=["one by one", "some"])
@INTO
def test_cached_logits_equal_those_of_the_full_sequence(position, stops, into):
    options = {"attention": AttentionConfig(position=position), "time_scale": 10.0, "vectors_into": into}
    network = randomize(build_network(CausalTransformer, **options))
    (condition, options), kv_cache, ids = all_conditions(network), KVCache(GRID), codes()
    expected = network(ids, condition, **options).flatten(1, 2)
    for stop in stops:
        logits = network(ids.flatten(1)[:, :stop], condition, kv_cache, **options)
        assert torch.allclose(logits, expected[:, stop], rtol=0, atol=1e-10)


@NETWORKS
def test_rows_of_a_condition_are_those_examples(kind):
    network, rows = randomize(build_network(kind, time_scale=10.0)), torch.tensor([2, 0])
    condition, options = all_conditions(network)
    part = {name: value[rows] for name, value in options.items()}
    expected = network(codes(), condition, **options)[rows]
    assert torch.allclose(network(codes()[rows], condition[rows], **part), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="got a condition of 3 examples for 2: take condition"):
        network(codes()[rows], condition, **part)


@pytest.mark.parametrize("kind", ["gelu", "geglu"])
def test_feed_forward_layers_by_name(kind):
    network = build_network(encoders={}, feed_forward=kind)
    layer = network.blocks[0].feed_forward
    assert (layer is None) == (kind == "gelu")
    last = network.blocks[0].residual_projections()[1]
    assert last.weight.std().item() == pytest.approx(0.02 / 2, rel=0.2)
    assert kind == "gelu" or isinstance(layer, FeedForward) and layer.expand.out_features == 2 * 4 * WIDTH
    with pytest.raises(ValueError, match="got feed_forward 'relu': there are gelu, geglu"):
        build_network(encoders={}, feed_forward="relu")
