"""Choose the bridge between two families of models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lib_delta.bridges.base import Bridge, BridgeForm, BridgeSettings
from lib_delta.bridges.composed import Composed
from lib_delta.bridges.identity import SAME_SIZE, IdentityBridge
from lib_delta.bridges.learned import weights_path
from lib_delta.bridges.noise_limit import NoiseLimitBridge
from lib_delta.bridges.packed import Packed
from lib_delta.bridges.registry import bridge_form
from lib_delta.bridges.resolution import Noise, ResolutionBridge
from lib_delta.diffusion.families import Family, Sides
from lib_delta.diffusion.latent_spaces import LATENT_STRIDE, Space
from lib_delta.errors import SettingError

# The side model's size.  A number is the side, in pixels, of a square with the area that the side model works at.
SideSize = Literal["automatic", "picture"] | int
LEAST_SIDE = LATENT_STRIDE * LATENT_STRIDE


def reachable_spaces(source: Space) -> tuple[Space, ...]:
    """Return the source's space and all spaces for which learned maps exist."""
    return tuple(target for target in Space if target is source or weights_path(source, target).exists())


def choose_bridge(
    source: Family | Space,
    target: Family | Space,
    sigma_max: float | None = None,
    *,
    form: str = "stitched",
    size: SideSize = "automatic",
    noise: Noise = "averaged",
    tiled: bool = False,
    autoencoders: Path | None = None,
) -> Bridge:
    """Return the bridge between the latents of two families, or spaces.

    Args:
        source: the side model's family or space.
        target: the main model's family or space.
        sigma_max: the largest noise level of the source's training, if the target's schedule exceeds it
            (:class:`NoiseLimitBridge`).
        form: a name of :data:`lib_delta.bridges.registry.FORMS`; ignored if both share a space.
        size: the side model's size.  "automatic" shows images above the source's largest size (SD 1.x: 768 x 768) to
            it at half their size if the form halves and that is at most the largest size, and else at the area of its
            native size (512 x 512), if the form resizes.  Images below the source's smallest size (SDXL: 768 x 768)
            are shown at twice their size.  Otherwise it equals "picture", the image's full size.
        noise: see :class:`ResolutionBridge`.
        tiled: whether the image's edges meet across from each other.
        autoencoders: the folder of tiny autoencoders, for the form "taesd".

    Raises:
        SettingError: no bridge connects the two spaces, a setting is outside its choices, or a tiny autoencoder
            is missing.
        CheckpointError: a tiny autoencoder's content does not match its name.
    """
    start, end = _space(source), _space(target)
    chosen = bridge_form(form)
    automatic = _automatic(source, noise, chosen, tiled=tiled) if start is not end and chosen.resizes else None
    resolution = _resolution(size, noise, automatic, tiled=tiled)
    limit = () if sigma_max is None else (NoiseLimitBridge(sigma_max),)
    if start is end:
        return _composed(*limit, IdentityBridge(), *resolution)
    if end not in reachable_spaces(start):
        raise SettingError(_no_bridge(start, end))
    bridge = chosen.make(
        BridgeSettings(start, end, resolution[0] if resolution else SAME_SIZE, tiled=tiled, autoencoders=autoencoders)
    )
    # The limit applies to the noise level that the source receives, after averaging.  Next to a scale it applies to the
    # target's sigma: the little that a scale adds to it does not matter.
    whole = _composed(bridge, *limit) if chosen.resizes else _composed(*limit, bridge, *resolution)
    packing = target.packing if isinstance(target, Family) else 1
    return whole if packing == 1 else Packed(whole, packing)


def bridge_status(
    source: Family | Space,
    target: Family | Space,
    height: int,
    width: int,
    *,
    form: str = "stitched",
    size: SideSize = "automatic",
    autoencoders: Path | None = None,
) -> str:
    """Return the status line of the bridge for a target's latents of ``height`` and ``width``.

    For example "SDXL latents: learned bridge, 64 x 64": the size is the source's, width first as for images.  Raises
    the errors of :func:`choose_bridge`.
    """
    bridge = choose_bridge(source, target, form=form, size=size, autoencoders=autoencoders)
    return describe_bridge(bridge, target, height, width)


def describe_bridge(bridge: Bridge, target: Family | Space, height: int, width: int) -> str:
    """Return the status line of :func:`bridge_status` for an existing bridge."""
    rows, columns = bridge.source_size(height, width)
    return f"{_space(target).label} latents: {bridge.label}, {columns} x {rows}"


def _space(model: Family | Space) -> Space:
    return model.space if isinstance(model, Family) else model


def may_enlarge(source: Family, target: Family) -> bool:
    """Return whether the source may work at twice the target's size, and so at twice its sigma."""
    return source.space is not target.space and source.sides.smallest > 0


def _sides(source: Family | Space) -> Sides:
    """Return the sizes of a source; those of the first family in a space."""
    return next(family.sides for family in Family if source in (family, family.space))


def _automatic(source: Family | Space, noise: Noise, form: BridgeForm, *, tiled: bool) -> ResolutionBridge:
    """Return the bridge to the automatic size of a source in another space than the target's."""
    sides = _sides(source)
    native, largest, smallest = (side // LATENT_STRIDE for side in (sides.native, sides.largest, sides.smallest))
    return ResolutionBridge(native, largest, noise, tiled, form.halves, smallest)


def _resolution(size: SideSize, noise: Noise, automatic: Bridge | None, *, tiled: bool) -> tuple[Bridge, ...]:
    """Return the bridge that changes latents to ``size``, or none."""
    if size == "automatic":
        return () if automatic is None else (automatic,)
    if size == "picture":
        return ()
    if isinstance(size, int) and not isinstance(size, bool) and size >= LEAST_SIDE:
        side = size // LATENT_STRIDE
        return (ResolutionBridge(side, side, noise, tiled),)
    raise SettingError(f"the size of the side model must be automatic, picture or {LEAST_SIDE} and more, not {size!r}")


def _composed(*bridges: Bridge) -> Bridge:
    return bridges[0] if len(bridges) == 1 else Composed(bridges)


def _no_bridge(source: Space, target: Space) -> str:
    models = ", ".join(family.label for family in Family if family.space is target)
    *first, last = (space.label for space in reachable_spaces(source))
    reached = f"{', '.join(first)} or {last}" if first else last
    return (
        f"no bridge leads from the {source.label} latents of the side model to those of {target.label} ({models}): "
        f"choose a main checkpoint with latents of {reached}, or fit maps to those latents (docs/bridges.md)"
    )
