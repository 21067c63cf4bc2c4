"""Files of other kinds that people put among their models, told by the names and shapes of what is in them."""

from __future__ import annotations

import re
from collections.abc import Mapping

Shapes = Mapping[str, tuple[int, ...]]

_KINDS: tuple[tuple[str, str], ...] = (
    (r".*\.lora_E(\.|$)", "an AdaLoRA file of peft, which is not served"),
    (r".*\.hra_u(\.|$)", "an HRA file of peft, which is not served"),
    (r".*\.vera_lambda_[bd]", "a VeRA file of peft, which is not served"),
    (r".*\.fourierft_spectrum", "a FourierFT file of peft, which is not served"),
    (r"\d+\.[01]\.linear\.\d+\.", "a hypernetwork"),
    (r"modifier_token\.", "a Custom Diffusion file"),
    (r"(?:ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"conv8\.weight$", "an approximate autoencoder (VAE-approx), for previews"),
    (r"(?:taesd_)?(?:(?:en|de)coder\.)?(?:layers\.)?[1-4]\.conv\.0\.weight$", "a tiny autoencoder (TAESD)"),
    (r"$", "a single tensor, as aesthetic embeddings are"),
)
_WORD_WIDTHS = (768, 1024)


def other_kind(shapes: Shapes) -> str:
    """Name what a file is that is neither a checkpoint nor an adapter; empty where it is of no kind known here."""
    for pattern, what in _KINDS:
        if any(re.match(pattern, key) for key in shapes):
            return what
    if len(shapes) == 1 and all(len(s) in (1, 2) and s[-1] in _WORD_WIDTHS for s in shapes.values()):
        (key,) = shapes
        return "" if "." in key else "a textual inversion embedding (use it in the prompt)"
    return ""
