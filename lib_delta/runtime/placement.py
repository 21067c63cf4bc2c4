"""Where a model's weights are: at home in CPU memory, or for a while on a device.

What is on a device is a copy, so going home costs nothing: weights are never written to where they compute.
Towards a CUDA card they lie in memory from which it fetches by itself (:mod:`lib_delta.runtime.pinned_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_delta.adapters.attach import Bypass
from lib_delta.devices import fetches, indexed
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.unet import UNet
from lib_delta.runtime.pinned_memory import pinned

CPU = torch.device("cpu")
Holder = dict[str, Any]


class Restorable(Protocol):
    """What has weights on a device for a while."""

    def restore(self) -> None:
        """Have them where they were."""
        ...


class Visit:
    """All weights of a module on a device for a while."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, indexed(device)
        self._originals: list[tuple[Holder, str, Any]] = []

    def enter(self) -> None:
        """Have copies on the device; what is there already stays."""
        self.restore()
        self.sync()

    def sync(self) -> None:
        """Have copies of what came since as well; what is no part of the module any more is let go of."""
        bypasses = [part for part in self._module.modules() if isinstance(part, Bypass)]
        tensors = list(_tensors(self._module))
        holders = {id(holder) for holder, _, _ in tensors} | {id(vars(part)) for part in bypasses}
        self._originals = [entry for entry in self._originals if id(entry[0]) in holders]
        left = {id(holder) for holder, _, _ in self._originals}
        for holder, name, tensor in tensors:
            if tensor.device != self._device:
                home = holder[name] = _like(tensor, pinned(tensor.detach(), self._device))
                self._swap(holder, name, _like(home, home.to(self._device, non_blocking=fetches(self._device))))
        for part in bypasses:
            if id(vars(part)) not in left:
                self._swap(vars(part), "adapters", part.on(self._device))

    def is_for(self, module: nn.Module, device: torch.device) -> bool:
        """Tell whether it is this module's visit to this device."""
        return module is self._module and self._device == indexed(device)

    def _swap(self, holder: Holder, name: str, copy: Any) -> None:
        self._originals.append((holder, name, holder[name]))
        holder[name] = copy

    def restore(self) -> None:
        """Have the weights where they were, and those with them that were made on the device meanwhile."""
        if not self._originals:
            return
        while self._originals:
            holder, name, tensor = self._originals.pop()
            holder[name] = tensor
        for holder, name, tensor in _tensors(self._module):
            if tensor.device == self._device:
                holder[name] = _like(tensor, tensor.to(CPU))
        for part in self._module.modules():
            if isinstance(part, Bypass):
                part.adapters = part.on(CPU)


def copy_to_device(module: nn.Module, device: torch.device) -> Visit:
    """Have all of a module on a device, until it is told to come home."""
    visiting = Visit(module, device)
    visiting.enter()
    return visiting


class Stream:
    """A UNet that computes on a device, where each part's weights are only while it runs; its ends stay there."""

    def __init__(self, unet: UNet, others: Sequence[nn.Module], device: torch.device) -> None:
        """Take what computes beside it as well, as networks of controls do, which are there whole."""
        blocks = (*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks)
        parts = self._parts = [part for block in blocks for part in block]
        inner = {id(module) for part in parts for module in part.modules()}
        ends = [layer for layer in unet.modules() if isinstance(layer, ForkedLayer) and id(layer) not in inner]
        there = (*ends, *others)
        self._visits = [Visit(module, device) for module in (*there, *parts)]
        self._hooks = []
        for visit in self._visits[: len(there)]:
            visit.enter()
        for part, visit in zip(parts, self._visits[len(there) :]):
            self._hooks += [
                part.register_forward_pre_hook(lambda *_, visit=visit: visit.enter()),
                part.register_forward_hook(lambda *_, visit=visit: visit.restore()),
            ]

    @property
    def largest_part(self) -> int:
        """The bytes of the largest of the parts, which are on the device one at a time."""
        return max(sum(tensor.nbytes for _, _, tensor in _tensors(part)) for part in self._parts)

    def restore(self) -> None:
        """Have all weights at home, and let them stay there."""
        for hook in self._hooks:
            hook.remove()
        for visit in self._visits:
            visit.restore()


def _tensors(module: nn.Module) -> Iterator[tuple[Holder, str, Tensor]]:
    """Return the places of a module's weights, and of those that are merged for its second branch."""
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for name, tensor in tuple(holder.items()):
                if tensor is not None:
                    yield holder, name, tensor


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
