"""A tiny BERT with random weights, and a package that holds it as pip's holds MiniLM."""

import json
import string
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from models import wordpiece
from models.bert import Bert, BertConfig, bert_tensors
from models.wordpiece import load_vocabulary
from train import text_encoder_file

CONFIG = BertConfig(width=8, layers=2, heads=2, length=20)
SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
PIECES = [*string.ascii_lowercase, *(f"##{each}" for each in string.ascii_lowercase), *string.digits, *"[](),.!", "##s"]
WORDS = ["red", "star", "blue", "ring", "and", "un", "##aff", "##able", "image", "of"]
VOCABULARY = SPECIAL | {piece: 1000 + i for i, piece in enumerate([*PIECES, *WORDS])}
needs_minilm = pytest.mark.skipif(find_spec(wordpiece.PACKAGE) is None, reason=f"optional: {wordpiece.INSTALL}")


def random_weights(config: BertConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Returns weights by their names in transformers' BertModel."""
    rng = torch.Generator().manual_seed(seed)
    size, embeddings = config.width, {"word": config.vocab_size, "position": 2 * config.length, "token_type": 2}
    shapes = {f"embeddings.{name}_embeddings.weight": (count, size) for name, count in embeddings.items()}
    norms, linear = ["embeddings.LayerNorm"], {"pooler.dense": (size, size)}
    for layer in (f"encoder.layer.{i}." for i in range(config.layers)):
        linear |= {f"{layer}attention.self.{name}": (size, size) for name in ("query", "key", "value")}
        linear |= {f"{layer}attention.output.dense": (size, size), f"{layer}intermediate.dense": (4 * size, size)}
        linear |= {f"{layer}output.dense": (size, 4 * size)}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    shapes |= {f"{name}.{part}": (size,) for name in norms for part in ("weight", "bias")}
    return {name: torch.randn(shape, generator=rng) * 0.3 for name, shape in shapes.items()}


def tiny_bert() -> Bert:
    """Returns the encoder of these weights."""
    encoder = Bert(CONFIG)
    encoder.load_state_dict(bert_tensors(random_weights(), CONFIG))
    return encoder.eval()


def use_vocabulary(patch: pytest.MonkeyPatch) -> None:
    """Gives words the ids of the tiny vocabulary, without a package."""
    patch.setattr(wordpiece, "load_vocabulary", lambda: VOCABULARY)


def install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Puts the tiny encoder in place of the package; returns its archive. The package must not be imported."""
    archive = folder / wordpiece.PACKAGE / "model.zip"
    archive.parent.mkdir(parents=True)
    (archive.parent / "__init__.py").write_text("raise AssertionError")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("tokenizer.json", json.dumps({"model": {"vocab": VOCABULARY}}))
        file.writestr("model.safetensors", save(random_weights()))
    patch.syspath_prepend(folder)
    patch.setattr(text_encoder_file, "MINILM_L6", CONFIG)
    patch.setattr(wordpiece, "load_vocabulary", lru_cache(load_vocabulary.__wrapped__))
    return archive


def uninstall(patch: pytest.MonkeyPatch) -> None:
    """Leaves no package to find."""
    patch.setattr(wordpiece, "PACKAGE", "no_such_package")
    patch.setattr(wordpiece, "load_vocabulary", lru_cache(load_vocabulary.__wrapped__))
