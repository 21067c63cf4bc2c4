"""Run one part of this repository.

    python run.py demo|train|evaluate|bench|test|test-newest|lint [arguments of the part]

The first call makes a virtual environment beside this file (.venv) and installs pinned requirements into it; later
calls start at once. `test` without arguments ends with `test-newest`: the same tests in a second environment, on the
newest torch. Only the standard library is used, in words that an old Python understands, so that it can say what is
needed.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SERVED = ("3.11", "3.10")  # torch 2.1.2, which the WebUIs run, has no wheels for later ones

# What each part needs (a file in requirements/) and runs.
PARTS = {
    "demo": ("demo", [["-m", "demo"]]),
    "train": ("demo", [["-m", "demo.train"]]),
    "evaluate": ("demo", [["-m", "demo.evaluate"]]),
    "bench": ("demo", [["-m", "bench"]]),
    "test": ("test", [["-m", "pytest"]]),
    "lint": ("test", [["-m", "ruff", "check"], ["-m", "mypy"]]),
}


class UnavailableError(Exception):
    """An environment that cannot be had here; the message says what is needed."""


def main() -> int:
    """Run the part that the command line names, and return its exit status."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in PARTS and name != "test-newest":
        print("usage: python run.py " + "|".join([*PARTS, "test-newest"]) + " [arguments of the part]")
        return 0 if name in ("-h", "--help") else 2
    # Ctrl-C reaches the part as well, which may have work to save: wait for it instead of dying first.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        status = run_newest(arguments) if name == "test-newest" else run_part(name, arguments)
    except UnavailableError as error:
        say(str(error))
        return 1
    if name == "test" and not arguments and status == 0:
        status = run_newest_where_possible()
    return status


def run_part(name: str, arguments: list) -> int:
    """Run every command of a part, and return the first exit status that is not 0."""
    requirements, commands = PARTS[name]
    python = environment(".venv", requirements, SERVED)
    # Files named on the command line are the caller's; tests and lint are about this folder.
    folder = ROOT if requirements == "test" else Path.cwd()
    statuses = [call([python, *command, *arguments], folder) for command in commands]
    return next((status for status in statuses if status), 0)


def run_newest(arguments: list) -> int:
    """Run the tests on the newest torch; those that need a package tied to the older one skip themselves."""
    python = environment(".venv-newest", "newest", SERVED[:1])
    return call([python, "-m", "pytest", *arguments], ROOT)


def run_newest_where_possible() -> int:
    """Run the tests on the newest torch; only CI insists that it can be installed."""
    try:
        return run_newest([])
    except UnavailableError as error:
        say(f"skipped the second run, on the newest torch: {error}")
        return 1 if os.environ.get("CI") else 0


def environment(folder: str, requirements: str, versions: tuple) -> str:
    """Return the Python of an environment that has what requirements/<requirements>.txt names, made if need be."""
    venv, wanted = ROOT / folder, ROOT / "requirements" / f"{requirements}.txt"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, digest = venv / f"installed-{requirements}", hashlib.sha256(wanted.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == digest:
        return str(python)
    if not python.exists() or not any(venv.glob("installed-*")):  # none, or one that was left half made
        make_venv(venv, versions)
    say(f"installing requirements/{wanted.name} into {folder} (this once)")
    # The files list all that is needed, so nothing else may come along: k-diffusion asks for wandb, and wandb for more.
    install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "-r", str(wanted)]
    if call([str(python), *install], ROOT):
        raise UnavailableError(
            f"pip could not install requirements/{wanted.name} (its lines above say why); "
            "it needs a package index and up to 6 GB of disk"
        )
    stamp.write_text(digest)
    return str(python)


def make_venv(venv: Path, versions: tuple) -> None:
    """Make an empty virtual environment with one of the Python versions, in place of what is there."""
    python = find_python(versions)
    say(f"making {venv.name} with " + " ".join(python))
    if call([*python, "-m", "venv", "--clear", str(venv)], ROOT):
        raise UnavailableError(f"Python could not make the virtual environment {venv} (its lines above say why)")


def find_python(versions: tuple) -> list:
    """Return a command that starts one of the Python versions: this Python, or else one that is found by its name."""
    running = "{}.{}".format(*sys.version_info)
    if running in versions:
        return [sys.executable]
    for version in versions:
        for command in ([f"python{version}"], ["py", f"-{version}"]):
            if shutil.which(command[0]) and can_make_venv(command):
                return command
    served = " or ".join(reversed(versions))
    raise UnavailableError(f"Python {served} is needed, this is {running} and no other was found")


def can_make_venv(python: list) -> bool:
    """Tell whether a Python starts (a version manager's stub may not) and has the parts that some systems leave out."""
    check = [*python, "-c", "import ensurepip, venv"]
    return subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def call(command: list, folder: Path) -> int:
    """Run a command in a folder, with this repository's modules in reach, and return its exit status."""
    return subprocess.run(command, cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


def say(line: str) -> None:
    """Print a line of this script's own, in order with those of the commands that it runs."""
    print("run.py: " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
