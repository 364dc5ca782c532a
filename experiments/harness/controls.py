"""The controls of the demo page: one for each sampling setting, with its label, hint, limits and value."""

import re
import types
import typing
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from experiments.harness.edit_methods import EditingConfig
from models.ranges import FINITE, describe, is_inside
from train.cli.help import field_docs
from train.config import SamplingConfig

LABELS = {  # of flags whose names are not the usual terms
    "sample_steps": "steps",
    "temp": "temperature",
    "last_temp": "last temperature",
    "choice_temp": "choice temperature",
    "guidance": "guidance scale",
    "image_guidance": "image guidance scale",
    "region_guidance": "region guidance scale",
    "control_strength": "hint strength",
    "control_guess": "guess mode",
    "top_k": "top-k",
    "top_p": "top-p",
    "sigma_min": "smallest sigma",
    "sigma_max": "largest sigma",
    "s_churn": "churn",
    "s_tmin": "smallest sigma of churn",
    "s_tmax": "largest sigma of churn",
    "s_noise": "noise factor of churn",
    "repaint_resamplings": "RePaint resamplings",
    "repaint_jump": "RePaint jump",
}
HINTS = {  # of the main settings, shorter than the help texts of their flags
    "sample_steps": "More take longer.",
    "temp": "Lower: safer, less varied.",
    "guidance": "Higher: more typical.",
    "image_guidance": "Higher: closer to the source image. Empty: the guidance scale.",
    "region_guidance": "Higher: closer to the layout. Empty: the guidance scale.",
    "control_strength": "Lower: freer. One number, or one for each skip and one for the middle.",
}
CONTROL_KINDS = {int: "integer", float: "number", bool: "switch"}
CONDITION_SETTINGS = (  # of their source, opened once, with the page
    *("condition_file", "metadata", "class_sampling", "hint", "hint_ready"),
)
LARGE = 1e5  # an upper limit from here on only catches slips of the keyboard


class ControlKey(NamedTuple):
    """What the settings of two samplers have in common that share a control."""

    name: str
    kind: str
    optional: bool


class Control(NamedTuple):
    """A control of the page for one sampling setting."""

    name: str
    label: str
    help: str  # help text of the flag
    kind: Literal["choice", "switch", "integer", "number", "numbers"]  # numbers: several, separated by spaces
    value: Any  # initial value
    choices: tuple[str, ...] = ()
    optional: bool = False  # may be empty, meaning None
    count: int = 1  # how many numbers; 0: one or more
    interval: str = FINITE  # of numbers, as in RANGES
    placeholder: str = "default"  # what an empty control means
    editable: bool = True
    visible: bool = True

    @property
    def key(self) -> ControlKey:
        return ControlKey(self.name, self.kind, self.optional)

    @property
    def hint(self) -> str:
        """What the setting does, and the limits of a number, unless the help text has them."""
        low, high = self.interval[1:-1].split(", ")
        text = HINTS.get(self.name, flags_to_labels(" ".join(self.help.split())))
        if low == "-inf" or re.search(rf"in \[{low}, {high}\]|\b{low}( \([^)]*\))? to {high}\b", text):
            return text
        if self.interval[0] == "(":
            limits = f"above {low}" if float(high) >= LARGE else f"above {low}, up to {high}"
        else:
            limits = f"at least {low}" if float(high) >= LARGE else f"{low} to {high}"
        return f"{text} Allowed: {limits}."


def make_controls(
    options: SamplingConfig | EditingConfig,
    solvers: list[str],
    conditional: bool,
    regions: bool,
    images: bool,
    hints: bool,
) -> list[Control]:
    """Returns a control for each setting with a supported type, except the source of the conditions; guidance only for
    conditional models, that of regions and of images and what hints do only for models conditioned on them."""
    kinds, helps, controls = typing.get_type_hints(type(options)), field_docs(type(options)), []
    ranges = {k: v for base in reversed(type(options).__mro__) for k, v in vars(base).get("RANGES", {}).items()}
    for field in fields(options):
        name, value, (kind, optional) = field.name, getattr(options, field.name), split_optional(kinds[field.name])
        own = {"name": name, "label": label_of(name), "help": helps.get(name, "")}
        own |= {"value": value, "optional": optional, "interval": ranges.get(name, FINITE)}
        if name in CONDITION_SETTINGS or (name.startswith("guidance") and not conditional):
            continue
        if (name == "region_guidance" and not regions) or (name == "image_guidance" and not images):
            continue
        if name.startswith("control_") and not hints:
            continue
        if name == "solver":
            controls.append(Control(**own, kind="choice", choices=tuple(solvers)))
        elif typing.get_origin(kind) is Literal:
            controls.append(Control(**own, kind="choice", choices=typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            own["value"] = None if value is None else " ".join(f"{each:g}" for each in value)
            parts = typing.get_args(kind)
            controls.append(Control(**own, kind="numbers", count=0 if Ellipsis in parts else len(parts)))
        elif kind in CONTROL_KINDS:
            controls.append(Control(**own, kind=CONTROL_KINDS[kind]))
    return controls


def split_optional(kind: Any) -> tuple[Any, bool]:
    """Splits an optional type into the type and whether it may be None."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [each for each in typing.get_args(kind) if each is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def parse_value(control: Control, value: Any) -> Any:
    """Converts the content of a control to a value of its field; ValueError if it is not valid."""
    if value is None or value == "":
        if not control.optional:
            raise ValueError(f"{control.label} is empty: enter a value")
        return None
    if control.kind in ("choice", "switch"):
        return value
    try:
        numbers = tuple(float(word) for word in str(value).split())
    except ValueError:
        numbers = ()
    if control.kind == "integer":
        numbers = tuple(int(number) for number in numbers if number.is_integer())
    if not numbers or control.count not in (0, len(numbers)):
        kinds = {"integer": "an integer", "number": "a number"}
        wanted = kinds.get(control.kind, f"{control.count or 'one or more'} numbers separated by spaces")
        raise ValueError(f"got {value!r} for {control.label}, wanted {wanted}")
    for number in numbers:
        if not is_inside(number, control.interval):
            raise ValueError(f"got {value} for {control.label}, wanted {describe(control.interval, number)}")
    return numbers if control.kind == "numbers" else numbers[0]


def flags_to_labels(message: str) -> str:
    """Replaces flags and names of settings in a message by labels of the page: `pass --top_k K` becomes `pass top-k K`,
    and `with s_churn` becomes `with churn`."""
    names = "|".join(name for name in LABELS if "_" in name)
    return re.sub(rf"--(\w+)|\b({names})\b", lambda found: label_of(found[1] or found[2]), message)


def label_of(name: str) -> str:
    """Returns the label of a setting on the page."""
    return LABELS.get(name, name.replace("_", " "))


def component(control: Control) -> Any:
    """Returns the gradio component of a control, or the update of one.

    A number that may be empty is a text: gradio turns an empty number into 0 when it appears.
    """
    import gradio as gr

    common = {"label": control.label, "info": control.hint, "value": control.value}
    common |= {"visible": control.visible, "min_width": 150}
    if control.kind == "choice":
        choices = [("default", ""), *control.choices] if control.optional else control.choices
        common |= {"value": "" if control.value is None else control.value}
        return gr.Dropdown(choices, **common, allow_custom_value=control.name == "solver")  # not the same for all runs
    if control.kind == "switch":
        return gr.Checkbox(**common)
    if control.optional or control.kind == "numbers":
        common |= {"value": "" if control.value is None else str(control.value)}
        return gr.Textbox(**common, placeholder=control.placeholder, interactive=control.editable)
    return gr.Number(**common, step=1 if control.kind == "integer" else 0.1)
