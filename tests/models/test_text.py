"""The text encoders compute what transformers', diffusers' and open_clip's do on the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lib_delta.diffusion.families import Family
from lib_delta.errors import CheckpointError, DeltaError, SettingError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.text import Conditioner, TextEncoder, load_tokenizer, load_towers, sdxl_label

WORDS = ["cat", "dog", "red", "hat"]
SD1_PREFIX = "cond_stage_model.transformer.text_model."


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 16 entries: the letters of four words, the words, the two marks."""
    folder = tmp_path_factory.mktemp("tokenizer")
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "h a", "ha t</w>"]
    entries = ["!", *sorted(set("catdogredh")), "t</w>", "g</w>", "d</w>", *(m.replace(" ", "") for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.normal_(generator=generator)
        parameter.mul_(parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)


def clip_model(vocabulary: int, width: int = 96, heads: int = 4, positions: int = 12) -> CLIPTextModel:
    """Return a narrow CLIP-L of transformers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        hidden_act="quick_gelu",
    )
    model = CLIPTextModel(config).eval()
    randomize(model, 0)
    return model


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenClip(nn.Module):
    """The text half of open_clip's CLIP, in its key names."""

    def __init__(self, vocabulary: int, width: int = 128, heads: int = 2, positions: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))}
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, width))
        randomize(self, 1)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return every layer's output and the pooled text."""
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        states = [self.token_embedding(tokens) + self.positional_embedding]
        for block in self.transformer["resblocks"]:
            states.append(block(states[-1], mask))
        last = self.ln_final(states[-1])
        return states, last[torch.arange(len(tokens)), tokens.argmax(-1)] @ self.text_projection


def prefixed(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v.detach().clone() for k, v in module.state_dict().items()}


def save(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> WeightFile:
    save_file(dict(tensors), str(path), {k.replace("__", "."): v for k, v in metadata.items()})
    return WeightFile.open(path)


def tokens_like(vocabulary: int, length: int = 12, pad: int | None = None) -> Tensor:
    """Draw two token rows that end before the last position."""
    end = vocabulary - 1
    drawn = torch.randint(1, vocabulary - 2, (2, length), generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = vocabulary - 2
    drawn[0, 5:], drawn[1, 8:] = (end if pad is None else pad), (end if pad is None else pad)
    drawn[0, 5] = drawn[1, 8] = end
    return drawn


def sd1_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    """CLIP-L under SD 1.x's keys, in any version of transformers."""
    return prefixed(SD1_PREFIX, getattr(model, "text_model", model))


@torch.no_grad()
@pytest.mark.parametrize("prefix", [SD1_PREFIX, "cond_stage_model.transformer."], ids=["new keys", "old keys"])
def test_clip_l_equals_transformers(tmp_path: Path, prefix: str) -> None:
    model = clip_model(30)
    tensors = {k.replace(SD1_PREFIX, prefix): v for k, v in sd1_tensors(model).items()}
    # Checkpoints of the first releases store these as floating-point numbers, some of them rounded wrongly.
    tensors[f"{prefix}embeddings.position_ids"] = torch.zeros(1, 12)
    (tower,) = load_towers(save(tmp_path / "sd1.safetensors", tensors, delta__text_heads="4"), Family.SD1)
    tokens = tokens_like(30)
    expected = model(tokens, output_hidden_states=True)
    norm = getattr(model, "text_model", model).final_layer_norm
    for clip_skip in (1, 2, 3):
        hidden, pooled = tower.encode(tokens, clip_skip)
        assert pooled is None
        assert (hidden - norm(expected.hidden_states[-clip_skip])).abs().max() < 1e-5
    assert (tower.encode(tokens)[0] - expected.last_hidden_state).abs().max() < 1e-5


@torch.no_grad()
def test_sd2_uses_the_normed_penultimate_layer_of_open_clip(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    model = OpenClip(len(tokenizer))
    file = save(tmp_path / "sd2.safetensors", prefixed("cond_stage_model.model.", model))
    conditioner = Conditioner.load(file, Family.SD2, tokenizer)
    prompts = ["cat red hat", ""]
    tokens = conditioner.chunks(prompts, conditioner.towers[0])[:, 0]
    states, _ = model(tokens)
    conditioning = conditioner(prompts)
    assert (conditioning.context - model.ln_final(states[-2])).abs().max() < 1e-5
    assert conditioning.pooled is None


@torch.no_grad()
def test_sdxl_joins_the_unnormed_penultimate_layers(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    clip, open_clip = clip_model(len(tokenizer), width=128, heads=2), OpenClip(len(tokenizer))
    clip_keys = {k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in sd1_tensors(clip).items()}
    tensors = clip_keys | prefixed("conditioner.embedders.1.model.", open_clip)
    conditioner = Conditioner.load(save(tmp_path / "xl.safetensors", tensors), Family.SDXL, tokenizer)
    prompts = ["cat red hat", "dog"]
    clip_tokens, open_clip_tokens = (conditioner.chunks(prompts, tower)[:, 0] for tower in conditioner.towers)
    states, pooled = open_clip(open_clip_tokens)
    clip_states = clip(clip_tokens, output_hidden_states=True).hidden_states
    conditioning = conditioner(prompts)
    assert conditioning.context.shape == (2, 12, 256)
    assert (conditioning.context - torch.cat((clip_states[-2], states[-2]), -1)).abs().max() < 1e-5
    assert conditioning.pooled is not None
    assert (conditioning.pooled - pooled).abs().max() < 1e-5


@torch.no_grad()
def test_open_clip_equals_diffusers_conversion(tmp_path: Path) -> None:
    convert_from_ckpt = pytest.importorskip("diffusers.pipelines.stable_diffusion.convert_from_ckpt")
    model = OpenClip(30)
    CLIPTextConfig(
        vocab_size=30, hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=12, hidden_act="gelu", eos_token_id=29,
    ).save_pretrained(tmp_path / "config")  # fmt: skip
    clip = {
        k.replace("cond_stage_model.", "conditioner.embedders.0."): v for k, v in sd1_tensors(clip_model(30)).items()
    }
    tensors = prefixed("conditioner.embedders.1.model.", model)
    reference = convert_from_ckpt.convert_open_clip_checkpoint(
        dict(tensors),
        str(tmp_path / "config"),
        "conditioner.embedders.1.model.",
        has_projection=True,
        local_files_only=True,
    ).eval()
    file = save(tmp_path / "xl.safetensors", clip | tensors, delta__text_heads="2")
    tower = load_towers(file, Family.SDXL)[1]
    tokens = tokens_like(30, pad=0)
    expected = reference(tokens, output_hidden_states=True)
    hidden, pooled = tower.encode(tokens, 2)
    assert (hidden - expected.hidden_states[-2]).abs().max() < 1e-5
    assert pooled is not None
    assert (pooled - expected.text_embeds).abs().max() < 1e-5


def test_heads_are_64_wide_unless_the_header_says_otherwise(tmp_path: Path) -> None:
    tensors = sd1_tensors(clip_model(30, width=128))
    assert tower_of(save(tmp_path / "a.safetensors", tensors)).config.heads == 2
    assert tower_of(save(tmp_path / "b.safetensors", tensors, delta__text_heads="8")).config.heads == 8


def tower_of(file: WeightFile) -> TextEncoder:
    return load_towers(file, Family.SD1)[0]


@pytest.mark.parametrize("heads", ["5", "0", "-1", "many"])
def test_impossible_heads_are_refused(tmp_path: Path, heads: str) -> None:
    file = save(tmp_path / "a.safetensors", sd1_tensors(clip_model(30)), delta__text_heads=heads)
    with pytest.raises(CheckpointError):
        load_towers(file, Family.SD1)


def test_towers_come_in_the_type_asked_for(tmp_path: Path) -> None:
    file = save(tmp_path / "a.safetensors", {k: v.half() for k, v in sd1_tensors(clip_model(30)).items()})
    tower = load_towers(file, Family.SD1, dtype=torch.float16)[0]
    assert all(p.dtype == torch.float16 and not p.requires_grad for p in tower.parameters())
    assert tower_of(file).transformer.dtype == torch.float32


@pytest.mark.parametrize("family", [Family.SD1, Family.SD2, Family.SDXL], ids=lambda f: f.label)
def test_a_file_without_text_encoder_is_refused(tmp_path: Path, family: Family) -> None:
    file = save(tmp_path / "unet-only.safetensors", {"model.diffusion_model.out.2.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"unet-only\.safetensors has no usable text encoder"):
        load_towers(file, family)


def test_a_missing_layer_weight_is_named(tmp_path: Path) -> None:
    tensors = sd1_tensors(clip_model(30))
    del tensors[f"{SD1_PREFIX}encoder.layers.1.self_attn.k_proj.bias"]
    file = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"a\.safetensors lacks 1 .*layers\.1\.self_attn\.k_proj\.bias"):
        load_towers(file, Family.SD1)


def test_padding_is_the_family_s_own(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    cat = tokenizer.convert_tokens_to_ids("cat</w>")
    clip, open_clip = (
        save(tmp_path / "1.safetensors", sd1_tensors(clip_model(len(tokenizer)))),
        save(tmp_path / "2.safetensors", prefixed("cond_stage_model.model.", OpenClip(len(tokenizer)))),
    )
    for file, family, padding in ((clip, Family.SD1, end), (open_clip, Family.SD2, 0)):
        conditioner = Conditioner.load(file, family, tokenizer)
        chunks = conditioner.chunks(["cat"], conditioner.towers[0])
        assert chunks.tolist() == [[[start, cat, end] + [padding] * 9]]


@torch.no_grad()
def test_long_prompts_take_several_chunks_and_short_ones_as_many(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    file = save(tmp_path / "a.safetensors", sd1_tensors(clip_model(len(tokenizer))))
    conditioner = Conditioner.load(file, Family.SD1, tokenizer)
    long = conditioner(["cat " * 10 + "dog", "red"])
    assert long.context.shape == (2, 24, 96)
    assert torch.allclose(
        long.context[0], torch.cat((conditioner(["cat " * 10]).context, conditioner(["dog"]).context), 1)[0], atol=1e-6
    )
    assert torch.allclose(long.context[1, 12:], conditioner([""]).context[0], atol=1e-6)


def test_clip_skip_beyond_the_layers_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    file = save(tmp_path / "a.safetensors", sd1_tensors(clip_model(len(tokenizer))))
    conditioner = Conditioner.load(file, Family.SD1, tokenizer)
    for clip_skip in (0, 4):
        with pytest.raises(SettingError, match="clip skip"):
            conditioner(["cat"], clip_skip)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    file = save(tmp_path / "a.safetensors", sd1_tensors(clip_model(500)))
    with pytest.raises(CheckpointError, match="500"):
        Conditioner.load(file, Family.SD1, load_tokenizer(tokenizer_folder))


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeltaError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DeltaError, match="damaged"):
        load_tokenizer(tmp_path)


def test_the_released_tokenizer_equals_the_original_code() -> None:
    simple_tokenizer = pytest.importorskip("clip.simple_tokenizer")
    original, ours = simple_tokenizer.SimpleTokenizer(), load_tokenizer()
    prompts = ["a photo of a cat", "Line art, ((masterpiece)): 1girl's café 42%", "", "日本 — naïve 🙂"]
    assert [ours(p, add_special_tokens=False)["input_ids"] for p in prompts] == [original.encode(p) for p in prompts]
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (49406, 49407, 49408)


def test_sdxl_label_joins_pooled_text_and_six_sizes() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    pooled = torch.randn(2, 40)
    label = sdxl_label(pooled, 512, 768, top=8, left=16, target_height=1024, target_width=640)
    sizes = torch.tensor([512.0, 768.0, 8.0, 16.0, 1024.0, 640.0])
    expected = embeddings.get_timestep_embedding(sizes, 256, flip_sin_to_cos=True, downscale_freq_shift=0).flatten()
    assert label.shape == (2, 40 + 6 * 256)
    assert torch.equal(label[:, :40], pooled)
    assert torch.allclose(label[:, 40:], expected.expand(2, -1), atol=1e-4)
