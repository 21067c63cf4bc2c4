"""Guides: adaptations that are not weights, and when they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lib_delta.core.strength import covers
from lib_delta.errors import SettingError
from lib_delta.models.injection import Injection


@dataclass(frozen=True)
class GuideInputs:
    """What the adapted model is given in one evaluation: N rows, the prompts' and then the negative prompts'.

    ``x`` ``(N, C, h, w)`` scaled as the UNet's input, ``t`` ``(N,)``, ``context`` ``(N, T, W)``, ``label``
    ``(N, L)`` for SDXL; ``images`` ``(N,)`` is each row's image, ``uncond`` ``(N,)`` marks the negative prompts';
    ``prompts`` are the numbers ``(K,)`` of all others, where they are known without a look at the device.  While the
    prompts stay, ``context`` is the same object.
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
        """The numbers ``(K,)`` of the prompts' rows."""
        return (~self.uncond).nonzero()[:, 0] if self.prompts is None else self.prompts


# An adaptation that is not weights.
Guide = Callable[[GuideInputs], Injection]


@dataclass(frozen=True, eq=False)
class TimedGuide:
    """A guide that counts in a share of the run: from ``start`` to ``end``, 0 the first step and 1 the last.

    Raises :class:`SettingError` for a share that is none.
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
    """Tell whether a guide counts at a point of the run; one that is not :class:`TimedGuide` always does."""
    return not isinstance(guide, TimedGuide) or covers(guide.start, guide.end, progress)
