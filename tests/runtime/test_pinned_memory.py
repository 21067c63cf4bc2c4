"""Pinned memory: how much is registered, and for how long; counted by a stand-in without a card."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_delta.runtime.pinned_memory import MIN_PINNED_BYTES, PAGE, pinned

CARD = torch.device("cuda", 0)
OUT_OF_MEMORY, ALREADY_REGISTERED = 2, 712


class Runtime:
    """CUDA's runtime, which takes no memory twice, nor more than ``limit`` bytes."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if any(start < address + size and address < start + taken for start, taken in self.registered.items()):
            return ALREADY_REGISTERED
        if self.bytes + size > self.limit:
            return OUT_OF_MEMORY
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0

    @property
    def bytes(self) -> int:
        return sum(self.registered.values())

    def has(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        return any(start <= address < start + size for start, size in self.registered.items())


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor, *_: runtime.has(tensor))
    yield runtime
    gc.collect()
    assert not runtime.registered


def model() -> nn.Module:
    """Return weights of sizes just above powers of two, where rounding up costs most."""
    return nn.ModuleList(nn.Linear(side, 513) for side in (65, 129, 257, 520)).requires_grad_(False)


def pin(module: nn.Module) -> None:
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(pinned(weight.detach(), CARD), requires_grad=False)


def test_what_is_registered_is_what_there_is_and_goes_with_it(runtime: Runtime) -> None:
    module = model()
    wanted = {name: weight.clone() for name, weight in module.state_dict().items()}
    sizes = [weight.nbytes for weight in wanted.values() if weight.nbytes >= MIN_PINNED_BYTES]
    pin(module)
    assert 0 <= runtime.bytes - sum(sizes) < PAGE * len(sizes)
    assert all(address % PAGE == 0 and size % PAGE == 0 for address, size in runtime.registered.items())
    assert all(torch.equal(weight, wanted[name]) for name, weight in module.state_dict().items())
    before = dict(runtime.registered)
    pin(module)
    assert runtime.registered == before, "what is registered stays where it is"
    view = module.state_dict()["3.weight"][1:]
    del module
    gc.collect()
    assert len(runtime.registered) == 1, "a view keeps its memory"
    del view
    gc.collect()
    assert runtime.bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_weights_of_any_type_are_the_same_afterwards(runtime: Runtime, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 128, 130).to(dtype)
    got = pinned(weight, CARD)
    assert runtime.has(got) and got.dtype is dtype and got.shape == weight.shape
    assert torch.equal(got.float(), weight.float())


def test_where_the_system_lets_no_more_be_registered_weights_stay_as_they_are(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA keeps its error until it is asked: the next that computes must not be the one that gets it."""
    made: list[Any] = []

    def ones(*size: int, device: torch.device) -> Tensor:
        made.append(device)
        raise RuntimeError("CUDA error: out of memory")

    runtime.limit = 2**19
    monkeypatch.setattr(torch, "ones", ones)
    module = model()
    places = {name: weight.data_ptr() for name, weight in module.state_dict().items()}
    pin(module)
    moved = [name for name, weight in module.state_dict().items() if weight.data_ptr() != places[name]]
    assert moved == ["0.weight", "1.weight"] and made == [CARD, CARD]


def test_other_devices_and_runtimes_that_cannot_are_let_be(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(MIN_PINNED_BYTES)
    for device in ("cpu", "mps", "xpu"):
        assert pinned(weight, torch.device(device)) is weight
    monkeypatch.setattr(torch.cuda, "cudart", object)
    assert pinned(weight, CARD) is weight
    small = torch.zeros(8)
    assert pinned(small, CARD) is small
