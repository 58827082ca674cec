"""Where trainings run, batches that are kept on a GPU, and what is said where none is there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from train_examples import tiny_candidate, tiny_dataset, tiny_targets

from nas.core.errors import ConfigError
from nas.testing import requires_gpu
from nas.train.compute import CPU, check_accelerator, device_of, mixed_precision, training_device
from nas.train.evaluate import normalised, predict_logits
from nas.train.feed import Feed
from nas.train.settings import DistillSettings
from nas.train.trainer import new_student, train_student


def test_without_a_gpu_the_search_is_told_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_accelerator("cpu")
    with pytest.raises(ConfigError, match=r"sees no GPU here.*CUDA_VISIBLE_DEVICES.*--set search.accelerator=cpu"):
        check_accelerator("cuda")
    assert training_device("cuda") == CPU, "a worker without a GPU trains on its processor"


def test_a_gpu_is_used_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device("cpu") == CPU
    assert training_device("cuda").type == "cuda"
    check_accelerator("cuda")


@pytest.mark.parametrize(("capability", "dtype"), [((8, 7), torch.bfloat16), ((7, 5), torch.float32)])
def test_gpus_that_compute_bfloat16_train_in_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capability >= (8, 0))
    with mixed_precision(torch.device("cuda")):
        assert (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32) == dtype


def test_processors_train_in_float32() -> None:
    with mixed_precision(CPU):
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("free_bytes", [0, 10**9])
def test_a_batch_is_the_same_read_from_files_or_kept_on_the_device(free_bytes: int) -> None:
    targets = tiny_targets(tiny_dataset())
    maps = np.random.default_rng(0).normal(size=(2, 96, 1, 4, 4)).astype(np.float16)
    given = Feed(targets, {"attention.a": maps}, CPU, lambda _: free_bytes)
    index = np.array([5, 1, 90])
    for variant in (1, 0, 1):
        batch = given.batch(variant, index)
        sorted_index = [1, 5, 90]
        expected = normalised(targets.images[variant][sorted_index], targets.mean, targets.std)
        assert torch.equal(batch.images, expected)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.logits.numpy(), targets.logits[variant][sorted_index])
        assert np.array_equal(batch.labels.numpy(), targets.labels[sorted_index])
        assert np.array_equal(batch.features["attention.a"].numpy(), maps[variant][sorted_index].astype(np.float32))
    assert (given._kept is not None) == bool(free_bytes)


def test_a_student_trained_on_a_gpu_answers_like_one_trained_on_a_processor() -> None:
    device = requires_gpu("training on a GPU")
    dataset = tiny_dataset()
    targets = tiny_targets(dataset)
    settings = replace(DistillSettings(epochs=3, batch_size=16), lr=3e-3)
    found = []
    for place in (CPU, device):
        student = new_student(tiny_candidate(), 0).to(place)
        history = train_student(student, targets, settings, seed=0)
        assert device_of(student).type == place.type
        logits = predict_logits(student, dataset.train.images, dataset.mean, dataset.std)[-1]
        found.append((history.epochs[-1].loss, float((logits.argmax(1) == dataset.train.labels).mean())))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.1)
    assert found[1][1] == pytest.approx(found[0][1], abs=0.1)
