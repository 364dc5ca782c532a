"""Opens a page in the browser to sample from a trained model, watch the denoising steps, and inpaint images."""

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model, model_run, run_defaults
from experiments.layout_page import CANVAS_SCRIPT
from experiments.page import build_page
from experiments.panoptic_page import PAINT_SCRIPT
from experiments.playground import Playground, Runs
from models.ranges import check_ranges
from train.cli.parse import run_script
from train.config import SamplingConfig
from train.datasets._decode import FORMATS
from train.inference import load

HOST = "127.0.0.1"  # the page is only accessible from this machine
LOCAL = re.compile(rb"(https?://)?(127\.0\.0\.1|localhost)(:\d+)?")  # a Host or Origin header of the page itself
SESSIONS = 4  # browser tabs whose watched steps are kept in memory
FONTS = ("Roboto", "system-ui", "sans-serif")  # installed ones: nothing is downloaded
STYLE = """
img {image-rendering: pixelated}
footer {display: none !important}
.full-line {flex-basis: 100% !important}
"""


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
class PageOutputConfig(OutputConfig):
    """Output."""

    seed: int | None = None
    """Seed that the page begins with, fixed; if omitted, each press draws one. Image i of a seed is always the same."""


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
    output: PageOutputConfig


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


def open_page(runs: Runs, config: Config) -> None:
    """Serves the page on this machine until Ctrl-C."""
    import gradio as gr
    from starlette.middleware import Middleware

    style = {"theme": gr.themes.Base(font=FONTS, font_mono=("monospace",)), "css": STYLE, "footer_links": []}
    style |= {"head": "".join(f"<script>{path.read_text()}</script>" for path in (CANVAS_SCRIPT, PAINT_SCRIPT))}
    server = {"server_name": HOST, "server_port": config.page.port, "share": False, "ssr_mode": False, "quiet": True}
    server |= {"app_kwargs": {"middleware": [Middleware(LocalRequests)]}, "state_session_capacity": SESSIONS}
    build_page(runs, config.output.batch_size, config.output.seed).launch(**style, **server, show_error=True)


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


def load_playground(config: Config, folder: Path, step: int | None) -> Playground:
    """Loads a run at a step, with its own settings; for the run of the flags, with those."""
    model, output = config.model, config.output
    if folder == model_run(output.logs_root, model):
        trained, options = load_model(replace(model, load_step=step), output), config.sampling
    else:
        ema = None if model.ema else False
        weights = {"ema": ema, "ema_length": model.ema_length, "allow": model.allow, "logs_root": output.logs_root}
        run = load(folder, step=step, device=output.device, amp=output.amp, **weights)
        trained, options = run.model, run.settings
    return Playground(trained, options, trained.condition_source(options))


def main(config: Config) -> None:
    model, output = config.model, config.output
    if output.log_dir is not None:
        raise ValueError(f"got log_dir {output.log_dir}, but the page saves no results: leave --log_dir out")
    check_free(config.page.port)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio: pip install -r requirements-extra.txt") from error

    load_run = partial(load_playground, config)  # no name here holds the first run, which others replace
    runs = Runs(
        Path(output.logs_root).expanduser(), load_run, load_run(model_run(output.logs_root, model), model.load_step)
    )
    limit_upload_formats()
    print(f"http://{HOST}:{config.page.port}  (press Ctrl-C to stop)", flush=True)
    open_page(runs, config)


if __name__ == "__main__":
    run_script(main, Config, "demo", base_values=run_defaults)
