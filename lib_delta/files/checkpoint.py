"""Detects a checkpoint's family, its variant and its prediction type.

Formats: safetensors and PyTorch's files, both read by :mod:`lib_delta.files`, so that no code in them can run.
Keys are those of the original Stable Diffusion release ("LDM layout").
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lib_delta.diffusion.families import SERVED, Family
from lib_delta.diffusion.parameterization import Prediction
from lib_delta.errors import CheckpointError, shown
from lib_delta.files.file_kinds import Role, kind_of
from lib_delta.files.sidecar_config import ModelConfig
from lib_delta.files.stored_file import Shapes
from lib_delta.files.weight_file import FileState, WeightFile

UNET_PREFIX = "model.diffusion_model."

VAE_PREFIX = "first_stage_model."
# The UNet's prefix in a checkpoint, and in two forms of UNet-only files.
UNET_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")
_SDXL_TEXT = ("conditioner.embedders.0.", "conditioner.embedders.1.")
# Keys of SDXL models that were trained for EDM's noise levels (Playground 2.5, CosXL).
_EDM_KEYS = ("edm_mean", "edm_vpred.sigma_max")

# All but one: the families of transformer models are detected by their blocks.
_OTHER_ROLES = tuple(role for role in Role if role is not Role.TRANSFORMER_CONTROL)


def unet_prefix(shapes: Shapes) -> str | None:
    """Return the prefix of the UNet's keys; None if there is no UNet in LDM layout."""
    return next((p for p in UNET_PREFIXES if f"{p}input_blocks.0.0.weight" in shapes), None)


def detect_family(shapes: Shapes, name: str = "the file") -> Family:
    """Detect the family of a checkpoint by the shapes of all its weights.

    SD 1.x and 2.x differ in the projections of their attention blocks (convolutions, linear maps).
    SDXL also has a label embedding.  Widths only distinguish families that share all that.
    Raises :class:`CheckpointError` that names the file's kind if it is no checkpoint.
    """
    if any(".joint_blocks." in k or k.startswith("joint_blocks.") for k in shapes):
        return Family.SD3
    if any(".double_blocks." in k or k.startswith("double_blocks.") for k in shapes):
        return Family.FLUX
    prefix = unet_prefix(shapes)
    if prefix is None or any(k.startswith(("control_model.", "input_hint_block.")) for k in shapes):
        raise CheckpointError(f"{name} is {_kind_of_file(shapes)} (needed: a checkpoint of {SERVED})")
    projection = next((v for k, v in shapes.items() if k.startswith(prefix) and k.endswith(".proj_in.weight")), ())
    if f"{prefix}label_emb.0.0.weight" not in shapes:
        return Family.SD2 if len(projection) == 2 else Family.SD1
    return _labelled_family(shapes, prefix)


def _labelled_family(shapes: Shapes, prefix: str) -> Family:
    context = next((v[-1] for k, v in shapes.items() if k.startswith(prefix) and k.endswith("attn2.to_k.weight")), 0)
    if context == Family.UNCLIP.context_width or any(k.startswith("cond_stage_model.") for k in shapes):
        return Family.UNCLIP
    # The refiner has one text encoder, OpenCLIP-G.  In its place the base model has CLIP-L.
    if context == Family.SDXL_REFINER.context_width or any(
        k.startswith("conditioner.embedders.0.model.") for k in shapes
    ):
        return Family.SDXL_REFINER
    return Family.SDXL


def _kind_of_file(shapes: Shapes) -> str:
    kind = kind_of(shapes, *_OTHER_ROLES)
    if kind is not None:
        return kind.sentence if kind.role is Role.INCOMPLETE else f"{kind.sentence}, not a checkpoint"
    return "not a Stable Diffusion checkpoint" if shapes else "a file without any weights"


def detect_variant(shapes: Shapes) -> str:
    """Return the variant by the UNet's input channels: "standard", "inpainting", "edit" or "depth"."""
    channels = shapes[f"{unet_prefix(shapes)}input_blocks.0.0.weight"][1]
    return {5: "depth", 8: "edit", 9: "inpainting"}.get(channels, "standard")


def detect_prediction(file: WeightFile, family: Family) -> Prediction:
    """Detect the UNet's prediction type.

    :func:`stated_prediction` comes first.  A ``.yaml`` next to the file that states none means eps, ldm's default.
    Otherwise SD 2.x predicts v and all other families predict eps.  SD 2.x has 512 (eps) and 768-v models of the same
    shapes: the default is that of the 768-v models.  Its inpainting and depth models predict eps.
    The user has to override a wrong guess.
    """
    stated = stated_prediction(file)
    if stated is not None:
        return stated
    standard_sd2 = family is Family.SD2 and detect_variant(file.shapes) == "standard"
    return "v" if standard_sd2 and ModelConfig.beside(file.path) is None else "eps"


def stated_prediction(file: WeightFile) -> Prediction | None:
    """Return the prediction type that a file states; None if it states none.

    Sources, the first one wins:

    1. the ``.yaml`` of the same name next to the file, which WebUIs read first;
    2. an (empty) tensor ``v_pred``;
    3. the header's ``modelspec.prediction_type``;
    4. a ``modelspec.architecture`` that ends in ``-v`` (as in ``stable-diffusion-v2-768-v``).

    Raises :class:`CheckpointError` for an unreadable configuration and for an unsupported prediction type.
    """
    if edm := next((key for key in _EDM_KEYS if key in file.shapes), ""):
        raise CheckpointError(
            f"{file.name} was trained for EDM's noise levels ({edm}), which is not supported: eps or v is needed"
        )
    config = ModelConfig.beside(file.path)
    if config is not None and (configured := _configured_prediction(file.name, config)) is not None:
        return configured
    if "v_pred" in file.shapes:
        return "v"
    stated = file.metadata.get("modelspec.prediction_type", "").lower()
    if stated:
        if stated not in ("eps", "epsilon", "v", "v_prediction"):
            raise CheckpointError(f"{file.name} predicts {stated!r}, which is not supported: eps or v is needed")
        return "v" if stated.startswith("v") else "eps"
    if file.metadata.get("modelspec.architecture", "").endswith("-v"):
        return "v"
    return None


def _configured_prediction(name: str, config: ModelConfig) -> Prediction | None:
    """Read the prediction type by ldm's name, or by sgm's."""
    scaling = config.text("denoiser_config", "params", "scaling_config", "target").rpartition(".")[2]
    stated = config.text("parameterization") or {"VScaling": "v", "EpsScaling": "eps"}.get(scaling, "")
    if stated and stated not in ("eps", "v"):
        raise CheckpointError(
            f"{name} predicts {shown(stated, 40)}, as {config.name} says, which is not supported: eps or v is needed"
        )
    return cast("Prediction | None", stated or None)


def detect_zero_terminal_snr(file: WeightFile) -> bool:
    """Return whether the noise schedule was rescaled to end in pure noise (arXiv 2305.08891)."""
    return "ztsnr" in file.shapes or file.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def missing_parts(shapes: Shapes) -> tuple[str, ...]:
    """Name the parts that a checkpoint lacks: "text encoder" ("second text encoder" of SDXL), "autoencoder"."""
    parts = {"text encoder": TEXT_PREFIXES, "autoencoder": (VAE_PREFIX,)}
    if any(k.startswith(_SDXL_TEXT[0]) for k in shapes):
        parts |= {"second text encoder": (_SDXL_TEXT[1],)}
    elif any(k.startswith(_SDXL_TEXT[1]) for k in shapes):
        parts |= {"first text encoder": (_SDXL_TEXT[0],)}
    return tuple(part for part, prefixes in parts.items() if not any(k.startswith(prefixes) for k in shapes))


def quantised_key(shapes: Shapes) -> str:
    """Return the first key of weights that are quantised, which needs more than a cast; empty if there is none."""
    marks = (".scale_weight", ".scale_input", ".absmax", ".quant_map")
    return next((k for k in shapes if k.endswith(marks) or "quant_state" in k), "")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's description by its header.

    ``missing`` is as :func:`missing_parts` names it.  ``quantised`` is the first key of quantised weights; empty if
    there is none.
    """

    name: str
    family: Family
    variant: str
    prediction: Prediction
    missing: tuple[str, ...]
    quantised: str = ""

    @property
    def why_not_base(self) -> str:
        """The reason why it cannot be the base of the side model, in a sentence; empty if it can."""
        label = self.family.label
        if not self.family.served:
            return f"{self.name} is a model of {label}, and a base has to be a checkpoint of {SERVED}"
        if self.variant != "standard":
            article = "a" if self.variant == "depth" else "an"
            return f"{self.name} is {article} {self.variant} model: an ordinary {label} checkpoint is needed as base"
        if self.quantised:
            return f"{self.name} is quantised ({self.quantised}): an fp32, fp16, bf16 or plain fp8 file is needed"
        if lacking := next((part for part in self.missing if part.endswith("text encoder")), ""):
            return f"{self.name} has no {lacking}: a whole {label} checkpoint is needed as base"
        return ""


def describe(path: str | Path) -> CheckpointInfo:
    """Describe a checkpoint by its header.

    This takes milliseconds, and the result is cached until the file changes.  It serves lists of files, and refuses an
    unfit checkpoint (``describe(path).why_not_base``) before any model is built.
    Raises :class:`CheckpointError` for a file that is no checkpoint or cannot be read; :func:`why_not_base` returns
    one sentence in every case.
    """
    described = _info_or_fault(FileState.of(Path(path)))
    if isinstance(described, str):
        raise CheckpointError(described)
    return described


def why_not_base(path: str | Path) -> str:
    """Return why a file cannot be the base of the side model, in a sentence; empty if it can.  Never raises."""
    try:
        return describe(path).why_not_base
    except CheckpointError as error:
        return str(error)


@functools.lru_cache(maxsize=4096)
def _info_or_fault(state: FileState) -> CheckpointInfo | str:
    """Return the description, or the error's sentence: both are worth caching."""
    try:
        with WeightFile.open(state.path) as file:
            family = detect_family(file.shapes, file.name)
            has_unet = unet_prefix(file.shapes) is not None
            return CheckpointInfo(
                name=file.name,
                family=family,
                variant=detect_variant(file.shapes) if has_unet else "standard",
                prediction=detect_prediction(file, family) if has_unet else "eps",
                missing=missing_parts(file.shapes),
                quantised=quantised_key(file.shapes),
            )
    except CheckpointError as error:
        return str(error)
