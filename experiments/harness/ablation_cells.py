"""The cells of an ablation: what each is drawn from, whether its model can draw it, and the name of its file.

A cell is drawn by itself: image i has the random numbers of the cell's seed and i, whatever the other settings and
cells are, so that cells of one shape start from the same noise. Its file is named after all that determines its images:
with other settings it has another name, and a cell that is there is not drawn again.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from experiments.harness.ablation_file import INPUTS, Ablation, Axis, Cell, Settings, conversion_of
from experiments.harness.editing import encode_images, read_image, redraw_input
from experiments.harness.experiment import ModelConfig, OutputConfig, data_provenance, load_model
from experiments.harness.prompt_inputs import PromptInputs, PromptsConfig, open_prompts
from experiments.harness.prompt_models import digest_of
from train.class_names import class_index
from train.cli.files import run_folder
from train.cli.parse import flatten_group
from train.condition_source import ConditionSource, condition_provenance
from train.config import DataConfig, SamplingConfig
from train.data.transforms import as_uint8, range_for_image, to_item
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.hint_files import hint_provenance
from train.loop import Batch
from train.python_values import convert_value, setting_names, with_settings
from train.runs import read_run
from train.sampler_loading import read_stored_config
from train.spaces import EditInput
from train.trained_sampler import TrainedSampler

VERSION = 1  # of what a cell's file holds: increase it whenever the same settings give other images
CELLS = "cells"  # folder of their files
STRENGTH = 0.7  # of redrawing, as in experiments/edit.py
LISTED = 10  # cells in a message


@dataclass(frozen=True)
class CellInputs:
    """What a model draws a cell from."""

    trained: TrainedSampler
    options: SamplingConfig
    source: ConditionSource
    prompts: PromptInputs | None
    given: Mapping[str, Any]  # conditions as the cell's settings name them
    seed: int
    shape: tuple[int, int] | None = None  # of the canvas, in the sampler's space; None: as in training
    image: Tensor | None = None  # to redraw, uint8 (C, H, W)
    strength: float = STRENGTH

    def draw(self, indices: list[int]) -> Batch:
        """Draws {"image": uint8 (B, C, H, W)} of these indices; see `TrainedSampler.draw`."""
        conditions, negative = self.source.draw(self.seed, indices), None
        if self.prompts is not None:
            conditions |= self.prompts.encode([self.given["prompt"]] * len(indices))
            negative = self.negative(len(indices))
        edit = self.edit(len(indices))
        return self.trained.draw(
            indices, self.seed, self.options, conditions, edit=edit, shape=self.shape, negative=negative
        )

    def dry_run(self) -> None:
        """Samples one image up to its first step; ValueError for what the model cannot do."""
        keywords = {"shape": self.shape, "edit": self.edit(1), "negative": self.negative(1)}
        self.trained.dry_run(self.options, self.source, **keywords)

    def negative(self, count: int) -> Batch | None:
        """Returns the fields that guidance moves away from, of `count` images; None without a negative prompt."""
        words = self.given.get("negative")
        return None if words is None else self.prompts.encode([words] * count)

    def edit(self, count: int) -> EditInput | None:
        """Returns the start of `count` images from the image to redraw; None without one."""
        if self.image is None:
            return None
        x0 = encode_images(self.image[None], self.trained)
        return redraw_input(x0.repeat_interleave(count, 0), self.trained, self.strength)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What decides whether the model can draw the cell: cells of one kind need one dry run."""
        missing = self.given.get("negative") is None, self.given.get("label", 0) is None
        return self.options, self.shape, self.image is None, self.strength, frozenset(self.given), *missing

    def identity(self, n_images: int) -> dict[str, Any]:
        """Returns all that determines the images beside the model, as JSON has it: content rather than paths."""
        options = flatten_group(self.options) | {"condition_file": None, "hint": []}
        options |= condition_provenance(self.options.condition_file) | hint_provenance(self.options.hint)
        redrawn = None if self.image is None else [hash_image(self.image), self.strength]
        own = {"options": options, "given": dict(self.given), "seed": self.seed, "shape": self.shape, "image": redrawn}
        return own | {"amp": self.trained.amp, "n_images": n_images, "version": VERSION}


def hash_image(image: Tensor) -> str:
    """Returns the SHA-256 of an image uint8 (C, H, W)."""
    shape = repr(tuple(image.shape)).encode()
    return hashlib.sha256(shape + image.contiguous().numpy().tobytes()).hexdigest()


class ModelFacts(NamedTuple):
    """What is known of a model that was opened."""

    run: Path
    step: int
    provenance: dict[str, Any]  # of its weights and its data
    data: DataConfig
    reader: DatasetConfig
    n_classes: int


class Models:
    """Opens the models of an ablation; memory holds the last one, with the sources of its conditions."""

    def __init__(
        self, entries: Mapping[str, Settings], output: OutputConfig, allow: tuple[str, ...], world: DistContext
    ):
        self.entries, self.output, self.allow, self.world = entries, output, allow, world
        self.facts: dict[str, ModelFacts] = {}  # of those that were opened, by name
        self.name: str | None = None
        self.trained: TrainedSampler | None = None
        self.sources: dict[tuple[Any, ...], ConditionSource] = {}

    def open(self, name: str) -> TrainedSampler:
        """Loads a model, unless it is the last one. FileNotFoundError, ValueError: it cannot be loaded."""
        if name != self.name:
            self.name, self.trained, self.sources = None, None, {}  # before the next one takes memory
            entry = dict(self.entries[name])
            config = self.config(name, entry.pop("run"), entry)
            model = load_model(config, self.output, self.world)
            provenance = model.provenance | data_provenance(config, model)
            provenance |= {} if config.tile is None else {"tiles": [config.tile, config.overlap]}
            data, reader, n_classes = model.data, model.reader, model.sampler.n_classes
            self.facts[name] = ModelFacts(model.run, model.step, provenance, data, reader, n_classes)
            self.name, self.trained = name, model
        return self.trained

    def open_cell(self, cell: Cell, seed: int) -> CellInputs:
        """Returns what a cell is drawn from; see `open_cell`."""
        return open_cell(self.open(cell.model), cell.settings, seed, self.sources)

    def config(self, name: str, run: str, entry: Settings) -> ModelConfig:
        """Returns the settings of a model as those of its flags."""
        folder = run_folder(self.output.logs_root, run)
        if (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} is a folder of diffusers, wanted a run as {name}: {conversion_of(str(folder))}")
        content = read_run(folder)
        if "sampler" not in content:
            raise ValueError(f"{folder} is no run of a sampler: wanted one of train_sampler.py as {name}")
        sampler, dataset = content["sampler"].get("sampler"), content.get("data", {}).get("dataset")
        averaged = "ema_length" in entry or content.get("training", {}).get("ema") is not False
        values = {"ema": averaged} | entry
        kinds = get_type_hints(ModelConfig)
        values = {key: convert_value(key, each, kinds[key]) for key, each in values.items()}
        return ModelConfig(sampler=sampler, dataset=dataset, load_dir=str(folder), allow=self.allow, **values)


def open_cell(
    trained: TrainedSampler, settings: Settings, seed: int, sources: dict[tuple[Any, ...], ConditionSource]
) -> CellInputs:
    """Returns what a model draws a cell from; `seed` is that of cells that have none of their own.

    `sources` are those of the model's conditions so far, which may read data sets; new ones are added.
    FileNotFoundError without a file that the settings name. ValueError for settings that the model does not have.
    """
    of_previews = {"condition_file": None, "metadata": (), "hint": (), "hint_ready": False}
    base = dataclasses.replace(read_stored_config(trained.run).sampling, **of_previews)
    own = {name: value for name, value in settings.items() if name not in INPUTS}
    if foreign := sorted(own.keys() - setting_names(base)):
        raise ValueError(f"got {', '.join(foreign)}, which the sampler {trained.sampler.config.sampler} does not have")
    options = with_settings(base, trained.sampler.process, own)
    given = {name: settings[name] for name in ("label", "prompt", "negative", "prompt_syntax") if name in settings}
    seed = settings.get("seed", seed)
    if "label" in given:
        given["label"] = class_index(given["label"], trained.sampler.n_classes, trained.class_names)
    source, prompts = open_conditions(trained, options, given, seed, sources)
    size = settings.get("size", trained.data.size)
    size = size if isinstance(size, tuple) else (size, size)
    shape = None if size == trained.data.size else canvas_shape(trained, size)
    if "strength" in settings and "image" not in settings:
        raise ValueError(f"got strength {settings['strength']} without an image to redraw: add image: FILE")
    image = read_at_size(Path(settings["image"]), trained, size) if "image" in settings else None
    return CellInputs(trained, options, source, prompts, given, seed, shape, image, settings.get("strength", STRENGTH))


def open_conditions(
    trained: TrainedSampler,
    options: SamplingConfig,
    given: Mapping[str, Any],
    seed: int,
    sources: dict[tuple[Any, ...], ConditionSource],
) -> tuple[ConditionSource, PromptInputs | None]:
    """Returns the source of a cell's conditions, with the label and the prompt that are given, and its prompts."""
    label = {"label": given["label"]} if "label" in given else {}
    words = {name: given[name] for name in ("prompt", "negative", "prompt_syntax") if name in given}
    if not words:
        key = source_key(options, label)
        if key not in sources:
            sources[key] = trained.condition_source(options, skip=label)
        source = sources[key]
        return (source.with_values(**label) if label else source), None
    prompts = open_prompts(PromptsConfig(**words), trained, options, seed)
    return (prompts.source.with_values(**label) if label else prompts.source), prompts


def source_key(options: SamplingConfig, label: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what the source of the conditions of a cell without a prompt depends on, beside the model."""
    own = options.condition_file, options.metadata, options.class_sampling, options.hint, options.hint_ready
    return *own, *label


def canvas_shape(trained: TrainedSampler, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the canvas of images of a height and width in pixels, in the sampler's space; ValueError if it has
    none."""
    factor = trained.space.factor
    if any(side % factor for side in size):
        raise ValueError(f"got size {size[0]}x{size[1]} for {trained.run}, wanted multiples of {factor}")
    return size[0] // factor, size[1] // factor


def read_at_size(path: Path, trained: TrainedSampler, size: tuple[int, int]) -> Tensor:
    """Reads an image file, resized and cropped as in training to a height and width: uint8 (C, H, W)."""
    data = trained.data
    image = read_image(path, data.n_channels)
    item = to_item({"image": image}, size, data.n_channels, range_for_image(image, data.data_range))
    return as_uint8(item["image"].as_subclass(Tensor))


class PlannedCell(NamedTuple):
    """A cell, and its file or the reason why there is none."""

    cell: Cell
    digest: str = ""
    reason: str = ""  # why its model cannot draw it
    image: Tensor | None = None  # that it redraws, uint8 (C, H, W)

    def path(self, folder: Path) -> Path:
        """Returns its file in a folder of results."""
        return cell_path(folder, self.digest)


def cell_path(folder: Path, digest: str) -> Path:
    """Returns the file of a cell in a folder of results."""
    return folder / CELLS / f"{digest[:16]}.npz"


def plan_cells(ablation: Ablation, models: Models, n_images: int, seed: int, folder: Path) -> list[PlannedCell]:
    """Returns all cells, after a dry run of each kind that has no file in `folder` yet.

    ValueError for a cell that no model of the grid can draw. One that another model can draw has a reason instead.
    """
    plans: dict[tuple[int, ...], PlannedCell] = {}
    cells = ablation.cells()
    for name in dict.fromkeys(cell.model for cell in cells):
        models.open(name)
        tried: set[tuple[Any, ...]] = set()
        for cell in (cell for cell in cells if cell.model == name):
            plans[cell.place] = plan_cell(cell, models, n_images, seed, folder, tried)
    check_drawable(list(plans.values()), ablation.axes)
    return [plans[cell.place] for cell in cells]


def plan_cell(
    cell: Cell, models: Models, n_images: int, seed: int, folder: Path, tried: set[tuple[Any, ...]]
) -> PlannedCell:
    """Returns a cell with its file, or with the reason why the model cannot draw it; `tried` are kinds that it can."""
    try:
        inputs = models.open_cell(cell, seed)
        digest = digest_of(models.facts[cell.model].provenance | inputs.identity(n_images))
        if inputs.kind not in tried and not cell_path(folder, digest).is_file():
            inputs.dry_run()
            tried.add(inputs.kind)
    except ValueError as error:
        return PlannedCell(cell, reason=str(error))
    return PlannedCell(cell, digest, image=inputs.image)


def check_drawable(plans: Sequence[PlannedCell], axes: Sequence[Axis]) -> None:
    """Raises ValueError for cells that no model can draw: those that differ in their model alone all have a reason."""
    shared = [i for i, axis in enumerate(axes) if not any("model" in point.settings for point in axis.points)]
    groups: dict[tuple[int, ...], list[PlannedCell]] = {}
    for plan in plans:
        groups.setdefault(tuple(plan.cell.place[i] for i in shared), []).append(plan)
    wrong = [group[0] for group in groups.values() if all(plan.reason for plan in group)]
    if wrong:
        listed = "; ".join(f"{', '.join(plan.cell.labels)}: {plan.reason}" for plan in wrong[:LISTED])
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise ValueError(f"{len(wrong)} of {len(groups)} cells can be drawn by no model of the grid: {listed}{more}")


def missing_cells(plans: Collection[PlannedCell], folder: Path) -> list[PlannedCell]:
    """Returns the cells that are still to be drawn, each file once."""
    drawable = {plan.digest: plan for plan in plans if not plan.reason}
    return [plan for plan in drawable.values() if not plan.path(folder).is_file()]
