"""Token merging equals that of the package ``tomesd``, as in AUTOMATIC1111, and Forge's form of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.models.injection import Injection
from lib_delta.models.token_merging import RandomChoice, TokenMerging
from lib_delta.models.unet import TextContext, TransformerBlock, UNet, merge_tokens
from tests.support.tiny_unet import adapt, randn, tiny_unet

tomesd = pytest.importorskip("tomesd", reason="tomesd is not installed, whose token merging is the model of ours")
WIDTH, TEXT = 32, randn(1, 2, 7, 16)


@pytest.fixture
def block() -> TransformerBlock:
    torch.manual_seed(0)
    made = TransformerBlock(WIDTH, 16, 4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def by_tomesd(block: TransformerBlock, x: Tensor, size: tuple[int, int], merging: TokenMerging, **how: Any) -> Tensor:
    """The block with the package's merging: of queries, keys and values, or only of queries."""
    count, stride = int(x.shape[1] * merging.ratio), merging.stride
    normed = block.norm1(x[None])[0]
    compared = normed if merging.queries else x
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(
        compared, size[1], size[0], stride, stride, count, **how
    )
    keys = normed[None] if merging.queries else None
    x = unmerge(block.attn1(merge(normed)[None], keys=keys)[0]) + x
    x = block.attn2(block.norm2(x[None]), TextContext(TEXT), Injection())[0] + x
    return block.ff(block.norm3(x[None]))[0] + x


SIZES = [(8, 8), (9, 7), (4, 10)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(("stride", "queries"), [(2, False), (2, True), (4, True)])
@torch.no_grad()
def test_a_block_merges_as_the_package_does(
    block: TransformerBlock, size: tuple[int, int], ratio: float, stride: int, queries: bool
) -> None:
    x = randn(2, size[0] * size[1], WIDTH, seed=3)
    block.merging = merging = TokenMerging(ratio, stride, queries=queries)
    got = block(x[None], TextContext(TEXT), Injection(), torch.Size(size))[0]
    torch.testing.assert_close(got, by_tomesd(block, x, size, merging, no_rand=True), atol=1e-4, rtol=1e-4)
    block.merging = None
    plain = block(x[None], TextContext(TEXT), Injection(), torch.Size(size))[0]
    assert (plain - got).abs().max() > 3e-3, "there is nothing alike here"


@torch.no_grad()
def test_the_random_choice_is_the_one_that_torch_would_make_next(block: TransformerBlock) -> None:
    x, size = randn(2, 63, WIDTH, seed=3), (9, 7)
    torch.manual_seed(5)
    drawn = RandomChoice.as_next_on(torch.device("cpu"))
    block.merging = merging = TokenMerging(0.5, queries=True, choice=drawn)
    expected = by_tomesd(block, x, size, merging, generator=torch.default_generator)
    other = by_tomesd(block, x, size, merging, generator=torch.default_generator)
    for _ in range(2):  # the choice is the same in parts, and for base and adapted in turn
        got = block(x[None], TextContext(TEXT), Injection(), torch.Size(size))[0]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (other - expected).norm() > 1e-3 * expected.norm()


def merging_blocks(unet: UNet) -> Iterator[str]:
    return (name for name, layer in unet.named_modules() if getattr(layer, "merging", None) is not None)


def test_where_a_unet_merges() -> None:
    unet = tiny_unet()
    every = {name for name, layer in unet.named_modules() if isinstance(layer, TransformerBlock)}
    merge_tokens(unet, TokenMerging(0.5))
    largest = set(merging_blocks(unet))
    assert 0 < len(largest) < len(every)
    assert all(name.startswith(("input_blocks.1.", "output_blocks.2.", "output_blocks.3.")) for name in largest)
    merge_tokens(unet, TokenMerging(0.5, downsample=8))
    assert set(merging_blocks(unet)) == every
    merge_tokens(unet, None)
    assert not set(merging_blocks(unet))


def test_base_and_adapted_model_each_merge_what_is_alike_in_them() -> None:
    told, x, sigma = Conditioning(randn(1, 7, 16, seed=1), randn(1, 7, 16, seed=2)), randn(2, 4, 8, 8), torch.ones(2)

    def merged() -> tuple[UNet, dict[str, Tensor]]:
        unet = tiny_unet()
        weights = {n: w + 0.3 * w.std() * randn(*w.shape, seed=9) for n, w in unet.state_dict().items() if "attn1" in n}
        merge_tokens(unet, TokenMerging(0.5))
        return unet, weights

    unet, weights = merged()
    base = Source(unet, Parameterization(), told).denoised(SourceStep(x, sigma, 3.0))
    unet.load_state_dict(weights, strict=False)
    adapted = Source(unet, Parameterization(), told).denoised(SourceStep(x, sigma, 3.0))
    forked, weights = merged()
    both = Source(adapt(forked, weights), Parameterization(), told).denoised(SourceStep(x, sigma, 3.0))
    torch.testing.assert_close(both, torch.cat((base, adapted)), atol=1e-3, rtol=1e-3)
    assert (adapted - base).norm() > 1e-3 * base.norm()
