"""Opens a page in the browser to sample from a trained model, watch the denoising steps, and inpaint images."""

import html
import math
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model, run_defaults
from experiments.playground import (
    AS_IN_DATA,
    Control,
    DenoisingStep,
    Playground,
    Request,
    enlarge_to_picture,
    escape_markdown,
    flags_to_labels,
)
from models.ranges import check_ranges
from train.cli.parse import run_script
from train.config import SamplingConfig
from train.datasets._decode import FORMATS, decode, to_grey_or_rgb
from train.datasets.folder import SUFFIXES
from train.logging import grid_image

HOST = "127.0.0.1"  # the page is only accessible from this machine
LOCAL = re.compile(rb"(https?://)?(127\.0\.0\.1|localhost)(:\d+)?")  # a Host or Origin header of the page itself
SESSIONS = 4  # browser tabs whose watched steps are kept in memory
MAIN_SETTINGS = ("solver", "sample_steps", "temp", "guidance")  # always visible
FONTS = ("Roboto", "system-ui", "sans-serif")  # installed ones: nothing is downloaded
STYLE = "img {image-rendering: pixelated} footer {display: none !important}"
IMAGES, COLUMNS = 12, 6  # default number of images, and columns of the gallery
DELETE_CACHE = (600, 3600)  # seconds: how often the page's image files are cleaned up, and their age then
SIDE = 384  # pixels to which images are enlarged


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Page."""

    port: int = 7860
    """Port of the page, http://127.0.0.1:PORT."""

    EVERYDAY = ("port",)
    RANGES = {"port": "[1, 65535]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Opens a page in the browser to sample from a trained model, watch the denoising steps, and inpaint images."""

    EXAMPLES = (
        "python demo.py --sampler {sampler} --dataset mnist",
        "python demo.py --load_dir {sampler}_mnist --port 8000",
    )
    NOT_EVERYDAY = ("output",)

    page: PageConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


@contextmanager
def show_errors() -> Iterator[None]:
    """Shows errors that the user can fix as messages on the page, which renders them as HTML."""
    import gradio as gr

    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(html.escape(flags_to_labels(str(error)), quote=False), print_exception=False) from error


def component(control: Control, *, brief: bool = False) -> Any:
    """Returns the gradio component of a control, with its help text unless `brief`."""
    import gradio as gr

    common = {"label": control.label, "info": None if brief else control.help, "value": control.value, "min_width": 110}
    if control.kind == "choice":
        choices = [("default", ""), *control.choices] if control.optional else control.choices
        return gr.Dropdown(choices, **common | {"value": "" if control.value is None else control.value})
    if control.kind == "switch":
        return gr.Checkbox(**common)
    if control.kind == "numbers":
        return gr.Textbox(**common, placeholder="none")
    precision = {"precision": 0} if control.kind == "integer" else {"step": 0.1}
    return gr.Number(**common, **precision, placeholder="default")


def settings_column(play: Playground, config: Config) -> tuple[list, Callable[..., Request]]:
    """Adds the settings; returns their components and the function from their values to a request."""
    import gradio as gr

    main_controls = sorted(
        (each for each in play.controls if each.name in MAIN_SETTINGS), key=lambda each: MAIN_SETTINGS.index(each.name)
    )
    others = [each for each in play.controls if each.name not in MAIN_SETTINGS]
    names = [each.name for each in main_controls + others]
    classes, most = play.classes, config.output.batch_size
    with gr.Row():
        label = gr.Dropdown(
            classes or [AS_IN_DATA], value=AS_IN_DATA, label="class", visible=bool(classes), min_width=240
        )
        inputs = [component(each, brief=True) for each in main_controls]
        count = gr.Number(
            min(IMAGES, most), label=f"images (up to {most})", precision=0, minimum=1, maximum=most, min_width=110
        )
        seed = gr.Number(config.output.seed, label="seed", precision=0, minimum=0, min_width=110)
    with gr.Accordion("more settings", open=False, visible=bool(others)):
        inputs += [component(each) for each in others]

    def make_request(label: str, count: int | None, seed: int | None, *values: Any) -> Request:
        if count is None or seed is None:
            raise ValueError("images or seed is empty: enter a number")
        return Request(
            options=play.settings(dict(zip(names, values, strict=True))), label=label, count=count, seed=seed
        )

    return [label, count, seed, *inputs], make_request


def sample_tab(play: Playground, inputs: list, make_request: Callable) -> Any:
    """Adds the tab for sampling; returns its gallery."""
    import gradio as gr

    button = gr.Button("Sample", variant="primary")
    gallery = gr.Gallery(
        columns=COLUMNS,
        show_label=False,
        format="png",
        object_fit="contain",
        interactive=False,
        buttons=["download_all"],
        height=560,
    )

    def sample(*values: Any) -> list[Image.Image]:
        with show_errors():
            return [enlarge_to_picture(image, SIDE) for image in play.draw(make_request(*values))]

    button.click(sample, inputs, gallery)
    return gallery


def watch_tab(play: Playground, inputs: list, make_request: Callable) -> None:
    """Adds the tab that shows the steps of sampling as they happen, with a slider to review them."""
    import gradio as gr

    with gr.Row():
        button, stop = gr.Button("Watch", variant="primary"), gr.Button("Stop")
    step = gr.Slider(1, 2, value=1, step=1, label="step", interactive=False)
    with gr.Row():
        style = {"format": "png", "interactive": False, "show_label": False, "buttons": ["download"]}
        with gr.Column():
            gr.Markdown("current sample x")
            current = gr.Image(**style)
        with gr.Column():
            gr.Markdown("predicted final image x0")
            prediction = gr.Image(**style)
    steps = gr.State([])  # kept small: a session's state stays in memory

    def watch(*values: Any) -> Iterator[tuple]:
        history = []
        with show_errors():
            for moment in play.watch(make_request(*values)):
                history.append(moment)
                yield (
                    gr.Slider(maximum=max(2, len(history)), value=len(history), interactive=False),
                    *step_pictures(moment),
                    history,
                )
        slider = gr.Slider(maximum=max(2, len(history)), value=len(history), interactive=True)
        yield slider, *step_pictures(history[-1]), history

    def look(number: float | None, history: list) -> tuple:
        if not history:
            return gr.skip(), gr.skip()
        return step_pictures(history[min(max(int(number or 1), 1), len(history)) - 1])

    watching = button.click(watch, inputs, [step, current, prediction, steps])
    stop.click(lambda: gr.Slider(interactive=True), None, step, cancels=[watching])
    step.input(look, [step, steps], [current, prediction])


def step_pictures(moment: DenoisingStep) -> tuple[Image.Image, Image.Image]:
    """Returns enlarged grids of the current samples and of the predicted images."""
    size = SIDE // math.ceil(math.sqrt(len(moment.current)))
    return grid_image(moment.current, enlarge_to=size), grid_image(moment.predicted, enlarge_to=size)


def inpaint_tab(play: Playground, inputs: list, make_request: Callable, gallery: Any) -> None:
    """Adds the tab for inpainting a sampled, selected or uploaded image with a brush."""
    import gradio as gr

    gr.Markdown(
        "Draw a new sample, click one in the first tab, or upload an image; then brush over the region to inpaint. "
        f"Here, class *{AS_IN_DATA}* means no class and no guidance."
    )
    with gr.Row():
        take, upload = gr.Button("New sample"), gr.UploadButton("Upload an image", file_types=[*SUFFIXES])
        button = gr.Button("Inpaint", variant="primary")
    with gr.Row():
        brush = gr.Brush(default_size=40, colors=["#e4572e"], color_mode="fixed")
        tools = {"brush": brush, "transforms": (), "layers": False, "sources": (), "type": "pil"}
        editor = gr.ImageEditor(show_label=False, canvas_size=(SIDE, SIDE), format="png", height=520, **tools)
        results = gr.Gallery(columns=3, show_label=False, format="png", object_fit="contain", height=520, buttons=[])

    def take_sample(*values: Any) -> Image.Image:
        with show_errors():
            return enlarge_to_picture(play.draw(replace(make_request(*values), count=1))[0], SIDE)

    def select_image(images: list, event: gr.SelectData) -> str:
        return images[event.index][0]

    def open_upload(file: str) -> Image.Image:
        with show_errors():
            return to_grey_or_rgb(decode(file, name=Path(file).name))

    def inpaint(drawn: dict | None, *values: Any) -> list:
        with show_errors():
            if drawn is None or drawn["background"] is None:
                raise ValueError("there is no image: draw a new sample, or upload an image")
            picture, mask = drawn["background"], Image.new("L", drawn["background"].size)
            for layer in drawn["layers"]:
                mask.paste(255, mask=layer.getchannel("A"))
            result = play.inpaint(make_request(*values), picture, mask)
            return [enlarge_to_picture(image) for image in (result.masked_input, *result.results)]

    take.click(take_sample, inputs, editor)
    upload.upload(open_upload, upload, editor)
    gallery.select(select_image, gallery, editor)
    button.click(inpaint, [editor, *inputs], results)


def build_page(play: Playground, config: Config) -> Any:
    """Builds the page (gradio.Blocks)."""
    import gradio as gr

    trained = play.trained
    height, width = trained.data.size
    with gr.Blocks(
        title=f"{trained.run.name}: samples", analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE
    ) as page:
        gr.Markdown(
            "# Discrete and continuous diffusion\n"
            f"**{escape_markdown(trained.run.name)}**, step {trained.step:,}: images of {height}x{width} pixels"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                inputs, make_request = settings_column(play, config)
            with gr.Column(scale=3):
                with gr.Tab("Sample"):
                    gallery = sample_tab(play, inputs, make_request)
                with gr.Tab("Watch"):
                    watch_tab(play, inputs, make_request)
                with gr.Tab("Inpaint"):
                    inpaint_tab(play, inputs, make_request, gallery)
    return page


class LocalRequests:
    """ASGI middleware that refuses requests to another host name (DNS rebinding) and from pages of other sites."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        names = [value for name, value in scope.get("headers", ()) if name in (b"host", b"origin")]
        if all(map(LOCAL.fullmatch, names)):
            await self.app(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"the page answers only to http://127.0.0.1 itself"})


def open_page(play: Playground, config: Config) -> None:
    """Serves the page on this machine until Ctrl-C."""
    import gradio as gr
    from starlette.middleware import Middleware

    style = {"theme": gr.themes.Base(font=FONTS, font_mono=("monospace",)), "css": STYLE, "footer_links": []}
    server = {"server_name": HOST, "server_port": config.page.port, "share": False, "ssr_mode": False, "quiet": True}
    server |= {"app_kwargs": {"middleware": [Middleware(LocalRequests)]}, "state_session_capacity": SESSIONS}
    build_page(play, config).launch(**style, **server, show_error=True)


def check_free(port: int) -> None:
    """Raises ValueError if the port is in use."""
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise ValueError(f"port {port} of {HOST} is not available ({error.strerror}): pass --port N") from error


def limit_upload_formats() -> None:
    """Makes this process open images of FORMATS only: gradio opens uploads in every format that Pillow knows."""
    Image.init()
    Image.ID[:] = FORMATS


def main(config: Config) -> None:
    if config.output.log_dir is not None:
        raise ValueError(f"got log_dir {config.output.log_dir}, but the page saves no results: leave --log_dir out")
    check_free(config.page.port)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install -r requirements-extra.txt") from error

    trained = load_model(config.model, config.output)
    limit_upload_formats()
    print(f"http://{HOST}:{config.page.port}  (press Ctrl-C to stop)", flush=True)
    open_page(Playground(trained, config.sampling, trained.condition_source(config.sampling)), config)


if __name__ == "__main__":
    run_script(main, Config, "demo", base_values=run_defaults)
