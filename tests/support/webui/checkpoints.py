"""Checkpoints, LoRAs and a textual inversion of random numbers, for a WebUI that the tests talk to.

Tiny models suffice for AUTOMATIC1111, which reads their architecture from a ``.yaml`` beside them
(:data:`TINY`); Forge knows models by the shapes of the released ones (:data:`FULL`).  The numbers are
drawn such that activations stay near 1 through every layer and a sampler's run stays bounded: the
noisy latent is led past the UNet's blocks to its output, as a trained noise prediction follows it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_delta.adapters.key_names import diffusers_paths
from lib_delta.diffusion.families import Family
from lib_delta.files.checkpoint import UNET_PREFIX
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.text import load_tokenizer
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.models.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from tests.support.webui.files import Files

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
VOCABULARY, POSITIONS = 49408, 77
CLIP_WIDTH, CLIP_HEADS = 768, 12
RANK = 4
HINT_WIDTHS = (3, 16, 16, 32, 32, 96, 96, 256)  # of the released ControlNets, before the UNet's own
LORA_STRENGTH = 0.7  # of the norm of the weights that it changes: far more than a trained one


@dataclass(frozen=True)
class OpenClip:
    """A text model of open_clip, by the name of its configuration there; ``width`` is that of its output too."""

    name: str
    width: int
    layers: int


@dataclass(frozen=True)
class Size:
    """How large the models are.  ``own_clip`` tells that CLIP-L differs from the released one."""

    unets: Mapping[Family, UNetConfig]
    vae: VAEConfig
    clip_layers: int
    clip_inner: int
    open_clip: Mapping[Family, OpenClip]
    own_clip: bool


def _unet(
    channels: int,
    factors: tuple[int, ...],
    depths: tuple[int, ...],
    middle: int,
    context: int,
    head_width: int | None = None,
    label: int = 0,
) -> UNetConfig:
    """Describe a UNet by the width and the transformer depth of each level, two blocks a level."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=channels,
        levels=tuple(channels * f for f in factors),
        res_blocks=(2,) * len(factors),
        depth_in=tuple(d for d in depths for _ in range(2)),
        depth_middle=middle,
        depth_out=tuple(d for d in reversed(depths) for _ in range(3)),
        context_width=context,
        linear_projection=head_width is not None,
        label_width=label,
        head_width=head_width,
    )


# A small text model whose configuration comes with open_clip.  Its width, joined with CLIP-L's, must not make
# that of an SDXL refiner (1280) or of an unCLIP model (1024), which are told by it.
_SMALL = OpenClip("ViT-M-32-alt", 384, 12)
TINY = Size(
    unets={
        Family.SD1: _unet(32, (1, 2, 2, 2), (1, 1, 1, 0), 1, 768),
        Family.SD2: _unet(64, (1, 1, 2, 2), (1, 1, 1, 0), 1, _SMALL.width, 64),
        Family.SDXL: _unet(64, (1, 2, 2), (0, 1, 2), 2, 768 + _SMALL.width, 64, _SMALL.width + 1536),
    },
    vae=VAEConfig(levels=(32,) * 4, res_blocks=1),
    clip_layers=3,
    clip_inner=1024,
    open_clip={Family.SD2: _SMALL, Family.SDXL: _SMALL},
    own_clip=True,
)
FULL = Size(
    unets={
        Family.SD1: _unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768),
        Family.SD2: _unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 1024, 64),
        Family.SDXL: _unet(320, (1, 2, 4), (0, 2, 10), 10, 2048, 64, 2816),
    },
    vae=VAEConfig(levels=(128, 256, 512, 512), res_blocks=2),
    clip_layers=12,
    clip_inner=3072,
    open_clip={Family.SD2: OpenClip("ViT-H-14", 1024, 24), Family.SDXL: OpenClip("ViT-bigG-14", 1280, 32)},
    own_clip=False,
)


def make_all(folder: Path, names: Files, size: Size) -> None:
    """Put what is not there yet into a WebUI's folders below ``models``, and its ``embeddings``."""
    models, loras, embeddings = folder / "models/Stable-diffusion", folder / "models/Lora", folder / "embeddings"
    controls = folder / "models/ControlNet"
    if (folder / "models/embeddings").is_dir():  # Forge Neo
        embeddings = folder / "models/embeddings"
    for place in (models, loras, embeddings, controls):
        place.mkdir(parents=True, exist_ok=True)
    clip = folder / "delta-test-clip"
    if size.own_clip:
        _write_clip_folder(clip, size)
    for name, checkpoint in _checkpoints(names, size).items():
        _once(models / f"{name}.safetensors", checkpoint.write)
        config = checkpoint.config(clip)
        if config:
            # JSON is YAML as well.
            (models / f"{name}.yaml").write_text(json.dumps(config, indent=1))
    _once(models / f"{names.copy}.safetensors", lambda path: shutil.copyfile(models / f"{names.sd1}.safetensors", path))
    if size.own_clip:
        shutil.copyfile(models / f"{names.sd1}.yaml", models / f"{names.copy}.yaml")
    _make_loras(loras, names, size)
    _once(controls / f"{names.control}.safetensors", lambda path: write_tensors(path, control_tensors(size)))
    vectors = 0.8 * draw("embedding", (3, CLIP_WIDTH))
    _once(embeddings / f"{names.embedding}.safetensors", lambda path: write_tensors(path, {"emb_params": vectors}))


def _checkpoints(names: Files, size: Size) -> dict[str, Checkpoint]:
    return {
        names.sd1: Checkpoint(Family.SD1, size),
        names.tuned: Checkpoint(Family.SD1, size, tuned=True),
        names.sd2: Checkpoint(Family.SD2, size),
        names.sdxl: Checkpoint(Family.SDXL, size),
    }


def _once(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is not there, under another name until it is whole."""
    if not path.exists():
        part = path.with_suffix(".part")
        write(part)
        part.replace(path)


# Random numbers.


def draw(key: str, shape: Shape, seed: int = 0) -> Tensor:
    """Return normal numbers, the same in every run."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {key}".encode()))
    return torch.randn(shape, generator=generator)


def spread(key: str, shape: Shape) -> float:
    """Return the standard deviation that a matrix or kernel is drawn with."""
    if "token_embedding" in key:
        return 1.0
    if "position" in key:
        return 0.3
    inputs = shape[0] if key.endswith("text_projection") else prod(shape[1:])
    gain = 1.0
    if re.search(r"attn2\.to_[qk]\.weight$", key):
        gain = 2.0  # words differ in how much they are attended to
    elif re.search(r"(\.proj_out|\.out_layers\.3|\.to_out\.0|\.net\.2)\.weight$", key):
        gain = 0.7  # what a branch adds counts less than what it is added to
    return gain * inputs**-0.5


def random_weight(key: str, shape: Shape) -> Tensor:
    """Return a weight of a layer that nothing special is asked of."""
    if not shape:
        return torch.tensor(1.0)
    noise = draw(key, shape)
    if len(shape) > 1:
        return noise * spread(key, shape)
    if key.endswith(".weight"):
        return 1 + 0.1 * noise
    # Emphasis restores the mean of the encoded prompt, so that must not be zero.
    return 0.1 * noise + (0.3 if re.search(r"(final_layer_norm|ln_final)\.bias$", key) else 0.0)


# Shapes.


def text_shapes(width: int, layers: int, inner: int) -> Shapes:
    """Return the shapes of a CLIP text model in transformers' names, below ``text_model.``."""
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (VOCABULARY, width),
        "embeddings.position_embedding.weight": (POSITIONS, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        linear = {f"self_attn.{p}": (width, width) for p in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        for name, shape in linear.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    return shapes


def open_clip_shapes(model: OpenClip) -> Shapes:
    """Return the shapes of an open_clip text model in its own names."""
    width = model.width
    shapes: Shapes = {
        "token_embedding.weight": (VOCABULARY, width),
        "positional_embedding": (POSITIONS, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for i in range(model.layers):
        layer = f"transformer.resblocks.{i}."
        shapes |= {f"{layer}attn.in_proj_weight": (3 * width, width), f"{layer}attn.in_proj_bias": (3 * width,)}
        for name, out, inputs in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{layer}{name}.weight": (out, inputs), f"{layer}{name}.bias": (out,)}
        shapes |= {f"{layer}{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return shapes


def below(prefix: str, shapes: Mapping[str, Shape]) -> Shapes:
    """Put a prefix before every key."""
    return {prefix + key: shape for key, shape in shapes.items()}


def _module_shapes(make: Callable[[], torch.nn.Module]) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(weight.shape) for key, weight in make().state_dict().items()}


# Checkpoints.


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in LDM layout; ``tuned`` has other attention and text-encoder weights."""

    family: Family
    size: Size
    tuned: bool = False

    @property
    def unet(self) -> UNetConfig:
        """The UNet's configuration."""
        return self.size.unets[self.family]

    def shapes(self) -> Shapes:
        """Return the shapes of all its weights."""
        parts = below(UNET_PREFIX, _module_shapes(lambda: UNet(self.unet)))
        parts |= below("first_stage_model.", _module_shapes(lambda: VAE(self.size.vae)))
        clip = text_shapes(CLIP_WIDTH, self.size.clip_layers, self.size.clip_inner)
        if self.family is Family.SD1:
            return parts | below("cond_stage_model.transformer.text_model.", clip)
        other = open_clip_shapes(self.size.open_clip[self.family])
        if self.family is Family.SD2:
            return parts | below("cond_stage_model.model.", other)
        parts |= below("conditioner.embedders.0.transformer.text_model.", clip)
        return parts | below("conditioner.embedders.1.model.", other)

    def weight(self, key: str, shape: Shape) -> Tensor:
        """Return one weight."""
        name = key.partition(".")[2]
        if key.startswith("first_stage_model."):
            return self._vae_weight(name, shape)
        weight = random_weight(f"{self.family.name} {key}", shape)
        # A prediction of velocity need not follow the latent.
        if key.startswith(UNET_PREFIX) and self.family is not Family.SD2:
            weight = self._led_past(key.removeprefix(UNET_PREFIX), weight)
        part = self._tuned_part(key, shape)
        return weight + part * spread(key, shape) * draw(key, shape, seed=1) if part else weight

    def _tuned_part(self, key: str, shape: Shape) -> float:
        if not self.tuned or len(shape) < 2:
            return 0.0
        return 0.5 if ".transformer_blocks." in key else 0.15 if ".encoder.layers." in key else 0.0

    def _led_past(self, name: str, weight: Tensor) -> Tensor:
        """Let channels 2c and 2c + 1 carry latent channel c and its negative from the UNet's input to its output."""
        last = f"output_blocks.{len(self.unet.depth_out) - 1}."
        if name == "input_blocks.0.0.weight":
            weight[:8] = 0
            for i in range(8):
                weight[i, i // 2, 1, 1] = 1 - 2 * (i % 2)
        elif name == f"{last}0.skip_connection.weight":
            skipped = weight.shape[1] - self.unet.model_channels
            weight[:8] = 0
            for i in range(8):
                weight[i, skipped + i] = 1
        elif name in ("input_blocks.0.0.bias", f"{last}0.skip_connection.bias", "out.0.bias"):
            weight[:8] = 0
        elif name.startswith((f"{last}0.out_layers.3.", f"{last}1.proj_out.")):
            weight[:8] *= 0.1
        elif name == "out.0.weight":
            weight[:8] = 1
        elif name == "out.2.weight":
            weight *= 0.8
            weight[:, :8] = 0
            for c in range(4):
                weight[c, 2 * c, 1, 1], weight[c, 2 * c + 1, 1, 1] = 1, -1
        return weight

    def _vae_weight(self, name: str, shape: Shape) -> Tensor:
        """Pictures have contrast, latents the size that the family expects, and their variance is next to nothing."""
        scale = self.family.scale_factor
        weight = random_weight(name, shape)
        if name in ("quant_conv.weight", "post_quant_conv.weight"):
            return torch.eye(shape[0]).reshape(shape)
        if name in ("quant_conv.bias", "post_quant_conv.bias", "decoder.conv_out.bias"):
            return torch.zeros(shape)
        if name == "decoder.conv_in.weight":
            return weight * scale
        if name == "decoder.conv_out.weight":
            return weight * 0.75
        if name == "encoder.conv_out.weight":
            return torch.cat((weight[:4] * 1.3 / scale, weight[4:] * 0.05))
        if name == "encoder.conv_out.bias":
            return torch.tensor([0.0] * 4 + [-12.0] * 4)
        return weight

    def write(self, path: Path) -> None:
        """Write the checkpoint, weight by weight: full-size ones are larger than many a memory."""
        shapes = self.shapes()
        write_stream(path, shapes, (self.weight(key, shape) for key, shape in shapes.items()))

    def config(self, clip: Path) -> dict[str, Any] | None:
        """Return what has to be in the ``.yaml`` beside it; None where the WebUIs know without."""
        if not self.size.own_clip and self.family is not Family.SD2:
            return None
        return sdxl_config(self, clip) if self.family is Family.SDXL else ldm_config(self, clip)


def ldm_config(checkpoint: Checkpoint, clip: Path) -> dict[str, Any]:
    """Return AUTOMATIC1111's configuration of an SD 1.x or 2.x model, 2.x with v-prediction."""
    encoders = "ldm.modules.encoders.modules."
    if checkpoint.family is Family.SD2:
        model = checkpoint.size.open_clip[Family.SD2].name
        text = _part(f"{encoders}FrozenOpenCLIPEmbedder", arch=model, version="none", freeze=True, layer="penultimate")
    else:
        text = _part(f"{encoders}FrozenCLIPEmbedder", version=str(clip))
    parameters = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "timesteps": 1000,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": 64,
        "channels": 4,
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "scale_factor": checkpoint.family.scale_factor,
        "use_ema": False,
        "unet_config": _part(
            "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            **_unet_parameters(checkpoint.unet),
            image_size=32,
            legacy=False,
            transformer_depth=1,
        ),
        "first_stage_config": _vae_part("ldm.models.autoencoder.AutoencoderKL", checkpoint.size.vae),
        "cond_stage_config": text,
    }
    if checkpoint.family is Family.SD2:
        parameters["parameterization"] = "v"
    return {"model": _part("ldm.models.diffusion.ddpm.LatentDiffusion", **parameters)}


def sdxl_config(checkpoint: Checkpoint, clip: Path) -> dict[str, Any]:
    """Return AUTOMATIC1111's configuration of an SDXL model."""
    diffusion, encoders = "sgm.modules.diffusionmodules.", "sgm.modules.encoders.modules."
    unet = checkpoint.unet
    depths = unet.depth_in[::2]
    denoiser = _part(
        f"{diffusion}denoiser.DiscreteDenoiser",
        num_idx=1000,
        weighting_config=_part(f"{diffusion}denoiser_weighting.EpsWeighting"),
        scaling_config=_part(f"{diffusion}denoiser_scaling.EpsScaling"),
        discretization_config=_part(f"{diffusion}discretizer.LegacyDDPMDiscretization"),
    )
    embedders = [
        _part(
            f"{encoders}FrozenCLIPEmbedder",
            version=str(clip),
            layer="hidden",
            layer_idx=checkpoint.size.clip_layers - 1,
        ),
        _part(
            f"{encoders}FrozenOpenCLIPEmbedder2",
            arch=checkpoint.size.open_clip[Family.SDXL].name,
            version="none",
            freeze=True,
            layer="penultimate",
            always_return_pooled=True,
            legacy=False,
        ),
        *[_part(f"{encoders}ConcatTimestepEmbedderND", outdim=256) for _ in range(3)],
    ]
    inputs = ("txt", "txt", "original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    told = [{"is_trainable": False, "input_key": key, **embedder} for key, embedder in zip(inputs, embedders)]
    network = _part(
        f"{diffusion}openaimodel.UNetModel",
        **_unet_parameters(unet),
        transformer_depth=list(depths),
        adm_in_channels=unet.label_width,
        num_classes="sequential",
        legacy=False,
    )
    return {
        "model": _part(
            "sgm.models.diffusion.DiffusionEngine",
            scale_factor=checkpoint.family.scale_factor,
            disable_first_stage_autocast=True,
            denoiser_config=denoiser,
            network_config=network,
            conditioner_config=_part("sgm.modules.GeneralConditioner", emb_models=told),
            first_stage_config=_vae_part("sgm.models.autoencoder.AutoencoderKLInferenceWrapper", checkpoint.size.vae),
        )
    }


def _part(target: str, **parameters: Any) -> dict[str, Any]:
    return {"target": target, **({"params": parameters} if parameters else {})}


def _unet_parameters(unet: UNetConfig) -> dict[str, Any]:
    depths = unet.depth_in[::2]
    heads = {"num_heads": unet.heads} if unet.head_width is None else {"num_head_channels": unet.head_width}
    return {
        "use_checkpoint": False,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": unet.model_channels,
        "attention_resolutions": [2**level for level, depth in enumerate(depths) if depth],
        "num_res_blocks": unet.res_blocks[0],
        "channel_mult": [width // unet.model_channels for width in unet.levels],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.linear_projection,
        "context_dim": unet.context_width,
        **heads,
    }


def _vae_part(target: str, vae: VAEConfig) -> dict[str, Any]:
    layers = {
        "attn_type": "vanilla",
        "double_z": True,
        "z_channels": vae.latent_channels,
        "resolution": 256,
        "in_channels": vae.picture_channels,
        "out_ch": vae.picture_channels,
        "ch": vae.levels[0],
        "ch_mult": [width // vae.levels[0] for width in vae.levels],
        "num_res_blocks": vae.res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return _part(target, embed_dim=4, ddconfig=layers, lossconfig=_part("torch.nn.Identity"))


def _write_clip_folder(folder: Path, size: Size) -> None:
    """Write the configuration and vocabulary that AUTOMATIC1111 makes its CLIP and tokenizer from."""
    folder.mkdir(exist_ok=True)
    if not (folder / "merges.txt").exists():
        load_tokenizer(os.environ.get("WEBUI_TOKENIZER")).save_vocabulary(str(folder))
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": VOCABULARY,
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": size.clip_inner,
        "num_hidden_layers": size.clip_layers,
        "num_attention_heads": CLIP_HEADS,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "quick_gelu",
        "projection_dim": CLIP_WIDTH,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


# LoRAs.


def _make_loras(folder: Path, names: Files, size: Size) -> None:
    """Write good ones, in the format of kohya's sd-scripts, and bad ones."""
    sd1, sdxl = lora_tensors(sd1_layers(size)), lora_tensors(sdxl_layers(size))
    marks = {"ss_network_module": "networks.lora", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK)}
    of_sd1 = {**marks, "ss_base_model_version": "sd_v1"}
    some = {key: tensor for key, tensor in sd1.items() if "attn2" in key or "lora_te" in key}
    stray = {key.replace("blocks", "bricks"): tensor for key, tensor in some.items() if "to_q" in key}
    with_nan = {key: tensor * (torch.nan if "lora_up" in key else 1) for key, tensor in some.items()}
    for name, tensors, metadata in (
        (names.lora, sd1, of_sd1),
        (names.sdxl_lora, sdxl, {**marks, "ss_base_model_version": "sdxl_base_v1-0"}),
        (names.nan_lora, with_nan, of_sd1),
        (names.unmatched_lora, {**some, **stray}, of_sd1),
    ):
        _once(folder / f"{name}.safetensors", lambda path, t=tensors, m=metadata: write_tensors(path, t, m))
    whole = (folder / f"{names.lora}.safetensors").read_bytes()
    _once(folder / f"{names.broken_lora}.safetensors", lambda path: path.write_bytes(whole[: len(whole) // 2]))


def lora_tensors(layers: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return factors whose products change each layer by a share of its own norm."""
    tensors = {}
    for name, shape in layers.items():
        inputs = prod(shape[1:])
        down = draw(f"{name}.down", (RANK, *shape[1:])) * (LORA_STRENGTH / inputs) ** 0.5
        up = draw(f"{name}.up", (shape[0], RANK, *(1 for _ in shape[2:]))) * (LORA_STRENGTH / RANK) ** 0.5
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    return tensors


def sd1_layers(size: Size) -> Shapes:
    """Return a LoRA's layers of SD 1.x: attention, feed-forward, projections, convolutions, text encoder.

    The UNet's have the names of diffusers' modules, as in most files.
    """
    with torch.device("meta"):
        unet = UNet(size.unets[Family.SD1])
    wanted = r"attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_(in|out)|resnets\.\d\.conv1|samplers\.0\.conv"
    layers = {
        f"lora_unet_{name.replace('.', '_')}": tuple(unet.get_submodule(path).weight.shape)
        for path, name in diffusers_paths(unet).items()
        if re.search(rf"({wanted})$", name)
    }
    return layers | _text_layers("lora_te", CLIP_WIDTH, size.clip_layers, size.clip_inner)


def sdxl_layers(size: Size) -> Shapes:
    """Return a LoRA's layers of SDXL: attention, and both text encoders.  The UNet's have their own names."""
    unet = _module_shapes(lambda: UNet(size.unets[Family.SDXL]))
    layers = {
        f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": shape
        for key, shape in unet.items()
        if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.weight$", key)
    }
    layers |= _text_layers("lora_te1", CLIP_WIDTH, size.clip_layers, size.clip_inner)
    other = size.open_clip[Family.SDXL]
    return layers | _text_layers("lora_te2", other.width, other.layers, 4 * other.width)


def _text_layers(prefix: str, width: int, layers: int, inner: int) -> Shapes:
    return {
        f"{prefix}_text_model_{key.removesuffix('.weight').replace('.', '_')}": shape
        for key, shape in text_shapes(width, layers, inner).items()
        if re.search(r"encoder\.layers\..*(_proj|fc[12])\.weight$", key)
    }


# ControlNets.


def control_tensors(size: Size) -> dict[str, Tensor]:
    """Return a ControlNet for SD 1.x in the names of the first release; its convolutions are not of zero."""
    unet = size.unets[Family.SD1]
    shapes = _module_shapes(lambda: ControlNet(unet, (*HINT_WIDTHS, unet.model_channels)))
    weights = {key: random_weight(f"control {key}", shape) for key, shape in shapes.items()}
    halved = ("zero_convs", "middle_block_out")
    return {f"control_model.{key}": (0.5 if key.startswith(halved) else 1) * w for key, w in weights.items()}


# Files.


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a safetensors file of numbers of one type."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    write_stream(path, shapes, iter(tensors.values()), metadata, dtype)


STORED = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def write_stream(
    path: Path,
    shapes: Mapping[str, Shape],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a safetensors file of numbers of one type, which need not be in memory together."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    at = 0
    for key, shape in shapes.items():
        end = at + dtype.itemsize * prod(shape)
        header[key] = {"dtype": STORED[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            raw = tensor.to(dtype).contiguous().flatten().view(torch.uint8)
            stream.write(raw.numpy().tobytes())
