"""The tables that compare algorithms: one scale for all, and errors that are those of the choice of prompts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.support.tiny_unet import randn

pytest.importorskip("k_diffusion")
pytest.importorskip("diffusers")

from demo import algorithms
from demo.metrics import Scores
from demo.pipeline import Settings
from demo.studio import Result, Task, Workers
from run import ONE_THREAD

PROMPTS = tuple(f"emoji {i}" for i in range(50))


class MadeUp:
    """Workers whose scores are made up: by prompt, and shifted for each kind of task and each file."""

    def run(self, tasks: dict[str, Task]) -> dict[str, Result]:
        return {key: self.result(task) for key, task in tasks.items()}

    def result(self, task: Task) -> Result:
        known = {"target": 0.1, "adapted": 0.9, "delta": 0.1 + 0.4 * task.strength.value}[task.kind]
        shift = 0.05 if "loha" in task.adapters[0] and task.kind != "target" else 0.0
        style = known + shift + 0.01 * randn(len(task.prompts), seed=1)
        near = 0.5 + 0.1 * randn(len(task.prompts), seed=int(10 * known)).double()
        rows = [Scores(float(s), float(s), 0.0, float(n), float(n)) for s, n in zip(style, near)]
        return Result(rows[0], tuple(rows), torch.zeros(0))


@pytest.fixture
def measured(tmp_path: Path) -> dict[str, Any]:
    for name in ("LoRA", "LoHa", "OFT"):
        (tmp_path / algorithms.FILES[name]).touch()
    return algorithms.measure(cast(Workers, MadeUp()), tmp_path, PROMPTS, (0, 1), Settings())


def test_the_files_that_are_there_are_measured_at_every_lambda(measured: dict[str, Any]) -> None:
    assert measured.pop("cases") == 100
    assert measured.keys() == {"lambda 1", "lambda 1.5"}
    assert all(list(rows) == ["LoRA", "LoHa", "OFT"] for rows in measured.values())


def test_style_is_the_share_of_the_way_to_what_the_lora_draws_alone(measured: dict[str, Any]) -> None:
    assert measured["lambda 1"]["LoRA"]["style_share"] == pytest.approx(0.5, abs=1e-3)
    assert measured["lambda 1.5"]["LoHa"]["style_share"] == pytest.approx(0.6 / 0.8 + 0.05 / 0.8, abs=1e-3)
    assert measured["lambda 1"]["LoHa"]["style_difference"] == pytest.approx(0.05 / 0.8, abs=1e-3)


def test_files_that_draw_alike_do_not_differ_and_what_varies_has_the_standard_error_of_its_mean(
    measured: dict[str, Any],
) -> None:
    row = measured["lambda 1"]["OFT"]
    assert (row["style_difference"], row["style_difference_error"]) == (0, 0)
    spread = float(0.1 * randn(len(PROMPTS), seed=5).std())
    assert row["diversity_error"] == pytest.approx(spread / len(PROMPTS) ** 0.5, rel=0.1)


def test_of_a_target_that_shows_no_emoji_no_share_is_kept(measured: dict[str, Any]) -> None:
    row = measured["lambda 1"]["LoRA"]
    assert (row["content_ratio"], row["content_ratio_error"]) == (None, None)
    assert "| - |" in algorithms.table(measured["lambda 1"], "lambda 1")


def test_workers_are_told_to_have_one_thread_before_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ONE_THREAD:
        monkeypatch.delenv(name)
    Workers(tmp_path, 1).close()
    assert ONE_THREAD.items() <= os.environ.items()
