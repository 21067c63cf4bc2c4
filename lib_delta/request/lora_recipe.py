"""Recipes: which adapters, how strong, where in the UNet and when, in one line that people write and read.

``moxin:0.8, lineart:1:te=0.5:lbw=MIDD:start=0.2:end=0.8``: picks between commas, each a name, a weight
and options between colons.  A name that holds any of these signs stands between double quotes.
Importing this module imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lib_delta.adapters.block_weights import BlockWeights
from lib_delta.errors import SettingError, shortened, shown

PICK_OPTIONS = "te=weight, lbw=blocks, start=share, end=share, dyn=rank"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_WEBUI_TAG = re.compile(r"<(?:lora|lyco):([^<>]+)>")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")


@dataclass(frozen=True)
class Pick:
    """An adapter by name.

    ``text`` is its weight for the text encoder (None: the same), ``blocks`` its block weights
    (:class:`BlockWeights`; empty: 1 for all), ``start`` and ``end`` the share of the run in which it counts,
    ``rank`` how many ranks of a DyLoRA are used (None: all).
    Raises :class:`SettingError` for values that are not allowed.
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
                f"LoRA {shown(self.name)} is to count from {self.start:g} to {self.end:g}: "
                "two shares of the run from 0 to 1 are needed, the earlier first"
            )
        if self.blocks:
            BlockWeights.parse(self.blocks)

    @property
    def text_weight(self) -> float:
        """The weight for the text encoder, block weights included."""
        weight = self.weight if self.text is None else self.text
        return weight * BlockWeights.parse(self.blocks).text if self.blocks else weight

    def __str__(self) -> str:
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


def parse_picks(recipe: str) -> tuple[Pick, ...]:
    """Read a recipe, in which the WebUI's own ``<lora:NAME:weight>`` may stand as well.

    Raises :class:`SettingError` that quotes what cannot be read.
    """
    return tuple(map(parse_single, _items(_WEBUI_TAG.sub(_from_webui, recipe))))


def _from_webui(tag: re.Match[str]) -> str:
    """Write a tag of the WebUI as a pick: its first number is for the text encoder, a second one for the UNet."""
    name, *rest = tag[1].split(":")
    numbers = [part for part in rest if "=" not in part]
    options = [part for part in rest if "=" in part]
    if len(numbers) == 2:
        numbers, options = numbers[1:], [f"te={numbers[0]}", *options]
    return ", " + ":".join([quoted(name.strip()), *numbers, *options]) + ", "


def parse_single(text: str) -> Pick:
    """Read a recipe of one pick, whose name may hold commas."""
    return parse_pick(split(text, ":"))


def format_picks(picks: Sequence[Pick]) -> str:
    """Write picks as :func:`parse_picks` reads them."""
    return ", ".join(map(str, picks))


def parse_pick(parts: Sequence[str]) -> Pick:
    """Read one pick, given as the texts between its colons."""
    name, text = unquoted(parts[0].strip()), ":".join(parts)
    if not name:
        raise SettingError(f"LoRA pick {shown(text)} has no name: NAME:weight is needed")
    values: dict[str, str] = {}
    for part in parts[1:]:
        key, _, value = part.strip().partition("=") if "=" in part else ("", "", part.strip())
        field = {"": "weight", "unet": "weight", "te": "text", "lbw": "blocks", "dyn": "rank"}.get(key, key)
        if field not in ("weight", "text", "blocks", "start", "end", "rank") or field in values:
            raise SettingError(
                f"LoRA pick {shown(text)} cannot be read at {shown(part)}: NAME:weight is needed, and {PICK_OPTIONS}"
            )
        values[field] = value.strip()
    return Pick(name, **_pick_values(values, text))  # type: ignore[arg-type]


def _pick_values(values: Mapping[str, str], text: str) -> dict[str, float | int | str]:
    typed: dict[str, float | int | str] = {}
    for field, value in values.items():
        if field == "blocks":
            typed[field] = ",".join(part.strip() for part in value.split(","))
        elif field == "rank":
            if not value.isdecimal() or int(value) < 1:
                given = f"LoRA pick {shown(text)} has dyn={shortened(value)}"
                raise SettingError(f"{given}: a whole number of ranks, 1 or more, is needed")
            typed[field] = int(value)
        else:
            typed[field] = read_number(value, f"LoRA pick {shown(text)} has {'weight' if field == 'text' else field}")
    return typed


def read_number(text: str, where: str) -> float:
    """Read a finite number; ``where`` begins the error's sentence."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SettingError(f"{where} {shown(text)}: a number is needed")
    return value


def written(value: float) -> str:
    """Write a number as short as it can be read back exactly."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _items(recipe: str) -> Iterator[str]:
    """Yield the texts between commas; the commas inside a list of block weights are none of these."""
    item = ""
    for part in split(recipe, ",\n"):
        if item and re.search(r":\s*lbw=[^:]*$", item) and _NUMBER.fullmatch(split(part, ":")[0]):
            item += "," + part
            continue
        if re.search(r":[^:]*\d$", item) and re.match(r"\d+\s*(:|$)", part):
            raise SettingError(
                f"LoRA pick {shown(f'{item.strip()},{part}')} cannot be read: write 0.8 with a point, "
                'or a name that is a number between quotes, as in "8"'
            )
        if item.strip():
            yield item.strip()
        item = part
    if item.strip():
        yield item.strip()


def split(text: str, signs: str) -> list[str]:
    """Return the texts between the signs, but for those between double quotes."""
    parts = [""]
    for found in re.finditer(rf"{_QUOTED}|.", text, re.DOTALL):
        if found[0] in signs:
            parts.append("")
        else:
            parts[-1] += found[0]
    return parts


def quoted(name: str) -> str:
    """Write a name, between quotes where it could be read as something else."""
    plain = not re.search(r'[,:"\n\\]', name) and name == name.strip() and not _NUMBER.fullmatch(name)
    return name if plain else json.dumps(name, ensure_ascii=False)


def unquoted(name: str) -> str:
    if not re.fullmatch(_QUOTED, name, re.DOTALL):
        return name
    try:
        return str(json.loads(name, strict=False))
    except ValueError:
        return name[1:-1]
