"""Files of prompts whose items name the model that draws them: runs beside the loaded one, and pipelines of diffusers.

    models.yaml      small: ddpm_text                       a run below --logs_root
                     large: /runs/ddpm_large                or elsewhere
                     turbo: diffusers:/models/sdxl-turbo    a pipeline that diffusers saved, for which it is installed

A run draws with the sampling settings of its own config.yaml, a pipeline with its own defaults; the sampling settings
of the command line are for the loaded run.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.rng import seed_of
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
from train.execution import autocast
from train.files import sha256
from train.loop import Batch
from train.prompt_files import PromptItem, prompts_provenance, read_prompts, report_errors
from train.registry import did_you_mean
from train.sampler_loading import load_trained_sampler, read_stored_config
from train.trained_sampler import TrainedSampler

DIFFUSERS = "diffusers:"  # begins a folder that holds a pipeline
INSTALL = "pip install diffusers transformers"


@dataclass(frozen=True)
class PipelineInputs:
    """The prompts of a file that a pipeline of diffusers draws, each image by itself: see `PromptInputs`."""

    pipeline: Any  # a diffusers.DiffusionPipeline
    items: tuple[PromptItem, ...]
    arguments: tuple[Mapping[str, Any], ...]  # of each item, for the pipeline
    seed: int
    device: torch.device
    amp: bool
    digest: str  # SHA-256 that identifies the pipeline's files
    places: tuple[int, ...] = ()  # of the items in their file
    file_length: int = 0  # number of items in that file

    def __len__(self) -> int:
        return len(self.items)

    def key_of(self, index: int) -> tuple[int, int]:
        """Returns the seed of an image, and its number among the images of that seed."""
        repetition, item = divmod(index, len(self))
        own = self.items[item].seed
        return (self.seed, repetition * self.file_length + self.places[item]) if own is None else (own, repetition)

    @torch.no_grad()
    def draw(self, indices: list[int], on_step: OnStep | None = None) -> Batch:
        """Draws {"image": uint8 (B, 3, H, W)} of these indices, without steps to see."""
        images = []
        for index in indices:
            seed, number = self.key_of(index)
            rng = torch.Generator().manual_seed(seed_of(seed, "sample", number))
            with autocast(self.device, self.amp):
                drawn = self.pipeline(**self.arguments[index % len(self)], generator=rng, output_type="np")
            images.append((torch.as_tensor(drawn.images[0]) * 255).round().to(torch.uint8).permute(2, 0, 1))
        return {"image": torch.stack(images)}

    def record(self, index: int) -> dict[str, Any]:
        """Returns what an image was drawn with; None is the pipeline's default."""
        item, (seed, number) = index % len(self), self.key_of(index)
        own, given = self.items[item], self.arguments[item]
        record = {"prompt": own.prompt, "negative": given.get("negative_prompt"), "seed": seed, "number": number}
        solver = type(self.pipeline.scheduler).__name__
        return record | {"solver": solver, "sample_steps": own.sample_steps, "guidance": own.guidance}


@dataclass(frozen=True)
class PromptsOfModels:
    """The prompts of a file that several models draw: image i has prompt i % P. All draw images of one size."""

    parts: Mapping[str, PromptInputs | PipelineInputs]  # by the name of the model
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
    folders, items = read_models(settings.models), read_prompts(settings.prompts)
    loaded = trained.run.name
    owners = [loaded if item.model is None else item.model for item in items]
    errors = [wrong_model(item, folders, loaded) for item in items if item.model not in (None, loaded, *folders)]
    if loaded in folders and run_folder(logs_root, folders[loaded]) != trained.run:
        raise ValueError(f"got {loaded} in {settings.models}, which --load_dir loads: give it another name")
    names = [repeated_name(item.output, k) for k in range(n_seeds or 1) for item in items]
    report_errors(settings.prompts, errors + reserved_names(names), len(items))
    parts, weights, errors = {}, {}, []
    for name in dict.fromkeys(owners):
        places = tuple(place for place, owner in enumerate(owners) if owner == name)
        part = [dataclasses.replace(items[place], model=None) for place in places]
        if folders.get(name, "").startswith(DIFFUSERS):
            inputs, wrong = open_pipeline(part, settings, folders[name], trained, seed)
            weights[name] = {"pipeline": inputs.digest}
        else:
            folder = run_folder(logs_root, folders[name]) if name in folders else trained.run
            is_loaded = folder == trained.run
            model, own = (trained, options) if is_loaded else load_run(folder, trained, logs_root, allow)
            inputs, wrong = open_run_prompts(part, settings, model, own, seed)
            weights[name] = model.provenance
        if not wrong:
            parts[name] = dataclasses.replace(inputs, places=places, file_length=len(items))
        errors += wrong
    report_errors(settings.prompts, errors, len(items))
    check_one_size(parts)
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
            raise ValueError(f"{file}: got {folder!r} for {name}, wanted the folder of a run or diffusers:FOLDER")
    return models


def wrong_model(item: PromptItem, folders: Mapping[str, str], loaded: str) -> str:
    """Returns what is wrong with an item whose model is unknown."""
    names = [*folders, loaded]
    near = did_you_mean(item.model, names)
    return f"item {item.number}: got model {item.model!r}{near}, wanted one of {', '.join(names)}"


def load_run(
    run: Path, trained: TrainedSampler, logs_root: str, allow: tuple[str, ...]
) -> tuple[TrainedSampler, SamplingConfig]:
    """Returns the newest model of a run, averaged if the run kept averages, and its own sampling settings."""
    roots = (str(run.parent), logs_root)
    model = load_trained_sampler(run, None, trained.device, ema=None, amp=trained.amp, logs_roots=roots, allow=allow)
    options = dataclasses.replace(
        read_stored_config(run).sampling, condition_file=None, metadata=(), hint=(), hint_ready=False
    )
    return dataclasses.replace(model, world=trained.world), options


def open_run_prompts(
    items: Sequence[PromptItem], settings: PromptsConfig, model: TrainedSampler, options: SamplingConfig, seed: int
) -> tuple[PromptInputs | None, list[str]]:
    """Returns the prompts that a run draws, None if some cannot be drawn, and the errors."""
    check_reads_prompts(model, options)
    checked, errors = check_items(items, settings, model, options)
    if errors:
        return None, errors
    inputs = assemble(items, checked, (), settings, model, options, seed)
    return inputs, try_settings(inputs, options)


def open_pipeline(
    items: Sequence[PromptItem], settings: PromptsConfig, word: str, trained: TrainedSampler, seed: int
) -> tuple[PipelineInputs, list[str]]:
    """Returns the prompts that the pipeline of diffusers:FOLDER draws where `trained` draws, and the errors."""
    folder = Path(os.path.expanduser(word.removeprefix(DIFFUSERS)))
    pipeline = load_pipeline(folder, trained.device)
    arguments, errors = check_pipeline_items(items, settings, pipeline)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = digest_of({str(file.relative_to(folder)): sha256(file) for file in files})
    return PipelineInputs(pipeline, tuple(items), arguments, seed, trained.device, trained.amp, digest), errors


def load_pipeline(folder: Path, device: torch.device) -> Any:
    """Returns the pipeline in a folder that diffusers saved. FileNotFoundError, ValueError: it cannot be loaded."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder / 'model_index.json'} not found: pass a folder that diffusers saved")
    try:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    except ImportError as error:
        raise ValueError(f"{folder} needs packages that are not installed ({error}): {INSTALL}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_pipeline_items(
    items: Sequence[PromptItem], settings: PromptsConfig, pipeline: Any
) -> tuple[tuple[dict[str, Any], ...], list[str]]:
    """Returns the arguments of a pipeline for each item, and what is wrong with items."""
    if settings.prompt_syntax != "plain":
        raise ValueError(f"got prompt_syntax {settings.prompt_syntax} for a pipeline, wanted plain: leave it out")
    accepted, kind = inspect.signature(pipeline.__call__).parameters, type(pipeline).__name__
    arguments, errors = [], []
    for item in items:
        given = {
            "prompt": item.prompt,
            "negative_prompt": settings.negative if item.negative is None else item.negative,
            "num_inference_steps": item.sample_steps,
            "guidance_scale": item.guidance,
            "height": item.height,
            "width": item.width,
        }
        arguments.append({name: value for name, value in given.items() if value is not None})
        unknown = [*(arguments[-1].keys() - accepted.keys()), *(() if item.metadata is None else ("metadata",))]
        if unknown:
            errors.append(f"item {item.number}: got {', '.join(sorted(unknown))}, which {kind} does not take")
    return tuple(arguments), errors


def size_of(part: PromptInputs | PipelineInputs) -> str:
    """Returns the height and width of a model's images: those of its run, or those that items of a pipeline give."""
    if isinstance(part, PromptInputs):
        return "x".join(map(str, part.trained.data.size))
    own = {f"{each.get('height', '?')}x{each.get('width', '?')}" for each in part.arguments}
    return " and ".join(sorted(own))


def check_one_size(parts: Mapping[str, PromptInputs | PipelineInputs]) -> None:
    """Raises ValueError unless all models draw images of one size, grey or RGB, or of the same channels."""
    sizes = {name: size_of(part) for name, part in parts.items()}
    different = {*sizes.values()}
    unknown = len(parts) > 1 and any("?" in size for size in different)
    if unknown or len(different) > 1 or any(" and " in size for size in different):
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        remedy = "give items of pipelines their height and width, or draw the prompts in separate calls"
        raise ValueError(f"got models of different sizes, {listed}, wanted one: {remedy}")
    runs = {name: part.trained for name, part in parts.items() if isinstance(part, PromptInputs)}
    channels = {name: run.data.n_channels for name, run in runs.items()} | dict.fromkeys(parts.keys() - runs.keys(), 3)
    if len({3 if count == 1 else count for count in channels.values()}) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in channels.items())
        raise ValueError(f"got models of different channels, {listed}: draw their prompts in separate calls")


def digest_of(weights: Mapping[str, Any]) -> str:
    """Returns the SHA-256 that identifies the weights of models."""
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
