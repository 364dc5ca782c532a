"""The prompts of images to generate: one for all, or those in a file, each with settings of its own."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.types import OnStep
from experiments.harness.images import image_names
from experiments.harness.source_images import SourceImages
from models.conditions.metadata import UNKNOWN
from models.conditions.text import CaptionEncoder
from models.prompt_weights import Embed, PromptRules, encode_prompts
from models.prompts import parse_prompt
from train.condition_source import ConditionSource, Row
from train.config import SamplingConfig
from train.loop import Batch
from train.prompt_files import PromptItem, prompts_provenance, read_prompts, report_errors
from train.trained_sampler import TrainedSampler

RESERVED = ("samples.png", "process.png", "layouts.png")  # pictures of all images
FIELD = "caption"  # of a batch, that prompts fill
CheckedItem = tuple[SamplingConfig, Row, str | None]  # an item's sampling settings, conditions and negative prompt


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompts."""

    prompt: str | None = None
    """Text that all images show, for a run with --conditions text; --prompts FILE has many."""
    negative: str | None = None
    """Text that guidance moves away from, in place of the null; prompts of a file may have their own."""
    prompts: str | None = None
    """File of prompts, one image each: .txt (a prompt a line), .csv, .json or .jsonl, with settings of each image."""
    prompt_syntax: Literal["plain", "a1111", "compel"] = "plain"
    """plain: brackets are characters; a1111: weights as (word:1.4) and [word], and BREAK, as in the web UI; compel:
    weights as (word)1.4 and word++, ("a", "b").and() and .blend()."""
    models: str | None = None
    """YAML file of what draws the items of --prompts that name a model: its name: folder of a run, or diffusers:FOLDER;
    --load_dir draws the others."""

    def __post_init__(self):
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("got --prompt and --prompts: pass one of them")
        if self.models is not None and self.prompts is None:
            raise ValueError(f"got models {self.models} without items that name them: pass --prompts FILE")
        if not self.has_prompts and (self.negative is not None or self.prompt_syntax != "plain"):
            got = f"negative {self.negative!r}" if self.negative is not None else f"prompt_syntax {self.prompt_syntax}"
            raise ValueError(f"got {got} without a prompt: pass --prompt TEXT, or --prompts FILE")

    @property
    def has_prompts(self) -> bool:
        """Whether there are any prompts."""
        return self.prompt is not None or self.prompts is not None


@dataclass(frozen=True)
class PromptInputs:
    """Prompts to draw images for, which get them in turn: image i has prompt i % P.

    With a seed of its own, the prompt's first image is image 0 of that seed, wherever the prompt stands in the file;
    others are image i of the experiment's seed. Where other models draw some prompts of the file, i is the image's
    number among all: see `places`.
    """

    trained: TrainedSampler
    items: tuple[PromptItem, ...]
    options: tuple[SamplingConfig, ...]  # of each item
    negatives: tuple[str | None, ...]  # of each item
    source: ConditionSource  # of the conditions of images, prompts among them
    seed: int
    syntax: str
    names: tuple[str, ...]  # of the pictures of all images; () if none are saved
    provenance: dict[str, str]  # identifies the file
    sources: tuple[str, ...] = ()  # names of the source images of the items, if they have any
    places: tuple[int, ...] = ()  # of the items in their file, where some of its items are missing here
    file_length: int = 0  # number of items in that file

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, indices: list[int], on_step: OnStep | None = None) -> Batch:
        """Draws the images of these indices, those of equal settings together; see `TrainedSampler.draw`.

        `on_step` sees images of equal settings only: ValueError for others.
        """
        if on_step is not None:
            self.check_steps(indices)
        groups: dict[Any, list[int]] = {}
        for place, index in enumerate(indices):
            groups.setdefault(self.group_of(index), []).append(place)
        parts = [self.draw_group([indices[place] for place in places], on_step) for places in groups.values()]
        order = torch.tensor([place for places in groups.values() for place in places]).argsort()
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def check_steps(self, indices: Sequence[int]) -> None:
        """Raises ValueError unless these images are drawn together, step by step."""
        if len({self.group_of(index) for index in indices}) > 1:
            raise ValueError("got prompts of different settings, whose steps differ: leave --save_process out")

    def group_of(self, index: int) -> tuple[Any, ...]:
        """Returns what images have in common that are drawn together."""
        item = index % len(self)
        alone = self.items[item].seed is not None and {*self.source.fields} - {*self.source.rows[item]}
        return self.options[item], self.negatives[item] is None, item if alone else None

    def draw_group(self, indices: list[int], on_step: OnStep | None) -> Batch:
        """Draws images of one group."""
        items = [index % len(self) for index in indices]
        keys = [self.key_of(index) for index in indices]
        seeds, numbers = [seed for seed, _ in keys], [number for _, number in keys]
        *_, alone = self.group_of(indices[0])
        if alone is None:
            conditions = self.source.draw(self.seed, indices)
        else:  # what the prompt leaves open follows from its own seed
            conditions = self.source.with_rows([self.source.rows[alone]]).draw(seeds[0], numbers)
        conditions |= self.encode([self.items[item].prompt for item in items])
        negatives = [self.negatives[item] for item in items if self.negatives[item] is not None]
        negative = self.encode(negatives) if negatives else None
        return self.trained.draw(numbers, seeds, self.options[items[0]], conditions, on_step=on_step, negative=negative)

    def key_of(self, index: int) -> tuple[int, int]:
        """Returns the seed of an image, and its number among the images of that seed."""
        repetition, item = divmod(index, len(self))
        number = repetition * self.file_length + self.places[item] if self.places else index
        own = self.items[item].seed
        return (self.seed, number) if own is None else (own, repetition)

    def encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Returns the fields of prompts."""
        return encode_with_weights(prompts, self.syntax, self.trained)

    def records(self, count: int) -> list[dict[str, Any]]:
        """Returns what each of the first `count` images was drawn with, for results.json."""
        return [self.record(index) for index in range(count)]

    def record(self, index: int) -> dict[str, Any]:
        """Returns what an image was drawn with; `number` is its number among the images of its seed."""
        item = index % len(self)
        options, (seed, number) = self.options[item], self.key_of(index)
        settings = {"solver": options.solver, "sample_steps": options.sample_steps, "guidance": options.guidance}
        record = {"file": self.names[index]} if self.names else {}
        record |= {"model": self.trained.run.name}
        record |= {"prompt": self.items[item].prompt, "negative": self.negatives[item], "seed": seed, "number": number}
        record |= {"source": self.sources[item]} if self.sources else {}
        metadata = self.items[item].metadata
        return record | settings | ({} if metadata is None else {"metadata": dict(metadata)})


def encode_with_weights(prompts: Sequence[str], syntax: str, trained: TrainedSampler) -> dict[str, Any]:
    """Returns the fields of prompts in a syntax: plain ones as texts, others as tokens with weights."""
    if syntax == "plain":
        return {FIELD: list(prompts)}
    encoder, device = trained.sampler.network.encoders["text"], trained.device
    rules = rules_of(encoder, syntax)
    tokens, mask = encode_prompts(prompts, encoder.tokenizer, embed_with(encoder, device), rules)
    return {FIELD: tokens, f"{FIELD}_mask": mask}


def embed_with(encoder: CaptionEncoder, device: torch.device) -> Embed:
    """Returns the text encoder of a condition, as `encode_prompts` takes it."""

    def embed(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return encoder.encoder(ids.to(device), None if mask is None else mask.to(device)).tokens

    return embed


def rules_of(encoder: CaptionEncoder, syntax: str) -> PromptRules:
    """Returns the rules for an encoder: padding is read as in training, or masked."""
    return PromptRules(syntax=syntax, length=encoder.length, pad_id=encoder.pad_id, mask_padding=encoder.pad_id is None)


def open_prompts(
    settings: PromptsConfig,
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    n_seeds: int | None = None,
    label: int | None = None,
    save: int = 0,
    sources: SourceImages | None = None,
) -> PromptInputs:
    """Returns the prompts of the settings, those of a file with `n_seeds` pictures each, or one with `save` pictures.

    Of several `sources`, each prompt of a file has one, and a single prompt has them in turn. Other fields of the model
    come from where they come from without prompts; metadata that neither the item nor --metadata gives are unknown,
    unless held-out images give other fields. All ranks must call it.
    FileNotFoundError, ValueError: the model reads no captions, `options` name a --condition_file, or some items of the
    file cannot be drawn, which are all listed.
    """
    check_reads_prompts(trained, options)
    if settings.prompts is None:
        items = [PromptItem(number=1, prompt=settings.prompt, output="")] * (len(sources) if sources else 1)
        names = image_names(save)
    else:
        items = read_prompts(settings.prompts)
        names = [repeated_name(item.output, k) for k in range(n_seeds or 1) for item in items]
    sources = None if sources is None else sources.for_prompts(len(items))
    if settings.prompts is None:
        checked = [check_item(items[0], settings, trained, options, metadata_of_all(trained, options))] * len(items)
    else:
        checked, errors = check_items(items, settings, trained, options)
        report_errors(settings.prompts, errors + reserved_names(names), len(items))
    if sources is not None:
        checked = [(own, {**row, **image}, away) for (own, row, away), image in zip(checked, sources.rows, strict=True)]
    inputs = assemble(items, checked, names, settings, trained, options, seed, label)
    if sources is not None:
        inputs = dataclasses.replace(inputs, sources=sources.names, provenance=inputs.provenance | sources.provenance)
    report_errors(settings.prompts, try_settings(inputs, options), len(items))
    return inputs


def check_reads_prompts(trained: TrainedSampler, options: SamplingConfig) -> None:
    """Raises ValueError unless a model reads captions, and `options` name no --condition_file."""
    if FIELD not in trained.sampler.conditions:
        reads = ", ".join(trained.sampler.conditions) or "no conditions"
        raise ValueError(f"got a prompt for {trained.run}, which reads {reads}: pass a run with --conditions text")
    if options.condition_file is not None:
        raise ValueError("got prompts and --condition_file: pass one of them")


def check_items(
    items: Sequence[PromptItem], settings: PromptsConfig, trained: TrainedSampler, options: SamplingConfig
) -> tuple[list[CheckedItem], list[str]]:
    """Returns what `check_item` returns of the items that can be drawn, and the errors of the others."""
    metadata, checked, errors = metadata_of_all(trained, options), [], []
    for item in items:
        try:
            checked.append(check_item(item, settings, trained, options, metadata))
        except ValueError as error:
            errors.append(f"item {item.number}: {error}")
    return checked, errors


def assemble(
    items: Sequence[PromptItem],
    checked: Sequence[CheckedItem],
    names: Sequence[str],
    settings: PromptsConfig,
    trained: TrainedSampler,
    options: SamplingConfig,
    seed: int,
    label: int | None = None,
) -> PromptInputs:
    """Returns items that `check_items` found no error in, with the source of their conditions; all ranks call it."""
    rows = trained.with_hints(complete_rows([row for _, row, _ in checked], trained, options), options)
    source = trained.condition_source(dataclasses.replace(options, metadata=()), skip=rows[0]).with_rows(rows)
    return PromptInputs(
        trained,
        tuple(items),
        tuple(own for own, _, _ in checked),
        tuple(negative for _, _, negative in checked),
        source if label is None else source.with_values(label=label),
        seed,
        settings.prompt_syntax,
        tuple(names),
        prompts_provenance(settings.prompts),
    )


def try_settings(inputs: PromptInputs, options: SamplingConfig) -> list[str]:
    """Returns the errors of items whose own settings, other than `options`, the sampler cannot use: it samples an image
    with each of them up to its first step."""
    wrong: dict[Any, str] = {}  # "": nothing
    errors = []
    for item, own, negative in zip(inputs.items, inputs.options, inputs.negatives, strict=True):
        key = own, negative is None  # a negative prompt stands for the null
        if own != options and key not in wrong:
            try:
                away = None if negative is None else inputs.encode([negative])
                inputs.trained.dry_run(own, inputs.source, negative=away)
                wrong[key] = ""
            except ValueError as error:
                wrong[key] = str(error)
        if wrong.get(key):
            errors.append(f"item {item.number}: {wrong[key]}")
    return errors


def metadata_of_all(trained: TrainedSampler, options: SamplingConfig) -> dict[str, str]:
    """Returns the metadata of items that give none, as words by field: those of --metadata and, where held-out images
    give no other field, unknown. ValueError for --metadata that cannot be used."""
    trained.with_metadata([], options)
    fields = trained.metadata_fields
    unknown = {*trained.sampler.conditions} <= {"label", FIELD, *fields}
    return dict.fromkeys(fields if unknown else (), UNKNOWN) | dict(word.split("=", 1) for word in options.metadata)


def check_item(
    item: PromptItem,
    settings: PromptsConfig,
    trained: TrainedSampler,
    options: SamplingConfig,
    metadata: Mapping[str, str],
) -> CheckedItem:
    """Returns the sampling settings, the row of conditions and the negative prompt of an item; ValueError if it cannot
    be drawn. `metadata` are those of all items."""
    own = {name: getattr(item, name) for name in ("sample_steps", "guidance") if getattr(item, name) is not None}
    options = dataclasses.replace(options, **own)
    negative = settings.negative if item.negative is None else item.negative
    if negative is not None and options.guidance == 1:
        raise ValueError(f"got negative {negative!r} with guidance 1, which ignores it: pass --guidance 3, or so")
    if item.model not in (None, trained.run.name):
        got = f"got model {item.model!r}, but {trained.run.name} is loaded"
        raise ValueError(f"{got}: pass --load_dir {item.model}, or --models FILE")
    height, width = trained.data.size
    size = (item.height or height, item.width or width)
    if size != (height, width):
        raise ValueError(f"got an image of {size[0]}x{size[1]}, the model draws {height}x{width}: leave its size out")
    for text in (item.prompt, negative or ""):
        parse_prompt(text, settings.prompt_syntax)
    words = {**metadata, **(item.metadata or {})}
    given = dataclasses.replace(options, metadata=tuple(f"{field}={value}" for field, value in words.items()))
    (row,) = trained.with_metadata([{FIELD: item.prompt}], given)
    return options, row, negative


def complete_rows(rows: Sequence[Row], trained: TrainedSampler, options: SamplingConfig) -> list[Row]:
    """Returns rows with the same fields: metadata that some items do not have are unknown there."""
    unknown = {field: UNKNOWN for row in rows for field in row}
    return trained.with_metadata([unknown | row for row in rows], dataclasses.replace(options, metadata=()))


def repeated_name(name: str, repetition: int) -> str:
    """Returns the path of a prompt's further pictures: cat.png, cat_1.png, cat_2.png."""
    path = PurePosixPath(name)
    return str(path if repetition == 0 else path.with_name(f"{path.stem}_{repetition}{path.suffix}"))


def reserved_names(names: Sequence[str]) -> list[str]:
    """Returns what is wrong with paths of pictures that other pictures have."""
    counts = Counter(name.lower() for name in names)
    taken = sorted({name for name in names if name.lower() in RESERVED or counts[name.lower()] > 1})
    return [f"got output {name}, which another picture has: give it another name" for name in taken]
