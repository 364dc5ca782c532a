"""Captions: tokens that depend on their own caption alone, of any length."""

from functools import partial

import pytest
import torch

from helpers.tiny_minilm import VOCABULARY, random_weights, use_vocabulary
from models.bert import bert_tensors
from models.conditioning import Condition, Conditioner, Tokens
from models.conditions import text
from models.conditions.text import caption_chunks, tokenize
from models.tokenizer import Tokenizer
from models.transformer import CausalTransformer, Transformer
from models.unet import UNet, UNetConfig

START, END = Tokenizer.start_id, Tokenizer.end_id
LONG = " ".join(["a red star and a blue ring"] * 25)  # 150 words


def build(width=0, **options):
    torch.manual_seed(0)
    options = {"text_width": 16, "text_layers": 2, "text_heads": 2} | options
    return text.build(text.Config(**options), width, 0).eval()


def encode(encoder, captions, drop=None):
    return encoder(captions, torch.zeros(len(captions), 3, 4, 4), drop)


def present(tokens, row):
    """The tokens of an example that are no padding."""
    return tokens.values[row][tokens.mask[row]]


# Ids


def test_chunks_have_starts_and_ends_of_their_own():
    ids = Tokenizer().encode(LONG)
    chunks = caption_chunks(LONG, 77)
    assert [len(chunk) for chunk in chunks] == [77, 77, 2 + len(ids) - 150] == [77, 77, 27]
    assert all(chunk[0] == START and chunk[-1] == END for chunk in chunks)
    assert [each for chunk in chunks for each in chunk[1:-1]] == ids  # none is lost
    assert caption_chunks("", 77) == [[START, END]]
    assert caption_chunks("a b c", 4) == [[START, 320, 321, END], [START, 322, END]]


def test_ids_are_padded_to_the_longest_of_the_batch():
    ids, mask = tokenize(["a cat", "", "a photo of a cat on a mat"], 77)
    assert ids.shape == mask.shape == (3, 1, 16) and ids.dtype == torch.int64
    assert ids[0, 0].tolist() == [START, 320, 2368, END, *[END] * 12]
    assert mask.sum(-1).flatten().tolist() == [4, 2, 10]
    ids, mask = tokenize([LONG, "a cat"], 77)
    assert ids.shape == (2, 3, 77) and mask.sum(-1).tolist() == [[77, 77, 27], [4, 0, 0]]


def test_what_is_no_text_is_refused():
    with pytest.raises(ValueError, match="got caption 7, wanted a text: quote it, such as '7'"):
        encode(build(), ["seven", 7])


# Tokens


@pytest.mark.parametrize("null", ["learned", "empty"])
@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_do_not_matter(null):
    encoder = build(text_null=null)
    alone, together = encode(encoder, ["a red star"]), encode(encoder, ["a red star", LONG, "a bus"])
    assert together.values.shape[1] > 2 * alone.values.shape[1]
    assert torch.allclose(present(together, 0), present(alone, 0), atol=1e-6)
    training = encode(encoder.train(), ["a red star", LONG, "a bus"])
    for row in range(3):
        assert torch.allclose(present(training, row), present(together, row), atol=1e-5)


@torch.no_grad()
def test_every_word_of_a_long_caption_counts():
    encoder = build()
    tokens = encode(encoder, [LONG, LONG + " today", "today " + LONG, LONG.replace("ring", "bow", 12)])
    rows = [present(tokens, row) for row in range(4)]
    assert [len(row) for row in rows] == [181, 182, 182, 181]
    assert torch.equal(rows[1][:180], rows[0][:180]) and not torch.equal(rows[1][180], rows[0][180])
    assert not torch.allclose(rows[2][:77], rows[0][:77], atol=1e-2)
    assert not torch.allclose(rows[3], rows[0], atol=1e-2)


@torch.no_grad()
def test_ids_of_the_loader_are_the_same_as_texts():
    encoder, captions = build(), ["a red star", LONG]
    ids, mask = tokenize(captions, encoder.length)
    from_texts = encode(encoder, captions)
    from_ids = encoder({"caption": ids, "caption_mask": mask}, torch.zeros(2, 3, 4, 4))
    assert torch.equal(from_ids.values, from_texts.values) and torch.equal(from_ids.mask, from_texts.mask)


@torch.no_grad()
def test_the_null_is_seen_by_dropped_examples_alone():
    learned, empty = build(), build(text_null="empty")
    drop = torch.tensor([True, False])
    for encoder, size in ((learned, 1), (empty, 2)):
        null, tokens = encode(encoder, ["", ""]).values[:1, :size], encode(encoder, ["a bus", "a star"], drop)
        assert torch.equal(present(tokens, 0), null[0])
        assert tokens.mask[1, :size].tolist() == [False] * size and len(present(tokens, 1)) == 4
        assert torch.equal(encoder(None, torch.zeros(3, 3, 4, 4)).values, null.expand(3, -1, -1))
    assert torch.equal(learned(None, torch.zeros(1, 3, 4, 4)).values, learned.null)
    assert torch.allclose(present(encode(empty, [""]), 0), present(encode(empty, ["a", ""], drop), 0))


@torch.no_grad()
def test_equal_captions_share_a_row_and_different_ones_never():
    captions = ["a red star", "a bus", "A  red STAR", LONG, "a red star.", LONG, LONG + " today"]
    rows = Condition({"text": encode(build(), captions)}).row_ids().tolist()
    assert [[other == row for other in rows] for row in rows] == [
        [other == row for other in (0, 1, 0, 3, 4, 3, 6)] for row in (0, 1, 0, 3, 4, 3, 6)
    ]


# Padding that is read


def padded(captions, pad):
    """Ids (B, C, 77) of captions of equal numbers of chunks, filled with an id."""
    return torch.tensor(
        [[chunk + [pad] * (77 - len(chunk)) for chunk in caption_chunks(each, 77)] for each in captions]
    )


@pytest.mark.parametrize(("padding", "pad"), [("end", END), ("zero", 0)])
@torch.no_grad()
def test_padding_is_read_as_the_text_encoder_makes_it(padding, pad):
    encoder = build(text_null="empty", text_padding=padding)
    captions = ["a red star", "", "a photo of a cat"]
    ids, mask = tokenize(captions, 77, pad_id=pad)
    assert torch.equal(ids, padded(captions, pad)) and mask.all()
    tokens = encode(encoder, captions)
    for row, wanted in enumerate(encoder.encoder(padded(captions, pad)[:, 0]).tokens):
        assert torch.equal(tokens.values[row], wanted)
    assert tokens.mask is None and tokens.values.shape == (3, 77, 16)
    assert torch.equal(encoder({"caption": ids, "caption_mask": mask}, torch.zeros(3, 3, 4, 4)).values, tokens.values)
    masked = encode(build(text_null="empty"), captions)
    assert torch.allclose(present(masked, 0), tokens.values[0, :5], atol=1e-6)


@torch.no_grad()
def test_padding_is_read_in_every_chunk_of_a_long_caption():
    encoder = build(text_null="empty", text_padding="end")
    tokens = encode(encoder, [LONG, "a bus"])
    assert tokens.values.shape == (2, 231, 16) and tokens.mask.sum(1).tolist() == [231, 77]
    wanted = encoder.encoder.encode_chunks(padded([LONG], END))
    assert torch.allclose(tokens.values[0], wanted[0], atol=1e-6) and not tokens.values[1, 77:].any()
    assert torch.allclose(tokens.values[1, :77], encode(encoder, ["a bus"]).values[0], atol=1e-6)


@torch.no_grad()
def test_dropped_examples_read_the_empty_caption():
    encoder, x = build(text_null="empty", text_padding="zero"), torch.zeros(2, 3, 4, 4)
    null = encode(encoder, [""]).values[0]
    assert torch.equal(encoder(None, x).values, null.expand(2, -1, -1)) and encoder(None, x).mask is None
    short = encode(encoder, ["a bus", "a star"], torch.tensor([True, False]))
    assert torch.equal(short.values[0], null) and short.mask is None
    assert torch.allclose(short.values[1], encode(encoder, ["a star"]).values[0], atol=1e-6)
    long = encode(encoder, [LONG, LONG], torch.tensor([True, False]))
    assert torch.equal(long.values[0, :77], null) and not long.values[0, 77:].any()
    assert long.mask.sum(1).tolist() == [77, 231]
    both = Condition.cat([Condition({"text": tokens}) for tokens in (encoder(None, x), long)]).streams["text"]
    assert both.values.shape == (4, 231, 16) and both.mask.sum(1).tolist() == [77, 77, 77, 231]


@torch.no_grad()
def test_networks_read_padding_and_no_further_chunks():
    network, run = unet(build(32, text_null="empty", text_padding="end", text_pooled=True))
    network.eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    alone, both = run({"text": ["a red star"]}, 1), run({"text": ["a red star", LONG]}, 2)
    assert torch.allclose(both[0], alone[0], atol=1e-5) and (both[1] - both[0]).abs().max() > 1e-3
    condition = network.encoders({"text": ["a red star"]}, torch.zeros(1, 3, 4, 4)).streams
    for place in (3, 76):  # a word, and the last of the padding
        condition["text"].values[0, place] += 1
        assert not torch.allclose(run(Condition(condition), 1), alone, atol=1e-4)
        condition["text"].values[0, place] -= 1


def test_padding_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="got text_padding end and text_null learned, .*: pass --text_null empty"):
        text.Config(text_padding="end")
    with pytest.raises(ValueError, match="got text_padding zero for minilm, which reads no padding"):
        text.Config(text_padding="zero", text_null="empty", text_encoder="minilm")
    encoder, (ids, mask) = build(text_null="empty", text_padding="end"), tokenize(["a bus"], 77)
    with pytest.raises(ValueError, match="got 8 tokens of captions whose padding is read, wanted chunks of 77"):
        encoder({"caption": ids, "caption_mask": mask}, torch.zeros(1, 3, 4, 4))


# Pooled


@torch.no_grad()
def test_the_pooled_vector_is_of_the_mean_of_tokens():
    encoder = build(width=6, text_pooled=True)
    conditioner, x = Conditioner({"text": encoder}).eval(), torch.zeros(3, 3, 4, 4)
    fields, drop = {"text": ["a red star", LONG, "a bus"]}, {"text": torch.tensor([False, False, True])}
    assert not conditioner(fields, x).vector().any()  # at birth
    torch.nn.init.normal_(encoder.pooling.contract.weight)
    condition, pooling = conditioner(fields, x, drop), encoder.pooling
    rows = torch.stack([present(condition.streams["text"], row).mean(0) for row in range(3)])
    mean = torch.nn.functional.layer_norm(rows, (16,), pooling.norm.weight, pooling.norm.bias)
    wanted = pooling.contract(torch.nn.functional.silu(pooling.expand(mean)))
    assert condition.vector().shape == (3, 6) and torch.allclose(condition.vector(), wanted, atol=1e-5)
    assert torch.allclose(conditioner(None, x).vector(), wanted[2:].expand(3, -1), atol=1e-5)  # the null
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


@torch.no_grad()
def test_equal_captions_share_a_row_with_their_pooled_vectors():
    """Whatever the sizes: a product of matrices may round equal rows differently."""
    for width, count in ((6, 3), (33, 17), (256, 37)):
        encoder = build(width, text_pooled=True, text_width=64)
        torch.nn.init.normal_(encoder.pooling.contract.weight)
        captions = ["a bus", "a red star", "a bus"] * count
        rows = Conditioner({"text": encoder}).eval()({"text": captions}, torch.zeros(3 * count, 3, 4, 4)).row_ids()
        assert rows.unique().numel() == 2 and (rows[::3] == rows[2::3]).all()


def test_a_condition_without_its_pooled_vector_is_refused():
    conditioner, x = Conditioner({"text": build(width=6, text_pooled=True)}), torch.zeros(1, 3, 4, 4)
    assert conditioner.makes_vectors and conditioner.stream_names == ["text", "text_pooled"]
    condition = conditioner({"text": ["a bus"]}, x)
    assert conditioner.resolve(condition, x) is condition
    with pytest.raises(ValueError, match="got a condition without text_pooled"):
        conditioner.resolve(Condition({"text": condition.streams["text"]}), x)


def test_other_numbers_of_captions_are_refused():
    encoder, (ids, mask) = build(), tokenize(["a bus"] * 3, 77)
    for raw in (["a bus"] * 3, {"caption": ids, "caption_mask": mask}):
        with pytest.raises(ValueError, match=r"got caption \(3, 1, 8\) .* for 2 images, wanted 2 texts"):
            encoder(raw, torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"caption_mask \(1, 1, 8\) for 3 images"):
        encoder({"caption": ids, "caption_mask": mask[:1]}, torch.zeros(3, 3, 4, 4))
    with pytest.raises(ValueError, match=r"got caption \[7, 3\], wanted texts: quote them"):
        encoder({"caption": torch.tensor([7, 3])}, torch.zeros(2, 3, 4, 4))


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="got text_width 16 and text_heads 3, wanted heads that divide the width"):
        text.Config(text_width=16, text_heads=3)
    with pytest.raises(ValueError, match="got text_length 2, wanted at least 3"):
        text.Config(text_length=2)


# BERT, whose tokens also see those after them


@pytest.fixture
def minilm(monkeypatch):
    """Builds the encoder of a run with MiniLM, as it is saved with the run, of 20 tokens a chunk."""
    use_vocabulary(monkeypatch)
    sizes = {"text_width": 8, "text_layers": 2, "text_heads": 2, "text_length": 20}

    def build(**options):
        encoder = text.build(text.Config(text_encoder="minilm", **sizes, **options), 0, 0)
        encoder.encoder.load_state_dict(bert_tensors(random_weights(), encoder.encoder.config))
        return encoder.eval()

    return build


@pytest.mark.parametrize("null", ["learned", "empty"])
@torch.no_grad()
def test_no_padding_matters_to_bert(null, minilm):
    encoder, captions = minilm(text_null=null), ["a red star", LONG, ""]
    together, training = encode(encoder, captions), encode(encoder.train(), captions)
    encoder.eval()
    for row, count in enumerate((5, 175 + 20, 2)):
        alone = encode(encoder, captions[row : row + 1])
        assert len(present(alone, 0)) == count
        for other in (together, training):
            assert torch.allclose(present(other, row), present(alone, 0), atol=1e-5)
    drop = encode(encoder, captions, torch.tensor([True, False, False]))
    null = encode(encoder, [""]).values[0, -8:-6] if null == "empty" else encoder.null[0]
    assert torch.allclose(present(drop, 0), null, atol=1e-6)


@torch.no_grad()
def test_ids_of_the_loader_are_those_of_bert(minilm):
    encoder, captions = minilm(), ["a red star", "unaffable stars"]
    ids, mask = tokenize(captions, encoder.length, encoder.tokenizer)
    assert ids[0, 0].tolist() == [101, *(VOCABULARY[word] for word in ("a", "red", "star")), 102, 0, 0, 0]
    assert mask.sum(-1).flatten().tolist() == [5, 7]
    from_ids = encoder({"caption": ids, "caption_mask": mask}, torch.zeros(2, 3, 4, 4))
    assert torch.equal(from_ids.values, encode(encoder, captions).values)
    assert not any(p.requires_grad for p in encoder.encoder.parameters()) and encoder.null.requires_grad


# Networks


def unet(encoder):
    config = UNetConfig(
        channels=8, channel_mults=(1,), res_blocks=1, attn_factors=(1,), heads=1, attn_block_type="transformer"
    )
    network = UNet(config, {"text": encoder})
    return network, lambda condition, count: network(torch.ones(count, 3, 4, 4), torch.zeros(count), condition)


def transformer(encoder, kind=Transformer, **options):
    network = kind(codes=5, grid=(4, 4), width=16, heads=2, layers=2, encoders={"text": encoder}, **options)
    return network, lambda condition, count: network(torch.zeros(count, 4, 4, dtype=torch.long), condition)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("kind", [unet, transformer])
@torch.no_grad()
def test_networks_read_captions_and_no_padding(kind, pooled):
    """At birth captions change nothing; later the longest caption of a batch does not change the others' outputs."""
    network, run = kind(build({unet: 32, transformer: 16}[kind], text_pooled=pooled))
    network.eval()
    captions = ["a red star", LONG]
    assert torch.allclose(run({"text": captions}, 2), run(None, 2), atol=1e-5)
    for p in network.parameters():  # some start at zero
        p.data += 0.1 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    both, null = run({"text": captions}, 2), run(None, 2)
    assert (both - null).flatten(1).abs().amax(1).min() > 1e-3
    assert torch.allclose(run({"text": captions[:1]}, 1)[0], both[0], atol=1e-5)


@pytest.mark.parametrize("kind", [unet, transformer])
def test_pooled_vectors_alone_carry_the_caption(kind):
    """With equal tokens, the vectors of two captions lead to other outputs."""
    network, run = kind(build({unet: 32, transformer: 16}[kind], text_pooled=True))
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    streams = network.encoders({"text": ["a red star", "a bus on the moon"]}, torch.zeros(2, 3, 4, 4)).streams
    tokens = Tokens(*(None if part is None else part[:1].expand_as(part) for part in streams["text"]))
    one, other = run(Condition(streams | {"text": tokens}), 2)
    assert (one - other).abs().max() > 1e-3


LEARNERS = {
    "unet": unet,
    "norms": transformer,
    "embeddings": partial(transformer, vectors_into="embeddings"),
    "causal": partial(transformer, kind=CausalTransformer),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_pooled_vectors_learn(name):
    """Of layers in a row one alone may start at zero: two would never have a gradient."""
    network, run = LEARNERS[name](build(32 if name == "unet" else 16, text_pooled=True))
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(4):  # in the first steps only the last layers have a gradient
        optimizer.zero_grad()
        (run({"text": ["a red star", LONG]}, 2) - 1).square().sum().backward()
        optimizer.step()
    unchanged = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == ["encoders.text.null"]  # no caption is dropped


@pytest.mark.parametrize("kind", [unet, transformer])
def test_networks_keep_the_embeddings_of_words_that_differ(kind):
    """As large as what the norms make of them, so that steps of an optimizer do not outweigh what tells words apart."""
    encoder = kind(build(32))[0].encoders["text"].encoder
    assert 0.9 < encoder.token.weight.std() < 1.1 and 0.4 < encoder.position.std() < 0.6


@torch.no_grad()
def test_known_keys_are_those_of_the_captions():
    network, run = transformer(build())
    network.eval()
    for p in network.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.manual_seed(p.numel()))
    condition = network.encode({"text": ["a red star", LONG]}, torch.zeros(2, 4, 4, dtype=torch.long))
    assert torch.allclose(run(network.with_keys(condition), 2), run(condition, 2), atol=1e-5)


def test_tokens_stand_beside_those_of_other_conditions():
    conditioner = Conditioner({"text": build(), "more": build()})
    condition = conditioner({"text": ["a bus"]}, torch.zeros(1, 3, 4, 4))
    assert condition.spans() == {"text": slice(0, 9), "more": slice(9, 10)}
