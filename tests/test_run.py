"""run.py makes its environments once, names the Pythons that it serves, and passes exit statuses on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import run

Calls = list[list[str]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put a folder with one requirement in the repository's place, and record commands instead of running them."""
    recorded: Calls = []

    def call(command: list[str], folder: Path) -> int:
        recorded.append(command)
        if "venv" in command:
            python = tmp_path / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        return 0

    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "demo.txt").write_text("torch==2.1.2\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "call", call)
    monkeypatch.setattr(run, "find_python", lambda versions: ["python"])
    return recorded


def words(calls: Calls) -> list[str]:
    """Tell what each command is about."""
    return [next(word for word in ("venv", "install", "demo") if word in command) for command in calls]


def test_only_the_first_call_installs(calls: Calls) -> None:
    assert run.run_part("demo", ["--steps", "3"]) == 0
    assert words(calls) == ["venv", "install", "demo"]
    assert calls[-1][1:] == ["-m", "demo", "--steps", "3"]
    run.run_part("demo", [])
    assert words(calls[3:]) == ["demo"]


def test_changed_requirements_are_installed_into_the_same_environment(calls: Calls) -> None:
    run.run_part("demo", [])
    (run.ROOT / "requirements" / "demo.txt").write_text("torch==2.1.3\n")
    run.run_part("demo", [])
    assert words(calls[3:]) == ["install", "demo"]


def test_an_environment_that_was_left_half_made_is_made_again(calls: Calls) -> None:
    run.make_venv(run.ROOT / ".venv", run.SERVED)
    run.run_part("demo", [])
    assert words(calls[1:]) == ["venv", "install", "demo"]


def test_a_failed_install_is_one_sentence_and_is_tried_again(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    run.make_venv(run.ROOT / ".venv", run.SERVED)
    monkeypatch.setattr(run, "call", lambda command, folder: int("install" in command))
    for _ in range(2):
        with pytest.raises(run.UnavailableError, match=r"pip could not install requirements/demo\.txt"):
            run.run_part("demo", [])


def test_another_python_hears_which_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    with pytest.raises(run.UnavailableError, match=r"Python 3\.10 or 3\.11 is needed, this is 3\.13"):
        run.find_python(run.SERVED)


@pytest.mark.parametrize(("ci", "status"), [("true", run.NO_TESTS), ("", 0)])
def test_only_ci_insists_on_further_environments(ci: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> str:
        raise run.UnavailableError("no wheel")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(run, "environment", unavailable)
    assert run.run_more_where_possible("test-newest") == status
    monkeypatch.setattr(run, "environment", lambda *_: "python")
    monkeypatch.setattr(run, "call", lambda command, folder: run.NO_TESTS)
    assert run.run_more_where_possible("test-browser") == status


def test_the_accordion_is_tried_on_both_gradio_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Calls = []
    monkeypatch.setattr(run, "environment", lambda folder, *_: folder)
    monkeypatch.setattr(run, "call", lambda command, folder: ran.append(command) or int("gradio3" in command[0]))
    assert run.run_more("test-browser", []) == 1
    assert [command[0] for command in ran] == [".venv-gradio3", ".venv-gradio4"]


@pytest.mark.parametrize("failing", ["ruff", "mypy"])
def test_lint_runs_both_checks_and_fails_with_either(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Calls = []

    def call(command: list[str], folder: Path) -> int:
        ran.append(command)
        return int(failing in command)

    monkeypatch.setattr(run, "environment", lambda *names: "python")
    monkeypatch.setattr(run, "call", call)
    assert run.run_part("lint", []) == 1
    assert len(ran) == 2
