"""One version: the code's is the newest of the changelog."""

from __future__ import annotations

import re
from pathlib import Path

from lib_delta import __version__


def test_the_newest_version_of_the_changelog_is_the_codes() -> None:
    versions = re.findall(r"^## (\S+)$", Path("CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    released = [version for version in versions if version != "Unreleased"]
    assert released[0] == __version__
    numbers = [tuple(map(int, version.split("."))) for version in released]
    assert numbers == sorted(numbers, reverse=True)
