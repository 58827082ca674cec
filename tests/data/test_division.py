"""Dividing images class by class."""

import numpy as np

from nas.data.division import divide


def _digests(count: int) -> list[str]:
    return [f"{i:04d}" for i in range(count)]


def test_every_image_is_in_one_part_and_shares_hold_per_class() -> None:
    labels = np.repeat([0, 1], [100, 40])
    stay, first, second = divide(labels, _digests(140), 0, (0.2, 0.1))
    assert np.array_equal(np.sort(np.concatenate([stay, first, second])), np.arange(140))
    assert np.bincount(labels[first]).tolist() == [20, 8]
    assert np.bincount(labels[second]).tolist() == [10, 4]


def test_small_classes_serve_train_first_then_the_parts_in_order() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    stay, first, second = divide(labels, _digests(6), 0, (0.15, 0.15))
    assert [np.bincount(labels[part], minlength=3).tolist() for part in (stay, first, second)] == [
        [1, 1, 1],
        [0, 1, 1],
        [0, 0, 1],
    ]


def test_an_added_image_moves_almost_no_other() -> None:
    labels, digests = np.zeros(200, dtype=np.int64), _digests(200)
    before = {digests[i] for i in divide(labels, digests, 0, (0.2,))[1]}
    digests, labels = ["new", *digests], np.zeros(201, dtype=np.int64)
    after = {digests[i] for i in divide(labels, digests, 0, (0.2,))[1]}
    assert len(before ^ after) <= 2


def test_copies_go_together_and_count_as_one() -> None:
    digests = ["same"] * 30 + _digests(10)
    labels = np.zeros(40, dtype=np.int64)
    for seed in range(20):
        stay, part = divide(labels, digests, seed, (0.2,))
        copies = np.intersect1d(part, np.arange(30))
        assert len(copies) in (0, 30)
        assert len(part) - max(len(copies) - 1, 0) == 2
        assert len(stay) + len(part) == 40
