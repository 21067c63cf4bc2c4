"""A file that is read piece by piece, and not mapped: a map of a file that is overwritten ends the process."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lib_delta.errors import CheckpointError
from lib_delta.files.zip_records import Span

Shapes = Mapping[str, tuple[int, ...]]


def itemsize(dtype: torch.dtype) -> int:
    """Return the bytes of a number."""
    return torch.empty((), dtype=dtype).element_size()


class StoredFile:
    """An open file, of which nothing is kept in memory but what was read."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.stream: BinaryIO = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
        self._state = self._now()
        self.size = self._state[0]
        self._placing = threading.Lock()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.stream.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, span: Span) -> Tensor:
        """Return bytes as a vector of uint8; raises :class:`CheckpointError` if the file is not what it was."""
        data = torch.empty(span.length, dtype=torch.uint8)
        view = memoryview(data.numpy())
        try:
            complete = self._fill(view, span.start) and self._now() == self._state
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.name} cannot be read ({error}): a model file is needed") from error
        if not complete:
            raise CheckpointError(f"{self.name} was changed while it was read: try again when it is complete")
        if span.checksum is not None and zlib.crc32(view) != span.checksum:
            raise CheckpointError(
                f"{self.name} is damaged: what it holds does not fit its checksums; download it again"
            )
        return data

    def _fill(self, view: memoryview, start: int) -> bool:
        done = 0
        while done < len(view):
            got = self._read_into(view[done:], start + done)
            if not got:
                return False
            done += got
        return True

    def _read_into(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.stream.fileno(), [view], start)
        with self._placing:  # elsewhere (Windows) the place to read from is the file's, and readers take turns
            self.stream.seek(start)
            return self.stream.readinto(view)  # type: ignore[attr-defined]

    def bytes(self, span: Span) -> bytes:
        """Return a short stretch of the file."""
        return self.read(span).numpy().tobytes()

    def close(self) -> None:
        """Let go of the file; what was read stays."""
        self.stream.close()
