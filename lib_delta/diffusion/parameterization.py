"""What a network's output means, and where on the noise schedule it was asked.

Everything inside the engine is ``(x, sigma) -> denoised`` with ``x = x0 + sigma * noise``, the
convention of k-diffusion (arXiv 2206.00364).  Networks predict noise (eps), velocity (v) or flow,
at discrete timesteps, on inputs scaled in their own way; this module is the only place that knows.
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

# What WebUIs put in the place of the last signal level after the rescale to zero terminal SNR:
# small enough to be pure noise, large enough for sigma (4518) to be a number.
TERMINAL_ALPHA_BAR = 4.8973451890853435e-08
# The noise level up to which states of flow-matching models are followed: in float32 more would drown the estimate.
FLOW_SIGMA_MAX = 1000.0


class Schedule:
    """The discrete noise schedule a model was trained with.

    The table is kept in float64 on the CPU and used in float32, on the device of what is asked;
    rounding the logarithms only once is what decides which timestep is the nearest.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        """Take the signal levels ``(steps,)``, decreasing, between 0 and 1 (both excluded)."""
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
        """Map noise levels ``(N,)`` to timesteps ``(N,)``, interpolated in log sigma or, quantized, the nearest."""
        table = self._table(sigma.device)
        log_sigma = sigma.float().log()
        if quantize:
            return (log_sigma - table[:, None]).abs().argmin(0)
        low = ((log_sigma >= table[:, None]).sum(0) - 1).clamp(0, len(table) - 2)
        weight = ((table[low] - log_sigma) / (table[low] - table[low + 1])).clamp(0, 1)
        return (1 - weight) * low + weight * (low + 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """Map timesteps ``(N,)``, whole or fractional, to noise levels ``(N,)``; outside the table its ends hold."""
        table = self._table(t.device)
        t = t.float().clamp(0, len(table) - 1)
        return torch.lerp(table[t.floor().long()], table[t.ceil().long()], t.frac()).exp()

    def _table(self, device: torch.device) -> Tensor:
        # Once for each device: it is asked in every step.
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
    """How one model reads ``(x, sigma)`` and how its output becomes the denoised estimate.

    Shapes: ``x``, outputs and estimates ``(..., N, C, H, W)``, ``sigma`` ``(N,)``.  Flow models
    (arXiv 2209.03003) see ``(1 - s) * x0 + s * noise`` with ``s = sigma / (1 + sigma)``, are asked
    at ``1000 * s`` and predict ``noise - x0``; they have no use for the schedule.
    """

    prediction: Prediction = "eps"
    schedule: Schedule = field(default_factory=Schedule.stable_diffusion)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise SettingError(f"prediction must be one of {', '.join(get_args(Prediction))}, not {self.prediction!r}")

    def model_input(self, x: Tensor, sigma: Tensor, quantize: bool = False) -> tuple[Tensor, Tensor]:
        """Return what the network is given: the scaled ``x`` and the timesteps ``(N,)``."""
        s = per_image(sigma, x)
        if self.prediction == "flow":
            return x / (1 + s), 1000 * sigma / (1 + sigma)
        return x / (s**2 + 1) ** 0.5, self.schedule.sigma_to_t(sigma, quantize)

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoised estimate (x0) that the network's ``output`` for ``(x, sigma)`` stands for."""
        s = per_image(sigma, x)
        if self.prediction == "eps":
            return x - output * s
        if self.prediction == "v":
            return x / (s**2 + 1) - output * s / (s**2 + 1) ** 0.5
        return (x - output * s) / (1 + s)

    def output_of(self, denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the output that stands for ``denoised``: the inverse of :meth:`denoised`, for sigma above 0."""
        s = per_image(sigma, x)
        if self.prediction == "eps":
            return (x - denoised) / s
        if self.prediction == "v":
            return (x / (s**2 + 1) - denoised) * (s**2 + 1) ** 0.5 / s
        return (x - denoised * (1 + s)) / s


def per_image(sigma: Tensor, x: Tensor) -> Tensor:
    """Shape ``(N,)`` noise levels so that they broadcast over ``(..., N, C, H, W)``."""
    return sigma.reshape(-1, 1, 1, 1).to(x)


def from_timestep_space(x: Tensor, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Convert the state of a timestep sampler (DDIM, PLMS, UniPC) to ``(x, sigma)``.

    Such a sampler holds ``sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise`` (variance preserving)
    at timesteps ``t`` ``(N,)``, and asks for the noise: see :func:`eps_of`.
    """
    sigma = schedule.t_to_sigma(t)
    s = per_image(sigma, x)
    return x * (s**2 + 1) ** 0.5, sigma


def to_timestep_space(x: Tensor, sigma: Tensor) -> Tensor:
    """Convert ``x = x0 + sigma * noise`` to the variance-preserving scale of a timestep sampler."""
    return x / (per_image(sigma, x) ** 2 + 1) ** 0.5


def from_flow_space(x: Tensor, t: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor]:
    """Convert the state of a flow-matching model (arXiv 2209.03003) to ``(x, sigma)``.

    Such a model holds ``(1 - t) * x0 + t * noise`` at times ``t`` ``(N,)`` of 0 to 1: that is ``x / (1 - t)`` at
    ``t / (1 - t)``.  Near 1, where both grow without bound, the estimate and the noise that it leaves are
    put together again at :data:`FLOW_SIGMA_MAX`.
    """
    sigma = (t / (1 - t)).clamp(max=FLOW_SIGMA_MAX)
    time = per_image(t, x)
    noise = (x - (1 - time) * denoised) / time
    within = per_image(t / (1 - t) <= FLOW_SIGMA_MAX, x).bool()
    return torch.where(within, x / (1 - time), denoised + FLOW_SIGMA_MAX * noise), sigma


def eps_of(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise that a denoised estimate leaves in ``x``, which timestep samplers work with."""
    return (x - denoised) / per_image(sigma, x)


def denoised_of(eps: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the denoised estimate that a predicted noise stands for."""
    return x - eps * per_image(sigma, x)


def denoiser(
    network: Callable[[Tensor, Tensor], Tensor], parameterization: Parameterization, quantize: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """Turn ``network(x, t) -> output`` into ``(x, sigma) -> denoised``, the currency of k-diffusion's samplers."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        model_x, t = parameterization.model_input(x, sigma, quantize)
        return parameterization.denoised(network(model_x, t), x, sigma)

    return denoise
