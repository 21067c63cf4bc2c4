"""CLIP's image encoder, through which IP-Adapters look at pictures; told by its weights, not by its name."""

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

# Of CLIP's training pictures, by channel.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI_PROJECTION = 768  # ViT-L of the first CLIP, whose activation is another than OpenCLIP's
HEADS = 16  # of ViT-L, H and G alike


class ImageEncoder(nn.Module):
    """``transformer`` is transformers' vision model with its projection, on the meta device, and in its key names.

    It computes in float32 on the CPU.  It is asked once for a picture, and a ViT-H has 2.5 GB: so each layer's weights
    are read from the file when it runs, and let go of right after.
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
            none = {key: torch.empty_like(weight) for key, weight in part.state_dict().items()}
            part.register_forward_pre_hook(partial(self._read, names[part]))
            part.register_forward_hook(partial(_forget, none), always_call=True)

    def prepare(self, picture: Tensor) -> Tensor:
        """Scale a picture ``(1, 3, H, W)`` in [0, 1] by its shorter side, cut out the middle, and normalise it.

        What is scaled is rounded to 8 bits, as by the release's and the WebUIs' own, and by what CLIP was trained with.
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
        """Return the embedding ``(N, projection)``, or what the last layer but one makes of the patches."""
        with WeightFile.open(self.path) as self._file:
            seen = self.transformer(prepared, output_hidden_states=of_patches)
        return seen.hidden_states[-2] if of_patches else seen.image_embeds

    def _read(self, name: str, part: nn.Module, *_: object) -> None:
        file = self._file
        assert file is not None
        tensors = {key: file.tensor(whole) for key in part.state_dict() if (whole := f"{name}.{key}") in file.shapes}
        load_weights(part, tensors, file.name)


def _forget(none: dict[str, Tensor], part: nn.Module, *_: object) -> None:
    part.load_state_dict(none, assign=True)


def load_image_encoder(path: Path) -> ImageEncoder:
    """Make an image encoder of a file in transformers' names; raises :class:`CheckpointError` for one that is none."""
    with WeightFile.open(path) as file:
        config = _config(file)
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        with torch.device("meta"):
            transformer = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        embeddings = transformer.vision_model.embeddings
        # Numbers and no weights: older versions of transformers store them.
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
    """Return the first image encoder whose pictures are as wide as an IP-Adapter looks at, by the files' headers.

    Raises :class:`SettingError` where there is none.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which looks at maps: an IP-Adapter is needed for a picture")
    projection = file.model.image_proj
    wanted = "hidden_size" if projection.of_patches else "projection_dim"
    for path in candidates:
        found = _encoder_info(FileState.of(path))
        if found is not None and found[wanted] == projection.seen_width:
            return path
    raise SettingError(
        f"no image encoder is there whose pictures are {projection.seen_width} wide, as {file.name} needs them:"
        " put the one that it was made with (CLIP ViT-H for most) into the WebUI's folder for them"
    )


@lru_cache(maxsize=1024)
def _encoder_info(state: FileState) -> dict[str, Any] | None:
    """Describe an image encoder; None for whatever else lies in its folder."""
    try:
        with WeightFile.open(state.path) as file:
            return _config(file)
    except CheckpointError:
        return None


@torch.no_grad()
def image_tokens(file: ControlFile, encoder: ImageEncoder, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return what an IP-Adapter's projection makes of pictures, and of none: ``(S, context_width)`` each.

    The tokens of several pictures, ``(1, 3, H, W)`` in [0, 1], stand one after another; they are computed in
    float32, and have the projection's device and type.
    Raises :class:`SettingError` without a picture, and :class:`AdapterError` for an encoder of another width.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which looks at maps: an IP-Adapter is needed for a picture")
    if not pictures:
        raise SettingError(f"{file.name} has no picture to look at: one or more are needed")
    projection = file.model.image_proj
    of_patches = bool(projection.of_patches)
    prepared = torch.cat([encoder.prepare(picture.cpu().float()) for picture in pictures])
    # The release's choice: no embedding at all, but the patches of a picture without anything.
    asked = torch.cat((prepared, torch.zeros_like(prepared[:1]))) if of_patches else prepared
    seen = encoder(asked, of_patches)
    seen, none = (seen[:-1], seen[-1:]) if of_patches else (seen, torch.zeros_like(seen[:1]))
    if seen.shape[-1] != projection.seen_width:
        raise AdapterError(
            f"{file.name} was made with another image encoder than this one, whose pictures are {seen.shape[-1]} wide"
        )
    own = next(projection.parameters())
    # The tokens are made where the files were read, often the CPU, and there older torches multiply nothing in fp16.
    weights = {name: weight.float() for name, weight in projection.state_dict().items()}
    # They are often a card's by the second picture, and there a host may have autocast on.
    with without_autocast(own.device):
        tokens, without = (
            functional_call(projection, weights, (what.to(own.device, torch.float32),)).to(own.dtype)
            for what in (seen, none)
        )
    return tokens.flatten(0, 1), without.expand(len(pictures), -1, -1).flatten(0, 1)
