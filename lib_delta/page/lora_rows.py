"""The rows below the accordion's LoRA box: for each LoRA a slider for its weight, and its trigger words.

The box's text is the only state.  The page sends each change of a row, and each click on a LoRA's card, as an *edit*,
a small dictionary; the edit changes the text, and the rows are rendered from it.  Nothing here imports torch.
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
CHECK_MARK = "\N{CHECK MARK}"
# The sign and the tooltip of a button that adds a card's words to a prompt, by its edit.
OFFERS = {
    "words": ("+", "Add these trigger words to the side model's prompt"),
    "negative": ("\N{MINUS SIGN}", "Add these words to the side model's negative prompt"),
}


@dataclass(frozen=True)
class LoraCard:
    """A LoRA's name in the WebUI's list, and the user's notes on its card.

    ``words`` are its trigger words, ``negative`` its words for the negative prompt.  ``fault`` is the error message
    if there is no such LoRA.
    """

    name: str
    weight: float = 1.0
    words: str = ""
    negative: str = ""
    fault: str = ""


CardOf = Callable[[str], LoraCard]


@dataclass(frozen=True)
class BoxTexts:
    """The texts that edits change: the LoRA box and the side model's two prompts."""

    loras: str = ""
    prompt: str = ""
    negative_prompt: str = ""


def render_rows(texts: BoxTexts, cards: CardOf) -> str:
    """Return the rows as HTML, or the error if the box's text cannot be parsed.

    ``data-drawn`` holds that text: the page compares it with its latest.
    """
    try:
        picks = enumerate(parse_picks(texts.loras))
        content = "".join(_render_row(index, pick, cards(pick.name), texts) for index, pick in picks)
    except SettingError as error:
        content = f'<p class="delta-sampling-wrong">{escape(str(error))}</p>'
    return f'<div data-drawn="{escape(json.dumps(texts.loras))}">{content}</div>'


def apply_edit(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    """Return the texts after an edit: ``do`` is one of :data:`EDITS`, and the other keys are its arguments.

    An invalid edit changes nothing; nor does an edit of a LoRA that has meanwhile moved.
    """
    change = EDITS.get(str(edit.get("do")))
    try:
        return texts if change is None else change(texts, edit, cards)
    except (SettingError, LookupError, TypeError, ValueError):
        return texts


def add_lora(loras: str, name: str, weight: float) -> str:
    """Return a recipe with one more LoRA at its end, unless it contains the LoRA already."""
    if name in _names(loras):
        return loras
    present = loras.strip().rstrip(",")
    return ", ".join(part for part in (present, f"{quoted(name)}:{written(weight)}") if part)


def with_words(prompt: str, words: str) -> str:
    """Return a side model's prompt with trigger words.  An empty prompt becomes the main prompt, which it stood for."""
    if words in prompt:
        return prompt
    return ", ".join((prompt.strip().rstrip(",") or MAIN_PROMPT, words))


def _names(loras: str) -> list[str]:
    try:
        return [pick.name for pick in parse_picks(loras)]
    except SettingError:  # the user is still typing
        return []


def _edited_pick(texts: BoxTexts, edit: Mapping[str, Any]) -> tuple[list[Pick], int]:
    """Return the picks and the index of the edited one; raise LookupError if another pick is there by now."""
    picks, index = list(parse_picks(texts.loras)), int(edit["index"])
    if picks[index].name != edit["name"]:
        raise LookupError(index)
    return picks, index


def _set_weight(texts: BoxTexts, edit: Mapping[str, Any], _: CardOf) -> BoxTexts:
    picks, index = _edited_pick(texts, edit)
    weight = round(float(edit["weight"]), 4)
    if not math.isfinite(weight):
        return texts
    picks[index] = replace(picks[index], weight=weight)
    return replace(texts, loras=format_picks(picks))


def _remove(texts: BoxTexts, edit: Mapping[str, Any], _: CardOf) -> BoxTexts:
    picks, index = _edited_pick(texts, edit)
    return replace(texts, loras=format_picks(picks[:index] + picks[index + 1 :]))


def _add_words(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    return replace(texts, prompt=with_words(texts.prompt, cards(edit["name"]).words))


def _add_negative_words(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    return replace(texts, negative_prompt=with_words(texts.negative_prompt, cards(edit["name"]).negative))


def _toggle_card(texts: BoxTexts, edit: Mapping[str, Any], cards: CardOf) -> BoxTexts:
    """Add the LoRA of a clicked card, or remove it if it is there, as the WebUI does in the main prompt."""
    tag = re.search(r"<(?:lora|lyco):([^:<>]+):([^:<>]*)", edit["text"])
    if tag is None:
        return texts
    card = cards(tag[1].strip())
    if card.name in _names(texts.loras):
        return replace(texts, loras=format_picks([pick for pick in parse_picks(texts.loras) if pick.name != card.name]))
    return replace(texts, loras=add_lora(texts.loras, card.name, float(tag[2] or card.weight)))


EDITS: Mapping[str, Callable[[BoxTexts, Mapping[str, Any], CardOf], BoxTexts]] = {
    "weight": _set_weight,
    "drop": _remove,
    "words": _add_words,
    "negative": _add_negative_words,
    "card": _toggle_card,
}


def _render_row(index: int, pick: Pick, card: LoraCard, texts: BoxTexts) -> str:
    name, weight = escape(pick.name), written(pick.weight)
    low, high = min(0, math.floor(pick.weight)), max(2, math.ceil(pick.weight))
    number = f'step="{WEIGHT_STEP}" value="{weight}"'
    offers = _render_offer("words", card.words, texts.prompt) + _render_offer(
        "negative", card.negative, texts.negative_prompt
    )
    return "".join(
        [
            f'<div class="delta-sampling-pick" data-index="{index}" data-name="{name}">',
            f'<span class="delta-sampling-name" title="{name}">{name}</span>',
            f'<input type="range" min="{low}" max="{high}" {number} aria-label="Weight of {name}">',
            f'<input type="number" {number} aria-label="Weight of {name} as a number">',
            f'<button type="button" data-do="drop" title="Remove {name}">\N{MULTIPLICATION SIGN}</button>',
            f'<span class="delta-sampling-wrong">{escape(card.fault)}</span>' if card.fault else "",
            f'<div class="delta-sampling-offers">{offers}</div>' if offers else "",
            "</div>",
        ]
    )


def _render_offer(edit: str, words: str, prompt: str) -> str:
    """Return a button that adds a card's words to a prompt; with a check mark if the prompt contains them."""
    if not words:
        return ""
    sign, title = OFFERS[edit]
    return (
        f'<button type="button" class="delta-sampling-words" data-do="{edit}" title="{escape(title)}">'
        f"{CHECK_MARK if words in prompt else sign} {escape(words)}</button>"
    )
