"""Files of other kinds that people put among their models, told by the names and shapes of what is in them."""

from __future__ import annotations

import re

from lib_delta.errors import shortened
from lib_delta.files.stored_file import Shapes

# What peft calls an adapter (``peft_type``) that is not served, its name as its authors write it, and how its
# tensors' names start.
_OF_PEFT: tuple[tuple[str, str, str], ...] = (
    ("ADALORA", "an AdaLoRA", "lora_E"),
    ("BEFT", "a BEFT", "beft_"),
    ("BONE", "a Bone", "bone_"),
    ("C3A", "a C3A", "c3a_"),
    ("CARTRIDGE", "a Cartridge", "cartridge_"),
    ("DEFT", "a DEFT", "deft_"),
    ("DELORA", "a DeLoRA", "delora_"),
    ("FOURIERFT", "a FourierFT", "fourierft_"),
    ("GLORA", "a GLoRA", "glora_"),
    ("GRALORA", "a GraLoRA", "gralora_"),
    ("HIRA", "a HiRA", "hira_"),
    ("HRA", "an HRA", "hra_"),
    ("LILY", "a Lily", "lily_"),
    ("LN_TUNING", "an LN-Tuning", "ln_tuning_"),
    ("MISS", "a MiSS", "miss_"),
    ("OSF", "an OSF", "osf_"),
    ("PEANUT", "a PEANuT", "peanut_"),
    ("POLY", "a Poly", "poly_lora_"),
    ("PSOFT", "a PSOFT", "psoft_"),
    ("PVERA", "a PVeRA", "pvera_"),
    ("RANDLORA", "a RandLoRA", "randlora_"),
    ("ROAD", "a RoAd", "road_"),
    ("SHIRA", "a SHiRA", "shira_"),
    ("SUPERTUNING", "a SuperTuning", "supertuning_"),
    ("TINYLORA", "a TinyLoRA", "tinylora_"),
    ("TRAINABLE_TOKENS", "a trainable-tokens", "trainable_tokens_"),
    ("VBLORA", "a VB-LoRA", "vblora_"),
    ("VERA", "a VeRA", "vera_"),
    ("WAVEFT", "a WaveFT", "waveft_"),
)
_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r".*\.(q_layer|p_layer|lambda_layer)(\.|$)", "a T-LoRA, whose rank changes from step to step: it is not served"),
    (r"lllite_", "a ControlNet-LLLite, which is not served"),
    (r"\d+\.[01]\.linear\.\d+\.", "a hypernetwork"),
    (r"modifier_token\.", "a Custom Diffusion file"),
    (r"(?:ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"conv8\.weight$", "an approximate autoencoder (VAE-approx), for previews"),
    (r"(?:taesd_)?(?:(?:en|de)coder\.)?(?:layers\.)?[1-4]\.conv\.0\.weight$", "a tiny autoencoder (TAESD)"),
    (r"$", "a single tensor, as aesthetic embeddings are"),
)
_WORD_WIDTHS = (768, 1024)


def of_peft(stated: str) -> str:
    """Name a kind of adapter that is not served, by what peft calls it."""
    name = next((name for own, name, _ in _OF_PEFT if own == stated.upper()), f"a {shortened(stated, 40)}")
    return f"{name} file of peft, which is not served"


def unsupported_kind(shapes: Shapes) -> str:
    """Name what a file is that is neither a checkpoint nor an adapter; empty where it is of no kind known here."""
    for pattern, what in _UNSUPPORTED:
        if any(re.match(pattern, key) for key in shapes):
            return what
    for stated, _, start in _OF_PEFT:
        if any(f".{start}" in key for key in shapes):
            return of_peft(stated)
    if len(shapes) == 1 and all(len(s) in (1, 2) and s[-1] in _WORD_WIDTHS for s in shapes.values()):
        (key,) = shapes
        return "" if "." in key else "a textual inversion embedding (use it in the prompt)"
    return ""
