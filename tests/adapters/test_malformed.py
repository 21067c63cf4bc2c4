"""Files that are damaged, wrong, or made to do harm: each is refused in a sentence, or loads with a report.

They cause no other exception, no hang, and no memory use beyond a small multiple of the file's size.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.adapters.attach import attach, detach
from lib_delta.errors import AdapterError, DeltaError
from lib_delta.models.text import TextConfig, TextEncoder
from lib_delta.models.unet import UNet
from tests.support.adapters import LINEAR, every_algorithm, kohya_name, locon, make_unet

NAME = kohya_name(LINEAR)


@functools.cache
def base() -> UNet:
    return make_unet()


@functools.cache
def tower() -> TextEncoder:
    torch.manual_seed(5)
    made = TextConfig(16, 32, layers=1, positions=8, vocabulary=99, heads=2, activation="quick_gelu")
    return TextEncoder(made, final_norm=True).requires_grad_(False).eval()


def lora(**changes: Tensor | None) -> dict[str, Tensor]:
    """Return one layer's LoRA, with tensors replaced or left out, by their names or by ``down`` and ``up``."""
    tensors = {"down": torch.randn(4, 32), "up": torch.randn(128, 4), "alpha": torch.tensor(2.0), **changes}
    names = {"down": "lora_down.weight", "up": "lora_up.weight"}
    return {f"{NAME}.{names.get(key, key)}": tensor for key, tensor in tensors.items() if tensor is not None}


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pickled(content: object, legacy: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def rezipped(content: bytes, edit: Any, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip file with records changed by ``edit(name, data)`` and correct checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return out.getvalue()


def loaded_or_refused(path: Path) -> AdapterFile | str:
    """Return the adapter, or the error's sentence."""
    try:
        return load_adapter(path, base(), [tower()])
    except DeltaError as error:
        return str(error)


def refused(path: Path, content: bytes | dict[str, Tensor], message: str) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(path, base(), [tower()])
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down": None}, "lora_down.weight is missing"),
        ({"down": torch.zeros(0, 32), "up": torch.zeros(128, 3)}, "ranks of its factors disagree"),
        ({"down": torch.zeros(4, 0)}, "has shape"),
        ({"down": torch.zeros(4)}, "2 or 4 dimensions"),
        ({"down": torch.zeros(4, 32, 1, 1, 1)}, "2 or 4 dimensions"),
        ({"up": torch.zeros(())}, "2 or 4 dimensions"),
        ({"up": torch.zeros(127, 4)}, "has shape .127, 4. where the model's layer needs .128, 4."),
        ({"up": torch.full((128, 4), math.nan)}, "lora_up.weight holds NaN or infinity"),
        ({"up": torch.full((128, 4), math.inf, dtype=torch.float16)}, "lora_up.weight holds NaN or infinity"),
        ({"up": torch.full((128, 4), math.nan).to(torch.float8_e4m3fn)}, "lora_up.weight holds NaN or infinity"),
        ({"alpha": torch.tensor(math.nan)}, "alpha holds NaN"),
        ({"alpha": torch.zeros(0)}, "alpha"),
        ({"alpha": torch.zeros(3)}, "alpha"),
        ({"dora_scale": torch.zeros(7)}, "dora_scale has shape"),
        ({"dora_scale": torch.zeros(0, 0)}, "dora_scale has shape"),
        ({"lokr_w1": torch.zeros(2, 2)}, "not supported, or incomplete"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", lora(**changes), message)


def test_a_rank_of_0_adds_nothing(tmp_path: Path) -> None:
    save_file(lora(down=torch.zeros(0, 32), up=torch.zeros(128, 0)), tmp_path / "x.safetensors")
    adapter = load_adapter(tmp_path / "x.safetensors", base())
    layer = base().get_submodule(LINEAR)
    assert adapter.ranks() == (0,)
    assert not adapter.unet[LINEAR].merged_difference(layer.weight).any()


def test_a_layer_that_two_dialects_name_is_told(tmp_path: Path) -> None:
    dotted = {
        "unet.time_embedding.linear_1.lora_A.weight": torch.zeros(4, 32),
        "unet.time_embedding.linear_1.lora_B.weight": torch.zeros(128, 4),
    }
    refused(tmp_path / "x.safetensors", {**lora(), **dotted}, "names the layer time_embed.0 twice")
    same = {f"{NAME.replace('lora_unet', 'lycoris_unet')}.lora_up.weight": torch.zeros(128, 4)}
    refused(tmp_path / "x.safetensors", {**lora(), **same}, "holds lora_up.weight of lora_unet_time_embed_0 twice")


def test_a_key_that_stands_twice_in_a_header_does_no_harm(tmp_path: Path) -> None:
    header, data = header_of(save(lora()))
    first = next(key for key in header if key != "__metadata__")
    entry = f'{{"{first}": {json.dumps(header[first])}, '.encode()
    (tmp_path / "x.safetensors").write_bytes(with_header(entry + json.dumps(header).encode()[1:], data))
    outcome = loaded_or_refused(tmp_path / "x.safetensors")
    assert "x.safetensors" in (outcome if isinstance(outcome, str) else outcome.report())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "old.pt"])
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    content = save(lora()) if suffix == "safetensors" else pickled(lora(), legacy=suffix == "old.pt")
    refused(tmp_path / f"x.{suffix}", content[: int(share * len(content))], "x")


@pytest.mark.parametrize("length", [0, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_headers_that_claim_to_be_larger_than_the_file(length: int, tmp_path: Path) -> None:
    content = save(lora())
    refused(tmp_path / "x.safetensors", struct.pack("<Q", length) + content[8:], "x.safetensors")


@pytest.mark.parametrize(
    "shape", [[2**40, 2**40], [2**62, 4], [2**64, 1], [-1, 32], [1e3, 1.5], ["4", 32], None, [[4]]]
)
def test_headers_that_claim_other_shapes(shape: Any, tmp_path: Path) -> None:
    header, data = header_of(save(lora()))
    header[f"{NAME}.lora_down.weight"]["shape"] = shape
    refused(tmp_path / "x.safetensors", with_header(header, data), "truncated or damaged")


def test_views_that_are_not_contiguous_are_read_as_they_show(tmp_path: Path) -> None:
    up, down = torch.randn(4, 128).T, torch.randn(64, 64)[::16, 1::2]
    torch.save(lora(up=up, down=down), tmp_path / "x.pt")
    adapter = load_adapter(tmp_path / "x.pt", base())
    layer = base().get_submodule(LINEAR)
    expected = 0.5 * up @ down
    torch.testing.assert_close(adapter.unet[LINEAR].merged_difference(layer.weight), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool], ids=str)
def test_factors_that_are_whole_numbers_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whole numbers are quantised with an unknown scale; only alpha may be one."""
    refused(tmp_path / "x.safetensors", lora(up=torch.ones(128, 4).to(dtype)), f"lora_up.weight is stored as {dtype}")
    bundled = {**lora(), "bundle_emb.word.emb_params": torch.ones(2, 24).to(dtype)}
    refused(tmp_path / "x.safetensors", bundled, f"contains an embedding .* and type {dtype}")
    save_file(lora(alpha=torch.tensor(2)), tmp_path / "x.safetensors")
    assert load_adapter(tmp_path / "x.safetensors", base()).unet[LINEAR].scale == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "up",
    [
        torch.zeros(1, 1).expand(2**20, 2**20),
        torch.zeros(128, 1).expand(128, 2**30),
        torch.zeros(4).as_strided((128, 4), (0, 1)),
    ],
    ids=["one number", "columns", "rows"],
)
def test_views_that_repeat_what_they_hold_are_refused(up: Tensor, tmp_path: Path) -> None:
    torch.save(lora(up=up), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", (tmp_path / "x.pt").read_bytes(), "larger than its storage")


@pytest.mark.filterwarnings("ignore:.*(beta|deprecated|quantiz|quantis)")
def test_tensors_that_are_not_stored_number_by_number_are_refused(tmp_path: Path) -> None:
    dense = torch.ones(128, 4)
    for tensor in (dense.to_sparse(), dense.to_sparse_csr(), torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)):
        refused(tmp_path / "x.pt", pickled(lora(up=tensor)), "x.pt")
    refused(tmp_path / "x.pt", pickled(lora(up=torch.ones(128, 4, device="meta"))), "x.pt")


def test_data_that_is_shorter_than_its_tensor_claims_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    """PyTorch 2.1 makes a storage as long as the pickle says, over a record of any length."""
    content = pickled(lora())
    assert any(b"M\x00\x02" in zipfile.ZipFile(io.BytesIO(content)).read(n) for n in ("archive/data.pkl",))

    def longer(name: str, data: bytes) -> bytes:
        return data.replace(b"M\x00\x02", b"M\xff\xff") if name.endswith("data.pkl") else data

    refused(tmp_path / "x.pt", rezipped(content, longer), "x.pt")


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    bomb = pickled(lora(up=torch.zeros(128, 4), more=torch.zeros(2**20)))
    refused(tmp_path / "x.pt", rezipped(bomb, lambda _, data: data, zipfile.ZIP_DEFLATED), "compressed archive")


class Code:
    """The content of a hostile pickle: a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(legacy: bool, tmp_path: Path) -> None:
    for code in (Code(Path.touch, tmp_path / "ran"), Code(eval, "1 + 1"), Code(print, "ran"), Code(bytearray, 2**40)):
        tensors: dict[str, Any] = {**lora(), "more": code}
        refused(tmp_path / "x.pt", pickled(tensors, legacy), "x.pt")
    refused(tmp_path / "x.pt", pickle.dumps(Code(Path.touch, tmp_path / "ran")), "x.pt")
    assert not (tmp_path / "ran").exists()


def test_other_contents_are_told(tmp_path: Path) -> None:
    for content in ([1, 2], torch.ones(3), {}, {"state_dict": {}}, {1: torch.ones(3)}, {"a": "b"}, None, {"model": 3}):
        refused(tmp_path / "x.pt", pickled(content), "x.pt")
    for content_ in (b"", b"\x80", b"PK\x03\x04", b"{" * 100, b"GGUF" + b"\0" * 90, b"<html>" + b" " * 90, b"\0" * 999):
        refused(tmp_path / "x.pt", content_, "x.pt")


# Bombs: small files that could make a reader allocate much memory.

BOMBS = {
    "an expanded tensor": "torch.save({K % 'up': torch.zeros(1, 1).expand(2**17, 2**17), K % 'down': down}, path)",
    "a LoKr of huge factors": (
        "save_file({L % 'w1': torch.zeros(2048, 2048), L % 'w2': torch.zeros(2048, 2048)}, path)"
    ),
    "a LoHa of huge factors": (
        "save_file({H % p: torch.zeros(*((2**18, 1) if p[-1] == 'a' else (1, 2**18)))"
        " for p in ('w1_a', 'w1_b', 'w2_a', 'w2_b')}, path)"
    ),
    "a LoRA of huge factors": "save_file({K % 'up': torch.zeros(2**18, 1), K % 'down': torch.zeros(1, 2**18)}, path)",
    "an OFT of one huge row": "save_file({N + '.oft_R.weight': torch.zeros(1, 2**22)}, path)",
    "a huge IA3": "save_file({N + '.ia3_l': torch.zeros(1, 2**22)}, path)",
    "many blocks of one number": "save_file({N + '.oft_blocks': torch.zeros(2**22, 1, 1)}, path)",
    "a header of a huge tensor": (
        "open(path, 'wb').write((lambda t: len(t).to_bytes(8, 'little') + t)(json.dumps({K % 'up':"
        " {'dtype': 'F32', 'shape': [2**20, 2**20], 'data_offsets': [0, 2**42]}}).encode()))"
    ),
    "an inflating archive": (
        "torch.save({K % 'up': torch.zeros(2**25), K % 'down': down}, 'big.pt'); "
        "old = zipfile.ZipFile('big.pt'); new = zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED); "
        "[new.writestr(n, old.read(n)) for n in old.namelist()]; new.close(); os.remove('big.pt')"
    ),
    "an old file of a huge storage": (
        "b = io.BytesIO(); torch.save({K % 'up': torch.zeros(128, 4)}, b, _use_new_zipfile_serialization=False);"
        " open(path, 'wb').write(b.getvalue().replace((512).to_bytes(2, 'little'), (60000).to_bytes(2, 'little')))"
    ),
}
WRITE = """
import io, json, os, sys, zipfile, torch
from safetensors.torch import save_file
N = "lora_unet_time_embed_0"
K, L, H = N + ".lora_%s.weight", N + ".lokr_%s", N + ".hada_%s"
down = torch.zeros(4, 32)
"""
READ = """
import re, sys, torch
from tests.support.adapters import make_unet
from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.errors import DeltaError
def memory(which):
    return int(re.search(which + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
unet = make_unet()
for path in sys.argv[1:]:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    before = memory("VmRSS")
    try:
        load_adapter(path, unet)
        said = "loaded"
    except DeltaError as error:
        said = str(error)
    print(memory("VmHWM") - before, said, sep="\\t")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has used at most is asked of Linux")
def test_no_file_takes_more_memory_than_a_few_times_its_size(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])}
    paths = [tmp_path / f"{number}.bin" for number in range(len(BOMBS))]
    codes = [f"path = {str(path)!r}\n{code}\n" for path, code in zip(paths, BOMBS.values())]
    settings: dict[str, Any] = {"check": True, "cwd": tmp_path, "env": environment, "timeout": 300}
    subprocess.run([sys.executable, "-c", WRITE + "".join(codes)], **settings)
    command = [sys.executable, "-c", READ, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, **settings)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == len(BOMBS)
    for (grown, said), path, bomb in zip(lines, paths, BOMBS):
        assert said != "loaded", bomb
        assert int(grown) < 4 * path.stat().st_size + 16 * 2**20, (bomb, grown, said)


# Random damage.

CORRUPTIONS = 10_000
SHARES = 10
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool)


@functools.cache
def good_files() -> tuple[dict[str, Tensor], ...]:
    """Return small files of every algorithm, dialect and kind of layer."""
    files = list(every_algorithm().values())
    text = "text_model_encoder_layers_0_mlp_fc1"
    files.append(
        {k.replace(NAME, f"lora_te_{text}"): v for k, v in lora(down=torch.randn(4, 16), up=torch.randn(32, 4)).items()}
    )
    files.append({**lora(), "bundle_emb.word.string_to_param.*": torch.randn(2, 16)})
    files.append(
        {
            "unet.time_embedding.linear_1.lora_A.weight": torch.randn(2, 32),
            "unet.time_embedding.linear_1.lora_B.weight": torch.randn(128, 2),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": torch.randn(2, 16),
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": torch.randn(32, 2),
        }
    )
    files.append(locon(base(), ["input_blocks.1.1.transformer_blocks.0.attn2.to_k", "out.2"], tucker=True))
    return tuple({key: value.clone() for key, value in file.items()} for file in files)


def written(tensors: dict[str, Tensor], form: str) -> bytes:
    """Return a file with the tensors in one of the three formats."""
    return save(tensors) if form == "safetensors" else pickled(tensors, form == "legacy")


@functools.cache
def good_content(number: int, form: str) -> bytes:
    """Return a good file's bytes."""
    return written(good_files()[number], form)


def edited(tensors: dict[str, Tensor], random: Random) -> dict[str, Tensor]:
    """Change one or two tensors of a file: shape, type, numbers, name."""
    tensors = dict(tensors)
    for _ in range(random.randint(1, 2)):
        key = random.choice(list(tensors))
        tensor = tensors[key]
        change = random.randrange(10)
        if change == 0:
            if len(tensors) > 1:
                del tensors[key]
        elif change == 1:
            tensors[key] = tensor.flatten()
        elif change == 2:
            tensors[key] = tensor[..., None] if random.random() < 0.5 else tensor[None]
        elif change == 3:
            tensors[key] = torch.zeros(
                [random.choice((0, 1, 2, 3, 4, 8, 32, 128)) for _ in range(random.randint(0, 5))]
            )
        elif change == 4:
            tensors[key] = tensor.to(random.choice(DTYPES))
        elif change == 5:
            tensors[key] = tensor * random.choice((math.nan, math.inf, 1e30, 0.0, -1.0))
        elif change == 6 and tensor.ndim:
            tensors[key] = tensor.transpose(0, -1).contiguous()
        elif change == 7 and tensor.ndim:
            tensors[key] = tensor[: random.randint(0, len(tensor))].clone()
        elif change == 8:
            instead = random.choice(list(tensors))
            tensors[instead] = tensors.pop(key)
        else:
            other = random.choice(list(random.choice(good_files())))
            tensors[other if random.random() < 0.7 else other.replace("lora_unet", "lora_te")] = tensors.pop(key)
    return tensors


def damaged_header(content: bytes, random: Random) -> bytes:
    header, data = header_of(content)
    entry = random.choice([value for key, value in header.items() if key != "__metadata__"])
    values = (0, 1, -1, 2**31, 2**63, 2**70, 1.5, "x", None, [], {}, [0, 2**40], True)
    part = random.choice(("shape", "dtype", "data_offsets"))
    if part == "dtype":
        entry[part] = random.choice(("F16", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "x", 3, None))
    elif entry[part] and random.random() < 0.7:
        at = random.randrange(len(entry[part]))
        entry[part] = [random.choice(values) if i == at else value for i, value in enumerate(entry[part])]
    else:
        entry[part] = random.choice(values)
    return with_header(header, data)


def flipped(content: bytes, random: Random, within: int) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        changed[random.randrange(min(within, len(changed)))] = random.randrange(256)
    return bytes(changed)


def corrupted(random: Random) -> bytes:
    """Return a good file after some damage."""
    number = random.randrange(len(good_files()))
    kind = random.randrange(8)
    tensors = edited(good_files()[number], random) if kind == 0 else {}
    form = random.choice(("safetensors", "safetensors", "zip", "legacy"))
    if kind == 0:
        return written(tensors, form)
    content = good_content(number, form)
    if kind == 1:
        return flipped(content, random, len(content))
    if kind == 2:
        return content[: random.randrange(len(content))]
    if kind == 3:
        start = random.randrange(len(content))
        other = save(random.choice(good_files()))
        chunk = other[: random.randrange(1, len(other))][-random.randrange(1, 400) :]
        return content[:start] + chunk + content[start + random.choice((0, len(chunk))) :]
    if kind == 4:
        start = random.randrange(len(content))
        return content[:start] + content[start + random.randrange(1, 64) :]
    if form == "safetensors":
        length = struct.unpack("<Q", content[:8])[0]
        return damaged_header(content, random) if kind < 7 else flipped(content, random, 8 + length)
    if form == "zip":
        return rezipped(
            content, lambda name, data: flipped(data, random, len(data)) if name.endswith("data.pkl") else data
        )
    return flipped(content, random, 1500)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", range(SHARES))
def test_random_damage_is_refused_in_a_sentence_or_loads_with_a_report(share: int, tmp_path: Path) -> None:
    random = Random(share)
    path = tmp_path / "x.bin"
    loaded = 0
    for number in range(CORRUPTIONS // SHARES):
        content = corrupted(random)
        path.write_bytes(content)
        try:
            outcome = loaded_or_refused(path)
            if isinstance(outcome, AdapterFile):
                attach(base(), [(outcome, 0.7)], "merged" if number % 2 else "bypass")
                outcome, loaded = outcome.report(), loaded + 1
        except BaseException as error:
            raise AssertionError(f"damage {number} of share {share} gave {error!r}") from error
        assert "x.bin" in outcome and "\n" not in outcome, (number, outcome)
    detach(base())
    assert 50 < loaded < CORRUPTIONS // SHARES - 300
