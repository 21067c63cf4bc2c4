"""Devices: how much memory one has left, how errors say that it ran out, and what a host has switched on there."""

from __future__ import annotations

import ctypes
import errno
import re
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

# CUDA and ROCm, MPS, DirectML, XPU, the CPU and their libraries each have words of their own.  cuBLAS and cuDNN that
# find no room for what they set up say that they could not start, or that they know no way to compute.
_OUT_OF_MEMORY = re.compile(
    r"(out of|not enough|insufficient|(cannot|can't|could not|failed to) allocate) ((gpu|video|device|host) )*memory"
    r"|could not allocate tensor|allocation on device|failed to allocate private mtlbuffer|invalid buffer size"
    r"|alloc_?failed|allocation_fail(ed|ure)|out_?of_?((device|host)_?)?(memory|resources)|error_?memory_?allocation"
    r"|cu(blas|dnn)_status_not_initialized|unable to find (an engine|a valid cudnn algorithm)"
    r"|bad_alloc|bad allocation|memory resources are available",
    re.IGNORECASE,
)
_PAGING_FILE_TOO_SMALL = 1455  # what Windows calls it


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or in RAM."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) == _PAGING_FILE_TOO_SMALL
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def indexed(device: torch.device) -> torch.device:
    """Return a device as its tensors call it: "cuda" is the current one, as "cuda:0", and "mps" is "mps:0".

    A host says either, torch 2.1 asks no device without an index for its free memory, and the two are never equal.
    """
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    current = getattr(getattr(torch, device.type, None), "current_device", None)
    return torch.device(device.type, 0 if current is None else int(current()))


def fetches(device: torch.device) -> bool:
    """Tell whether a device copies from the CPU's memory by itself, without a copy being waited for.

    Towards the CPU no copy may be left unwaited for: Python would read what has not come yet.
    """
    return device.type == "cuda"


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes a device can still give, None where it does not say."""
    device = indexed(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = getattr(torch.mps, "recommended_max_memory", None) if device.type == "mps" else None
    return None if limit is None else max(0, limit() - torch.mps.current_allocated_memory())


def empty_cache(device: torch.device) -> None:
    """Have a device's allocator give back what it keeps for later, so that pieces of it can be joined."""
    release = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if release is not None:
        release()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch off the autocast a host may be running under: the weights' own type is the one asked for."""
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, AssertionError, AttributeError):
        # This torch has no autocast for this device, so there is none to switch off: an older one for Apple's, one
        # without its modules for Intel's, and none for DirectML's.
        return nullcontext()


def trim_heap() -> bool:
    """Have the C library give back what it keeps of freed memory, 1.6 GB after an SD 1.x base; True if it did.

    Only glibc keeps so much, and only it can be asked.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim(0)) if trim is not None else False
