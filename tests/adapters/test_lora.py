"""LoRA and LoCon layers against lycoris-lora and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.algorithms import lora
from lib_delta.adapters.algorithms.lora import Lora
from lib_delta.errors import AdapterError
from lib_delta.models.forked_layers import Conv2d, ForkedLayer, Linear
from tests.support.adapters import make_unet

lycoris = pytest.importorskip("lycoris.modules.locon")
peft_layer = pytest.importorskip("peft.tuners.lora.layer")

KINDS = ("linear", "conv 1x1", "conv 3x3", "conv 3x3 tucker", "conv 3x3 stride 2", "conv 3x3 stride 2 tucker")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def layers(kind: str) -> tuple[ForkedLayer, nn.Module, Tensor]:
    """Return a forked layer, torch's layer with the same weights, and an input."""
    torch.manual_seed(3)
    if kind == "linear":
        theirs: nn.Module = nn.Linear(12, 20)
        ours: ForkedLayer = Linear(12, 20)
        x = torch.randn(2, 5, 12)
    else:
        kernel, stride = int(kind[5]), 2 if "stride 2" in kind else 1
        theirs = nn.Conv2d(12, 20, kernel, stride, kernel // 2)
        ours = Conv2d(12, 20, kernel, stride)
        x = torch.randn(2, 12, 9, 6)
    ours.load_state_dict(theirs.state_dict())
    return ours.requires_grad_(False), theirs.requires_grad_(False), x


def lycoris_module(kind: str, theirs: nn.Module, alpha: float = 2.0) -> nn.Module:
    module = lycoris.LoConModule("layer", theirs, lora_dim=4, alpha=alpha, use_tucker="tucker" in kind)
    nn.init.normal_(module.lora_up.weight, std=0.3)
    return module.requires_grad_(False)


def ours_of(module: nn.Module, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Lora:
    adapter = lora.match({key: value.to(dtype) for key, value in module.state_dict().items()})
    assert adapter is not None
    return adapter.fit(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_equals_lycoris(kind: str, dtype: torch.dtype) -> None:
    ours, theirs, _ = layers(kind)
    module = lycoris_module(kind, theirs)
    adapter = ours_of(module, ours.weight.shape, dtype)
    for parameter in module.parameters():
        parameter.copy_(parameter.to(dtype))
    expected, _ = module.get_merged_weight(multiplier=0.7)
    merged = ours.weight + 0.7 * adapter.merged_difference(ours.weight)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bypass_equals_merged(kind: str, dtype: torch.dtype) -> None:
    ours, theirs, x = layers(kind)
    adapter = ours_of(lycoris_module(kind, theirs), ours.weight.shape, dtype).map(lambda t: t.float())
    merged = ours.apply_weights(x, ours.weight + adapter.merged_difference(ours.weight), ours.bias)
    y = ours.base(x)
    torch.testing.assert_close(y + adapter.bypass(ours, x, y), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bypass_equals_the_forward_pass_of_lycoris(kind: str) -> None:
    ours, theirs, x = layers(kind)
    module = lycoris_module(kind, theirs)
    expected = module.bypass_forward_diff(x)
    torch.testing.assert_close(
        ours_of(module, ours.weight.shape).bypass(ours, x, ours.base(x)), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tucker" not in kind])
def test_merged_difference_equals_peft(kind: str) -> None:
    ours, theirs, _ = layers(kind)
    make = peft_layer.Linear if kind == "linear" else peft_layer.Conv2d
    module = make(theirs, "default", r=4, lora_alpha=2, init_lora_weights=False).requires_grad_(False)
    tensors = {
        "lora_down.weight": module.lora_A["default"].weight,
        "lora_up.weight": module.lora_B["default"].weight,
        "alpha": torch.tensor(2.0),
    }
    adapter = lora.match(tensors)
    assert adapter is not None
    difference = adapter.fit(ours.weight.shape).merged_difference(ours.weight)
    torch.testing.assert_close(difference, module.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv 3x3 tucker"])
def test_a_missing_alpha_counts_as_the_rank(kind: str) -> None:
    ours, theirs, _ = layers(kind)
    module = lycoris_module(kind, theirs, alpha=4.0)
    tensors = {key: value for key, value in module.state_dict().items() if key != "alpha"}
    adapter = lora.match(tensors)
    assert adapter is not None and adapter.scale == 1.0
    expected = ours_of(module, ours.weight.shape).merged_difference(ours.weight)
    assert torch.equal(adapter.fit(ours.weight.shape).merged_difference(ours.weight), expected)


def test_factors_of_a_linear_map_serve_a_1x1_convolution_and_the_reverse() -> None:
    linear, conv = torch.Size((20, 12)), torch.Size((20, 12, 1, 1))
    tensors = {"lora_down.weight": torch.randn(4, 12), "lora_up.weight": torch.randn(20, 4)}
    adapter = lora.match(tensors)
    assert adapter is not None
    as_conv = adapter.fit(conv)
    assert as_conv.down.shape == (4, 12, 1, 1) and as_conv.up.shape == (20, 4, 1, 1)
    assert torch.equal(as_conv.fit(linear).down, tensors["lora_down.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_up.weight": None}, "lora_up.weight is missing"),
        ({"lora_down.weight": None}, "lora_down.weight is missing"),
        ({"lora_up.weight": torch.zeros(20, 5)}, "ranks of its factors disagree"),
        ({"lora_mid.weight": torch.zeros(4, 5, 3, 3)}, "ranks of its factors disagree"),
        ({"lora_up.weight": torch.zeros(20)}, "2 or 4 dimensions"),
        ({"alpha": torch.zeros(2)}, "alpha"),
        ({"alpha": torch.tensor(float("nan"))}, "alpha"),
    ],
)
def test_malformed_factors_are_refused(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {"lora_down.weight": torch.zeros(4, 12), "lora_up.weight": torch.zeros(20, 4), **changes}
    with pytest.raises(AdapterError, match=message):
        lora.match({key: value for key, value in tensors.items() if value is not None})


@pytest.mark.parametrize("shape", [(20, 13), (21, 12), (20, 12, 3, 3), (20,)])
def test_factors_of_another_layer_are_refused(shape: tuple[int, ...]) -> None:
    adapter = lora.match({"lora_down.weight": torch.zeros(4, 12), "lora_up.weight": torch.zeros(20, 4)})
    assert adapter is not None
    with pytest.raises(AdapterError, match="shape"):
        adapter.fit(torch.Size(shape))


def test_tensors_of_other_algorithms_are_left_to_them() -> None:
    factors = {"lora_down.weight": torch.zeros(4, 12), "lora_up.weight": torch.zeros(20, 4)}
    assert lora.match({"hada_w1_a": torch.zeros(4, 4)}) is None
    assert lora.match({**factors, "dora_scale": torch.ones(1, 12)}) is None


def test_every_layer_kind_of_a_real_unet_is_covered() -> None:
    unet = make_unet()
    layers_ = key_names.named_layers(unet).values()
    shapes = {(type(m).__name__, *m.weight.shape[2:], getattr(m, "stride", 1)) for m in layers_}
    assert {("Linear", 1), ("Conv2d", 1, 1, 1), ("Conv2d", 3, 3, 1), ("Conv2d", 3, 3, 2)} <= shapes


def test_a_whole_network_made_by_lycoris_merges_the_same(tmp_path: Path) -> None:
    wrapper = pytest.importorskip("lycoris")
    torch.manual_seed(4)
    unet = make_unet()
    twin = pytest.importorskip("diffusers").UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
    )
    paths = key_names.diffusers_paths(unet)
    for path, other in paths.items():
        twin.get_submodule(other).load_state_dict(unet.get_submodule(path).state_dict())
    wrapper.LycorisNetwork.LORA_PREFIX = "lora_unet"
    sizes = {"linear_dim": 4, "linear_alpha": 2, "conv_dim": 3, "conv_alpha": 1}
    network = wrapper.create_lycoris(twin, 1.0, algo="lora", use_tucker=True, **sizes)
    network.apply_to()
    for name, parameter in network.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.2)
    network.save_weights(str(tmp_path / "net.safetensors"), torch.float32, {})
    adapter = load_adapter(tmp_path / "net.safetensors", unet)
    assert len(adapter.unet) == len(network.loras) and not adapter.unmatched
    assert any(layer.mid is not None for layer in adapter.unet.values())
    network.merge_to(1.0)
    for path, layer in key_names.named_layers(unet).items():
        expected = twin.get_submodule(paths[path]).weight
        ours = layer.weight
        if path in adapter.unet:
            ours = ours + adapter.unet[path].merged_difference(ours)
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)
