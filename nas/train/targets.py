"""What the teacher says about every augmented training image, computed once and shared by all students.

Source of the idea: Shen & Xing 2021, "Fast Knowledge Distillation", arXiv 2112.01528; differs: whole augmented copies
of the training set instead of crops, and full logits instead of compressed ones (they are small beside the images).

On disk: `images.npy` uint8 [V, N, H, W, 3], `logits.npy` float32 [V, N, K], `labels.npy` int64 [N], `targets.json`, and
where a loss needs them `feature-<number>.npy` float16 [V, N, C, H, W], one for each of the record's `features`.
The files are mapped read-only, so worker processes share their pages.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from nas.core.errors import StorageError, TrainingError
from nas.core.jsonio import content_hash, read_record, write_record
from nas.data import Dataset, augmented
from nas.train.features import layer_of, reduced
from nas.train.teacher import Teacher

TARGETS_VERSION = 1
FEATURE_PATTERN = "feature-*.npy"  # of the names of `feature_files`
PREDICT_BATCH = 500
FEATURE_BATCH = 64  # feature maps of a large teacher are megabytes an image


@dataclass(frozen=True, slots=True)
class TargetsInfo:
    """`targets.json`: what the arrays are, and the key of everything that decides them.

    `plain_key` is that of the same answers without features; empty where there are none.
    """

    version: int
    key: str
    variants: int
    images: int
    resolution: int
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    teacher: str
    dataset: str
    features: tuple[str, ...] = ()
    plain_key: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """Cached variants of a training split with the teacher's logits.

    Fields:
        key: content hash of data set, augmentation, teacher, and number of variants.
        images: uint8 [V, N, H, W, 3], mapped from disk.
        logits: float32 [V, N, K], mapped from disk.
        labels: int64 [N].
        mean, std: of the data set, per channel, on the scale 0-1.
        folder: where the files are; `Targets.open(folder)` gives them to another process.
        features: what is kept of the teacher's maps, by name, float16 [V, N, C, H, W], mapped from disk; empty where no
            loss needs them.
        plain_key: `key` of the same answers without features; empty where there are none.
    """

    key: str
    images: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    folder: Path
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    plain_key: str = ""

    @property
    def variants(self) -> int:
        return len(self.images)

    @property
    def answers_key(self) -> str:
        """Key of images, labels and logits, whatever features lie beside them."""
        return self.plain_key or self.key

    @staticmethod
    def open(folder: Path) -> Targets:
        """Maps the files of `make_targets`.

        Raises:
            StorageError: missing or damaged; the message says what to delete.
        """
        try:
            info = read_record(TargetsInfo, folder / "targets.json")
            images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
            logits = np.load(folder / "logits.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / "labels.npy", allow_pickle=False)
            features = {
                name: np.load(folder / file, mmap_mode="r", allow_pickle=False)
                for name, file in zip(info.features, feature_files(info), strict=True)
            }
        except (OSError, ValueError, EOFError, StorageError) as e:
            raise StorageError(
                f"{folder}: cached targets cannot be read: {e}. Delete the folder to compute them again"
            ) from e
        side = info.resolution
        shapes = (
            (info.variants, info.images, side, side, 3),
            (info.variants, info.images, info.classes),
            (info.images,),
        )
        whole = all(f.shape[:2] == shapes[1][:2] and f.ndim == 5 for f in features.values())
        if (images.shape, logits.shape, labels.shape) != shapes or info.version != TARGETS_VERSION or not whole:
            raise StorageError(
                f"{folder}: cached targets do not fit their description. Delete the folder to compute them again"
            )
        return Targets(info.key, images, logits, labels, info.mean, info.std, folder, features, info.plain_key)


def feature_files(info: TargetsInfo) -> tuple[str, ...]:
    """File names of the cached features, in the order of their names."""
    return tuple(f"feature-{number}.npy" for number in range(len(info.features)))


def targets_key(teacher: Teacher, dataset: Dataset, variants: int, seed: int, features: tuple[str, ...] = ()) -> str:
    """Content hash of everything that decides the cached arrays."""
    return content_hash(
        {
            **({"features": features} if features else {}),
            "version": TARGETS_VERSION,
            "dataset": dataset.sha256,
            "augment": dataset.augment,
            "teacher": teacher.sha256,
            "precision": teacher.precision,
            "variants": variants,
            "seed": seed,
        }
    )


def make_targets(
    teacher: Teacher,
    dataset: Dataset,
    variants: int,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    seed: int = 0,
    features: tuple[str, ...] = (),
) -> Targets:
    """Variants of the training images with the teacher's logits, from the cache where they are.

    Args:
        teacher: from `prepare_teacher`.
        dataset: its training split is augmented by its own rules.
        variants: V, number of augmented copies.
        cache_dir: the arrays are kept in `targets/<key>` below it.
        progress: called with (variants done, variants).
        seed: of the augmentation; variant v depends on (seed, v) only.
        features: of `wanted_features`.

    Raises:
        ConfigError: a layer that the teacher does not have.
        StorageError: the cache cannot be read or written.
    """
    key = targets_key(teacher, dataset, variants, seed, features)
    plain_key = targets_key(teacher, dataset, variants, seed) if features else ""
    home = cache_dir / "targets"
    folder = home / key
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(
            f"{home}: cannot be made: {e.strerror or e}. Choose another cache: --set run.cache=DIR"
        ) from e
    with FileLock(home / f"{key}.lock"):  # two runs on one cache: the second waits and finds the files
        if not (folder / "targets.json").exists():
            _sweep(home, key)
            _compute(teacher, dataset, variants, seed, key, folder, features, plain_key, progress)
    if progress is not None:
        progress(variants, variants)
    return Targets.open(folder)


def with_logits(
    base: Targets,
    logits: Callable[[], np.ndarray],
    teacher: str,
    features: Mapping[str, Callable[[int], np.ndarray]] | None = None,
) -> Targets:
    """The same images and labels with the answers of another teacher, beside `base`; from the cache where they are.

    Args:
        base: from `make_targets`; its images take no space a second time where the file system links files.
        logits: gives float32 [V, N, K]; asked only where they are not in the cache.
        teacher: hash of everything that decides these answers.
        features: of those of `base` that this teacher has too, by name: gives float16 [N, C, H, W] of a variant, asked
            as the logits are. The others stay those of `base`.

    Raises:
        StorageError: the cache cannot be read or written.
    """
    key, plain_key = (
        content_hash({"version": TARGETS_VERSION, "base": k, "teacher": teacher}) if k else ""
        for k in (base.key, base.plain_key)
    )
    folder = base.folder.parent / key
    with FileLock(folder.parent / f"{key}.lock"):
        if not (folder / "targets.json").exists():
            _sweep(folder.parent, key)
            found = logits()
            if found.shape != base.logits.shape or not np.isfinite(found).all():
                raise TrainingError(
                    f"answers of a teacher: expected {base.logits.shape}, all finite, got {found.shape}"
                )
            info = read_record(TargetsInfo, base.folder / "targets.json")
            with _new_folder(folder) as temporary:
                files = dict(zip(feature_files(info), info.features, strict=True))
                for file in ("images.npy", "labels.npy", *files):
                    if file in files and features is not None and files[file] in features:
                        _write_variants(temporary / file, features[files[file]], len(found))
                    else:
                        _link(base.folder / file, temporary / file)
                np.save(temporary / "logits.npy", found.astype(np.float32), allow_pickle=False)
                write_record(temporary / "targets.json", replace(info, key=key, teacher=teacher, plain_key=plain_key))
    return Targets.open(folder)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its place when it is whole.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.tmp-"))
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(folder)
    except OSError as e:
        raise StorageError(
            f"{folder}: cached targets cannot be written: {e.strerror or e}. Free space, or choose another cache: "
            "--set run.cache=DIR"
        ) from e


def _write_variants(path: Path, of_variant: Callable[[int], np.ndarray], variants: int) -> None:
    file: np.memmap | None = None
    for v in range(variants):
        part = of_variant(v)
        if file is None:
            file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(variants, *part.shape))
            _take_space(path)
        file[v] = part


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _sweep(home: Path, key: str) -> None:
    """Removes what a killed process left; the lock is held, so nobody is writing it."""
    for left in (*home.glob(f".{key}.tmp-*"), home / key):
        shutil.rmtree(left, ignore_errors=True)


def _compute(
    teacher: Teacher,
    dataset: Dataset,
    variants: int,
    seed: int,
    key: str,
    folder: Path,
    features: tuple[str, ...],
    plain_key: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    train = dataset.train
    count, side, classes = len(train), dataset.resolution, len(dataset.class_names)
    with _new_folder(folder) as temporary:
        shape = (variants, count, side, side, 3)
        images = np.lib.format.open_memmap(temporary / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
        _take_space(temporary / "images.npy")
        logits = np.empty((variants, count, classes), dtype=np.float32)
        answers = _Answers(teacher, features, temporary, (variants, count))
        for v in range(variants):
            images[v] = augmented(train.images, dataset.augment, np.random.default_rng([seed, v]))
            step = FEATURE_BATCH if features else PREDICT_BATCH
            for start in range(0, count, step):
                logits[v, start : start + step] = answers(v, start, images[v, start : start + step])
            if progress is not None:
                progress(v + 1, variants)
        images.flush()
        del images, answers  # what is mapped is written
        np.save(temporary / "logits.npy", logits, allow_pickle=False)
        np.save(temporary / "labels.npy", train.labels, allow_pickle=False)
        info = TargetsInfo(
            TARGETS_VERSION,
            key,
            variants,
            count,
            side,
            classes,
            dataset.mean,
            dataset.std,
            teacher.sha256,
            dataset.sha256,
            features,
            plain_key,
        )
        write_record(temporary / "targets.json", info)


class _Answers:
    """Asks a teacher for logits and writes its features, where these are wanted, into files in passing."""

    def __init__(self, teacher: Teacher, features: tuple[str, ...], folder: Path, shape: tuple[int, int]) -> None:
        self._teacher, self._names, self._folder, self._shape = teacher, features, folder, shape
        self._files: list[np.memmap] = []

    def __call__(self, variant: int, start: int, images: np.ndarray) -> np.ndarray:
        """Logits [B, K] of images uint8 [B, H, W, 3], which are numbers `start` and following of the variant."""
        if not self._names or self._teacher.features is None:
            return self._teacher.predict(images)
        layers = tuple(dict.fromkeys(map(layer_of, self._names)))
        logits, maps = self._teacher.features(images, layers)
        parts = [reduced(name, maps[layer_of(name)]) for name in self._names]
        if not self._files:
            self._files = [self._file(number, part.shape[1:]) for number, part in enumerate(parts)]
        for file, part in zip(self._files, parts, strict=True):
            file[variant, start : start + len(part)] = part
        return logits

    def _file(self, number: int, shape: tuple[int, ...]) -> np.memmap:
        path = self._folder / f"feature-{number}.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(*self._shape, *shape))
        _take_space(path)
        return file


def _take_space(path: Path) -> None:
    """Takes the whole space of a file from its disk: a process whose mapped page finds none is killed without a word.

    Raises:
        OSError: the disk has not so much.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
