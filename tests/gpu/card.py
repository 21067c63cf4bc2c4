"""The checked device, its memory, and the machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MB, GB = 2**20, 2**30
PACKAGES = ("torch", "torchvision", "xformers", "triton", "numpy", "safetensors", "transformers", "torch-directml")
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "COMMANDLINE_ARGS")


@dataclass(frozen=True)
class Card:
    """A torch device and torch's information about it; DirectML reports almost none."""

    device: torch.device

    @property
    def _module(self) -> Any:
        return getattr(torch, self.device.type, None)

    def _asked(self, *names: str) -> Any:
        """Return the result of the first of these functions that exists, or None."""
        function = next((f for name in names if (f := getattr(self._module, name, None)) is not None), None)
        return None if function is None else function()

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def unindexed(self) -> torch.device:
        """The device without an index, as AUTOMATIC1111 names it; DirectML's always has one."""
        return self.device if self.device.type == "privateuseone" else torch.device(self.device.type)

    def wait(self) -> None:
        """Wait until the device has finished its queued work."""
        if self.is_cpu:
            return
        if getattr(self._module, "synchronize", None) is None:
            torch.zeros(1, device=self.device).cpu()
        else:
            self._asked("synchronize")

    def used(self) -> int | None:
        """Return the bytes in use by tensors."""
        return None if self.is_cpu else self._asked("memory_allocated", "current_allocated_memory")

    def peak(self) -> int | None:
        """Return the peak of the bytes in use since :meth:`forget_peak`."""
        return None if self.is_cpu else self._asked("max_memory_allocated")

    def forget_peak(self) -> None:
        """Count the peak from now on."""
        if not self.is_cpu:
            self._asked("reset_peak_memory_stats")

    def total(self) -> int | None:
        """Return the device's memory in bytes."""
        if self.device.type in ("cuda", "xpu"):
            return int(self._module.get_device_properties(self.device).total_memory)
        return self._asked("recommended_max_memory") if self.device.type == "mps" else None

    def free(self) -> int | None:
        """Return the device's free bytes."""
        if self.device.type in ("cuda", "xpu") and hasattr(self._module, "mem_get_info"):
            return int(self._module.mem_get_info(self.device)[0])
        total, used = self.total(), self.used()
        return None if total is None or used is None else total - used

    @contextmanager
    def short(self, share: float) -> Iterator[None]:
        """Limit free memory to a share of the last pass's need (only on CUDA)."""
        self.wait()
        resting, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (resting + share * (peak - resting)) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def find(name: str = "") -> Card:
    """Return the device of a name, or the one that a WebUI would take: of CUDA (or ROCm), Intel, Apple or DirectML.

    Without any it is the CPU.
    """
    if name == "directml":
        return Card(importlib.import_module("torch_directml").device())
    if name:
        return Card(torch.empty(0, device=name).device)
    if torch.cuda.is_available():
        return Card(torch.device("cuda", torch.cuda.current_device()))
    if _has_xpu():  # before Intel's extension is asked for, which ends the process where torch is another than its own
        return Card(torch.device("xpu", 0))
    for extension in ("torch_directml", "intel_extension_for_pytorch"):
        try:
            importlib.import_module(extension)
        except (ImportError, OSError):  # not installed, or its libraries are of another torch
            continue
        if extension == "torch_directml":
            return find("directml")
        if _has_xpu():
            return Card(torch.device("xpu", 0))
    return Card(torch.device("mps", 0) if torch.backends.mps.is_available() else torch.device("cpu"))


def _has_xpu() -> bool:
    return hasattr(torch, "xpu") and bool(torch.xpu.is_available())


def described(card: Card) -> Iterator[tuple[str, str]]:
    """Describe the card and the machine, as far as is known."""
    yield "device", card_name(card)
    yield "driver", _driver(card)
    yield "system", f"{platform.platform()}, Python {platform.python_version()} ({sys.executable})"
    yield "packages", ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name)))
    yield "torch", _build(card)
    told = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    yield "environment", ", ".join(told) or "nothing set"
    yield "VRAM", f"{_gigabytes(card.free())} free of {_gigabytes(card.total())}"
    free, total = memory()
    yield "RAM", f"{_gigabytes(free)} free of {_gigabytes(total)}"


def card_name(card: Card) -> str:
    """Return the card's name."""
    if card.device.type in ("cuda", "xpu"):
        properties = card._module.get_device_properties(card.device)
        return f"{properties.name} ({card.device})"
    if card.device.type == "privateuseone":
        return f"{importlib.import_module('torch_directml').device_name(card.device.index or 0)} (DirectML)"
    return f"{platform.processor() or platform.machine()} ({card.device})"


def _driver(card: Card) -> str:
    if card.device.type != "cuda" or torch.version.hip:
        return "not told"
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or "not told"
    except (OSError, subprocess.SubprocessError) as error:
        return f"not told ({type(error).__name__})"


def _build(card: Card) -> str:
    if card.device.type != "cuda":
        build = torch.version.cuda or torch.version.hip
        return f"built for {'CUDA ' + build if build else 'no CUDA'}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(card.device)
    kernels = torch.cuda.get_arch_list()
    parts = [
        f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        f"cuDNN {torch.backends.cudnn.version()}",
        f"the card is sm_{major}{minor}, kernels for {' '.join(kernels)}",
        f"bf16 {'known' if torch.cuda.is_bf16_supported() else 'not known'}",
        f"allocator {torch.cuda.get_allocator_backend()}",
        f"TF32 {torch.backends.cuda.matmul.allow_tf32}/{torch.backends.cudnn.allow_tf32}",
    ]
    return ", ".join(parts)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gigabytes(size: int | None) -> str:
    return "not told" if size is None else f"{size / GB:.1f} GB"


def memory() -> tuple[int | None, int | None]:
    """Return the machine's free and total memory in bytes, if known."""
    try:
        found = importlib.import_module("psutil").virtual_memory()
    except ImportError:
        if not hasattr(os, "sysconf"):
            return None, None
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * size if "SC_AVPHYS_PAGES" in os.sysconf_names else None
        return free, pages * size
    return found.available, found.total


def own_memory() -> int | None:
    """Return this process's resident bytes, pinned memory included."""
    try:
        return int(importlib.import_module("psutil").Process().memory_info().rss)
    except ImportError:
        if sys.platform != "linux":
            return None
        with open("/proc/self/statm") as stream:  # noqa: PTH123 (of the system's, and no file)
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
