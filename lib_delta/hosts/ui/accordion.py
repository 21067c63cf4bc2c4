"""The accordion: the widgets of all settings, and what connects them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

import gradio as gr
from modules.ui_components import FormRow, InputAccordion

from lib_delta.core.strength import CURVES
from lib_delta.hosts import host
from lib_delta.hosts.ui.checkpoint_choices import base_choices, whole_list
from lib_delta.hosts.ui.lora_box import LoraBox
from lib_delta.hosts.ui.preset_row import PresetRow, unfolded
from lib_delta.hosts.ui.unit_box import UnitBox
from lib_delta.hosts.ui.unit_box import unfold as unfold_units
from lib_delta.hosts.ui.widgets import HIDDEN, QUIET, ROW, refresh_button
from lib_delta.page.lambda_curve import draw_lambda
from lib_delta.request.request import (
    BETWEEN,
    BRIDGES,
    CHECKPOINT_FIELDS,
    HIRES_PASSES,
    LIMITS,
    NONE,
    OFFERED_SIZES,
    QUALITIES,
    SETTINGS,
    Request,
    from_infotext,
)

TITLE = "Delta Sampling"
PROMPTS = ("prompt", "negative_prompt", "adapted_prompt")
CURVE_FIELDS = ("strength", "start", "end", "curve", "first", "last")

HELP = """<details class="delta-sampling-help"><summary>How to start</summary><ol>
<li>Choose a <b>base checkpoint</b>: the SD 1.x model that your LoRA was made for.</li>
<li>Add a <b>LoRA</b>, or choose a fine-tuned checkpoint as <b>adapted</b>, or both.</li>
<li>Generate with any main checkpoint. <b>Lambda</b> is how much of the effect is added: start at 1.</li></ol>
<p>In a prompt, <code>&lt;delta:NAME:lambda&gt;</code> does the same. A LoRA can have more than a weight:
<code>name:0.8:te=0.5</code> (text encoder), <code>lbw=MIDD</code> (blocks, or 12, 17, 26 numbers),
<code>start=0.2:end=0.8</code> (part of the run).</p></details>"""


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
RESTORE = {f.name: partial(restore, f.name) for f in SETTINGS}


class Accordion:
    """The accordion of one tab.

    ``widgets`` has the widget of each field of :class:`Request` but the units, which ``units`` has.
    """

    def __init__(self, elem_id: Callable[[str], str], is_img2img: bool) -> None:
        """Make the widgets; ``elem_id`` returns the id of an element of the tab for a name."""
        self.elem_id, self.default = elem_id, Request()
        self.widgets: dict[str, Any] = {}
        accordion = InputAccordion(False, label=TITLE, elem_id=elem_id("enabled"))
        inside = gr.Column(elem_classes=["delta-sampling"], elem_id=elem_id("settings"))
        with accordion as self.widgets["enabled"], inside:
            gr.HTML(HELP)
            self._make_checkpoints()
            self.lora_box = LoraBox(elem_id, self.default.loras)
            self.widgets["loras"] = self.lora_box.loras
            self.units = UnitBox(elem_id, is_img2img)
            # The page's script ends the slider at 5; larger values can be typed.
            self._slider("strength", "Lambda", 0.05)
            self._make_range()
            self._make_prompts()
            self._radio("quality", "Quality", QUALITIES)
            self._make_quality_details()
            self._radio("hires", "With hires fix, in", HIRES_PASSES, visible=not is_img2img)
            self._make_side_model()
            self.presets = PresetRow(elem_id)
            self._make_status()
        self._connect()

    @property
    def inputs(self) -> list[Any]:
        """The widgets of all settings, in the order of positional arguments: Request's fields, then the units'."""
        return [*(self.widgets[f.name] for f in SETTINGS), *self.units.inputs]

    @property
    def restored(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The widgets that infotext restores, each with the function that reads its value."""
        return [*((self.widgets[name], read) for name, read in RESTORE.items()), *self.units.infotext_fields]

    @property
    def unfolded(self) -> list[tuple[Any, Callable[..., Any]]]:
        """The inner accordions, each with the function that unfolds it if infotext fills it."""
        return [(self.prompts, unfold_prompts), (self.units.accordion, unfold_units)]

    def _make_checkpoints(self) -> None:
        labels = {"base": "Base checkpoint (SD 1.x)", "adapted": "Adapted (None: same as base)"}
        with gr.Row(**ROW):
            for name, label in labels.items():
                with gr.Column(min_width=240), FormRow():
                    dropdown = self.widgets[name] = gr.Dropdown(
                        label=label,
                        choices=base_choices(),
                        value=NONE,
                        allow_custom_value=True,  # without it, a pasted name that is not in the list shows as nothing
                        elem_id=self.elem_id(name),
                    )
                    refresh_id = self.elem_id(f"refresh_{name}")
                    refresh_button(dropdown, host().catalog.refresh_checkpoints, base_choices, refresh_id)
                    dropdown.select(whole_list, inputs=[dropdown], outputs=[dropdown], **QUIET)

    def _make_range(self) -> None:
        with gr.Row(**ROW):
            with gr.Column(min_width=240):
                self._slider("start", "Start", 0.01)
                self._slider("end", "End", 0.01)
            with gr.Column(min_width=240):
                values = [getattr(self.default, name) for name in CURVE_FIELDS]
                self.drawing = gr.HTML(
                    draw_lambda(*values), elem_id=self.elem_id("drawing"), elem_classes=["delta-sampling-drawing"]
                )
                # The page's script clicks it if a late answer has left an older drawing.
                self.redraw = gr.Button("Draw lambda anew", elem_id=self.elem_id("redraw"), **HIDDEN)
        with gr.Row(**ROW):
            self._dropdown("curve", "Curve", CURVES)
            with gr.Column(scale=2, min_width=340), gr.Row(**ROW):
                self._slider("first", "Curve start", 0.01)
                self._slider("last", "Curve end", 0.01)

    def _make_prompts(self) -> None:
        texts = {
            "prompt": ("Prompt of the side model", "empty: the main prompt; {prompt} stands for it"),
            "negative_prompt": ("Negative prompt of the side model", "empty: the main one; {prompt} stands for it"),
            "adapted_prompt": ("Prompt of the adapted model alone", "empty: the base's; {prompt} stands for it"),
        }
        self.prompts = gr.Accordion("Prompts of the side model", open=False, elem_id=self.elem_id("prompts"))
        with self.prompts:
            for name, (label, placeholder) in texts.items():
                self.widgets[name] = gr.Textbox(
                    label=label, placeholder=placeholder, lines=1, value="", elem_id=self.elem_id(name)
                )

    def _make_quality_details(self) -> None:
        title = "Advanced: how often the side model is asked"
        with gr.Accordion(title, open=False, elem_id=self.elem_id("details")), gr.Row(**ROW):
            self._slider("every", "Every so many steps (0: as Quality says)", 1, 200)
            self._radio("between", "In between", BETWEEN, min_width=200)
            self._slider("moved", "Or when the main estimate has moved by (0: by steps)", 0.05, 200)

    def _make_side_model(self) -> None:
        with gr.Row(**ROW):
            self._slider("cfg", "Side model CFG (0: automatic)", 0.5, 200)
            self._dropdown("size", "Size of the side model", OFFERED_SIZES, allow_custom_value=True)
            self._dropdown("bridge", "Bridge to other latents", BRIDGES)

    def _make_status(self) -> None:
        self.status = gr.HTML(status_html(), elem_id=self.elem_id("status"), elem_classes=["delta-sampling-status"])
        with gr.Row(elem_classes=["delta-sampling-buttons"]):
            self.refresh_status = gr.Button("Refresh status", size="sm", elem_id=self.elem_id("refresh_status"))
            self.unload = gr.Button("Unload side models", size="sm", elem_id=self.elem_id("unload"))

    def _slider(self, name: str, label: str, step: float, min_width: int = 160) -> None:
        minimum, maximum = LIMITS[name]
        self.widgets[name] = gr.Slider(
            label=label,
            minimum=minimum,
            maximum=maximum,
            step=step,
            value=getattr(self.default, name),
            min_width=min_width,
            elem_id=self.elem_id(name),
        )

    def _radio(self, name: str, label: str, choices: tuple[str, ...], **options: Any) -> None:
        value = getattr(self.default, name)
        self.widgets[name] = gr.Radio(
            label=label, choices=list(choices), value=value, elem_id=self.elem_id(name), **options
        )

    def _dropdown(self, name: str, label: str, choices: tuple[str, ...], **options: Any) -> None:
        self.widgets[name] = gr.Dropdown(
            label=label,
            choices=list(choices),
            value=getattr(self.default, name),
            min_width=130,
            elem_id=self.elem_id(name),
            **options,
        )

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
    """Return the status as HTML, one element a line."""
    lines = [line for line in (first_line, *host().status().splitlines()) if line]
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def unload_html() -> str:
    """Unload the side models, and return how much memory that freed, followed by the status."""
    return status_html(host().unload())
