"""Every tensor of an adapter's file is used or reported: tensors next to factors, and unsupported kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files.checkpoint import describe
from lib_delta.models.unet import UNet
from tests.support.adapters import LINEAR, diffusers_twin, every_algorithm, kohya_name, make_unet

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_Q, KOHYA_Q = f"base_model.model.{Q}", f"lora_unet_{Q.replace('.', '_')}"


@pytest.fixture(scope="module")
def unet() -> UNet:
    return make_unet()


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def read(unet: UNet, folder: Path, tensors: dict[str, Tensor], config: object = None) -> AdapterFile:
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return load_adapter(folder / "adapter_model.safetensors", unet)


PEFT = {f"{PEFT_Q}.lora_A.weight": r(4, 64), f"{PEFT_Q}.lora_B.weight": r(64, 4)}
KOHYA = {f"{KOHYA_Q}.lora_down.weight": r(4, 64), f"{KOHYA_Q}.lora_up.weight": r(64, 4)}


@pytest.mark.parametrize(
    ("factors", "key", "told"),
    [
        (PEFT, f"{PEFT_Q}.lora_diag", "lora_diag of KaSA"),
        (PEFT, f"{PEFT_Q}.base_layer.weight", "base_layer.weight"),
        (PEFT, f"{PEFT_Q}.of_tomorrow.default.weight", "of_tomorrow.default.weight"),
        (PEFT, "base_model.model.conv_in.of_tomorrow", "of_tomorrow"),
        (KOHYA, f"{KOHYA_Q}.of_tomorrow", "of_tomorrow"),
        (KOHYA, f"{KOHYA_Q}.bias", "bias"),
        (KOHYA, f"{KOHYA_Q}.bias_values", "bias_values"),
    ],
)
def test_a_tensor_that_no_algorithm_reads_is_refused_by_name(
    factors: dict[str, Tensor], key: str, told: str, unet: UNet, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=rf"holds a tensor {told} for the layer lora_unet_"):
        read(unet, tmp_path, {**factors, key: r(64)})


@pytest.mark.parametrize("algorithm", every_algorithm())
def test_whatever_the_algorithm_a_further_tensor_is_told(algorithm: str, unet: UNet, tmp_path: Path) -> None:
    tensors = every_algorithm()[algorithm]
    layer = next(iter(tensors)).partition(".")[0]
    with pytest.raises(AdapterError, match="of_tomorrow"):
        read(unet, tmp_path, {**tensors, f"{layer}.of_tomorrow": r(4)})


def test_a_tensor_of_no_layer_is_counted(unet: UNet, tmp_path: Path) -> None:
    adapter = read(unet, tmp_path, {**PEFT, "base_model.model.no_such.layer.weight": r(4)})
    assert adapter.unmatched == ("base_model.model.no_such.layer.weight",)


def test_a_scale_counts_in_the_place_of_alpha_over_the_rank(unet: UNet, tmp_path: Path) -> None:
    stated = {f"{KOHYA_Q}.alpha": torch.tensor(1.0), f"{KOHYA_Q}.scale": torch.tensor(0.75)}
    path = "middle_block.1.transformer_blocks.0.attn1.to_q"
    weight = unet.get_submodule(path).weight
    for more, scale in ((stated, 0.75), ({f"{KOHYA_Q}.scalar": torch.tensor(1.0)}, 1.0)):
        found = read(unet, tmp_path, {**KOHYA, **more}).unet[path].merged_difference(weight)
        torch.testing.assert_close(found, scale * r(64, 4) @ r(4, 64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({**KOHYA, f"{KOHYA_Q}.scalar": torch.tensor(0.5)}, "scalar other than 1"),
        ({f"{kohya_name(LINEAR)}.diff": r(128, 32), f"{kohya_name(LINEAR)}.scale": torch.tensor(0.5)}, "a scale"),
    ],
)
def test_other_factors_of_the_whole_are_refused(
    tensors: dict[str, Tensor], told: str, unet: UNet, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=told):
        read(unet, tmp_path, tensors)


def test_whole_weights_in_diffusers_names_are_no_adapter(unet: UNet, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(AdapterError, match="holds whole weights by diffusers' names"):
        read(unet, tmp_path, dict(diffusers_twin(unet).state_dict()))


def test_a_whole_weight_beside_factors_of_its_own_is_told(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not supported, or incomplete"):
        read(unet, tmp_path, {**PEFT, f"{PEFT_Q}.weight": r(64, 64)})


# Kinds.

# peft 0.21: type, its authors' spelling, and a tensor of its files.
KINDS = {
    "MISS": ("MiSS", "miss_block"),
    "C3A": ("C3A", "c3a_kernel"),
    "SHIRA": ("SHiRA", "shira_weight"),
    "WAVEFT": ("WaveFT", "waveft_spectrum"),
    "DELORA": ("DeLoRA", "delora_A"),
    "ROAD": ("RoAd", "road_theta"),
    "GRALORA": ("GraLoRA", "gralora_A"),
    "RANDLORA": ("RandLoRA", "randlora_lambda"),
    "VBLORA": ("VB-LoRA", "vblora_logits_A"),
    "PVERA": ("PVeRA", "pvera_lambda_b"),
    "LN_TUNING": ("LN-Tuning", "ln_tuning_layers.weight"),
    "BEFT": ("BEFT", "beft_bias"),
    "DEFT": ("DEFT", "deft_P"),
    "HIRA": ("HiRA", "hira_A"),
    "LILY": ("Lily", "lily_A.weight"),
    "OSF": ("OSF", "osf_svd_params.S_low"),
    "PEANUT": ("PEANuT", "peanut_A.weight"),
    "PSOFT": ("PSOFT", "psoft_R.vector_a"),
    "POLY": ("Poly", "poly_lora_A"),
    "SUPERTUNING": ("SuperTuning", "supertuning_values"),
    "TINYLORA": ("TinyLoRA", "tinylora_v"),
    "GLORA": ("GLoRA", "glora_A.Xd"),
    "ADALORA": ("AdaLoRA", "lora_E"),
}


@pytest.mark.parametrize("stated", KINDS)
@pytest.mark.parametrize("with_config", [True, False])
def test_peft_kinds_are_refused_by_name(stated: str, with_config: bool, unet: UNet, tmp_path: Path) -> None:
    name, tensor = KINDS[stated]
    config = {"peft_type": stated} if with_config else None
    with pytest.raises(AdapterError, match=rf"is an? {name} file of peft, which is not supported"):
        read(unet, tmp_path, {f"{PEFT_Q}.{tensor}": r(4, 64)}, config)


def test_a_kind_that_is_not_known_yet_is_named_by_its_configuration(unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match="is a OF_TOMORROW file of peft, which is not supported, as adapter_config.json"
    ):
        read(unet, tmp_path, PEFT, {"peft_type": "OF_TOMORROW"})


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        (
            {
                f"{KOHYA_Q}.q_layer.weight": r(4, 64),
                f"{KOHYA_Q}.p_layer.weight": r(64, 4),
                f"{KOHYA_Q}.lambda_layer": r(1, 4),
                f"{KOHYA_Q}.alpha": torch.tensor(1.0),
            },
            "a T-LoRA",
        ),
        (
            {f"transformer.single_blocks.0.linear1.lora_{side}.weight": r(4, 4) for side in "AB"},
            r"made for a transformer model \(HunyuanVideo",
        ),
        ({"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": r(4, 64)}, "ControlNet-LLLite"),
    ],
)
def test_other_kinds_are_refused_by_name(tensors: dict[str, Tensor], told: str, unet: UNet, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=told):
        read(unet, tmp_path, tensors)


def test_layers_are_owners_of_what_stands_below_them(unet: UNet) -> None:
    names = key_names.layer_names(unet, [])
    assert key_names.owner(f"{PEFT_Q}.a.b.c", names) == (KOHYA_Q, "a.b.c")
    assert key_names.owner("conv_in.bias", names) == ("lora_unet_conv_in", "bias")
    assert key_names.owner("global_step", names) is None and key_names.owner("no.such.layer", names) is None


# Saved from parallel training.


def test_a_wrapper_of_parallel_training_is_looked_through(unet: UNet, tmp_path: Path) -> None:
    checkpoint = {f"model.diffusion_model.{key}": tensor for key, tensor in unet.state_dict().items()}
    text = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": r(8)}
    whole = {f"module.{key}": tensor for key, tensor in {**checkpoint, **text}.items()}
    torch.save({"state_dict": whole}, tmp_path / "whole.ckpt")
    assert describe(tmp_path / "whole.ckpt").missing == ("autoencoder",)
    assert not load_adapter(tmp_path / "whole.ckpt", unet).unet  # the base's weights
    torch.save({**whole, "epoch_loss": r(1)}, tmp_path / "part.ckpt")
    with pytest.raises(CheckpointError, match="^part.ckpt is saved from parallel training"):
        describe(tmp_path / "part.ckpt")
