"""LoRA recipes: a line that people write and read, with adapters, their weights, blocks of the UNet, and times.

``moxin:0.8, lineart:1:te=0.5:lbw=MIDD:start=0.2:end=0.8`` holds picks, separated by commas; each has a name, a weight
and options, separated by colons.  A name that contains one of these signs stands in double quotes.
Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lib_delta.adapters.block_weights import BlockWeights
from lib_delta.core.strength import covers
from lib_delta.errors import SettingError, shortened, shown

PICK_OPTIONS = "te=weight, lbw=blocks, start=share, end=share, dyn=rank"
# The fields of Pick by the keys of a recipe's options; the weight has no key.
_OPTION_FIELDS = {
    "": "weight",
    "unet": "weight",
    "weight": "weight",
    "te": "text",
    "text": "text",
    "lbw": "blocks",
    "blocks": "blocks",
    "start": "start",
    "end": "end",
    "dyn": "rank",
    "rank": "rank",
}
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_WEBUI_TAG = re.compile(r"<(?:lora|lyco):([^<>]+)>")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
# For each LoRA of a recipe, whether it is active.
Active = tuple[bool, ...]


@dataclass(frozen=True)
class Pick:
    """An adapter by name.

    ``text`` is its weight for the text encoder (None: ``weight``), ``blocks`` its block weights (:class:`BlockWeights`;
    empty: 1 for all).  It is active from ``start`` to ``end``, shares of the run.  ``rank`` is the number of a
    DyLoRA's ranks to use (None: all).

    Raises:
        SettingError: A value is not allowed.
    """

    name: str
    weight: float = 1.0
    text: float | None = None
    blocks: str = ""
    start: float = 0.0
    end: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise SettingError(
                f"LoRA {shown(self.name)} has start {self.start:g} and end {self.end:g}: "
                "two shares of the run from 0 to 1 are needed, the earlier first"
            )
        if self.blocks:
            BlockWeights.parse(self.blocks)

    @property
    def text_weight(self) -> float:
        """The weight for the text encoder, multiplied by the block weight of BASE."""
        weight = self.weight if self.text is None else self.text
        return weight * BlockWeights.parse(self.blocks).text if self.blocks else weight

    def __str__(self) -> str:
        """Return the pick's recipe."""
        options = {
            "te": None if self.text is None else written(self.text),
            "lbw": self.blocks or None,
            "start": written(self.start) if self.start else None,
            "end": written(self.end) if self.end != 1 else None,
            "dyn": None if self.rank is None else str(self.rank),
        }
        stated = [f"{key}={value}" for key, value in options.items() if value is not None]
        weight = [written(self.weight)] if self.weight != 1 or stated else []
        return ":".join([quoted(self.name), *weight, *stated])


@dataclass(frozen=True)
class LoraTimeline:
    """LoRAs, each with the part of the run in which it is active."""

    picks: tuple[Pick, ...] = ()

    def active(self, progress: float) -> Active:
        """Return which LoRAs are active at a point of the run."""
        return tuple(covers(pick.start, pick.end, progress) for pick in self.picks)

    def stages(self) -> set[Active]:
        """Return every combination of LoRAs that is active at some point of the run.

        It changes only at a start or an end, so these points and one point between each two show all.
        """
        ends = sorted({0.0, 1.0, *(share for pick in self.picks for share in (pick.start, pick.end))})
        between = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        return {self.active(progress) for progress in (*ends, *between)}


def parse_picks(recipe: str) -> tuple[Pick, ...]:
    """Parse a recipe, which may also contain the WebUI's ``<lora:NAME:weight>``.

    Raises:
        SettingError: A part is invalid; the message quotes it.
    """
    return tuple(map(parse_single, _items(_WEBUI_TAG.sub(_from_webui, recipe))))


def _from_webui(tag: re.Match[str]) -> str:
    """Return a tag of the WebUI as a pick.  Of two numbers, the first is the text encoder's, the second the UNet's."""
    name, *rest = tag[1].split(":")
    numbers = [part for part in rest if "=" not in part]
    options = [part for part in rest if "=" in part]
    if len(numbers) == 2:
        numbers, options = numbers[1:], [f"te={numbers[0]}", *options]
    return ", " + ":".join([quoted(name.strip()), *numbers, *options]) + ", "


def parse_single(text: str) -> Pick:
    """Parse a recipe of one pick, whose name may contain commas."""
    return parse_pick(split(text, ":"))


def format_picks(picks: Sequence[Pick]) -> str:
    """Return the recipe of picks, for :func:`parse_picks`."""
    return ", ".join(map(str, picks))


def parse_pick(parts: Sequence[str]) -> Pick:
    """Parse one pick from the texts between its colons."""
    name, recipe = unquoted(parts[0].strip()), ":".join(parts)
    if not name:
        raise SettingError(f"LoRA pick {shown(recipe)} has no name: NAME:weight is needed")
    values: dict[str, str] = {}
    for part in parts[1:]:
        key, _, text = part.strip().partition("=") if "=" in part else ("", "", part.strip())
        field = _OPTION_FIELDS.get(key)
        if field is None or field in values:
            raise SettingError(
                f"LoRA pick {shown(recipe)} cannot be read at {shown(part)}: NAME:weight is needed, and {PICK_OPTIONS}"
            )
        values[field] = text.strip()
    return Pick(name, **{field: _parse_option(field, text, recipe) for field, text in values.items()})


def _parse_option(field: str, text: str, recipe: str) -> Any:
    """Return an option's value in the type of its field."""
    if field == "blocks":
        return ",".join(part.strip() for part in text.split(","))
    if field == "rank":
        if not text.isdecimal() or int(text) < 1:
            given = f"LoRA pick {shown(recipe)} has dyn={shortened(text)}"
            raise SettingError(f"{given}: a whole number of ranks, 1 or more, is needed")
        return int(text)
    return read_number(text, f"LoRA pick {shown(recipe)} has {'weight' if field == 'text' else field}")


def read_number(text: str, where: str) -> float:
    """Return a finite number; ``where`` begins the error's sentence."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SettingError(f"{where} {shown(text)}: a number is needed")
    return value


def written(value: float) -> str:
    """Return the shortest text of a number that is read back exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _items(recipe: str) -> Iterator[str]:
    """Yield the texts between commas, but do not split a list of block weights at its commas."""
    item = ""
    for part in split(recipe, ",\n"):
        if item and re.search(r":\s*lbw=[^:]*$", item) and _NUMBER.fullmatch(split(part, ":")[0]):
            item += "," + part
            continue
        if re.search(r":[^:]*\d$", item) and re.match(r"\d+\s*(:|$)", part):
            raise SettingError(
                f"LoRA pick {shown(f'{item.strip()},{part}')} cannot be read: write 0.8 with a point, "
                'or put a name that is a number in quotes, as in "8"'
            )
        if item.strip():
            yield item.strip()
        item = part
    if item.strip():
        yield item.strip()


def split(text: str, signs: str) -> list[str]:
    """Split a text at any of the signs, except inside double quotes."""
    parts = [""]
    for token in re.finditer(rf"{_QUOTED}|.", text, re.DOTALL):
        if token[0] in signs:
            parts.append("")
        else:
            parts[-1] += token[0]
    return parts


def quoted(name: str) -> str:
    """Return a name as a recipe needs it: in quotes if it could be read as something else."""
    plain = not re.search(r'[,:"\n\\]', name) and name == name.strip() and not _NUMBER.fullmatch(name)
    return name if plain else json.dumps(name, ensure_ascii=False)


def unquoted(name: str) -> str:
    """Return a name without its quotes; escapes that JSON does not know stay as they are."""
    if not re.fullmatch(_QUOTED, name, re.DOTALL):
        return name
    try:
        return str(json.loads(name, strict=False))
    except ValueError:
        return name[1:-1]
