"""No model file runs code: everything except plain weights is refused before a loader of torch reads it."""

import io
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_delta.errors import CheckpointError
from lib_delta.files import unpickle
from lib_delta.files.unpickle import ForbiddenError, PickleError, Unpickler
from lib_delta.files.weight_file import WeightFile


@pytest.fixture(autouse=True)
def no_loader_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every loader of torch fail the test that reaches it."""

    def reached(*_: Any, **__: Any) -> None:
        pytest.fail("a loader of torch's was reached")

    for owner, name in (
        (torch, "load"),
        (torch.serialization, "load"),
        (torch.jit, "load"),
        (torch._C, "import_ir_module"),
        (torch._C, "PyTorchFileReader"),
        (pickle, "load"),
        (pickle, "loads"),
    ):
        monkeypatch.setattr(owner, name, reached)


class Writing(nn.Module):
    """A TorchScript module that writes a file when it is loaded."""

    mark: str

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.weight, self.mark = torch.zeros(3), mark

    @torch.jit.export
    def __getstate__(self):  # type: ignore[no-untyped-def]
        return (self.weight, self.training, self.mark)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool, str]):  # type: ignore[no-untyped-def]
        self.weight = state[0]
        self.training = state[1]
        self.mark = state[2]
        torch.save(torch.ones(2), state[2])

    def forward(self, x):  # type: ignore[no-untyped-def]
        return x + self.weight


class Method(nn.Module):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x + 1


def torchscript(path: Path, mark: Path) -> None:
    torch.jit.save(torch.jit.script(Method()), str(path))


def torchscript_with_a_state(path: Path, mark: Path) -> None:
    torch.jit.save(torch.jit.script(Writing(str(mark))), str(path))


def package(path: Path, mark: Path) -> None:
    from torch.package import PackageExporter

    with PackageExporter(str(path)) as exporter:
        exporter.save_source_string("code", "print(1)")
        exporter.save_pickle("model", "model.pkl", {"w": torch.ones(2)})


def exported(path: Path, mark: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), str(path))


PROGRAMS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "TorchScript": (torchscript, "TorchScript"),
    "TorchScript with __setstate__": (torchscript_with_a_state, "TorchScript"),
    "torch.package": (package, "package"),
    "torch.export": (exported, "exported"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stored", [False, True], ids=["as written", "uncompressed"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_refused_under_any_name(program: str, stored: bool, tmp_path: Path) -> None:
    write, named = PROGRAMS[program]
    mark, path = tmp_path / "mark", tmp_path / "x.pt2"
    try:
        write(path, mark)
    except (AttributeError, RuntimeError) as error:
        if program != "torch.export":
            raise
        pytest.skip(f"this torch does not export here: {error}")
    mark.unlink(missing_ok=True)
    content = path.read_bytes()
    if stored:
        out = io.BytesIO()
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
            for record in old.infolist():
                new.writestr(record.filename, old.read(record.filename))
        content = out.getvalue()
    for name in ("style.safetensors", "style.ckpt", "style.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"^{name} is (.*{named}|a compressed archive)") as raised:
            WeightFile.open(tmp_path / name)
        assert not stored or named in str(raised.value)
    assert not mark.exists()


def archive(*more: tuple[str, bytes], drop: str = "", root: str = "archive", tensors: Any = None) -> bytes:
    """Return a file of torch.save with added or removed records, uncompressed."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.arange(6.0)} if tensors is None else tensors, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for record in old.namelist():
            if record.partition("/")[2] != drop:
                new.writestr(f"{root}/{record.partition('/')[2]}", old.read(record))
        for name, data in more:
            new.writestr(name, data)
    return out.getvalue()


def refusal(content: bytes, tmp_path: Path) -> str:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        WeightFile.open(tmp_path / "x.pt")
    assert str(raised.value).startswith("x.pt ") and "\n" not in str(raised.value) and len(str(raised.value)) < 400
    return str(raised.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("archive/constants.pkl", "TorchScript"),
        ("archive/code/__torch__.py", "TorchScript"),
        ("archive/bytecode.pkl", "TorchScript"),
        ("archive/.data/extern_modules", "package"),
        ("archive/.data/version", "package"),
        ("serialized_exported_program.json", "exported"),
        ("archive/more.py", "contains more than weights"),
        ("archive/data/../../x", "contains more than weights"),
        ("archive/data/x", "contains more than weights"),
        ("archive/data.pkl/", "contains more than weights"),
        ("other/data.pkl", "several"),
        ("archive/data.pkl", "two records"),
    ],
)
def test_an_archive_holds_what_torch_save_writes_and_nothing_else(record: str, message: str, tmp_path: Path) -> None:
    assert message in refusal(archive((record, b"x")), tmp_path)


def test_archives_that_readers_could_understand_in_two_ways_are_refused(tmp_path: Path) -> None:
    good = archive()
    assert "two" in refusal(archive(("archive/data/0", bytes(24))), tmp_path)
    assert "damaged" in refusal(good + b"behind", tmp_path)
    assert "damaged" in refusal(good[:-2] + struct.pack("<H", 5) + b"words", tmp_path)
    assert "damaged" in refusal(b"PK\x03\x04" + good, tmp_path)
    # The two headers of a record disagree about its name.
    at = good.index(b"archive/data.pkl")
    assert "damaged" in refusal(good[:at] + b"archive/data.pk_" + good[at + 16 :], tmp_path)
    assert "no data.pkl" in refusal(archive(drop="data.pkl"), tmp_path)


def test_flipped_numbers_are_told_by_the_checksum(tmp_path: Path) -> None:
    good = archive()
    at = good.index(struct.pack("<2f", 1, 2))
    (tmp_path / "x.pt").write_bytes(good[:at] + b"\x01" + good[at + 1 :])
    with WeightFile.open(tmp_path / "x.pt") as file, pytest.raises(CheckpointError, match="checksums"):
        file.tensor("w")


def program(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


def loaded(content: bytes, operations: int = 2**17) -> Any:
    return Unpickler(io.BytesIO(content), operations).load()


HARMFUL = (
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "__builtin__.eval",
    "torch.load",
    "torch.jit.load",
    "torch.jit._script.unpackage_script_module",
    "torch.hub.load",
    "torch.storage._load_from_bytes",
    "torch.serialization.load",
    "torch._utils._import_dotted_name",
    "torch.nn.modules.module.Module",
    "torch.utils.data._utils.collate.default_collate",
    "numpy.load",
    "numpy.core.multiarray._reconstruct",
    "numpy.testing._private.utils.runstring",
    "_codecs.decode",
    "pathlib.PosixPath",
    "functools.partial",
    "operator.attrgetter",
    "importlib.import_module",
    "copyreg._reconstructor",
    "collections.OrderedDict.fromkeys",
    "lib_delta.files.unpickle.Unpickler",
)


@pytest.mark.parametrize("name", HARMFUL)
def test_names_that_are_not_tensors_own_are_refused_and_never_imported(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    was_there = module in sys.modules
    with pytest.raises(ForbiddenError, match=name.replace(".", r"\.")):
        loaded(program(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n", b"X\x01\0\0\0x", b"\x85R"))
    assert (module in sys.modules) is was_there


ARGUMENTS = {
    "none": b")",
    "a command": b"X\x0a\0\0\0touch mark\x85",
    "numbers": b"(K\x01K\x02K\x03K\x04K\x05K\x06K\x07t",
    "nested": b"(]}N\x88))(tt",
    "itself": b"h\0\x85",
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", sorted(unpickle._ALLOWED_NAMES))
def test_every_name_that_is_allowed_makes_plain_data_or_a_sentence_whatever_it_is_called_with(
    name: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, attribute = name.rpartition(".")
    named = b"c" + module.encode() + b"\n" + attribute.encode() + b"\nq\0"
    for call in (b"R", b"\x81"):
        try:
            made = loaded(program(named, ARGUMENTS[arguments], call))
        except PickleError:
            continue
        assert isinstance(made, (str, int, list, dict, tuple, unpickle._Call, unpickle.Ignored)) or made is not None
    assert not list(tmp_path.iterdir())


def test_only_operations_that_torch_save_writes_are_known() -> None:
    refused = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL", "NEWOBJ_EX", "PERSID", "NEXT_BUFFER", "FRAME"}
    assert refused <= {operation.name for operation in pickletools.opcodes}
    for operation in pickletools.opcodes:
        code = operation.code.encode("latin-1")
        if code in unpickle._OPERATIONS or code == b".":
            assert operation.name not in refused
            continue
        with pytest.raises(ForbiddenError):
            loaded(program(code))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(program(b"]" * 2**18), id="many lists"),
        pytest.param(program(b"(" * 2**18), id="many marks"),
        pytest.param(program(b"X\xff\xff\xff\xff"), id="a long text"),
        pytest.param(program(b"K\x01r\xff\xff\xff\xff" * 2**18), id="far memories"),
        pytest.param(program(b"}", b")" + b"\x85" * 100_000, b"K\x01s"), id="a key nested deeply"),
        pytest.param(program(b"(K\x01K\x02", b"\x8a\xff"), id="a cut number"),
        pytest.param(program(b"c" + b"a" * 10_000), id="a name without an end"),
        pytest.param(program(b"h\x05"), id="what is not remembered"),
        pytest.param(program(b"K\x01K\x02a"), id="appending to a number"),
        pytest.param(program(b"K\x01K\x02K\x03s"), id="an item of a number"),
        pytest.param(program(b"K\x01)R"), id="calling a number"),
        pytest.param(program(b"K\x01}b"), id="attributes of a number"),
        pytest.param(program(b"e"), id="no mark"),
        pytest.param(program(b""), id="nothing"),
        pytest.param(b"", id="no program"),
    ],
)
def test_programs_that_make_no_sense_end_in_an_error_of_the_reader(content: bytes) -> None:
    with pytest.raises(PickleError):
        loaded(content)


def test_lists_in_lists_many_times_over_end(tmp_path: Path) -> None:
    laughs: Any = [None] * 5000
    for _ in range(5):
        laughs = [laughs] * 5000
    path = tmp_path / "x.pt"
    torch.save({"a": laughs, "w": torch.ones(2)}, path)
    with WeightFile.open(path) as file:
        assert file.keys == ("w",)


def test_pickles_in_pickles_are_not_opened(tmp_path: Path) -> None:
    """torch pickles a bare storage as the bytes of another file, with a function to load them."""
    inner = pickle.dumps(torch.ones(2).untyped_storage(), protocol=2)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.namelist():
            new.writestr(record, inner if record.endswith("data.pkl") else old.read(record))
    assert "_load_from_bytes" in refusal(out.getvalue(), tmp_path)


# Allowed files read as with torch's loader.


def samples() -> dict[str, Tensor]:
    torch.manual_seed(0)
    types = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    made = {name: (3 * torch.randn(3, 5)).to(getattr(torch, name)) for name in types}
    whole = torch.randn(6, 8)
    return made | {
        "number": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(4, 5).T,
        "part": whole[2:4, ::2],
        "another part": whole[5],
        "alone": torch.randn(100)[10:20],
        "parameter": nn.Parameter(torch.randn(3)),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_reads_as_torch_reads_it(legacy: bool, tmp_path: Path) -> None:
    tensors = samples()
    state = OrderedDict(tensors)
    state._metadata = {"version": 1}  # type: ignore[attr-defined]  # as modules' states have
    torch.save(
        {"state_dict": state, "epoch": 3, "lr": 0.5, "note": "ä", "betas": (0.9, 0.99), "x": None, "shape": (2,)},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    with WeightFile.open(tmp_path / "x.pt") as file:
        assert set(file.keys) == set(tensors)
        for key, tensor in tensors.items():
            assert file.shapes[key] == tuple(tensor.shape)
            assert file.tensor(key).dtype is tensor.dtype and torch.equal(file.tensor(key), tensor.detach())


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_small_floats_read_as_torch_reads_them(name: str, tmp_path: Path) -> None:
    tensor = torch.randn(4, 4).to(getattr(torch, name))
    try:
        torch.save({"w": tensor}, tmp_path / "x.pt")
    except (AttributeError, KeyError) as error:
        pytest.skip(f"this torch does not save it: {error}")
    with WeightFile.open(tmp_path / "x.pt") as file:
        assert torch.equal(file.tensor("w").float(), tensor.float())


def test_what_old_training_runs_left_is_passed_over(tmp_path: Path) -> None:
    """The checkpoints of 2022 contain a callback's class and numpy's numbers next to their weights."""
    plain = io.BytesIO()
    torch.save({"callbacks": "HERE", "state_dict": {"w": torch.ones(2)}}, plain)
    left = (
        b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\0\0\0f8K\0K\x01\x87R(K\x03X\x01\0\0\0<NNNK\xffK\xffK\0tb"
        b"c_codecs\nencode\nX\x01\0\0\0xX\x06\0\0\0latin1\x86R\x86Rs"
    )
    out = io.BytesIO()
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(out, "w") as new:
        for record in old.namelist():
            data = old.read(record)
            start = data.find(b"X\x04\0\0\0HERE")
            new.writestr(record, data if start < 0 else data[:start] + left + data[start + 9 :])
    (tmp_path / "x.ckpt").write_bytes(out.getvalue())
    with WeightFile.open(tmp_path / "x.ckpt") as file:
        assert file.keys == ("w",)
