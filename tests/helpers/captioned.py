"""A few small images with captions, and a tiny text encoder in a file."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.text_encoder import TextEncoder, TextEncoderConfig
from train.text_encoder_file import save_text_encoder

ENCODER = TextEncoderConfig(width=8, layers=1, heads=2, activation="quick_gelu")


def write_captioned_images(folder: Path, captions: list[str]) -> str:
    """Writes 8 images for training and 4 for validation, with these captions in turn; returns the flags of the data."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        (folder / "images" / split).mkdir(parents=True)
        rows = [("img_name", "prompt")]
        for i in range(count):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(image).save(folder / "images" / split / f"{i}.png")
            rows.append((f"{i}.png", captions[i % len(captions)]))
        with (folder / f"prompts_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return f"--dataset captions --data_dir {folder}"


def write_encoder(path: Path, seed: int = 0) -> Path:
    """Writes a text encoder with random weights to a file."""
    torch.manual_seed(seed)
    save_text_encoder(TextEncoder(ENCODER), path)
    return path
