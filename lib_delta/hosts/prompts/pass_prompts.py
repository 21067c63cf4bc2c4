"""What a generation tells its models: the prompts of each pass, as the WebUI's own prompt code takes them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modules import extra_networks, sd_samplers, shared

from lib_delta.request.passes import Passes
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import MAIN_PROMPT

if TYPE_CHECKING:
    pass

Texts = Sequence[str]


@dataclass(frozen=True)
class PassPrompts:
    """Prompts of one pass, a row for each image, without tags."""

    prompts: Texts
    negative: Texts
    steps: int
    hires_steps: int | None


def prompts_per_pass(p: Any, asked: Passes) -> list[tuple[bool, PassPrompts]]:
    """Return the prompts of the first pass and, if there is one, of the hires pass."""
    config = sd_samplers.find_sampler_config(p.sampler_name)
    steps = config.total_steps(p.steps) if config else p.steps
    passes = [(False, _pass_prompts(asked.first, p.prompts, p.negative_prompts, steps, None))]
    if getattr(p, "enable_hr", False):
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        wanted = p.hr_second_pass_steps or p.steps
        hires_steps = config.total_steps(wanted) if config else wanted
        passes.append((True, _pass_prompts(asked.hires, p.hr_prompts, p.hr_negative_prompts, steps, hires_steps)))
    return passes


def _pass_prompts(
    request: Request, prompts: Texts, negative: Texts, steps: int, hires_steps: int | None
) -> PassPrompts:
    count = len(prompts)
    return PassPrompts(
        without_networks(side_prompts(request.prompt, prompts) or prompts, count),
        without_networks(side_prompts(request.negative_prompt, negative) or negative, count),
        steps,
        hires_steps,
    )


def side_prompts(prompt: str, main: Texts) -> Texts:
    """Return what a prompt of the side model is for each image, whose main one may stand in it; nothing if empty."""
    own = without_comments(prompt)
    return [own.replace(MAIN_PROMPT, text) for text in main] if own else ()


def without_comments(prompt: str) -> str:
    """Take out comments, as the WebUI does in its own prompts where its settings say so."""
    try:
        module = importlib.import_module("modules.processing_scripts.comments")
    except ImportError:  # an older WebUI knows none
        return prompt
    return str(module.strip_comments(prompt)) if getattr(shared.opts, "enable_prompt_comments", False) else prompt


def without_networks(prompts: Texts, count: int) -> Texts:
    """Return ``count`` prompts without extra-network tags; one is for all images."""
    without: list[str] = extra_networks.parse_prompts(list(prompts))[0]
    return without * count if len(without) < count else without
