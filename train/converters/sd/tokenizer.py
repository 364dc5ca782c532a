"""Words that the tokenizer of a folder adds to CLIP's vocabulary, such as the places of GeoDiffusion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.tokenizer import contract_words
from train.converters.sd.files import PARTS, read_json

TOKENIZER = "tokenizer"  # folder of a pipeline


def read_added_words(path: Path, end_id: int) -> tuple[str, ...]:
    """Returns the words with ids after the end, in the order of their ids, as `contract_words` does.

    `path` is a pipeline, its text encoder, or a folder with both; files add no words. ValueError for ids that do not
    follow each other.
    """
    folders = (path / TOKENIZER, path.parent / TOKENIZER if path.name == PARTS["text"][1] else path, path)
    folder = next(folder for folder in folders if folder.is_dir() or folder == path)
    ids = {word: number for file in FILES for word, number in read_ids(folder, file).items() if number > end_id}
    words = sorted(ids, key=ids.__getitem__)
    if [ids[word] for word in words] != [*range(end_id + 1, end_id + 1 + len(words))]:
        got = f"{folder} has {len(words)} added words with ids from {ids[words[0]]} to {ids[words[-1]]}"
        raise ValueError(f"{got}, wanted one for each id from {end_id + 1} on")
    return contract_words(words)


def read_ids(folder: Path, name: str) -> dict[str, int]:
    """Returns the ids of added words in a file of a tokenizer's folder, {} without it; ValueError for other content."""
    path = folder / name
    if not path.is_file():
        return {}
    content = read_json(path)
    try:
        return FILES[name](content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has added words of another form ({error!r}), wanted words with an id each") from error


def listed(content: Mapping[str, Any]) -> dict[str, int]:
    """Reads tokenizer.json, where the words are listed."""
    return {row["content"]: int(row["id"]) for row in content.get("added_tokens", [])}


def by_number(content: Mapping[str, Any]) -> dict[str, int]:
    """Reads tokenizer_config.json, where the words are named by their ids."""
    return {row["content"]: int(number) for number, row in content.get("added_tokens_decoder", {}).items()}


def by_word(content: Mapping[str, Any]) -> dict[str, int]:
    """Reads added_tokens.json, which has nothing else."""
    return {word: int(number) for word, number in content.items()}


FILES = {"tokenizer.json": listed, "tokenizer_config.json": by_number, "added_tokens.json": by_word}
