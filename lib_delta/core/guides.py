"""Guides: adaptations that are not weights, and when they are active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lib_delta.core.strength import covers
from lib_delta.errors import SettingError
from lib_delta.models.injection import Injection


@dataclass(frozen=True)
class GuideInputs:
    """The adapted model's inputs in one evaluation: N rows, those of prompts before those of negative prompts.

    Attributes:
        x: latents ``(N, C, h, w)``, scaled as the UNet's input.
        t: timesteps ``(N,)``.
        context: encoded prompts ``(N, T, W)``, the same object while the prompts stay the same.
        label: label embeddings ``(N, L)`` for SDXL.
        images: the image of each row ``(N,)``.
        uncond: marks the negative prompts' rows ``(N,)``.
        prompts: the indices ``(K,)`` of the prompts' rows, None if finding them needs a transfer from the device.
    """

    x: Tensor
    t: Tensor
    context: Tensor
    label: Tensor | None
    images: Tensor
    uncond: Tensor
    prompts: Tensor | None = None

    @property
    def prompt_rows(self) -> Tensor:
        """The indices ``(K,)`` of the prompts' rows."""
        return (~self.uncond).nonzero()[:, 0] if self.prompts is None else self.prompts


# Computes the additions of an adaptation that is not weights, such as a ControlNet.
Guide = Callable[[GuideInputs], Injection]


@dataclass(frozen=True, eq=False)
class TimedGuide:
    """A guide that is active from ``start`` to ``end``; 0 is the first step and 1 the last.

    Raises:
        SettingError: unless ``0 <= start <= end <= 1``.
    """

    guide: Guide
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise SettingError(
                f"a control is to count from {self.start:g} to {self.end:g}: "
                "two shares of the run from 0 to 1 are needed, the earlier first"
            )

    def __call__(self, inputs: GuideInputs) -> Injection:
        return self.guide(inputs)


def is_active(guide: Guide, progress: float) -> bool:
    """Return whether a guide is active at ``progress`` (0 to 1); only a :class:`TimedGuide` can be inactive."""
    return not isinstance(guide, TimedGuide) or covers(guide.start, guide.end, progress)
