"""What the source's weights take, and what loading and swapping them costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.models import random_lora
from bench.timing import seconds
from lib_delta.adapters.adapter_file import AdapterFile
from lib_delta.adapters.attach import AdapterForm, Bypass, attach, detach
from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_unet
from lib_delta.models.unet import UNet

FORMS: tuple[AdapterForm, ...] = ("merged", "bypass")


def _bytes(unet: UNet) -> int:
    total = sum(t.numel() * t.element_size() for t in (*unet.parameters(), *unet.buffers()))
    for module in unet.modules():
        if isinstance(module, Bypass):
            factors = [t for adapter, _ in module.adapters for t in vars(adapter).values() if isinstance(t, Tensor)]
            total += sum(t.numel() * t.element_size() for t in factors)
    return total


def weights(unet: UNet, loras: dict[str, AdapterFile]) -> dict[str, float]:
    """Return the bytes of all weights with a LoRA attached, in those of the base alone."""
    detach(unet)
    alone, found = _bytes(unet), {}
    for title, lora in loras.items():
        for form in FORMS:
            attach(unet, [(lora, 1.0)], form)
            found[f"{title}, {form}"] = round(_bytes(unet) / alone, 3)
    detach(unet)
    return found


def swaps(unet: UNet, rank: int, device: torch.device, plain: float) -> dict[str, float]:
    """Return what taking another LoRA of all layers costs, in plain passes; the first swap warms up."""
    loras, found = [random_lora(unet, rank, "") for _ in range(2)], {}
    for form in FORMS:
        taken = [seconds(partial(attach, unet, [(loras[i % 2], 1.0)], form), device) for i in range(4)]
        found[form] = round(statistics.median(taken[1:]) / plain, 3)
    detach(unet)
    return found


def loading(unet: UNet, count: int) -> dict[str, float]:
    """Return what a checkpoint in the page cache takes until it is ready, beside reading the file alone."""
    state = {
        f"{UNET_PREFIX}{key}": tensor.detach().to("cpu", torch.float16) for key, tensor in unet.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        save_file(state, path)
        del state
        ways = {"load_file": load_file, "load_file, and every number read once": _read, "ready": _load}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(count + 1):  # the first warms up
            for name, way in ways.items():
                taken[name].append(_took(partial(way, path)))
    found: dict[str, float] = {}
    for i, clock in enumerate(("seconds", "seconds of the process")):
        times = {name: [pair[i] for pair in pairs[1:]] for name, pairs in taken.items()}
        found |= {f"{name}, {clock}": round(statistics.median(own), 4) for name, own in times.items()}
        quotients = [b / a for a, b in zip(times["load_file, and every number read once"], times["ready"])]
        found[f"ready, in load_file and reading, {clock}"] = round(statistics.median(quotients), 2)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Load a file as the package does, which maps it and reads nothing, and have its numbers in memory of its own."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}


def _load(path: Path) -> UNet:
    with WeightFile.open(path) as file:
        return load_unet(file, torch.float16)[0]


def _took(run: partial[object]) -> tuple[float, float]:
    """Return the seconds that pass, and those that this process computes, in all of its threads."""
    started, computing = time.perf_counter(), time.process_time()
    kept = run()
    taken = time.perf_counter() - started, time.process_time() - computing
    del kept
    return taken
