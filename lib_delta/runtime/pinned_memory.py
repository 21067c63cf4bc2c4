"""Memory of the CPU's from which a CUDA card fetches by itself (pinned memory).

It is the system's own, registered with CUDA: what torch pins is rounded up to powers of two (SD 1.5's UNet takes
1978 MB for 1639), and stays pinned when nothing uses it any more.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor

# What is registered are whole pages, and none that others have a part in.
PAGE = 4096
# What is smaller is on its way at once, pinned or not.
LEAST = 64 * 1024
# For all of CUDA's contexts (cudaHostRegisterPortable).
PORTABLE = 1


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor in memory that a CUDA card fetches from; as it is for other devices, and where there is none.

    The memory is registered for as long as something uses it, and no longer.
    """
    apart = tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.nbytes < LEAST
    if device.type != "cuda" or apart or tensor.is_pinned():
        return tensor
    memory = _registered(tensor.nbytes, device)
    if memory is None:
        return tensor
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _registered(size: int, device: torch.device) -> Tensor | None:
    """Return so many bytes of registered memory; None where the system lets no more of its memory be registered."""
    runtime = torch.cuda.cudart()
    if not hasattr(runtime, "cudaHostRegister"):
        return None
    pages = -(-size // PAGE) * PAGE
    owner = numpy.empty(pages + PAGE, numpy.uint8)
    start = -owner.ctypes.data % PAGE
    part = owner[start : start + pages]
    if int(runtime.cudaHostRegister(part.ctypes.data, pages, PORTABLE)) != 0:
        _forget_error(device)
        return None
    # An array tells when it ends, before its memory is gone; a tensor's storage does not.
    weakref.finalize(owner, _release, runtime, part.ctypes.data).atexit = False
    return torch.from_numpy(part)[:size]


def _release(runtime: Any, address: int) -> None:
    runtime.cudaHostUnregister(address)


def _forget_error(device: torch.device) -> None:
    """Have CUDA's error of the last call come out here, and not in whatever is computed next."""
    with suppress(RuntimeError):
        torch.ones(1, device=device)
