"""From decoded images and their division to a data set with an identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nas.core.jsonio import content_hash
from nas.data.decode import DECODE_VERSION
from nas.data.division import Indices, Part
from nas.data.records import AugmentSettings, Dataset, Images, Split, channel_statistics


def assemble(
    name: str,
    class_names: tuple[str, ...],
    images: Images,
    labels: Indices,
    digests: Sequence[str],
    names: Sequence[str] | None,
    parts: Mapping[Part, Indices],
    augment: AugmentSettings,
    warnings: Sequence[str],
) -> Dataset:
    """The data set of images uint8 [N, H, W, 3], of which `parts` holds the indices per split.

    Its identity is made of content hashes, labels and split of the images in their order (cached logits are stored by
    index), the class names and the resolution; not of file names, times or places.
    """
    resolution = images.shape[1]
    splits = {
        part: Split(
            images=np.ascontiguousarray(images[index]),
            labels=labels[index],
            names=None if names is None else tuple(names[i] for i in index),
        )
        for part, index in parts.items()
    }
    mean, std = channel_statistics(splits["train"].images)
    identity = {
        "decode": DECODE_VERSION,
        "resolution": resolution,
        "classes": class_names,
        "images": {part: [(int(labels[i]), digests[i]) for i in index] for part, index in parts.items()},
    }
    return Dataset(
        name=name,
        class_names=class_names,
        resolution=resolution,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        mean=mean,
        std=std,
        augment=augment,
        sha256=content_hash(identity, 64),
        warnings=tuple(warnings),
    )
