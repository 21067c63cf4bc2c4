"""The LoRAs picked, as the accordion shows them below their box: a slider for each weight, and its trigger words.

The box's text stays the truth.  What is done with a row, or with a LoRA's card in the WebUI, comes back as an *edit*,
a small dictionary, and changes the text.  Importing this module imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from lib_delta.errors import SettingError
from lib_delta.request.lora_recipe import Pick, format_picks, parse_picks, quoted, written
from lib_delta.request.setting_choices import MAIN_PROMPT

WEIGHT_STEP = 0.05


@dataclass(frozen=True)
class LoraCard:
    """What the WebUI knows of a LoRA: the name by which it is listed, and what the user has noted on its card.

    ``words`` are its trigger words, ``negative`` what belongs into the negative prompt beside it.  ``fault`` is the
    sentence that says that there is no such LoRA.
    """

    name: str
    weight: float = 1.0
    words: str = ""
    negative: str = ""
    fault: str = ""


CardOf = Callable[[str], LoraCard]


@dataclass(frozen=True)
class BoxTexts:
    """The texts that edits change: the box of the LoRAs, and the side model's two prompts."""

    loras: str = ""
    prompt: str = ""
    negative_prompt: str = ""


def render_rows(texts: BoxTexts, cards: CardOf) -> str:
    """Return the rows as HTML, or the sentence that says why the box cannot be read.

    ``data-drawn`` has the texts that are shown, for the page to see whether its latest are.
    """
    try:
        picks = enumerate(parse_picks(texts.loras))
        inside = "".join(_render_row(index, pick, cards(pick.name), texts) for index, pick in picks)
    except SettingError as error:
        inside = f'<p class="delta-sampling-wrong">{escape(str(error))}</p>'
    return f'<div data-drawn="{escape(json.dumps(texts.loras))}">{inside}</div>'


def apply_edit(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    """Return the texts after an edit: ``do`` is what (one of :data:`EDITS`), and the rest with what.

    An edit of a LoRA that is no longer where it was changes nothing, as does one that cannot be read.
    """
    change = EDITS.get(str(edit.get("do")))
    try:
        return texts if change is None else change(texts, edit, cards)
    except (SettingError, LookupError, TypeError, ValueError):
        return texts


def add_lora(loras: str, name: str, weight: float) -> str:
    """Return a recipe with one more LoRA at its end, unless it has that already."""
    if name in _names(loras):
        return loras
    before = loras.strip().rstrip(",")
    return ", ".join(part for part in (before, f"{quoted(name)}:{written(weight)}") if part)


def with_words(prompt: str, words: str) -> str:
    """Return a side model's prompt with trigger words; an empty one, which means the main prompt, goes on doing so."""
    if words in prompt:
        return prompt
    return ", ".join((prompt.strip().rstrip(",") or MAIN_PROMPT, words))


def _names(loras: str) -> list[str]:
    try:
        return [pick.name for pick in parse_picks(loras)]
    except SettingError:  # half written: the user goes on from there
        return []


def _picks(texts: BoxTexts, edit: Mapping[str, Any]) -> tuple[list[Pick], int]:
    """Return the picks, and the place of the one that is edited; raises LookupError if another is there by now."""
    picks, index = list(parse_picks(texts.loras)), int(edit["index"])
    if picks[index].name != edit["name"]:
        raise LookupError(index)
    return picks, index


def _weigh(texts: BoxTexts, edit: Mapping[str, Any], _: CardOf) -> BoxTexts:
    picks, index = _picks(texts, edit)
    weight = round(float(edit["weight"]), 4)
    if not math.isfinite(weight):
        return texts
    picks[index] = replace(picks[index], weight=weight)
    return replace(texts, loras=format_picks(picks))


def _drop(texts: BoxTexts, edit: Mapping[str, Any], _: CardOf) -> BoxTexts:
    picks, index = _picks(texts, edit)
    return replace(texts, loras=format_picks(picks[:index] + picks[index + 1 :]))


def _words(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    return replace(texts, prompt=with_words(texts.prompt, cards(edit["name"]).words))


def _negative(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    return replace(texts, negative_prompt=with_words(texts.negative_prompt, cards(edit["name"]).negative))


def _card(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    """Add the LoRA of a card that was clicked, or take it away again, as the WebUI does in its own prompt."""
    found = re.search(r"<(?:lora|lyco):([^:<>]+):([^:<>]*)", edit["text"])
    if found is None:
        return texts
    card = cards(found[1].strip())
    if card.name in _names(texts.loras):
        return replace(texts, loras=format_picks([pick for pick in parse_picks(texts.loras) if pick.name != card.name]))
    return replace(texts, loras=add_lora(texts.loras, card.name, float(found[2] or card.weight)))


EDITS: Mapping[str, Callable[[BoxTexts, Mapping[str, Any], CardOf], BoxTexts]] = {
    "weight": _weigh,
    "drop": _drop,
    "words": _words,
    "negative": _negative,
    "card": _card,
}


def _render_row(index: int, pick: Pick, card: LoraCard, texts: BoxTexts) -> str:
    name, weight = escape(pick.name), written(pick.weight)
    low, high = min(0, math.floor(pick.weight)), max(2, math.ceil(pick.weight))
    number = f'step="{WEIGHT_STEP}" value="{weight}"'
    offers = "".join(
        [
            _render_offer("words", card.words, texts.prompt, "These trigger words join the side model's prompt"),
            _render_offer(
                "negative", card.negative, texts.negative_prompt, "These join the side model's negative prompt"
            ),
        ]
    )
    return "".join(
        [
            f'<div class="delta-sampling-pick" data-index="{index}" data-name="{name}">',
            f'<span class="delta-sampling-name" title="{name}">{name}</span>',
            f'<input type="range" min="{low}" max="{high}" {number} aria-label="Weight of {name}">',
            f'<input type="number" {number} aria-label="Weight of {name} as a number">',
            f'<button type="button" data-do="drop" title="Take {name} out">\N{MULTIPLICATION SIGN}</button>',
            f'<span class="delta-sampling-wrong">{escape(card.fault)}</span>' if card.fault else "",
            f'<div class="delta-sampling-offers">{offers}</div>' if offers else "",
            "</div>",
        ]
    )


def _render_offer(what: str, words: str, prompt: str, title: str) -> str:
    if not words:
        return ""
    sign = "\N{CHECK MARK}" if words in prompt else ("\N{MINUS SIGN}" if what == "negative" else "+")
    return (
        f'<button type="button" class="delta-sampling-words" data-do="{what}" title="{escape(title)}">'
        f"{sign} {escape(words)}</button>"
    )
