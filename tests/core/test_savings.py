"""What a step does not do twice: counts of layer calls, rows and copies, and that results stay what they were."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lib_delta import devices
from lib_delta.adapters.attach import attach
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Schedule
from lib_delta.models.forked_layers import Conv2d, ForkedLayer
from tests.support.counting import EPS, SIGMA, TOLD, X, counted, lora
from tests.support.tiny_unet import adapt, randn, tiny_unet


class Operators(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["merged", "bypass"])
def test_keys_and_values_of_a_prompt_are_computed_once(form: str) -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], form)
    source = Source(unet, EPS, TOLD)
    first = source.delta(SourceStep(X, SIGMA, 3.0))
    with counted(unet) as calls:
        second = source.delta(SourceStep(X, SIGMA, 3.0))
    assert torch.equal(first, second)
    assert any(".attn1.to_k" in path for path in calls)
    assert not [path for path in calls if ".attn2.to_k" in path or ".attn2.to_v" in path]


def test_another_adapter_makes_other_keys_and_values() -> None:
    unet = tiny_unet()
    source = Source(unet, EPS, TOLD)
    for seed in (0, 5):
        attach(unet, [(lora(unet, "attn2", seed), 1.0)])
        assert torch.equal(
            source.delta(SourceStep(X, SIGMA, 3.0)), Source(unet, EPS, TOLD).delta(SourceStep(X, SIGMA, 3.0))
        )


def test_keys_and_values_of_an_adapter_that_is_gone_are_not_the_bases() -> None:
    unet = tiny_unet()
    source = Source(unet, EPS, TOLD)
    base = source.denoised(SourceStep(X, SIGMA, 3.0))[0]
    attach(unet, [(lora(unet, "attn2"), 1.0)], "bypass")
    source.delta(SourceStep(X, SIGMA, 3.0))
    attach(unet, [])
    assert torch.equal(source.denoised(SourceStep(X, SIGMA, 3.0))[0], base)


def test_prompts_that_alternate_are_known_when_they_return() -> None:
    unet = tiny_unet()
    other = Conditioning(randn(1, 7, 16, seed=3), TOLD.uncond)
    source = Source(unet, EPS, TOLD, lambda step: (TOLD, other)[step % 2])
    deltas = [source.delta(SourceStep(X, SIGMA, 3.0, step)) for step in range(2)]
    with counted(unet) as calls:
        again = [source.delta(SourceStep(X, SIGMA, 3.0, step)) for step in (2, 3)]
    assert all(map(torch.equal, deltas, again)) and deltas[1].any()
    assert not [path for path in calls if ".attn2.to_k" in path]


def test_rows_of_an_image_are_one_until_they_meet_their_prompts() -> None:
    unet = tiny_unet()
    with counted(unet) as calls:
        Source(unet, EPS, TOLD).denoised(SourceStep(X, SIGMA, 3.0))
    shared = ("input_blocks.0.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    for path in (*shared, "time_embed.0", "output_blocks.0.0.emb_layers.1"):
        assert [shape[1] for shape in calls[path]] == [2], path
    for path in ("input_blocks.1.1.transformer_blocks.0.attn2.to_q", "input_blocks.2.0.op", "out.2"):
        assert [shape[1] for shape in calls[path]] == [4], path


def test_low_rank_factors_leave_the_base_one_call_for_both_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0), (lora(unet, seed=7), 0.5)], "bypass")
    source = Source(unet, EPS, TOLD)
    bases: Counter[int] = Counter()
    base = ForkedLayer.base

    def count(self: ForkedLayer, x: Tensor) -> Tensor:
        bases[id(self)] += 1
        return base(self, x)

    monkeypatch.setattr(ForkedLayer, "base", count)
    bypassed = source.delta(SourceStep(X, SIGMA, 3.0))
    assert set(bases.values()) == {1}
    attach(unet, [(lora(unet), 1.0), (lora(unet, seed=7), 0.5)], "merged")
    merged = Source(unet, EPS, TOLD).delta(SourceStep(X, SIGMA, 3.0))
    assert (bypassed - merged).norm() < 1e-4 * merged.norm()


def test_convolutions_get_what_they_are_laid_out_for() -> None:
    """A transposed view would turn all that follows to channels-last, and weights with it in every pass."""
    unet = tiny_unet()
    wrong = []
    for path, layer in unet.named_modules():
        if isinstance(layer, Conv2d):
            layer.register_forward_pre_hook(
                lambda _module, inputs, path=path: None if inputs[0].is_contiguous() else wrong.append(path)
            )
    Source(adapt(unet, {"middle_block.0.in_layers.2.weight": randn(64, 64, 3, 3)}), EPS, TOLD).delta(
        SourceStep(X, SIGMA, 3.0)
    )
    assert not wrong


def test_a_step_waits_for_no_device_and_brings_nothing_to_it() -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)])
    source = Source(unet, EPS, TOLD)
    source.delta(SourceStep(X, SIGMA, 3.0))
    with Operators() as operators:
        source.delta(SourceStep(X, SIGMA, 3.0))
    # Reading a number, comparing tensors, and tensors made of Python's numbers.
    assert not {"_local_scalar_dense", "equal", "nonzero", "lift_fresh"} & operators.counts.keys()
    assert operators.counts["convolution"] > 10


def test_a_schedule_is_brought_to_a_device_once() -> None:
    schedule = Schedule.stable_diffusion()
    schedule.sigma_to_t(SIGMA)
    with Operators() as operators:
        schedule.sigma_to_t(SIGMA)
    assert operators.counts["_to_copy"] <= 1  # whole numbers to fractions, not the table


def test_freed_memory_is_given_back_where_the_platform_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.trim_heap() in (True, False)
    monkeypatch.setattr("sys.platform", "win32")
    assert not devices.trim_heap()
