"""Autoregression on VQGAN codes: a causal transformer that draws them one after the other, in raster order."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.absorbing import forgotten
from diffusion.absorbing_solvers import tempered
from diffusion.autoregressive import Autoregression
from diffusion.denoisers import guided
from diffusion.rng import Streams
from diffusion.solvers import solver
from diffusion.types import Bound, Denoiser, Loss, OnStep
from models.conditioning import Condition
from models.kv_cache import Memory
from train.config import SamplingConfig
from train.data.loading import Draws
from train.samplers._conditions import draw_drops, fields_by_condition, make_encoders, raw_conditions
from train.samplers._transformer import TransformerConfig, make_network
from train.spaces import Start

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Autoregression: a transformer that predicts each code from those before it."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention != "full":
            raise ValueError(
                f"got attention {self.attention} for autoregressive, whose codes see all before them and none of the "
                "others in a neighbourhood: pass --attention full"
            )
        if self.position == "bias":
            raise ValueError(
                "got position bias for autoregressive, which is sampled code by code, where a bias is made for whole "
                "maps: pass --position rope, learned or none"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "raster"
    """raster: row by row, one network call per code."""
    sample_steps: int | None = None
    """The number of codes, which may be left out."""
    temp: float = 1.0
    """Temperature that logits are divided by."""
    last_temp: float | None = None
    """Temperature at the end, where it changes on the way."""
    top_k: int | None = None
    """Draw from the k likeliest codes alone."""
    top_p: float | None = None
    """Draw from the fewest codes whose probabilities add up to this."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance grows from the first code to the last."""


class AutoregressiveSampler:
    """Network and process of a model of `codes` codes on a grid (h, w), one after the other, with `n_classes` or 0."""

    unit = "bits per code"
    likelihood = "exact"

    def __init__(self, config: Any, *, codes: int, grid: tuple[int, int], n_classes: int):
        self.config, self.grid = config, tuple(grid)
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = Autoregression(codes)
        self.extras = {}
        encoders = make_encoders(config, config.bert_n_emb, self.n_classes)
        self.network = make_network(config, codes=codes, grid=grid, encoders=encoders, causal=True)
        self.field_of = fields_by_condition(encoders)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""
        return tuple(self.field_of.values())

    def loss(self, network: nn.Module, batch: dict[str, Tensor], draw: Draws) -> Loss:
        """The loss of {"codes": (B, h, w), and the fields of its conditions}; `draw(purpose)` gives random streams.

        No code is hidden but by its place: what is seen is what is learned, and t is 0 for all.
        """
        x0, raw = batch["codes"], raw_conditions(self.field_of, batch)
        logits = network(x0, raw, drop=draw_drops(self.config, raw, draw, len(x0)))
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

        `batch` holds the fields of its conditions, or none: all null.
        `start` holds known codes, see train/spaces.py.
        """
        if tuple(shape or self.grid) != self.grid or window_stride is not None:
            raise ValueError(
                f"an autoregressive sampler draws grids of {self.grid} codes and no larger canvases: "
                "pass --sampler absorbing"
            )
        x = torch.full((len(rng), *self.grid), self.process.mask, device=rng.device)
        if start is not None:
            x = torch.where(start.keep, start.x0, forgotten(start.x0, start.t, self.process.mask, rng))
        denoise = self.denoiser(network, batch, options, x)
        temperature = {"last": options.last_temp, "top_k": options.top_k, "top_p": options.top_p}
        denoise = tempered(denoise, options.temp, **temperature)
        solve = solver(self.process, options.solver)
        return solve(denoise, self.process, x, steps=options.sample_steps, rng=rng, on_step=on_step)

    def denoiser(self, network: nn.Module, batch: dict[str, Tensor] | None, options: Any, x: Tensor) -> Denoiser:
        """What the network says of the next code of grids like x (B, *grid), guided, for one run of a solver.

        It remembers what it has read. A condition is the number of a sequence: that of example i under its own
        condition is i, under the null B + i.
        """
        raw = raw_conditions(self.field_of, batch) if batch else {}
        if options.guidance != 1 and not raw:
            raise ValueError(f"got guidance {options.guidance} for samples without a condition: pass --guidance 1")
        null = network.encode({}, x)
        conditions = Condition.cat([network.encode(raw, x) if raw else null, null])
        sequences, memory = torch.arange(len(x), device=x.device), Memory(self.grid)

        def denoise(x: Tensor, t: Tensor, of: Tensor) -> Tensor:  # the network is told no time
            return network(x, conditions[of], memory.keep(of))

        schedule = options.guidance_schedule
        return guided(denoise, sequences, len(x) + sequences, options.guidance, schedule=schedule)

    def log_likelihood(
        self, network: nn.Module, batch: dict[str, Tensor], rng: Streams, calls: int | None = None
    ) -> Bound:
        """-log2 p of {"codes": (B, h, w)}: exact, in one network call whatever `calls` says."""
        with torch.no_grad():
            logits = network(batch["codes"], raw_conditions(self.field_of, batch))
            return self.process.likelihood(logits, batch["codes"])


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
    """The contract of train/samplers: a file's `build` gives network, `loss` and `sample`."""
    return AutoregressiveSampler(config, codes=codes, grid=grid, n_classes=n_classes)
