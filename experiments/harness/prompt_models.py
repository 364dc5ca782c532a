"""Files of prompts whose items name the model that draws them: runs of ours beside the loaded one.

    models.yaml      small: ddpm_text            a run below --logs_root
                     large: /runs/ddpm_large     or elsewhere

A run draws with the sampling settings of its own config.yaml; those of the command line are for the loaded run.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.types import OnStep
from experiments.harness.prompt_inputs import (
    PromptInputs,
    PromptsConfig,
    assemble,
    check_items,
    check_reads_prompts,
    repeated_name,
    reserved_names,
    try_settings,
)
from train.cli.files import read_yaml, run_folder
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.transforms import grey_to_rgb
from train.loop import Batch
from train.prompt_files import PromptItem, prompts_provenance, read_prompts, report_errors
from train.registry import did_you_mean
from train.trained_sampler import TrainedSampler, load_trained_sampler, read_stored_config


@dataclass(frozen=True)
class PromptsOfModels:
    """The prompts of a file that several models draw: image i has prompt i % P. All draw images of one size."""

    parts: Mapping[str, PromptInputs]  # by the name of the model
    owners: tuple[str, ...]  # of each item: the name of the model that draws it
    loaded: str  # the name of the model that --load_dir loads
    names: tuple[str, ...]  # of the pictures of all images
    provenance: dict[str, str]  # identifies the file and the weights

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def source(self) -> ConditionSource | None:
        """The source of the conditions of the loaded run's images; None if it draws none."""
        return self.parts[self.loaded].source if self.loaded in self.parts else None

    def place_of(self, index: int) -> tuple[str, int]:
        """Returns the model that draws an image, and the number of the image among those of the model."""
        repetition, item = divmod(index, len(self))
        owner = self.owners[item]
        return owner, repetition * len(self.parts[owner]) + self.owners[:item].count(owner)

    def draw(self, indices: list[int], on_step: OnStep | None = None) -> Batch:
        """Draws {"image": uint8 (B, C, H, W)} of these indices; those of models of grey images are RGB.

        `on_step` sees images of the loaded run with equal settings: ValueError for others.
        """
        if on_step is not None:
            self.check_steps(indices)
        groups: dict[str, list[int]] = {}
        for place, index in enumerate(indices):
            groups.setdefault(self.place_of(index)[0], []).append(place)
        images = [
            self.parts[owner].draw([self.place_of(indices[place])[1] for place in places], on_step)["image"]
            for owner, places in groups.items()
        ]
        order = torch.tensor([place for places in groups.values() for place in places]).argsort()
        return {"image": torch.cat([grey_to_rgb(each) for each in images])[order]}

    def check_steps(self, indices: Sequence[int]) -> None:
        """Raises ValueError unless the loaded run draws these images together, step by step."""
        owners, numbers = zip(*map(self.place_of, indices), strict=True)
        if {*owners} != {self.loaded}:
            raise ValueError("got prompts for several models, whose steps differ: leave --save_process out")
        self.parts[self.loaded].check_steps(numbers)

    def records(self, count: int) -> list[dict[str, Any]]:
        """Returns what each of the first `count` images was drawn with, for results.json."""
        return [self.record(index) for index in range(count)]

    def record(self, index: int) -> dict[str, Any]:
        """Returns what an image was drawn with."""
        owner, number = self.place_of(index)
        return {"file": self.names[index]} | self.parts[owner].record(number) | {"model": owner}


def open_prompts_of_models(
    settings: PromptsConfig,
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    n_seeds: int | None,
    logs_root: str,
    allow: tuple[str, ...] = (),
) -> PromptsOfModels:
    """Returns the prompts of a file, with the models that its items name; `trained` and `options` are for the others.

    All ranks must call it. FileNotFoundError, ValueError: a model cannot be loaded or reads no captions, or some items
    of the file cannot be drawn, which are all listed.
    """
    known, items = read_models(settings.models), read_prompts(settings.prompts)
    loaded = trained.run.name
    owners = [loaded if item.model is None else item.model for item in items]
    errors = [wrong_model(item, known, loaded) for item in items if item.model not in (None, loaded, *known)]
    names = [repeated_name(item.output, k) for k in range(n_seeds or 1) for item in items]
    report_errors(settings.prompts, errors + reserved_names(names), len(items))
    models: dict[str, tuple[TrainedSampler, SamplingConfig]] = {}
    for name in dict.fromkeys(owners):
        folder = run_folder(logs_root, known[name]) if name in known else trained.run
        models[name] = (trained, options) if folder == trained.run else load_run(folder, trained, logs_root, allow)
    parts, errors = {}, []
    for name, (model, own) in models.items():
        places = [place for place, owner in enumerate(owners) if owner == name]
        part = [dataclasses.replace(items[place], model=None) for place in places]
        check_reads_prompts(model, own)
        checked, wrong = check_items(part, settings, model, own)
        if not wrong:
            inputs = assemble(part, checked, (), settings, model, own, seed)
            parts[name] = dataclasses.replace(inputs, places=tuple(places), file_length=len(items))
            wrong = try_settings(parts[name], own)
        errors += wrong
    report_errors(settings.prompts, errors, len(items))
    check_one_size({name: model for name, (model, _) in models.items()})
    weights = {name: model.provenance for name, (model, _) in models.items()}
    provenance = prompts_provenance(settings.prompts) | {"models_sha256": digest_of(weights)}
    return PromptsOfModels(parts, tuple(owners), loaded, tuple(names), provenance)


def read_models(path: str) -> dict[str, str]:
    """Reads a YAML file of folders by the names of models. FileNotFoundError, ValueError: it cannot be used."""
    file = Path(os.path.expanduser(path))
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: pass a YAML file as --models")
    models = read_yaml(file)
    for name, folder in models.items():
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"{file}: got {folder!r} for {name}, wanted the folder of a run")
    return models


def wrong_model(item: PromptItem, known: Mapping[str, str], loaded: str) -> str:
    """Returns what is wrong with an item whose model is unknown."""
    names = [*known, loaded]
    near = did_you_mean(item.model, names)
    return f"item {item.number}: got model {item.model!r}{near}, wanted one of {', '.join(names)}"


def load_run(
    run: Path, trained: TrainedSampler, logs_root: str, allow: tuple[str, ...]
) -> tuple[TrainedSampler, SamplingConfig]:
    """Returns the newest model of a run, averaged if the run kept averages, and its own sampling settings."""
    roots = (str(run.parent), logs_root)
    model = load_trained_sampler(run, None, trained.device, ema=None, amp=trained.amp, logs_roots=roots, allow=allow)
    options = dataclasses.replace(read_stored_config(run).sampling, condition_file=None, metadata=())
    return dataclasses.replace(model, world=trained.world), options


def check_one_size(models: Mapping[str, TrainedSampler]) -> None:
    """Raises ValueError unless all models draw images of one size, grey or RGB, or of the same channels."""
    sizes = {name: "x".join(map(str, model.data.size)) for name, model in models.items()}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"got models of different sizes, {listed}, wanted one: draw their prompts in separate calls")
    channels = {name: model.data.n_channels for name, model in models.items()}
    if len({3 if count == 1 else count for count in channels.values()}) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in channels.items())
        raise ValueError(f"got models of different channels, {listed}: draw their prompts in separate calls")


def digest_of(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the SHA-256 that identifies the weights of models."""
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
