"""Images of a class that is asked for."""

from collections.abc import Callable

import torch

from train.config import SamplingConfig
from train.generate import TrainedSampler
from train.loop import Batch


def images_of_class(
    trained: TrainedSampler, label: int | None, seed: int, options: SamplingConfig
) -> Callable[..., Batch]:
    """A function from indices to images, as `TrainedSampler.draw` makes them, all of one class where one is named.

    Conditions beside the class are those that are drawn without it. All processes must ask. ValueError: there is no
    such class.
    """
    classes = trained.sampler.n_classes
    if label is not None and not 0 <= label < classes:
        wanted = f"a class from 0 to {classes - 1}: pass --label N" if classes else "a model of classes: leave it out"
        raise ValueError(f"got --label {label} for {trained.run}, wanted {wanted}")
    held_out = trained.held_out()

    def draw(indices: list[int], **how) -> Batch:
        if label is None:
            return trained.draw(indices, seed, options, held_out=held_out, **how)
        given = trained.conditions(seed, indices, held_out) | {"label": torch.full((len(indices),), label)}
        return trained.draw(indices, seed, options, given=given, **how)

    return draw
