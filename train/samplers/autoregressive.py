"""Autoregression on VQGAN codes: a causal transformer that draws them one after the other, in raster order."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion.autoregressive import Autoregression
from diffusion.denoisers import guided
from diffusion.rng import Streams
from diffusion.solvers import solver_options_for
from diffusion.types import Bound, Denoiser, Loss
from models.kv_cache import KVCache
from train.data.loading import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers import Control
from train.samplers._codes import CodeSampler, CodeSampling
from train.samplers._conditions import draw_drops, make_encoders, raw_conditions
from train.samplers._transformer import TransformerConfig, make_network

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
class Sampling(*solver_options_for(Autoregression), CodeSampling):
    """Sampling."""

    solver: str = "raster"
    """raster: row by row, one network call per code."""
    sample_steps: int | None = None
    """The number of codes, which may be left out."""


class AutoregressiveSampler(CodeSampler):
    """Network and process of a model of `codes` codes on a grid (h, w), one after the other, with `n_classes` or 0."""

    likelihood = "exact"

    def __init__(self, config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
        n_classes = n_classes if config.class_conditional else 0
        encoders = make_encoders(config, config.bert_n_emb, n_classes)
        network = make_network(config, codes=codes, grid=grid, encoders=encoders, causal=True)
        super().__init__(config, Autoregression(codes), network, grid=grid, n_classes=n_classes)

    def loss(
        self, network: nn.Module, batch: Batch, streams: TrainingStreams, *, control: Control | None = None
    ) -> Loss:
        """The loss of {"codes": (B, h, w)} and the fields of its conditions.

        No code is hidden but by its place: what is seen is what is learned, and t is 0 for all.
        """
        refuse_control(control)
        x0 = batch["codes"]
        t = torch.zeros(len(x0), device=x0.device)
        raw = raw_conditions(self.fields_of, batch)
        logits = self.predict(network, x0, t, raw, drop=draw_drops(self.config, raw, streams, len(x0)))
        loss = self.process.loss(logits, x0, loss_weight=batch.get("loss_weight"))
        seen = {"x0": x0, "x_t": x0, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """The codes found likeliest in training, each given the true ones before it."""
        return outputs["prediction"].argmax(-1)

    def noise_level(self, t: Tensor) -> Tensor:
        """There is no noise: 0 (B,)."""
        return torch.zeros_like(t)

    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        if shape != self.grid or window_stride is not None:
            raise ValueError(
                f"an autoregressive sampler draws grids of {self.grid} codes and no larger canvases: "
                "pass --sampler absorbing"
            )
        return False

    def make_denoiser(
        self, network: nn.Module, batch: Batch | None, options: Sampling, x: Tensor, control: Control | None = None
    ) -> Denoiser:
        """What the network says of the next code, guided. It remembers what it has read.

        A sequence has the number of its row of the conditions: that of example i is i under the weakest.
        """
        refuse_control(control)
        conditions, kv_cache = self.guidance_chain(network, batch, options, x), KVCache(self.grid)
        sequences = torch.arange(2 * len(x), device=x.device)

        def denoise(x: Tensor, t: Tensor, of: Tensor) -> Tensor:
            return self.predict(network, x, t, conditions[of], kv_cache=kv_cache.keep_rows(of))

        return guided(denoise, sequences.chunk(2), [options.guidance], schedule=options.guidance_schedule)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """-log2 p of {"codes": (B, h, w)}: exact, in one network call whatever `nfe` says."""
        x0 = batch["codes"]
        with torch.no_grad():
            t = torch.zeros(len(x0), device=x0.device)
            logits = self.predict(network, x0, t, raw_conditions(self.fields_of, batch))
        return self.process.likelihood(logits, x0)


def refuse_control(control: Control | None) -> None:
    """ValueError for a branch: in training it would be given the very codes that are to be predicted."""
    if control is not None:
        raise ValueError("got a control branch for autoregressive, which would see the codes to predict: use absorbing")


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int) -> AutoregressiveSampler:
    return AutoregressiveSampler(config, codes=codes, grid=grid, n_classes=n_classes)
