"""Regions for the parts of a prompt joined by AND, as Forge's masks and extensions give them.

Forge evaluates the parts and combines them in one function; extensions (Regional Prompter's mode *Latent*) wrap the
model in it.  The function is linear in the parts' estimates, so it also combines changes of them.

At scale s, it averages the parts' estimates c_i, of weights w_i with the sum W, to c.  Guidance returns
``u + s * W * (c - u)``, with u for the negative prompt; or ``W * c`` if guidance is skipped.
The change has to be ``u + sum(w_i * (p_i - u))``, where p_i is the part's change, guided as if it were the only one.
So the function gets ``c_i = u + (p_i - u) / s`` if there is guidance, and ``c_i = p_i - u + u / W`` if not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, PromptParts

WRAPPER = "model_function_wrapper"
# Below this, weights or scales are not divided by.
SMALLEST_SCALE = 0.01
Combine = Callable[..., tuple[Tensor, Tensor]]


class ChangesAsModel:
    """Replaces the model: each row's estimate is the change in its conditioning, and nothing is computed.

    ``whole`` becomes False if it is called for less than a whole image, of which it cannot know the part.
    """

    def __init__(self, model: Any) -> None:
        self.memory_required: Callable[..., float] = model.memory_required
        self.whole = True

    def apply_model(self, x: Tensor, _t: Tensor, c_crossattn: Tensor, **_: Any) -> Tensor:
        """Return the changes ``(N, C, H * W)`` as latents ``(N, C, H, W)``."""
        self.whole = self.whole and c_crossattn.numel() == x.numel()
        return c_crossattn.reshape(x.shape) if self.whole else torch.zeros_like(x)


def combine_in_regions(
    changes: Deltas, args: Mapping[str, Any], scale: float, combine: Combine, *, skipped: bool
) -> Deltas:
    """Return the changes as the WebUI combines those of the parts; unchanged if the parts have no regions.

    ``args`` are a post-CFG function's, ``scale`` is that of guidance, ``skipped`` tells that there is none, and
    ``combine`` is the WebUI's function.
    """
    cond, parts, uncond = args["cond"], changes.parts, changes.uncond
    if parts is None or not _may_have_regions(cond, parts, args["model_options"]):
        return changes
    total = sum(parts.weights[0])
    if abs(total) < SMALLEST_SCALE or abs(scale) < SMALLEST_SCALE:
        return changes
    part_changes, of_uncond = parts.change.unflatten(0, (-1, len(cond))), uncond[:, None]  # (N, parts, C, H, W)
    if skipped:
        estimates = part_changes - of_uncond + of_uncond / total
    else:
        estimates = of_uncond + (part_changes - of_uncond) / scale
    conds = [_with_change_as_text(part, estimates[:, i]) for i, part in enumerate(cond)]
    unconds = None if skipped else [_with_change_as_text(part, uncond) for part in args["uncond"]]
    model = ChangesAsModel(args["model"])
    combined, uncond = combine(model, conds, unconds, args["input"], args["sigma"], args["model_options"])
    if not model.whole:
        return changes
    if skipped:
        return changes._replace(guided=total * combined)
    return changes._replace(guided=uncond + scale * total * (combined - uncond), uncond=uncond)


def _may_have_regions(cond: list[Any], parts: PromptParts, options: Mapping[str, Any]) -> bool:
    """Return whether something may give the parts regions, and these are the side model's parts, in equal rows."""
    texts = [part["model_conds"]["c_crossattn"] for part in cond]
    strengths = tuple(float(part.get("strength", 1.0)) for part in cond)
    return (
        (WRAPPER in options or any("mask" in part for part in cond))
        and not any("area" in part for part in cond)
        and all(image == strengths for image in parts.weights)
        and all(texts[0].can_concat(text) for text in texts)
    )


def _with_change_as_text(part: Mapping[str, Any], change: Tensor) -> dict[str, Any]:
    """Return a part with a change as its text, without the ControlNets that would be computed for it."""
    conds = part["model_conds"]
    text = type(conds["c_crossattn"])(change.flatten(2))
    return {
        **{key: value for key, value in part.items() if key != "control"},
        "model_conds": {**conds, "c_crossattn": text},
    }
