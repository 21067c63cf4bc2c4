"""The autoencoder computes what diffusers' AutoencoderKL computes on the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.files.checkpoint import VAE_PREFIX
from lib_delta.models.vae import VAE, VAEConfig

diffusers = pytest.importorskip("diffusers")
convert_from_ckpt = pytest.importorskip("diffusers.pipelines.stable_diffusion.convert_from_ckpt")

# Widths, blocks per level, groups of the norms: the released models' (except the last two levels, which have 512
# channels), a shallower one, and one too narrow for 32 groups.
LAYOUTS = {"released": ((128, 256, 256, 256), 2, 32), "shallow": ((128, 256), 1, 32), "narrow": ((32, 32), 1, 8)}


@torch.no_grad()
def pair(layout: str) -> tuple[VAE, nn.Module]:
    levels, res_blocks, groups = LAYOUTS[layout]
    ours = VAE(VAEConfig(levels, res_blocks)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in ours.named_parameters():
        parameter.normal_(generator=generator)
        parameter.mul_(parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.add_(1)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=levels,
        layers_per_block=res_blocks,
        norm_num_groups=groups,
        down_block_types=["DownEncoderBlock2D"] * len(levels),
        up_block_types=["UpDecoderBlock2D"] * len(levels),
    ).eval()
    checkpoint = {f"{VAE_PREFIX}{k}": v for k, v in ours.state_dict().items()}
    theirs.load_state_dict(convert_from_ckpt.convert_ldm_vae_checkpoint(checkpoint, dict(theirs.config)), strict=True)
    return ours, theirs


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_encoding_equals_diffusers(layout: str) -> None:
    ours, theirs = pair(layout)
    pictures = noise(2, 3, 64, 48)
    mean, log_variance = ours.moments(pictures)
    expected = theirs.encode(pictures).latent_dist
    assert mean.shape == (2, 4, 64 // ours.config.factor, 48 // ours.config.factor)
    assert (mean - expected.mean).abs().max() < 1e-4
    assert (log_variance - expected.logvar).abs().max() < 1e-4
    assert torch.equal(ours.encode(pictures), mean)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_equals_diffusers(layout: str) -> None:
    ours, theirs = pair(layout)
    latents = noise(2, 4, 7, 6)
    error = (ours.decode(latents) - theirs.decode(latents).sample).abs().max().item()
    print(f"{layout}: max abs error {error:.2e}")
    assert error < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_configuration_is_read_off_the_shapes(layout: str) -> None:
    ours, _ = pair(layout)
    assert VAEConfig.from_shapes({k: tuple(v.shape) for k, v in ours.state_dict().items()}) == ours.config


@pytest.mark.parametrize(
    "change",
    [{"post_quant_conv.weight": ()}, {"encoder.down.1.block.0.conv2.weight": (33, 33, 3, 3)}, None],
    ids=["no dimensions", "odd width", "incomplete"],
)
def test_shapes_that_are_no_autoencoder_are_refused(change: dict[str, tuple[int, ...]] | None) -> None:
    ours, _ = pair("shallow")
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()} if change else {}
    with pytest.raises(CheckpointError, match="not a Stable Diffusion autoencoder"):
        VAEConfig.from_shapes(shapes | (change or {"encoder.down.0.block.0.conv2.weight": (32, 32, 3, 3)}))
