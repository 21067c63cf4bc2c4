"""CLIP's image encoder, which encodes pictures for IP-Adapters; recognised by its weights, not by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lib_delta.controls.control_file import ControlFile
from lib_delta.devices import without_autocast
from lib_delta.errors import AdapterError, CheckpointError, SettingError
from lib_delta.files.stored_file import Shapes
from lib_delta.files.weight_file import FileState, WeightFile, header_number
from lib_delta.models.ip_adapter import IPAdapter
from lib_delta.models.loading import load_weights
from lib_delta.models.unpatched import unpatched

# Mean and deviation of CLIP's training pictures, by channel.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI_PROJECTION = 768  # width of OpenAI's ViT-L, whose activation differs from OpenCLIP's
HEADS = 16  # of ViT-L, H and G


class ImageEncoder(nn.Module):
    """CLIP's image encoder: transformers' vision model with projection, on the meta device.

    It computes in float32 on the CPU.  A picture is encoded only once, and a ViT-H takes 2.5 GB.  So each layer's
    weights are read from the file when the layer runs, and freed right after.
    """

    def __init__(self, transformer: Any, path: Path) -> None:
        super().__init__()
        unpatched(transformer)
        self.transformer, self.path = transformer, path
        self.side: int = transformer.config.image_size
        self._file: WeightFile | None = None
        vision = transformer.vision_model
        parts = [vision.embeddings, vision.pre_layrnorm, *vision.encoder.layers, vision.post_layernorm]
        names = {module: name for name, module in transformer.named_modules()}
        for part in (*parts, transformer.visual_projection):
            empty = {key: torch.empty_like(weight) for key, weight in part.state_dict().items()}
            part.register_forward_pre_hook(partial(self._read, names[part]))
            part.register_forward_hook(partial(_free, empty), always_call=True)

    def prepare(self, picture: Tensor) -> Tensor:
        """Resize a picture ``(1, 3, H, W)`` in [0, 1] by its shorter side, crop the centre, and normalise it.

        The resized picture is rounded to 8 bits, as in CLIP's training, the IP-Adapters' release and the WebUIs.
        """
        scale = self.side / min(picture.shape[2:])
        size = [max(self.side, round(side * scale)) for side in picture.shape[2:]]
        scaled = F.interpolate(picture, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        top, left = ((side - self.side) // 2 for side in size)
        middle = scaled[..., top : top + self.side, left : left + self.side].mul(255).round() / 255
        mean, deviation = (torch.tensor(values, device=picture.device)[:, None, None] for values in (MEAN, DEVIATION))
        return (middle - mean) / deviation

    @torch.no_grad()
    def forward(self, prepared: Tensor, of_patches: bool) -> Tensor:
        """Return the embedding ``(N, projection)``, or the last but one layer's output for the patches."""
        with WeightFile.open(self.path) as self._file:
            output = self.transformer(prepared, output_hidden_states=of_patches)
        return output.hidden_states[-2] if of_patches else output.image_embeds

    def _read(self, name: str, part: nn.Module, *_: object) -> None:
        file = self._file
        assert file is not None
        tensors = {key: file.tensor(whole) for key in part.state_dict() if (whole := f"{name}.{key}") in file.shapes}
        load_weights(part, tensors, file.name)


def _free(empty: dict[str, Tensor], part: nn.Module, *_: object) -> None:
    part.load_state_dict(empty, assign=True)


def load_image_encoder(path: Path) -> ImageEncoder:
    """Load an image encoder in transformers' layout; raises :class:`CheckpointError` for any other file."""
    with WeightFile.open(path) as file:
        config = _config(file)
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        with torch.device("meta"):
            transformer = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        embeddings = transformer.vision_model.embeddings
        # Older versions of transformers store these numbers with the weights.
        count = embeddings.position_embedding.num_embeddings
        embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
    return ImageEncoder(transformer.eval().requires_grad_(False), path)


def _config(file: WeightFile) -> dict[str, Any]:
    shapes: Shapes = file.shapes
    try:
        projection, width = shapes["visual_projection.weight"]
        patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
        patches = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
        inner = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{file.name} is no CLIP image encoder in transformers' layout (no usable {error}):"
            " the one that the IP-Adapter was made with is needed"
        ) from error
    layers = {m[1] for key in shapes if (m := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key))}
    heads = header_number(file, "delta.vision_heads") or HEADS
    if width % heads:
        raise CheckpointError(f"{file.name} is {width} wide, and {heads} heads need equal shares of that")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "projection_dim": projection,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "image_size": patch * round(patches**0.5),
        "patch_size": patch,
        "hidden_act": "quick_gelu" if projection == OPENAI_PROJECTION else "gelu",
    }


def choose_encoder(file: ControlFile, candidates: Sequence[Path]) -> Path:
    """Return the first image encoder whose output has the width that an IP-Adapter needs, by the files' headers.

    Raises :class:`SettingError` without one.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which looks at maps: an IP-Adapter is needed for a picture")
    projection = file.model.image_proj
    width = "hidden_size" if projection.of_patches else "projection_dim"
    for path in candidates:
        info = _encoder_info(FileState.of(path))
        if info is not None and info[width] == projection.seen_width:
            return path
    raise SettingError(
        f"no image encoder is there whose pictures are {projection.seen_width} wide, as {file.name} needs them:"
        " put the one that it was made with (CLIP ViT-H for most) into the WebUI's folder for them"
    )


@lru_cache(maxsize=1024)
def _encoder_info(state: FileState) -> dict[str, Any] | None:
    """Return an image encoder's configuration; None for any other file."""
    try:
        with WeightFile.open(state.path) as file:
            return _config(file)
    except CheckpointError:
        return None


@torch.no_grad()
def image_tokens(file: ControlFile, encoder: ImageEncoder, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return an IP-Adapter's tokens of the pictures, and of an empty picture: ``(S, context_width)`` each.

    The tokens of several pictures, ``(1, 3, H, W)`` in [0, 1], are concatenated.  They are computed in float32, and
    returned on the projection's device and in its type.  Raises :class:`SettingError` without a picture, and
    :class:`AdapterError` for an encoder of another width.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which looks at maps: an IP-Adapter is needed for a picture")
    if not pictures:
        raise SettingError(f"{file.name} has no picture to look at: one or more are needed")
    projection = file.model.image_proj
    of_patches = bool(projection.of_patches)
    prepared = torch.cat([encoder.prepare(picture.cpu().float()) for picture in pictures])
    # As in the release, "no picture" is an embedding of zeros, but for patches the encoding of a picture of zeros.
    if of_patches:
        encoded = encoder(torch.cat((prepared, torch.zeros_like(prepared[:1]))), of_patches)
        encoded, empty = encoded[:-1], encoded[-1:]
    else:
        encoded = encoder(prepared, of_patches)
        empty = torch.zeros_like(encoded[:1])
    if encoded.shape[-1] != projection.seen_width:
        raise AdapterError(
            f"{file.name} was made with another image encoder than this one, whose pictures are"
            f" {encoded.shape[-1]} wide"
        )
    placed = next(projection.parameters())
    # The projection is often on the CPU, where older versions of torch cannot multiply in fp16.
    weights = {name: weight.float() for name, weight in projection.state_dict().items()}
    # By the second picture it is often on a card, where a host may run under autocast.
    with without_autocast(placed.device):
        tokens, without = (
            functional_call(projection, weights, (embedding.to(placed.device, torch.float32),)).to(placed.dtype)
            for embedding in (encoded, empty)
        )
    return tokens.flatten(0, 1), without.expand(len(pictures), -1, -1).flatten(0, 1)
