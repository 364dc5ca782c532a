"""Compares the methods of editing on one trained model: what they reach of what is asked for, what else they change,
and what they cost."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion.rng import Streams, seed_of
from experiments.harness.batches import MakeBatch, ResumableBatches
from experiments.harness.edit_methods import (
    EditingConfig,
    EditTask,
    edit_times,
    find_method,
    methods_for,
    open_sides,
)
from experiments.harness.editing import (
    change_within,
    condition_source_for,
    conditions_for,
    encode_images,
    mean_abs_difference,
)
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.inversion import (
    INVERSIONS,
    InversionConfig,
    ddim_steps,
    ddim_times,
    in_double_precision,
    round_trip_errors,
)
from experiments.harness.report import progress, table
from experiments.metrics.classifier import Proportion, class_agreement
from experiments.metrics.contact_sheet import GAP, LINE, TEXT, cut_text
from experiments.metrics.cost import count_nfe
from experiments.metrics.edit_tasks import ASKED, CHANGES, CLASS, COLOR, OTHERS, Edits, Shown, plan_edits
from experiments.metrics.layout.layout_pictures import draw_image, panel_size, save_picture
from models.ranges import COUNT, check_ranges
from train.config import SamplingConfig
from train.distributed import DistContext
from train.files import write_text
from train.samplers.ddpm import GaussianSampler
from train.trained_sampler import TrainedSampler

AUTO = "auto"  # all methods, each with its default strength
STRENGTHS = {"sdedit": 0.7, "diffedit": 0.9, "flowedit": 0.7, "ddpm_inversion": 0.7, "cyclediffusion": 0.7}
OWN, REAL, UNCHANGED = "own samples", "real images", "unchanged images"  # what the results are compared with
ROWS = 8  # of the picture
PICTURE = "compare_edits.png"


class Method(NamedTuple):
    """A method of editing with its strength."""

    name: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name} {self.strength:g}"


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Comparison."""

    methods: tuple[str, ...] = (AUTO,)
    """Methods of edit.py, as NAME or NAME:STRENGTH; auto: all that the model has, each with a strength that does well
    (cyclediffusion, the other name of ddpm_inversion, only if it is named)."""
    n_images: int = 20
    """Number of held-out images, a fixed random subset."""
    classes: int = 3
    """Models of classes: how many other classes each image is edited to."""
    changes: tuple[str, ...] = ()
    """Models of drawn scenes: how one thing of each scene changes: color, class, move; default: all that the model
    reads."""

    EVERYDAY = ("methods", "n_images", "classes", "changes")
    RANGES = {"n_images": COUNT, "classes": COUNT}

    def __post_init__(self):
        check_ranges(self)
        if not self.methods:
            raise ValueError("got no methods, wanted at least one: pass --methods NAME, or leave it out")
        for entry in self.methods:
            parse_method(entry)
        if unknown := [change for change in self.changes if change not in CHANGES]:
            raise ValueError(f"got changes {unknown[0]}, wanted some of {', '.join(CHANGES)}")
        if len({*self.changes}) < len(self.changes):
            raise ValueError(f"got changes {' '.join(self.changes)}, wanted each once")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Edits held-out images with every method and judges the results, beside the model's own samples; writes
    results.json, table.md and compare_edits.png to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/compare_edits.py --sampler {sampler} --guidance 3",
        "python experiments/compare_edits.py --load_dir {sampler}_digits --methods sdedit:0.6 diffedit:0.8",
    )

    comparison: ComparisonConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


def parse_method(entry: str) -> Method:
    """Reads NAME or NAME:STRENGTH; ValueError for anything else."""
    name, colon, word = entry.partition(":")
    try:
        strength = float(word) if colon else STRENGTHS.get(name, 0.0)
    except ValueError:
        strength = 0.0
    if entry != AUTO and not (name in STRENGTHS and 0 < strength <= 1):
        wanted = f"wanted NAME or NAME:STRENGTH, a strength in (0, 1] and a name of {', '.join(STRENGTHS)}"
        raise ValueError(f"got methods entry {entry!r}, {wanted}")
    return Method(name, strength)


def plan_methods(entries: Sequence[str], model: TrainedSampler) -> list[Method]:
    """Returns the methods that the entries stand for, each once. ValueError: the model has no such method."""
    available, methods = methods_for(model), []
    functions = {function: name for name, function in reversed(available.items())}  # the first of equal ones
    for method in map(parse_method, entries):
        if method.name == AUTO:
            methods += [Method(name, STRENGTHS[name]) for name in available if name in functions.values()]
        else:
            find_method(method.name, model)
            methods.append(method)
    return list(dict.fromkeys(methods))


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Plans methods and edits. ValueError: the model does not support them."""
    comparison, sampling = config.comparison, config.sampling
    methods = plan_methods(comparison.methods, model)
    if sampling.condition_file is not None or sampling.metadata:
        raise ValueError("got conditions, but edits are those of held-out images: leave --condition_file out")
    judge_folder = Path(config.output.logs_root).expanduser() / ".cache" / "judges"
    edits = plan_edits(model, comparison.n_images, comparison.classes, comparison.changes, judge_folder)
    if isinstance(model.sampler, GaussianSampler):
        ddim_times(model, sampling.without_guidance(), 1.0)  # of the round trips
    for method in methods:
        settings = EditingConfig(method=method.name, strength=method.strength)
        source, target = open_sides(edits.inputs, [0], edits.targets[:1], settings, sampling, model)
        if method.name != "sdedit" and isinstance(model.sampler, GaussianSampler):
            edit_times(model, settings, source.options, target.options)
    texts = sha256("\n".join(edits.texts).encode()).hexdigest()
    provenance = {"given_images": edits.inputs.fingerprint, "edits_sha256": texts}
    source = condition_source_for(model, edits.inputs, [0], None, sampling, edits.targets[:1])
    return ExperimentSetup((edits, methods, sampling), provenance, source=source, timed=True)


# Measurement


def measure(
    edits: Edits, methods: Sequence[Method], sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any] | None:
    """Edits the images with each method, samples from noise, judges all, and saves table.md and the picture. All ranks
    must call it; only the main rank gets the results."""
    samples = collect(OWN.replace(" ", "_"), len(edits), own_samples(edits, sampling, model, batches), batches)
    edited = {}
    for method in methods:
        make = edited_images(edits, method, sampling, model, batches)
        edited[str(method)] = collect(f"{method.name}_{method.strength:g}", len(edits), make, batches)
    trips = measure_round_trips(edits, sampling, model, batches)
    if not batches.world.is_main:
        return None
    judge = edits.open_judge()
    own = figures_of(judge(samples["image"]), edits)
    if edits.by == "caption":
        del own[OTHERS]  # samples of captions have things anywhere
    compared = {UNCHANGED: figures_of(judge(edits.originals), edits)}
    compared |= {} if edits.real is None else {REAL: figures_of(judge(edits.real), edits)}
    results = {
        **{"by": edits.by, "n_images": len(edits.inputs), "n_edits": len(edits)},
        **{"compared_with": {OWN: own} | compared, "methods": [], "round_trips": trips},
        **{"asked": [*edits.texts], "judges": judge.hashes, "run": batches.run},
    }
    for method in methods:
        parts = edited[str(method)]
        figures = figures_of(judge(parts["image"]), edits) | changes_of(parts, edits)
        reached = figures[ASKED]["value"] / own[ASKED]["value"] if own[ASKED]["value"] else None
        results["methods"].append({"method": method.name, "strength": method.strength, "of_own": reached} | figures)
    columns = {name: parts["image"] for name, parts in edited.items()}
    columns = {"original": edits.originals, **columns, OWN: samples["image"]}
    save_picture(batches.folder / PICTURE, draw_picture(edits, columns))
    rows, others = table_rows(results), round_trip_rows(results)
    text = [*markdown(rows), "", *([*markdown(others), ""] if others else []), *notes(results)]
    write_text(batches.folder / "table.md", "\n".join(text) + "\n")
    return results


def collect(name: str, count: int, make: MakeBatch, batches: ResumableBatches) -> dict[str, Tensor]:
    """Returns what `make` gives for all numbers below `count`, from resumable batches; {} on other ranks than the
    main one."""
    parts = list(progress(batches.resume(name, range(count), make), count, name, batches.world.is_main))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]} if parts else {}


def own_samples(edits: Edits, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches) -> MakeBatch:
    """Returns a function from numbers of edits to the model's samples of their targets, from noise."""

    def draw(numbers: list[int]) -> dict[str, Tensor]:
        fields = [edits.targets[number] for number in numbers]
        conditions, options = conditions_for(model, edits.inputs, edits.images_of(numbers), None, sampling, fields)
        return {"image": model.draw(numbers, batches.seed, options, conditions)["image"]}

    return draw


def edited_images(
    edits: Edits, method: Method, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> MakeBatch:
    """Returns a function from numbers of edits to the edited images, their masks if there are any, and the network
    calls and seconds of each."""
    edit = find_method(method.name, model)
    settings = EditingConfig(method=method.name, strength=method.strength)

    def make(numbers: list[int]) -> dict[str, Tensor]:
        images, fields = edits.images_of(numbers), [edits.targets[number] for number in numbers]
        sides = open_sides(edits.inputs, images, fields, settings, sampling, model)
        task = EditTask(model, settings, edits.inputs.image[images], None, *sides, batches.seed, images)
        start = time.perf_counter()
        with count_nfe(model.sampler.network) as nfe:
            edited = edit(task)
        cost = torch.tensor([nfe.evaluations, time.perf_counter() - start], dtype=torch.float64) / len(numbers)
        masks = {} if edited.mask is None else {"mask": edited.mask}
        return {"image": edited.image, "cost": cost.expand(len(numbers), 2), **masks}

    return make


def measure_round_trips(
    edits: Edits, sampling: SamplingConfig, model: TrainedSampler, batches: ResumableBatches
) -> dict[str, Any]:
    """Returns, by method of inversion, the largest error of the images under their own conditions without guidance, as
    invert.py measures it, and its network calls; {} of codes, which have no inversion."""
    trips = {}
    if not isinstance(model.sampler, GaussianSampler):
        return trips

    def make_batch(name: str, numbers: list[int]) -> dict[str, Tensor]:
        x0 = in_double_precision(encode_images(edits.inputs.image[numbers], model))
        conditions, options = conditions_for(model, edits.inputs, numbers, None, sampling.without_guidance())
        rng = Streams([seed_of(batches.seed, "invert", number) for number in numbers], model.device)
        with model.inference():
            inverted = INVERSIONS[name](
                ddim_steps(model, options, conditions, x0), x0, InversionConfig(method=name), rng
            )
        finite = inverted.back.isfinite().flatten(1).all(1).cpu()
        errors = round_trip_errors(x0, inverted.back.nan_to_num(0, 0, 0), model)
        largest = {key: errors[key].where(finite, math.inf) for key in ("latent_max", "pixels_max")}
        return largest | {"calls": inverted.calls + inverted.calls_back}

    for name in INVERSIONS:
        parts = collect(f"round_trip_{name}", len(edits.inputs), partial(make_batch, name), batches)
        if parts:
            worst = {key: parts[key].max().item() for key in ("latent_max", "pixels_max")}
            worst = {key: value if math.isfinite(value) else None for key, value in worst.items()}
            trips[name] = worst | {"calls": parts["calls"].double().mean().item()}
    return trips


def figures_of(findings: Shown, edits: Edits) -> dict[str, Any]:
    """Returns the shares of what images show, all with standard errors over the N images, and of each kind of edits."""
    grid = {name: each.double().view(len(edits.inputs), -1) for name, each in findings.items()}  # (N, R)
    figures = {name: proportion(each)._asdict() for name, each in grid.items() if name != OTHERS}
    if OTHERS in grid:
        known = grid[OTHERS][~grid[OTHERS].isnan()]
        figures[OTHERS] = known.mean().item() if len(known) else None
    kinds = dict.fromkeys(edits.changes) if len({*edits.changes}) > 1 else ()
    columns = {kind: [k for k, each in enumerate(edits.changes) if each == kind] for kind in kinds}
    return figures | {"of_change": {kind: proportion(grid[ASKED][:, k])._asdict() for kind, k in columns.items()}}


def proportion(right: Tensor) -> Proportion:
    """Returns the share of the results (N, R) that are right."""
    return class_agreement(torch.ones(len(right)), right)


def changes_of(parts: dict[str, Tensor], edits: Edits) -> dict[str, Any]:
    """Returns the mean change of edited images as fractions of the range, also outside the masks that a method found
    and outside the things that were to change, and the cost of an image."""
    original, image = edits.originals.unsqueeze(1), parts["image"].unsqueeze(1)  # (M, 1, C, H, W)
    calls, seconds = parts["cost"].mean(0).tolist()
    figures = {"change": mean_abs_difference(original, image), "calls": calls, "seconds": seconds}
    if "mask" in parts:
        mask = parts["mask"][:, None, None]
        figures |= {"masked": mask.float().mean().item(), "outside_mask": change_within(original, image, ~mask)}
    if edits.regions is not None:
        figures["outside_thing"] = change_within(original, image, ~edits.regions[:, None, None])
    return figures


# Report


def table_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the rows of the table, a method each below what they are compared with; the first is the heading."""
    compared, methods = results["compared_with"], results["methods"]
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {  # heading and format, by name of the figure
        ASKED: ("asked, higher is better", share_text),
        "of_own": ("of own samples, %", percent),
        CLASS: ("class", share_text),
        COLOR: ("colour", share_text),
        "change": ("change, % of range", percent),
        "masked": ("masked, %", percent),
        "outside_mask": ("outside the mask, %", percent),
        "outside_thing": ("outside the thing, %", percent),
        OTHERS: ("other things kept, %", percent),
        "calls": ("network calls per image", "{:.4g}".format),
        "seconds": ("s/image", "{:.3g}".format),
    }
    figures = {**compared, **{str(Method(each["method"], each["strength"])): each for each in methods}}
    kinds = [*next(iter(figures.values()))["of_change"]]
    present = [key for key in columns if any(each.get(key) is not None for each in figures.values())]
    rows = [("", *(columns[key][0] for key in present), *(f"asked: {kind}" for kind in kinds))]
    for name, each in figures.items():
        cells = ["-" if each.get(key) is None else columns[key][1](each[key]) for key in present]
        rows.append((name, *cells, *(share_text(each["of_change"][kind]) for kind in kinds)))
    return rows


def round_trip_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the rows of the table of round trips; [] of models of codes."""
    if not results["round_trips"]:
        return []
    heading = ("round trip", "largest error of x_0", "pixels, levels of 255", "network calls per image, there and back")
    rows = [heading]
    for name, each in results["round_trips"].items():
        errors = ["not finite" if each[key] is None else f"{each[key]:.2g}" for key in ("latent_max", "pixels_max")]
        rows.append((name, *errors, f"{each['calls']:.4g}"))
    return rows


def share_text(value: dict[str, Any]) -> str:
    """Formats a share with its standard error."""
    return str(Proportion(**value))


def percent(value: float) -> str:
    """Formats a fraction in percent; exactly 0 as 0."""
    return f"{100 * value:.1f}" if value else "0"


def notes(results: dict[str, Any]) -> list[str]:
    """Returns what the table is about, and the best method."""
    edits = f"{results['n_edits']} edits of {results['n_images']} held-out images by {results['by']}; ± standard error"
    best = max(results["methods"], key=lambda each: each[ASKED]["value"])
    if best["of_own"] is None:
        return [edits]
    reached = f"{percent(best['of_own'])} % of the model's own share"
    return [edits, f"best: {Method(best['method'], best['strength'])}, {reached}"]


def markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns the lines of a table; the first row is the heading."""
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], ("---",) * len(rows[0]), *rows[1:])]


def draw_picture(edits: Edits, columns: dict[str, Tensor]) -> Image.Image:
    """Draws edits of the first images, a row each: what is asked for, and below it the image of every column, uint8
    (M, C, H, W) by heading."""
    n = len(edits.changes)
    shown = [image * n + image % n for image in range(min(ROWS, len(edits.inputs)))]
    height, width = panel = panel_size(tuple(edits.inputs.image.shape[2:]))
    across, down = width + GAP, height + LINE + GAP
    sheet = Image.new("RGB", (GAP + len(columns) * across, GAP + LINE + len(shown) * down), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TEXT)
    for j, (heading, images) in enumerate(columns.items()):
        ink.text((GAP + j * across, GAP // 2), cut_text(heading, width), "black", font)
        for i, number in enumerate(shown):
            sheet.paste(draw_image(images[number], panel), (GAP + j * across, GAP + 2 * LINE + i * down))
    for i, number in enumerate(shown):
        ink.text((GAP, GAP + LINE + i * down), cut_text(edits.texts[number], sheet.width - 2 * GAP), "black", font)
    return sheet


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the tables."""
    parts = [table(table_rows(results)), ""]
    if others := round_trip_rows(results):
        parts += [table(others), ""]
    files = [str(folder / name) for name in ("results.json", "table.md", PICTURE)]
    return "\n".join(["", *parts, *notes(results), "", *files])


if __name__ == "__main__":
    run_experiment("compare_edits", Config, measure, report, prepare=prepare)
