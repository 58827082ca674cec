"""Which images an epoch shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_examples import tiny_candidate, tiny_dataset, tiny_targets

from nas.core.errors import ConfigError
from nas.train.curriculum import admitted_share, distances, easy_ranks, images_of_epoch
from nas.train.evaluate import predict_logits
from nas.train.settings import DistillSettings
from nas.train.trainer import new_student, train_student

COUNT = 40
RANKS = np.arange(COUNT) / (COUNT - 1)
NONE = np.zeros(COUNT, dtype=np.float32)


def shown(settings: DistillSettings, epoch: int, distance: np.ndarray = NONE, seed: int = 0) -> np.ndarray:
    return images_of_epoch(settings, epoch, RANKS, distance, np.random.default_rng(seed))


def test_a_curriculum_begins_with_easy_images_and_ends_with_all() -> None:
    settings = DistillSettings(epochs=10, curriculum=0.5, curriculum_start=0.2)
    assert [round(admitted_share(settings, e), 2) for e in range(7)] == [0.2, 0.36, 0.52, 0.68, 0.84, 1.0, 1.0]
    for epoch in range(10):
        images = shown(settings, epoch)
        assert len(images) == COUNT
        assert RANKS[images].max() <= admitted_share(settings, epoch)
        counts = np.bincount(images)[: RANKS.searchsorted(admitted_share(settings, epoch), side="right")]
        assert counts.max() - counts.min() <= 1  # all that are admitted, evenly
    assert sorted(shown(settings, 9)) == list(range(COUNT))


def test_easy_is_what_the_teacher_is_sure_of_within_each_class() -> None:
    targets = tiny_targets(tiny_dataset())
    logits = np.zeros_like(targets.logits)
    own = np.linspace(5, 0, len(targets.labels))  # the first images are the easiest
    logits[:, np.arange(len(own)), targets.labels] = own
    ranks = easy_ranks(replace(targets, logits=logits))
    for label in range(10):
        members = np.flatnonzero(targets.labels == label)
        assert (np.diff(ranks[members]) > 0).all()
        assert (ranks[members[0]], ranks[members[-1]]) == (0.0, 1.0)


def test_mining_draws_images_in_proportion_to_their_distance() -> None:
    distance = np.zeros(COUNT, dtype=np.float32)
    distance[[3, 7]] = 0.25, 0.75
    counts = np.bincount(shown(DistillSettings(mining=0.5), 1, distance), minlength=COUNT)
    assert counts.sum() == COUNT
    assert counts[7] - counts[3] in (9, 10, 11)  # 15 and 5 of the 20 that are mined
    assert counts[[i for i in range(COUNT) if i not in (3, 7)]].max() == 1
    assert sorted(shown(DistillSettings(mining=0.5), 0)) == list(range(COUNT))  # nothing is known yet


def test_distance_is_large_where_a_sure_and_right_teacher_is_not_followed() -> None:
    teacher = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.1, 0.0]])
    student = torch.tensor([[0.0, 9.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    found = distances(student, teacher, torch.tensor([0, 0, 0, 0]))
    assert found[0] > 0.99
    assert found[1] < 0.01
    assert found[2] == 0  # the teacher is wrong
    assert 0.4 < found[3] < 0.6  # it is hardly sure


def test_curriculum_and_mining_go_on_as_if_never_stopped(tmp_path: Path) -> None:
    dataset = tiny_dataset()
    targets = tiny_targets(dataset)
    settings = DistillSettings(epochs=4, batch_size=32, recalibration_images=64, curriculum=0.5, mining=0.4)
    logits = []
    for stops, checkpoint in (((4,), None), ((1, 3, 4), tmp_path / "student.ckpt")):
        for stop in stops:
            student = new_student(tiny_candidate(), 0)
            train_student(student, targets, settings, seed=0, stop_epoch=stop, checkpoint=checkpoint)
        logits.append(predict_logits(student, dataset.val.images, dataset.mean, dataset.std))
    assert np.array_equal(*logits)


def test_settings_out_of_range_are_named() -> None:
    for name, value in (("curriculum", 1.5), ("curriculum_start", 0.0), ("mining", -0.1), ("hints", -1.0)):
        with pytest.raises(ConfigError, match=rf"distill\.{name}: must be"):
            DistillSettings(**{name: value})
