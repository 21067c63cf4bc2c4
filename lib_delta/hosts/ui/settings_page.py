"""The page of our settings in the WebUI."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import gradio as gr
from modules import shared

from lib_delta.hosts import host
from lib_delta.hosts.settings import MOST_UNITS, UNITS
from lib_delta.hosts.ui.preset_row import preset_choices
from lib_delta.request.setting_choices import ADAPTER_FORMS, NONE, ON_ERROR, PLACEMENTS, PRECISIONS, RENAMED_CHOICES

SECTION = ("delta_sampling", "Delta Sampling")


def add_settings() -> None:
    """Add the settings page."""
    torch = sys.modules.get("torch")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch else []
    options = {
        "delta_sampling_base": shared.OptionInfo(
            NONE,
            "Default base checkpoint",
            gr.Dropdown,
            lambda: {"choices": [NONE, *host().catalog.bases()]},
            refresh=host().catalog.refresh_checkpoints,
            section=SECTION,
        ).info("for generations that choose none"),
        "delta_sampling_units": _number_setting("ControlNet and IP-Adapter units", UNITS, 1, MOST_UNITS).info(
            "in the accordion, once the UI has been reloaded"
        ),
        "delta_sampling_cache": _number_setting("Base models kept in memory", 1, 0, 4).info(
            "0: memory is given back after each generation"
        ),
        "delta_sampling_cache_size": _number_setting("Memory for base models that are kept (GB)", 8, 0, 64).info(
            "those longest unused go first; the one in use stays"
        ),
        "delta_sampling_device": _choice("Device of the side models", ["Automatic", "CPU", *devices]).info(
            "Automatic: where the WebUI computes; the CPU needs no GPU memory, and is slow"
        ),
        "delta_sampling_precision": _choice("Precision of the side models", PRECISIONS).info(
            "Automatic: the WebUI's own; bf16 or fp32 where fp16 overflows; fp32 takes twice the memory, "
            "fp8 weights half, and LoRAs on them are never rounded to fp8"
        ),
        "delta_sampling_placement": _choice("Side models on their device", PLACEMENTS).info(
            "block by block: weights wait in CPU memory, and each block's are there while it runs; for small GPUs"
        ),
        "delta_sampling_form": _choice("How LoRAs are held", ADAPTER_FORMS).info(
            "automatic: as factors where that is faster, mostly; merged: up to 1.7 GB more in half precision"
        ),
        "delta_sampling_compile": shared.OptionInfo(
            False,
            "Compile the side model (torch.compile)",
            section=SECTION,
        ).info("takes minutes for each size of picture and each LoRA; where torch cannot, it runs as it is"),
        "delta_sampling_on_error": _choice("When the delta cannot be computed", ON_ERROR).info(
            "the reason is shown either way"
        ),
        "delta_sampling_preset": shared.OptionInfo(
            NONE,
            "Default preset",
            gr.Dropdown,
            lambda: {"choices": preset_choices()},
            refresh=lambda: None,  # the button is for those that were saved since the page was made
            section=SECTION,
        ).info("what the accordion holds when the page is opened"),
        "delta_sampling_show": shared.OptionInfo(
            False,
            "Show the delta",
            section=SECTION,
        ).info("a heat map beside the result: where the delta changed the estimate, and how much, mean over the steps"),
        "delta_sampling_adetailer": shared.OptionInfo(
            True,
            "Add the delta in the passes of ADetailer as well",
            section=SECTION,
        ).info("puts Delta Sampling on the list of scripts that ADetailer applies, from the next start on"),
    }
    for name, option in options.items():
        stored = shared.opts.data.get(name)
        if isinstance(stored, str) and stored in RENAMED_CHOICES:  # or else the page would refuse what it shows
            shared.opts.data[name] = RENAMED_CHOICES[stored]
        shared.opts.add_option(name, option)


def _choice(label: str, choices: Sequence[str]) -> Any:
    """Return a setting that is one of the choices, at first the first."""
    return shared.OptionInfo(choices[0], label, gr.Radio, {"choices": list(choices)}, section=SECTION)


def _number_setting(label: str, default: int, minimum: int, maximum: int) -> Any:
    """Return a setting that is a whole number."""
    limits = {"minimum": minimum, "maximum": maximum, "step": 1}
    return shared.OptionInfo(default, label, gr.Slider, limits, section=SECTION)
