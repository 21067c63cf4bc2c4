"""A file that is read piece by piece, not mapped: overwriting a mapped file ends the process."""

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
    """Return the bytes that one number takes."""
    return torch.empty((), dtype=dtype).element_size()


def reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Return the tensor in a shape that differs in dimensions of length 1 only; None for any other shape.

    A 1x1 convolution may be stored as a matrix, or the reverse.
    """
    if _without_ones(tensor.shape) != _without_ones(shape):
        return None
    return tensor.reshape(shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


class StoredFile:
    """An open file; only what was read is in memory."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self.stream: BinaryIO = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
        self._state = self._current_state()
        self.size = self._state[0]
        self._seeking = threading.Lock()

    def _current_state(self) -> tuple[int, int]:
        status = os.fstat(self.stream.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, span: Span) -> Tensor:
        """Return bytes as a vector of uint8; raises :class:`CheckpointError` if the file has changed."""
        data = torch.empty(span.length, dtype=torch.uint8)
        view = memoryview(data.numpy())
        try:
            complete = self._fill(view, span.start) and self._current_state() == self._state
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.name} cannot be read ({error}): a model file is needed") from error
        if not complete:
            raise CheckpointError(f"{self.name} was changed while it was read: try again when it is complete")
        if span.checksum is not None and zlib.crc32(view) != span.checksum:
            raise CheckpointError(f"{self.name} is damaged: its contents do not match its checksums; download it again")
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
        with self._seeking:  # without preadv (Windows) all readers share the file's position, and take turns
            self.stream.seek(start)
            return self.stream.readinto(view)  # type: ignore[attr-defined]

    def bytes(self, span: Span) -> bytes:
        """Return a short stretch of the file."""
        return self.read(span).numpy().tobytes()

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self.stream.close()
