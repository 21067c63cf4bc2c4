"""A compiled UNet computes the same; one that cannot be compiled too, and the reason is reported once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo

from lib_delta.adapters.attach import attach
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.errors import SettingError
from lib_delta.runtime.compiling import Compiled, compile_unet
from tests.support.counting import EPS, SIGMA, TOLD, X, lora
from tests.support.tiny_unet import tiny_unet

pytestmark = pytest.mark.skipif(not hasattr(torch, "compile"), reason="this torch does not compile")


def broken(_graph: Any, _inputs: Any) -> Any:
    raise RuntimeError("no C++ compiler\nand more lines")


def test_what_is_compiled_gives_what_it_gave() -> None:
    told: list[str] = []
    function = Compiled(lambda x: (x * 2).sin(), told.append, "eager")
    x = torch.linspace(0, 1, 5)
    assert torch.equal(function(x), (x * 2).sin()) and told == []


# Other imported packages make torch fall back by itself, with pages in the log.
@torch._dynamo.config.patch(suppress_errors=False)
def test_a_unet_that_cannot_be_compiled_runs_as_it_is() -> None:
    unet = tiny_unet()
    attach(unet, [(lora(unet), 1.0)], "bypass")
    wanted = Source(unet, EPS, TOLD).delta(SourceStep(X, SIGMA, 3.0))
    told: list[str] = []
    compile_unet(unet, True, told.append, broken)
    compile_unet(unet, True, told.append, broken)
    for _ in range(2):
        assert torch.equal(Source(unet, EPS, TOLD).delta(SourceStep(X, SIGMA, 3.0)), wanted)
    assert len(told) == 1 and "could not be compiled" in told[0] and "more lines" not in told[0]
    compile_unet(unet, False, told.append)
    assert "forward" not in vars(unet)


@pytest.mark.parametrize("error", [MemoryError(), SettingError("not so")])
def test_faults_of_the_function_itself_are_not_the_compilers(error: Exception) -> None:
    def failing(_x: object) -> None:
        raise error

    told: list[str] = []
    function = Compiled(failing, told.append, "eager")
    function._compiled = failing
    with pytest.raises(type(error)):
        function(0)
    assert told == [] and function._compiled is failing
