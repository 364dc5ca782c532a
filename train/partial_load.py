"""Weights of another network, as far as they fit: --load_partial."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention import GatedCrossAttention
from models.conditioning import Conditioner
from models.embeddings import GrowingEmbedding
from models.experts import StackedLinear
from train.checkpoint import EMA_WEIGHTS, WEIGHTS, checkpoint_path, module_tensors, read_tensors, verify_checkpoint
from train.distributed import full_tensor, shard_like
from train.loop import TrainState


class PartialLoadReport(NamedTuple):
    """What happened to each key of a partial load."""

    taken: list[str]  # loaded
    grown: list[str]  # loaded into a larger tensor
    missing: list[str]  # not in the file: unchanged
    unexpected: list[str]  # only in the file
    misshapen: list[str]  # of another shape in the file: unchanged


def load_partial_checkpoint(run: Path, step: int, state: TrainState) -> tuple[str, PartialLoadReport]:
    """Loads the weights and averages of a checkpoint that fit, and leaves the rest unchanged.

    Returns the SHA-256 of the weights' file and a report of each key. ValueError if nothing fits, and for gates of
    attention that would stay closed.
    """
    path = checkpoint_path(run, step)
    manifest = verify_checkpoint(path)
    tensors = read_tensors(path / WEIGHTS)
    reports = [load_matching(module, tensors, name) for name, module in state.modules.items()]
    report = PartialLoadReport(*(sum(keys, []) for keys in zip(*reports, strict=True)))
    if not report.taken and not report.grown:
        raise ValueError(f"--load_partial found nothing in {path / WEIGHTS} that fits: pass a run of a similar network")
    for name, module in state.modules.items():
        refuse_closed_gates(module, report.missing, name)
    averaged = read_tensors(path / EMA_WEIGHTS) if EMA_WEIGHTS in manifest else tensors
    for name, average in state.averages.items():
        load_matching(average.module, averaged, name)
    for name, average in state.posthoc_averages.items():
        load_matching(average.module, averaged, name.partition("/")[2])
    return manifest[WEIGHTS]["sha256"], report


def format_report(report: PartialLoadReport) -> str:
    """Returns the report as text, one line per key."""
    lines = [f"{len(report.taken)} tensors loaded"]
    for kind in PartialLoadReport._fields:
        lines += [f"  {kind}: {key}" for key in getattr(report, kind)]
    return "\n".join(lines)


def load_matching(module: nn.Module, tensors: dict[str, Tensor], name: str) -> PartialLoadReport:
    """Loads the tensors of module `name` that fit; the keys of the report start with that name.

    Three kinds of weights may be larger than in the file. A linear layer or convolution directly in the module (the
    input layer, which sees the image and concatenated conditions) gets zeros for new input channels, so its output does
    not change; maps that the file has keep theirs, wherever new ones are joined, but not if they have more channels
    now. Deeper layers are not grown, since their inputs may be concatenated in another order. Experts become copies of
    the one layer of the file. A `GrowingEmbedding` may have more rows; new ones keep their initial values. Other
    embeddings do not say where the rows of the file belong.
    """
    current, loaded = module.state_dict(), {}
    saved = module_tensors(name, tensors, current)
    report = PartialLoadReport([], [], [], sorted(f"{name}.{key}" for key in saved.keys() - current.keys()), [])
    for key, value in current.items():
        tensor, shape = saved.get(key), tuple(value.shape)
        if tensor is None:
            report.missing.append(f"{name}.{key}")
        elif shape == tuple(tensor.shape):
            report.taken.append(f"{name}.{key}")
            loaded[key] = tensor
        elif (larger := grow(module, key, tensor, full_tensor(value).cpu(), saved)) is not None:
            report.grown.append(f"{name}.{key}: {tuple(tensor.shape)} -> {shape}")
            loaded[key] = larger
        else:
            report.misshapen.append(f"{name}.{key}: {tuple(tensor.shape)} in the file, {shape} here")
    module.load_state_dict(current | {key: shard_like(value, current[key]) for key, value in loaded.items()})
    return report


def grow(module: nn.Module, key: str, saved: Tensor, current: Tensor, keys: Collection[str]) -> Tensor | None:
    """Expands a saved weight to the shape of the current one (see `load_matching`); None if it cannot be expanded.

    `keys` are those of all saved weights.
    """
    owner, _, leaf = key.rpartition(".")
    layer, (rows, *_), out = module.get_submodule(owner), saved.shape, current.clone()
    if isinstance(layer, StackedLinear) and saved.shape == current.shape[1:]:
        return saved.to(out.dtype).expand_as(out).contiguous()
    if leaf != "weight" or saved.ndim != current.ndim:
        return None
    if isinstance(layer, nn.Linear | nn.Conv2d) and "." not in owner and saved.shape[1] < current.shape[1]:
        if saved.select(1, 0).shape != current.select(1, 0).shape:
            return None
        columns = saved_columns(module, saved.shape[1], current.shape[1], keys)
        if columns is None:
            return None
        return torch.zeros_like(out).index_copy_(1, torch.tensor(columns), saved.to(out.dtype))
    if isinstance(layer, GrowingEmbedding) and saved.shape[1] == current.shape[1] and rows < len(current):
        kept = rows - layer.null_last
        out[:kept], out[len(out) - rows + kept :] = saved[:kept], saved[kept:]
        return out
    return None


def saved_columns(module: nn.Module, count: int, total: int, keys: Collection[str]) -> list[int] | None:
    """Returns where the `count` input channels of a saved input layer are among the `total` of the current one.

    The last channels are the maps of conditions, of which those with saved weights had theirs; without maps, they are
    the first ones. None if a map had fewer channels: they may be those of other classes.
    """
    encoders = dict(module.named_children()).get("encoders")
    if not isinstance(encoders, Conditioner) or not 0 < encoders.map_channels <= total:
        return list(range(count))
    start = total - encoders.map_channels
    columns = list(range(start))
    for name, encoder in encoders.items():
        if any(key.startswith(f"encoders.{name}.") for key in keys):
            columns += range(start, start + encoder.map_channels)
        start += encoder.map_channels
    return columns if len(columns) == count else None


def new_parameters(network: nn.Module, report: PartialLoadReport | None, name: str) -> frozenset[str]:
    """Returns the parameters that a smaller base lacks, that grew from its own, or whose shapes are others."""
    if report is None:
        return frozenset()
    entries = [*report.missing, *report.grown, *report.misshapen]
    keys = {entry.partition(":")[0].removeprefix(f"{name}.") for entry in entries}
    return frozenset(key for key, p in network.named_parameters() if key in keys and p.requires_grad)


def refuse_closed_gates(module: nn.Module, missing: Collection[str], name: str) -> None:
    """Raises ValueError if gates of attention that were `missing` in a partial load are frozen: they start at 0, and
    what they let through would never be read."""
    closed = [
        part
        for part, layer in module.named_modules()
        if isinstance(layer, GatedCrossAttention) and not layer.gate.requires_grad and f"{name}.{part}.gate" in missing
    ]
    if closed:
        part = "blocks.*.gated" if closed[0].startswith("blocks.") else closed[0].partition(".")[0]
        got = f"got --train_only without {part}, which the run of --load_dir lacks and whose gates start at 0"
        raise ValueError(f"{got}: what it reads would have no effect; add {part} to --train_only")
