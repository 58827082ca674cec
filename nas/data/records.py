"""What a data set is: three disjoint splits of images in memory, and the settings that name it.

Letters: N images, H W pixels (images are square), K classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import ConfigError, DataError

Images = NDArray[np.uint8]

Corruption = Literal["noise", "motion_blur", "defocus_blur", "exposure", "vignetting", "jpeg"]

Division = Literal["random", "order"]

Progress = Callable[[int, int], None]
"""Called with the number of images done and the number of all."""

MIN_RESOLUTION_PX, MAX_RESOLUTION_PX = 8, 1024


class DataFolderError(DataError):
    """A data folder that is missing, empty or laid out in an unknown way: a wrong setting, so exit code 2."""

    exit_code = 2


def even_places(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` numbers below `length`, evenly over all of them, rising.

    Images of a folder lie class by class: the first ones are of one class, those of even places of all.
    """
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))


def evenly(images: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """At most `count` of the images [N, H, W, 3], evenly over all of them, in their order."""
    return np.ascontiguousarray(images[even_places(len(images), count)])


def _count(name: str, value: int, minimum: int, maximum: int = 10_000_000) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ConfigError(f"{name} must be a whole number from {minimum} to {maximum}, got {value!r}")


def _share(name: str, value: float, maximum: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0 <= value <= maximum:
        raise ConfigError(f"{name} must be a number from 0 to {maximum}, got {value!r}")


@dataclass(frozen=True, slots=True)
class AugmentSettings:
    """Changes of a training image that do not change its class: a property of the data set, not of the trainer.

    The defaults are those of the embedded set, where light comes from above: a vertical flip turns dents into bumps.

    Attributes:
        shift: largest shift along each axis as a share of the side; what comes in is the reflected border.
        horizontal_flip: left and right are exchanged in half of the images.
        vertical_flip: top and bottom are exchanged in half of the images.
        quarter_turns: a random turn by 0, 90, 180 or 270 degrees (views from above, with no preferred direction).
        brightness: largest factor minus one, up or down: 0.2 multiplies all pixels by 0.8 to 1.2.
        contrast: the same for the distance of each pixel from the mean grey level of its image.
        cutout: side of one square set to the mean colour of the image, as a share of the side; 0 leaves it out.
        corruptions: what the camera may do to an image: noise, motion_blur, defocus_blur, exposure, vignetting, jpeg;
            none by default. One of them is drawn for each image that gets any.
        corrupted_share: share of the images that get one.
        max_severity: severities from 1 to this one, at most 5, are drawn evenly.
    """

    shift: float = 2 / 32
    horizontal_flip: bool = True
    vertical_flip: bool = False
    quarter_turns: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    cutout: float = 0.0
    corruptions: tuple[Corruption, ...] = ()
    corrupted_share: float = 0.5
    max_severity: int = 3

    def __post_init__(self) -> None:
        _share("data.augment.shift", self.shift, 0.5)
        _share("data.augment.brightness", self.brightness, 0.9)
        _share("data.augment.contrast", self.contrast, 0.9)
        _share("data.augment.cutout", self.cutout, 0.75)
        _share("data.augment.corrupted_share", self.corrupted_share, 1.0)
        _count("data.augment.max_severity", self.max_severity, 1, 5)
        unknown = [name for name in self.corruptions if name not in get_args(Corruption)]
        if unknown or len(set(self.corruptions)) != len(self.corruptions):
            raise ConfigError(
                f"data.augment.corruptions: each of {', '.join(get_args(Corruption))} at most once, got "
                f"{list(self.corruptions)}"
            )


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which images to use and how they are divided.

    Attributes:
        name: "defects" (the embedded, generated set), "folder" (image folders) or the name of a torchvision
            classification data set, such as "CIFAR10".
        path: the image folder, or the folder that holds (or receives) the files of a torchvision set.
        train_images: training images of the embedded set.
        val_images: search-validation images of the embedded set.
        test_images: test images of the embedded set.
        val_share: share of the training images, taken class by class, that becomes the search-validation split of a
            set that brings none; also the share of the test split of a set that is not divided at all.
        division: how these are taken. `random`: by content and `seed`. `order`: the last images of each class by name
            (numbers in names count as numbers), for frames of a film, pictures of one strip or of one day: neighbours
            look alike, and if they were on both sides, validation would ask only for what the students know.
        threshold_share: share of the search-validation images that scores no candidate and chooses none: exit
            thresholds and temperatures are solved on it. 0: they are solved on the images that also choose.
        seed: draws the embedded set and decides which images of other sets go to search validation.
        max_corrupt_share: largest share of unreadable files that is left out with a warning; more is an error.
        download: fetch the files of a torchvision set that are not in `path` yet.
        augment: allowed changes of a training image.
    """

    name: str = "defects"
    path: str | None = None
    train_images: int = 4000
    val_images: int = 3000
    test_images: int = 3000
    val_share: float = 0.15
    division: Division = "random"
    threshold_share: float = 0.0
    seed: int = 0
    max_corrupt_share: float = 0.01
    download: bool = True
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError(f"data.name must be 'defects', 'folder' or a torchvision data set, got {self.name!r}")
        if self.path is not None and (not isinstance(self.path, str) or not self.path.strip() or "\0" in self.path):
            raise ConfigError(f"data.path must be a folder, got {self.path!r}")
        _count("data.train_images", self.train_images, 2)
        _count("data.val_images", self.val_images, 1)
        _count("data.test_images", self.test_images, 1)
        _count("data.seed", self.seed, 0, 2**63 - 1)
        _share("data.val_share", self.val_share, 0.45)
        if self.val_share == 0:
            raise ConfigError("data.val_share must be above 0: a search never chooses on its training or test images")
        _share("data.threshold_share", self.threshold_share, 0.9)
        _share("data.max_corrupt_share", self.max_corrupt_share, 1.0)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DataError(message)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Images of one split, at rest.

    Attributes:
        images: uint8 [N, H, W, 3], RGB.
        labels: int64 [N], indices into `Dataset.class_names`.
        names: one name per image (the path below the data folder), where images have names.
        boxes: float32 [N, 4], left, top, right, bottom in pixels, right and bottom exclusive; zeros where nothing is.
        difficulty: float32 [N] from 0 (easy) to 0.75, of generated images.
    """

    images: Images
    labels: NDArray[np.int64]
    names: tuple[str, ...] | None = None
    boxes: NDArray[np.float32] | None = None
    difficulty: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        count = len(self.images)
        shape = self.images.shape
        square_rgb = self.images.ndim == 4 and shape[1] == shape[2] and shape[3] == 3
        _require(square_rgb and self.images.dtype == np.uint8, f"images must be uint8 [N, H, H, 3], got {shape}")
        _require(self.labels.shape == (count,), f"{count} images need {count} labels, got {self.labels.shape}")
        _require(self.labels.dtype == np.int64, f"labels must be int64, got {self.labels.dtype}")
        _require(self.names is None or len(self.names) == count, f"{count} images need {count} names")
        _require(self.boxes is None or self.boxes.shape == (count, 4), f"{count} images need boxes [{count}, 4]")
        _require(
            self.difficulty is None or self.difficulty.shape == (count,), f"{count} images need {count} difficulties"
        )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: NDArray[Any]) -> Split:
        """The split made of the images at `indices` [M], in that order."""
        return Split(
            images=np.ascontiguousarray(self.images[indices]),
            labels=self.labels[indices],
            names=None if self.names is None else tuple(self.names[i] for i in indices),
            boxes=None if self.boxes is None else self.boxes[indices],
            difficulty=None if self.difficulty is None else self.difficulty[indices],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set in memory at one resolution: train, search validation and test share no image.

    Attributes:
        name: what the set is called in reports.
        class_names: the classes in the order of the labels.
        resolution: side of the images in pixels.
        train: images that weights are trained on.
        val: images that the search compares candidates on.
        test: images for the final figures, used once.
        mean: per channel (R, G, B) over the training images, pixels divided by 255.
        std: standard deviation of the same.
        augment: allowed changes of a training image.
        sha256: identifies images, labels, split and resolution; part of the key of everything made from the set.
        warnings: what a person should know about the set before training, one sentence each.
        solve: images for exit thresholds and temperatures; None: those of `val`.
    """

    name: str
    class_names: tuple[str, ...]
    resolution: int
    train: Split
    val: Split
    test: Split
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: AugmentSettings
    sha256: str
    warnings: tuple[str, ...] = ()
    solve: Split | None = None

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        _require(classes >= 2, f"data set {self.name}: at least two classes are needed, got {self.class_names}")
        _require(len(set(self.class_names)) == classes, f"data set {self.name}: two classes have the same name")
        for title, split in (("train", self.train), ("val", self.val), ("test", self.test)):
            _require(len(split) > 0, f"data set {self.name}: the {title} split holds no image")
            _require(
                split.images.shape[1] == self.resolution,
                f"data set {self.name}: {title} images have {split.images.shape[1]} px, expected {self.resolution}",
            )
            lowest, highest = int(split.labels.min()), int(split.labels.max())
            _require(
                lowest >= 0 and highest < classes,
                f"data set {self.name}: {title} labels {lowest} to {highest} do not fit {classes} classes",
            )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def check_resolution(resolution: int) -> None:
    """Refuses a side that no network here can take.

    Raises:
        ConfigError: not a whole number of pixels between 8 and 1024.
    """
    _count("resolution", resolution, MIN_RESOLUTION_PX, MAX_RESOLUTION_PX)


def check_memory(count: int, resolution: int, where: str) -> None:
    """Refuses a set whose pixels would not fit: they are held twice for a moment.

    Raises:
        DataError: more than 40 % of the machine's memory; the message names a resolution that fits.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = count * resolution**2 * 3
    if needed > 0.4 * total:
        fits = int((0.4 * total / 3 / count) ** 0.5) // 8 * 8
        raise DataError(
            f"{where}: {count} images at {resolution} px take {needed / 2**30:.1f} GiB, this machine has "
            f"{total / 2**30:.1f} GiB. Use a resolution of {fits} px or less, or fewer images"
        )


def channel_statistics(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation per channel of images uint8 [N, H, W, 3], on the scale 0 to 1.

    Sums are whole numbers, so the result does not depend on the machine. A channel that never changes gets the standard
    deviation of one grey level, so that dividing by it is safe.
    """
    total, squares = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    for start in range(0, len(images), 512):
        pixels = images[start : start + 512].reshape(-1, 3)
        total += pixels.sum(axis=0, dtype=np.int64)
        squares += (pixels.astype(np.uint32) ** 2).sum(axis=0, dtype=np.int64)
    count = images.size // 3
    means, stds = [], []
    for channel in range(3):
        sum_, square = int(total[channel]), int(squares[channel])
        variance = (square * count - sum_ * sum_) / count**2  # exact integers up to the division
        means.append(sum_ / count / 255)
        stds.append(max(math.sqrt(variance), 1.0) / 255)
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])
