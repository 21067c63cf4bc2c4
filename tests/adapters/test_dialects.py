"""All dialects of layer names read the same adapter, and files of other kinds are named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.errors import AdapterError
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import KINDS, adapted_layers, every_algorithm, kohya_name, locon, make_unet


@functools.cache
def base() -> UNet:
    return make_unet()


@functools.cache
def tower() -> TextEncoder:
    torch.manual_seed(5)
    made = TextConfig(16, 32, layers=2, positions=8, vocabulary=99, heads=2, activation="quick_gelu")
    return TextEncoder(made, final_norm=True).requires_grad_(False).eval()


def text_layers() -> dict[str, nn.Module]:
    """Return the text encoder's linear layers by transformers' names."""
    named = tower().transformer.named_modules()
    return {
        path: layer
        for path, layer in named
        if path.startswith("text_model.encoder") and hasattr(layer, "weight") and layer.weight.ndim == 2
    }


# A layer's tensors, as (side, tensor); sides are down, up and alpha.
Parts = dict[str, Tensor]


@functools.cache
def unet_parts(transformer_only: bool = False) -> dict[str, Parts]:
    tensors = locon(base())
    paths = [path for path in adapted_layers(base()) if not transformer_only or ".attn" in path]
    return {
        path: {
            "down": tensors[f"{kohya_name(path)}.lora_down.weight"],
            "up": tensors[f"{kohya_name(path)}.lora_up.weight"],
            "alpha": torch.tensor(3.0),  # equals the rank, for dialects without alpha
        }
        for path in paths
    }


@functools.cache
def text_parts() -> dict[str, Parts]:
    torch.manual_seed(8)
    return {
        path: {
            "down": torch.randn(2, layer.weight.shape[1]),
            "up": torch.randn(layer.weight.shape[0], 2),
            "alpha": torch.tensor(2.0),
        }
        for path, layer in text_layers().items()
    }


def written(
    unet_name: Callable[[str], str], text_name: Callable[[str], str], names: dict[str, str]
) -> dict[str, Tensor]:
    tensors = {}
    for parts, name in ((unet_parts(), unet_name), (text_parts(), text_name)):
        for path, sides in parts.items():
            tensors |= {f"{name(path)}.{names[side]}": tensor for side, tensor in sides.items() if side in names}
    return tensors


def ldm(path: str) -> str:
    return path


def hub(path: str) -> str:
    return key_names.diffusers_paths(base())[path]


def joined(prefix: str, other: Callable[[str], str] = ldm) -> Callable[[str], str]:
    return lambda path: prefix + other(path).replace(".", "_")


def behind(prefix: str, other: Callable[[str], str] = ldm) -> Callable[[str], str]:
    return lambda path: prefix + other(path)


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
NAMED_PEFT = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
HUB = {"down": "lora.down.weight", "up": "lora.up.weight"}
OLD_HUB = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight", "alpha": "alpha"}
DIALECTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "kohya, original names": lambda: written(joined("lora_unet_"), joined("lora_te_"), KOHYA),
    "kohya, diffusers' names": lambda: written(joined("lora_unet_", hub), joined("lora_te_"), KOHYA),
    "kohya, numbered text encoder": lambda: written(joined("lora_unet_", hub), joined("lora_te1_"), KOHYA),
    "LyCORIS": lambda: written(joined("lycoris_unet_", hub), joined("lycoris_te_"), KOHYA),
    "LyCORIS, no part named": lambda: written(joined("lycoris_", hub), joined("lycoris_"), KOHYA),
    "diffusers": lambda: written(behind("unet.", hub), behind("text_encoder."), HUB),
    "diffusers, 2023": lambda: written(behind("unet.", hub), behind("text_encoder."), OLD_HUB),
    "diffusers, peft": lambda: written(behind("unet.", hub), behind("text_encoder."), PEFT),
    "peft": lambda: written(behind("base_model.model.", hub), behind("base_model.model."), PEFT),
    "peft, the adapter named": lambda: written(
        behind("base_model.model.", hub), behind("base_model.model."), NAMED_PEFT
    ),
    "peft behind the part": lambda: written(
        behind("unet.base_model.model.", hub), behind("text_encoder.base_model.model."), PEFT
    ),
    "bare, diffusers' names": lambda: written(behind("", hub), behind("text_encoder."), PEFT),
    "original names, dotted": lambda: written(behind("diffusion_model."), behind("text_encoder."), PEFT),
    "original names, whole model's": lambda: written(behind("model.diffusion_model."), behind("text_encoder."), KOHYA),
}


def read(tensors: dict[str, Tensor], path: Path) -> AdapterFile:
    save_file(tensors, path)
    return load_adapter(path, base(), [tower()])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_same_adapter(dialect: str, tmp_path: Path) -> None:
    tensors = DIALECTS[dialect]()
    adapter = read(tensors, tmp_path / "x.safetensors")
    assert not adapter.unmatched and adapter.total == len(tensors)
    assert set(adapter.unet) == set(unet_parts())
    assert set(adapter.text[0]) == {f"transformer.{path}" for path in text_parts()}
    for model, found, parts in ((base(), adapter.unet, unet_parts()), (tower(), adapter.text[0], text_parts())):
        for path, part in found.items():
            sides = parts[path.removeprefix("transformer.")]
            weight = model.get_submodule(path).weight
            expected = (sides["up"].flatten(1) @ sides["down"].flatten(1)).view(weight.shape)
            torch.testing.assert_close(part.merged_difference(weight), expected, rtol=1e-5, atol=1e-6)


def test_attention_processors_of_2023(tmp_path: Path) -> None:
    tensors = {}
    for path, sides in unet_parts(transformer_only=True).items():
        block, _, layer = hub(path).removesuffix(".0").rpartition(".")
        for side in ("down", "up"):
            tensors[f"{block}.processor.{layer}_lora.{side}.weight"] = sides[side]
    adapter = read(tensors, tmp_path / "x.safetensors")
    assert set(adapter.unet) == set(unet_parts(transformer_only=True)) and not adapter.unmatched


def test_the_bundled_embeddings_of_onetrainer_come_along(tmp_path: Path) -> None:
    word, two = torch.randn(3, 24), torch.randn(1, 24)
    tensors = {
        **DIALECTS["kohya, diffusers' names"](),
        "bundle_emb.my-word.string_to_param.*": word,
        "bundle_emb.two.emb_params": two,
    }
    adapter = read(tensors, tmp_path / "x.safetensors")
    assert not adapter.unmatched and adapter.embeddings.keys() == {"my-word", "two"}
    assert torch.equal(adapter.embeddings["my-word"][0], word) and torch.equal(adapter.embeddings["two"][0], two)
    assert "contains the embeddings my-word, two" in adapter.report()


@pytest.mark.parametrize("algorithm", every_algorithm())
def test_every_algorithm_in_lycoris_own_names(algorithm: str, tmp_path: Path) -> None:
    tensors = every_algorithm()[algorithm]
    renamed = {key.replace("lora_unet_", "lycoris_unet_"): value for key, value in tensors.items()}
    ours, theirs = read(tensors, tmp_path / "a.safetensors"), read(renamed, tmp_path / "b.safetensors")
    assert ours.unet.keys() == theirs.unet.keys() and not theirs.unmatched
    for path, part in ours.unet.items():
        weight = base().get_submodule(path).weight
        assert torch.equal(part.merged_difference(weight), theirs.unet[path].merged_difference(weight))


def test_a_file_that_matches_in_part_loads_and_counts(tmp_path: Path) -> None:
    strange = {
        "lora_unet_down_blocks_3_attentions_7_proj_in.lora_up.weight": torch.zeros(4, 4),
        "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight": torch.zeros(4, 4),
        "global_step": torch.tensor(3),
    }
    tensors = {**{f"{kohya_name(KINDS['linear'])}.{k}": v for k, v in lora_of_linear().items()}, **strange}
    adapter = read(tensors, tmp_path / "part.safetensors")
    assert set(adapter.unet) == {KINDS["linear"]} and set(adapter.unmatched) == set(strange)
    assert "3 of its 6 keys match no layer" in adapter.report()
    assert "adapts 1 layers of the UNet" in adapter.report() and "LoRA of rank 2" in adapter.report()


def lora_of_linear() -> dict[str, Tensor]:
    return {"lora_down.weight": torch.randn(2, 32), "lora_up.weight": torch.randn(128, 2), "alpha": torch.tensor(2.0)}


ATTN2 = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
WRONG_FAMILIES = {
    "SDXL by its text's width": (f"lora_unet_{ATTN2}.lora_down.weight", (4, 2048), "SDXL"),
    "SDXL by its depth": (
        "lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.lora_down.weight",
        (4, 1280),
        "SDXL",
    ),
    "SDXL by its second text encoder": (
        "lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight",
        (4, 1280),
        "SDXL",
    ),
    "SDXL, dotted": (
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_q.lora_A.weight",
        (4, 1280),
        "SDXL",
    ),
    "SDXL as LoHa": (f"lora_unet_{ATTN2}.hada_w1_b", (4, 2048), "SDXL"),
    "SD 2": (f"lora_unet_{ATTN2}.lora_down.weight", (4, 1024), "SD 2"),
    "SD 2, dotted": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight",
        (4, 1024),
        "SD 2",
    ),
    "SD 3, kohya": ("lora_unet_joint_blocks_3_x_block_attn_qkv.lora_down.weight", (4, 1536), "SD 3"),
    "SD 3, third text encoder": (
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        (4, 4096),
        "SD 3",
    ),
    "SD 3, diffusers": ("transformer.transformer_blocks.3.attn.to_q.lora_A.weight", (4, 1536), "SD 3"),
    "Flux, kohya": ("lora_unet_double_blocks_3_img_attn_qkv.lora_down.weight", (4, 3072), "Flux"),
    "Flux, diffusers": ("transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight", (4, 3072), "Flux"),
    "an unknown transformer": ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", (4, 5120), "DiT"),
    "another unknown transformer": ("diffusion_model.layers.3.attention.qkv.lora_A.weight", (4, 2304), "DiT"),
}


@pytest.mark.parametrize("case", WRONG_FAMILIES)
def test_files_of_another_family_are_named(case: str, tmp_path: Path) -> None:
    key, shape, family = WRONG_FAMILIES[case]
    save_file({key: torch.zeros(shape)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match=rf"other\.safetensors is made for .*{family}.*, is needed"):
        load_adapter(tmp_path / "other.safetensors", base(), [tower()])


@pytest.mark.parametrize(
    ("header", "family"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2"),
        ({"ss_v2": "True"}, "SD 2"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
    ],
)
def test_a_header_tells_the_family_where_no_key_does(header: dict[str, str], family: str, tmp_path: Path) -> None:
    save_file({"lora_unet_something_new.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors", header)
    with pytest.raises(AdapterError, match=f"x.safetensors is made for {family}.*header"):
        load_adapter(tmp_path / "x.safetensors", base())


OTHER_FILES = {
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "input_hint_block.0.weight": "ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "ControlNet",
    "controlnet_down_blocks.0.weight": "ControlNet",
    "lora_controlnet": "Control-LoRA",
    "ip_adapter.1.to_k_ip.weight": "IP-Adapter",
    "image_proj.proj.weight": "IP-Adapter",
    "first_stage_model.encoder.conv_in.weight": "VAE",
    "decoder.conv_in.weight": "VAE",
    "emb_params": "textual inversion",
    "clip_l": "textual inversion",
    "<cat-toy>": "textual inversion",
    "body.0.block1.weight": "T2I-Adapter",
    "adapter.body.0.resnets.0.block1.weight": "T2I-Adapter",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "motion module",
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("key", OTHER_FILES)
def test_files_of_other_kinds_are_named(key: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save({key: torch.zeros(4, 4)}, path)
    else:
        save_file({key: torch.zeros(4, 4)}, path)
    with pytest.raises(AdapterError, match=rf"^x\.{suffix} is .*{OTHER_FILES[key]}"):
        load_adapter(path, base(), [tower()])


def test_an_embedding_as_the_webui_saves_it_is_named(tmp_path: Path) -> None:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "word", "step": 3}
    torch.save(content, tmp_path / "word.pt")
    with pytest.raises(AdapterError, match=r"word\.pt .*embedding"):
        load_adapter(tmp_path / "word.pt", base())
