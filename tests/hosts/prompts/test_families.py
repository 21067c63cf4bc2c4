"""Prompts of SD 2.x and SDXL bases, encoded by the WebUIs' prompt code."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose tokenizer the prompt code uses")

from lib_delta.diffusion.families import Family
from lib_delta.models.text import Conditioner, TextConfig, TextEncoder, load_tokenizer, sdxl_label
from tests.support.small_files import TEXT, TOKENIZER
from tests.support.stand_in_webui import WebUI

WORDS = len(load_tokenizer(TOKENIZER))
CLIP_L = replace(TEXT, vocabulary=WORDS)
OPEN_CLIP = TextConfig(width=48, inner_width=64, layers=3, positions=77, vocabulary=WORDS, heads=1, activation="gelu")
SIZE = 96, 160
PROMPT, NEGATIVE = "a red boat", "green"


def model_of(family: Family) -> Any:
    """Return a stand-in of a side model: its text encoders with random weights."""
    torch.manual_seed(3)
    if family is Family.SD2:
        towers: tuple[TextEncoder, ...] = (TextEncoder(OPEN_CLIP, final_norm=True),)
    else:
        projected = replace(OPEN_CLIP, projection=48)
        towers = TextEncoder(CLIP_L, final_norm=False), TextEncoder(projected, final_norm=False)
    return SimpleNamespace(towers=towers, report=SimpleNamespace(family=family))


def prompts_of(prompt: str, negative: str) -> Any:
    """Return a pass's prompts; the class imports the WebUI."""
    from lib_delta.hosts.prompts.pass_prompts import PassPrompts

    return PassPrompts([prompt], [negative], 4, None, SIZE)


def encode(webui: WebUI, model: Any, prompt: str = PROMPT, negative: str = NEGATIVE) -> Any:
    """Return the conditioning at a pass's first step."""
    with torch.no_grad():
        engine = webui.host.make_text_engine(model)
        engine.use_embeddings({})
        prompts = prompts_of(prompt, negative)
        return engine.encode(model.towers, prompts.prompts, prompts)(1)


def encoded_by_models(model: Any, prompt: str) -> Any:
    """Return the prompt's conditioning without any WebUI."""
    return Conditioner(model.report.family, model.towers, load_tokenizer(TOKENIZER))([prompt])


@pytest.mark.parametrize("family", [Family.SD2, Family.SDXL], ids=["SD 2.x", "SDXL"])
def test_prompts_are_encoded_as_the_family_was_trained(webui: WebUI, family: Family) -> None:
    model = model_of(family)
    got, cond, uncond = encode(webui, model), *(encoded_by_models(model, text) for text in (PROMPT, NEGATIVE))
    torch.testing.assert_close(got.cond, cond.context)
    torch.testing.assert_close(got.uncond, uncond.context)
    if family is Family.SD2:
        assert got.cond_label is None and got.uncond_label is None
    else:
        torch.testing.assert_close(got.cond_label, sdxl_label(cond.pooled, *SIZE))
        torch.testing.assert_close(got.uncond_label, sdxl_label(uncond.pooled, *SIZE))


def test_the_webuis_crop_is_part_of_sdxls_label(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(Family.SDXL)
    monkeypatch.setattr(webui.shared.opts, "sdxl_crop_top", 16, raising=False)
    monkeypatch.setattr(webui.shared.opts, "sdxl_crop_left", 8, raising=False)
    want = sdxl_label(encoded_by_models(model, PROMPT).pooled, *SIZE, top=16, left=8)
    torch.testing.assert_close(encode(webui, model).cond_label, want)


@pytest.mark.parametrize("zeroed", [True, False])
def test_an_empty_negative_prompt_of_sdxl_is_zero_unless_the_webui_encodes_it(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, zeroed: bool
) -> None:
    """Only Forge Neo has the option; all other WebUIs always do so."""
    monkeypatch.setattr(webui.shared.opts, "sdxl_zero_neg", zeroed, raising=False)
    got, width = encode(webui, model_of(Family.SDXL), "", ""), OPEN_CLIP.width
    assert got.uncond.any() != zeroed and got.uncond_label[:, :width].any() != zeroed
    assert got.cond.any() and got.cond_label[:, :width].any()
    assert torch.equal(got.cond_label[:, width:], got.uncond_label[:, width:])


def test_prompt_editing_and_and_carry_labels(webui: WebUI) -> None:
    model = model_of(Family.SDXL)
    got = encode(webui, model, "a red boat AND a green boat :0.5")
    labels = [sdxl_label(encoded_by_models(model, text).pooled, *SIZE) for text in ("a red boat", "a green boat")]
    torch.testing.assert_close(got.cond_label, torch.cat(labels))
    assert got.weights == ((1.0, 0.5),)


def test_engines_hold_no_text_encoder_between_generations(webui: WebUI) -> None:
    model = model_of(Family.SDXL)
    engine = webui.host.make_text_engine(model)
    prompts = prompts_of(PROMPT, NEGATIVE)
    engine.encode(model.towers, prompts.prompts, prompts)
    with pytest.raises(AssertionError, match="only within"):
        engine.slots[0].encode(torch.zeros(1, 77, dtype=torch.long), 1)
