"""Time and memory of Stable Diffusion's UNet beside diffusers' with the same weights: a denoising step, and a training
step with LoRA.

Each network is measured in processes of its own, in turn: ours, diffusers', ours, and so on. All read the same folder.
"""

import importlib.util
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness.report import table, three_digits
from experiments.metrics.cost import bytes_in_use, peak_extra_bytes
from experiments.metrics.speed_results import Row, timing_row
from models.conditioning import ConditionEncoder
from models.lora import LoRAOptions, adapt
from models.ranges import MILLION, SIZE, check_ranges
from models.streams import Tokens
from models.unet import UNet, UNetConfig
from train.converters.sd.files import read_source, write_folder
from train.converters.sd.names import from_layout, to_layout
from train.converters.sd.unet import infer_unet, unet_weights
from train.distributed import DistContext
from train.perf import time_call

PACKAGES = ("diffusers", "peft")
OURS, THEIRS = "ours", "diffusers"
DENOISING, TRAINING = "denoising step", "training step"
LATENT_CHANNELS, TOKENS, TIME = 4, 77, 500.0
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # names of diffusers for the layers that are our group "attention"
GROUPS = 32  # of the group norms
ALLOWED = {"float32": 1e-3, "mixed": 0.1, "bfloat16": 0.1}  # difference of outputs, relative to the largest output
GB = 1e9
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (B, C, H, W), t (B,), tokens (B, M, D) -> as x


@dataclass(frozen=True, kw_only=True)
class PretrainedBenchmarkConfig:
    """Benchmark."""

    weights: str | None = None
    """Folder of diffusers with a UNet; default: random weights in bfloat16, of the shape below."""
    channels: int = 320
    """Channels of the first level, a multiple of 32."""
    channel_mults: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, as multiples of --channels; all levels but the last have attention."""
    res_blocks: int = 2
    """Residual blocks per level of the down path; the up path has one more."""
    heads: int = 8
    """Attention heads."""
    text_width: int = 768
    """Width of the text's tokens."""
    latent_size: int = 64
    """Side of the latents."""
    batch_size: int = 1
    """Latents per step; with guidance a denoising step has two for each image."""
    rank: int = 16
    """Rank of the adapters on queries, keys, values and outputs of attention."""
    precision: Literal["float32", "mixed", "bfloat16"] = "bfloat16"
    """mixed: weights in float32, products in bfloat16 by autocast; bfloat16: frozen weights in bfloat16, too."""
    rounds: int = 3
    """Processes of each network, in turn."""
    repeats: int = 5
    """Timed steps of each kind in a process, after a warm-up."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""

    EVERYDAY = (
        *("weights", "channels", "channel_mults", "res_blocks", "latent_size", "batch_size", "rank", "precision"),
        *("rounds", "repeats", "device"),
    )
    RANGES = {name: UNetConfig.RANGES[name] for name in ("channels", "channel_mults", "res_blocks", "heads")}
    RANGES |= dict.fromkeys(("text_width", "latent_size", "rank"), SIZE)
    RANGES |= dict.fromkeys(("batch_size", "rounds", "repeats"), MILLION)

    def __post_init__(self):
        check_ranges(self)
        if self.channels % GROUPS:
            raise ValueError(f"got channels {self.channels}, wanted a multiple of {GROUPS}: pass --channels {GROUPS}")

    @property
    def unet(self) -> UNetConfig:
        """The architecture of a network of random weights: that of Stable Diffusion 1."""
        return UNetConfig(
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            channels=self.channels,
            channel_mults=self.channel_mults,
            res_blocks=self.res_blocks,
            attn_factors=tuple(2**level for level in range(len(self.channel_mults) - 1)),
            heads=self.heads,
            scale_shift=False,
            attn_block_type="transformer",
            qkv_bias=False,
            transformer_eps=1e-6,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the frozen weights."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


@dataclass
class Measured:
    """What one process measured."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # of each run, by what ran
    peaks: dict[str, int | None] = field(default_factory=dict)  # bytes, weights and all; None: cannot be measured
    parameters: int = 0
    learned: int = 0  # parameters of the adapters
    output: np.ndarray | None = None  # of the network, float32 (B, C, H, W)
    loss: float = 0.0  # of the first training step
    grad_norm: float = 0.0  # of the first training step


def check_packages() -> None:
    """Raises ValueError without the packages to compare with."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"got no {' and no '.join(missing)} to compare with: pip install {' '.join(missing)}")


def measure_pretrained(settings: PretrainedBenchmarkConfig, world: DistContext) -> list[Row]:
    """Measures both networks in turn, each in processes of its own; prints a table.

    ValueError without diffusers and peft, if the outputs differ by more than rounding, and if a process is killed.
    """
    check_packages()
    s, measured = settings, {OURS: [], THEIRS: []}
    with TemporaryDirectory() as temporary:
        folder = write_random_unet(Path(temporary), s) if s.weights is None else Path(s.weights).expanduser()
        if not folder.is_dir():
            raise ValueError(f"got --weights {s.weights}, which is no folder: pass a folder of diffusers")
        for _ in range(s.rounds):
            for name, results in measured.items():
                results.append(in_own_process(name, folder, s, world.device))
    print_conditions(s, measured)
    print(f"\n{table(table_rows(measured))}", flush=True)
    return [
        timing_row(f"pretrained {what}, {name}", sum((each.seconds[what] for each in results), []))
        for name, results in measured.items()
        for what in (DENOISING, TRAINING)
    ]


def print_conditions(settings: PretrainedBenchmarkConfig, measured: dict[str, list[Measured]]) -> None:
    """Prints what was measured; ValueError if the networks computed different things."""
    s, ours, theirs = settings, measured[OURS][0], measured[THEIRS][0]
    difference = float(abs(ours.output - theirs.output).max() / abs(theirs.output).max())
    if (ours.parameters, ours.learned) != (theirs.parameters, theirs.learned) or difference > ALLOWED[s.precision]:
        sizes = " and ".join(f"{each.parameters:,} parameters, {each.learned:,} of LoRA" for each in (ours, theirs))
        raise ValueError(f"got networks of {sizes}, whose outputs differ by {difference:.2g}: wanted equal ones")
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"{versions}; {s.rounds} processes of each in turn, {s.repeats} steps of each kind after a warm-up")
    print(f"{ours.parameters:,} parameters, {s.batch_size} x {s.latent_size}x{s.latent_size} latents, {s.precision}")
    print(f"LoRA of rank {s.rank} on q, k, v and out of attention: {ours.learned:,} parameters in float32, AdamW")
    print(f"largest difference of the outputs, relative to the largest output: {difference:.1e}")
    steps = ", ".join(f"{name} {each.loss:.6g}, {each.grad_norm:.4g}" for name, (each, *_) in measured.items())
    print(f"loss and norm of the gradient at the first training step: {steps}")


def figures_of(measured: Measured) -> dict[str, float | None]:
    """Returns the figures of a process by their names in the table; None where memory cannot be measured."""
    figures = {}
    for what in (DENOISING, TRAINING):
        peak = measured.peaks[what]
        figures[f"{what}, s"] = median(measured.seconds[what])
        figures[f"{what}, peak of memory, GB"] = None if peak is None else peak / GB
    return figures


def table_rows(measured: dict[str, list[Measured]]) -> list[tuple[str, ...]]:
    """Returns the rows of the table: a heading, then medians over processes and the ratios of those of a round."""
    rows = [("", OURS, THEIRS, f"{OURS} / {THEIRS}", "smallest", "largest")]
    ours, theirs = ([figures_of(each) for each in measured[name]] for name in (OURS, THEIRS))
    for name in ours[0]:
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
        if all(None not in pair for pair in pairs):
            ratios = [a / b for a, b in pairs]
            middle = (three_digits(median(side)) for side in zip(*pairs, strict=True))
            rows.append((name, *middle, *(f"{each(ratios):.2f}x" for each in (median, min, max))))
    return rows


def write_random_unet(folder: Path, settings: PretrainedBenchmarkConfig) -> Path:
    """Writes a folder of diffusers with random weights in bfloat16, whose outputs are about as large as inputs."""
    config = settings.unet
    with torch.device("meta"):
        network = UNet(config, {"text": GivenTokens(settings.text_width)})
    rng = torch.Generator().manual_seed(0)
    state = {name: random_weight(name, p.shape, rng) for name, p in network.state_dict().items()}
    attends = [factor in config.attn_factors for factor in config.factors]
    content = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": settings.latent_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "layers_per_block": config.res_blocks,
        "block_out_channels": config.widths,
        "down_block_types": ["CrossAttnDownBlock2D" if attn else "DownBlock2D" for attn in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attn else "UpBlock2D" for attn in reversed(attends)],
        "cross_attention_dim": settings.text_width,
        "attention_head_dim": config.heads,  # the number of heads, in spite of its name
    }
    tensors = to_layout(unet_weights(network, conv_projections=True), state, "folder")
    write_folder(folder, {"unet": tensors}, {"unet": content})
    return folder


def random_weight(name: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Draws a weight in bfloat16: of norms around 1, of other layers with variance 1 / inputs; biases are small."""
    x = torch.randn(shape, generator=rng)
    if len(shape) > 1:
        return (x * x[0].numel() ** -0.5).bfloat16()
    return (0.1 * x + float("norm" in name and name.endswith("weight"))).bfloat16()


class GivenTokens(ConditionEncoder):
    """Stands for a text encoder, whose tokens are given."""

    def __init__(self, width: int):
        super().__init__()
        self.token_width = width

    def forward(self, raw: Tensor, x: Tensor, drop: Tensor | None = None) -> Tokens:
        return Tokens(raw)


class Side(NamedTuple):
    """One of the two networks."""

    network: nn.Module
    token_width: int
    predict: Predict
    add_adapters: Callable[[int], Any]  # of a rank; their change is zero at first


def load_ours(folder: Path, dtype: torch.dtype) -> Side:
    """Loads our network from a folder of diffusers."""
    source = read_source(folder)
    if "unet" not in source.parts:
        raise ValueError(f"{folder} has {', '.join(source.parts)}, wanted a UNet: pass another --weights")
    tensors = source.parts["unet"]
    flags = infer_unet(tensors, source.layout, source.configs.get("unet"))
    width, conv_projections = flags.pop("text_width"), flags.pop("conv_projections")
    with torch.device("meta"):
        network = UNet(UNetConfig(**flags), {"text": GivenTokens(width)})
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    weights = from_layout(unet_weights(network, conv_projections), tensors, source.layout, shapes)
    network.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return Side(
        network,
        width,
        lambda x, t, tokens: network(x, t, {"text": tokens}),
        lambda rank: adapt(network, "lora", LoRAOptions(rank=rank, alpha=rank), ["attention"]),
    )


def load_theirs(folder: Path, dtype: torch.dtype) -> Side:
    """Loads diffusers' network."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    own = folder / "unet" if (folder / "unet").is_dir() else folder
    network = UNet2DConditionModel.from_pretrained(own, torch_dtype=dtype, local_files_only=True)
    return Side(
        network,
        network.config.cross_attention_dim,
        lambda x, t, tokens: network(x, t, tokens).sample,
        lambda rank: network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)),
    )


LOADERS = {OURS: load_ours, THEIRS: load_theirs}


def in_own_process(name: str, folder: Path, settings: PretrainedBenchmarkConfig, device: torch.device) -> Measured:
    """Measures one of the networks in a fresh process; ValueError if it was killed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure_side, name, folder, settings, device.type).result()
        except BrokenProcessPool as error:
            got = f"the process that measured {name} was killed, probably as memory ran out"
            raise ValueError(f"{got}: pass a smaller --batch_size, --channels or --latent_size") from error


def measure_side(name: str, folder: Path, settings: PretrainedBenchmarkConfig, device_name: str) -> Measured:
    """Measures one of the networks in this process."""
    device, side, result = torch.device(device_name), LOADERS[name](folder, settings.dtype), Measured()
    side.network.to(device).eval()
    result.parameters = sum(p.numel() for p in side.network.parameters())
    denoise(side, settings, device, result)
    train(side, settings, device, result)
    return result


def batch_of(side: Side, settings: PretrainedBenchmarkConfig, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns noise (B, C, H, W), times (B,) and tokens (B, M, D), the same for both networks."""
    rng, size = torch.Generator().manual_seed(1), settings.batch_size
    shape = (size, side.network.config.in_channels, settings.latent_size, settings.latent_size)
    x, tokens = (torch.randn(each, generator=rng) for each in (shape, (size, TOKENS, side.token_width)))
    return x.to(device, settings.dtype), torch.full((size,), TIME, device=device), tokens.to(device, settings.dtype)


def autocast(settings: PretrainedBenchmarkConfig, device: torch.device) -> torch.autocast:
    """Returns the autocast of a precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision != "float32")


def denoise(side: Side, settings: PretrainedBenchmarkConfig, device: torch.device, result: Measured) -> None:
    """Measures a call of the network without gradients. Autocast keeps its copies of the weights for all calls."""
    inputs, outputs = batch_of(side, settings, device), []
    with torch.no_grad(), autocast(settings, device):
        time_steps(DENOISING, lambda: outputs.append(side.predict(*inputs)), settings.repeats, device, result)
    result.output = outputs[0].float().cpu().numpy()


def train(side: Side, settings: PretrainedBenchmarkConfig, device: torch.device, result: Measured) -> None:
    """Measures a training step of adapters in float32: forward, backward, clipping, AdamW. Nothing is recomputed."""
    side.network.train().requires_grad_(False)
    side.add_adapters(settings.rank)
    learned = [p for p in side.network.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.float()
        if p.any():  # down, not up, which is zero: the gradients of both networks are the same
            nn.init.constant_(p, 1 / p.shape[1])
    result.learned = sum(p.numel() for p in learned)
    optimizer, (x, t, tokens), first = torch.optim.AdamW(learned, lr=1e-4), batch_of(side, settings, device), []

    def step() -> None:
        with autocast(settings, device):
            output = side.predict(x, t, tokens)
        loss = F.mse_loss(output.float(), x.float())
        loss.backward()
        first.append((loss.detach(), nn.utils.clip_grad_norm_(learned, 1.0)))
        optimizer.step()
        optimizer.zero_grad()

    time_steps(TRAINING, step, settings.repeats, device, result)
    result.loss, result.grad_norm = (value.item() for value in first[0])


def time_steps(name: str, step: Callable[[], object], repeats: int, device: torch.device, result: Measured) -> None:
    """Times steps after a warm-up, and measures the peak of memory of all of them."""
    seconds, before = [], bytes_in_use(device)
    extra = peak_extra_bytes(lambda: seconds.extend(time_call(step, device) for _ in range(1 + repeats)), device)
    result.seconds[name] = seconds[1:]
    result.peaks[name] = None if before is None or extra is None else before + extra
