"""What a learned sampler is conditioned on: the flags, the encoders they name, and the fields of a batch they read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from diffusion.rng import Streams
from models.conditioning import ConditionEncoder
from models.conditions import label
from train.config import SamplerConfig
from train.loop import Batch
from train.registry import plugin


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig(SamplerConfig):
    """A sampler whose network takes conditions."""

    class_conditional: bool = True
    """Condition on the class where the data have labels."""
    label_drop: float = 0.1
    """Share of training labels replaced by the null class, for guidance."""
    conditions: tuple[str, ...] = ()
    """Files of models/conditions beside the class: image takes the field condition_image."""
    condition_channels: int = 3
    """conditions image: channels of the field condition_image."""
    condition_drop: float = 0.1
    """Share of training conditions replaced by their null, each apart."""

    def __post_init__(self):
        for name in ("label_drop", "condition_drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted a share in [0, 1)")


def make_encoders(config: ConditionsConfig, width: int, n_classes: int) -> dict[str, ConditionEncoder]:
    """The encoders of --conditions, and that of the label where there are classes, for embeddings of a width.

    --condition_channels is the option `channels` of those that have it.
    """
    encoders = {}
    for name in config.conditions:
        module = plugin("models.conditions", name, "condition")
        if module is label:
            raise ValueError("got condition 'label' for --conditions: classes are --class_conditional")
        own = [field.name for field in fields(module.Config) if hasattr(config, f"condition_{field.name}")]
        options = {option: getattr(config, f"condition_{option}") for option in own}
        encoders[name] = module.build(module.Config(**options), width)
    if n_classes:
        encoders["label"] = label.build(label.Config(n_classes=n_classes), width)
    return encoders


def fields_by_condition(names: Collection[str]) -> dict[str, str]:
    """The field of a batch that each condition reads, by the condition's name."""
    return {name: plugin("models.conditions", name, "condition").FIELD for name in names}


def raw_conditions(field_of: Mapping[str, str], batch: Batch | None) -> Batch:
    """Raw conditions by name; ValueError where the batch has no such field."""
    batch = batch or {}
    missing = sorted({*field_of.values()} - {*batch})
    if missing:
        raise ValueError(
            f"got a batch with the fields {', '.join(batch) or 'none'}, conditions need {', '.join(missing)}: "
            "write them in the function of --adapt, or give the items of the data set such fields"
        )
    return {name: batch[field] for name, field in field_of.items()}


def draw_drops(
    config: ConditionsConfig, names: Collection[str], draw: Callable[[str], Streams], count: int
) -> dict[str, Tensor]:
    """Which examples get the null of each condition, (count,) bool by name, from a stream of its own."""
    share = {name: config.label_drop if name == "label" else config.condition_drop for name in names}
    return {name: draw(name).uniform((count,)) < share[name] for name in names}
