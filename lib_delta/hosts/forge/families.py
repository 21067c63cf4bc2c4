"""The families of Forge's checkpoints."""

from __future__ import annotations

from typing import Any

from lib_delta.diffusion.families import Family
from lib_delta.errors import SettingError

# By channels and scale factor of the latents.  Class names are no help: some models pretend to be SDXL.
FAMILIES = {
    (4, 0.18215): Family.SD1,
    (4, 0.13025): Family.SDXL,
    (16, 1.5305): Family.SD3,
    (16, 0.3611): Family.FLUX,
    (16, 1.0): Family.WAN,
    (128, 1.0): Family.FLUX2,
    (32, 1.0): Family.MUGEN,
}
FLAGS = {"is_sdxl": Family.SDXL, "is_sd3": Family.SD3, "is_sd2": Family.SD2, "is_sd1": Family.SD1}


def family_by_latents(model: Any) -> Family:
    """Return the family of the WebUI's checkpoint; raises :class:`SettingError` for unknown latents."""
    latents = getattr(getattr(model, "model_config", None), "latent_format", None)
    flagged = next((family for flag, family in FLAGS.items() if getattr(model, flag, False)), None)
    if latents is None:
        family, unknown = flagged, "a family"
    else:
        family = FAMILIES.get((latents.latent_channels, latents.scale_factor))
        unknown = f"latents ({type(latents).__name__})"
    if family is None:
        raise SettingError(
            f"the main checkpoint ({type(model).__name__}) is of {unknown} that Delta Sampling does not know: "
            "SD 1.x, SD 2.x, SDXL, SD 3 or one with FLUX.1's or FLUX.2's latents is needed"
        )
    # SD 1.x and SD 2.x share their latents.
    return Family.SD2 if family is Family.SD1 and flagged is Family.SD2 else family


def is_flow(schedule: Any) -> bool:
    """Return whether a model's schedule is that of flow matching; reForge marks it only by a base class."""
    by_name = any(kind.__name__ == "CONST" for kind in type(schedule).__mro__)
    return by_name or getattr(schedule, "prediction_type", None) == "const"
