"""A ddpm sampler with a network that records its calls."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from train.data.streams import TrainingStreams
from train.samplers import ddpm

SHAPE, CLASSES = (1, 4, 4), 5
SMALL = {"channels": 8, "channel_mults": (1, 2), "res_blocks": 1, "attn_factors": (2,), "heads": 1, "total_steps": 20}
CPU = torch.device("cpu")


class Call(NamedTuple):
    x: Tensor
    t: Tensor
    condition: Any
    drop: Any


class EncodedLabels(dict):
    """The fields passed to `encode`, as "fields"; `rows` are the labels of all examples, None for a null."""

    def __init__(self, rows: list[int | None], **fields: Any):
        super().__init__(fields=fields)
        self.rows = rows

    @classmethod
    def cat(cls, conditions: "list[EncodedLabels]") -> "EncodedLabels":
        return cls([label for condition in conditions for label in condition.rows])

    def scaled(self, x: Tensor, numbers: dict[bool, float]) -> Tensor:
        """x (B or 1, ...) times a number per example that depends on whether it has a label."""
        return x * torch.tensor([numbers[label is not None] for label in self.rows]).view(-1, 1, 1, 1)


class Recorder(nn.Module):
    """Records its calls and returns `output`: a number, a tensor, or a function of the call."""

    def __init__(self, output=0.0, channels: int = 1):
        super().__init__()
        self.output, self.channels, self.calls = output, channels, []

    def encode(self, fields, x, drop=None):
        labels = fields["label"].tolist() if "label" in fields else [None] * len(x)
        return EncodedLabels(labels, **fields)

    def forward(self, x, t, condition=None, drop=None):
        self.calls.append(Call(x.clone(), t.clone(), condition, drop))
        output = self.output(self.calls[-1]) if callable(self.output) else self.output
        if isinstance(output, Tensor):
            return output
        return torch.full((len(x), self.channels, *x.shape[2:]), float(output))


def sampler(n_classes: int = CLASSES, pixels: bool = True, **settings):
    torch.manual_seed(0)
    return ddpm.build(ddpm.Config(**SMALL | settings), shape=SHAPE, pixels=pixels, n_classes=n_classes)


def perturb(built):
    """Perturbs the network, which initially returns 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in built.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built, built.network.eval()


def images(n: int, first: int = 0) -> dict[str, Tensor]:
    """A batch of n positions; an image is a function of its position."""
    positions = range(first, first + n)
    x0 = Streams([seed_of("image", i) for i in positions]).uniform((n, *SHAPE)) * 2 - 1
    return {"x0": x0, "label": torch.tensor(positions) % CLASSES, "position": torch.tensor(positions)}


def draws(batch, seed: int = 0, batch_size: int | None = None):
    return TrainingStreams(seed, batch, batch_size or len(batch["position"]), CPU)


def record_loss(built, n=40, training=True, output=0.0, batch=None):
    """The loss with a recording network, and the network's only call."""
    channels = 2 if built.process.variance == "learned_range" else 1
    recorder, batch = Recorder(output, channels).train(training), batch or images(n)
    loss = built.loss(recorder, batch, draws(batch))
    (call,) = recorder.calls
    return loss, call


def sample_recorded(built, recorder, labels=(2, 2), seeds=(0, 1), seen=None, **options):
    """Samples; (t, predicted x0) of each step are appended to `seen`."""

    def on_step(i, t, s, x, predicted):
        if seen is not None:
            seen.append((t, predicted.clone()))
        return x

    batch = {"label": torch.tensor(labels)}
    options = ddpm.Sampling(**options)
    return built.sample(recorder, Streams(list(seeds)), batch=batch, options=options, on_step=on_step)
