"""A stand-in for a GPU: on the CPU, and as strict as Apple's.

While :func:`stand_in_device` runs, tensors can be moved to ``DEVICE``.  There, as on a real one, an operation refuses
tensors of another device (but for single numbers), float64 does not exist, and data have to come back before Python
can read them.  Each transfer is counted.  As torch has it, what is made there in inference mode cannot be written to
outside of it.  As on Apple's, products that are written to a part of a tensor are lost (pytorch/pytorch#193385), and
there are no adaptive averages over windows that do not divide what they average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# Torch tells it from ``torch.device("cpu")``; and it is one that every torch knows how to guard and autocast.
DEVICE = torch.device("cpu", 0)


# A number, a comparison's outcome, and what is as many as there are of something.
_aten = torch.ops.aten
WAITING = tuple(getattr(_aten, name) for name in ("_local_scalar_dense", "equal", "nonzero", "masked_select"))

# What is computed into a copy where it is to be written to a part of a tensor; and the copy is forgotten.
PRODUCTS = tuple(
    getattr(_aten, name)
    for name in (
        *("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "mv", "addmv", "addmv_", "addr"),
        *("addr_", "dot", "matmul", "linear", "convolution", "addcmul", "addcmul_", "addcdiv", "addcdiv_"),
    )
)
AVERAGES = (_aten.adaptive_avg_pool2d, _aten._adaptive_avg_pool2d)


class OnDevice(Tensor):
    """A tensor that says it is on the device; ``held`` is where its numbers are."""

    held: Tensor
    inference: bool
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert to {held.dtype}: the device {DEVICE} has no float64")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        layout |= {"device": DEVICE, "requires_grad": False}
        inference = torch.is_inference_mode_enabled()
        # A wrapper made in inference mode has no views outside of it, which tensors made there do have.
        with torch.inference_mode(False):
            self: OnDevice = Tensor._make_wrapper_subclass(cls, held.shape, **layout)
        self.held, self.inference = held, inference
        return self

    def is_inference(self) -> bool:
        return self.inference

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Brings tensors to the device, and lets operations make tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.transfers: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():
            # In this mode, operations that are made of others are not taken apart before they come here.
            with self:
                parts = function.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return _run(function, args, kwargs or {}, self.transfers)


def _run(function: Any, args: Any, kwargs: dict[str, Any], transfers: Counter[str] | None = None) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = any(isinstance(t, OnDevice) for t in tensors)
    wanted = kwargs.get("device")
    moves = function is torch.ops.aten._to_copy.default or function is torch.ops.aten.copy_.default
    # Indices may come from the CPU, at the price of a transfer.
    mixed = any(t.ndim and not isinstance(t, OnDevice) for t in tensors)
    if mixed and there and function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
        mixed = not isinstance(args[0], OnDevice)
        if transfers is not None:
            transfers["to the device"] += 1
    if there and mixed and not moves:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu: {function}")
    written = kwargs.get("out", args[0] if args else None)
    if function._schema.is_mutable and getattr(written, "inference", False) and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"Inplace update to inference tensor outside InferenceMode is not allowed: {function}")
    target = there if wanted is None else torch.device(wanted) == DEVICE
    if function is torch.ops.aten.copy_.default:
        target = isinstance(args[0], OnDevice)
    if transfers is not None and moves and any(isinstance(t, OnDevice) is not target for t in tensors):
        transfers["to the device" if target else "from the device"] += 1
    if target and wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and function.overloadpacket in AVERAGES and _uneven(args[0].shape[-2:], args[1]):
        raise RuntimeError("Adaptive pool MPS: input sizes must be divisible by output sizes.")
    plain_args, plain_kwargs = tree_map(_held, (args, kwargs))
    if function._schema.is_mutable and function.overloadpacket in PRODUCTS and _is_part(_held(written)):
        return written
    result = function(*plain_args, **plain_kwargs)
    if transfers is not None and there and _waits(function, args):
        transfers["from the device"] += 1
    known = {id(_held(t)): t for t in tensors}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # What an operation gives back that it was given, as those in place do.
        return known.get(id(value), OnDevice(value) if target else value)

    return tree_map(wrap, result)


def _waits(function: Any, args: Any) -> bool:
    """Tell whether what an operation gives, or its size, has to be known before Python can go on."""
    if function.overloadpacket is torch.ops.aten.index:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return function.overloadpacket in WAITING


def _is_part(tensor: Any) -> bool:
    """Tell whether a tensor is only a part of what lies in its memory, or in another order."""
    if not isinstance(tensor, Tensor):
        return False
    return not tensor.is_contiguous() or tensor.nbytes < tensor.untyped_storage().nbytes()


def _uneven(sizes: Any, wanted: Any) -> bool:
    return any(max(size, to) % min(size, to) for size, to in zip(sizes, wanted))


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


@contextmanager
def stand_in_device() -> Iterator[Counter[str]]:
    """Have the device for a while; returns how many transfers there were, by direction."""
    mode = _Mode()
    # A parameter of the CPU cannot hold a tensor of another kind: modules that move get new ones.
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mode:
            yield mode.transfers
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
