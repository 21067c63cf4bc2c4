"""The accordion's units: a tab for each, with the picture, its map, and the settings of a ControlNet or IP-Adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow

from lib_delta.errors import DeltaError
from lib_delta.hosts import host
from lib_delta.hosts.settings import units_shown
from lib_delta.hosts.ui.widgets import GRADIO_4, MESSAGE, QUIET, ROW, refresh_button
from lib_delta.request.control_unit import (
    MAX_UNIT_WEIGHT,
    MODES,
    RECIPE_FIELDS,
    RESIZES,
    UNIT_FIELDS,
    WEIGHT_TYPES,
    Unit,
    plain_value,
)
from lib_delta.request.request import NONE, from_infotext

# As it is: of 16 bits and of what is transparent nothing is lost.
PICTURE = {"type": "pil", "image_mode": None, "height": 240}


class UnitBox:
    """The widgets of all units."""

    def __init__(self, elem_id: Callable[[str], str], is_img2img: bool) -> None:
        """Make them; ``elem_id`` completes a name to the id of an element of the tab."""
        self.tabs = []
        title = "ControlNet and IP-Adapter units"
        self.accordion = gr.Accordion(title, open=False, elem_id=elem_id("units"))
        with self.accordion, gr.Tabs(elem_id=elem_id("unit_tabs")):
            for number in range(1, units_shown() + 1):
                with gr.Tab(f"Unit {number}", elem_id=elem_id(f"unit{number}")):
                    self.tabs.append(UnitTab(partial(_id, elem_id, number), number, is_img2img))

    @property
    def inputs(self) -> list[Any]:
        """The widgets that hold a setting, unit by unit, in the order of the fields of Unit."""
        return [tab.widgets[name] for tab in self.tabs for name in UNIT_FIELDS]

    @property
    def infotext_fields(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The widgets that a picture's text fills, each with what reads it."""
        return [(tab.widgets[name], restoring(i, name)) for i, tab in enumerate(self.tabs) for name in RECIPE_FIELDS]


def _id(elem_id: Callable[[str], str], number: int, name: str) -> str:
    return elem_id(f"unit{number}_{name}")


class UnitTab:
    """The widgets of one unit."""

    def __init__(self, elem_id: Callable[[str], str], number: int, is_img2img: bool) -> None:
        self.elem_id, self.of, default = elem_id, f"of unit {number}", Unit()
        self.widgets: dict[str, Any] = {}
        w = self.widgets
        source: dict[str, Any] = {"sources": ["upload", "clipboard"]} if GRADIO_4 else {"source": "upload"}
        with gr.Row(**ROW):
            # Short, for it lies over the widget's buttons.
            label = f"Picture {number}, or img2img's" if is_img2img else f"Picture {self.of}"
            w["image"] = gr.Image(label=label, elem_id=elem_id("image"), **source, **PICTURE)
            made = gr.Image(label=f"Map {self.of}", interactive=False, height=240, elem_id=elem_id("map"))
        w["images"] = gr.File(
            label=f"More pictures {self.of}",
            file_count="multiple",
            file_types=["image"],
            type="binary",  # what gradio 3 gives for a file cannot be copied with the other arguments
            height=140,
            elem_id=elem_id("images"),
        )
        with gr.Row(**ROW):
            w["enabled"] = gr.Checkbox(label=f"Enable unit {number}", value=False, elem_id=elem_id("enabled"))
            self._checkbox("pixel_perfect", "Pixel perfect map", default)
            preview = gr.Button("Preview the map", size="sm", elem_id=elem_id("preview"))
        said = gr.HTML("", elem_id=elem_id("said"), **MESSAGE)
        self._files(default)
        with gr.Row(**ROW):
            self._slider("weight", "Weight", MAX_UNIT_WEIGHT, default)
            self._slider("start", "Start", 1, default)
            self._slider("end", "End", 1, default)
        with gr.Row(**ROW):
            self._choice("mode", "Control mode", MODES, default)
            self._choice("resize", "Resize mode", RESIZES, default)
        with gr.Row(**ROW):
            numbers = {"resolution": "Resolution", "threshold_a": "Threshold A", "threshold_b": "Threshold B"}
            for name, label in numbers.items():
                w[name] = gr.Number(
                    label=f"{label} of the map {self.of} (-1: its own)",
                    value=getattr(default, name),
                    precision=0 if name == "resolution" else None,
                    min_width=120,
                    elem_id=elem_id(name),
                )
            self._choice("weight_type", "IP-Adapter's weight type", WEIGHT_TYPES, default)
        for name in ("image", "images"):
            w[name].upload(_on, inputs=[], outputs=[w["enabled"]], **QUIET)
        inputs = [w[name] for name in UNIT_FIELDS]
        preview.click(partial(shown_map, number), inputs=inputs, outputs=[made, said], show_progress="hidden")

    def _files(self, default: Unit) -> None:
        lists = {"model": ("ControlNet or IP-Adapter", control_choices), "preprocessor": ("Preprocessor", makers)}
        with gr.Row(**ROW):
            for name, (label, choices) in lists.items():
                with gr.Column(min_width=240), FormRow():
                    self.widgets[name] = gr.Dropdown(
                        label=f"{label} {self.of}",
                        choices=choices(),
                        value=NONE,
                        allow_custom_value=True,  # or else a pasted name that is not here shows as nothing
                        elem_id=self.elem_id(name),
                    )
                    refresh_button(
                        self.widgets[name], host().units.files.refresh, choices, self.elem_id(f"refresh_{name}")
                    )

    def _checkbox(self, name: str, label: str, default: Unit) -> None:
        self.widgets[name] = gr.Checkbox(
            label=f"{label} {self.of}", value=getattr(default, name), elem_id=self.elem_id(name)
        )

    def _slider(self, name: str, label: str, maximum: float, default: Unit) -> None:
        self.widgets[name] = gr.Slider(
            label=f"{label} {self.of}",
            minimum=0,
            maximum=maximum,
            step=0.01,
            value=getattr(default, name),
            min_width=160,
            elem_id=self.elem_id(name),
        )

    def _choice(self, name: str, label: str, choices: tuple[str, ...], default: Unit) -> None:
        kind = gr.Dropdown if len(choices) > 3 else gr.Radio
        self.widgets[name] = kind(
            label=f"{label} {self.of}",
            choices=list(choices),
            value=getattr(default, name),
            min_width=200,
            elem_id=self.elem_id(name),
        )


def control_choices() -> list[str]:
    """Return what the lists of models offer."""
    return [NONE, *host().units.files.names()]


def makers() -> list[str]:
    """Return what the lists of preprocessors offer; none is for a picture that is a map already."""
    return [NONE, *host().units.preprocessors()]


def shown_map(number: int, *values: Any) -> tuple[Any, str]:
    """Return the map that a unit's widgets ask for, and what is wrong with them."""
    unit = Unit(**{name: plain_value(name, value) for name, value in zip(UNIT_FIELDS, values)})
    if not unit.pictures:
        return None, "<div>Put a picture in to see its map</div>"
    try:
        return host().units.preview(unit, number), ""
    except DeltaError as error:
        text = str(error)
        return None, f"<div>{escape(text[:1].upper() + text[1:])}</div>"


def unfold(values: Mapping[str, str]) -> Any:
    """Return the update that unfolds the units, if a picture's text has any."""
    return gr.update(open=True) if from_infotext(values, "units") else gr.update()


def _on() -> bool:
    return True


@cache
def restoring(place: int, name: str) -> Callable[[Mapping[str, str]], Any]:
    """Return what reads a unit's field from a picture's text: always the same function, by which "Send to" goes."""
    return partial(restored, place, name)


def restored(place: int, name: str, values: Mapping[str, str]) -> Any:
    """Return what a unit's widget is set to from a picture's text; None leaves it.

    A picture with a delta switches units off that it did not have, and keeps what is in them.
    """
    if not from_infotext(values, "enabled"):
        return None
    units = from_infotext(values, "units")
    if name == "enabled" and place == units_shown() - 1 and len(units) > units_shown():
        gr.Warning(f"The picture has {len(units)} units of Delta Sampling, and {units_shown()} are shown: see Settings")
    unit = units[place] if place < len(units) else Unit()
    if name == "enabled":
        return unit.enabled
    if not unit.enabled:
        return None
    value = getattr(unit, name)
    return value or NONE if name in ("model", "preprocessor") else value
