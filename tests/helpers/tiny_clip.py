"""Tiny CLIP models of transformers with random weights, in folders as it saves them, with a tokenizer of letters."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
SIDE, LENGTH = 20, 12  # of images in pixels, of captions in tokens
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def make_clip(seed: int = 0) -> CLIPModel:
    """Returns a CLIP model whose weights are large enough for its features to differ."""
    ends = {"bos_token_id": len(VOCABULARY) - 2, "eos_token_id": len(VOCABULARY) - 1}
    text = LAYERS | ends | {"vocab_size": len(VOCABULARY), "max_position_embeddings": LENGTH}
    vision = LAYERS | {"image_size": SIDE, "patch_size": 5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def save_clip(folder: Path, model: CLIPModel) -> Path:
    """Saves a model with its image processor and its tokenizer; returns the folder."""
    model.save_pretrained(folder)
    save_processor(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n")
    return folder


def save_processor(folder: Path) -> CLIPImageProcessor:
    """Saves and returns the image processor of CLIP for images of SIDE pixels."""
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return processor
