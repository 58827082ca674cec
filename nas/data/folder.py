"""Image folders: one folder per class, divided into train, validation and test or not.

Layouts:
    DIR/train/<class>/*          with DIR/val (or valid, validation) and/or DIR/test laid out alike
    DIR/train/images/<class>/*   the same beside other folders, such as annotations
    DIR/<class>/*                not divided: test and search validation are taken class by class

The search needs a validation split of its own beside the test split. Train, val and test are used as they are when all
three exist. With train and val only, val becomes the test split (it is what published figures are measured on), and the
search-validation split is taken from train.

Every file is decoded before anything else happens: broken ones are listed, and stop the run when they are many.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import DataError, did_you_mean
from nas.data.assemble import assemble
from nas.data.decode import decode_bytes, read_image_file, refusing_bombs
from nas.data.division import PARTS, Part, complete
from nas.data.findings import LISTED, check_presence, listed, note_copies, without_leaks
from nas.data.records import DataFolderError, Dataset, DataSettings, Images, Progress, check_memory, check_resolution

EXPECTED_LAYOUT = (
    "expected DIR/train/<class>/* with DIR/val and/or DIR/test laid out alike "
    "(or DIR/train/images/<class>/*), or DIR/<class>/* for a set that is not divided"
)

_PART_FOLDERS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "dib", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "jpx", "mpo"),
        *("pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp"),
    )
)
_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_LISTED_AS_ERROR = 100
_TWELVE_BITS = 4095


@dataclass(frozen=True, slots=True)
class _File:
    """An image file; `name` is its path below the data folder, `label` the name of its class."""

    path: Path
    name: str
    part: Part
    label: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """What decoding one file told: its hash, or why it cannot be used."""

    sha256: str = ""
    shorter_side_px: int = 0
    deep_max: int | None = None
    error: str | None = None


def count_training_images(root: Path) -> int:
    """Image files of the training split, or of the whole folder where it is still to be divided; none is opened.

    Raises:
        DataError: the folder holds no class folders, or no images.
    """
    files = _list_files(root, _find_layout(root, []), [])
    return sum(file.part == "train" for file in files)


def load_folder(settings: DataSettings, resolution: int, progress: Progress | None = None) -> Dataset:
    """The data set in the folder `settings.path`, decoded at `resolution` px.

    Raises:
        DataFolderError: no folder given, no such folder, nothing in it, or an unknown layout (exit code 2).
        DataError: too many broken files, a single class, classes that train lacks, validation or test images that are
            copies of training images.
        ConfigError: a resolution out of range.
    """
    check_resolution(resolution)
    if settings.path is None:
        raise DataFolderError("data.path: missing for data.name 'folder'. Add --set data.path=DIR")
    root = Path(settings.path).expanduser()
    warnings: list[str] = []
    folders = _find_layout(root, warnings)
    files = _list_files(root, folders, warnings)
    class_names = _check_classes(root, files)
    check_memory(len(files), resolution, str(root))

    images, seen = _decode_all(files, resolution, progress)
    usable = _drop_broken(root, files, seen, settings.max_corrupt_share, warnings)
    _note_properties([seen[i] for i in usable], resolution, warnings)
    files, seen = [files[i] for i in usable], [seen[i] for i in usable]
    if len(usable) < len(images):
        images = images[usable]

    labels = np.array([class_names.index(file.label) for file in files], dtype=np.int64)
    digests = [item.sha256 for item in seen]
    name, names = root.resolve().name or str(root), [file.name for file in files]
    given = {p: np.array([i for i, f in enumerate(files) if f.part == p], dtype=np.int64) for p in PARTS}
    note_copies(given, labels, digests, names, warnings)
    parts = without_leaks(given, digests, names, warnings)
    parts = complete(parts, labels, digests, names, settings, warnings)
    check_presence(parts, labels, class_names, warnings)

    return assemble(name, class_names, images, labels, digests, names, parts, settings.augment, warnings)


def shown(path: Path | str) -> str:
    """A path in one printable line, whatever bytes its name holds."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)


def _children(folder: Path) -> list[Path]:
    """Visible files and folders in `folder`, sorted by name.

    Raises:
        DataFolderError: the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as e:
        raise DataFolderError(f"{shown(folder)}: cannot be read: {e.strerror or e}") from e
    return [path for path in paths if not path.name.startswith(".") and path.name.casefold() not in _CLUTTER]


def _subfolders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in _children(folder) if path.is_dir()}


def _class_folders(folder: Path) -> dict[str, Path]:
    """Class folders by name: those in `folder/images` where that holds folders, else those in `folder`."""
    below = _subfolders(folder)
    if "images" in below and (inner := _subfolders(below["images"])):
        below = inner
    named: dict[str, Path] = {}
    for name, path in below.items():
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as e:
            raise DataError(f"{shown(path)}: the name of a class folder must be valid UTF-8. Rename it") from e
        clean = unicodedata.normalize("NFC", name)  # macOS and Linux write accents differently
        if clean in named:
            raise DataError(f"{shown(path)}: two class folders have the same name {clean!r}. Merge them")
        named[clean] = path
    return named


def _found(folder: Path) -> str:
    names = [shown(path.name) + ("/" if path.is_dir() else "") for path in _children(folder)]
    if not names:
        return "it is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"found {', '.join(names[:8])}{more}"


def _find_layout(root: Path, warnings: list[str]) -> dict[Part, dict[str, Path]]:
    """Class folders by name for each split that is there."""
    if not root.exists():
        siblings = list(_subfolders(root.parent)) if root.parent.is_dir() else []
        hint = did_you_mean(root.name, siblings)
        raise DataFolderError(
            f"data.path: {shown(root)} does not exist{hint or '.'} Give an image folder: --set data.path=DIR"
        )
    if not root.is_dir():
        raise DataFolderError(
            f"data.path: {shown(root)} is a file; {EXPECTED_LAYOUT}. Unpack it first if it is an archive"
        )

    named: dict[Part, Path] = {}
    for name, path in _subfolders(root).items():
        part = _PART_FOLDERS.get(name.casefold())
        if part is None:
            continue
        if part in named:
            raise DataFolderError(
                f"data.path: {shown(root)} holds both {named[part].name} and {name}. Keep one as {part}"
            )
        named[part] = path
    train = _class_folders(named["train"]) if "train" in named else {}
    if not train:  # a folder called train may also be a class
        classes = _class_folders(root)
        if not classes or set(classes) <= {path.name for path in named.values()}:
            raise DataFolderError(f"data.path: {shown(root)}: no class folders; {_found(root)}; {EXPECTED_LAYOUT}")
        return {"train": classes}

    layout: dict[Part, dict[str, Path]] = {"train": train}
    for part in ("val", "test"):
        if part not in named:
            continue
        classes = _class_folders(named[part])
        if classes:
            layout[part] = classes
        elif part == "test":
            warnings.append(f"{named[part].name} holds no class folders (images without labels?) and is not used.")
        else:
            folder = named[part]
            raise DataFolderError(f"data.path: {shown(folder)}: no class folders; {_found(folder)}; {EXPECTED_LAYOUT}")
    return layout


def _files_below(folder: Path) -> list[Path]:
    """Visible files below a folder, sorted; links to folders are followed, each folder once."""
    files: list[Path] = []
    visited: set[str] = set()

    def fail(e: OSError) -> None:
        raise DataError(f"{shown(e.filename)}: cannot be read: {e.strerror or e}") from e

    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, n) for n in names if not n.startswith(".") and n.casefold() not in _CLUTTER]
    return sorted(files, key=os.fspath)


def _list_files(root: Path, layout: dict[Part, dict[str, Path]], warnings: list[str]) -> list[_File]:
    files: list[_File] = []
    others: list[str] = []
    empty: list[str] = []
    for part, classes in layout.items():
        for label in sorted(classes):
            below = _files_below(classes[label])
            images = [path for path in below if not path.suffix or path.suffix.lower() in _IMAGE_SUFFIXES]
            kept = set(images)
            others += [shown(path.relative_to(root)) for path in below if path not in kept]
            files += [_File(path, shown(path.relative_to(root)), part, label) for path in images]
            if not images:
                empty.append(shown(classes[label].relative_to(root)))
    if others:
        warnings.append(f"{len(others)} files are not images by their names and are not used:{listed(others, 5)}")
    if not files:
        raise DataFolderError(f"data.path: {shown(root)}: no images; {_found(root)}; {EXPECTED_LAYOUT}")
    if empty:
        warnings.append(f"{len(empty)} folders hold no image and are not classes: {', '.join(empty)}.")
    return files


def _check_classes(root: Path, files: Sequence[_File]) -> tuple[str, ...]:
    """The class names in the order of the labels: those of the training files, sorted."""
    by_part: dict[str, set[str]] = {}
    for file in files:
        by_part.setdefault(file.part, set()).add(file.label)
    classes = sorted(by_part.get("train", ()))
    for part in ("val", "test"):
        unknown = sorted(by_part.get(part, set()) - set(classes))
        if unknown:
            hints = "; ".join(repr(name) + did_you_mean(name, classes) for name in unknown)
            raise DataError(
                f"{shown(root)}: {part} has classes without training images: {hints}. "
                f"Classes of train: {', '.join(classes)}. Use the same folder names in every split"
            )
    if len(classes) < 2:
        raise DataError(
            f"{shown(root)}: only one class, {classes[0]!r}: there is nothing to tell apart; "
            f"{_found(root)}; {EXPECTED_LAYOUT}"
        )
    return tuple(classes)


def _decode_all(files: Sequence[_File], resolution: int, progress: Progress | None) -> tuple[Images, list[_Seen]]:
    """Pixels [N, H, H, 3] of all files (anything where a file is broken) and what decoding told."""
    images = np.zeros((len(files), resolution, resolution, 3), dtype=np.uint8)

    def decode(index: int) -> _Seen:
        file = files[index]
        try:
            data = read_image_file(file.path)
            decoded = decode_bytes(data, resolution, str(file.path))
        except DataError as e:
            return _Seen(error=str(e).removeprefix(f"{file.path}: "))
        images[index] = decoded.pixels
        return _Seen(hashlib.sha256(data).hexdigest(), decoded.shorter_side_px, decoded.deep_max)

    seen: list[_Seen] = []
    with refusing_bombs(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        for done, item in enumerate(pool.map(decode, range(len(files))), start=1):
            seen.append(item)
            if progress is not None and (done % 64 == 0 or done == len(files)):
                progress(done, len(files))
    return images, seen


def _drop_broken(
    root: Path, files: Sequence[_File], seen: Sequence[_Seen], most: float, warnings: list[str]
) -> NDArray[np.int64]:
    """Indices of the files that could be decoded."""
    failed = [i for i, item in enumerate(seen) if item.error is not None]
    stray = [i for i in failed if not files[i].path.suffix and "not an image" in (seen[i].error or "")]
    broken = [i for i in failed if i not in set(stray)]
    if stray:
        names = (files[i].name for i in stray)
        warnings.append(f"{len(stray)} files without an extension are not images and are not used:{listed(names, 5)}")
    if broken:
        share = len(broken) / (len(files) - len(stray))
        lines = [f"{files[i].name}: {shown(seen[i].error or '')}" for i in broken]
        if share > most:
            raise DataError(
                f"{shown(root)}: {len(broken)} of {len(files) - len(stray)} image files cannot be read ({share:.1%}, "
                f"allowed {most:.1%}):{listed(lines, _LISTED_AS_ERROR)}\nRepair or remove them, or allow more: "
                "--set data.max_corrupt_share=SHARE"
            )
        warnings.append(f"{len(broken)} image files cannot be read and are left out:{listed(lines, LISTED)}")
    bad = set(failed)
    return np.array([i for i in range(len(files)) if i not in bad], dtype=np.int64)


def _note_properties(seen: Sequence[_Seen], resolution: int, warnings: list[str]) -> None:
    small = sum(item.shorter_side_px < resolution for item in seen)
    if small:
        warnings.append(f"{small} of {len(seen)} images are smaller than {resolution} px and are enlarged.")
    deep = [item.deep_max for item in seen if item.deep_max is not None]
    if deep and max(deep) <= _TWELVE_BITS:
        warnings.append(
            f"{len(deep)} images have 16 bits but no value above {max(deep)}: they look like 12-bit or darker data and "
            "become nearly black in 8 bits. Scale them to the full range first."
        )
