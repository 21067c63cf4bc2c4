"""What is told of the main checkpoint, which a WebUI runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_delta.families import Family
    from lib_delta.models.merging import TokenMerging


@dataclass(frozen=True)
class Target:
    """The main checkpoint: its family, the largest noise level of its schedule, and whether it is one of flow matching.

    Samplers of such a model hold ``(1 - t) * x0 + t * noise`` and call t sigma; its largest level is infinite.
    ``merging`` is the token merging that it runs with now.
    """

    family: Family
    sigma_max: float
    flow: bool = False
    merging: TokenMerging | None = None
