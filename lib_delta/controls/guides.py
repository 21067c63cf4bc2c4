"""Guides: the additions of a ControlNet, a T2I-Adapter or an IP-Adapter to the adapted model's forward pass."""

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

# The emphasis on prompt or control, with the modes of Mikubill's extension.  "prompt" and "control" weaken the
# additions to shallow layers.  "control" also leaves the negative prompt's estimate unchanged, so that guidance
# strengthens the control.
Mode = Literal["balanced", "prompt", "control"]
SOFTENED = 0.825  # the weight of each layer relative to the one below it
# The distribution of an image prompt's weight over the layers (names of ComfyUI_IPAdapter_plus).
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
    """Guide by a map through a ControlNet.

    ``pooled`` averages the additions over the image and leaves the negative prompt alone, the training of the "shuffle"
    model.  Raises :class:`SettingError` for an unknown mode.
    """

    model: ControlNet
    map: ControlMap
    weight: float = 1.0
    mode: Mode = "balanced"
    pooled: bool = False
    _hints: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _text_context: tuple[Tensor, TextContext] | None = None  # with the context that it was made of

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
        """Return the network's text context, which caches its keys and values while the prompts stay the same."""
        if self._text_context is None or self._text_context[0] is not inputs.context:
            self._text_context = inputs.context, TextContext(of_rows(inputs.context, rows)[None], known={})
        return self._text_context[1]

    def weights(self, count: int) -> list[float]:
        """Return the weight of each of ``count`` layers, the middle block last."""
        softened = 1.0 if self.mode == "balanced" else SOFTENED
        return [self.weight * softened ** (count - 1 - i) for i in range(count)]

    def _hint(self, inputs: GuideInputs) -> Tensor:
        """Return the map's features ``(count, C, h, w)``, cached because they are the same at every step."""
        height, width = inputs.x.shape[-2:]
        if (height, width) not in self._hints:
            factor = self.model.factor
            picture = self.map.at(factor * height, factor * width, self.model.hint_channels)
            self._hints = {(height, width): self.model.hint(picture.to(inputs.x))}
        return self._hints[height, width]


@dataclass(eq=False)
class FeatureGuide:
    """Guide by a map through a T2I-Adapter; ``mode`` "control" leaves the negative prompt's estimate unchanged.

    Raises :class:`SettingError` for an unknown mode.
    """

    model: T2IAdapter
    unet: UNet
    map: ControlMap
    weight: float = 1.0
    mode: Mode = "balanced"
    factor: int = 8  # image pixels per latent pixel
    _features: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_unknown(self.mode, get_args(Mode), "control mode")

    def __call__(self, inputs: GuideInputs) -> Injection:
        if not self.weight:
            return Injection()
        rows = inputs.prompt_rows if self.mode == "control" else None
        numbers = of_rows(inputs.images, rows) % self.map.count
        weighted = [self.weight * feature[numbers] for feature in self._map_features(inputs)]
        return feature_injection(self.unet, batch_of(weighted, rows, len(inputs.x)))

    def _map_features(self, inputs: GuideInputs) -> list[Tensor]:
        size = (inputs.x.shape[-2], inputs.x.shape[-1])
        if size not in self._features:
            unit = self.model.config.unshuffled
            # Round up, as the UNet's downsampling does.
            height, width = (-(-side * self.factor // unit) * unit for side in size)
            picture = self.map.at(height, width, self.model.config.picture_channels)
            self._features = {size: self.model(picture.to(inputs.x))}
        return self._features[size]


@dataclass(eq=False)
class ImageGuide:
    """Guide by image prompts through an IP-Adapter.

    ``tokens`` are the projections of the pictures and of an empty picture: ``(S, context_width)`` each.  Raises
    :class:`SettingError` for an unknown weight type.
    """

    model: IPAdapter
    unet: UNet
    tokens: tuple[Tensor, Tensor]
    weight: float = 1.0
    weight_type: WeightType = "linear"
    _keys_and_values: Sequence[tuple[Tensor, Tensor]] = ()  # of each layer, the same at every step

    def __post_init__(self) -> None:
        _refuse_unknown(self.weight_type, get_args(WeightType), "weight type")

    def __call__(self, inputs: GuideInputs) -> Injection:
        if not self.weight:
            return Injection()
        if not self._keys_and_values:
            self._keys_and_values = self.model.keys_and_values(torch.stack(self.tokens).to(inputs.context))
        row = inputs.uncond.long()
        layers = list(cross_attentions(self.unet))
        attended = {
            module: _attended(k[row], v[row], self.weight * share(self.weight_type, i, len(layers), place))
            for i, ((place, module), (k, v)) in enumerate(zip(layers, self._keys_and_values, strict=True))
        }
        return Injection(extra_attention=attended)  # type: ignore[arg-type]


def of_rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows of these numbers; all rows for None."""
    return tensor if rows is None else tensor[rows]


def _refuse_unknown(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise SettingError(f"the {what} is {value!r}: one of {', '.join(known)} is needed")


def follow(
    file: ControlFile, unet: UNet, control_map: ControlMap, weight: float = 1.0, *, mode: Mode = "balanced"
) -> Guide:
    """Return the guide of a ControlNet's or T2I-Adapter's file for a map.

    Raises :class:`SettingError` for an IP-Adapter, which reads no maps.
    """
    if isinstance(file.model, ControlNet):
        return ControlNetGuide(file.model, control_map, weight, mode=mode, pooled=file.pooled)
    if isinstance(file.model, T2IAdapter):
        return FeatureGuide(file.model, unet, control_map, weight, mode=mode)
    raise SettingError(f"{file.name} is an {file.kind}, which reads no maps: a ControlNet or T2I-Adapter is needed")


def prompt_by(
    file: ControlFile,
    unet: UNet,
    tokens: tuple[Tensor, Tensor],
    weight: float = 1.0,
    *,
    weight_type: WeightType = "linear",
) -> Guide:
    """Return the guide of an IP-Adapter's file for image prompts, by the tokens of the pictures and of an empty one.

    Raises :class:`SettingError` for a file that reads maps.
    """
    if not isinstance(file.model, IPAdapter):
        raise SettingError(f"{file.name} is a {file.kind}, which reads maps: an IP-Adapter is needed for a picture")
    return ImageGuide(file.model, unet, tokens, weight, weight_type=weight_type)


def _attended(k: Tensor, v: Tensor, weight: float) -> ExtraAttention:
    return lambda q, heads: weight * attend_to_image(q, k, v, heads)


def share(weight_type: WeightType, number: int, count: int, place: str) -> float:
    """Return layer ``number``'s share of an image prompt's weight, out of ``count`` layers; it is at ``place``."""
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
