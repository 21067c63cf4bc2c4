"""The request: one generation's settings, as the accordion, the API, infotext and prompt tags give them.

Nothing here knows of models or imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lib_delta.core.strength import Strength
from lib_delta.errors import SettingError, shortened, shown
from lib_delta.request.control_unit import Unit, parse_units, plain_value, read_unit
from lib_delta.request.fields import (
    SETTINGS,
    UNIT_FIELDS,
    UNITS,
    Field,
    RequestFields,
    as_json,
    declare,
)
from lib_delta.request.infotext import to_infotext
from lib_delta.request.lora_recipe import (
    Active,
    LoraTimeline,
    Pick,
    format_picks,
    parse_pick,
    parse_picks,
    parse_single,
    read_number,
)
from lib_delta.request.setting_choices import SIDE_SIZES, SizeChoice


@dataclass(frozen=True)
class Request(RequestFields):
    """One generation's settings, each declared in :class:`RequestFields`, and its units.

    Values are checked only if a delta is requested, so an accordion that is off, or whose lambda is 0, may hold
    anything.  LoRAs and lambda are parsed once.

    Raises:
        SettingError: A value is not allowed.
    """

    units: tuple[Unit, ...] = declare((), UNITS)

    def __post_init__(self) -> None:
        """Check the values, which also parses LoRAs and lambda."""
        if self.enabled is False or _is_zero(self.strength):
            return
        for field in SETTINGS:
            value = getattr(self, field.name)
            if not field.allows(value):
                raise SettingError(f"Delta Sampling's {field.key!r} must be {field.allowed}, not {as_json(value)}")
        if 0 < self.every < 1:
            raise SettingError(f"Delta Sampling's 'quality_steps' must be 0 or from 1 to 10, not {self.every:g}")
        for i, unit in enumerate(self.units):
            unit.check(i + 1)
        self.lambda_over_run()
        self.picks()

    @property
    def wanted(self) -> bool:
        """Whether a delta is requested."""
        return self.enabled and self.strength != 0

    def lambda_over_run(self) -> Strength:
        """Return lambda as a function of progress."""
        return self._lambda_over_run

    @cached_property
    def _lambda_over_run(self) -> Strength:
        return Strength(
            value=self.strength,
            start=self.start,
            end=self.end,
            curve=self.curve,
            first=self.first,
            last=self.last,
        )

    @cached_property
    def timeline(self) -> LoraTimeline:
        """The LoRAs, and when each is active."""
        return LoraTimeline(parse_picks(self.loras))

    def picks(self) -> tuple[Pick, ...]:
        """Return the LoRAs."""
        return self.timeline.picks

    def active(self, progress: float) -> Active:
        """Return which LoRAs are active at a point of the run."""
        return self.timeline.active(progress)

    def stages(self) -> set[Active]:
        """Return every combination of LoRAs that is active at some point of the run."""
        return self.timeline.stages()

    @property
    def always_differs(self) -> bool:
        """Whether base and adapted model differ even while no LoRA and no unit is active."""
        return bool(self.adapted or self.adapted_prompt)

    @property
    def has_units(self) -> bool:
        """Whether any unit is active at some point of the run."""
        return any(unit.has_effect for unit in self.units)

    def differs_at(self, progress: float) -> bool:
        """Return whether base and adapted model differ at a point of the run."""
        return self.always_differs or any(self.active(progress)) or any(unit.is_active(progress) for unit in self.units)

    @property
    def side_size(self) -> SizeChoice | int:
        """The size of the side model, as bridges take it: a choice, or a side in pixels."""
        return next((choice for choice in SIDE_SIZES if choice == self.size), None) or int(self.size)

    def in_pass(self, hires: bool) -> bool:
        """Return whether ``hires`` includes the hires pass, or the first pass."""
        return self.hires == "both" or (self.hires == "hires pass") == hires

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any], **changes: Any) -> Request:
        """Return the request of a script's arguments: a dictionary of named keys, or values in the fields' order.

        Missing values have their defaults.  Values after a dictionary are ignored, because hosts pad API calls with
        the accordion's defaults.  ``changes`` replace fields before anything is checked.
        """
        if arguments and isinstance(arguments[0], Mapping):
            return cls.from_named(arguments[0], **changes)
        if len(arguments) > len(SETTINGS) and (len(arguments) - len(SETTINGS)) % len(UNIT_FIELDS):
            raise SettingError(
                f"Delta Sampling takes {len(SETTINGS)} arguments, and {len(UNIT_FIELDS)} more for each unit:"
                f" {len(arguments)} were given"
            )
        values = {field.name: _plain(field, value) for field, value in zip(SETTINGS, arguments)}
        return cls(**values | {"units": _units_of_widgets(arguments[len(SETTINGS) :])} | changes)

    @classmethod
    def from_named(cls, named: Mapping[str, Any], **changes: Any) -> Request:
        """Return the request of an API call's dictionary, which is enabled unless it says otherwise."""
        by_key = {field.key: field for field in SETTINGS}
        values: dict[str, Any] = {"enabled": True}
        values |= {field.name: _plain(field, named[key]) for key, field in by_key.items() if key in named}
        request = cls(**values | changes)
        if not request.wanted:
            return request
        if UNITS.key in named and UNITS.name not in changes:
            request = replace(request, units=_units_of_api(named[UNITS.key]))
        _refuse_unknown_keys(named, known=(*by_key, UNITS.key))
        return request

    def with_tags(self, tags: Sequence[Sequence[str]]) -> Request:
        """Apply a prompt's ``<delta:NAME:lambda>`` tags, each given as the texts between its colons.

        Tags enable the delta and set lambda.  Their LoRAs are added to those of an accordion that is on.  They replace
        LoRAs of the same name, because a pasted picture has them both in its prompt and in the accordion.
        """
        if not tags:
            return self
        parsed = [_parse_tag(tag) for tag in tags]
        lambdas = {strength for _, strength in parsed if strength is not None}
        if len(lambdas) > 1:
            stated = " and ".join(f"{v:g}" for v in sorted(lambdas))
            raise SettingError(f"<delta:...> tags ask for lambda {stated} in one prompt: give lambda once")
        picks = [pick for pick, _ in parsed]
        names = {pick.name for pick in picks}
        before = [pick for pick in self.picks() if pick.name not in names] if self.enabled else []
        return replace(
            self,
            enabled=True,
            strength=lambdas.pop() if lambdas else self.strength,
            loras=format_picks([*before, *picks]),
        )

    def overridden_by(self, tagged: Request) -> str:
        """Return the values that a prompt's tags have changed, in words; ``tagged`` is this request with the tags."""
        weights = {pick.name: pick.weight for pick in self.picks()} if self.wanted else {}
        changes = []
        if tagged.strength != self.strength:
            changes.append(f"lambda {tagged.strength:g} (here {self.strength:g})")
        changes += [
            f"weight {pick.weight:g} of {shown(pick.name)} (here {weights[pick.name]:g})"
            for pick in (tagged.picks() if tagged.wanted else ())
            if weights.get(pick.name, pick.weight) != pick.weight
        ]
        return " and ".join(changes)

    def infotext(self, hashes: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the infotext of a picture with this delta: lambda, and every setting that is not the default.

        ``hashes`` are short hashes by the names of the side files.
        """
        return to_infotext(self, hashes or {}) if self.enabled else {}


def _parse_tag(tag: Sequence[str]) -> tuple[Pick, float | None]:
    """Return the LoRA and lambda of ``<delta:NAME:lambda:weight=0.8:te=0.5>``."""
    options = [part for part in tag[1:] if "=" in part]
    numbers = [part for part in tag[1:] if "=" not in part]
    text = shortened("<delta:" + ":".join(tag) + ">")
    if not tag or not tag[0].strip() or len(numbers) > 1:
        raise SettingError(f"{text} cannot be read: <delta:NAME:lambda> is needed")
    pick = parse_pick([tag[0], *(re.sub(r"^\s*weight=", "unet=", option) for option in options)])
    return pick, read_number(numbers[0], f"{text} has lambda") if numbers else None


def _plain(field: Field, value: Any) -> Any:
    """Return a value of a widget or of JSON in the field's type, if that loses nothing, or else as it is."""
    if field.name == "loras" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return _joined_picks(value)
    if field.name == "size" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return field.plain(value)


def _joined_picks(recipes: Sequence[str]) -> str:
    try:
        return format_picks([parse_single(recipe) for recipe in recipes])
    except SettingError:
        return ", ".join(recipes)  # Request reports the error, if a delta is requested


def _units_of_widgets(values: Sequence[Any]) -> tuple[Unit, ...]:
    """Return the units up to the last that is enabled, from the widgets' values, unit by unit."""
    size = len(UNIT_FIELDS)
    rows = [values[i : i + size] for i in range(0, len(values), size)]
    units = [Unit(**{name: plain_value(name, value) for name, value in zip(UNIT_FIELDS, row)}) for row in rows]
    while units and not units[-1].enabled:
        units.pop()
    return tuple(units)


def _units_of_api(given: Any) -> tuple[Unit, ...]:
    """Return the units of an API call: a line of recipes, or a list of recipes and dictionaries."""
    if isinstance(given, str):
        return parse_units(given)
    if not isinstance(given, (list, tuple)):
        raise SettingError(f"Delta Sampling's 'units' must be a list of dictionaries and recipes, not {shown(given)}")
    return tuple(read_unit(unit, i + 1) for i, unit in enumerate(given))


def _refuse_unknown_keys(named: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = next((key for key in named if key not in known), None)
    if unknown is not None:
        close = difflib.get_close_matches(str(unknown), known, 1)
        hint = f": is {close[0]!r} meant?" if close else f", only {', '.join(known)}"
        raise SettingError(f"Delta Sampling has no argument {shown(unknown)}{hint}")


def _is_zero(strength: Any) -> bool:
    return isinstance(strength, (int, float)) and not isinstance(strength, bool) and strength == 0
