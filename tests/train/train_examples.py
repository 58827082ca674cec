"""Tiny real objects that the tests of training share: a data set of ten classes, a small student, made-up targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nas.core.records import BlockConfig, Candidate, ExitConfig, HeadConfig, StageConfig, StemConfig
from nas.data import Dataset, DataSettings, load_dataset
from nas.train.targets import Targets

CLASSES = 10


def tiny_dataset(train: int = 96, val: int = 40, test: int = 40, resolution: int = 16) -> Dataset:
    """The embedded set in a few images."""
    return load_dataset(DataSettings(train_images=train, val_images=val, test_images=test), resolution)


def tiny_candidate(resolution: int = 16, exits: int = 1, classes: int = CLASSES) -> Candidate:
    """Two stages; squeeze-and-excitation and a skip connection in the second."""
    first = BlockConfig(8, 16, 8, stride=2)
    second = BlockConfig(8, 24, 16, stride=2, use_se=True, activation="hard_swish")
    third = BlockConfig(16, 32, 16, kernel_size=5, use_se=True, activation="hard_swish")
    return Candidate(
        resolution,
        classes,
        StemConfig(8),
        (StageConfig((first,)), StageConfig((second, third))),
        HeadConfig(),
        (ExitConfig(0),) if exits else (),
    )


def tiny_targets(dataset: Dataset, variants: int = 2, seed: int = 0) -> Targets:
    """Targets in memory: unchanged images, and a teacher that is sure of the label."""
    rng = np.random.default_rng(seed)
    count = len(dataset.train)
    logits = rng.normal(0, 0.5, (variants, count, len(dataset.class_names))).astype(np.float32)
    logits[:, np.arange(count), dataset.train.labels] += 5.0
    images = np.stack([dataset.train.images] * variants)
    return Targets(
        f"made-up-{variants}-{seed}",
        images,
        logits,
        dataset.train.labels,
        dataset.mean,
        dataset.std,
        Path("in memory"),
    )
