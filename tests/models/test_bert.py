"""BERT's encoder, against PyTorch's own layers, and MiniLM against published figures."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from torch import nn

from helpers.tiny_minilm import CONFIG, needs_minilm, random_weights, tiny_bert
from models.bert import MINILM_L6, Bert, bert_tensors
from models.wordpiece import WordPiece, read_packaged

IDS = torch.tensor([[101, 7, 8, 9, 9, 102, 0, 0], [101, 7, 102, 0, 0, 0, 0, 0], [101, 8, 7, 9, 5, 4, 3, 102]])


def plain_bert(ids, weights, config):
    """BERT of PyTorch's own layers."""
    embeddings = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = embeddings["word"][ids] + embeddings["token_type"][0] + embeddings["position"][: ids.shape[1]]
    size, eps = config.width, 1e-12
    norm = [weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
    x = nn.functional.layer_norm(x, (size,), *norm, eps)
    for i in range(config.layers):
        layer = nn.TransformerEncoderLayer(size, config.heads, 4 * size, 0.0, "gelu", eps, batch_first=True)
        state = {}
        for part in ("weight", "bias"):
            own = {
                name.removeprefix(f"encoder.layer.{i}.").removesuffix(f".{part}"): each
                for name, each in weights.items()
                if name.startswith(f"encoder.layer.{i}.") and name.endswith(part)
            }
            state[f"self_attn.in_proj_{part}"] = torch.cat(
                [own["attention.self.query"], own["attention.self.key"], own["attention.self.value"]]
            )
            state[f"self_attn.out_proj.{part}"] = own["attention.output.dense"]
            state[f"linear1.{part}"], state[f"linear2.{part}"] = own["intermediate.dense"], own["output.dense"]
            state[f"norm1.{part}"], state[f"norm2.{part}"] = own["attention.output.LayerNorm"], own["output.LayerNorm"]
        layer.load_state_dict(state)
        x = layer(x, src_key_padding_mask=ids == 0)  # in training mode: no fused path
    return x


@torch.no_grad()
def test_tokens_are_those_of_pytorch_s_own_layers():
    got, wanted = tiny_bert()(IDS).tokens, plain_bert(IDS, random_weights(), CONFIG)
    assert (got - wanted)[IDS != 0].abs().max() < 2e-6
    assert got.std() > 0.1


@torch.no_grad()
def test_padding_does_not_matter():
    encoder = tiny_bert()
    together = encoder(IDS)
    for row, length in enumerate((6, 3, 8)):
        alone = encoder(IDS[row : row + 1, :length])
        assert torch.allclose(alone.tokens[0], together.tokens[row, :length], atol=1e-6)
        assert torch.allclose(alone.pooled[0], together.pooled[row], atol=1e-6)
    assert encoder(torch.zeros(1, 4, dtype=torch.long)).tokens.isfinite().all()  # a chunk that is all padding


@torch.no_grad()
def test_tokens_see_both_sides_but_no_masked_ones():
    encoder, ids = tiny_bert(), IDS[[0, 0], :6].clone()
    ids[1, 3] = 55
    mask, others = torch.ones(2, 6, dtype=torch.bool), torch.arange(6) != 3
    mask[:, 3] = False
    plain, masked = encoder(ids), encoder(ids, mask)
    assert (plain.tokens[0] - plain.tokens[1]).abs().amax(1).min() > 1e-3
    assert torch.equal(masked.tokens[0, others], masked.tokens[1, others])
    assert torch.equal(masked.pooled[0], masked.pooled[1])


@torch.no_grad()
def test_the_pooled_vector_is_the_normalised_mean():
    features = tiny_bert()(IDS[:1])
    mean = features.tokens[0, :6].mean(0)
    assert torch.allclose(features.pooled[0], mean / mean.norm(), atol=1e-6)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match=r"got ids \(1, 21\), wanted .* at most 20 tokens: split a longer text"):
        tiny_bert()(torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="got layers 0, wanted at least 1"):
        replace(CONFIG, layers=0)


@needs_minilm
@torch.no_grad()
def test_sentences_have_their_published_similarities():
    """Those of sentence-transformers' page of all-MiniLM-L6-v2, and of near and far pairs."""
    encoder = Bert(MINILM_L6)
    encoder.load_state_dict(bert_tensors(load(read_packaged("model.safetensors")), MINILM_L6))
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    texts += ["a photo of a dress", "a picture of a long gown"]
    texts += ["a satellite image after a wildfire", "burnt houses seen from above"]
    ids = [[101, *WordPiece().encode(text), 102] for text in texts]
    ids = torch.tensor([each + [0] * (16 - len(each)) for each in ids])
    pooled = encoder.eval()(ids).pooled
    similarities = pooled @ pooled.T
    wanted = torch.tensor([[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]])
    assert torch.allclose(similarities[:3, :3], wanted, atol=1e-4)
    assert similarities[3, 4].item() == pytest.approx(0.73, abs=0.01)
    assert similarities[5, 6].item() == pytest.approx(0.43, abs=0.01)
    assert similarities[3:5, 5:].abs().max() < 0.2
