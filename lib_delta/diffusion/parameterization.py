"""Conversion between a network's inputs and outputs and ``(x, sigma) -> denoised``.

The rest of the code uses k-diffusion's convention (arXiv 2206.00364): ``(x, sigma) -> denoised`` with
``x = x0 + sigma * noise``.  Networks predict noise (eps), velocity (v) or flow, at discrete timesteps, and scale their
inputs differently.  Only this module deals with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lib_delta.errors import SettingError

Prediction = Literal["eps", "v", "flow"]

# The WebUIs' last signal level after the rescale to zero terminal SNR, which would make it 0.
# It is small enough to be pure noise, and large enough for a finite sigma (4518).
TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
# The highest noise level for states of flow-matching models: in float32, more noise would drown the estimate.
FLOW_SIGMA_MAX = 1000.0


class Schedule:
    """The discrete noise schedule a model was trained with.

    The table is stored in float64 on the CPU and used in float32 on the device of the query.  Rounding the logarithms
    only once makes the nearest timestep the right one.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Take the signal levels ``(steps,)``, decreasing, between 0 and 1 (both excluded).

        Raises:
            SettingError: if there are fewer than two, or if one is not between 0 and 1.
        """
        # cpu() first: not every device has float64.
        alphas = alphas_cumprod.detach().cpu().double()
        if alphas.ndim != 1 or len(alphas) < 2 or not bool(((alphas > 0) & (alphas < 1)).all()):
            raise SettingError("a noise schedule needs at least two values of alphas_cumprod between 0 and 1")
        self.alphas_cumprod = alphas
        self.log_sigmas = ((1 - alphas) / alphas).log() / 2
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def stable_diffusion(cls, zero_terminal_snr: bool = False) -> Schedule:
        """Return the schedule of SD 1.x, 2.x and XL: 1000 steps, sqrt(beta) linear (arXiv 2112.10752, D.1).

        ``zero_terminal_snr`` applies the rescale of arXiv 2305.08891 (algorithm 1).
        """
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        return cls(_rescale_to_zero_terminal_snr(alphas) if zero_terminal_snr else alphas)

    @property
    def sigma_min(self) -> float:
        """The smallest noise level of the table."""
        return math.exp(float(self.log_sigmas[0]))

    @property
    def sigma_max(self) -> float:
        """The largest noise level of the table."""
        return math.exp(float(self.log_sigmas[-1]))

    def sigma_to_t(self, sigma: Tensor, quantize: bool = False) -> Tensor:
        """Map noise levels ``(N,)`` to timesteps ``(N,)``: in log sigma, or the nearest if ``quantize``."""
        table = self._table(sigma.device)
        log_sigma = sigma.float().log()
        if quantize:
            return (log_sigma - table[:, None]).abs().argmin(0)
        low = ((log_sigma >= table[:, None]).sum(0) - 1).clamp(0, len(table) - 2)
        weight = ((table[low] - log_sigma) / (table[low] - table[low + 1])).clamp(0, 1)
        return (1 - weight) * low + weight * (low + 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Map timesteps ``(N,)``, whole or fractional, to noise levels ``(N,)``, clamped to the table."""
        table = self._table(t.device)
        t = t.float().clamp(0, len(table) - 1)
        return torch.lerp(table[t.floor().long()], table[t.ceil().long()], t.frac()).exp()

    def _table(self, device: torch.device) -> Tensor:
        # Cached per device, as every step uses it.
        if device not in self._tables:
            # float() first: not every device has float64.
            self._tables[device] = self.log_sigmas.float().to(device)
        return self._tables[device]


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    roots = alphas_cumprod.sqrt()
    rescaled = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    rescaled[-1] = TERMINAL_ALPHA_BAR
    return rescaled


@dataclass(frozen=True)
class Parameterization:
    """The conversion of one model's inputs and outputs.

    Shapes: ``x``, outputs and estimates ``(..., N, C, H, W)``, ``sigma`` ``(N,)``.  Flow models (arXiv 2209.03003)
    take ``(1 - s) * x0 + s * noise`` with ``s = sigma / (1 + sigma)`` at the timestep ``1000 * s``, and predict
    ``noise - x0``.  They do not use the schedule.
    """

    prediction: Prediction = "eps"
    schedule: Schedule = field(default_factory=Schedule.stable_diffusion)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise SettingError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {self.prediction!r}")

    def model_input(self, x: Tensor, sigma: Tensor, quantize: bool = False) -> tuple[Tensor, Tensor]:
        """Return the network's inputs: the scaled ``x`` and the timesteps ``(N,)``."""
        s = per_image(sigma, x)
        if self.prediction == "flow":
            return x / (1 + s), 1000 * sigma / (1 + sigma)
        return x / (s**2 + 1) ** 0.5, self.schedule.sigma_to_t(sigma, quantize)

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoised estimate (x0) from the network's ``output`` for ``(x, sigma)``."""
        s = per_image(sigma, x)
        if self.prediction == "eps":
            return x - output * s
        if self.prediction == "v":
            return x / (s**2 + 1) - output * s / (s**2 + 1) ** 0.5
        return (x - output * s) / (1 + s)

    def output_of(self, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the network's output from ``denoised``: the inverse of :meth:`denoised`, for sigma above 0."""
        s = per_image(sigma, x)
        if self.prediction == "eps":
            return (x - denoised) / s
        if self.prediction == "v":
            return (x / (s**2 + 1) - denoised) * (s**2 + 1) ** 0.5 / s
        return (x - denoised * (1 + s)) / s


def per_image(sigma: Tensor, x: Tensor) -> Tensor:
    """Return noise levels ``(N,)`` as ``(N, 1, 1, 1)``, which broadcasts over ``x`` ``(..., N, C, H, W)``."""
    return sigma.reshape(-1, 1, 1, 1).to(x)


def from_timestep_space(x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Convert the state of a timestep sampler (DDIM, PLMS, UniPC) to ``(x, sigma)``.

    Its state is ``sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise`` (variance preserving) at timesteps ``t``
    ``(N,)``.  It works with predicted noise: see :func:`eps_of`.
    """
    sigma = schedule.t_to_sigma(t)
    s = per_image(sigma, x)
    return x * (s**2 + 1) ** 0.5, sigma


def to_timestep_space(x: Tensor, sigma: Tensor) -> Tensor:
    """Convert ``x = x0 + sigma * noise`` to the variance-preserving scale of a timestep sampler."""
    return x / (per_image(sigma, x) ** 2 + 1) ** 0.5


def from_flow_space(x: Tensor, t: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor]:
    """Convert the state of a flow-matching model (arXiv 2209.03003) to ``(x, sigma)``.

    Its state is ``(1 - t) * x0 + t * noise`` at times ``t`` ``(N,)`` from 0 to 1, which equals ``x / (1 - t)`` at
    the noise level ``t / (1 - t)``.  Both grow without bound near 1, so above :data:`FLOW_SIGMA_MAX` the result is
    the estimate plus its noise at that level.
    """
    sigma = (t / (1 - t)).clamp(max=FLOW_SIGMA_MAX)
    time = per_image(t, x)
    noise = (x - (1 - time) * denoised) / time
    within = per_image(t / (1 - t) <= FLOW_SIGMA_MAX, x).bool()
    return torch.where(within, x / (1 - time), denoised + FLOW_SIGMA_MAX * noise), sigma


def eps_of(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise in ``x`` according to a denoised estimate."""
    return (x - denoised) / per_image(sigma, x)


def denoised_of(eps: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the denoised estimate according to a predicted noise."""
    return x - eps * per_image(sigma, x)


def denoiser(
    network: Callable[[Tensor, Tensor], Tensor], parameterization: Parameterization, quantize: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``(x, sigma) -> denoised``, as k-diffusion's samplers need it, from ``network(x, t) -> output``."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        model_x, t = parameterization.model_input(x, sigma, quantize)
        return parameterization.denoised(network(model_x, t), x, sigma)

    return denoise
