"""Devices as their tensors call them, what they have free, and what may be copied without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_delta import devices
from lib_delta.adapters.attach import Bypass, attach
from lib_delta.devices import free_memory, indexed
from lib_delta.runtime.placement import CPU
from tests.support.counting import lora
from tests.support.tiny_unet import tiny_unet


class Runtime:
    """What CUDA's runtime says; all else is torch's own, which takes no device without an index (2.1)."""

    def cudaMemGetInfo(self, index: int) -> tuple[int, int]:  # noqa: N802
        return (index + 1) * 2**30, 2**33


def test_a_card_says_what_it_has_free_with_and_without_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert free_memory(torch.device("cuda")) == free_memory(torch.device("cuda:1")) == 2**31
    assert free_memory(torch.device("cuda:0")) == 2**30


@pytest.mark.parametrize(
    ("said", "meant"),
    [("cpu", "cpu"), ("meta", "meta"), ("mps", "mps:0"), ("cuda:1", "cuda:1"), ("privateuseone:0", "privateuseone:0")],
)
def test_devices_are_named_as_their_tensors_name_them(said: str, meant: str) -> None:
    assert indexed(torch.device(said)) == torch.device(meant)


class Copies(TorchDispatchMode):
    """Notes where tensors are copied to without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.unwaited: list[torch.device] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("non_blocking"):
            self.unwaited.append(kwargs["device"])
        if function is torch.ops.aten._to_copy.default and args[0].is_meta:
            return torch.zeros(args[0].shape)  # there are no numbers to bring
        return function(*args, **kwargs)


def test_only_a_card_that_fetches_by_itself_is_not_waited_for() -> None:
    """A copy back that is not waited for is read before it is there."""
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], "bypass")
    bypasses = [part for part in unet.modules() if isinstance(part, Bypass)]
    with Copies() as copies:
        for device in (torch.device("meta"), CPU):
            for part in bypasses:
                part.adapters = part.on(device)
    assert bypasses and copies.unwaited == []
    assert devices.fetches(torch.device("cuda:0")) and not devices.fetches(CPU)
