"""Inspect adapter files from the command line: ``python -m lib_delta inspect FILE``."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from lib_delta.errors import DeltaError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, 1 if a file cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m lib_delta", description="Inspect adapter files.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect", help="report the kind of LoRA or LyCORIS files, and the layers that they adapt"
    )
    inspect.add_argument("files", nargs="+", type=Path, metavar="FILE")
    inspect.add_argument("--base", type=Path, help="checkpoint to look up layers in (default: SD 1.5 as released)")
    inspect.add_argument("--json", action="store_true", help="print JSON, one object for all files")
    options = parser.parse_args(arguments)
    # The output's encoding may be limited (cp1252, cp932), while file names may contain any character.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return run_inspect(options.files, options.base, as_json=options.json)


def run_inspect(files: list[Path], base: Path | None, *, as_json: bool) -> int:
    """Print a report on each file; for a file that cannot be used, the reason in a sentence."""
    # Imported late, because models' code takes seconds to import and --help does not need it.
    from lib_delta.adapters.inspection import Reference, coverage

    def report(file: Path) -> dict[str, object]:
        try:
            return coverage(file, reference)
        except DeltaError as error:
            return {"error": str(error)}

    try:
        reference = Reference.of_checkpoint(base) if base else Reference.sd15()
    except DeltaError as error:
        print(error, file=sys.stderr)
        return 1
    reports = {str(file): report(file) for file in files}
    if as_json:
        print(json.dumps(reports, indent=2))
    else:
        print("\n\n".join(_lines(file, entry) for file, entry in reports.items()))
    return int(any("error" in entry for entry in reports.values()))


def _lines(file: str, report: dict[str, object]) -> str:
    width = max(map(len, report))
    return "\n".join([file, *(f"  {key:<{width}}  {_shown(value)}" for key, value in report.items())])


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count} layers)" for key, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
