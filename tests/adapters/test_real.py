"""Formats of real files, compared with the programs that wrote them; files of other kinds are named."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.adapters.attach import adapted_text_parameters, attach
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files.checkpoint import UNET_PREFIX, describe, why_not_base
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import attached_weight, diffusers_twin, locon, make_unet, relative_error

BLOCK = "input_blocks.1.1.transformer_blocks.0"  # 32 wide, text 24
HUB = "down_blocks.0.attentions.0.transformer_blocks.0"


@functools.cache
def base() -> UNet:
    return make_unet()


@functools.cache
def tower() -> TextEncoder:
    torch.manual_seed(5)
    made = TextConfig(24, 48, layers=2, positions=8, vocabulary=99, heads=2, activation="quick_gelu")
    return TextEncoder(made, final_norm=True).requires_grad_(False).eval()


def r(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape)


def load(folder: Path, tensors: dict[str, Tensor], config: Any = None, header: Any = None) -> AdapterFile:
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, header)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return load_adapter(file, base(), [tower()])


def change(adapter: AdapterFile, path: str) -> tuple[Tensor, Tensor | None]:
    """Return an adapter's additions to a layer's weight and bias."""
    layer = base().get_submodule(path)
    attach(base(), [(adapter, 1.0)])
    bias = None if layer.adaptation.bias is None else layer.adaptation.bias - layer.bias
    return attached_weight(layer) - layer.weight, bias


def peft_lora(names: tuple[str, ...], inner: int = 32) -> dict[str, Tensor]:
    sizes = {"attn2.to_k": (24, 32), "ff.net.0.proj": (32, 256), "time_emb_proj": (128, 32)}
    made: dict[str, Tensor] = {}
    for name in names:
        into, out = next((size for end, size in sizes.items() if name.endswith(end)), (inner, 32))
        made |= {
            f"base_model.model.{name}.lora_A.weight": r(4, into),
            f"base_model.model.{name}.lora_B.weight": r(out, 4),
        }
    return made


@pytest.mark.parametrize(
    ("pattern", "scaled"),
    [
        (r".*attn2\.to_k", {"attn2.to_k"}),
        ("to_k", {"attn1.to_k", "attn2.to_k"}),
        ("proj", {"ff.net.0.proj"}),
        (r"^down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1\.to_k", {"attn1.to_k"}),
        (r"attn[12]\.to_k", {"attn1.to_k", "attn2.to_k"}),
        ("emb_proj", set()),
    ],
)
def test_patterns_of_peft_are_regular_expressions_on_dotted_names(
    pattern: str, scaled: set[str], tmp_path: Path
) -> None:
    names = {f"{HUB}.{n}": n for n in ("attn1.to_k", "attn2.to_k", "ff.net.0.proj")}
    names["down_blocks.0.resnets.0.time_emb_proj"] = "time_emb_proj"
    tensors = peft_lora(tuple(names))
    adapter = load(tmp_path, tensors, {"r": 4, "lora_alpha": 8, "alpha_pattern": {pattern: 64}})
    places = {hub: path for path, hub in key_names.diffusers_paths(base()).items()}
    for name, short in names.items():
        product = tensors[f"base_model.model.{name}.lora_B.weight"] @ tensors[f"base_model.model.{name}.lora_A.weight"]
        expected = product * (16 if short in scaled else 2)
        assert relative_error(change(adapter, places[name])[0], expected) < 1e-5, name


@pytest.mark.parametrize(
    "pattern", ["(.*)*x", "(a+)+", r"(a)\1", "a*b*c*d*", "x" * 500, "(", "[z-a]", "a{99999999999}"]
)
def test_patterns_that_could_take_forever_are_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="adapter_config has the pattern"):
        load(tmp_path, peft_lora((f"{HUB}.attn1.to_k",)), {"lora_alpha": 8, "alpha_pattern": {pattern: 64}})


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_factors_that_started_as_a_part_of_the_base_are_refused(start: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"part of the base .{start}"):
        load(tmp_path, peft_lora((f"{HUB}.attn1.to_k",)), {"lora_alpha": 4, "init_lora_weights": start})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_starts_are_ordinary_loras(start: Any, tmp_path: Path) -> None:
    made = load(tmp_path, peft_lora((f"{HUB}.attn1.to_k",)), {"lora_alpha": 4, "init_lora_weights": start})
    assert len(made.unet) == 1


def test_biases_of_peft(tmp_path: Path) -> None:
    name = f"base_model.model.{HUB}.attn1.to_out.0"
    tensors = peft_lora((f"{HUB}.attn1.to_out.0",)) | {f"{name}.lora_B.bias": r(32)}
    weight, bias = change(load(tmp_path, tensors, {"lora_alpha": 8}), f"{BLOCK}.attn1.to_out.0")
    product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    assert relative_error(weight, 2 * product) < 1e-5
    assert bias is not None and relative_error(bias, 2 * tensors[f"{name}.lora_B.bias"]) < 1e-5
    del tensors[f"{name}.lora_B.bias"]
    tensors[f"{name}.base_layer.bias"] = r(32)
    _, bias = change(load(tmp_path, tensors, {"lora_alpha": 8}), f"{BLOCK}.attn1.to_out.0")
    own = base().get_submodule(f"{BLOCK}.attn1.to_out.0").bias
    assert bias is not None and relative_error(bias, tensors[f"{name}.base_layer.bias"] - own) < 1e-5


def test_what_comfyui_extracts_and_trains(tmp_path: Path) -> None:
    unet, text = f"diffusion_model.{BLOCK}.", "text_encoders.clip_l.transformer.text_model.encoder.layers.0."
    tensors = {
        f"{unet}attn1.to_out.0.lora_up.weight": r(32, 4),
        f"{unet}attn1.to_out.0.lora_down.weight": r(4, 32),
        f"{unet}attn1.to_out.0.diff_b": r(32),
        f"{unet}norm1.diff": r(32),
        f"{unet}norm1.diff_b": r(32),
        f"{unet}attn1.to_q.lora_up.weight": r(32, 4),
        f"{unet}attn1.to_q.lora_down.weight": r(4, 32),
        f"{unet}ff.net.2.diff_b": r(32),
        f"{text}self_attn.q_proj.lora_up.weight": r(24, 4),
        f"{text}self_attn.q_proj.lora_down.weight": r(4, 24),
        f"{text}layer_norm1.diff": r(24),
        f"{text}layer_norm1.diff_b": r(24),
    }
    adapter = load(tmp_path, tensors)
    assert not adapter.unmatched and len(adapter.unet) == 4 and len(adapter.text[0]) == 2
    weight, bias = change(adapter, f"{BLOCK}.attn1.to_out.0")
    name = f"{unet}attn1.to_out.0."
    assert relative_error(weight, tensors[f"{name}lora_up.weight"] @ tensors[f"{name}lora_down.weight"]) < 1e-5
    assert bias is not None and relative_error(bias, tensors[f"{name}diff_b"]) < 1e-5
    weight, bias = change(adapter, f"{BLOCK}.ff.net.2")
    assert not weight.any() and bias is not None and relative_error(bias, tensors[f"{unet}ff.net.2.diff_b"]) < 1e-5
    changed = adapted_text_parameters(tower(), [(adapter, 1.0)])
    layer = "transformer.text_model.encoder.layers.0."
    found = changed[f"{layer}layer_norm1.weight"] - tower().get_parameter(f"{layer}layer_norm1.weight")
    assert relative_error(found, tensors[f"{text}layer_norm1.diff"]) < 1e-5
    # In the form bypass, which other layers allow.
    attach(base(), [(adapter, 0.5)], "bypass")
    assert torch.isfinite(base()(torch.randn(1, 1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 1, 5, 24))).all()


def test_old_text_encoder_keys_of_diffusers(tmp_path: Path) -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn."
    parts = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
    tensors = {f"{name}{p}_lora.{s}.weight": r(24, 2) if s == "up" else r(2, 24) for p in parts for s in ("up", "down")}
    adapter = load(tmp_path, tensors)
    assert not adapter.unmatched
    changed = adapted_text_parameters(tower(), [(adapter, 1.0)])
    for old, new in parts.items():
        path = f"transformer.text_model.encoder.layers.0.self_attn.{new}.weight"
        product = tensors[f"{name}{old}_lora.up.weight"] @ tensors[f"{name}{old}_lora.down.weight"]
        assert relative_error(changed[path] - tower().get_parameter(path), product) < 1e-4


@pytest.mark.parametrize("alpha", [9999999999.0, 4.0, float("inf")])
def test_alpha_means_nothing_to_a_lokr_of_two_whole_factors(alpha: float, tmp_path: Path) -> None:
    name = f"lora_unet_{HUB.replace('.', '_')}_attn1_to_q"
    one, two = r(4, 4).half(), r(8, 8).half()
    stated = torch.tensor(alpha).half()
    adapter = load(tmp_path, {f"{name}.lokr_w1": one, f"{name}.lokr_w2": two, f"{name}.alpha": stated})
    assert relative_error(change(adapter, f"{BLOCK}.attn1.to_q")[0], torch.kron(one.float(), two.float())) < 1e-5


# cloneofsimo's files.


def modules(kinds: tuple[str, ...], gated_second: bool) -> list[tuple[str, torch.nn.Module]]:
    """Walk diffusers' UNet as the trainer of 2022 did: linear layers (and convolutions) below certain modules."""
    twin = diffusers_twin(base())
    found = []
    for path, parent in twin.named_modules():
        if type(parent).__name__ not in kinds:
            continue
        for name, layer in parent.named_modules():
            conv = isinstance(layer, torch.nn.Conv2d) and "ResnetBlock2D" in kinds
            if isinstance(layer, torch.nn.Linear) or conv:
                found.append((f"{path}.{name}", layer))
    if not gated_second:
        return found
    ordered: list[tuple[str, torch.nn.Module]] = []
    for path, layer in found:  # diffusers of that time registered the feed-forward layer between the attentions
        if path.endswith("ff.net.0.proj"):
            ordered.insert(len(ordered) - 4, (path, layer))
        else:
            ordered.append((path, layer))
    return ordered


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("gated_second", [False, True])
def test_loras_of_2022_whose_layers_have_numbers(gated_second: bool, extended: bool, tmp_path: Path) -> None:
    kinds = ("CrossAttention", "Attention", "GEGLU", *(("ResnetBlock2D",) if extended else ()))
    walked = modules(kinds, gated_second)
    tensors = {"<s1>": r(24), "<s2>": r(24)}
    for number, (_, layer) in enumerate(walked):
        out, inner, *kernel = layer.weight.shape
        tensors[f"unet:{number}:up"] = r(out, 1, *(1 for _ in kernel))
        tensors[f"unet:{number}:down"] = r(1, inner, *kernel)
    for number in range(8):
        tensors |= {f"text_encoder:{number}:up": r(24, 1), f"text_encoder:{number}:down": r(1, 24)}
    adapter = load(tmp_path, tensors, header={"unet": json.dumps(kinds), "<s1>": "<embed>"})
    assert not adapter.unmatched and len(adapter.unet) == len(walked) and len(adapter.text[0]) == 8
    assert adapter.embeddings.keys() == {"<s1>", "<s2>"} and [v.shape for v in adapter.embeddings["<s1>"]] == [(1, 24)]
    attach(base(), [(adapter, 1.0)])
    places = {hub: path for path, hub in key_names.diffusers_paths(base()).items()}
    for number, (hub, _) in enumerate(walked):
        layer = base().get_submodule(places[hub])
        up, down = (tensors[f"unet:{number}:{side}"] for side in ("up", "down"))
        expected = (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)
        assert relative_error(attached_weight(layer) - layer.weight, expected) < 1e-4, hub
    changed = adapted_text_parameters(tower(), [(adapter, 1.0)])
    for number, name in enumerate(("k_proj", "v_proj", "q_proj", "out_proj")):
        path = f"transformer.text_model.encoder.layers.1.self_attn.{name}.weight"
        product = tensors[f"text_encoder:{4 + number}:up"] @ tensors[f"text_encoder:{4 + number}:down"]
        assert relative_error(changed[path] - tower().get_parameter(path), product) < 1e-4


@pytest.mark.parametrize(("name", "unet"), [("style.pt", True), ("style.text_encoder.pt", False)])
def test_lists_of_factors_are_numbered(name: str, unet: bool, tmp_path: Path) -> None:
    width = 32 if unet else 24
    factors = [torch.nn.Parameter(r(width, 2)), torch.nn.Parameter(r(2, width))]
    torch.save(factors, tmp_path / name)
    adapter = load_adapter(tmp_path / name, base(), [tower()])
    assert (len(adapter.unet), len(adapter.text[0])) == ((1, 0) if unet else (0, 1))


# Files of other kinds.


def weights(n: int) -> dict[str, Tensor]:
    return {"linear.0.weight": r(2 * n, n), "linear.0.bias": r(2 * n)}


OTHERS: dict[str, tuple[Any, str]] = {
    "hypernetwork": ({320: [weights(8), weights(8)], "step": 9, "layer_structure": [1, 2, 1]}, "a hypernetwork"),
    "IP-Adapter": (
        {"image_proj": {"proj.weight": r(8, 8)}, "ip_adapter": {"1.to_k_ip.weight": r(3, 2)}},
        "an IP-Adapter",
    ),
    "Custom Diffusion": (
        {"unet": {f"{HUB}.attn2.to_k.weight": r(32, 24)}, "modifier_token": {"<new1>": r(768)}},
        "a Custom Diffusion file",
    ),
    "embedding": ({"sks-dog": r(768)}, "a textual inversion"),
    "bare tensor": (r(1, 768), "a single tensor"),
    "TAESD": ({"0.weight": r(4, 3, 3, 3), "1.conv.0.weight": r(4, 4, 3, 3)}, "a tiny autoencoder"),
    "VAE-approx": ({"conv1.weight": r(4, 4, 7, 7), "conv8.weight": r(3, 8, 3, 3)}, "an approximate autoencoder"),
    "AdaLoRA": ({f"base_model.model.{HUB}.attn1.to_q.lora_E": r(4, 1)}, "an AdaLoRA"),
    "HRA": ({f"base_model.model.{HUB}.attn1.to_q.hra_u": r(4, 1)}, "an HRA"),
    "VeRA": ({f"base_model.model.{HUB}.attn1.to_q.vera_lambda_b": r(4)}, "a VeRA"),
    "FourierFT": ({f"base_model.model.{HUB}.attn1.to_q.fourierft_spectrum": r(4)}, "a FourierFT"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_are_named_wherever_they_are_chosen(kind: str, tmp_path: Path) -> None:
    content, what = OTHERS[kind]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AdapterError, match=rf"^x\.pt is {what}"):
        load_adapter(tmp_path / "x.pt", base(), [tower()])
    with pytest.raises(CheckpointError, match=rf"^x\.pt is {what}"):
        describe(tmp_path / "x.pt")


def test_a_lora_of_the_text_encoder_alone_needs_one(tmp_path: Path) -> None:
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save_file({f"{name}.lora_up.weight": r(24, 3), f"{name}.lora_down.weight": r(3, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="only the text encoder, and the base has none"):
        load_adapter(tmp_path / "x.safetensors", base())


# Inpainting models, and models with another prediction type.


def test_a_lora_of_an_inpainting_model_is_used_as_far_as_it_fits(tmp_path: Path) -> None:
    tensors = locon(base(), ["input_blocks.0.0", "out.2"])
    plain = load(tmp_path, tensors)
    key = "lora_unet_input_blocks_0_0.lora_down.weight"
    wider = load(tmp_path, {**tensors, key: torch.cat((tensors[key], r(3, 5, 3, 3)), 1)})
    assert wider.unmatched == (f"{key} (input channels 5 to 9)",)
    assert torch.equal(change(wider, "input_blocks.0.0")[0], change(plain, "input_blocks.0.0")[0])


def tuned(folder: Path, name: str, **changes: Tensor) -> Path:
    state = {f"{UNET_PREFIX}{k}": v + 0.1 for k, v in base().state_dict().items()}
    save_file({**state, **{k.replace("__", "."): v for k, v in changes.items()}}, folder / name)
    return folder / name


def test_an_adapted_inpainting_model_is_used_as_far_as_it_fits(tmp_path: Path) -> None:
    first = base().get_parameter("input_blocks.0.0.weight")
    wide = torch.cat((first + 0.1, r(32, 5, 3, 3)), 1)
    path = tuned(tmp_path, "inpaint.safetensors", **{f"{UNET_PREFIX}input_blocks.0.0.weight": wide})
    adapter = load_adapter(path, base())
    assert adapter.unmatched == ("input_blocks.0.0.weight (input channels 5 to 9)",)
    torch.testing.assert_close(change(adapter, "input_blocks.0.0")[0], torch.full_like(first, 0.1))


def test_an_adapted_model_predicts_what_the_base_does(tmp_path: Path) -> None:
    path = tuned(tmp_path, "v.safetensors", v_pred=torch.zeros(1))
    assert load_adapter(path, base(), (), "v").unet
    with pytest.raises(AdapterError, match=r"^v\.safetensors predicts v where the base predicts eps"):
        load_adapter(path, base(), (), "eps")


# Headers.


def test_a_checkpoint_is_described_by_its_header_until_it_changes(tmp_path: Path, monkeypatch: Any) -> None:
    from lib_delta.files import checkpoint
    from lib_delta.files.weight_file import WeightFile

    path = tuned(tmp_path, "a.safetensors")
    opened: list[Path] = []
    really = WeightFile.open
    monkeypatch.setattr(WeightFile, "open", lambda path: opened.append(path) or really(path))
    monkeypatch.setattr(WeightFile, "tensor", lambda *_: pytest.fail("a weight was read"))
    for _ in range(3):
        assert describe(path).family is checkpoint.Family.SD1
        assert "has no text encoder" in why_not_base(path)
    assert len(opened) == 1
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, path)
    assert "is a model of Flux" in why_not_base(path) and len(opened) == 2
    path.unlink()
    assert "cannot be read" in why_not_base(path)
