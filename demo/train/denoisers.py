"""Train the denoisers: base, its line-art adapters, its line-art fine-tune, and the target.

Loss: Ho et al. 2020 (arXiv 2006.11239) for eps, Salimans & Ho 2022 (arXiv 2202.00512) for v, weighted
by min-SNR-5 (Hang et al. 2023, arXiv 2303.09556) with a floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from demo.train.adapters import Adapter, Kind
from demo.train.common import Run, train
from demo.train.data import augment, to_float
from demo.train.vae import SCALE
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.forked_layers import Conv2d, ForkedLayer, Linear
from lib_delta.models.loading import load_unet
from lib_delta.models.text import load_towers
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.models.vae import VAE

BASE = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    levels=(64, 64),
    res_blocks=(1, 1),
    depth_in=(0, 1),
    depth_middle=1,
    depth_out=(1, 1, 0, 0),
    context_width=96,
    linear_projection=False,
    head_width=32,
)
TARGET = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=64,
    levels=(64, 64),
    res_blocks=(1, 1),
    depth_in=(0, 1),
    depth_middle=1,
    depth_out=(1, 1, 0, 0),
    context_width=112,
    linear_projection=True,
    head_width=32,
)
WITHOUT_PROMPT = 0.15
VARIANTS = 24  # augmentations of a picture, each encoded once
CELL = 2  # latent pixels along a side of a cell


@dataclass(frozen=True)
class TextConfig:
    width: int
    layers: int
    heads: int
    activation: str
    skipped: int  # layers left out at the end: SD 2.x conditions on the last but one


BASE_TEXT = TextConfig(width=96, layers=2, heads=4, activation="quick_gelu", skipped=0)
TARGET_TEXT = TextConfig(width=112, layers=3, heads=4, activation="gelu", skipped=1)


class Conditioned(nn.Module):
    """A UNet and the text encoder that trains with it."""

    def __init__(self, unet: UNetConfig, text: TextConfig, vocabulary: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.skipped = text.skipped
        self.unet = initialise(UNet(unet))
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=text.width,
                intermediate_size=4 * text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                hidden_act=text.activation,
                max_position_embeddings=77,
                eos_token_id=vocabulary - 1,
            )
        )

    def context(self, tokens: Tensor) -> Tensor:
        """Encode ``(N, 77)`` tokens as ``(N, 77, width)``."""
        states = self.text(tokens, output_hidden_states=True).hidden_states
        return self.text.text_model.final_layer_norm(states[-1 - self.skipped])


def initialise(unet: UNet) -> UNet:
    """Give a UNet random weights; every residual branch starts at zero."""
    for name, layer in unet.named_modules():
        if not isinstance(layer, ForkedLayer):
            continue
        if isinstance(layer, (Linear, Conv2d)):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        else:
            nn.init.ones_(layer.weight)
        if name.endswith(("out_layers.3", "proj_out", "out.2")):
            nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return unet


def picture_variants(pictures: Tensor, strong: int, seed: int) -> Iterator[list[Tensor]]:
    """Yield ``VARIANTS`` augmentations of uint8 pictures, as floats in parts of 50; the last ``strong`` are strong."""
    for variant in range(VARIANTS):
        generator = torch.Generator().manual_seed(seed * 1000 + variant)
        yield [augment(to_float(p), generator, variant >= VARIANTS - strong) for p in pictures.split(50)]


@torch.no_grad()
def latent_variants(
    vae: VAE, pictures: Tensor, strong: int, stored: Path, seed: int, look: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Encode ``VARIANTS`` augmentations of every picture as scaled fp16 latents ``(pictures, VARIANTS, 4, 16, 16)``.

    The last ``strong`` of them are augmented strongly.  ``look``, if given, is applied to each.
    """
    if stored.exists():
        return torch.load(stored, weights_only=True)
    variants = []
    for moved in tqdm(picture_variants(pictures, strong, seed), total=VARIANTS, desc=stored.stem):
        shown = moved if look is None else [look(p) for p in moved]
        variants.append(torch.cat([vae.encode(p).mul(SCALE).half() for p in shown]))
    latents = torch.stack(variants, 1)
    torch.save(latents, stored)
    return latents


def draw_batch(latents: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pick ``count`` latents; return them and their picture numbers.

    They are not shifted: the edge of a latent encodes the picture's border, and would decode as a line one pixel
    further in.
    """
    index = torch.randint(latents.shape[0], (count,), generator=generator)
    variant = torch.randint(latents.shape[1], (count,), generator=generator)
    return latents[index, variant].float(), index


@cache
def alphas_cumprod() -> Tensor:
    """Return SD's scaled linear schedule: the share of signal variance at each of 1000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def denoising_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], latents: Tensor, prediction: str, count: int
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss of ``predict(noisy, t, picture numbers)``; number -1 means no prompt."""

    def loss(generator: torch.Generator) -> Tensor:
        x0, index = draw_batch(latents, count, generator)
        index = torch.where(torch.rand(count, generator=generator) < WITHOUT_PROMPT, -1, index)
        return noise_loss(lambda noisy, t: predict(noisy, t, index), x0, prediction, generator)

    return loss


def flow_loss(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], latents: Tensor, count: int
) -> Callable[[torch.Generator], Tensor]:
    """Return the loss of flow matching (arXiv 2209.03003) of ``predict(noisy, 1000 * time, picture numbers)``."""

    def loss(generator: torch.Generator) -> Tensor:
        x0, index = draw_batch(latents, count, generator)
        index = torch.where(torch.rand(count, generator=generator) < WITHOUT_PROMPT, -1, index)
        # A third of the draws is in the highest fifth, as in the other trainings.
        low, high = torch.rand(2, count, generator=generator)
        time = torch.where(torch.rand(count, generator=generator) < 2 / 3, low, 0.8 + 0.2 * high)
        noise, share = torch.randn(x0.shape, generator=generator), time[:, None, None, None]
        with torch.autocast(x0.device.type, torch.bfloat16):
            output = predict((1 - share) * x0 + share * noise, 1000 * time, index)
        return F.mse_loss(output.float(), noise - x0)

    return loss


def noise_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    prediction: str,
    generator: torch.Generator,
    in_noise: float = 1 / 3,
) -> Tensor:
    """Return the loss of ``predict(noisy, t)`` for latents ``x0`` ``(N, C, H, W)``, each at a random noise level.

    A share ``in_noise`` of the draws is in the highest fifth, where the prompt matters most.  The others are evenly
    spaced, since random gaps at low noise would show as speckles.
    """
    signal, count = alphas_cumprod(), len(x0)
    low, high = torch.rand(2, count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 1 - in_noise, 1000 * low, 800 + 200 * high)
    t = t.long().clamp(max=999)
    noise = torch.randn(x0.shape, generator=generator)
    a = signal[t][:, None, None, None]
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    goal = noise if prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x0
    snr = signal[t] / (1 - signal[t])
    # Weights of the denoised estimate: SNR up to 5, and a floor, without which prompts would have little weight, as
    # they only matter at high noise.  The floor is as high as each output tolerates.
    weight = (snr.clamp(max=5) + 0.2) / snr if prediction == "eps" else (snr.clamp(max=5) + 1) / (snr + 1)
    with torch.autocast(noisy.device.type, torch.bfloat16):
        output = predict(noisy, t.float())
    error = (output.float() - goal).square().mean((1, 2, 3))
    return (weight * error).mean() / weight.mean()


def train_conditioned(
    name: str,
    unet: UNetConfig,
    text: TextConfig,
    tokens: Tensor,
    latents: Tensor,
    prediction: str,
    folder: Path,
    reading: Run,
    run: Run,
    strong: int,
    start: Path | None = None,
) -> Conditioned:
    """Train a UNet with its text encoder, from the checkpoint ``start`` or from nothing.

    ``tokens[-1]`` is the empty prompt.  From nothing, the text encoder first learns to read, from the variants that are
    not among the last ``strong``, because mirrored pictures would blur positions.
    """
    torch.manual_seed(run.seed)
    model = Conditioned(unet, text, int(tokens.max()) + 1)
    if start is None:
        model.text = train_reading(f"{name}-text", model, tokens, latents[:, : VARIANTS - strong], folder, reading)
    else:
        load_conditioned(model, start)

    def predict(noisy: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return model.unet(noisy[None], t, model.context(tokens[index])[None])[0]

    return cast(Conditioned, train(name, model, denoising_loss(predict, latents, prediction, run.batch), folder, run))


def load_conditioned(model: Conditioned, path: Path) -> None:
    """Load a checkpoint's weights into a model; its UNet takes the file's width."""
    with WeightFile.open(path) as file:
        unet, report = load_unet(file)
        model.unet = UNet(unet.config)
        model.unet.load_state_dict(unet.state_dict())
        weights = load_towers(file, report.family)[0].transformer.state_dict()
    own = model.text.state_dict()
    model.text.load_state_dict({**own, **{key: value for key, value in weights.items() if key in own}})


class Reading(nn.Module):
    """A text encoder and a linear map from its last 64 tokens to the 8x8 cells of a latent, row by row."""

    def __init__(self, model: Conditioned) -> None:
        super().__init__()
        self.model = model
        self.cell = nn.Linear(model.text.config.hidden_size, CELL * CELL * 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the expected cells, ``(N, 64, 16)``."""
        return self.cell(self.model.context(tokens)[:, -64:])


def train_reading(name: str, model: Conditioned, tokens: Tensor, latents: Tensor, folder: Path, run: Run) -> nn.Module:
    """Train the text encoder to predict the average picture of a name, cell by cell.

    Learning names only through the denoising loss takes far longer than learning to denoise.  The padding, 64 tokens
    after the longest name, is room for positions, which attention finds.
    """
    reading = Reading(model)
    reading.model.unet.requires_grad_(False)
    cells = F.unfold(latents.float().mean(1), CELL, stride=CELL).transpose(1, 2)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(cells), (run.batch,), generator=generator)
        with torch.autocast(cells.device.type, torch.bfloat16):
            read = reading(tokens[index])
        return F.mse_loss(read.float(), cells[index])

    trained = cast(
        Reading, train(name, reading, loss, folder, run, [*model.text.parameters(), *reading.cell.parameters()])
    )
    model.unet.requires_grad_(True)
    return trained.model.text.requires_grad_(True)


@torch.no_grad()
def all_contexts(model: Conditioned, tokens: Tensor) -> Tensor:
    """Encode every prompt once, for training with a frozen text encoder."""
    return torch.cat([model.context(part) for part in tokens.split(200)])


def train_adapter(
    name: str, kind: Kind, base: Conditioned, tokens: Tensor, latents: Tensor, folder: Path, run: Run
) -> Adapter:
    """Train an adapter of any kind on a frozen base."""
    contexts = all_contexts(base, tokens)
    unet = base.unet.requires_grad_(False)
    torch.manual_seed(run.seed)
    adapter = Adapter(unet, kind)

    def predict(noisy: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return functional_call(unet, adapter.merged(unet), (noisy[None], t, contexts[index][None]))[0]

    return cast(Adapter, train(name, adapter, denoising_loss(predict, latents, "eps", run.batch), folder, run))


def train_full(base: Conditioned, tokens: Tensor, latents: Tensor, folder: Path, run: Run) -> Conditioned:
    """Fine-tune a copy of the base's UNet; the text encoder stays as it is."""
    contexts = all_contexts(base, tokens)
    base.text.requires_grad_(False)
    base.unet.requires_grad_(True)

    def predict(noisy: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return base.unet(noisy[None], t, contexts[index][None])[0]

    loss = denoising_loss(predict, latents, "eps", run.batch)
    return cast(Conditioned, train("lineart-full", base, loss, folder, run, base.unet.parameters()))
