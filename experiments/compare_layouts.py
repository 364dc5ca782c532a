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
import numpy as np
import torch
from torch import Tensor

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import BriefTrainingConfig, FolderConfig
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.images import GRID_IMAGES, read_samples, save_grid
from experiments.harness.report import table
from experiments.harness.results import load_results, write_results
from experiments.metrics.layout.arms import ARMS, Bench, Run, count_seeds, ordered_runs
from experiments.metrics.layout.judges import VERSION, Scenes, judge_split, load_judges, load_scenes, open_scenes
from experiments.metrics.layout.layout_pictures import draw_rows, pair_images, save_picture
from experiments.metrics.layout.layouts import BUCKETS
from experiments.metrics.layout.obedience import (
    ALL,
    CROP_ACCURACY,
    OBJECTS,
    Figures,
    Measurement,
    check_judges,
    open_measurement,
    wrong_layouts,
)
from models.ranges import FINITE, MILLION, SEED, check_ranges
from train.cli.files import run_folder
from train.cli.parse import first_stage_data, flatten_group, run_script
from train.config import DataConfig, FirstStageConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.data.transforms import grey_to_rgb
from train.datasets import DatasetConfig, content_fingerprint
from train.files import atomic_write, write_text
from train.first_stage import load_vqgan_stage
from train.identity import comparison_identity, find_differences, format_differences
from train.runs import open_run, run_lock

CODES = "codes"  # the conditions of the best arm, for an absorbing sampler of a VQGAN's codes
TESTED = ("per_object", "mean_prompt", "overlap")  # the first is better than the second in this bucket
BEYOND = 2  # standard errors
FREE = {"arms", "seeds", "guided_arms", "strong_guidance", "ae_weights"}  # may differ in a folder: names of runs tell
PICTURE = "layouts.png"
REAL_SCENES, WRONG = "real scenes", "real scenes, wrong layouts"
FIGURES = ("colour", "AP50", "spurious", "crop FD", "mIoU")  # over all objects, beside the crop accuracy
NOTES = (
    "accuracy: share of the objects whose crop is taken for their class, and of those in each bucket, ± standard error "
    "(binomial, or over several runs if that is larger); the other figures are of all objects"
)
Results = dict[str, dict[str, Any]]  # by name


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
        count_seeds(self.seeds)

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


class Judged(NamedTuple):
    """What the samples of all runs are measured with."""

    measurement: Measurement
    real: Scenes  # the held-out scenes
    names: Sequence[str]  # of the classes, by number
    yardsticks: dict[str, Figures]  # of the real scenes, under their own and under wrong layouts
    hashes: dict[str, str]  # of the judges


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
        judged = load_judged(bench, c, Path(root).expanduser() / ".cache" / "judges")
        comparison = Comparison(bench, judged, folder, load_results(folder) or {"trained": {}, "measured": {}})
        counts = count_seeds(c.seeds)
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
    runs = bench.pixel_runs(c.pixel_arms, c.parameter_tolerance)
    for run in runs.values():
        conditional = bool(run.settings.conditions)
        bench.check_sampling(run, c.strong_guidance if c.guided_arms and conditional else 1.0)
        if conditional and bench.first_stage is not None:
            bench.check_sampling(open_code_run(bench, run, c), 1.0)
    return runs


def open_code_run(bench: Bench, run: Run, c: ComparisonConfig) -> Run:
    """Returns the run of an arm's conditions on codes, of as many parameters as its run on pixels."""
    wanted = bench.count(run.settings, run.space)
    return bench.code_run(run.arm, wanted, c.code_layers, c.code_heads, c.parameter_tolerance)


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
    if training.load_dir is not None or training.hooks or training.resume != "auto":
        raise ValueError(
            "every run of a comparison starts from scratch and without hooks: leave --load_dir, --hooks, --resume out"
        )
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
    held_out = open_scenes(data, with_kinds(config.reader, c.eval_kinds), "val")
    if len(held_out) < c.n_images:
        raise ValueError(f"got n_images {c.n_images}, the validation split has {len(held_out)}: pass --n_images N")
    return Bench(
        sampler=config.sampler,
        data=data,
        reader=config.reader,
        training=config.training,
        sampling=config.sampling,
        train_images=ImageSource(images, data, margin=data.crop_margin),
        held_out=TrainingImages(held_out, seed=0, first_caption=True),
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


def load_judged(bench: Bench, c: ComparisonConfig, cache: Path) -> Judged:
    """Loads the held-out scenes and the judges, which are trained unless they are in the folder `cache`.

    Judges are trained on the kinds of scenes of the training and of the held-out scenes. ValueError: they do not
    recognise real scenes well enough.
    """
    source, kinds = bench.held_out.source, ()
    if c.eval_kinds:
        kinds = tuple(dict.fromkeys((*bench.reader.shapes_kinds, *c.eval_kinds)))
    items = []
    for number in range(c.n_images):
        bench.held_out[[number]]  # an unreadable scene is replaced when it is read
        items.append(bench.held_out.item_index(number))
    real = load_scenes(source, items, "held-out scenes")
    judging = open_scenes(bench.data, with_kinds(bench.reader, kinds), judge_split(bench.data))
    judges = load_judges(judging, cache, c.judge_seed)
    measurement = open_measurement(judges, judging, c.judge_seed)
    wrong = wrong_layouts(real.layouts, torch.tensor(real.items))
    check_judges(measurement, real, wrong, c.min_judge, judging.config)
    yardsticks = {REAL_SCENES: measurement(real.images, real.layouts), WRONG: measurement(real.images, wrong)}
    return Judged(measurement, real, judging.dataset.region_classes, yardsticks, judges.hashes)


# Runs and their results


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison; each is trained and measured once, and kept in the folder."""

    bench: Bench
    judged: Judged
    folder: Path
    results: Results  # "trained" by name of a run, "measured" by name of its samples

    def run(self, run: Run, guidance: float) -> None:
        """Trains a run and measures its samples, unless the results have it. ValueError: with other settings."""
        trained, measured = self.results["trained"], self.results["measured"]
        weights, name = self.folder / f"{run.name}.safetensors", samples_name(run.name, guidance)
        if run.name in trained:
            self.check_unchanged(run)
        if name in measured and (self.folder / f"{name}.npz").is_file():
            return
        if run.name not in trained or not weights.is_file():
            trained[run.name] = self.bench.train(run, weights)
            write_results(self.folder, self.results)  # an interrupted comparison resumes with what is missing
        images = self.bench.sample(run, weights, guidance, len(self.judged.real.items))
        self.save_samples(name, images)
        figures = self.judged.measurement(images, self.judged.real.layouts)
        known = {"arm": run.arm, "seed": run.seed, "guidance": guidance, "run": run.name}
        measured[name] = {**known, "figures": figures}
        write_results(self.folder, self.results)
        print(f"{name}: {CROP_ACCURACY} {figures[ALL][CROP_ACCURACY]:.3f}", flush=True)

    def check_unchanged(self, run: Run) -> None:
        """Raises ValueError if a run was trained with other settings of its arm."""
        there = self.results["trained"][run.name]["settings"]
        now = {key: value for key, value in flatten_group(run.settings).items() if key in there}
        if differences := find_differences({"settings": there}, {"settings": now}, comparison_identity):
            text = format_differences(differences)
            raise ValueError(f"{self.folder} holds {run.name} with other settings ({text}): pass another --log_dir")

    def save_samples(self, name: str, images: Tensor) -> None:
        """Saves samples uint8 (N, C, H, W) as calc_layout.py reads them, and the first of them as a picture."""
        pixels = grey_to_rgb(images).permute(0, 2, 3, 1).numpy()
        with atomic_write(self.folder / f"{name}.npz") as scratch, scratch.open("wb") as file:
            np.savez(file, arr_0=pixels, held_out=np.array(self.judged.real.items))
        save_grid(self.folder / f"{name}.png", images[:GRID_IMAGES])

    def figures_of(self, arm: str, guidance: float = 1.0) -> list[Figures]:
        """Returns what was measured of each run of an arm."""
        measured = self.results["measured"].values()
        return [each["figures"] for each in measured if (each["arm"], each["guidance"]) == (arm, guidance)]

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
        results, yardsticks = self.results, self.judged.yardsticks
        rows = table_rows(results["trained"], results["measured"], yardsticks)
        test = compare_arms(*(self.figures_of(arm) for arm in TESTED[:2]), TESTED[2])
        results.update(yardsticks=yardsticks, judges=self.judged.hashes, test=test)
        write_results(self.folder, results)
        objects = yardsticks[REAL_SCENES][ALL][OBJECTS]
        notes = [
            f"{len(self.judged.real.items):,} held-out layouts with {objects:,} objects; {NOTES}",
            *([] if test is None else [test["text"]]),
        ]
        markdown = [f"| {' | '.join(cells)} |" for cells in (rows[0], ("---",) * len(rows[0]), *rows[1:])]
        write_text(self.folder / "table.md", "\n".join([*markdown, "", *notes]) + "\n")
        self.save_picture()
        files = [str(self.folder / name) for name in ("results.json", "table.md", PICTURE)]
        return "\n".join([table(rows), "", *notes, "", *files])

    def save_picture(self) -> None:
        """Saves a picture of some layouts with the sample of the first run of each arm, and the real scene."""
        columns, real = {}, self.judged.real
        for name, each in sorted(self.results["measured"].items(), key=lambda item: order_of(item[1])):
            heading = each["arm"] if each["guidance"] == 1 else f"{each['arm']}, {each['guidance']:g}"
            if heading not in columns:
                columns[heading] = read_samples(self.folder / f"{name}.npz", None)["image"]
        columns[REAL_SCENES] = grey_to_rgb(real.images)
        rows, headings = pair_images(real.layouts, [*columns.values()]), ("layout", *columns)
        size, palette = tuple(real.images.shape[2:]), self.judged.measurement.palette or ()
        save_picture(self.folder / PICTURE, draw_rows(rows, size, self.judged.names, palette, headings))


def samples_name(run: str, guidance: float) -> str:
    """Returns the name of the samples of a run."""
    return run if guidance == 1 else f"{run}_guidance_{guidance:g}"


def order_of(measured: dict[str, Any]) -> tuple[bool, int, float, int]:
    """Returns by what samples are sorted: the arms of pixels first, in the order of ARMS, then those of codes."""
    name, on_codes, _ = measured["arm"].partition(" on codes")
    return bool(on_codes), [*ARMS].index(name), measured["guidance"], measured["seed"]


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
