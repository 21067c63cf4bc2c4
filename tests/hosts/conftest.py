"""The WebUIs that tests run in: a stand-in of each, started once for all tests of a file.

A test file names its WebUIs in ``HOSTS`` (default: all), and may add files for them in ``add_files(files)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.small_files import Files, make_files
from tests.support.stand_in_webui import WebUI, running

ALL = ("a1111", "forge", "neo")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test in each of its file's WebUIs."""
    if "started" in metafunc.fixturenames:
        metafunc.parametrize("started", getattr(metafunc.module, "HOSTS", ALL), indirect=True, scope="module")


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    """The stand-in, in the state that earlier tests left."""
    files = make_files(tmp_path_factory.mktemp(request.param))
    add_files = getattr(request.module, "add_files", None)
    if add_files is not None:
        add_files(files)
    with running(request.param, files) as webui:
        yield webui


@pytest.fixture
def webui(started: WebUI) -> Iterator[WebUI]:
    """The stand-in, reset after each test."""
    yield started
    started.reset()


@pytest.fixture
def files(webui: WebUI) -> Files:
    """The stand-in's files."""
    return webui.files
