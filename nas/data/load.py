"""The one way to a data set: from settings to images in memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nas.core.errors import DataError
from nas.core.jsonio import content_hash
from nas.data import defects
from nas.data.folder import load_folder
from nas.data.records import Dataset, DataSettings, Progress, channel_statistics, check_resolution
from nas.data.torchvision_sets import check_name, load_named


def load_dataset(settings: DataSettings, resolution: int, progress: Progress | None = None) -> Dataset:
    """The data set that `settings` names, with all images in memory at `resolution` px.

    Args:
        settings: which set.
        resolution: side in pixels. The same settings at another resolution show the same images, divided the same way.
        progress: called with images done and images in all while files are read.

    Raises:
        ConfigError: an unknown set, a missing path, a resolution out of range.
        DataError: files that are missing or broken, or a set that contradicts itself.
    """
    check_resolution(resolution)
    check_name(settings.name)
    if settings.name == "folder":
        dataset = load_folder(settings, resolution, progress)
    elif settings.name == "defects":
        dataset = _load_defects(settings, resolution)
    else:
        dataset = load_named(settings, resolution, progress)
    return _with_solve_split(dataset, settings.threshold_share) if settings.threshold_share else dataset


def _with_solve_split(dataset: Dataset, share: float) -> Dataset:
    """The same set with a share of its search-validation images, evenly over their order, in a split of their own.

    Raises:
        DataError: too few images.
    """
    steps = np.floor(np.arange(len(dataset.val) + 1) * share)
    taken = np.diff(steps) > 0
    if not taken.any() or taken.all():
        raise DataError(
            f"data set {dataset.name}: of {len(dataset.val)} validation images a share of {share:g} cannot be kept for "
            "thresholds. Leave it out: --set data.threshold_share=0"
        )
    return replace(
        dataset,
        val=dataset.val.take(np.flatnonzero(~taken)),
        solve=dataset.val.take(np.flatnonzero(taken)),
        sha256=content_hash([dataset.sha256, share], 64),
    )


def _load_defects(settings: DataSettings, resolution: int) -> Dataset:
    train = defects.generate("train", settings.train_images, resolution, settings.seed)
    mean, std = channel_statistics(train.images)
    identity = {
        "kind": "defects",
        "version": defects.GENERATOR_VERSION,
        "resolution": resolution,
        "seed": settings.seed,
        "images": (settings.train_images, settings.val_images, settings.test_images),
    }
    return Dataset(
        name="defects",
        class_names=defects.CLASS_NAMES,
        resolution=resolution,
        train=train,
        val=defects.generate("val", settings.val_images, resolution, settings.seed),
        test=defects.generate("test", settings.test_images, resolution, settings.seed),
        mean=mean,
        std=std,
        augment=settings.augment,
        sha256=content_hash(identity, 64),
    )
