"""Timesteps, noise levels and denoised estimates equal those of k-diffusion and diffusers."""

from __future__ import annotations

import pytest
import torch

from lib_delta.diffusion.parameterization import (
    FLOW_SIGMA_MAX,
    Parameterization,
    Schedule,
    denoised_of,
    denoiser,
    eps_of,
    from_flow_space,
    from_timestep_space,
    to_timestep_space,
)
from lib_delta.errors import SettingError
from tests.support.tiny_unet import randn

SD = Schedule.stable_diffusion()
SIGMAS = torch.tensor([0.001, 0.0291671, 0.03, 0.5, 1.0, 2.7, 9.0, 14.6146, 20.7])


def network(x: torch.Tensor, t: torch.Tensor, cond: None = None) -> torch.Tensor:
    """A closed-form model that depends on x and on the timestep."""
    return torch.tanh(x + torch.cos(t / 100)[:, None, None, None])


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("prediction", "wrapper"), [("eps", "CompVisDenoiser"), ("v", "CompVisVDenoiser")])
def test_timestep_and_denoised_equal_k_diffusion(prediction: str, wrapper: str, quantize: bool) -> None:
    external = pytest.importorskip("k_diffusion.external")

    class Model(torch.nn.Module):
        alphas_cumprod = SD.alphas_cumprod.float()
        apply_model = staticmethod(network)

    theirs = getattr(external, wrapper)(Model(), quantize=quantize)
    x = randn(len(SIGMAS), 4, 8, 8) * (SIGMAS**2 + 1)[:, None, None, None] ** 0.5
    t = SD.sigma_to_t(SIGMAS, quantize)
    torch.testing.assert_close(t.float(), theirs.sigma_to_t(SIGMAS).float(), atol=2e-3, rtol=0)
    ours = denoiser(network, Parameterization(prediction, SD), quantize)
    torch.testing.assert_close(ours(x, SIGMAS), theirs(x, SIGMAS, cond=None), atol=1e-4, rtol=1e-5)


def test_noise_levels_equal_k_diffusion() -> None:
    external = pytest.importorskip("k_diffusion.external")
    theirs = external.DiscreteSchedule(((1 - SD.alphas_cumprod) / SD.alphas_cumprod).sqrt().float(), quantize=False)
    t = torch.linspace(0, 999, 777)
    torch.testing.assert_close(SD.t_to_sigma(t), theirs.t_to_sigma(t), rtol=1e-5, atol=0)
    assert SD.sigma_max == pytest.approx(float(theirs.sigma_max), rel=1e-5)
    assert SD.sigma_min == pytest.approx(float(theirs.sigma_min), rel=1e-5)


def test_schedule_equals_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(SD.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)


def test_zero_terminal_snr_rescale_equals_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    theirs = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    ours = Schedule.stable_diffusion(zero_terminal_snr=True)
    # The last level is 0 by the paper, which has no sigma; it is the one value that differs.
    torch.testing.assert_close(ours.alphas_cumprod[:-1], theirs[:-1], rtol=1e-9, atol=0)
    assert theirs[-1] == 0
    assert ours.sigma_max == pytest.approx(4518.76, rel=1e-5)


def test_timesteps_survive_the_way_over_sigma() -> None:
    t = torch.linspace(0, 999, 500)
    torch.testing.assert_close(SD.sigma_to_t(SD.t_to_sigma(t)), t, atol=2e-3, rtol=0)
    whole = torch.arange(1000)
    assert torch.equal(SD.sigma_to_t(SD.t_to_sigma(whole), quantize=True), whole)


def test_noise_outside_the_schedule_is_asked_at_its_ends() -> None:
    assert SD.sigma_to_t(torch.tensor([0.0, 1e-4, 20.7, 4518.0])).tolist() == [0, 0, 999, 999]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_output_and_denoised_are_inverse(prediction: str) -> None:
    parameterization = Parameterization(prediction)
    sigma = torch.tensor([0.05, 1.0, 14.0], dtype=torch.float64)
    x, output = randn(3, 4, 8, 8).double(), randn(3, 4, 8, 8, seed=1).double()
    denoised = parameterization.denoised(output, x, sigma)
    torch.testing.assert_close(parameterization.output_of(denoised, x, sigma), output, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_a_perfect_model_denoises_perfectly(prediction: str) -> None:
    x0, noise = randn(3, 4, 8, 8).double(), randn(3, 4, 8, 8, seed=1).double()
    sigma = torch.tensor([0.05, 1.0, 14.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    alpha = 1 / (s**2 + 1) ** 0.5
    truth = {"eps": noise, "v": alpha * noise - alpha * s * x0, "flow": noise - x0}[prediction]
    got = Parameterization(prediction).denoised(truth, x0 + s * noise, sigma)
    torch.testing.assert_close(got, x0, atol=1e-9, rtol=1e-9)


def test_a_flow_model_sees_the_straight_path() -> None:
    x0, noise, time = randn(1, 4, 8, 8), randn(1, 4, 8, 8, seed=1), 0.3
    sigma = torch.tensor([time / (1 - time)])
    model_x, t = Parameterization("flow").model_input(x0 + sigma * noise, sigma)
    torch.testing.assert_close(model_x, (1 - time) * x0 + time * noise)
    torch.testing.assert_close(t, torch.tensor([1000 * time]))


def test_timestep_space_is_diffusers_own() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise, t = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([1, 400, 999])
    x, sigma = from_timestep_space(scheduler.add_noise(x0, noise, t), t, SD)
    torch.testing.assert_close(x, x0 + sigma[:, None, None, None] * noise, atol=1e-4, rtol=1e-4)


def test_timestep_space_and_back() -> None:
    x, t = randn(3, 4, 8, 8), torch.tensor([1.0, 400.5, 999.0])
    k_x, sigma = from_timestep_space(x, t, SD)
    torch.testing.assert_close(to_timestep_space(k_x, sigma), x)
    eps = randn(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(eps_of(denoised_of(eps, k_x, sigma), k_x, sigma), eps, atol=1e-4, rtol=1e-4)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(SettingError, match="eps, v, flow"):
        Parameterization("velocity")  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [[0.5], [1.0, 0.5], [0.9, 0.0], [0.9, float("nan")]])
def test_a_table_that_is_no_schedule_is_refused(values: list[float]) -> None:
    with pytest.raises(SettingError, match="alphas_cumprod"):
        Schedule(torch.tensor(values))


def test_the_state_of_a_flow_matching_model():
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t = torch.tensor([0.25, 0.9])
    x, sigma = from_flow_space((1 - t.view(-1, 1, 1, 1)) * clean + t.view(-1, 1, 1, 1) * noise, t, clean)
    assert torch.allclose(sigma, torch.tensor([1 / 3, 9.0]))
    assert torch.allclose(x, clean + sigma.view(-1, 1, 1, 1) * noise, atol=1e-5)


def test_at_the_start_of_flow_matching_the_noise_is_kept_within_a_limit():
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t = torch.tensor([1.0, 0.99999])
    x, sigma = from_flow_space((1 - t.view(-1, 1, 1, 1)) * clean + t.view(-1, 1, 1, 1) * noise, t, clean)
    assert sigma.tolist() == [FLOW_SIGMA_MAX] * 2
    assert torch.allclose((x - clean) / FLOW_SIGMA_MAX, noise, atol=1e-3)
