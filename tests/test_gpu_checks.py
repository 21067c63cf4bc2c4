"""The checks for a card (tests/gpu), at tiny width: on the CPU, on the stand-in device; no line of them is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_delta.adapters import attach
from lib_delta.adapters.algorithms.lora import Lora
from lib_delta.models.unet import UNet
from tests.gpu import check, checks
from tests.support.adapters import config
from tests.support.stand_in_device import DEVICE, stand_in_device

GPU = Path(check.__file__).parent


@pytest.fixture
def transfers() -> Iterator[Counter[str]]:
    with stand_in_device() as transfers:
        yield transfers


@pytest.fixture
def bench(transfers: Counter[str]) -> checks.Bench:
    return checks.Bench(DEVICE, config(), 8, lambda: 0, config(), (8,))


def on_the_cpu() -> checks.Bench:
    return checks.Bench(torch.device("cpu"), config(), 8, lambda: None, config(), (8,), ((112, 112),))


@contextmanager
def short(share: float) -> Iterator[None]:
    """Have the UNet run out of memory for both branches, or for anything."""
    original = UNet.forward

    def forward(unet: UNet, *given: Any) -> torch.Tensor:
        output = original(unet, *given)
        if share == 0 or len(output) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return output

    UNet.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        UNet.forward = original  # type: ignore[method-assign]


def test_all_checks_pass_on_the_stand_in(bench: checks.Bench, transfers: Counter[str]) -> None:
    @contextmanager
    def watched() -> Iterator[Sequence[str]]:
        found: list[str] = []
        before = transfers["from the device"]
        yield found
        found += ["a transfer"] * (transfers["from the device"] - before)

    lines = [*checks.ambient(bench), *checks.shortage(bench, short), *checks.swaps(bench, 6)]
    lines += [*checks.placements(bench), *checks.numbers(bench), *checks.hosts_settings(bench)]
    lines += checks.synchronisation(bench, watched)
    assert len(lines) > 10 and not [line for line in lines if line.good is False]


def test_all_checks_pass_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers a generation runs")
    report = check.Report(tmp_path / "told.md")
    found = checks.checks_for(on_the_cpu())
    check.run(report, on_the_cpu(), found, time.monotonic() + 600)
    told = (tmp_path / "told.md").read_text(encoding="utf-8")
    assert report.wrong == report.left_out == 0, told
    assert "a generation on cpu | 0.0e+00" in told and "a shortage" in told and "a forked pass at 8x8" in told


def test_a_merge_that_obeys_autocast_is_found(bench: checks.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    original = attach._merge

    def rounded(*given: Any, **named: Any) -> Any:
        weight, bias = original(*given, **named)
        return weight.bfloat16().to(weight.dtype), bias

    def merge(*given: Any, **named: Any) -> Any:
        return (rounded if torch.is_autocast_cpu_enabled() else original)(*given, **named)

    monkeypatch.setattr(attach, "_merge", merge)
    monkeypatch.setattr(attach, "without_autocast", lambda _device: torch.enable_grad())
    assert [line.good for line in checks.ambient(bench)] == [True, False]


def test_products_that_a_device_loses_are_found(bench: checks.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: Lora, total: torch.Tensor, *given: Any) -> torch.Tensor:
        both = torch.stack((total, total))
        both[1].flatten().view(-1, 1).addmm_(total.reshape(-1, 1), torch.ones(1, 1).to(total.device))
        return both[1]

    monkeypatch.setattr(Lora, "plus_bypass", lost)
    good = {line.what.split()[0]: line.good for line in checks.numbers(bench)}
    assert good["merged"] and not good["bypass"]


def test_what_grows_from_swap_to_swap_is_found(bench: checks.Bench) -> None:
    used = iter(range(0, 2**40, 2**20))
    growing = replace(bench, used=lambda: next(used))
    assert [line.good for line in checks.swaps(growing, 6)] == [False]


# No line is lost.


def raising(_bench: checks.Bench) -> Iterator[checks.Line]:
    yield checks.Line("merged delta, float16", "2e-2 from fp32", True)
    raise RuntimeError("Current CUDA Device does not support bfloat16.\nMore of it | here")


def fine(_bench: checks.Bench) -> Iterator[checks.Line]:
    yield checks.Line("a check | of two", "3 parts", False)
    yield checks.Line("another", "told", None)


def test_a_check_that_raises_loses_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check.Report(tmp_path / "told.md")
    check.run(report, on_the_cpu(), {"halves": raising, "fine": fine}, time.monotonic() + 60)
    said = (tmp_path / "told.md").read_text(encoding="utf-8")
    assert said == capsys.readouterr().out
    assert said.splitlines()[:4] == [
        "| merged delta, float16 | 2e-2 from fp32 | ok |",
        "| halves | RuntimeError: Current CUDA Device does not support bfloat16. | **not ok** |",
        "| a check \\| of two | 3 parts | **not ok** |",
        "| another | told |  |",
    ]
    assert report.wrong == 2 and "in raising" in said


def test_what_there_is_no_time_for_is_told(tmp_path: Path) -> None:
    report = check.Report(tmp_path / "told.md")
    check.run(report, on_the_cpu(), {"halves": raising, "fine": fine}, time.monotonic() - 1)
    said = (tmp_path / "told.md").read_text(encoding="utf-8").splitlines()
    assert said == [f"| {name} | left out: the time was over |  |" for name in ("halves", "fine")]
    assert report.left_out == 2 and report.wrong == 0


def test_an_extension_that_does_not_start_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "no-such-device", "--out", str(tmp_path / "told.md")]) == 1
    assert "The checks could not start: RuntimeError" in capsys.readouterr().out
    assert "no-such-device" in (tmp_path / "told.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["cp1252", "cp932"])
def test_the_script_runs_by_itself_from_any_folder(encoding: str, tmp_path: Path) -> None:
    """Without pytest, the project's folder or a path of its own, as with a WebUI's Python."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONIOENCODING": encoding, "COMMANDLINE_ARGS": "--ckpt \u6c34\u5f69"}
    command = [sys.executable, str(GPU / "check.py"), "--device", "cpu", "--only", "attention"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    told = (tmp_path / "delta-check.md").read_text(encoding="utf-8")
    assert "--ckpt \u6c34\u5f69" in told and "attention at a head width of 160" in told and "0 not ok" in told
    assert "pytest" not in (GPU / "check.py").read_text() + (GPU / "checks.py").read_text()


def test_the_full_layout_is_that_of_sd_1_5() -> None:
    with torch.device("meta"):
        unet = UNet(checks.SD15)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964
