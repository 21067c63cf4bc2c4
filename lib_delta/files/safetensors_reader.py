"""Reads safetensors files: a JSON header with each tensor's position, then the numbers.

Format: https://github.com/huggingface/safetensors#format.  The package of that name maps the file into memory.
That is fast, but ends the process if another program overwrites the file while the map is in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_delta.errors import CheckpointError
from lib_delta.files.stored_file import Shapes, StoredFile, itemsize
from lib_delta.files.zip_records import Span

_LARGEST_HEADER = 100_000_000  # bytes, the format's limit
_MOST_TENSORS = 2**16
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    # Newer than the oldest supported torch.
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
}


class _HeaderError(Exception):
    """A header that breaks the format's rules."""


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """A safetensors file whose tensors are read on demand."""

    def __init__(self, path: Path) -> None:
        self._file = StoredFile(path)
        try:
            self.metadata, self._entries, self._data = _read_header(self._file)
        except (_HeaderError, ValueError, RecursionError) as error:
            self._file.close()
            raise CheckpointError(
                f"{path.name} is a truncated or damaged safetensors file ({_short(error)}): download it again"
            ) from error
        except BaseException:
            self._file.close()
            raise
        self.shapes: Shapes = {key: entry.shape for key, entry in self._entries.items()}

    def tensor(self, key: str) -> Tensor:
        entry = self._entries[key]
        data = self._file.read(Span(self._data + entry.start, entry.end - entry.start))
        return data.view(entry.dtype).view(entry.shape)

    def close(self) -> None:
        self._file.close()


def _read_header(file: StoredFile) -> tuple[Mapping[str, str], dict[str, _Entry], int]:
    """Return the text fields, the tensors, and the position of the first number."""
    length = int.from_bytes(file.bytes(Span(0, min(8, file.size))), "little")
    if length > min(_LARGEST_HEADER, file.size - 8):
        raise _HeaderError("its header is longer than the file")
    seen = 0

    def compact(pairs: list[tuple[str, Any]]) -> Any:
        # Runs as soon as an object is parsed: lists and dictionaries take many times the header's size.
        nonlocal seen
        seen += 1
        if seen > _MOST_TENSORS:
            raise _HeaderError("it has more tensors than any model")
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            raise _HeaderError("a name stands twice in it")
        return _entry(parsed) if parsed.keys() == {"dtype", "shape", "data_offsets"} else parsed

    header = json.loads(file.bytes(Span(8, length)).decode("utf-8"), object_pairs_hook=compact)
    metadata = header.pop("__metadata__", None) or {} if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderError("its text fields are no text")
    _check_layout(header, file.size - 8 - length)
    return metadata, header, 8 + length


def _entry(entry: Mapping[str, Any]) -> _Entry:
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
            raise _HeaderError("a tensor has a shape or a place that is no list of whole numbers")
    dtype = getattr(torch, _DTYPES.get(str(entry["dtype"]), ""), None)
    if not isinstance(dtype, torch.dtype):
        raise _HeaderError(f"it has numbers of a type {str(entry['dtype'])[:20]!r}, which is not known")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * itemsize(dtype):
        raise _HeaderError("a tensor's shape does not fit its place")
    return _Entry(dtype, tuple(shape), *offsets)


def _check_layout(header: Mapping[str, Any], size: int) -> None:
    """Check that the tensors fill the rest of the file, without gaps or overlaps."""
    end = 0
    if not all(isinstance(entry, _Entry) for entry in header.values()):
        raise _HeaderError("a tensor is described wrongly")
    for entry in sorted(header.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            raise _HeaderError("its tensors overlap, or have gaps between them")
        end = entry.end
    if end != size:
        raise _HeaderError(f"it should be of {end - size:+} bytes")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
