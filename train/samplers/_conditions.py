"""Conditions of learned samplers: their flags, encoders and batch fields."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from diffusion.rng import Streams
from models.conditioning import ConditionConfig, ConditionEncoder, Conditioner
from models.conditions.image import ImageEncoder
from models.unet_attention import SELF_ATTENTION
from train.cli.plugins import merge_configs, plugin_options
from train.config import SamplerConfig
from train.data.hints import Kind, hint_channels
from train.datasets import Dataset
from train.loop import Batch, Field
from train.registry import load_plugin
from train.samplers._experts import ExpertsConfig
from train.text_encoder_file import with_options_of_file

Raw = Field | dict[str, Field]  # a condition's input to its encoder


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig(ExpertsConfig):
    """A sampler with a conditional network."""

    class_conditional: bool = True
    """Condition on the class if the data have labels."""
    label_drop: float = 0.1
    """Probability of replacing a training label by the null class; 0 leaves the null untrained, without guidance."""
    conditions: tuple[str, ...] = ()
    """Conditions besides the class, by their files in models/conditions; image uses the field condition_image."""
    condition_options: ConditionConfig = ConditionConfig()
    condition_drop: float = 0.1
    """Probability of replacing a condition by its null in training, independently for each; 0: no guidance."""

    RANGES = {"label_drop": "[0, 1)", "condition_drop": "[0, 1)"}

    def __post_init__(self):
        super().__post_init__()
        kinds = [load_plugin("models.conditions", name, "condition").Config for name in self.conditions]
        if type(self.condition_options) is ConditionConfig:  # default: the defaults of the named conditions
            object.__setattr__(self, "condition_options", merge_configs(kinds, ConditionConfig)())
        if missing := [kind.__module__ for kind in kinds if not isinstance(self.condition_options, kind)]:
            got = type(self.condition_options).__name__
            raise ValueError(f"got {got} as condition_options, wanted those of {', '.join(missing)}")


def options_of_conditions(config: SamplerConfig) -> ConditionConfig:
    """Returns the options of the conditions of a sampler; those of none for a sampler without conditions."""
    return config.condition_options if isinstance(config, ConditionsConfig) else ConditionConfig()


def make_encoders(config: ConditionsConfig, width: int, n_classes: int) -> dict[str, ConditionEncoder]:
    """Builds the encoders of --conditions, and of the label if there are classes, for embeddings of this width.

    ValueError for a label among --conditions, and a field of words or numbers that another condition reads too.
    """
    if "label" in config.conditions:
        raise ValueError("got 'label' among --conditions: use --class_conditional for classes")
    names, encoders = (*config.conditions, *(["label"] if n_classes else [])), {}
    modules = {name: load_plugin("models.conditions", name, "condition") for name in names}
    for name in sorted(modules, key=lambda name: hasattr(modules[name], "SHARES")):  # those that share parts are last
        module = modules[name]
        shared = [encoders.get(module.SHARES)] if hasattr(module, "SHARES") else []
        options = plugin_options(config.condition_options, module.Config)
        encoders[name] = module.build(options, width, n_classes, *shared)
    encoders = {name: encoders[name] for name in modules}
    check_named_fields(encoders)
    return encoders


def check_named_fields(encoders: Mapping[str, ConditionEncoder]) -> None:
    """Raises ValueError for a field of words or numbers, which options name, that another condition reads too."""
    fields_of = fields_by_condition(encoders)
    for name in encoders:
        if getattr(load_plugin("models.conditions", name, "condition"), "FIELDS", ()):
            continue  # fixed ones, which conditions of regions have in common
        for other in (each for each in encoders if each != name):
            if both := [field for field in fields_of[name] if field in fields_of[other]]:
                got = f"got the field {both[0]} in the conditions {name} and {other}, wanted it in one of them"
                raise ValueError(f"{got}: leave it out of --{name}_fields")


def check_tokens_are_read(encoders: Mapping[str, ConditionEncoder], *kinds: str | None) -> None:
    """Raises ValueError for conditions of tokens in a UNet whose attention blocks, of these kinds, all ignore them."""
    unread = [name for name, encoder in encoders.items() if encoder.token_width]
    if unread and {*kinds} <= {*SELF_ATTENTION, "none", None}:
        got = f"got conditions {', '.join(unread)}, whose tokens attn_block_type {kinds[0]} ignores"
        raise ValueError(f"{got}: pass --attn_block_type transformer")


def check_image_input(encoders: Mapping[str, ConditionEncoder], inputs: Collection[str], kind: str) -> None:
    """Raises ValueError for an image condition that reads its image in none of the ways `inputs` of a `kind` of
    sampler."""
    encoder = encoders["image"] if "image" in encoders else None
    if isinstance(encoder, ImageEncoder) and encoder.reads not in inputs:
        wanted = ", ".join(inputs)
        raise ValueError(f"got image_input {encoder.reads} for a sampler of {kind}, wanted {wanted}: see --image_input")


def with_declared_values(config: SamplerConfig, train: Dataset, *others: Dataset) -> SamplerConfig:
    """Returns the config with what a data set declares, to be saved with the run: the number of classes of regions, the
    values of metadata, which may occur in the `others`, such as the validation split, alone, and the ranges of numbers.
    The numbers of classes replace their names in --experts, and the options of the encoder that --text_encoder names
    are saved too."""
    if not isinstance(config, ConditionsConfig):
        return config
    metadata: dict[str, tuple[str, ...]] = {}
    for dataset in (train, *others) if "metadata" in config.conditions else ():
        for field, values in getattr(dataset, "metadata_values", {}).items():
            metadata[field] = tuple(dict.fromkeys((*metadata.get(field, ()), *values)))
    names, numbers = getattr(train, "region_classes", ()), getattr(train, "number_fields", {})
    regions = names, getattr(train, "region_things", ())
    options = with_options_of_file(config.condition_options.for_data(len(names), metadata, numbers, *regions))
    return replace(config.with_class_numbers(names), condition_options=options)


def with_hint_channels(config: SamplerConfig, kind: Kind | Literal[""], image_channels: int) -> SamplerConfig:
    """Returns the config whose condition image has the channels of a hint of images of `image_channels`, unchanged for
    the kind "". ValueError for a sampler without that condition, and other channels that were set."""
    if not kind:
        return config
    if not isinstance(config, ConditionsConfig) or "image" not in config.conditions:
        raise ValueError(f"got condition_image {kind}, which no condition reads: pass --conditions image")
    channels, options = hint_channels(kind, image_channels), config.condition_options
    if options.image_input != "pixels":  # the channels are those of latents
        return config
    if options.condition_channels not in (channels, type(options)().condition_channels):
        got = f"got condition_channels {options.condition_channels} for condition_image {kind}"
        raise ValueError(f"{got}, which has {channels}: leave --condition_channels out")
    return replace(config, condition_options=replace(options, condition_channels=channels))


def fields_by_condition(encoders: Mapping[str, ConditionEncoder]) -> dict[str, tuple[str, ...]]:
    """Returns the batch fields that each condition reads, keyed by condition name."""
    return {
        name: encoder.fields or load_plugin("models.conditions", name, "condition").FIELDS
        for name, encoder in encoders.items()
    }


def optional_by_condition(encoders: Mapping[str, ConditionEncoder]) -> dict[str, tuple[str, ...]]:
    """Returns the batch fields that each condition reads where a batch has them, keyed by condition name."""
    fields = {name: (*encoder.optional_fields, *encoder.prepared_fields) for name, encoder in encoders.items()}
    return {name: own for name, own in fields.items() if own}


def optional_conditions(encoders: Mapping[str, ConditionEncoder]) -> dict[str, str]:
    """Returns the batch fields that may be given beside those of a condition, each with the first of these."""
    needed = fields_by_condition(encoders)
    return {field: needed[name][0] for name, encoder in encoders.items() for field in encoder.optional_fields}


def raw_conditions(
    fields_of: Mapping[str, tuple[str, ...]],
    batch: Batch | None,
    optional_of: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> dict[str, Raw]:
    """Collects the encoders' inputs, keyed by condition name: a field, or a dict of several fields and padding masks.

    A condition whose fields are None is null, and left out. ValueError if the batch lacks a field that is not optional.
    """
    batch = batch or {}
    fields_of = {
        name: fields for name, fields in fields_of.items() if any(batch.get(field, ()) is not None for field in fields)
    }
    missing = sorted({field for fields in fields_of.values() for field in fields} - {*batch})
    if missing:
        raise ValueError(
            f"got a batch with the fields {', '.join(batch) or 'none'}, but the conditions need {', '.join(missing)}: "
            "add them to the items of the data set, or (ddpm) in the function of --adapt; a condition_image is made by "
            "--condition_image edges, grey or another hint"
        )
    raw = {}
    for name, fields in fields_of.items():
        fields = (*fields, *(field for field in optional_of.get(name, ()) if field in batch))
        masks = [f"{field}_mask" for field in fields if f"{field}_mask" in batch]
        single = len(fields) == 1 and not masks
        raw[name] = batch[fields[0]] if single else {field: batch[field] for field in (*fields, *masks)}
    return raw


def drop_flag(name: str) -> str:
    """Returns the flag with the probability of the null of a condition in training."""
    return "label_drop" if name == "label" else "condition_drop"


def draw_drops(
    config: ConditionsConfig, encoders: Conditioner, streams: Callable[[str], Streams], count: int
) -> dict[str, Tensor]:
    """Samples which examples get the null of each condition: (count,) bools by name, from separate streams.

    All conditions that read regions share one.
    """
    names = dict.fromkeys(encoders.drop_names.values())
    return {name: streams(name).uniform((count,)) < getattr(config, drop_flag(name)) for name in names}
