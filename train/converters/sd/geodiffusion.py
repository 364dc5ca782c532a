"""GeoDiffusion (Chen et al. 2024): what generation_config.json of a folder says of prompts and of sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.tokenizer import Tokenizer
from train.converters.sd.export import FACTS, FOLDER, find_source_run
from train.converters.sd.files import read_json
from train.location_prompts import LocationPrompt, place_word

NAME = "generation_config.json"
WANTED = ("prompt_template", "num_bucket_per_side")
FLAGS: dict[str, tuple[str, type]] = {  # and their types, by key
    **{"height": ("img_size", int), "width": ("img_width", int)},
    **{"cfg_scale": ("guidance", float), "num_inference_steps": ("sample_steps", int)},
}
IGNORED = ("dataset", "nsamples")  # class names are words here; --n_seeds is the number of images


def generation_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags of the image's size and of sampling; ValueError for keys that are missing or not known."""
    known = {*WANTED, *FLAGS, *IGNORED, "max_num_bbox"}
    if odd := sorted({*config} - known | {*WANTED} - {*config}):
        raise ValueError(f"{NAME} {'lacks' if odd[0] in WANTED else 'has an unknown key'} {odd[0]!r}: correct it")
    make_location_prompt(config)
    flags = {}
    for key, (flag, kind) in FLAGS.items():
        if key not in config:
            continue
        if type(config[key]) not in (int, float) or kind(config[key]) != config[key]:
            raise ValueError(f"{NAME} has {key} {config[key]!r}, wanted type {kind.__name__}: correct it")
        flags[flag] = kind(config[key])
    return flags


def make_location_prompt(config: Mapping[str, Any]) -> LocationPrompt:
    """Returns how prompts are made of layouts; ValueError if it cannot be done so."""
    grid = config["num_bucket_per_side"]
    grid = tuple(grid) if isinstance(grid, list) else (grid, grid)
    return LocationPrompt(config["prompt_template"], grid, config.get("max_num_bbox"))


def check_places(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Raises ValueError if the tokenizer lacks words of places."""
    columns, rows = make_location_prompt(config).grid
    missing = [word for word in map(place_word, range(columns * rows)) if word not in tokenizer.added_ids]
    if missing:
        got = f"got a tokenizer without {missing[0]} and {len(missing) - 1} other places of {columns} x {rows}"
        raise ValueError(f"{got}: add its added_tokens.json to the folder tokenizer")


def read_location_prompt(run: Path) -> LocationPrompt | None:
    """Returns how a run that came from GeoDiffusion reads layouts; None for other runs."""
    source = find_source_run(run)
    config = None if source is None else read_json(source / FOLDER / FACTS)["configs"].get("generation")
    return None if config is None else make_location_prompt(config)
