"""Guides: what a ControlNet, a T2I-Adapter or an IP-Adapter adds to the adapted model, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lib_delta.controls.control_file import ControlFile
from lib_delta.controls.control_map import ControlMap
from lib_delta.core.guides import Guide, GuideInputs
from lib_delta.errors import SettingError
from lib_delta.models.controlnet import ControlNet, T2IAdapter, batch_of, feature_injection
from lib_delta.models.injection import ExtraAttention, Injection
from lib_delta.models.ip_adapter import IPAdapter, attend_to_image, cross_attentions
from lib_delta.models.unet import TextContext, UNet

# Which counts more, as Mikubill's extension calls it: "prompt" and "control" weaken what steers the shallow layers,
# and "control" leaves the negative prompt's estimate alone, so that guidance strengthens the control.
Mode = Literal["balanced", "prompt", "control"]
SOFTENED = 0.825  # the weight of each layer relative to the one below it
# How an image prompt's weight is spread over the layers (ComfyUI_IPAdapter_plus).
WeightType = Literal[
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
]


@dataclass(eq=False)
class ControlNetGuide:
    """Steer by a map through a ControlNet.

    ``pooled`` averages what it adds over the picture, and leaves the negative prompt alone, as the "shuffle"
    model was trained to.
    Raises :class:`SettingError` for a mode that is not known.
    """

    model: ControlNet
    map: ControlMap
    weight: float = 1.0
    mode: Mode = "balanced"
    pooled: bool = False
    _hints: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _told: tuple[Tensor, TextContext] | None = None

    def __post_init__(self) -> None:
        _refuse_unknown(self.mode, get_args(Mode), "control mode")

    def __call__(self, inputs: GuideInputs) -> Injection:
        if not self.weight:
            return Injection()
        rows = inputs.prompt_rows if self.mode == "control" or self.pooled else None
        hint = self._hint(inputs)[of_rows(inputs.images, rows) % self.map.count]
        label = None if inputs.label is None else of_rows(inputs.label, rows)
        x, t = of_rows(inputs.x, rows), of_rows(inputs.t, rows)
        residuals = self.model(x, t, self._text(inputs, rows), hint, label)
        if self.pooled:
            residuals = [residual.mean((2, 3), keepdim=True).expand_as(residual) for residual in residuals]
        weighted = [weight * residual for weight, residual in zip(self.weights(len(residuals)), residuals)]
        return Injection(decoder=dict(enumerate(batch_of(weighted, rows, len(inputs.x)))))

    def _text(self, inputs: GuideInputs, rows: Tensor | None) -> TextContext:
        """Return what the network is told, whose keys and values are the same while the prompts are."""
        if self._told is None or self._told[0] is not inputs.context:
            self._told = inputs.context, TextContext(of_rows(inputs.context, rows)[None], known={})
        return self._told[1]

    def weights(self, count: int) -> list[float]:
        """Return the weight of each of ``count`` layers, the middle block's last."""
        softened = 1.0 if self.mode == "balanced" else SOFTENED
        return [self.weight * softened ** (count - 1 - i) for i in range(count)]

    def _hint(self, inputs: GuideInputs) -> Tensor:
        """Return the map's features ``(count, C, h, w)``, which are the same at every step."""
        height, width = inputs.x.shape[-2:]
        if (height, width) not in self._hints:
            factor = self.model.factor
            picture = self.map.at(factor * height, factor * width, self.model.hint_channels)
            self._hints = {(height, width): self.model.hint(picture.to(inputs.x))}
        return self._hints[height, width]


@dataclass(eq=False)
class FeatureGuide:
    """Steer by a map through a T2I-Adapter; ``mode`` "control" leaves the negative prompt's estimate alone.

    Raises :class:`SettingError` for a mode that is not known.
    """

    model: T2IAdapter
    unet: UNet
    map: ControlMap
    weight: float = 1.0
    mode: Mode = "balanced"
    factor: int = 8  # pixels along a latent's side
    _features: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_unknown(self.mode, get_args(Mode), "control mode")

    def __call__(self, inputs: GuideInputs) -> Injection:
        if not self.weight:
            return Injection()
        rows = inputs.prompt_rows if self.mode == "control" else None
        which = of_rows(inputs.images, rows) % self.map.count
        weighted = [self.weight * feature[which] for feature in self._seen(inputs)]
        return feature_injection(self.unet, batch_of(weighted, rows, len(inputs.x)))

    def _seen(self, inputs: GuideInputs) -> list[Tensor]:
        size = (inputs.x.shape[-2], inputs.x.shape[-1])
        if size not in self._features:
            unit = self.model.config.unshuffled
            # Rounded up as the UNet's halvings are.
            height, width = (-(-side * self.factor // unit) * unit for side in size)
            picture = self.map.at(height, width, self.model.config.picture_channels)
            self._features = {size: self.model(picture.to(inputs.x))}
        return self._features[size]


@dataclass(eq=False)
class ImageGuide:
    """Prompt by pictures through an IP-Adapter.

    ``tokens`` are what the projection makes of the pictures and of none: ``(S, context_width)`` each.
    Raises :class:`SettingError` for a weight type that is not known.
    """

    model: IPAdapter
    unet: UNet
    tokens: tuple[Tensor, Tensor]
    weight: float = 1.0
    weight_type: WeightType = "linear"
    _seen: Sequence[tuple[Tensor, Tensor]] = ()  # keys and values are the same at every step

    def __post_init__(self) -> None:
        _refuse_unknown(self.weight_type, get_args(WeightType), "weight type")

    def __call__(self, inputs: GuideInputs) -> Injection:
        if not self.weight:
            return Injection()
        if not self._seen:
            self._seen = self.model.keys_and_values(torch.stack(self.tokens).to(inputs.context))
        row = inputs.uncond.long()
        layers = list(cross_attentions(self.unet))
        attended = {
            module: _attended(k[row], v[row], self.weight * share(self.weight_type, i, len(layers), place))
            for i, ((place, module), (k, v)) in enumerate(zip(layers, self._seen, strict=True))
        }
        return Injection(extra_attention=attended)  # type: ignore[arg-type]


def of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows of these numbers, or all where there are none."""
    return tensor if rows is None else tensor[rows]


def _refuse_unknown(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise SettingError(f"the {what} is {value!r}: one of {', '.join(known)} is needed")


def follow(file: ControlFile, unet: UNet, picture: ControlMap, weight: float = 1.0, mode: Mode = "balanced") -> Guide:
    """Return the guide by which a ControlNet's or T2I-Adapter's file follows a map.

    Raises :class:`SettingError` for an IP-Adapter, which follows none.
    """
    if isinstance(file.model, ControlNet):
        return ControlNetGuide(file.model, picture, weight, mode, file.pooled)
    if isinstance(file.model, T2IAdapter):
        return FeatureGuide(file.model, unet, picture, weight, mode)
    raise SettingError(f"{file.name} is an {file.kind}, which follows no map: a ControlNet or T2I-Adapter is needed")


def prompt_by(
    file: ControlFile,
    unet: UNet,
    tokens: tuple[Tensor, Tensor],
    weight: float = 1.0,
    weight_type: WeightType = "linear",
) -> Guide:
    """Return the guide by which an IP-Adapter's file prompts with the tokens of pictures, and of none.

    Raises :class:`SettingError` for a file that reads maps.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which reads maps: an IP-Adapter is needed for a picture")
    return ImageGuide(file.model, unet, tokens, weight, weight_type)


def _attended(k: Tensor, v: Tensor, weight: float) -> ExtraAttention:
    return lambda q, heads: weight * attend_to_image(q, k, v, heads)


def share(weight_type: WeightType, number: int, count: int, place: str) -> float:
    """Return the share of an image prompt's weight that layer ``number`` of ``count``, at ``place``, gets."""
    along = number / count
    from_middle = abs(2 * along - 1)
    eased = {"ease in": 1 - along, "ease out": along, "ease in-out": 1 - from_middle, "reverse in-out": from_middle}
    if weight_type in eased:
        return 0.05 + 0.95 * eased[weight_type]
    weak: dict[str, tuple[str, ...]] = {
        "weak input": ("input",),
        "weak middle": ("middle",),
        "weak output": ("output",),
    }
    weak["strong middle"] = ("input", "output")
    return 0.2 if place in weak.get(weight_type, ()) else 1.0
