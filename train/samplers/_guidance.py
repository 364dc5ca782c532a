"""Guidance along a chain of conditions: the null, images, other conditions, regions.

With S = --image_guidance, W = --guidance and V = --region_guidance, the prediction is

    d(null) + S (d(images) - d(null)) + W (d(others) - d(images)) + V (d(all) - d(others)),

where each condition of the chain includes those before it. It is eq. 3 of Brooks et al. 2023 (InstructPix2Pix) for an
image and text. Without --image_guidance or --region_guidance these conditions are among the others, which --guidance
scales together: d(null) + W (d(all) - d(null)) without both. Training drops images, regions and other conditions
independently, so it sees the whole chain.

Negative conditions, such as a negative prompt, take the place of the null: what is sampled moves away from them.

Hints of control branches are in all conditions of the chain, as in ControlNet (Zhang et al. 2023), so that guidance
acts on the others. In guess mode --guidance scales them like other conditions.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from models.conditioning import Conditioner
from models.control import is_hint_field
from train.loop import Batch
from train.samplers._conditions import ConditionsConfig, Raw, drop_flag, optional_by_condition, raw_conditions
from train.sampling_config import GUIDANCE_SCALES, SamplingConfig

IMAGES = ("image", "images")  # conditions that --image_guidance scales


class Chain(NamedTuple):
    """Conditions of a batch, weakest first, and the guidance scale of each step to the next (see `guided`)."""

    raw: list[dict[str, Raw]]  # inputs of the encoders, by condition; conditions left out are null
    scales: list[float]


class ScaledStep(NamedTuple):
    """A step of the chain: the conditions that it adds, and its scale, the value of `setting`."""

    setting: str
    scale: float
    names: list[str]


def guidance_chain(
    config: ConditionsConfig,
    encoders: Conditioner,
    fields_of: Mapping[str, tuple[str, ...]],
    batch: Batch | None,
    options: SamplingConfig,
    n_classes: int,
    negative: Batch | None = None,
) -> Chain:
    """Returns the chain for a batch, from the null to all its conditions, whose fields are `fields_of`, by condition.

    The fields of some or all conditions in `negative` take the place of their null, those of regions only at the start
    of the chain, unless --guidance is 1, which ignores them.
    ValueError: a scale without a condition that it could scale, nulls that training never used, or a `negative` with
    other fields than the conditions have.
    """
    guided = {name: names for name, names in fields_of.items() if name not in encoders.hints or options.control_guess}
    steps = scaled_steps(guided, encoders.region_encoders, options)
    fields = [field for names in guided.values() for field in names]
    first = negative_conditions(fields_of, negative, optional_by_condition(encoders))
    first = {} if options.guidance == 1 else first
    weaker = {name: value for name, value in first.items() if name not in encoders.region_encoders}
    for i, step in enumerate(steps):
        replaced, names = weaker if i else first, [name for later in steps[i:] for name in later.names]
        nulls = [field for name in names if name not in replaced for field in fields_of[name]]
        remedy = "pass --guidance 1" if step.setting == "guidance" else f"leave --{step.setting} out"
        check_scale(config, f"{step.setting} {step.scale}", step.scale, fields, batch, remedy, nulls)
    check_nulls(config, fields, batch, n_classes)
    raw = raw_conditions(fields_of, batch, optional_by_condition(encoders)) if batch else {}
    hints = {} if options.control_guess else {name: raw[name] for name in encoders.hints if name in raw}
    weaker, chain = hints | weaker, [hints | first]
    for step in steps:
        weaker = weaker | {name: raw[name] for name in step.names if name in raw}
        chain.append(weaker)
    return Chain(chain, [step.scale for step in steps])


def scaled_steps(
    fields_of: Mapping[str, tuple[str, ...]], regions: Collection[str], options: SamplingConfig
) -> list[ScaledStep]:
    """Returns the steps of the chain, weakest first.

    ValueError for a scale of images or regions without such conditions, and a --guidance that no condition is left for.
    """
    kinds = {"image_guidance": "images", "region_guidance": "regions"}
    names_of = {"image_guidance": [name for name in fields_of if name in IMAGES], "region_guidance": [*regions]}
    scales = {setting: getattr(options, setting) for setting in GUIDANCE_SCALES}
    own = {setting: names for setting, names in names_of.items() if scales[setting] is not None}
    for setting in (each for each, names in own.items() if not names):
        got = f"got {setting} {scales[setting]} for a model without conditions of {kinds[setting]}"
        raise ValueError(f"{got}: leave --{setting} out")
    others = [name for name in fields_of if not any(name in names for names in own.values())]
    if others or not own:
        own["guidance"] = others
    elif options.guidance != 1:
        got = " and ".join(f"{setting} {scales[setting]}" for setting in ("guidance", *own))
        alone = " and ".join(kinds[setting] for setting in own)
        raise ValueError(f"got {got} for a model of {alone} alone, which --guidance does not scale: pass --guidance 1")
    order = ("image_guidance", "guidance", "region_guidance")
    return [ScaledStep(setting, scales[setting], own[setting]) for setting in order if setting in own]


def negative_conditions(
    fields_of: Mapping[str, tuple[str, ...]],
    negative: Batch | None,
    optional_of: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Raw]:
    """Returns the inputs of the encoders of the conditions that `negative` has, by condition; others are null.

    ValueError for fields of no condition, and for a condition that has only some of its fields.
    """
    given = {field.removesuffix("_mask") for field in negative or ()}
    known = {name: {*fields, *optional_of.get(name, ())} for name, fields in fields_of.items()}
    if unknown := sorted(given - {field for names in known.values() for field in names}):
        accepted = ", ".join(field for names in fields_of.values() for field in names) or "none"
        raise ValueError(f"got the negative condition {', '.join(unknown)}, this sampler takes: {accepted}")
    named = {name: fields for name, fields in fields_of.items() if given & known[name]}
    return raw_conditions(named, negative, optional_of)


def check_scale(
    config: ConditionsConfig,
    setting: str,
    scale: float | None,
    fields: Collection[str],
    batch: Batch | None,
    remedy: str,
    nulls: Collection[str],
) -> None:
    """Raises ValueError if a guidance scale other than 1 needs conditions of `fields`, or `nulls`, that there are not.

    Converted weights whose nulls are untrained have drops of 0 in their config.
    """
    if scale in (None, 1):
        return
    if not fields:
        raise ValueError(f"got {setting} for a model without conditions: {remedy}")
    if not batch:
        raise ValueError(f"got {setting} without a condition: {remedy}")
    for reason in untrained_nulls(config, nulls).values():
        raise ValueError(f"got {setting}, {reason}: {remedy}")


def check_nulls(config: ConditionsConfig, fields: Collection[str], batch: Batch | None, n_classes: int) -> None:
    """Raises ValueError if a batch lacks a condition whose null training never used; label `n_classes` is the null."""
    for name, reason in untrained_nulls(config, fields).items():
        if not batch or (name == "label" and (batch["label"] == n_classes).any()):
            raise ValueError(f"got no {name}, {reason}: pass a {name}")


def untrained_nulls(config: ConditionsConfig, fields: Collection[str]) -> dict[str, str]:
    """Returns the fields whose nulls training never used, each with the reason; without its hint a branch adds
    nothing."""
    flags = {name: drop_flag(name) for name in fields if not is_hint_field(name)}
    return {
        name: f"but the model was trained with {flag} 0, which leaves the null of {name} untrained"
        for name, flag in flags.items()
        if not getattr(config, flag)
    }
