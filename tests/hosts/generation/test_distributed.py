"""Workers of stable-diffusion-webui-distributed get the same picture: its request has all settings.

It packs the values of each script's widgets, or what an API call gave in their place, by the script's title into
``alwayson_scripts``; the worker's API puts these in the place of its own defaults.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.request.fields import SETTINGS
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE
from tests.support.small_files import Files, make_files
from tests.support.stand_in_webui import WebUI, running

WIDGETS = {field.name: NONE if field.name in ("base", "adapted") else field.default for field in SETTINGS}
ASKED = replace(Request(), strength=1.5, start=0.2, base="base.safetensors", loras="ink:0.7:te=0.5", quality="balanced")


def from_widgets() -> list[Any]:
    return [True, *[getattr(ASKED, name) or default for name, default in WIDGETS.items() if name != "enabled"]]


def from_the_api() -> list[Any]:
    named = {"lambda": 1.5, "start": 0.2, "base": ASKED.base, "loras": [ASKED.loras], "quality": "balanced"}
    return [named, *list(WIDGETS.values())[1:]]


def sent(arguments: list[Any]) -> list[Any]:
    """Return the arguments of a worker's API."""
    payload = {"alwayson_scripts": {"Delta Sampling": {"args": list(arguments)}}}
    received: list[Any] = json.loads(json.dumps(payload))["alwayson_scripts"]["Delta Sampling"]["args"]
    return received


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return make_files(tmp_path_factory.mktemp("shared"))


def picture(files: Files, arguments: list[Any]) -> tuple[Any, str]:
    with running("a1111", files) as webui:
        made = webui.generate(arguments, steps=5)
        plain = WebUI.latents(webui, steps=5)
    assert not made.images.equal(plain)
    return made.images.clone(), made.infotexts[0]


def test_a_worker_makes_the_picture_that_its_master_would(files: Files) -> None:
    wanted, said = picture(files, from_widgets())
    for arguments in (sent(from_widgets()), sent(from_the_api())):
        got, told = picture(files, arguments)
        assert got.equal(wanted) and told == said
    assert "Delta lambda: 1.5" in said and Path(files.base).name.split(".")[0] in said
