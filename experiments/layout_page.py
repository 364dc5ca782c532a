"""The tab Layout of the demo page: samples images from boxes that the user draws, and edits images by their boxes.

layout_canvas.js is the canvas in the browser; harness/layout_edits.py has the edits.
"""

import base64
import io
import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from experiments.harness.layout_edits import EditedLayout, Layout, LayoutNames, Region, check_box
from experiments.metrics.contact_sheet import class_color
from experiments.page_components import SIDE, Results, Settings, add_results, show_errors
from experiments.playground import Playground, enlarge_to_picture

CANVAS_SCRIPT = Path(__file__).with_name("layout_canvas.js")
SHOW = "scene => { customElements.get('layout-canvas').show(scene) }"
READ = "(regions, ...others) => [document.querySelector('layout-canvas').regions, ...others]"
COLUMNS = 3  # of the gallery
SAMPLE, EDIT = "Sample this layout", "Edit the image"
NO_BOXES = "This run reads no boxes. Choose one that was trained with `--conditions boxes`, `objects` or `layout`."
HELP = (
    "Drag on the canvas to draw a box; drag a box to move it, a corner of it to resize it. Then sample images of these "
    "boxes, and edit them: where boxes move, come, go or change, the image is drawn anew, and the rest is kept."
)


class Scene(NamedTuple):
    """An image with its layout."""

    image: Tensor | None = None  # uint8 (C, H, W); None: none yet
    layout: Layout = ()


def canvas_content(play: Playground, scene: Scene) -> dict[str, Any] | None:
    """Returns what the canvas shows, as `show` of layout_canvas.js takes it; None for a model that reads no boxes."""
    names = play.layout_names
    if names is None:
        return None
    swatches = [*names.rgb, *map(class_color, range(len(names.rgb), len(names.colors)))]
    return {
        "key": secrets.token_hex(8),  # a canvas shows the same content once
        "size": play.trained.data.size,
        "image": None if scene.image is None else data_url(enlarge_to_picture(scene.image, 1)),
        "regions": [region._asdict() for region in scene.layout],
        "classes": names.classes,
        "class_colors": [css_color(class_color(number)) for number in range(len(names.classes))],
        "colors": [(name, css_color(rgb)) for name, rgb in zip(names.colors, swatches, strict=True)],
    }


def css_color(rgb: tuple[int, int, int]) -> str:
    return f"rgb{tuple(rgb)}"


def data_url(picture: Image.Image) -> str:
    """Returns a picture as an address that contains it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_canvas(text: str, before: Layout, names: LayoutNames) -> EditedLayout:
    """Returns the layout on the canvas, beside the one that it showed first; ValueError for boxes that cannot be."""
    regions: list[Region | None] = [None] * len(before)
    for each in json.loads(text):
        region = Region(tuple(map(float, each["box"])), each["number"], each["color"])
        check_box(region.box, names.describe(region))
        if each["id"] is None:
            regions.append(region)
        else:
            regions[each["id"]] = region
    return EditedLayout(before, tuple(regions))


@dataclass(frozen=True)
class Handlers:
    """What the buttons of the tab do, and what another run does to it: updates of components."""

    settings: Settings
    results: Results

    def sample_layout(self, text: str, scenes: list[Scene], number: int, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            layout = read_canvas(text, scenes[number].layout, play.layout_names).after
            batch = play.sample(replace(request, layout=layout))
            drawn = [Scene(image, layout) for image in batch["image"]]
            gallery = self.results.show(play, request, batch, kind="_layout")
            return [*gallery, request.seed, canvas_content(play, drawn[0]), drawn, 0]

    def edit_layout(self, text: str, scenes: list[Scene], number: int, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            image, before = scenes[number]
            if image is None:
                raise ValueError(f"there is no image to edit: draw boxes, and press {SAMPLE}")
            layout = read_canvas(text, before, play.layout_names)
            batch = play.edit_layout(request, image, layout)
            drawn = [scenes[number], *(Scene(each, layout.after) for each in batch["image"])]
            first = (enlarge_to_picture(image, SIDE), "before")
            gallery = self.results.show(play, request, batch, (first,), "_edited")
            return [*gallery, request.seed, canvas_content(play, drawn[1]), drawn, 1]

    def take_layout(self, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            scene = Scene(None, play.draw_layout(request.seed))
            return [canvas_content(play, scene), [scene], 0, request.seed]

    def clear_layout(self, run: str, step: int | str) -> list:
        return [canvas_content(self.settings.runs.open(run, step), Scene()), [Scene()], 0]

    def pick_run(self, run: str, last_choice: str) -> list:
        import gradio as gr

        if run == last_choice:
            return [gr.skip()] * 7
        play = self.settings.runs.open(run)
        reads = play.layout_names is not None
        areas = [gr.update(visible=visible) for visible in (reads, not reads, False)]
        return [*areas, canvas_content(play, Scene()), [Scene()], 0, run]


def add_layout_tab(settings: Settings, loaded: Any) -> None:
    """Adds the tab, with a canvas for models that read boxes; `loaded` is the event of another run."""
    import gradio as gr

    play = settings.runs.current
    reads = play.layout_names is not None
    with gr.Tab("Layout") as tab:
        message = gr.Markdown(NO_BOXES, visible=not reads)
        with gr.Column(visible=reads) as area:
            gr.Markdown(HELP)
            with gr.Row():
                with gr.Column(min_width=400):
                    gr.HTML("<layout-canvas></layout-canvas>")
                    with gr.Row():
                        sample_button = gr.Button(SAMPLE, variant="primary", min_width=120)
                        edit_button = gr.Button(EDIT, variant="primary", min_width=120)
                    with gr.Row():
                        take = gr.Button("A layout of the data", min_width=120)
                        clear = gr.Button("Clear", min_width=120)
                with gr.Column(min_width=320):
                    results = add_results(COLUMNS)
        content = gr.JSON(canvas_content(play, Scene()), visible=False)  # of the canvas, when it was shown
        regions = gr.Textbox(visible=False)  # its boxes, which READ fills in
        scenes, number = gr.State([Scene()]), gr.State(0)  # those in the gallery, and which of them the canvas shows
        last_choice = gr.State(settings.run.value)

    def select_image(scenes: list[Scene], run: str, step: int | str, event: gr.SelectData) -> list:
        return [canvas_content(settings.runs.open(run, step), scenes[event.index]), event.index]

    handlers = Handlers(settings, results)
    inputs, outputs, model = [regions, scenes, number, *settings.inputs], [content, scenes, number], settings.inputs[:2]
    show = {"fn": None, "inputs": content, "outputs": None, "js": SHOW}
    for button, draw in ((sample_button, handlers.sample_layout), (edit_button, handlers.edit_layout)):
        results.fill_on(button, draw, inputs, settings.seed, *outputs, js=READ).success(**show)
    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    take.click(handlers.take_layout, settings.inputs, [*outputs, settings.seed], **quietly).success(**show)
    clear.click(handlers.clear_layout, model, outputs, **quietly).success(**show)
    results.gallery.select(select_image, [scenes, *model], [content, number], **quietly).success(**show)
    switched = loaded.success(
        handlers.pick_run, [settings.run, last_choice], [area, message, results.area, *outputs, last_choice], **quietly
    )
    switched.success(**show)
    tab.select(**show)
