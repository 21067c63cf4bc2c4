"""The field table: everything that the API, the accordion, infotext and the XYZ plot know of each setting.

:class:`RequestFields` and :class:`UnitFields` declare each setting once, with its :class:`Field`.  The order is that
of positional arguments and of the accordion's inputs.  To add a setting, append its declaration; the schema, the
checks, infotext and tooltips follow.  Nothing here imports torch.
"""

# ruff: noqa: RUF009  `declare` returns dataclasses.field

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib_delta.core.strength import MAX_LAMBDA, Curve
from lib_delta.errors import shortened
from lib_delta.request.setting_choices import (
    BETWEEN,
    BRIDGES,
    CURVES,
    HIRES_PASSES,
    MAIN_PROMPT,
    MODES,
    NONE,
    QUALITIES,
    RESIZES,
    SIDE_SIZES,
    WEIGHT_TYPES,
    BetweenChoice,
    BridgeChoice,
    HiresChoice,
    ModeChoice,
    QualityChoice,
    ResizeChoice,
    WeightTypeChoice,
)

PREPROCESSOR_DEFAULT = -1  # requests the preprocessor's default, as in ControlNet's API
_EMPTY_MEANS_MAIN = f"empty is the main one, for which {MAIN_PROMPT} stands"


@dataclass(frozen=True)
class Axis:
    """An axis of the XYZ plot.

    ``cost`` tells the plot what a change takes: it changes the dearest axis least often.  The WebUI's checkpoint axis
    has cost 1.
    """

    label: str
    cost: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Field:
    """One setting.

    ``key`` is its name in API calls, ``infotext`` its label in a picture's text (empty: not written), ``help`` its
    description in the schema.  ``label``, ``placeholder``, ``tooltip`` and ``step`` belong to its widget, ``axis`` to
    the XYZ plot.  ``minimum`` and ``maximum`` limit a number, ``unset`` is a number outside them that is allowed
    too, and ``unset_means`` says what it does.  A text with ``choices`` and limits is a choice or a whole number within
    the limits.  ``noun`` names any allowed text in errors.  With ``reads_none`` :data:`NONE` is read as empty.
    ``recipe`` is the option's name in a unit's recipe.  ``name`` and ``default`` come from the declaration.
    """

    name: str = ""
    default: Any = None
    key: str = ""
    infotext: str = ""
    help: str = ""
    label: str = ""
    placeholder: str = ""
    tooltip: str = ""
    minimum: float | None = None
    maximum: float | None = None
    unset: float | None = None
    unset_means: str = ""
    step: float | None = None
    choices: tuple[str, ...] = ()
    noun: str = "a text"
    reads_none: bool = False
    recipe: str = ""
    axis: Axis | None = None

    @property
    def value_type(self) -> type:
        """The type of its values, which is its default's."""
        return type(self.default)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of a number."""
        return -math.inf if self.minimum is None else self.minimum, math.inf if self.maximum is None else self.maximum

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers."""
        return self.value_type in (int, float)

    @property
    def allowed(self) -> str:
        """The allowed values in words, for errors."""
        low, high = self.limits
        if self.is_number:
            text = f"a number from {low:g}" + (" on" if math.isinf(high) else f" to {high:g}")
            return text if self.unset is None else f"{text}, or {self.unset:g} for {self.unset_means},"
        if self.value_type is bool:
            return "true or false"
        if self.choices and self.minimum is not None:
            return f"{', '.join(self.choices)} or a whole number of pixels from {low:g} to {high:g}"
        return "one of " + ", ".join(self.choices) if self.choices else self.noun

    def allows(self, value: Any) -> bool:
        """Return whether a value is allowed."""
        if self.is_number:
            return self._allows_number(value)
        if not isinstance(value, self.value_type):
            return False
        return not self.choices or value in self.choices or self._allows_pixels(str(value))

    def _allows_number(self, value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        low, high = self.limits
        return low <= value <= high or value == self.unset

    def _allows_pixels(self, text: str) -> bool:
        low, high = self.limits
        return self.minimum is not None and text.isdecimal() and low <= int(text) <= high

    def plain(self, value: Any) -> Any:
        """Return a value of a widget or of JSON in the field's type, if that loses nothing, or else as it is."""
        if value is None and self.value_type is str:
            return ""
        if self.reads_none and value == NONE:
            return ""
        if self.value_type is float and type(value) is int:
            return float(value)
        if self.value_type is int and isinstance(value, float) and value.is_integer():
            return int(value)
        return value


def as_json(value: Any) -> str:
    """Return a wrong value as errors quote it."""
    return shortened(json.dumps(value, default=str))


def declare(default: Any, about: Field, *, compare: bool = True) -> Any:
    """Declare a dataclass field with its entry of the table; without ``compare``, ``==`` and ``repr`` ignore it."""
    return dataclasses.field(default=default, metadata={"field": about}, compare=compare, repr=compare)


def table_of(declarations: type) -> dict[str, Field]:
    """Return the entries of a dataclass of declarations by their names."""
    return {
        f.name: dataclasses.replace(f.metadata["field"], name=f.name, default=f.default, key=_key(f))
        for f in dataclasses.fields(declarations)
    }


def _key(declared: dataclasses.Field[Any]) -> str:
    return declared.metadata["field"].key or declared.name


@dataclass(frozen=True)
class RequestFields:
    """The settings of one generation, but for its units."""

    enabled: bool = declare(False, Field(help="whether the delta is added"))
    strength: float = declare(
        1.0,
        Field(
            key="lambda",
            infotext="Delta lambda",
            help="how strongly the delta is added",
            label="Lambda",
            tooltip="How strongly the delta is added at each step. 0 adds nothing, 1 adds the difference unchanged; "
            "up to 10 can be typed.",
            minimum=0,
            maximum=MAX_LAMBDA,
            step=0.05,
            axis=Axis("Lambda"),
        ),
    )
    start: float = declare(
        0.0,
        Field(
            infotext="Delta start",
            help="where in the run it starts",
            label="Start",
            tooltip="Where in the run the delta starts: 0 is the first step.",
            minimum=0,
            maximum=1,
            step=0.01,
            axis=Axis("Start"),
        ),
    )
    end: float = declare(
        1.0,
        Field(
            infotext="Delta end",
            help="where in the run it ends",
            label="End",
            tooltip="Where in the run the delta ends: 1 is the last step.",
            minimum=0,
            maximum=1,
            step=0.01,
            axis=Axis("End"),
        ),
    )
    curve: Curve = declare(
        CURVES[0],
        Field(
            infotext="Delta curve",
            help="how lambda changes from start to end",
            label="Curve",
            tooltip="How lambda changes from start to end. The constant curve ignores curve start and curve end.",
            choices=CURVES,
            axis=Axis("Curve"),
        ),
    )
    first: float = declare(
        1.0,
        Field(
            key="curve_start",
            infotext="Delta curve start",
            help="share of lambda at the start of the curve",
            label="Curve start",
            tooltip="Share of lambda at the start of the range.",
            minimum=0,
            maximum=1,
            step=0.01,
        ),
    )
    last: float = declare(
        1.0,
        Field(
            key="curve_end",
            infotext="Delta curve end",
            help="share of lambda at the end of the curve",
            label="Curve end",
            tooltip="Share of lambda at the end of the range.",
            minimum=0,
            maximum=1,
            step=0.01,
        ),
    )
    base: str = declare(
        "",
        Field(
            reads_none=True,
            infotext="Delta base",
            help="checkpoint that the adaptations were made for: SD 1.x, SD 2.x or SDXL",
            label="Base checkpoint",
            tooltip="The SD 1.x, SD 2.x or SDXL checkpoint that the LoRAs and the adapted checkpoint were made for. "
            "None: the default of the settings page.",
            axis=Axis("Base", cost=0.9),
        ),
    )
    adapted: str = declare(
        "",
        Field(
            reads_none=True,
            infotext="Delta adapted",
            help="fine-tuned checkpoint; empty is the base itself",
            label="Adapted (None: same as base)",
            tooltip="A fine-tuned checkpoint whose difference from the base is added. "
            "None: only the LoRAs change the base.",
            axis=Axis("Adapted", cost=0.8),
        ),
    )
    loras: str = declare(
        "",
        Field(
            reads_none=True,
            infotext="Delta LoRAs",
            help="LoRAs with weights and options, as in 'moxin:0.8, lineart:1:te=0.5:lbw=MIDD'",
            label="LoRAs",
            placeholder="name:weight, name:weight:te=0.5",
            tooltip="LoRAs or LyCORIS networks with their weights, as in: moxin:0.8, lineart:1:te=0.5 "
            "(te: weight for the text encoder). Tags such as <lora:moxin:0.8> work too.",
            axis=Axis("LoRAs", cost=0.6),
        ),
    )
    prompt: str = declare(
        "",
        Field(
            infotext="Delta prompt",
            help=f"prompt of the side model; {_EMPTY_MEANS_MAIN}",
            label="Prompt of the side model",
            placeholder=f"empty: the main prompt; {MAIN_PROMPT} stands for it",
            tooltip="The side model's prompt. Empty: the main prompt without its extra-network tags, "
            f"for which {MAIN_PROMPT} stands.",
        ),
    )
    negative_prompt: str = declare(
        "",
        Field(
            infotext="Delta negative prompt",
            help=f"negative prompt of the side model; {_EMPTY_MEANS_MAIN}",
            label="Negative prompt of the side model",
            placeholder=f"empty: the main one; {MAIN_PROMPT} stands for it",
            tooltip="The side model's negative prompt. Empty: the main negative prompt, "
            f"for which {MAIN_PROMPT} stands.",
        ),
    )
    adapted_prompt: str = declare(
        "",
        Field(
            infotext="Delta adapted prompt",
            help=f"prompt for only the adapted model; empty is the base's, for which {MAIN_PROMPT} stands",
            label="Prompt of the adapted model alone",
            placeholder=f"empty: the base's; {MAIN_PROMPT} stands for it",
            tooltip="A prompt for only the adapted model: the difference between two prompts can be the delta, too.",
        ),
    )
    hires: HiresChoice = declare(
        HIRES_PASSES[0],
        Field(
            infotext="Delta hires",
            help="in which passes of hires fix the delta is added",
            label="With hires fix, in",
            tooltip="In which passes of hires fix the delta is added.",
            choices=HIRES_PASSES,
        ),
    )
    cfg: float = declare(
        0.0,
        Field(
            infotext="Delta CFG",
            help="guidance scale of the side model; "
            "0: the main one's, or 3 if that is less and the main model is of another family",
            label="Side model CFG (0: automatic)",
            tooltip="The guidance scale of the side model. 0: that of the main model, but at least 3 if the main model "
            "is of another family.",
            minimum=0,
            maximum=30,
            step=0.5,
            axis=Axis("CFG"),
        ),
    )
    size: str = declare(
        SIDE_SIZES[0],
        Field(
            infotext="Delta size",
            help="size of the side model: 'automatic', 'picture' (as large), "
            "or the side in pixels of a square as large",
            label="Size of the side model",
            tooltip="The size at which the side model sees the picture. Automatic: the size that it was made for; "
            "picture: the picture's; a number: the side in pixels of a square of the same area.",
            minimum=64,
            maximum=4096,
            choices=SIDE_SIZES,
            axis=Axis("Size"),
        ),
    )
    bridge: BridgeChoice = declare(
        BRIDGES[0],
        Field(
            infotext="Delta bridge",
            help="how latents of another kind are carried over: by stitched maps, by linear (learned) ones, over "
            "pictures by the WebUI's TAESD files, or only by scale in one of two forms",
            label="Bridge to other latents",
            tooltip="How the delta gets into the latents of SDXL, SD 3 or Flux. Stitched is the best; learned restores "
            "older pictures; taesd needs the WebUI's TAESD files; the last two only scale.",
            choices=BRIDGES,
            axis=Axis("Bridge"),
        ),
    )
    quality: QualityChoice = declare(
        QUALITIES[0],
        Field(
            infotext="Delta quality",
            help="how often the side model is evaluated: exact (always), balanced (every 2nd step), fast (every 4th)",
            label="Quality",
            tooltip="How often the side model is evaluated: exact (every step), balanced (every 2nd), fast (every "
            "4th). The steps in between reuse its delta.",
            choices=QUALITIES,
            axis=Axis("Quality"),
        ),
    )
    every: float = declare(
        0.0,
        Field(
            key="quality_steps",
            infotext="Delta quality steps",
            help="for how many steps one evaluation of the side model is used, instead of what quality says; "
            "0: as quality says",
            label="Every so many steps (0: as Quality says)",
            tooltip="Evaluate the side model once in this many steps, instead of what Quality says.",
            minimum=0,
            maximum=10,
            step=1,
            axis=Axis("Quality steps"),
        ),
    )
    between: BetweenChoice = declare(
        BETWEEN[0],
        Field(
            key="quality_between",
            infotext="Delta quality between",
            help="the delta between evaluations: held, or extrapolated linearly; automatic: as quality says",
            label="In between",
            tooltip="The delta between evaluations: the last one held, or continued in a line through the last two.",
            choices=BETWEEN,
        ),
    )
    moved: float = declare(
        0.0,
        Field(
            key="quality_moved",
            infotext="Delta quality moved",
            help="evaluate the side model when the main estimate has moved by this share of its size, instead of "
            "after a number of steps; 0: by steps",
            label="Or when the main estimate has moved by (0: by steps)",
            tooltip="Evaluate the side model again when the picture has changed by this share since the last time.",
            minimum=0,
            maximum=1,
            step=0.05,
            axis=Axis("Quality moved"),
        ),
    )


# Request's last field: its widgets are those of each unit.
UNITS = Field(
    name="units",
    default=(),
    key="units",
    infotext="Delta units",
    help="ControlNets and IP-Adapters with their pictures",
)


@dataclass(frozen=True)
class UnitFields:
    """The settings of one unit.  Their labels go on with "of unit 1" and so on."""

    enabled: bool = declare(False, Field(label="Enable"))
    image: Any = declare(
        None,
        Field(
            help="base64 or a path on this machine; absent: img2img's own picture",
            label="Picture",
            tooltip="The model's input: a map, a picture that a preprocessor turns into one, or a picture for an "
            "IP-Adapter. Empty in img2img: img2img's picture.",
        ),
        compare=False,
    )
    model: str = declare(
        "",
        Field(
            reads_none=True,
            label="ControlNet or IP-Adapter",
            tooltip="A ControlNet, Control-LoRA, T2I-Adapter or IP-Adapter made for the base checkpoint's family.",
            noun="a name",
            axis=Axis("Unit model", cost=0.5),
        ),
    )
    preprocessor: str = declare(
        "",
        Field(
            reads_none=True,
            label="Preprocessor",
            tooltip="Makes the map. None: the picture is a map already, or is for an IP-Adapter.",
            noun="a name",
        ),
    )
    weight: float = declare(
        1.0,
        Field(
            label="Weight",
            tooltip="How strongly the model steers. 0 adds nothing.",
            minimum=0,
            maximum=2,
            step=0.01,
            axis=Axis("Unit weight"),
        ),
    )
    start: float = declare(
        0.0,
        Field(
            recipe="start",
            label="Start",
            tooltip="Where in the run the unit becomes active: 0 is the first step.",
            minimum=0,
            maximum=1,
            step=0.01,
            axis=Axis("Unit start"),
        ),
    )
    end: float = declare(
        1.0,
        Field(
            recipe="end",
            label="End",
            tooltip="Where in the run the unit stops being active: 1 is the last step.",
            minimum=0,
            maximum=1,
            step=0.01,
            axis=Axis("Unit end"),
        ),
    )
    mode: ModeChoice = declare(
        MODES[0],
        Field(
            recipe="mode",
            label="Control mode",
            tooltip="Which matters more. Both prompt and control weaken each layer a little; control also leaves the "
            "negative prompt uncontrolled, which strengthens the unit.",
            choices=MODES,
        ),
    )
    resize: ResizeChoice = declare(
        RESIZES[1],
        Field(
            recipe="resize",
            label="Resize mode",
            tooltip="How a map is fitted whose proportions differ from the picture's.",
            choices=RESIZES,
        ),
    )
    pixel_perfect: bool = declare(
        False,
        Field(
            recipe="perfect",
            label="Pixel perfect map",
            tooltip="Make the map at the side model's size, and again for the hires pass.",
        ),
    )
    resolution: int = declare(
        PREPROCESSOR_DEFAULT,
        Field(
            recipe="res",
            label="Resolution of the map",
            tooltip="The shorter side of the map, in pixels.",
            minimum=64,
            maximum=4096,
            unset=PREPROCESSOR_DEFAULT,
            unset_means="the preprocessor's default",
        ),
    )
    threshold_a: float = declare(
        float(PREPROCESSOR_DEFAULT),
        Field(
            recipe="a",
            label="Threshold A of the map",
            tooltip="The preprocessor's first number; canny drops edges below it.",
            minimum=0,
            unset=PREPROCESSOR_DEFAULT,
            unset_means="the preprocessor's default",
        ),
    )
    threshold_b: float = declare(
        float(PREPROCESSOR_DEFAULT),
        Field(
            recipe="b",
            label="Threshold B of the map",
            tooltip="The preprocessor's second number; canny always keeps edges above it.",
            minimum=0,
            unset=PREPROCESSOR_DEFAULT,
            unset_means="the preprocessor's default",
        ),
    )
    weight_type: WeightTypeChoice = declare(
        WEIGHT_TYPES[0],
        Field(
            recipe="type",
            label="IP-Adapter's weight type",
            tooltip="How an IP-Adapter's weight is spread over the layers of the model.",
            choices=WEIGHT_TYPES,
        ),
    )
    images: Any = declare(
        (),
        Field(
            help="more of them: an image prompt's are seen together, maps go by image",
            label="More pictures",
            tooltip="An IP-Adapter sees them together with the first; maps go to the images of a batch, one by one.",
        ),
        compare=False,
    )


REQUEST_FIELDS: Mapping[str, Field] = table_of(RequestFields)
UNIT_FIELDS: Mapping[str, Field] = table_of(UnitFields)
SETTINGS = tuple(REQUEST_FIELDS.values())
CHECKPOINT_FIELDS = ("base", "adapted")
RECIPE_FIELDS = tuple(name for name in UNIT_FIELDS if name not in ("image", "images"))  # all that a recipe states
