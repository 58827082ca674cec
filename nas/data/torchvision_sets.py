"""Published classification sets by name, through torchvision.

torchvision checks the MD5 of what it downloads. CIFAR-10 and CIFAR-100 come as pickles, which torchvision opens only
after that check; nothing else here unpickles. Its loaders open image files with plain `convert("RGB")`; published sets
hold ordinary 8-bit photographs, for which this equals our own decoding.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.core.errors import ConfigError, DataError, did_you_mean
from nas.data.assemble import assemble
from nas.data.decode import square, to_rgb
from nas.data.division import Part, complete
from nas.data.findings import check_presence, note_copies, without_leaks
from nas.data.records import Dataset, DataSettings, Images, Progress, check_memory, check_resolution


@dataclass(frozen=True, slots=True)
class _Published:
    """How a torchvision class is called: the argument that picks a split and its value per split.

    `argument` is None for a set that is not divided. `mirrors` tells whether a mirrored image keeps its class.
    """

    argument: str | None = "split"
    train: str | bool = "train"
    val: str | None = None
    test: str | bool | None = "test"
    fixed: tuple[tuple[str, str], ...] = ()
    downloads: bool = True
    mirrors: bool = True


_BOOL = _Published("train", True, None, False)
_BOOL_DIGITS = _Published("train", True, None, False, mirrors=False)
_THREE = _Published(val="val")
_WHOLE = _Published(None, test=None)

_PUBLISHED: Mapping[str, _Published] = {
    "CIFAR10": _BOOL,
    "CIFAR100": _BOOL,
    "CLEVRClassification": _Published(val="val", test=None),
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": _Published(val="valid"),
    "DTD": _THREE,
    "EMNIST": _Published("train", True, None, False, fixed=(("split", "balanced"),), mirrors=False),
    "EuroSAT": _WHOLE,
    "FER2013": _Published(downloads=False),
    "FGVCAircraft": _THREE,
    "FashionMNIST": _BOOL,
    "Flowers102": _THREE,
    "Food101": _Published(),
    "GTSRB": _Published(mirrors=False),
    "ImageNet": _Published(val="val", test=None, downloads=False),
    "Imagenette": _Published(val="val", test=None),
    "KMNIST": _BOOL_DIGITS,
    "MNIST": _BOOL_DIGITS,
    "OxfordIIITPet": _Published(train="trainval"),
    "PCAM": _THREE,
    "Places365": _Published(train="train-standard", val="val", test=None),
    "QMNIST": _BOOL_DIGITS,
    "RenderedSST2": _Published(val="val", mirrors=False),
    "SEMEION": _Published(None, test=None, mirrors=False),
    "STL10": _Published(),
    "SUN397": _WHOLE,
    "SVHN": _Published(mirrors=False),
    "StanfordCars": _Published(),
    "USPS": _BOOL_DIGITS,
}


def published_names() -> tuple[str, ...]:
    """The torchvision classification sets that `data.name` may be."""
    return tuple(sorted(_PUBLISHED))


def check_name(name: str) -> None:
    """Refuses a `data.name` that is no data set.

    Raises:
        ConfigError: with the closest name and all allowed ones.
    """
    allowed = ("defects", "folder", *published_names())
    if name not in allowed:
        by_case = {known.lower(): known for known in allowed}
        near = by_case.get(name.lower().replace("-", ""))
        hint = f"; did you mean '{near}'?" if near else did_you_mean(name, allowed)
        raise ConfigError(f"data.name: no data set {name!r}{hint} (allowed: {', '.join(allowed)})")


def load_named(settings: DataSettings, resolution: int, progress: Progress | None = None) -> Dataset:
    """A torchvision classification set with its published train and test images; see `division.complete` for the rest.

    Raises:
        ConfigError: an unknown name, no `data.path`, or a resolution out of range.
        DataError: files that are missing and cannot be downloaded, or are broken; a class without a training image.
    """
    check_resolution(resolution)
    check_name(settings.name)
    if settings.path is None:
        raise ConfigError(
            f"data.path: missing for {settings.name}: the folder that holds its files or receives them. "
            "Add --set data.path=DIR"
        )
    published = _PUBLISHED[settings.name]
    sources: dict[Part, Any] = {}
    values: dict[Part, str | bool | None] = {"train": published.train, "val": published.val, "test": published.test}
    for part, value in values.items():
        if value is not None:
            sources[part] = _open(settings, published, value)

    warnings: list[str] = []
    total = sum(len(source) for source in sources.values())
    check_memory(total, resolution, f"torchvision's {settings.name}")
    images = np.empty((total, resolution, resolution, 3), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    digests: list[str] = []
    parts: dict[Part, Any] = {part: np.arange(0) for part in values}
    for part, source in sources.items():
        start = len(digests)
        parts[part] = np.arange(start, start + len(source))
        for index in range(len(source)):
            at = start + index
            labels[at], digest = _read(settings.name, source, index, images, at, resolution)
            digests.append(digest)
            if progress is not None and (at % 256 == 255 or at + 1 == total):
                progress(at + 1, total)
    if labels.min() < 0:
        raise DataError(f"torchvision's {settings.name} has images without a label. Use another set or an image folder")

    names = [f"{part} image {i}" for part, index in parts.items() for i in range(len(index))]
    note_copies(parts, labels, digests, names, warnings)
    parts = without_leaks(parts, digests, names, warnings)
    parts = complete(parts, labels, digests, names, settings, warnings)
    class_names = _class_names(sources["train"], int(labels.max()) + 1)
    check_presence(parts, labels, class_names, warnings)
    augment = settings.augment
    if not published.mirrors and (augment.horizontal_flip or augment.vertical_flip):
        warnings.append(
            f"A mirrored image of {settings.name} is another or no class at all. "
            "Set data.augment.horizontal_flip=false and data.augment.vertical_flip=false."
        )
    return assemble(settings.name, class_names, images, labels, digests, None, parts, augment, warnings)


def _open(settings: DataSettings, published: _Published, value: str | bool) -> Any:
    """The torchvision object of one split, downloaded where that is needed and allowed."""
    root = Path(settings.path or "").expanduser()
    arguments: dict[str, Any] = {"root": str(root), **dict(published.fixed)}
    if published.argument is not None:
        arguments[published.argument] = value
    try:
        return _make(settings.name, arguments | ({"download": False} if published.downloads else {}))
    except DataError as e:
        missing = e
    where = f"data.path: {root} holds no complete {settings.name} ({missing})"
    if not published.downloads:
        raise DataError(f"{where}. No program may download it: fetch it by hand from its publisher") from missing
    if not settings.download:
        raise DataError(f"{where}. Put its files there, or allow fetching them: --set data.download=true") from missing
    try:
        return _make(settings.name, arguments | {"download": True})
    except DataError as e:
        raise DataError(
            f"{where}, and fetching it failed ({e}). On a machine with a network run: "
            f"python -c \"import torchvision; torchvision.datasets.{settings.name}('DIR', download=True)\" "
            "and copy DIR here; or use --set data.name=defects, which needs no files"
        ) from e


def _make(name: str, arguments: Mapping[str, Any]) -> Any:
    from torchvision import datasets  # imports torch: seconds that only these sets need

    try:
        return getattr(datasets, name)(**arguments)
    except Exception as e:  # every set fails in its own way when files are missing or broken
        raise DataError(_first_line(e)) from e


def _first_line(e: Exception) -> str:
    text = str(e).strip().splitlines()
    return text[0] if text else type(e).__name__


def _read(name: str, source: Any, index: int, images: Images, at: int, resolution: int) -> tuple[int, str]:
    """Decodes one image into `images[at]`; its label and the hash of its original pixels."""
    try:
        image, target = source[index]
        digest = hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
        images[at] = np.asarray(square(to_rgb(image), resolution))
        return operator.index(target), digest
    except Exception as e:  # as above: a broken file of a published set, whatever its loader raises
        where = f"torchvision's {name}: image {index}"
        raise DataError(f"{where} cannot be read ({_first_line(e)}). Remove its files and fetch them again") from e


def _class_names(source: Any, count: int) -> tuple[str, ...]:
    """Class names as the set gives them (the first synonym), or the label numbers."""
    given = getattr(source, "classes", None) or getattr(source, "categories", None) or ()
    names = [str(name[0]) if isinstance(name, tuple | list) else str(name) for name in given]
    if len(names) < count:
        names = [str(label) for label in range(count)]
    return tuple(f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names))
