"""Checks of a device, as functions that yield lines of a table.

They import torch and this extension, and nothing that a WebUI's Python lacks.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lib_delta.adapters import key_names
from lib_delta.adapters.adapter_file import AdapterFile, read_adapter
from lib_delta.adapters.attach import AdapterForm, attach, detach
from lib_delta.bridges import choose_bridge
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.devices import empty_cache, out_of_memory, trim_heap
from lib_delta.diffusion.latent_spaces import Space
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.models.forked_layers import Conv2d, Linear
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.runtime.compiling import compile_unet
from lib_delta.runtime.placement import Restorable, Stream, copy_to_device
from lib_delta.runtime.side_model import _store_as
from tests.gpu.card import MB, Card, own_memory

SD15 = UNetConfig.sd15()
# The same at a fraction of the width: what fits beside its own reference in fp32, and what a CPU computes in seconds.
HALF = UNetConfig.sd15(width=160)
FIFTH = UNetConfig.sd15(width=64)
# What torch compiles soon enough: one level, one transformer.
NARROWEST = replace(
    SD15, model_channels=32, levels=(32,), res_blocks=(1,), depth_in=(0,), depth_out=(0, 0), context_width=32
)
SEED, CFG, SIGMA = 0, 6.0, 3.0
RANK = 8
REPEATED = 1_000_003  # numbers of which weights are made where only the time is of interest; a prime
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Line:
    """A line of the table: the check, its result, and whether that is right (None: information)."""

    what: str
    found: str
    good: bool | None


@dataclass(frozen=True)
class Bench:
    """Where the checks run: ``side`` is that of the latents; ``used`` counts the device's bytes in use.

    ``config`` is what results are compared at, ``full`` what is timed, at latents of ``sides``; bridges are crossed at
    latents of ``crossings``.
    """

    device: torch.device
    config: UNetConfig
    side: int
    used: Callable[[], int | None]
    full: UNetConfig = SD15
    sides: tuple[int, ...] = (64, 128)
    crossings: tuple[tuple[int, int], ...] = ((128, 128), (144, 144), (228, 156))

    @property
    def card(self) -> Card:
        """The device and its memory."""
        return Card(self.device)

    def unet(self, dtype: torch.dtype = torch.float32, config: UNetConfig | None = None) -> UNet:
        """Return the same random UNet every time, made in fp32 on the CPU and then cast."""
        unet = UNet(config or self.config).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(SEED)
        for weight in unet.parameters():
            scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            weight.normal_(std=scale, generator=generator)
        return unet.to(self.device, dtype)

    def large(self, dtype: torch.dtype) -> UNet:
        """Return a full-width UNet, made on the device from a few repeated numbers."""
        with torch.device("meta"):
            unet = UNet(self.full).requires_grad_(False).eval().to(dtype)
        unet.to_empty(device=self.device)
        numbers = self.random(REPEATED).to(dtype)
        for weight in unet.parameters():
            scale = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
            repeated = numbers.repeat(-(-weight.numel() // REPEATED))[: weight.numel()]
            weight.copy_(repeated.view(weight.shape) * scale)
        return unet

    def lora(self, unet: UNet) -> AdapterFile:
        """Return a LoRA of rank 8 on all attention and convolution layers, in kohya's names."""
        generator = torch.Generator().manual_seed(SEED + 1)
        tensors = {}
        for path, layer in key_names.named_layers(unet).items():
            if isinstance(layer, (Linear, Conv2d)):
                out, inner, *kernel = layer.weight.shape
                down, up = (RANK, inner, *kernel), (out, RANK, *[1] * len(kernel))
                for part, shape in (("down", down), ("up", up)):
                    values = torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
                    tensors[f"lora_unet_{path.replace('.', '_')}.lora_{part}.weight"] = values
        return read_adapter("random", tensors, unet)

    def source(self, unet: UNet) -> Source:
        """Return the source with prompts of random numbers."""
        told = [self.random(1, 77, unet.config.context_width, seed=i) for i in (1, 2)]
        return Source(unet, Parameterization(), Conditioning(*told))

    def random(self, *shape: int, seed: int = 3) -> Tensor:
        """Return normal random numbers on the device."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def step(self, side: int | None = None) -> tuple[Tensor, Tensor]:
        """Return a state and its noise level."""
        side = side or self.side
        return SIGMA * self.random(1, 4, side, side), torch.tensor([SIGMA]).to(self.device)

    def delta(self, source: Source) -> Tensor:
        """Return the delta of one step, in fp32."""
        return source.deltas(SourceStep(*self.step(), CFG))[0]

    def halves(self) -> Iterator[tuple[str, torch.dtype]]:
        """Yield the device's half precisions."""
        for dtype in (torch.float16, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            if self.device.type == "cpu" and dtype == torch.float16:
                continue  # older torches have no products of it there
            try:
                probe = torch.ones(8, 8).to(self.device, dtype)
                float((probe @ probe).float().sum())
            except (RuntimeError, TypeError):
                continue
            yield name, dtype

    def half(self) -> torch.dtype:
        """Return a WebUI's default type: fp16, or fp32 on a CPU."""
        return torch.float32 if self.device.type == "cpu" else torch.float16


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the distance between two deltas, relative to the second."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def numbers(bench: Bench) -> Iterator[Line]:
    """Compare the forked pass with the CPU's, in fp32, in every form that an adapter can have."""
    home = replace(bench, device=torch.device("cpu"), config=FIFTH if bench.config.levels[0] > 64 else bench.config)
    there = replace(home, device=bench.device)
    file = home.lora(home.unet())
    forms: tuple[AdapterForm, ...] = ("merged", "bypass", "automatic")
    for form in forms:
        deltas = []
        for each in (home, there):
            unet = each.unet()
            attach(unet, [(file, 1.0)], form)
            deltas.append(each.delta(each.source(unet)).cpu())
        error = apart(deltas[1], deltas[0])
        yield Line(f"{form} delta against the CPU's, fp32", f"{error:.1e} apart", error < 1e-2)


def precision(bench: Bench) -> Iterator[Line]:
    """Compare the forked pass in half precision, merged and low-rank, with fp32."""
    unet = bench.unet()
    file = bench.lora(unet)
    deltas = {}
    forms: tuple[AdapterForm, ...] = ("merged", "bypass")
    for form in forms:
        attach(unet, [(file, 1.0)], form)
        deltas[form] = bench.delta(bench.source(unet))
    between = apart(deltas["bypass"], deltas["merged"])
    yield Line("merged and low-rank, fp32", f"{between:.1e} apart", between < 1e-3)
    known = []
    for name, dtype in bench.halves():
        known.append(name)
        half = bench.unet(dtype)
        for form in forms:
            attach(half, [(file, 1.0)], form)
            error = apart(bench.delta(bench.source(half)), deltas["merged"])
            yield Line(f"{form} delta, {name}", f"{error:.1e} from fp32", error < 0.25)
    yield Line("half precisions that the device has", ", ".join(known) or "none", None)


def hosts_settings(bench: Bench) -> Iterator[Line]:
    """Compare under WebUIs' settings: TF32, cuDNN's benchmark mode, autocast."""
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "merged")
    wanted = bench.delta(bench.source(unet))
    if bench.device.type == "cuda":
        for name, attributes in (("TF32", (True, True, False)), ("cudnn.benchmark", (False, False, True))):
            with _backends(*attributes):
                error = apart(bench.delta(bench.source(unet)), wanted)
            yield Line(f"fp32 with {name}", f"{error:.1e} apart", error < 0.05)
    for name, dtype in bench.halves():
        try:
            autocast = torch.autocast(bench.device.type, dtype)
        except (RuntimeError, AssertionError, AttributeError) as error:
            yield Line(f"under autocast, {name}", f"this torch has none here ({type(error).__name__})", None)
            continue
        with autocast:
            error = apart(bench.delta(bench.source(unet)), wanted)
        yield Line(f"under autocast, {name}", f"{error:.1e} apart", error < 1e-4)


@contextmanager
def _backends(matmul: bool, convolutions: bool, search: bool) -> Iterator[None]:
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = matmul, convolutions, search
    try:
        yield
    finally:
        products.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


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
    halves = dict(bench.halves())
    dtype = halves.get("float16" if bench.device.type != "cpu" else "bfloat16")
    try:
        autocast = torch.autocast(bench.device.type, dtype)
    except (RuntimeError, AssertionError, AttributeError) as error:
        yield Line("merged and evaluated under autocast", f"this torch has none here ({type(error).__name__})", None)
        return
    with autocast:
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


def swaps(bench: Bench, count: int = 50) -> Iterator[Line]:
    """Swap adapters and forms, and compare the memory in use."""
    unet = bench.unet(bench.half())
    file = bench.lora(unet)
    levels: list[int | None] = []
    for i in range(count):
        attach(unet, [(file, 0.5 + i / count)], "merged" if i % 2 else "bypass")
        if i % 2:
            levels.append(bench.used())
    first, last = levels[0], levels[-1]
    if first is None or last is None:
        yield Line(f"{count} swaps of a LoRA", "done; this device does not say what is in use", None)
        return
    grown = last - first
    yield Line(f"{count} swaps of a LoRA", f"{grown / MB:+.1f} MB in use", abs(grown) < MB)


def placements(bench: Bench) -> Iterator[Line]:
    """Compute with copied weights and block by block, and compare the memory in use."""
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "bypass")
    wanted = bench.delta(bench.source(unet))
    unet.to("cpu")
    resting = bench.used()
    for name in ("on a visit", "block by block"):
        placed: Restorable = (
            Stream(unet, [], bench.device) if name == "block by block" else copy_to_device(unet, bench.device)
        )
        error = apart(bench.delta(bench.source(unet)), wanted)
        there = _grown(bench, resting)
        placed.restore()
        stays = _grown(bench, resting)
        found = f"{error:.1e} apart, {_megabytes(there)} on the device, {_megabytes(stays)} afterwards"
        yield Line(name, found, error < 1e-4 and abs(stays or 0) < MB)


def _grown(bench: Bench, before: int | None) -> int | None:
    now = bench.used()
    return None if before is None or now is None else now - before


def _megabytes(size: int | None) -> str:
    return "bytes not told" if size is None else f"{size / MB:.1f} MB"


def pinned(bench: Bench) -> Iterator[Line]:
    """Compare the machine's memory before a side model is loaded, while it is in use, and after *Unload*."""
    _collect(bench)
    before = own_memory()
    if before is None:
        yield Line("memory of the machine after Unload", "the system does not tell it without psutil", None)
        return
    unet = replace(bench, device=torch.device("cpu")).unet(torch.float16)
    size = sum(weight.nbytes for weight in unet.parameters())
    visiting = copy_to_device(unet, bench.device)
    during = own_memory()
    visiting.restore()
    pinned_bytes = sum(weight.nbytes for weight in unet.parameters() if weight.is_pinned())
    del visiting, unet
    _collect(bench)
    trim_heap()
    after = own_memory()
    assert during is not None and after is not None
    found = f"weights {size / MB:.0f} MB, of these pinned {pinned_bytes / MB:.0f}; the process {before / MB:.0f} MB"
    found += f" before, {during / MB:.0f} with it, {after / MB:.0f} after Unload"
    statistics_of = getattr(torch.cuda, "host_memory_stats", None)
    if bench.device.type == "cuda" and statistics_of is not None:
        found += f"; torch keeps {statistics_of().get('allocated_bytes.current', 0) / MB:.0f} MB pinned"
    yield Line("memory of the machine before and after Unload", found, after - before < max(size / 2, 64 * MB))


def _collect(bench: Bench) -> None:
    gc.collect()
    empty_cache(bench.device)


def synchronisation(bench: Bench, watched: Callable[[], AbstractContextManager[Sequence[str]]]) -> Iterator[Line]:
    """Look for points at which a step waits for the device; ``watched`` lists them."""
    unet = bench.unet()
    attach(unet, [(bench.lora(unet), 1.0)], "merged")
    source = bench.source(unet)
    x, sigma = SIGMA * bench.random(1, 4, bench.side, bench.side), torch.tensor([SIGMA]).to(bench.device)
    source.deltas(SourceStep(x, sigma, CFG, 0))
    with watched() as waits:
        source.deltas(SourceStep(x, sigma, CFG, 1))
    found = f"{len(waits)}: {waits[0]}"[:80] if waits else "none"
    yield Line("points at which a step waits for the device", found, not waits)


@contextmanager
def waits() -> Iterator[Sequence[str]]:
    """List the points at which torch reports a wait (only on CUDA)."""
    found: list[str] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
        found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def generation(bench: Bench) -> Iterator[Line]:
    """Generate in the stand-in of AUTOMATIC1111, which names its device without a number, as the WebUI does."""
    place = bench.card.unindexed
    sys.path[:0] = map(str, _k_diffusion())
    try:
        importlib.import_module("k_diffusion")
        from tests.support.small_files import make_files
        from tests.support.stand_in_webui import running
    except ImportError as error:
        yield Line(f"a generation on {place}", f"left out: {error}", None)
        return
    asked = {"base": "base", "loras": "ink", "lambda": 1.0}
    # Files that are mapped into memory cannot be removed on Windows.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as path, running("a1111", make_files(Path(path))) as webui:
        plain, wanted = webui.latents(steps=3), webui.latents(asked, steps=3)
        devices = webui.module("devices")
        devices.device, devices.dtype_unet = place, torch.float32
        got = webui.latents(asked, steps=3)
        error = apart((got - plain).cpu(), (wanted - plain).cpu())
        told = webui.host.status().splitlines()[0]
        unloaded = webui.host.unload()
        yield Line(f"a generation on {place}", f"{error:.1e} from the CPU's", error < 1e-2)
        yield Line("what it says of itself", f"{told}; {unloaded}", None)


def _k_diffusion() -> list[Path]:
    """Return the folder of the WebUI's samplers."""
    found = (parent / "repositories" / "k-diffusion" for parent in ROOT.parents)
    return [path for path in found if path.is_dir()]


def bridges(bench: Bench) -> Iterator[Line]:
    """Carry states there and deltas back, at a size whose half is known and at one whose windows do not divide."""
    for target in (Space.SDXL, Space.SD3, Space.FLUX1):
        worst, where = 0.0, ""
        for height, width in bench.crossings:
            made = [_crossed(target, height, width, place) for place in (torch.device("cpu"), bench.device)]
            for part, wanted, got in zip(("state", "delta"), *made):
                error = apart(got, wanted)
                worst, where = max((worst, where), (error, f"{part} at {8 * width}x{8 * height}"))
        yield Line(f"bridge to {target.label} against the CPU's", f"{worst:.1e} apart ({where})", worst < 1e-2)


@torch.no_grad()
def _crossed(target: Space, height: int, width: int, place: torch.device) -> tuple[Tensor, Tensor]:
    bridge = choose_bridge(Space.SD1, target)
    generator = torch.Generator().manual_seed(SEED)
    clean, noise = (torch.randn(1, target.channels, height, width, generator=generator) for _ in range(2))
    sigma = torch.tensor([SIGMA]).to(place)
    x, _, crossing = bridge.to_source((clean + SIGMA * noise).to(place), sigma, clean.to(place))
    return x.cpu(), bridge.delta_to_target(0.1 * x, crossing).cpu()


KERNELS = {0: "scores are held whole", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "overridden"}


def attention_kernels(bench: Bench) -> Iterator[Line]:
    """Report torch's attention kernel at SD 1.5's head widths, for pixels and for prompts."""
    dtype = bench.half()
    for width in (40, 80, 160):
        told = []
        for name, length in (("pixels", 1024), ("prompt", 77)):
            q = torch.zeros(2, 8, 1024, width).to(bench.device, dtype)
            k = torch.zeros(2, 8, length, width).to(bench.device, dtype)
            try:
                choice = torch._fused_sdp_choice(q, k, k)
                told.append(f"{name}: {KERNELS.get(choice, choice)}")
            except (AttributeError, NotImplementedError, RuntimeError) as error:
                told.append(f"{name}: torch does not say ({type(error).__name__})")
        yield Line(f"attention at a head width of {width}, {str(dtype).removeprefix('torch.')}", ", ".join(told), None)


def timings(bench: Bench, count: int = 5) -> Iterator[Line]:
    """Measure time and memory of a plain and a forked pass of cond and uncond."""
    dtype = bench.half()
    unet = bench.large(dtype)
    file = bench.lora(unet)
    size = sum(weight.nbytes for weight in unet.parameters())
    name = f"{unet.config.levels[0]} wide, {str(dtype).removeprefix('torch.')}"
    yield Line(f"weights of a side model, {name}", f"{size / MB:.0f} MB", None)
    for side in bench.sides:
        for adapted in (False, True):
            what = f"a {'forked' if adapted else 'plain'} pass at {side}x{side}"
            try:
                attach(unet, [(file, 1.0)] if adapted else [], "automatic")
                yield Line(what, _timed(bench, bench.source(unet), side, count), None)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                yield Line(what, f"does not fit: {str(error)[:150]}", None)
            _collect(bench)


def _timed(bench: Bench, source: Source, side: int, count: int) -> str:
    card, (x, sigma) = bench.card, bench.step(side)
    source.denoised(SourceStep(x, sigma, CFG))
    card.wait()
    card.forget_peak()
    resting, passes, times = bench.used(), source.evaluations, []
    for _ in range(count):
        start = time.perf_counter()
        source.denoised(SourceStep(x, sigma, CFG))
        card.wait()
        times.append(1000 * (time.perf_counter() - start))
    peak = card.peak()
    parts = (source.evaluations - passes) // count
    need = "peak not told" if peak is None or resting is None else f"{(peak - resting) / MB:.0f} MB at the peak"
    cut = f", in {parts} parts for want of memory" if parts > 1 else ""
    return f"{statistics.median(times):.1f} ms, {need}{cut}"


def fp8(bench: Bench) -> Iterator[Line]:
    """Store weights in fp8, and compare with weights rounded to fp8."""
    kind = getattr(torch, "float8_e4m3fn", None)
    try:
        torch.zeros(1).to(bench.device).to(kind).to(bench.half())
    except (RuntimeError, TypeError) as error:
        yield Line("weights in fp8", f"not here: {type(error).__name__}", None)
        return
    assert kind is not None
    rounded, stored = bench.unet(bench.half()), bench.unet(bench.half())
    _store_as(stored, kind)
    for (_, weight), (_, other) in zip(rounded.named_parameters(), stored.named_parameters()):
        weight.copy_(other)
    file = bench.lora(stored)
    deltas = []
    for unet in (rounded, stored):
        attach(unet, [(file, 1.0)], "bypass")
        deltas.append(bench.delta(bench.source(unet)))
    error = apart(deltas[1], deltas[0])
    yield Line("weights in fp8", f"{error:.1e} from weights rounded to it", error < 1e-2)


def exhaustion(bench: Bench) -> Iterator[Line]:
    """Exhaust the memory (an impossible request, then a full card), and record the error messages."""
    _, known, said = _words(lambda: torch.empty(2**50, dtype=torch.uint8, device=bench.device))
    yield Line("what is said to a request for a million gigabytes", said, known)
    total = bench.card.total()
    if bench.device.type not in ("cuda", "xpu") or total is None:
        return
    unet = bench.unet(bench.half())
    attach(unet, [(bench.lora(unet), 1.0)], "bypass")
    wanted = bench.delta(bench.source(unet))
    filled: list[Tensor] = []
    size, held = 256 * MB, 0

    def fill() -> None:
        filled.append(torch.empty(size, dtype=torch.uint8, device=bench.device))

    # Windows gives the machine's memory where the card's has run out: no more is taken than the card has.
    while size >= MB and held < total:
        failed, known, said = _words(fill)
        size, held = (size // 4, held) if failed else (size, held + size)
    yield Line("what is said where the card is full", said if filled else "nothing could be filled", known)
    failed, known, said = _words(lambda: nn.functional.conv2d(*_convolved(bench)))
    yield Line("a convolution on a full card", said, known)
    failed, known, said = _words(lambda: bench.delta(bench.source(unet)))
    yield Line("a step on a full card", said, known)
    filled.clear()
    _collect(bench)
    error = apart(bench.delta(bench.source(unet)), wanted)
    yield Line("the next step", f"{error:.1e} apart", error < 1e-2)


def _convolved(bench: Bench) -> tuple[Tensor, Tensor]:
    dtype = bench.half()
    return bench.random(1, 320, 96, 96).to(dtype), bench.random(320, 320, 3, 3).to(dtype)


def _words(asked: Callable[[], object]) -> tuple[bool, bool, str]:
    """Return whether the call failed, whether it succeeded or its error is a known shortage, and the message."""
    try:
        asked()
    except Exception as error:
        known = out_of_memory(error)
        first = next(iter(str(error).splitlines()), "")[:200]
        return True, known, f"{type(error).__name__}: {first} ({'a shortage' if known else 'not known for a shortage'})"
    return False, True, "it was given"


def compiled(bench: Bench) -> Iterator[Line]:
    """Compile a narrow UNet with torch (about a minute), and compare."""
    if bench.device.type == "cpu":
        yield Line("compiled by torch", "left out: on a CPU it takes minutes", None)
        return
    unet = bench.unet(config=NARROWEST)
    attach(unet, [(bench.lora(unet), 1.0)], "merged")
    wanted = bench.delta(bench.source(unet))
    told: list[str] = []
    start = time.perf_counter()
    compile_unet(unet, True, told.append)
    error = apart(bench.delta(bench.source(unet)), wanted)
    spent = f"{time.perf_counter() - start:.0f} s, {error:.1e} apart"
    yield Line("compiled by torch", f"{spent}; {told[0]}" if told else spent, None if told else error < 1e-2)


Check = Callable[[Bench], Iterator[Line]]


def checks_for(bench: Bench) -> dict[str, Check]:
    """Return the checks by name; those that could break the device come last."""
    found: dict[str, Check] = {
        "a generation": generation,
        "attention": attention_kernels,
        "times": timings,
        "numbers": numbers,
        "bridges": bridges,
        "precision": precision,
        "settings of hosts": hosts_settings,
        "inference mode and autocast": ambient,
        "visits and streams": placements,
        "pinned memory": pinned,
        "swaps": swaps,
        "fp8": fp8,
    }
    if bench.device.type == "cuda":
        found["waits"] = lambda bench: synchronisation(bench, waits)
        found["memory that runs out in mid-step"] = lambda bench: shortage(bench, bench.card.short)
    return {**found, "exhaustion": exhaustion, "compiling": compiled}
