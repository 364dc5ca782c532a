"""Faults for training at chosen steps and ranks, for --adapt, --hooks and `ProcessPool.call`."""

import os
import signal
import time
from contextlib import contextmanager
from unittest import mock

import torch

from diffusion.rng import seed_of
from helpers import tiny_runs
from train.data.loading import TrainingImages
from train.data.transforms import to_float
from train.distributed import is_sharded
from train.execution import LossScale
from train.sampler import SamplerStep

BATCH = 4
AT = 2  # the faulty step
LAST = BATCH * AT + BATCH - 1  # its last sample, on rank 1 if there are two


def nan_image(item):
    """For --adapt: makes one pixel of one sample NaN. (The seed identifies the sample.)"""
    image = to_float(item["image"])
    if torch.initial_seed() == seed_of(0, "adapt", LAST):
        image[0, 0, 0] = float("nan")
    return item | {"image": image}


class NanGradient:
    """For --hooks: makes the gradient of a parameter NaN at one step.

    For a sharded module, whose parameters autograd does not see, it is the gradient of its output.
    """

    module, step, ranks = "network", AT, {"0", "1"}

    def __init__(self):
        self.set = False

    def __call__(self, state, outputs):
        if not self.set and os.environ.get("RANK", "0") in self.ranks:
            module = state.modules[self.module]

            def spoil(gradient):
                return gradient * float("nan") if state.step == self.step else None

            def spoil_behind(module, inputs, output):
                output.register_hook(spoil)

            if is_sharded(module):
                module.register_forward_hook(spoil_behind)
            else:
                parameter = list(module.parameters())[0]
                requires_grad = parameter.requires_grad
                parameter.requires_grad_(True).register_hook(spoil)
                parameter.requires_grad_(requires_grad)
        self.set = True


class NanGradientOnRank1(NanGradient):
    ranks = {"1"}


class NanGradientOfAutoencoder(NanGradient):
    module, step = "autoencoder", 4


class NanGradientOfDiscriminator(NanGradient):
    module, step = "discriminator", 4


@contextmanager
def add_to_loss(number: float, positions: set[int], seen: list | None = None):
    """Adds a constant to the loss of these samples; appends all samples of each step to `seen`."""
    loss = SamplerStep.loss

    def changed(self, network, batch, validation_size=None):
        losses = loss(self, network, batch, validation_size)
        if seen is not None:
            seen.append(batch["position"].tolist())
        selected = torch.tensor([p in positions for p in batch["position"].tolist()])
        per_example = losses.per_example + torch.where(selected, number, 0.0).to(losses.per_example)
        return losses._replace(per_example=per_example)

    with mock.patch.object(SamplerStep, "loss", changed):
        yield


@contextmanager
def replace_images_by_nan(positions: set[int]):
    """Makes the images of these samples NaN."""
    images = TrainingImages.__getitem__

    def changed(self, requested):
        batch = images(self, requested)
        for i, position in enumerate(requested):
            if position in positions:
                batch["image"][i] = float("nan")
        return batch

    with mock.patch.object(TrainingImages, "__getitem__", changed):
        yield


def run_with_infinite_loss(flags: str) -> None:
    with add_to_loss(float("inf"), {LAST}):
        tiny_runs.call("train_sampler.py", flags)


@contextmanager
def initial_loss_scale(value: float):
    """Sets the initial float16 loss scale."""
    with mock.patch.object(LossScale, "INITIAL", value):
        yield


def raise_on_rank_1(state, outputs):
    """For --hooks: raises an error in rank 1 only."""
    if os.environ["RANK"] == "1" and state.step == 3:
        raise ValueError("not one image can be read any more")


class TerminateLater:
    """For --hooks: sends SIGTERM at call number `at` of the network after the training part of step AT, on one rank.
    Later calls are an error."""

    at, rank = 1, "0"

    def __call__(self, state, outputs):
        if state.step == AT and os.environ.get("RANK", "0") == self.rank:
            self.calls = 0
            state.eval_module("network").register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.calls += 1
        assert self.calls <= self.at, "the network was called after the signal"
        if self.calls == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class InValidation(TerminateLater):
    at = 2


class InDistances(TerminateLater):
    at = 8


class InPictures(TerminateLater):
    at = 15


class InDistancesOfRank1(TerminateLater):
    at, rank = 5, "1"


def wait_for_data(item):
    """For --adapt: waits for a minute for one sample of step 4, and sends SIGTERM first."""
    if torch.initial_seed() == seed_of(0, "adapt", 3 * BATCH + 1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        raise AssertionError("the signal did not end the wait")
    return item


def kill_rank_1(state, outputs):
    """For --hooks: kills the process of rank 1 at step 3."""
    if os.environ.get("RANK") == "1" and state.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
