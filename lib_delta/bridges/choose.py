"""The right bridge for two families of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from lib_delta.bridges.base import Bridge
from lib_delta.bridges.composed import Composed
from lib_delta.bridges.identity import IdentityBridge
from lib_delta.bridges.learned import SAME_SIZE, load_bridge, weights_path
from lib_delta.bridges.noise_limit import NoiseLimitBridge
from lib_delta.bridges.resolution import Noise, ResolutionBridge
from lib_delta.bridges.scale import ScaleBridge
from lib_delta.bridges.through_pixels import taesd_bridge
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.latent_spaces import LATENT_STRIDE, Space
from lib_delta.errors import SettingError

BridgeForm = Literal["learned", "taesd", "published", "same_snr"]
BRIDGE_FORMS: tuple[BridgeForm, ...] = get_args(BridgeForm)
# The size of the side model: a number is the side, in pixels, of a square as large as the picture it is shown.
SideSize = Literal["automatic", "picture"] | int
NATIVE_SIDE, LARGEST_SIDE = 512, 768  # the sizes that SD 1.x was made for, and that it still knows well


def reachable_spaces(source: Space) -> tuple[Space, ...]:
    """Return the spaces that bridges lead to from a source's: its own, and those whose maps are here."""
    return tuple(target for target in Space if target is source or weights_path(source, target).exists())


def choose_bridge(
    source: Family | Space,
    target: Family | Space,
    sigma_max: float | None = None,
    form: BridgeForm = "learned",
    size: SideSize = "automatic",
    noise: Noise = "averaged",
    tiled: bool = False,
    autoencoders: Path | None = None,
) -> Bridge:
    """Return the bridge between the latents of two families, or spaces.

    Args:
        source: what the side model works in.
        target: what the main model works in.
        sigma_max: the largest noise level that the source knows, where the target's schedule goes
            further (:class:`NoiseLimitBridge`).
        form: "learned" maps; "taesd", where states go over pictures (:mod:`lib_delta.bridges.through_pixels`); or one
            of the two forms of :class:`ScaleBridge`.  Without meaning where both share a space.
        size: of the side model.  "automatic" shows it pictures above 768 x 768 at the size of
            512 x 512, where a learned bridge is needed; elsewhere it is "picture", as large as the picture.
        noise: see :class:`ResolutionBridge`.
        tiled: whether the picture's edges meet those across from them.
        autoencoders: the folder of tiny autoencoders, for "taesd".

    Raises:
        SettingError: no bridge leads from one space to the other, a setting is outside its choices, or a
            tiny autoencoder is missing.
        CheckpointError: one is another file than its name says.
    """
    start, end = _space(source), _space(target)
    if form not in BRIDGE_FORMS:
        raise SettingError(f"the form of a bridge must be one of {', '.join(BRIDGE_FORMS)}, not {form!r}")
    fitted = form in ("learned", "taesd")
    resolution = _resolution(size, noise, tiled, automatic=start is not end and fitted)
    limit = () if sigma_max is None else (NoiseLimitBridge(sigma_max),)
    if start is end:
        return _composed(*limit, IdentityBridge(), *resolution)
    if end not in reachable_spaces(start):
        raise SettingError(_no_bridge(start, end))
    sized = resolution[0] if resolution else SAME_SIZE
    # What counts is the noise that the source is shown in the end.
    if form == "learned":
        return _composed(replace(load_bridge(weights_path(start, end), tiled), resolution=sized), *limit)
    if form == "taesd":
        return _composed(taesd_bridge(start, end, autoencoders, sized, tiled), *limit)
    if start.channels != end.channels:
        raise SettingError(
            f"latents of {start.label} and {end.label} differ in more than scale: "
            f"the form must be learned or taesd, not {form}"
        )
    # The target's sigma is compared: that a scale makes the source's a little larger does not count.
    return _composed(*limit, ScaleBridge(start.scale_factor / end.scale_factor, form), *resolution)


def bridge_status(
    source: Family | Space,
    target: Family | Space,
    height: int,
    width: int,
    form: BridgeForm = "learned",
    size: SideSize = "automatic",
    autoencoders: Path | None = None,
) -> str:
    """Say in a line which bridge a target's latents of ``height`` and ``width`` get, and how large the source's are.

    As in "SDXL latents: learned bridge, 64 x 64" (width first, as pictures are given).  Raises as
    :func:`choose_bridge` does.
    """
    return describe_bridge(
        choose_bridge(source, target, form=form, size=size, autoencoders=autoencoders), target, height, width
    )


def describe_bridge(bridge: Bridge, target: Family | Space, height: int, width: int) -> str:
    """Say in a line what :func:`bridge_status` says of a bridge that is there already."""
    rows, columns = bridge.source_size(height, width)
    return f"{_space(target).label} latents: {bridge.label}, {columns} x {rows}"


def _space(model: Family | Space) -> Space:
    return model.space if isinstance(model, Family) else model


def _resolution(size: SideSize, noise: Noise, tiled: bool, automatic: bool) -> tuple[Bridge, ...]:
    if size == "automatic":
        return (
            (ResolutionBridge(NATIVE_SIDE // LATENT_STRIDE, LARGEST_SIDE // LATENT_STRIDE, noise, tiled),)
            if automatic
            else ()
        )
    if size == "picture":
        return ()
    if isinstance(size, bool) or not isinstance(size, int) or size < LATENT_STRIDE * LATENT_STRIDE:
        least = LATENT_STRIDE * LATENT_STRIDE
        raise SettingError(f"the size of the side model must be automatic, picture or {least} and more, not {size!r}")
    return (ResolutionBridge(size // LATENT_STRIDE, size // LATENT_STRIDE, noise, tiled),)


def _composed(*bridges: Bridge) -> Bridge:
    return bridges[0] if len(bridges) == 1 else Composed(bridges)


def _no_bridge(source: Space, target: Space) -> str:
    models = ", ".join(family.label for family in Family if family.space is target)
    *others, last = (space.label for space in reachable_spaces(source))
    reached = f"{', '.join(others)} or {last}" if others else last
    return (
        f"no bridge leads from the {source.label} latents of the side model to those of {target.label} ({models}): "
        f"choose a main checkpoint with latents of {reached}"
    )
