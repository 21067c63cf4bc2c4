"""Placement of weights: copied to a device, streamed block by block, and in fp8; counted on the stand-in device."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from torch import Tensor

from lib_delta.adapters.attach import AdapterForm, Merged, attach
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.unet import UNet
from lib_delta.runtime.placement import CPU, Restorable, Stream, copy_to_device
from lib_delta.runtime.side_model import _store_as
from tests.support.counting import EPS, SIGMA, TOLD, X, lora
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.tiny_unet import randn, tiny_unet

FORMS: tuple[AdapterForm, ...] = ("merged", "bypass")


def on_the_device(unet: UNet) -> list[str]:
    return [name for name, tensor in (*unet.named_parameters(), *unet.named_buffers()) if tensor.device == DEVICE]


def delta(unet: UNet) -> Tensor:
    return Source(unet, EPS, TOLD).delta(SourceStep(X, SIGMA, 3.0))


def placed(unet: UNet, how: Literal["visit", "stream"]) -> Restorable:
    if how == "stream":
        return Stream(unet, [], DEVICE)
    return copy_to_device(unet, DEVICE)


@pytest.mark.parametrize("how", ["visit", "stream"])
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_went_to_a_device_come_home_without_a_copy(
    form: AdapterForm, how: Literal["visit", "stream"]
) -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], form)
    wanted = delta(unet)
    before = {name: tensor.data_ptr() for name, tensor in (*unet.named_parameters(), *unet.named_buffers())}
    with stand_in_device() as transfers:
        there = placed(unet, how)
        if how == "visit":
            assert len(on_the_device(unet)) == len(before)
        got = delta(unet)
        transfers.clear()
        there.restore()
        assert not transfers and not on_the_device(unet)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    after = {name: tensor.data_ptr() for name, tensor in (*unet.named_parameters(), *unet.named_buffers())}
    assert after == before
    assert torch.equal(delta(unet), wanted)


def test_of_a_streamed_model_only_the_part_that_runs_is_on_the_device() -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], "merged")
    most: Counter[str] = Counter()
    total = sum(p.numel() for p in (*unet.parameters(), *unet.buffers()))

    def weigh(_module: object, _inputs: object) -> None:
        tensors = (*unet.parameters(), *unet.buffers())
        most["there"] = max(most["there"], sum(p.numel() for p in tensors if p.device == DEVICE))

    with stand_in_device():
        stream = Stream(unet, [], DEVICE)
        hooks = [m.register_forward_pre_hook(weigh) for m in unet.modules() if isinstance(m, ForkedLayer)]
        assert unet.time_embed["0"].weight.device == DEVICE
        delta(unet)
        assert all("block" not in name or name.startswith("input_blocks.0.") for name in on_the_device(unet))
        stream.restore()
    for hook in hooks:
        hook.remove()
    assert 0 < most["there"] < 0.4 * total


def test_a_stream_says_how_much_is_there_at_most_besides_its_ends() -> None:
    unet = tiny_unet()
    parts = [part for block in (*unet.input_blocks[1:], unet.middle_block, *unet.output_blocks) for part in block]
    with stand_in_device():
        stream = Stream(unet, [], DEVICE)
        assert stream.largest_part == max(sum(p.nbytes for p in part.parameters()) for part in parts)
        stream.restore()


def test_a_part_that_fails_goes_home_before_it_is_tried_again() -> None:
    unet = tiny_unet()
    wanted = unet(X[None], SIGMA, randn(1, 2, 7, 16))
    with stand_in_device():
        stream = Stream(unet, [], DEVICE)
        with pytest.raises(RuntimeError, match="device"):
            unet(X[None].to(DEVICE), SIGMA, randn(1, 2, 7, 16).to(DEVICE))
        got = unet(X[None].to(DEVICE), SIGMA.to(DEVICE), randn(1, 2, 7, 16).to(DEVICE)).cpu()
        stream.restore()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not on_the_device(unet)


def test_what_was_merged_on_the_device_comes_along() -> None:
    unet = tiny_unet()
    with stand_in_device():
        visiting = copy_to_device(unet, DEVICE)
        attach(unet, [(lora(unet), 1.0)], "merged")
        assert unet.middle_block[0].out_layers["3"].adaptation.weight.device == DEVICE
        visiting.restore()
        assert not on_the_device(unet)
    assert delta(unet).any()


# fp8.


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_fp8_give_the_delta_of_rounded_weights(form: AdapterForm) -> None:
    unet, rounded = tiny_unet(), tiny_unet()
    _store_as(unet, torch.float8_e4m3fn)
    stored = {name for name, weight in unet.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert len(stored) > 20 and not [n for n in stored if "block" not in n or n.startswith("input_blocks.0.")]
    for name, weight in rounded.named_parameters():
        if name in stored:
            weight.copy_(weight.to(torch.float8_e4m3fn).float())
    for model in (unet, rounded):
        attach(model, [(lora(model), 1.0)], form)
    torch.testing.assert_close(delta(unet), delta(rounded), rtol=1e-4, atol=1e-4)
    if form == "merged":
        merged = [m for m in unet.modules() if isinstance(m, Merged)]
        assert merged and {m.weight.dtype for m in merged} == {torch.float32}, "fp8 would lose the difference"


def test_fp8_takes_about_half_of_half_precision() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    before = sum(p.nbytes for p in unet.parameters())
    _store_as(unet, torch.float8_e4m3fn)
    assert sum(p.nbytes for p in unet.parameters()) < 0.6 * before
    assert unet(X[None].bfloat16(), SIGMA, randn(1, 2, 7, 16).bfloat16()).dtype == torch.bfloat16


def test_home_is_cpu_memory() -> None:
    assert CPU.type == "cpu" and CPU != DEVICE
