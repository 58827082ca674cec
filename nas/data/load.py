"""The one way to a data set: from settings to images in memory."""

from __future__ import annotations

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
        return load_folder(settings, resolution, progress)
    if settings.name == "defects":
        return _load_defects(settings, resolution)
    return load_named(settings, resolution, progress)


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
