"""Adapters on a whole UNet and on text encoders: attached, evaluated, detached."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter, read_adapter
from lib_delta.adapters.attach import (
    AdaptedTextEncoder,
    AdapterForm,
    Bypass,
    Merged,
    adapted_text_parameters,
    attach,
    detach,
)
from lib_delta.errors import AdapterError, SettingError
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import adapted_layers, diffusers_twin, inputs, locon, make_unet

FORMS: tuple[AdapterForm, ...] = ("merged", "bypass")
FAMILIES = ("SD1", "SD2")


def difference(tensors: dict[str, Tensor], path: str) -> Tensor | float:
    """Return the difference of a layer's weight, index by index (0 for a layer that the file does not change)."""
    name = f"lora_unet_{path.replace('.', '_')}"
    if f"{name}.lora_down.weight" not in tensors:
        return 0.0
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    scale = tensors[f"{name}.alpha"].item() / down.shape[0]
    if f"{name}.lora_mid.weight" in tensors:
        mid = tensors[f"{name}.lora_mid.weight"]
        return scale * torch.einsum("op, pqhw, qi -> oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return scale * torch.einsum("or, ri... -> oi...", up.flatten(1), down)


def merged_by_hand(unet: UNet, files: list[tuple[dict[str, Tensor], float]]) -> UNet:
    merged = copy.deepcopy(unet)
    for path, layer in adapted_layers(merged).items():
        for tensors, weight in files:
            layer.weight += weight * difference(tensors, path)
    return merged


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_forked_unet_equals_two_unets(family: str, tucker: bool, form: AdapterForm) -> None:
    """Both branches match to float tolerance: attention over two branches rounds differently."""
    unet = make_unet(family)
    tensors = locon(unet, tucker=tucker)
    base, adapted = unet(*inputs()), merged_by_hand(unet, [(tensors, 0.6)])(*inputs())
    attach(unet, [(read_adapter("x", tensors, unet), 0.6)], form)
    forked = unet(*inputs())
    assert forked.shape[0] == 2 and (adapted - base).abs().max() > 0.05
    torch.testing.assert_close(forked[0], base[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forked[1], adapted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_detached_unet_is_the_base_bit_for_bit(form: AdapterForm) -> None:
    unet = make_unet()
    before, weights = unet(*inputs()), copy.deepcopy(unet.state_dict())
    attach(unet, [(read_adapter("x", locon(unet), unet), 1.0)], form)
    assert unet.state_dict().keys() == weights.keys()
    unet(*inputs())
    detach(unet)
    assert torch.equal(unet(*inputs()), before)
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_different_adapters_add_up_in_any_order(form: AdapterForm) -> None:
    unet = make_unet()
    some = [p for p in adapted_layers(unet) if "attn" in p]
    first, second = locon(unet), locon(unet, some, rank=2, tucker=True, seed=5)
    pair = [(read_adapter("a", first, unet), 0.5), (read_adapter("b", second, unet), -0.8)]
    attach(unet, pair, form)
    forked = unet(*inputs())
    attach(unet, pair[::-1], form)
    torch.testing.assert_close(unet(*inputs()), forked, rtol=1e-4, atol=1e-5)
    expected = merged_by_hand(unet, [(first, 0.5), (second, -0.8)])
    detach(expected)
    torch.testing.assert_close(forked[1], expected(*inputs())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_attaches_nothing(form: AdapterForm) -> None:
    unet = make_unet()
    before = unet(*inputs())
    attach(unet, [(read_adapter("x", locon(unet), unet), 0.0)], form)
    after = unet(*inputs())
    assert after.shape[0] == 1 and torch.equal(after, before)
    assert all(layer.adaptation is None for layer in key_names.named_layers(unet).values())


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_touches_no_unet_layer_leaves_one_branch(form: AdapterForm) -> None:
    unet = make_unet()
    attach(unet, [(AdapterFile("text only", {}), 1.0)], form)
    assert unet(*inputs()).shape[0] == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_fork_starts_at_the_first_adapted_layer(form: AdapterForm) -> None:
    unet = make_unet()
    path = "middle_block.0.out_layers.3"
    branches: dict[str, int] = {}
    for name, layer in key_names.named_layers(unet).items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: branches.update({name: out.shape[0]}))
    attach(unet, [(read_adapter("x", locon(unet, [path]), unet), 1.0)], form)
    unet(*inputs())
    assert branches["middle_block.0.in_layers.2"] == 1 and branches[path] == 2 and branches["out.2"] == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adaptations_follow_the_layers_type(dtype: torch.dtype, form: AdapterForm) -> None:
    unet = make_unet().to(dtype)
    path = "input_blocks.1.0.in_layers.2"
    attach(unet, [(read_adapter("x", locon(unet, [path], tucker=True), unet), 1.0)], form)
    adaptation = unet.get_submodule(path).adaptation
    held = [adaptation.weight] if form == "merged" else [adaptation.adapters[0][0].up, adaptation.adapters[0][0].mid]
    assert {t.dtype for t in held} == {dtype}
    unet.to(torch.float64)
    held = [adaptation.weight] if form == "merged" else [adaptation.adapters[0][0].up, adaptation.adapters[0][0].mid]
    assert {t.dtype for t in held} == {torch.float64}


def test_a_bypass_holds_factors_only_and_a_merge_one_weight() -> None:
    unet = make_unet()
    path = "input_blocks.1.0.in_layers.2"
    adapter = read_adapter("x", locon(unet, [path], rank=2), unet)
    layer = unet.get_submodule(path)
    attach(unet, [(adapter, 1.0)], "bypass")
    assert isinstance(layer.adaptation, Bypass)
    factors = layer.adaptation.adapters[0][0]
    assert factors.up.numel() + factors.down.numel() < layer.weight.numel() / 10
    attach(unet, [(adapter, 1.0), (adapter, 1.0)], "merged")
    assert isinstance(layer.adaptation, Merged)
    assert layer.adaptation.weight.shape == layer.weight.shape and layer.adaptation.bias is None


def test_settings_are_checked_before_anything_is_attached() -> None:
    unet = make_unet()
    adapter = read_adapter("x", locon(unet), unet)
    with pytest.raises(SettingError, match="weight of x is nan"):
        attach(unet, [(adapter, float("nan"))])
    with pytest.raises(SettingError, match="form is 'fused'"):
        attach(unet, [(adapter, 1.0)], "fused")  # type: ignore[arg-type]
    assert all(layer.adaptation is None for layer in key_names.named_layers(unet).values())


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_with_the_same_lora_gives_the_same_output(form: AdapterForm) -> None:
    """peft's layers inside diffusers' UNet, filled with the file's factors."""
    peft = pytest.importorskip("peft")
    unet = make_unet()
    targets = [p for p in adapted_layers(unet) if "attn" in p or p.endswith((".op", ".in_layers.2", ".proj_in"))]
    tensors = locon(unet, targets)
    twin, paths = diffusers_twin(unet), key_names.diffusers_paths(unet)
    twin.add_adapter(peft.LoraConfig(r=3, lora_alpha=2, target_modules=[paths[p] for p in targets]))
    for path in targets:
        name, module = f"lora_unet_{path.replace('.', '_')}", twin.get_submodule(paths[path])
        module.lora_A["default"].weight.data.copy_(tensors[f"{name}.lora_down.weight"])
        module.lora_B["default"].weight.data.copy_(tensors[f"{name}.lora_up.weight"])
    x, t, context = inputs()
    with torch.no_grad():
        expected = twin(x[0], t, context[0]).sample
    attach(unet, [(read_adapter("x", tensors, unet), 1.0)], form)
    torch.testing.assert_close(unet(x, t, context)[1], expected, rtol=1e-4, atol=1e-4)


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(7)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=8, **widths))
    return model.requires_grad_(False).eval()


def text_lora(tower: CLIPTextModel) -> dict[str, Tensor]:
    torch.manual_seed(8)
    tensors = {}
    for path, layer in tower.named_modules():
        if isinstance(layer, torch.nn.Linear):
            name = f"lora_te_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, layer.in_features)
            tensors[f"{name}.lora_up.weight"] = torch.randn(layer.out_features, 2)
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def test_text_encoder_takes_its_own_strength_and_is_not_written_to() -> None:
    unet, tower, tokens = make_unet(), text_encoder(), torch.tensor([[98, 4, 5, 98]])
    tensors = {**locon(unet, ["time_embed.0"]), **text_lora(tower)}
    adapter = read_adapter("x", tensors, unet, [tower])
    weights = copy.deepcopy(tower.state_dict())
    before = tower(tokens).last_hidden_state
    adapted = functional_call(tower, adapted_text_parameters(tower, [(adapter, 0.3)]), (tokens,)).last_hidden_state

    by_hand = copy.deepcopy(tower)
    for path, layer in by_hand.named_modules():
        if isinstance(layer, torch.nn.Linear):
            name = f"lora_te_{path.replace('.', '_')}"
            layer.weight += 0.3 * 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    torch.testing.assert_close(adapted, by_hand(tokens).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert torch.equal(tower(tokens).last_hidden_state, before)
    assert all(torch.equal(value, weights[key]) for key, value in tower.state_dict().items())
    assert (
        adapted_text_parameters(tower, [(adapter, 0.0)])
        == {}
        == adapted_text_parameters(tower, [(adapter, 1.0)], index=1)
    )


def test_an_adapted_tower_encodes_as_a_tower_with_merged_weights_and_leaves_the_base_tower_alone() -> None:
    config = TextConfig(
        width=16, inner_width=32, layers=2, positions=77, vocabulary=50, heads=4, activation="quick_gelu"
    )
    tower = TextEncoder(config, final_norm=True).requires_grad_(False).eval()
    tokens = torch.tensor([[48, 5, 7, 49, 49]])
    changed = {f"{path}.weight": -20 * layer.weight for path, layer in tower.named_modules() if path.endswith("fc1")}
    before, _ = tower.encode(tokens)
    adapted, _ = AdaptedTextEncoder(tower, changed).encode(tokens)

    by_hand = copy.deepcopy(tower)
    by_hand.load_state_dict({**tower.state_dict(), **changed})
    torch.testing.assert_close(adapted, by_hand.encode(tokens)[0])
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert torch.equal(tower.encode(tokens)[0], before)
    assert torch.equal(AdaptedTextEncoder(tower, {}).encode(tokens)[0], before)


def test_a_saved_file_of_either_dialect_loads_and_reports_what_did_not_match(tmp_path: Path) -> None:
    unet = make_unet()
    tensors = locon(unet)
    renamed = {}
    for path, other in key_names.diffusers_paths(unet).items():
        for below in ("lora_down.weight", "lora_up.weight", "alpha"):
            key = f"lora_unet_{path.replace('.', '_')}.{below}"
            if key in tensors:
                renamed[f"lora_unet_{other.replace('.', '_')}.{below}"] = tensors[key]
    save_file({**tensors, "lora_unet_no_such_layer.alpha": torch.tensor(1.0)}, tmp_path / "ldm.safetensors")
    save_file(renamed, tmp_path / "diffusers.safetensors")
    torch.save(tensors, tmp_path / "ldm.pt")
    ldm, diffusers, pickled = (
        load_adapter(tmp_path / name, unet) for name in ("ldm.safetensors", "diffusers.safetensors", "ldm.pt")
    )
    assert ldm.unet.keys() == diffusers.unet.keys() == pickled.unet.keys() == adapted_layers(unet).keys()
    assert ldm.unmatched == ("lora_unet_no_such_layer.alpha",) and diffusers.unmatched == ()
    assert "1 of its 250 keys match no layer" in ldm.report()
    outputs = []
    for adapter in (ldm, diffusers, pickled):
        attach(unet, [(adapter, 1.0)])
        outputs.append(unet(*inputs()))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def broken(tensors: dict[str, Tensor], ending: str, value: Tensor | None) -> dict[str, Tensor]:
    key = next(k for k in tensors if k.endswith(ending))
    return {k: v if k != key else value for k, v in tensors.items() if k != key or value is not None}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        ("lora_up.weight", None, "lora_up.weight is missing"),
        ("lora_up.weight", torch.zeros(7, 3), "lora_up.weight has shape .7, 3."),
        ("lora_down.weight", torch.full((3, 32), float("nan")), "lora_down.weight holds NaN"),
        ("lora_down.weight", torch.zeros(4, 32), "ranks of its factors disagree"),
    ],
)
def test_malformed_files_are_refused_with_file_and_key(ending: str, value: Tensor | None, message: str) -> None:
    unet = make_unet()
    tensors = broken(locon(unet, ["time_embed.0"]), ending, value)
    with pytest.raises(AdapterError, match=rf"^x\.safetensors .* lora_unet_time_embed_0: .*{message}"):
        read_adapter("x.safetensors", tensors, unet)


def test_unserved_algorithms_and_dialects_are_refused() -> None:
    unet = make_unet()
    parts = {"oft_blocks": torch.zeros(2, 2, 2), "lokr_w1": torch.zeros(2, 2)}
    mixed = {f"lora_unet_time_embed_0.{name}": tensor for name, tensor in parts.items()}
    with pytest.raises(AdapterError, match="lokr_w1, oft_blocks.*not supported"):
        read_adapter("x", mixed, unet)
    with pytest.raises(AdapterError, match="x has no key that names a layer .* 1; foo.lora_A.weight."):
        read_adapter("x", {"foo.lora_A.weight": torch.zeros(2, 2)}, unet)
    doubled = locon(unet, ["time_embed.0"])
    other = {k.replace("time_embed_0", "time_embedding_linear_1"): v for k, v in doubled.items()}
    with pytest.raises(AdapterError, match="time_embed.0 twice"):
        read_adapter("x", {**doubled, **other}, unet)


@pytest.mark.parametrize(
    ("key", "shape", "found"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", (4, 2048), "SDXL"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k", (4, 1024), "SD 2.x"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", (4, 1280), "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_proj", (4, 3072), "Flux"),
        ("lora_unet_joint_blocks_0_context_block_attn_qkv", (4, 1536), "SD 3"),
    ],
)
def test_files_of_another_family_are_refused_by_name(key: str, shape: tuple[int, int], found: str) -> None:
    unet = make_unet()
    tensors = {k: v for k, v in locon(unet).items() if "attn2" not in k}
    tensors |= {f"{key}.lora_down.weight": torch.zeros(shape), f"{key}.lora_up.weight": torch.zeros(4, shape[0])}
    with pytest.raises(AdapterError, match=rf"x\.safetensors is made for {found}.*SD 1\.x \(text 24 wide\), is needed"):
        read_adapter("x.safetensors", tensors, unet)


def test_truncated_files_are_refused_by_name(tmp_path: Path) -> None:
    unet, path = make_unet(), tmp_path / "cut.safetensors"
    save_file(locon(unet), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="cut.safetensors"):
        load_adapter(path, unet)


@pytest.mark.parametrize(("rank", "kind"), [(4, Bypass), (32, Merged)])
def test_automatic_merges_only_factors_that_cost_more_than_a_second_weight(rank: int, kind: type) -> None:
    """A square layer of 64 has 4096 weights, and factors of rank 4 and 16 have an eighth of them and as many."""
    unet = make_unet()
    path = next(p for p, layer in adapted_layers(unet).items() if layer.weight.shape == (64, 64))
    layer = unet.get_submodule(path)
    wanted = {}
    forms: tuple[AdapterForm, ...] = ("automatic", "merged")
    for form in forms:
        attach(unet, [(read_adapter("a", locon(unet, [path], rank), unet), 0.7)], form)
        adapted = layer.adaptation
        assert isinstance(adapted, kind if form == "automatic" else Merged)
        with torch.no_grad():
            wanted[form] = unet(*inputs())
    torch.testing.assert_close(wanted["automatic"], wanted["merged"], rtol=1e-4, atol=1e-4)


def test_automatic_reckons_with_all_adapters_of_a_layer() -> None:
    unet = make_unet()
    path = next(p for p, layer in adapted_layers(unet).items() if layer.weight.shape == (64, 64))
    files = [(read_adapter(str(seed), locon(unet, [path], 4, seed), unet), 1.0) for seed in range(5)]
    attach(unet, files[:4], "automatic")
    assert isinstance(unet.get_submodule(path).adaptation, Bypass)
    attach(unet, files, "automatic")
    assert isinstance(unet.get_submodule(path).adaptation, Merged)
