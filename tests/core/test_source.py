"""The forked pass gives what two separate models give, and exactly nothing where they are the same."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Parameterization, denoiser
from lib_delta.models.unet import UNet
from tests.support.tiny_unet import TINY, adapt, randn, tiny_unet

EPS = Parameterization("eps")
X, SIGMA = 5 * randn(2, 4, 8, 8), torch.tensor([0.7, 6.0])
BASE_TOLD = Conditioning(randn(1, 7, 16, seed=1), randn(1, 7, 16, seed=2))
ADAPTED_TOLD = Conditioning(randn(1, 7, 16, seed=3), randn(1, 7, 16, seed=4))


def changed(unet: UNet, part: str = "") -> dict[str, Tensor]:
    """New weights for the layers whose key contains ``part``."""
    weights = {name: w for name, w in unet.state_dict().items() if part in name}
    return {name: w + 0.1 * w.std() * randn(*w.shape, seed=9) for name, w in weights.items()}


def with_weights(unet: UNet, weights: Mapping[str, Tensor]) -> UNet:
    """A model of its own: the same but for the given weights."""
    other = deepcopy(unet)
    other.load_state_dict(weights, strict=False)
    return other


def separately(unet: UNet, told: Conditioning, cfg: float, parameterization: Parameterization = EPS) -> Tensor:
    """The textbook way: cond and uncond in passes of their own, one model."""

    def half(context: Tensor, label: Tensor | None) -> Tensor:
        def network(x: Tensor, t: Tensor) -> Tensor:
            rows = context.expand(len(x), -1, -1)[None]
            return unet(x[None], t, rows, None if label is None else label.expand(len(x), -1)[None])[0]

        return denoiser(network, parameterization)(X, SIGMA)

    cond, uncond = half(told.cond, told.cond_label), half(told.uncond, told.uncond_label)
    return uncond + cfg * (cond - uncond)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("cfg", [1.0, 7.5])
@pytest.mark.parametrize("part", ["", "attn2.to_k", "output_blocks.1", "out.2", "time_embed", "input_blocks.0"])
@pytest.mark.parametrize("told", [BASE_TOLD, ADAPTED_TOLD])
def test_one_forked_pass_equals_two_models(prediction: str, cfg: float, part: str, told: Conditioning) -> None:
    unet, parameterization = tiny_unet(), Parameterization(prediction)
    weights = changed(unet, part)
    adapted = with_weights(unet, weights)
    expected = separately(adapted, told, cfg, parameterization) - separately(unet, BASE_TOLD, cfg, parameterization)
    source = Source(adapt(unet, weights), parameterization, BASE_TOLD, told)
    assert (source.delta(SourceStep(X, SIGMA, cfg)) - expected).norm() < 1e-3 * expected.norm()
    assert source.evaluations == 1


def test_what_the_adapted_model_is_told_reaches_it_alone() -> None:
    """The published code drops the adapted model's own options, and the target's reach all three."""
    unet = tiny_unet()
    weights = changed(unet, "attn2")
    base, adapted = Source(adapt(unet, weights), EPS, BASE_TOLD, ADAPTED_TOLD).denoised(SourceStep(X, SIGMA, 3.0))
    plain = tiny_unet()
    torch.testing.assert_close(base, separately(plain, BASE_TOLD, 3.0), atol=1e-3, rtol=1e-4)
    alone = separately(with_weights(plain, weights), ADAPTED_TOLD, 3.0)
    torch.testing.assert_close(adapted, alone, atol=1e-3, rtol=1e-4)


def test_prompts_alone_make_a_delta() -> None:
    unet = tiny_unet()
    expected = separately(unet, ADAPTED_TOLD, 3.0) - separately(unet, BASE_TOLD, 3.0)
    source = Source(unet, EPS, BASE_TOLD, ADAPTED_TOLD)
    torch.testing.assert_close(source.delta(SourceStep(X, SIGMA, 3.0)), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cfg", [1.0, 7.5])
def test_nothing_changed_gives_exactly_nothing(cfg: float) -> None:
    same_words = Conditioning(BASE_TOLD.cond.clone(), BASE_TOLD.uncond.clone())
    for told in (None, BASE_TOLD, same_words):
        delta = Source(tiny_unet(), EPS, BASE_TOLD, told).delta(SourceStep(X, SIGMA, cfg))
        assert torch.equal(delta, torch.zeros_like(X))


def test_an_adaptation_on_the_very_same_base_gives_its_full_delta() -> None:
    """Base and adapted share one network object; the published code then gives 0."""
    unet = tiny_unet()
    before = {name: w.clone() for name, w in unet.state_dict().items()}
    weights = changed(unet, "attn1")
    full = separately(with_weights(unet, weights), BASE_TOLD, 1.0) - separately(unet, BASE_TOLD, 1.0)
    delta = Source(adapt(unet, weights), EPS, BASE_TOLD).delta(SourceStep(X, SIGMA, 1.0))
    assert full.norm() > 1
    assert (delta - full).norm() < 1e-4 * full.norm()
    assert all(torch.equal(w, before[name]) for name, w in unet.state_dict().items())


def test_without_guidance_the_negative_prompt_is_not_evaluated() -> None:
    silent = Conditioning(BASE_TOLD.cond, torch.full_like(BASE_TOLD.uncond, torch.nan))
    source = Source(adapt(unet := tiny_unet(), changed(unet, "out.2")), EPS, silent)
    assert source.delta(SourceStep(X, SIGMA, 1.0)).isfinite().all()
    assert source.delta(SourceStep(X, SIGMA, 2.0)).isnan().any()


def test_prompts_of_different_lengths_are_served_without_changing_the_result() -> None:
    unet = tiny_unet()
    longer = Conditioning(randn(1, 21, 16, seed=5), randn(1, 14, 16, seed=6))
    expected = separately(unet, longer, 4.0) - separately(unet, BASE_TOLD, 4.0)
    delta = Source(unet, EPS, BASE_TOLD, longer).delta(SourceStep(X, SIGMA, 4.0))
    torch.testing.assert_close(delta, expected, atol=1e-3, rtol=1e-3)


def test_every_image_of_a_batch_may_have_its_own_prompt() -> None:
    unet = tiny_unet()
    both = Conditioning(torch.cat((BASE_TOLD.cond, ADAPTED_TOLD.cond)), BASE_TOLD.uncond)
    delta = Source(unet, EPS, BASE_TOLD, both).delta(SourceStep(X, SIGMA, 4.0))
    assert delta[0].abs().max() < 1e-4
    one = Conditioning(ADAPTED_TOLD.cond, BASE_TOLD.uncond)
    expected = separately(unet, one, 4.0) - separately(unet, BASE_TOLD, 4.0)
    torch.testing.assert_close(delta[1], expected[1], atol=1e-3, rtol=1e-3)


def test_prompts_joined_by_and_are_weighted_against_the_negative_prompt() -> None:
    unet = tiny_unet()
    parts = [randn(1, 7, 16, seed=s) for s in (11, 12, 13)]
    # The first image has two prompts, the second one; the adapted model has as many of its own.
    told = Conditioning(torch.cat(parts), BASE_TOLD.uncond, weights=((1.0, -0.5), (0.8,)))
    other = Conditioning(torch.cat(parts[1:]), ADAPTED_TOLD.uncond, weights=((0.7,), (1.0,)))

    def by_hand(c: Conditioning, cfg: float) -> Tensor:
        rows = iter(c.cond.split(1))
        images = []
        for i, weights in enumerate(c.weights or ()):
            uncond = separately(unet, replace(c, cond=c.uncond, weights=None), 1.0)[i]
            parts = [w * (separately(unet, Conditioning(next(rows), c.uncond), 1.0)[i] - uncond) for w in weights]
            images.append(uncond + cfg * torch.stack(parts).sum(0))
        return torch.stack(images)

    for cfg in (1.0, 4.0):
        base, adapted = Source(unet, EPS, told, other).denoised(SourceStep(X, SIGMA, cfg))
        torch.testing.assert_close(base, by_hand(told, cfg), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(adapted, by_hand(other, cfg), atol=1e-3, rtol=1e-3)
    skipped = Source(unet, EPS, told).denoised(SourceStep(X, SIGMA, 4.0, uncond_skipped=True))[0]
    first = torch.cat((told.cond[:1], told.cond[2:]))
    rows = [separately(unet, Conditioning(first[i : i + 1], first[i : i + 1]), 1.0)[i] for i in (0, 1)]
    second = separately(unet, Conditioning(told.cond[1:2], first[:1]), 1.0)[0]
    expected = torch.stack((rows[0] - 0.5 * (second - rows[0]), rows[1]))
    torch.testing.assert_close(skipped, expected, atol=1e-3, rtol=1e-3)
    source = Source(unet, EPS, told)
    added = source.denoised(SourceStep(X, SIGMA, 4.0, uncond_skipped=True, uncond_zero=True))[0]
    expected = torch.stack((rows[0] - 0.5 * second, 0.8 * rows[1]))
    torch.testing.assert_close(added, expected, atol=1e-3, rtol=1e-3)
    assert not source.deltas(SourceStep(X, SIGMA, 4.0, uncond_skipped=True, uncond_zero=True))[1].any()


def test_each_part_of_and_has_a_delta_of_its_own() -> None:
    unet = tiny_unet()
    cond = torch.cat([randn(1, 7, 16, seed=s) for s in (11, 12, 13)])
    told = Conditioning(cond, BASE_TOLD.uncond, weights=((1.0, -0.5), (0.8,)))
    other = replace(told, cond=cond.flip(0), uncond=ADAPTED_TOLD.uncond)
    deltas = Source(unet, EPS, told, other).deltas(SourceStep(X, SIGMA, 4.0))
    assert deltas.parts is not None and deltas.parts.weights == told.weights
    images = (0, 0, 1)
    assert deltas.parts.images.tolist() == list(images)
    for part, image in enumerate(images):
        alone = [Conditioning(c.cond[part : part + 1], c.uncond) for c in (told, other)]
        expected = separately(unet, alone[1], 4.0) - separately(unet, alone[0], 4.0)
        torch.testing.assert_close(deltas.parts.change[part], expected[image], atol=1e-3, rtol=1e-3)
    assert (
        Source(unet, EPS, told, replace(other, weights=((1.0, -0.4), (0.8,)))).deltas(SourceStep(X, SIGMA, 4.0)).parts
        is None
    )
    assert Source(unet, EPS, told, ADAPTED_TOLD).deltas(SourceStep(X, SIGMA, 4.0)).parts is None
    assert Source(unet, EPS, BASE_TOLD, ADAPTED_TOLD).deltas(SourceStep(X, SIGMA, 4.0)).parts is None


def test_prompts_may_change_from_step_to_step() -> None:
    unet = tiny_unet()
    source = Source(unet, EPS, lambda step: BASE_TOLD, lambda step: BASE_TOLD if step < 2 else ADAPTED_TOLD)
    assert not source.delta(SourceStep(X, SIGMA, 4.0, step=1)).any()
    expected = Source(unet, EPS, BASE_TOLD, ADAPTED_TOLD).delta(SourceStep(X, SIGMA, 4.0))
    assert torch.equal(source.delta(SourceStep(X, SIGMA, 4.0, step=2)), expected)


def test_a_target_without_guidance_in_a_step_takes_the_source_along() -> None:
    source = Source(tiny_unet(), EPS, BASE_TOLD, ADAPTED_TOLD)
    assert torch.equal(
        source.delta(SourceStep(X, SIGMA, 7.0, uncond_skipped=True)), source.delta(SourceStep(X, SIGMA, 1.0))
    )


def test_the_delta_for_the_negative_prompt_alone() -> None:
    unet = tiny_unet()
    source = Source(unet, EPS, BASE_TOLD, ADAPTED_TOLD)
    guided, uncond, _ = source.deltas(SourceStep(X, SIGMA, 4.0))
    assert torch.equal(guided, source.delta(SourceStep(X, SIGMA, 4.0)))
    negative = [replace(told, cond=told.uncond) for told in (ADAPTED_TOLD, BASE_TOLD)]
    expected = separately(unet, negative[0], 1.0) - separately(unet, negative[1], 1.0)
    torch.testing.assert_close(uncond, expected, atol=1e-3, rtol=1e-3)
    guided, uncond, _ = source.deltas(SourceStep(X, SIGMA, 1.0))
    assert uncond is guided


def test_as_many_weights_as_rows_are_needed() -> None:
    with pytest.raises(ValueError, match="1 rows of cond need as many weights"):
        replace(BASE_TOLD, weights=((1.0, 1.0),))


def test_sdxl_labels_may_differ_between_base_and_adapted() -> None:
    unet = tiny_unet(replace(TINY, label_width=12))
    base = replace(BASE_TOLD, cond_label=randn(1, 12, seed=7), uncond_label=randn(1, 12, seed=8))
    adapted = replace(base, cond_label=randn(1, 12, seed=9))
    expected = separately(unet, adapted, 4.0) - separately(unet, base, 4.0)
    torch.testing.assert_close(
        Source(unet, EPS, base, adapted).delta(SourceStep(X, SIGMA, 4.0)), expected, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_delta_is_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    unet = tiny_unet()
    weights = changed(unet)
    expected = Source(adapt(unet, weights), EPS, BASE_TOLD).delta(SourceStep(X, SIGMA, 2.0))
    other = adapt(tiny_unet().to(dtype), {name: w.to(dtype) for name, w in weights.items()})
    delta = Source(other, EPS, BASE_TOLD).delta(SourceStep(X.half(), SIGMA, 2.0))
    assert delta.dtype == torch.float32
    assert (delta - expected).norm() < 0.2 * expected.norm()


def test_a_hosts_autocast_does_not_reach_the_source() -> None:
    unet = tiny_unet()
    source = Source(adapt(unet, changed(unet)), EPS, BASE_TOLD)
    outside = source.delta(SourceStep(X, SIGMA, 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(source.delta(SourceStep(X, SIGMA, 2.0)), outside)


def test_a_label_for_one_prompt_only_is_refused() -> None:
    with pytest.raises(ValueError, match="both the prompt and the negative prompt"):
        replace(BASE_TOLD, cond_label=randn(1, 12))
