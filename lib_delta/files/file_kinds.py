"""The kinds of files that people put among their models, recognised by the names and shapes of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from lib_delta.errors import shortened
from lib_delta.files.stored_file import Shapes


class Role(Enum):
    """The purpose of a kind of file."""

    ADAPTER = auto()
    """Changes the base's weights."""
    CONTROL = auto()
    """Steers the base by a picture."""
    UNSUPPORTED_CONTROL = auto()
    """Steers a model by a picture, and is not supported here."""
    TRANSFORMER_CONTROL = auto()
    """Steers a transformer model (SD 3, FLUX.1).  LoRAs of these models share its names of layers."""
    INCOMPLETE = auto()
    """Part of a checkpoint, or a checkpoint in another form; the sentence says which file is needed instead."""
    OTHER = auto()
    """Neither an adapter, nor a control, nor a checkpoint."""


@dataclass(frozen=True)
class FileKind:
    """One kind of file.

    ``sentence`` completes "FILE is ..." in messages; ``matches`` recognises the kind by a file's shapes.
    """

    name: str
    sentence: str
    role: Role
    matches: Callable[[Shapes], bool]


def _any_key(pattern: str) -> Callable[[Shapes], bool]:
    """Recognise files with a key that starts as ``pattern`` describes."""
    expression = re.compile(pattern)
    return lambda shapes: any(map(expression.match, shapes))


def _all_keys(pattern: str) -> Callable[[Shapes], bool]:
    """Recognise files with nothing but keys that ``pattern`` describes whole."""
    expression = re.compile(pattern)
    return lambda shapes: bool(shapes) and all(map(expression.fullmatch, shapes))


def _any_tensor_named(start: str) -> Callable[[Shapes], bool]:
    """Recognise files with a layer's tensor whose name begins with ``start``."""
    return lambda shapes: any(f".{start}" in key for key in shapes)


def _is_single_embedding(shapes: Shapes) -> bool:
    """Recognise one tensor, under the token's name, with vectors as wide as the text of SD 1.x or 2.x."""
    if len(shapes) != 1:
        return False
    ((key, shape),) = shapes.items()
    return "." not in key and len(shape) in (1, 2) and shape[-1] in (768, 1024)


# peft's name for each adapter that is not supported (``peft_type``), the spelling of its authors, and the start of its
# tensors' names.
_PEFT_TYPES: tuple[tuple[str, str, str], ...] = (
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
CONTROL_LORA, CONTROLNET, IP_ADAPTER, T2I_ADAPTER = "Control-LoRA", "ControlNet", "IP-Adapter", "T2I-Adapter"
_EMBEDDING = "a textual inversion embedding (use it in the prompt)"

# In the order in which files are compared with them: a file may match several kinds, and is of the first.
KINDS: tuple[FileKind, ...] = (
    FileKind(
        "T-LoRA",
        "a T-LoRA, whose rank changes from step to step: it is not supported",
        Role.OTHER,
        _any_key(r".*\.(q_layer|p_layer|lambda_layer)(\.|$)"),
    ),
    FileKind(
        "ControlNet-LLLite",
        "a ControlNet-LLLite, which is not supported",
        Role.UNSUPPORTED_CONTROL,
        _any_key(r"lllite_"),
    ),
    FileKind(
        "union ControlNet",
        "a union ControlNet, which is not supported",
        Role.UNSUPPORTED_CONTROL,
        _any_key(r"(control_model\.)?(task_embedding|control_add_embedding)"),
    ),
    FileKind(
        "transformer ControlNet",
        "for a transformer model",
        Role.TRANSFORMER_CONTROL,
        _any_key(r"(controlnet_)?(transformer_blocks|single_transformer_blocks|x_embedder|joint_blocks)"),
    ),
    FileKind(
        "T2I style adapter",
        "a T2I style adapter, which is not supported",
        Role.UNSUPPORTED_CONTROL,
        _any_key(r"style_embedding|ln_post"),
    ),
    FileKind(
        CONTROL_LORA,
        "a Control-LoRA, which follows a picture",
        Role.CONTROL,
        lambda shapes: "lora_controlnet" in shapes,
    ),
    FileKind(
        CONTROLNET,
        "a ControlNet",
        Role.CONTROL,
        _any_key(r"(control_model|input_hint_block|controlnet_cond_embedding|controlnet_\w*blocks?)\."),
    ),
    FileKind(IP_ADAPTER, "an IP-Adapter", Role.CONTROL, _any_key(r"(ip_adapter|image_proj)\.")),
    FileKind(T2I_ADAPTER, "a T2I-Adapter, which follows a picture", Role.CONTROL, _any_key(r"(adapter\.)?body\.\d+\.")),
    FileKind("hypernetwork", "a hypernetwork", Role.OTHER, _any_key(r"\d+\.[01]\.linear\.\d+\.")),
    FileKind("Custom Diffusion", "a Custom Diffusion file", Role.OTHER, _any_key(r"modifier_token\.")),
    FileKind(
        "VAE-approx",
        "an approximate autoencoder (VAE-approx), for previews",
        Role.OTHER,
        _any_key(r"conv8\.weight$"),
    ),
    FileKind(
        "TAESD",
        "a tiny autoencoder (TAESD)",
        Role.OTHER,
        _any_key(r"(taesd_)?((en|de)coder\.)?(layers\.)?[1-4]\.conv\.0\.weight$"),
    ),
    FileKind("single tensor", "a single tensor, as aesthetic embeddings are", Role.OTHER, lambda shapes: "" in shapes),
    *(
        FileKind(stated, f"{name} file of peft, which is not supported", Role.OTHER, _any_tensor_named(start))
        for stated, name, start in _PEFT_TYPES
    ),
    FileKind("embedding", _EMBEDDING, Role.OTHER, _is_single_embedding),
    FileKind(
        "LoRA",
        "a LoRA",
        Role.ADAPTER,
        _any_key(r"lora_(unet|te\d?|transformer)_|lycoris_|.*\.(lora_(down|up|A|B)|hada_w1_[ab]|lokr_w[12])"),
    ),
    FileKind("embedding", _EMBEDDING, Role.OTHER, _any_key(r"(emb_params|clip_[lg]|string_to_param.*)$")),
    FileKind("embedding", _EMBEDDING, Role.OTHER, _all_keys(r"<[^>]*>")),
    FileKind(
        "diffusers UNet",
        "a UNet in diffusers layout, which diffusers' convert_diffusers_to_original_*.py turns into a checkpoint",
        Role.INCOMPLETE,
        _any_key(r"(unet\.)?down_blocks\.\d+\.(resnets|attentions)\."),
    ),
    FileKind(
        "parallel training",
        "saved from parallel training, in part: its keys start with 'module.', and ordinary ones are needed",
        Role.INCOMPLETE,
        _any_key(r"module\."),
    ),
    FileKind(
        "EMA weights",
        "a checkpoint with only the averaged (EMA) copy of its UNet: export it with its ordinary weights",
        Role.INCOMPLETE,
        _any_key(r"model_ema\."),
    ),
    FileKind(
        "unknown UNet",
        "incomplete or of an unknown family: its UNet has no input_blocks.0.0.weight",
        Role.INCOMPLETE,
        _any_key(r"(model\.)?diffusion_model\."),
    ),
    FileKind("no UNet", "a checkpoint without a UNet", Role.INCOMPLETE, _any_key(r"cond_stage_model\.|conditioner\.")),
    FileKind(
        "VAE", "an autoencoder (VAE)", Role.OTHER, _any_key(r"(first_stage_model\.)?(encoder|decoder)\.conv_in\.")
    ),
    FileKind("motion module", "a motion module", Role.OTHER, _any_key(r".*motion_modules\.")),
    FileKind("image encoder", "an image encoder", Role.OTHER, _any_key(r"vision_model\.|visual\.")),
    FileKind("text encoder", "a text encoder, not a checkpoint", Role.INCOMPLETE, _any_key(r"(.*\.)?text_model\.")),
)


def kind_of(shapes: Shapes, *roles: Role) -> FileKind | None:
    """Return the first kind of these roles that a file matches; None for files of no such kind."""
    return next((kind for kind in KINDS if kind.role in roles and kind.matches(shapes)), None)


def peft_sentence(stated: str) -> str:
    """Describe an unsupported adapter by ``stated``, its ``peft_type``."""
    name = next((name for known, name, _ in _PEFT_TYPES if known == stated.upper()), f"a {shortened(stated, 40)}")
    return f"{name} file of peft, which is not supported"
