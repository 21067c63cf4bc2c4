"""Generations within a generation, as ADetailer makes them: what they do takes nothing away from the run around them.

Its order is followed call by call: after a batch's first image it ends the scripts' work on a copy of ``p``, generates
by img2img what it has found, and after the last image begins their work anew, again on a copy; copies share the
dictionary that the run's texts are written from.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from tests.support.stand_in_webui import DeltaScript, WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
DELTA = {"base": "base", "loras": "ink"}
OFF = {**DELTA, "enabled": False, "loras": ""}
TAGGED = {"prompt": "a cat on a mat<delta:ink:1>"}
HIRES = {"enable_hr": True, "hr_second_pass_steps": 3, "hr_cfg": 5.0}


HOSTS = ("a1111", "forge")


class Plotted(DeltaScript):
    """The hooks of scripts/delta_sampling.py; the first argument is the number of a chosen script."""

    def process(self, p: Any, _chosen: int, *arguments: Any) -> None:
        super().process(p, *arguments)


class Detailer:
    """A script that repaints ``found`` areas of each picture by img2img."""

    def __init__(self, webui: WebUI, found: int, prompt: str | None) -> None:
        self.webui, self.found, self.prompt = webui, found, prompt
        self.inner: list[Any] = []

    def process(self, p: Any, *_arguments: Any) -> None:
        p.extra_generation_params["ADetailer model"] = "face"

    def postprocess_image(self, p: Any, picture: torch.Tensor) -> None:
        if p.batch_index == 0:
            p.scripts.postprocess(copy(p), SimpleNamespace(images=[], infotexts=[]), *p.script_args)
        for _ in range(self.found):
            self.inner.append(self.webui.processing.process_images(self.pass_within(p, picture)))
        if p.batch_index == p.batch_size - 1:
            again = copy(p)
            p.scripts.process(again, *again.script_args)

    def pass_within(self, p: Any, picture: torch.Tensor) -> Any:
        within = self.webui.p(None, init_latent=picture[None, :, :8, :8].clone(), steps=p.steps)
        within.prompt = p.all_prompts[p.batch_index] if self.prompt is None else self.prompt
        said = {key: value for key, value in p.extra_generation_params.items() if not callable(value)}
        within.extra_generation_params = said
        within.scripts = self.webui.processing.ScriptRunner([s for s in p.scripts.scripts if s is not self])
        within.scripts.selectable_scripts = getattr(p.scripts, "selectable_scripts", [])
        within.script_args = list(p.script_args)
        return within


def generation(
    webui: WebUI, delta: Any, found: int, of_face: str | None = None, **changes: Any
) -> tuple[Any, Detailer]:
    p, detailer = webui.p(delta, **changes), Detailer(webui, found, of_face)
    p.scripts.scripts.append(detailer)
    return p, detailer


def claimed(text: str) -> str:
    return text.split("Steps: ")[1]


def status(webui: WebUI) -> list[str]:
    return [line for line in webui.host.status().splitlines() if line.startswith(("Last run", "The last"))]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one picture": (DELTA, {}),
    "by a tag": (OFF, TAGGED),
    "hires": (DELTA, HIRES),
    "a batch of two, twice": (DELTA, {"batch_size": 2, "n_iter": 2}),
    "tags in a batch of two, twice": (OFF, {**TAGGED, "batch_size": 2, "n_iter": 2}),
}


@pytest.mark.parametrize("found", [0, 2])
@pytest.mark.parametrize(("delta", "changes"), CASES.values(), ids=CASES)
def test_every_text_has_the_recipe_and_the_status_is_the_runs(
    webui: WebUI, delta: dict[str, Any], changes: dict[str, Any], found: int
) -> None:
    alone = webui.generate(delta, **changes)
    said = status(webui)
    p, detailer = generation(webui, delta, found, **changes)
    made = webui.processing.process_images(p)
    assert webui.callbacks.swallowed == []
    assert torch.equal(made.images, alone.images)
    for text, wanted in zip(made.infotexts, alone.infotexts, strict=True):
        assert "ADetailer model: face" in text and "Delta lambda: 1" in text
        assert claimed(wanted) in claimed(text).replace("ADetailer model: face, ", "")
    told = status(webui)
    assert told[0].partition(" pass")[0] == said[0].partition(" pass")[0], "how long it took may differ"
    assert len(told) == (2 if found else 1)
    assert len(detailer.inner) == found * len(made.infotexts)
    assert all("Delta lambda: 1" in text for inner in detailer.inner for text in inner.infotexts)


def test_passes_that_ask_for_nothing_leave_the_status_of_the_run(webui: WebUI) -> None:
    p, detailer = generation(webui, OFF, 1, of_face="a face", **TAGGED)
    made = webui.processing.process_images(p)
    assert "Delta lambda: 1" in made.infotexts[0] and "Delta" not in detailer.inner[0].infotexts[0]
    assert len(status(webui)) == 1 and status(webui)[0].startswith("Last run: delta in ")


def test_what_a_pass_within_could_not_do_is_told_beside_what_the_run_did(webui: WebUI) -> None:
    p, detailer = generation(webui, OFF, 1, of_face="a face<delta:ink:1:weight=0>", **TAGGED)
    webui.processing.process_images(p)
    assert "Delta" not in detailer.inner[0].infotexts[0]
    of_run, within = status(webui)
    assert of_run.startswith("Last run: delta in ") and "it was" in of_run
    assert within.startswith("The last generation within it: no delta in ") and "weight of 0" in within


def test_a_run_without_a_delta_says_so_whatever_the_last_one_did(webui: WebUI) -> None:
    webui.generate(DELTA)
    p, _ = generation(webui, {**DELTA, "enabled": False}, 1)
    made = webui.processing.process_images(p)
    assert "Delta" not in made.infotexts[0] and status(webui) == ["Last run: no delta was requested"]


@pytest.mark.parametrize("found", [0, 1])
def test_cells_of_a_plot_and_its_own_text(webui: WebUI, found: int) -> None:
    shared: dict[str, Any] = {}
    texts = []
    for number, strength in enumerate((0.0, 0.5, 1.0)):
        p, _ = generation(webui, DELTA, found, extra_generation_params=shared)
        p.delta_sampling_axes = {"enabled": True, "strength": strength}
        p.scripts.selectable_scripts = [SimpleNamespace(title=lambda: "X/Y/Z plot")]
        p.scripts.scripts[0] = Plotted(webui.host)
        p.script_args = [1, *p.script_args]
        texts += webui.processing.process_images(p).infotexts
        if number == 0:
            p.extra_generation_params = copy(p.extra_generation_params)
            p.extra_generation_params["Script"] = "X/Y/Z plot"
            grid = webui.processing.create_infotext(p)
    assert "Delta" not in texts[0] and "Delta lambda: 0.5" in texts[1] and "Delta lambda: 1," in texts[2]
    assert "Delta lambda: 0, Delta base: base" in grid and "Delta LoRAs: ink" in grid
    assert webui.callbacks.swallowed == []


def test_the_base_stays_for_the_passes_within_where_none_is_kept(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.shared.opts.delta_sampling_cache = 0
    p, detailer = generation(webui, DELTA, 1)
    bases: list[int] = []
    inner = detailer.pass_within

    def pass_within(*arguments: Any) -> Any:
        bases.append(len(webui.host.side_models()))
        return inner(*arguments)

    monkeypatch.setattr(detailer, "pass_within", pass_within)
    webui.processing.process_images(p)
    assert bases == [1] and not webui.host.side_models()


def test_a_copy_that_generates_within_a_run_has_a_text_of_its_own(webui: WebUI) -> None:
    """Some scripts generate with the copy itself, unlike ADetailer."""
    p = webui.p({**DELTA, "lambda": 0.5})
    made: list[Any] = []

    class Again:
        def postprocess_image(self, p: Any, _picture: torch.Tensor) -> None:
            if not made:
                made.append(None)
                again = copy(p)
                again.script_args = [DELTA]
                made[0] = webui.processing.process_images(again)

    p.scripts.scripts.append(Again())
    outer = webui.processing.process_images(p)
    assert "Delta lambda: 0.5" in outer.infotexts[0]
    assert "Delta lambda: 1," in made[0].infotexts[0]
    assert relative(made[0].images, webui.native()) < 1e-5


def test_a_run_that_failed_is_around_no_other(webui: WebUI) -> None:
    p = webui.p({**DELTA, "start": 0.9, "end": 0.1})
    with pytest.raises(Exception, match="must not come after end"):
        webui.processing.process_images(p)
    assert status(webui)[0].startswith("Last run: no delta: start")
    webui.generate({**DELTA, "enabled": False})
    assert status(webui) == ["Last run: no delta was requested"]
    p.script_args = [DELTA]
    assert "Delta lambda: 1" in webui.processing.process_images(p).infotexts[0]
