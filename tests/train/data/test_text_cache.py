"""The cache of embeddings of captions by a frozen encoder."""

import os
import pickle
import sqlite3
from contextlib import closing, contextmanager

import pytest
import torch

from helpers.tiny_minilm import tiny_bert, use_vocabulary
from models.conditions.text import CaptionEncoder
from models.text_encoder import TextEncoder, TextEncoderConfig
from train.data import text_cache
from train.data.text_cache import TextCache

LONG = " ".join(["a red star and a blue ring"] * 25)  # 150 words
CAPTIONS = ["a red star", LONG, "", "A  red STAR"]


def build(seed=0, **options):
    torch.manual_seed(seed)
    encoder = TextEncoder(TextEncoderConfig(width=8, layers=1, heads=2, **options))
    encoder.token.weight.data.normal_()
    return encoder.eval().requires_grad_(False)


@pytest.fixture
def encoded(monkeypatch):
    """The captions that are encoded, by their first chunks."""
    chunks, encode = [], TextCache.encode
    monkeypatch.setattr(TextCache, "encode", lambda cache, each: chunks.append(each[0]) or encode(cache, each))
    return chunks


def test_embeddings_are_those_of_the_encoder(tmp_path):
    encoder = build()
    batch = TextCache(encoder, tmp_path)[CAPTIONS]
    assert batch["caption"].shape == (4, 184, 8) and batch["caption_mask"].sum(1).tolist() == [5, 181, 2, 5]
    captions, x = CaptionEncoder(encoder, pretrained=True).eval(), torch.zeros(4, 3, 4, 4)
    from_texts, from_cache = captions(CAPTIONS, x), captions(batch, x)
    for row in range(4):
        one, other = (tokens.values[row][tokens.mask[row]] for tokens in (from_texts, from_cache))
        assert torch.allclose(one, other, atol=1e-5)
    assert not batch["caption"][~batch["caption_mask"]].any()


def test_embeddings_of_bert_are_those_of_the_encoder(tmp_path, monkeypatch):
    use_vocabulary(monkeypatch)
    encoder = tiny_bert()
    batch = TextCache(encoder, tmp_path)[CAPTIONS]
    lengths = [5, 195, 2, 5]  # of 20 tokens a chunk
    assert batch["caption"].shape == (4, 200, 8) and batch["caption_mask"].sum(1).tolist() == lengths
    captions = CaptionEncoder(encoder, pretrained=True).eval()
    tokens = captions(CAPTIONS, torch.zeros(4, 3, 4, 4))
    for row, length in enumerate(lengths):
        assert torch.allclose(batch["caption"][row, :length], tokens.values[row][tokens.mask[row]], atol=1e-5)


def test_chunks_are_encoded_with_the_padding_that_is_read(tmp_path, encoded):
    encoder = build()
    masked, batch = (TextCache(encoder, tmp_path, pad)[CAPTIONS] for pad in (None, 0))
    assert len(encoded) == 6 and batch["caption"].shape == (4, 231, 8)
    assert batch["caption_mask"].sum(1).tolist() == [77, 231, 77, 77]
    captions = CaptionEncoder(encoder, "empty", pretrained=True, padding="zero").eval()
    from_texts, from_cache = (captions(raw, torch.zeros(4, 3, 4, 4)) for raw in (CAPTIONS, batch))
    assert torch.allclose(from_texts.values, from_cache.values, atol=1e-5)
    assert torch.equal(from_texts.mask, from_cache.mask)
    assert TextCache(encoder, tmp_path, 0)[["a bus"]]["caption"].shape == (1, 77, 8)
    assert torch.allclose(masked["caption"][0, :5], batch["caption"][0, :5], atol=1e-6)


def test_a_caption_is_encoded_once_whatever_its_batch(tmp_path, encoded):
    first = TextCache(build(), tmp_path)[CAPTIONS]
    assert len(encoded) == 3  # two are the same
    again = TextCache(build(), tmp_path)[CAPTIONS[::-1]]
    assert len(encoded) == 3
    assert torch.equal(again["caption"].flip(0), first["caption"])
    alone = TextCache(build(), tmp_path / "other")[[LONG]]
    assert torch.equal(alone["caption"][0], first["caption"][1])
    assert not torch.equal(first["caption"][0], first["caption"][1])


def test_the_cache_is_keyed_by_the_encoder(tmp_path, encoded):
    other_layer = build(clip_skip=1, final_norm=False)
    caches = [TextCache(encoder, tmp_path) for encoder in (build(), build(1), other_layer)]
    batches = [cache[["a bus"]]["caption"] for cache in caches]
    assert len({cache.path for cache in caches}) == 3 == len(encoded)
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_what_a_killed_job_had_encoded_stays(tmp_path, encoded, monkeypatch):
    """A job that dies while it writes leaves the batches before, and no part of that one."""
    cache = TextCache(build(), tmp_path)
    cache[["a bus", "a star"]]
    if (child := os.fork()) == 0:
        monkeypatch.setattr(text_cache, "closing", lambda connection: DyingConnection(connection))
        cache[["a ring", "a disc"]]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9 << 8
    encoded.clear()
    cache[["a bus", "a star", "a ring", "a disc"]]
    assert len(encoded) == 2


class DyingConnection:
    """A connection whose process dies after the first row of a transaction."""

    def __init__(self, connection):
        self.connection = connection

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def execute(self, *args):
        return self.connection.execute(*args)

    def executemany(self, query, rows):
        self.connection.execute(query, next(iter(rows)))
        os._exit(9)


def test_the_file_is_mapped_as_far_as_sqlite_can(tmp_path, monkeypatch):
    mapped = []

    @contextmanager
    def recording(connection):
        with closing(connection):
            yield connection
            mapped.extend(connection.execute("PRAGMA mmap_size").fetchone())

    monkeypatch.setattr(text_cache, "closing", recording)
    TextCache(build(), tmp_path)[["a bus"]]
    assert mapped == [text_cache.MAPPED]


def test_caches_travel_to_workers(tmp_path):
    cache = TextCache(build(), tmp_path)
    batch = cache[["a bus"]]
    assert torch.equal(pickle.loads(pickle.dumps(cache))[["a bus"]]["caption"], batch["caption"])


def test_a_damaged_file_is_named(tmp_path):
    cache = TextCache(build(), tmp_path)
    cache.path.write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match=f"{cache.path} cannot be used .*: free disk space, or delete the file"):
        cache[["a bus"]]
    cache.path.unlink()
    cache[["a bus"]]
    with closing(sqlite3.connect(cache.path)) as connection:
        assert connection.execute("SELECT count(*) FROM captions").fetchone() == (1,)


def test_words_are_without_start_and_end_and_may_be_none(tmp_path, encoded):
    """Also where captions are read with their padding; both are encoded once."""
    encoder = build()
    cache = TextCache(encoder, tmp_path)
    whole, (values, mask) = cache[CAPTIONS], cache.words(CAPTIONS)
    assert len(encoded) == 3 and values.shape == (4, 175, 8) and mask.sum(1).tolist() == [3, 175, 0, 3]
    for row in (0, 3):
        assert torch.equal(values[row][mask[row]], whole["caption"][row, 1:4])
    inside = [*range(1, 76), *range(78, 153), *range(155, 180)]
    assert torch.equal(values[1][mask[1]], whole["caption"][1, inside]) and not values[~mask].any()
    read = TextCache(encoder, tmp_path, pad_id=49407)
    assert torch.equal(read.words(CAPTIONS)[0], values) and read.words([""])[0].shape == (1, 1, 8)
