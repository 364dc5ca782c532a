"""Loading of a trained sampler from the folder of its run, with its first stage and what files add to it."""

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import nn

from train.checkpoint import (
    EMA_WEIGHTS,
    checkpoint_path,
    load_into_module,
    load_weights,
    resolve_step,
    saved_steps,
    verify_checkpoint,
)
from train.class_names import recorded_class_names
from train.cli.parse import from_dict
from train.config import DataConfig, SamplerConfig, SamplingConfig
from train.continuous_stage import load_first_stage
from train.control_file import add_control_files
from train.data.hints import HintsConfig
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.finetuning import hint_makers, read_fine_tuning, reopen_fine_tuned
from train.first_stage import find_vqgan_run
from train.lora_merging import AdapterFile, merge_adapter_files
from train.posthoc_ema import open_snapshot, reconstruct_ema, snapshot_path, snapshot_steps
from train.registry import load_plugin
from train.resumed_settings import find_code
from train.runs import read_run
from train.space_opening import reopen_space
from train.spaces import Space
from train.textual_inversion import add_files_of_words
from train.trained_sampler import TrainedSampler
from vq.weights import refuse_nan


@dataclass(frozen=True, kw_only=True)
class StoredSamplerConfig:
    """The part of a sampler run's config.yaml that inference needs."""

    data: DataConfig
    reader: DatasetConfig
    sampler: SamplerConfig
    sampling: SamplingConfig
    hints: HintsConfig


def load_trained_sampler(
    run: Path,
    step: int | None,
    device: torch.device,
    *,
    ema: bool | None,
    amp: bool,
    logs_roots: Sequence[str],
    allow: tuple[str, ...] = (),
    ema_length: float | None = None,
    ae_load_dir: str | None = None,
    ae_load_step: int | None = None,
    lora: Sequence[AdapterFile] = (),
    textual_inversion: Sequence[str] = (),
    control: Sequence[AdapterFile] = (),
) -> TrainedSampler:
    """Returns the sampler of a run with its first stage, if it has one: `load_space`, then `load_sampler`."""
    space = load_space(run, logs_roots, device, amp, ae_load_dir=ae_load_dir, ae_load_step=ae_load_step)
    options = {"ema": ema, "amp": amp, "allow": allow, "ema_length": ema_length}
    added = {"lora": lora, "textual_inversion": textual_inversion, "control": control}
    return load_sampler(run, step, space, device, **options, **added)


def load_space(
    run: Path,
    logs_roots: Sequence[str],
    device: torch.device,
    amp: bool,
    *,
    ae_load_dir: str | None = None,
    ae_load_step: int | None = None,
) -> Space:
    """Returns the space that the sampler of a run works in: pixels, or codes or latents of its first stage.

    That is the one that the sampler was trained on, in the first of `logs_roots` that has it or else at the path
    that --ae_load_dir had in training, unless it is named. ValueError if its weights differ from those in training.
    """
    content = read_run(run)
    origin = content.get("origin", {})
    if "ae_weights" not in origin:
        if ae_load_dir is not None or ae_load_step is not None:
            raise ValueError(f"{run} was trained on pixels: leave --ae_load_dir and --ae_load_step out")
        return reopen_space(content, None)
    vqgan_run = find_vqgan_run(run, content, logs_roots, ae_load_dir)
    if ae_load_step is None and ae_load_dir is None:
        ae_load_step = origin.get("ae_load_step")
    first_stage = load_first_stage(vqgan_run, ae_load_step, device, amp, logs_root=logs_roots[-1])
    if origin["ae_weights"] != first_stage.weights:
        kind = "VQGAN" if first_stage.has_codes else "autoencoder"
        raise ValueError(
            f"{run} was trained on other {kind} weights than those of {first_stage.run}: "
            "pass the --ae_load_dir and --ae_load_step that it was trained with"
        )
    return reopen_space(content, first_stage)


def load_sampler(
    run: Path,
    step: int | None,
    space: Space,
    device: torch.device,
    *,
    ema: bool | None,
    amp: bool,
    allow: tuple[str, ...] = (),
    ema_length: float | None = None,
    lora: Sequence[AdapterFile] = (),
    textual_inversion: Sequence[str] = (),
    control: Sequence[AdapterFile] = (),
) -> TrainedSampler:
    """Returns the sampler of a run, for the space it was trained in; see `check_allowed` for `allow`.

    `ema`: the averaged weights, the plain ones, or, if None, the averaged ones if the run kept them. With `ema_length`
    the weights are an average of that relative length, reconstructed from the EMA snapshots of the run. The adapters of
    the files `lora` are merged into them (see `merge_adapter_files`), the words in the files `textual_inversion` added
    to the vocabulary (see `add_files_of_words`), and the branches of the files `control` to the network (see
    `add_control_files`).
    """
    content = read_run(run)
    step = resolve_step(run, step, "--load_step") if ema_length is None else resolve_snapshot_step(run, step)
    config = read_stored_config(run)
    check_allowed(run, config.reader, allow, config.sampler)
    origin = content.get("origin", {})
    frequencies = origin.get("class_frequencies")
    if not isinstance(frequencies, list):
        raise ValueError(f"{run / 'config.yaml'} has no class_frequencies in its origin: is it damaged?")
    module = load_plugin("train.samplers", config.sampler.sampler, "sampler")
    sampler = module.build(config.sampler, **space.model_args, n_classes=len(frequencies))
    loaded = reopen_fine_tuned(run, sampler.network)
    if ema_length is None:
        averaged = EMA_WEIGHTS in verify_checkpoint(checkpoint_path(run, step)) if ema is None else ema
        weights = load_weights(run, step, {"network": sampler.network}, ema=averaged, loaded=loaded)
    else:
        weights = load_posthoc_ema(run, step, "network", sampler.network, ema_length, loaded)
    base, makers = weights, hint_makers(read_fine_tuning(run), config.hints)
    if lora:
        weights = merge_adapter_files(sampler.network, lora, base)
    if textual_inversion:
        weights = add_files_of_words(sampler.network, textual_inversion, weights)
    if control:
        weights, others = add_control_files(sampler.network, control, base, weights)
        makers |= others
    sampler.network.to(device).eval().requires_grad_(False)
    frequencies = torch.tensor(frequencies, dtype=torch.float64) if sampler.n_classes else None
    names = recorded_class_names(origin, run) if sampler.n_classes else ()
    world, data, reader = DistContext(device), config.data, config.reader
    facts = {"hint_makers": makers, "hints": config.hints}
    return TrainedSampler(run, step, sampler, space, data, reader, frequencies, weights, world, amp, names, **facts)


def read_stored_config(run: Path) -> StoredSamplerConfig:
    """Returns the config of a sampler's run; what its config.yaml leaves out has its default."""
    content = read_run(run)
    groups = {name: content.get(name, {}) for name in StoredSamplerConfig.__dataclass_fields__}
    return from_dict(StoredSamplerConfig, groups, str(run / "config.yaml"))


def resolve_snapshot_step(run: Path, step: int | None) -> int | None:
    """Returns `step`, or the newest step that has an EMA snapshot and is not after the newest checkpoint."""
    newest = max(saved_steps(run), default=None)
    usable = [each for each in snapshot_steps(run) if newest is None or each <= newest]
    if step is None and not usable and snapshot_steps(run):
        raise FileNotFoundError(f"{run} has no EMA snapshot up to its newest checkpoint, {newest}: train on")
    return usable[-1] if step is None and usable else step


def load_posthoc_ema(
    run: Path, step: int | None, name: str, module: nn.Module, length: float, loaded: Collection[str] = ()
) -> str:
    """Fills a module with its average of a relative length; snapshots may lack the keys in `loaded`. Returns a SHA-256
    that identifies these weights.

    It covers the length and the checksums of the snapshots used, not the result, whose last bits depend on the
    machine's linear algebra.
    """
    tensors = reconstruct_ema(run, step, name, length)
    refuse_nan(tensors, snapshot_path(run, step))
    tensors = {f"{name}.{key}": value for key, value in tensors.items()}
    load_into_module(module, tensors, name, snapshot_path(run, step), loaded)
    parts = []
    for each in [each for each in snapshot_steps(run) if each <= step]:
        with open_snapshot(run, each) as snapshot:
            prefixes = tuple(snapshot.profiles(name))
            parts.append([each, sorted(check for check in snapshot.checks.items() if check[0].startswith(prefixes))])
    return sha256(json.dumps([length, parts]).encode()).hexdigest()


def check_allowed(
    run: Path, reader: DatasetConfig, allow: tuple[str, ...], sampler: SamplerConfig | None = None
) -> None:
    """Raises ValueError if a run names user code, or a shell command that fetches its data, that is not in `allow`.

    The settings are those read from its config.yaml. Loading a run never executes code that was not allowed.
    """
    for key, value in find_code([reader] if sampler is None else [reader, sampler]).items():
        if value not in allow:
            typed = shlex.quote(value)
            raise ValueError(f"{run} was trained with --{key} {value}, which is code: pass --allow {typed} to run it")
