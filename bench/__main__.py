"""What the delta costs, beside a plain step and beside two separate networks: ``python -m bench``.

Cases alternate in one run, and a figure is the median of ratios to diffusers' pass of the same round: seconds
differ from machine to machine, and from minute to minute, ratios much less.  A pass is that of one picture with
prompt and negative prompt.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench import bridges, operations, storage
from bench.models import Layout, diffusers_unet, random_control, random_lora, random_unet, sd15, sdxl
from bench.timing import Case, keep_memory, ratios, rounds
from lib_delta.adapters.adapter_file import AdapterFile
from lib_delta.adapters.attach import AdapterForm, attach
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import ControlNetGuide
from lib_delta.core.guides import GuideInputs
from lib_delta.diffusion.families import Family
from lib_delta.models.unet import CrossAttention, TextContext, UNet

# Of the steps of a run, how many the side model is asked in.
SHARES = {"exact": 1.0, "balanced": 0.5, "fast": 0.25}
WIDTHS = {"tiny": 64, "small": 128, "full": 320}
LAYERS = {"all layers": "", "attention": "attn", "decoder": "output_blocks"}
FORMS: tuple[AdapterForm, ...] = ("merged", "bypass", "automatic")
BRIDGED = (Family.SDXL, Family.SD3, Family.FLUX)
PLAIN, PUBLISHED, FOUR = "plain pass (diffusers)", "two more networks (the published way)", "one pass of four rows"
RESULTS = Path(__file__).with_name("results")


class Passes:
    """One layout's networks, and what they are given."""

    def __init__(self, layout: Layout, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.unet = random_unet(layout, device, dtype)
        self.reference: nn.Module = diffusers_unet(layout, self.unet)
        make = partial(torch.randn, device=device, dtype=dtype)
        self.x, self.t = make(1, 1, 4, size, size), torch.tensor([500.0], device=device)
        width = layout.ours.context_width
        rows = torch.tensor([0, 0], device=device)
        # Cond and uncond of one picture; what is kept from step to step is kept here.
        self.text = TextContext(make(1, 2, 77, width), rows, {})
        self.other_text = TextContext(torch.cat((self.text.context, make(1, 2, 77, width))), rows, {})
        self.control = random_control(layout, device, dtype)
        self.guide = ControlNetGuide(self.control, ControlMap(torch.rand(1, 3, 8 * size, 8 * size)))

    @torch.no_grad()
    def adapted(self, adapters: Sequence[tuple[AdapterFile, float]] = (), form: AdapterForm = "merged") -> None:
        """Have these adapters attached, and know the prompts' keys and values, as in all steps but the first."""
        attach(self.unet, adapters, form)
        for layer in self.unet.modules():
            if isinstance(layer, CrossAttention) and layer.to_k.weight.shape[1] == self.text.context.shape[-1]:
                self.text.keys_values(layer)
                self.other_text.keys_values(layer)

    @torch.no_grad()
    def ours(self, text: TextContext | None = None) -> None:
        """Evaluate our UNet, with whatever is attached."""
        self.unet(self.x, self.t, text or self.text)

    @torch.no_grad()
    def controlled(self) -> None:
        """Evaluate our UNet, and for the adapted model a ControlNet, whose own pass counts."""
        rows = self.text.rows
        assert rows is not None
        uncond = torch.arange(len(rows), device=rows.device) == 1
        inputs = GuideInputs(self.x[0, rows], self.t[rows], self.text.adapted, None, rows, uncond)
        self.unet(self.x, self.t, self.text, None, self.guide(inputs))

    @torch.no_grad()
    def theirs(self, rows: int = 2, times: int = 1) -> None:
        """Evaluate diffusers' UNet."""
        context = self.text.context[0].repeat(rows // 2, 1, 1)
        x, t = self.x[0].expand(rows, -1, -1, -1).contiguous(), self.t.expand(rows)
        for _ in range(times):
            self.reference(x, t, context)

    def cases(self, loras: dict[str, AdapterFile]) -> dict[str, Case]:
        """Return everything that is timed."""
        plain = self.adapted
        cases = {
            PLAIN: Case(self.theirs),
            FOUR: Case(partial(self.theirs, 4)),
            PUBLISHED: Case(partial(self.theirs, 2, 2)),
            "ours, no adapter": Case(self.ours, plain),
            "ours, prompts alone": Case(partial(self.ours, self.other_text), plain),
            "ours, ControlNet": Case(self.controlled, plain),
        }
        for title, lora in loras.items():
            for form in FORMS:
                cases[f"ours, {title}, {form}"] = Case(self.ours, partial(self.adapted, [(lora, 1.0)], form))
        return cases


def flops(case: Case) -> float:
    """Return the floating-point operations of a case, in units of 10^9."""
    case.prepare()
    return operations.gflop(case.run)


def activations(case: Case, passes: Passes) -> float:
    """Return what a case holds at most besides weights, in units of 2^20 bytes."""
    case.prepare()
    weights = [t for module in (passes.unet, passes.control) for t in (*module.parameters(), *module.buffers())]
    with operations.Peak(weights) as peak:
        case.run()
    return peak.bytes / 2**20


def native_resolution() -> dict[str, float]:
    """Return what the source adds to a plain step of SDXL at 1024x1024, by operations: at its own 64x64, unforked."""
    meta = torch.device("meta")

    def count(layout: Layout, size: int, rows: int) -> float:
        with meta:
            unet = UNet(layout.ours)
            x, t = torch.empty(1, rows, 4, size, size), torch.empty(rows)
            context = torch.empty(1, rows, 77, layout.ours.context_width)
            label = torch.empty(1, rows, layout.ours.label_width) if layout.ours.label_width else None
        with torch.no_grad():
            return operations.gflop(lambda: unet(x, t, context, label))

    target, branch = count(sdxl(), 128, 2), count(sd15(), 64, 2)
    # At most both branches are computed whole.
    return {
        "sdxl plain step, GFLOP": round(target),
        "sd15 pass at 64x64, GFLOP": round(branch),
        **{f"bridge to {to.label}, of one such pass": round(bridges.gflop(to) / branch, 4) for to in BRIDGED},
        "whole step, exact": round(1 + 2 * branch / target, 3),
        "whole step, balanced": round(1 + branch / target, 3),
        "whole step, fast": round(1 + branch / 2 / target, 3),
    }


def native_times(width: int, size: int, rounds_: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Time a step of SDXL's layout with the source at half its size beside a plain one, both narrowed alike."""
    target = random_unet(sdxl(width), device, dtype)
    reference = diffusers_unet(sdxl(width), target)
    source = Passes(sd15(width), size, device, dtype)
    make = partial(torch.randn, device=device, dtype=dtype)
    x, context = make(2, 4, 2 * size, 2 * size), make(2, 77, sdxl(width).ours.context_width)
    pooled = {"text_embeds": make(2, 1280), "time_ids": make(2, 6)}
    lora = random_lora(source.unet, 16, "")

    @torch.no_grad()
    def plain() -> None:
        reference(x, source.t.expand(2), context, added_cond_kwargs=pooled)

    def whole() -> None:
        plain()
        source.ours()

    source.adapted([(lora, 1.0)], "automatic")
    cases = {"plain step": Case(plain), "whole step, exact": Case(whole)}
    found = ratios(rounds(cases, rounds_, device), "plain step")
    share = found["whole step, exact"]["ratio"] - 1
    balanced, fast = (round(1 + share * part, 3) for part in (SHARES["balanced"], SHARES["fast"]))
    about = {"width": width, "latents of the target": 2 * size, "dtype": str(dtype).removeprefix("torch.")}
    return {**about, **found, "whole step, balanced": balanced, "whole step, fast": fast}


def delta_steps(passes: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return what a step with the delta takes, in plain steps, at each quality."""
    return {
        name: {quality: round(1 + share * row["ratio"], 3) for quality, share in SHARES.items()}
        for name, row in passes.items()
        if name.startswith("ours, ") or name == PUBLISHED
    }


def main() -> None:
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    torch.set_num_threads(1)  # a process's own time has that of all threads, also while they spin
    torch.manual_seed(0)
    if options.native_only:
        keep_memory()
        _native_alone(options, device)
        return
    passes = Passes(sd15(WIDTHS[options.width]), options.size, device, dtype)
    load = storage.loading(passes.unet, options.rounds)
    keep_memory()
    loras = {title: random_lora(passes.unet, options.rank, only) for title, only in LAYERS.items()}
    cases = passes.cases(loras)
    times = ratios(rounds(cases, options.rounds, device), PLAIN)
    plain = flops(cases[PLAIN])
    for name, case in cases.items():
        times[name]["flops"] = round(flops(case) / plain, 3)
        times[name]["activations, MB"] = round(activations(case, passes), 1)
    results = {
        **_machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "width": WIDTHS[options.width],
        "latent": options.size,
        "rounds": options.rounds,
        "passes": times,
        "delta step": delta_steps(times),
        "memory": storage.weights(passes.unet, loras),
        "swap": storage.swaps(passes.unet, options.rank, device, times[PLAIN]["seconds"]),
        "load": load,
        "native resolution": native_resolution(),
    }
    del passes, cases, loras
    results["native resolution, timed"] = native_times(WIDTHS["tiny"], options.size, options.rounds, device, dtype)
    _write(results, options.out / f"{device.type}-{options.width}-{options.size}")


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _native_alone(options: argparse.Namespace, device: torch.device) -> None:
    """Time a step of SDXL's layout with the delta, in half precision, and write that."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    found = native_times(WIDTHS[options.width], options.size, options.rounds, device, dtype)
    text = json.dumps({**_machine(device), "rounds": options.rounds, **found}, indent=1) + "\n"
    path = options.out / f"{device.type}-native-{options.width}-{options.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    print(f"{text}\nwritten to {path}")


def _write(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print("| pass | of diffusers' pass | range | by operations | activations |\n|---|---|---|---|---|")
    for name, row in results["passes"].items():
        times = f"{row['ratio']:.2f} | {row['lowest']:.2f}-{row['highest']:.2f}"
        print(f"| {name} | {times} | {row['flops']:.2f} | {row['activations, MB']:.0f} MB |")
    for part in ("delta step", "memory", "swap", "load", "native resolution", "native resolution, timed"):
        print(f"\n{part}: {json.dumps(results[part], indent=1)}")
    _plot(results["passes"], path.with_suffix(".png"))
    print(f"\nwritten to {path}.json and .png")


def _plot(rows: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    names = list(rows)[::-1]
    middle = [rows[name]["ratio"] for name in names]
    low, high = ([abs(rows[name][end] - rows[name]["ratio"]) for name in names] for end in ("lowest", "highest"))
    axes.barh(names, middle, xerr=[low, high], color="#7a9cc6", ecolor="grey")
    axes.plot([rows[name]["flops"] for name in names], names, "k|", markersize=14, label="by operations")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("time, in diffusers' passes (median and range)")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--width", choices=sorted(WIDTHS), default="tiny", help="full is SD 1.5's own, 320 channels")
    parser.add_argument("--size", type=int, default=16, help="latents are this many pixels wide and high")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--native-only", action="store_true", help="only a step of SDXL's layout at this width, with the side model's"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
