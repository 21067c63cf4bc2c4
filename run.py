"""Run one part of this repository.

    python run.py demo|train|evaluate|bench|test|test-newest|test-browser|test-gpu|lint [arguments of the part]

The first call makes a virtual environment beside this file (.venv) and installs pinned requirements into it; later
calls start at once. `test` without arguments runs on all cores. It ends with `test-newest`, the same tests in a second
environment, on the newest torch, and with `test-browser`, the accordion in Chromium on the gradio of each WebUI, which
has an environment for each. `test-gpu` checks what only a card can tell, in minutes, and prints a table;
`tests/gpu/check.py` is the same for a WebUI's own Python. Only the standard library is used, in words that an old
Python understands, so that it can say what is needed.
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
    "test-gpu": ("test", [["tests/gpu/check.py"]]),
    "lint": ("test", [["-m", "ruff", "check"], ["-m", "mypy"]]),
}

# More environments for tests: requirements, the Pythons they are for, and what is tested there if nothing is named.
MORE_TESTS = {
    "test-newest": [("newest", SERVED[:1], [])],
    "test-browser": [("gradio3", SERVED, ["tests/browser"]), ("gradio4", SERVED, ["tests/browser"])],
}
NO_TESTS = 5  # pytest's status where none could run; its output says why

# Threads of OpenMP and of BLAS spin while they wait, so where processes outnumber cores they keep each other from
# work: all parts but demo, which draws alone, have one a process. torch reads this when it is imported.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
MOST_WORKERS = 8  # each holds a torch and models of its own, up to 2 GB


class UnavailableError(Exception):
    """An environment that cannot be had here; the message says what is needed."""


def main() -> int:
    """Run the part that the command line names, and return its exit status."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name not in PARTS and name not in MORE_TESTS:
        print("usage: python run.py " + "|".join([*PARTS, *MORE_TESTS]) + " [arguments of the part]")
        return 0 if name in ("-h", "--help") else 2
    # Ctrl-C reaches the part as well, which may have work to save: wait for it instead of dying first.
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        status = run_more(name, arguments) if name in MORE_TESTS else run_part(name, arguments)
    except UnavailableError as error:
        say(str(error))
        return 1
    if name == "test" and not arguments:
        for more in MORE_TESTS:
            status = status or run_more_where_possible(more)
    return status


def run_part(name: str, arguments: list) -> int:
    """Run every command of a part, and return the first exit status that is not 0."""
    requirements, commands = PARTS[name]
    python = environment(".venv", requirements, SERVED)
    # Files named on the command line are the caller's; tests and lint are about this folder.
    folder = ROOT if requirements == "test" else Path.cwd()
    if name == "test" and not arguments:
        arguments = side_by_side()
    threads = {} if name == "demo" else ONE_THREAD
    statuses = [call([python, *command, *arguments], folder, threads) for command in commands]
    return next((status for status in statuses if status), 0)


def run_more(name: str, arguments: list) -> int:
    """Run tests in environments of their own; those that need a package not there skip themselves."""
    status = 0
    for requirements, versions, default in MORE_TESTS[name]:
        python = environment(".venv-" + requirements, requirements, versions)
        tests = arguments or [*side_by_side(), *default]
        status = call([python, "-m", "pytest", *tests], ROOT, ONE_THREAD) or status
    return status


def side_by_side() -> list:
    """Return what has pytest run a process for each core; a file's tests stay together, and so what they share."""
    # A running WebUI is one, and knows one caller at a time.
    workers = 1 if os.environ.get("WEBUI_URL") else min(cores(), MOST_WORKERS)
    return ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_more_where_possible(name: str) -> int:
    """Run further tests; only CI insists that what they need can be had."""
    try:
        status = run_more(name, [])
    except UnavailableError as error:
        say("skipped " + name + ": " + str(error))
        status = NO_TESTS
    return 0 if status == NO_TESTS and not os.environ.get("CI") else status


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
    # Modules are compiled when they are imported; all that is in packages would be a third of the installation's time.
    install = ["-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "--no-deps", "-r", str(wanted)]
    if call([str(python), *install], ROOT, {}):
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
    if call([*python, "-m", "venv", "--clear", str(venv)], ROOT, {}):
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


def call(command: list, folder: Path, variables: dict) -> int:
    """Run a command in a folder, with this repository's modules in reach, and return its exit status.

    ``variables`` of the environment are those that the caller's does not have.
    """
    environment = {**variables, **os.environ, "PYTHONPATH": str(ROOT)}
    # Packages are installed without bytecode. Where nobody may leave it, each process compiles torch for itself.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=str(folder), env=environment).returncode


def say(line: str) -> None:
    """Print a line of this script's own, in order with those of the commands that it runs."""
    print("run.py: " + line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
