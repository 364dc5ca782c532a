"""How a causal transformer and codes meet: what train/samplers/autoregressive.py builds from its config."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusion.absorbing import forgotten
from diffusion.autoregressive import Autoregression, OnStep
from diffusion.guidance import Denoiser, guided
from diffusion.likelihood import Bound
from diffusion.loss import Loss
from diffusion.rng import Streams
from diffusion.solvers import solver
from diffusion.tempering import tempered
from models.memory import Memory
from train.data import Draws
from train.start import Start
from train.transformer_config import make_network


class AutoregressiveSampler:
    """Network and process of a model of `codes` codes on a grid (h, w), one after the other, with `n_classes` or 0."""

    unit = "bits per code"
    likelihood = "exact"

    def __init__(self, config: Any, *, codes: int, grid: tuple[int, int], n_classes: int):
        self.config, self.grid = config, tuple(grid)
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = Autoregression(codes)
        self.extras = {}
        self.network = make_network(config, codes=codes, grid=grid, n_classes=self.n_classes, causal=True)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""
        return ("label",) if self.n_classes else ()

    def loss(self, network: nn.Module, batch: dict[str, Tensor], draw: Draws) -> Loss:
        """The loss of {"codes": (B, h, w), "label": (B,)}; `draw(purpose)` gives the batch's random streams.

        No code is hidden but by its place: what is seen is what is learned, and t is 0 for all.
        """
        x0, labels = batch["codes"], None
        if self.n_classes:
            dropped = draw("label").uniform((len(x0),)) < self.config.label_drop
            labels = batch["label"].masked_fill(dropped, self.n_classes)
        logits = network(x0, labels)
        loss = self.process.loss(logits, x0)
        t = torch.zeros(len(x0), device=x0.device)
        seen = {"x0": x0, "x_t": x0, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: dict[str, Tensor]) -> Tensor:
        """The codes found likeliest in training, each given the true ones before it."""
        return outputs["prediction"].argmax(-1)

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """There are no times."""

    def noise_level(self, t: Tensor) -> Tensor:
        """There is no noise: 0 (B,)."""
        return torch.zeros_like(t)

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        batch: dict[str, Tensor] | None = None,
        options: Any,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        start: Start | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Codes (B, *grid) for the B streams of `rng`, by `options`. ValueError for another shape, or windows.

        `batch` holds "label" (B,) int64 in [0, n_classes) where there are classes; without it, the null class.
        `start` holds known codes, see train/start.py.
        """
        if tuple(shape or self.grid) != self.grid or window_stride is not None:
            raise ValueError(
                f"an autoregressive sampler draws grids of {self.grid} codes and no larger canvases: "
                "pass --sampler absorbing"
            )
        x = torch.full((len(rng), *self.grid), self.process.mask, device=rng.device)
        if start is not None:
            x = torch.where(start.keep, start.x0, forgotten(start.x0, start.t, self.process.mask, rng))
        denoise = self.denoiser(network, batch, options, rng)
        temperature = {"last": options.last_temp, "top_k": options.top_k, "top_p": options.top_p}
        denoise = tempered(denoise, options.temp, **temperature)
        solve = solver(self.process, options.solver)
        return solve(denoise, self.process, x, steps=options.sample_steps, rng=rng, on_step=on_step)

    def denoiser(self, network: nn.Module, batch: dict[str, Tensor] | None, options: Any, rng: Streams) -> Denoiser:
        """What the network says of the next code, guided, for one run of a solver over the B streams.

        It remembers what it has read. A condition is a label and the number of a sequence: that of example i under its
        own class is i, under the null class B + i.
        """
        labels = batch.get("label") if batch is not None and self.n_classes else None
        if options.guidance != 1 and labels is None:
            raise ValueError(f"got guidance {options.guidance} for samples without a class: pass --guidance 1")
        null = torch.full((len(rng),), self.n_classes, device=rng.device)
        sequences, memory = torch.arange(len(rng), device=rng.device), Memory(self.grid)

        def denoise(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:  # the network is told no time
            told, of = condition.unbind(1)
            return network(x, told if self.n_classes else None, memory.keep(of))

        strong = torch.stack([null if labels is None else labels, sequences], 1)
        weak = torch.stack([null, len(rng) + sequences], 1)
        return guided(denoise, strong, weak, options.guidance, schedule=options.guidance_schedule)

    def log_likelihood(
        self, network: nn.Module, batch: dict[str, Tensor], rng: Streams, calls: int | None = None
    ) -> Bound:
        """-log2 p of {"codes": (B, h, w)}: exact, in one network call whatever `calls` says."""
        labels = batch["label"] if self.n_classes else None
        with torch.no_grad():
            return self.process.likelihood(network(batch["codes"], labels), batch["codes"])
