"""Where the side model computes, and in which types, as the settings want it and the device can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_delta.hosts.settings import device_wanted, one_of, warn_once
from lib_delta.request.setting_choices import PRECISIONS

if TYPE_CHECKING:
    import torch

# What one row of a pass through an SD UNet needs besides its weights, for each pixel of the latent.
ACTIVATION_BYTES = 32 * 1024


def side_device(device: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Return where the side model computes, as tensors there call it, and in which type: by the settings, or as the
    WebUI does.
    """
    import torch

    from lib_delta.devices import indexed

    wanted = device_wanted(_is_device)
    if wanted == "CPU":
        device, dtype = torch.device("cpu"), torch.float32
    elif wanted != "Automatic":
        device = torch.device(wanted)
    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = types.get(one_of("precision", PRECISIONS), dtype)
    if device.type == "cpu" and dtype == torch.float16:
        warn_once("a CPU does not compute in fp16: the side models run in fp32")
        dtype = torch.float32
    return indexed(device), dtype


def _is_device(name: str) -> bool:
    """Tell whether a name is that of a device which is there."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the latter of a torch that was built without CUDA
        return False
    return True


def fp8_storage(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the type that weights are stored in as fp8; None, and one warning, where there is none."""
    import torch

    fp8 = getattr(torch, "float8_e4m3fn", None)
    try:
        torch.zeros(1, device=device).to(fp8).to(dtype)
    except (RuntimeError, TypeError):  # MPS, DirectML, torch before 2.1
        warn_once(f"{device} knows no fp8: the side models' weights are stored in {str(dtype).removeprefix('torch.')}")
        return None
    return fp8
