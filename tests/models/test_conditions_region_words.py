"""Words of regions: which region reads what, merged and shared tokens. Public code: test_words_of_public_code.py."""

import copy

import pytest
import torch
from torch import nn

from models.attention import CrossAttention
from models.conditioning import Condition, Conditioner
from models.conditions import objects, region_words, text
from models.conditions.region_words import WordRule
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig

NAMES = ("red disc", "traffic_light", "sky", "sand")
SMALL = {"text_width": 16, "text_layers": 1, "text_heads": 2}
LONG = " ".join(["a red star and a blue ring"] * 25)  # 150 words
X = torch.zeros(2, 3, 4, 6)


def build(shared=False, **options):
    """An encoder of random weights, and the captions whose text encoder it shares."""
    torch.manual_seed(0)
    options = {"region_words_names": NAMES, "region_words_stuff": (2, 3)} | SMALL | options
    captions = text.build(text.Config(**SMALL), 8, 0).eval() if shared else None
    encoder = region_words.build(region_words.Config(**options), 8, 0, captions).eval()
    return (encoder, captions) if shared else encoder


def scenes():
    """Two images of quarters: two discs, one of them a red car, a light and the sky; and sand, with nothing else."""
    ids = torch.zeros(2, 4, 6, dtype=torch.int32)
    ids[0, :2, :3], ids[0, :2, 3:], ids[0, 2:, :3], ids[0, 2:, 3:] = 7, 5, 9, 3
    ids[1, :2] = 1
    return {
        "panoptic": ids,
        "segment_id": torch.tensor([[3, 5, 7, 9], [1, 0, 0, 0]]),
        "segment_id_mask": torch.tensor([[True] * 4, [True, False, False, False]]),
        "segment_class": torch.tensor([[2, 0, 0, 1], [3, 0, 0, 0]]),
        "segment_class_mask": torch.tensor([[True] * 4, [True, False, False, False]]),
        "box_id": torch.tensor([[5, 7, 9], [0, 0, 0]]),
        "box_id_mask": torch.tensor([[True] * 3, [False] * 3]),
        "box_words": [["a red car", "red disc", "traffic_light"], []],
    }


def encode(encoder, fields, drop=None, x=X):
    """The condition of fields, by a conditioner of this encoder alone."""
    conditioner = Conditioner({"region_words": encoder})
    conditioner.training = encoder.training
    return conditioner({"region_words": fields}, x, {} if drop is None else {"regions": drop})


def seen_words(encoder, fields, condition, row, region):
    """The texts that a region of an image reads."""
    tokens, texts = condition.streams["region_words"], encoder.tokens_of_texts(fields)[row]
    read = tokens.mask[row] & tokens.membership[row, :, region]
    words = [each for each, own in texts.items() if own and read[own].all()]
    assert read.sum() == sum(len(texts[each]) for each in words)
    return words


# Which words


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [["sky"], ["a red car"], ["red disc"], ["traffic light"], ["sand"]]),
        ("things", [[], ["a red car"], ["red disc"], ["traffic light"], []]),
        ("background", [["sky"], [], [], [], ["sand"]]),
        ("instances", [[], ["a red car"], [], [], []]),  # the name of a class is none of its own
    ],
)
def test_a_mode_says_which_regions_have_words(mode, expected):
    encoder, fields = build(region_words_mode=mode), scenes()
    condition = encode(encoder, fields)
    read = [seen_words(encoder, fields, condition, 0, region) for region in range(4)]
    assert [*read, seen_words(encoder, fields, condition, 1, 0)] == expected


def test_words_are_found_by_the_ids_of_instances():
    """In any order of the segments and of the instances; stuff may have words too; those of others are not read."""
    encoder, fields = build(), scenes()
    fields["box_id"], fields["box_words"][0] = torch.tensor([[9, 3, 800], [0, 0, 0]]), ["a lamp", "a cloud", "nobody"]
    condition = encode(encoder, fields)
    read = [seen_words(encoder, fields, condition, 0, region) for region in range(4)]
    assert read == [["a cloud"], ["red disc"], ["red disc"], ["a lamp"]]
    assert "nobody" not in encoder.tokens_of_texts(fields)[0]


def test_without_words_of_instances_classes_have_theirs():
    encoder, fields = build(), scenes()
    for name in ("box_id", "box_id_mask", "box_words"):
        del fields[name]
    condition = encode(encoder, fields)
    read = [seen_words(encoder, fields, condition, 0, region) for region in range(4)]
    assert read == [["sky"], ["red disc"], ["red disc"], ["traffic light"]]
    blank = scenes() | {"box_words": [["", " ", "traffic_light"], []]}
    assert torch.equal(encode(encoder, blank).streams["region_words"].values, condition.streams["region_words"].values)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_boxes_and_masks_have_words_in_their_order(kind):
    encoder = build(region_words_regions=kind, region_words_stuff=())
    shape = torch.tensor([[[0, 0, 0.5, 1], [0.5, 0, 1, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]])
    shape = shape if kind == "boxes" else (torch.arange(48).view(2, 1, 4, 6) % 2 == torch.arange(2)[:, None, None])
    mask = torch.tensor([[True, True], [True, False]])
    fields = {kind: shape, f"{kind}_mask": mask, "box_class": torch.tensor([[0, 3], [1, 0]]), "box_class_mask": mask}
    fields["box_words"] = [["a red car", ""], ["a lamp"]]
    condition = encode(encoder, fields)
    read = [seen_words(encoder, fields, condition, *place) for place in ((0, 0), (0, 1), (1, 0))]
    assert read == [["a red car"], ["sand"], ["a lamp"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box_words": [["a car"], []]}, "image 0 of the batch: got 1 texts as box_words, wanted a text for each of 3"),
        ({"box_words": [["a", "b", 3], []]}, "got 3 texts as box_words"),
        ({"box_words": ["a car", []]}, "got 'a car' as box_words"),
        ({"box_id": None}, "got box_words without box_id"),
        ({"segment_class": torch.full((2, 4), 4)}, "got segment_class 4 as region 0, wanted 0 to 3"),
    ],
)
def test_other_words_than_regions_are_refused(changes, message):
    fields = {name: value for name, value in (scenes() | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        encode(build(), fields)


def test_what_modes_need_must_be_known():
    for mode, stuff, message in (("all", (), "no names of classes"), ("background", (), "no names of classes")):
        config = region_words.Config(region_words_mode=mode, region_words_stuff=stuff)
        with pytest.raises(ValueError, match=message):
            region_words.build(config, 8, 0)
    with pytest.raises(ValueError, match="background, and no class that is stuff"):
        WordRule(mode="background", names=NAMES)
    assert WordRule(mode="instances").words_of(7, "a lamp") == "a lamp"


def test_names_and_stuff_are_those_of_the_data():
    config = region_words.Config().for_data(3, names=("a", "b", "c"), things=(True, False, True))
    assert config.region_words_names == ("a", "b", "c") and config.region_words_stuff == (1,)
    assert config.for_data(3, names=("a", "b", "c"), things=(True, False, True)) == config == config.for_data(0)
    own = region_words.Config(region_words_names=("x", "y")).for_data(2, names=("a", "b"), things=(False, True))
    assert own.region_words_names == ("x", "y") and own.region_words_stuff == (0,)
    assert own.rule.words_of(0, "a") == own.rule.words_of(0) == "x" and own.rule.words_of(0, "b") == "b"
    with pytest.raises(ValueError, match="got region_words_names of 2 classes, the data set has 3"):
        own.for_data(3, names=("a", "b", "c"))


# Tokens


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_a_region_reads_the_words_alone_without_start_and_end(training):
    encoder, fields = build().train(training), scenes() | {"box_words": [[LONG, "red disc", "traffic_light"], []]}
    condition = encode(encoder, fields)
    tokens = condition.streams["region_words"]
    for row, region, words in (
        (0, 0, "sky"),
        (0, 1, LONG),
        (0, 2, "red disc"),
        (0, 3, "traffic light"),
        (1, 0, "sand"),
    ):
        chunks = text.caption_chunks(words, 77)
        expected = torch.cat([encoder.captions.encoder(torch.tensor([chunk])).tokens[0, 1:-1] for chunk in chunks])
        own = tokens.values[row][tokens.membership[row, :, region] & tokens.mask[row]]
        assert torch.allclose(own, expected, atol=1e-5) and len(own) == len(encoder.tokenizer.encode(words))
    assert not tokens.values[~tokens.mask].any()


def test_equal_words_are_one_group_of_all_their_regions():
    encoder, fields = build(), scenes() | {"box_words": [["a car", "a car", "a car"], []]}
    tokens = encode(encoder, fields).streams["region_words"]
    assert tokens.mask[0].sum() == 1 + 2  # sky; a car
    assert sorted(map(tuple, tokens.membership[0][tokens.mask[0]].tolist())) == [(False, True, True, True)] * 2 + [
        (True, False, False, False)
    ]


def unmerged(encoder, fields):
    """The tokens with a group of its own for each region."""
    found = encoder.rule.read(fields)
    texts = [
        [own[n] if n >= 0 else "" for n in row] for own, row in zip(found.texts, found.numbers.tolist(), strict=True)
    ]
    apart = found._replace(texts=texts, numbers=torch.arange(4).expand(2, -1).where(found.numbers >= 0, -1))
    return fields | region_words.tokenize_words(apart, 77, encoder.tokenizer)


def random_unet(encoders):
    torch.manual_seed(1)
    options = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (1, 2), "heads": 2}
    network = UNet(UNetConfig(**options, attn_block_type="transformer"), encoders)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def random_transformer(encoders, kind=Transformer):
    torch.manual_seed(1)
    network = kind(codes=5, grid=(4, 6), width=16, heads=2, layers=2, encoders=encoders)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def run(network, condition, rows=2):
    """The output of a network for the same x in each row."""
    if isinstance(network, UNet):
        x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(2)).to(next(network.parameters()).dtype)
        return network(x.expand(rows, -1, -1, -1), torch.full((rows,), 0.5), condition)
    ids = torch.randint(5, (1, 4, 6), generator=torch.Generator().manual_seed(2)).expand(rows, -1, -1)
    return network(ids, condition)


NETWORKS = {
    "unet": random_unet,
    "absorbing": random_transformer,
    "causal": lambda encoders: random_transformer(encoders, CausalTransformer),
}
network_kinds = pytest.mark.parametrize("kind", NETWORKS)


@network_kinds
@torch.no_grad()
def test_merged_words_act_as_unmerged(kind):
    encoder, fields = build(), scenes() | {"box_words": [["a car", "a car", "a car"], []]}
    network = NETWORKS[kind]({"region_words": encoder}).double()
    one, other = (run(network, {"region_words": each}) for each in (fields, unmerged(encoder, fields)))
    assert (one - other).abs().max() < 1e-6
    assert (one[0] - one[1]).abs().max() > 1e-3


@network_kinds
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_mates(kind):
    """To the bit, if the shapes are equal; without other words and classes in between."""
    encoder, captions = build(shared=True)
    network = NETWORKS[kind]({"text": captions, "region_words": encoder}).double()
    fields, outs = scenes(), []
    prompts = ["a scene", "sand"]
    for words, classes, prompt in (("a lamp", 3, "sand"), ("red disc", 1, "two cars")):
        fields = scenes() | {"box_words": [scenes()["box_words"][0], [words]]}
        fields["box_id"][1, 0], fields["box_id_mask"][1, 0], fields["segment_class"][1, 0] = 1, True, classes
        outs.append(run(network, {"text": ["a scene", prompt], "region_words": fields}))
    assert torch.equal(outs[0][0], outs[1][0]) and not torch.equal(outs[0][1], outs[1][1])
    alone = {name: value[:1] for name, value in scenes().items()}
    one = run(network, {"text": prompts[:1], "region_words": alone}, rows=1)
    assert (one[0] - outs[0][0]).abs().max() < 1e-10


@network_kinds
@torch.no_grad()
def test_regions_without_words_read_the_prompt_alone(kind):
    """They are as without any words at all, and places see no words of other regions."""
    encoder, captions = build(shared=True, region_words_mode="instances")
    network = NETWORKS[kind]({"text": captions, "region_words": encoder}).double()
    none = scenes() | {"box_words": [["", "", ""], []]}
    prompts = ["a scene", "sand"]
    without = run(network, {"text": prompts})
    assert torch.allclose(run(network, {"text": prompts, "region_words": none}), without, rtol=0, atol=1e-12)
    other = run(network, {"text": prompts, "region_words": scenes()})
    assert not torch.allclose(other[0], without[0]) and torch.allclose(other[1], without[1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_where_no_words_are_seen_nothing_is_read():
    """One cross-attention alone: exactly 0 before the bias of the output."""
    encoder = build(region_words_mode="instances")
    condition = encode(encoder, scenes())
    layer = CrossAttention(8, 2, context_width=16)
    out = layer(torch.randn(2, 24, 8), *condition.context(4, 6))
    covered = (scenes()["panoptic"] == 5).flatten(1)
    assert torch.equal(out[~covered], layer.proj.bias.expand(48 - 6, -1))
    assert not torch.isclose(out[covered], layer.proj.bias).all()


@torch.no_grad()
def test_dropped_images_have_no_words():
    encoder, captions = build(shared=True, region_words_everywhere="our street")
    conditioner = Conditioner({"text": captions, "region_words": encoder})
    fields, drop = {"text": ["a scene", "sand"], "region_words": scenes()}, torch.tensor([True, False])
    dropped, full = (conditioner(fields, X, each).streams["region_words"] for each in ({"regions": drop}, {}))
    assert not dropped.mask[0].any() and not dropped.values[0].any() and not dropped.membership[0].any()
    assert torch.equal(dropped.values[1], full.values[1]) and torch.equal(dropped.mask[1], full.mask[1])
    null = conditioner({"text": fields["text"]}, X).streams["region_words"]
    assert null.values.shape == (2, 0, 16)
    both = Condition.cat([conditioner({}, X), conditioner(fields, X)])  # a chain of guidance
    assert both.batch_size == 4 and not both.streams["region_words"].mask[:2].any()


@torch.no_grad()
def test_words_everywhere_are_read_by_all_places():
    encoder = build(region_words_everywhere="our street")
    condition = encode(encoder, scenes())
    first = encoder.tokens_of_texts(scenes())[0]["our street"]
    seen = condition.attention_mask(4, 6)
    assert len(first) == 2 and seen[:, :, first].all()
    assert not seen[1, 12:][:, [i for i in range(seen.shape[2]) if i not in first]].any()  # no region is there


@network_kinds
@torch.no_grad()
def test_a_window_reads_the_words_of_what_is_in_it(kind):
    encoder = build()
    network = NETWORKS[kind]({"region_words": encoder})
    if kind == "unet":
        window = network.encode({"region_words": scenes()}, X).window(0, 0, 2, 3, (4, 6))
    else:
        fields, ids = {"region_words": scenes()}, torch.zeros(2, 2, 3, dtype=torch.long)
        whole = network.encode(fields, torch.zeros(2, 4, 6, dtype=torch.long))
        window = network.encode_window(fields, whole, ids, (0, 0), (4, 6))
    seen = window.attention_mask(2, 3)
    own = encoder.tokens_of_texts(scenes())[0]["red disc"]
    others = [i for i in range(seen.shape[2]) if i not in own]
    assert seen[0][:, own].all() and not seen[0][:, others].any()


def test_regions_can_be_prompts_of_region_attention():
    torch.manual_seed(0)
    options = {"channels": 8, "channel_mults": (1,), "res_blocks": 1, "attn_factors": (1,), "heads": 1}
    network = UNet(UNetConfig(**options, region_attention="v2"), {"region_words": build()})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    out = run(network, {"region_words": scenes()})
    assert not torch.allclose(out[0], out[1]) and torch.isfinite(out).all()


# One text encoder


def test_a_text_encoder_is_shared_or_its_own():
    encoder, captions = build(shared=True)
    network = random_unet({"region_words": encoder, "text": captions})
    alone = random_unet({"text": captions})
    assert network.state_dict().keys() == alone.state_dict().keys()
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in alone.parameters())
    twin = copy.deepcopy(network)
    words = twin.encoders["region_words"]
    assert words.captions is twin.encoders["text"] is not captions
    own = build()
    assert {key.split(".")[0] for key in own.state_dict()} == {"own"} and own.own.null is None
    assert next(iter(own.state_dict())).startswith("own.encoder.")


@pytest.mark.parametrize("shared", [True, False])
def test_the_text_encoder_learns_from_words_of_regions(shared):
    """Also where no image of a batch has any, so that all ranks have gradients, which are then 0."""
    encoder, captions = build(shared=True) if shared else (build(region_words_mode="instances"), None)
    encoder.rule = WordRule(mode="instances")
    network = random_unet({"text": captions, "region_words": encoder} if shared else {"region_words": encoder}).train()
    tokens = encoder.captions.encoder.token.weight
    for words, learns in ((["a lamp", "", ""], True), (["", "", ""], False)):
        network.zero_grad()
        fields = {"region_words": scenes() | {"box_words": [words, []]}} | ({"text": ["sand"] * 2} if shared else {})
        run(network, fields).square().mean().backward()
        (lamp,) = encoder.tokenizer.encode("lamp")
        assert bool(tokens.grad[lamp].any()) == learns
        assert all(p.grad is not None for p in network.parameters() if p is not getattr(captions, "null", None))


def test_new_words_of_the_encoder_are_read():
    encoder = build()
    encoder.captions.encoder.add_words({"<my-car>": torch.full((16,), 3.0)})
    fields = scenes() | {"box_words": [["a <my-car>", "", ""], []]}
    (tokens,) = [own for text, own in encoder.tokens_of_texts(fields)[0].items() if "my-car" in text]
    assert len(tokens) == 2
    condition = encode(encoder, fields)
    assert condition.streams["region_words"].mask[0, tokens].all()


def test_other_conditions_of_regions_stand_beside_words():
    encoder, captions = build(shared=True)
    encoders = {"text": captions, "objects": objects.ObjectsEncoder(4, 16, "segments"), "region_words": encoder}
    network = random_unet(encoders)
    fields = {name: value for name, value in scenes().items() if not name.startswith("box")}
    assert torch.isfinite(run(network, {"text": ["a", "b"], "objects": fields, "region_words": scenes()})).all()


# Tokens by name, for maps of attention


def test_tokens_of_words_are_those_of_all_texts_that_have_them():
    encoder, fields = build(), scenes() | {"box_words": [["a red car", "red disc", "traffic_light"], []]}
    texts = encoder.tokens_of_texts(fields)
    assert [*texts[0]] == ["sky", "a red car", "red disc", "traffic light"] and [*texts[1]] == ["sand"]
    red = encoder.tokens_of_words(fields, "Red")
    assert red == [[texts[0]["a red car"][1], texts[0]["red disc"][0]], []]
    assert encoder.tokens_of_words(fields, "red car") == [texts[0]["a red car"][1:], []]


# Gated


@network_kinds
@torch.no_grad()
def test_gated_words_start_as_no_words_at_all(kind):
    """With gates at 0 the output is that without words, to the bit; open, places with words change, and no others."""
    encoder, captions = build(shared=True, region_words_gated=True)
    plain = NETWORKS[kind]({"text": captions})
    network = NETWORKS[kind]({"text": captions, "region_words": encoder})
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    gates = [p for name, p in network.named_parameters() if name.endswith(".gate")]
    assert not unexpected and gates and all(key.partition("gated")[1] for key in missing)
    fields = {"text": ["a scene", "sand"], "region_words": scenes()}
    expected = run(plain, {"text": fields["text"]})
    for value, same in ((0.0, True), (0.5, False)):
        for gate in gates:
            gate.data.fill_(value)
        assert torch.equal(run(network, fields), expected) == same
        assert torch.equal(run(network, {"text": fields["text"]}), expected)  # the null: no token is seen
    condition = network.encoders(fields, X, {"regions": torch.tensor([True, False])})
    out = network(*inputs_of(network), condition)
    assert torch.equal(out[0], expected[0]) and not torch.equal(out[1], expected[1])  # the first one is dropped


def inputs_of(network):
    """What `run` calls a network with, but for the condition."""
    if isinstance(network, UNet):
        x = torch.randn(1, 3, 4, 6, generator=torch.Generator().manual_seed(2))
        return x.expand(2, -1, -1, -1), torch.full((2,), 0.5)
    return (torch.randint(5, (1, 4, 6), generator=torch.Generator().manual_seed(2)).expand(2, -1, -1),)


def test_a_pretrained_encoder_of_gated_words_is_kept():
    """A transformer of codes initialises gated encoders itself, but not a text encoder that keeps its weights."""
    torch.manual_seed(0)
    encoder = build(region_words_gated=True)
    kept = {name for name, module in encoder.named_modules() if module in encoder.kept_modules()}
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    Transformer(codes=5, grid=(4, 6), width=16, heads=2, layers=2, encoders={"region_words": encoder})
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]) or name.rpartition(".")[0] not in kept
    assert kept
