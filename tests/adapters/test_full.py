"""A fine-tuned checkpoint as an adaptation of its base, and stored whole differences."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import load_adapter, read_adapter, read_fine_tuned
from lib_delta.adapters.algorithms import full
from lib_delta.adapters.attach import AdapterForm, Merged, adapted_text_parameters, attach, detach
from lib_delta.errors import AdapterError
from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import inputs, make_unet

TUNED = ("input_blocks.1.1.norm", "middle_block.0.in_layers.2", "out.2")


def tuned_unet(unet: UNet, paths: tuple[str, ...] = TUNED) -> UNet:
    torch.manual_seed(11)
    tuned = copy.deepcopy(unet)
    for path in paths:
        for parameter in tuned.get_submodule(path).parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return tuned


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize("family", ["SD1", "SD2", "SDXL"])
def test_forked_unet_equals_the_base_and_the_tuned_unet(family: str, form: AdapterForm) -> None:
    """Both branches match to float tolerance: attention over two branches may round differently."""
    unet = make_unet(family)
    every_layer = tuple(key_names.named_layers(unet))
    tuned = tuned_unet(unet, every_layer)
    extra = (torch.randn(1, 2, 40),) if family == "SDXL" else ()
    base, expected = unet(*inputs(), *extra), tuned(*inputs(), *extra)
    adapter = read_fine_tuned("tuned", tuned.state_dict(), unet)
    assert tuple(adapter.unet) == every_layer
    attach(unet, [(adapter, 1.0)], form)
    forked = unet(*inputs(), *extra)
    torch.testing.assert_close(forked[0], base[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forked[1], expected[0], rtol=1e-4, atol=1e-5)
    detach(unet)
    assert torch.equal(unet(*inputs(), *extra), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merged_weights_are_the_tuned_ones(dtype: torch.dtype) -> None:
    """Half precision matches bit for bit; fp32 to the rounding of base + (tuned - base)."""
    unet = make_unet().to(dtype)
    tuned = tuned_unet(unet)
    attach(unet, [(read_fine_tuned("tuned", tuned.state_dict(), unet), 1.0)])
    for path in TUNED:
        second, layer = unet.get_submodule(path).adaptation, tuned.get_submodule(path)
        assert isinstance(second, Merged) and second.bias is not None
        tolerance = 1e-6 if dtype is torch.float32 else 0.0
        torch.testing.assert_close(second.weight, layer.weight, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(second.bias, layer.bias, rtol=tolerance, atol=tolerance)


def test_layers_that_are_bit_identical_stay_shared() -> None:
    unet = make_unet()
    adapter = read_fine_tuned("tuned", tuned_unet(unet).state_dict(), unet)
    assert set(adapter.unet) == set(TUNED)
    attach(unet, [(adapter, 1.0)])
    assert {path for path, layer in key_names.named_layers(unet).items() if layer.adaptation is not None} == set(TUNED)


def test_a_file_in_another_precision_is_compared_in_the_bases() -> None:
    unet = make_unet().half()
    tuned = {key: value.float() for key, value in tuned_unet(unet).state_dict().items()}
    assert set(read_fine_tuned("tuned", tuned, unet).unet) == set(TUNED)


def test_the_base_itself_leaves_one_branch() -> None:
    unet = make_unet()
    adapter = read_fine_tuned("same", unet.state_dict(), unet)
    attach(unet, [(adapter, 1.0)])
    assert not adapter.unet and unet(*inputs()).shape[0] == 1


def test_half_the_weight_is_half_the_way() -> None:
    unet = make_unet()
    tuned = tuned_unet(unet)
    attach(unet, [(read_fine_tuned("tuned", tuned.state_dict(), unet), 0.5)])
    between = {key: torch.lerp(value, tuned.state_dict()[key], 0.5) for key, value in unet.state_dict().items()}
    expected = functional_call(make_unet(), between, inputs())
    torch.testing.assert_close(unet(*inputs())[1], expected[0], rtol=1e-4, atol=1e-5)


def refused(change: dict[str, Tensor | None], message: str) -> None:
    unet = make_unet()
    tensors = {**tuned_unet(unet).state_dict(), **change}
    with pytest.raises(AdapterError, match=message):
        read_fine_tuned("tuned.safetensors", {k: v for k, v in tensors.items() if v is not None}, unet)


def test_incomplete_and_foreign_weights_are_refused() -> None:
    refused({"out.2.weight": None}, r"tuned.safetensors has no out.2.weight")
    refused({"input_blocks.0.0.weight": torch.zeros(32, 7, 3, 3)}, r"input_blocks.0.0.weight of shape .32, 7, 3, 3.")
    refused({"out.0.bias": torch.full((32,), float("nan"))}, "NaN or infinity in out.0.bias")
    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    refused({key: torch.zeros(32, 2048)}, r"made for SDXL \(text 2048 wide\).*SD 1\.x \(text 24 wide\), is needed")


def text_tower() -> TextEncoder:
    torch.manual_seed(5)
    config = TextConfig(16, 32, layers=2, positions=8, vocabulary=99, heads=2, activation="quick_gelu")
    return TextEncoder(config, final_norm=True).requires_grad_(False).eval()


def save_checkpoint(path: Path, unet: UNet, tower: TextEncoder | None) -> None:
    """Write an SD-1.x checkpoint in the original key names."""
    tensors = {UNET_PREFIX + key: value for key, value in unet.state_dict().items()}
    if tower is not None:
        state = tower.transformer.state_dict()
        tensors |= {f"cond_stage_model.transformer.{k}": v for k, v in state.items() if "position_ids" not in k}
    save_file(tensors, path, metadata={"delta.text_heads": "2"})


def test_a_checkpoint_file_adapts_the_unet_and_the_text_encoder(tmp_path: Path) -> None:
    unet, tower, tokens = make_unet(), text_tower(), torch.tensor([[97, 4, 5, 98]])
    tuned_tower = copy.deepcopy(tower)
    tuned_tower.transformer.text_model.encoder.layers[1].mlp.fc1.bias += 0.5
    tuned_tower.transformer.text_model.embeddings.token_embedding.weight *= 1.1
    save_checkpoint(tmp_path / "tuned.safetensors", tuned_unet(unet), tuned_tower)
    adapter = load_adapter(tmp_path / "tuned.safetensors", unet, [tower])
    assert set(adapter.unet) == set(TUNED)
    assert set(adapter.text[0]) == {
        "transformer.text_model.encoder.layers.1.mlp.fc1",
        "transformer.text_model.embeddings.token_embedding",
    }
    adapted = functional_call(tower, adapted_text_parameters(tower, [(adapter, 1.0)]), (tokens,))[0]
    torch.testing.assert_close(adapted, tuned_tower(tokens)[0], rtol=1e-5, atol=1e-6)


def test_a_checkpoint_without_text_encoder_leaves_the_bases(tmp_path: Path) -> None:
    unet, tower = make_unet(), text_tower()
    save_checkpoint(tmp_path / "tuned.safetensors", tuned_unet(unet), None)
    adapter = load_adapter(tmp_path / "tuned.safetensors", unet, [tower])
    assert set(adapter.unet) == set(TUNED) and adapted_text_parameters(tower, [(adapter, 1.0)]) == {}


def test_a_checkpoint_of_another_family_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "xl.safetensors", make_unet("SDXL"), None)
    with pytest.raises(AdapterError, match=r"xl.safetensors is made for SDXL, .* SD 1\.x"):
        load_adapter(tmp_path / "xl.safetensors", make_unet())


def test_stored_differences_equal_lycoris() -> None:
    lycoris = pytest.importorskip("lycoris.modules.full")
    torch.manual_seed(6)
    unet, path = make_unet(), "input_blocks.1.0.in_layers.2"
    layer = unet.get_submodule(path)
    theirs = torch.nn.Conv2d(32, 32, 3, padding=1)
    theirs.load_state_dict(layer.state_dict())
    module = lycoris.FullModule("layer", theirs, multiplier=1.0)
    weight, bias = torch.randn_like(layer.weight), torch.randn_like(layer.bias)
    module.load_state_dict({"diff": weight, "diff_b": bias})
    differences = [p.detach() for p in module.get_diff_weight(0.5)]
    name = f"lora_unet_{path.replace('.', '_')}"
    attach(unet, [(read_adapter("x", {f"{name}.diff": weight, f"{name}.diff_b": bias}, unet), 0.5)], "bypass")
    assert isinstance(layer.adaptation, Merged) and layer.adaptation.bias is not None
    torch.testing.assert_close(layer.adaptation.weight - layer.weight, differences[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.adaptation.bias - layer.bias, differences[1], rtol=1e-5, atol=1e-5)


def test_differences_of_another_shape_or_algorithm_are_refused() -> None:
    unet = make_unet()
    for tensors in ({"diff": torch.zeros(3, 3)}, {"diff": torch.zeros(128, 32), "diff_b": torch.zeros(3)}):
        with pytest.raises(AdapterError, match="time_embed_0: diff(_b)? has shape .3"):
            read_adapter("x", {f"lora_unet_time_embed_0.{k}": v for k, v in tensors.items()}, unet)
    assert full.match({"diff": torch.zeros(3), "w_norm": torch.zeros(3)}) is None
