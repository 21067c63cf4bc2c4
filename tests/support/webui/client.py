"""A running WebUI's HTTP API, for the tests of this folder."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

SCRIPT = "Delta Sampling"


class RefusedError(Exception):
    """The WebUI answered with an error; the text is its answer's."""

    @property
    def sentence(self) -> str:
        """Return what went wrong; AUTOMATIC1111 and Forge have different names for it."""
        answer = json.loads(str(self))
        return str(answer.get("errors") or answer["message"])


@dataclass(frozen=True)
class Result:
    """The pictures ``(N, H, W, 3)`` of a generation, as whole numbers, and what each says of itself."""

    pictures: np.ndarray
    infotexts: list[str]
    comments: str = ""


@dataclass
class WebUI:
    """The API at ``url``, with the fields that every generation starts from."""

    url: str
    defaults: dict[str, Any] = field(default_factory=dict)

    def get(self, path: str) -> Any:
        """Ask for JSON."""
        return self._call(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON."""
        return self._call(path, body)

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **password()})
        try:
            with urllib.request.urlopen(request, timeout=1800) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from error

    def options(self, **values: Any) -> None:
        """Change the WebUI's settings."""
        self.post("/sdapi/v1/options", values)

    def generate(self, delta: dict[str, Any] | None = None, **changes: Any) -> Result:
        """Make pictures: txt2img, or img2img where there are ``init_images``; ``delta`` None leaves the script out."""
        body = {**self.defaults, **changes}
        if delta is not None:
            body["alwayson_scripts"] = {**body.get("alwayson_scripts", {}), SCRIPT: {"args": [delta]}}
        answer = self.post(f"/sdapi/v1/{'img2img' if 'init_images' in body else 'txt2img'}", body)
        info = json.loads(answer["info"])
        pictures = [np.asarray(decode(picture).convert("RGB"), int) for picture in answer["images"]]
        return Result(np.stack(pictures), info["infotexts"], info.get("comments", ""))


def password() -> dict[str, str]:
    """Return the header for a WebUI that was started with ``--api-auth``, whose value is in ``WEBUI_AUTH``."""
    user = os.environ.get("WEBUI_AUTH")
    return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}


def decode(picture: str) -> Image.Image:
    """Read a picture as the API sends it."""
    return Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[-1])))


def encode(picture: Image.Image) -> str:
    """Write a picture as the API takes it."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def skip_without_infotexts(webui: WebUI) -> None:
    """Skip a test of infotexts that come through the API where the WebUI refuses its own pictures' as well."""
    try:
        webui.post("/sdapi/v1/txt2img", {"infotext": webui.generate().infotexts[0]})
    except RefusedError as error:
        pytest.skip(f"this WebUI does not take its own infotexts ({error.sentence})")


def size_of_checkpoints() -> str:
    """Return how large the checkpoints have to be: Forge serves no others than those of released models' shapes."""
    host = WebUI(os.environ["WEBUI_URL"].rstrip("/")).get("/delta-sampling/status")["host"]
    return os.environ.get("WEBUI_SIZE", "tiny" if host == "AUTOMATIC1111" else "full")
