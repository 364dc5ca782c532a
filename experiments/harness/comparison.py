"""Measurements of --samples against --reference: of two sets of images without a trained run, or of a run."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from experiments.harness.batches import ResumableBatches, experiment_world
from experiments.harness.experiment import (
    ExperimentSetup,
    ModelConfig,
    OutputConfig,
    deleted_if_refused,
    hash_files,
    measure_once,
    model_run,
    run_experiment,
)
from experiments.harness.image_sets import MIXED_SIZE, AnySet, SetOptions, Size, names_run, open_image_set
from experiments.harness.results import load_results
from train.cli.files import run_folder
from train.cli.parse import flatten_group, run_script, to_dict
from train.cli.values import peek_flag
from train.distributed import DistContext
from train.runs import open_run, run_lock

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
    `run_experiment`, for which `--samples RUN` is the same as `--load_dir RUN`. A flag that selects a run (--load_dir,
    --sampler, --dataset) always does that, for the sake of its held-out images, and so does --ref_stats where the
    default run exists.
    """
    argv, root = sys.argv[1:], peek_flag(sys.argv, "logs_root") or OutputConfig.logs_root
    samples, reference, statistics = (peek_flag(argv, flag) for flag in ("samples", "reference", "ref_stats"))
    selects_run = any(peek_flag(argv, flag) is not None for flag in ("load_dir", "sampler", "dataset"))
    has_default = (model_run(root, ModelConfig()) / "config.yaml").is_file()
    if names_run(samples, root) and not selects_run:
        sys.argv[1:] = [re.sub(r"^--samples(?==|$)", "--load_dir", word) for word in argv]
    elif samples is not None and not selects_run and (reference or (statistics and not has_default)):
        defaults = flatten_group(get_type_hints(pair_class)["measurement"]())  # not a data set's preset
        main = pair_main(name, measure_pair, report, tuple(file for file in files if file != "samples"))
        return run_script(main, pair_class, Path(sys.argv[0]).stem, base_values=lambda argv, section: defaults)
    return run_experiment(name, config_class, measure, report, files=files, prepare=prepare)


def pair_main(name: str, measure: Measure, report: Report, files: tuple[str, ...]) -> Callable[[PairConfig], None]:
    """Returns the main of a measurement of two sets of images."""

    def main(config: PairConfig) -> None:
        output, settings, sets = config.output, config.measurement, config.sets
        with experiment_world(output.device) as world:
            given = open_sets(settings, output, world, sets.data_dir, sets.allow)
            samples, reference = given["samples"], given.get("reference")
            flags = flatten_group(settings)
            names = samples.name, flags["ref_stats"] if reference is None else reference.name
            folder = run_folder(output.logs_root, output.log_dir or default_name(name, *names))
            hashes = content_hashes(given) | hash_files({file: flags[file] for file in files})
            with lock_results(folder, config, hashes, world) as setup:
                run = to_dict(config) | {"files": hashes}
                batches = ResumableBatches(world, folder, output.batch_size, output.seed, run)
                measure_once(lambda: measure(settings, samples, reference, batches), report, batches, setup)

    return main


def default_name(measured: str, *names: str) -> str:
    """Returns the name of the results folder of two sets of images, such as FID_photographs_digits_val."""
    paths = [path.parent if path.name == "samples.npz" else path for path in map(Path, names)]
    return re.sub(r"[^\w.-]+", "_", "_".join([measured, *(path.name.removesuffix(".npz") for path in paths)]))


def open_sets(
    settings: Measurement,
    output: OutputConfig,
    world: DistContext,
    data_dir: str | None = None,
    allow: tuple[str, ...] = (),
) -> dict[str, AnySet]:
    """Opens the sets that --samples and --reference name; of a run as the reference, the images of the next seed."""
    options = SetOptions(
        world=world,
        logs_root=output.logs_root,
        split=settings.split,
        count=settings.n_samples,
        seed=output.seed + 1,  # other images than those of a run as the samples
        amp=output.amp,
        data_dir=data_dir,
        allow=allow,
    )
    words = {"samples": settings.samples, "reference": settings.reference}
    return {name: open_image_set(word, options) for name, word in words.items() if word is not None}


def open_sets_beside_run(
    settings: Measurement, output: OutputConfig, world: DistContext, allow: tuple[str, ...]
) -> dict[str, AnySet]:
    """Opens the sets that a measurement of a run names, except a file given as --samples, which is read as it is."""
    is_file = settings.samples is not None and settings.samples.endswith(".npz")
    return open_sets(replace(settings, samples=None) if is_file else settings, output, world, allow=allow)


def content_hashes(sets: dict[str, AnySet]) -> dict[str, str]:
    """Returns the hash of the content of each set, by the name of its flag."""
    return {name: images.content_hash for name, images in sets.items()}


def common_size(samples: AnySet, reference: AnySet | None) -> Size:
    """Returns the size at which two sets are measured: that of the samples, else of the reference, else MIXED_SIZE."""
    return samples.size or (reference and reference.size) or MIXED_SIZE


@contextmanager
def lock_results(folder: Path, config: object, hashes: dict[str, str], world: DistContext) -> Iterator[ExperimentSetup]:
    """Creates or reopens the results folder of two sets of images, and locks it. All ranks must call it.

    Images are the same as those of earlier results if their path is, or their content: the first may have changed since
    (they are measured again), and they may have moved.
    """
    setup = ExperimentSetup(())
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_lock(folder))
            stack.enter_context(deleted_if_refused(folder))
            before = (load_results(folder) or {"run": {}})["run"].get("files", {})
            same = {"data_dir"} | {name for name, content in hashes.items() if before.get(name) == content}

            def identity(content: dict[str, Any]) -> dict[str, Any]:
                return {key: value for key, value in setup.identity(content).items() if key not in same}

            open_run(folder, config, {}, identity)
        world.barrier()
        print(f"results: {folder}", flush=True)
        yield setup
