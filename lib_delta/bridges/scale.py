"""The published code's assumption about SDXL: its latents differ by a factor only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lib_delta.bridges.base import BridgeForm, BridgeSettings, Crossing
from lib_delta.bridges.identity import SameSize
from lib_delta.errors import SettingError

ScaleForm = Literal["same_snr", "published"]


@dataclass(frozen=True)
class ScaleBridge(SameSize):
    """Assume that latents agree up to their scale factors, which is wrong for the released SD 1.x and SDXL.

    This form exists for parity with the published code, and for comparison.  ``k`` is the source's scale factor divided
    by the target's.  "same_snr" scales the whole state: ``x_s = k * x`` at ``k * sigma``.  "published" (the node that
    comes with arXiv 2512.03056) preserves the noise level: ``x_s = k * denoised + sigma * noise`` at ``sigma``.
    """

    k: float
    form: ScaleForm = "same_snr"

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise SettingError(f"scale bridge: k must be above 0, not {self.k}")
        if self.form not in get_args(ScaleForm):
            raise SettingError(f"scale bridge: form must be one of {', '.join(get_args(ScaleForm))}, not {self.form!r}")

    @property
    def label(self) -> str:
        return _label(self.form)

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        if self.form == "same_snr":
            return self.k * x, self.k * sigma, Crossing(self.k * denoised)
        return self.k * denoised + (x - denoised), sigma, Crossing(self.k * denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta / self.k


def _label(form: ScaleForm) -> str:
    return f"scale only ({form})"


def _scale_form(name: ScaleForm) -> BridgeForm:
    def make(settings: BridgeSettings) -> ScaleBridge:
        start, end = settings.source, settings.target
        if start.channels != end.channels:
            raise SettingError(
                f"latents of {start.label} and {end.label} differ in more than scale: "
                f"the form must be stitched, learned or taesd, not {name}"
            )
        return ScaleBridge(start.scale_factor / end.scale_factor, name)

    return BridgeForm(name, _label(name), make, resizes=False)


PUBLISHED, SAME_SNR = _scale_form("published"), _scale_form("same_snr")
