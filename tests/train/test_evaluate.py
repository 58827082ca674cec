from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from train_examples import tiny_candidate, tiny_dataset

from nas.train.evaluate import normalised, predict_logits, recalibrate_bn, threads, top1
from nas.train.trainer import new_student

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_normalised_gives_channels_last_input_and_leaves_the_images_alone() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    images.setflags(write=False)  # as a mapped file is
    x = normalised(images, MEAN, STD)
    expected = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    assert x.shape == (3, 3, 8, 8)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


def test_logits_do_not_depend_on_the_batch_and_training_mode_stays() -> None:
    images = tiny_dataset().val.images
    student = new_student(tiny_candidate(), 0).train()
    whole = predict_logits(student, images, MEAN, STD, batch_size=64)
    parts = predict_logits(student, images, MEAN, STD, batch_size=7)
    assert whole.shape == (2, 40, 10)
    assert whole.dtype == np.float32
    assert np.allclose(whole, parts, atol=1e-5)
    assert student.training


def test_recalibration_gives_the_statistics_of_the_images() -> None:
    images = tiny_dataset().train.images
    student = new_student(tiny_candidate(), 0).eval()
    recalibrate_bn(student, images, MEAN, STD, batch_size=len(images))
    x = student.body["stem"].conv.conv(normalised(images, MEAN, STD))
    norm = student.body["stem"].conv.bn
    assert torch.allclose(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, x.var((0, 2, 3)), rtol=1e-4)
    assert norm.momentum == pytest.approx(0.01)
    assert not student.training


def test_recalibration_of_images_that_lie_class_by_class_sees_what_classes_differ_by() -> None:
    """Batches of one class each would find the variance inside classes only."""
    shades = np.repeat(np.arange(8, dtype=np.uint8) * 30, 16)
    images = np.broadcast_to(shades[:, None, None, None], (128, 16, 16, 3)).copy()
    whole, parts = new_student(tiny_candidate(), 0), new_student(tiny_candidate(), 0)
    recalibrate_bn(whole, images, MEAN, STD, batch_size=128)
    recalibrate_bn(parts, images, MEAN, STD, batch_size=16)
    expected, found = (s.body["stem"].conv.bn.running_var for s in (whole, parts))
    assert torch.allclose(found, expected, rtol=0.1)


def test_every_image_counts_in_recalibration() -> None:
    images = tiny_dataset().train.images
    one, other = new_student(tiny_candidate(), 0), new_student(tiny_candidate(), 0)
    recalibrate_bn(one, images[:33], MEAN, STD, batch_size=32)
    recalibrate_bn(other, images[:33], MEAN, STD, batch_size=33)
    assert torch.equal(one.body["stem"].conv.bn.running_var, other.body["stem"].conv.bn.running_var)


def test_recalibration_of_a_network_without_batch_norm_does_nothing() -> None:
    recalibrate_bn(nn.Linear(2, 2), np.zeros((4, 8, 8, 3), np.uint8), MEAN, STD)


def test_the_thread_count_is_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_top1_is_the_share_of_right_answers() -> None:
    assert top1(np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
