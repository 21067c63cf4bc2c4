"""The stand-in WebUI as a process, with the installed gradio, and the browser that opens it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from run import ONE_THREAD

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCREENSHOTS = ROOT / "out" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_SECONDS = 120


def missing() -> str:
    """Return a sentence that names what the browser tests lack, or an empty string."""
    lacking = [name for name in ("gradio", "playwright") if find_spec(name) is None]
    if not lacking and not browser():
        lacking = ["Chromium"]
    needed = "requirements/gradio3.txt or gradio4.txt, and Chromium (Debian: apt-get install chromium)"
    return f"the browser tests need {needed}: no {' and '.join(lacking)} here" if lacking else ""


def browser() -> str | None:
    """Return the path of the system's browser, or of Playwright's, or None."""
    installed = next(filter(None, map(shutil.which, BROWSERS)), None)
    if installed:
        return installed
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@contextmanager
def serve(log: Path) -> Iterator[str]:
    """Serve the stand-in, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ONE_THREAD, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": "127.0.0.1,localhost"}
    command = [sys.executable, str(HERE / "webui" / "app.py"), str(port)]
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "ready" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
