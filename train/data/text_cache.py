"""The cache of embeddings: each caption is encoded once by a frozen text encoder, on the CPU, and kept in one file.

The file is an SQLite database, named after the encoder's weights; a caption is known by its ids. Its first 2 GiB are
mapped into memory, and the rest is read. Any number of processes may read and fill it. What a killed job had encoded
stays.
"""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.bert import Bert
from models.conditions.text import MULTIPLE, caption_chunks
from models.text_encoder import TextEncoder
from train.loop import Batch

MAPPED = (1 << 31) - (1 << 16)  # bytes of the file that are mapped, the most that SQLite allows by default
WAIT = 600.0  # seconds for other processes that write
Chunks = list[list[int]]  # the ids of a caption


class TextCache:
    """Embeddings of captions by a frozen encoder on the CPU, computed when they are first read.

    A caption is encoded alone, so that its embedding does not depend on its batch. With a `pad_id` its chunks are
    filled with it and encoded as a whole.
    """

    def __init__(self, encoder: TextEncoder | Bert, folder: Path, pad_id: int | None = None):
        self.encoder, self.pad_id = encoder, pad_id
        self.path = folder / f"{encoder_key(encoder)}.sqlite"

    def __getitem__(self, captions: Sequence[str]) -> Batch:
        """Returns {"caption": (B, M, D) float32, padded with zeros, "caption_mask": (B, M)}; M is rounded up,
        unless padding of chunks is read.

        ValueError for a file that cannot be read or written.
        """
        length, tokenizer = self.encoder.config.length, self.encoder.tokenizer
        rows = self.look_up([caption_chunks(caption, length, tokenizer, self.pad_id) for caption in captions])
        values, mask = pad_tokens(rows, self.width, 1 if self.pad_id is not None else MULTIPLE)
        return {"caption": values, "caption_mask": mask}

    def words(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns the tokens (B, M, D) of texts without the start, end and padding of their chunks, which may be none,
        padded with zeros to the longest, and which are no padding, (B, M). ValueError as above."""
        length, tokenizer = self.encoder.config.length, self.encoder.tokenizer
        chunks = [caption_chunks(text, length, tokenizer) for text in texts]
        rows = []
        for own, tokens in zip(chunks, self.look_up(chunks), strict=True):
            rows.append(torch.cat([part[1:-1] for part in tokens.split([*map(len, own)])]))
        return pad_tokens(rows, self.width, 1)

    def look_up(self, captions: Sequence[Chunks]) -> list[Tensor]:
        """Returns `read`; ValueError for a file that cannot be read or written."""
        try:
            return self.read(captions)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} cannot be used ({error}): free disk space, or delete the file") from error

    def read(self, captions: Sequence[Chunks]) -> list[Tensor]:
        """Returns the tokens (M, D) of captions; encodes and keeps those that the file lacks."""
        keys = [content_key(chunks) for chunks in captions]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as connection:
            connection.execute(f"PRAGMA mmap_size = {MAPPED}")
            known = find_all(connection, keys)
            missing = {key: chunks for key, chunks in zip(keys, captions, strict=True) if key not in known}
            new = {key: self.encode(chunks).numpy().tobytes() for key, chunks in missing.items()}
            if new:
                with connection:  # a transaction: of a killed job the file has all of it or nothing
                    connection.executemany("INSERT OR IGNORE INTO captions VALUES (?, ?)", new.items())
        blobs = known | new
        return [torch.from_numpy(np.frombuffer(blobs[key], np.float32).copy()).view(-1, self.width) for key in keys]

    @property
    def width(self) -> int:
        return self.encoder.config.width

    @torch.no_grad()
    def encode(self, chunks: Chunks) -> Tensor:
        """Returns the tokens (M, D) of a caption."""
        return torch.cat([self.encoder(torch.tensor([chunk])).tokens[0] for chunk in chunks])


def pad_tokens(rows: Sequence[Tensor], width: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Pads tokens (M, D) with zeros to the longest, whose length is rounded up to a multiple, at least one: (B, M, D),
    and where they are no padding, (B, M)."""
    lengths = torch.tensor([len(tokens) for tokens in rows])
    longest = max(1, int(lengths.max()))
    values = torch.zeros(len(rows), longest + -longest % multiple, width)
    for row, tokens in zip(values, rows, strict=True):
        row[: len(tokens)] = tokens
    return values, torch.arange(values.shape[1]) < lengths[:, None]


def find_all(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, bytes]:
    """Returns the embeddings that a file has of these captions; makes its table if there is none."""
    connection.execute("CREATE TABLE IF NOT EXISTS captions (caption BLOB PRIMARY KEY, tokens BLOB)")
    query = "SELECT caption, tokens FROM captions WHERE caption = ?"
    return dict(row for key in keys for row in connection.execute(query, (key,)))


def encoder_key(encoder: TextEncoder | Bert) -> str:
    """Returns the hexadecimal key of all that embeddings depend on besides the captions."""
    options = encoder.config.to_dict() if isinstance(encoder, TextEncoder) else asdict(encoder.config)
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def content_key(chunks: Chunks) -> bytes:
    """Returns the key of a caption: of its ids and where its chunks end."""
    return hashlib.sha256(json.dumps(chunks).encode()).digest()
