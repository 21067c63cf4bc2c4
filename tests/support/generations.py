"""Generations in a stand-in: the settings that several test files share, and the comparison that proves a delta."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.stand_in_webui import WebUI, relative

DELTA = {"base": "base", "loras": "ink"}
HIRES = {"enable_hr": True, "hr_second_pass_steps": 3, "hr_cfg": 5.0}


def init_latents(batch: int = 1) -> torch.Tensor:
    """Return latents for img2img."""
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(8))


def assert_exact(webui: WebUI, delta: dict[str, Any] | None = None, native: str | None = None, **changes: Any) -> None:
    """Check that the delta equals the merged LoRA up to rounding, and that both are far from the plain latents."""
    plain, expected = webui.latents(**changes), webui.native(native, **changes)
    generated = webui.generate({**DELTA, **(delta or {})}, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(plain, expected) > 1e-3, "the LoRA changes nothing here"
    assert float((generated.images - expected).norm() / (plain - expected).norm()) < 1e-3
    assert all("Delta lambda: 1" in text for text in generated.infotexts)
