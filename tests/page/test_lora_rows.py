"""The rows below the LoRA box: their HTML, and the texts after an edit."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from lib_delta.page.lora_rows import BoxTexts, LoraCard, add_lora, apply_edit, render_rows, with_words
from lib_delta.request.lora_recipe import parse_picks

CARDS = {
    "moxin": LoraCard("moxin", 0.7, "moxin style, ink", "photo, <3d>"),
    "alias": LoraCard("moxin", 0.7, "moxin style, ink"),
    "plain": LoraCard("plain"),
}


def card(name: str) -> LoraCard:
    return CARDS.get(name, LoraCard(name, fault=f"there is no LoRA {name!r}"))


class Tags(HTMLParser):
    """The elements and the text of some HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[dict[str, Any]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append({"tag": tag, **dict(attrs)})

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, **about: str) -> list[dict[str, Any]]:
        return [tag for tag in self.tags if all(tag.get(key) == value for key, value in about.items())]


def shown(loras: str, prompt: str = "", negative: str = "") -> Tags:
    return Tags(render_rows(BoxTexts(loras, prompt, negative), card))


def test_each_lora_has_a_row_with_its_weight() -> None:
    tags = shown('moxin:0.8:te=0.5, <lora:plain:1.2>, "8":-1.5, moxin:3')
    sliders = [(tag["min"], tag["max"], tag["value"]) for tag in tags.of(type="range")]
    assert sliders == [("0", "2", "0.8"), ("0", "2", "1.2"), ("-2", "2", "-1.5"), ("0", "3", "3")]
    assert [tag["value"] for tag in tags.of(type="number")] == ["0.8", "1.2", "-1.5", "3"]
    assert [tag["data-name"] for tag in tags.tags if "data-name" in tag] == ["moxin", "plain", "8", "moxin"]


def test_rows_offer_trigger_words_and_report_a_missing_lora() -> None:
    tags = shown("moxin, plain, moxxin")
    assert len(tags.of(**{"data-do": "words"})) == len(tags.of(**{"data-do": "negative"})) == 1
    assert "+ moxin style, ink" in tags.text and "\N{MINUS SIGN} photo, <3d>" in tags.text
    assert "there is no LoRA 'moxxin'" in tags.text
    assert "\N{CHECK MARK} moxin style, ink" in shown("moxin", "a cat, moxin style, ink").text


def test_an_invalid_box_shows_its_error_and_names_are_escaped() -> None:
    assert shown("moxin:much").text == "LoRA pick 'moxin:much' has weight 'much': a number is needed"
    assert shown("").text == ""
    tags = shown('"<b>&\'":0.5')
    assert not tags.of(tag="b") and next(tag for tag in tags.tags if "data-name" in tag)["data-name"] == "<b>&'"


def edit(texts: BoxTexts, **about: Any) -> BoxTexts:
    return apply_edit(texts, about, card)


def test_an_edited_weight_changes_nothing_else() -> None:
    texts = BoxTexts("moxin:0.8:te=0.5:lbw=MIDD, <lora:plain:1.2>", "a", "b")
    after = edit(texts, do="weight", index=0, name="moxin", weight=0.30000000000000004)
    assert after == BoxTexts("moxin:0.3:te=0.5:lbw=MIDD, plain:1.2", "a", "b")
    assert edit(after, do="weight", index=1, name="plain", weight=1).loras == "moxin:0.3:te=0.5:lbw=MIDD, plain"
    assert edit(texts, do="drop", index=0, name="moxin").loras == "plain:1.2"


@pytest.mark.parametrize(
    "about",
    [
        {"do": "weight", "index": 1, "name": "moxin", "weight": 1},
        {"do": "weight", "index": 7, "name": "moxin", "weight": 1},
        {"do": "weight", "index": 0, "name": "moxin", "weight": float("nan")},
        {"do": "weight", "index": 0, "name": "moxin", "weight": None},
        {"do": "weight", "index": 0, "name": "moxin"},
        {"do": "drop", "index": None, "name": "moxin"},
        {"do": "card", "text": "a cat"},
        {"do": "card"},
        {"do": "dance"},
        {},
    ],
)
def test_an_edit_that_does_not_fit_changes_nothing(about: dict[str, Any]) -> None:
    texts = BoxTexts("moxin:0.8, plain:1", "a", "b")
    assert apply_edit(texts, about, card) == texts


def test_words_join_a_prompt_once_and_an_empty_prompt_becomes_the_main_one() -> None:
    texts = edit(BoxTexts("moxin"), do="words", name="moxin")
    assert texts.prompt == "{prompt}, moxin style, ink" and texts.negative_prompt == ""
    assert edit(texts, do="words", name="moxin") == texts
    assert edit(BoxTexts("moxin", "", "grey,"), do="negative", name="moxin").negative_prompt == "grey, photo, <3d>"
    assert with_words("a cat, ", "ink") == "a cat, ink"


def test_a_card_adds_its_lora_and_a_second_click_removes_it() -> None:
    clicked = {"do": "card", "text": "<lora:alias:0.7> moxin style, ink"}
    texts = edit(BoxTexts("plain:0.5"), **clicked)
    assert texts == BoxTexts("plain:0.5, moxin:0.7"), "by its name in the list, and the prompt is unchanged"
    assert edit(BoxTexts(), do="card", text="<lora:alias:>").loras == "moxin:0.7", (
        "the weight of its card if the click has none"
    )
    texts = edit(BoxTexts("plain:0.5, moxin:0.2:te=0"), **clicked)
    assert texts == BoxTexts("plain:0.5")
    assert edit(BoxTexts("plain:"), **clicked).loras == "plain:, moxin:0.7", "the user is still typing"


def test_an_added_name_is_parsed_back() -> None:
    for name in ("my, ink", "8", 'the "one"'):
        (pick,) = parse_picks(add_lora("", name, 0.6))
        assert (pick.name, pick.weight) == (name, 0.6)
