"""Devices: free memory, out-of-memory errors, and autocast."""

from __future__ import annotations

import ctypes
import errno
import re
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

# CUDA and ROCm, MPS, DirectML, XPU, the CPU and their libraries word this differently.  cuBLAS and cuDNN report a
# failed initialization, or that they found no engine, when there is no room for their workspace.
_OUT_OF_MEMORY = re.compile(
    r"(out of|not enough|insufficient|(cannot|can't|could not|failed to) allocate) ((gpu|video|device|host) )*memory"
    r"|could not allocate tensor|allocation on device|failed to allocate private mtlbuffer|invalid buffer size"
    r"|alloc_?failed|allocation_fail(ed|ure)|out_?of_?((device|host)_?)?(memory|resources)|error_?memory_?allocation"
    r"|cu(blas|dnn)_status_not_initialized|unable to find (an engine|a valid cudnn algorithm)"
    r"|bad_alloc|bad allocation|memory resources are available",
    re.IGNORECASE,
)
_PAGING_FILE_TOO_SMALL = 1455  # Windows' error code ERROR_COMMITMENT_LIMIT


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that memory ran out, on a GPU or in RAM."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) == _PAGING_FILE_TOO_SMALL
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def indexed(device: torch.device) -> torch.device:
    """Return a device with its index, as its tensors report it: "cuda" as the current "cuda:0", "mps" as "mps:0".

    Hosts use both forms, which never compare equal, and torch 2.1 reports free memory only for a device with an index.
    """
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    current = getattr(getattr(torch, device.type, None), "current_device", None)
    return torch.device(device.type, 0 if current is None else int(current()))


def fetches(device: torch.device) -> bool:
    """Return whether a device can copy from the CPU's memory without Python waiting for it.

    Copies to the CPU must always be waited for: Python would read memory that is not yet written.
    """
    return device.type == "cuda"


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes a device can still allocate, or None if it does not report that."""
    device = indexed(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit = getattr(torch.mps, "recommended_max_memory", None) if device.type == "mps" else None
    return None if limit is None else max(0, limit() - torch.mps.current_allocated_memory())


def empty_cache(device: torch.device) -> None:
    """Release the memory that a device's allocator caches, so that adjacent pieces can be joined."""
    release = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if release is not None:
        release()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch off a host's autocast, so that layers compute in their weights' type."""
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, AssertionError, AttributeError):
        # This torch has no autocast for this device, so there is none to switch off.  Older ones have none for Apple's
        # devices, those without Intel's modules none for Intel's, and no torch has one for DirectML.
        return nullcontext()


def trim_heap() -> bool:
    """Return freed memory from the C library to the system (1.6 GB after an SD 1.x base); True if it did.

    Only glibc retains so much, and only glibc has a function for this.
    """
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return bool(trim(0)) if trim is not None else False
