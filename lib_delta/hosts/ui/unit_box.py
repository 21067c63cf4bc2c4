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
from lib_delta.hosts.ui.widgets import GRADIO_4, MESSAGE, QUIET, ROW, ElemId, FieldWidgets
from lib_delta.request.control_unit import Unit, plain_value
from lib_delta.request.fields import RECIPE_FIELDS, UNIT_FIELDS
from lib_delta.request.infotext import from_infotext
from lib_delta.request.setting_choices import NONE

# image_mode None passes the picture unconverted, with 16 bits and transparency.
PICTURE = {"type": "pil", "image_mode": None, "height": 240}


class UnitBox:
    """The widgets of all units."""

    def __init__(self, elem_id: ElemId, is_img2img: bool) -> None:
        self.tabs = []
        title = "ControlNet and IP-Adapter units"
        self.accordion = gr.Accordion(title, open=False, elem_id=elem_id("units"))
        with self.accordion, gr.Tabs(elem_id=elem_id("unit_tabs")):
            for number in range(1, units_shown() + 1):
                with gr.Tab(f"Unit {number}", elem_id=elem_id(f"unit{number}")):
                    self.tabs.append(UnitTab(elem_id, number, is_img2img))

    @property
    def inputs(self) -> list[Any]:
        """The widgets of all settings, unit by unit, in the order of the fields of Unit."""
        return [widget for tab in self.tabs for widget in tab.inputs]

    @property
    def restored(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The widgets that infotext restores, each with the function that reads its value."""
        return [(tab.widgets[name], restoring(i, name)) for i, tab in enumerate(self.tabs) for name in RECIPE_FIELDS]


class UnitTab:
    """The widgets of one unit, by the names of its fields."""

    def __init__(self, elem_id: ElemId, number: int, is_img2img: bool) -> None:
        self.number, self.suffix = number, f" of unit {number}"
        self.elem_id: ElemId = lambda name: elem_id(f"unit{number}_{name}")
        self.make = FieldWidgets(UNIT_FIELDS, self.elem_id, self.suffix)
        self.widgets = self.make.made
        self._make_pictures(is_img2img)
        with gr.Row(**ROW):
            self.make.checkbox("enabled", label=f"Enable unit {number}")
            self.make.checkbox("pixel_perfect")
            self.preview = gr.Button("Preview the map", size="sm", elem_id=self.elem_id("preview"))
        self.message = gr.HTML("", elem_id=self.elem_id("said"), **MESSAGE)
        self._make_files()
        with gr.Row(**ROW):
            for name in ("weight", "start", "end"):
                self.make.slider(name)
        with gr.Row(**ROW):
            self.make.radio("mode", min_width=200)
            self.make.radio("resize", min_width=200)
        with gr.Row(**ROW):
            for name in ("resolution", "threshold_a", "threshold_b"):
                label = f"{UNIT_FIELDS[name].label}{self.suffix} (-1: its own)"
                self.make.number(name, label=label, precision=0 if name == "resolution" else None, min_width=120)
            self.make.dropdown("weight_type", min_width=200)
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        """The widgets in the order of the fields of Unit."""
        return [self.widgets[name] for name in UNIT_FIELDS]

    def _make_pictures(self, is_img2img: bool) -> None:
        source: dict[str, Any] = {"sources": ["upload", "clipboard"]} if GRADIO_4 else {"source": "upload"}
        # Short, since the label covers the widget's buttons.
        label = f"Picture {self.number}, or img2img's" if is_img2img else f"Picture{self.suffix}"
        with gr.Row(**ROW):
            self.widgets["image"] = gr.Image(label=label, elem_id=self.elem_id("image"), **source, **PICTURE)
            self.map = gr.Image(label=f"Map{self.suffix}", interactive=False, height=240, elem_id=self.elem_id("map"))
        self.widgets["images"] = gr.File(
            label=f"More pictures{self.suffix}",
            file_count="multiple",
            file_types=["image"],
            type="binary",  # gradio 3's file objects cannot be copied with the other arguments
            height=140,
            elem_id=self.elem_id("images"),
        )

    def _make_files(self) -> None:
        with gr.Row(**ROW):
            for name, choices in (("model", control_choices), ("preprocessor", preprocessor_choices)):
                with gr.Column(min_width=240), FormRow():
                    self.make.file_list(name, choices, host().units.files.refresh)

    def _connect(self) -> None:
        for name in ("image", "images"):
            self.widgets[name].upload(_on, inputs=[], outputs=[self.widgets["enabled"]], **QUIET)
        preview, outputs = partial(preview_map, self.number), [self.map, self.message]
        self.preview.click(preview, inputs=self.inputs, outputs=outputs, show_progress="hidden")


def control_choices() -> list[str]:
    """Return the choices of the model lists."""
    return [NONE, *host().units.files.names()]


def preprocessor_choices() -> list[str]:
    """Return the choices of the preprocessor lists; a picture that is a map already needs none."""
    return [NONE, *host().units.preprocessors()]


def preview_map(number: int, *values: Any) -> tuple[Any, str]:
    """Return the map of a unit, or None and the reason as HTML; ``values`` are those of its widgets."""
    unit = Unit(**{name: plain_value(name, value) for name, value in zip(UNIT_FIELDS, values)})
    if not unit.pictures:
        return None, "<div>Put a picture in to see its map</div>"
    try:
        return host().units.preview(unit, number), ""
    except DeltaError as error:
        text = str(error)
        return None, f"<div>{escape(text[:1].upper() + text[1:])}</div>"


def unfold(values: Mapping[str, str]) -> Any:
    """Return the update that unfolds the units if a picture's infotext contains any."""
    return gr.update(open=True) if from_infotext(values, "units") else gr.update()


def _on() -> bool:
    return True


@cache
def restoring(index: int, name: str) -> Callable[[Mapping[str, str]], Any]:
    """Return the function that reads a unit's field from infotext.

    Equal arguments return the same function, since "Send to" matches the widgets of two tabs by it.
    """
    return partial(restore, index, name)


def restore(index: int, name: str, values: Mapping[str, str]) -> Any:
    """Return the value of a unit's field in a picture's infotext, or None to leave the widget unchanged.

    A picture with a delta switches off the units that it lacks, and changes nothing else in them.
    """
    if not from_infotext(values, "enabled"):
        return None
    units = from_infotext(values, "units")
    if name == "enabled" and index == units_shown() - 1 and len(units) > units_shown():
        gr.Warning(f"The picture has {len(units)} units of Delta Sampling, and {units_shown()} are shown: see Settings")
    unit = units[index] if index < len(units) else Unit()
    if name == "enabled":
        return unit.enabled
    if not unit.enabled:
        return None
    value = getattr(unit, name)
    return value or NONE if name in ("model", "preprocessor") else value
