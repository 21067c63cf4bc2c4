"""Train autoencoders: the one that base and target share, and those of targets with other latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.train.common import Run, train
from demo.train.data import Emoji, augment, to_float
from lib_delta.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(levels=(16, 32, 64), res_blocks=1)
OWN = VAEConfig(levels=(16, 32, 48), res_blocks=1)
SIXTEEN = VAEConfig(levels=(16, 32, 48), res_blocks=1, latent_channels=16)
SCALE = 0.18215


def train_vae(emoji: Emoji, folder: Path, colour: Run, run: Run, config: VAEConfig = CONFIG, name: str = "vae") -> VAE:
    """Return the trained autoencoder, its latents standardised for SD's scale factor.

    Without guidance, the latents encode mainly the luminance of edges, and pictures come out grey.  So the ``colour``
    run comes first, with a loss on coarse colours only, of parts of pictures.  From whole pictures, which are mostly
    white, and in half precision, an autoencoder learnt no colours.
    """
    pictures = to_float(torch.cat(tuple(emoji.pictures.values())))

    def loss(vae: VAE, colours: bool, batch: int) -> Callable[[torch.Generator], Tensor]:
        distance = _coarse if colours else _fine

        def value(generator: torch.Generator) -> Tensor:
            chosen = pictures[torch.randint(len(pictures), (batch,), generator=generator)]
            chosen = _part(chosen, generator) if colours else augment(chosen, generator)
            with torch.autocast(chosen.device.type, torch.bfloat16, enabled=not colours):
                mean, log_variance = (moment.float() for moment in vae.moments(chosen))
                noise = torch.randn(mean.shape, generator=generator)
                restored = vae.decode(mean + (0.5 * log_variance).exp() * noise).float()
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            return distance(restored, chosen) + 1e-4 * kl

        return value

    vae = VAE(config)
    coarse = train(f"{name}-colour", vae, loss(vae, True, colour.batch), folder, colour)
    vae = cast(VAE, coarse).requires_grad_(True)
    vae = cast(VAE, train(name, vae, loss(vae, False, run.batch), folder, run))
    return _standardise(vae, pictures)


def train_decoder(vae: VAE, emoji: Emoji, folder: Path, run: Run, name: str = "vae-decoder") -> VAE:
    """Train the decoder further, only on the pictures of the world; latents stay unchanged.

    The encoder was trained on ten times as many pictures, so that its latents are evenly distributed; the decoder's
    output is only of these.
    """
    pictures = to_float(torch.cat(tuple(emoji.pictures.values())))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = augment(pictures[torch.randint(len(pictures), (run.batch,), generator=generator)], generator)
        with torch.no_grad():
            mean, log_variance = vae.moments(chosen)
            latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        with torch.autocast(latents.device.type, torch.bfloat16):
            restored = vae.decode(latents)
        return _fine(restored.float(), chosen)

    decoder = [*vae.decoder.requires_grad_(True).parameters(), *vae.post_quant_conv.requires_grad_(True).parameters()]
    return cast(VAE, train(name, vae, loss, folder, run, decoder)).requires_grad_(False)


def _part(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Crop a part of half the side from pictures ``(N, 3, H, W)``, at the same place."""
    side = pictures.shape[-1] // 2
    top, left = torch.randint(side + 1, (2,), generator=generator).tolist()
    return pictures[..., top : top + side, left : left + side]


def _coarse(restored: Tensor, pictures: Tensor) -> Tensor:
    """Compare averages of 4x4 pixels, and their deviation from grey.

    Uses only squares: most pixels are white, and the median, which absolute differences favour, is grey.
    """
    difference = F.avg_pool2d(restored - pictures, 4)
    chroma = difference - difference.mean(1, keepdim=True)
    return 4 * difference.square().mean() + 16 * chroma.square().mean()


def _fine(restored: Tensor, pictures: Tensor) -> Tensor:
    """Compare pixels, edges and coarse colours."""
    edges = _distance(*map(_edges, (restored, pictures)))
    return _distance(restored, pictures) + edges + 0.5 * _coarse(restored, pictures)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean() + (a - b).square().mean()


def _edges(pictures: Tensor) -> Tensor:
    return torch.cat((pictures.diff(dim=-1).flatten(1), pictures.diff(dim=-2).flatten(1)), 1)


@torch.no_grad()
def _standardise(vae: VAE, pictures: Tensor) -> VAE:
    """Give every latent channel mean 0 and standard deviation 1 / 0.18215 by folding both into the 1x1 convolutions."""
    latents = torch.cat([vae.encode(batch) for batch in pictures[:: max(1, len(pictures) // 600)].split(50)])
    mean, gain = latents.mean((0, 2, 3)), 1 / (SCALE * latents.std((0, 2, 3)))
    channels = vae.config.latent_channels
    vae.quant_conv.weight[:channels] *= gain[:, None, None, None]
    _bias(vae.quant_conv)[:channels] = (_bias(vae.quant_conv)[:channels] - mean) * gain
    _bias(vae.quant_conv)[channels:] += 2 * gain.log()
    inverse = vae.post_quant_conv.weight[:, :, 0, 0]
    _bias(vae.post_quant_conv).add_(inverse @ mean)
    vae.post_quant_conv.weight /= gain[None, :, None, None]
    return vae


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
