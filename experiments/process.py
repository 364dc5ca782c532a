"""Strips of images on their way from noise: what a solver has, and what the network predicts of it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.images import save_grid
from train.generate import TrainedSampler
from train.loop import Batch

STRIPS, MOMENTS = 6, 10  # images, and steps of each that are shown


class Recorder:
    """An `on_step` that keeps x and prediction, decoded to images (B, C, H, W) uint8, of the last step and of up to
    `most` before it, evenly spaced."""

    def __init__(self, trained: TrainedSampler, most: int = 64):
        self.trained, self.most = trained, most
        self.steps, self.stride = [], 1

    def __call__(self, i: int, t: float, s: float, x: Tensor, predicted: Tensor) -> Tensor:
        if i % self.stride == 0 or s == 0:
            self.steps.append(tuple(image.cpu() for image in self.trained.space.shown(x, predicted)))
        if len(self.steps) > self.most and s > 0:
            self.steps, self.stride = self.steps[::2], 2 * self.stride
        return x


def save_process(path: Path, trained: TrainedSampler, indices: list[int], draw: Callable[..., Batch]) -> None:
    """A PNG of two rows per image: x at about ten moments from noise to data, and below it the predicted image.

    `draw` makes the images of `indices` once more, in one batch, and hands what it sees to an `on_step`.
    """
    recorder = Recorder(trained)
    draw(indices, on_step=recorder)
    last = len(recorder.steps) - 1
    moments = sorted({round(last * k / (MOMENTS - 1)) for k in range(MOMENTS)})
    rows = [torch.stack([recorder.steps[m][kind] for m in moments], 1) for kind in (0, 1)]  # (B, moments, C, H, W)
    save_grid(path, torch.stack(rows, 1).flatten(0, 2), columns=len(moments))
