"""Write trained models in the form of users' files: SD key names, fp16 safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from demo.targets import PREDICTION, TARGET, fingerprint
from demo.train.adapters import Adapter
from demo.train.controls import EdgeControl, PicturePrompt
from demo.train.denoisers import Conditioned
from lib_delta.files.checkpoint import UNET_PREFIX, VAE_PREFIX
from lib_delta.models import vae
from lib_delta.models.unet import UNet


def sd1(path: Path, model: Conditioned, autoencoder: vae.VAE) -> None:
    """Write an SD 1.x checkpoint: CLIP text encoder in transformers' names."""
    text = _below("cond_stage_model.transformer.", model.text)
    _save(path, _below(UNET_PREFIX, model.unet) | _below(VAE_PREFIX, autoencoder) | text, _narrow(model))


def sd2(path: Path, model: Conditioned, autoencoder: vae.VAE) -> None:
    """Write an SD 2.x checkpoint that predicts v: text encoder in OpenCLIP's names."""
    tensors = _below(UNET_PREFIX, model.unet) | _below(VAE_PREFIX, autoencoder) | _open_clip(model)
    # The key by which WebUIs recognise a v-predicting checkpoint.
    _save(path, tensors | {"v_pred": torch.zeros(1)}, _narrow(model))


def unet_only(path: Path, model: Conditioned) -> None:
    """Write only a fine-tuned UNet; its text encoder and autoencoder are the base's."""
    _save(path, _below(UNET_PREFIX, model.unet), {})


def differing(path: Path, model: UNet, start: UNet, autoencoder: vae.VAE | None, prediction: str) -> None:
    """Write the weights of a UNet that differ from those of ``start``, and an autoencoder, for :mod:`demo.targets`."""
    known = _below(UNET_PREFIX, start)
    own = {k: v for k, v in _below(UNET_PREFIX, model).items() if not _alike(v, known[k])}
    if autoencoder is not None:
        own |= _below(VAE_PREFIX, autoencoder)
    _save(path, own, {PREDICTION: prediction, TARGET: fingerprint(start)})


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.half(), b.half())


def adapter(path: Path, trained: Adapter) -> None:
    """Write an adapter as kohya's scripts and LyCORIS do."""
    _save(path, trained.export(), trained.kind.metadata)


def edges(path: Path, trained: EdgeControl) -> None:
    """Write a ControlNet in the form of Control-LoRAs: factors that are added to the base."""
    _save(path, trained.export(), {})


def image_prompt(folder: Path, trained: PicturePrompt) -> None:
    """Write an IP-Adapter in the release's names, and next to it the image encoder in transformers' names."""
    _save(folder / "image-prompt.safetensors", dict(trained.adapter.state_dict()), {})
    heads = {"delta.vision_heads": str(trained.encoder.config.num_attention_heads)}
    _save(folder / "image-encoder.safetensors", _below("", trained.encoder), heads)


def metrics(path: Path, model: nn.Module) -> None:
    """Write the judges' networks."""
    _save(path, dict(model.state_dict()), {})


def _below(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in module.state_dict().items() if not key.endswith("position_ids")}


def _narrow(model: Conditioned) -> dict[str, str]:
    """Record the settings that shapes do not show, of models narrower than the real ones."""
    metadata = {"delta.text_heads": str(model.text.config.num_attention_heads)}
    if model.unet.config.head_width:
        metadata["delta.head_width"] = str(model.unet.config.head_width)
    return metadata


def _open_clip(model: Conditioned) -> dict[str, Tensor]:
    text, prefix = model.text.text_model, "cond_stage_model.model."
    width = model.text.config.hidden_size
    tensors = {
        "token_embedding.weight": text.embeddings.token_embedding.weight,
        "positional_embedding": text.embeddings.position_embedding.weight,
        "ln_final.weight": text.final_layer_norm.weight,
        "ln_final.bias": text.final_layer_norm.bias,
        "text_projection": torch.eye(width),
        "logit_scale": torch.tensor(4.6052),
    }
    for i, layer in enumerate(text.encoder.layers):
        attention, block = layer.self_attn, f"transformer.resblocks.{i}."
        for part in ("weight", "bias"):
            three = [getattr(p, part) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            tensors |= {
                f"{block}attn.in_proj_{part}": torch.cat(three),
                f"{block}attn.out_proj.{part}": getattr(attention.out_proj, part),
                f"{block}ln_1.{part}": getattr(layer.layer_norm1, part),
                f"{block}ln_2.{part}": getattr(layer.layer_norm2, part),
                f"{block}mlp.c_fc.{part}": getattr(layer.mlp.fc1, part),
                f"{block}mlp.c_proj.{part}": getattr(layer.mlp.fc2, part),
            }
    return {prefix + key: value for key, value in tensors.items()}


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = {key: value.detach().to(torch.float16).contiguous() for key, value in tensors.items()}
    save_file(half, str(path), {"format": "pt", **metadata})
