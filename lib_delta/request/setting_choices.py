"""Every list of choices that the accordion, the API and the settings page offer.  Nothing here imports torch.

The first choice of a list is the default, unless the field table names another.  The lists for a generation repeat
the types of ``lib_delta.bridges``, ``lib_delta.core`` and ``lib_delta.controls``, which need torch; a test compares
them.
"""

from __future__ import annotations

from typing import Literal, get_args

from lib_delta.core.strength import Curve

NONE = "None"  # an empty choice in a dropdown: gradio cannot paste into a dropdown whose default is empty
MAIN_PROMPT = "{prompt}"  # stands for the main prompt in a prompt of the side model

# A generation's settings.
HiresChoice = Literal["both", "first pass", "hires pass"]
BridgeChoice = Literal["stitched", "learned", "taesd", "published", "same_snr"]
QualityChoice = Literal["exact", "balanced", "fast"]
BetweenChoice = Literal["automatic", "held", "linear"]
SizeChoice = Literal["automatic", "picture"]

CURVES: tuple[Curve, ...] = get_args(Curve)
HIRES_PASSES: tuple[HiresChoice, ...] = get_args(HiresChoice)
BRIDGES: tuple[BridgeChoice, ...] = get_args(BridgeChoice)
LEGACY_BRIDGE: BridgeChoice = "same_snr"  # the bridge of pictures whose infotext names none
QUALITIES: tuple[QualityChoice, ...] = get_args(QualityChoice)
BETWEEN: tuple[BetweenChoice, ...] = get_args(BetweenChoice)
SIDE_SIZES: tuple[SizeChoice, ...] = get_args(SizeChoice)
OFFERED_SIZES = (*SIDE_SIZES, "512", "640", "768")  # other numbers of pixels can be typed

# A unit's settings.
ModeChoice = Literal["balanced", "prompt", "control"]
ResizeChoice = Literal["just resize", "crop and resize", "resize and fill"]
WeightTypeChoice = Literal[
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
]

MODES: tuple[ModeChoice, ...] = get_args(ModeChoice)
RESIZES: tuple[ResizeChoice, ...] = get_args(ResizeChoice)
WEIGHT_TYPES: tuple[WeightTypeChoice, ...] = get_args(WeightTypeChoice)

# The settings page.
STOP = "stop"
FP8 = "fp8 weights"  # weights are stored as fp8 and computed with in the device's usual type
PRECISIONS = ("Automatic", "fp16", "bf16", "fp32", FP8)
WHOLE, STREAMED = "whole", "block by block"
PLACEMENTS = (WHOLE, STREAMED)
ADAPTER_FORMS = ("automatic", "merged", "low-rank factors")
ON_ERROR = (STOP, "go on without")
# Values that settings files of earlier versions still hold, and their names of today.
RENAMED_CHOICES = {"merged (faster)": "automatic", "low-rank factors (less memory)": "low-rank factors"}
