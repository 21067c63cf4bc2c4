"""What only a card can tell, as functions of a device: each gives the lines of a table that can be pasted anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from adapters_helpers import adapted_layers, locon
from torch import Tensor

from lib_delta.adapters.apply import Form, attach, detach
from lib_delta.adapters.load import AdapterFile, read_adapter
from lib_delta.devices import out_of_memory
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.parameterization import Parameterization
from lib_delta.placement import Placed, Stream, visit
from lib_delta.source import Conditioning, Source

# What a release of Stable Diffusion 1.5 has.
SD15 = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=320,
    levels=(320, 640, 1280, 1280),
    res_blocks=(2, 2, 2, 2),
    depth_in=(1, 1, 1, 1, 1, 1, 0, 0),
    depth_middle=1,
    depth_out=(0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    context_width=768,
    linear_projection=False,
)
SEED, CFG, SIGMA = 0, 6.0, 3.0


@dataclass(frozen=True)
class Line:
    """A line of the table: what was looked at, what was found, and whether that is as it should be."""

    what: str
    found: str
    good: bool


@dataclass(frozen=True)
class Bench:
    """Where the checks run: ``side`` is that of the latents; ``used`` counts the device's bytes in use."""

    device: torch.device
    config: UNetConfig
    side: int
    used: Callable[[], int]

    def unet(self, dtype: torch.dtype = torch.float32) -> UNet:
        """Return the same random UNet every time; it is made in fp32 and then cast."""
        unet = UNet(self.config).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(SEED)
        for weight in unet.parameters():
            scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(std=scale, generator=generator)
        return unet.to(self.device, dtype)

    def lora(self, unet: UNet) -> AdapterFile:
        """Return a LoRA of rank 8 on all attention and convolution layers."""
        return read_adapter("random", locon(unet, list(adapted_layers(unet)), rank=8), unet)

    def source(self, unet: UNet) -> Source:
        """Return the source with prompts of random numbers."""
        told = [self.random(1, 77, self.config.context_width, seed=i) for i in (1, 2)]
        return Source(unet, Parameterization(), Conditioning(*told))

    def random(self, *shape: int, seed: int = 3) -> Tensor:
        """Return normal random numbers on the device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def delta(self, source: Source) -> Tensor:
        """Return the delta of one step, in fp32."""
        x = SIGMA * self.random(1, 4, self.side, self.side)
        return source.deltas(x, torch.tensor([SIGMA]).to(self.device), CFG)[0]


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return how far a delta is from another, as a share of it."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def precision(bench: Bench) -> Iterator[Line]:
    """Compare the forked pass in half precision, merged and low-rank, with fp32."""
    unet = bench.unet()
    file = bench.lora(unet)
    deltas = {}
    forms: tuple[Form, ...] = ("merged", "bypass")
    for form in forms:
        attach(unet, [(file, 1.0)], form)
        deltas[form] = bench.delta(bench.source(unet))
    between = apart(deltas["bypass"], deltas["merged"])
    yield Line("merged and low-rank, fp32", f"{between:.1e} apart", between < 1e-3)
    for dtype in (torch.float16, torch.bfloat16):
        half = bench.unet(dtype)
        for form in forms:
            attach(half, [(file, 1.0)], form)
            error = apart(bench.delta(bench.source(half)), deltas["merged"])
            yield Line(f"{form} delta, {str(dtype).removeprefix('torch.')}", f"{error:.1e} from fp32", error < 0.25)


def ambient(bench: Bench) -> Iterator[Line]:
    """Move in inference mode, merge again, and merge under autocast."""
    unet = bench.unet()
    file = bench.lora(unet)
    attach(unet, [(file, 0.5)], "merged")
    wanted = bench.delta(bench.source(unet))
    for moved in ("cpu", bench.device):
        with torch.inference_mode():
            unet.to(moved)
        attach(unet, [(file, 1.0)], "merged")
        attach(unet, [(file, 0.5)], "merged")
    error = apart(bench.delta(bench.source(unet)), wanted)
    yield Line("merged anew after moves in inference mode", f"{error:.1e} apart", error < 1e-4)
    detach(unet)
    with torch.autocast(bench.device.type, torch.bfloat16):
        attach(unet, [(file, 0.5)], "merged")
        under = bench.delta(bench.source(unet))
    error = apart(under, wanted)
    yield Line("merged and evaluated under autocast", f"{error:.1e} apart", error < 1e-4)


def shortage(bench: Bench, short: Callable[[float], AbstractContextManager[object]]) -> Iterator[Line]:
    """Run a step with too little memory for one pass, then with too little for anything, then with enough.

    ``short`` leaves a share of what a pass needs.
    """
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "bypass")
    source = bench.source(unet)
    wanted = bench.delta(source)
    before = source.evaluations
    with short(0.6):
        error = apart(bench.delta(source), wanted)
    parts = source.evaluations - before
    yield Line("a step where one pass does not fit", f"{parts} parts, {error:.1e} apart", parts > 1 and error < 1e-3)
    said = "no error"
    try:
        with short(0.0):
            bench.delta(source)
    except Exception as found:
        said = "out of memory" if out_of_memory(found) else f"{type(found).__name__}: {found}"[:60]
    yield Line("a step where nothing fits", said, said == "out of memory")
    error = apart(bench.delta(bench.source(unet)), wanted)
    yield Line("the next run", f"{error:.1e} apart", error < 1e-4)


def swaps(bench: Bench, count: int = 100) -> Iterator[Line]:
    """Swap adapters and forms, and look at what stays in use."""
    unet = bench.unet(torch.float16 if bench.device.type == "cuda" else torch.float32)
    file = bench.lora(unet)
    levels: list[int] = []
    for i in range(count):
        attach(unet, [(file, 0.5 + i / count)], "merged" if i % 2 else "bypass")
        if i % 2:
            levels.append(bench.used())
    grown = levels[-1] - levels[0]
    yield Line(f"{count} swaps of a LoRA", f"{grown / 2**20:+.1f} MB in use", abs(grown) < 2**20)


def placements(bench: Bench) -> Iterator[Line]:
    """Compute on a visit and block by block, and look at what stays on the device."""
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "bypass")
    wanted = bench.delta(bench.source(unet))
    unet.to("cpu")
    resting = bench.used()
    for name in ("on a visit", "block by block"):
        placed: Placed = Stream(unet, [], bench.device) if name == "block by block" else visit(unet, bench.device)
        error = apart(bench.delta(bench.source(unet)), wanted)
        there = bench.used() - resting
        placed.come_home()
        stays = bench.used() - resting
        found = f"{error:.1e} apart, {there / 2**20:.0f} MB on the device, {stays / 2**20:.1f} MB afterwards"
        yield Line(name, found, error < 1e-4 and abs(stays) < 2**20)


def synchronisation(bench: Bench, watched: Callable[[], AbstractContextManager[Sequence[str]]]) -> Iterator[Line]:
    """Look for points at which a step waits for the device; ``watched`` lists them."""
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "merged")
    source = bench.source(unet)
    x, sigma = SIGMA * bench.random(1, 4, bench.side, bench.side), torch.tensor([SIGMA]).to(bench.device)
    source.deltas(x, sigma, CFG, 0)
    with watched() as waits:
        source.deltas(x, sigma, CFG, 1)
    found = f"{len(waits)}: {waits[0]}"[:80] if waits else "none"
    yield Line("points at which a step waits for the device", found, not waits)


def table(head: str, lines: Sequence[Line]) -> str:
    """Return the lines as a table in Markdown."""
    rows = [f"| {line.what} | {line.found} | {'ok' if line.good else '**not ok**'} |" for line in lines]
    return "\n".join([head, "", "| check | found | |", "|---|---|---|", *rows])
