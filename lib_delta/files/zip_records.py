"""Finds the records of a zip file that PyTorch wrote: uncompressed, each in one piece.

This reader is strict: it refuses files that two lenient zip readers could read in two ways.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

START = b"PK\x03\x04"
MOST_RECORDS = 2**16
_END, _END_64, _LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY = struct.Struct("<4s4x2H4x3I3H8xI")
_UNKNOWN = 2**32 - 1  # the number is in the entry's extra field
_ENCRYPTED = 1


class ZipError(Exception):
    """A zip file that is damaged, or not of the kind that PyTorch writes; the message continues "it"."""


class CompressedError(ZipError):
    """An archive that would unpack to more than its size."""


class Span(NamedTuple):
    """Bytes of a file; ``checksum`` is their CRC-32, None if the file states none."""

    start: int
    length: int
    checksum: int | None = None


def read_records(stream: BinaryIO) -> dict[str, Span]:
    """Return the position of each record's data, by its name; raises :class:`ZipError`."""
    try:
        return _records(stream)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        raise ZipError(f"is damaged ({error})") from error


def _records(stream: BinaryIO) -> dict[str, Span]:
    start, length, count = _directory(stream)
    stream.seek(start)
    directory = stream.read(length)
    if count > MOST_RECORDS or len(directory) != length:
        raise ZipError("is cut off, or has more records than PyTorch writes")
    records: dict[str, Span] = {}
    for name, header, size, checksum in _entries(directory, count):
        if name in records:
            raise ZipError(f"has two records {name}")
        records[name] = Span(_data_start(stream, header, name), size, checksum)
        if records[name].start + size > start:
            raise ZipError(f"is cut off in its record {name}")
    if sum(span.length for span in records.values()) > start:
        raise CompressedError("its records overlap")
    return records


def _directory(stream: BinaryIO) -> tuple[int, int, int]:
    """Return the start and the length of the list of records, and their number."""
    size = stream.seek(0, os.SEEK_END)
    end = _tail(stream, size - 22, "<4s6xHIIH", _END)
    count, length, start, comment = end
    if comment:
        raise ZipError("has a comment")
    if count == 2**16 - 1 or _UNKNOWN in (length, start):
        (where,) = _tail(stream, size - 42, "<4s4xQ4x", _LOCATOR)
        count, length, start = _tail(stream, where, "<4s28xQQQ", _END_64)
    if start + length > size:
        raise ZipError("is cut off")
    return start, length, count


def _tail(stream: BinaryIO, at: int, form: str, signature: bytes) -> tuple[int, ...]:
    if at < 0:
        raise ZipError("is cut off")
    stream.seek(at)
    start, *numbers = struct.unpack(form, stream.read(struct.calcsize(form)))
    if start != signature:
        raise ZipError("is cut off: its end is missing")
    return tuple(numbers)


def _entries(directory: bytes, count: int) -> Iterator[tuple[str, int, int, int]]:
    """Yield each record's name, the position of its header, its size and its checksum."""
    at = 0
    for _ in range(count):
        signature, flags, method, checksum, packed, size, *lengths, header = _ENTRY.unpack_from(directory, at)
        at += _ENTRY.size
        name_length, extra_length, comment_length = lengths
        name = directory[at : at + name_length].decode("utf-8")
        extra = directory[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if signature != b"PK\x01\x02" or at > len(directory):
            raise ZipError("is damaged")
        size, packed, header = _wide((size, packed, header), extra)
        if method or packed != size or flags & _ENCRYPTED:
            raise CompressedError(f"its record {name}")
        yield name, header, size, checksum
    if at != len(directory):
        raise ZipError("has records that are not counted")


def _wide(numbers: tuple[int, ...], extra: bytes) -> tuple[int, ...]:
    """Read numbers that do not fit 32 bits from the extra field of 64-bit numbers."""
    if _UNKNOWN not in numbers:
        return numbers
    at = 0
    while at < len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{numbers.count(_UNKNOWN)}Q", extra, at + 4))
            return tuple(next(wide) if number == _UNKNOWN else number for number in numbers)
        at += 4 + length
    raise ZipError("is damaged: a record has no size")


def _data_start(stream: BinaryIO, header: int, name: str) -> int:
    """Return the start of a record's data, after its header, which repeats its name."""
    stream.seek(header)
    signature, name_length, extra_length = struct.unpack("<4s22x2H", stream.read(30))
    if signature != START or stream.read(name_length) != name.encode():
        raise ZipError(f"is damaged at its record {name}")
    return header + 30 + name_length + extra_length
