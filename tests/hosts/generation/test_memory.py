"""Side models in memory, and the files that they are loaded from."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.errors import AdapterError, DeltaError, SettingError
from lib_delta.runtime.side_model import SideModel
from tests.support.generations import DELTA, HIRES, assert_exact
from tests.support.small_files import Files, checkpoint, lora_factors, with_lora, write, write_lora
from tests.support.stand_in_webui import PACKAGES, STAND_IN, WebUI, folders, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")


def test_unloading_gives_the_memory_back_at_once(webui: WebUI) -> None:
    webui.generate(DELTA)
    model = weakref.ref(webui.side_model)
    unet, tower = (weakref.ref(next(part.parameters())) for part in (model().unet, model().towers[0]))
    gc.collect()
    gc.disable()
    try:
        assert webui.host.unload() == "Unloaded 1 side model"
        assert [model(), unet(), tower()] == [None, None, None]
    finally:
        gc.enable()
    assert webui.host.status().startswith("No side model is loaded")
    assert webui.host.unload() == "Unloaded 0 side models"
    assert_exact(webui)


def broken_off(webui: WebUI, base: str) -> None:
    with pytest.raises(DeltaError, match="not a number"):
        webui.generate({"base": base, "loras": "ink:1e38"})


def gone_on_without(webui: WebUI, base: str) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    webui.generate({"base": base, "loras": "ink:1e38"})


def without_a_readable_lora(webui: WebUI, base: str) -> None:
    webui.shared.opts.delta_sampling_cache = 0
    bad = webui.files.lora_file("bad")
    bad.write_bytes(b"no LoRA")
    for on_error in ("stop", "go on without"):
        webui.shared.opts.delta_sampling_on_error = on_error
        with contextlib.suppress(AdapterError):
            webui.generate({"base": base, "loras": "ink, bad"})
    bad.unlink()
    sys.modules["networks"].available_networks.pop("bad", None)  # type: ignore[attr-defined]


# What a generation does with its base, and how many bases there are after it.
DROPPING: dict[str, tuple[Any, int]] = {
    "a LoRA": (lambda webui, base: webui.generate({"base": base, "loras": "ink"}), 1),
    "hires": (lambda webui, base: webui.generate({"base": base, "loras": "ink"}, **HIRES), 1),
    "an adapted checkpoint": (lambda webui, base: webui.generate({"base": base, "adapted": "tuned"}), 1),
    "a fault": (broken_off, 0),
    "a fault that is gone on without": (gone_on_without, 0),
    "a LoRA that cannot be read": (without_a_readable_lora, 0),
}


@pytest.mark.parametrize("collector", [True, False], ids=["collected", "without the collector"])
@pytest.mark.parametrize(("generate", "left"), DROPPING.values(), ids=DROPPING)
def test_a_base_that_is_dropped_is_gone_before_the_next_is_loaded(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, generate: Any, left: int, collector: bool
) -> None:
    alive: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
    load = SideModel.__init__

    def living() -> tuple[int, int]:
        """Return the numbers of the bases' UNets and text encoders in memory."""
        return sum(unet() is not None for unet, _ in alive), sum(tower() is not None for _, tower in alive)

    def counted(self: SideModel, *given: Any) -> None:
        assert living() == (0, 0), "one is there still"
        load(self, *given)
        alive.append((weakref.ref(self.unet), weakref.ref(self.towers[0])))

    webui.host.unload()
    gc.collect()
    monkeypatch.setattr(SideModel, "__init__", counted)
    gc.disable()
    try:
        if not collector:
            monkeypatch.setattr(gc, "collect", lambda *_: 0)
        for base in ("half", "base", "copy"):
            generate(webui, base)
            assert living() == (left, left)
    finally:
        gc.enable()


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 1), (2, 2)])
def test_as_many_bases_are_kept_as_the_settings_say(webui: WebUI, limit: int, kept: int) -> None:
    webui.shared.opts.delta_sampling_cache = limit
    for base in ("half", "base", "copy"):
        webui.generate({**DELTA, "base": base})
    names = [model.name for model in webui.host.side_models()]
    assert names == ["base.safetensors", "copy.safetensors"][2 - kept :]


def test_a_base_that_is_kept_is_not_loaded_again(webui: WebUI) -> None:
    webui.generate(DELTA)
    model = webui.side_model
    webui.generate({**DELTA, "loras": "ink:0.5"})
    assert webui.side_model is model


@pytest.mark.parametrize("kept", [1, 0])
def test_a_lora_that_cannot_be_used_does_not_cost_the_base(webui: WebUI, files: Files, kept: int) -> None:
    before = webui.latents(DELTA)
    model = webui.side_model
    webui.shared.opts.delta_sampling_cache = kept
    bad = files.lora_file("bad")
    bad.write_bytes(b"no LoRA")
    try:
        for loras, error in (("ink, bad", AdapterError), ("inks", SettingError), ("ink:1:lbw=1,0", SettingError)):
            with pytest.raises(error):
                webui.generate({**DELTA, "loras": loras})
            assert list(webui.host.side_models()) == [model] * kept
    finally:
        bad.unlink()
        sys.modules["networks"].available_networks.pop("bad", None)  # type: ignore[attr-defined]
    assert torch.equal(webui.latents(DELTA), before)


def test_changed_files_are_read_again(webui: WebUI, files: Files) -> None:
    kept = {path: path.with_suffix(".kept") for path in (files.lora_file(), files.checkpoint("copy"))}
    for path, aside in kept.items():
        os.link(path, aside)
    weights = checkpoint(seed=7)
    other = lora_factors(weights, seed=8)
    try:
        webui.generate({**DELTA, "base": "copy"})
        write_lora(other, files.lora_file())
        write(weights, files.checkpoint("copy"))
        write(with_lora(weights, other, 1, 1), files.checkpoint("copy-tuned"))
        later(files.lora_file(), files.checkpoint("copy"))
        webui.sd_models.list_models()
        webui.shared.sd_model = webui.sd_models.load_model(webui.sd_models.get_closet_checkpoint_match("copy"))
        assert_exact(webui, {"base": "copy"}, native="copy-tuned")
    finally:
        for path, aside in kept.items():
            aside.replace(path)
        files.checkpoint("copy-tuned").unlink(missing_ok=True)
        webui.sd_models.list_models()


def later(*paths: Path) -> None:
    """Make files newer by more than the resolution of a clock of whole seconds."""
    for path in paths:
        moment = path.stat().st_mtime_ns + 2_000_000_000
        os.utime(path, ns=(moment, moment))


def test_the_status_says_what_is_loaded_and_what_it_cost(webui: WebUI) -> None:
    webui.generate(DELTA, steps=5)
    lines = webui.host.status().splitlines()
    assert lines[0].startswith("base.safetensors: on cpu") and "float32" in lines[0]
    assert "ink.safetensors (LoRA of rank 4) adapts" in lines[1] and "match no layer" not in lines[1]
    assert lines[2].startswith("Last run: delta in 5 steps, 5 passes")


def test_lists_follow_the_folders(webui: WebUI, files: Files) -> None:
    assert webui.host.catalog.checkpoints() == ["base", "copy", "half", "tuned", "unet-only"]
    assert webui.host.catalog.loras() == ["ink"]
    files.lora_file("pen").write_bytes(files.lora_file().read_bytes())
    files.checkpoint("new").write_bytes(b"")
    try:
        webui.host.catalog.refresh_loras()
        webui.host.catalog.refresh_checkpoints()
        assert webui.host.catalog.loras() == ["ink", "pen"] and "new" in webui.host.catalog.checkpoints()
    finally:
        files.lora_file("pen").unlink()
        files.checkpoint("new").unlink()
        sys.modules["networks"].available_networks.pop("pen")  # type: ignore[attr-defined]
        webui.sd_models.list_models()


def test_a_lora_that_came_after_the_list_is_found_as_the_webuis_own_tags_find_it(webui: WebUI, files: Files) -> None:
    pen = files.lora_file("pen")
    pen.write_bytes(files.lora_file().read_bytes())
    try:
        assert webui.host.catalog.card("pen").fault, "folders are not searched while somebody types"
        assert relative(webui.latents({**DELTA, "loras": "pen"}), webui.native()) < 1e-5
    finally:
        pen.unlink()
        sys.modules["networks"].available_networks.pop("pen", None)  # type: ignore[attr-defined]


def test_loras_are_found_by_alias_and_without_regard_to_case(webui: WebUI) -> None:
    networks: Any = sys.modules["networks"]
    networks.available_network_aliases["Tusche"] = networks.available_networks["ink"]
    assert relative(webui.latents({**DELTA, "loras": "Tusche"}), webui.native()) < 1e-5
    assert relative(webui.latents({**DELTA, "loras": "INK"}), webui.native()) < 1e-5


def test_without_the_lora_extension_there_are_no_loras(webui: WebUI) -> None:
    networks = sys.modules.pop("networks")
    try:
        webui.host.catalog.refresh_loras()
        assert webui.host.catalog.loras() == []
        with pytest.raises(SettingError, match="none are installed"):
            webui.generate(DELTA)
    finally:
        sys.modules["networks"] = networks


def test_models_are_not_imported_before_the_first_delta() -> None:
    """In one new process for all stand-ins, because torch takes seconds to start."""
    code = (
        # k-diffusion is slow to import, and this test does not sample.
        "import sys; from unittest.mock import MagicMock\n"
        "k = MagicMock(); k.external.DiscreteSchedule = object; sys.modules['k_diffusion'] = k\n"
        "sys.modules.update({'k_diffusion.sampling': k.sampling, 'k_diffusion.external': k.external})\n"
        "path = list(sys.path)\n"
        "for folders in sys.argv[1:]:\n"
        "    sys.path[:] = [*folders.split(';'), *path]\n"
        "    from lib_delta.hosts import host; host().start(); host().status(); host().unload()\n"
        "    heavy = [m for m in sys.modules if m.startswith(('lib_delta.models', 'lib_delta.core.source'))]\n"
        "    print(host().name, *heavy)\n"
        f"    for m in [m for m in sys.modules if m.split('.')[0] in {(*PACKAGES, 'lib_delta')}]: del sys.modules[m]"
    )
    paths = [";".join(folders(name)) for name in ("a1111", "forge", "neo")]
    environment = {**os.environ, "PYTHONPATH": str(STAND_IN.parents[2])}
    command = [sys.executable, "-c", code, *paths]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["AUTOMATIC1111", "Forge", "Forge Neo"]
