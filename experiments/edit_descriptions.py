"""What an image shows and should show, in the tab Edit of the demo page: class, text, boxes, words and numbers.

edit_page.py has the tab.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from experiments.harness.edit_methods import Side
from experiments.harness.layout_edits import Layout, format_layout, parse_layout
from experiments.page_components import MOST_FIELDS, know_moved_numbers, metadata_inputs, read_metadata
from experiments.playground import AS_IN_DATA, CAPTION, NO_CLASS, Playground, Request, first_layout
from models.conditions.metadata import UNKNOWN
from models.conditions.numbers import parse_number
from train.config import SamplingConfig
from train.data.collate import collate
from train.data.loading import ImageSource
from train.data.transforms import as_uint8
from train.loop import Batch

PER_SIDE = 3 + 3 * MOST_FIELDS  # boxes of a description: class, text, boxes of objects, words, numbers with switches
SIDES = {"from": "What it shows.", "to": "What it should show."}


@dataclass(frozen=True)
class Description:
    """What an image shows."""

    label: str | int = NO_CLASS  # a number or a text of `Playground.classes`
    prompt: str = ""
    layout: Layout = ()
    metadata: Mapping[str, str | float] = field(default_factory=dict)  # by field; others are unknown

    @property
    def is_empty(self) -> bool:
        known = [value for name, value in self.metadata.items() if is_known(name, value)]
        return self.label == NO_CLASS and not (self.prompt or self.layout or known)


def is_known(name: str, value: str | float) -> bool:
    """Whether a word or a number of metadata is not the null."""
    return value != UNKNOWN and value == value  # a missing number is NaN


def describe_side(play: Playground, request: Request, shows: Description, options: SamplingConfig) -> Side:
    """Returns the conditions of images of a description, null ones for an empty one, and the options for them. Hints of
    control branches are those of the request.

    ValueError: the model reads texts, and there is none.
    """
    if shows.is_empty:
        return Side(null_conditions(play, request), options.without_guidance())
    if play.reads_prompts and not shows.prompt:
        raise ValueError("got a description without a text, which this run reads too: enter a text")
    return Side(play.conditions(request_for(play, request, shows)), options)


def request_for(play: Playground, request: Request, shows: Description) -> Request:
    """Returns the request for images of a description."""
    given = {"label": shows.label if play.classes else AS_IN_DATA, "prompt": shows.prompt}
    given["layout"] = None if play.layout_names is None else shows.layout
    given["metadata"] = {name: shows.metadata.get(name, UNKNOWN) for name in play.metadata_fields.unknown}
    return replace(request, **given)


def null_conditions(play: Playground, request: Request) -> Batch | None:
    """Returns conditions that are all null but for the hints of control branches, None without any."""
    if not play.hint_fields:
        return None
    batch = play.conditions(request_for(play, request, Description()))
    return {name: value if name in (*play.hint_fields, "label") else None for name, value in batch.items()}


def held_out_image(play: Playground, number: int) -> tuple[Tensor, Description]:
    """Returns a held-out image, uint8 (C, H, W), and what it shows."""
    source = ImageSource(play.trained.dataset("val"), play.trained.data)
    index = number % len(source)
    item, batch = source[index], {}
    label = int(source.dataset.labels[index]) if play.classes else NO_CLASS
    if play.reads_prompts or play.layout_names or play.metadata_fields.unknown:
        batch = collate([play.trained.conditions_of(item, index)])
    return as_uint8(item["image"].as_subclass(Tensor)), first_description(play, batch, label)


def sample_image(play: Playground, request: Request) -> tuple[Tensor, Description]:
    """Samples an image, uint8 (C, H, W), and returns what it should show."""
    request = replace(request, count=1)
    batch, label = play.sample(request), NO_CLASS
    if play.classes and batch.get("label", [-1])[0] in dict(play.classes).values():
        label = int(batch["label"][0])
    return batch["image"][0], first_description(play, play.conditions(request) or {}, label)


def first_description(play: Playground, batch: Batch, label: str | int) -> Description:
    """Returns what the first image of a batch of conditions shows; a text that is encoded is left out."""
    caption = batch[CAPTION][0] if play.reads_prompts else ""
    fields, metadata = play.metadata_fields, {}
    for name, words in fields.words.items():
        value = batch[name][0]
        metadata[name] = value if isinstance(value, str) else (UNKNOWN, *words)[int(value)]
    metadata |= {name: float(batch[name][0]) for name in fields.numbers}
    layout = () if play.layout_names is None else first_layout(batch)
    return Description(label, caption if isinstance(caption, str) else "", layout, metadata)


# Boxes of the page


def description_boxes(play: Playground) -> list:
    """Returns the boxes of the source and then of the target, PER_SIDE each, or the updates of them: those that the
    model reads are visible."""
    import gradio as gr

    boxes, classes, names = [], play.classes[1:], play.layout_names
    unknown = dict.fromkeys(play.metadata_fields.unknown, UNKNOWN)
    for side, about in SIDES.items():
        choices = classes if side == "from" else classes[1:]
        value = choices[0][1] if choices else None
        style = {"label": f"{side} class", "info": about, "min_width": 160, "visible": bool(choices)}
        boxes.append(gr.Dropdown(choices, value=value, allow_custom_value=True, **style))
        boxes.append(gr.Textbox("", **style | {"label": f"{side} text", "visible": play.reads_prompts}))
        form = "" if names is None else f"An object a line: CLASS {'COLOR ' * bool(names.colors)}LEFT TOP RIGHT BOTTOM."
        style |= {"label": f"{side} boxes", "info": form, "visible": names is not None, "lines": 3}
        boxes += [gr.Textbox("", **style), *metadata_inputs(play, unknown, f"{side} ")]
    return boxes


def link_boxes(boxes: list) -> None:
    """Makes numbers of `description_boxes` known when their sliders are moved."""
    for first in (0, PER_SIDE):
        know_moved_numbers(boxes[first + 3 : first + PER_SIDE])


def read_description(play: Playground, label: str | int | None, text: str, layout: str, *metadata: Any) -> Description:
    """Returns what the boxes of a side say, those that the model reads; ValueError for boxes that cannot be."""
    return Description(
        label if play.classes else NO_CLASS,
        text.strip() if play.reads_prompts else "",
        () if play.layout_names is None else parse_layout(layout, play.layout_names),
        read_metadata(play, metadata),
    )


def description_values(play: Playground, shows: Description) -> list:
    """Returns the values of the boxes of a side that say what an image shows; hidden ones stay as they are."""
    import gradio as gr

    names, fields = play.layout_names, play.metadata_fields
    values = [shows.label, shows.prompt, "" if names is None else format_layout(shows.layout, names)]
    words = [shows.metadata[name] for name in fields.words][:MOST_FIELDS]
    values += [*words, *[gr.skip()] * (MOST_FIELDS - len(words))]
    for name in [*fields.numbers][:MOST_FIELDS]:
        number = parse_number(name, shows.metadata[name])
        values += [number, False] if is_known(name, number) else [gr.skip(), True]
    return values + [gr.skip()] * (PER_SIDE - len(values))
