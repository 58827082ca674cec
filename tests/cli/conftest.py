"""A finished run of the smallest search there is, shared by the tests of the commands that read runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nas.cli.main import run

SPACE = """
name: two-stages-16
source: made for tests
resolution: 16
stem: {channels: 8, kernel_size: 3, stride: 2, activation: relu}
stages:
  - {name: s1, width: 8, depth: 1, stride: 2, kernel_size: 3, expansion: [2, 3], activation: relu}
  - {name: s2, width: 16, depth: 1, stride: 2, kernel_size: 3, expansion: [2, 3], activation: relu}
head: {conv_channels: 0, hidden_channels: 0}
exits: {after: [s1], max_count: 1, thresholds: [0.5, 0.8]}
precision: {choices: [fp32], per: network}
"""

EXPERIMENT = """
space: space.yaml
budget: {ms: 5}
data: {train_images: 120, val_images: 60, test_images: 60}
teacher: {epochs: 1, widths: [8, 16], blocks: 1, threads: 1}
distill: {epochs: 1, variants: 1, batch_size: 40, recalibration_images: 40}
search: {trials: 3, rounds: 1, batch: 3, workers: 1}
supernet: {steps: 3}
feedback: {first_networks: 0, networks_per_round: 0}
finish: {students: 1, calibration_images: 64}
"""


def write_experiment(folder: Path) -> Path:
    """An experiment and its space in a folder; the file."""
    (folder / "space.yaml").write_text(SPACE, encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@pytest.fixture
def tiny_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own with `tiny.yaml` and its space."""
    monkeypatch.chdir(tmp_path)
    return write_experiment(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `nas search tiny.yaml` was run; the run lies in runs/tiny."""
    folder = tmp_path_factory.mktemp("search") / "ñ 目录"
    folder.mkdir()
    write_experiment(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert run(["search", "tiny.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder
