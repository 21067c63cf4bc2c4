"""Train controls of the base: an edge-map ControlNet, and image prompts.

The base is frozen, and the training data are pictures that it knows.  The ControlNet (arXiv 2302.05543) is trained as
the low-rank changes to the base's encoder that a Control-LoRA's file contains.  The image prompt (IP-Adapter, arXiv
2308.06721) is trained together with its image encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from demo.edges import edge_maps
from demo.train.adapters import Adapter, low_rank
from demo.train.common import Run, train
from demo.train.data import to_float
from demo.train.denoisers import Conditioned, all_contexts, initialise, noise_loss, picture_variants
from lib_delta.adapters.algorithms import lora
from lib_delta.controls.image_encoder import DEVIATION, MEAN
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.injection import Injection
from lib_delta.models.ip_adapter import IPAdapter, TokenProjection, attend_to_image, cross_attentions
from lib_delta.models.unet import UNet, UNetEncoder

HINTS = (3, 8, 8, 16, 16, 32)  # channels of the convolutions that read a map; the UNet's follow
RANK = 32
TOKENS = 4
SEEN = {"hidden_size": 96, "intermediate_size": 192, "projection_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 64, "patch_size": 8, "hidden_act": "gelu"}  # fmt: skip
# Shares of the training pictures without their prompt: of those with a map, so that the map has an effect, and fewer of
# those with a reference, which should not determine the subject.
WITHOUT_PROMPT, WITHOUT_PROMPT_COLOURED = 0.4, 0.1
# Shares without a reference, for the negative prompt, and with one of shuffled patches, which has colours but no
# shapes.
WITHOUT_PICTURE, IN_DISORDER = 0.1, 0.9
# An image prompt's share of draws in the highest noise, where the noisy picture does not show its colours yet.
IN_NOISE = 0.8


@dataclass(frozen=True)
class Lesson:
    """Latents ``(P, V, 4, h, w)`` with their maps or references, and the base with its prompts.

    ``shown`` ``(P, V, C, H, W)`` are the latents' pictures or maps, in bytes; ``tokens[P]`` are the empty prompt's.
    """

    base: Conditioned
    tokens: Tensor
    latents: Tensor
    shown: Tensor

    def last(self, count: int) -> Lesson:
        """Return the lesson of the last ``count`` variants, which have the strongest augmentation."""
        return replace(self, latents=self.latents[:, -count:], shown=self.shown[:, -count:])

    def draw(self, count: int, without_prompt: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pick latents ``(N, 4, h, w)``; return them, the numbers of their prompts, and their maps or references."""
        number = torch.randint(self.latents.shape[0], (count,), generator=generator)
        variant = torch.randint(self.latents.shape[1], (count,), generator=generator)
        silent = torch.rand(count, generator=generator) < without_prompt
        return self.latents[number, variant].float(), torch.where(silent, -1, number), self.shown[number, variant]


def variants_of(pictures: Tensor, strong: int, seed: int) -> Tensor:
    """Return the augmented pictures that latents encode, uint8 ``(P, V, 3, H, W)``."""
    moved = [torch.cat(parts) for parts in picture_variants(pictures, strong, seed)]
    return torch.stack([((variant + 1) * 127.5).round().byte() for variant in moved], 1)


def maps_of(pictures: Tensor) -> Tensor:
    """Return the edge maps of pictures from :func:`variants_of`, uint8 ``(P, V, 1, H, W)``."""
    return torch.stack([255 * edge_maps(to_float(one)).byte() for one in pictures])[:, :, None]


class EdgeControl(nn.Module):
    """A ControlNet whose encoder is the base's with low-rank changes."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        encoder = UNetEncoder(unet.config)
        shared = encoder.state_dict()
        encoder.load_state_dict({key: value for key, value in unet.state_dict().items() if key in shared})
        self.encoder = encoder.requires_grad_(False)
        self.changes = Adapter(encoder, low_rank(RANK))
        self.control = ControlNet(unet.config, (*HINTS, unet.config.model_channels))
        initialise(self.control)
        self.control.load_state_dict(encoder.state_dict(), strict=False)
        for name, parameter in self.control.named_parameters():
            parameter.requires_grad_(name not in shared)
        for layer in (*self._outputs(), list(self.control.input_hint_block.values())[-1]):
            nn.init.zeros_(layer.weight)

    def _outputs(self) -> list[nn.Module]:
        return [*(parts[0] for parts in self.control.zero_convs), self.control.middle_block_out[0]]

    def forward(self, noisy: Tensor, t: Tensor, context: Tensor, maps: Tensor) -> list[Tensor]:
        """Return the additions to each output of the encoder, for maps ``(N, 3, H, W)`` in [0, 1]."""
        hint = self.control.hint(maps)
        return functional_call(self.control, self.changes.merged(self.encoder), (noisy, t, context, hint))

    def export(self) -> dict[str, Tensor]:
        """Return the tensors of a Control-LoRA: factors by layer, and the layers that the base does not have."""
        shared = self.encoder.state_dict()
        out = {key: value for key, value in self.control.state_dict().items() if key not in shared}
        sides = {lora.UP: "up", lora.DOWN: "down"}
        for (path, name), tensor in zip(self.changes.names, self.changes.tensors):
            if name in sides:
                out[f"{path}.{sides[name]}"] = tensor
        return {"lora_controlnet": torch.zeros(0), **out}


def train_edges(name: str, lesson: Lesson, folder: Path, run: Run) -> EdgeControl:
    """Train a ControlNet to make the base follow the edges of its pictures."""
    contexts, unet = all_contexts(lesson.base, lesson.tokens), lesson.base.unet.requires_grad_(False)
    torch.manual_seed(run.seed)
    model = EdgeControl(unet)

    def loss(generator: torch.Generator) -> Tensor:
        x0, number, shown = lesson.draw(run.batch, WITHOUT_PROMPT, generator)
        context, maps = contexts[number], (shown / 255).expand(-1, 3, -1, -1)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            residuals = model(noisy, t, context, maps)
            return unet(
                noisy[None], t, context[None], None, Injection(decoder=dict(enumerate(residuals)), single_branch=True)
            )[0]

        return noise_loss(predict, x0, "eps", generator)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return cast(EdgeControl, train(name, model, loss, folder, run, trained))


class PicturePrompt(nn.Module):
    """An image encoder in CLIP's form, and an IP-Adapter for it."""

    def __init__(self, unet: UNet) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self.encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**SEEN))
        width = unet.config.context_width
        widths = [layer.to_q.weight.shape[0] for _, layer in cross_attentions(unet)]
        self.adapter = IPAdapter(TokenProjection(SEEN["projection_dim"], width, TOKENS), width, widths)
        for layer in self.adapter.ip_adapter.values():
            nn.init.kaiming_uniform_(layer.to_k_ip.weight, a=math.sqrt(5))
            nn.init.zeros_(layer.to_v_ip.weight)
        projection = self.adapter.image_proj
        nn.init.kaiming_uniform_(projection.proj.weight, a=math.sqrt(5))
        nn.init.ones_(projection.norm.weight)
        for bias in (projection.proj.bias, projection.norm.bias):
            nn.init.zeros_(bias)

    def forward(self, references: Tensor, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each cross-attention's keys and values for the selected pictures ``(N, 3, H, W)`` in [-1, 1]."""
        mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        seen = self.encoder(pixel_values=((references + 1) / 2 - mean) / deviation).image_embeds
        return self.adapter.keys_and_values(self.adapter.image_proj(seen * kept[:, None]))


def train_image_prompt(name: str, lesson: Lesson, folder: Path, run: Run) -> PicturePrompt:
    """Train an IP-Adapter and its image encoder to make the base draw in the colours of a reference."""
    contexts, unet = all_contexts(lesson.base, lesson.tokens), lesson.base.unet.requires_grad_(False)
    torch.manual_seed(run.seed)
    model = PicturePrompt(unet)

    def loss(generator: torch.Generator) -> Tensor:
        x0, number, shown = lesson.draw(run.batch, WITHOUT_PROMPT_COLOURED, generator)
        references = in_disorder(turned(to_float(shown), generator), generator)
        kept = (torch.rand(run.batch, generator=generator) >= WITHOUT_PICTURE).float()

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            pairs = zip(cross_attentions(unet), model(references, kept))
            attended = {layer: _seen(k, v) for (_, layer), (k, v) in pairs}
            injection = Injection(extra_attention=attended, single_branch=True)  # type: ignore[arg-type]
            return unet(noisy[None], t, contexts[number][None], None, injection)[0]

        return noise_loss(predict, x0, "eps", generator, IN_NOISE)

    return cast(PicturePrompt, train(name, model, loss, folder, run))


def _seen(k: Tensor, v: Tensor):  # type: ignore[no-untyped-def]
    return lambda q, heads: attend_to_image(q, k, v, heads)


def turned(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each of ``(N, 3, H, W)`` by any angle, and mirror half of them; the colours stay."""
    count = len(pictures)
    angle = 2 * math.pi * torch.rand(count, generator=generator)
    mirror = (torch.rand(count, generator=generator) < 0.5).float() * 2 - 1
    cos, sin, none = angle.cos(), angle.sin(), torch.zeros(count)
    affine = torch.stack((torch.stack((cos * mirror, -sin, none), 1), torch.stack((sin * mirror, cos, none), 1)), 1)
    grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures - 1, grid, mode="bilinear", align_corners=False) + 1


def in_disorder(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Shuffle the patches of some pictures ``(N, 3, H, W)``, in another order for each."""
    side = SEEN["patch_size"]
    patches = F.unfold(pictures, side, stride=side)
    order = torch.rand(len(pictures), patches.shape[2], generator=generator).argsort(1)
    mixed = patches.gather(2, order[:, None].expand_as(patches))
    some = torch.rand(len(pictures), generator=generator) < IN_DISORDER
    return F.fold(torch.where(some[:, None, None], mixed, patches), pictures.shape[2:], side, stride=side)
