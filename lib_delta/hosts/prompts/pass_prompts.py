"""The side model's prompts for each pass, in the form that the WebUI's prompt code takes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modules import extra_networks, sd_samplers, shared

from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import MAIN_PROMPT

Texts = Sequence[str]


@dataclass(frozen=True)
class PassPrompts:
    """Prompts of one pass, one for each image, without extra-network tags.

    ``size`` is the height and width of the source's image in pixels, which only SDXL is conditioned on.
    """

    prompts: Texts
    negative: Texts
    steps: int
    hires_steps: int | None
    size: tuple[int, int] | None = None


def prompts_per_pass(p: Any, requests: Passes) -> list[tuple[bool, PassPrompts]]:
    """Return, for each pass, whether it is the hires pass, and its prompts."""
    config = sd_samplers.find_sampler_config(p.sampler_name)
    steps = config.total_steps(p.steps) if config else p.steps
    passes = [(False, _pass_prompts(requests.first, p.prompts, p.negative_prompts, steps=steps, hires_steps=None))]
    if getattr(p, "enable_hr", False):
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        hires_steps = p.hr_second_pass_steps or p.steps
        if config:
            hires_steps = config.total_steps(hires_steps)
        hires = _pass_prompts(requests.hires, p.hr_prompts, p.hr_negative_prompts, steps=steps, hires_steps=hires_steps)
        passes.append((True, hires))
    return passes


def _pass_prompts(
    request: Request, prompts: Texts, negative: Texts, *, steps: int, hires_steps: int | None
) -> PassPrompts:
    count = len(prompts)
    return PassPrompts(
        without_networks(side_prompts(request.prompt, prompts) or prompts, count),
        without_networks(side_prompts(request.negative_prompt, negative) or negative, count),
        steps,
        hires_steps,
    )


def side_prompts(prompt: str, main: Texts) -> Texts:
    """Return the side model's prompt for each image, with the main prompt inserted; empty if ``prompt`` is."""
    template = without_comments(prompt)
    return [template.replace(MAIN_PROMPT, text) for text in main] if template else ()


def without_comments(prompt: str) -> str:
    """Remove comments if the WebUI's settings do so for its prompts."""
    try:
        module = importlib.import_module("modules.processing_scripts.comments")
    except ImportError:  # an older WebUI has no comments
        return prompt
    return str(module.strip_comments(prompt)) if getattr(shared.opts, "enable_prompt_comments", False) else prompt


def without_networks(prompts: Texts, count: int) -> Texts:
    """Return ``count`` prompts without extra-network tags; a single prompt applies to all images."""
    plain: list[str] = extra_networks.parse_prompts(list(prompts))[0]
    return plain * count if len(plain) < count else plain
