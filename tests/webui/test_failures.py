"""What cannot be done is said in one sentence, and leaves no trace in what is generated next."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.webui.client import RefusedError, Result, WebUI
from tests.support.webui.files import Files
from tests.support.webui.results import refusal

STEPS = 15  # of a run that is interrupted


@dataclass(frozen=True)
class Earlier:
    """Pictures from before anything went wrong."""

    plain: np.ndarray
    delta: np.ndarray


@pytest.fixture(scope="module")
def earlier(running: WebUI, files: Files) -> Earlier:
    plain, delta = running.generate(), running.generate(files.delta())
    assert not np.array_equal(plain.pictures, delta.pictures)
    return Earlier(plain.pictures, delta.pictures)


def assert_unharmed(webui: WebUI, files: Files, earlier: Earlier) -> None:
    """Everything still works, to the bit."""
    plain, delta = webui.generate(), webui.generate(files.delta())
    assert np.array_equal(plain.pictures, earlier.plain)
    assert "Delta" not in plain.infotexts[0]
    assert np.array_equal(delta.pictures, earlier.delta)
    assert "Delta lambda: 1" in delta.infotexts[0]


Case = tuple[Callable[[Files], dict[str, Any]], str]

# Settings that cannot be meant, whatever the option for errors says.
WRONG_SETTINGS: dict[str, Case] = {
    "unknown key": (lambda f: f.delta(lamda=1), r"no argument 'lamda': is 'lambda' meant\?"),
    "wrong type": (
        lambda f: f.delta(**{"lambda": "strong"}),
        r"'lambda' must be a number from 0 to 10, not \"strong\"",
    ),
    "out of range": (lambda f: f.delta(start=1.5), r"'start' must be a number from 0 to 1, not 1.5"),
    "unreadable LoRAs": (lambda f: f.delta(loras=f"{f.lora}:much"), r"LoRA pick .* has weight 'much'"),
    "unknown checkpoint": (lambda f: f.delta(base="delta-test-sd7"), r"there is no checkpoint 'delta-test-sd7'"),
    "unknown LoRA": (
        lambda f: f.delta(loras=f"{f.lora[:-1]}e"),
        r"there is no LoRA 'delta-test-lore'.*: is 'delta-test-lora' meant\?",
    ),
    "no base": (lambda f: f.delta(base=""), r"choose a base checkpoint"),
    "nothing to add": (lambda f: f.delta(loras=""), r"has nothing to add: choose a LoRA"),
}

# What is wrong with a delta that is not wanted is nobody's business.
UNWANTED: dict[str, dict[str, Any]] = {
    "off": {"enabled": False, "start": 0.8, "end": 0.2},
    "off, half-typed": {"enabled": False, "loras": "moxin:"},
    "lambda 0": {"lambda": 0, "start": 0.8, "end": 0.2},
}


@pytest.mark.parametrize("changes", UNWANTED.values(), ids=UNWANTED)
def test_what_does_not_count_is_not_checked(
    webui: WebUI, files: Files, earlier: Earlier, changes: dict[str, Any]
) -> None:
    got = webui.generate(files.delta(**changes))
    assert np.array_equal(got.pictures, earlier.plain) and "Delta" not in got.infotexts[0]


def test_damaged_settings_do_no_harm(webui: WebUI, files: Files, earlier: Earlier) -> None:
    damaged = {"delta_sampling_cache": -3, "delta_sampling_device": "toaster", "delta_sampling_precision": "int3"}
    webui.options(**damaged)
    try:
        assert np.array_equal(webui.generate(files.delta()).pictures, earlier.delta)
    finally:
        webui.options(delta_sampling_device="Automatic", delta_sampling_precision="Automatic")


# Files that cannot be used.
BAD_FILES: dict[str, Case] = {
    "a LoRA for SDXL": (
        lambda f: f.delta(loras=f.sdxl_lora),
        r"delta-test-sdxl-lora.* is made for SDXL, and one for .*SD 1\.x",
    ),
    "a truncated LoRA": (lambda f: f.delta(loras=f.broken_lora), r"delta-test-broken-lora.* is a truncated or damaged"),
    "a LoRA with NaN": (lambda f: f.delta(loras=f.nan_lora), r"delta-test-nan-lora.* holds NaN or infinity"),
    "a good and a bad LoRA": (lambda f: f.delta(loras=f"{f.lora}, {f.nan_lora}"), r"delta-test-nan-lora.* NaN"),
    "an adapted model that is SDXL": (lambda f: f.delta(adapted=f.sdxl), r"delta-test-sdxl.* is made for SDXL"),
}
ALL = {**WRONG_SETTINGS, **BAD_FILES}


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_a_failure_is_one_sentence_and_leaves_no_trace(
    webui: WebUI, files: Files, earlier: Earlier, case: Case
) -> None:
    settings, words = case
    sentence = refusal(webui, settings(files))
    assert re.search(words, sentence), sentence
    assert "\n" not in sentence
    assert_unharmed(webui, files, earlier)


@pytest.mark.parametrize("case", WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_are_refused_even_where_errors_are_gone_over(webui: WebUI, files: Files, case: Case) -> None:
    webui.options(delta_sampling_on_error="go on without")
    assert re.search(case[1], refusal(webui, case[0](files)))


def assert_gone_on(webui: WebUI, got: Result, earlier: Earlier, words: str) -> None:
    """The picture is the plain one, claims no delta, and says why, as the status does."""
    assert np.array_equal(got.pictures, earlier.plain)
    assert "Delta lambda" not in got.infotexts[0] and re.search(rf"Delta not applied: .*{words}", got.infotexts[0])
    said = webui.get("/delta-sampling/status")["status"][-1]
    assert re.search(words, said), said


@pytest.mark.parametrize("case", BAD_FILES.values(), ids=BAD_FILES)
def test_going_on_without_the_delta(webui: WebUI, files: Files, earlier: Earlier, case: Case) -> None:
    webui.options(delta_sampling_on_error="go on without")
    assert_gone_on(webui, webui.generate(case[0](files)), earlier, case[1])
    assert_unharmed(webui, files, earlier)


@contextmanager
def deleted_checkpoint(webui: WebUI, files: Files) -> Iterator[str]:
    """A checkpoint that was deleted after the WebUI had listed it."""
    listed = {entry["model_name"]: Path(entry["filename"]) for entry in webui.get("/sdapi/v1/sd-models")}
    gone = listed[files.sd1].with_name("delta-test-gone.safetensors")
    shutil.copyfile(listed[files.sd1], gone)
    try:
        webui.post("/sdapi/v1/refresh-checkpoints", {})
        gone.unlink()
        yield gone.stem
    finally:
        gone.unlink(missing_ok=True)
        webui.post("/sdapi/v1/refresh-checkpoints", {})


def test_a_base_whose_file_is_gone(webui: WebUI, files: Files, earlier: Earlier) -> None:
    words = r"delta-test-gone.safetensors cannot be read \(No such file"
    with deleted_checkpoint(webui, files) as gone:
        assert re.search(words, refusal(webui, files.delta(base=gone)))
        assert_unharmed(webui, files, earlier)
        webui.options(delta_sampling_on_error="go on without")
        assert_gone_on(webui, webui.generate(files.delta(base=gone)), earlier, words)
    assert_unharmed(webui, files, earlier)


def test_a_failure_in_the_second_of_two_batches(webui: WebUI, files: Files, earlier: Earlier) -> None:
    """Prompts that differ by batch: the second one's tag names no LoRA."""
    prompts = f"a cat <delta:{files.lora}:1> a mat\na cat <delta:nothing:1>"
    with pytest.raises(RefusedError, match="there is no LoRA 'nothing'"):
        webui.generate(
            {"enabled": False, "base": files.sd1},
            script_name="Prompts from file or textbox",
            script_args=[False, False, "start", prompts],
        )
    assert_unharmed(webui, files, earlier)


# Interrupting.


def after_step(webui: WebUI, step: int, generation: Future[Result], path: str) -> Result:
    """Post to ``path`` once that many steps are done, and return what comes of the generation."""
    while not generation.done():
        state = webui.get("/sdapi/v1/progress?skip_current_image=true")["state"]
        if state["sampling_steps"] == STEPS and state["sampling_step"] >= step:
            webui.post(path, {})
            return generation.result()
        time.sleep(0.02)
    pytest.fail("the generation was over before it could be interrupted")


def interrupted(webui: WebUI, delta: dict[str, Any], path: str = "/sdapi/v1/interrupt", **changes: Any) -> Result:
    with ThreadPoolExecutor(1) as pool:
        return after_step(webui, 3, pool.submit(webui.generate, delta, steps=STEPS, **changes), path)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_interrupting_leaves_no_trace(webui: WebUI, files: Files, earlier: Earlier, sampler: str) -> None:
    whole = webui.generate(files.delta(), steps=STEPS, sampler_name=sampler)
    part = interrupted(webui, files.delta(), sampler_name=sampler)
    assert not np.array_equal(part.pictures, whole.pictures)
    assert "Delta lambda: 1" in part.infotexts[0]
    assert_unharmed(webui, files, earlier)


def test_interrupted_before_the_delta_starts_a_picture_claims_none(
    webui: WebUI, files: Files, earlier: Earlier
) -> None:
    part = interrupted(webui, files.delta(start=0.9))
    assert "Delta" not in part.infotexts[0]
    assert_unharmed(webui, files, earlier)


def test_skipping_one_of_two(webui: WebUI, files: Files, earlier: Earlier) -> None:
    late = files.delta(start=0.9)
    second = webui.generate(late, steps=STEPS, seed=webui.defaults["seed"] + 1)
    both = interrupted(webui, late, "/sdapi/v1/skip", n_iter=2)
    assert len(both.pictures) == len(both.infotexts) == 2
    assert "Delta" not in both.infotexts[0]
    assert "Delta lambda: 1" in both.infotexts[1]
    assert np.array_equal(both.pictures[1], second.pictures[0])
    assert_unharmed(webui, files, earlier)
