"""The WebUIs that Delta Sampling runs in.  Only this package imports their modules."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_delta.hosts.base import Host


@lru_cache(maxsize=1)
def host() -> Host:
    """Return the running WebUI; Forge and its relatives have packages that AUTOMATIC1111 lacks."""
    forge = any(importlib.util.find_spec(name) for name in ("modules_forge", "ldm_patched"))
    module = importlib.import_module("lib_delta.hosts.forge.host" if forge else "lib_delta.hosts.a1111.host")
    running: Host = module.running()
    return running
