"""Floating-point operations, and the memory of what is computed on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, baddbmm_flop


class Operations(FlopCounterMode):
    """Counts floating-point operations; those as well whose result goes into a tensor that was there."""

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(display=False, custom_mapping={aten.addmm_: addmm_flop, aten.baddbmm_: baddbmm_flop})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        out = given.pop("out", None)
        if out is None:
            return super().__torch_dispatch__(func, types, args, given)
        return out.copy_(super().__torch_dispatch__(func._overloadpacket.default, types, args, given))


def gflop(run: Callable[[], object]) -> float:
    """Return the operations of a call, in units of 10^9."""
    with Operations() as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


class Peak(TorchDispatchMode):
    """Notes how much is held at most, in bytes, of what is made while it is on: activations, not weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._alive: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._alive += [weakref.ref(t) for t in tree_flatten(made)[0] if isinstance(t, Tensor)]
        self._alive = [ref for ref in self._alive if ref() is not None]
        storages = [t.untyped_storage() for ref in self._alive if (t := ref()) is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.bytes = max(self.bytes, sum(size for place, size in sizes.items() if place not in self._weights))
        return made
