"""Evaluating the UNet for base and adapted, in one forward pass if memory allows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_delta.core.guides import Guide
from lib_delta.core.rows import Rows
from lib_delta.devices import empty_cache, out_of_memory, without_autocast
from lib_delta.models.forked_layers import is_adapted
from lib_delta.models.network import Network


class Evaluator:
    """Evaluates a UNet with its guides, and splits the work when memory runs out.

    ``parts`` is the number of parts that an evaluation is split into, ``evaluations`` the number of forward passes
    so far.
    """

    def __init__(self, unet: Network, guides: Sequence[Guide] = (), parts: int = 1) -> None:
        self.unet = unet
        self.guides = tuple(guides)
        self.parts = parts
        self.evaluations = 0

    @property
    def adapts(self) -> bool:
        """Whether adapted differs from base by its layers or guides."""
        return bool(self.guides) or is_adapted(self.unet)

    def __call__(self, rows: Rows) -> Tensor:
        """Return the UNet's output ``(R, M, C, H, W)``.

        If memory runs out, the work is split and tried again: first into base and adapted, then into prompts and
        negative prompts, then into images.  Later evaluations start with the number of parts that fitted.
        """
        while True:
            try:
                with without_autocast(rows.x.device):
                    return self._evaluate(rows)
            except Exception as error:
                most = rows.count * len(self._branches(rows))
                if not out_of_memory(error) or self.parts >= most:
                    raise
            # Outside the handler the error no longer keeps the failed pass's tensors alive.
            self.parts = min(2 * self.parts, most)
            empty_cache(rows.x.device)

    def _evaluate(self, rows: Rows) -> Tensor:
        if self.parts == 1:
            output = rows.evaluate(self.unet, self.guides, None)
            self.evaluations += 1
            return output
        branches = self._branches(rows)
        pieces = rows.split(min(rows.count, self.parts // len(branches)))
        output = torch.cat(
            [torch.cat([piece.evaluate(self.unet, self.guides, branch) for piece in pieces], 1) for branch in branches]
        )
        self.evaluations += len(branches) * len(pieces)
        return output

    def _branches(self, rows: Rows) -> tuple[int | None, ...]:
        return (0, 1) if rows.differ or self.adapts else (None,)
