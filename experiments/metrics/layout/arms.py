"""Ways to give a network the layout of an image, as runs of equal size: their settings."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from math import lcm
from typing import Any, NamedTuple

from experiments.metrics.layout.bench import Bench, Run
from models.conditioning import ConditionConfig
from train.cli.plugins import merge_configs
from train.config import SamplerConfig
from train.datasets import Dataset
from train.registry import load_plugin
from train.samplers import absorbing
from train.samplers._conditions import ConditionsConfig, with_declared_values
from train.spaces import CodeSpace, PixelSpace


class Arm(NamedTuple):
    """A way to give a network a layout: conditions, their options, and what the UNet changes to read them.

    Transformers of codes have no region attention, but read `with_codes` beside the conditions.
    """

    conditions: tuple[str, ...] = ()
    options: dict[str, Any] = {}
    network: dict[str, Any] = {}
    with_codes: tuple[str, ...] = ()


REGIONS = {"region_attention": "v2", "region_places": False}
TOKENS = {"attn_block_type": "transformer", "feed_forward": "gelu"}
ARMS: dict[str, Arm] = {  # where objects have colours, every condition has them too
    "none": Arm(),
    "class_map": Arm(("layout",), {"layout_places": False}),
    "map": Arm(("layout",)),
    "map_decoder": Arm(("layout",), {"layout_into": "decoder"}),
    "mean_prompt": Arm(("objects",), network=REGIONS | {"overlap": "mean_prompt"}),
    "per_object": Arm(("objects",), network=REGIONS),
    "per_object_places": Arm(("objects",), network=REGIONS | {"region_places": True}, with_codes=("layout",)),
    "box_tokens": Arm(("boxes",), network=TOKENS),
    "box_tokens_masked": Arm(("boxes",), {"boxes_everywhere": False}, TOKENS),
    "box_tokens_gated": Arm(("boxes",), {"boxes_gated": True}),
    "location_words": Arm(("location_words",), {"location_words_grid": (16, 16)}, TOKENS),
}
UNET_OPTIONS = ("layout_into",)  # of conditions; transformers of codes have none of them
REFERENCE = "none"  # whose number of parameters all others have
WIDEST = 1024  # of a transformer


# Settings


def condition_settings(arm: Arm, dataset: Dataset) -> dict[str, Any]:
    """Returns the conditions of an arm with their options, colours included if the objects of a data set have any."""
    colors = len(getattr(dataset, "palette", ()))
    kinds = [load_plugin("models.conditions", name, "condition").Config for name in arm.conditions]
    options = {f"{name}_colors": colors for name in arm.conditions} | arm.options
    return {"conditions": arm.conditions, "condition_options": merge_configs(kinds, ConditionConfig)(**options)}


def pixel_settings(sampler: SamplerConfig, arm: Arm, dataset: Dataset) -> Callable[[int], SamplerConfig]:
    """Returns a function from the width of the UNet's last level to the settings of an arm."""
    settings = replace(sampler, **condition_settings(arm, dataset), **arm.network)
    settings = with_declared_values(settings, dataset)

    def of_width(width: int) -> SamplerConfig:
        last = (width + 0.5) / sampler.channels  # widths are rounded down
        return replace(settings, channel_mults=(*sampler.channel_mults[:-1], last))

    return of_width


def code_settings(
    sampler: SamplerConfig, arm: Arm, dataset: Dataset, layers: int, heads: int
) -> Callable[[int], SamplerConfig]:
    """Returns a function from the width of a transformer to the settings of an arm on codes."""
    shared = {each.name: getattr(sampler, each.name) for each in fields(ConditionsConfig)}
    options = {name: value for name, value in arm.options.items() if name not in UNET_OPTIONS}
    arm = arm._replace(conditions=arm.conditions + arm.with_codes, options=options)
    shared |= {"sampler": "absorbing", **condition_settings(arm, dataset)}
    settings = absorbing.Config(**shared, bert_n_emb=heads, bert_n_head=heads, bert_n_layers=layers)
    return lambda width: replace(with_declared_values(settings, dataset), bert_n_emb=width)


def match_parameters(
    settings_of: Callable[[int], SamplerConfig],
    widths: Sequence[int],
    count: Callable[[SamplerConfig], int],
    wanted: int,
) -> SamplerConfig:
    """Returns the settings of the width, of increasing `widths`, whose number of parameters is nearest to `wanted`."""
    first = bisect_left(widths, wanted, key=lambda width: count(settings_of(width)))
    near = [settings_of(width) for width in widths[max(0, first - 1) : first + 1]]
    return min(near, key=lambda settings: abs(count(settings) - wanted))


def check_parameters(counts: dict[str, int], wanted: int, tolerance: float) -> None:
    """Raises ValueError for arms whose parameters differ from those wanted by more than a share."""
    unequal = [f"{name} {count:,}" for name, count in counts.items() if abs(count / wanted - 1) > tolerance]
    if unequal:
        raise ValueError(
            f"got {', '.join(unequal)} parameters, wanted {wanted:,} within {tolerance:.1%}: pass other --channels or "
            "--channel_mults, or a larger --parameter_tolerance"
        )


# Runs


def pixel_runs(bench: Bench, arms: Sequence[str], tolerance: float) -> dict[str, Run]:
    """Returns the first run of each arm, the last level of its UNet so wide that all have equally many parameters.

    ValueError: they differ by more than the share `tolerance` from those of REFERENCE.
    """
    sampler, dataset, space = bench.sampler, bench.train_images.dataset, PixelSpace(bench.data)
    step = sampler.head_width or 2 * sampler.heads
    last = int(sampler.channel_mults[-1] * sampler.channels)
    widths, count = [*range(step, last, step), last], partial(bench.count, space=space)
    wanted = count(pixel_settings(sampler, ARMS[REFERENCE], dataset)(last))
    settings = {
        name: match_parameters(pixel_settings(sampler, ARMS[name], dataset), widths, count, wanted) for name in arms
    }
    counts = {name: count(each) for name, each in settings.items()}
    print(f"parameters: {', '.join(f'{name} {number:,}' for name, number in counts.items())}", flush=True)
    check_parameters(counts, wanted, tolerance)
    seed = bench.training.seed
    return {name: Run(name, seed, each, space, f"{name}_{seed}") for name, each in settings.items()}


def code_run(bench: Bench, arm: str, wanted: int, layers: int, heads: int, tolerance: float) -> Run:
    """Returns the run of an arm's conditions on the codes of a VQGAN, of about `wanted` parameters.

    ValueError: they differ by more than the share `tolerance`.
    """
    space, seed = CodeSpace(bench.first_stage), bench.training.seed
    settings_of = code_settings(bench.sampler, ARMS[arm], bench.train_images.dataset, layers, heads)
    count, step = partial(bench.count, space=space), lcm(4, 2 * heads)  # location words need a multiple of 4
    settings = match_parameters(settings_of, range(step, WIDEST, step), count, wanted)
    check_parameters({f"{arm} on codes": count(settings)}, wanted, tolerance)
    return Run(f"{arm} on codes", seed, settings, space, f"{arm}_on_codes_{bench.first_stage.weights[:8]}_{seed}")


def order_of(measured: dict[str, Any]) -> tuple[bool, int, float, int]:
    """Returns by what samples are sorted: the arms of pixels first, in the order of ARMS, then those of codes; those of
    an arm by guidance and seed."""
    name, on_codes, _ = measured["arm"].partition(" on codes")
    return bool(on_codes), [*ARMS].index(name), measured["guidance"], measured["seed"]
