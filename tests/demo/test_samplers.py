"""The demo's samplers solve what they claim to solve, and the judges judge what they claim to judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("k_diffusion")
pytest.importorskip("diffusers")

from demo import metrics, samplers
from lib_delta.diffusion.parameterization import Schedule
from lib_delta.errors import SettingError

SPREAD = 0.5
SCHEDULE = Schedule.stable_diffusion()
STOCHASTIC = {"euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "ddpm"}


def gaussian(x: Tensor, sigma: Tensor, **_: object) -> Tensor:
    """The exact denoiser of data that is normal with standard deviation SPREAD."""
    variance = SPREAD**2
    return x * variance / (variance + sigma.reshape(-1, 1, 1, 1) ** 2)


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", [n for n in samplers.NAMES if n not in STOCHASTIC])
def test_deterministic_samplers_follow_the_probability_flow_of_normal_data(name: str) -> None:
    steps = 60
    made = samplers.sample(name, gaussian, noise(), steps, SCHEDULE, seed=0)
    start = SCHEDULE.sigma_max
    # The flow's solution in closed form; samplers in timestep space start from noise of the whole variance.
    exact = noise() * SPREAD * start / (SPREAD**2 + start**2) ** 0.5
    if name in samplers.DIFFUSERS:
        exact = noise() * SPREAD
    # Rates of convergence differ: a first-order sampler is off by about the size of a step.
    assert (made - exact).norm() / exact.norm() < 0.06


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_samplers_make_data_of_the_right_spread_and_repeat_with_their_seed(name: str) -> None:
    x = noise(64)
    made = samplers.sample(name, gaussian, x, 250, SCHEDULE, seed=1)
    assert made.std() == pytest.approx(SPREAD, rel=0.06)
    assert torch.equal(made, samplers.sample(name, gaussian, x, 250, SCHEDULE, seed=1))
    assert not torch.allclose(made, samplers.sample(name, gaussian, x, 250, SCHEDULE, seed=2))


def test_gradient_estimation_with_gamma_1_is_euler() -> None:
    sigmas = samplers.noise_levels(8, SCHEDULE)
    x = noise() * sigmas[0]
    euler = samplers.denoise_from("euler", gaussian, x, sigmas, seed=0)
    torch.testing.assert_close(samplers.gradient_estimation(gaussian, x, sigmas, gamma=1.0), euler)


def test_the_levels_of_a_run_are_those_at_which_the_sampler_asks() -> None:
    for name in ("euler", "ddim", "unipc"):
        asked: list[float] = []

        def ask(x: Tensor, sigma: Tensor, asked: list[float] = asked, **_: object) -> Tensor:
            asked.append(float(sigma[0]))
            return gaussian(x, sigma)

        samplers.sample(name, ask, noise(), 7, SCHEDULE, seed=0)
        levels = samplers.run_levels(name, 7, SCHEDULE)
        assert levels[-1] == 0 and asked == pytest.approx(levels[:-1].tolist(), rel=1e-5)


def test_an_unknown_sampler_is_named_with_those_that_there_are() -> None:
    with pytest.raises(SettingError, match="euler.*not 'magic'"):
        samplers.sample("magic", gaussian, noise(), 2, SCHEDULE, seed=0)


def test_ink_is_1_for_black_and_white_and_less_for_any_colour() -> None:
    picture = torch.ones(1, 3, 8, 8)
    picture[..., :4] = -1
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert metrics.ink(picture) == 1
    assert metrics.ink(red) == pytest.approx(1 - (4 / 3) ** 0.5)


def test_diversity_is_the_difference_between_the_seeds_of_a_prompt() -> None:
    one = torch.zeros(3, 1, 3, 64, 64)
    assert metrics.diversity(torch.cat((one, one), 1)) == 0
    assert metrics.diversity(torch.cat((one, one + 0.5), 1)) == pytest.approx(0.5)
