"""The extension's section of the WebUI's settings."""

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
    """Add the settings, and rename stored choices of earlier versions, which the page would refuse to save."""
    for name, option in settings().items():
        stored = shared.opts.data.get(name)
        if isinstance(stored, str) and stored in RENAMED_CHOICES:
            shared.opts.data[name] = RENAMED_CHOICES[stored]
        shared.opts.add_option(name, option)


def settings() -> dict[str, Any]:
    """Return the settings by name, in the page's order."""
    torch = sys.modules.get("torch")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch else []
    return {
        "delta_sampling_base": shared.OptionInfo(
            NONE,
            "Default base checkpoint",
            gr.Dropdown,
            lambda: {"choices": [NONE, *host().catalog.bases()]},
            refresh=host().catalog.refresh_checkpoints,
            section=SECTION,
        ).info("used if a generation chooses none"),
        "delta_sampling_units": _number_setting("ControlNet and IP-Adapter units", UNITS, 1, MOST_UNITS).info(
            "shown in the accordion after a reload of the UI"
        ),
        "delta_sampling_cache": _number_setting("Base models cached in memory", 1, 0, 4).info(
            "0: free the memory after each generation"
        ),
        "delta_sampling_cache_size": _number_setting("Memory for cached base models (GB)", 8, 0, 64).info(
            "the least recently used goes first; the one in use stays"
        ),
        "delta_sampling_device": _choice("Device of the side models", ["Automatic", "CPU", *devices]).info(
            "Automatic: the WebUI's device; the CPU needs no GPU memory, but is slow"
        ),
        "delta_sampling_precision": _choice("Precision of the side models", PRECISIONS).info(
            "Automatic: the WebUI's; bf16 or fp32 if fp16 overflows; fp32 takes twice the memory, "
            "fp8 weights half; LoRAs on fp8 weights are never rounded to fp8"
        ),
        "delta_sampling_placement": _choice("Side models on their device", PLACEMENTS).info(
            "block by block: weights stay in CPU memory; each block's are on the device while it runs; for small GPUs"
        ),
        "delta_sampling_form": _choice("How LoRAs are applied", ADAPTER_FORMS).info(
            "automatic: factors if they are faster, as they mostly are; merged: up to 1.7 GB more in half precision"
        ),
        "delta_sampling_compile": shared.OptionInfo(
            False,
            "Compile the side model (torch.compile)",
            section=SECTION,
        ).info(
            "takes minutes for each picture size and each LoRA; if torch cannot compile the model, it runs uncompiled"
        ),
        "delta_sampling_on_error": _choice("When the delta cannot be computed", ON_ERROR).info(
            "the reason is shown in both cases"
        ),
        "delta_sampling_preset": shared.OptionInfo(
            NONE,
            "Default preset",
            gr.Dropdown,
            lambda: {"choices": preset_choices()},
            refresh=lambda: None,  # shows a refresh button, which offers presets saved since the page was built
            section=SECTION,
        ).info("loaded into the accordion when the page opens"),
        "delta_sampling_show": shared.OptionInfo(
            False,
            "Show the delta",
            section=SECTION,
        ).info(
            "a heat map next to the result: where and how much the delta changed the estimate, averaged over the steps"
        ),
        "delta_sampling_adetailer": shared.OptionInfo(
            True,
            "Add the delta in the passes of ADetailer as well",
            section=SECTION,
        ).info("adds Delta Sampling to the scripts that ADetailer runs, from the next start on"),
    }


def _choice(label: str, choices: Sequence[str]) -> Any:
    """Return a setting with choices; the first is the default."""
    return shared.OptionInfo(choices[0], label, gr.Radio, {"choices": list(choices)}, section=SECTION)


def _number_setting(label: str, default: int, minimum: int, maximum: int) -> Any:
    """Return a setting that is a whole number."""
    limits = {"minimum": minimum, "maximum": maximum, "step": 1}
    return shared.OptionInfo(default, label, gr.Slider, limits, section=SECTION)
