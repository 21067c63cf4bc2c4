"""Every test runs with one thread, and one WebUI is asked by one test at a time."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from run import ONE_THREAD

# torch reads these when it is imported; processes that tests start inherit them.
os.environ.update(ONE_THREAD)

if find_spec("torch") is not None:  # the environments of the browser tests have none
    import torch

    torch.set_num_threads(1)  # a plugin may have imported torch before this file


def pytest_configure(config: pytest.Config) -> None:
    """Refuse parallel runs against one WebUI."""
    if os.environ.get("WEBUI_URL") and config.getoption("numprocesses", None):
        raise pytest.UsageError("WEBUI_URL names one WebUI, whose settings tests change: run them without -n")
