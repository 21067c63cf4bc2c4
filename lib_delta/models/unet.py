"""The UNet of Stable Diffusion 1.x, 2.x and XL, in the key names of the original checkpoints.

Architecture: Rombach et al. 2022 (arXiv 2112.10752, latent diffusion), Podell et al. 2023 (arXiv 2307.01952, SDXL).
The shapes of the weights determine everything except the rule for attention heads, so that one class covers all
families and widths.  Activations have the branch axis of :mod:`lib_delta.models.forked_layers`.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.models import forked_layers
from lib_delta.models.forked_layers import Conv2d, GroupNorm, LayerNorm, Linear
from lib_delta.models.injection import Injection
from lib_delta.models.network import Network
from lib_delta.models.token_merging import TokenMerging


@dataclass(frozen=True)
class UNetConfig:
    """A UNet's architecture, as its weights show it.

    ``levels[i]`` is the number of channels at 1/2**i of the latent's size.  ``depth_in`` and ``depth_out`` are the
    transformer depths of the encoder and decoder blocks (0: no attention), in key order.  SD 1.x has a fixed number of
    ``heads`` (8) at every level; SD 2.x and XL have a fixed ``head_width`` (64) instead.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    levels: tuple[int, ...]
    res_blocks: tuple[int, ...]
    depth_in: tuple[int, ...]
    depth_middle: int
    depth_out: tuple[int, ...]
    context_width: int
    linear_projection: bool
    label_width: int = 0
    heads: int = 8
    head_width: int | None = None

    @classmethod
    def sd15(cls, width: int = 320) -> UNetConfig:
        """Return the configuration of Stable Diffusion 1.5; another ``width`` makes it narrower in proportion."""
        return cls(
            in_channels=4,
            out_channels=4,
            model_channels=width,
            levels=(width, 2 * width, 4 * width, 4 * width),
            res_blocks=(2, 2, 2, 2),
            depth_in=(1, 1, 1, 1, 1, 1, 0, 0),
            depth_middle=1,
            depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
            context_width=768,
            linear_projection=False,
        )

    def heads_for(self, channels: int) -> int:
        """Return the number of attention heads of a block with ``channels``."""
        return self.heads if self.head_width is None else channels // self.head_width

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], head_width: int | None = None) -> UNetConfig:
        """Return the configuration of weights with these shapes; keys are below ``model.diffusion_model.``.

        ``head_width`` overrides the family's rule: 8 heads if the projections of attention blocks are convolutions,
        heads of width 64 if they are linear.
        Raises :class:`CheckpointError` for keys of anything else.
        """
        try:
            return cls._from_shapes(shapes, head_width)
        except (KeyError, IndexError, ValueError) as error:
            raise CheckpointError(f"these weights are not a Stable Diffusion UNet (no usable entry {error})") from error

    @classmethod
    def _from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], head_width: int | None) -> UNetConfig:
        model_channels = shapes["input_blocks.0.0.weight"][0]
        inputs = 1 + max(int(m[1]) for k in shapes if (m := re.match(r"input_blocks\.(\d+)\.", k)))
        outputs = 1 + max(int(m[1]) for k in shapes if (m := re.match(r"output_blocks\.(\d+)\.", k)))

        levels, res_blocks, depth_in = [model_channels], [0], []
        for i in range(1, inputs):
            if f"input_blocks.{i}.0.op.weight" in shapes:
                levels.append(model_channels)
                res_blocks.append(0)
                continue
            levels[-1] = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
            res_blocks[-1] += 1
            depth_in.append(_transformer_depth(shapes, f"input_blocks.{i}"))
        if outputs != sum(res_blocks) + len(levels):
            raise KeyError(f"output_blocks.{outputs - 1}")
        # Only attention blocks show the text's width.
        context = next((v[1] for k, v in shapes.items() if k.endswith("attn2.to_k.weight")), 0)
        projection = next((v for k, v in shapes.items() if k.endswith(".proj_in.weight")), (0, 0))
        linear = len(projection) == 2
        head_width = head_width or (64 if linear else None)
        _check_widths(shapes, (model_channels, *levels), head_width or 8)
        return cls(
            in_channels=shapes["input_blocks.0.0.weight"][1],
            out_channels=shapes["out.2.weight"][0],
            model_channels=model_channels,
            levels=tuple(levels),
            res_blocks=tuple(res_blocks),
            depth_in=tuple(depth_in),
            depth_middle=_transformer_depth(shapes, "middle_block"),
            depth_out=tuple(_transformer_depth(shapes, f"output_blocks.{i}") for i in range(outputs)),
            context_width=context,
            linear_projection=linear,
            label_width=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else 0,
            head_width=head_width,
        )


def _transformer_depth(shapes: Mapping[str, tuple[int, ...]], block: str) -> int:
    # Counts entries instead of taking the largest number: a damaged file must not make a huge module.
    blocks = re.compile(re.escape(block) + r"\.1\.transformer_blocks\.(\d+)\.")
    return len({m[1] for k in shapes if (m := blocks.match(k))})


def _check_widths(shapes: Mapping[str, tuple[int, ...]], widths: tuple[int, ...], head: int) -> None:
    """Raise ``ValueError`` for widths that 32 groups of a norm, or heads (multiples of ``head``), do not divide."""
    attended = [v[0] for k, v in shapes.items() if k.endswith(".proj_in.weight")]
    bad = [w for w in widths if w < 1 or w % 32] + [w for w in attended if w % head]
    if bad:
        raise ValueError(f"of a fitting width: {bad[0]} channels")


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Embed continuous timesteps ``(N,)`` as ``(N, width)`` cosines and sines (arXiv 1706.03762, 3.5)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000) / half))
    angles = t.float()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), -1)


@dataclass(frozen=True)
class TextContext:
    """The conditioning of a forward pass's rows.

    ``context`` is the encoded text ``(R, M, T, C)``.  Rows that share an image, as cond and uncond do, are one row
    until they attend to their texts.  ``rows`` ``(M,)`` has the number of each row's image, among N images.
    ``known`` caches keys and values for later forward passes with the same prompts; None caches nothing.
    """

    context: Tensor
    rows: Tensor | None = None
    known: dict[CrossAttention, _KeysValues] | None = None

    @cached_property
    def adapted(self) -> Tensor:
        """The adapted model's encoded text ``(M, T, C)``; always the same object."""
        return self.context[-1]

    @classmethod
    def of(cls, context: Tensor | TextContext) -> TextContext:
        """Wrap encoded text as a context with one row for each image; return a context unchanged."""
        return context if isinstance(context, TextContext) else cls(context)

    def keys_values(self, layer: CrossAttention) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values of the context, ``(R, M, T, C)`` each."""
        cached = None if self.known is None else self.known.get(layer)
        if cached is None or not cached.current(layer):
            made_with = tuple(map(_identity, _weight_sources(layer)))
            cached = _KeysValues(layer.to_k(self.context), layer.to_v(self.context), made_with)
            if self.known is not None:
                self.known[layer] = cached
        return cached.keys, cached.values


@dataclass(frozen=True)
class _KeysValues:
    """A layer's keys and values, with weak references to the weights that made them."""

    keys: Tensor
    values: Tensor
    made_with: tuple[Callable[[object], bool], ...]

    def current(self, layer: CrossAttention) -> bool:
        """Return whether the layer still has those weights, on the same device."""
        same = all(made_with(now) for made_with, now in zip(self.made_with, _weight_sources(layer)))
        return same and (self.keys.device, self.keys.dtype) == (layer.to_k.weight.device, layer.to_k.weight.dtype)


def _weight_sources(layer: CrossAttention) -> tuple[object, ...]:
    return layer.to_k.weight, layer.to_v.weight, layer.to_k.adaptation, layer.to_v.adaptation


def _identity(thing: object) -> Callable[[object], bool]:
    """Return a test for this object that refers to it weakly."""
    if thing is None:
        return lambda other: other is None
    ref = weakref.ref(thing)
    return lambda other: other is not None and ref() is other


class ResBlock(nn.Module):
    """Two convolutions with the timestep's embedding added between them."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int) -> None:
        super().__init__()
        # Key names are those of a Sequential: norm at 0, convolution last; SiLU (and dropout) between.
        self.in_layers = nn.ModuleDict({"0": GroupNorm(in_channels), "2": Conv2d(in_channels, out_channels, 3)})
        self.emb_layers = nn.ModuleDict({"1": Linear(emb_channels, out_channels)})
        self.out_layers = nn.ModuleDict({"0": GroupNorm(out_channels), "3": Conv2d(out_channels, out_channels, 3)})
        self.skip_connection = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor, rows: Tensor | None = None) -> Tensor:
        h = self.in_layers["2"](F.silu(self.in_layers["0"](x)))
        shift = self.emb_layers["1"](F.silu(emb))
        h = h + (shift if shift.shape[1] == h.shape[1] else forked_layers.expand_rows(shift, rows))[..., None, None]
        h = self.out_layers["3"](F.silu(self.out_layers["0"](h)))
        return (x if self.skip_connection is None else self.skip_connection(x)) + h


class CrossAttention(nn.Module):
    """Attention of tokens over a context; without one, over themselves."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_width, width, bias=False)
        self.to_v = Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleDict({"0": Linear(width, width)})

    def forward(
        self, x: Tensor, text: TextContext | None = None, injection: Injection | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Attend to a text; without one, to ``keys``, by default x."""
        q = self.to_q(x)
        to = x if keys is None else keys
        k, v = (self.to_k(to), self.to_v(to)) if text is None else text.keys_values(self)
        h = forked_layers.attention(q, k, v, self.heads)
        if injection is not None:
            h = injection.beside_text(self, q, h, self.heads)
        return self.to_out["0"](h)


class GEGLU(nn.Module):
    """Gated GELU (arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with a gated GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": GEGLU(width, 4 * width), "2": Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each with a norm and a residual."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.attn2 = CrossAttention(width, context_width, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
        self.merging: TokenMerging | None = None

    def forward(self, x: Tensor, text: TextContext, injection: Injection, size: torch.Size) -> Tensor:
        """Evaluate the block for pixels ``(R, N, T, C)`` of feature maps of a ``size``."""
        normed = self.norm1(x)
        merging = self.merging
        attended = self.attn1(normed) if merging is None else merging.attend(self.attn1, x, normed, size)
        x = forked_layers.expand_rows(attended + x, text.rows)
        x = self.attn2(self.norm2(x), text, injection) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.linear_projection
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)
        heads = config.heads_for(channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_width, heads) for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels) if self.linear else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: TextContext, injection: Injection) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(3).transpose(2, 3)
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, text, injection, size)
        if self.linear:
            h = self.proj_out(h)
        # A transposed view would make later activations channels-last, and convert weights in each forward pass.
        h = h.transpose(2, 3).unflatten(3, size).contiguous()
        if not self.linear:
            h = self.proj_out(h)
        return h + forked_layers.expand_rows(x, text.rows)


class Downsample(nn.Module):
    """Halve the size by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the size (to exactly ``size``, as halving may have rounded up) and convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        enlarged = F.interpolate(x.flatten(0, 1), size=size, mode="nearest")
        return self.conv(enlarged.unflatten(0, x.shape[:2]))


class UNetEncoder(nn.Module):
    """The half of the UNet that ControlNets copy: embeddings, encoder and middle block."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        emb = 4 * config.model_channels
        self.time_embed = _two_layer_mlp(config.model_channels, emb)
        if config.label_width:
            self.label_emb = nn.ModuleList([_two_layer_mlp(config.label_width, emb)])
        channels = config.model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv2d(config.in_channels, channels, 3)])])
        self.skips = [channels]  # the channels of each skip connection to the decoder
        depths, last = iter(config.depth_in), len(config.levels) - 1
        for level, (width, count) in enumerate(zip(config.levels, config.res_blocks)):
            for _ in range(count):
                self.input_blocks.append(_block(channels, width, next(depths), config))
                channels = width
                self.skips.append(channels)
            if level < last:
                self.input_blocks.append(nn.ModuleList([Downsample(channels)]))
                self.skips.append(channels)
        middle = _block(channels, channels, config.depth_middle, config)
        self.middle_block = nn.ModuleList([*middle, ResBlock(channels, channels, emb)])

    def embed(self, t: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Embed timesteps ``(N,)`` and, for SDXL, the label ``(R, N, label_width)`` as ``(R, N, C)``."""
        emb = timestep_embedding(t, self.config.model_channels).to(dtype)[None]
        emb = _mlp(self.time_embed, emb)
        if not self.config.label_width:
            return emb
        if label is None:
            raise ValueError("this UNet (SDXL) needs a label embedding: pooled text and image size")
        return emb + _mlp(self.label_emb[0], label)

    def encode(self, x: Tensor, emb: Tensor, context: Tensor | TextContext, injection: Injection) -> list[Tensor]:
        """Return the outputs of every input block and of the middle block."""
        text = TextContext.of(context)
        outputs: list[Tensor] = []
        h = x
        for number, parts in enumerate(self.input_blocks):
            h = injection.after_block(number, _run_block(parts, h, emb, text, injection))
            outputs.append(h)
        outputs.append(_run_block(self.middle_block, h, emb, text, injection))
        return [forked_layers.expand_rows(output, text.rows) for output in outputs]


class UNet(UNetEncoder, Network):
    """Predicts noise, velocity or flow from a noisy latent, its timestep and the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, skips = self.skips[-1], list(self.skips)
        self.output_blocks = nn.ModuleList()
        depths = iter(config.depth_out)
        for level in range(len(config.levels) - 1, -1, -1):
            width, count = config.levels[level], config.res_blocks[level]
            for i in range(count + 1):
                parts = _block(channels + skips.pop(), width, next(depths), config)
                if level > 0 and i == count:
                    parts.append(Upsample(width))
                channels = width
                self.output_blocks.append(parts)
        self.out = nn.ModuleDict({"0": GroupNorm(channels), "2": Conv2d(channels, config.out_channels, 3)})

    @property
    def entry(self) -> Tensor:
        """The weight of the timestep's first layer."""
        weight: Tensor = self.time_embed["0"].weight
        return weight

    @property
    def streamed_parts(self) -> Sequence[nn.Module]:
        """The parts of all blocks but the first convolution."""
        blocks = (*self.input_blocks[1:], self.middle_block, *self.output_blocks)
        return [part for block in blocks for part in block]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | TextContext,
        label: Tensor | None = None,
        injection: Injection = Injection(),  # noqa: B008 (it is frozen)
    ) -> Tensor:
        """Evaluate the network, both branches at once.

        Args:
            x: latents ``(R, N, C, H, W)``, in the scale of the model's input; any H, W.
            t: continuous timesteps ``(N,)``, 0 to 999.
            context: encoded text ``(R, N, T, context_width)``, or a :class:`TextContext` of M rows for the N images.
            label: pooled text and size embedding ``(R, N or M, label_width)``, for SDXL.
            injection: additions to the adapted branch, by a ControlNet or an image prompt.

        Returns:
            The prediction ``(R', N or M, C, H, W)``; ``R'`` is 1 if the branches are equal.
        """
        text = TextContext.of(context)
        if label is not None or injection.blocks:
            # Rows differ from the start.
            x, t = forked_layers.expand_rows(x, text.rows), forked_layers.expand_rows(t[None], text.rows)[0]
        emb = self.embed(t, label, x.dtype)
        *skips, h = injection.into_decoder(self.encode(x, emb, text, injection))
        for parts in self.output_blocks:
            h = forked_layers.cat(h, skips.pop(), dim=2)
            h = _run_block(parts, h, emb, text, injection, size=skips[-1].shape[-2:] if skips else None)
        return self.out["2"](F.silu(self.out["0"](h)))


def merge_tokens(unet: UNet, merging: TokenMerging | None) -> None:
    """Merge tokens in the blocks whose feature maps are large enough; None ends merging."""
    level = 0
    for parts in (*unet.input_blocks, unet.middle_block, *unet.output_blocks):
        level += any(isinstance(part, Downsample) for part in parts)
        setting = merging if merging is not None and 2**level <= merging.downsample else None
        for layer in parts.modules():
            if isinstance(layer, TransformerBlock):
                layer.merging = setting
        level -= any(isinstance(part, Upsample) for part in parts)


def _block(in_channels: int, out_channels: int, depth: int, config: UNetConfig) -> nn.ModuleList:
    parts: list[nn.Module] = [ResBlock(in_channels, out_channels, 4 * config.model_channels)]
    if depth:
        parts.append(SpatialTransformer(out_channels, depth, config))
    return nn.ModuleList(parts)


def _run_block(
    parts: nn.ModuleList,
    h: Tensor,
    emb: Tensor,
    text: TextContext,
    injection: Injection,
    *,
    size: torch.Size | None = None,
) -> Tensor:
    """Evaluate one block; an upsampling part enlarges to ``size``."""
    for part in parts:
        if isinstance(part, ResBlock):
            h = part(h, emb, text.rows)
        elif isinstance(part, SpatialTransformer):
            h = part(h, text, injection)
        elif isinstance(part, Upsample):
            h = part(h, size)
        else:
            h = part(h)
    return h


def _two_layer_mlp(inputs: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Linear(inputs, width), "2": Linear(width, width)})


def _mlp(layers: nn.ModuleDict, x: Tensor) -> Tensor:
    return layers["2"](F.silu(layers["0"](x)))
