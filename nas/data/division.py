"""Dividing images into parts class by class, so that copies of one image never land on both sides.

An image's side depends on its content and the seed only, through a hash: adding, renaming or reordering files leaves
nearly all other images where they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.data.records import DataSettings

Indices = NDArray[np.int64]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


def divide(labels: Indices, digests: Sequence[str], seed: int, shares: Sequence[float]) -> list[Indices]:
    """Indices of the images that stay and of one part per share, each in ascending order.

    Every part gets its share of every class, rounded, at least one image where the class has enough: the first image
    stays, the second goes to the first part, and so on. Images with equal digests count as one.

    Args:
        labels: [N] class of each image; a copy under another label follows the first one.
        digests: N content hashes.
        seed: another seed gives another division.
        shares: share of each part, from 0 to 1 in sum.
    """
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    by_class: dict[int, list[str]] = {}
    for digest, members in groups.items():
        by_class.setdefault(int(labels[members[0]]), []).append(digest)

    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for own in by_class.values():
        own.sort(key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        left = len(own) - 1  # one stays
        start = 0
        for part, share in enumerate(shares, start=1):
            count = min(left, max(1, round(share * len(own))))
            for digest in own[start : start + count]:
                parts[part].extend(groups[digest])
            start += count
            left -= count
        for digest in own[start:]:
            parts[0].extend(groups[digest])
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def complete(
    parts: Mapping[Part, Indices],
    labels: Indices,
    digests: Sequence[str],
    settings: DataSettings,
    warnings: list[str],
) -> dict[Part, Indices]:
    """Train, search validation and test from whatever a set brings; what was done goes to `warnings`.

    All three given: as they are. Train and val: val becomes the test split, which is what published figures of such
    sets are measured on. Train and one other: search validation is `settings.val_share` of train. Train only: test and
    search validation both are.

    Args:
        parts: indices of the images of each split; empty where the set brings none.
        labels: [N] class of each image.
        digests: N content hashes.
        settings: `val_share` and `seed`.
        warnings: receives one sentence when anything had to be divided.
    """
    train, val, test = parts["train"], parts["val"], parts["test"]
    if len(val) and len(test):
        return {"train": train, "val": val, "test": test}
    share, own = settings.val_share, [digests[i] for i in train]
    if len(val) or len(test):
        given = "The given val split is used as the test split; the" if len(val) else "The"
        stay, picked = (train[part] for part in divide(labels[train], own, settings.seed, (share,)))
        result: dict[Part, Indices] = {"train": stay, "val": picked, "test": val if len(val) else test}
        text = f"{given} search-validation split is taken from train"
    else:
        stay, test, picked = (train[part] for part in divide(labels[train], own, settings.seed, (share, share)))
        result = {"train": stay, "val": picked, "test": test}
        text = "The set is not divided; test and search validation are taken"
    counts = f"{len(stay)} train, {len(picked)} search validation, {len(result['test'])} test images"
    warnings.append(f"{text} class by class (seed {settings.seed}): {counts}.")
    return result
