"""Telling checkpoints: the family of a model file, its variant, and what its UNet predicts.

Formats: safetensors and PyTorch's own files, both read by :mod:`lib_delta.files` (so that no code in them can
run), in the key names of the original Stable Diffusion release, "LDM layout".
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
# Where the UNet may be: in a checkpoint, and in two forms of UNet-only files.
UNET_PREFIXES = (UNET_PREFIX, "diffusion_model.", "")
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")

# Every kind that names of keys recognise; a transformer model's family is detected by its blocks.
_OTHER_ROLES = tuple(role for role in Role if role is not Role.TRANSFORMER_CONTROL)


def unet_prefix(shapes: Shapes) -> str | None:
    """Return the prefix of the UNet's keys, None where there is no UNet in LDM layout."""
    return next((p for p in UNET_PREFIXES if f"{p}input_blocks.0.0.weight" in shapes), None)


def detect_family(shapes: Shapes, name: str = "the file") -> Family:
    """Tell the family of a checkpoint from the shapes of all its weights.

    SD 1.x and 2.x differ in the projections of their attention blocks (convolutions, linear maps),
    SDXL has a label embedding besides; widths are not looked at, but to tell what shares all that.
    Raises :class:`CheckpointError` that names what the file is instead.
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
    # The refiner has one text encoder, OpenCLIP-G, where the base model has CLIP-L.
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
    """Name what the UNet's input channels tell: "standard", "inpainting", "edit" or "depth"."""
    channels = shapes[f"{unet_prefix(shapes)}input_blocks.0.0.weight"][1]
    return {5: "depth", 8: "edit", 9: "inpainting"}.get(channels, "standard")


def detect_prediction(file: WeightFile, family: Family) -> Prediction:
    """Tell what the UNet predicts.

    In this order: what :func:`stated_prediction` finds; eps where a ``.yaml`` lies beside the file and says nothing of
    it, as ldm's models have it; else v for SD 2.x and eps for all others.  SD 2.x comes as 512 (eps) and
    768-v models of the same shapes: the default is that of the 768-v models, but for the inpainting and depth
    models, which are eps.  Where that is wrong the user has to say so.
    """
    stated = stated_prediction(file)
    if stated is not None:
        return stated
    standard_sd2 = family is Family.SD2 and detect_variant(file.shapes) == "standard"
    return "v" if standard_sd2 and ModelConfig.beside(file.path) is None else "eps"


def stated_prediction(file: WeightFile) -> Prediction | None:
    """Return what is said of what a file's UNet predicts, None where nothing is.

    In this order: the ``.yaml`` of its name beside it, which WebUIs believe first; an (empty) tensor ``v_pred``; the
    header's ``modelspec.prediction_type``, or a ``modelspec.architecture`` that ends in ``-v`` (as in
    ``stable-diffusion-v2-768-v``).
    Raises :class:`CheckpointError` for a configuration that cannot be read, and a prediction that is not supported.
    """
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
    """Read ldm's name for a prediction, and sgm's."""
    scaling = config.text("denoiser_config", "params", "scaling_config", "target").rpartition(".")[2]
    stated = config.text("parameterization") or {"VScaling": "v", "EpsScaling": "eps"}.get(scaling, "")
    if stated and stated not in ("eps", "v"):
        raise CheckpointError(
            f"{name} predicts {shown(stated, 40)}, as {config.name} says, which is not supported: eps or v is needed"
        )
    return cast("Prediction | None", stated or None)


def detect_zero_terminal_snr(file: WeightFile) -> bool:
    """Tell whether the noise schedule was rescaled to end in pure noise (arXiv 2305.08891)."""
    return "ztsnr" in file.shapes or file.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


def missing_parts(shapes: Shapes) -> tuple[str, ...]:
    parts = {"text encoder": TEXT_PREFIXES, "autoencoder": (VAE_PREFIX,)}
    return tuple(part for part, prefixes in parts.items() if not any(k.startswith(prefixes) for k in shapes))


@dataclass(frozen=True)
class CheckpointInfo:
    """What the header of a checkpoint tells of it, with nothing built; ``missing`` as in :class:`Report`."""

    name: str
    family: Family
    variant: str
    prediction: Prediction
    missing: tuple[str, ...]

    @property
    def why_not_base(self) -> str:
        """Why it cannot be the base of the side model, in a sentence; empty where it can."""
        if self.family is not Family.SD1:
            label = self.family.label
            return f"{self.name} is a model of {label}, and the base of Delta Sampling has to be an SD 1.x checkpoint"
        if self.variant != "standard":
            return f"{self.name} is an {self.variant} model: an ordinary SD 1.x checkpoint is needed as base"
        if "text encoder" in self.missing:
            return f"{self.name} has no text encoder: a whole SD 1.x checkpoint is needed as base"
        return ""


def describe(path: str | Path) -> CheckpointInfo:
    """Say what a checkpoint is, from its header alone: milliseconds, and remembered until the file changes.

    For lists of files, and to refuse before anything is built: ``describe(path).unfit`` is why a checkpoint cannot be
    the base, empty where it can.  Raises :class:`CheckpointError` for what is no checkpoint or cannot be read; see
    :func:`why_not_base` for one sentence in every case.
    """
    described = _info_or_fault(FileState.of(Path(path)))
    if isinstance(described, str):
        raise CheckpointError(described)
    return described


def why_not_base(path: str | Path) -> str:
    """Return why a file cannot be the base of the side model, in a sentence; empty where it can.  Never raises."""
    try:
        return describe(path).why_not_base
    except CheckpointError as error:
        return str(error)


@functools.lru_cache(maxsize=4096)
def _info_or_fault(state: FileState) -> CheckpointInfo | str:
    """Return the description, or the sentence that says why there is none: both are worth remembering."""
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
            )
    except CheckpointError as error:
        return str(error)
