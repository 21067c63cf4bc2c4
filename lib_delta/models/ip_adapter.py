"""IP-Adapter: a picture as a prompt, through separate cross-attentions (Ye et al. 2023, arXiv 2308.06721).

A projection maps the output of CLIP's image encoder to tokens of the text's width.  Each cross-attention of the UNet
has a second key and value for them, and adds the result for its queries.  Key names are those of the release.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_delta.models import forked_layers
from lib_delta.models.forked_layers import LayerNorm, Linear
from lib_delta.models.unet import CrossAttention, SpatialTransformer, UNet

HEAD_WIDTH = 64  # of the resampler's attention


class TokenProjection(nn.Module):
    """The first release's projection: the picture's single embedding as a few tokens."""

    of_patches = False

    def __init__(self, seen_width: int, context_width: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.seen_width = tokens, seen_width
        self.proj = Linear(seen_width, tokens * context_width)
        self.norm = LayerNorm(context_width)

    def forward(self, seen: Tensor) -> Tensor:
        """Map ``(N, seen_width)`` to ``(N, tokens, context_width)``."""
        return self.norm(self.proj(seen[None])[0].unflatten(1, (self.tokens, -1)))


class PatchProjection(nn.Module):
    """The "full" form's projection: every patch becomes a token."""

    of_patches = True

    def __init__(self, seen_width: int, context_width: int) -> None:
        super().__init__()
        self.seen_width = seen_width
        self.proj = nn.ModuleDict(
            {
                "0": Linear(seen_width, seen_width),
                "2": Linear(seen_width, context_width),
                "3": LayerNorm(context_width),
            }
        )

    def forward(self, seen: Tensor) -> Tensor:
        """Map ``(N, patches, seen_width)`` to ``(N, patches, context_width)``."""
        return self.proj["3"](self.proj["2"](F.gelu(self.proj["0"](seen))))


class PerceiverAttention(nn.Module):
    """Attention of a few learned tokens over the patches and themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * HEAD_WIDTH
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.to_q = Linear(width, inner, bias=False)
        self.to_kv = Linear(width, 2 * inner, bias=False)
        self.to_out = Linear(inner, width, bias=False)

    def forward(self, seen: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat((self.norm1(seen), latents), 1)).chunk(2, -1)
        out = forked_layers.attention(self.to_q(latents)[None], k[None], v[None], self.heads)[0]
        return self.to_out(out)


class PerceiverFeedForward(nn.Module):
    """A norm and two layers; the release has a Sequential, whose third part has no weights."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.up, self.down = Linear(width, inner, bias=False), Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Resampler(nn.Module):
    """The "plus" form's projection: learned tokens attend to the patches."""

    of_patches = True

    def __init__(
        self, seen_width: int, width: int, context_width: int, *, tokens: int, depth: int, heads: int, inner: int
    ) -> None:
        super().__init__()
        self.seen_width = seen_width
        self.latents = nn.Parameter(torch.empty(1, tokens, width))
        self.proj_in, self.proj_out = Linear(seen_width, width), Linear(width, context_width)
        self.norm_out = LayerNorm(context_width)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(width, heads), PerceiverFeedForward(width, inner)]) for _ in range(depth)
        )

    def forward(self, seen: Tensor) -> Tensor:
        """Map ``(N, patches, seen_width)`` to ``(N, tokens, context_width)``."""
        latents = self.latents.expand(len(seen), -1, -1)
        seen = self.proj_in(seen)
        for attention, feed_forward in self.layers:
            latents = attention(seen, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm_out(self.proj_out(latents))


Projection = TokenProjection | PatchProjection | Resampler


class ImageAttention(nn.Module):
    """The second key and value of one cross-attention."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = Linear(context_width, width, bias=False)
        self.to_v_ip = Linear(context_width, width, bias=False)


class IPAdapter(nn.Module):
    """A projection, and a key and value for each cross-attention of a UNet."""

    def __init__(self, projection: Projection, context_width: int, widths: Sequence[int]) -> None:
        """Make an adapter for cross-attentions of these ``widths``, in the order of :func:`cross_attentions`."""
        super().__init__()
        self.image_proj = projection
        # The numbers of diffusers' attention processors, of which every other one is a self-attention's.
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): ImageAttention(context_width, width) for i, width in enumerate(widths)}
        )

    def keys_and_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each cross-attention's keys and values ``(N, S, width)`` for tokens ``(N, S, context_width)``."""
        return [(layer.to_k_ip(tokens), layer.to_v_ip(tokens)) for layer in self.ip_adapter.values()]


def cross_attentions(unet: UNet) -> Iterator[tuple[str, CrossAttention]]:
    """Yield the UNet's cross-attentions in the order of IP-Adapters: encoder, decoder, then middle block.

    Each comes with its part of the UNet: "input", "output" or "middle".
    """
    parts = (("input", unet.input_blocks), ("output", unet.output_blocks), ("middle", unet.middle_block))
    for place, blocks in parts:
        for module in blocks.modules():
            if isinstance(module, SpatialTransformer):
                for block in module.transformer_blocks:
                    yield place, block.attn2


def attend_to_image(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Return the attention of queries ``(N, T, C)`` over a picture's keys and values ``(N, S, C)``."""
    return forked_layers.attention(q[None], k[None], v[None], heads)[0]
