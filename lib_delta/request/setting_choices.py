"""What the settings page offers, whichever WebUI it is in; the first of each is the default."""

from __future__ import annotations

STOP = "stop"
# fp8 is how weights are stored; the device's own type is what they are computed with.
FP8 = "fp8 weights"
PRECISIONS = ("Automatic", "fp16", "bf16", "fp32", FP8)
WHOLE, STREAMED = "whole", "block by block"
PLACEMENTS = (WHOLE, STREAMED)
ADAPTER_FORMS = ("automatic", "merged", "low-rank factors")
ON_ERROR = (STOP, "go on without")
# Values as versions before had them, which settings files still hold, for what they are now.
RENAMED_CHOICES = {"merged (faster)": "automatic", "low-rank factors (less memory)": "low-rank factors"}
