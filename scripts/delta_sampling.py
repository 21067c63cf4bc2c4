"""Delta Sampling in the WebUI: the accordion, infotext and API routes.

What it does with them is in ``lib_delta``; which WebUI runs is known to ``lib_delta.hosts`` alone.
"""

from functools import partial
from html import escape
from pathlib import PurePath

import gradio as gr
from modules import script_callbacks, scripts, shared
from modules.ui_components import FormRow, InputAccordion

from lib_delta.core.strength import CURVES
from lib_delta.hosts import host
from lib_delta.hosts.ui.checkpoint_choices import base_choices, whole_list
from lib_delta.hosts.ui.lora_box import LoraBox
from lib_delta.hosts.ui.preset_row import PresetRow, unfolded
from lib_delta.hosts.ui.settings_page import add_settings
from lib_delta.hosts.ui.unit_box import UnitBox
from lib_delta.hosts.ui.unit_box import unfold as unfold_units
from lib_delta.hosts.ui.widgets import refresh_button
from lib_delta.hosts.ui.xyz_axes import add_axes
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
from lib_delta.request.schema import schema

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


def restore(name, values):
    """Return what a field is set to from a picture's text; None leaves it.

    A picture without a delta closes the accordion, and keeps what is in it.
    """
    if name != "enabled" and not from_infotext(values, "enabled"):
        return None
    value = from_infotext(values, name)
    return value or NONE if name in CHECKPOINT_FIELDS else value


def unfold(values):
    """Return the update that unfolds the side model's prompts, if a picture's text has any."""
    return unfolded(Request(**{name: from_infotext(values, name) for name in PROMPTS}))


# "Send to" compares these functions between the tabs, so there is one for each field, made once.
RESTORE = {f.name: partial(restore, f.name) for f in SETTINGS}


class DeltaSampling(scripts.Script):
    """The accordion in both tabs.  Whatever is done in a generation is the host's."""

    def title(self):
        """Return the name that API calls use as well."""
        return TITLE

    def show(self, is_img2img):
        """Show it in both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """Make the widgets, and return those that hold a setting, in the order of the fields of Request."""
        default = Request()
        w = {}
        accordion = InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled"))
        inside = {"elem_classes": ["delta-sampling"], "elem_id": self.elem_id("settings")}
        with accordion as w["enabled"], gr.Column(**inside):
            gr.HTML(HELP)
            self._checkpoints(w)
            box = LoraBox(self.elem_id, default.loras)
            w["loras"] = box.loras
            units = UnitBox(self.elem_id, is_img2img)
            # The script of the page lets the slider end at 5; up to the limit can be typed.
            self._slider(w, default, "strength", "Lambda", 0.05)
            picture, redraw = self._range(w, default)
            prompts = self._prompts(w)
            self._radio(w, default, "quality", "Quality", QUALITIES)
            self._quality_details(w, default)
            self._radio(w, default, "hires", "With hires fix, in", HIRES_PASSES, visible=not is_img2img)
            self._side_model(w, default)
            presets = PresetRow(self.elem_id)
            status, refresh = self._status()
        box.connect(w["prompt"], w["negative_prompt"], prompts)
        presets.connect(w, prompts, units)
        drawn = [w[name] for name in CURVE_FIELDS]
        for event in (*(widget.change for widget in drawn), redraw.click):
            event(draw_lambda, inputs=drawn, outputs=[picture], queue=False, show_progress="hidden")
        for event in (refresh.click, w["enabled"].change):
            event(status_html, inputs=[], outputs=[status], queue=False, show_progress="hidden")
        pasted = [*((w[name], function) for name, function in RESTORE.items()), *units.infotext_fields]
        self.infotext_fields = [*pasted, (prompts, unfold), (units.accordion, unfold_units)]
        self.paste_field_names = [function for _, function in pasted]
        return [*(w[f.name] for f in SETTINGS), *units.inputs]

    def _quality_details(self, w, default):
        shown = gr.Accordion("Advanced: how often the side model is asked", open=False, elem_id=self.elem_id("details"))
        with shown, gr.Row(elem_classes=["delta-sampling-row"]):
            self._slider(w, default, "every", "Every so many steps (0: as Quality says)", 1, 200)
            self._radio(w, default, "between", "In between", BETWEEN, min_width=200)
            self._slider(w, default, "moved", "Or when the main estimate has moved by (0: by steps)", 0.05, 200)

    def _checkpoints(self, w):
        labels = {"base": "Base checkpoint (SD 1.x)", "adapted": "Adapted (None: same as base)"}
        with gr.Row(elem_classes=["delta-sampling-row"]):
            for name, label in labels.items():
                with gr.Column(min_width=240), FormRow():
                    w[name] = gr.Dropdown(
                        label=label,
                        choices=base_choices(),
                        value=NONE,
                        allow_custom_value=True,  # or else a pasted name that is not here shows as nothing
                        elem_id=self.elem_id(name),
                    )
                    again = self.elem_id(f"refresh_{name}")
                    refresh_button(w[name], host().catalog.refresh_checkpoints, base_choices, again)
                    w[name].select(whole_list, inputs=[w[name]], outputs=[w[name]], queue=False, show_progress="hidden")

    def _range(self, w, default):
        with gr.Row(elem_classes=["delta-sampling-row"]):
            with gr.Column(min_width=240):
                self._slider(w, default, "start", "Start", 0.01)
                self._slider(w, default, "end", "End", 0.01)
            with gr.Column(min_width=240):
                values = [getattr(default, name) for name in CURVE_FIELDS]
                picture = gr.HTML(
                    draw_lambda(*values), elem_id=self.elem_id("drawing"), elem_classes=["delta-sampling-drawing"]
                )
                # The script of the page clicks this when an answer that came late has left an older drawing.
                redraw = gr.Button(
                    "Draw lambda anew", elem_id=self.elem_id("redraw"), elem_classes=["delta-sampling-hidden"]
                )
        with gr.Row(elem_classes=["delta-sampling-row"]):
            self._dropdown(w, default, "curve", "Curve", CURVES)
            with gr.Column(scale=2, min_width=340), gr.Row(elem_classes=["delta-sampling-row"]):
                self._slider(w, default, "first", "Curve start", 0.01)
                self._slider(w, default, "last", "Curve end", 0.01)
        return picture, redraw

    def _slider(self, w, default, name, label, step, min_width=160):
        low, high = LIMITS[name]
        w[name] = gr.Slider(
            label=label,
            minimum=low,
            maximum=high,
            step=step,
            value=getattr(default, name),
            min_width=min_width,
            elem_id=self.elem_id(name),
        )

    def _radio(self, w, default, name, label, choices, **given):
        w[name] = gr.Radio(
            label=label, choices=list(choices), value=getattr(default, name), elem_id=self.elem_id(name), **given
        )

    def _dropdown(self, w, default, name, label, choices, **given):
        w[name] = gr.Dropdown(
            label=label,
            choices=list(choices),
            value=getattr(default, name),
            min_width=130,
            elem_id=self.elem_id(name),
            **given,
        )

    def _prompts(self, w):
        texts = {
            "prompt": ("Prompt of the side model", "empty: the main prompt; {prompt} stands for it"),
            "negative_prompt": ("Negative prompt of the side model", "empty: the main one; {prompt} stands for it"),
            "adapted_prompt": ("Prompt of the adapted model alone", "empty: the base's; {prompt} stands for it"),
        }
        prompts = gr.Accordion("Prompts of the side model", open=False, elem_id=self.elem_id("prompts"))
        with prompts:
            for name, (label, placeholder) in texts.items():
                w[name] = gr.Textbox(
                    label=label, placeholder=placeholder, lines=1, value="", elem_id=self.elem_id(name)
                )
        return prompts

    def _side_model(self, w, default):
        with gr.Row(elem_classes=["delta-sampling-row"]):
            self._slider(w, default, "cfg", "Side model CFG (0: automatic)", 0.5, 200)
            self._dropdown(w, default, "size", "Size of the side model", OFFERED_SIZES, allow_custom_value=True)
            self._dropdown(w, default, "bridge", "Bridge to other latents", BRIDGES)

    def _status(self):
        status = gr.HTML(status_html(), elem_id=self.elem_id("status"), elem_classes=["delta-sampling-status"])
        with gr.Row(elem_classes=["delta-sampling-buttons"]):
            refresh = gr.Button("Refresh status", size="sm", elem_id=self.elem_id("refresh_status"))
            unload = gr.Button("Unload side models", size="sm", elem_id=self.elem_id("unload"))
        unload.click(unload_html, inputs=[], outputs=[status], queue=False, show_progress="hidden")
        return status, refresh

    def process(self, p, *arguments):
        """Read the settings; a wrong one is reported through the generation."""
        host().process(p, arguments)

    def process_batch(self, p, *arguments, **about):
        """Make ready for a batch, whose prompts are known now."""
        host().process_batch(p)

    def process_before_every_sampling(self, p, *arguments, **about):
        """Make ready for one pass."""
        host().before_sampling(p)

    def postprocess(self, p, processed, *arguments):
        """Clear up after a generation."""
        host().postprocess(p, processed)


def status_html(before=""):
    """Return the status, a line each."""
    lines = [line for line in (before, *host().status().splitlines()) if line]
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def unload_html():
    """Give the memory back, and return what that did with the status."""
    return status_html(host().unload())


def join_adetailer():
    """Put this script on ADetailer's list of scripts that its passes run, for as long as the WebUI runs."""
    listed_in = shared.opts.data_labels.get("ad_script_names")
    if listed_in is None or not getattr(shared.opts, "delta_sampling_adetailer", True):
        return
    names = str(shared.opts.data.get("ad_script_names", listed_in.default))
    own = PurePath(__file__).stem
    if own not in [name.strip() for name in names.split(",")]:
        shared.opts.data["ad_script_names"] = ",".join(filter(None, (names, own)))


def add_routes(_, app):
    """Serve what API callers may give, and the status, if the WebUI serves its API; behind the same password."""
    add_axes()  # without a user interface nothing else calls it
    join_adetailer()
    own = next((route for route in app.routes if getattr(route, "path", None) == "/sdapi/v1/options"), None)
    if own is not None:
        for path, answer in (("schema", schema), ("status", status)):
            app.add_api_route(f"/delta-sampling/{path}", answer, methods=["GET"], dependencies=own.dependencies)


def status():
    """Return the status for API callers."""
    return {"host": host().name, "status": host().status().splitlines()}


script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(add_axes)
script_callbacks.on_app_started(add_routes)
host().start()
