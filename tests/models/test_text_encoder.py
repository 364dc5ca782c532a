"""Text encoders, against those of CLIP and OpenCLIP with the same weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.text_weights import SIZES, TEXTS, clip_tensors, openclip_tensors, tiny_clip, tiny_openclip
from models.text_encoder import CHUNK, CLIP_L, OPENCLIP_H, QuickGELU, TextEncoder, TextEncoderConfig

ORACLE = {name: torch.from_numpy(array) for name, array in np.load(TEXTS / "encoders.npz").items()}
CLIP_IDS, OPENCLIP_IDS = ORACLE["clip_tiny_ids"].long(), ORACLE["openclip_ids"].long()
END = SIZES["end_id"]


@pytest.fixture
def is_close(agrees):
    return lambda got, name: agrees(got, ORACLE[name], f"text encoders: {name}")


@torch.no_grad()
def test_clip_embeddings_and_first_layers(is_close):
    """Recorded are every fourth of 32 numbers of each token."""
    assert is_close(tiny_clip().embed(CLIP_IDS)[..., ::4], "clip_hidden_0_embeddings")
    for skip, name in ((3, "clip_hidden_1"), (2, "clip_penultimate_raw")):
        assert is_close(tiny_clip(clip_skip=skip, final_norm=False)(CLIP_IDS).tokens[..., ::4], name)


@torch.no_grad()
def test_clip_last_layer_and_pooled_vector(is_close):
    features = tiny_clip()(CLIP_IDS)
    assert is_close(features.tokens, "clip_last_with_final_norm")
    assert is_close(features.pooled, "clip_pooled")


@torch.no_grad()
def test_clip_skip_and_no_final_norm(is_close):
    assert is_close(tiny_clip(clip_skip=2)(CLIP_IDS).tokens, "clip_penultimate_with_final_norm")
    raw = tiny_clip(final_norm=False)(CLIP_IDS)
    assert is_close(raw.tokens, "clip_last_raw")
    assert is_close(raw.pooled, "clip_pooled")  # always with the norm
    assert is_close(tiny_clip(clip_skip=2)(CLIP_IDS).pooled, "clip_pooled")  # always of the last layer


@torch.no_grad()
def test_openclip_layers_and_projected_vector(is_close):
    features = tiny_openclip(clip_skip=2)(OPENCLIP_IDS)
    assert is_close(features.tokens, "openclip_penultimate")
    assert is_close(features.pooled, "openclip_pooled")
    assert is_close(tiny_openclip()(OPENCLIP_IDS).tokens, "openclip_last")


@torch.no_grad()
def test_the_other_activation_is_another_function():
    gelu = tiny_clip(activation="gelu")(CLIP_IDS).tokens
    assert (gelu - ORACLE["clip_last_with_final_norm"]).abs().max() > 1e-3


@torch.no_grad()
def test_quick_gelu_is_x_times_sigmoid_of_1_702_x():
    layer = QuickGELU(1, ratio=1).requires_grad_(False)
    for linear in (layer.expand, layer.contract):
        linear.weight.fill_(1), linear.bias.fill_(0)
    x = torch.linspace(-4, 4, 9).unsqueeze(1)
    assert torch.allclose(layer(x), x / (1 + torch.exp(-1.702 * x)), atol=1e-6)
    assert (layer(x) - x / (1 + torch.exp(-1.7 * x))).abs().max() > 1e-4


@torch.no_grad()
def test_penultimate_is_the_last_of_one_layer_less():
    """As Stable Diffusion 2 is stored: in folders with 23 layers, in single files with 24."""
    weights = openclip_tensors(load_file(TEXTS / "openclip.safetensors"), 2)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("projection")}
    shorter = TextEncoder(TextEncoderConfig(**SIZES | {"layers": 2}))
    shorter.load_state_dict(weights)
    assert torch.equal(shorter(OPENCLIP_IDS).tokens, tiny_openclip(clip_skip=2)(OPENCLIP_IDS).tokens)


@torch.no_grad()
def test_tokens_do_not_depend_on_what_follows():
    encoder, ids = tiny_clip(), CLIP_IDS[:1].repeat(2, 1)
    ids[1, 7:] = 5
    first, second = encoder(ids).tokens
    assert torch.equal(first[:7], second[:7]) and not torch.equal(first[7:], second[7:])


@torch.no_grad()
def test_pooled_vector_is_that_of_the_first_end():
    """Padding with end tokens does not count, nor tokens of larger ids, as of learned words."""
    encoder = tiny_clip(end_id=300)
    ids = torch.tensor([[382, 5, 300, 383, 300], [382, 300, 5, 5, 5], [382, 5, 5, 5, 5]])
    features = encoder(ids)
    assert torch.equal(features.pooled, features.tokens[torch.arange(3), torch.tensor([2, 1, 4])])


@torch.no_grad()
def test_masked_tokens_are_seen_by_no_other():
    encoder, ids = tiny_clip(), CLIP_IDS[:1, :8].repeat(2, 1)
    ids[1, 3] = 7
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 3] = False
    others = torch.arange(8) != 3
    plain, masked = encoder(ids).tokens[:, others], encoder(ids, mask).tokens[:, others]
    assert not torch.allclose(plain[0, 3:], plain[1, 3:])
    assert torch.equal(masked[0], masked[1])
    assert torch.allclose(encoder(ids, torch.ones_like(mask)).tokens, encoder(ids).tokens, atol=1e-6)


@torch.no_grad()
def test_chunks_are_encoded_each_for_itself():
    encoder, chunks = tiny_clip(), CLIP_IDS.view(2, 2, CHUNK)
    together = encoder.encode_chunks(chunks)
    assert together.shape == (2, 2 * CHUNK, 32)
    assert torch.allclose(together.view(4, CHUNK, 32), encoder(CLIP_IDS).tokens, atol=1e-6)


def test_longer_sequences_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"got ids \(1, 78\), wanted .* at most 77 tokens: split a longer text"):
        tiny_clip()(torch.zeros(1, 78, dtype=torch.long))


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="got clip_skip 3 of 2 layers"):
        TextEncoderConfig(layers=2, clip_skip=3)
    with pytest.raises(ValueError, match="got 2 added words after the end, 49407, .* pass vocab_size 49410"):
        TextEncoderConfig(vocab_size=49_409, added_words=("<l{0..1}>",))
    with pytest.raises(ValueError, match="got clip_skip 0"):
        TextEncoderConfig(clip_skip=0)
    with pytest.raises(ValueError, match="got activation relu, wanted one of gelu, quick_gelu"):
        TextEncoderConfig(activation="relu")
    with pytest.raises(ValueError, match="does not split over 5 heads"):
        TextEncoder(TextEncoderConfig(width=32, heads=5, vocab_size=8))


def test_public_sizes():
    """As those of Stable Diffusion 1 and 2, with the last layer and the projection that its folders leave out."""
    with torch.device("meta"):
        counts = [sum(p.numel() for p in TextEncoder(config).parameters()) for config in (CLIP_L, OPENCLIP_H)]
    assert counts == [123_060_480, 354_032_640]


def test_all_weights_learn():
    encoder = TextEncoder(replace(TextEncoderConfig(**SIZES), projection=4))
    features = encoder(CLIP_IDS)
    (features.tokens.square().mean() + features.pooled.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())


def test_a_fresh_tensor_map_is_complete():
    """Every tensor of CLIP's file has a place in ours."""
    weights = load_file(TEXTS / "clip.safetensors")
    ours = clip_tensors(weights, 3)
    assert sum(t.numel() for t in ours.values()) == sum(t.numel() for t in weights.values())


@torch.no_grad()
def test_new_words_change_no_other_text():
    encoder, plain = tiny_clip(), tiny_clip()
    rows = torch.arange(64.0).view(2, 32) / 10
    encoder.add_words({"<a>": rows[0], "<b>": rows[1]})
    assert torch.equal(encoder(CLIP_IDS).tokens, plain(CLIP_IDS).tokens)
    ids = torch.tensor([[382, 384, 5, 385, 383]])
    plain.token.weight[6], plain.token.weight[7] = rows
    assert torch.equal(encoder(ids).tokens, plain(torch.tensor([[382, 6, 5, 7, 383]])).tokens)
    assert encoder.tokenizer.encode("<a><b>") == [384, 385]
    encoder.add_words({"<c>": rows + 1, "<d>": rows[0] + 2})
    assert encoder.tokenizer.encode("<B> <c> <d>") == [385, 386, 387, 388]
    assert torch.equal(encoder.token.new_tokens, torch.cat([rows, rows + 1, rows[:1] + 2]))
    with pytest.raises(IndexError):
        encoder(torch.tensor([[382, 389, 383]]))


def test_only_new_words_learn_in_a_frozen_encoder():
    encoder = tiny_clip().requires_grad_(False)
    encoder.add_words({"<a>": torch.ones(32), "<b>": torch.ones(32)})
    encoder(torch.tensor([[382, 5, 384, 0, 383]])).tokens.square().sum().backward()
    grads = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert grads.keys() == {"token.new_tokens"}
    assert grads["token.new_tokens"][0].any() and not grads["token.new_tokens"][1].any()


def test_new_words_start_at_the_mean_norm_or_at_a_word():
    encoder = TextEncoder(TextEncoderConfig(width=8, layers=1, heads=2))
    torch.manual_seed(0)
    drawn = [encoder.new_embedding() for _ in range(2)]
    norm = encoder.token.weight.norm(dim=1).mean()
    assert all(torch.allclose(each.norm(), norm) for each in drawn) and not torch.allclose(*drawn)
    (dog,) = encoder.tokenizer.encode("dog")
    assert torch.equal(encoder.new_embedding("Dog"), encoder.token.weight[dog])
    with pytest.raises(ValueError, match="got 'a dog' to start from, which is 2 tokens"):
        encoder.new_embedding("a dog")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"Dog": 8}, "got the new word 'Dog', which is in the vocabulary"),
        ({"<old>": 8}, "got the new word '<old>', which is in the vocabulary"),
        ({"<long>": 8}, "got the new word '<long>', which is in the vocabulary"),
        ({"two words": 8}, "'two words', which no text has"),
        ({"": 8}, "'', which no text has"),
        ({"<a>": 8, "<A>": 8}, "equal apart from case"),
        ({"<a>": 4}, r"got an embedding \(4,\) of <a>, wanted \(8,\) or \(N, 8\): it is of another text encoder"),
    ],
)
def test_other_new_words_are_refused(words, message):
    encoder = TextEncoder(TextEncoderConfig(width=8, layers=1, heads=2))
    encoder.add_words({"<old>": torch.zeros(8), "<long>": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match=message):
        encoder.add_words({word: torch.zeros(width) for word, width in words.items()})
    assert [*encoder.tokenizer.added_ids] == ["<old>", "<long>"] and len(encoder.token.new_tokens) == 3
