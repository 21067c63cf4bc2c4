"""What is read off a running WebUI's answers."""

from __future__ import annotations

import json
import re
import urllib.error
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.support.webui.client import SCRIPT, RefusedError, Result, WebUI, decode

# Whole numbers of 255: two computations of the same picture may round one or two apart.
NEAR = 2


def assert_same(a: Result, b: Result) -> None:
    assert a.pictures.shape == b.pictures.shape
    worst = np.abs(a.pictures - b.pictures).max()
    assert worst <= NEAR, f"pictures differ by up to {worst} of 255"


def refusal(webui: WebUI, delta: dict[str, Any], **changes: Any) -> str:
    """Return the sentence that a generation is refused with."""
    with pytest.raises(RefusedError) as caught:
        webui.generate(delta, **changes)
    cause = caught.value.__cause__
    assert isinstance(cause, urllib.error.HTTPError) and cause.code == 500
    return caught.value.sentence


def delta_keys(infotext: str) -> dict[str, str]:
    """Return what a picture's text says of the delta."""
    pairs = re.findall(r"(Delta [\w ]+): (\"(?:[^\"\\]|\\.)*\"|[^,]*)", infotext.splitlines()[-1])
    # Hashes are there only where the WebUI makes them.
    return {
        key: json.loads(value) if value.startswith('"') else value.strip()
        for key, value in pairs
        if key not in ("Delta LoRA hashes", "Delta version")
    }


def without_hash(value: str) -> str:
    return re.sub(r" \[\w+\]$", "", value)


# Infotext.


def texts_of(infotext: str) -> dict[str, str]:
    return {key: without_hash(value) for key, value in delta_keys(infotext).items()}


# XYZ plot.


@dataclass(frozen=True)
class Cell:
    picture: np.ndarray
    infotext: str


def plot_arguments(webui: WebUI, axes: dict[str, str]) -> list[Any]:
    """Return the XYZ plot's arguments; axes are chosen by their number in its list."""
    scripts = webui.get("/sdapi/v1/script-info")
    plot = next(s for s in scripts if s["name"].lower() == "x/y/z plot" and not s["is_img2img"])
    labels = next(argument["choices"] for argument in plot["args"] if argument["label"] == "X type")
    labels = [label if isinstance(label, str) else label[0] for label in labels]
    chosen = [*axes.items(), ("Nothing", ""), ("Nothing", "")][:3]
    arguments: list[Any] = []
    for label, values in chosen:
        assert label in labels, f"the plot has no axis {label}, only {labels}"
        # Axes of names take a list, axes of numbers a text.
        arguments += [labels.index(label), values, values.split(", ")]
    # What else there is, and in which order, differs by WebUI.
    given = {"Draw legend": False, "Include Sub Images": True}
    return arguments + [given.get(other["label"], other["value"]) for other in plot["args"][len(arguments) :]]


def plot(webui: WebUI, delta: dict[str, Any], axes: dict[str, str]) -> list[Cell]:
    """Return the cells of an XYZ plot, x running fastest."""
    script = {"script_name": "X/Y/Z plot", "script_args": plot_arguments(webui, axes)}
    body = {**webui.defaults, **script, "alwayson_scripts": {SCRIPT: {"args": [delta]}}}
    answer = webui.post("/sdapi/v1/txt2img", body)
    texts = json.loads(answer["info"])["infotexts"]
    pictures = [np.asarray(decode(image).convert("RGB"), int) for image in answer["images"]]
    assert len(pictures) == len(texts)
    # The grid comes first.
    return [Cell(picture, text) for picture, text in zip(pictures[1:], texts[1:])]


# Status.


def status(webui: WebUI) -> list[str]:
    lines: list[str] = webui.get("/delta-sampling/status")["status"]
    return lines
