"""How much one forked pass saves over two separate ones, and what it takes to swap a LoRA: ``python -m bench``.

Everything is timed side by side in one run, A B A B, and given as the ratio of medians: seconds differ
from machine to machine, ratios much less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lib_delta.adapters.apply import Form, attach, detach
from lib_delta.adapters.load import AdapterFile, read_adapter
from lib_delta.fork import Conv2d, Linear
from lib_delta.models.unet import UNet, UNetConfig

WIDTHS = {"tiny": 64, "small": 128, "full": 320}


def sd15(width: int) -> UNetConfig:
    """Return SD 1.5's layout at any width."""
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=width,
        levels=(width, 2 * width, 4 * width, 4 * width),
        res_blocks=(2, 2, 2, 2),
        depth_in=(1, 1, 1, 1, 1, 1, 0, 0),
        depth_middle=1,
        depth_out=(0, 0, 0, *[1] * 9),
        context_width=768,
        linear_projection=False,
    )


def random_lora(unet: UNet, rank: int, only: str) -> AdapterFile:
    """Return a LoRA of random factors for the layers whose path contains ``only``."""
    tensors = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, (Linear, Conv2d)) and only in path:
            key = "lora_unet_" + path.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = 0.01 * torch.randn(rank, *layer.weight.shape[1:])
            tail = (1, 1) if layer.weight.ndim == 4 else ()
            tensors[f"{key}.lora_up.weight"] = 0.01 * torch.randn(layer.weight.shape[0], rank, *tail)
    return read_adapter("random LoRA", tensors, unet)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=sorted(WIDTHS), default="tiny", help="full is SD 1.5's own, 320 channels")
    parser.add_argument("--size", type=int, default=32, help="latents are this many pixels wide and high")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unet = UNet(sd15(WIDTHS[options.width])).requires_grad_(False).to(device)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.02)
    x, t = torch.randn(1, 2, 4, options.size, options.size, device=device), torch.full((2,), 500.0, device=device)
    context = torch.randn(1, 2, 77, 768, device=device)

    @torch.no_grad()
    def once() -> Tensor:
        return unet(x, t, context)

    print(
        "| layers adapted | form | time of the forked pass, in plain passes (two separate passes: 2) |\n|---|---|---|"
    )
    forms: tuple[Form, ...] = ("merged", "bypass")
    for title, only in (("all", ""), ("attention", "attn"), ("decoder", "output_blocks")):
        lora = random_lora(unet, options.rank, only)
        for form in forms:
            times = alternate(
                lambda form=form, lora=lora: attach(unet, [(lora, 1.0)], form),
                lambda: detach(unet),
                once,
                options.pairs,
            )
            print(f"| {title} | {form} | {times:.2f} |")
    print("\n| layers adapted | form | one LoRA swapped for another, in plain passes | seconds |\n|---|---|---|---|")
    for title, only in (("all", ""), ("attention", "attn")):
        loras = [random_lora(unet, options.rank, only) for _ in range(2)]
        for form in forms:
            detach(unet)
            plain = statistics.median(timed(once) for _ in range(options.pairs + 1))
            attach(unet, [(loras[0], 1.0)], form)
            # The first swap is a warm-up.
            swaps = [partial(attach, unet, [(loras[i % 2], 1.0)], form) for i in range(1, options.pairs + 2)]
            seconds = statistics.median([timed(swap) for swap in swaps][1:])
            print(f"| {title} | {form} | {seconds / plain:.2f} | {seconds:.2f} |")
    detach(unet)


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(adapt: Callable[[], None], restore: Callable[[], None], run: Callable[[], object], pairs: int) -> float:
    """Return the median time of ``run`` when adapted over that when restored; the first pair is a warm-up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs + 1):
        for prepare, times in zip((adapt, restore), seconds, strict=True):
            prepare()
            seconds_taken = timed(run)
            if pair:
                times.append(seconds_taken)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
    main()
