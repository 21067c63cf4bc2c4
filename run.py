"""Run one part of this repository.

    python run.py demo|train|evaluate|bench|test|test-newest|test-browser|test-quick|test-gpu|lint [arguments]

The first call makes a virtual environment beside this file (.venv) and installs pinned requirements into it; later
calls start at once. `test` without arguments uses all cores, and then runs `test-newest` (the same tests on the newest
torch) and `test-browser` (the accordion in Chromium, on the gradio of each WebUI), each in its own environment.
`test-quick` runs the tests that need no torch, in seconds. `test-gpu` checks the graphics card in a few minutes and
prints a table; `tests/gpu/check.py` does the same with a WebUI's Python. This script uses only the standard library and
syntax that an old Python understands, so that it can say which Python is needed.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SUPPORTED = ("3.11", "3.10")  # the WebUIs' torch 2.1.2 has no wheels for later ones

# Each part: its requirements (a file in requirements/), and its commands.
PARTS = {
    "demo": ("demo", [["-m", "demo"]]),
    "train": ("demo", [["-m", "demo.train"]]),
    "evaluate": ("demo", [["-m", "demo.evaluate"]]),
    "bench": ("demo", [["-m", "bench"]]),
    "test": ("test", [["-m", "pytest"]]),
    "test-gpu": ("test", [["tests/gpu/check.py"]]),
    "lint": ("test", [["-m", "ruff", "check"], ["-m", "ruff", "format", "--check"], ["-m", "mypy"]]),
}

# Tests in other environments: requirements, supported Pythons, and the default arguments.
MORE_TESTS = {
    "test-newest": [("newest", SUPPORTED[:1], [])],
    "test-browser": [("gradio3", SUPPORTED, ["tests/browser"]), ("gradio4", SUPPORTED, ["tests/browser"])],
    "test-quick": [("quick", ("3.13", "3.12", *SUPPORTED), ["tests/request", "tests/page"])],
}
AFTER_TEST = ("test-newest", "test-browser")  # `test` without arguments runs these as well
NO_TESTS = 5  # pytest's status where none could run; its output says why

# Threads of OpenMP and BLAS spin while they wait. If processes outnumber cores, they slow each other down, so every
# part but demo (a single process) runs one thread per process. torch reads these variables when it is imported.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MAX_WORKERS = 8  # each loads torch and its models, up to 2 GB


class UnavailableError(Exception):
    """An environment that can't be made here; the message says what is needed."""


def main() -> int:
    """Run the part that the command line names, and return its exit status."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in PARTS and name not in MORE_TESTS:
        print("usage: python run.py " + "|".join([*PARTS, *MORE_TESTS]) + " [arguments of the part]")
        return 0 if name in ("-h", "--help") else 2
    # Ctrl-C also reaches the part, which may have work to save: wait for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        status = run_more(name, arguments) if name in MORE_TESTS else run_part(name, arguments)
    except UnavailableError as error:
        say(str(error))
        return 1
    if name == "test" and not arguments:
        for more in AFTER_TEST:
            status = status or run_more_where_possible(more)
    return status


def run_part(name: str, arguments: list) -> int:
    """Run every command of a part, and return the first exit status that is not 0."""
    requirements, commands = PARTS[name]
    python = environment(".venv", requirements, SUPPORTED)
    # Files named on the command line are the caller's; tests and lint are about this folder.
    folder = ROOT if requirements == "test" else Path.cwd()
    if name == "test" and not arguments:
        arguments = side_by_side()
    threads = {} if name == "demo" else ONE_THREAD
    statuses = [call([python, *command, *arguments], folder, threads) for command in commands]
    return next((status for status in statuses if status), 0)


def run_more(name: str, arguments: list) -> int:
    """Run tests in other environments; tests skip themselves if a package is missing there."""
    status = 0
    for requirements, versions, default in MORE_TESTS[name]:
        python = environment(".venv-" + requirements, requirements, versions)
        tests = arguments or [*side_by_side(), *default]
        status = call([python, "-m", "pytest", *tests], ROOT, ONE_THREAD) or status
    return status


def side_by_side() -> list:
    """Return pytest's arguments for one process per core; the tests of a file share a process and their fixtures."""
    # There is only one running WebUI, and it answers one caller at a time.
    workers = 1 if os.environ.get("WEBUI_URL") else min(cores(), MAX_WORKERS)
    return ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_more_where_possible(name: str) -> int:
    """Run tests in other environments; only CI fails if their packages can't be installed."""
    try:
        status = run_more(name, [])
    except UnavailableError as error:
        say("skipped " + name + ": " + str(error))
        status = NO_TESTS
    return 0 if status == NO_TESTS and not os.environ.get("CI") else status


def environment(folder: str, requirements: str, versions: tuple) -> str:
    """Return the Python of an environment with requirements/<requirements>.txt, and make it if necessary."""
    venv, wanted = ROOT / folder, ROOT / "requirements" / f"{requirements}.txt"
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp, digest = venv / f"installed-{requirements}", hashlib.sha256(wanted.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == digest:
        return str(python)
    if not python.exists() or not any(venv.glob("installed-*")):  # none, or one that was left half made
        make_venv(venv, versions)
    say(f"installing requirements/{wanted.name} into {folder} (this once)")
    # The files list every dependency. --no-deps keeps out wandb, which k-diffusion requires and only its training uses.
    # --no-compile saves a third of the time; modules are compiled when they are imported.
    install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--no-deps", "-r", str(wanted)]
    if call([str(python), *install], ROOT, {}):
        raise UnavailableError(
            f"pip could not install requirements/{wanted.name} (its lines above say why); "
            "it needs a package index and up to 6 GB of disk"
        )
    stamp.write_text(digest)
    return str(python)


def make_venv(venv: Path, versions: tuple) -> None:
    """Make an empty virtual environment with one of the Python versions; replace an existing one."""
    python = find_python(versions)
    say(f"making {venv.name} with " + " ".join(python))
    if call([*python, "-m", "venv", "--clear", str(venv)], ROOT, {}):
        raise UnavailableError(f"Python could not make the virtual environment {venv} (its lines above say why)")


def find_python(versions: tuple) -> list:
    """Return a command that starts one of the Python versions: this Python if it fits, else one found by name."""
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
    """Return whether a Python starts (a version manager's stub may not) and has venv (some systems leave it out)."""
    check = [*python, "-c", "import ensurepip, venv"]
    return subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def call(command: list, folder: Path, variables: dict) -> int:
    """Run a command in a folder, with this repository on Python's path, and return its exit status.

    ``variables`` are environment variables to set unless the caller has set them.
    """
    environment = {**variables, **os.environ, "PYTHONPATH": str(ROOT)}
    # Packages are installed without bytecode. Without this line, every process would compile torch again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=str(folder), env=environment).returncode


def say(line: str) -> None:
    """Print a line of this script, in order with the lines of its commands."""
    print("run.py: " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
