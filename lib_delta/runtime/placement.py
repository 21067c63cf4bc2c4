"""Placement of a model's weights: in CPU memory, or temporarily on a device.

The device holds copies.  Returning to the CPU is free, because computation never writes to weights.  For a CUDA card,
the CPU's weights are in pinned memory (:mod:`lib_delta.runtime.pinned_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_delta.adapters.attach import Bypass
from lib_delta.devices import fetches, indexed
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.network import Network
from lib_delta.runtime.pinned_memory import pinned

CPU = torch.device("cpu")
Holder = dict[str, Any]  # a dictionary of a module that contains a weight


class Restorable(Protocol):
    """A temporary placement of weights on a device."""

    def restore(self) -> None:
        """Put the original weights back."""
        ...


class Visit:
    """Temporary copies of a module's weights on a device."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, indexed(device)
        self._originals: list[tuple[Holder, str, Any]] = []

    def enter(self) -> None:
        """Copy all weights to the device; weights that are there already stay."""
        self.restore()
        self.sync()

    def sync(self) -> None:
        """Copy weights that the module gained since, and drop the originals of parts that it lost."""
        bypasses = [part for part in self._module.modules() if isinstance(part, Bypass)]
        tensors = list(_tensors(self._module))
        holders = {id(holder) for holder, _, _ in tensors} | {id(vars(part)) for part in bypasses}
        self._originals = [entry for entry in self._originals if id(entry[0]) in holders]
        copied = {id(holder) for holder, _, _ in self._originals}
        for holder, name, tensor in tensors:
            if tensor.device != self._device:
                original = holder[name] = _like(tensor, pinned(tensor.detach(), self._device))
                copy = original.to(self._device, non_blocking=fetches(self._device))
                self._swap(holder, name, _like(original, copy))
        for part in bypasses:
            if id(vars(part)) not in copied:
                self._swap(vars(part), "adapters", part.on(self._device))

    def is_for(self, module: nn.Module, device: torch.device) -> bool:
        """Return whether this is the module's visit to this device."""
        return module is self._module and self._device == indexed(device)

    def _swap(self, holder: Holder, name: str, copy: Any) -> None:
        self._originals.append((holder, name, holder[name]))
        holder[name] = copy

    def restore(self) -> None:
        """Put the original weights back, and move weights that were created on the device to the CPU."""
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
    """Copy a module's weights to a device, until the returned visit is restored."""
    visit = Visit(module, device)
    visit.enter()
    return visit


class Stream:
    """A network that computes on a device, and holds the weights of each block there only while it runs.

    The layers before and after the blocks stay on the device.
    """

    def __init__(self, unet: Network, companions: Sequence[nn.Module], device: torch.device) -> None:
        """Take also the ``companions``, such as networks of controls, which stay on the device as a whole."""
        parts = self._parts = unet.streamed_parts
        inner = {id(module) for part in parts for module in part.modules()}
        ends = [layer for layer in unet.modules() if isinstance(layer, ForkedLayer) and id(layer) not in inner]
        resident = (*ends, *companions)
        self._visits = [Visit(module, device) for module in (*resident, *parts)]
        self._hooks = []
        for visit in self._visits[: len(resident)]:
            visit.enter()
        for part, visit in zip(parts, self._visits[len(resident) :]):
            self._hooks += [
                part.register_forward_pre_hook(lambda *_, visit=visit: visit.enter()),
                part.register_forward_hook(lambda *_, visit=visit: visit.restore()),
            ]

    @property
    def largest_part(self) -> int:
        """The bytes of the largest part; only one part is on the device at a time."""
        return max(sum(tensor.nbytes for _, _, tensor in _tensors(part)) for part in self._parts)

    def restore(self) -> None:
        """Put all original weights back, and stop copying."""
        for hook in self._hooks:
            hook.remove()
        for visit in self._visits:
            visit.restore()


def _tensors(module: nn.Module) -> Iterator[tuple[Holder, str, Tensor]]:
    """Yield the dictionary, the name and the tensor of each weight, including those merged for the second branch."""
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for name, tensor in tuple(holder.items()):
                if tensor is not None:
                    yield holder, name, tensor


def _like(tensor: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
