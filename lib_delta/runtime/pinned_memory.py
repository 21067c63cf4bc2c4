"""CPU memory that a CUDA card reads directly (pinned memory).

Ordinary memory of the system is registered with CUDA. torch's pinned allocations are rounded up to powers of two (SD
1.5's UNet takes 1978 MB instead of 1639), and stay pinned after the last use.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor

# Registration takes whole pages, which must not contain other data.
PAGE = 4096
# Smaller tensors transfer as fast unpinned.
MIN_PINNED_BYTES = 64 * 1024
# Valid in all CUDA contexts (cudaHostRegisterPortable).
PORTABLE = 1


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to pinned memory; return it unchanged for other devices, or if no memory can be registered.

    The memory stays registered only while something uses it.
    """
    unsuitable = tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < MIN_PINNED_BYTES
    if device.type != "cuda" or unsuitable or tensor.is_pinned():
        return tensor
    memory = _registered(tensor.nbytes, device)
    if memory is None:
        return tensor
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _registered(size: int, device: torch.device) -> Tensor | None:
    """Return ``size`` bytes of registered memory; None if the system refuses to register more."""
    runtime = torch.cuda.cudart()
    if not hasattr(runtime, "cudaHostRegister"):
        return None
    pages = -(-size // PAGE) * PAGE
    buffer = numpy.empty(pages + PAGE, numpy.uint8)
    start = -buffer.ctypes.data % PAGE
    part = buffer[start : start + pages]
    if int(runtime.cudaHostRegister(part.ctypes.data, pages, PORTABLE)) != 0:
        _forget_error(device)
        return None
    # An array runs its finalizer before its memory is freed; a tensor's storage has no finalizer.
    weakref.finalize(buffer, _release, runtime, part.ctypes.data).atexit = False
    return torch.from_numpy(part)[:size]


def _release(runtime: Any, address: int) -> None:
    runtime.cudaHostUnregister(address)


def _forget_error(device: torch.device) -> None:
    """Raise CUDA's error of the last call here, so that the next computation does not raise it."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)
