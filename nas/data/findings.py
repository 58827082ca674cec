"""What a user should know of a set of images before training: copies, leaks between splits, absent classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nas.core.errors import DataError
from nas.data.division import PARTS, Indices, Part

LISTED = 10  # names in a warning; the others are counted


def listed(lines: Iterable[str], most: int = LISTED) -> str:
    """Lines below a sentence, indented; those beyond `most` are counted."""
    every = list(lines)
    rest = [f"... and {len(every) - most} more"] if len(every) > most else []
    return "".join(f"\n  {line}" for line in every[:most] + rest)


def note_copies(
    parts: Mapping[Part, Indices],
    labels: Indices,
    digests: Sequence[str],
    names: Sequence[str],
    warnings: list[str],
) -> None:
    """Warns of identical images with different labels, and of copies inside a split.

    Args:
        parts: indices of the images of each split.
        labels: [N] class of each image.
        digests: N content hashes.
        names: N names for people.
        warnings: receives a sentence for each finding.
    """
    part_of = {int(i): part for part, index in parts.items() for i in index}
    first: dict[str, int] = {}
    conflicts, copies = [], 0
    for i in sorted(part_of):
        other = first.setdefault(digests[i], i)
        if labels[other] != labels[i]:
            conflicts.append(f"{names[other]} = {names[i]}")
        elif other != i and part_of[other] == part_of[i]:
            copies += 1
    if conflicts:
        warnings.append(
            f"{len(conflicts)} identical files carry different labels; one of each pair is wrong:{listed(conflicts)}"
        )
    if copies:
        warnings.append(f"Files that are copies of another file of their class and split: {copies}.")


def without_leaks(
    parts: Mapping[Part, Indices], digests: Sequence[str], names: Sequence[str], warnings: list[str]
) -> dict[Part, Indices]:
    """Indices per split; an image that is also in a later split (train, val, test) is left out of the earlier one.

    Args:
        parts: indices of the images of each split.
        digests: N content hashes.
        names: N names for people.
        warnings: receives a sentence for each pair of splits that share images.

    Raises:
        DataError: most of a later split is also in an earlier one, so it is no test of anything.
    """
    members = {part: [int(i) for i in parts[part]] for part in PARTS}
    for place, late in enumerate(PARTS):
        held = {digests[i]: i for i in members[late]}
        for early in PARTS[:place]:
            leaks = [i for i in members[early] if digests[i] in held]
            if not leaks:
                continue
            shared = len({digests[i] for i in leaks})
            pairs = listed(f"{names[i]} = {names[held[digests[i]]]}" for i in leaks)
            if shared > 0.5 * len(held):
                raise DataError(
                    f"{shared} of {len(held)} images of {late} are also in {early}, so its figures would mean "
                    f"nothing:{pairs}\nDivide the images into separate folders, or keep only {early} to have it divided"
                )
            warnings.append(f"{shared} images of {late} are also in {early} and are left out of {early}:{pairs}")
            gone = set(leaks)
            members[early] = [i for i in members[early] if i not in gone]
    return {part: np.array(indices, dtype=np.int64) for part, indices in members.items()}


def check_presence(
    parts: Mapping[Part, Indices], labels: Indices, class_names: Sequence[str], warnings: list[str]
) -> None:
    """Warns of classes that a split lacks, or has one training image of.

    Raises:
        DataError: a class without a training image, a split without any image.
    """
    counts = {part: Counter(int(label) for label in labels[index]) for part, index in parts.items()}
    absent = [name for label, name in enumerate(class_names) if not counts["train"][label]]
    if absent:
        raise DataError(f"no usable training image is left of: {', '.join(absent)}. Add images or remove the class")
    titles: tuple[tuple[Part, str], ...] = (("val", "search validation"), ("test", "test"))
    for part, title in titles:
        if not len(parts[part]):
            raise DataError(f"no image is left for {title}: every class has too few images. Add images")
        missing = [name for label, name in enumerate(class_names) if not counts[part][label]]
        if missing:
            warnings.append(
                f"The {title} split holds no image of: {', '.join(missing)}. Accuracy says nothing about them."
            )
    single = [name for label, name in enumerate(class_names) if counts["train"][label] == 1]
    if single:
        warnings.append(f"A single training image is all there is of: {', '.join(single)}.")
