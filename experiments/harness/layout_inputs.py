"""The layouts of images to generate: those in a file, or of held-out images; each gets several seeds.

A text model of GeoDiffusion reads them as prompts.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.conditions.metadata import split_word
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.converters.sd.geodiffusion import read_location_prompt
from train.data.formats.categories import Categories
from train.data.loading import ImageSource, fixed_subset
from train.datasets._regions import naming
from train.layout_files import LayoutVocabulary, class_names_in
from train.layouts import Layout, layouts_provenance, make_row, read_layouts, trained_vocabulary
from train.location_prompts import DESCRIPTION, LocationPrompt
from train.trained_sampler import TrainedSampler

EXAMPLE = Path(__file__).parents[2] / "assets" / "street_layouts.json"  # for models without data


@dataclass(frozen=True)
class LayoutInputs:
    """Layouts to draw images for, which get them in turn: image i has layout i % L, with the random numbers of i."""

    layouts: tuple[Layout, ...]
    vocabulary: LayoutVocabulary
    source: ConditionSource  # of the conditions of images, the layouts among them
    provenance: dict[str, str]  # identifies the file

    def __len__(self) -> int:
        return len(self.layouts)

    def layout_of(self, indices: list[int]) -> Tensor:
        """Returns the number of the layout (B,) of each image."""
        return torch.tensor([index % len(self) for index in indices])


def open_layouts(
    path: str,
    trained: TrainedSampler,
    options: SamplingConfig,
    size: tuple[int, int] | None = None,
    most: int | None = None,
) -> LayoutInputs:
    """Opens the layouts in a file or folder, for images of `size` in pixels or, without, of that of the training; of
    more than `most` the first ones.

    Fields of the model that they do not have come from where they come from without layouts. All ranks must call it.
    FileNotFoundError, ValueError: they cannot be used, or `options` name a --condition_file.
    """
    if options.condition_file is not None:
        raise ValueError("got --layouts and --condition_file, whose rows are layouts, too: pass one of them")
    prompt = read_location_prompt(trained.run)
    if prompt is not None and size is not None:
        raise ValueError(f"got layouts for parts of an image, but {trained.run} reads them as prompts: leave them out")
    vocabulary = trained_vocabulary(trained, size) if prompt is None else prompt_vocabulary(prompt, path, trained)
    layouts = tuple(read_layouts(path, vocabulary)[:most])
    if prompt is None:
        source = source_of(layouts, trained, options)
    else:
        source = prompt_source(prompt, layouts, vocabulary, trained, options)
    return LayoutInputs(layouts, vocabulary, source, layouts_provenance(path))


def held_out_layouts(trained: TrainedSampler, options: SamplingConfig, count: int) -> LayoutInputs:
    """Returns the layouts of a fixed random subset of `count` held-out images, with all that the model reads of them.

    Those of a model that reads layouts as prompts, which has no data, are examples. ValueError for a model that reads
    no regions, or if `options` name a --condition_file.
    """
    if options.condition_file is not None:
        raise ValueError("got --condition_file, but layouts come from --layouts, or from held-out images: leave it out")
    if read_location_prompt(trained.run) is not None:
        return open_layouts(str(EXAMPLE), trained, options, most=count)
    vocabulary = trained_vocabulary(trained)
    data = dataclasses.replace(trained.data.without_augmentation, in_memory=False, cache_images=False)
    images = ImageSource(trained.dataset("val"), data)
    indices = fixed_subset(len(images), count)
    layouts = tuple(Layout(f"val_{i:06d}", make_row(trained.conditions_of(images[i], i))) for i in indices)
    return LayoutInputs(layouts, vocabulary, source_of(layouts, trained, options), {})


def source_of(layouts: Sequence[Layout], trained: TrainedSampler, options: SamplingConfig) -> ConditionSource:
    """Returns the source of the conditions of images that have these layouts in turn, and the metadata in `options`."""
    rows = trained.with_hints(trained.with_metadata([layout.row for layout in layouts], options), options)
    return trained.condition_source(options, skip=rows[0]).with_rows(rows)


def prompt_vocabulary(prompt: LocationPrompt, path: str, trained: TrainedSampler) -> LayoutVocabulary:
    """Returns the vocabulary of the layouts in a file or folder for a model that reads them as prompts: all class names
    that it has. FileNotFoundError, ValueError: it cannot be read."""
    names = class_names_in(Path(path).expanduser())
    categories = Categories(tuple(range(len(names))), names, (True,) * len(names))
    fields = ("boxes", "box_class", *dict.fromkeys((*prompt.fields, *DESCRIPTION)))
    return LayoutVocabulary(categories, (), fields, trained.data.size)


def prompt_source(
    prompt: LocationPrompt,
    layouts: Sequence[Layout],
    vocabulary: LayoutVocabulary,
    trained: TrainedSampler,
    options: SamplingConfig,
) -> ConditionSource:
    """Returns the source of the prompts of images that have these layouts in turn. Fields of the template are those of
    a layout, or come from the metadata in `options`, which overrides them."""
    given = dict(map(split_word, options.metadata))
    if len(given) < len(options.metadata) or not given.keys() <= {*prompt.fields}:
        got = f"got metadata {' '.join(options.metadata)}"
        raise ValueError(f"{got}, wanted each field of the prompt once: {', '.join(prompt.fields) or 'it has none'}")
    rows = []
    for layout in layouts:
        with naming(f"layout {layout.name}"):
            rows.append({"caption": prompt.write({**layout.row, **given}, vocabulary.classes)})
    plain = dataclasses.replace(options, metadata=())
    return trained.condition_source(plain, skip=("caption",)).with_rows(trained.with_hints(rows, options))
