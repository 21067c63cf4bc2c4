"""Sources of a larger size than the target's: sizes by family, white noise, the state's filter, averages of deltas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lib_delta.bridges import Bridge, IdentityBridge, ResolutionBridge, choose_bridge, may_enlarge
from lib_delta.bridges.learned import WEIGHTS, load_bridge
from lib_delta.bridges.resolution import doubled_noise
from lib_delta.diffusion.families import Family
from lib_delta.errors import SettingError
from tests.support.tiny_unet import randn

FORMS = ["stitched", "learned"]
# Source, target, the picture's width and height, and the source's, in pixels.
SIZES = [
    (Family.SDXL, Family.SD1, (512, 512), (1024, 1024)),
    (Family.SDXL, Family.SD1, (512, 768), (1024, 1536)),
    (Family.SDXL, Family.SD1, (504, 744), (1008, 1488)),  # 63 x 93 latents
    (Family.SDXL, Family.SD2, (768, 768), (768, 768)),
    (Family.SDXL, Family.SD2, (768, 1024), (768, 1024)),
    (Family.SDXL, Family.FLUX, (1024, 1024), (1024, 1024)),
    (Family.SDXL, Family.FLUX, (2048, 2048), (1024, 1024)),
    (Family.SD2, Family.SDXL, (1024, 1024), (1024, 1024)),
    (Family.SD1, Family.SDXL, (256, 256), (256, 256)),
    (Family.SD1, Family.SDXL, (1024, 1024), (512, 512)),
    (Family.SD1, Family.SDXL, (832, 1216), (416, 608)),
    (Family.SD1, Family.SDXL, (1536, 1024), (768, 512)),
    (Family.SD1, Family.SDXL, (1536, 1536), (768, 768)),
    (Family.SD1, Family.SDXL, (2048, 2048), (512, 512)),
]


@pytest.mark.parametrize(("source", "target", "picture", "side"), SIZES)
def test_sources_work_near_the_size_of_their_training(
    source: Family, target: Family, picture: tuple[int, int], side: tuple[int, int]
) -> None:
    width, height = picture
    rows, columns = choose_bridge(source, target).source_size(height // 8, width // 8)
    assert (8 * columns, 8 * rows) == side


def test_models_of_one_space_are_never_enlarged() -> None:
    for family in Family:
        assert choose_bridge(family, family) == IdentityBridge()
        assert not may_enlarge(family, family)
    assert choose_bridge(Family.SD2, Family.SD1) == IdentityBridge()
    assert may_enlarge(Family.SDXL, Family.SD1) and not may_enlarge(Family.SD1, Family.SDXL)


def test_a_number_and_the_pictures_size_enlarge_nothing() -> None:
    assert choose_bridge(Family.SDXL, Family.SD1, size="picture").source_size(64, 64) == (64, 64)
    assert choose_bridge(Family.SDXL, Family.SD1, size=1024).source_size(64, 64) == (64, 64)


def test_noise_of_twice_the_size_is_white_and_averages_to_the_noise() -> None:
    noise = randn(2, 4, 48, 64)
    doubled = doubled_noise(noise)
    assert doubled.shape == (2, 4, 96, 128)
    torch.testing.assert_close(F.avg_pool2d(doubled, 2), noise / 2)
    torch.testing.assert_close(doubled.square().mean((2, 3)), noise.square().mean((2, 3)))
    assert float(doubled.std()) == pytest.approx(1, abs=0.02)
    # No point knows its neighbours, or another channel's noise at the same point.
    spectrum = torch.fft.fft2(doubled).abs().square().mean((0, 1)) / doubled[0, 0].numel()
    quarters = F.avg_pool2d(spectrum[None, None], (24, 32))
    torch.testing.assert_close(quarters, torch.ones_like(quarters), atol=0.12, rtol=0)
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0)):
        moved = doubled.roll((down, across), (-2, -1))
        assert abs(float((moved * doubled).mean())) < 0.02
    channels = doubled.transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels @ channels.T / channels.shape[1], torch.eye(4), atol=0.03, rtol=0)


@pytest.mark.parametrize(("noise", "growth"), [("averaged", 2), ("unit", 1)])
def test_the_enlarged_state_has_the_noise_that_its_sigma_says(noise: str, growth: int) -> None:
    clean, sigma = torch.zeros(2, 4, 32, 32), torch.tensor([0.5, 9.0])
    levels = sigma[:, None, None, None]
    drawn = randn(2, 4, 32, 32)
    bridge = ResolutionBridge(128, 192, noise, smallest=96)  # type: ignore[arg-type]
    x, level, crossing = bridge.to_source(clean + levels * drawn, sigma, clean)
    torch.testing.assert_close(level, growth * sigma)
    torch.testing.assert_close(x.std((1, 2, 3)), level, rtol=0.05, atol=0)
    # The source's picture, averaged, is the target's.
    torch.testing.assert_close(F.avg_pool2d(x, 2), growth / 2 * levels * drawn)
    delta = randn(*x.shape, seed=2)
    torch.testing.assert_close(bridge.delta_to_target(delta, crossing), F.avg_pool2d(delta, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("source", "target"), [(Family.SDXL, Family.SD1), (Family.SD3, Family.SD2)])
def test_an_enlarging_bridge_carries_states_and_deltas(source: Family, target: Family, form: str) -> None:
    bridge = choose_bridge(source, target, 14.6, form=form)
    clean, sigma = randn(2, target.latent_channels, 11, 14), torch.tensor([0.5, 9.0])
    x = clean + sigma[:, None, None, None] * randn(2, target.latent_channels, 11, 14, seed=1)
    x_s, level, crossing = bridge.to_source(x, sigma, clean)
    assert x_s.shape == (2, source.latent_channels, 22, 28)
    torch.testing.assert_close(level, torch.tensor([1.0, 14.6]))  # twice the target's, up to the source's largest
    noise = (x_s - crossing.denoised) / level[:, None, None, None]
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    delta = 0.3 * randn(*x_s.shape, seed=2)
    carried = bridge.delta_to_target(delta, crossing)
    assert carried.shape == clean.shape and float(carried.std()) > 0.01
    assert not bridge.delta_to_target(torch.zeros_like(delta), crossing).any()


@pytest.mark.parametrize("space", ["sdxl", "sd3", "flux1"])
def test_the_state_at_twice_the_size_is_a_filter_and_a_pixel_shuffle(space: str) -> None:
    state = load_bridge(WEIGHTS / f"{space}-sd1.safetensors").state
    weight, bias = state.doubling.weight, state.doubling.bias  # type: ignore[attr-defined]
    z = randn(1, 4, 6, 9)
    points = F.conv2d(F.pad(z, (1,) * 4, mode="replicate"), weight, bias).unflatten(1, (-1, 2, 2))
    expected = points.permute(0, 1, 4, 2, 5, 3).reshape(1, -1, 12, 18)
    torch.testing.assert_close(state(z, (12, 18)), expected)
    # Its averages are nearly what the map of the same size gives.
    smooth = F.interpolate(randn(1, 4, 3, 3), (24, 24), mode="bilinear", align_corners=False)
    same, averaged = state(smooth), F.avg_pool2d(state(smooth, (48, 48)), 2)
    assert float(F.cosine_similarity(same.flatten(), averaged.flatten(), 0)) > 0.95


def test_a_state_without_a_filter_for_twice_the_size_is_enlarged() -> None:
    state = load_bridge(WEIGHTS / "sdxl-flux1.safetensors").state
    z = randn(1, 16, 6, 8)
    expected = F.interpolate(state(z), (12, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(state(z, (12, 16)), expected)


def test_each_enlarged_delta_crosses_by_its_image() -> None:
    bridge: Bridge = choose_bridge(Family.SDXL, Family.SD1)
    clean = randn(3, 4, 8, 8)
    x_s, _, crossing = bridge.to_source(clean + randn(3, 4, 8, 8, seed=1), torch.ones(3), clean)
    together = bridge.delta_to_target(x_s, crossing)
    alone = bridge.delta_to_target(x_s[1:2], crossing.of(torch.tensor([1])))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_a_smallest_size_whose_double_is_too_large_is_refused() -> None:
    with pytest.raises(SettingError, match="smallest"):
        ResolutionBridge(64, 96, smallest=64)
