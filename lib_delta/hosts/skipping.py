"""Whether a WebUI leaves out guidance in a step to save time, by its own rules."""

from __future__ import annotations

from typing import Any

from modules import shared


def may_skip(denoiser: Any, level: float) -> bool:
    """Tell whether the settings have the sampler's denoiser leave out guidance in this step, at a noise level.

    As ``CFGDenoiser`` tells it in all of the WebUIs, but for the first step, which Forge Neo spares: what is evaluated
    has to be looked at where it may be so, and only there.
    """
    early = float(getattr(shared.opts, "skip_early_cond", 0) or 0)
    if early and denoiser.step / max(denoiser.total_steps, 1) <= early:
        return True
    limit = float(denoiser.sampler.sampler_extra_args.get("s_min_uncond") or 0)
    every = bool(denoiser.step % 2 or getattr(shared.opts, "s_min_uncond_all", False))
    return every and limit > 0 and level < limit
