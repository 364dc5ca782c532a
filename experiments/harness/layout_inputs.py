"""The layouts of images to generate: those in a file, or of held-out images; each gets several seeds."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset
from train.layout_files import LayoutVocabulary
from train.layouts import Layout, layouts_provenance, make_row, read_layouts, trained_vocabulary
from train.trained_sampler import TrainedSampler


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
    vocabulary = trained_vocabulary(trained, size)
    layouts = tuple(read_layouts(path, vocabulary)[:most])
    return LayoutInputs(layouts, vocabulary, source_of(layouts, trained, options), layouts_provenance(path))


def held_out_layouts(trained: TrainedSampler, options: SamplingConfig, count: int) -> LayoutInputs:
    """Returns the layouts of a fixed random subset of `count` held-out images, with all that the model reads of them.

    ValueError for a model that reads no regions, or if `options` name a --condition_file.
    """
    if options.condition_file is not None:
        raise ValueError("got --condition_file, but layouts come from --layouts, or from held-out images: leave it out")
    vocabulary = trained_vocabulary(trained)
    data = dataclasses.replace(trained.data.without_augmentation, in_memory=False, cache_images=False)
    images = ImageSource(trained.dataset("val"), data)
    indices = fixed_subset(len(images), count)
    layouts = tuple(Layout(f"val_{i:06d}", make_row(trained.conditions_of(images[i], i))) for i in indices)
    return LayoutInputs(layouts, vocabulary, source_of(layouts, trained, options), {})


def source_of(layouts: Sequence[Layout], trained: TrainedSampler, options: SamplingConfig) -> ConditionSource:
    """Returns the source of the conditions of images that have these layouts in turn, and the metadata in `options`."""
    rows = trained.with_metadata([layout.row for layout in layouts], options)
    return trained.condition_source(options, skip=rows[0]).with_rows(rows)
