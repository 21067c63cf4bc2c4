"""Where memory is short: a pass in parts, attention in slices; with the same result."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.models import forked_layers
from lib_delta.models.unet import UNet
from lib_delta.models.vae import AttnBlock
from tests.support.tiny_unet import TINY, adapt, randn, tiny_unet

X, SIGMA = 5 * randn(2, 4, 8, 8), torch.tensor([0.7, 6.0])
TOLD = Conditioning(randn(2, 7, 16, seed=1), randn(1, 14, 16, seed=2))
TOLD_OTHERWISE = Conditioning(randn(1, 7, 16, seed=3), randn(1, 7, 16, seed=4))
JOINED = Conditioning(randn(3, 7, 16, seed=5), randn(1, 7, 16, seed=6), weights=((1.0, 0.5), (0.7,)))


def adapted_unet(part: str = "attn1") -> UNet:
    unet = tiny_unet()
    weights = {name: w for name, w in unet.state_dict().items() if part in name}
    return adapt(unet, {name: w + 0.1 * w.std() * randn(*w.shape, seed=9) for name, w in weights.items()})


@contextmanager
def room_for(rows: int, error: Callable[[], BaseException] = MemoryError) -> Iterator[list[int]]:
    """Have the UNet run out of memory at more than so many rows of activations; note how many it is asked for."""
    asked: list[int] = []
    original = UNet.forward

    def forward(unet: UNet, x: Tensor, t: Tensor, text: Any, *rest: Any) -> Tensor:
        single = any(
            layer.branch is not None for layer in unet.modules() if isinstance(layer, forked_layers.ForkedLayer)
        )
        told = text.context
        asked.append(told.shape[1] * (1 if single or not (len(told) > 1 or forked_layers.is_adapted(unet)) else 2))
        output = original(unet, x, t, text, *rest)
        if asked[-1] > rows:
            raise error()
        return output

    UNet.forward = forward  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        UNet.forward = original  # type: ignore[method-assign]


CASES: dict[str, tuple[Any, Any, float]] = {
    "a LoRA": (adapted_unet, (TOLD,), 3.0),
    "a LoRA without guidance": (adapted_unet, (TOLD,), 1.0),
    "a prompt": (tiny_unet, (TOLD, TOLD_OTHERWISE), 3.0),
    "both": (adapted_unet, (TOLD, TOLD_OTHERWISE), 3.0),
    "AND": (adapted_unet, (JOINED, TOLD_OTHERWISE), 3.0),
}


@pytest.mark.parametrize("room", [4, 2, 1])
@pytest.mark.parametrize(("unet", "told", "cfg"), CASES.values(), ids=CASES)
def test_a_pass_in_parts_gives_what_one_gives(unet: Any, told: Any, cfg: float, room: int) -> None:
    wanted = Source(unet(), Parameterization(), *told).deltas(SourceStep(X, SIGMA, cfg))
    source = Source(unet(), Parameterization(), *told)
    with room_for(room) as asked:
        got = source.deltas(SourceStep(X, SIGMA, cfg))
        needed = len(asked)
        asked.clear()
        source.deltas(SourceStep(X, SIGMA, cfg))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert max(asked) <= room, "what did not fit is tried only once in a run"
    assert needed == 1 or needed > len(asked)
    assert source.evaluations == 2 * len(asked)


def test_base_and_adapted_go_apart_before_cond_and_uncond_and_these_before_images() -> None:
    source = Source(adapted_unet(), Parameterization(), TOLD)
    rows = 2 * len(X)
    with room_for(1) as asked:
        source.deltas(SourceStep(X, SIGMA, 3.0))
    assert asked == [2 * rows, rows, rows // 2, *[1] * 2 * rows]


def test_what_does_not_fit_row_by_row_is_out_of_memory() -> None:
    source = Source(adapted_unet(), Parameterization(), TOLD)
    with room_for(0) as asked, pytest.raises(MemoryError):
        source.deltas(SourceStep(X, SIGMA, 3.0))
    assert asked[-1] == 1


def test_other_errors_are_not_tried_again() -> None:
    source = Source(adapted_unet(), Parameterization(), TOLD)
    with room_for(0, lambda: RuntimeError("shapes do not match")) as asked, pytest.raises(RuntimeError, match="shapes"):
        source.deltas(SourceStep(X, SIGMA, 3.0))
    assert len(asked) == 1


def test_layers_serve_both_branches_again_after_a_part_has_failed() -> None:
    unet = adapted_unet()
    with room_for(0), pytest.raises(MemoryError):
        Source(unet, Parameterization(), TOLD).deltas(SourceStep(X, SIGMA, 3.0))
    assert {layer.branch for layer in unet.modules() if isinstance(layer, forked_layers.ForkedLayer)} == {None}


def test_what_a_failed_pass_had_computed_is_gone_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []
    original = UNet.forward

    def forward(unet: UNet, *given: Any) -> Tensor:
        alive.append([ref() is not None for ref in left])
        held = original(unet, *given)
        left.append(weakref.ref(held))
        if len(held) > 1:
            raise MemoryError
        return held

    monkeypatch.setattr(UNet, "forward", forward)
    gc.disable()
    try:
        Source(adapted_unet(), Parameterization(), TOLD).deltas(SourceStep(X, SIGMA, 3.0))
    finally:
        gc.enable()
    assert alive[1] == [False]


# Attention.


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor that is made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [t for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)]
        self.bytes = max(self.bytes, *(t.numel() * t.element_size() for t in tensors), 0)
        return made


@pytest.fixture
def without_fused_kernels() -> Iterator[None]:
    enabled = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(enabled)


def heads(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nhtc,nhsc->nhts", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("nhts,nhsc->nhtc", scores.softmax(-1), v.double()).float()


@pytest.mark.usefixtures("without_fused_kernels")
@pytest.mark.parametrize("room", [2**19, 2**14, 1])
def test_without_a_fused_kernel_scores_are_held_in_slices(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(forked_layers, "MAX_SCORE_BYTES", room)
    q, k, v = heads(2, 2, 250, 8)
    with Largest() as largest:
        got = forked_layers.attend(q, k, v)
    torch.testing.assert_close(got, by_hand(q, k, v))
    one_query = 2 * 2 * 250 * 4
    assert largest.bytes <= max(room, one_query, q.numel() * 4)


@pytest.mark.usefixtures("without_fused_kernels")
def test_slices_follow_the_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_layers, "free_memory", lambda _device: 2**17)
    monkeypatch.setattr(forked_layers, "MAX_SCORE_BYTES", 2**21)
    q, k, v = heads(2, 2, 250, 8)
    with Largest() as largest:
        forked_layers.attend(q, k, v)
    assert largest.bytes <= 2**16


def test_with_a_fused_kernel_there_are_no_slices_and_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_layers, "MAX_SCORE_BYTES", 1)
    q, k, v = heads(2, 2, 250, 8)
    with Largest() as largest:
        got = forked_layers.attend(q, k, v)
    torch.testing.assert_close(got, by_hand(q, k, v))
    assert largest.bytes == q.numel() * 4


@pytest.mark.usefixtures("without_fused_kernels")
def test_the_networks_attend_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, block = tiny_unet(TINY), AttnBlock(32).requires_grad_(False)
    x, context = randn(1, 1, 4, 32, 32), randn(1, 1, 7, 16)

    def networks() -> tuple[Tensor, Tensor]:
        return unet(x, torch.tensor([500.0]), context), block(randn(1, 32, 32, 32))

    wanted = networks()
    monkeypatch.setattr(forked_layers, "MAX_SCORE_BYTES", 2**16)
    with Largest() as largest:
        got = networks()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    scores = 1024 * 1024 * 4
    assert largest.bytes <= scores // 4


def test_without_anything_to_tell_them_apart_no_pass_is_made() -> None:
    source = Source(tiny_unet(), Parameterization(), TOLD)
    with room_for(0) as asked:
        assert not source.delta(SourceStep(X, SIGMA, 3.0)).any()
    assert asked == [] and source.evaluations == 0
