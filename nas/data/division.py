"""Dividing images into parts class by class, so that copies of one image never land on both sides.

At random, an image's side depends on its content and the seed only, through a hash: adding, renaming or reordering
files leaves nearly all other images where they were. In order, the last ones by name are for validation and test:
frames of a film and pictures of one strip look alike, and at random such neighbours would be on both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.data.records import DataSettings

Indices = NDArray[np.int64]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")


def divide(
    labels: Indices, digests: Sequence[str], seed: int, shares: Sequence[float], names: Sequence[str] | None = None
) -> list[Indices]:
    """Indices of the images that stay and of one part per share, each in ascending order.

    Every part gets its share of every class, rounded, at least one image where the class has enough: the first image
    stays, the second goes to the first part, and so on. Images with equal digests count as one.

    Args:
        labels: [N] class of each image; a copy under another label follows the first one.
        digests: N content hashes.
        seed: another seed gives another division.
        shares: share of each part, from 0 to 1 in sum.
        names: N names, by whose order the images are divided: the last ones go to the first part, those before to the
            next. A number in a name counts as one: `b_10` follows `b_9`. None: at random.
    """
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    by_class: dict[int, list[str]] = {}
    for digest, members in groups.items():
        by_class.setdefault(int(labels[members[0]]), []).append(digest)

    parts: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for own in by_class.values():
        if names is None:
            own.sort(key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
        else:
            last = {digest: max(_in_order(names[i]) for i in groups[digest]) for digest in own}
            own.sort(key=last.__getitem__, reverse=True)
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


def _in_order(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts names as people do: what is between numbers by its letters, numbers by their value."""
    return tuple((text, int(number or -1)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name))


def complete(
    parts: Mapping[Part, Indices],
    labels: Indices,
    digests: Sequence[str],
    names: Sequence[str],
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
        names: N names.
        settings: `val_share`, `division` and `seed`.
        warnings: receives one sentence when anything had to be divided.
    """
    train, val, test = parts["train"], parts["val"], parts["test"]
    if len(val) and len(test):
        return {"train": train, "val": val, "test": test}
    share, own = settings.val_share, [digests[i] for i in train]
    in_order = [names[i] for i in train] if settings.division == "order" else None
    if len(val) or len(test):
        given = "The given val split is used as the test split; the" if len(val) else "The"
        stay, picked = (train[part] for part in divide(labels[train], own, settings.seed, (share,), in_order))
        result: dict[Part, Indices] = {"train": stay, "val": picked, "test": val if len(val) else test}
        text = f"{given} search-validation split is taken from train"
    else:
        divided = divide(labels[train], own, settings.seed, (share, share), in_order)
        stay, test, picked = (train[part] for part in divided)
        result = {"train": stay, "val": picked, "test": test}
        text = "The set is not divided; test and search validation are taken"
    counts = f"{len(stay)} train, {len(picked)} search validation, {len(result['test'])} test images"
    how = f"seed {settings.seed}" if in_order is None else "the last ones by name"
    warnings.append(f"{text} class by class ({how}): {counts}.")
    return result
