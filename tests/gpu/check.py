"""Check this machine's graphics card, and write one text that can be pasted into an issue.

    venv\\Scripts\\python extensions\\delta-sampling\\tests\\gpu\\check.py

It is run with the WebUI's own Python, from the WebUI's folder or any other, while the WebUI is not running.  It takes
up to five minutes, downloads nothing, and serves cards of 4 GB and more; without a card it checks what the CPU can.
Each check is printed as it ends, and kept in `delta-check.md` in the folder that it is run from.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

LIMIT = 300.0  # seconds
PASTED = "delta-check.md"


class Report:
    """A text that is printed and written line by line, so a crash loses nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path, self.wrong, self.left_out = path, 0, 0
        if path is not None:
            path.write_text("", encoding="utf-8")

    def say(self, text: str = "") -> None:
        """Print and write a line, without the user's name in paths."""
        text = text.replace(str(Path.home()), "~")
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(text + "\n")

    def row(self, what: str, found: str, good: bool | None) -> None:
        """Write a row of the table; ``good`` is None for plain information."""
        self.wrong += good is False
        verdict = {True: "ok", False: "**not ok**", None: ""}[good]
        self.say(f"| {_cell(what)} | {_cell(found)} | {verdict} |")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, and return the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Check what only a device can tell, for an issue.")
    parser.add_argument("--device", default="", help="cuda:1, xpu, mps, directml or cpu (default: what a WebUI takes)")
    parser.add_argument("--out", type=Path, default=Path(PASTED), help=f"where the text is kept (default: {PASTED})")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="the checks of these names alone")
    options = parser.parse_args(arguments)
    report = _report(options.out)
    start = time.monotonic()
    try:
        bench, checks = _prepared(report, options.device)
    except Exception as error:  # whatever keeps torch or the extension from starting is what has to be told
        report.say(f"\nThe checks could not start: {_first_line(error)}\n\n```\n{traceback.format_exc()}```")
        return 1
    chosen = {name: check for name, check in checks.items() if not options.only or name in options.only}
    run(report, bench, chosen, start + LIMIT)
    report.say(f"\n{report.wrong} not ok, {report.left_out} left out, {time.monotonic() - start:.0f} s")
    report.say(f"Paste all of this into an issue; it is in {options.out.name} as well.")
    return int(report.wrong > 0)


def _report(path: Path) -> Report:
    try:
        return Report(path)
    except OSError as error:
        report = Report(None)
        report.say(f"(the text is not kept: {error})")
        return report


def _prepared(report: Report, name: str) -> tuple[object, Mapping[str, Callable]]:  # type: ignore[type-arg]
    """Describe the machine, and return the checks and their device."""
    report.say("### Delta Sampling on a device\n\n| | |\n|---|---|")
    import torch

    from tests.gpu.card import described, find

    card = find(name)
    told = described(card)
    while True:
        try:
            what, found = next(told)
        except StopIteration:
            break
        except Exception as error:  # a generator that has raised has ended, and what it had told stays
            report.say(f"| and then | {_cell(_first_line(error))} |")
            break
        report.say(f"| {what} | {_cell(found)} |")
    from tests.gpu.checks import FIFTH, HALF, SD15, Bench, checks_for

    if card.is_cpu:
        report.say("\nThis Python's torch found no card: what a CPU can tell is checked, at a fifth of the width.")
        bench = Bench(card.device, FIFTH, 16, card.used, FIFTH, (16, 32), ((112, 112),))
    else:
        bench = Bench(card.device, HALF, 32, card.used, SD15)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report.say("\n| check | found | |\n|---|---|---|")
    return bench, checks_for(bench)


def run(report: Report, bench: object, checks: Mapping[str, Callable], end: float) -> None:  # type: ignore[type-arg]
    """Run the checks until time is up; one that raises gets a line, and the rest continue."""
    faults = []
    for name, check in checks.items():
        if time.monotonic() > end:
            report.left_out += 1
            report.row(name, "left out: the time was over", None)
            continue
        try:
            lines = check(bench)
            for line in lines:
                report.row(line.what, line.found, line.good)
                if time.monotonic() > end:
                    lines.close()
                    break
        except KeyboardInterrupt:
            report.row(name, "stopped by hand", None)
            break
        except Exception as error:
            report.row(name, _first_line(error), False)
            faults.append(f"{name}:\n{traceback.format_exc(limit=-4)}")
        _make_room(bench)
    if faults:
        report.say("\n```\n" + "\n".join(faults) + "```")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _make_room(bench: object) -> None:
    """Free the memory left by a check; a broken device shows in the next check."""
    from lib_delta.devices import empty_cache

    gc.collect()
    try:
        empty_cache(bench.device)  # type: ignore[attr-defined]
    except RuntimeError as error:
        print(_first_line(error), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
