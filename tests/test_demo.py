"""The demo page: its errors at startup, whom it answers, what memory it takes (its use: experiments/test_page.py)."""

import asyncio
import io
import json
import re
import socket
import sys
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, UnidentifiedImageError

import demo
from demo import LocalRequests
from helpers.browser import free_port, needs_gradio, page_process
from helpers.tiny_runs import call


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


def page_values(address):
    """The values of the inputs of `sample`, in their order."""
    with urllib.request.urlopen(f"{address}/config", timeout=30) as answer:
        page = json.load(answer)
    props = {each["id"]: each["props"] for each in page["components"]}
    inputs = next(each for each in page["dependencies"] if each["api_name"] == "sample")["inputs"]
    return [props[each].get("value") for each in inputs]


@pytest.mark.slow
@needs_gradio
def test_clicks_and_sessions_leave_no_memory_behind(trained, capsys):
    """Growth from the 20th to the last of 100 browser tabs with a click each, then of 100 clicks in one tab."""
    from gradio_client import Client

    def used():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # MB

    def clicks(client):
        megabytes = []
        for _ in range(100):
            client().predict(*values, api_name="/sample")
            megabytes.append(used())
        return megabytes

    with page_process(trained, "--no_amp --sample_steps 4 --batch_size 12") as (address, process):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example"}), timeout=30)
        values = page_values(address)
        sessions = clicks(lambda: Client(address, verbose=False, download_files=False))
        client = Client(address, verbose=False, download_files=False)
        in_one = clicks(lambda: client)
    with capsys.disabled():
        print(
            [
                f"{name}: {used[19]:.0f} MB at the 20th, {used[-1]:.0f} at the last"
                for name, used in (("tabs", sessions), ("clicks", in_one))
            ]
        )
    assert sessions[-1] - sessions[19] < 30 and in_one[-1] - in_one[19] < 30
