"""Names of layers in adapter files, against the module names of diffusers and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from lib_delta.adapters import key_names
from lib_delta.adapters.key_names import LayerPath
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet, UNetConfig
from tests.support.adapters import config

REAL = {
    "SD1": UNetConfig.sd15(),
    "SDXL": UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=320,
        levels=(320, 640, 1280),
        res_blocks=(2, 2, 2),
        depth_in=(0, 0, 2, 2, 10, 10),
        depth_middle=10,
        depth_out=(10, 10, 10, 2, 2, 2, 0, 0, 0),
        context_width=2048,
        linear_projection=True,
        label_width=2816,
        head_width=64,
    ),
}


def diffusers_unet(family: str) -> nn.Module:
    """Return diffusers' UNet of the released model's layout, narrow."""
    common = {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 24, "attention_head_dim": 8}
    xl = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(**{**common, **(xl if family == "SDXL" else {})})


def names(family: str) -> dict[str, LayerPath]:
    with torch.device("meta"):
        return key_names.layer_names(UNet(REAL[family]), ())


@pytest.mark.parametrize("family", REAL)
def test_every_layer_of_diffusers_unet_is_named(family: str) -> None:
    with torch.device("meta"):
        ours, theirs = UNet(REAL[family]), diffusers_unet(family)
    paths = key_names.diffusers_paths(ours)
    expected = {path for path, module in theirs.named_modules() if hasattr(module, "weight")}
    assert set(paths.values()) == expected
    assert len(paths) == len(expected) == len(key_names.named_layers(ours))


@pytest.mark.parametrize(
    ("family", "name", "path"),
    [
        ("SD1", "lora_unet_input_blocks_1_1_proj_in", "input_blocks.1.1.proj_in"),
        ("SD1", "lora_unet_down_blocks_0_attentions_0_proj_in", "input_blocks.1.1.proj_in"),
        (
            "SD1",
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0",
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "SD1",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "middle_block.1.transformer_blocks.0.ff.net.0.proj",
        ),
        ("SD1", "lora_unet_down_blocks_2_downsamplers_0_conv", "input_blocks.9.0.op"),
        ("SD1", "lora_unet_up_blocks_0_upsamplers_0_conv", "output_blocks.2.1.conv"),
        ("SD1", "lora_unet_up_blocks_1_upsamplers_0_conv", "output_blocks.5.2.conv"),
        ("SD1", "lora_unet_mid_block_resnets_1_conv2", "middle_block.2.out_layers.3"),
        ("SD1", "lora_unet_down_blocks_1_resnets_0_conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("SD1", "lora_unet_down_blocks_3_resnets_1_time_emb_proj", "input_blocks.11.0.emb_layers.1"),
        ("SD1", "lora_unet_time_embedding_linear_2", "time_embed.2"),
        (
            "SDXL",
            "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_k",
            "input_blocks.8.1.transformer_blocks.9.attn1.to_k",
        ),
        (
            "SDXL",
            "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn1_to_k",
            "input_blocks.8.1.transformer_blocks.9.attn1.to_k",
        ),
        ("SDXL", "lora_unet_up_blocks_1_attentions_2_proj_out", "output_blocks.5.1.proj_out"),
        ("SDXL", "lora_unet_add_embedding_linear_1", "label_emb.0.0"),
        ("SDXL", "lora_unet_label_emb_0_0", "label_emb.0.0"),
    ],
)
def test_both_naming_schemes_lead_to_the_layer(family: str, name: str, path: str) -> None:
    assert names(family)[name] == LayerPath(None, path)


def test_a_layer_that_the_model_lacks_has_no_name() -> None:
    assert "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k" not in names("SD1")
    assert "lora_unet_down_blocks_3_attentions_0_proj_in" not in names("SD1")


def clip(projection: bool = True) -> nn.Module:
    """Return a text model of transformers, of the class whose names are the same in every version."""
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=99, projection_dim=16, **widths))
    if not projection:
        del model.text_projection
    return model


def test_one_text_encoder_is_te_and_two_are_te1_and_te2() -> None:
    unet = UNet(config())
    path = "text_model.encoder.layers.1.self_attn.q_proj"
    layer = path.replace(".", "_")
    small, large = clip(projection=False), clip()
    one, two = key_names.layer_names(unet, [small]), key_names.layer_names(unet, [small, large])
    assert one[f"lora_te_{layer}"] == LayerPath(0, path)
    assert two[f"lora_te1_{layer}"] == LayerPath(0, path) and two[f"lora_te2_{layer}"] == LayerPath(1, path)
    assert two["lora_te2_text_projection"] == LayerPath(1, "text_projection")
    # Some trainers number the encoder even if there is only one.
    assert f"lora_te_{layer}" not in two and one[f"lora_te1_{layer}"] == LayerPath(0, path)


def test_an_open_clip_encoder_is_addressed_by_the_names_of_transformers() -> None:
    text = TextConfig(16, 32, layers=2, positions=8, vocabulary=99, heads=2, activation="gelu")
    tower = TextEncoder(text, final_norm=True)
    named = key_names.layer_names(UNet(config("SD2")), [tower])
    path = "transformer.text_model.encoder.layers.1.mlp.fc2"
    assert named["lora_te_text_model_encoder_layers_1_mlp_fc2"] == LayerPath(0, path)


@pytest.mark.parametrize(
    ("key", "layer", "tensor"),
    [
        (
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
            "lora_unet_mid_block_attentions_0_proj_in",
            "down",
        ),
        (
            "lycoris_unet_mid_block_attentions_0_proj_in.hada_w1_a",
            "lora_unet_mid_block_attentions_0_proj_in",
            "hada_w1_a",
        ),
        ("lycoris_mid_block_attentions_0_proj_in.alpha", "lora_unet_mid_block_attentions_0_proj_in", "alpha"),
        (
            "lycoris_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "alpha",
        ),
        ("lycoris_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_te_text_model_encoder_layers_0_mlp_fc1", "alpha"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "lora_unet_mid_block_attentions_0_proj_in", "down"),
        ("unet.mid_block.attentions.0.proj_in.lora_B.default.weight", "lora_unet_mid_block_attentions_0_proj_in", "up"),
        ("unet.mid_block.attentions.0.proj_in.lora.up.weight", "lora_unet_mid_block_attentions_0_proj_in", "up"),
        (
            "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
            "lora_unet_mid_block_attentions_0_proj_in",
            "down",
        ),
        (
            "base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
            "lora_te_text_model_encoder_layers_0_mlp_fc1",
            "down",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight",
            "lora_te1_text_model_encoder_layers_0_mlp_fc1",
            "down",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "down",
        ),
        ("diffusion_model.middle_block.1.proj_in.lora_A.weight", "lora_unet_middle_block_1_proj_in", "down"),
        (
            "base_model.model.mid_block.attentions.0.proj_in.lora_magnitude_vector",
            "lora_unet_mid_block_attentions_0_proj_in",
            "dora_scale",
        ),
    ],
)
def test_every_dialect_is_brought_to_the_names_of_kohya(key: str, layer: str, tensor: str) -> None:
    found = key_names.parse_key(key)
    assert found is not None and found.layer == layer
    assert found.tensor == {"down": "lora_down.weight", "up": "lora_up.weight"}.get(tensor, tensor)


@pytest.mark.parametrize("key", ["down_blocks.0.resnets.0.conv1.weight", "global_step", "lora_unet_proj_in.nonsense"])
def test_keys_of_other_things_are_told(key: str) -> None:
    assert key_names.parse_key(key) is None
