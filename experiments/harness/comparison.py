"""Measurements of --samples against --reference: of two sets of images without a trained run, or of a run."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from experiments.harness.batches import ResumableBatches, broadcast_object, experiment_world
from experiments.harness.experiment import (
    ExperimentSetup,
    ModelConfig,
    OutputConfig,
    hash_files,
    measure_once,
    model_run,
    peek_settings,
    run_experiment,
)
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.image_sets import (
    MIXED_SIZE,
    AnySet,
    SetOptions,
    Size,
    check_channels,
    find_run,
    has_shape,
    open_image_set,
)
from models.ranges import FINITE, SIZE, check_ranges
from train.cli.errors import one_line_errors
from train.cli.parse import BaseSettings, flatten_group, run_script, to_dict
from train.cli.values import peek_flag_values
from train.datasets._channels import PICTURES
from train.distributed import DistContext
from train.identity import results_identity
from train.runs import open_run, run_lock
from train.trained_sampler import TrainedSampler

RUN_FLAGS = ("load_dir", "sampler", "dataset")  # those that select a run
MAX_SIDE = 1024  # pixels of the longer side of images that are measured: of photographs, a batch takes gigabytes
Report = Callable[[dict[str, Any], Path], str]
Measure = Callable[..., dict[str, Any] | None]


class Measurement(Protocol):
    """The flags of a measurement of one set of images against another."""

    samples: str | None
    reference: str | None
    split: str
    n_samples: int


@dataclass(frozen=True, kw_only=True)
class SetsConfig:
    """Sets of images."""

    data_dir: str | None = None
    """Folder of the data set that --samples or --reference names; by default the one in datasets.yaml."""
    allow: tuple[str, ...] = ()
    """Dotted paths of your own classes and functions that the run named as --reference may import."""
    n_channels: int | None = None
    """Channels of the images of a folder or a reader without a preset; by default 3, of grey and RGB images."""
    data_range: tuple[float, float] | None = None
    """Lowest and highest value of their 16-bit and float images."""

    RANGES = {"n_channels": SIZE, "data_range": FINITE}

    def __post_init__(self):
        check_ranges(self)
        if self.data_range is not None and not self.data_range[0] < self.data_range[1]:
            got = " ".join(map(str, self.data_range))
            raise ValueError(f"got --data_range {got}, wanted the lower first: pass --data_range LOWEST HIGHEST")


class PairConfig(Protocol):
    """The config of a measurement without a trained run."""

    measurement: Measurement
    sets: SetsConfig
    output: OutputConfig


def run_comparison(
    name: str,
    config_class: type,
    measure: Measure,
    report: Report,
    *,
    pair_class: type,
    measure_pair: Measure,
    files: tuple[str, ...],
    prepare: Callable[..., ExperimentSetup],
) -> None:
    """The main of a measurement that needs no run if the command line names both sets and neither is a run's samples.

    Then it parses `pair_class` and calls `measure_pair(settings, samples, reference, batches)`; otherwise it is
    `run_experiment`, for which `--samples RUN` is the same as `--load_dir RUN`. A flag that selects a run (RUN_FLAGS)
    always does that, for the sake of its held-out images, and so does --ref_stats with an .npz file as --samples where
    the default run exists. Flags in a --config file count as those on the command line.
    """
    argv, script = sys.argv[1:], Path(sys.argv[0])
    with one_line_errors(script.name):
        given = peek_settings(argv, script.stem, "samples", "reference", "ref_stats", "logs_root", *RUN_FLAGS)
        if measures_pair(given):
            groups = get_type_hints(pair_class)
            defaults = flatten_group(groups["measurement"]()) | flatten_group(groups["sets"]())  # no data set's preset
            base = BaseSettings(defaults, "defaults")
            main = pair_main(name, measure_pair, report, tuple(file for file in files if file != "samples"))
            return run_script(main, pair_class, script.stem, base_values=lambda argv, section: base)
        for flag in ("n_channels", "data_range"):
            if peek_flag_values(argv, flag) is not None:
                raise ValueError(f"got --{flag}, but images beside a run are read as its own: leave it out")
        if (run := run_as_samples(given)) is not None:
            sys.argv += [f"--load_dir={run}", "--samples=None"]
    return run_experiment(name, config_class, measure, report, files=files, prepare=prepare)


def run_as_samples(given: Mapping[str, Any]) -> Path | None:
    """Returns the run that --samples names, unless another flag selects one."""
    if "samples" not in given or not given.keys().isdisjoint(RUN_FLAGS):
        return None
    return find_run(str(given["samples"]), given.get("logs_root", OutputConfig.logs_root))


def measures_pair(given: Mapping[str, Any]) -> bool:
    """Returns whether the flags name two sets of images, or one and statistics, and no run to measure them beside."""
    if "samples" not in given or not given.keys().isdisjoint(RUN_FLAGS) or run_as_samples(given) is not None:
        return False
    default = model_run(given.get("logs_root", OutputConfig.logs_root), ModelConfig())
    beside_default = str(given["samples"]).endswith(".npz") and (default / "config.yaml").is_file()
    return "reference" in given or ("ref_stats" in given and not beside_default)


def pair_main(name: str, measure: Measure, report: Report, files: tuple[str, ...]) -> Callable[[PairConfig], None]:
    """Returns the main of a measurement of two sets of images."""

    def main(config: PairConfig) -> None:
        output, settings = config.output, config.measurement
        with experiment_world(output.device) as world:
            given = open_sets(settings, output, world, config.sets)
            channels = [(each.name, each.data.n_channels) for each in given.values()]
            check_channels(channels, "pass others, or --n_channels N for those of a folder")
            samples, reference = given["samples"], given.get("reference")
            flags = flatten_group(settings)
            names = samples.name, flags["ref_stats"] if reference is None else reference.name
            hashes = content_hashes(given) | hash_files({file: flags[file] for file in files})
            with open_pair_folder(default_name(name, *names), config, hashes, world) as folder:
                run = to_dict(config) | {"files": hashes}
                batches = ResumableBatches(world, folder, output.batch_size, output.seed, run)
                setup = ExperimentSetup(())
                measure_once(lambda: measure(settings, samples, reference, batches), report, batches, setup)

    return main


def default_name(measured: str, *words: str) -> str:
    """Returns the name of the results folder of two sets of images, such as FID_photographs_digits_val; of paths that
    end alike, more is kept: FID_a_val_b_val."""
    paths = [path.parent if path.name == "samples.npz" and path.parent.name else path for path in map(Path, words)]
    longest = max(len(path.parts) for path in paths)
    tails = [["_".join(path.parts[-n:]).removesuffix(".npz") for path in paths] for n in range(1, longest + 1)]
    names = next((names for names in tails if len({*names}) > 1), tails[0])
    return re.sub(r"[^\w.-]+", "_", "_".join([measured, *names]))


def open_sets(settings: Measurement, output: OutputConfig, world: DistContext, sets: SetsConfig) -> dict[str, AnySet]:
    """Opens the sets that --samples and --reference name; of a run as the reference, the images of the next seed."""
    options = SetOptions(
        world=world,
        logs_root=output.logs_root,
        split=settings.split,
        count=settings.n_samples,
        seed=output.seed + 1,  # other images than those of a run as the samples
        amp=output.amp,
        data_dir=sets.data_dir,
        allow=sets.allow,
        n_channels=sets.n_channels,
        data_range=sets.data_range,
    )
    words = {"samples": settings.samples, "reference": settings.reference}
    return {name: open_image_set(word, options) for name, word in words.items() if word is not None}


def open_sets_beside_run(
    settings: Measurement, output: OutputConfig, model: TrainedSampler, allow: tuple[str, ...]
) -> dict[str, AnySet]:
    """Opens the sets that a measurement of a run names, with its channels and range.

    Except an .npz file given as --samples whose images have the run's shape: it is read as it is, codes included.
    """
    data, samples = model.data, settings.samples
    n_channels = 3 if data.n_channels in PICTURES else data.n_channels
    if samples is not None and samples.endswith(".npz") and has_shape(Path(samples), (*data.size, n_channels)):
        settings = replace(settings, samples=None)
    read_as = SetsConfig(allow=allow, n_channels=n_channels, data_range=data.data_range)
    sets = open_sets(settings, output, model.world, read_as)
    for each in sets.values():
        check_channels([(each.name, each.data.n_channels), (str(model.run), n_channels)], "pass other images")
    return sets


def content_hashes(sets: dict[str, AnySet]) -> dict[str, str]:
    """Returns the hash of the content of each set, by the name of its flag."""
    return {name: images.content_hash for name, images in sets.items()}


def common_size(samples: AnySet, reference: AnySet | None) -> Size:
    """Returns the size at which two sets are measured: that of the samples, else of the reference, else MIXED_SIZE;
    larger images are reduced to MAX_SIDE."""
    height, width = samples.size or (reference and reference.size) or MIXED_SIZE
    scale = min(1, MAX_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


@contextmanager
def open_pair_folder(default: str, config: PairConfig, hashes: dict[str, str], world: DistContext) -> Iterator[Path]:
    """Creates or reopens the results folder of two sets of images, and locks it. All ranks must call it.

    ValueError: the folder of --log_dir holds another experiment, or another process is writing to it.
    """
    output, folder = config.output, None
    provenance = {f"{name}_content": content for name, content in hashes.items()}
    identity = partial(pair_identity, current=flatten_group(config.measurement), hashes=hashes)
    if world.is_main:
        folder = choose_results_folder(output.logs_root, output.log_dir, default, config, provenance, identity)
    folder = broadcast_object(world, folder)
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_lock(folder))
            stack.enter_context(deleted_if_refused(folder))
            open_run(folder, config, provenance, identity)
        world.barrier()
        print(f"results: {folder}", flush=True)
        yield folder


def pair_identity(content: dict[str, Any], *, current: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings that identify the results of two sets of images with this config.yaml.

    An input is the same as the `current` one if its path is, or its content: the first may have changed since (it is
    measured again), and it may have moved.
    """
    origin, groups = content.get("origin", {}), {name: group for name, group in content.items() if name != "origin"}
    settings = results_identity(groups)
    moved = {name: current[name] for name in hashes if origin.get(f"{name}_content") == hashes[name]}
    return {key: value for key, value in (settings | moved).items() if key != "data_dir"}
