"""Delta Sampling in the WebUI: the accordion, its settings page, XYZ axes, infotext and API routes.

What it does with them is in ``lib_delta``; which WebUI runs is known to ``lib_delta.hosts`` alone.
"""

import re
import sys
from functools import partial
from html import escape
from pathlib import PurePath

import gradio as gr
from modules import script_callbacks, scripts, shared
from modules.ui_components import FormRow, InputAccordion

from lib_delta.drawing import drawing
from lib_delta.errors import SettingError, shortened
from lib_delta.hosts import host
from lib_delta.hosts.lora_box import LoraBox, lora_choices, refresh_button
from lib_delta.hosts.preset_row import PresetRow, preset_choices, unfolded
from lib_delta.hosts.settings import MOST_UNITS, UNITS
from lib_delta.hosts.unit_box import UnitBox, control_choices
from lib_delta.hosts.unit_box import unfold as unfold_units
from lib_delta.options import FORMER, FORMS, ON_ERROR, PLACEMENTS, PRECISIONS
from lib_delta.recipe import parse_picks, quoted
from lib_delta.request import (
    BETWEEN,
    BRIDGES,
    HIRES_PASSES,
    NONE,
    QUALITIES,
    SETTINGS,
    SIZES,
    Request,
    from_infotext,
    schema,
)
from lib_delta.strength import CURVES, MAXIMUM
from lib_delta.units import LARGEST_WEIGHT

TITLE = "Delta Sampling"
CHECKPOINT_FIELDS = ("base", "adapted")
ALL = "... show all checkpoints"  # at the end of a list of those that can be a base
LIMITS = {f.name: (f.metadata["minimum"], f.metadata["maximum"]) for f in SETTINGS if "minimum" in f.metadata}
LIMITS |= {"unit_weight": (0, LARGEST_WEIGHT), "unit_start": (0, 1), "unit_end": (0, 1)}
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
            w["strength"] = gr.Slider(
                label="Lambda",
                minimum=0,
                maximum=MAXIMUM,  # of what can be typed: the script of the page lets the slider itself end at 5
                step=0.05,
                value=default.strength,
                elem_id=self.elem_id("strength"),
            )
            picture, redraw = self._range(w, default)
            prompts = self._prompts(w)
            w["quality"] = gr.Radio(
                label="Quality",
                choices=list(QUALITIES),
                value=default.quality,
                elem_id=self.elem_id("quality"),
            )
            self._quality_details(w, default)
            w["hires"] = gr.Radio(
                visible=not is_img2img,
                label="With hires fix, in",
                choices=list(HIRES_PASSES),
                value=default.hires,
                elem_id=self.elem_id("hires"),
            )
            self._side_model(w, default)
            presets = PresetRow(self.elem_id)
            status, refresh = self._status()
        box.connect(w["prompt"], w["negative_prompt"], prompts)
        presets.connect(w, prompts, units)
        drawn = [w[name] for name in CURVE_FIELDS]
        for event in (*(widget.change for widget in drawn), redraw.click):
            event(drawing, inputs=drawn, outputs=[picture], queue=False, show_progress="hidden")
        for event in (refresh.click, w["enabled"].change):
            event(status_html, inputs=[], outputs=[status], queue=False, show_progress="hidden")
        pasted = [*((w[name], function) for name, function in RESTORE.items()), *units.infotext_fields]
        self.infotext_fields = [*pasted, (prompts, unfold), (units.accordion, unfold_units)]
        self.paste_field_names = [function for _, function in pasted]
        return [*(w[f.name] for f in SETTINGS), *units.inputs]

    def _quality_details(self, w, default):
        shown = gr.Accordion("Advanced: how often the side model is asked", open=False, elem_id=self.elem_id("details"))
        with shown, gr.Row(elem_classes=["delta-sampling-row"]):
            w["every"] = gr.Slider(
                label="Every so many steps (0: as Quality says)",
                minimum=LIMITS["every"][0],
                maximum=LIMITS["every"][1],
                step=1,
                value=default.every,
                min_width=200,
                elem_id=self.elem_id("every"),
            )
            w["between"] = gr.Radio(
                label="In between",
                choices=list(BETWEEN),
                value=default.between,
                min_width=200,
                elem_id=self.elem_id("between"),
            )
            w["moved"] = gr.Slider(
                label="Or when the main estimate has moved by (0: by steps)",
                minimum=LIMITS["moved"][0],
                maximum=LIMITS["moved"][1],
                step=0.05,
                value=default.moved,
                min_width=200,
                elem_id=self.elem_id("moved"),
            )

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
                self._share(w, "start", "Start", default)
                self._share(w, "end", "End", default)
            with gr.Column(min_width=240):
                values = [getattr(default, name) for name in CURVE_FIELDS]
                picture = gr.HTML(
                    drawing(*values), elem_id=self.elem_id("drawing"), elem_classes=["delta-sampling-drawing"]
                )
                # The script of the page clicks this when an answer that came late has left an older drawing.
                redraw = gr.Button(
                    "Draw lambda anew", elem_id=self.elem_id("redraw"), elem_classes=["delta-sampling-hidden"]
                )
        with gr.Row(elem_classes=["delta-sampling-row"]):
            w["curve"] = gr.Dropdown(
                label="Curve",
                choices=list(CURVES),
                value=default.curve,
                min_width=130,
                elem_id=self.elem_id("curve"),
            )
            with gr.Column(scale=2, min_width=340), gr.Row(elem_classes=["delta-sampling-row"]):
                self._share(w, "first", "Curve start", default)
                self._share(w, "last", "Curve end", default)
        return picture, redraw

    def _share(self, w, name, label, default):
        w[name] = gr.Slider(
            label=label,
            minimum=0,
            maximum=1,
            step=0.01,
            value=getattr(default, name),
            min_width=160,
            elem_id=self.elem_id(name),
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
            w["cfg"] = gr.Slider(
                label="Side model CFG (0: automatic)",
                minimum=LIMITS["cfg"][0],
                maximum=LIMITS["cfg"][1],
                step=0.5,
                value=default.cfg,
                min_width=200,
                elem_id=self.elem_id("cfg"),
            )
            w["size"] = gr.Dropdown(
                label="Size of the side model",
                choices=side_sizes(),
                value=default.size,
                allow_custom_value=True,
                min_width=130,
                elem_id=self.elem_id("size"),
            )
            w["bridge"] = gr.Dropdown(
                label="Bridge to other latents",
                choices=list(BRIDGES),
                value=default.bridge,
                min_width=130,
                elem_id=self.elem_id("bridge"),
            )

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


def checkpoint_choices():
    """Return what the checkpoint dropdowns offer."""
    return [NONE, *host().catalog.checkpoints()]


def base_choices():
    """Return what the checkpoint dropdowns offer at first: those that can be a base, or adapt one."""
    fitting = host().catalog.bases()
    return [NONE, *fitting, *([ALL] if len(fitting) < len(host().catalog.checkpoints()) else [])]


def whole_list(value, selected: gr.SelectData):
    """Offer all checkpoints, where that is what was chosen."""
    return gr.update(choices=checkpoint_choices(), value=NONE) if selected.value == ALL else value


def side_sizes():
    """Return what the dropdown of the side model's size offers; other numbers of pixels can be typed."""
    return [*SIZES, "512", "640", "768"]


def status_html(before=""):
    """Return the status, a line each."""
    lines = [line for line in (before, *host().status().splitlines()) if line]
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def unload_html():
    """Give the memory back, and return what that did with the status."""
    return status_html(host().unload())


def add_settings():
    """Add the settings page."""
    section = ("delta_sampling", TITLE)
    torch = sys.modules.get("torch")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch else []
    options = {
        "delta_sampling_base": shared.OptionInfo(
            NONE,
            "Default base checkpoint",
            gr.Dropdown,
            lambda: {"choices": [NONE, *host().catalog.bases()]},
            refresh=host().catalog.refresh_checkpoints,
            section=section,
        ).info("for generations that choose none"),
        "delta_sampling_units": shared.OptionInfo(
            UNITS,
            "ControlNet and IP-Adapter units",
            gr.Slider,
            {"minimum": 1, "maximum": MOST_UNITS, "step": 1},
            section=section,
        ).info("in the accordion, once the UI has been reloaded"),
        "delta_sampling_cache": shared.OptionInfo(
            1,
            "Base models kept in memory",
            gr.Slider,
            {"minimum": 0, "maximum": 4, "step": 1},
            section=section,
        ).info("0: memory is given back after each generation"),
        "delta_sampling_cache_size": shared.OptionInfo(
            8,
            "Memory for base models that are kept (GB)",
            gr.Slider,
            {"minimum": 0, "maximum": 64, "step": 1},
            section=section,
        ).info("those longest unused go first; the one in use stays"),
        "delta_sampling_device": shared.OptionInfo(
            "Automatic",
            "Device of the side models",
            gr.Radio,
            {"choices": ["Automatic", "CPU", *devices]},
            section=section,
        ).info("Automatic: where the WebUI computes; the CPU needs no GPU memory, and is slow"),
        "delta_sampling_precision": shared.OptionInfo(
            PRECISIONS[0],
            "Precision of the side models",
            gr.Radio,
            {"choices": list(PRECISIONS)},
            section=section,
        ).info(
            "Automatic: the WebUI's own; bf16 or fp32 where fp16 overflows; fp32 takes twice the memory, "
            "fp8 weights half, and LoRAs on them are never rounded to fp8"
        ),
        "delta_sampling_placement": shared.OptionInfo(
            PLACEMENTS[0],
            "Side models on their device",
            gr.Radio,
            {"choices": list(PLACEMENTS)},
            section=section,
        ).info("block by block: weights wait in CPU memory, and each block's are there while it runs; for small GPUs"),
        "delta_sampling_form": shared.OptionInfo(
            FORMS[0],
            "How LoRAs are held",
            gr.Radio,
            {"choices": list(FORMS)},
            section=section,
        ).info("automatic: as factors where that is faster, mostly; merged: up to 1.7 GB more in half precision"),
        "delta_sampling_compile": shared.OptionInfo(
            False,
            "Compile the side model (torch.compile)",
            section=section,
        ).info("takes minutes for each size of picture and each LoRA; where torch cannot, it runs as it is"),
        "delta_sampling_on_error": shared.OptionInfo(
            ON_ERROR[0],
            "When the delta cannot be computed",
            gr.Radio,
            {"choices": list(ON_ERROR)},
            section=section,
        ).info("the reason is shown either way"),
        "delta_sampling_preset": shared.OptionInfo(
            NONE,
            "Default preset",
            gr.Dropdown,
            lambda: {"choices": preset_choices()},
            refresh=lambda: None,  # the button is for those that were saved since the page was made
            section=section,
        ).info("what the accordion holds when the page is opened"),
        "delta_sampling_show": shared.OptionInfo(
            False,
            "Show the delta",
            section=section,
        ).info("a heat map beside the result: where the delta changed the estimate, and how much, mean over the steps"),
        "delta_sampling_adetailer": shared.OptionInfo(
            True,
            "Add the delta in the passes of ADetailer as well",
            section=section,
        ).info("puts Delta Sampling on the list of scripts that ADetailer applies, from the next start on"),
    }
    for name, option in options.items():
        stored = shared.opts.data.get(name)
        if isinstance(stored, str) and stored in FORMER:  # or else the page would refuse what it shows
            shared.opts.data[name] = FORMER[stored]
        shared.opts.add_option(name, option)


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


# Axes of the XYZ plot: the label, what it sets, and what changing it costs.  The WebUI changes the dearest least often,
# and its own checkpoint axis has cost 1.
AXES = (
    ("Lambda", "strength", 0.0),
    ("Start", "start", 0.0),
    ("End", "end", 0.0),
    ("Curve", "curve", 0.0),
    ("Base", "base", 0.9),
    ("Adapted", "adapted", 0.8),
    ("LoRAs", "loras", 0.6),
    ("LoRA weight", "lora_weight", 0.4),
    ("CFG", "cfg", 0.0),
    ("Size", "size", 0.0),
    ("Bridge", "bridge", 0.0),
    ("Quality", "quality", 0.0),
    ("Quality steps", "every", 0.0),
    ("Quality moved", "moved", 0.0),
    ("Unit weight", "unit_weight", 0.0),
    ("Unit start", "unit_start", 0.0),
    ("Unit end", "unit_end", 0.0),
    ("Unit model", "unit_model", 0.5),
)
CHOICES = {
    "curve": lambda: list(CURVES),
    "base": lambda: [NONE, *host().catalog.bases()],
    "adapted": lambda: [NONE, *host().catalog.bases()],
    "loras": lambda: [NONE, *map(quoted, host().catalog.loras())],
    "size": side_sizes,
    "bridge": lambda: list(BRIDGES),
    "quality": lambda: list(QUALITIES),
    "unit_model": lambda: control_choices(),
}


def add_axes():
    """Add the axes to the XYZ plot, if it is there and does not have them yet."""
    modules = (data.module for data in scripts.scripts_data)
    grid = next((m for m in modules if m.__name__ in ("xyz_grid.py", "scripts.xyz_grid")), None)
    if grid is None:
        return
    known = {option.label for option in grid.axis_options}
    for name, target, cost in AXES:
        label = f"[Delta] {name}"
        if label not in known:
            option = grid.AxisOption(
                label,
                str if target in CHOICES else float,
                partial(set_axis, target),
                confirm=partial(confirm_axis, label, target),
                cost=cost,
                choices=CHOICES.get(target),
            )
            grid.axis_options.append(option)


def set_axis(target, p, value, values):
    """Note one axis' value for a cell; cells are shallow copies of one object, so the dictionary is a new one."""
    if target in CHECKPOINT_FIELDS:
        value = find_checkpoint(value)
    if target == "loras" and value in host().catalog.loras():
        value = quoted(value)  # a name may hold what separates LoRAs
    if value == NONE:
        value = ""
    p.delta_sampling_axes = {**getattr(p, "delta_sampling_axes", {}), "enabled": True, target: value}


def confirm_axis(label, target, p, values):
    """Refuse values that are not allowed, before anything is generated."""
    for value in values:
        if target in LIMITS:
            low, high = LIMITS[target]
            if not low <= value <= high:
                raise SettingError(f'{label} "{value:g}" is not allowed: a number from {low:g} to {high:g} is')
        elif target in CHECKPOINT_FIELDS:
            if find_checkpoint(value) is None:
                raise SettingError(f'{label} "{shortened(value)}" is no checkpoint: {listed(checkpoint_choices())}')
        elif target in ("curve", "bridge", "quality", "unit_model") and value not in CHOICES[target]():
            raise SettingError(f'{label} "{shortened(value)}" is not allowed: {listed(CHOICES[target]())}')
        elif target == "size":
            Request(enabled=True, size=value)
        elif target == "loras" and value not in (NONE, *host().catalog.loras()):
            for pick in parse_picks(value):
                if pick.name not in host().catalog.loras():
                    raise SettingError(f'{label} "{shortened(pick.name)}" is no LoRA: {listed(lora_choices())}')


def find_checkpoint(name):
    """Return the checkpoint that is meant, by its full name or without folder, ending and hash, or None."""
    known = checkpoint_choices()
    if name in known:
        return name
    for short in (short_name, lambda checkpoint: short_name(without_hash(checkpoint))):
        found = [other for other in known if short(other) == short(name)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def short_name(checkpoint):
    """Return a checkpoint's name without folder, ending and case."""
    name = PurePath(checkpoint.replace("\\", "/")).name.casefold()
    return name.removesuffix(".safetensors").removesuffix(".ckpt")


def without_hash(checkpoint):
    """Return a checkpoint's title without the hash at its end, if that is one."""
    return re.sub(r" \[\w+\]$", "", checkpoint)


def listed(names, shown=12):
    """Return the allowed values for an error."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "one of " + ", ".join(names[:shown]) + more + " is"


script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(add_axes)
script_callbacks.on_app_started(add_routes)
host().start()
