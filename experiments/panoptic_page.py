"""The tab Panoptic of the demo page: samples images of a painted panoptic map, with words for its regions.

panoptic_canvas.js is the canvas in the browser; harness/painted_maps.py turns what is painted into conditions.
"""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.harness.painted_maps import (
    WORDS,
    PaintedMap,
    empty_map,
    painting_in_picture,
    painting_of,
    parse_painting,
)
from experiments.metrics.contact_sheet import class_color
from experiments.page_components import Results, Settings, add_results, open_upload, show_errors
from experiments.playground import Playground

PAINT_SCRIPT = Path(__file__).with_name("panoptic_canvas.js")
SHOW = "scene => { customElements.get('panoptic-canvas').show(scene) }"
READ = "(painting, ...others) => [document.querySelector('panoptic-canvas').painting, ...others]"
COLUMNS = 3  # of the gallery
SAMPLE = "Sample this map"
NO_SEGMENTS = "This run reads no segments. Choose one that was trained with `--conditions region_words`."
HELP = (
    "Choose a class and paint. *New instance* begins another thing of the class. Regions without words of their own "
    "read the name of their class; grey is in no region. Without a prompt, the prompt is the names of the classes."
)


def canvas_content(play: Playground, painted: PaintedMap | None = None) -> dict[str, Any] | None:
    """Returns what the canvas shows, as `show` of panoptic_canvas.js takes it: a map, by default an empty one; None for
    a model that reads no segments."""
    vocabulary = play.map_vocabulary
    if vocabulary is None:
        return None
    painted = empty_map(vocabulary.size) if painted is None else painted
    return {
        "key": secrets.token_hex(8),  # a canvas shows the same content once
        "size": vocabulary.size,
        "runs": painted.runs,
        "regions": [region and region._asdict() for region in painted.regions],
        "classes": vocabulary.classes,
        "things": vocabulary.categories.things,
        "class_colors": [class_color(number) for number in range(len(vocabulary.classes))],
        "words": WORDS in vocabulary.fields,
    }


@dataclass(frozen=True)
class Handlers:
    """What the buttons of the tab do, and what another run does to it: updates of components."""

    settings: Settings
    results: Results

    def sample_map(self, text: str, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            request = replace(request, painted=parse_painting(text, play.map_vocabulary))
            return [*self.results.show(play, request, play.sample(request), kind="_panoptic"), request.seed]

    def take_map(self, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            batch = play.source.draw(request.seed, [request.seed])
            return [canvas_content(play, painting_of(batch, play.map_vocabulary)), request.seed]

    def open_picture(self, file: str, run: str, step: int | str) -> dict[str, Any]:
        picture = open_upload(file)
        with show_errors():
            play = self.settings.runs.open(run, step)
            colors = [class_color(number) for number in range(len(play.map_vocabulary.classes))]
            return canvas_content(play, painting_in_picture(picture, colors, play.map_vocabulary))

    def clear_map(self, run: str, step: int | str) -> dict[str, Any]:
        return canvas_content(self.settings.runs.open(run, step))

    def pick_run(self, run: str, last_choice: str) -> list:
        import gradio as gr

        if run == last_choice:
            return [gr.skip()] * 5
        content = canvas_content(self.settings.runs.open(run))
        reads = content is not None
        areas = [gr.update(visible=visible) for visible in (reads, not reads, False)]
        return [*areas, content, run]


def add_panoptic_tab(settings: Settings, loaded: Any) -> None:
    """Adds the tab, with a canvas for models that read segments; `loaded` is the event of another run."""
    import gradio as gr

    play = settings.runs.current
    first = canvas_content(play)
    with gr.Tab("Panoptic") as tab:
        message = gr.Markdown(NO_SEGMENTS, visible=first is None)
        with gr.Column(visible=first is not None) as area:
            gr.Markdown(HELP)
            with gr.Row():
                with gr.Column(min_width=400):
                    gr.HTML("<panoptic-canvas></panoptic-canvas>")
                    with gr.Row():
                        sample_button = gr.Button(SAMPLE, variant="primary", min_width=120)
                        take = gr.Button("A map of the data", min_width=120)
                    with gr.Row():
                        upload = gr.UploadButton("Open a painted picture", min_width=120)
                        clear = gr.Button("Clear the map", min_width=120)
                with gr.Column(min_width=320):
                    results = add_results(COLUMNS)
        content = gr.JSON(first, visible=False)  # of the canvas, when it was shown
        painting = gr.Textbox(visible=False)  # the map on it, which READ fills in
        last_choice = gr.State(settings.run.value)

    handlers, model = Handlers(settings, results), settings.inputs[:2]
    show = {"fn": None, "inputs": content, "outputs": None, "js": SHOW}
    results.fill_on(sample_button, handlers.sample_map, [painting, *settings.inputs], settings.seed, js=READ)
    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    take.click(handlers.take_map, settings.inputs, [content, settings.seed], **quietly).success(**show)
    upload.upload(handlers.open_picture, [upload, *model], content, **quietly).success(**show)
    clear.click(handlers.clear_map, model, content, **quietly).success(**show)
    outputs = [area, message, results.area, content, last_choice]
    loaded.success(handlers.pick_run, [settings.run, last_choice], outputs, **quietly).success(**show)
    tab.select(**show)
