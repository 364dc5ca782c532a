"""The demo page in a process of its own, and a browser tab on it."""

import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_runs import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="no gradio: pip install -r requirements-extra.txt"
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="no Chromium, or no playwright: apt-get install chromium; pip install playwright",
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def page_process(logs: Path, flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
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
def served(logs: Path, flags: str) -> Iterator[str]:
    """The address of the page."""
    with page_process(logs, flags) as (address, _):
        yield address


@contextmanager
def tab_at(address: str) -> Iterator[Any]:
    """A browser tab; any request to another machine fails the test."""
    from playwright.sync_api import sync_playwright

    external_requests = []

    def record_request(request: Any) -> None:
        if request.url.startswith(("http", "ws")) and not request.url.startswith(address):
            external_requests.append(request.url)

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.on("request", record_request)
        tab.goto(address)
        yield tab
        chromium.close()
    assert external_requests == []


def press(tab: Any, name: str) -> None:
    tab.get_by_role("button", name=name, exact=True).click()


def turn_to(tab: Any, name: str) -> None:
    tab.get_by_role("tab", name=name).click()


def field(tab: Any, label: str) -> Any:
    """The input of a setting."""
    inside = tab.locator(f"label:has(span:text-is('{label}')) :is(input, textarea)")
    return inside.or_(tab.locator(f"input[aria-label='{label}']")).first


def enter(tab: Any, label: str, value: object) -> None:
    field(tab, label).fill(str(value))


def choose(tab: Any, label: str, option: str) -> None:
    field(tab, label).click()
    tab.get_by_role("option", name=option, exact=True).click()


def content(image: Any) -> np.ndarray:
    """The pixels of an image as enlarged on the page."""
    with urllib.request.urlopen(image.get_attribute("src"), timeout=30) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))


def new_images(tab: Any, count: int, excluded: Sequence[str] = ()) -> tuple[list, list[str]]:
    """Waits for `count` images in the visible gallery, all different from `excluded`."""
    locator = tab.locator(".thumbnail-item img:visible")
    deadline = time.monotonic() + 60
    while True:
        sources = locator.evaluate_all("images => images.map(image => image.src)")
        if len(sources) == count and not {*sources} & {*excluded}:
            return locator.all(), sources
        assert time.monotonic() < deadline, sources
        tab.wait_for_timeout(50)
