"""Absorbing diffusion on VQGAN codes: the transformer, the process, and how they meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from train.config import SamplerConfig, SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from diffusion.absorbing import Loss, OnStep
    from diffusion.likelihood import Bound
    from diffusion.rng import Streams

SPACE = "codes"


@dataclass(frozen=True, kw_only=True)
class Config(SamplerConfig):
    """Absorbing diffusion: a transformer that predicts masked codes."""

    bert_n_emb: int = 512
    """Width of the transformer."""
    bert_n_head: int = 8
    """Attention heads."""
    bert_n_layers: int = 24
    """Blocks."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layers, relative to the transformer's."""
    attention: Literal["full", "neighborhood"] = "full"
    """Whether a code sees all others, or those of its neighbourhood."""
    kernel_sizes: tuple[int, ...] = (7,)
    """Neighbourhood attention: codes seen along each side (odd), one number per group of heads or one for all."""
    dilations: tuple[int, ...] = (1,)
    """Neighbourhood attention: distance between the codes seen, one number per group of heads or one for all."""
    na_backend: Literal["auto", "dense", "tiled", "natten"] = "auto"
    """Neighbourhood attention: what computes it; all mean the same."""
    attention_type: Literal["softmax", "diff_v1", "diff_v2"] = "softmax"
    """Softmax or differential attention; diff_v1 pairs the heads, diff_v2 gives each a second query."""
    position: Literal["learned", "rope", "bias", "none"] = "learned"
    """How codes know their places: all but learned also serve canvases larger than the grid."""
    attn_pdrop: float = 0.0
    """Dropout of attention weights."""
    embd_pdrop: float = 0.0
    """Dropout of embeddings."""
    resid_pdrop: float = 0.0
    """Dropout of each block's outputs."""
    loss_type: Literal["reweighted_elbo", "elbo", "mlm"] = "reweighted_elbo"
    """What is minimised; the ELBO in bits per code is logged whatever is chosen."""
    mask_schedule: Literal["random", "fixed"] = "random"
    """random: each code is masked with probability t; fixed: exactly round(t N) codes are."""
    total_steps: int = 256
    """Time steps T of the process: t is uniform over {1/T, ..., 1}."""
    class_conditional: bool = True
    """Condition on the class where the data have labels."""
    label_drop: float = 0.1
    """Share of training labels replaced by the null class, for guidance."""

    def __post_init__(self):
        if min(self.bert_n_emb, self.bert_n_head, len(self.kernel_sizes), len(self.dilations)) < 1:
            sizes = f"bert_n_emb {self.bert_n_emb}, bert_n_head {self.bert_n_head}"
            raise ValueError(f"got {sizes}, {self.kernel_sizes=}, {self.dilations=}: wanted at least 1 of each")
        if self.bert_n_emb % self.bert_n_head:
            raise ValueError(
                f"got bert_n_emb {self.bert_n_emb} and bert_n_head {self.bert_n_head}: the heads must divide it"
            )
        if self.total_steps < 1 or self.bert_n_layers < 1:
            raise ValueError(
                f"got total_steps {self.total_steps}, bert_n_layers {self.bert_n_layers}: wanted at least 1"
            )
        if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernel_sizes) or min(self.dilations) < 1:
            sizes = f"kernel_sizes {self.kernel_sizes}, dilations {self.dilations}"
            raise ValueError(f"got {sizes}: wanted odd kernels, and dilations of at least 1")
        groups = max(len(self.kernel_sizes), len(self.dilations))
        if {len(self.kernel_sizes), len(self.dilations)} - {1, groups} or groups > self.bert_n_head:
            sizes = f"{len(self.kernel_sizes)} kernel_sizes, {len(self.dilations)} dilations, {self.bert_n_head} heads"
            raise ValueError(f"got {sizes}: wanted as many of both, or one for all, and a head for each")
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "label_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingConfig):
    """Sampling."""

    solver: str = "ancestral"
    """ancestral, or one_by_one: one code per step."""
    sample_steps: int | None = None
    """Network calls per image; left out, the steps of the process, but for one_by_one one per code."""
    temp: float = 1.0
    """Temperature that logits are divided by."""


class AbsorbingSampler:
    """Network and process of one absorbing model over `codes` codes on a grid (h, w), with `n_classes` classes or 0."""

    unit = "bits per code"

    def __init__(self, config: Config, *, codes: int, grid: tuple[int, int], n_classes: int):
        from diffusion.absorbing import AbsorbingDiffusion
        from models.transformer import AttentionConfig, Transformer

        self.config, self.grid = config, grid
        self.n_classes = n_classes if config.class_conditional else 0
        self.process = AbsorbingDiffusion(codes, config.total_steps)
        self.extras = {}
        self.network = Transformer(
            codes=codes,
            grid=grid,
            width=config.bert_n_emb,
            heads=config.bert_n_head,
            layers=config.bert_n_layers,
            n_classes=self.n_classes,
            mlp_ratio=config.mlp_ratio,
            attention=AttentionConfig(
                attention=config.attention,
                attention_type=config.attention_type,
                position=config.position,
                kernel_sizes=config.kernel_sizes,
                dilations=config.dilations,
                na_backend=config.na_backend,
                dropout=config.attn_pdrop,
            ),
            embd_dropout=config.embd_pdrop,
            resid_dropout=config.resid_pdrop,
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch that the network is conditioned on."""
        return ("label",) if self.n_classes else ()

    def loss(self, network: nn.Module, batch: dict[str, Tensor], draw: Callable[[str], Streams]) -> Loss:
        """The loss of {"codes": (B, h, w), "label": (B,)}; `draw(purpose)` gives the batch's random streams."""
        x0, t = batch["codes"], self.process.times(draw("time"))
        corrupt = self.process.corrupt if self.config.mask_schedule == "random" else self.process.corrupt_fixed
        x_t = corrupt(x0, t, draw("mask"))
        labels = None
        if self.n_classes:
            dropped = draw("label").uniform((len(x0),)) < self.config.label_drop
            labels = batch["label"].masked_fill(dropped, self.n_classes)
        logits = network(x_t, labels)
        loss = self.process.loss(logits, x0, x_t, t, self.config.loss_type)
        seen = {"x0": x0, "x_t": x_t, "t": t, "prediction": logits, "loss": loss.per_example}
        return loss._replace(outputs={name: value.detach() for name, value in seen.items()})

    def x0_hat(self, outputs: dict[str, Tensor]) -> Tensor:
        """The codes that a prediction in training found likeliest; those that were not masked stay."""
        import torch

        said = outputs["prediction"].argmax(-1)
        return torch.where(outputs["x_t"] == self.process.mask, said, outputs["x_t"])

    def observe(self, t: Tensor, losses: Tensor) -> None:
        """Times do not depend on losses."""

    def noise_level(self, t: Tensor) -> Tensor:
        """The share of codes that is masked at t (B,), on average."""
        return t

    def sample(
        self,
        network: nn.Module,
        rng: Streams,
        *,
        batch: dict[str, Tensor] | None = None,
        options: Sampling,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Codes (B, *shape) for the B streams of `rng`, by `options`.

        A shape that is not the grid is sampled natively, one pass a step, where positions are relative; else, or with a
        `window_stride`, by windows of the grid (half a grid apart, if left out).
        `batch` holds "label" (B,) int64 in [0, n_classes) where there are classes; None is the null class.
        """
        import torch

        from diffusion.guidance import guided
        from diffusion.solvers import solver
        from diffusion.windows import windowed

        solve = solver(self.process, options.solver)
        labels = batch["label"] if batch is not None and self.n_classes else None
        if options.guidance != 1 and labels is None:
            raise ValueError(f"got guidance {options.guidance} for a model without classes: pass --guidance 1")
        shape = shape or self.grid

        def denoise(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            return network(x, None if condition is None else condition.repeat(len(x) // len(condition)))

        conditional = guided(denoise, labels, None, options.guidance)
        native = shape == self.grid or (self.config.position != "learned" and window_stride is None)
        stride = max(1, min(self.grid) // 2) if window_stride is None else window_stride
        canvas = conditional if native else windowed(conditional, self.grid, stride)
        x = torch.full((len(rng), *shape), self.process.mask, device=rng.device)
        settings = {"steps": options.sample_steps, "temperature": options.temp}
        return solve(canvas, self.process, x, rng=rng, on_step=on_step, **settings)

    def log_likelihood(
        self, network: nn.Module, batch: dict[str, Tensor], rng: Streams, calls: int | None = None
    ) -> Bound:
        """-log2 p of {"codes": (B, h, w)}, by the variational bound in `calls` network calls per image, or all T."""
        from diffusion.likelihood import bits_per_code

        labels = batch["label"] if self.n_classes else None
        return bits_per_code(lambda x, t: network(x, labels), self.process, batch["codes"], rng, calls)


def build(config: Config, *, codes: int, grid: tuple[int, int], n_classes: int) -> AbsorbingSampler:
    """The contract of train/samplers: a file's `build` gives network, `loss` and `sample`."""
    return AbsorbingSampler(config, codes=codes, grid=grid, n_classes=n_classes)
