"""Side models of SD 2.x and SDXL: text encoders, predictions, LoRAs of each part, and refused files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder a base needs")

from lib_delta.adapters.attach import AdapterForm
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.families import Family
from lib_delta.errors import AdapterError, CheckpointError
from lib_delta.files.checkpoint import describe, why_not_base
from lib_delta.models.text import TextConfig, TextEncoder, sdxl_label
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.runtime.side_model import AdapterPick, SideModel

FP32 = torch.float32
UNET_PREFIX = "model.diffusion_model."
CLIP_PREFIX, OPEN_CLIP_PREFIX = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
POOLED = 40
XL = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    levels=(32, 64),
    res_blocks=(1, 1),
    depth_in=(0, 2),
    depth_middle=1,
    depth_out=(2, 2, 0, 0),
    context_width=128,
    linear_projection=True,
    label_width=POOLED + 6 * 256,
    head_width=64,
)
CLIP = TextConfig(width=64, inner_width=96, layers=2, positions=77, vocabulary=100, heads=1, activation="quick_gelu")
OPEN_CLIP = TextConfig(
    width=64, inner_width=96, layers=3, positions=77, vocabulary=100, heads=1, activation="gelu", projection=POOLED
)
TOKENS = torch.cat((torch.tensor([98]), torch.arange(1, 40), torch.tensor([99] * 37)))[None]


def draw(state: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights of a scale at which every layer matters."""

    def one(name: str, like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator)
        if like.ndim == 1:
            return 0.1 * noise + (1 if "norm" in name and name.endswith(".weight") else 0)
        return noise if "embedding" in name else noise / math.sqrt(like[0].numel())

    return {name: one(name, like) for name, like in state.items() if not name.endswith("position_ids")}


def open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in transformers' names by those of open_clip."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    found = {new: state[old] for old, new in names.items()} | {"text_projection": state["text_projection.weight"].t()}
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for i in range(OPEN_CLIP.layers):
        old, new = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for part in ("weight", "bias"):
            three = [state[f"{old}self_attn.{p}_proj.{part}"] for p in "qkv"]
            found |= {f"{new}attn.in_proj_{part}": torch.cat(three)}
            found |= {f"{new}attn.out_proj.{part}": state[f"{old}self_attn.out_proj.{part}"]}
            found |= {f"{new}{b}.{part}": state[f"{old}{a}.{part}"] for a, b in inside.items()}
    return found


Parts = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def parts() -> Parts:
    """Return the weights of UNet, CLIP-L and OpenCLIP-G, the encoders' in transformers' names."""
    generator = torch.Generator().manual_seed(0)
    modules = UNet(XL), TextEncoder(CLIP, False).transformer, TextEncoder(OPEN_CLIP, False).transformer
    unet, clip, other = (draw(module.state_dict(), generator) for module in modules)
    return unet, clip, other


def write(parts: Parts, path: Path, **extra: Tensor) -> Path:
    unet, clip, other = parts
    tensors = {UNET_PREFIX + k: v for k, v in unet.items()}
    tensors |= {CLIP_PREFIX + k.removeprefix("text_model."): v for k, v in clip.items()}
    tensors |= {OPEN_CLIP_PREFIX + k: v for k, v in open_clip(other).items()}
    save_file({k: v.contiguous() for k, v in (tensors | extra).items()}, path)
    return path


def factors(parts: Parts) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """Return ``(up, down)`` of rank 2 for some layers of each part."""
    generator = torch.Generator().manual_seed(1)
    chosen = ("attn2.to_k.", "attn1.to_out.0.", "proj_in.", "emb_layers.1."), ("q_proj", "fc1"), ("out_proj", "fc2")
    return [
        {
            name: (torch.randn(len(w), 2, generator=generator), 0.1 * torch.randn(2, w.shape[1], generator=generator))
            for name, w in part.items()
            if name.endswith("weight") and any(word in name for word in words)
        }
        for part, words in zip(parts, chosen)
    ]


def merged(parts: Parts, low_rank: list[dict[str, tuple[Tensor, Tensor]]]) -> Parts:
    unet, clip, other = (
        {name: w + low[name][0] @ low[name][1] if name in low else w for name, w in part.items()}
        for part, low in zip(parts, low_rank)
    )
    return unet, clip, other


def dialect(name: str, low_rank: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """Return the factors by kohya's or peft's names, with the original names of the UNet's blocks."""
    prefixes = {
        "kohya": ("lora_unet_", "lora_te1_", "lora_te2_"),
        "peft": ("unet.", "text_encoder.", "text_encoder_2."),
        "comfy": ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    }[name]
    down, up = ("lora_down", "lora_up") if name == "kohya" else ("lora_A", "lora_B")
    tensors = {}
    for prefix, low in zip(prefixes, low_rank):
        for layer, (a, b) in low.items():
            path = layer.removesuffix(".weight")
            path = prefix + (path.replace(".", "_") if name == "kohya" else path)
            tensors |= {f"{path}.{up}.weight": a, f"{path}.{down}.weight": b}
    return tensors


@torch.no_grad()
def outputs(model: SideModel, *, adapted: bool = False) -> tuple[Tensor, Tensor]:
    """Return the joined text and the UNet's output for it, with pooled text and sizes."""
    towers = model.adapted_towers() if adapted else model.towers
    encoded = [tower.encode(TOKENS, 2) for tower in towers]
    context = torch.cat([hidden for hidden, _ in encoded], -1)
    assert encoded[0][1] is None and encoded[1][1] is not None
    label = sdxl_label(encoded[1][1], 1024, 1024)
    x = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return context, model.unet(x, torch.tensor([400.0]), context[None], label[None])


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize("name", ["kohya", "peft", "comfy"])
def test_an_sdxl_lora_adapts_the_unet_and_both_text_encoders(
    parts: Parts, name: str, form: AdapterForm, tmp_path: Path
) -> None:
    low_rank = factors(parts)
    model = SideModel(write(parts, tmp_path / "xl.safetensors"), FP32)
    tuned = SideModel(write(merged(parts, low_rank), tmp_path / "tuned.safetensors"), FP32)
    before = outputs(model)
    save_file(dialect(name, low_rank), tmp_path / "moxin.safetensors")
    model.adapt([AdapterPick(tmp_path / "moxin.safetensors")], form)
    (file,) = model.adapters
    assert not file.unmatched and [len(layers) for layers in (file.unet, *file.text)] == list(map(len, low_rank))
    context, output = outputs(model, adapted=True)
    expected_context, expected = outputs(tuned)
    torch.testing.assert_close(context, expected_context, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output[1], expected[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(output[1], before[1][0], atol=1e-2)
    torch.testing.assert_close(outputs(model)[1][0], before[1][0])
    model.adapt([], form)
    assert all(map(torch.equal, outputs(model), before)), "the base must be as before, bit for bit"


def test_a_fine_tuned_sdxl_checkpoint_is_the_adapted_model(parts: Parts, tmp_path: Path) -> None:
    model = SideModel(write(parts, tmp_path / "xl.safetensors"), FP32)
    path = write(merged(parts, factors(parts)), tmp_path / "tuned.safetensors")
    model.adapt([AdapterPick(path)], "merged")
    for found, expected in zip(outputs(model, adapted=True), outputs(SideModel(path, FP32))):
        torch.testing.assert_close(found[-1], expected[0], rtol=1e-4, atol=1e-4)


def test_an_unadapted_sdxl_base_stays_one_branch(parts: Parts, tmp_path: Path) -> None:
    model = SideModel(write(parts, tmp_path / "xl.safetensors"), FP32)
    assert model.family is Family.SDXL and len(model.towers) == 2 and model.adapted_towers() == model.towers
    assert outputs(model)[1].shape == (1, 1, 4, 8, 8)
    parameters = {p for module in (model.unet, *model.towers) for p in module.parameters()}
    buffers = {b for module in (model.unet, *model.towers) for b in module.buffers()}
    assert model.memory == sum(t.nbytes for t in parameters | buffers)


@pytest.mark.parametrize(("flags", "prediction", "zero"), [((), "eps", False), (("v_pred", "ztsnr"), "v", True)])
def test_noobai_v_s_flags_are_read(
    parts: Parts, flags: tuple[str, ...], prediction: str, zero: bool, tmp_path: Path
) -> None:
    path = write(parts, tmp_path / "xl.safetensors", **{flag: torch.tensor([]) for flag in flags})
    parameterization = SideModel(path, FP32).parameterization
    assert parameterization.prediction == describe(path).prediction == prediction
    assert (parameterization.schedule.sigma_max > 4000) == zero


def test_embeddings_have_vectors_for_both_encoders(parts: Parts, tmp_path: Path) -> None:
    model = SideModel(write(parts, tmp_path / "xl.safetensors"), FP32)
    bundled = {"bundle_emb.word.clip_g": torch.ones(2, 64), "bundle_emb.word.clip_l": torch.zeros(2, 64)}
    save_file(dialect("kohya", factors(parts)) | bundled, tmp_path / "a.safetensors")
    model.adapt([AdapterPick(tmp_path / "a.safetensors")], "merged")
    clip_l, clip_g = model.embeddings["word"]
    assert torch.equal(clip_l, torch.zeros(2, 64)) and torch.equal(clip_g, torch.ones(2, 64))
    del bundled["bundle_emb.word.clip_g"]
    save_file(dialect("kohya", factors(parts)) | bundled, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="text encoders \\(2\\) are needed"):
        model.adapt([AdapterPick(tmp_path / "b.safetensors")], "merged")


def test_files_that_cannot_be_a_base_are_refused_by_their_header(parts: Parts, tmp_path: Path) -> None:
    first = f"{UNET_PREFIX}input_blocks.0.0.weight"
    nf4 = f"{UNET_PREFIX}out.2.weight.quant_state.bitsandbytes__nf4"
    one_encoder = open_clip(parts[2])
    refiner = {UNET_PREFIX + k: v for k, v in parts[0].items()}
    refiner |= {f"conditioner.embedders.0.model.{k}": v.contiguous() for k, v in one_encoder.items()}
    save_file(refiner, tmp_path / "refiner.safetensors")
    second_missing = {UNET_PREFIX + k: v for k, v in parts[0].items()}
    second_missing |= {CLIP_PREFIX + k.removeprefix("text_model."): v for k, v in parts[1].items()}
    save_file(second_missing, tmp_path / "half.safetensors")
    write(parts, tmp_path / "inpaint.safetensors", **{first: torch.zeros(32, 9, 3, 3)})
    write(parts, tmp_path / "nf4.safetensors", **{nf4: torch.zeros(1)})
    write(parts, tmp_path / "edm.safetensors", edm_mean=torch.zeros(4))
    (tmp_path / "q8.gguf").write_bytes(b"GGUF" + bytes(100))
    for name, sentence in {
        "refiner.safetensors": "is a model of SDXL refiner, and a base has to be a checkpoint of SD 1.x, SD 2.x, SDXL",
        "half.safetensors": "has no second text encoder: a whole SDXL checkpoint is needed",
        "inpaint.safetensors": "is an inpainting model: an ordinary SDXL checkpoint is needed",
        "nf4.safetensors": "is quantised",
        "edm.safetensors": "EDM's noise levels",
        "q8.gguf": "is a quantised GGUF file",
    }.items():
        assert sentence in why_not_base(tmp_path / name), name
        with pytest.raises(CheckpointError):
            SideModel(tmp_path / name, FP32)


def test_a_lora_of_sdxl_names_the_base_that_it_needs(tmp_path: Path) -> None:
    from tests.support.small_files import make_files

    files = make_files(tmp_path)
    key = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"
    tensors = {f"{key}.lora_up.weight": torch.zeros(640, 4), f"{key}.lora_down.weight": torch.zeros(4, 2048)}
    save_file(tensors, tmp_path / "moxin.safetensors")
    with pytest.raises(AdapterError, match="moxin.safetensors is made for SDXL.*choose an SDXL base"):
        SideModel(files.checkpoint(files.base), FP32).adapt([AdapterPick(tmp_path / "moxin.safetensors")], "merged")


def conditioning(towers: tuple[TextEncoder, ...]) -> Conditioning:
    with torch.no_grad():
        encoded = [tower.encode(TOKENS.expand(2, -1), 2) for tower in towers]
    pooled = encoded[1][1]
    assert pooled is not None
    label = sdxl_label(pooled, 512, 512)
    context = torch.cat([hidden for hidden, _ in encoded], -1)
    return Conditioning(context[:1], 0.5 * context[1:], label[:1], 0.5 * label[1:])


def test_one_forked_pass_of_an_sdxl_source_is_the_difference_of_two_models(parts: Parts, tmp_path: Path) -> None:
    low_rank = factors(parts)
    model = SideModel(write(parts, tmp_path / "xl.safetensors"), FP32)
    tuned = SideModel(write(merged(parts, low_rank), tmp_path / "tuned.safetensors"), FP32)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    step = SourceStep(3 * x, torch.tensor([3.0]), 5.0)
    alone = [Source(m.unet, m.parameterization, conditioning(m.towers)).denoised(step) for m in (model, tuned)]
    assert [len(estimate) for estimate in alone] == [1, 1]
    save_file(dialect("kohya", low_rank), tmp_path / "a.safetensors")
    model.adapt([AdapterPick(tmp_path / "a.safetensors")], "merged")
    adapted = conditioning(model.adapted_towers())
    source = Source(model.unet, model.parameterization, conditioning(model.towers), adapted)
    torch.testing.assert_close(source.delta(step), (alone[1] - alone[0])[0], rtol=1e-3, atol=1e-3)
    assert source.evaluations == 1
