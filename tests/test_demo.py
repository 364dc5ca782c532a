"""The demo page: its controls, its errors at startup, and its use in a real browser."""

import asyncio
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

import demo
from demo import LocalRequests, show_errors
from helpers.tiny_runs import ROOT, SAMPLER, call

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="no gradio: pip install -r requirements-extra.txt"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium, or no playwright: apt-get install chromium; pip install playwright",
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        call("demo.py", flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_errors_that_keep_the_page_from_opening_are_one_line(tmp_path, capsys, monkeypatch):
    port = free_port()
    flags = f"--logs_root {tmp_path} --port {port}"
    errors = [refused(f"{flags} --log_dir mine", capsys)]
    with socket.create_server(("127.0.0.1", port)):
        errors.append(refused(flags, capsys))
    monkeypatch.setitem(sys.modules, "gradio", None)
    errors.append(refused(flags, capsys))
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    errors.append(refused(flags, capsys))
    remedies = ["leave --log_dir out", "pass --port N", "pip install -r requirements-extra.txt", "no run in"]
    assert all(remedy in line and len(line.splitlines()) == 1 for remedy, line in zip(remedies, errors, strict=True))
    assert "wanted at most 65535: pass --port N" in refused("--port 70000", capsys)


def test_uploads_are_opened_in_the_formats_of_folders_only(monkeypatch):
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    demo.limit_upload_formats()
    for kind, is_open in (("PNG", True), ("WEBP", True), ("EPS", False), ("TGA", False)):
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, kind)
        with nullcontext() if is_open else pytest.raises(UnidentifiedImageError):
            Image.open(file).load()


@contextmanager
def page_process(logs, flags):
    """The address of the page and the process that serves it: gradio leaves sockets and event loops behind."""
    port = free_port()
    command = [sys.executable, str(ROOT / "demo.py"), "--logs_root", str(logs), "--port", str(port), *flags.split()]
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300  # seconds: the machine may be busy
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=stderr)
        try:
            while True:
                assert process.poll() is None and time.monotonic() < deadline, stderr.seek(0) or stderr.read()
                try:
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield address, process
        finally:
            process.terminate()
            process.wait(timeout=30)
        stderr.seek(0)
        assert "Traceback" not in (text := stderr.read()), text


@contextmanager
def served(logs, flags):
    """The address of the page."""
    with page_process(logs, flags) as (address, _):
        yield address


def labels(address):
    """The labels of all visible components, from the page's own config."""
    with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
        components = [each["props"] for each in json.load(answer)["components"]]
    return [each["label"] for each in components if each.get("label") and each.get("visible", True)]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "evil.example:7860"}, 403),  # DNS rebinding: the name resolves to 127.0.0.1
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_only_the_page_itself_is_answered(headers, status):
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        messages.append(message)

    messages = []
    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(LocalRequests(page)(scope, None, send))
    assert messages[0]["status"] == status


@needs_gradio
def test_errors_on_the_page_are_escaped():
    import gradio as gr

    with pytest.raises(gr.Error) as error, show_errors():
        raise ValueError("got <img src=x>: pass --temp T")
    assert error.value.message == "got &lt;img src=x&gt;: pass temperature T"


@pytest.mark.slow
@needs_gradio
def test_a_click_keeps_no_memory_and_a_broken_upload_is_told(trained, tmp_path):
    from gradio_client import Client, handle_file

    def used():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # MB

    def click(seed):
        """Samples in a new browser tab; a tab's values were kept for hours, 8 MB each."""
        settings[2] = seed
        Client(address, verbose=False).predict(*settings, api_name="/sample")

    with page_process(trained, "--no_amp --sample_steps 4 --batch_size 12") as (address, process):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=30)
        (tmp_path / "holiday.png").write_bytes(b"broken")
        with pytest.raises(Exception, match="holiday.png: its content is none of"):
            Client(address, verbose=False).predict(handle_file(tmp_path / "holiday.png"), api_name="/open_upload")
        with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
            page = json.load(answer)
        values = {each["id"]: each["props"].get("value") for each in page["components"]}
        sample = next(each for each in page["dependencies"] if each["api_name"] == "sample")
        settings = [values[each] for each in sample["inputs"]]
        for seed in range(8):
            click(seed)
        before = used()
        for seed in range(8, 20):
            click(seed)
        assert used() - before < 24


@pytest.mark.slow
@needs_gradio
def test_the_page_shows_what_the_model_has(trained):
    with served(trained, "--no_amp --sample_steps 4 --batch_size 9") as address:
        visible_labels = labels(address)
    first_labels = ["class", "solver", "steps", "temperature", "guidance scale", "images (up to 9)", "seed"]
    assert visible_labels[: len(first_labels)] == first_labels
    assert {"top-k", "reveal", "guidance interval", "Sample", "Watch", "Inpaint"} <= {*visible_labels}


@pytest.mark.slow
@needs_gradio
def test_a_model_without_classes_has_no_class_control(trained):
    flags = f"--train_steps 1 --no_amp --no_class_conditional --guidance 1 --log_dir bare {SAMPLER}"
    call("train_sampler.py", f"--logs_root {trained} {flags}")
    with served(trained, "--no_amp --load_dir bare") as address:
        visible_labels = labels(address)
    assert "temperature" in visible_labels and not [
        label for label in visible_labels if label == "class" or "guidance" in label
    ]


@contextmanager
def tab_at(address):
    """A browser tab; any request to another machine fails the test."""
    from playwright.sync_api import sync_playwright

    external_requests = []

    def record_request(request):
        if request.url.startswith(("http", "ws")) and not request.url.startswith(address):
            external_requests.append(request.url)

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1200, "height": 800})
        tab.set_default_timeout(60_000)
        tab.on("request", record_request)
        tab.goto(address)
        yield tab
        chromium.close()
    assert external_requests == []


@pytest.fixture(scope="module", params=["absorbing", "ddpm"])
def address(request):
    logs = request.getfixturevalue("trained" if request.param == "absorbing" else "trained_ddpm")
    with served(logs, f"--sampler {request.param} --no_amp --sample_steps 4 --batch_size 9") as url:
        yield url


@pytest.fixture
def tab(address):
    with tab_at(address) as page:
        yield page


def press(tab, name):
    tab.get_by_role("button", name=name, exact=True).click()


def turn_to(tab, name):
    tab.get_by_role("tab", name=name).click()


def enter(tab, label, value):
    tab.get_by_label(label, exact=True).fill(str(value))


def content(tab, image):
    """The pixels of an image as enlarged on the page."""
    with urllib.request.urlopen(image.get_attribute("src"), timeout=30) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))


def new_images(tab, count, excluded=()):
    """Waits for `count` images in the visible gallery, all different from `but`."""
    locator = tab.locator(".thumbnail-item img:visible")
    deadline = time.monotonic() + 60
    while True:
        sources = locator.evaluate_all("images => images.map(image => image.src)")
        if len(sources) == count and not {*sources} & {*excluded}:
            return locator.all(), sources
        assert time.monotonic() < deadline, sources
        tab.wait_for_timeout(50)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_sampling_on_the_page(tab):
    enter(tab, "images (up to 9)", 3)
    press(tab, "Sample")
    images, sources = new_images(tab, 3)
    first = [content(tab, each) for each in images]
    assert len({each.tobytes() for each in first}) == 3
    enter(tab, "seed", 1)
    press(tab, "Sample")
    other = content(tab, new_images(tab, 3, sources)[0][0])
    assert not np.array_equal(first[0], other)
    enter(tab, "seed", 0)
    enter(tab, "images (up to 9)", 1)
    press(tab, "Sample")
    assert np.array_equal(content(tab, new_images(tab, 1)[0][0]), first[0])  # the same seed, the same image


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_watching_on_the_page(tab):
    enter(tab, "images (up to 9)", 2)
    enter(tab, "steps", 7)
    turn_to(tab, "Watch")
    frames = []
    tab.on("request", lambda request: frames.append(request.url) if request.url.endswith(".png") else None)
    press(tab, "Watch")
    step = tab.get_by_label("number input for step")
    tab.wait_for_function("box => box.value === '7' && !box.disabled", arg=step.element_handle())
    assert len({*frames}) >= 4  # frames arrived during sampling
    frame = tab.locator(".image-frame img:visible").first
    last = content(tab, frame)
    source = frame.get_attribute("src")
    step.fill("1")
    step.press("Enter")
    tab.wait_for_function("([image, was]) => image.src !== was", arg=[frame.element_handle(), source])
    assert not np.array_equal(content(tab, frame), last)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_inpainting_with_the_brush(tab):
    enter(tab, "images (up to 9)", 2)
    press(tab, "Sample")
    images, sources = new_images(tab, 2)
    selected = content(tab, images[1])
    images[1].click()
    turn_to(tab, "Inpaint")
    canvas = tab.locator("canvas:visible").first
    canvas.wait_for()
    tab.wait_for_timeout(2000)  # until the image is on it
    press(tab, "Inpaint")
    tab.get_by_text("nothing is masked").wait_for()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 100, y)
    tab.mouse.down()
    tab.mouse.move(x + 100, y, steps=10)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    press(tab, "Inpaint")
    hidden, *results = (content(tab, each) for each in new_images(tab, 3, sources)[0])
    selected = np.asarray(Image.fromarray(selected).resize(hidden.shape[::-1], Image.Resampling.NEAREST))
    grey = hidden == 128
    assert 0.1 < grey.mean() < 0.7
    assert np.array_equal(hidden[~grey], selected[~grey])  # unmasked pixels are unchanged
    assert not np.array_equal(results[0], results[1])


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_bad_settings_are_a_message_on_the_page(tab):
    enter(tab, "steps", 0)
    press(tab, "Sample")
    tab.get_by_text("got sample_steps 0").wait_for()
    assert tab.get_by_text("pass steps").count() == 1
    assert tab.get_by_text("Traceback").count() == 0
