"""Reads files of ``torch.save``: a pickle that describes tensors, and their numbers next to it.

There are two layouts: a zip archive (PyTorch 1.6 and later), and a row of pickles followed by the numbers (before).
Neither ``torch.load`` nor ``torch.jit`` reads a byte of them: both can run code that a file names.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lib_delta.errors import CheckpointError
from lib_delta.files import zip_records
from lib_delta.files.stored_file import Shapes, StoredFile, itemsize
from lib_delta.files.unpickle import ForbiddenError, PickleError, Storage, StoredTensor, Unpickler
from lib_delta.files.zip_records import CompressedError, Span, ZipError

# The records that torch.save writes; all records of a file share the root.
_RECORD = re.compile(
    r"(?P<root>[^/]+)/(?P<name>data\.pkl|data/\d+|version|byteorder|\.data/serialization_id|\.format_version|\.storage_alignment)"
)
_PROGRAMS: tuple[tuple[str, str], ...] = (
    (r"([^/]+/)?(models/|archive_format$|archive_version$|serialized_)", "an exported PyTorch program"),
    (r"[^/]+/\.data/(extern_modules|version)", "a torch.package, which contains code"),
    (r"[^/]+/(code/|constants\.pkl|constants/|bytecode\.pkl)", "a TorchScript program"),
)
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LEAST_OPERATIONS = 2**17  # of a pickle; one more for every 16 bytes of the file
_DEEPEST = 4  # levels of nested dictionaries and lists
_WRAPPERS = ("state_dict", "model", "params_ema")


@dataclass(frozen=True)
class _Content:
    """The object that a file describes, and the positions of its storages by their keys."""

    described: Any
    spans: Mapping[str, Span]


class TorchFileReader:
    """A ``.ckpt``, ``.pt`` or ``.bin`` file whose tensors are read on demand.

    A nested tensor's name is its path, joined by dots; positions in lists are part of it.  A file that is one tensor
    has the empty name for it.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path) -> None:
        self._file = StoredFile(path)
        try:
            content = _content(self._file)
            self._tensors = _named_tensors(content.described)
            self._spans = content.spans
            self._check()
        except BaseException:
            self._file.close()
            raise
        self.shapes: Shapes = {key: stored.shape for key, stored in self._tensors.items()}
        uses = Counter(stored.storage.key for stored in self._tensors.values())
        self._shared: dict[str, Tensor | None] = {key: None for key, count in uses.items() if count > 1}
        self._sharing = threading.Lock()

    def _check(self) -> None:
        """Refuse tensors that are larger than their storage."""
        for key, stored in self._tensors.items():
            storage, size = stored.storage, itemsize(stored.dtype)
            unit = 1 if storage.dtype is None else size
            span = self._spans.get(storage.key)
            steps = [(length - 1) * stride for length, stride in zip(stored.shape, stored.strides)]
            last = (stored.offset + 1 + sum(steps)) * size if math.prod(stored.shape) else 0
            if (
                span is None
                or span.length < (storage.start + storage.length) * unit
                or len(stored.strides) != len(stored.shape)
                or max(last, math.prod(stored.shape) * size) > storage.length * unit
            ):
                raise CheckpointError(f"{self._file.name} is damaged: its weight {key} is larger than its storage")

    def tensor(self, key: str) -> Tensor:
        stored = self._tensors[key]
        numbers = self._numbers(stored)
        tensor = torch.as_strided(numbers, stored.shape, stored.strides, numbers.storage_offset() + stored.offset)
        if stored.storage.key in self._shared or tensor.numel() == numbers.numel():
            return tensor
        return tensor.clone()  # nothing else needs the rest of the storage

    def _numbers(self, stored: StoredTensor) -> Tensor:
        """Return the storage of a tensor as a vector of its type."""
        storage = stored.storage
        data = self._read_shared(storage.key) if storage.key in self._shared else self._read(storage.key)
        unit = 1 if storage.dtype is None else itemsize(stored.dtype)
        return data[storage.start * unit : (storage.start + storage.length) * unit].view(stored.dtype)

    def _read_shared(self, key: str) -> Tensor:
        with self._sharing:  # otherwise each thread would read it
            data = self._shared[key]
            if data is None:
                data = self._shared[key] = self._read(key)
            return data

    def _read(self, key: str) -> Tensor:
        return self._file.read(self._spans[key])

    def close(self) -> None:
        self._shared = {}
        self._file.close()


def _content(file: StoredFile) -> _Content:
    try:
        is_archive = file.stream.read(4) == zip_records.START
        file.stream.seek(0)
        return _archive(file) if is_archive else _row_of_pickles(file)
    except CompressedError as error:
        raise CheckpointError(
            f"{file.name} is a compressed archive ({error}), which is not supported: PyTorch's plain file is needed"
        ) from error
    except ForbiddenError as error:
        raise CheckpointError(
            f"{file.name} holds Python objects besides weights ({error}), which are not loaded for safety:"
            " convert it to safetensors"
        ) from error
    except ZipError as error:
        raise CheckpointError(
            f"{file.name} is a truncated or damaged PyTorch file (it {error}): download it again"
        ) from error
    except PickleError as error:
        raise CheckpointError(
            f"{file.name} is a truncated or damaged PyTorch file ({error}): download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error.strerror}): a model file is needed") from error


def _archive(file: StoredFile) -> _Content:
    records = _without_root(file.name, zip_records.read_records(file.stream))
    if "data.pkl" not in records:
        raise ZipError("has no data.pkl")
    if "byteorder" in records and file.bytes(records["byteorder"]) != b"little":
        raise CheckpointError(f"{file.name} was written on a machine of another byte order: convert it to safetensors")
    unpickler = Unpickler(io.BytesIO(file.bytes(records["data.pkl"])), _operations(file))
    described = unpickler.load()
    spans = {key: records[f"data/{key}"] for key in unpickler.storages if f"data/{key}" in records}
    for key, storage in unpickler.storages.items():
        unit = 1 if storage.dtype is None else itemsize(storage.dtype)
        if key in spans and spans[key].length != storage.length * unit:
            raise PickleError("a storage has another size than described")
    return _Content(described, spans)


def _without_root(name: str, records: Mapping[str, Span]) -> dict[str, Span]:
    """Return the records by their names below the root; refuse records that torch.save does not write."""
    for pattern, what in _PROGRAMS:
        if any(re.match(pattern, record) for record in records):
            raise CheckpointError(f"{name} is {what}, not plain weights: it is not read, for safety")
    below_root: dict[str, Span] = {}
    roots = set()
    for record, span in records.items():
        match = _RECORD.fullmatch(record)
        if match is None:
            raise CheckpointError(
                f"{name} is an archive that contains more than weights ({record[:100]!r}): it is not read, for safety"
            )
        below_root[match["name"]] = span
        roots.add(match["root"])
    if len(roots) > 1:
        raise ZipError("is made of several")
    return below_root


def _row_of_pickles(file: StoredFile) -> _Content:
    """Read magic number, version, system, content and keys, then the position of each key's numbers."""
    stream = file.stream
    unpickler = Unpickler(stream, _operations(file))
    if (unpickler.load(), unpickler.load()) != (_MAGIC, _PROTOCOL):
        raise PickleError("it does not start like a file of torch.save")
    unpickler.load()
    described, keys = unpickler.load(), unpickler.load()
    if not isinstance(keys, list):
        raise PickleError("it has no list of storages")
    return _Content(described, dict(_spans_after(stream, keys, unpickler.storages)))


def _spans_after(stream: BinaryIO, keys: list[Any], storages: Mapping[str, Storage]) -> Iterator[tuple[str, Span]]:
    end = stream.seek(0, os.SEEK_CUR)
    size = stream.seek(0, os.SEEK_END)
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.dtype is None:
            raise PickleError("a storage is not described")
        stream.seek(end)
        length = int.from_bytes(stream.read(8), "little")
        end += 8 + length * itemsize(storage.dtype)
        if length != storage.length or end > size:
            raise PickleError("a storage has another size than described")
        yield key, Span(end - length * itemsize(storage.dtype), length * itemsize(storage.dtype))


def _operations(file: StoredFile) -> int:
    return _LEAST_OPERATIONS + file.size // 16


def _named_tensors(described: Any) -> dict[str, StoredTensor]:
    for name in _WRAPPERS:
        if isinstance(described, dict) and isinstance(described.get(name), dict):
            described = described[name]
    return dict(_walk("", described, 0, set()))


def _walk(name: str, described: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, StoredTensor]]:
    if isinstance(described, StoredTensor):
        yield name, described
    # Visits each object once: a list that contains a list many times, which contains another, has no end.
    if depth >= _DEEPEST or not isinstance(described, (dict, list)) or id(described) in seen:
        return
    seen.add(id(described))
    for key, value in described.items() if isinstance(described, dict) else enumerate(described):
        if isinstance(key, (str, int)):
            yield from _walk(f"{name}.{key}" if name else str(key), value, depth + 1, seen)
