"""Checkpoint files are detected and load without copies; damaged ones raise one clear sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import Prediction
from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import UNET_PREFIX, detect_family
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_unet, load_vae
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.models.vae import VAE, VAEConfig

ROOT = Path(__file__).parents[2]
NARROW: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "levels": (32, 64),
    "res_blocks": (1, 1),
    "depth_in": (1, 0),
    "depth_middle": 1,
    "depth_out": (0, 0, 1, 1),
    "context_width": 24,
    "linear_projection": False,
}
LINEAR: dict[str, Any] = {
    **NARROW,
    "levels": (64, 128),
    "model_channels": 64,
    "linear_projection": True,
    "head_width": 64,
}


def unet_tensors(prefix: str = UNET_PREFIX, **changes: Any) -> dict[str, Tensor]:
    base = LINEAR if changes.pop("linear", False) else NARROW
    torch.manual_seed(0)
    with torch.device("meta"):
        state = UNet(UNetConfig(**{**base, **changes})).state_dict()
    return {f"{prefix}{k}": torch.randn(v.shape) for k, v in state.items()}


def sd1(**changes: Any) -> dict[str, Tensor]:
    return unet_tensors(**changes)


def sd2(**changes: Any) -> dict[str, Tensor]:
    return unet_tensors(linear=True, **changes)


def sdxl() -> dict[str, Tensor]:
    text = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.ones(4)}
    return unet_tensors(linear=True, label_width=48) | text


def refiner() -> dict[str, Tensor]:
    return unet_tensors(linear=True, label_width=48) | {"conditioner.embedders.0.model.ln_final.bias": torch.ones(4)}


def vae_tensors(prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    return {f"{prefix}{k}": v.detach().clone() for k, v in VAE(VAEConfig((32, 64), 1)).state_dict().items()}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file(dict(tensors), str(path), dict(metadata or {}))
    return path


def load(path: Path, **options: Any) -> Any:
    with WeightFile.open(path) as file:
        return load_unet(file, **options)


@pytest.mark.parametrize(
    ("tensors", "family"),
    [
        (sd1(), Family.SD1),
        (sd1(in_channels=9), Family.SD1),
        (sd2(), Family.SD2),
        (sdxl(), Family.SDXL),
        (refiner(), Family.SDXL_REFINER),
        (unet_tensors(linear=True, label_width=48, context_width=1280), Family.SDXL_REFINER),
        (unet_tensors(linear=True, label_width=48, context_width=2048), Family.SDXL),
        (unet_tensors(linear=True, label_width=48, context_width=1024), Family.UNCLIP),
        ({"model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": torch.ones(1)}, Family.SD3),
        ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, Family.FLUX),
        ({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, Family.FLUX),
    ],
)
def test_families_are_told_apart(tensors: dict[str, Tensor], family: Family) -> None:
    assert detect_family({k: tuple(v.shape) for k, v in tensors.items()}) is family


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (refiner(), "SDXL refiner"),
        ({"model.diffusion_model.joint_blocks.0.x.weight": torch.ones(1)}, "SD 3"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.ones(1)}, "Flux"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": torch.ones(1)}, "a LoRA, not a checkpoint"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)}, "a LoRA, not a checkpoint"),
        ({"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": torch.ones(1)}, "a LoRA, not a checkpoint"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "diffusers layout"),
        ({"control_model.input_blocks.0.0.weight": torch.ones(1)}, "a ControlNet"),
        ({"input_hint_block.0.weight": torch.ones(1), "input_blocks.0.0.weight": torch.ones(1)}, "a ControlNet"),
        ({"string_to_param.*": torch.ones(1)}, "textual inversion"),
        ({"emb_params": torch.ones(1)}, "textual inversion"),
        ({"model_ema.diffusion_modelinput_blocks00weight": torch.ones(1)}, "averaged"),
        ({"model.diffusion_model.x_embedder.weight": torch.ones(1)}, "of an unknown family"),
        (vae_tensors() | {"cond_stage_model.transformer.x": torch.ones(1)}, "a checkpoint without a UNet"),
        ({"encoder.conv_in.weight": torch.ones(1)}, "an autoencoder"),
        ({"text_model.final_layer_norm.weight": torch.ones(1)}, "a text encoder"),
        ({"something": torch.ones(1)}, "not a Stable Diffusion checkpoint"),
    ],
)
def test_other_files_are_named(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    with pytest.raises(CheckpointError, match=name) as raised:
        load(save(tmp_path / "model.safetensors", tensors))
    assert_one_sentence(raised.value, "model.safetensors")
    assert "needed" in str(raised.value)


def test_a_file_without_weights_is_named(tmp_path: Path) -> None:
    torch.save({"step": 5}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt is a file without any weights"):
        load(tmp_path / "a.ckpt")


def assert_one_sentence(error: Exception, file: str) -> None:
    text = str(error)
    assert text.startswith(file)
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(("channels", "variant"), [(4, "standard"), (5, "depth"), (8, "edit"), (9, "inpainting")])
def test_variants_are_told_by_the_input_channels(tmp_path: Path, channels: int, variant: str) -> None:
    unet, report = load(save(tmp_path / "a.safetensors", sd1(in_channels=channels)))
    assert report.variant == variant
    assert unet.config.in_channels == channels


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction"),
    [
        (sd1(), {}, "eps"),
        (sdxl(), {}, "eps"),
        (sd2(), {}, "v"),
        (sd2(in_channels=9), {}, "eps"),
        (sd2(), {"modelspec.prediction_type": "epsilon"}, "eps"),
        (sd1(), {"modelspec.prediction_type": "v"}, "v"),
        (sdxl(), {"modelspec.prediction_type": "v_prediction"}, "v"),
        (sd1(), {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        (sdxl() | {"v_pred": torch.tensor([])}, {}, "v"),
        (sdxl() | {"v_pred": torch.tensor([])}, {"modelspec.prediction_type": "epsilon"}, "v"),
    ],
)
def test_prediction_is_told(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], prediction: Prediction
) -> None:
    _, report = load(save(tmp_path / "a.safetensors", tensors, metadata))
    assert report.prediction == prediction
    assert not report.zero_terminal_snr


def test_prediction_can_be_overridden(tmp_path: Path) -> None:
    assert load(save(tmp_path / "a.safetensors", sd2()), prediction="eps")[1].prediction == "eps"


def test_a_prediction_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", sd1(), {"modelspec.prediction_type": "edm"})
    with pytest.raises(CheckpointError, match=r"^a\.safetensors predicts 'edm'.*eps or v is needed"):
        load(path)


def test_zero_terminal_snr_is_told(tmp_path: Path) -> None:
    flag = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    assert load(save(tmp_path / "a.safetensors", sdxl() | flag))[1].zero_terminal_snr
    assert load(save(tmp_path / "b.safetensors", sd1(), {"ss_zero_terminal_snr": "True"}))[1].zero_terminal_snr


@pytest.mark.parametrize("prefix", [UNET_PREFIX, "diffusion_model.", ""])
def test_unet_only_files_load_and_say_what_they_lack(tmp_path: Path, prefix: str) -> None:
    tensors = unet_tensors(prefix)
    unet, report = load(save(tmp_path / "a.safetensors", tensors))
    assert {f"{prefix}{k}" for k in unet.state_dict()} == set(tensors)
    assert all(torch.equal(v, tensors[f"{prefix}{k}"]) for k, v in unet.state_dict().items())
    assert report.missing == ("text encoder", "autoencoder")
    assert report.unexpected == ()


def test_keys_that_nobody_reads_are_reported(tmp_path: Path) -> None:
    known = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.ones(1, 77),
        "first_stage_model.quant_conv.bias": torch.ones(8),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1),
        "alphas_cumprod": torch.ones(1000),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
    }
    strange = {f"{UNET_PREFIX}input_blocks.0.0.extra": torch.ones(1), "note": torch.ones(1)}
    _, report = load(save(tmp_path / "a.safetensors", sd1() | known | strange))
    assert set(report.unexpected) == set(strange)
    assert report.missing == ()


def test_missing_unet_weights_are_an_error(tmp_path: Path) -> None:
    tensors = sd1()
    del tensors[f"{UNET_PREFIX}middle_block.0.in_layers.2.weight"]
    path = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of \d+ weights of its UNet .*middle_block\.0\.in_layers\.2"
    ) as raised:
        load(path)
    assert_one_sentence(raised.value, "a.safetensors")


def test_a_weight_of_another_shape_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", sd1() | {f"{UNET_PREFIX}out.0.bias": torch.ones(7)})
    with pytest.raises(CheckpointError, match=r"out\.0\.bias with shape \(7,\) where \(32,\) is needed"):
        load(path)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_every_storage_type_loads(tmp_path: Path, name: str) -> None:
    stored = {k: v.to(getattr(torch, name)) for k, v in sd1().items()}
    unet, _ = load(save(tmp_path / "a.safetensors", stored))
    assert all(v.dtype == torch.float32 for v in unet.state_dict().values())
    assert all(torch.equal(v, stored[f"{UNET_PREFIX}{k}"].float()) for k, v in unet.state_dict().items())
    assert unet(torch.randn(1, 1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 1, 3, 24)).isfinite().all()


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", sd1() | {f"{UNET_PREFIX}out.2.scale_weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"a\.safetensors is quantised"):
        load(path)
    path = save(
        tmp_path / "b.safetensors", sd1() | {f"{UNET_PREFIX}out.2.weight": torch.ones(4, 32, 3, 3, dtype=torch.int8)}
    )
    with pytest.raises(CheckpointError, match=r"b\.safetensors has weight out\.2\.weight of type torch\.int8"):
        load(path)


OVERWRITE = """
import sys, torch
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_unet
for path in sys.argv[1:]:
    with WeightFile.open(path) as file:
        unet, _ = load_unet(file, torch.float16)
    before = sum(float(weight.float().sum()) for weight in unet.parameters())
    open(path, "wb").close()
    assert sum(float(weight.float().sum()) for weight in unet.parameters()) == before, path
    print(path)
"""


def test_weights_outlive_their_file(tmp_path: Path) -> None:
    """Overwriting a mapped file ends the process (SIGBUS), so that this runs in a subprocess."""
    paths, tensors = [tmp_path / "a.safetensors", tmp_path / "a.ckpt"], {k: v.half() for k, v in sd1().items()}
    save(paths[0], tensors)
    torch.save(tensors, paths[1])
    command = [sys.executable, "-c", OVERWRITE, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.split() == [*map(str, paths)], done.stdout


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("change", ["overwritten", "cut off"])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, suffix: str, change: str) -> None:
    path, tensors = tmp_path / f"a.{suffix}", sd1()
    if suffix == "ckpt":
        torch.save(tensors, path)
    else:
        save(path, tensors)
    content = path.read_bytes()
    with WeightFile.open(path) as file:
        path.write_bytes(content if change == "overwritten" else content[: len(content) // 2])
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointError, match=rf"^a\.{suffix} was changed while it was read: try again"):
            load_unet(file)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_ckpt_files_load_like_safetensors(tmp_path: Path, nested: bool, zipped: bool) -> None:
    tensors = sd1()
    path = tmp_path / "a.ckpt"
    content = {"state_dict": tensors, "global_step": 5} if nested else tensors
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    unet, report = load(path)
    assert report.family is Family.SD1
    assert all(torch.equal(v, tensors[f"{UNET_PREFIX}{k}"]) for k, v in unet.state_dict().items())


def test_the_content_counts_not_the_name(tmp_path: Path) -> None:
    tensors = sd1()
    torch.save(tensors, tmp_path / "a.safetensors")
    save(tmp_path / "b.ckpt", tensors)
    assert load(tmp_path / "a.safetensors")[1] == load(tmp_path / "b.ckpt")[1]


def test_a_view_holds_the_keys_below_a_prefix(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", {"a.b.c": torch.ones(2, 3), "a.d": torch.zeros(1), "e": torch.zeros(1)})
    with WeightFile.open(path) as file:
        view = file.below("a.").below("b.")
        assert view.shapes == {"c": (2, 3)}
        assert view.keys == ("c",)
        assert torch.equal(view.tensor("c"), torch.ones(2, 3))
        assert set(file.below("a.").keys) == {"b.c", "d"}
        with pytest.raises(CheckpointError, match=r"a\.safetensors has no readable weight a\.x"):
            file.below("a.").tensor("x")


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_autoencoders_load(tmp_path: Path, prefix: str) -> None:
    tensors = vae_tensors(prefix)
    # Some conversions store the attention's 1x1 convolutions as matrices.
    tensors[f"{prefix}encoder.mid.attn_1.q.weight"] = tensors[f"{prefix}encoder.mid.attn_1.q.weight"][
        :, :, 0, 0
    ].contiguous()
    tensors[f"{prefix}loss.logvar"] = torch.zeros(1)
    with WeightFile.open(save(tmp_path / "a.safetensors", tensors)) as file:
        vae = load_vae(file)
    assert vae.config == VAEConfig((32, 64), 1)
    assert vae.decode(torch.randn(1, 4, 4, 4)).shape == (1, 3, 8, 8)


def test_a_checkpoint_without_autoencoder_says_so(tmp_path: Path) -> None:
    file = WeightFile.open(save(tmp_path / "a.safetensors", sd1()))
    with pytest.raises(CheckpointError, match=r"^a\.safetensors has no autoencoder"):
        load_vae(file)


def header(entries: Mapping[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code in the file was run",))


BAD_FILES = {
    "empty": b"",
    "one byte": b"\0",
    "text": b"# Installation\nFirst, download the model and put it into the folder.\n" * 10,
    "web page": b"<!DOCTYPE html><html><body>Sign in to download</body></html>",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "gguf": b"GGUF" + bytes(100),
    "zeros": bytes(10_000),
    "header longer than the file": header({}, length=10_000),
    "gigantic header": header({}, length=2**62),
    "header of the largest number": header({}, length=2**64 - 1),
    "header is no json": struct.pack("<Q", 8) + b"{broken!",
    "header nested deeply": struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
    "data beyond the end": header(entry([1000], [0, 4000])) + bytes(16),
    "offsets that overflow": header(entry([2**62], [0, 2**64 - 1])) + bytes(16),
    "shape that overflows": header(entry([2**40, 2**40], [0, 16])) + bytes(16),
    "negative shape": header(entry([-4], [0, 16])) + bytes(16),
    "offsets reversed": header(entry([4], [16, 0])) + bytes(16),
    "unknown type": header(entry([4], [0, 16], "X9")) + bytes(16),
    "no weights": header({}),
    "zip start only": b"PK\x03\x04" + bytes(50),
    "pickle start only": b"\x80\x02",
    "malicious pickle": pickle.dumps(Malicious()),
    "pickled list": pickle.dumps([1, 2, 3]),
    "pickled number keys": pickle.dumps({1: 2}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_get_one_sentence(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(BAD_FILES[kind])
    with pytest.raises(CheckpointError) as raised:
        load(path)
    assert_one_sentence(raised.value, path.name)
    assert path.exists()


@pytest.mark.parametrize("kept", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_truncated_files_get_one_sentence(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": sd1()}, path)
    else:
        save(path, sd1())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match="truncated or damaged|damaged") as raised:
        load(path)
    assert_one_sentence(raised.value, path.name)
    assert path.exists()


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_flipped_bytes_do_nothing_worse_than_that_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.file"
    tensors = {k: v[:1].clone() if v.ndim > 1 else v for k, v in sd1().items() if "out" in k}
    if kind == "safetensors":
        save(path, tensors)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    content, random = path.read_bytes(), Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(random.choice((1, 1, 10, 100))):
            damaged[random.randrange(min(len(damaged), random.choice((16, 4000, 10**9))))] = random.randrange(256)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as raised:
            load(path)
        assert_one_sentence(raised.value, path.name)


def test_objects_in_a_ckpt_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": sd1(), "callbacks": Malicious()}, path)
    with pytest.raises(CheckpointError, match=r"^a\.ckpt .*not loaded for safety: convert it to safetensors"):
        load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        WeightFile.open(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        WeightFile.open(tmp_path)


@pytest.mark.parametrize(
    "key", ["input_blocks.0.0.weight", "out.2.weight", "input_blocks.1.1.proj_in.weight", "out.2.bias"]
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_empty_weights_get_one_sentence(tmp_path: Path, key: str, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    tensors = sd1() | {f"{UNET_PREFIX}{key}": torch.ones(0, 4, 3, 3)}
    if suffix == ".ckpt":
        torch.save(tensors, path)
    else:
        save(path, tensors)
    with pytest.raises(CheckpointError, match=f"weight {key} is empty"):
        load(path)


@pytest.mark.parametrize("value", ["0", "-64", "wide", "", "1e3", "48", "²"])
def test_impossible_head_widths_are_refused(tmp_path: Path, value: str) -> None:
    path = save(tmp_path / "a.safetensors", sd2(), {"delta.head_width": value})
    with pytest.raises(CheckpointError) as raised:
        load(path)
    assert_one_sentence(raised.value, "a.safetensors")


def test_the_head_width_in_the_header_counts(tmp_path: Path) -> None:
    unet, _ = load(save(tmp_path / "a.safetensors", sd2(), {"delta.head_width": "16"}))
    assert unet.config.head_width == 16
