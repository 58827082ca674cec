"""What a worker process needs of data and teacher: files that are mapped, not sent, described by one small JSON record.

A resolution below the data set's own is a search choice: its images are decoded at that side (as a deployed student
will see them), augmented with the same random numbers, and share the teacher's logits of the full-size variants.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from nas.core.errors import StorageError
from nas.core.jsonio import content_hash, read_record, write_bytes, write_record
from nas.data import Dataset, augmented, evenly
from nas.train.compute import training_device
from nas.train.settings import Accelerator
from nas.train.targets import FEATURE_PATTERN, Targets

ARRAYS_VERSION = 2  # raise it when a change of the code changes what is kept
CALIBRATION_IMAGES = 1024  # kept for int8 ranges and batch norm; 128-256 are enough for either


@dataclass(frozen=True, slots=True)
class ResolutionFiles:
    """Arrays of one resolution: uint8 [N, H, W, 3]; `variants` [V, N, H, W, 3]; `solve` is empty where it is `val`."""

    resolution: int
    val: str
    test: str
    sample: str
    variants: str
    solve: str = ""


@dataclass(frozen=True, slots=True)
class ContextFile:
    """`context.json`: where the arrays of a data set and of its teacher's targets lie, and what students train on."""

    dataset: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    targets: str
    val_labels: str
    test_labels: str
    resolutions: tuple[ResolutionFiles, ...]
    solve_labels: str = ""
    accelerator: Accelerator = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Mapped arrays of one resolution.

    Fields:
        targets: augmented training images with the teacher's logits.
        val: search validation images, uint8 [N, H, W, 3]; `val_labels` int64 [N].
        test: images of the final figures; `test_labels` int64 [N].
        sample: training images without augmentation, for int8 ranges and batch norm.
        solve: images for exit thresholds and temperatures; those of `val` where the data set keeps none apart.
        accelerator: what students are trained on where a process has it.
    """

    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    targets: Targets
    val: np.ndarray
    val_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    sample: np.ndarray
    solve: np.ndarray
    solve_labels: np.ndarray
    accelerator: Accelerator = "cpu"

    @property
    def device(self) -> torch.device:
        """Where this process trains students."""
        return training_device(self.accelerator)

    @property
    def splits(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Images and labels of the splits that a finished student answers, by name; `solve` where it is one."""
        found = {"val": (self.val, self.val_labels), "test": (self.test, self.test_labels)}
        return found if self.solve is self.val else found | {"solve": (self.solve, self.solve_labels)}


def write_context(
    path: Path,
    datasets: tuple[Dataset, ...],
    targets: Targets,
    cache: Path,
    seed: int,
    accelerator: Accelerator = "cpu",
) -> ContextFile:
    """Keeps the arrays of each resolution in the cache and writes the record that names them.

    Args:
        path: the record, in the run folder.
        datasets: the same data set in each resolution of the space, the teacher's (the largest) among them.
        targets: of the largest resolution.
        cache: folder of the arrays; they are shared by all runs on the same data.
        seed: of the augmentation, as given to `make_targets`.
        accelerator: what students shall be trained on.

    Raises:
        StorageError: the cache cannot be written.
    """
    largest = max(datasets, key=lambda d: d.resolution)
    sets = []
    for dataset in sorted(datasets, key=lambda d: d.resolution):
        folder = cache / "arrays" / content_hash([ARRAYS_VERSION, dataset.sha256, targets.key, seed])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise StorageError(f"{folder}: cannot be made: {e.strerror}. Choose another cache: run.cache") from e
        with FileLock(folder.with_suffix(".lock")):
            variants = targets.folder / "images.npy"
            if dataset.resolution != largest.resolution:
                variants = folder / "variants.npy"
                if not variants.exists():
                    _save(variants, _variants(dataset, targets.variants, seed))
            arrays = {
                "val": dataset.val.images,
                "test": dataset.test.images,
                "sample": evenly(dataset.train.images, CALIBRATION_IMAGES),
                "val_labels": dataset.val.labels,
                "test_labels": dataset.test.labels,
            }
            if dataset.solve is not None:
                arrays |= {"solve": dataset.solve.images, "solve_labels": dataset.solve.labels}
            for name, array in arrays.items():
                if not (folder / f"{name}.npy").exists():
                    _save(folder / f"{name}.npy", array)
        names = (str((folder / f"{name}.npy").resolve()) for name in ("val", "test", "sample"))
        solve = "" if dataset.solve is None else str((folder / "solve.npy").resolve())
        sets.append((folder, ResolutionFiles(dataset.resolution, *names, str(variants.resolve()), solve)))
    folder = sets[-1][0].resolve()
    record = ContextFile(
        dataset=largest.name,
        class_names=largest.class_names,
        mean=largest.mean,
        std=largest.std,
        targets=str(targets.folder.resolve()),
        val_labels=str(folder / "val_labels.npy"),
        test_labels=str(folder / "test_labels.npy"),
        resolutions=tuple(files for _, files in sets),
        solve_labels="" if largest.solve is None else str(folder / "solve_labels.npy"),
        accelerator=accelerator,
    )
    write_record(path, record)
    return record


def _variants(dataset: Dataset, count: int, seed: int) -> np.ndarray:
    # The same generator per variant as make_targets uses: the same shifts and flips at another side.
    parts = [augmented(dataset.train.images, dataset.augment, np.random.default_rng([seed, v])) for v in range(count)]
    return np.stack(parts)


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


@lru_cache(maxsize=4)
def open_context(path: str, resolution: int) -> Context:
    """The arrays of one resolution, mapped; kept open, because a worker scores many students on them.

    Raises:
        StorageError: a file is missing or damaged; run the same command again to make it anew.
        RecordError: the context record itself is damaged.
    """
    record = read_record(ContextFile, Path(path))
    files = {f.resolution: f for f in record.resolutions}.get(resolution)
    if files is None:
        raise StorageError(f"{path}: no arrays at {resolution} px; run the same command again")
    targets = Targets.open(Path(record.targets))
    if Path(files.variants) != Path(record.targets) / "images.npy":
        plain_key = targets.plain_key and f"{targets.plain_key}-{resolution}"
        key = f"{targets.key}-{resolution}"
        targets = replace(targets, images=_open(files.variants), key=key, plain_key=plain_key)
    val, val_labels = _open(files.val), _open(record.val_labels)
    return Context(
        record.class_names,
        record.mean,
        record.std,
        targets,
        val,
        val_labels,
        _open(files.test),
        _open(record.test_labels),
        _open(files.sample),
        _open(files.solve) if files.solve else val,
        _open(record.solve_labels) if record.solve_labels else val_labels,
        record.accelerator,
    )


def _open(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise StorageError(f"{path}: cannot be read: {e}. Delete it and run the same command again") from e


TARGET_FILES = ("targets.json", "images.npy", "logits.npy", "labels.npy")  # and the features, where there are any


def context_parts(path: Path) -> tuple[ContextFile, dict[str, Path]]:
    """A context as another machine can have it: the record with plain file names, and where each of these files lies.

    Raises:
        StorageError, RecordError: the record cannot be read.
    """
    record = read_record(ContextFile, path)
    targets = Path(record.targets)
    features = sorted(path.name for path in targets.glob(FEATURE_PATTERN))
    files = {name: targets / name for name in (*TARGET_FILES, *features)}
    files |= {"val_labels.npy": Path(record.val_labels), "test_labels.npy": Path(record.test_labels)}
    if record.solve_labels:
        files["solve_labels.npy"] = Path(record.solve_labels)
    resolutions = []
    for each in record.resolutions:
        parts = ("val", "test", "sample", "variants", *(("solve",) if each.solve else ()))
        names = {part: f"{part}-{each.resolution}.npy" for part in parts}
        if Path(each.variants) == targets / "images.npy":
            names["variants"] = "images.npy"
        files |= {name: Path(getattr(each, part)) for part, name in names.items()}
        resolutions.append(ResolutionFiles(each.resolution, **names))
    plain = replace(
        record,
        targets="",
        val_labels="val_labels.npy",
        test_labels="test_labels.npy",
        resolutions=tuple(resolutions),
        solve_labels="solve_labels.npy" if record.solve_labels else "",
    )
    return plain, files


def place_context(record: ContextFile, folder: Path) -> Path:
    """Writes the record of `context_parts` into a folder that holds all of its files; gives its path."""

    def here(name: str) -> str:
        return str(folder / Path(name).name) if name else ""

    placed = replace(
        record,
        targets=str(folder),
        val_labels=here(record.val_labels),
        test_labels=here(record.test_labels),
        resolutions=tuple(
            ResolutionFiles(r.resolution, here(r.val), here(r.test), here(r.sample), here(r.variants), here(r.solve))
            for r in record.resolutions
        ),
        solve_labels=here(record.solve_labels),
    )
    path = folder / "context.json"
    write_record(path, placed)
    return path
