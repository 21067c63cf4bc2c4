"""What the user asks for: one generation's settings, as the accordion, the API, infotext and prompts give them.

One table, the fields of :class:`Request`, says how each setting is called in each of these places.
Nothing here knows of models; importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lib_delta.core.strength import CURVES, MAX_LAMBDA, PROGRESS_TOLERANCE, Strength
from lib_delta.errors import SettingError, shortened, shown
from lib_delta.request.control_unit import UNIT_FIELDS, Unit, format_units, parse_units, read_unit
from lib_delta.request.control_unit import plain_value as plain_of_unit
from lib_delta.request.lora_recipe import (
    Pick,
    format_picks,
    parse_pick,
    parse_picks,
    parse_single,
    read_number,
    written,
)

HIRES_PASSES = ("both", "first pass", "hires pass")
SIDE_SIZES = ("automatic", "picture")
OFFERED_SIZES = (*SIDE_SIZES, "512", "640", "768")  # other numbers of pixels can be typed
# The forms of lib_delta.bridges; pictures of versions that knew no other were made with the last.
BRIDGES = ("stitched", "learned", "taesd", "published", "same_snr")
# The plans of lib_delta.core.delta_reuse, which needs torch.
QUALITIES = ("exact", "balanced", "fast")
BETWEEN = ("automatic", "held", "linear")
# For each LoRA picked, whether it counts.
Active = tuple[bool, ...]
MAIN_PROMPT = "{prompt}"  # in a prompt of the side model's, where the main one is to stand
_EMPTY = f"empty is the main one, for which {MAIN_PROMPT} stands"
_HASHED = re.compile(r" \[([0-9a-f]{10})?\]$")  # at the end of a checkpoint's name, as WebUIs write hashes
NONE = "None"  # what dropdowns show for an empty choice, for one whose default is empty cannot be pasted into


def _setting(default: Any, key: str, infotext: str, help_text: str, **limits: Any) -> Any:
    return field(default=default, metadata={"key": key, "infotext": infotext, "help": help_text, **limits})


@dataclass(frozen=True)
class Request:
    """One generation's settings.

    In each field's metadata: ``key``, its name for the API; ``infotext``, its name in a picture's
    text; ``help``; and what values are allowed.  The order is that of positional arguments.
    Raises :class:`SettingError` for values that are not allowed, if a delta is wanted: what stands in an
    accordion that is off, or beside a lambda of 0, is nobody's business.
    """

    enabled: bool = _setting(False, "enabled", "", "whether the delta is added")
    strength: float = _setting(
        1.0, "lambda", "Delta lambda", "how strongly the delta is added", minimum=0, maximum=MAX_LAMBDA
    )
    start: float = _setting(0.0, "start", "Delta start", "where in the run it starts", minimum=0, maximum=1)
    end: float = _setting(1.0, "end", "Delta end", "where in the run it ends", minimum=0, maximum=1)
    curve: str = _setting("constant", "curve", "Delta curve", "how lambda changes from start to end", choices=CURVES)
    first: float = _setting(
        1.0, "curve_start", "Delta curve start", "share of lambda at the start of the curve", minimum=0, maximum=1
    )
    last: float = _setting(
        1.0, "curve_end", "Delta curve end", "share of lambda at the end of the curve", minimum=0, maximum=1
    )
    base: str = _setting("", "base", "Delta base", "SD 1.x checkpoint that the adaptations were made for")
    adapted: str = _setting("", "adapted", "Delta adapted", "fine-tuned checkpoint; empty is the base itself")
    loras: str = _setting(
        "", "loras", "Delta LoRAs", "LoRAs with weights and options, as in 'moxin:0.8, lineart:1:te=0.5:lbw=MIDD'"
    )
    prompt: str = _setting("", "prompt", "Delta prompt", f"prompt of the side model; {_EMPTY}")
    negative_prompt: str = _setting(
        "", "negative_prompt", "Delta negative prompt", f"negative prompt of the side model; {_EMPTY}"
    )
    adapted_prompt: str = _setting(
        "",
        "adapted_prompt",
        "Delta adapted prompt",
        f"prompt of the adapted model alone; empty is the base's, for which {MAIN_PROMPT} stands",
    )
    hires: str = _setting(
        "both", "hires", "Delta hires", "in which passes of hires fix the delta is added", choices=HIRES_PASSES
    )
    cfg: float = _setting(
        0.0,
        "cfg",
        "Delta CFG",
        "guidance scale of the side model; 0: the main one's, or 3 beside a model of another family that runs below",
        minimum=0,
        maximum=30,
    )
    size: str = _setting(
        "automatic",
        "size",
        "Delta size",
        "size of the side model: 'automatic', 'picture' (as large), or the side in pixels of a square as large",
        sizes=(64, 4096),
    )
    bridge: str = _setting(
        BRIDGES[0],
        "bridge",
        "Delta bridge",
        "how latents of another kind are carried over: by stitched maps (learned ones for pairs without), by learned "
        "maps, over pictures by the WebUI's TAESD files, or by scale alone in one of two forms",
        choices=BRIDGES,
    )
    quality: str = _setting(
        "exact",
        "quality",
        "Delta quality",
        "how often the side model is asked: exact (always), balanced (every 2nd step), fast (every 4th)",
        choices=QUALITIES,
    )
    every: float = _setting(
        0.0,
        "quality_steps",
        "Delta quality steps",
        "in place of what quality says: how many steps one evaluation of the side model serves; 0: as quality says",
        minimum=0,
        maximum=10,
    )
    between: str = _setting(
        "automatic",
        "quality_between",
        "Delta quality between",
        "what the delta does between evaluations: it is held, or goes on linearly; automatic: as quality says",
        choices=BETWEEN,
    )
    moved: float = _setting(
        0.0,
        "quality_moved",
        "Delta quality moved",
        "the side model is asked, instead, when the main estimate has moved by this share of its size; 0: by steps",
        minimum=0,
        maximum=1,
    )
    units: tuple[Unit, ...] = _setting((), "units", "Delta units", "ControlNets and IP-Adapters with their pictures")

    def __post_init__(self) -> None:
        if self.enabled is False or _is_zero(self.strength):
            return
        for setting in SETTINGS:
            _check(setting.metadata, setting.type, getattr(self, setting.name))
        if 0 < self.every < 1:
            raise SettingError(f"Delta Sampling's 'quality_steps' must be 0 or from 1 to 10, not {self.every:g}")
        for i, unit in enumerate(self.units):
            unit.check(i + 1)
        self.lambda_over_run()
        self.picks()

    @property
    def wanted(self) -> bool:
        """Whether a delta is asked for at all."""
        return self.enabled and self.strength != 0

    def lambda_over_run(self) -> Strength:
        """Return lambda as a function of progress."""
        return Strength(self.strength, self.start, self.end, self.curve, self.first, self.last)  # type: ignore[arg-type]

    def picks(self) -> tuple[Pick, ...]:
        """Return the LoRAs picked."""
        return parse_picks(self.loras)

    def active(self, progress: float) -> Active:
        """Tell which of the LoRAs picked count at a point of the run."""
        return tuple(
            pick.start - PROGRESS_TOLERANCE <= progress <= pick.end + PROGRESS_TOLERANCE for pick in self.picks()
        )

    def stages(self) -> set[Active]:
        """Return the sets of LoRAs that count together at some point of the run."""
        ends = sorted({0.0, 1.0, *(share for pick in self.picks() for share in (pick.start, pick.end))})
        between = [(a + b) / 2 for a, b in itertools.pairwise(ends)]
        return {self.active(progress) for progress in (*ends, *between)}

    @property
    def always_differs(self) -> bool:
        """Whether base and adapted model differ even where no LoRA counts, and no unit."""
        return bool(self.adapted or self.adapted_prompt)

    @property
    def has_units(self) -> bool:
        """Whether any unit counts at some point of the run."""
        return any(unit.has_effect for unit in self.units)

    def differs_at(self, progress: float) -> bool:
        """Tell whether base and adapted model differ at a point of the run."""
        return self.always_differs or any(self.active(progress)) or any(unit.is_active(progress) for unit in self.units)

    @property
    def side_size(self) -> Literal["automatic", "picture"] | int:
        """The size of the side model, as bridges take it."""
        return self.size if self.size in SIDE_SIZES else int(self.size)  # type: ignore[return-value]

    def in_pass(self, hires: bool) -> bool:
        """Tell whether the delta is wanted in the first or in the hires pass."""
        return self.hires == "both" or (self.hires == "hires pass") == hires

    @classmethod
    def from_arguments(cls, arguments: Sequence[Any], **changes: Any) -> Request:
        """Read what a script is called with: one dictionary of named keys, or values in the fields' order.

        Missing ones have their defaults.  Hosts pad API calls with the defaults of the accordion, so
        what follows a dictionary is left out.  ``changes`` are fields to have in place of what was given,
        before anything is checked.
        """
        if arguments and isinstance(arguments[0], Mapping):
            return cls.from_named(arguments[0], **changes)
        if len(arguments) > len(SETTINGS) and (len(arguments) - len(SETTINGS)) % len(UNIT_FIELDS):
            raise SettingError(
                f"Delta Sampling takes {len(SETTINGS)} arguments, and {len(UNIT_FIELDS)} more for each unit:"
                f" {len(arguments)} were given"
            )
        given = {f.name: _plain_value(f.metadata, f.type, value) for f, value in zip(SETTINGS, arguments)}
        return cls(**given | {"units": _units_from_widgets(arguments[len(SETTINGS) :])} | changes)

    @classmethod
    def from_named(cls, named: Mapping[str, Any], **changes: Any) -> Request:
        """Read named keys; a dictionary without "enabled" means that it is."""
        by_key = {f.metadata["key"]: f for f in SETTINGS}
        given: dict[str, Any] = {"enabled": True}
        given |= {f.name: _plain_value(f.metadata, f.type, named[key]) for key, f in by_key.items() if key in named}
        request = cls(**given | changes)
        if request.wanted and "units" in named and "units" not in changes:
            request = replace(request, units=_units_from_api(named["units"]))
        unknown = next((key for key in named if key not in (*by_key, "units")), None)
        if unknown is not None and request.wanted:
            near = difflib.get_close_matches(str(unknown), (*by_key, "units"), 1)
            hint = f": is {near[0]!r} meant?" if near else f", only {', '.join((*by_key, 'units'))}"
            raise SettingError(f"Delta Sampling has no argument {shown(unknown)}{hint}")
        return request

    def with_tags(self, tags: Sequence[Sequence[str]]) -> Request:
        """Apply ``<delta:NAME:lambda>`` tags of a prompt, each given as the texts between its colons.

        Tags switch the delta on.  Their LoRAs join those of an accordion that is on, and replace those of
        the same name: a pasted picture has them in both places.  Lambda is theirs.
        """
        if not tags:
            return self
        read = [_read_tag(tag) for tag in tags]
        lambdas = {strength for _, strength in read if strength is not None}
        if len(lambdas) > 1:
            stated = " and ".join(f"{v:g}" for v in sorted(lambdas))
            raise SettingError(f"<delta:...> tags ask for lambda {stated} in one prompt: give lambda once")
        names = {pick.name for pick, _ in read}
        before = [pick for pick in self.picks() if pick.name not in names] if self.enabled else []
        return replace(
            self,
            enabled=True,
            strength=lambdas.pop() if lambdas else self.strength,
            loras=format_picks([*before, *(pick for pick, _ in read)]),
        )

    def overridden_by(self, other: Request) -> str:
        """Say what ``other``, which came of this by a prompt's tags, has another value of; empty for nothing."""
        weights = {pick.name: pick.weight for pick in self.picks()} if self.wanted else {}
        said = [f"lambda {other.strength:g} (here {self.strength:g})"] if other.strength != self.strength else []
        said += [
            f"weight {pick.weight:g} of {shown(pick.name)} (here {weights[pick.name]:g})"
            for pick in (other.picks() if other.wanted else ())
            if weights.get(pick.name, pick.weight) != pick.weight
        ]
        return " and ".join(said)

    def infotext(self, hashes: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return what a picture that got the delta says: lambda, and whatever is not the default.

        ``hashes`` are short hashes by the names of the side files.
        """
        if not self.enabled:
            return {}
        hashes = hashes or {}
        values: dict[str, str] = {}
        for f in SETTINGS:
            value, label = getattr(self, f.name), f.metadata["infotext"]
            if label and (value != f.default or f.name in ALWAYS_WRITTEN):
                values[label] = written(value) if f.type == "float" else value
        if self.has_units:
            values[_label("units")] = format_units(self.units)
        for label in (_label("base"), _label("adapted")):
            name = values.get(label, "")
            if name in hashes or _HASHED.search(name):  # or else the end of such a name would be taken for its hash
                values[label] = f"{name} [{hashes.get(name, '')}]"
        values = {label: _escaped(value) for label, value in values.items()}
        lora_hashes = [f"{pick.name}: {hashes[pick.name]}" for pick in self.picks() if pick.name in hashes]
        if lora_hashes:
            values[LORA_HASHES] = ", ".join(lora_hashes)
        return values


# The settings of widgets of their own; each unit has some more.
SETTINGS = tuple(f for f in fields(Request) if f.name != "units")
CHECKPOINT_FIELDS = ("base", "adapted")
LIMITS = {f.name: (f.metadata["minimum"], f.metadata["maximum"]) for f in SETTINGS if "minimum" in f.metadata}
LORA_HASHES = "Delta LoRA hashes"
NOT_APPLIED = "Delta not applied"
# The bridge too, for its default was another in pictures that are silent about it.
ALWAYS_WRITTEN = ("strength", "bridge")


def _escaped(text: str) -> str:
    """Write a text so that the WebUI's parser gives it back, which takes quotes off and blanks away.

    Texts with commas, colons and line ends are quoted by the WebUI itself.
    """
    if re.search("[,:\n]", text):
        return text
    return json.dumps(text, ensure_ascii=False) if text != text.strip() or re.fullmatch('".*"', text) else text


def _label(name: str) -> str:
    return str(next(f.metadata["infotext"] for f in fields(Request) if f.name == name))


def infotext_labels() -> dict[str, str]:
    """Return the labels of the settings in a picture's text, by the names of the fields."""
    return {f.name: f.metadata["infotext"] for f in fields(Request) if f.metadata["infotext"]}


def from_infotext(values: Mapping[str, str], name: str) -> Any:
    """Return one field's value as the text of a picture gives it: its default where the text is silent.

    ``enabled`` is true exactly for a picture that got a delta.  A checkpoint's hash is left out, as
    names find it.
    """
    setting = next(f for f in fields(Request) if f.name == name)
    if name == "enabled":
        return _label("strength") in values
    label = setting.metadata["infotext"]
    text = values.get(label)
    if f"{label}-1" in values and f"{label}-2" in values:  # the WebUI has taken it for a picture's size
        text = f"{values[f'{label}-1']}x{values[f'{label}-2']}"
    if text is None:
        return BRIDGES[-1] if name == "bridge" else setting.default
    if name == "units":
        return _units_from_infotext(text)
    if setting.type == "float":
        try:
            number = float(text)
        except ValueError:
            return setting.default
        return number if math.isfinite(number) else setting.default
    return _HASHED.sub("", text) if name in CHECKPOINT_FIELDS else text


def _read_tag(tag: Sequence[str]) -> tuple[Pick, float | None]:
    """Split ``<delta:NAME:lambda:weight=0.8:te=0.5>`` into what it picks and lambda."""
    named = [part for part in tag[1:] if "=" in part]
    plain = [part for part in tag[1:] if "=" not in part]
    written_tag = shortened("<delta:" + ":".join(tag) + ">")
    if not tag or not tag[0].strip() or len(plain) > 1:
        raise SettingError(f"{written_tag} cannot be read: <delta:NAME:lambda> is needed")
    pick = parse_pick([tag[0], *(re.sub(r"^\s*weight=", "unet=", part) for part in named)])
    return pick, read_number(plain[0], f"{written_tag} has lambda") if plain else None


def _plain_value(about: Mapping[str, Any], kind: Any, value: Any) -> Any:
    """Turn what widgets and JSON give into a field's own type, where nothing is lost."""
    if kind == "str":
        if value is None or (value == NONE and about["key"] in ("base", "adapted", "loras")):
            return ""
        if about["key"] == "loras" and isinstance(value, list) and all(isinstance(v, str) for v in value):
            return _joined_picks(value)
        if about["key"] == "size" and isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _units_from_widgets(values: Sequence[Any]) -> tuple[Unit, ...]:
    """Read the units' widgets, one unit's after another's; those after the last that is on are left out."""
    size = len(UNIT_FIELDS)
    rows = [values[i : i + size] for i in range(0, len(values), size)]
    units = [Unit(**{name: plain_of_unit(name, value) for name, value in zip(UNIT_FIELDS, row)}) for row in rows]
    while units and not units[-1].enabled:
        units.pop()
    return tuple(units)


def _units_from_api(given: Any) -> tuple[Unit, ...]:
    """Read what an API call has for units: a line of recipes, or a list of recipes and dictionaries."""
    if isinstance(given, str):
        return parse_units(given)
    if not isinstance(given, (list, tuple)):
        raise SettingError(f"Delta Sampling's 'units' must be a list of dictionaries and recipes, not {shown(given)}")
    return tuple(read_unit(unit, i + 1) for i, unit in enumerate(given))


def _units_from_infotext(text: str) -> tuple[Unit, ...]:
    try:
        return parse_units(text)
    except SettingError:  # of a text that somebody has changed
        return ()


def _joined_picks(picks: Sequence[str]) -> str:
    try:
        return format_picks([parse_single(text) for text in picks])
    except SettingError:
        return ", ".join(picks)  # what is wrong with it is said if it is wanted


def _is_zero(strength: Any) -> bool:
    return isinstance(strength, (int, float)) and not isinstance(strength, bool) and strength == 0


def _check(about: Mapping[str, Any], kind: Any, value: Any) -> None:
    needed = {"bool": "true or false", "float": "a number", "str": "a text"}[kind]
    if "minimum" in about:
        needed = f"a number from {about['minimum']:g} to {about['maximum']:g}"
    if "sizes" in about:
        low, high = about["sizes"]
        needed = f"{', '.join(SIDE_SIZES)} or a whole number of pixels from {low} to {high}"
    if "choices" in about:
        needed = "one of " + ", ".join(about["choices"])
    types: dict[str, tuple[type, ...]] = {"bool": (bool,), "float": (int, float), "str": (str,)}
    good = isinstance(value, types[kind])
    good = good and not (kind == "float" and isinstance(value, bool))
    if good and "minimum" in about:
        good = about["minimum"] <= value <= about["maximum"]
    if good and "sizes" in about:
        good = value in SIDE_SIZES or (value.isdecimal() and about["sizes"][0] <= int(value) <= about["sizes"][1])
    if good and "choices" in about:
        good = value in about["choices"]
    if not good:
        given = shortened(json.dumps(value, default=str))
        raise SettingError(f"Delta Sampling's {about['key']!r} must be {needed}, not {given}")
