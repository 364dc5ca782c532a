"""Numbers measured in images, by a regressor that learns them from real images, and how they agree with those given."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.metrics.layout.fitting import Recipe, fit
from models.conditions.numbers import NumberField

Fields = Mapping[str, NumberField]
Numbers = dict[str, Tensor]  # by field: (N,), NaN where missing

SIDE = 64  # pixels; larger images are reduced to it
WIDTHS = (32, 64, 96)  # channels of the stages
CELLS = 2  # rows and columns of the last map
SHIFT = 1 / 16  # of the side, by which training images are moved at most
BATCH = 250  # images at a time
RECIPE = Recipe(steps=800, batch_size=64, peak_lr=3e-3)


class NumberRegressor(nn.Module):
    """Three stages of two convolutions each and two linear layers, which predict all fields of an image.

    A linear field is one output, a cyclic one two, the cosine and the sine of its angle; all are standardised.
    """

    def __init__(self, n_channels: int, fields: Fields, mean: Tensor, deviation: Tensor) -> None:
        """`mean` and `deviation` (K,) are those of the outputs over the training images."""
        super().__init__()
        self.fields = dict(fields)
        layers: list[nn.Module] = []
        for channels_in, channels_out in pairwise((n_channels, *WIDTHS)):
            for channels in (channels_in, channels_out):
                layers += [nn.Conv2d(channels, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)]
                layers += [nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(CELLS), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(WIDTHS[-1] * CELLS**2, 128), nn.ReLU(), nn.Linear(128, len(mean)))
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, C, H, W) of any size, in [0, 255], to standardised outputs (B, K) float32."""
        images = images.float() / 127.5 - 1
        if max(images.shape[-2:]) > SIDE:
            images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return self.head(self.body(images))

    @torch.no_grad()
    def measure(self, images: Tensor) -> Numbers:
        """Returns the fields of images (N, C, H, W) uint8: (N,) float64 each, on the CPU."""
        device = self.mean.device
        parts = [(self(part.to(device)) * self.deviation + self.mean).cpu() for part in images.split(BATCH)]
        return from_outputs(torch.cat(parts).double(), self.fields)


def train_number_regressor(
    images: Tensor,
    numbers: Numbers,
    fields: Fields,
    seed: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda steps: None,
) -> NumberRegressor:
    """Trains a regressor on images (N, C, H, W) uint8 and their numbers, for `RECIPE.steps` steps; it is frozen.

    The loss is the squared error of the outputs that are known. `advance` is called with 1 after each step. The global
    random state is unchanged.
    """
    outputs = to_outputs(numbers, fields)  # (N, K)
    known = ~outputs.isnan()
    counts = known.sum(0).clamp(min=1)
    mean = outputs.nan_to_num().sum(0) / counts
    deviation = ((outputs - mean).nan_to_num().square().sum(0) / counts).sqrt()
    deviation[deviation == 0] = 1  # of a constant
    targets = ((outputs - mean) / deviation).nan_to_num().float()

    def build() -> NumberRegressor:
        return NumberRegressor(images.shape[1], fields, mean, deviation).to(device)

    def loss(network: NumberRegressor, rows: Tensor, generator: torch.Generator) -> Tensor:
        predicted = network(move(images[rows], generator).to(device))
        errors = (predicted - targets[rows].to(device)).square() * known[rows].to(device)
        return errors.sum() / known[rows].sum().clamp(min=1).to(device)

    return fit(build, loss, len(images), RECIPE, seed, advance)


def move(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves a batch of images (B, C, H, W) by whole pixels, all alike; float32, the border is repeated."""
    H, W = images.shape[-2:]
    down, right = int(SHIFT * H), int(SHIFT * W)
    padded = F.pad(images.float(), (right, right, down, down), mode="replicate")
    top, left = (int(torch.randint(2 * most + 1, (), generator=generator)) for most in (down, right))
    return padded[..., top : top + H, left : left + W]


def on_line(values: Tensor, field: NumberField) -> Tensor:
    """Returns values (N,) of a field where differences are lengths: (N, 1), or (N, 2) on a circle if it is cyclic."""
    if not field.cyclic:
        return values.double().unsqueeze(1)
    angle = 2 * math.pi * (values.double() - field.low) / (field.high - field.low)
    return torch.stack([angle.cos(), angle.sin()], 1)


def to_outputs(numbers: Numbers, fields: Fields) -> Tensor:
    """Returns what a regressor predicts of images with these numbers: (N, K) float64, NaN where they are missing."""
    return torch.cat([on_line(numbers[name], field) for name, field in fields.items()], 1)


def from_outputs(outputs: Tensor, fields: Fields) -> Numbers:
    """Returns the numbers of outputs (N, K); those of a cyclic field are in [low, high)."""
    numbers, column = {}, 0
    for name, field in fields.items():
        if field.cyclic:
            turns = torch.atan2(outputs[:, column + 1], outputs[:, column]) / (2 * math.pi)
            numbers[name] = field.low + (field.high - field.low) * torch.remainder(turns, 1)
        else:
            numbers[name] = outputs[:, column]
        column += 2 if field.cyclic else 1
    return numbers


class Agreement(NamedTuple):
    """How well measured numbers agree with those given. None: there are too few images, or all are given the same."""

    n: int  # images of which both are known
    r2: float | None  # 1: equal; 0: no better than the mean of those given for all
    error: float | None  # mean absolute error, in the unit of the field


def compare_numbers(given: Tensor, measured: Tensor, field: NumberField) -> Agreement:
    """Compares numbers (N,) of a field; of a cyclic one, differences are the shorter way round.

    R2 is 1 - sum |g - m|² / sum |g - mean g|²; of a cyclic field g and m are points of a circle.
    """
    known = ~(given.isnan() | measured.isnan())
    given, measured = given[known].double(), measured[known].double()
    if not len(given):
        return Agreement(0, None, None)
    difference, g, m = measured - given, on_line(given, field), on_line(measured, field)
    if field.cyclic:
        period = field.high - field.low
        difference = torch.remainder(difference + period / 2, period) - period / 2
    spread = (g - g.mean(0)).square().sum().item()
    r2 = 1 - (g - m).square().sum().item() / spread if given.unique().numel() > 1 else None
    return Agreement(len(given), r2, difference.abs().mean().item())


class Spread(NamedTuple):
    """Mean and standard deviation of numbers; None if there are none."""

    mean: float | None
    deviation: float | None


def spread_of(values: Tensor, field: NumberField) -> Spread:
    """Returns the spread of those of the values (N,) of a field that are known.

    Of a cyclic field it is the direction of the mean on the circle and, of its length R, sqrt(-2 ln R), the standard
    deviation of a wrapped normal distribution (Mardia & Jupp 2000, section 2.3).
    """
    values = values[~values.isnan()].double()
    if not len(values):
        return Spread(None, None)
    if not field.cyclic:
        return Spread(values.mean().item(), values.std(correction=0).item())
    centre = on_line(values, field).mean(0, keepdim=True)
    length = min(max(centre.norm().item(), 1e-16), 1.0)  # of values all around the circle, rounding leaves 0
    deviation = math.sqrt(-2 * math.log(length)) * (field.high - field.low) / (2 * math.pi)
    return Spread(from_outputs(centre, {"mean": field})["mean"].item(), deviation)


class Line(NamedTuple):
    """A linear function of a quantity that is computed from pixels: the number in the unit of its field."""

    slope: float
    offset: float

    def __call__(self, quantity: Tensor) -> Tensor:
        """Maps quantities (N,) to numbers (N,)."""
        return self.slope * quantity + self.offset


def fit_line(quantity: Tensor, numbers: Tensor) -> Line:
    """Fits numbers (N,) as a linear function of a quantity (N,) by least squares, over the images with both.

    It changes the unit, such as pixels of the original images to those of a model. ValueError: the quantity is the same
    in all of them.
    """
    known = ~(quantity.isnan() | numbers.isnan())
    x, y = quantity[known].double(), numbers[known].double()
    if x.unique().numel() < 2:
        raise ValueError("got one value in all training images, wanted a quantity that differs between them")
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return Line(slope.item(), (y.mean() - slope * x.mean()).item())
