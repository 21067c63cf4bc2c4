"""Compile a UNet if the user enables it; fall back to the plain UNet if torch cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lib_delta.devices import out_of_memory
from lib_delta.errors import DeltaError
from lib_delta.models.unet import UNet

Backend = str | Callable[..., Any]


class Compiled:
    """A function that torch compiles at its first call with each shape, which takes minutes.

    After the first error that is not the function's, it calls the plain function for good, and passes the reason to
    ``warn``.
    """

    def __init__(self, plain: Callable[..., Any], warn: Callable[[str], None], backend: Backend) -> None:
        self._plain, self._warn = plain, warn
        self._compiled: Callable[..., Any] | None = None
        try:
            self._compiled = torch.compile(plain, dynamic=False, backend=backend)
        except RuntimeError as error:  # this torch cannot compile on this Python or system
            self._fall_back(error)

    def _fall_back(self, error: Exception) -> None:
        self._compiled = None
        reason = next(iter(str(error).splitlines()), "")[:200]
        self._warn(f"the side model could not be compiled, and runs as it is ({type(error).__name__}: {reason})")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **named)
            except Exception as error:
                if isinstance(error, DeltaError) or out_of_memory(error):
                    raise
                self._fall_back(error)
        return self._plain(*arguments, **named)


def compile_unet(unet: UNet, enabled: bool, warn: Callable[[str], None], backend: Backend = "inductor") -> None:
    """Compile a UNet's forward pass from now on, or restore the plain one if not ``enabled``."""
    compiled = vars(unet).get("forward")
    if enabled and compiled is None:
        setattr(unet, "forward", Compiled(unet.forward, warn, backend))  # noqa: B010 (mypy rejects assigning a method)
    elif not enabled and compiled is not None:
        delattr(unet, "forward")
