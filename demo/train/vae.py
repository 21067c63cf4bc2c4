"""Train the autoencoder that base and target share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from demo.train.common import Run, train
from demo.train.data import Emoji, augment, to_float
from lib_delta.models.vae import VAE, VAEConfig

CONFIG = VAEConfig(levels=(32, 64, 64), res_blocks=1)
SCALE = 0.18215


def train_vae(emoji: Emoji, folder: Path, run: Run) -> VAE:
    """Return the trained autoencoder, its latents standardised for SD's scale factor."""
    pictures = to_float(torch.cat(tuple(emoji.pictures.values())))
    vae = VAE(CONFIG)

    def loss(generator: torch.Generator) -> Tensor:
        batch = pictures[torch.randint(len(pictures), (run.batch,), generator=generator)]
        batch = augment(batch, generator)
        mean, log_variance = vae.moments(batch)
        noise = torch.randn(mean.shape, generator=generator)
        restored = vae.decode(mean + (0.5 * log_variance).exp() * noise)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        # Edges carry line art: the differences of neighbouring pixels count as much as the pixels.
        return _distance(restored, batch) + 2 * _distance(*map(_edges, (restored, batch))) + 1e-4 * kl

    trained = train("vae", vae, loss, folder, run)
    assert isinstance(trained, VAE)
    return _standardise(trained, pictures)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean() + (a - b).square().mean()


def _edges(pictures: Tensor) -> Tensor:
    return torch.cat((pictures.diff(dim=-1).flatten(1), pictures.diff(dim=-2).flatten(1)), 1)


@torch.no_grad()
def _standardise(vae: VAE, pictures: Tensor) -> VAE:
    """Give every latent channel mean 0 and standard deviation 1 / 0.18215 by folding both into the 1x1 convolutions."""
    latents = torch.cat([vae.encode(batch) for batch in pictures[:: len(pictures) // 600].split(50)])
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
