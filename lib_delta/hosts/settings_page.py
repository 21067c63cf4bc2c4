"""The page of our settings in the WebUI."""

from __future__ import annotations

import sys

import gradio as gr
from modules import shared

from lib_delta.hosts import host
from lib_delta.hosts.preset_row import preset_choices
from lib_delta.hosts.settings import MOST_UNITS, UNITS
from lib_delta.options import FORMER, FORMS, ON_ERROR, PLACEMENTS, PRECISIONS
from lib_delta.request import NONE


def add_settings() -> None:
    """Add the settings page."""
    section = ("delta_sampling", "Delta Sampling")
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
