"""A step of the engine on a device: nothing is brought there, nothing is waited for, nothing is computed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_delta.adapters.attach import attach
from lib_delta.bridges import (
    Bridge,
    Composed,
    IdentityBridge,
    NoiseLimitBridge,
    ResolutionBridge,
    ScaleBridge,
    choose_bridge,
)
from lib_delta.bridges.latent_maps import solve_positive_definite
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import ControlNetGuide, FeatureGuide, ImageGuide
from lib_delta.core.delta_reuse import DeltaReuse, ReusePlan
from lib_delta.core.guidance import DeltaGuidance
from lib_delta.core.guides import Guide
from lib_delta.core.source import Source
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.models.controlnet import ControlNet, T2IAdapter, T2IConfig
from lib_delta.models.ip_adapter import IPAdapter, TokenProjection, cross_attentions
from lib_delta.models.token_merging import TokenMerging
from lib_delta.models.unet import CrossAttention, UNet, merge_tokens
from tests.support.counting import EPS, TOLD, counted, lora
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.tiny_unet import randn, tiny_unet

PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
HINTS = (3, 16, 16, 32, 32, 96, 96, 256, 32)
LEVELS = (9.0, 4.0, 2.0, 1.0, 0.5)


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for weight in module.requires_grad_(False).eval().parameters():
        weight.normal_(std=0.1, generator=generator)
    return module


def control_net(unet: UNet, mode: str = "balanced") -> ControlNetGuide:
    return ControlNetGuide(randomized(ControlNet(unet.config, HINTS)), ControlMap(PICTURE), 0.7, mode)  # type: ignore[arg-type]


def features(unet: UNet, mode: str = "control") -> FeatureGuide:
    return FeatureGuide(
        randomized(T2IAdapter(T2IConfig(3, (32, 64), 1, 8, (1,)))), unet, ControlMap(PICTURE), 0.7, mode
    )  # type: ignore[arg-type]


def picture_prompt(unet: UNet) -> ImageGuide:
    widths = [layer.to_k.weight.shape[0] for _, layer in cross_attentions(unet)]
    model = randomized(IPAdapter(TokenProjection(40, 16, 4), 16, widths))
    return ImageGuide(model, unet, (randn(4, 16, seed=1), randn(4, 16, seed=2)))


GUIDES: dict[str, Callable[[UNet], Guide]] = {
    "ControlNet": control_net,
    "ControlNet, of prompts alone": lambda unet: control_net(unet, "control"),
    "T2I-Adapter": features,
    "IP-Adapter": picture_prompt,
}


def steps(guidance: DeltaGuidance, channels: int, size: int, transfers: Counter[str]) -> list[Counter[str]]:
    """Return what each step of a run on the device transfers."""
    found = []
    x = (9 * randn(1, channels, size, size)).to(DEVICE)
    for number, level in enumerate(LEVELS):
        sigma = torch.tensor([level]).to(DEVICE)
        step = DenoiseStep(x, sigma, 0.9 * x, 3.0, number / 4, number, levels=len(LEVELS))
        before = Counter(transfers)
        changes = guidance.changes(step)
        found.append(transfers - before)
        assert changes is not None and changes.guided.device == DEVICE
    return found


def guided(unet: UNet, bridge: Bridge, guides: list[Guide], plan: ReusePlan) -> DeltaGuidance:
    return DeltaGuidance(Strength(), bridge, Source(unet, EPS, TOLD, guides=guides), DeltaReuse(plan), checked=False)


@pytest.mark.parametrize("name", GUIDES)
def test_controls_bring_nothing_to_a_step_and_wait_for_nothing(name: str) -> None:
    unet = tiny_unet()
    guide = GUIDES[name](unet)
    with stand_in_device() as transfers:
        unet.to(DEVICE)
        guide.model.to(DEVICE)  # type: ignore[attr-defined]
        found = steps(guided(unet, IdentityBridge(), [guide], ReusePlan()), 4, 8, transfers)
    assert found[0]["to the device"] > 0 and not any(found[1:])


@pytest.mark.parametrize(
    ("bridge", "channels", "size"),
    [
        (ScaleBridge(1.4), 4, 8),
        (ResolutionBridge(8, 8), 4, 16),
        (ResolutionBridge(8, 8, "unit", tiled=True), 4, 24),
        (Composed((NoiseLimitBridge(5.0), ResolutionBridge(8, 8))), 4, 16),
        (choose_bridge(Family.SD1, Family.SDXL, 5.0), 4, 8),
        (choose_bridge(Family.SD1, Family.SDXL, size=64), 4, 16),
        (choose_bridge(Family.SD1, Family.SDXL, form="learned"), 4, 8),
        (choose_bridge(Family.SD1, Family.SDXL, size=64), 4, 24),
        (choose_bridge(Family.SD1, Family.SD3), 16, 8),
        (choose_bridge(Family.SDXL, Family.SD1, 5.0), 4, 8),
        (choose_bridge(Family.SD1, Family.FLUX, tiled=True), 16, 8),
    ],
)
@pytest.mark.parametrize("plan", [ReusePlan(), ReusePlan(2, linear=True)])
def test_bridges_bring_nothing_to_a_step_and_wait_for_nothing(
    bridge: Bridge, channels: int, size: int, plan: ReusePlan
) -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], "bypass")
    with stand_in_device() as transfers:
        unet.to(DEVICE)
        found = steps(guided(unet, bridge, [], plan), channels, size, transfers)
        to_cpu(bridge)
    assert found[0]["to the device"] > 0 and not any(found[1:])


def test_token_merging_brings_nothing_to_a_step_and_waits_for_nothing() -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], "bypass")
    merge_tokens(unet, TokenMerging(0.5))
    with stand_in_device() as transfers:
        unet.to(DEVICE)
        found = steps(guided(unet, IdentityBridge(), [], ReusePlan()), 4, 8, transfers)
    assert found[0]["to the device"] > 0 and not any(found[1:])


def to_cpu(bridge: Bridge) -> None:
    """Have a learned bridge, which is kept for the process's life, where it was."""
    for part in getattr(bridge, "bridges", (bridge,)):
        for name in ("state", "difference", "stitched"):
            if hasattr(part, name):
                getattr(part, name).to(torch.device("cpu"))


def test_a_controlnet_knows_its_prompts_keys_and_values_from_step_to_step() -> None:
    unet = tiny_unet()
    guide = control_net(unet)
    source = Source(unet, EPS, TOLD, guides=[guide])
    x, sigma = randn(1, 4, 8, 8), torch.tensor([2.0])
    first = source.delta(SourceStep(x, sigma, 3.0))
    with counted(guide.model) as calls:  # type: ignore[arg-type]
        again = source.delta(SourceStep(x, sigma, 3.0, step=1))
    assert torch.equal(first, again) and first.any()
    assert any(".attn2.to_q" in path for path in calls)
    assert not [path for path in calls if ".attn2.to_k" in path or ".attn2.to_v" in path]


def test_a_step_embeds_its_time_once() -> None:
    """For both branches, and for cond and uncond: once for each image."""
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)])
    unet.time_embed["0"].adaptation = unet.time_embed["2"].adaptation = None
    source = Source(unet, EPS, TOLD)
    with counted(unet) as calls:
        source.delta(SourceStep(randn(2, 4, 8, 8), torch.tensor([2.0, 2.0]), 3.0))
    assert calls["time_embed.0"] == [(1, 2, 32)] and calls["time_embed.2"] == [(1, 2, 128)]


def attentions(model: nn.Module) -> list[CrossAttention]:
    return [module for module in model.modules() if isinstance(module, CrossAttention)]


def test_only_what_attends_to_the_prompt_is_known() -> None:
    """Half of the attentions attend to pixels, which are others in each step."""
    unet = tiny_unet()
    source = Source(unet, EPS, TOLD)
    for _ in range(2):
        source.denoised(SourceStep(randn(1, 4, 8, 8), torch.tensor([2.0]), 3.0))
    ((_, joined),) = source._joined
    (placed,) = joined.by_device.values()
    assert placed.text.known is not None and len(placed.text.known) == len(attentions(unet)) / 2


@pytest.mark.parametrize("count", [1, 8, 32])
def test_what_is_solved_on_the_device_is_what_a_solver_finds(count: int) -> None:
    factors = randn(2, 3 * count, count, seed=count)
    matrix = factors.transpose(1, 2) @ factors / count + 0.01 * torch.eye(count)
    right = randn(2, count, 4, seed=1)
    torch.testing.assert_close(
        solve_positive_definite(matrix, right), torch.linalg.solve(matrix, right), rtol=1e-4, atol=1e-4
    )
