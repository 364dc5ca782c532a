"""Compares a model of captions with what panoptic maps add: words of regions, experts by class, a learned router.

python experiments/compare_panoptic.py --config configs/shapes_panoptic.yaml
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

import _root
from torch import Tensor

from experiments.harness.batches import single_process_world
from experiments.harness.experiment import BriefTrainingConfig, FolderConfig
from experiments.harness.folders import choose_results_folder, deleted_if_refused
from experiments.harness.report import mean_and_deviation, table
from experiments.harness.results import load_results, write_results
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
from experiments.metrics.layout.judges import (
    REFERENCE_SCENES,
    VERSION,
    judge_split,
    load_scenes,
    open_scenes,
    training_indices,
)
from experiments.metrics.layout.layout_pictures import MOST_SHOWN
from experiments.metrics.layout.layouts import Layouts
from experiments.metrics.layout.map_obedience import (
    CLASS,
    COLOR,
    EVERY,
    MEANINGS,
    MIOU,
    REGIONS,
    Groups,
    MapFigures,
    estimate_words,
    name_groups,
)
from experiments.metrics.layout.obedience import feature_distance
from experiments.metrics.layout.scene_network import scene_features
from models.ranges import MILLION, SEED, check_ranges
from train.cli.parse import run_script
from train.config import DataConfig, SamplerConfig, SamplingConfig, TrainingConfig
from train.data.loading import ImageSource, build_dataset
from train.datasets import DatasetConfig, content_fingerprint
from train.files import write_text
from train.identity import comparison_identity
from train.runs import open_run, run_lock
from train.samplers._conditions import with_declared_values
from train.samplers._experts import read_groups
from train.spaces import PixelSpace

ARMS = {
    "text": "captions alone",
    "words": "and the words of regions, in masked cross-attention",
    "experts": "and experts by groups of classes",
    "router": "in place of these as many experts behind a learned router",
}
FREE = {"arms", "seeds"}  # may differ in a folder: names of runs tell
WRONG = "real scenes, wrong maps"
FD = "FD"
FIGURES = (MIOU, CLASS, COLOR)  # of maps

Measured = dict[str, Any]  # "maps": MapFigures, as JSON has them; FD


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    arms: tuple[str, ...] = tuple(ARMS)
    """Parts of the model that --conditions and --experts describe: text, its conditions without regions; words, all
    of them; experts, the whole model; router, with as many experts behind a learned router."""
    seeds: tuple[str, ...] = ("text=3", "experts=3")
    """Runs of arms, as ARM=COUNT, with seeds from --seed on; the others have one."""
    n_images: int = 250
    """Held-out maps, of each of which every run generates an image."""
    min_judge: float | None = None
    """Share of real crops that the judge must recognise, or the command refuses; as that of calc_layout.py."""
    judge_seed: int = 0
    """Random seed of the judges."""
    generated_at_once: int = 50
    """Images sampled at once; does not change the images."""

    EVERYDAY = ("arms", "seeds", "n_images")
    RANGES = {
        **{"n_images": "[2, 1000000000]", "judge_seed": SEED},
        **{"min_judge": "[0, 1]", "generated_at_once": MILLION},
    }

    def __post_init__(self):
        check_ranges(self)
        if len({*self.arms}) < len(self.arms) or {*self.arms} - {*ARMS} or not self.arms:
            raise ValueError(f"got arms {list(self.arms)}, wanted one or more of {', '.join(ARMS)}, each once")
        count_seeds(self.seeds, ARMS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains parts of a panoptic model for equally many steps, and measures how well their samples obey held-out maps.

    Writes results.json, table.md, layouts.png, and the samples and weights of each run to <logs_root>/<log_dir>.
    """

    EXAMPLES = (
        "python experiments/compare_panoptic.py --config configs/shapes_panoptic.yaml",
        "python experiments/compare_panoptic.py --config configs/shapes_panoptic.yaml --arms words experts",
    )
    NOT_EVERYDAY = ("sampler", "sampling")

    comparison: ComparisonConfig
    sampler: SamplerConfig
    data: DataConfig
    reader: DatasetConfig
    training: BriefTrainingConfig
    sampling: SamplingConfig
    output: FolderConfig


def main(config: Config) -> None:
    c, output = config.comparison, config.output
    check_settings(config.sampler, config.training, config.sampling)
    bench = prepare(config)
    runs = open_runs(bench, c.arms)
    provenance = {"data_fingerprint": content_fingerprint(bench.train_images.dataset), "judge_version": VERSION}
    name, root = f"compare_panoptic_{config.data.dataset}", output.logs_root
    folder = choose_results_folder(root, output.log_dir, name, config, provenance, identity)
    with run_lock(folder), deleted_if_refused(folder):
        open_run(folder, config, provenance, identity)
        print(f"results: {folder}", flush=True)
        cache = Path(root).expanduser() / ".cache" / "judges"
        judged = load_judged(bench, config.reader, c.n_images, c.min_judge, c.judge_seed, cache)
        results = load_results(folder) or {"trained": {}, "measured": {}}
        groups = name_groups(read_groups(config.sampler.experts, judged.names), judged.names)
        comparison = PanopticComparison(bench, judged, folder, results, groups, reference_features(bench, judged))
        for arm, number in ordered_runs(c.arms, count_seeds(c.seeds, ARMS)):
            comparison.run(runs[arm].with_seed(config.training.seed + number), config.sampling.guidance)
        print(f"\n{comparison.report()}")


def identity(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that identify a folder of results: arms and seeds may be added to it."""
    return {key: value for key, value in comparison_identity(content).items() if key not in FREE}


def check_settings(sampler: SamplerConfig, training: TrainingConfig, sampling: SamplingConfig) -> None:
    """Raises ValueError for settings that do not describe a panoptic model, or would make runs unequal."""
    if sampler.sampler != "ddpm":
        raise ValueError(f"got sampler {sampler.sampler}, wanted ddpm: a UNet that reads maps and words")
    if sampler.adapt:
        raise ValueError(f"got adapt {sampler.adapt}, which comparisons do not apply: leave --adapt out")
    if not sampler.experts:
        raise ValueError("got no experts, of which an arm has some: pass --experts with groups of classes")
    check_fresh(training)
    if sampling.condition_file is not None or sampling.region_guidance is not None:
        given = "a condition_file" if sampling.condition_file is not None else "region_guidance"
        raise ValueError(f"got {given}, but maps are held-out ones, and all arms have one scale: pass --guidance alone")


def prepare(config: Config) -> Bench:
    """Opens the training images and the held-out scenes. ValueError: no such scenes, or fewer than are wanted."""
    c, data = config.comparison, config.data
    images = build_dataset(data, config.reader, "train")
    return Bench(
        sampler=config.sampler,
        data=data,
        reader=config.reader,
        training=config.training,
        sampling=config.sampling,
        train_images=ImageSource(images, data, margin=data.crop_margin),
        held_out=open_held_out(data, config.reader, c.n_images),
        first_stage=None,
        world=single_process_world(config.training.device),
        sampled_at_once=c.generated_at_once,
    )


def open_runs(bench: Bench, arms: Sequence[str]) -> dict[str, Run]:
    """Returns the first run of each arm. ValueError, before hours of training, for a model without regions or without
    other conditions, and for what cannot be sampled."""
    space, seed = PixelSpace(bench.data), bench.training.seed
    model = with_declared_values(bench.sampler, bench.train_images.dataset)
    of_regions = bench.build(model, space).network.encoders.region_encoders
    others = tuple(name for name in model.conditions if name not in of_regions)
    if not of_regions or not others:
        got = f"got the conditions {', '.join(model.conditions) or 'none'}"
        raise ValueError(f"{got}, wanted captions and regions: pass --conditions text region_words")
    words = replace(model, experts=(), expert_rule="nearest")
    settings = {
        "text": replace(words, conditions=others),
        "words": words,
        "experts": model,
        "router": replace(words, router_experts=len(model.experts) + 1),
    }
    runs = {name: Run(name, seed, settings[name], space, f"{name}_{seed}") for name in arms}
    for run in runs.values():
        bench.check_sampling(run, bench.sampling.guidance)
    return runs


def reference_features(bench: Bench, judged: Judged) -> Tensor:
    """Returns the features of real scenes that no sample was drawn for, (n, D)."""
    judging = open_scenes(bench.data, bench.reader, judge_split(bench.data))
    scenes = load_scenes(judging, training_indices(judging)[:REFERENCE_SCENES], "reference scenes")
    return scene_features(judged.measurement.judges.scenes, scenes.images)


# Runs and their results


@dataclass(frozen=True)
class PanopticComparison(Comparison):
    """The comparison of the parts of a panoptic model."""

    groups: Groups
    reference: Tensor  # (n, D): features of real scenes

    def measure(self, images: Tensor) -> Measured:
        return {"maps": self.of_maps(images, self.judged.real.layouts), FD: self.distance(images)}

    def describe(self, figures: Measured) -> str:
        return f"{MIOU} {figures['maps'][EVERY][MIOU][0]:.3f}"

    def of_maps(self, images: Tensor, layouts: Layouts) -> MapFigures:
        """Measures images against maps. ValueError: the data have none."""
        figures = self.judged.measurement.of_maps(images, layouts, self.groups)
        if figures is None:
            raise ValueError("got data without maps of classes, wanted panoptic maps: pass --dataset shapes")
        return figures

    def distance(self, images: Tensor) -> float | None:
        """Returns the Fréchet distance of images to real ones, in the features of the judge of scenes."""
        return feature_distance(scene_features(self.judged.measurement.judges.scenes, images), self.reference)

    def report(self) -> str:
        """Writes the results, the tables and the picture of maps; returns what to print."""
        results, real = self.results, self.judged.real
        yardsticks = {REAL_SCENES: self.measure(real.images)}
        yardsticks[WRONG] = {"maps": self.of_maps(real.images, self.judged.wrong), FD: None}
        results.update(yardsticks=yardsticks, judges=self.judged.hashes)
        write_results(self.folder, results)
        rows = table_rows(results["trained"], results["measured"], yardsticks)
        by_group = group_rows(results["measured"], yardsticks)
        regions = yardsticks[REAL_SCENES]["maps"][EVERY][REGIONS]
        notes = [
            f"{len(real.items):,} held-out maps with {regions:,} regions; guidance {self.bench.sampling.guidance:g}",
            "±: standard deviation over several runs, or of one set of images the standard error over these",
            *(f"{name}: {MEANINGS[name]}" for name in FIGURES),
            f"{FD}: Fréchet distance to {len(self.reference):,} real scenes, in the features of a judge",
        ]
        text = "\n\n".join([markdown_table(rows), markdown_table(by_group), "\n".join(f"- {note}" for note in notes)])
        write_text(self.folder / "table.md", f"{text}\n")
        captions = [self.bench.held_out[[number]]["caption"][0] for number in range(min(MOST_SHOWN, len(real.items)))]
        self.save_picture(order_of, captions, maps=True)
        files = [str(self.folder / name) for name in ("results.json", "table.md", PICTURE)]
        return "\n".join([table(rows), "", table(by_group), "", *notes, "", *files])


def order_of(measured: dict[str, Any]) -> tuple[int, float, int]:
    """Returns by what samples are sorted: the arms in the order of ARMS."""
    return [*ARMS].index(measured["arm"]), measured["guidance"], measured["seed"]


def runs_by_arm(measured: Results) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns what was measured of the runs of each arm."""
    ordered = sorted(measured.values(), key=order_of)
    return [(arm, [*group]) for arm, group in groupby(ordered, lambda each: each["arm"])]


def table_rows(trained: Results, measured: Results, yardsticks: dict[str, Measured]) -> list[tuple[str, ...]]:
    """Returns the rows of the table, one for each arm between the yardsticks; the first is its heading."""
    rows = [("arm", "runs", "parameters", "s/step", *FIGURES, FD)]
    rows.append((REAL_SCENES, "", "", "", *format_figures([yardsticks[REAL_SCENES]])))
    for arm, group in runs_by_arm(measured):
        runs = [trained[each["run"]] for each in group]
        seconds = mean(60 * run["minutes"] / run["steps"] for run in runs)
        cost = f"{runs[0]['parameters']:,}", f"{seconds:.2f}"
        rows.append((arm, str(len(group)), *cost, *format_figures([each["figures"] for each in group])))
    return [*rows, (WRONG, "", "", "", *format_figures([yardsticks[WRONG]]))]


def group_rows(measured: Results, yardsticks: dict[str, Measured]) -> list[tuple[str, ...]]:
    """Returns the rows of the table by group of classes: for each arm its figures in each group that has them."""
    real = yardsticks[REAL_SCENES]["maps"]
    columns = [(group, name) for group in real for name in FIGURES if group != EVERY and real[group][name] is not None]
    rows = [("arm", *(f"{name}, {group}" for group, name in columns))]
    runs = {REAL_SCENES: [yardsticks[REAL_SCENES]]}
    runs |= {arm: [each["figures"] for each in group] for arm, group in runs_by_arm(measured)}
    for arm, figures in (runs | {WRONG: [yardsticks[WRONG]]}).items():
        rows.append((arm, *(format_figure(figures, group, name) for group, name in columns)))
    return rows


def format_figures(runs: Sequence[Measured]) -> list[str]:
    """Formats the figures of all classes of the runs of an arm, and their FD."""
    values = [run[FD] for run in runs]
    return [
        *(format_figure(runs, EVERY, name) for name in FIGURES),
        "-" if None in values else mean_and_deviation(values),
    ]


def format_figure(runs: Sequence[Measured], group: str, name: str) -> str:
    """Formats a figure of several runs with their deviation, or of one with its standard error over images."""
    estimates = [run["maps"][group][name] for run in runs]
    if None in estimates:
        return "-"
    values = [value for value, _ in estimates]
    return estimate_words(estimates[0]) if len(values) == 1 else mean_and_deviation(values)


if __name__ == "__main__":
    run_script(main, Config, "compare_panoptic")
