"""Names of the files that are put into the WebUI's folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Files:
    """Names of the files that are put into the WebUI's folders."""

    sd1: str = "delta-test-sd1"
    copy: str = "delta-test-sd1-copy"
    tuned: str = "delta-test-sd1-tuned"
    sd2: str = "delta-test-sd2"
    sdxl: str = "delta-test-sdxl"
    lora: str = "delta-test-lora"
    sdxl_lora: str = "delta-test-sdxl-lora"
    broken_lora: str = "delta-test-broken-lora"
    nan_lora: str = "delta-test-nan-lora"
    unmatched_lora: str = "delta-test-unmatched-lora"
    embedding: str = "delta-test-embedding"
    control: str = "delta-test-control"

    def delta(self, **changes: Any) -> dict[str, Any]:
        """Return what the API takes for a delta that works: the LoRA on the checkpoint that it was made for."""
        return {"lambda": 1.0, "base": self.sd1, "loras": self.lora, **changes}
