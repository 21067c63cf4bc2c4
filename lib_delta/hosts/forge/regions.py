"""AND's parts in regions of their own, as extensions and masks of Forge have them.

Forge evaluates the parts and combines them in one function, around which extensions (Regional Prompter's mode
*Latent*) put theirs.  That function is called once more, with changes in place of estimates: all that is done there
is linear in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, PromptParts

WRAPPER = "model_function_wrapper"


class ChangesAsModel:
    """Stands where the model is: the estimate of a row is what the row is told, and nothing is computed.

    ``whole`` is False once it has been asked for less than a whole picture, which it cannot tell.
    """

    def __init__(self, model: Any) -> None:
        self.memory_required: Callable[..., float] = model.memory_required
        self.whole = True

    def apply_model(self, x: Tensor, _t: Tensor, c_crossattn: Tensor, **_: Any) -> Tensor:
        """Return the changes ``(N, C, H * W)`` as latents ``(N, C, H, W)``."""
        self.whole = self.whole and c_crossattn.numel() == x.numel()
        return c_crossattn.reshape(x.shape) if self.whole else torch.zeros_like(x)


def in_regions(
    changes: Deltas, args: Mapping[str, Any], scale: float, skipped: bool, combine: Callable[..., tuple[Tensor, Tensor]]
) -> Deltas:
    """Return the changes as the WebUI combines those of the parts; as they are if it does nothing of its own with them.

    ``args`` are a post-CFG function's, ``scale`` that of guidance, of which ``skipped`` says that it was left out;
    ``combine`` is the WebUI's function.
    """
    cond, parts = args["cond"], changes.parts
    if parts is None or not _have_regions(cond, parts, args["model_options"]):
        return changes
    total = sum(parts.weights[0])
    if abs(total) < 0.01 or abs(scale) < 0.01:
        return changes
    own = changes.uncond[:, None]
    rows = parts.change.unflatten(0, (-1, len(cond)))
    rows = rows - own + own / total if skipped else own + (rows - own) / scale
    parts_as_changes = [_with_change_as_text(part, rows[:, i]) for i, part in enumerate(cond)]
    negative = None if skipped else [_with_change_as_text(part, changes.uncond) for part in args["uncond"]]
    model = ChangesAsModel(args["model"])
    guided, uncond = combine(model, parts_as_changes, negative, args["input"], args["sigma"], args["model_options"])
    if not model.whole:
        return changes
    if skipped:
        return changes._replace(guided=total * guided)
    return changes._replace(guided=uncond + scale * total * (guided - uncond), uncond=uncond)


def _have_regions(cond: list[Any], parts: PromptParts, options: Mapping[str, Any]) -> bool:
    """Tell whether the parts may have regions, and are those of the side model, in rows that go together."""
    texts = [part["model_conds"]["c_crossattn"] for part in cond]
    strengths = tuple(float(part.get("strength", 1.0)) for part in cond)
    return (
        (WRAPPER in options or any("mask" in part for part in cond))
        and not any("area" in part for part in cond)
        and all(image == strengths for image in parts.weights)
        and all(texts[0].can_concat(text) for text in texts)
    )


def _with_change_as_text(part: Mapping[str, Any], change: Tensor) -> dict[str, Any]:
    """Return one of AND's parts with a change in place of its text, and nothing else that would be computed."""
    conds = part["model_conds"]
    parts_as_changes = type(conds["c_crossattn"])(change.flatten(2))
    return {
        **{k: v for k, v in part.items() if k != "control"},
        "model_conds": {**conds, "c_crossattn": parts_as_changes},
    }
