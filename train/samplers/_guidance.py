"""Guidance along a chain of conditions: the null, the conditions without regions, all conditions.

With W = --guidance and V = --region_guidance, the prediction is

    d(null) + W (d(others) - d(null)) + V (d(all) - d(others))

as in Brooks et al. 2023 (InstructPix2Pix), eq. 3, for image and text. Without --region_guidance, and for V = W, it is
d(null) + W (d(all) - d(null)). Training drops regions independently of other conditions, so it sees all three.

Negative conditions, such as a negative prompt, take the place of the null: what is sampled moves away from them.

Hints of control branches are in all conditions of the chain, as in ControlNet (Zhang et al. 2023), so that guidance
acts on the others. In guess mode the first has none, so that guidance acts on the hint too.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from models.conditioning import Conditioner
from models.control import is_hint_field
from train.config import SamplingConfig
from train.loop import Batch
from train.samplers._conditions import ConditionsConfig, Raw, drop_flag, raw_conditions


class Chain(NamedTuple):
    """Conditions of a batch, weakest first, and the guidance scale of each step to the next (see `guided`)."""

    raw: list[dict[str, Raw]]  # inputs of the encoders, by condition; conditions left out are null
    scales: list[float]


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

    With the fields of some or all conditions in `negative`, these begin the chain in place of their null, unless
    --guidance is 1, which ignores them.
    ValueError: a scale without a condition that it could scale, nulls that training never used, or a `negative` with
    other fields than the conditions have.
    """
    regions, scale, region_scale = encoders.region_encoders, options.guidance, options.region_guidance
    guided = {name: names for name, names in fields_of.items() if name not in encoders.hints or options.control_guess}
    fields = [field for names in guided.values() for field in names]
    region_fields = [field for name in regions for field in fields_of[name]]
    if region_scale is not None and not regions:
        got = f"got region_guidance {region_scale} for a model without conditions of regions"
        raise ValueError(f"{got}: leave --region_guidance out")
    first = negative_conditions(fields_of, negative)
    nulls = [field for name, names in fields_of.items() if name not in first for field in names]
    check_scale(config, f"guidance {scale}", scale, fields, batch, "pass --guidance 1", nulls)
    check_scale(
        config,
        f"region_guidance {region_scale}",
        region_scale,
        region_fields,
        batch,
        "leave --region_guidance out",
        region_fields,
    )
    check_nulls(config, fields, batch, n_classes)
    raw = raw_conditions(fields_of, batch) if batch else {}
    hints = {name: raw[name] for name in encoders.hints if name in raw}
    first = hints | ({} if scale == 1 else first)
    if region_scale is None:
        return Chain([first, raw], [scale])
    if fields_of.keys() > {*regions, *encoders.hints}:
        others = {name: value for name, value in raw.items() if name not in regions}
        return Chain([first, others, raw], [scale, region_scale])
    if scale != 1:
        got = f"got guidance {scale} and region_guidance {region_scale}"
        raise ValueError(f"{got} for a model of regions alone, which has one scale: pass --guidance 1")
    return Chain([hints, raw], [region_scale])


def negative_conditions(fields_of: Mapping[str, tuple[str, ...]], negative: Batch | None) -> dict[str, Raw]:
    """Returns the inputs of the encoders of the conditions that `negative` has, by condition; others are null.

    ValueError for fields of no condition, and for a condition that has only some of its fields.
    """
    given = {field.removesuffix("_mask") for field in negative or ()}
    if unknown := sorted(given - {field for names in fields_of.values() for field in names}):
        accepted = ", ".join(field for names in fields_of.values() for field in names) or "none"
        raise ValueError(f"got the negative condition {', '.join(unknown)}, this sampler takes: {accepted}")
    return raw_conditions({name: fields for name, fields in fields_of.items() if given & {*fields}}, negative)


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
