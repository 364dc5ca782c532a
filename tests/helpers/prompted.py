"""Tiny models with random weights that read prompts, as those of test_prompt_inputs.py."""

from pathlib import Path

import torch
from torch import Tensor, nn

from models.conditioning import Condition, ConditionConfig
from models.conditions import metadata, text
from train.cli.plugins import merge_configs
from train.config import DataConfig, SamplingConfig
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.samplers import absorbing, ddpm
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

MODULES = {"ddpm": ddpm, "absorbing": absorbing}
UNET = {
    "channels": 8,
    "channel_mults": (1,),
    "res_blocks": 1,
    "attn_factors": (1,),
    "heads": 1,
    "total_steps": 20,
    "prediction": "x0",
    "variance": "fixed_small",
}
TRANSFORMER = {"bert_n_emb": 16, "bert_n_head": 2, "bert_n_layers": 1}
TEXT = {"text_width": 16, "text_layers": 1, "text_heads": 2}
CODES, GRID, CLASSES = 9, (4, 4), 3


class CodesAsImages:
    """A space whose images are the codes, in steps of brightness."""

    provenance: dict[str, str] = {}

    def decode(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * 25).to(torch.uint8)

    def preview(self, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(x), self.decode(predicted.argmax(-1))

    def extra_arrays(self, x: Tensor) -> dict[str, Tensor]:
        return {"codes": x}


def read_text(network: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """Adds to what a fresh network predicts something that depends on each token of the text, and on x."""
    condition = next(each for each in args if isinstance(each, Condition))
    tokens = condition.tokens()
    mask = torch.ones(tokens.values.shape[:2]) if tokens.mask is None else tokens.mask.float()
    mean = torch.einsum("bmd,bm->bd", tokens.values, mask) / mask.sum(1, keepdim=True)
    rng = torch.Generator().manual_seed(5)
    if output.shape[1:] == (1, *GRID):
        read = (mean @ torch.randn(mean.shape[1], 1, generator=rng) / 3).tanh()  # (B, 1)
        return output + 0.2 * args[0] + 0.6 * read[..., None, None]
    read = mean @ torch.randn(mean.shape[1], CODES, generator=rng)
    return output + 0.5 * read.view(len(read), *[1] * (output.ndim - 2), CODES)


def make_model(name: str = "ddpm", n_classes: int = 0, words: bool = False, **training: object) -> TrainedSampler:
    """A sampler with random weights, conditioned on captions and perhaps on classes and one field of metadata."""
    torch.manual_seed(0)
    conditions = ("text", "metadata") if words else ("text",)
    options = merge_configs([text.Config, metadata.Config] if words else [text.Config], ConditionConfig)
    fields = {"metadata_values": ("light=day", "light=night", "camera=left")} if words else {}
    settings = {"sampler": name, "conditions": conditions, "condition_options": options(**TEXT, **fields)}
    settings |= training
    data = DataConfig(img_size=4, n_channels=1)
    if name == "ddpm":
        config = ddpm.Config(**UNET, attn_block_type="transformer", **settings)
        sampler = ddpm.build(config, shape=(1, *GRID), pixels=True, n_classes=n_classes)
        space = PixelSpace(data)
    else:
        sampler = absorbing.build(
            absorbing.Config(**TRANSFORMER, **settings), codes=CODES, grid=GRID, n_classes=n_classes
        )
        space = CodesAsImages()
    sampler.network.register_forward_hook(read_text, with_kwargs=True)
    sampler.network.eval().requires_grad_(False)
    frequencies = torch.full((n_classes,), 1 / n_classes, dtype=torch.float64) if n_classes else None
    world = DistContext(torch.device("cpu"))
    run = Path("logs/tiny")
    return TrainedSampler(run, 0, sampler, space, data, DatasetConfig(), frequencies, "w", world, amp=False)


MODELS = {name: make_model(name) for name in MODULES}


def options_of(model: TrainedSampler, **settings: object) -> SamplingConfig:
    return MODULES[model.sampler.config.sampler].Sampling(**{"sample_steps": 2} | settings)


def draw(model: TrainedSampler, prompt: str, seed: int, number: int, negative: str | None = None, **settings) -> Tensor:
    """One image, by itself."""
    away = None if negative is None else {"caption": [negative]}
    conditions = {"caption": [prompt]}
    return model.draw([number], seed, options_of(model, **settings), conditions, negative=away)["image"][0].int()


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of other batches."""
    return (a - b).abs().max() <= 1
