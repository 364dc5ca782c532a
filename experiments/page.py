"""The demo page in gradio: settings, and tabs to sample, watch, inpaint, edit, and look at the attention.

demo.py serves the page; page_components.py has the settings; layout_page.py, panoptic_page.py, edit_page.py and
look_page.py have tabs of their own; playground.py draws the images.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from PIL import Image

from experiments.edit_page import add_edit_tab
from experiments.layout_page import add_layout_tab
from experiments.look_page import add_look_tab
from experiments.page_components import (
    SIDE,
    TAB_TITLE,
    Settings,
    add_editor,
    add_header,
    add_results,
    add_settings,
    brushed_mask,
    fill_on,
    has_picture,
    open_upload,
    show_errors,
)
from experiments.panoptic_page import add_panoptic_tab
from experiments.playground import DenoisingStep, Runs, WatchedSteps, enlarge_to_picture
from train.data.transforms import as_uint8
from train.logging import grid_image

COLUMNS = 6  # of the gallery of samples
HINT = "hint"  # below those given, before the samples
DELETE_CACHE = (600, 3600)  # seconds: how often the page's image files are cleaned up, and their age then


def add_sample_tab(settings: Settings) -> Any:
    """Adds the tab for sampling; returns its gallery."""
    import gradio as gr

    button = gr.Button("Sample", variant="primary")
    results = add_results(COLUMNS)

    def sample(*values: Any) -> list:
        with show_errors():
            play, request = settings.read(*values)
            hints = [(enlarge_to_picture(as_uint8(hint), SIDE), HINT) for hint in request.hints.values()]
            return [*results.show(play, request, play.sample(request), hints), request.seed]

    results.fill_on(button, sample, settings.inputs, settings.seed)
    return results.gallery


def add_watch_tab(settings: Settings) -> None:
    """Adds the tab that shows the steps of sampling as they happen, with a slider to review them."""
    import gradio as gr

    with gr.Row():
        button, stop = gr.Button("Watch", variant="primary"), gr.Button("Stop")
    with gr.Column(visible=False) as area:
        step = gr.Slider(1, 2, value=1, step=1, label="step", interactive=False)
        with gr.Row():
            style = {"format": "png", "interactive": False, "show_label": False, "buttons": ["download"]}
            with gr.Column():
                gr.Markdown("current sample x")
                current = gr.Image(**style)
            with gr.Column():
                gr.Markdown("predicted final image x0")
                prediction = gr.Image(**style)
    steps = gr.State(None)  # WatchedSteps

    def watch(*values: Any) -> Iterator[tuple]:
        history, last = WatchedSteps(), (None, None)
        with show_errors():
            play, request = settings.read(*values)
            for moment in play.watch(request):
                history.add(moment)
                slider = gr.Slider(maximum=max(2, moment.step), value=moment.step, info="", interactive=False)
                pictures = step_pictures(moment)
                # the same picture again would be written, by its content's name, while the browser reads it
                changed = [gr.skip() if new == old else new for new, old in zip(pictures, last, strict=True)]
                yield slider, *changed, history, request.seed
                last = pictures
        info = f"Of every {history.stride} steps, one is kept." if history.stride > 1 else ""
        yield gr.Slider(info=info, interactive=True), gr.skip(), gr.skip(), history, request.seed

    def look(number: float | None, history: WatchedSteps | None) -> tuple:
        return (gr.skip(), gr.skip()) if history is None else step_pictures(history.nearest(number or 1))

    outputs, style = [step, current, prediction, steps, settings.seed], {"show_progress_on": [current, prediction]}
    watching = fill_on([button.click], watch, settings.inputs, outputs, area, steps, **style)
    stop.click(lambda: gr.Slider(interactive=True), None, step, cancels=[watching])
    step.input(look, [step, steps], [current, prediction])


def step_pictures(moment: DenoisingStep) -> tuple[Image.Image, Image.Image]:
    """Returns enlarged grids of the current samples and of the predicted images."""
    size = SIDE // math.ceil(math.sqrt(len(moment.current)))
    return grid_image(moment.current, enlarge_to=size), grid_image(moment.predicted, enlarge_to=size)


def add_inpaint_tab(settings: Settings, gallery: Any) -> None:
    """Adds the tab for inpainting a sampled, selected or uploaded image with a brush."""
    import gradio as gr

    gr.Markdown(
        "Draw a new sample, click one in the first tab, or upload an image; then brush over the region to inpaint."
    )
    settings.note.render()
    with gr.Row():
        take, upload = gr.Button("New sample"), gr.UploadButton("Upload an image")  # gradio hides errors of file types
        button = gr.Button("Inpaint", variant="primary")
    with gr.Row(visible=False) as area:
        editor = add_editor()
        with gr.Column():
            results = add_results(3)

    def take_sample(*values: Any) -> tuple[Image.Image, int]:
        with show_errors():
            play, request = settings.read(*values)
            return enlarge_to_picture(play.draw(replace(request, count=1))[0], SIDE), request.seed

    def select_image(images: list, event: gr.SelectData) -> str:
        return images[event.index][0]

    def inpaint(canvas: dict | None, *values: Any) -> list:
        with show_errors():
            if not has_picture(canvas):
                raise ValueError("there is no image: draw a new sample, or upload an image")
            play, request = settings.read(*values)
            result = play.inpaint(request, canvas["background"], brushed_mask(canvas))
            masked = enlarge_to_picture(result.masked_input, SIDE)
            return [*results.show(play, request, result.results, (masked,), "_inpainted"), request.seed]

    filled, style = (area, editor, has_picture), {"show_progress_on": editor}
    fill_on([take.click], take_sample, settings.inputs, [editor, settings.seed], *filled, **style)
    fill_on([upload.upload], open_upload, upload, [editor], *filled, **style)
    gallery.select(lambda: gr.Row(visible=True), None, area, show_progress="hidden")
    gallery.select(select_image, gallery, editor)
    results.fill_on(button, inpaint, [editor, *settings.inputs], settings.seed)


def build_page(runs: Runs, most: int, seed: int | None) -> Any:
    """Builds the page (gradio.Blocks); `most` is the largest number of images at once, a given seed is fixed."""
    import gradio as gr

    name = runs.current.trained.run.name
    with gr.Blocks(title=name + TAB_TITLE, analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE) as page:
        header = add_header(runs)
        with gr.Row():
            with gr.Column(scale=1, min_width=360):
                settings, loaded = add_settings(runs, most, seed, *header)
            with gr.Column(scale=3):
                with gr.Tab("Sample"):
                    gallery = add_sample_tab(settings)
                with gr.Tab("Watch"):
                    add_watch_tab(settings)
                with gr.Tab("Inpaint"):
                    add_inpaint_tab(settings, gallery)
                add_layout_tab(settings, loaded)
                add_panoptic_tab(settings, loaded)
                add_edit_tab(settings, loaded, gallery)
                add_look_tab(settings, loaded)
        page.load(settings.list_runs, None, [settings.run, settings.step], show_progress="hidden")
    return page
