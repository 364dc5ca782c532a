"""Compares ways to give a network the layout of an image: equal networks, trained for equally many steps on equal
images, and judged by how well their samples obey the layouts of held-out scenes.

python experiments/compare_layouts.py --config configs/shapes_layouts.yaml
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import _root
from torch import Tensor

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import BriefTrainingConfig, FolderConfig
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.report import table
from experiments.harness.results import load_results, write_results
from experiments.metrics.layout.arms import ARMS, code_run, order_of, pixel_runs
from experiments.metrics.layout.bench import Bench, Run, count_seeds, ordered_runs
from experiments.metrics.layout.comparison import (
    PICTURE,
    REAL_SCENES,
    Comparison,
    Judged,
    Results,
    check_fresh,
    load_judged,
    markdown_table,
    open_held_out,
)
from experiments.metrics.layout.judges import VERSION
from experiments.metrics.layout.layouts import BUCKETS
from experiments.metrics.layout.obedience import (
    ALL,
    CROP_ACCURACY,
    OBJECTS,
    Figures,
)
from models.ranges import FINITE, MILLION, SEED, check_ranges
from train.cli.files import run_folder
from train.cli.parse import first_stage_data, run_script
from train.config import DataConfig, FirstStageConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, build_dataset
from train.datasets import DatasetConfig, content_fingerprint
from train.files import write_text
from train.first_stage import load_vqgan_stage
from train.identity import comparison_identity
from train.runs import open_run, run_lock

CODES = "codes"  # the conditions of the best arm, for an absorbing sampler of a VQGAN's codes
TESTED = ("per_object", "mean_prompt", "overlap")  # the first is better than the second in this bucket
BEYOND = 2  # standard errors
FREE = {"arms", "seeds", "guided_arms", "strong_guidance", "ae_weights"}  # may differ in a folder: names of runs tell
WRONG = "real scenes, wrong layouts"
FIGURES = ("colour", "AP50", "spurious", "crop FD", "mIoU")  # over all objects, beside the crop accuracy
NOTES = (
    "accuracy: share of the objects whose crop is taken for their class, and of those in each bucket, ± standard error "
    "(binomial, or over several runs if that is larger); the other figures are of all objects"
)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    arms: tuple[str, ...] = (*ARMS, CODES)
    """Ways to give the layout: those in ARMS of experiments/metrics/layout/arms.py; codes: the best of them on a
    VQGAN's codes, if --ae_load_dir names one."""
    seeds: tuple[str, ...] = ("mean_prompt=3", "per_object=3")
    """Runs of arms, as ARM=COUNT, with seeds from --seed on; the others have one."""
    n_images: int = 250
    """Held-out layouts, of each of which every run generates an image."""
    eval_kinds: tuple[str, ...] = ()
    """Kinds of scenes of the held-out layouts; by default those of --shapes_kinds, which runs are trained on."""
    guided_arms: int = 2
    """How many of the best arms, by crop accuracy, are sampled with --strong_guidance too."""
    strong_guidance: float = 2.0
    """Guidance of the best arms; otherwise it is 1."""
    parameter_tolerance: float = 0.05
    """Largest difference of an arm's parameters from those of the network without layouts, as a share of these."""
    code_layers: int = 4
    """codes: layers of the transformer, whose width follows from the number of parameters."""
    code_heads: int = 4
    """codes: attention heads."""
    min_judge: float | None = None
    """Share of real crops that the judge must recognise, or the command refuses; as that of calc_layout.py."""
    judge_seed: int = 0
    """Random seed of the judges."""
    generated_at_once: int = 50
    """Images sampled at once; does not change the images."""

    EVERYDAY = ("arms", "seeds", "n_images", "eval_kinds")
    RANGES = {
        **{"n_images": "[2, 1000000000]", "guided_arms": "[0, 100]", "strong_guidance": FINITE, "judge_seed": SEED},
        **{"parameter_tolerance": "(0, 1000]", "code_layers": "[1, 1000]", "code_heads": "[1, 256]"},
        **{"min_judge": "[0, 1]", "generated_at_once": MILLION},
    }

    def __post_init__(self):
        check_ranges(self)
        known = (*ARMS, CODES)
        if len({*self.arms}) < len(self.arms) or {*self.arms} - {*known} or not self.pixel_arms:
            wanted = f"one or more of {', '.join(ARMS)}, each once, and {CODES} beside them"
            raise ValueError(f"got arms {list(self.arms)}, wanted {wanted}")
        count_seeds(self.seeds, ARMS)

    @property
    def pixel_arms(self) -> list[str]:
        """The arms whose networks generate pixels."""
        return [name for name in ARMS if name in self.arms]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a small network with each way to give it layouts and measures how well its samples obey held-out ones.

    Writes results.json, table.md, layouts.png, and the samples and weights of each run to <logs_root>/<log_dir>.
    """

    EXAMPLES = (
        "python experiments/compare_layouts.py --config configs/shapes_layouts.yaml",
        "python experiments/compare_layouts.py --config configs/shapes_layouts.yaml --arms map per_object",
    )
    NOT_EVERYDAY = ("sampler", "sampling")

    comparison: ComparisonConfig
    sampler: SamplerConfig
    first: FirstStageConfig
    data: DataConfig
    reader: DatasetConfig
    training: BriefTrainingConfig
    sampling: SamplingConfig
    output: FolderConfig


def main(config: Config) -> None:
    c, output = config.comparison, config.output
    check_settings(config.sampler, config.training, config.sampling, guided=c.guided_arms > 0)
    bench = prepare(config)
    runs = open_runs(bench, c)
    provenance = {"data_fingerprint": content_fingerprint(bench.train_images.dataset), "judge_version": VERSION}
    if bench.first_stage is not None:
        provenance |= {"ae_weights": bench.first_stage.weights}
    name, root = f"compare_layouts_{config.data.dataset}", output.logs_root
    folder = choose_results_folder(root, output.log_dir, name, config, provenance, identity)
    with run_lock(folder), deleted_if_refused(folder):
        open_run(folder, config, provenance, identity)
        print(f"results: {folder}", flush=True)
        reader, cache = judging_reader(config.reader, c.eval_kinds), Path(root).expanduser() / ".cache" / "judges"
        judged = load_judged(bench, reader, c.n_images, c.min_judge, c.judge_seed, cache)
        results = load_results(folder) or {"trained": {}, "measured": {}}
        comparison = LayoutComparison(bench, judged, folder, results, make_yardsticks(judged))
        counts = count_seeds(c.seeds, ARMS)
        for arm, number in ordered_runs(c.pixel_arms, counts):
            comparison.run(runs[arm].with_seed(config.training.seed + number), 1.0)
        best = comparison.best_arms(c.pixel_arms)
        for arm, number in ordered_runs(best[: c.guided_arms], counts):
            comparison.run(runs[arm].with_seed(config.training.seed + number), c.strong_guidance)
        if best and bench.first_stage is not None:
            comparison.run(open_code_run(bench, runs[best[0]], c), 1.0)
        print(f"\n{comparison.report()}")


def open_runs(bench: Bench, c: ComparisonConfig) -> dict[str, Run]:
    """Returns the first run of each arm of pixels. ValueError, before hours of training, if networks are of unequal
    size, or cannot sample with these settings; also on codes, where any of the arms may be the best."""
    runs = pixel_runs(bench, c.pixel_arms, c.parameter_tolerance)
    for run in runs.values():
        conditional = bool(run.settings.conditions)
        bench.check_sampling(run, c.strong_guidance if c.guided_arms and conditional else 1.0)
        if conditional and bench.first_stage is not None:
            bench.check_sampling(open_code_run(bench, run, c), 1.0)
    return runs


def open_code_run(bench: Bench, run: Run, c: ComparisonConfig) -> Run:
    """Returns the run of an arm's conditions on codes, of as many parameters as its run on pixels."""
    wanted = bench.count(run.settings, run.space)
    return code_run(bench, run.arm, wanted, c.code_layers, c.code_heads, c.parameter_tolerance)


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a folder of results: arms and seeds may be added to it."""
    return {key: value for key, value in comparison_identity(content).items() if key not in FREE}


def check_settings(sampler: SamplerConfig, training: TrainingConfig, sampling: SamplingConfig, guided: bool) -> None:
    """Raises ValueError for settings that arms have of their own, or that would make runs unequal."""
    if sampler.sampler != "ddpm":
        raise ValueError(f"got sampler {sampler.sampler}, wanted ddpm, whose UNet reads all kinds of layouts")
    regions = "" if sampler.region_attention == "none" else sampler.region_attention
    for name, value in {"conditions": sampler.conditions, "adapt": sampler.adapt, "region_attention": regions}.items():
        if value:
            raise ValueError(f"got {name} {value}, but every arm has settings of its own: leave --{name} out")
    check_fresh(training)
    if sampling.guidance != 1 or sampling.condition_file is not None:
        given = f"guidance {sampling.guidance:g}" if sampling.guidance != 1 else "a condition_file"
        raise ValueError(f"got {given}, but layouts are held-out ones, and guidance is 1 or --strong_guidance")
    if guided and sampler.condition_drop == 0:
        raise ValueError("got condition_drop 0, without which there is no guidance: pass --guided_arms 0")


def prepare(config: Config) -> Bench:
    """Opens the training images, the held-out scenes and, if one is named, the VQGAN.

    ValueError: no such scenes, or fewer than images are wanted.
    """
    c, data, output = config.comparison, config.data, config.output
    world, first = single_process_world(config.training.device), None
    if CODES in c.arms and config.first.ae_load_dir is None:
        print(f"{CODES}: left out, pass the run of a VQGAN as --ae_load_dir", flush=True)
    elif CODES in c.arms:
        run, step = run_folder(output.logs_root, config.first.ae_load_dir), config.first.ae_load_step
        first = load_vqgan_stage(run, step, world.device, config.training.amp, logs_root=output.logs_root)
        first.check_fits(data)
    images = build_dataset(data, config.reader, "train")
    return Bench(
        sampler=config.sampler,
        data=data,
        reader=config.reader,
        training=config.training,
        sampling=config.sampling,
        train_images=ImageSource(images, data, margin=data.crop_margin),
        held_out=open_held_out(data, with_kinds(config.reader, c.eval_kinds), c.n_images),
        first_stage=first,
        world=world,
        sampled_at_once=c.generated_at_once,
    )


def with_kinds(reader: DatasetConfig, kinds: Sequence[str]) -> DatasetConfig:
    """Returns a data set's options with other kinds of scenes, if any are named.

    ValueError: the data set has no kinds of scenes, or not these.
    """
    if not kinds:
        return reader
    if not hasattr(reader, "shapes_kinds"):
        raise ValueError("got --eval_kinds for data whose scenes have no kinds: leave it out, or use --dataset shapes")
    try:
        return replace(reader, shapes_kinds=tuple(kinds))
    except ValueError as error:
        raise ValueError(f"--eval_kinds: {error}") from error


def judging_reader(reader: DatasetConfig, eval_kinds: Sequence[str]) -> DatasetConfig:
    """Returns the options of the scenes that judges are trained on: the kinds of training and of the held-out ones."""
    return with_kinds(reader, tuple(dict.fromkeys((*reader.shapes_kinds, *eval_kinds))) if eval_kinds else ())


def make_yardsticks(judged: Judged) -> dict[str, Figures]:
    """Returns the figures of the real scenes, under their own and under wrong layouts."""
    real, measurement = judged.real, judged.measurement
    return {REAL_SCENES: measurement(real.images, real.layouts), WRONG: measurement(real.images, judged.wrong)}


# Runs and their results


@dataclass(frozen=True)
class LayoutComparison(Comparison):
    """The comparison of ways to give layouts."""

    yardsticks: dict[str, Figures]  # of the real scenes, under their own and under wrong layouts

    def measure(self, images: Tensor) -> Figures:
        return self.judged.measurement(images, self.judged.real.layouts)

    def describe(self, figures: Figures) -> str:
        return f"{CROP_ACCURACY} {figures[ALL][CROP_ACCURACY]:.3f}"

    def best_arms(self, arms: Sequence[str]) -> list[str]:
        """Returns those arms that give a layout, by their crop accuracy over all objects, the highest first."""
        accuracy = {
            name: mean(figures[ALL][CROP_ACCURACY] for figures in self.figures_of(name))
            for name in arms
            if ARMS[name].conditions
        }
        return sorted(accuracy, key=lambda name: -accuracy[name])

    def report(self) -> str:
        """Writes the results, the table and the picture of layouts; returns what to print."""
        results, yardsticks = self.results, self.yardsticks
        rows = table_rows(results["trained"], results["measured"], yardsticks)
        test = compare_arms(*(self.figures_of(arm) for arm in TESTED[:2]), TESTED[2])
        results.update(yardsticks=yardsticks, judges=self.judged.hashes, test=test)
        write_results(self.folder, results)
        objects = yardsticks[REAL_SCENES][ALL][OBJECTS]
        notes = [
            f"{len(self.judged.real.items):,} held-out layouts with {objects:,} objects; {NOTES}",
            *([] if test is None else [test["text"]]),
        ]
        write_text(self.folder / "table.md", "\n".join([markdown_table(rows), "", *notes]) + "\n")
        self.save_picture(order_of)
        files = [str(self.folder / name) for name in ("results.json", "table.md", PICTURE)]
        return "\n".join([table(rows), "", *notes, "", *files])


def table_rows(trained: Results, measured: Results, yardsticks: dict[str, Figures]) -> list[tuple[str, ...]]:
    """Returns the rows of the table, one for each arm and guidance between the yardsticks; the first is its heading."""
    rows = [("arm", "guidance", "runs", "parameters", "minutes", "accuracy", *BUCKETS, *FIGURES)]
    rows.append((REAL_SCENES, "", "", "", "", *format_figures([yardsticks[REAL_SCENES]])))
    for (_, _, guidance), group in groupby(sorted(measured.values(), key=order_of), lambda each: order_of(each)[:3]):
        group = list(group)
        runs = [trained[each["run"]] for each in group]
        cost = f"{runs[0]['parameters']:,}", f"{mean(run['minutes'] for run in runs):.1f}"
        figures = format_figures([each["figures"] for each in group])
        rows.append((group[0]["arm"], f"{guidance:g}", str(len(group)), *cost, *figures))
    return [*rows, (WRONG, "", "", "", "", *format_figures([yardsticks[WRONG]]))]


def format_figures(runs: Sequence[Figures]) -> list[str]:
    """Formats the figures of the runs of an arm: accuracies with their standard errors, and the means of others."""
    accuracies = [accuracy_of(runs, bucket) for bucket in (ALL, *BUCKETS)]
    cells = ["-" if each is None else f"{each.mean:.3f} ± {each.error:.3f}" for each in accuracies]
    for name in FIGURES:
        values = [run[ALL].get(name) for run in runs]
        cells.append("-" if None in values else f"{mean(values):.3f}")
    return cells


class Accuracy(NamedTuple):
    """A crop accuracy and its standard error."""

    mean: float
    error: float


def accuracy_of(runs: Sequence[Figures], bucket: str) -> Accuracy | None:
    """Returns the mean crop accuracy of runs in a bucket; None without runs or objects.

    Its standard error is the binomial one, or that over the runs if there are several and it is larger: their spread
    may be small by chance.
    """
    values = [run[bucket][CROP_ACCURACY] for run in runs]
    if not values or None in values:
        return None
    share = mean(values)
    error = math.sqrt(share * (1 - share) / (runs[0][bucket][OBJECTS] * len(runs)))
    return Accuracy(share, max(error, stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0))


def compare_arms(better: Sequence[Figures], worse: Sequence[Figures], bucket: str) -> dict[str, Any] | None:
    """Returns whether the first of TESTED is better than the second by more than BEYOND standard errors of their
    difference; None if one of them was not measured."""
    first, second = accuracy_of(better, bucket), accuracy_of(worse, bucket)
    if first is None or second is None:
        return None
    difference, error = first.mean - second.mean, math.hypot(first.error, second.error)
    passed = difference > BEYOND * error
    text = (
        f"{TESTED[0]} above {TESTED[1]} in the bucket {bucket}: {difference:+.3f} ± {error:.3f}, "
        f"{'more' if passed else 'not more'} than {BEYOND} standard errors"
    )
    return {"difference": difference, "standard_error": error, "passed": passed, "text": text}


if __name__ == "__main__":
    run_script(main, Config, "compare_layouts", base_values=first_stage_data)
