"""Show Delta Sampling at work: a sweep over lambda, as a labelled picture and a table (``python -m demo``)."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_delta.errors import DeltaError, SettingError

# Modules that import torch are imported late, so that --help and wrong options are answered at once.
if TYPE_CHECKING:
    from demo.pipeline import Adapter, Place, Settings, Steering
    from demo.sweep import Column, Judgement, OwnFiles, Plan

# Names whose drawings by the small target are recognised.
PROMPTS = ("cupcake", "crescent moon", "octopus", "pizza", "rocket", "fox")
MODELS = Path(__file__).parent / "models"
NAME_FILES = ("names.json", "concepts.json")
EXAMPLES = """examples:
  python run.py demo
  python run.py demo --prompt "red apple" --prompt rocket --lambdas 0,1,2 --range 0.5 1
  python run.py demo --lora demo/models/lineart-loha.safetensors
  python run.py demo --control demo/examples/edges/crown.png --control-mode control --prompt snowflake
  python run.py demo --image demo/examples/references/frog.png --prompt snowflake
  python run.py demo --target sd21.safetensors --base v1-5.safetensors --lora style.safetensors:0.8 \\
      --prompt "a lighthouse" --size 512
"""
OWN_FILES = ("target", "base", "device", "dtype", "prediction", "form", "tokenizer")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python run.py demo",
        usage="%(prog)s [options]",
        description="Draw pictures with base, adapted and target model, then with target + lambda * (adapted - base).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_picture_options(out.add_argument_group("pictures"))
    _add_own_files(out.add_argument_group("your own files, in place of the embedded models or beside them"))
    output = out.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, default=Path("out/demo.png"), help="the .png to write (default: %(default)s)"
    )
    output.add_argument("--list", action="store_true", help="name the prompts that the embedded models know, and end")
    output.add_argument("--json", type=Path, metavar="FILE", help="write what is printed, with the settings, as JSON")
    return out


def _add_picture_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt", action="append", help=f"what to draw, may be repeated (default: {', '.join(PROMPTS)})")
    add("--negative", metavar="PROMPT", help="what not to draw")
    add("--lambdas", type=_numbers, default=(0.5, 1.0, 1.5, 2.0), metavar="LIST", help="0 to 10 (default: 0.5,1,1.5,2)")
    add("--range", type=float, nargs=2, default=(0.0, 1.0), metavar=("START", "END"),
        help="the part of the run in which the delta is added (default: 0 1)")  # fmt: skip
    add(
        "--curve",
        choices=("constant", "linear", "cosine", "sigmoid"),
        default="constant",
        help="of lambda in the range",
    )
    add("--curve-ends", type=float, nargs=2, default=(1.0, 0.0), metavar=("FIRST", "LAST"),
        help="factors on lambda at the two ends of a curve that is not constant (default: 1 0)")  # fmt: skip
    add("--sampler", metavar="NAME",
        help="euler, heun, dpm_2, dpmpp_2m, euler_ancestral, dpmpp_sde, dpmpp_2m_sde, lms, gradient_estimation, "
        "ddim, ddpm or unipc (default: dpmpp_2m)")  # fmt: skip
    add("--steps", type=int, help="sampling steps (default: 20; own files: 25)")
    add("--cfg", type=float, help="guidance scale (default: 3; own files: 7)")
    add(
        "--source-cfg",
        type=float,
        metavar="CFG",
        help="guidance scale of base and adapted in the delta (default: 1; own files: --cfg)",
    )
    add("--seed", type=int, default=0, help="one picture is drawn of each prompt, from this noise (default: 0)")
    add("--size", type=int, metavar="PIXELS", help="side, a multiple of 64 (default: 64; own files: 512)")
    add("--models", type=Path, default=MODELS, metavar="FOLDER", help="where the embedded models are")


def _add_own_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--target", type=Path, metavar="FILE", help="the checkpoint that draws: SD 1.x, SD 2.x or SDXL")
    add("--base", type=Path, metavar="FILE", help="the checkpoint that the adapter was made for")
    add("--lora", action="append", metavar="FILE[:WEIGHT]",
        help="an adapter for the base or, without one, the embedded base; may be repeated")  # fmt: skip
    add("--control", action="append", metavar="PICTURE[:WEIGHT]",
        help="a map to follow (edges, depth, a pose); may be repeated")  # fmt: skip
    add("--control-model", action="append", type=Path, metavar="FILE",
        help="the ControlNet or T2I-Adapter of the base that reads the map; one for each --control "
        "(default with the embedded models: theirs for edges)")  # fmt: skip
    add("--control-mode", choices=("balanced", "prompt", "control"), default="balanced",
        help="which prevails if prompt and map disagree (default: balanced)")  # fmt: skip
    add("--image", metavar="PICTURE[:WEIGHT]", help="a reference picture that the adapted model is prompted with")
    add("--image-model", type=Path, metavar="FILE", help="the IP-Adapter of the base that reads it")
    add("--image-encoder", type=Path, metavar="FILE", help="the CLIP image encoder that the IP-Adapter was made with")
    add("--adapted", type=Path, metavar="FILE", help="a fine-tuned checkpoint of the base, in place of or beside LoRAs")
    add("--prediction", choices=("eps", "v"), help="what the target predicts, where its file does not say")
    add("--form", choices=("automatic", "merged", "bypass"),
        help="adapted weights, or only factors (less memory); automatic, the default, is the faster one")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="numbers to compute in (default: fp16 on a GPU, else fp32)")
    add("--tokenizer", type=Path, metavar="FOLDER", help="vocab.json and merges.txt of models with words of their own")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas are needed, as in 0.5,1,2, not {text!r}") from None


@dataclass(frozen=True)
class Result:
    """The outcome of a run; ``judgements`` is empty for the user's own files.

    ``adapters`` are the named ones.  Without any, the embedded LoRA was attached.
    """

    plan: Plan
    where: str
    columns: Sequence[Column]
    judgements: Sequence[Judgement] = ()
    adapters: Sequence[Adapter] = ()
    files: OwnFiles | None = None
    controls: Sequence[Steering] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status: 0, or 2 with a sentence on stderr."""
    options = parser().parse_args(arguments)
    started = time.perf_counter()
    try:
        _check(options)
        if options.list:
            print("\n".join(_known(options.models)))
            return 0
        for path in filter(None, (options.out, options.json)):
            path.parent.mkdir(parents=True, exist_ok=True)
        result = _draw_own(options) if options.target else _draw_embedded(options)
        _write(result, options, started)
    except (DeltaError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def _check(options: argparse.Namespace) -> None:
    """Reject wrong settings that can be detected before anything is loaded."""
    given = [f"--{name}" for name in OWN_FILES if getattr(options, name) is not None]
    if given and not (
        options.target and options.base and (options.lora or options.adapted or options.control or options.image)
    ):
        raise SettingError(
            f"{given[0]} is for your own files: --target, --base "
            "and a --lora, --adapted, --control or --image are needed"
        )
    _check_controls(options)
    if given and not options.prompt:
        raise SettingError("--prompt is needed with your own files: say what to draw")
    if options.steps is not None and not 2 <= options.steps <= 1000:
        raise SettingError(f"--steps is {options.steps}: 2 to 1000 are needed")
    for name, scale in (("--cfg", options.cfg), ("--source-cfg", options.source_cfg)):
        if scale is not None and not 1 <= scale <= 100:
            raise SettingError(f"{name} is {scale}: 1 to 100 is needed")
    if options.size is not None and (options.size < 64 or options.size % 64):
        raise SettingError(f"--size is {options.size}: a multiple of 64 is needed")
    if not 0 <= options.seed < 2**63:
        raise SettingError(f"--seed is {options.seed}: 0 or a positive number below 2**63 is needed")
    if options.out.suffix.lower() != ".png":
        raise SettingError(f"--out is {options.out}: the name of a .png file is needed")


def _check_controls(options: argparse.Namespace) -> None:
    """Reject maps and pictures without a model; the embedded models come with theirs."""
    maps, readers = len(options.control or ()), len(options.control_model or ())
    if maps != readers and (readers or options.target):
        raise SettingError(f"there are {maps} --control and {readers} --control-model: each map needs its model")
    models = (options.image_model, options.image_encoder)
    if (any(models) and not (all(models) and options.image)) or (options.image and options.target and not all(models)):
        raise SettingError("--image, --image-model and --image-encoder are needed together")


def _plan(options: argparse.Namespace, defaults: Settings) -> Plan:
    from demo.samplers import NAMES
    from demo.sweep import Plan
    from lib_delta.core.strength import Strength

    given = {name: getattr(options, name) for name in ("sampler", "steps", "cfg", "source_cfg", "size", "negative")}
    settings = replace(defaults, **{name: value for name, value in given.items() if value is not None})
    if settings.sampler not in NAMES:
        raise SettingError(f"--sampler is {settings.sampler}: one of {', '.join(NAMES)} is needed")
    start, end = options.range
    first, last = options.curve_ends
    strengths = [Strength(value, start, end, options.curve, first, last) for value in options.lambdas]
    return Plan(options.prompt or PROMPTS, strengths, settings, options.seed)


def _draw_embedded(options: argparse.Namespace) -> Result:
    from demo.embedded import SETTINGS, Embedded
    from demo.sweep import embedded_sweep, judge_column

    plan = _plan(options, SETTINGS)
    adapters = _adapters(options)
    controls = _controls(options)
    embedded = Embedded.load(options.models, adapters, controls)
    _check_known(plan.prompts, embedded.judged)
    columns = embedded_sweep(embedded, plan)
    judgements = [judge_column(embedded.judges, embedded.judged, plan.prompts, column) for column in columns]
    return Result(plan, "CPU, fp32", columns, judgements, adapters, controls=controls)


def _known(models: Path) -> list[str]:
    """Return the prompts that the embedded models know, including those that their adapter of content teaches."""
    return [name for file in NAME_FILES for name in json.loads((models / file).read_text("utf-8"))]


def _check_known(prompts: Sequence[str], known: Sequence[str]) -> None:
    """Reject prompts that the embedded models cannot draw: they know only these names."""
    for prompt in prompts:
        if prompt.strip().lower() not in known:
            near = difflib.get_close_matches(prompt.strip().lower(), known, 3, 0.4)
            meant = f"is {' or '.join(map(repr, near))} meant? " if near else ""
            raise SettingError(
                f"the embedded models do not know {prompt[:60]!r}: {meant}--list names the {len(known)} that they do"
            )


def _draw_own(options: argparse.Namespace) -> Result:
    from demo.pipeline import Settings
    from demo.sweep import OwnFiles, own_sweep

    plan = _plan(options, Settings(steps=25, cfg=7.0, size=512))
    adapters = _adapters(options)
    place = _place(options.device, options.dtype)
    controls = _controls(options)
    files = OwnFiles(
        options.target,
        options.base,
        adapters,
        options.form or "automatic",
        options.prediction,
        options.tokenizer,
        controls,
    )
    where = f"{place.device}, {str(place.dtype).removeprefix('torch.')}"
    return Result(plan, where, own_sweep(files, plan, place), adapters=adapters, files=files, controls=controls)


def _adapters(options: argparse.Namespace) -> list[Adapter]:
    from demo.pipeline import Adapter

    return [_lora(text) for text in options.lora or ()] + [Adapter(path) for path in (options.adapted,) if path]


def _lora(text: str) -> Adapter:
    from demo.pipeline import Adapter

    return Adapter(*_weighted(text))


def _controls(options: argparse.Namespace) -> list[Steering]:
    from demo.embedded import EDGES, IMAGE_ENCODER, IMAGE_PROMPT
    from demo.pipeline import Control, ImagePrompt

    maps = options.control or ()
    readers = options.control_model or [options.models / EDGES] * len(maps)
    mode = options.control_mode
    found: list[Steering] = [Control(model, *_weighted(picture), mode) for model, picture in zip(readers, maps)]
    if options.image:
        model = options.image_model or options.models / IMAGE_PROMPT
        encoder = options.image_encoder or options.models / IMAGE_ENCODER
        found.append(ImagePrompt(model, encoder, *_weighted(options.image)))
    return found


def _weighted(text: str) -> tuple[Path, float]:
    """Read ``FILE[:WEIGHT]``; a colon without a number after it (after a drive, say) is part of the name."""
    name, _, weight = text.rpartition(":")
    try:
        return (Path(name), float(weight)) if name else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


def _place(device: str | None, dtype: str | None) -> Place:
    import torch

    from demo.pipeline import Place

    best = Place.best()
    try:
        chosen = torch.device(device) if device else best.device
        # Only using a device shows reliably whether it exists.
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {device} cannot be used here: {best.device} can") from error
    usual = torch.float32 if chosen.type == "cpu" else torch.float16
    number = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, None: usual}[dtype]
    if chosen.type == "cpu" and number is torch.float16:
        raise SettingError("--dtype fp16 needs a GPU: choose fp32 or bf16 on the CPU")
    return Place(chosen, number)


def _write(result: Result, options: argparse.Namespace, started: float) -> None:
    """Write the picture, print the table, and write both as JSON if requested."""
    import torch

    from demo.grid import draw_grid

    pictures = torch.stack([column.pictures for column in result.columns], 1)
    draw_grid(pictures, result.plan.prompts, [column.title for column in result.columns]).save(options.out)
    seconds = time.perf_counter() - started
    print(_table(_rows(result)))
    print(f"\n{_legend(result)}")
    print(f"{seconds:.0f} s in all, {sum(c.seconds for c in result.columns):.0f} s of it sampling ({result.where})")
    print(f"the picture is {options.out}")
    if options.json:
        options.json.write_text(json.dumps(_record(result, options.out, seconds), indent=1) + "\n", "utf-8")


def _rows(result: Result) -> list[dict[str, Any]]:
    """Return the table's rows, one for each column of the picture."""
    judged = [asdict(j) for j in result.judgements] or [{"style": None, "content": None}] * len(result.columns)
    return [
        {"column": column.title, **marks, "seconds": column.seconds, "evaluations": column.evaluations}
        for column, marks in zip(result.columns, judged)
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':11}{'style':>8}{'content':>9}{'time':>10}{'UNet evaluations':>18}"]
    for row in rows:
        style, content = ("-" if row[k] is None else f"{row[k]:.2f}" for k in ("style", "content"))
        lines.append(f"{row['column']:11}{style:>8}{content:>9}{row['seconds']:>8.1f} s{row['evaluations']:>18}")
    return "\n".join(lines)


def _legend(result: Result) -> str:
    together = "up to 8 prompts" if result.files is None else "one prompt"
    lines = [
        f"An evaluation is one pass through a UNet, with and without prompt, for {together} at once.",
        "Base and adapted are drawn by one network that computes both, so either takes the time of two.",
    ]
    if result.judgements:
        lines.insert(0, "Style: 0 colour, 1 line art. Content: the share of pictures in which the emoji is recognised.")
    return "\n".join(lines)


def _record(result: Result, picture: Path, seconds: float) -> dict[str, Any]:
    """Return the printed figures with the settings that led to them."""
    settings = {
        **asdict(result.plan.settings),
        "prompts": list(result.plan.prompts),
        "seed": result.plan.seed,
        "adapters": [{"path": str(a.path), "weight": a.weight} for a in result.adapters],
        "controls": json.loads(json.dumps([asdict(control) for control in result.controls], default=str)),
        "strengths": [asdict(strength) for strength in result.plan.strengths],
    }
    files = None if result.files is None else json.loads(json.dumps(asdict(result.files), default=str))
    return {
        "picture": str(picture),
        "columns": _rows(result),
        "seconds": seconds,
        "computed_on": result.where,
        "settings": settings,
        "files": files,
    }


if __name__ == "__main__":
    sys.exit(main())
