"""Held deltas: when the source is asked, by noise levels alone, and how near what is held stays to the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_delta.bridges import IdentityBridge
from lib_delta.core.delta_reuse import REUSE_PLANS, DeltaReuse, ReusePlan, StepState, reuse_plan
from lib_delta.core.deltas import Deltas, PromptParts
from lib_delta.core.guidance import DeltaDenoiser, DeltaGuidance
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.errors import SettingError
from tests.support import samplers
from tests.support.samplers import ADAPTED, BASE, TARGET, k_diffusion_samplers, run
from tests.support.tiny_unet import randn

LEVELS = 20
SIGMAS = torch.cat((torch.linspace(14.0 ** (1 / 7), 0.1 ** (1 / 7), LEVELS) ** 7, torch.zeros(1)))


@pytest.fixture(autouse=True)
def _as_many_steps_as_users_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "SIGMAS", SIGMAS)


class WatchedSource:
    """Two closed-form models, and the noise levels at which they were asked."""

    def __init__(self, told: Callable[[int], object] = lambda step: None) -> None:
        self.asked: list[float] = []
        self._told = told

    def conditioning_at(self, step: int) -> tuple[object, ...]:
        return (self._told(step),)

    def at_progress(self, progress: float) -> WatchedSource:
        return self

    def deltas(self, step: SourceStep) -> Deltas:
        self.asked.append(float(step.sigma.max()))
        delta = ADAPTED(step.x, step.sigma) - BASE(step.x, step.sigma)
        return Deltas(delta, delta)


def sampled(name: str, plan: ReusePlan | None) -> tuple[Tensor, list[float], int]:
    source, calls = WatchedSource(), []
    guidance = DeltaGuidance(Strength(1.0), IdentityBridge(), source, None if plan is None else DeltaReuse(plan))

    def target(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma.max()))
        return TARGET(x, sigma)

    picture = run(name, DeltaDenoiser(target, guidance, SIGMAS))
    return picture, source.asked, len(calls)


@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_exact_is_what_it_was_bit_for_bit(name: str) -> None:
    plain, asked, calls = sampled(name, None)
    exact, again, _ = sampled(name, REUSE_PLANS["exact"])
    assert torch.equal(plain, exact) and asked == again and len(asked) == calls


@pytest.mark.parametrize("quality", ["balanced", "fast"])
@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_every_sampler_saves_and_keeps_most_of_the_effect(name: str, quality: str) -> None:
    plan = REUSE_PLANS[quality]
    exact, _, calls = sampled(name, None)
    held, asked, _ = sampled(name, plan)
    plain = run(name, TARGET)
    # DPM fast takes seven steps of its own, each of several of the run's levels: there is nothing to save.
    assert 0 < len(asked) <= calls and (len(asked) < calls or name == "dpm_fast")
    distance = (held - exact).norm() / (exact - plain).norm()
    assert distance < {"balanced": 0.35, "fast": 0.5}[quality]


@pytest.mark.parametrize(
    "name", sorted({"euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral"} & {*k_diffusion_samplers()})
)
def test_one_evaluation_serves_the_levels_of_the_plan_however_often_a_sampler_calls(name: str) -> None:
    _, asked, _ = sampled(name, ReusePlan(2))
    assert len(asked) == math.ceil(LEVELS / 2)


def moments(progress: list[float], told: tuple[object, ...] = ()) -> list[StepState]:
    sigmas = [14.0 * math.exp(-5 * p) for p in progress]
    return [StepState(torch.tensor([s, s]), s + randn(2, 4, 4, 4), p, 21, told) for p, s in zip(progress, sigmas)]


def evaluated(plan: ReusePlan, asked: list[StepState]) -> list[bool]:
    """Tell for each moment whether the source was asked."""
    hold, answers = DeltaReuse(plan), []
    for moment in asked:
        calls: list[int] = []

        def evaluate(calls: list[int] = calls) -> Deltas:
            calls.append(1)
            return Deltas(randn(2, 4, 4, 4), randn(2, 4, 4, 4))

        hold.deltas(evaluate, moment)
        answers.append(bool(calls))
    return answers


def test_what_decides_is_the_noise_level_and_no_count() -> None:
    there = [0.0, 0.05, 0.1, 0.15]
    asked = evaluated(ReusePlan(2), moments([p for p in there for _ in range(3)]))
    assert asked == [p in (0.0, 0.1) and i == 0 for p in there for i in range(3)]


def test_going_back_asks_again() -> None:
    assert evaluated(ReusePlan(2), moments([0.0, 0.05, 0.1, 0.0])) == [True, False, True, True]


def test_a_change_of_what_the_delta_is_of_asks_again() -> None:
    prompt, other = object(), object()
    asked = [*moments([0.0, 0.05], (prompt, 7.0)), *moments([0.05], (other, 7.0)), *moments([0.05], (other, 1.0))]
    assert evaluated(ReusePlan(4), asked) == [True, False, True, True]


def test_an_unknown_number_of_levels_asks_always() -> None:
    assert all(evaluated(ReusePlan(4), [replace(m, levels=0) for m in moments([0.0, 0.01, 0.02])]))


def test_an_estimate_that_moved_asks_again() -> None:
    sizes = zip(moments([0, 0.5, 1.0]), (1, 1.1, 1.3))
    first, second, third = (replace(m, denoised=size * torch.ones(2, 4, 4, 4)) for m, size in sizes)
    assert evaluated(ReusePlan(moved=0.2), [first, second, third]) == [True, False, True]
    assert evaluated(ReusePlan(moved=0.2), [second, replace(first, denoised=second.denoised)]) == [True, True]


@pytest.mark.parametrize("linear", [False, True])
def test_a_change_of_v_that_is_constant_or_linear_in_log_sigma_is_held_exactly(linear: bool) -> None:
    change, slope = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2) * linear

    def truth(sigma: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        return (change + slope * s.log()) * s / (s**2 + 1) ** 0.5

    hold, answers = DeltaReuse(ReusePlan(2, linear)), []
    for moment in moments([0.0, 0.05, 0.1, 0.15, 0.2, 0.25]):
        moment = replace(moment, sigma=moment.sigma * torch.tensor([1.0, 1.5]))

        def evaluate(m: StepState = moment) -> Deltas:
            true = truth(m.sigma)
            return Deltas(
                true, 3 * true, PromptParts(2 * true[[0, 1, 1]], ((1.0,), (0.5, 0.5)), torch.tensor([0, 1, 1]))
            )

        answers.append((hold.deltas(evaluate, moment), truth(moment.sigma)))
    for deltas, true in answers[2:]:
        torch.testing.assert_close(deltas.guided, true, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deltas.uncond, 3 * true, rtol=1e-4, atol=3e-4)
        assert deltas.parts is not None and deltas.parts.weights == ((1.0,), (0.5, 0.5))
        torch.testing.assert_close(deltas.parts.change, 2 * true[[0, 1, 1]], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("sigma", "share"), [(7.5, 0.2892), (1.0, 1.0), (8.5, 0.0)])
def test_what_goes_on_linearly_goes_neither_further_than_it_came_nor_back(sigma: float, share: float) -> None:
    before, last = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2)
    hold = DeltaReuse(ReusePlan(linear=True, moved=0.2))

    def at(level: float, change: Tensor, size: float) -> Tensor:
        scaled = change * level / (level**2 + 1) ** 0.5
        (moment,) = moments([0.5])
        moment = replace(moment, sigma=torch.full((2,), level), denoised=size * torch.ones(2, 4, 4, 4))
        return hold.deltas(lambda: Deltas(scaled, scaled), replace(moment, progress=1 / level)).guided

    at(10.0, before, 1.0)
    at(8.0, last, 2.0)
    held = at(sigma, torch.full_like(last, torch.nan), 2.0)
    expected = (last + share * (last - before)) * sigma / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(held, expected, rtol=1e-3, atol=1e-4)


def test_levels_that_a_bridge_has_made_equal_are_no_division_by_zero() -> None:
    hold = DeltaReuse(ReusePlan(2, linear=True))
    for moment in moments([0.0, 0.1, 0.15]):
        same = replace(moment, sigma=torch.tensor([14.0, 14.0]))
        assert hold.deltas(lambda: Deltas(*(randn(2, 4, 4, 4),) * 2), same).guided.isfinite().all()


def test_prompts_that_change_in_mid_run_force_an_evaluation() -> None:
    prompts = object(), object()
    source = WatchedSource(lambda step: prompts[step >= 3])
    guidance = DeltaGuidance(Strength(1.0), IdentityBridge(), source, DeltaReuse(ReusePlan(100)))
    x = 14 * randn(1, 4, 8, 8)
    for step, sigma in enumerate(SIGMAS[:-1]):
        guidance.changes(DenoiseStep(x, sigma[None], x / 2, 3.0, step / (LEVELS - 1), step, levels=LEVELS))
    assert source.asked == [float(SIGMAS[0]), float(SIGMAS[3])]


@pytest.mark.parametrize("plan", [{"every": 0.5}, {"every": math.nan}, {"moved": 0.0}])
def test_plans_that_cannot_be_are_refused(plan: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="quality"):
        ReusePlan(**plan)


@pytest.mark.parametrize(
    ("details", "plan"),
    [
        (("exact",), ReusePlan()),
        (("balanced",), ReusePlan(2, linear=True)),
        (("balanced", 3.0), ReusePlan(3, linear=True)),
        (("balanced", 3.0, "held"), ReusePlan(3)),
        (("exact", 4.0, "linear"), ReusePlan(4, linear=True)),
        (("exact", 0.0, "automatic", 0.2), ReusePlan(moved=0.2)),
    ],
)
def test_details_take_the_place_of_what_a_quality_says(details: tuple[Any, ...], plan: ReusePlan) -> None:
    assert reuse_plan(*details) == plan
