"""Fine-tuning a loaded network: its base, the layers that are added to it, what learns, and what checkpoints leave out.

In this order: the network is built, the text encoder of --text_encoder and the base are loaded, new words are added,
softmax attention becomes differential, adapters or a control branch are added, and the rest is frozen. Checkpoints hold
what learns; the frozen rest stays in the base, which config.yaml names by its path, step and SHA-256, or in the file of
the text encoder, and is loaded from there. The weights of a base are its averaged ones, if it kept any.

With --load_partial the base of adapters is a smaller network, such as one without experts. Parameters that it lacks, or
that grew from its own, learn beside the adapters, unless --train_only names what does; what learns has no adapters.
"""

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from models.conditions.text import find_captions
from models.differential import make_differential
from models.lora import LoRAOptions, adapt, adapters_of, merge, select_layers, unmerge
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
from train.cli.files import recorded_path, run_folder
from train.cli.parse import flatten_group, from_dict
from train.cli.values import parse_int
from train.config import FineTuningConfig, TrainingConfig
from train.control_file import BranchFacts, add_start_of_branch, with_hint_of_file, write_branch
from train.data.hints import HintMaker, HintsConfig, differing_option, hint_channels
from train.distributed import DistContext
from train.files import sha256
from train.loop import TrainState
from train.lora_files import adapter_tensors, save_tensors
from train.optim import NEW_TOKENS, freeze_all_but, is_selected, name_experts
from train.partial_load import PartialLoadReport, load_matching, new_parameters, refuse_closed_gates
from train.runs import read_run, resumed_run, run_lock, write_config
from train.text_encoder_file import reopen_text_encoder
from train.textual_inversion import EMBEDDINGS, add_new_words, parse_words, write_embeddings

ADAPTER = "lora"  # the name of the adapters that learn
ADAPTERS = "lora.safetensors"  # their file
MERGED_FROM = "merged_from"  # in the origin of a merged run: the path of the base
START_OF_BRANCH = "load_control_sha256"  # in the origin of a run
PLACES_OF_WEIGHTS = ("base", "load_weights", "load_report", "text_encoder")  # in the origin of a run


@dataclass(frozen=True)
class Base:
    """The weights that a run is fine-tuned from."""

    run: Path
    step: int
    file: str  # of the checkpoint
    sha256: str
    needed: bool = True  # False: the run's own checkpoint, which is loaded afterwards, holds all weights
    partial: bool = False  # its network is smaller than that of the run
    report: PartialLoadReport | None = None  # of a resumed run: what was loaded of a smaller network

    def record(self, run: Path, logs_root: str) -> dict[str, Any]:
        """Returns what the config.yaml of the fine-tuned `run` says of it."""
        path = recorded_path(self.run, run, logs_root)
        content = {"path": path, "step": self.step, "file": self.file, "sha256": self.sha256}
        return content | ({"partial": True} if self.partial else {})


class FineTuned(NamedTuple):
    """What learns beside the parts of --train_only; the keys loaded from another run or file, which checkpoints may
    lack; those of them that checkpoints leave out; and what was loaded of a base with a smaller network."""

    learned: frozenset[str]
    loaded: frozenset[str]
    left_out: frozenset[str]
    report: PartialLoadReport | None = None


def read_base(run: Path) -> Base | None:
    """Returns the base that a run's config.yaml names; None for a run that holds all of its weights."""
    origin = read_run(run).get("origin", {})
    base = origin.get("base")
    if base is None:
        return None
    try:
        path = (run.parent / str(base["path"])).resolve()
        report = PartialLoadReport(**origin["load_report"]) if base.get("partial") else None
        facts = int(base["step"]), str(base["file"]), str(base["sha256"])
        return Base(path, *facts, partial=report is not None, report=report)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = f"{run / 'config.yaml'} has a damaged base in its origin ({error!r})"
        raise ValueError(f"{got}: put back the path, step, file and sha256 of the run it was trained from") from error


def find_base(
    run: Path,
    training: TrainingConfig,
    config: FineTuningConfig,
    logs_root: str,
    hints: HintsConfig = HintsConfig(),  # noqa: B008 (it is frozen)
) -> Base | None:
    """Returns the base of a run that is started or resumed; None if it loads no weights, or holds all of them itself.

    ValueError for adapters and other changes of a network without weights to begin from, and for a control branch
    beside a base whose condition_image is made in another way than `hints` say.
    """
    if config.save == "merged" and training.parallel == "fsdp":
        raise ValueError("got --save merged with --parallel fsdp, which has no whole weights: pass --parallel ddp")
    resumed = resumed_run(run, training.resume)
    if resumed is not None:
        base = read_base(resumed)
        return replace(base, needed=config.save != "full") if base else None
    flags = {
        f"--control {config.control}": config.control,
        "--lora_rank": config.lora_rank,
        f"--differential {config.differential}": config.differential,
        "--text_new_tokens": config.text_new_tokens,
    }
    flag, *others = [name for name, given in flags.items() if given] or [""]
    if config.control and others:
        raise ValueError(f"got {flag} with {others[0]}: train one after the other, each from the same --load_dir RUN")
    if flag not in ("", "--text_new_tokens") and training.load_dir is None:
        raise ValueError(f"got {flag} without trained weights: pass --load_dir RUN, or leave it out")
    partial = {"--lora_rank", "--text_new_tokens"} if config.lora_rank and not training.load_optim else set()
    whole = [each for each in (flag, *others) if each and each not in partial]
    if whole and (training.load_partial or training.load_optim):
        other = "load_partial" if training.load_partial else "load_optim"
        raise ValueError(f"got --{other} with {whole[0]}, which change a whole network: leave one of them out")
    if training.load_dir is None or (training.load_partial and not config.lora_rank):
        return None
    source = run_folder(logs_root, training.load_dir)
    if config.control and (source / "config.yaml").is_file() and read_fine_tuning(source).text_new_tokens:
        got = f"got --control {config.control} beside {source}, which has new words"
        remedy = f"sample with --textual_inversion {source / EMBEDDINGS} --control_files FILE"
        raise ValueError(f"{got}: train it beside the run that these were trained from, and {remedy}")
    if config.control and config.control_lock and (source / "config.yaml").is_file():
        refuse_other_hints(source, hints)
    if not (config.changes_network or training.train_only or leaves_out_weights(source)):
        return None
    step = resolve_step(source, training.load_step, "--load_step")
    manifest = verify_checkpoint(checkpoint_path(source, step))
    file = EMA_WEIGHTS if EMA_WEIGHTS in manifest else WEIGHTS
    return Base(source, step, file, manifest[file]["sha256"], partial=training.load_partial)


def refuse_other_hints(source: Path, hints: HintsConfig) -> None:
    """Raises ValueError if the condition_image of a base that stays as it is, `source`, is made in another way than
    `hints` say, which are also those of the control branch that learns beside it."""
    own = read_fine_tuned_run(source).hints
    if not own.condition_image or not hints.condition_image:
        return
    same = own.condition_image == hints.condition_image
    name = differing_option(own.condition_image, own, hints) if same else "condition_image"
    if name is not None:
        got = f"got {name} {getattr(hints, name)} beside {source}, whose condition_image {own.condition_image} has"
        remedy = f"leave --{name} out, or pass --no_control_lock, so that the network of --load_dir learns too"
        raise ValueError(f"{got} {name} {getattr(own, name)}: {remedy}")


def leaves_out_weights(run: Path) -> bool:
    """Returns whether weights of a run are in its base and not in its own checkpoints."""
    return read_base(run) is not None and read_run(run).get("fine_tuning", {}).get("save") != "full"


def saves_text_encoder(run: Path, training: TrainingConfig, config: FineTuningConfig) -> bool:
    """Returns whether the checkpoints of a run hold a frozen text encoder too.

    Checkpoints of earlier versions do; a resumed run keeps the form of the checkpoints that it has.
    """
    resumed = resumed_run(run, training.resume)
    return config.save == "full" if resumed is None else "text_encoder" not in read_run(resumed).get("origin", {})


def read_base_tensors(base: Base, name: str, network: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a base by the keys of `network`'s state_dict, completed from the base of that base. A
    frozen text encoder may be missing.

    FileNotFoundError or ValueError if it is gone, holds other weights, or has layers that are not those of a plain run.
    """
    file = checkpoint_path(base.run, base.step) / base.file
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found, which holds the frozen weights of a fine-tuned run: put it back")
    if (found := sha256(file)) != base.sha256:
        got = f"{file} has SHA-256 {found[:12]}..., wanted {base.sha256[:12]}..., that of the frozen weights of a run"
        raise ValueError(f"{got}: put that file back (runs trained with --save full need none)")
    own = read_run(base.run).get("fine_tuning", {})
    if own.get("control"):
        got = f"{base.run} is itself fine-tuned, with a control branch"
        raise ValueError(f"{got}: train that run on by --resume, or pass the run that it was trained from")
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
    *,
    text_keys: Collection[str] = (),
    save_text: bool = False,
) -> FineTuned:
    """Loads the base into a network that was just built, adds layers to it, and freezes what does not learn.

    A branch of --load_control is read from its file: leave that out for a network whose checkpoint follows.
    `name` is that of the module in checkpoints. `text_keys` are the weights that were filled from --text_encoder, which
    checkpoints leave out unless `save_text`. Without a base all others are in the checkpoints of the run itself, from
    which they are loaded afterwards. ValueError or FileNotFoundError: see `read_base_tensors`, and the flags.
    """
    before = {key for key, _ in network.named_parameters()}
    tensors, report = load_base(network, config.text_new_tokens, base, name, text_keys)
    if config.differential:
        make_differential(network, config.differential, config.differential_in)
    parts, new = name_experts(network, train_only), new_parameters(network, report, name) - {*text_keys}
    whole = frozenset(key for key in new if is_selected(key, parts))
    if config.lora_rank:
        add_adapters(network, config, whole)
    if config.load_control:
        add_start_of_branch(network, config.load_control, "" if base is None else base.sha256)
    else:
        config.add_branch(network)
    added = frozenset(key for key, _ in network.named_parameters() if key not in before)
    alone = config.lora_rank or (config.control and config.control_lock)
    extra = frozenset(key for key in added if alone or config.control or is_selected(key, [NEW_TOKENS]))
    learned = whole | (extra if alone or train_only else frozenset())
    freeze_all_but(network, train_only, learned)
    refuse_closed_gates(network, () if report is None else report.missing, name)
    parameters = network.named_parameters(remove_duplicate=False)
    frozen = {key: p.shape for key, p in parameters if not p.requires_grad and config.save != "full"}
    left_out = {key for key, shape in frozen.items() if key in tensors and shape == tensors[key].shape}
    left_out |= set() if save_text else {key for key in frozen if key in text_keys}
    loaded, left_out = (frozenset(f"{name}.{key}" for key in keys) for keys in ({*text_keys} | left_out, left_out))
    return FineTuned(learned, loaded, left_out, report)


def load_base(
    network: nn.Module, words: Sequence[str], base: Base | None, name: str, text_keys: Collection[str]
) -> tuple[dict[str, Tensor], PartialLoadReport | None]:
    """Adds new words to a network, and loads the weights of the base if they are needed, which it returns, with what
    was loaded of a smaller one. Words that the base does not have start from those that it has."""
    if base is None or not base.needed:
        add_new_words(network, words)
        return {}, None if base is None else base.report
    has_words, report = find_captions(network) is not None and read_words(base.run, words), None
    if has_words:
        add_new_words(network, words)
    tensors = read_base_tensors(base, name, network)
    named = {f"{name}.{key}": value for key, value in tensors.items()}
    if base.partial:
        report = load_matching(network, named, name)
        if not report.taken:
            raise ValueError(f"--load_partial found nothing in {base.run} that fits: pass a run of a similar network")
    else:
        source = checkpoint_path(base.run, base.step) / base.file
        load_into_module(network, named, name, source, {f"{name}.{key}" for key in text_keys})
    if not has_words:
        add_new_words(network, words)
    return tensors, report


def read_words(run: Path, words: Sequence[str]) -> bool:
    """Returns whether a base has new words; ValueError unless they are those of --text_new_tokens."""
    of_base = read_run(run).get("fine_tuning", {}).get("text_new_tokens", ())
    own, given = ([(word, new.tokens) for word, new in parse_words(each).items()] for each in (of_base, words))
    if own and own != given:
        typed = shlex.join(word if tokens == 1 else f"{word}=*{tokens}" for word, tokens in own)
        raise ValueError(f"{run} has new words: pass just these, --text_new_tokens {typed}")
    return bool(own)


def with_hint_settings(
    config: FineTuningConfig, hints: HintsConfig, image_channels: int, factor: int, is_new: bool
) -> FineTuningConfig:
    """Returns the settings of a control branch with those of its hint: in a new run of --load_control those of the
    file, else, where they are left out, those for images of `image_channels` that are `factor` times as high as what is
    sampled. ValueError for settings that do not fit together, or another file; FileNotFoundError without it."""
    if not config.control:
        return config
    if config.load_control and is_new:
        return with_hint_of_file(config, hints)
    return config.with_hint(hint_channels(config.control, image_channels), factor)


def start_provenance(config: FineTuningConfig, resumed: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
    """Returns the SHA-256 of the file of --load_control of a new run; that which a resumed run has recorded, if any."""
    if is_new:
        return {START_OF_BRANCH: sha256(Path(config.load_control).expanduser())} if config.load_control else {}
    return {START_OF_BRANCH: resumed[START_OF_BRANCH]} if START_OF_BRANCH in resumed else {}


def add_adapters(network: nn.Module, config: FineTuningConfig, whole: Collection[str] = ()) -> None:
    """Adds the adapters of --lora_rank and --lora_rank_of to a network; they change nothing at first. Layers whose
    weights learn themselves, `whole`, need none."""
    targets = [layer for layer in select_layers(network, config.lora_targets) if f"{layer}.weight" not in whole]
    ranks = dict.fromkeys(targets, config.lora_rank)
    for part, rank in parse_ranks(config.lora_rank_of).items():
        own = [layer for layer in select_layers(network, [part], "--lora_rank_of") if layer in ranks]
        if not own:
            raise ValueError(f"got --lora_rank_of {part}, which has no adapters: name it in --lora_targets too")
        ranks |= dict.fromkeys(own, rank)
    for rank in dict.fromkeys(ranks.values()):
        alpha = rank if config.lora_alpha is None else config.lora_alpha
        options = LoRAOptions(rank=rank, alpha=alpha, dropout=config.lora_dropout, dora=config.dora)
        adapt(network, ADAPTER, options, [layer for layer, own in ranks.items() if own == rank])


def parse_ranks(words: Sequence[str]) -> dict[str, int]:
    """Returns the ranks of --lora_rank_of by part; ValueError for other words than part=rank and for a part twice."""
    ranks: dict[str, int] = {}
    for word in words:
        part, _, rank = word.rpartition("=")
        if not part or part in ranks or not rank.isdecimal() or parse_int(rank) < 1:
            wanted = "wanted a part of the network and a rank of at least 1, each part once"
            raise ValueError(f"got --lora_rank_of {word}, {wanted}: pass text=4")
        ranks[part] = parse_int(rank)
    return ranks


def reopen_fine_tuned(run: Path, network: nn.Module) -> frozenset[str]:
    """Gives a network the layers and the frozen weights of a run; returns the keys that its checkpoints may lack."""
    content = read_run(run)
    text_keys = reopen_text_encoder(run, content.get("origin", {}), network)
    config, base = replace(read_fine_tuning(run), load_control=None), read_base(run)
    if base is None and not config.changes_network:
        return frozenset(f"network.{key}" for key in text_keys)
    base = None if base is None else replace(base, needed=config.save != "full")
    train_only = content.get("training", {}).get("train_only", ())
    return fine_tune(network, config, train_only, base, text_keys=text_keys).loaded


@dataclass(frozen=True, kw_only=True)
class FineTunedRun:
    """The part of a config.yaml that says how a network was fine-tuned, and with which hints it was trained."""

    fine_tuning: FineTuningConfig
    hints: HintsConfig


def read_fine_tuning(run: Path) -> FineTuningConfig:
    """Returns how the network of a run was fine-tuned."""
    return read_fine_tuned_run(run).fine_tuning


def read_fine_tuned_run(run: Path) -> FineTunedRun:
    """Returns how the network of a run was fine-tuned, and with which hints it was trained."""
    content = read_run(run)
    own = {name: content.get(name, {}) for name in FineTunedRun.__dataclass_fields__}
    return from_dict(FineTunedRun, own, str(run / "config.yaml"))


def hint_makers(config: FineTuningConfig, hints: HintsConfig) -> dict[str, HintMaker | None]:
    """Returns what makes the hint of --control, with these options, by batch field; {} without a branch."""
    return {name: HintMaker(kind, hints) for name, kind in config.hint_kinds.items()}


def write_additions(
    run: Path,
    state: TrainState,
    config: FineTuningConfig,
    base: Base | None,
    world: DistContext,
    hints: HintsConfig = HintsConfig(),  # noqa: B008 (it is frozen)
) -> None:
    """Writes what a run adds to its base, averaged if there are averages, as small files: new words, and adapters as
    <run>/lora.safetensors or a control branch as <run>/control.safetensors, which name the weights of the base by their
    SHA-256. A branch beside which other parts learn is not written, nor are adapters of a network that is larger than
    that of the base. `hints` are the options that its hints were made with. All ranks must call it."""
    average = state.averages.get("network")
    network = average.module if average is not None else state.modules["network"]
    if config.text_new_tokens:
        write_embeddings(run, network, world)
    if config.control and only_branch_learns(state.modules["network"]):
        facts = BranchFacts.of(HintMaker(config.control, hints), base.sha256, state.step)
        write_branch(run, network, facts, world)
    if not config.lora_rank or base.partial:
        return
    facts = {"base": base.sha256, "trigger_words": config.lora_trigger_words, "step": state.step}
    tensors = adapter_tensors(network, ADAPTER)  # gathers sharded ones
    if world.is_main:
        save_tensors(network, ADAPTER, tensors, run / ADAPTERS, **facts)


def only_branch_learns(network: nn.Module) -> bool:
    """Returns whether nothing but its control branch learns of a network, so that the branch fits its base."""
    return all(key.startswith("control.") for key, p in network.named_parameters() if p.requires_grad)


def write_merged_run(run: Path, state: TrainState) -> Path:
    """Writes weights and averages with the adapters merged into them as a run of its own; returns its folder.

    It is a plain run, to sample from, convert or fine-tune (--load_dir), but without optimizer states, so that it
    cannot be resumed. The networks are as before afterwards.
    """
    folder, content = run.with_name(f"{run.name}_merged"), read_run(run)
    files = {WEIGHTS: merged_tensors(state.modules)}
    if state.averages:
        files[EMA_WEIGHTS] = merged_tensors({name: average.module for name, average in state.averages.items()})
    kept = ("differential", "differential_in", "text_new_tokens")
    plain = FineTuningConfig(**{key: content["fine_tuning"][key] for key in kept}, save="full")
    content["fine_tuning"] = flatten_group(plain)
    content["training"] |= {"load_dir": None, "load_step": None, "load_partial": False, "train_only": []}
    content["origin"] = {key: value for key, value in content["origin"].items() if key not in PLACES_OF_WEIGHTS}
    if (base := read_base(run)) is not None:
        content["origin"][MERGED_FROM] = os.path.relpath(base.run, folder.parent)
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
