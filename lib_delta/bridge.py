"""Bridges: the target's noisy state seen in the source's latent space, and the delta carried back.

The target's own step gives all that is needed: from ``x``, ``sigma`` and its denoised estimate, the
noise is known.  A bridge maps the clean part into the source's latent and noises it again there, so
no second state is carried along and every sampler of the target works as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lib_delta.errors import SettingError
from lib_delta.families import Family
from lib_delta.parameterization import per_image

Form = Literal["same_snr", "published"]


@dataclass(frozen=True)
class Crossing:
    """What a bridge remembers of one step: the source's clean part, and its parts' crossings if it has parts."""

    denoised: Tensor
    parts: tuple[Crossing, ...] = ()


class Bridge(Protocol):
    """The way from the target's latent to the source's and back, for one step at a time."""

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        """Map the target's ``x`` ``(N, C, H, W)``, ``sigma`` ``(N,)`` and estimate to the source's x and sigma."""
        ...

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        """Map the delta found in the source's latent to the target's."""
        ...


@dataclass(frozen=True)
class IdentityBridge:
    """Source and target share the latent, as SD 1.x and 2.x do."""

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        return x, sigma, Crossing(denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta


@dataclass(frozen=True)
class ScaleBridge:
    """The latents agree up to their scale factors, as is assumed of SD 1.x and SDXL.

    ``k`` is the source's scale factor over the target's.  The ``same_snr`` form scales the whole
    state, ``x_s = k * x`` at ``k * sigma``.  The ``published`` form (the node that comes with arXiv
    2512.03056) keeps the noise level: ``x_s = k * denoised + sigma * noise`` at ``sigma``.
    """

    k: float
    form: Form = "same_snr"

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise SettingError(f"scale bridge: k must be above 0, not {self.k}")
        if self.form not in get_args(Form):
            raise SettingError(f"scale bridge: form must be one of {', '.join(get_args(Form))}, not {self.form!r}")

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        if self.form == "same_snr":
            return self.k * x, self.k * sigma, Crossing(self.k * denoised)
        return self.k * denoised + (x - denoised), sigma, Crossing(self.k * denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta / self.k


@dataclass(frozen=True)
class NoiseLimitBridge:
    """Keep the source within the noise it was trained on.

    A target of zero terminal SNR starts at a sigma in the thousands, where an eps model's estimate
    is its error magnified.  Above ``sigma_max`` the source is shown the same clean part and the same
    noise at ``sigma_max``.
    """

    sigma_max: float

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        limited = sigma.clamp(max=self.sigma_max)
        share = per_image(limited / sigma, x)
        # Images within the limit keep their x bit for bit.
        return torch.where(share < 1, denoised + share * (x - denoised), x), limited, Crossing(denoised)

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        return delta


@dataclass(frozen=True)
class Composed:
    """Bridges one after another, from the target to the source."""

    bridges: tuple[Bridge, ...]

    def to_source(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor, Crossing]:
        parts: list[Crossing] = []
        for bridge in self.bridges:
            x, sigma, crossing = bridge.to_source(x, sigma, denoised)
            denoised = crossing.denoised
            parts.append(crossing)
        return x, sigma, Crossing(denoised, tuple(parts))

    def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
        for bridge, part in zip(reversed(self.bridges), reversed(crossing.parts), strict=True):
            delta = bridge.delta_to_target(delta, part)
        return delta


def choose(source: Family, target: Family, sigma_max: float | None = None, form: Form = "same_snr") -> Bridge:
    """Return the bridge between two families' latents.

    ``sigma_max``, where given, is the largest noise level that the source knows; it is compared with
    the target's sigma (:class:`NoiseLimitBridge`), so that a scale that makes the source's a little
    larger does not count.  ``form`` is that of the :class:`ScaleBridge`, where one is needed.
    Raises :class:`SettingError` if the latents are not related by a known map.
    """
    if source.latent_channels != 4 or target.latent_channels != 4:
        raise SettingError(
            f"no bridge leads from a {source.label} source to a {target.label} target: "
            "choose a source and a target among SD 1.x, SD 2.x and SDXL"
        )
    k = source.scale_factor / target.scale_factor
    latent: Bridge = IdentityBridge() if k == 1 else ScaleBridge(k, form)
    return latent if sigma_max is None else Composed((NoiseLimitBridge(sigma_max), latent))
