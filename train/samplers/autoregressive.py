"""Autoregressive model of VQGAN codes: a causal transformer that samples them in raster order."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from diffusion.autoregressive import Autoregression
from diffusion.denoisers import LastResult, guided
from diffusion.rng import Streams
from diffusion.solvers import solver_options_for
from diffusion.types import Bound, Denoiser, Loss
from models.attention_recorder import MapRecorder
from models.kv_cache import KVCache
from train.data.streams import TrainingStreams
from train.loop import Batch, Outputs
from train.samplers._codes import CodeSampler, CodeSampling, Windows
from train.samplers._conditions import draw_drops, make_encoders, raw_conditions
from train.samplers._foreground import foreground_loss
from train.samplers._guidance import check_nulls
from train.samplers._transformer import TransformerConfig, make_network

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(TransformerConfig):
    """Autoregressive model: a transformer that predicts each code from those before it."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention != "full":
            raise ValueError(
                f"got attention {self.attention} for autoregressive, whose codes attend to all codes before them: "
                "pass --attention full"
            )
        if self.position == "bias":
            raise ValueError(
                "got position bias for autoregressive, which is sampled code by code, but the bias is for whole grids: "
                "pass --position rope, learned or none"
            )


@dataclass(frozen=True, kw_only=True)
class Sampling(*solver_options_for(Autoregression), CodeSampling):
    """Sampling."""

    solver: str = "raster"
    """raster: row by row, one network call per code."""
    sample_steps: int | None = None
    """Must be the number of codes; may be left out."""


class AutoregressiveSampler(CodeSampler):
    """Autoregressive model of `codes` codes on a grid (h, w), with `n_classes` classes or 0."""

    likelihood = "exact"

    def __init__(self, config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
        n_classes = n_classes if config.class_conditional else 0
        encoders = make_encoders(config, config.bert_n_emb, n_classes)
        network = make_network(config, codes=codes, grid=grid, encoders=encoders, causal=True)
        super().__init__(config, Autoregression(codes), network, grid=grid, n_classes=n_classes)

    def loss(self, network: nn.Module, batch: Batch, streams: TrainingStreams) -> Loss:
        """Returns the loss of a batch {"codes": (B, h, w)} with the fields of the conditions.

        Codes are not corrupted: x_t is x0, and t is 0.
        """
        x0 = batch["codes"]
        t = torch.zeros(len(x0), device=x0.device)
        raw = raw_conditions(self.fields_of, batch, self.optional_of)
        logits = self.predict(
            network, x0, t, raw, drop=draw_drops(self.config, self.network.encoders, streams, len(x0))
        )
        loss_of = partial(self.process.loss, logits, x0)
        loss = foreground_loss(self.config, loss_of, batch, x0.shape[-2:], network.training)
        outputs = {"x0": x0, "x_t": x0, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in outputs.items()})

    def x0_hat(self, outputs: Outputs) -> Tensor:
        """Returns the most likely codes in training, each given the true codes before it."""
        return outputs["prediction"].argmax(-1)

    def noise_level(self, t: Tensor) -> Tensor:
        """Returns 0 (B,): there is no noise."""
        return torch.zeros_like(t)

    def needs_windows(self, shape: tuple[int, int], window_stride: int | None) -> bool:
        if shape != self.grid or window_stride is not None:
            raise ValueError(
                f"an autoregressive sampler samples grids of {self.grid} codes only, no other canvases: "
                "pass --sampler absorbing"
            )
        return False

    def make_denoiser(
        self,
        network: nn.Module,
        batch: Batch | None,
        options: Sampling,
        x: Tensor,
        windows: Windows = (),
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the guided denoiser of the next code, with a KV cache.

        A sequence is identified by its row of the C B conditions: example i is row i under the null, B + i under the
        next condition of the chain.
        """
        if recorder is not None:
            got = "got attention maps of an autoregressive sampler, each of whose calls sees one code"
            raise ValueError(f"{got}: pass --sampler absorbing")
        chain, kv_cache = self.guidance_chain(batch, options, negative), KVCache(self.grid)
        conditions, count = self.encode_chain(network, chain, x, options), len(chain.raw)
        sequences, select = torch.arange(count * len(x), device=x.device), LastResult(lambda rows: conditions[rows])

        def denoise(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return self.predict(network, x, t, select(rows), kv_cache=kv_cache.keep_rows(rows))

        return guided(denoise, sequences.chunk(count), chain.scales, schedule=options.guidance_schedule)

    def log_likelihood(self, network: nn.Module, batch: Batch, rng: Streams, nfe: int | None = None) -> Bound:
        """Returns the exact -log2 p of {"codes": (B, h, w)}, in one network call whatever `nfe` is."""
        check_nulls(self.config, self.conditions, batch, self.n_classes)
        x0 = batch["codes"]
        with torch.no_grad():
            t = torch.zeros(len(x0), device=x0.device)
            logits = self.predict(network, x0, t, raw_conditions(self.fields_of, batch, self.optional_of))
        return self.process.likelihood(logits, x0)


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int) -> AutoregressiveSampler:
    return AutoregressiveSampler(config, codes=codes, grid=grid, n_classes=n_classes)
