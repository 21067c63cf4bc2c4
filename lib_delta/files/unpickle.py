"""Reads pickles of weights, with an interpreter that can make plain data only.

A pickle is a program: it names functions and calls them.  This interpreter never imports a name.

- The names that ``torch.save`` writes for tensors stand for functions of this module, which only describe a tensor.
- A few names that old training runs left in checkpoints are ignored.
- Any other name ends the reading.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

LONGEST_NAME = 256  # bytes of a module's or class's name
LONGEST_TEXT = 2**24  # bytes


class PickleError(Exception):
    """A pickle that is damaged."""


class ForbiddenError(PickleError):
    """A pickle that needs more than plain data and weights; the message names it."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of ``length`` numbers in the file; bytes if there is no ``dtype``.

    ``key`` names the block's data; this part starts at number ``start``.
    """

    key: str
    dtype: torch.dtype | None
    length: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The description of a tensor: a view of a storage, with ``offset`` and ``strides`` in numbers."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Ignored:
    """Stands for an object that a reader of weights does not need."""


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


@dataclass(frozen=True)
class _Call:
    """A name that the pickle may call; ``function`` takes its arguments."""

    function: Callable[..., Any]


def _plain_number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise PickleError("a size is no whole number")
    return value


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > 16:
        raise PickleError("a shape is no tuple of sizes")
    return tuple(map(_plain_number, values))


def _tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> StoredTensor:
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise PickleError("a tensor has no storage")
    return StoredTensor(storage, storage.dtype, _plain_number(offset), _numbers(shape), _numbers(strides))


def _tensor_of_type(
    storage: object, offset: object, shape: object, strides: object, grad: object, hooks: object, dtype: object, *_: Any
) -> StoredTensor:
    """Describe a tensor of a newer dtype, whose storage is untyped."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise PickleError("a tensor has no storage")
    return StoredTensor(storage, dtype, _plain_number(offset), _numbers(shape), _numbers(strides))


def _with_attributes(make: object, kind: object, arguments: object, state: object) -> object:
    """Describe a tensor that had extra attributes, which are dropped."""
    if not isinstance(make, _Call) or kind is not _TENSOR_CLASS or not isinstance(arguments, tuple):
        raise PickleError("a tensor with attributes is described wrongly")
    return make.function(*arguments)


def _unchanged(value: object, *_: object) -> object:
    return value


def _dictionary(*items: object) -> dict[object, object]:
    if items:
        raise PickleError("a dictionary has arguments")
    return {}


def _ignored(*_: object) -> Ignored:
    return Ignored()


def _not_plain(*_: object) -> StoredTensor:
    raise ForbiddenError("tensors that are sparse, quantised or without data")


_TENSOR_CLASS = object()
_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}
_UNTYPED_DTYPES = (*_STORAGES.values(), "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_ALLOWED_NAMES: dict[str, object] = {
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_tensor_of_type),
    "torch._utils._rebuild_parameter": _Call(_unchanged),
    "torch._utils._rebuild_parameter_with_state": _Call(_unchanged),
    "torch._tensor._rebuild_from_type_v2": _Call(_with_attributes),
    "torch._utils._rebuild_sparse_tensor": _Call(_not_plain),
    "torch._utils._rebuild_sparse_csr_tensor": _Call(_not_plain),
    "torch._utils._rebuild_qtensor": _Call(_not_plain),
    "torch._utils._rebuild_meta_tensor_no_storage": _Call(_not_plain),
    "torch.Tensor": _TENSOR_CLASS,
    "torch.nn.parameter.Parameter": _TENSOR_CLASS,
    "torch.Size": _Call(_unchanged),
    "collections.OrderedDict": _Call(_dictionary),
    **{f"torch.{name}Storage": _StorageType(getattr(torch, dtype)) for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": _StorageType(getattr(torch, dtype)) for name, dtype in _STORAGES.items()},
    **{f"torch.storage.{name}": _StorageType(None) for name in ("UntypedStorage", "_UntypedStorage")},
    "torch.UntypedStorage": _StorageType(None),
    **{f"torch.{name}": getattr(torch, name) for name in _UNTYPED_DTYPES if hasattr(torch, name)},
    # Left by the training runs of Stable Diffusion 1.x and of textual inversion.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _Call(_ignored),
    "torch.nn.modules.container.ParameterDict": _Call(_ignored),
    "numpy.core.multiarray.scalar": _Call(_ignored),
    "numpy._core.multiarray.scalar": _Call(_ignored),
    "numpy.dtype": _Call(_ignored),
    "_codecs.encode": _Call(_ignored),
    "torch.device": _Call(_ignored),
    "__builtin__.set": _Call(_ignored),
    "builtins.set": _Call(_ignored),
}


@dataclass
class Unpickler:
    """Reads the pickles of a stream, one after the other.

    ``operations`` is the number of steps that all of them may take together; it bounds time and memory.
    ``storages`` are the whole blocks named so far, by their keys.
    """

    stream: BinaryIO
    operations: int
    storages: dict[str, Storage] = field(default_factory=dict)

    def load(self) -> Any:
        """Read the next pickle; raises :class:`PickleError`, and :class:`ForbiddenError` for more than plain data."""
        machine = _Machine(self.stream, self.storages)
        try:
            while self.operations > 0:
                self.operations -= 1
                code = self.stream.read(1)
                if code == b".":
                    return machine.stack.pop()
                _step(machine, code)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise PickleError(f"it ends early or makes no sense ({error})") from error
        raise PickleError("it takes more steps than weights need")


class _Machine:
    def __init__(self, stream: BinaryIO, storages: dict[str, Storage]) -> None:
        self.stream, self.storages = stream, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def unpack(self, form: str) -> int:
        (number,) = struct.unpack(form, self.stream.read(struct.calcsize(form)))
        return int(number)

    def bytes(self, length: int) -> bytes:
        data = self.stream.read(min(length, LONGEST_TEXT))
        if len(data) != length:
            raise PickleError("it ends early")
        return data

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _step(machine: _Machine, code: bytes) -> None:
    operation = _OPERATIONS.get(code)
    if operation is None:
        raise PickleError("it ends early") if not code else ForbiddenError(f"the pickle operation {code!r}")
    operation(machine)


def _protocol(machine: _Machine) -> None:
    if machine.unpack("B") != 2:
        raise ForbiddenError("a pickle protocol that torch.save does not write by default")


def _global(machine: _Machine) -> None:
    lines = [machine.stream.readline(LONGEST_NAME) for _ in range(2)]
    if not all(line.endswith(b"\n") for line in lines):
        raise PickleError("a name is cut off")
    name = b".".join(line[:-1] for line in lines).decode("ascii", "backslashreplace")
    if name not in _ALLOWED_NAMES:
        raise ForbiddenError(name if name.isprintable() else ascii(name))
    machine.stack.append(_ALLOWED_NAMES[name])


def _reduce(machine: _Machine) -> None:
    arguments, called = machine.stack.pop(), machine.stack.pop()
    if not isinstance(called, _Call) or not isinstance(arguments, tuple):
        raise PickleError("it calls something that is no function")
    machine.stack.append(called.function(*arguments))


def _build(machine: _Machine) -> None:
    """Drop the attributes of a dictionary, a tensor or an ignored object."""
    machine.stack.pop()
    if not isinstance(machine.stack[-1], (dict, Ignored, StoredTensor)):
        raise PickleError("it gives attributes to something that has none")


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Ignored):
        raise PickleError("it appends to something that is no list")


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if isinstance(target, Ignored):
        return
    if type(target) is not dict or len(items) % 2:
        raise PickleError("it sets an item of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2]):
        # No nested keys: the hash of a tuple in a tuple in a tuple ... overflows the stack.
        if not isinstance(key, (str, int, Ignored, _Call)):
            raise PickleError("a key is no name")
        target[key] = value


def _persistent(machine: _Machine) -> None:
    """Describe a storage: ("storage", type, key, location, length), in older files with a view of it."""
    described = machine.stack.pop()
    if not isinstance(described, tuple) or len(described) not in (5, 6) or described[0] != "storage":
        raise ForbiddenError("a reference to something that is no storage")
    kind, key, length = described[1], described[2], _plain_number(described[4])
    if not isinstance(kind, _StorageType) or not isinstance(key, str):
        raise PickleError("a storage is described wrongly")
    whole = machine.storages.setdefault(key, Storage(key, kind.dtype, length))
    if (whole.dtype, whole.length) != (kind.dtype, length):
        raise PickleError("a storage is described in two ways")
    machine.stack.append(whole if len(described) == 5 or described[5] is None else _view(whole, described[5]))


def _view(whole: Storage, view: object) -> Storage:
    if not isinstance(view, tuple) or len(view) != 3:
        raise PickleError("a part of a storage is described wrongly")
    start, length = _plain_number(view[1]), _plain_number(view[2])
    if start + length > whole.length:
        raise PickleError("a part of a storage is larger than it")
    return Storage(whole.key, whole.dtype, length, start)


def _text(machine: _Machine) -> None:
    machine.stack.append(machine.bytes(machine.unpack("<I")).decode("utf-8", "surrogatepass"))


def _old_text(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.bytes(machine.unpack(form)).decode("latin-1"))


def _float(machine: _Machine) -> None:
    machine.stack.append(struct.unpack(">d", machine.bytes(8))[0])


def _put(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.memo.__setitem__(machine.unpack(form), machine.stack[-1])


def _get(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[machine.unpack(form)])


def _integer(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.unpack(form))


def _new(make: Callable[[], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make())


def _tuple_of(length: int) -> Callable[[_Machine], None]:
    def push(machine: _Machine) -> None:
        if len(machine.stack) < length:
            raise PickleError("a tuple lacks its items")
        machine.stack[-length:] = [tuple(machine.stack[-length:])]

    return push


# The operations that ``torch.save`` writes (protocol 2, also from Python 2), by their codes in ``pickletools``.
_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"c": _global,
    b"R": _reduce,
    b"\x81": _reduce,  # calls a class to make an object of it
    b"b": _build,
    b"Q": _persistent,
    b"(": lambda machine: machine.marks.append(len(machine.stack)),
    b"0": lambda machine: machine.stack.__delitem__(-1),
    b"}": _new(dict),
    b"]": _new(list),
    b")": _new(tuple),
    b"N": _new(lambda: None),
    b"\x88": _new(lambda: True),
    b"\x89": _new(lambda: False),
    b"J": _integer("<i"),
    b"K": _integer("<B"),
    b"M": _integer("<H"),
    b"\x8a": lambda machine: machine.stack.append(
        int.from_bytes(machine.bytes(machine.unpack("B")), "little", signed=True)
    ),
    b"G": _float,
    b"X": _text,
    b"U": _old_text("<B"),
    b"T": _old_text("<I"),
    b"t": lambda machine: machine.stack.append(tuple(machine.since_mark())),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"a": lambda machine: _append(machine, [machine.stack.pop()]),
    b"e": lambda machine: _append(machine, machine.since_mark()),
    b"s": lambda machine: _set_items(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    b"u": lambda machine: _set_items(machine, machine.since_mark()),
    b"q": _put("<B"),
    b"r": _put("<I"),
    b"h": _get("<B"),
    b"j": _get("<I"),
}
