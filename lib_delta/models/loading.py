"""Builds networks with the weights of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lib_delta.diffusion.families import SERVED, Family
from lib_delta.diffusion.parameterization import Prediction
from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import (
    TEXT_PREFIXES,
    VAE_PREFIX,
    detect_family,
    detect_prediction,
    detect_variant,
    detect_zero_terminal_snr,
    missing_parts,
    quantised_key,
    unet_prefix,
)
from lib_delta.files.stored_file import Shapes, reshaped
from lib_delta.files.weight_file import WeightFile, header_number
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.models.vae import VAE, VAEConfig

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint's kind, and the use of its keys.

    ``missing`` names the parts that the file lacks (a UNet-only file has no text encoder or autoencoder).
    ``unexpected`` are the keys that no checkpoint of this family has.
    """

    family: Family
    variant: str
    prediction: Prediction
    zero_terminal_snr: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


# Entries that training leaves: noise schedules, averaged weights, counters; and the flags of ``files.checkpoint``.
_KNOWN_EXTRAS = re.compile(
    r"model_ema\.|(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|logvar|lvlb_weights"
    r"|scale_factor|v_pred|ztsnr|denoiser\.sigmas|depth_model\..*|embedding_manager\..*)$"
)


def _unexpected_keys(shapes: Shapes, prefix: str, known: Iterable[str]) -> tuple[str, ...]:
    known = {prefix + k for k in known}
    if not prefix:
        return tuple(k for k in shapes if k not in known)
    parts = (*TEXT_PREFIXES, VAE_PREFIX)
    return tuple(k for k in shapes if k not in known and not k.startswith(parts) and not _KNOWN_EXTRAS.match(k))


def load_unet(
    file: WeightFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prediction: Prediction | None = None,
) -> tuple[UNet, CheckpointReport]:
    """Build the UNet of a checkpoint (or UNet-only file), and report the file's kind.

    ``prediction`` overrides :func:`detect_prediction`, whose default for SD 2.x is a guess.
    Raises :class:`CheckpointError` for files of another kind or family, and for missing weights.
    """
    family = detect_family(file.shapes, file.name)
    if not family.served:
        raise CheckpointError(
            f"{file.name} is a model of {family.label}, which is not supported: one of {SERVED} is needed"
        )
    prefix = unet_prefix(file.shapes) or ""
    weights = file.below(prefix)
    _refuse_unusable(weights)
    config = _unet_config(weights)
    module = build_module(lambda: UNet(config), weights, dtype, device)
    report = CheckpointReport(
        family=family,
        variant=detect_variant(file.shapes),
        prediction=prediction or detect_prediction(file, family),
        zero_terminal_snr=detect_zero_terminal_snr(file),
        missing=missing_parts(file.shapes),
        unexpected=_unexpected_keys(file.shapes, prefix, module.state_dict()),
    )
    return module, report


def _unet_config(weights: WeightFile) -> UNetConfig:
    try:
        return UNetConfig.from_shapes(weights.shapes, header_number(weights, "delta.head_width"))
    except CheckpointError as error:
        raise CheckpointError(f"{weights.name} cannot be used: {error}") from error


def load_vae(file: WeightFile, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Build the autoencoder of a checkpoint or of a file with nothing else.

    Raises :class:`CheckpointError` if the file has no autoencoder.
    """
    prefix = next((p for p in (VAE_PREFIX, "") if f"{p}encoder.conv_in.weight" in file.shapes), None)
    if prefix is None:
        raise CheckpointError(
            f"{file.name} has no autoencoder: a full checkpoint or a VAE file in LDM layout is needed"
        )
    weights = file.below(prefix)
    _refuse_unusable(weights)
    try:
        config = VAEConfig.from_shapes(weights.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name} cannot be used: {error}") from error
    return build_module(lambda: VAE(config), weights, dtype, device)


def _refuse_unusable(weights: WeightFile) -> None:
    """Refuse weights that are quantised (need more than a cast), or empty."""
    if key := quantised_key(weights.shapes):
        raise CheckpointError(f"{weights.name} is quantised ({key}): an fp32, fp16, bf16 or plain fp8 file is needed")
    for key, shape in weights.shapes.items():
        if 0 in shape:
            raise CheckpointError(f"{weights.name} is damaged: its weight {key} is empty, with shape {shape}")


def build_module(
    make: Callable[[], ModuleT], weights: WeightFile, dtype: torch.dtype, device: torch.device | str
) -> ModuleT:
    """Build a module with a file's weights, without initialising it first.

    Raises :class:`CheckpointError` that names the first missing weight, or the first of another shape.
    """
    with torch.device("meta"):
        module = make()
    tensors = weights.tensors(key for key in module.state_dict() if key in weights.shapes)
    load_weights(module, tensors, weights.name, dtype=dtype, device=device)
    return module


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Set the weights of a module on the meta device; they are copied only to change dtype or device."""
    needed = module.state_dict()
    missing = [k for k in needed if k not in tensors]
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(needed)} weights of its {type(module).__name__}"
            f" (the first is {missing[0]}): a complete checkpoint is needed"
        )
    state = {k: _in_shape(tensors[k], k, tuple(v.shape), name).to(device, dtype) for k, v in needed.items()}
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def _in_shape(tensor: Tensor, key: str, shape: tuple[int, ...], name: str) -> Tensor:
    fitting = reshaped(tensor, shape)
    if fitting is None:
        raise CheckpointError(
            f"{name} has weight {key} with shape {tuple(tensor.shape)} where {shape} is needed: the file is damaged"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} has weight {key} of type {tensor.dtype}: floating-point weights are needed")
    return fitting
