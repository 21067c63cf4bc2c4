"""Tests of a WebUI that is running: ``WEBUI_URL=http://127.0.0.1:7860 WEBUI_DIR=/path/to/webui pytest tests/webui``.

The extension has to be installed there and the API switched on (``--api``).  Small checkpoints, a
LoRA and an embedding, made here of random numbers, are put into its folders (all named
``delta-test-...``) and stay there.  Without ``WEBUI_URL`` the tests are skipped.  See README.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.webui.client import RefusedError, WebUI, size_of_checkpoints
from tests.support.webui.files import Files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if not os.environ.get("WEBUI_URL"):
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="WEBUI_URL names no running WebUI"))


@pytest.fixture(scope="session")
def files() -> Files:
    folder = os.environ.get("WEBUI_DIR")
    names = Files()
    if folder:
        from tests.support.webui.checkpoints import FULL, TINY, make_all

        make_all(Path(folder), names, FULL if size_of_checkpoints() == "full" else TINY)
    return names


@pytest.fixture(scope="session")
def running(files: Files) -> WebUI:
    webui = WebUI(os.environ["WEBUI_URL"].rstrip("/"))
    webui.post("/sdapi/v1/refresh-checkpoints", {})
    webui.post("/sdapi/v1/refresh-loras", {})
    with contextlib.suppress(RefusedError):  # not every WebUI has it
        webui.post("/sdapi/v1/refresh-embeddings", {})
    _reset(webui, files)
    webui.options(live_previews_enable=False)
    webui.defaults = {
        "prompt": "a cat on a mat",
        "negative_prompt": "blue",
        "seed": 11,
        "steps": 4,
        "width": 64,
        "height": 64,
        "cfg_scale": 4,
        "sampler_name": "Euler",
        "scheduler": "Automatic",
        "hr_upscaler": _upscaler(webui),
        "override_settings_restore_afterwards": True,
    }
    return webui


def _upscaler(webui: WebUI) -> str:
    """Return a hires upscaler that needs no model: one of latents, or where there are none (Forge Neo) of pictures."""
    latent = webui.get("/sdapi/v1/latent-upscale-modes")
    return "Latent" if latent else "None"


# What a test overrides must not reach the next: WebUIs keep overrides of settings that were never saved.
RESET = {
    "CLIP_stop_at_last_layers": 1,
    "s_min_uncond": 0,
    "s_min_uncond_all": False,
    "skip_early_cond": 0,
    "pad_cond_uncond": False,
    "enable_quantization": False,
    "token_merging_ratio": 0,
    "token_merging_ratio_hr": 0,
    "delta_sampling_on_error": "stop",
    "delta_sampling_cache": 1,
}


@pytest.fixture
def webui(running: WebUI, files: Files) -> Iterator[WebUI]:
    yield running
    _reset(running, files)


def _reset(webui: WebUI, files: Files) -> None:
    # Some WebUIs refuse settings that they do not have; Forge Neo has extensions' and does not list them.
    known = [*webui.get("/sdapi/v1/options"), *(name for name in RESET if name.startswith("delta_sampling"))]
    webui.options(sd_model_checkpoint=files.sd1, **{name: value for name, value in RESET.items() if name in known})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Ask the WebUI which samplers and schedulers it has."""
    for name, path, key, lacking in (
        ("subtests_of_samplers", "/sdapi/v1/samplers", "name", ()),
        ("subtests_of_schedulers", "/sdapi/v1/schedulers", "label", (RefusedError,)),  # not every WebUI has them
    ):
        if name in metafunc.fixturenames:
            url = os.environ.get("WEBUI_URL")
            values = []
            with contextlib.suppress(*lacking):
                values = [entry[key] for entry in WebUI(url.rstrip("/")).get(path)] if url else []
            metafunc.parametrize(name, values)
