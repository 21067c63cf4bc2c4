"""run.py makes its environments once, names the Pythons that it serves, and passes exit statuses on."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

import run

Calls = list[list[str]]
Variables = dict[str, str]
Parts = list[tuple[list[str], Variables]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put a folder with one requirement in the repository's place, and record commands instead of running them."""
    recorded: Calls = []

    def call(command: list[str], folder: Path, variables: Variables) -> int:
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
    run.make_venv(run.ROOT / ".venv", run.SUPPORTED)
    run.run_part("demo", [])
    assert words(calls[1:]) == ["venv", "install", "demo"]


def test_a_failed_install_is_one_sentence_and_is_tried_again(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    run.make_venv(run.ROOT / ".venv", run.SUPPORTED)
    monkeypatch.setattr(run, "call", lambda command, *_: int("install" in command))
    for _ in range(2):
        with pytest.raises(run.UnavailableError, match=r"pip could not install requirements/demo\.txt"):
            run.run_part("demo", [])


def test_another_python_hears_which_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(run.shutil, "which", lambda name: None)
    with pytest.raises(run.UnavailableError, match=r"Python 3\.10 or 3\.11 is needed, this is 3\.13"):
        run.find_python(run.SUPPORTED)


@pytest.mark.parametrize(("ci", "status"), [("true", run.NO_TESTS), ("", 0)])
def test_only_ci_insists_on_further_environments(ci: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> str:
        raise run.UnavailableError("no wheel")

    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(run, "environment", unavailable)
    assert run.run_more_where_possible("test-newest") == status
    monkeypatch.setattr(run, "environment", lambda *_: "python")
    monkeypatch.setattr(run, "call", lambda *_: run.NO_TESTS)
    assert run.run_more_where_possible("test-browser") == status


def test_the_accordion_is_tried_on_both_gradio_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Calls = []
    monkeypatch.setattr(run, "environment", lambda folder, *_: folder)
    monkeypatch.setattr(run, "call", lambda command, *_: ran.append(command) or int("gradio3" in command[0]))
    assert run.run_more("test-browser", []) == 1
    assert [command[0] for command in ran] == [".venv-gradio3", ".venv-gradio4"]


@pytest.mark.parametrize("failing", ["ruff", "mypy"])
def test_lint_runs_all_checks_and_fails_with_any(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Calls = []

    def call(command: list[str], *_: object) -> int:
        ran.append(command)
        return int(failing in command)

    monkeypatch.setattr(run, "environment", lambda *names: "python")
    monkeypatch.setattr(run, "call", call)
    assert run.run_part("lint", []) == 1
    assert len(ran) == 3


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Four cores and all environments, and what is run in these with which variables."""
    ran: Parts = []
    monkeypatch.delenv("WEBUI_URL", raising=False)
    monkeypatch.setattr(run, "cores", lambda: 4)
    monkeypatch.setattr(run, "environment", lambda *_: "python")
    monkeypatch.setattr(run, "call", lambda command, folder, variables: ran.append((command[3:], variables)) or 0)
    return ran


def test_all_tests_run_on_all_cores_and_a_files_tests_in_one_process(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "test"])
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.main() == 0
    workers = ["-n", "4", "--dist", "loadfile"]
    assert [command for command, _ in parts] == [workers, workers, *2 * [[*workers, "tests/browser"]]]


def test_tests_that_are_named_start_at_once_in_one_process(parts: Parts) -> None:
    run.run_part("test", ["tests/models/test_unet.py"])
    run.run_more("test-browser", ["tests/browser/test_accordion.py"])
    assert [command for command, _ in parts] == [
        ["tests/models/test_unet.py"],
        *2 * [["tests/browser/test_accordion.py"]],
    ]


@pytest.mark.parametrize(("cores", "url", "options"), [(1, "", []), (4, "http://127.0.0.1:7860", []), (64, "", ["8"])])
def test_one_core_and_one_webui_have_one_process_and_many_cores_not_too_many(
    cores: int, url: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBUI_URL", url)
    monkeypatch.setattr(run, "cores", lambda: cores)
    assert run.side_by_side()[1:2] == options


@pytest.mark.parametrize("name", [*run.PARTS, *run.MORE_TESTS])
def test_every_part_but_the_demo_has_one_thread_a_process(name: str, parts: Parts) -> None:
    (run.run_part if name in run.PARTS else run.run_more)(name, [])
    assert parts
    assert all(variables == ({} if name == "demo" else run.ONE_THREAD) for _, variables in parts)


def test_the_callers_own_count_of_threads_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS")
    check = "import os, sys; sys.exit(10 * int(os.environ['OMP_NUM_THREADS']) + int(os.environ['MKL_NUM_THREADS']))"
    assert run.call([sys.executable, "-c", check], tmp_path, run.ONE_THREAD) == 31


def test_modules_are_compiled_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run.call([sys.executable, "-c", "import sys; sys.exit(3 + sys.dont_write_bytecode)"], tmp_path, {}) == 3


def test_tests_have_one_thread_however_they_are_started() -> None:
    assert run.ONE_THREAD.items() <= os.environ.items()
    assert torch.get_num_threads() == 1


@pytest.mark.skipif(not Path(sys.prefix, "installed-test").exists(), reason="run.py did not make this environment")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["clip.simple_tokenizer", "cv2", "diffusers", "k_diffusion", "lycoris", "peft", "resvg_py", "tomesd"]
)
def test_the_pinned_environment_has_what_tests_skip_themselves_without(name: str) -> None:
    importlib.import_module(name)
