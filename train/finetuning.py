"""Fine-tuning a loaded network: its base, the layers that are added to it, what learns, and what checkpoints leave out.

In this order: the network is built, the base is loaded, softmax attention becomes differential, adapters are added,
and the rest is frozen. Checkpoints hold what learns; the frozen rest stays in the base, which config.yaml names by its
path, step and SHA-256, and is loaded from there. The weights of a base are its averaged ones, if it kept any.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.differential import make_differential
from models.lora import LoRAOptions, adapt, adapters_of, merge, unmerge
from train.checkpoint import (
    EMA_WEIGHTS,
    WEIGHTS,
    CheckpointData,
    checkpoint_path,
    gather_to_cpu,
    load_into_module,
    module_tensors,
    read_tensors,
    resolve_step,
    verify_checkpoint,
    write_checkpoint,
)
from train.cli.files import run_folder
from train.cli.parse import flatten_group, from_dict
from train.config import FineTuningConfig, TrainingConfig
from train.distributed import DistContext
from train.files import sha256
from train.loop import TrainState
from train.lora_files import adapter_tensors, save_tensors
from train.optim import freeze_all_but
from train.runs import read_run, resumed_run, run_lock, write_config

ADAPTER = "lora"  # the name of the adapters that learn
ADAPTERS = "lora.safetensors"  # their file


@dataclass(frozen=True)
class Base:
    """The weights that a run is fine-tuned from."""

    run: Path
    step: int
    file: str  # of the checkpoint
    sha256: str
    needed: bool = True  # False: the run's own checkpoint, which is loaded afterwards, holds all weights

    def record(self, run: Path, logs_root: str) -> dict[str, Any]:
        """Returns what the config.yaml of the fine-tuned `run` says of it. Its path is relative to the folder of `run`
        if both are below `logs_root`, so that they may move together."""
        root = Path(logs_root).expanduser().resolve()
        together = self.run.is_relative_to(root) and run.is_relative_to(root)
        path = os.path.relpath(self.run, run.parent) if together else str(self.run)
        return {"path": path, "step": self.step, "file": self.file, "sha256": self.sha256}


class FineTuned(NamedTuple):
    """What became of a network: its new parameters, and the keys of its state_dict that are those of the base."""

    added: frozenset[str]
    left_out: frozenset[str]


def read_base(run: Path) -> Base | None:
    """Returns the base that a run's config.yaml names; None for a run that holds all of its weights."""
    base = read_run(run).get("origin", {}).get("base")
    if base is None:
        return None
    try:
        path = (run.parent / str(base["path"])).resolve()
        return Base(path, int(base["step"]), str(base["file"]), str(base["sha256"]))
    except (KeyError, TypeError, ValueError) as error:
        got = f"{run / 'config.yaml'} has a damaged base in its origin ({error!r})"
        raise ValueError(f"{got}: put back the path, step, file and sha256 of the run it was trained from") from error


def find_base(run: Path, training: TrainingConfig, config: FineTuningConfig, logs_root: str) -> Base | None:
    """Returns the base of a run that is started or resumed; None if it loads no weights, or holds all of them itself.

    ValueError for adapters and other changes of a network without weights to begin from.
    """
    resumed = resumed_run(run, training.resume)
    if resumed is not None:
        base = read_base(resumed)
        return replace(base, needed=config.save != "full") if base else None
    flag = "--lora_rank" if config.lora_rank else f"--differential {config.differential}"
    if config.changes_network and training.load_dir is None:
        raise ValueError(f"got {flag} without trained weights: pass --load_dir RUN, or leave it out")
    if config.changes_network and (training.load_partial or training.load_optim):
        other = "load_partial" if training.load_partial else "load_optim"
        raise ValueError(f"got --{other} with {flag}, which change a whole network: leave one of them out")
    if config.save == "merged" and training.parallel == "fsdp":
        raise ValueError("got --save merged with --parallel fsdp, which has no whole weights: pass --parallel ddp")
    if training.load_dir is None or training.load_partial or not (config.changes_network or training.train_only):
        return None
    source = run_folder(logs_root, training.load_dir)
    step = resolve_step(source, training.load_step, "--load_step")
    manifest = verify_checkpoint(checkpoint_path(source, step))
    file = EMA_WEIGHTS if EMA_WEIGHTS in manifest else WEIGHTS
    return Base(source, step, file, manifest[file]["sha256"])


def read_base_tensors(base: Base, name: str, network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a base by the keys of `network`'s state_dict, completed from the base of that base.

    FileNotFoundError or ValueError if it is gone, holds other weights, or has layers that are not those of a plain run.
    """
    file = checkpoint_path(base.run, base.step) / base.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found, which holds the frozen weights of a fine-tuned run: put it back")
    if (found := sha256(file)) != base.sha256:
        got = f"{file} has SHA-256 {found[:12]}..., wanted {base.sha256[:12]}..., that of the frozen weights of a run"
        raise ValueError(f"{got}: put that file back (runs trained with --save full need none)")
    own = read_run(base.run).get("fine_tuning", {})
    if own.get("lora_rank") or own.get("differential"):
        layers = "adapters" if own.get("lora_rank") else "differential attention"
        remedy = "pass the run that --save merged writes" if own.get("lora_rank") else "train that run on by --resume"
        raise ValueError(f"{base.run} is itself fine-tuned, with {layers}: {remedy}")
    tensors = module_tensors(name, read_tensors(file), network.state_dict())
    deeper = read_base(base.run)
    if deeper is None or own.get("save") == "full":
        return tensors
    return read_base_tensors(deeper, name, network) | tensors


def fine_tune(
    network: nn.Module,
    config: FineTuningConfig,
    train_only: Sequence[str],
    base: Base | None,
    name: str = "network",
) -> FineTuned:
    """Loads the base into a network that was just built, adds layers to it, and freezes what does not learn.

    `name` is that of the module in checkpoints. Without a base all weights are in the checkpoints of the run itself,
    from which they are loaded afterwards. ValueError or FileNotFoundError: see `read_base_tensors`, and the flags.
    """
    before, tensors = {key for key, _ in network.named_parameters()}, {}
    if base is not None and base.needed:
        tensors = read_base_tensors(base, name, network)
        source = checkpoint_path(base.run, base.step) / base.file
        load_into_module(network, {f"{name}.{key}": value for key, value in tensors.items()}, name, source)
    if config.differential:
        make_differential(network, config.differential, config.differential_in)
    if config.lora_rank:
        add_adapters(network, config)
    added = frozenset(key for key, _ in network.named_parameters() if key not in before)
    freeze_all_but(network, train_only, added if config.lora_rank else ())
    parameters = network.named_parameters(remove_duplicate=False)
    frozen = {key: p.shape for key, p in parameters if not p.requires_grad and config.save != "full"}
    left_out = {key for key, shape in frozen.items() if key in tensors and shape == tensors[key].shape}
    return FineTuned(added, frozenset(f"{name}.{key}" for key in left_out))


def add_adapters(network: nn.Module, config: FineTuningConfig) -> None:
    """Adds the adapters of --lora_rank to a network; they change nothing at first."""
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    options = LoRAOptions(rank=config.lora_rank, alpha=alpha, dropout=config.lora_dropout, dora=config.dora)
    adapt(network, ADAPTER, options, config.lora_targets)


def reopen_fine_tuned(run: Path, network: nn.Module) -> frozenset[str]:
    """Gives a network the layers and the frozen weights of a fine-tuned run; returns the keys that its checkpoints
    leave out. A network of another run is not changed."""
    content = read_run(run)
    own = {"fine_tuning": content.get("fine_tuning", {})}
    config = from_dict(FineTunedRun, own, str(run / "config.yaml")).fine_tuning
    base = read_base(run)
    if base is None and not config.changes_network:
        return frozenset()
    base = None if config.save == "full" else base
    return fine_tune(network, config, content.get("training", {}).get("train_only", ()), base).left_out


@dataclass(frozen=True, kw_only=True)
class FineTunedRun:
    """The part of a config.yaml that says how a network was fine-tuned."""

    fine_tuning: FineTuningConfig


def write_adapters(run: Path, state: TrainState, config: FineTuningConfig, base: Base, world: DistContext) -> None:
    """Writes the adapters of a run, averaged ones if there are averages, as <run>/lora.safetensors, which names the
    weights of the base by their SHA-256. All ranks must call it."""
    average = state.averages.get("network")
    network = average.module if average is not None else state.modules["network"]
    facts = {"base": base.sha256, "trigger_words": config.lora_trigger_words, "step": state.step}
    tensors = adapter_tensors(network, ADAPTER)  # gathers sharded ones
    if world.is_main:
        save_tensors(network, ADAPTER, tensors, run / ADAPTERS, **facts)


def write_merged_run(run: Path, state: TrainState) -> Path:
    """Writes weights and averages with the adapters merged into them as a run of its own; returns its folder.

    It is a plain run, to sample from, convert or fine-tune (--load_dir), but without optimizer states, so that it
    cannot be resumed. The networks are as before afterwards.
    """
    folder, content = run.with_name(f"{run.name}_merged"), read_run(run)
    files = {WEIGHTS: merged_tensors(state.modules)}
    if state.averages:
        files[EMA_WEIGHTS] = merged_tensors({name: average.module for name, average in state.averages.items()})
    given = content["fine_tuning"]
    plain = FineTuningConfig(differential=given["differential"], differential_in=given["differential_in"], save="full")
    content["fine_tuning"] = flatten_group(plain)
    content["training"] |= {"load_dir": None, "load_step": None, "train_only": []}
    content["origin"] = {key: value for key, value in content["origin"].items() if key not in ("base", "load_weights")}
    rest = {"optimizers": {}, "extras": {}, "counters": {}, "step": state.step, "bad_steps": [], "best": {}}
    with run_lock(folder):
        write_config(folder, content)
        write_checkpoint(folder, CheckpointData(state.step, files, rest))
    return folder


def merged_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Returns copies of the modules' state_dicts with merged adapters instead of adapters, keys prefixed by the module.

    One module at a time: averages share their frozen weights with the network.
    """
    tensors = {}
    for name, module in modules.items():
        merge(module)
        layers = tuple({f"{layer}.adapters." for layer, _, _ in adapters_of(module)})
        own = {key: value for key, value in module.state_dict().items() if not key.startswith(layers)}
        tensors |= {f"{name}.{key}": value for key, value in gather_to_cpu(own, keep=True).items()}
        unmerge(module)
    return tensors
