"""Opens model files of any format, and returns their tensors by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from lib_delta.errors import CheckpointError
from lib_delta.files import sidecar_config, zip_records
from lib_delta.files.safetensors_reader import SafetensorsReader
from lib_delta.files.stored_file import Shapes
from lib_delta.files.torch_reader import TorchFileReader

# ``DataParallel`` prefixes every key with it.
_WRAPPER = "module."
# One thread copies from the page cache at a fraction of the memory's speed; more than four gain little.
READ_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileState:
    """The state of a file and of the configurations next to it, when it was read.

    Another time or size of any of them means another file.
    """

    path: Path
    modified: int
    size: int
    sidecars: sidecar_config.SidecarState = ()

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return a file's state; raises :class:`CheckpointError` if it cannot be read."""
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
        return cls(path, status.st_mtime_ns, status.st_size, sidecar_config.sidecar_state(path))


class TensorReader(Protocol):
    """The tensors of an open file."""

    metadata: Mapping[str, str]
    shapes: Shapes

    def tensor(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


def _open(path: Path) -> TensorReader:
    """Choose the reader by the file's content: extensions are often wrong."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
    if start[8:9] == b"{":
        return SafetensorsReader(path)
    if start.startswith((zip_records.START, b"\x80")):
        return TorchFileReader(path)
    raise CheckpointError(f"{path.name} {_describe_start(start)}: a model file (.safetensors, .ckpt or .pt) is needed")


def _describe_start(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"GGUF"):
        return "is a quantised GGUF file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page that was saved instead of the model"
    return "is not a model file"


class WeightFile:
    """An open model file, or the part of one below a prefix.

    Tensors are read on demand, and stay valid whatever happens to the file.
    Raises :class:`CheckpointError` for files that are unreadable, damaged or of another format.
    """

    def __init__(self, reader: TensorReader, path: Path, prefix: str = "") -> None:
        self._reader, self.path, self.prefix = reader, path, prefix
        # diffusers' common name does not identify a model, so its folder's name is added.
        self.name = (
            f"{sidecar_config.known_as(path)}/{path.name}" if sidecar_config.named_by_diffusers(path) else path.name
        )

    @classmethod
    def open(cls, path: str | Path) -> WeightFile:
        """Open a ``.safetensors``, ``.ckpt`` or ``.pt`` file."""
        path = Path(path)
        reader = _open(path)
        # Models that were trained in parallel may be saved inside their wrapper.
        wrapped = bool(reader.shapes) and all(key.startswith(_WRAPPER) for key in reader.shapes)
        return cls(reader, path, _WRAPPER if wrapped else "")

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's text fields (safetensors only)."""
        return self._reader.metadata

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors by key, without the prefix."""
        start = len(self.prefix)
        return {k[start:]: v for k, v in self._reader.shapes.items() if k.startswith(self.prefix)}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, without the prefix."""
        return tuple(self.shapes)

    def tensor(self, key: str) -> Tensor:
        """Return one tensor as it is stored."""
        try:
            return self._reader.tensor(self.prefix + key)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.name} has no readable weight {self.prefix}{key} ({error})") from error

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return several tensors as they are stored, read by several threads."""
        keys = tuple(keys)
        with ThreadPoolExecutor(READ_THREADS) as readers:
            return dict(zip(keys, readers.map(self.tensor, keys)))

    def below(self, prefix: str) -> WeightFile:
        """Return a view of the keys that start with ``prefix``, with it removed."""
        return WeightFile(self._reader, self.path, self.prefix + prefix)

    def close(self) -> None:
        """Close the file; tensors that were read from it stay valid."""
        self._reader.close()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def header_number(file: WeightFile, key: str) -> int | None:
    """Return a positive whole number from the file's header; None if the header lacks it."""
    text = file.metadata.get(key)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise CheckpointError(f"{file.name} has {key} = {text!r} in its header: a positive whole number is needed")
    return int(text)
