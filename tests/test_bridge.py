"""Bridges carry the target's state to the source and the delta back."""

from __future__ import annotations

import pytest
import torch
from conftest import randn

from lib_delta.bridge import Composed, IdentityBridge, NoiseLimitBridge, ScaleBridge, choose
from lib_delta.errors import SettingError
from lib_delta.families import Family

CLEAN, NOISE = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
SIGMA = torch.tensor([0.5, 9.0])
S = SIGMA[:, None, None, None]
X = CLEAN + S * NOISE
K = 0.18215 / 0.13025


def test_models_of_one_latent_share_everything() -> None:
    x, sigma, crossing = IdentityBridge().to_source(X, SIGMA, CLEAN)
    assert x is X
    assert sigma is SIGMA
    assert IdentityBridge().delta_to_target(NOISE, crossing) is NOISE


def test_the_same_snr_form_scales_the_whole_state() -> None:
    x, sigma, _ = ScaleBridge(K).to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(x, K * CLEAN + K * S * NOISE)
    torch.testing.assert_close(sigma, K * SIGMA)


def test_the_published_form_keeps_the_noise_level() -> None:
    x, sigma, _ = ScaleBridge(K, "published").to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(x, K * CLEAN + S * NOISE, atol=1e-5, rtol=1e-5)
    assert torch.equal(sigma, SIGMA)


@pytest.mark.parametrize("form", ["same_snr", "published"])
def test_a_change_of_the_clean_part_comes_back_as_itself(form: str) -> None:
    bridge = ScaleBridge(K, form)
    _, _, crossing = bridge.to_source(X, SIGMA, CLEAN)
    _, _, changed = bridge.to_source(X, SIGMA, CLEAN + 0.1 * NOISE)
    back = bridge.delta_to_target(changed.denoised - crossing.denoised, crossing)
    torch.testing.assert_close(back, 0.1 * NOISE, atol=1e-5, rtol=1e-5)


def test_noise_beyond_the_sources_schedule_is_shown_at_its_limit() -> None:
    sigma = torch.tensor([4518.0, 3.0])
    x = CLEAN + sigma[:, None, None, None] * NOISE
    x_source, limited, _ = NoiseLimitBridge(14.6).to_source(x, sigma, CLEAN)
    torch.testing.assert_close(limited, torch.tensor([14.6, 3.0]))
    torch.testing.assert_close(x_source[0], (CLEAN + 14.6 * NOISE)[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(x_source[1], x[1])


def test_bridges_compose_in_order() -> None:
    halves = Composed((ScaleBridge(2.0), ScaleBridge(K / 2, "published")))
    x, sigma, crossing = halves.to_source(X, SIGMA, CLEAN)
    torch.testing.assert_close(sigma, 2 * SIGMA)
    torch.testing.assert_close(x, K * CLEAN + 2 * S * NOISE, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(crossing.denoised, K * CLEAN)
    torch.testing.assert_close(halves.delta_to_target(K * NOISE, crossing), NOISE)


def test_the_two_families_choose_the_bridge() -> None:
    assert choose(Family.SD1, Family.SD2) == IdentityBridge()
    assert choose(Family.SDXL, Family.SDXL) == IdentityBridge()
    assert choose(Family.SD1, Family.SDXL) == ScaleBridge(K)
    assert choose(Family.SDXL, Family.SD2, form="published") == ScaleBridge(1 / K, "published")
    assert choose(Family.SD1, Family.SDXL, sigma_max=14.6) == Composed((NoiseLimitBridge(14.6), ScaleBridge(K)))


def test_latents_of_unknown_relation_are_refused() -> None:
    with pytest.raises(SettingError, match=r"SD 1\.x source to a SD 3 target"):
        choose(Family.SD1, Family.SD3)


@pytest.mark.parametrize("settings", [{"k": 0.0}, {"k": float("nan")}, {"k": 1.0, "form": "other"}])
def test_a_scale_bridge_with_wrong_settings_is_refused(settings: dict) -> None:
    with pytest.raises(SettingError, match="scale bridge"):
        ScaleBridge(**settings)
