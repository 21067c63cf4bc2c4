"""Limits of devices: refusals, lost results and reports; with every torch, and hosts that cast weights."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.bridges import choose_bridge
from lib_delta.bridges.resizing import averaged
from lib_delta.devices import out_of_memory, without_autocast
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.models import taesd
from tests.support.stand_in_device import DEVICE, OnDevice, stand_in_device
from tests.support.tiny_unet import randn

# Their out-of-memory messages.
SHORT = [
    "CUDA out of memory. Tried to allocate 20.00 MiB",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "hipErrorOutOfMemory",
    "MPS backend out of memory (MPS allocated: 1 GB)",
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "Failed to allocate private MTLBuffer for size 1048576",
    "Invalid buffer size: 24.00 GB",
    "XPU out of memory.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "miopenStatusAllocFailed",
    "Could not allocate tensor with 100 bytes. There is not enough GPU video memory available!",
    "Not enough memory resources are available to complete this operation.",
    "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
    "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    "UR_RESULT_ERROR_OUT_OF_RESOURCES",
    "PI_ERROR_MEM_OBJECT_ALLOCATION_FAILURE",
    "Allocation on device 0 would exceed allowed memory. (out of memory)",
    "Allocation on device ",
    "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    "unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)",
    "std::bad_alloc",
    "bad allocation",
]
OTHER = [
    "CUDA error: no kernel image is available for execution on the device",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "Expected all tensors to be on the same device, but found cuda:0 and cpu",
    "index 5 is out of bounds for dimension 0 with size 3",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
]


@pytest.mark.parametrize("text", SHORT)
def test_a_shortage_is_known_by_its_words(text: str) -> None:
    assert out_of_memory(RuntimeError(text)) and not out_of_memory(ValueError(text))


@pytest.mark.parametrize("text", OTHER)
def test_what_is_no_shortage_is_not_taken_for_one(text: str) -> None:
    assert not out_of_memory(RuntimeError(text))


def test_a_shortage_is_known_by_its_class_and_number() -> None:
    paging_file = OSError("The paging file is too small for this operation to complete")
    paging_file.winerror = 1455  # type: ignore[attr-defined]
    for error in (MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), paging_file):
        assert out_of_memory(error)
    assert not out_of_memory(FileNotFoundError(errno.ENOENT, "No such file"))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps", "xpu", "privateuseone", "hpu", "mtia", "ipu", "xla"])
def test_autocast_is_switched_off_on_every_device_that_torch_can_name(kind: str) -> None:
    """``torch.autocast`` raises for some: RuntimeError, AssertionError (DirectML), AttributeError."""
    with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device(kind, 0)):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.float32 if kind == "cpu" else torch.bfloat16)


# Apple's rules, on the stand-in.


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "out": lambda y, a: torch.mm(a, a, out=y[1]),
    "in place": lambda y, a: y[1].addmm_(a, a),
    "the first half": lambda y, a: torch.addmm(a, a, a, out=y[0]),
    "transposed": lambda y, a: y.transpose(1, 2).baddbmm_(y, y + 1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("inference", [False, True])
def test_the_stand_in_loses_products_that_are_written_to_a_part(
    write: Callable[[Tensor, Tensor], object], inference: bool
) -> None:
    with stand_in_device(), torch.inference_mode(inference):
        y, a = torch.zeros(2, 3, 3).to(DEVICE), torch.ones(3, 3).to(DEVICE)
        write(y, a)
        assert not y.cpu().any()


def test_the_stand_in_keeps_what_is_written_to_the_whole_and_copied_to_a_part() -> None:
    with stand_in_device():
        y, a = torch.zeros(2, 3, 3).to(DEVICE), torch.ones(3, 3).to(DEVICE)
        y.view(6, 3).addmm_(torch.cat((a, a)), a)
        assert float(y.sum()) == 54
        y[1] = a
        y[1] += 1
        assert float(y.sum()) == 27 + 18


def test_the_stand_in_has_averages_of_windows_that_divide_and_of_no_others() -> None:
    with stand_in_device():
        x = torch.ones(1, 1, 8, 8).to(DEVICE)
        assert F.interpolate(x, (4, 2), mode="area").shape == (1, 1, 4, 2)
        with pytest.raises(RuntimeError, match="must be divisible"):
            F.interpolate(x, (4, 3), mode="area")


@pytest.mark.parametrize(
    ("full", "size"),
    [
        *(((8, 8), (4, 4)), ((144, 144), (64, 64)), ((156, 228), (56, 80)), ((208, 304), (56, 80))),
        *(((7, 9), (5, 9)), ((31, 17), (1, 16)), ((5, 4), (5, 4)), ((90, 160), (45, 80))),
    ],
)
def test_averages_are_those_of_interpolate(full: tuple[int, int], size: tuple[int, int]) -> None:
    x = randn(2, 3, *full)
    torch.testing.assert_close(averaged(x, size), F.interpolate(x, size, mode="area"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1024, 1024), (1152, 1152), (1248, 1824), (1664, 2432), (1280, 720)])
@pytest.mark.parametrize("target", [Family.SDXL, Family.SD3])
def test_pictures_of_every_size_cross_on_a_device_like_apples(target: Family, size: tuple[int, int]) -> None:
    _cross_as_on_apple(Family.SD1, target, size)


@pytest.mark.parametrize("size", [(256, 256), (200, 328)])
def test_pictures_smaller_than_their_source_cross_on_a_device_like_apples(size: tuple[int, int]) -> None:
    _cross_as_on_apple(Family.SDXL, Family.SD1, size)


def _cross_as_on_apple(source: Family, target: Family, size: tuple[int, int]) -> None:
    bridge = choose_bridge(source, target)
    clean = randn(1, target.space.channels, size[1] // 8, size[0] // 8)
    x, sigma = clean + 2 * randn(*clean.shape, seed=1), torch.tensor([2.0])

    def crossed(place: Any) -> list[Tensor]:
        x_s, sigma_s, crossing = bridge.to_source(x.to(place), sigma.to(place), clean.to(place))
        back = bridge.delta_to_target(0.1 * x_s, crossing)
        return [x_s.cpu(), sigma_s.cpu(), back.cpu()]

    wanted = crossed("cpu")
    with stand_in_device():
        got = crossed(DEVICE)
        _bring_home(bridge)
    for found, expected in zip(got, wanted):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _bring_home(bridge: Any) -> None:
    """Bridges are loaded once and stay on their last device."""
    for part in (bridge, *getattr(bridge, "bridges", ())):
        for module in (getattr(part, name, None) for name in ("state", "difference", "stitched")):
            if module is not None:
                module.to("cpu")
                assert not any(isinstance(weight, OnDevice) for weight in module.parameters())


# Hosts that cast weights by hand.


def casting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a layer's ``forward`` as AUTOMATIC1111 does for cards that cannot compute in their weights' type."""

    def wrapped(self: nn.Module, x: Tensor) -> Tensor:
        before = next(self.parameters()).dtype
        self.to(torch.bfloat16)
        made = forward(self, x.to(torch.bfloat16))
        self.to(before)
        return made

    return wrapped


@pytest.fixture
def manual_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm):
        monkeypatch.setattr(kind, "forward", casting(kind.forward))


@pytest.mark.usefixtures("manual_cast")
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("form", ["learned", "stitched"])
@pytest.mark.parametrize("space", [Space.SDXL, Space.SD3, Space.FLUX1])
def test_a_host_that_casts_by_hand_leaves_bridges_as_they_are(space: Space, form: str, tiled: bool) -> None:
    bridge = choose_bridge(Space.SD1, space, form=form, tiled=tiled)
    parts = [getattr(bridge, name) for name in ("state", "difference", "stitched") if hasattr(bridge, name)]
    before = [weight.clone() for part in parts for weight in part.state_dict().values()]
    x, clean = randn(1, space.channels, 16, 16), randn(1, space.channels, 16, 16, seed=1)
    x_s, _, crossing = bridge.to_source(x, torch.tensor([2.0]), clean)
    assert x_s.dtype == bridge.delta_to_target(x_s, crossing).dtype == torch.float32
    assert all(map(torch.equal, before, (weight for part in parts for weight in part.state_dict().values())))


@pytest.mark.usefixtures("manual_cast")
def test_a_host_that_casts_by_hand_leaves_tiny_autoencoders_as_they_are() -> None:
    with torch.no_grad():
        for module, x in ((taesd.encoder(4), randn(1, 3, 32, 32)), (taesd.decoder(4), randn(1, 4, 4, 4))):
            before = [weight.clone() for weight in module.parameters()]
            assert module(x).dtype == torch.float32
            assert all(map(torch.equal, module.parameters(), before))


def test_a_convolution_of_our_own_is_torchs_whatever_lies_beyond_its_edges() -> None:
    from lib_delta.models.unpatched import Conv2d

    for padding_mode in ("zeros", "circular", "replicate"):
        theirs = nn.Conv2d(3, 5, 3, padding=1, padding_mode=padding_mode)
        ours = Conv2d(3, 5, 3, padding=1, padding_mode=padding_mode)
        ours.load_state_dict(theirs.state_dict())
        x = randn(1, 3, 6, 7)
        torch.testing.assert_close(ours(x), theirs(x))
