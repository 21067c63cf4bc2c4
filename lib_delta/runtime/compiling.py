"""A UNet that torch compiles, if the user wants that; where torch cannot, it computes as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib_delta.devices import out_of_memory
from lib_delta.errors import DeltaError
from lib_delta.models.unet import UNet

Backend = str | Callable[..., Any]


class Compiled:
    """A function as torch compiles it: at its first call, for each shape anew, in minutes.

    At the first fault that is not the function's own, it is the plain one for good, and ``told`` hears why.
    """

    def __init__(self, plain: Callable[..., Any], warn: Callable[[str], None], backend: Backend) -> None:
        self._plain, self._told = plain, warn
        self._compiled: Callable[..., Any] | None = None
        try:
            self._compiled = torch.compile(plain, dynamic=False, backend=backend)
        except RuntimeError as error:  # this torch has no compiler for this Python or this system
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        self._compiled = None
        first = next(iter(str(error).splitlines()), "")
        self._told(f"the side model could not be compiled, and runs as it is ({type(error).__name__}: {first[:200]})")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **named)
            except Exception as error:
                if isinstance(error, DeltaError) or out_of_memory(error):
                    raise
                self._fall_back(error)
        return self._plain(*arguments, **named)


def compile_unet(unet: UNet, wanted: bool, warn: Callable[[str], None], backend: Backend = "inductor") -> None:
    """Have a UNet compiled from now on, or no longer."""
    compiled = vars(unet).get("forward")
    if wanted and compiled is None:
        setattr(unet, "forward", Compiled(unet.forward, warn, backend))  # noqa: B010 (mypy knows it for a method)
    elif not wanted and compiled is not None:
        delattr(unet, "forward")
