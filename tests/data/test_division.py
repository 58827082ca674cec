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


def test_in_order_the_last_names_of_each_class_are_the_parts() -> None:
    names = [f"train/{c}/{c}_{n}.png" for c in ("a", "b") for n in range(1, 13)]
    at_random = np.random.default_rng(0).permutation(24)
    names = [names[i] for i in at_random]
    labels = np.array([n.startswith("train/b") for n in names], dtype=np.int64)
    stay, last, before = divide(labels, [f"{i:04d}" for i in at_random], 0, (0.25, 0.25), names)
    numbers = [sorted(int(names[i].rpartition("_")[2][:-4]) for i in part) for part in (stay, last, before)]
    assert numbers == [sorted([*range(1, 7)] * 2), [10, 10, 11, 11, 12, 12], [7, 7, 8, 8, 9, 9]]


def test_in_order_copies_go_with_the_last_of_them() -> None:
    names = ["x1", "x2", "x9", "x10", "x11"]
    stay, part = divide(np.zeros(5, dtype=np.int64), ["copy", "b", "c", "d", "copy"], 0, (0.25,), names)
    assert stay.tolist() == [1, 2, 3]
    assert part.tolist() == [0, 4]
