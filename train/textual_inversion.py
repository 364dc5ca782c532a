"""Textual inversion (Gal et al. 2022): new words in the vocabulary of a trained text encoder, and their files.

A new word is a row of the encoder's embedding, or several, that learn, alone or beside other parts of a network; all
other rows are as before. A run keeps its words in config.yaml, and their embeddings in learned_embeds.safetensors too,
which has a tensor (D,) for each word, or (N, D), as diffusers writes them. Such files are read, and those of
AUTOMATIC1111's web UI.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.conditions.text import find_captions
from models.text_encoder import ExtendedEmbedding, TextEncoder
from train.distributed import DistContext, full_tensor
from train.files import atomic_write, sha256, write_errors_as_oserror
from vq.weights import UNREADABLE, refuse_nan

EMBEDDINGS = "learned_embeds.safetensors"  # the file of a run
WEB_UI = ("emb_params", "string_to_param")  # the keys of its files, .safetensors and .pt
REMEDY = "pass a file of textual inversion"


class NewWord(NamedTuple):
    """A new word of --text_new_tokens."""

    like: str = ""  # the word that it starts from; "" for none
    tokens: int = 1


def parse_words(words: Sequence[str]) -> dict[str, NewWord]:
    """Returns the words of --text_new_tokens, WORD or WORD=LIKE, and WORD=LIKE*N or WORD=*N for one of N tokens;
    ValueError for others, and for a word twice."""
    parsed: dict[str, NewWord] = {}
    for each in words:
        word, equals, start = each.partition("=")
        like, star, count = start.rpartition("*")
        new = NewWord(like, int(count)) if star and count.isdecimal() else NewWord(start)
        if not word or (equals and not start) or word in parsed or new.tokens == 0:
            wanted = "wanted each word once, optionally with a word to start from and a number of tokens"
            remedy = "pass '<cat-toy>', '<cat-toy>=cat' or '<cat-toy>=cat*4'"
            raise ValueError(f"got --text_new_tokens {each}, {wanted}: {remedy}")
        parsed[word] = new
    return parsed


def add_new_words(network: nn.Module, words: Sequence[str]) -> None:
    """Adds words of --text_new_tokens to the text encoder of a network, to be learned.

    Their tokens start from the embedding of another word, if one is given, else from random directions, drawn from the
    global generator, with the mean norm of the embeddings that there are. ValueError for a network without a text
    encoder that takes words, and for words that are there already. Without words nothing changes.
    """
    if not words:
        return
    encoder = find_text_encoder(network)
    starts = {}
    for word, new in parse_words(words).items():
        starts[word] = torch.stack([encoder.new_embedding(new.like) for _ in range(new.tokens)])
    encoder.add_words(starts)


def find_text_encoder(network: nn.Module) -> TextEncoder:
    """Returns the text encoder of a network; ValueError without one that takes new words."""
    captions = find_captions(network)
    if captions is None or not isinstance(captions.encoder, TextEncoder):
        got = "a network that reads no captions" if captions is None else f"a {type(captions.encoder).__name__}"
        raise ValueError(
            f"got new words for {got}, wanted a CLIP-like text encoder: choose another run, or add no words"
        )
    return captions.encoder


def word_embeddings(network: nn.Module) -> dict[str, Tensor]:
    """Returns the embeddings of the new words of a network, on the CPU; {} without any. They are (D,), or (N, D) for a
    word of N tokens.

    Sharded ones are gathered: all ranks must call it.
    """
    encoder = find_text_encoder(network)
    if not isinstance(encoder.token, ExtendedEmbedding):
        return {}
    rows = full_tensor(encoder.token.new_tokens.detach()).cpu()
    first = encoder.config.vocab_size
    new = {word: own for word, own in encoder.tokenizer.added_ids.items() if own[0] >= first}
    return {word: rows[[each - first for each in own]].squeeze(0) for word, own in new.items()}


def write_embeddings(run: Path, network: nn.Module, world: DistContext) -> None:
    """Writes the new words of a network as <run>/learned_embeds.safetensors. All ranks must call it."""
    tensors, path = word_embeddings(network), run / EMBEDDINGS
    if world.is_main:
        with atomic_write(path) as temporary, write_errors_as_oserror(path):
            save_file(tensors, temporary)


def read_embeddings(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads a file of textual inversion: the embedding float32 of each word, (D,), or (N, D) for a word of N tokens. No
    code in it is run.

    A file of the web UI holds one word, which is named like the file. FileNotFoundError without the file; ValueError
    for one that is damaged, or of other content.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {REMEDY}")
    try:
        is_safe = path.suffix == ".safetensors"
        content = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors ({error}): {REMEDY}") from error
    tensors = words_of(content, path.stem) if isinstance(content, dict) else {}
    wrong = [word for word, value in tensors.items() if not isinstance(value, Tensor) or value.ndim not in (1, 2)]
    if wrong or not tensors:
        raise ValueError(f"{path} has no embedding (D,) or (N, D) of {wrong[0] if wrong else 'a word'}: {REMEDY}")
    refuse_nan(tensors, path)
    return {word: value.detach().squeeze(0).float() for word, value in tensors.items()}


def add_files_of_words(network: nn.Module, files: Sequence[str | os.PathLike], base: str) -> str:
    """Adds the words in files of textual inversion to the text encoder of a network with SHA-256 `base`; returns a
    SHA-256 that identifies the new weights.

    FileNotFoundError without a file; ValueError for files of another kind or text encoder, for words that are there
    already, and for a network without a text encoder that takes words.
    """
    encoder, identity = find_text_encoder(network), [base]
    for file in files:
        encoder.add_words(read_embeddings(file))
        identity.append(sha256(Path(file).expanduser()))
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def words_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns what a file holds by word; `name` is the word of a file of the web UI."""
    for key in WEB_UI:
        if key in content:
            value = content[key]
            return {name: next(iter(value.values()), None) if isinstance(value, dict) else value}
    return dict(content)
