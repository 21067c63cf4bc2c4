"""The side model's device and types, by the settings and the device's abilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_delta.hosts.settings import chosen_device, one_of, warn_once
from lib_delta.request.setting_choices import PRECISIONS

if TYPE_CHECKING:
    import torch

# Bytes that one row of an SD UNet's forward pass needs for each pixel of the latent, in addition to the weights.
ACTIVATION_BYTES = 32 * 1024


def side_device_and_type(device: torch.device, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
    """Return the side model's device, with its index, and computing type.

    ``device`` and ``dtype`` are the WebUI's, which the settings may replace.
    """
    import torch

    from lib_delta.devices import indexed

    choice = chosen_device(_exists)
    if choice == "CPU":
        device, dtype = torch.device("cpu"), torch.float32
    elif choice != "Automatic":
        device = torch.device(choice)
    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = types.get(one_of("precision", PRECISIONS), dtype)
    if device.type == "cpu" and dtype == torch.float16:
        warn_once("a CPU does not compute in fp16: the side models run in fp32")
        dtype = torch.float32
    return indexed(device), dtype


def _exists(name: str) -> bool:
    """Return whether torch can use a device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the latter from a torch that was built without CUDA
        return False
    return True


def fp8_storage(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the type that stores weights in fp8; None, with one warning, if the device has none."""
    import torch

    fp8 = getattr(torch, "float8_e4m3fn", None)
    try:
        torch.zeros(1, device=device).to(fp8).to(dtype)
    except (RuntimeError, TypeError):  # MPS, DirectML, torch before 2.1
        warn_once(f"{device} knows no fp8: the side models' weights are stored in {str(dtype).removeprefix('torch.')}")
        return None
    return fp8
