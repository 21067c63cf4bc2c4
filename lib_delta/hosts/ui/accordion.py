"""The accordion: the widgets of all settings, and the events between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow, InputAccordion

from lib_delta import __version__
from lib_delta.hosts import host
from lib_delta.hosts.settings import units_shown
from lib_delta.hosts.ui.checkpoint_choices import base_choices, whole_list
from lib_delta.hosts.ui.lora_box import LoraBox
from lib_delta.hosts.ui.preset_row import PresetRow, unfolded
from lib_delta.hosts.ui.unit_box import UnitBox
from lib_delta.hosts.ui.unit_box import unfold as unfold_units
from lib_delta.hosts.ui.widgets import HIDDEN, QUIET, ROW, ElemId, FieldWidgets
from lib_delta.page.lambda_curve import draw_lambda
from lib_delta.page.tooltips import accordion_tooltips, unit_tooltips
from lib_delta.request.fields import CHECKPOINT_FIELDS, REQUEST_FIELDS
from lib_delta.request.infotext import from_infotext
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE, OFFERED_SIZES

TITLE = "Delta Sampling"
PROMPTS = ("prompt", "negative_prompt", "adapted_prompt")
CURVE_FIELDS = ("strength", "start", "end", "curve", "first", "last")

HELP = """<details class="delta-sampling-help" data-tooltips="{tooltips}"><summary>How to start</summary><ol>
<li>Choose a <b>base checkpoint</b>: the model (SD 1.x, SD 2.x or SDXL) that your LoRA was made for.</li>
<li>Add a <b>LoRA</b>, or choose a fine-tuned checkpoint as <b>adapted</b>, or both.</li>
<li>Generate with any main checkpoint. <b>Lambda</b> is how much of the effect is added: start at 1.</li></ol>
<p>In a prompt, <code>&lt;delta:NAME:lambda&gt;</code> does the same. A LoRA can have more than a weight:
<code>name:0.8:te=0.5</code> (text encoder), <code>lbw=MIDD</code> (blocks, or 12, 17, 26 numbers),
<code>start=0.2:end=0.8</code> (part of the run).</p></details>"""


def help_html(units: int) -> str:
    """Return the help, which carries the tooltips for the page's script: JSON, by the ends of DOM ids."""
    tooltips = accordion_tooltips()
    for number in range(1, units + 1):
        tooltips |= {f"unit{number}_{name}": text for name, text in unit_tooltips().items()}
    return HELP.replace("{tooltips}", escape(json.dumps(tooltips)))


def restore(name: str, values: Mapping[str, str]) -> Any:
    """Return the value of a field in a picture's infotext, or None to leave the widget unchanged.

    A picture without a delta closes the accordion and changes nothing in it.
    """
    if name != "enabled" and not from_infotext(values, "enabled"):
        return None
    value = from_infotext(values, name)
    return value or NONE if name in CHECKPOINT_FIELDS else value


def unfold_prompts(values: Mapping[str, str]) -> Any:
    """Return the update that unfolds the side model's prompts if a picture's infotext contains any."""
    return unfolded(Request(**{name: from_infotext(values, name) for name in PROMPTS}))


# "Send to" matches the widgets of two tabs by these functions, so each field has one, made once.
RESTORE = {name: partial(restore, name) for name in REQUEST_FIELDS}


class Accordion:
    """The accordion of one tab.

    ``widgets`` has the widgets of all fields of :class:`Request` except ``units``.
    """

    def __init__(self, elem_id: ElemId, is_img2img: bool) -> None:
        self.elem_id = elem_id
        self.make = FieldWidgets(REQUEST_FIELDS, elem_id)
        self.widgets = self.make.made
        accordion = InputAccordion(False, label=TITLE, elem_id=elem_id("enabled"))
        column = {"elem_classes": ["delta-sampling"], "elem_id": elem_id("settings")}
        with accordion as self.widgets["enabled"], gr.Column(**column):
            gr.HTML(help_html(units_shown()))
            self._make_checkpoints()
            self.lora_box = LoraBox(elem_id, self.make)
            self.units = UnitBox(elem_id, is_img2img)
            self.make.slider("strength")  # the page's script ends it at 5; larger values can be typed
            self._make_range()
            self._make_prompts()
            self.make.radio("quality")
            self._make_quality_details()
            self.make.radio("hires", visible=not is_img2img)
            self._make_side_model()
            self.presets = PresetRow(elem_id)
            self._make_status()
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        """The widgets of all settings, in the order of positional arguments: Request's fields, then the units'."""
        return [*(self.widgets[name] for name in REQUEST_FIELDS), *self.units.inputs]

    @property
    def restored(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The widgets that infotext restores, each with the function that reads its value."""
        return [*((self.widgets[name], read) for name, read in RESTORE.items()), *self.units.restored]

    @property
    def unfolded(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The inner accordions, each with the function that unfolds it if infotext fills it."""
        return [(self.prompts, unfold_prompts), (self.units.accordion, unfold_units)]

    def _make_checkpoints(self) -> None:
        with gr.Row(**ROW):
            for name in CHECKPOINT_FIELDS:
                with gr.Column(min_width=240), FormRow():
                    self.make.file_list(name, base_choices, host().catalog.refresh_checkpoints)
                    dropdown = self.widgets[name]
                    dropdown.select(whole_list, inputs=[dropdown], outputs=[dropdown], **QUIET)

    def _make_range(self) -> None:
        with gr.Row(**ROW):
            with gr.Column(min_width=240):
                self.make.slider("start")
                self.make.slider("end")
            with gr.Column(min_width=240):
                values = [REQUEST_FIELDS[name].default for name in CURVE_FIELDS]
                self.drawing = gr.HTML(
                    draw_lambda(*values), elem_id=self.elem_id("drawing"), elem_classes=["delta-sampling-drawing"]
                )
                # The page's script clicks it if a late answer has left an older drawing.
                self.redraw = gr.Button("Draw lambda anew", elem_id=self.elem_id("redraw"), **HIDDEN)
        with gr.Row(**ROW):
            self.make.dropdown("curve", min_width=130)
            with gr.Column(scale=2, min_width=340), gr.Row(**ROW):
                self.make.slider("first")
                self.make.slider("last")

    def _make_prompts(self) -> None:
        self.prompts = gr.Accordion("Prompts of the side model", open=False, elem_id=self.elem_id("prompts"))
        with self.prompts:
            for name in PROMPTS:
                self.make.textbox(name, lines=1)

    def _make_quality_details(self) -> None:
        title = "Advanced: how often the side model is asked"
        with gr.Accordion(title, open=False, elem_id=self.elem_id("details")), gr.Row(**ROW):
            self.make.slider("every", min_width=200)
            self.make.radio("between", min_width=200)
            self.make.slider("moved", min_width=200)

    def _make_side_model(self) -> None:
        with gr.Row(**ROW):
            self.make.slider("cfg", min_width=200)
            self.make.dropdown("size", choices=list(OFFERED_SIZES), allow_custom_value=True, min_width=130)
            self.make.dropdown("bridge", min_width=130)

    def _make_status(self) -> None:
        self.status = gr.HTML(status_html(), elem_id=self.elem_id("status"), elem_classes=["delta-sampling-status"])
        with gr.Row(elem_classes=["delta-sampling-buttons"]):
            self.refresh_status = gr.Button("Refresh status", size="sm", elem_id=self.elem_id("refresh_status"))
            self.unload = gr.Button("Unload side models", size="sm", elem_id=self.elem_id("unload"))

    def _connect(self) -> None:
        self.lora_box.connect(self.widgets["prompt"], self.widgets["negative_prompt"], self.prompts)
        self.presets.connect(self.widgets, self.prompts, self.units)
        curve = [self.widgets[name] for name in CURVE_FIELDS]
        for event in (*(widget.change for widget in curve), self.redraw.click):
            event(draw_lambda, inputs=curve, outputs=[self.drawing], **QUIET)
        self.unload.click(unload_html, inputs=[], outputs=[self.status], **QUIET)
        for event in (self.refresh_status.click, self.widgets["enabled"].change):
            event(status_html, inputs=[], outputs=[self.status], **QUIET)


def status_html(first_line: str = "") -> str:
    """Return the status as HTML, one element a line; the last one is the version."""
    lines = [line for line in (first_line, *host().status().splitlines()) if line]
    lines.append(f"{TITLE} {__version__}")
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def unload_html() -> str:
    """Unload the side models, and return how much memory that freed, followed by the status."""
    return status_html(host().unload())
