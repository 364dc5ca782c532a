"""The components that the tabs of the demo page share: the settings of a run, a gallery of results, and an editor.

page.py has the tabs; playground.py draws the images.
"""

import html
import math
import random
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from experiments.harness.controls import Control, ControlKey, component, flags_to_labels, make_controls
from experiments.harness.images import SampleWriter, image_names
from experiments.playground import (
    AS_IN_DATA,
    DECISIVE,
    Playground,
    Request,
    Runs,
    enlarge_to_picture,
    escape_markdown,
)
from models.conditions.metadata import UNKNOWN
from models.conditions.numbers import parse_number
from train.cli.errors import is_out_of_memory
from train.datasets._decode import decode, to_grey_or_rgb
from train.loop import Batch
from train.registry import load_plugin, plugin_names

MAIN_SETTINGS = ("solver", "sample_steps", "temp", "guidance", "control_strength")  # always visible
IMAGES = 12  # default number of images
SEEDS = 1_000_000  # seeds that the page draws from
TAB_TITLE = ": samples"  # of the browser's tab, after the name of the run
SIDE = 384  # pixels to which images are enlarged
MASK_COLOR = (228, 87, 46)  # of the brush
MOST_FIELDS = 12  # of metadata that are words on the page, and that are numbers; further ones are unknown
MOST_HINTS = 3  # pictures of hints; those of further control branches are of the data
WHOLE_STEPS = 30  # length from which a range of whole numbers has steps of 1; 0 to 14 may be a thickness in pixels
Shown = Image.Image | tuple[Image.Image, str]  # a picture, and its caption


@contextmanager
def show_errors() -> Iterator[None]:
    """Shows errors that the user can fix as messages on the page, which renders them as HTML."""
    import gradio as gr

    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(html.escape(flags_to_labels(str(error)), quote=False), print_exception=False) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise gr.Error("out of memory: enter fewer images", print_exception=False) from error


def class_dropdown(play: Playground) -> Any:
    """Returns the dropdown of a model's classes, or the update of it."""
    import gradio as gr

    visible = {"visible": bool(play.classes), "min_width": 240}
    return gr.Dropdown(play.classes, value=AS_IN_DATA, label="class", allow_custom_value=True, **visible)


def class_note(play: Playground) -> Any:
    """Returns what the class means in the tab Inpaint, for a model with classes, not rendered, or the update of it."""
    import gradio as gr

    text = f"Here, class *{AS_IN_DATA}* means no class and no guidance."
    return gr.Markdown(text, visible=bool(play.classes), render=False)


def text_inputs(play: Playground) -> list:
    """Returns the boxes of the prompt and the negative prompt, those of words, and `number_inputs`, or the updates of
    them: those that the model reads are visible."""
    import gradio as gr

    visible = {"visible": play.reads_prompts, "min_width": 320}
    about = "What all images show. Empty: captions of the data."
    prompt = gr.Textbox("", label="prompt", info=about, **visible)
    about = "What guidance moves away from. It needs a guidance scale above 1."
    boxes = [prompt, gr.Textbox("", label="negative prompt", info=about, **visible)]
    return boxes + metadata_inputs(play, play.initial_metadata)


def metadata_inputs(play: Playground, initial: Mapping[str, str | float], side: str = "") -> list:
    """Returns the boxes of words and `number_inputs`, or the updates of them: those that the model reads are visible,
    with `initial` values, and labels that begin with `side`."""
    import gradio as gr

    boxes = []
    for name, words in islice(play.metadata_fields.words.items(), MOST_FIELDS):
        style = {"label": side + name, "visible": True, "min_width": 150}
        boxes.append(gr.Dropdown([UNKNOWN, *words], value=initial[name], **style))
    boxes += [gr.Dropdown([UNKNOWN], value=UNKNOWN, visible=False) for _ in range(MOST_FIELDS - len(boxes))]
    return boxes + number_inputs(play, initial, side)


def number_inputs(play: Playground, initial: Mapping[str, str | float], side: str = "") -> list:
    """Returns the sliders of the numbers, each followed by its switch "unknown", or the updates of them: those of the
    fields that the model reads are visible."""
    import gradio as gr

    inputs = []
    for name, (low, high, _) in islice(play.metadata_fields.numbers.items(), MOST_FIELDS):
        value = parse_number(name, initial[name])
        unknown = math.isnan(value)
        value, step = low if unknown else value, slider_step(low, high)
        ends = min(low, value), max(high, value)  # --metadata may be outside the range
        style = {"visible": True, "min_width": 320, "buttons": []}
        inputs.append(gr.Slider(*ends, value=value, step=step, label=side + name, **style))
        inputs.append(gr.Checkbox(unknown, label=f"{side}{name} unknown", visible=True, elem_classes=["full-line"]))
    for _ in range(MOST_FIELDS - len(inputs) // 2):
        inputs += [gr.Slider(visible=False), gr.Checkbox(visible=False)]
    return inputs


def know_moved_numbers(boxes: list) -> None:
    """Makes the numbers among `metadata_inputs` known when their sliders are moved."""
    numbers = boxes[MOST_FIELDS:]
    for slider, unknown in zip(numbers[::2], numbers[1::2], strict=True):
        slider.input(None, None, unknown, js="() => false")


def slider_step(low: float, high: float) -> float:
    """Returns the step of a slider: 1 for long ranges of whole numbers, such as days; otherwise the power of ten that
    is a hundredth to a thousandth of the range."""
    if low % 1 == high % 1 == 0 and high - low >= WHOLE_STEPS:
        return 1
    return 10 ** math.floor(math.log10(high - low) - 2)


def read_metadata(play: Playground, values: Sequence[Any]) -> dict[str, str | float]:
    """Returns the metadata of a model from the values of their boxes, in the order of `text_inputs`."""
    fields, chosen, inputs = play.metadata_fields, {}, values[MOST_FIELDS:]
    numbers = [UNKNOWN if unknown else value for value, unknown in zip(inputs[::2], inputs[1::2], strict=True)]
    for names, own in ((fields.words, values[:MOST_FIELDS]), (fields.numbers, numbers)):
        names = [*names][:MOST_FIELDS]
        chosen |= dict(zip(names, own[: len(names)], strict=True))  # further boxes are hidden
    return dict.fromkeys(fields.unknown, UNKNOWN) | chosen


def hint_inputs(play: Playground) -> list:
    """Returns the uploads of the hints of control branches and the switch "hint ready", or the updates of them: those
    of the branches that the model has are visible."""
    import gradio as gr

    names = [name.removesuffix("_image").replace("_", " ") for name in play.hint_fields[:MOST_HINTS]]
    style = {"type": "filepath", "height": 110, "min_width": 240, "interactive": True}  # gradio would hide errors
    files = [gr.File(None, label=name, visible=True, **style) for name in names]
    files += [gr.File(None, visible=False, **style) for _ in range(MOST_HINTS - len(names))]
    about = "The pictures are hints already, such as edges; otherwise hints are made of them."
    ready = gr.Checkbox(play.takes_ready_hints, label="hint ready", info=about, visible=bool(names))
    return [*files, ready]


def read_hints(play: Playground, values: Sequence[Any]) -> dict[str, Tensor]:
    """Returns the hints of a model from the values of their boxes, in the order of `hint_inputs`; those without a
    picture are left out."""
    *files, ready = values
    given = zip(play.hint_fields, files, strict=False)  # further uploads are hidden
    return {name: play.make_hint(name, decode(file, Path(file).name), ready) for name, file in given if file}


def title(play: Playground) -> str:
    """Returns the line in Markdown that says which model this is."""
    height, width = play.trained.data.size
    return f"**{escape_markdown(play.trained.run.name)}**: images of {height}x{width} pixels"


@dataclass(frozen=True)
class Settings:
    """The components of the settings: those of all samplers, of which those of the run and its solver are visible."""

    runs: Runs
    most: int  # images at once
    run: Any
    step: Any
    label: Any
    count: Any
    seed: Any
    fixed: Any
    settings_run: Any  # hidden: the run whose settings these are, which is another one than chosen while that is loaded
    note: Any  # on the class in the tab Inpaint, which renders it
    texts: list  # those of `text_inputs`
    hints: list  # those of `hint_inputs`
    controls: dict[ControlKey, Any]

    @property
    def inputs(self) -> list:
        """The components whose values `read` takes."""
        first = [self.run, self.step, self.label, self.count, self.seed, self.fixed, self.settings_run]
        return [*first, *self.texts, *self.hints, *self.controls.values()]

    def read(
        self,
        run: str,
        step: int | str,
        label: str | int,
        count: int | None,
        seed: int | None,
        fixed: bool,
        settings_run: str,
        *values: Any,
    ) -> tuple[Playground, Request]:
        """Returns the sampler and the request that the values of `inputs` ask for; draws the seed unless it is
        fixed."""
        if run != settings_run:
            raise ValueError(f"the settings are those of {settings_run}: wait until {run} is loaded, or choose again")
        for name, value in {"images": count, "seed": seed if fixed else 0}.items():
            if value is None:
                raise ValueError(f"{name} is empty: enter a number")
        if not 1 <= count <= self.most:
            raise ValueError(f"got {count} for images, wanted 1 to {self.most}")
        play = self.runs.open(run, step)
        (prompt, negative, *metadata), values = values[: len(self.texts)], values[len(self.texts) :]
        given = {"prompt": prompt.strip(), "negative": negative.strip()} if play.reads_prompts else {}
        given["metadata"] = read_metadata(play, metadata)
        given["hints"], values = read_hints(play, values[: len(self.hints)]), values[len(self.hints) :]
        keys = {each.key for each in play.controls}
        options = {key.name: value for key, value in zip(self.controls, values, strict=True) if key in keys}
        seed = seed if fixed else random.randrange(SEEDS)
        return play, Request(options=play.settings(options), label=label, count=count, seed=seed, **given)

    def list_runs(self) -> list:
        """Returns updates of run and step with what there is by now."""
        import gradio as gr

        steps = self.runs.steps(self.runs.name(self.runs.first))
        return [gr.update(choices=[*self.runs.folders]), gr.update(choices=steps)]

    def pick_run(self, run: str, last_choice: str) -> list:
        """Loads the newest checkpoint of a run, unless it was chosen last; returns updates of title, step, class, note,
        its name twice, texts, hints and controls."""
        import gradio as gr

        if run == last_choice:  # gradio reports a choice again when another field is clicked
            return [gr.skip()] * (6 + len(self.texts) + len(self.hints) + len(self.controls))
        with show_errors():
            play = self.runs.open(run)
            step = gr.update(choices=self.runs.steps(run), value=play.trained.step)
        controls = {each.key: component(each) for each in play.controls_of()}
        hidden = gr.update(visible=False)
        first = [title(play), step, class_dropdown(play), class_note(play), run, run, *text_inputs(play)]
        return [*first, *hint_inputs(play), *(controls.get(key, hidden) for key in self.controls)]

    @property
    def decisive(self) -> dict[ControlKey, Any]:
        """The controls on which it depends which others are visible."""
        return {key: each for key, each in self.controls.items() if key.name in DECISIVE}

    def show_controls(self, run: str, step: int | str, *values: Any) -> list:
        """Returns updates of the controls: hides settings without effect beside the values of the decisive ones, and
        sets steps that are not free."""
        import gradio as gr

        with show_errors():
            play = self.runs.open(run, step)
            keys = {each.key for each in play.controls}
            choices = {key.name: value for key, value in zip(self.decisive, values, strict=True) if key in keys}
            controls = {each.key: each for each in play.controls_of(**choices)}
        updates = {key: {"visible": key in controls and controls[key].visible} for key in self.controls}
        for key, control in controls.items():
            if key.name == "sample_steps":
                updates[key] |= {"placeholder": control.placeholder, "interactive": control.editable}
                updates[key] |= {} if control.editable else {"value": ""}
        return [gr.update(**each) for each in updates.values()]


def all_controls(play: Playground) -> dict[ControlKey, Control]:
    """Returns the controls of all samplers, the main ones first, with the values of `play` where it has them."""
    modules = [load_plugin("train.samplers", name, "sampler") for name in plugin_names("train.samplers")]
    controls = [each for module in modules for each in make_controls(module.Sampling(), [], *[True] * 4)]
    controls = {each.key: each._replace(visible=False) for each in controls}
    controls |= {each.key: each for each in play.controls_of()}
    order = {name: i for i, name in enumerate(MAIN_SETTINGS)}
    return dict(sorted(controls.items(), key=lambda item: order.get(item[0].name, len(order))))


def add_header(runs: Runs) -> tuple[Any, Any, Any]:
    """Adds the title of the page and the choice of a run and a step; returns the line below the title and these."""
    import gradio as gr

    name, custom = runs.name(runs.first), {"allow_custom_value": True}  # `list_runs` adds those that begin later
    with gr.Row(equal_height=True):
        with gr.Column(scale=3, min_width=320):
            gr.Markdown("# Discrete and continuous diffusion")
            heading = gr.Markdown(title(runs.current))
        run = gr.Dropdown([*runs.folders], value=name, label="run", scale=2, min_width=320, **custom)
        step = gr.Dropdown(runs.steps(name), value=runs.current.trained.step, label="step", min_width=120, **custom)
    return heading, run, step


def add_settings(runs: Runs, most: int, seed: int | None, heading: Any, run: Any, step: Any) -> tuple[Settings, Any]:
    """Adds the settings of the run that the page opens with; another `run` changes them and the line `heading`. A given
    seed is fixed. Returns the settings and the event of another run, whose `success` follows when it is loaded."""
    import gradio as gr

    play, controls = runs.current, all_controls(runs.current)
    with gr.Row():
        texts = text_inputs(play)
    with gr.Row():
        hints = hint_inputs(play)
    with gr.Row():
        label = class_dropdown(play)
        main = {key: component(each) for key, each in controls.items() if key.name in MAIN_SETTINGS}
        whole = {"precision": 0, "min_width": 150}
        count = gr.Number(min(IMAGES, most), label="images", info=f"Up to {most} at once.", **whole)
        seed_box = gr.Number(seed or 0, label="seed", info="The same seed gives the same images.", **whole)
    fixed = gr.Checkbox(seed is not None, label="fix the seed", info="Otherwise each press draws a new one.")
    settings_run, note = gr.Textbox(runs.name(runs.first), visible=False), class_note(play)
    with gr.Accordion("more settings", open=False):
        others = {key: component(each) for key, each in controls.items() if key not in main}
    boxes = (label, count, seed_box, fixed, settings_run, note, texts, hints)
    settings = Settings(runs, most, run, step, *boxes, main | others)
    updated, last_choice = list(settings.controls.values()), gr.State(runs.name(runs.first))
    seed_box.input(None, None, fixed, js="() => true")
    know_moved_numbers(texts[2:])
    outputs = [heading, step, label, note, settings_run, last_choice, *texts, *hints, *updated]
    loaded = run.input(settings.pick_run, [run, last_choice], outputs, show_progress_on=heading)
    loaded.success(None, run, None, js=f"run => {{ document.title = run + '{TAB_TITLE}' }}")
    decisive = [*settings.decisive.values()]
    gr.on(
        [each.input for each in decisive],
        settings.show_controls,
        [run, step, *decisive],
        updated,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return settings, loaded


@dataclass(frozen=True)
class Results:
    """A gallery of images, with buttons to download them; `area`, which holds them, is hidden while there are none."""

    area: Any
    gallery: Any
    png: Any
    npz: Any

    def fill_on(self, button: Any, draw: Callable[..., list], inputs: list, *others: Any, **keywords: Any) -> Any:
        """Makes a button show what `draw` returns: what `show` does, and the values of `others`, the seed first."""
        outputs, style = [self.gallery, self.png, self.npz, *others], {"show_progress_on": self.gallery}
        style |= {"api_name": draw.__name__} | keywords
        return fill_on([button.click], draw, inputs, outputs, self.area, self.npz, **style)

    def show(
        self, play: Playground, request: Request, batch: Batch, first: Sequence[Shown] = (), kind: str = ""
    ) -> list:
        """Returns the values that show a batch after other pictures, and let it be downloaded as files that are named
        after the run and the kind of result."""
        import gradio as gr

        pictures = [enlarge_to_picture(image, SIDE) for image in batch["image"]]
        folder = Path(self.gallery.GRADIO_CACHE) / secrets.token_hex(8)
        name = f"{play.trained.run.name}_{play.trained.step}{kind}_seed{request.seed}"
        files = [gr.DownloadButton(value=str(file), visible=True) for file in write_files(folder, name, batch)]
        images = [*first, *zip(pictures, play.captions(batch), strict=True)]
        return [images, *files]


def fill_on(
    events: list[Callable],
    work: Callable,
    inputs: Any,
    outputs: list,
    area: Any,
    content: Any,
    is_filled: Callable[[Any], bool] = bool,
    **keywords: Any,
) -> Any:
    """Makes events show an area while `work` fills it; if that fails, hides it again unless its `content` is filled."""
    import gradio as gr

    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    visible = gr.on(events, lambda: gr.update(visible=True), None, area, **quietly)
    working = visible.then(work, inputs, outputs, **keywords)
    working.failure(lambda value: gr.update(visible=is_filled(value)), content, area, **quietly)
    return working


def write_files(folder: Path, name: str, batch: Batch) -> tuple[Path, Path]:
    """Writes images as PNG files in a .zip, and as a .npz in the format of get_samples.py; returns their paths."""
    with SampleWriter(folder, len(batch["image"]), image_names(len(batch["image"]))) as writer:
        writer.add(batch)
    archive = Path(shutil.make_archive(str(folder / name), "zip", folder / "images"))
    shutil.rmtree(folder / "images")
    return archive, (folder / "samples.npz").rename(folder / f"{name}.npz")


def add_results(columns: int) -> Results:
    """Adds a hidden gallery and its download buttons."""
    import gradio as gr

    style = {"show_label": False, "format": "png", "object_fit": "contain", "interactive": False, "buttons": []}
    with gr.Column(visible=False) as area:
        gallery = gr.Gallery(columns=columns, **style)
        with gr.Row():
            png = gr.DownloadButton("Download PNG files (.zip)", size="sm", visible=False)
            npz = gr.DownloadButton("Download array (.npz)", size="sm", visible=False)
    return Results(area, gallery, png, npz)


def add_editor() -> Any:
    """Adds a canvas that shows a picture, on which a brush draws a mask."""
    import gradio as gr

    brush = gr.Brush(default_size=40, colors=[f"#{bytes(MASK_COLOR).hex()}"], color_mode="fixed")
    tools = {"brush": brush, "transforms": (), "layers": False, "sources": (), "type": "pil"}
    return gr.ImageEditor(show_label=False, canvas_size=(SIDE, SIDE), format="png", height=520, **tools)


def has_picture(canvas: dict | None) -> bool:
    """Whether there is a picture in the content of an editor."""
    return canvas is not None and canvas["background"] is not None


def brushed_mask(canvas: dict) -> Image.Image:
    """Returns an L image of the size of an editor's picture, 255 where the brush was."""
    mask = Image.new("L", canvas["background"].size)
    for layer in canvas["layers"]:
        mask.paste(255, mask=layer.getchannel("A"))
    return mask


def open_upload(file: str) -> Image.Image:
    """Opens an image that was uploaded."""
    with show_errors():
        return to_grey_or_rgb(decode(file, name=Path(file).name))
