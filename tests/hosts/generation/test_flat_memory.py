"""A hundred generations with changing LoRAs, weights, forms and prompts leave no memory behind."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.devices import trim_heap
from lib_delta.request.setting_choices import ADAPTER_FORMS
from tests.support.small_files import checkpoint, lora_factors, make_files, write_lora
from tests.support.stand_in_webui import WebUI, running

COUNT, SETTLED = 100, 40


def resident() -> int:
    """Return this process's bytes in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors() -> int:
    """Return the bytes of all live tensors."""
    gc.collect()
    # Other kinds (a stand-in device's, left by other tests of this process) have no memory of their own.
    plain = (torch.Tensor, torch.nn.Parameter)
    alive = [t for t in gc.get_objects() if type(t) in plain and t.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def generate(webui: WebUI, number: int) -> None:
    webui.shared.opts.delta_sampling_form = ADAPTER_FORMS[number % 3]
    lora = ("ink", "other", "ink:0.5, other:0.3")[number % 5 % 3]
    webui.latents({"base": "base", "loras": lora}, steps=1, prompt=f"a cat on mat {number}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    files = make_files(tmp_path)
    write_lora(lora_factors(checkpoint(), seed=7), files.lora_file("other"))
    with running("a1111", files) as webui:
        levels = []
        tracemalloc.start()
        try:
            for number in range(COUNT):
                generate(webui, number)
                if number + 1 in (SETTLED, COUNT):
                    alive = tensors()
                    trim_heap()
                    levels.append((tracemalloc.get_traced_memory()[0], alive, resident()))
        finally:
            tracemalloc.stop()
    (python, alive, in_memory), (python_after, alive_after, in_memory_after) = levels
    assert python_after - python < 400_000
    assert alive_after - alive < 200_000
    assert in_memory_after - in_memory < 8 * 2**20
