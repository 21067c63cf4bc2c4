"""One small UNet and text encoder, in diffusers and here, load the same file."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.adapters.attach import AdapterForm, adapted_text_parameters, attach
from lib_delta.models.unet import UNet
from tests.support.adapters import adapted_layers, diffusers_twin, inputs, kohya_name, locon, make_unet

pytest.importorskip("peft")
pytest.importorskip("diffusers.loaders.lora")
pytest.importorskip("diffusers.loaders.unet")
import peft
from diffusers.loaders import LoraLoaderMixin

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(autouse=True)
def _with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make diffusers load through peft, although it requires a newer transformers than the WebUIs' without need."""
    diffusers_twin(make_unet())
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers") and "USE_PEFT_BACKEND" in vars(module):
            monkeypatch.setattr(module, "USE_PEFT_BACKEND", True)
    monkeypatch.setattr(CLIPTextModel, "load_adapter", with_peft, raising=False)


def with_peft(model: nn.Module, adapter_name: str, adapter_state_dict: dict[str, Tensor], peft_config: Any) -> None:
    """Do what the method ``load_adapter`` of newer models of transformers does."""
    peft.inject_adapter_in_model(peft_config, model, adapter_name)
    missed = peft.set_peft_model_state_dict(model, adapter_state_dict, adapter_name)
    assert not missed.unexpected_keys
    model.eval()


def adapted_paths(unet: UNet, kind: str) -> list[str]:
    """Return the layers of a kind of file: only attention, its whole block, or also convolutions."""
    if kind == "attention":
        return [path for path in adapted_layers(unet) if path.endswith(ATTENTION)]
    inside = [
        path for path in adapted_layers(unet) if "transformer_blocks" in path or path.endswith(("proj_in", "proj_out"))
    ]
    return inside if kind == "transformer" else [*inside, "input_blocks.3.0.in_layers.2", "middle_block.2.out_layers.3"]


def kohya(unet: UNet, paths: list[str]) -> dict[str, Tensor]:
    """Return a LoCon in the names of kohya's scripts, after diffusers' modules."""
    others = key_names.diffusers_paths(unet)
    tensors = {}
    for key, value in locon(unet, paths).items():
        name, _, below = key.partition(".")
        path = next(path for path in paths if kohya_name(path) == name)
        tensors[f"{kohya_name(others[path])}.{below}"] = value
    return tensors


def dotted(unet: UNet, paths: list[str], up: str, down: str, prefix: str = "unet.") -> dict[str, Tensor]:
    """Return a LoRA of scale 1 whose keys are dotted paths."""
    others, tensors = key_names.diffusers_paths(unet), locon(unet, paths)
    return {
        f"{prefix}{others[path]}.{below}": tensors[f"{kohya_name(path)}.lora_{side}.weight"]
        for path in paths
        for side, below in (("up", up), ("down", down))
    }


def processors(unet: UNet, paths: list[str]) -> dict[str, Tensor]:
    """Return a LoRA in the form of diffusers' attention processors of 2023."""
    tensors = dotted(unet, paths, "up.weight", "down.weight", prefix="")
    renamed = {}
    for key, value in tensors.items():
        block, layer = key.replace(".to_out.0.", ".to_out.").rsplit(".attn", 1)
        number, name, side, _ = layer.split(".")
        renamed[f"{block}.attn{number}.processor.{name}_lora.{side}.weight"] = value
    return renamed


FORMATS: dict[str, tuple[str, Callable[[UNet, list[str]], dict[str, Tensor]]]] = {
    "kohya, attention": ("attention", kohya),
    "kohya, transformers": ("transformer", kohya),
    "kohya, convolutions too": ("convolutions", kohya),
    "diffusers": ("attention", lambda u, p: dotted(u, p, "lora.up.weight", "lora.down.weight")),
    "peft": ("transformer", lambda u, p: dotted(u, p, "lora_B.weight", "lora_A.weight")),
    "peft, convolutions too": ("convolutions", lambda u, p: dotted(u, p, "lora_B.weight", "lora_A.weight")),
    "processors": ("attention", processors),
}


def with_diffusers(twin: nn.Module, file: Path) -> nn.Module:
    state, alphas = LoraLoaderMixin.lora_state_dict(load_file(file))
    LoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=twin)
    return twin


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize("name", FORMATS)
def test_both_branches_of_a_unet(name: str, form: AdapterForm, tmp_path: Path) -> None:
    unet = make_unet()
    kind, write = FORMATS[name]
    paths = adapted_paths(unet, kind)
    save_file(write(unet, paths), tmp_path / "x.safetensors")
    twin = diffusers_twin(unet)
    x, t, context = inputs()
    with torch.no_grad():
        base = twin(x[0], t, context[0]).sample
        adapted = with_diffusers(twin, tmp_path / "x.safetensors")(x[0], t, context[0]).sample
    adapter = load_adapter(tmp_path / "x.safetensors", unet)
    assert set(adapter.unet) == set(paths) and not adapter.unmatched
    attach(unet, [(adapter, 1.0)], form)
    ours = unet(x, t, context)
    assert (adapted - base).abs().max() > 0.05
    torch.testing.assert_close(ours[0], base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], adapted, rtol=1e-4, atol=1e-4)


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(7)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=99, max_position_embeddings=8, **widths))
    return model.requires_grad_(False).eval()


def text_lora(tower: CLIPTextModel, name: Callable[[str, str], str], alpha: bool) -> dict[str, Tensor]:
    torch.manual_seed(8)
    tensors = {}
    for path, layer in tower.named_modules():
        if isinstance(layer, nn.Linear) and "self_attn" in path:
            tensors[name(path, "down")] = torch.randn(2, layer.in_features)
            tensors[name(path, "up")] = torch.randn(layer.out_features, 2)
            if alpha:
                tensors[name(path, "alpha")] = torch.tensor(1.0)
    return tensors


def kohya_text(path: str, part: str) -> str:
    return f"lora_te_{path.replace('.', '_')}." + ("alpha" if part == "alpha" else f"lora_{part}.weight")


def diffusers_text(path: str, part: str) -> str:
    return f"text_encoder.{path}.lora_linear_layer.{part}.weight"


def peft_text(path: str, part: str) -> str:
    return f"text_encoder.{path}.lora_{ {'down': 'A', 'up': 'B'}[part] }.weight"


@pytest.mark.parametrize(("name", "alpha"), [(kohya_text, True), (diffusers_text, False), (peft_text, False)])
def test_a_text_encoder(name: Callable[[str, str], str], alpha: bool, tmp_path: Path) -> None:
    unet, tower, tokens = make_unet(), text_encoder(), torch.tensor([[98, 4, 5, 98]])
    unet_part = kohya(unet, adapted_paths(unet, "attention"))
    if not alpha:
        unet_part = dotted(unet, adapted_paths(unet, "attention"), "lora_B.weight", "lora_A.weight")
    save_file({**unet_part, **text_lora(tower, name, alpha)}, tmp_path / "x.safetensors")
    adapter: AdapterFile = load_adapter(tmp_path / "x.safetensors", unet, [tower])
    assert len(adapter.text[0]) == 8 and not adapter.unmatched
    parameters = adapted_text_parameters(tower, [(adapter, 1.0)])
    ours = functional_call(tower, parameters, (tokens,)).last_hidden_state
    theirs = copy.deepcopy(tower)
    state, alphas = LoraLoaderMixin.lora_state_dict(load_file(tmp_path / "x.safetensors"))
    LoraLoaderMixin.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=theirs)
    expected = theirs(tokens).last_hidden_state
    assert (expected - tower(tokens).last_hidden_state).abs().max() > 0.05
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
