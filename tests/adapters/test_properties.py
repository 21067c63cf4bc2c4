"""Properties of adapters of every algorithm, weight and order."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, read_adapter, read_fine_tuned
from lib_delta.adapters.algorithms.lora import Lora
from lib_delta.adapters.attach import AdapterForm, Bypass, Merged, attach, detach
from lib_delta.models.unet import UNet
from tests.support.adapters import CONV, LINEAR, attached_weight, every_algorithm, inputs, kohya_name, locon, make_unet

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = tuple(every_algorithm())
names = st.sampled_from(NAMES)
weights = st.floats(-8, 8, allow_nan=False)
lists = st.lists(st.tuples(names, st.floats(-2, 2, allow_nan=False)), min_size=2, max_size=4)


@functools.cache
def base() -> UNet:
    return make_unet()


@functools.cache
def adapter_of(name: str, seed: int = 4) -> AdapterFile:
    return read_adapter(name, every_algorithm(seed)[name], base())


def differences(adapters: Sequence[tuple[AdapterFile, float]], form: AdapterForm = "merged") -> dict[str, Tensor]:
    """Return the differences of every merged layer's weight and bias from the base's."""
    attach(base(), adapters, form)
    found = {}
    for path, layer in key_names.named_layers(base()).items():
        if isinstance(layer.adaptation, Merged):
            found[f"{path}.weight"] = layer.adaptation.weight - layer.weight
            if layer.adaptation.bias is not None:
                found[f"{path}.bias"] = layer.adaptation.bias - layer.bias
    return found


def second_output(adapters: Sequence[tuple[AdapterFile, float]], form: AdapterForm = "merged") -> Tensor:
    attach(base(), adapters, form)
    return base()(*inputs())[-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_changes_what_it_names_and_its_report_says_so(name: str) -> None:
    adapter = adapter_of(name)
    changed = differences([(adapter, 1.0)])
    assert {key.rpartition(".")[0] for key in changed} == set(adapter.unet)
    assert set(adapter.unet) in ({LINEAR, CONV}, {"input_blocks.3.0.in_layers.0"})
    assert all(difference.abs().max() > 1e-3 for difference in changed.values())
    assert f"adapts {len(adapter.unet)} layers" in adapter.report()


@settings(max_examples=60, deadline=None)
@given(weights, names)
def test_the_merged_difference_is_linear_in_the_weight(weight: float, name: str) -> None:
    """For rotations and DoRA too, the user's weight is a share of the whole change."""
    unit = differences([(adapter_of(name), 1.0)])
    scaled = differences([(adapter_of(name), weight)])
    for key, difference in unit.items():
        found = scaled.get(key, torch.zeros_like(difference))
        torch.testing.assert_close(found, weight * difference, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(lists, st.randoms(use_true_random=False))
def test_the_order_of_adapters_does_not_matter(chosen: list[tuple[str, float]], random: object) -> None:
    adapters = [(adapter_of(name, 4 + i), weight) for i, (name, weight) in enumerate(chosen)]
    shuffled = list(adapters)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = differences(adapters), differences(shuffled)
    assert first.keys() == second.keys()
    for key, difference in first.items():
        torch.testing.assert_close(second[key], difference, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(lists)
def test_several_adapters_add_up(chosen: list[tuple[str, float]]) -> None:
    adapters = [(adapter_of(name, 4 + i), weight) for i, (name, weight) in enumerate(chosen)]
    together = differences(adapters)
    for key, difference in together.items():
        alone = [differences([part]).get(key) for part in adapters]
        torch.testing.assert_close(difference, sum(a for a in alone if a is not None), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(lists, st.sampled_from(("merged", "bypass")))
def test_detaching_restores_the_base_bit_for_bit(chosen: list[tuple[str, float]], form: AdapterForm) -> None:
    before, output = copy.deepcopy(base().state_dict()), (detach(base()), base()(*inputs()))[1]
    attach(base(), [(adapter_of(name, 4 + i), weight) for i, (name, weight) in enumerate(chosen)], form)
    base()(*inputs())
    detach(base())
    after = base().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert torch.equal(base()(*inputs()), output) and output.shape[0] == 1


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_weight_0_leaves_one_branch(name: str, form: AdapterForm) -> None:
    attach(base(), [(adapter_of(name), 0.0)], form)
    assert all(layer.adaptation is None for layer in key_names.named_layers(base()).values())
    assert base()(*inputs()).shape[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_bypass_and_merged_form_give_the_same_picture(name: str) -> None:
    adapters = [(adapter_of(name), 0.7), (adapter_of("LoRA", 9), -0.4)]
    merged = second_output(adapters)
    torch.testing.assert_close(second_output(adapters, "bypass"), merged, rtol=1e-4, atol=1e-4)
    bypassed = [isinstance(base().get_submodule(path).adaptation, Bypass) for path in adapters[0][0].unet]
    assert bypassed == [adapter.bypasses for adapter in adapters[0][0].unet.values()]


@settings(max_examples=60, deadline=None)
@given(names, names, st.floats(-2, 2).filter(bool), st.sampled_from(("merged", "bypass")))
def test_memory_that_is_used_again_holds_nothing_of_the_adapter_before(
    first: str, second: str, weight: float, form: AdapterForm
) -> None:
    detach(base())
    fresh = {key: value.clone() for key, value in differences([(adapter_of(second, 5), weight)]).items()}
    detach(base())
    attach(base(), [(adapter_of(first), 1.3), (adapter_of("full", 8), 0.2)], form)
    used_again = differences([(adapter_of(second, 5), weight)])
    assert used_again.keys() == fresh.keys()
    assert all(torch.equal(used_again[key], value) for key, value in fresh.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_in_half_precision_the_sum_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    unet = make_unet().to(dtype)
    adapter = read_adapter(name, every_algorithm()[name], unet)
    attach(unet, [(adapter, 0.6)])
    for path, part in adapter.unet.items():
        layer = unet.get_submodule(path)
        exact = layer.weight.float() + 0.6 * part.merged_difference(layer.weight)
        assert attached_weight(layer).dtype == dtype
        off = (attached_weight(layer).float() - exact).abs()
        assert (off <= torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_a_truncated_lora_has_the_first_ranks_and_their_scale(rank: int) -> None:
    tensors = locon(base(), [LINEAR, CONV], rank=3)
    adapter = read_adapter("x", tensors, base())
    for path, part in adapter.unet.items():
        assert isinstance(part, Lora)
        up, down = (tensors[f"{kohya_name(path)}.lora_{side}.weight"] for side in ("up", "down"))
        expected = 2 / 3 * (up.flatten(1)[:, :rank] @ down.flatten(1)[:rank])
        weight = base().get_submodule(path).weight
        difference = part.truncated(rank).merged_difference(weight)
        torch.testing.assert_close(difference.flatten(1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_on_a_fine_tuned_checkpoint_the_others_adapt_what_it_has_made(name: str) -> None:
    """In any order, this equals merging the checkpoint by hand first; each file by itself adapts the base."""
    torch.manual_seed(21)
    tuned = copy.deepcopy(base())
    detach(tuned)
    for path in (LINEAR, CONV, "input_blocks.3.0.in_layers.0"):
        for parameter in tuned.get_submodule(path).parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    checkpoint, adapter = read_fine_tuned("tuned", tuned.state_dict(), base()), adapter_of(name)
    on_tuned = read_adapter(name, every_algorithm()[name], tuned)
    attach(tuned, [(on_tuned, 0.7)])
    expected = tuned(*inputs())[-1]
    for adapters in ([(checkpoint, 1.0), (adapter, 0.7)], [(adapter, 0.7), (checkpoint, 1.0)]):
        torch.testing.assert_close(second_output(adapters), expected, rtol=1e-4, atol=1e-4)
        for path in adapter.unet:
            torch.testing.assert_close(
                attached_weight(base().get_submodule(path)),
                attached_weight(tuned.get_submodule(path)),
                rtol=1e-5,
                atol=1e-5,
            )
