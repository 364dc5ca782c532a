"""The common main of all experiments: loads the trained model, opens the results folder, measures once, reports."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.harness.batches import ResumableBatches, broadcast_object, experiment_world, single_process_world
from experiments.harness.first_stage import FirstStageModelConfig, first_stage_run, load_chosen_stage
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.results import load_results, write_results
from models.ranges import MILLION, NOT_NEGATIVE, SEED, SIZE, check_ranges
from train.class_names import with_class_numbers
from train.cli.files import get_section, read_run_config, run_folder
from train.cli.parse import BaseSettings, flatten_group, read_config_flag, run_script, to_dict
from train.cli.values import peek_flag
from train.condition_source import ConditionSource, condition_provenance
from train.config import LoggingConfig, SamplingConfig, TrainingConfig
from train.data.loading import build_dataset
from train.datasets import content_fingerprint
from train.distributed import DistContext
from train.execution import compile_for_sampling
from train.files import sha256, sha256_of_network
from train.first_stage import FirstStage
from train.hint_files import hint_provenance
from train.identity import results_identity
from train.lora_merging import parse_adapter_files
from train.registry import load_plugin
from train.runs import is_new, open_run, read_provenance, read_run, run_lock
from train.sampler_loading import load_trained_sampler
from train.trained_sampler import TrainedSampler

TrainedModel = TrainedSampler | FirstStage
EARLIER_FINGERPRINTS = ("images", "image_files")  # of the data, in folders of earlier versions


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Trained model."""

    sampler: str = "absorbing"
    """Learned sampler: a file of train/samplers."""
    dataset: str = "digits"
    """Data set it was trained on."""
    data_dir: str | None = None
    """Folder of the data, if it has moved since training."""
    load_dir: str | None = None
    """Folder of the sampler's run; if omitted, <sampler>_<dataset>."""
    load_step: int | None = None
    """Step of its checkpoint; if omitted, the newest."""
    ae_load_dir: str | None = None
    """Folder of the run of its VQGAN or autoencoder; if omitted, the one the sampler was trained on."""
    ae_load_step: int | None = None
    """Step of that run's checkpoint; if omitted, the one the sampler was trained on."""
    tile: int | None = None
    """Encode and decode larger images in tiles of this side, in codes or latents, to save memory; if omitted, whole."""
    overlap: int | None = None
    """Overlap of neighbouring tiles, in codes or latents; if omitted, a quarter of a tile."""
    ema: bool = True
    """Use the sampler's averaged (EMA) weights."""
    ema_length: float | None = None
    """Use an EMA of this relative length (such as 0.08) instead, reconstructed from a run with --ema_profiles."""
    lora: tuple[str, ...] = ()
    """Files of adapters to merge into the weights, FILE or FILE=STRENGTH: of runs with --lora_rank or, for runs of
    Stable Diffusion, of kohya, LyCORIS, peft or diffusers."""
    textual_inversion: tuple[str, ...] = ()
    """Files of words that prompts may then use: of runs with --text_new_tokens, of diffusers or of the web UI."""
    control_files: tuple[str, ...] = ()
    """Files of control branches, FILE or FILE=STRENGTH, whose outputs are added up: of runs with --control or, for runs
    of Stable Diffusion, of convert.py."""
    allow: tuple[str, ...] = ()
    """Dotted paths of your own classes and functions that the run may import; without it, loading runs no such code."""

    EVERYDAY = ("sampler", "dataset", "load_dir")
    RANGES = {
        **{"load_step": NOT_NEGATIVE, "ae_load_step": NOT_NEGATIVE, "ema_length": "(0, 0.3003]"},
        **{"tile": SIZE, "overlap": "[0, 65536]"},
    }

    def __post_init__(self):
        check_ranges(self)
        if self.ema_length is not None and not self.ema:
            raise ValueError(f"got --no_ema and --ema_length {self.ema_length}, which is an average: pass one of them")
        if self.overlap is not None and self.tile is None:
            raise ValueError(f"got overlap {self.overlap} without tiles: pass --tile 64, or leave --overlap out")


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output."""

    log_dir: str | None = None
    """Results folder, below --logs_root; if omitted, named after the experiment, the run and the step; other settings
    get a folder beside it."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
    batch_size: int = 50
    """Images sampled at once in each process; does not change the images."""
    seed: int = 0
    """Random seed; image i of a seed is always the same."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""
    amp: bool = True
    """bfloat16 autocast on devices with native support."""
    compile: bool = False
    """Compile the network with torch.compile, on CUDA with CUDA graphs; for many images."""

    EVERYDAY = ("log_dir", "batch_size", "seed")
    RANGES = {"batch_size": MILLION, "seed": SEED}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class FirstStageOutputConfig:
    """Output."""

    log_dir: str | None = None
    """Results folder, below --logs_root; if omitted, named after the experiment, the run and the step; other settings
    get a folder beside it."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if available, else mps, else cpu."""
    amp: bool = True
    """bfloat16 autocast on devices with native support."""

    EVERYDAY = ("log_dir", "device")


@dataclass(frozen=True, kw_only=True)
class BriefTrainingConfig(TrainingConfig):
    """Training."""

    train_steps: int = 1000
    """Training steps of each run."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Learning rate."""
    warmup_iters: int = 100
    """Warm-up steps, over which the learning rate rises from 0."""
    ema_beta: float = 0.99
    """Decay of the EMA weights, which are the ones measured."""


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Output."""

    log_dir: str | None = None
    """Results folder, below --logs_root; if omitted, named after the experiment and its data set or VQGAN."""
    logs_root: str = LoggingConfig.logs_root
    """Folder of all runs."""

    EVERYDAY = ("log_dir",)


def model_run(logs_root: str, model: ModelConfig) -> Path:
    """Returns the folder of the sampler's run."""
    return run_folder(logs_root, model.load_dir or f"{model.sampler}_{model.dataset}")


def peek_settings(argv: list[str], section: str, *flags: str) -> dict[str, Any]:
    """Returns the values of those of the flags that the command line gives, or else the --config files."""
    content = read_config_flag(argv)
    content = content | get_section(content, section)
    values = {flag: peek_flag(argv, flag) or content.get(flag) for flag in flags}
    return {flag: value for flag, value in values.items() if value is not None}


def run_defaults(argv: list[str], section: str) -> BaseSettings:
    """Returns the sampler, data set and sampling settings of the run named on the command line, as flag defaults."""
    chosen = peek_settings(argv, section, "sampler", "dataset", "load_dir", "logs_root")
    root = chosen.pop("logs_root", OutputConfig.logs_root)
    model = ModelConfig(**chosen)
    path = model_run(root, model) / "config.yaml"
    if not path.is_file():
        return BaseSettings({})
    content = read_run_config(path)
    named = {name: content.get(group, {}).get(name) for name, group in (("sampler", "sampler"), ("dataset", "data"))}
    sampling = content.get("sampling", {})
    if peek_flag(argv, "solver") not in (None, sampling.get("solver")):  # the run's steps etc. belong to another solver
        sampler = named["sampler"] or model.sampler
        own = load_plugin("train.samplers", sampler, "sampler").Sampling.solver_setting_names()
        sampling = {key: value for key, value in sampling.items() if key not in own}
    if content.get("training", {}).get("ema") is False:  # the run keeps no averages
        named["ema"] = False
    return BaseSettings(sampling | {name: value for name, value in named.items() if value is not None}, path)


def load_model(model: ModelConfig, output: OutputConfig, world: DistContext | None = None) -> TrainedSampler:
    """Loads a trained sampler and its first stage, for the ranks of `world` or for a single process.

    ValueError: the run was trained on another data set or sampler than the configured one.
    """
    world = world or single_process_world(output.device)
    run = model_run(output.logs_root, model)
    content = read_run(run)
    for key, group in (("dataset", "data"), ("sampler", "sampler")):
        trained_with = content.get(group, {}).get(key)
        if trained_with != getattr(model, key):
            raise ValueError(f"{run} was trained with --{key} {trained_with}, got {getattr(model, key)}: pass that")
    trained = load_trained_sampler(
        run,
        model.load_step,
        world.device,
        ema=model.ema,
        amp=output.amp,
        logs_roots=(str(run.parent), output.logs_root),
        allow=model.allow,
        ema_length=model.ema_length,
        ae_load_dir=model.ae_load_dir,
        ae_load_step=model.ae_load_step,
        lora=parse_adapter_files(model.lora),
        textual_inversion=model.textual_inversion,
        control=parse_adapter_files(model.control_files, "control_files"),
    )
    trained, space = dataclasses.replace(trained, world=world), trained.space
    if output.compile:
        compile_for_sampling(trained.sampler.network)
    if model.tile is not None:
        trained = trained.in_tiles(model.tile, model.overlap)
    if model.data_dir is not None:
        trained = dataclasses.replace(trained, reader=dataclasses.replace(trained.reader, data_dir=model.data_dir))
    weights = "averaged (EMA) weights" if model.ema else "plain weights"
    if model.ema_length is not None:
        weights = f"EMA reconstructed at relative length {model.ema_length}"
    weights += "".join(f", adapters of {word}" for word in model.lora)
    weights += "".join(f", words of {file}" for file in model.textual_inversion)
    weights += "".join(f", control branch of {word}" for word in model.control_files)
    first_stage = space.first_stage
    kind = "VQGAN" if first_stage is not None and first_stage.has_codes else "autoencoder"
    on = "pixels" if first_stage is None else f"{kind}: {first_stage.run}"
    print(f"sampler: {run}, step {trained.step}, {weights}; {on}", flush=True)
    return trained


def vqgan_run_defaults(argv: list[str], section: str) -> BaseSettings:
    """Returns the data set of the VQGAN run named on the command line, as a flag default; other autoencoders have
    none."""
    chosen = peek_settings(argv, section, "dataset", "load_dir", "logs_root")
    root = chosen.pop("logs_root", FirstStageOutputConfig.logs_root)
    path = first_stage_run(root, FirstStageModelConfig(**chosen)) / "config.yaml"
    if not path.is_file():
        return BaseSettings({})
    trained_on = read_run_config(path).get("data", {}).get("dataset")
    return BaseSettings({} if trained_on is None else {"dataset": trained_on}, path)


class ExperimentConfig(Protocol):
    """Config of an experiment on one trained model: these two groups and the experiment's own."""

    model: ModelConfig | FirstStageModelConfig
    output: OutputConfig | FirstStageOutputConfig


@dataclass(frozen=True)
class ExperimentSetup:
    """What an experiment determines from its flags and the model before its results folder is created."""

    settings: tuple[object, ...]  # the first arguments of `measure`
    provenance: dict[str, Any] = field(default_factory=dict)  # identifies the results beside the config: file hashes
    name: str | None = None  # replaces the experiment's name in that of the folder
    shape: tuple[int, int] | None = None  # height and width of the canvas, if not the model's own
    window_stride: int | None = None
    source: ConditionSource | None = None  # of the conditions of samples, if not the model's own
    is_current: Callable[[dict[str, Any]], bool] = lambda results: True  # whether saved results are still valid
    timed: bool = False  # the results tell seconds or calls, which depend on the batch size
    draws: bool = True  # whether the loaded model draws images; it is then tried before the folder is created

    def identity(self, content: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings that identify the results folder with this config.yaml."""
        origin = {key: value for key, value in content.get("origin", {}).items() if key not in EARLIER_FINGERPRINTS}
        settings = results_identity(content | {"origin": origin})
        return settings | {"batch_size": content["output"]["batch_size"]} if self.timed else settings


def config_groups(config: ExperimentConfig) -> dict[str, object]:
    """Returns the flag groups of a config by name."""
    return {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}


def measure_settings(config: ExperimentConfig) -> tuple[object, ...]:
    """Returns the groups that `measure` receives: all but `model` and `output`."""
    return tuple(group for name, group in config_groups(config).items() if name not in ("model", "output"))


def default_results_name(name: str, model: ModelConfig | FirstStageModelConfig, loaded: TrainedModel) -> str:
    """Returns the name of the results folder of an experiment that is run without --log_dir."""
    averaged = isinstance(model, ModelConfig) and model.ema_length is not None
    length = f"_ema{model.ema_length}" if averaged else ""
    return f"{name}_{loaded.run.name}_{loaded.step}{length}"


@contextmanager
def open_results_folder(
    name: str, config: ExperimentConfig, loaded: TrainedModel, world: DistContext, setup: ExperimentSetup
) -> Iterator[Path]:
    """Creates or reopens the results folder as a run, and locks it, so that two experiments never share one.

    All ranks must call it. Settings that the sampler does not support are refused before the folder is created.
    ValueError: the folder of --log_dir holds another experiment, or another process is writing to it.
    """
    output, sampling = config.output, config_groups(config).get("sampling")
    samples, folder = isinstance(sampling, SamplingConfig), None
    if world.is_main:
        given = condition_provenance(sampling.condition_file) | hint_provenance(sampling.hint) if samples else {}
        provenance = loaded.provenance | data_provenance(config.model, loaded) | setup.provenance | given
        default = default_results_name(setup.name or name, config.model, loaded)
        folder = choose_results_folder(output.logs_root, output.log_dir, default, config, provenance, setup.identity)
    folder = broadcast_object(world, folder)
    if samples and setup.draws and any(world.any(world.is_main and is_new(folder))):
        source = setup.source or loaded.condition_source(sampling)  # may encode the data set, on all ranks
        if world.is_main:
            loaded.dry_run(sampling, source, shape=setup.shape, window_stride=setup.window_stride)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_lock(folder))
            stack.enter_context(deleted_if_refused(folder))
            open_run(folder, config, provenance, setup.identity)
        world.barrier()
        print(f"results: {folder}", flush=True)
        yield folder


def data_provenance(model: ModelConfig | FirstStageModelConfig, loaded: TrainedModel) -> dict[str, Any]:
    """Returns the fingerprint of the data in --data_dir, or without it the one that the trained run recorded."""
    if model.data_dir is None:
        return {key: value for key, value in read_provenance(loaded.run).items() if key == "data_fingerprint"}
    return {"data_fingerprint": content_fingerprint(build_dataset(loaded.data, loaded.reader, "train"))}


def read_results(batches: ResumableBatches) -> dict[str, Any] | None:
    """Returns the results of this experiment if it finished before, else None; read by the main rank for all ranks."""
    world = batches.world
    return broadcast_object(world, load_results(batches.folder) if world.is_main else None)


def hash_files(paths: dict[str, str | None]) -> dict[str, str]:
    """Returns the SHA-256 of each input that exists, a file or the folder of a network with its config.json, by flag:
    results are identified by content, not by path."""
    files = {name: Path(path).expanduser() for name, path in paths.items() if path is not None}
    folders = {name: path for name, path in files.items() if (path / "config.json").is_file()}
    hashes = {name: sha256(path) for name, path in files.items() if path.is_file()}
    return hashes | {name: sha256_of_network(path) for name, path in folders.items()}


def run_experiment(
    name: str,
    config_class: type,
    measure: Callable[..., dict[str, Any] | None],
    report: Callable[[dict[str, Any], Path], str],
    *,
    files: tuple[str, ...] = (),
    prepare: Callable[..., ExperimentSetup] | None = None,
    one_process: bool = False,
) -> None:
    """The main of an experiment: parses the command line, measures unless results exist, and prints the report.

    `measure(*settings, model, batches)` returns the content of results.json on the main rank and None on the others,
    which help to compute the batches. The settings are the config's groups other than `model` and `output`, or those
    that `prepare(config, model, world)` returns; `model` is the sampler or first stage that the group `model` selects.
    `report(results, folder)` returns the text to print. Existing results are reported again, unless a file named by
    one of the flags `files` has changed since, or `prepare` finds them outdated.
    """

    def main(config: ExperimentConfig) -> None:
        output = config.output
        single_process = nullcontext(single_process_world(output.device)) if one_process else None
        with single_process or experiment_world(output.device) as world:
            model = load_trained_model(config.model, output, world)
            if isinstance(model, TrainedSampler):
                config = with_class_numbers(config, model.sampler.n_classes, model.class_names)
            setup = ExperimentSetup(measure_settings(config)) if prepare is None else prepare(config, model, world)
            with open_results_folder(name, config, model, world, setup) as folder:
                batches = open_batches(config, model, world, folder, files)
                measure_once(lambda: measure(*setup.settings, model, batches), report, batches, setup)

    kinds = {each.name: each.type for each in dataclasses.fields(config_class)}
    under = vqgan_run_defaults if kinds["model"] is FirstStageModelConfig else run_defaults
    run_script(main, config_class, Path(sys.argv[0]).stem, base_values=under)


def measure_once(
    measure: Callable[[], dict[str, Any] | None],
    report: Callable[[dict[str, Any], Path], str],
    batches: ResumableBatches,
    setup: ExperimentSetup,
) -> None:
    """Measures, unless there are results that are valid, and prints the report. All ranks must call it."""
    results, world = read_results(batches), batches.world
    if any(world.any(not are_current(results, setup, batches.files))):
        results = measure()
        if world.is_main:
            write_results(batches.folder, results)
    if world.is_main:
        batches.clear()
        print(report(results, batches.folder))


def are_current(results: dict[str, Any] | None, setup: ExperimentSetup, files: dict[str, str]) -> bool:
    """Returns whether results exist and are those that would be measured now."""
    if results is None or not setup.is_current(results):
        return False
    return files.items() <= results.get("run", {}).get("files", {}).items()


def load_trained_model(
    model: ModelConfig | FirstStageModelConfig, output: OutputConfig | FirstStageOutputConfig, world: DistContext
) -> TrainedModel:
    """Loads the sampler or the first stage that the flags select."""
    if isinstance(model, FirstStageModelConfig):
        return load_chosen_stage(model, output.logs_root, world.device, output.amp)
    return load_model(model, output, world)


def open_batches(
    config: ExperimentConfig, model: TrainedModel, world: DistContext, folder: Path, files: tuple[str, ...]
) -> ResumableBatches:
    """Returns the resumable batches of an experiment, with the hashes of the files that the flags `files` name."""
    output = config.output
    run = to_dict(config) | {"step": model.step}
    if files:
        flags = {key: value for group in measure_settings(config) for key, value in flatten_group(group).items()}
        run["files"] = hash_files({name: flags[name] for name in files})
    run |= model.provenance
    if isinstance(output, FirstStageOutputConfig):  # nothing is sampled
        return ResumableBatches(world, folder, run=run)
    return ResumableBatches(world, folder, output.batch_size, output.seed, run)
