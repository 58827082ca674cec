from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from train_examples import tiny_dataset

from nas.core.errors import DataError
from nas.data import Dataset
from nas.train.settings import SoftLabelFile
from nas.train.soft_labels import read_soft_labels

COUNT = 12


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Images with names, as those of a folder have them."""
    made = tiny_dataset(COUNT, 4, 4)
    return replace(
        made,
        train=replace(made.train, names=tuple(f"train/{i}.png" for i in range(COUNT))),
        val=replace(made.val, names=tuple(f"val/{i}.png" for i in range(4))),
    )


@pytest.fixture
def table(dataset: Dataset) -> np.ndarray:
    """Probabilities that are sure of the label, [N, K]."""
    found = np.full((COUNT, dataset.num_classes), 0.02)
    found[np.arange(COUNT), dataset.train.labels] = 0.82
    return found


def write_csv(path: Path, heading: list[str], rows: list[list[object]]) -> Path:
    path.write_text("\n".join(",".join(map(str, row)) for row in [heading, *rows]) + "\n")
    return path


def read(path: Path, dataset: Dataset, **changes: object) -> np.ndarray:
    return read_soft_labels(SoftLabelFile("lab", str(path), **changes), dataset).logits  # type: ignore[arg-type]


def test_all_forms_give_the_same_whatever_the_order_of_rows_and_classes(
    dataset: Dataset, table: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", table)
    expected = read(tmp_path / "a.npy", dataset)
    np.testing.assert_allclose(np.exp(expected), table, atol=1e-6)
    rows, columns = np.arange(COUNT)[::-1], np.arange(dataset.num_classes)[::-1]
    classes = [dataset.class_names[c] for c in columns]
    turned = table[rows][:, columns]
    names = [f"train/{i}.png" for i in rows]
    np.savez(tmp_path / "b.npz", values=turned, names=names, classes=classes)
    np.savez(tmp_path / "c.npz", values=turned, index=rows, classes=classes)
    cells = [[name, *line] for name, line in zip([*names, "val/0.png"], [*turned, turned[0]], strict=True)]
    write_csv(tmp_path / "d.csv", ["name", *classes], cells)
    write_csv(tmp_path / "e.csv", ["index", *classes], [[i, *line] for i, line in zip(rows, turned, strict=True)])
    for name in ("b.npz", "c.npz", "d.csv", "e.csv"):
        np.testing.assert_array_equal(read(tmp_path / name, dataset), expected, err_msg=name)


def test_logits_stay_as_they_are_and_agreement_is_told(dataset: Dataset, table: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", 7 * table - 3)
    found = read_soft_labels(SoftLabelFile("lab", str(tmp_path / "a.npy"), values="logits"), dataset)
    np.testing.assert_allclose(found.logits, 7 * table - 3, rtol=1e-6)
    assert found.agreement == 1.0
    assert found.about == "a.npy, 12 of 12 training images, likeliest class right in 100.0%"


def _with(value: float, row: int = 5, column: int = 0) -> object:
    def change(table: np.ndarray) -> np.ndarray:
        table = table.copy()
        table[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(np.nan), r"teacher.files \(lab\): .*a.npy: row 5: a value is not finite"),
        (_with(-0.1), r"row 5: a probability must be from 0 to 1, got -0.1; of logits say so: values: logits"),
        (_with(0.9, column=9), r"row 5: the probabilities sum to 1.\d+, not 1"),
        (lambda t: 2 * t, r"row 0 and 11 more: a probability must be"),
        (lambda t: t[:-1], r"11 rows; the training split has 12 images.*\.csv or \.npz"),
        (lambda t: t[:, 1:], r"9 columns; the data set has 10 classes: ok, scratch"),
        (lambda t: t[0], r"expected numbers \[images, classes\], got float64 \[10\]"),
        (lambda t: t.astype(str), r"expected numbers \[images, classes\], got <U"),
        (lambda t: t.astype(object), r"is no array of numbers .*numpy.save"),
    ],
)
def test_what_is_wrong_with_an_array_is_told_with_its_row(
    dataset: Dataset, table: np.ndarray, tmp_path: Path, change: object, message: str
) -> None:
    np.save(tmp_path / "a.npy", change(table))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.npy", dataset)


def test_what_is_wrong_with_rows_and_headings_of_a_csv_file_is_told(
    dataset: Dataset, table: np.ndarray, tmp_path: Path
) -> None:
    classes = list(dataset.class_names)
    good = [[f"train/{i}.png", *line] for i, line in enumerate(table)]

    def message(heading: list[str], rows: list[list[object]]) -> str:
        with pytest.raises(DataError) as caught:
            read(write_csv(tmp_path / "a.csv", heading, rows), dataset)
        return str(caught.value).partition("a.csv: ")[2]

    named = ["name", *classes]
    assert message(["file", *classes], good).startswith("line 1: the heading must be 'name' or 'index'")
    assert "unknown ['scratsh'], missing ['scratch']; did you mean 'scratch'?" in message(
        ["name", classes[0], "scratsh", *classes[2:]], good
    )
    assert message(named, [*good[:3], good[3][:-1], *good[4:]]) == "line 5: 10 cells, the heading has 11"
    assert message(named, [["train/0.png", "much", *good[0][2:]]]) == (
        "line 2 (train/0.png): expected a number, got 'much'"
    )
    assert message(named, [*good, good[4]]) == "line 14 (train/4.png): this image has a row already"
    assert "2 of 12 training images are missing, such as train/10.png, train/11.png" in message(named, good[:10])
    assert "line 2 (train/0.jpg): no such image in the data set; did you mean 'train/0.png'?" in message(
        named, [["train/0.jpg", *table[0]], *good[1:]]
    )
    assert message(["index", *classes], [["12", *table[0]]]) == "line 2: index 12 is outside 0 to 11"
    assert message(["index", *classes], [["-1", *table[0]]]).endswith("a whole number from 0, got '-1'")
    assert message(named, [[f"val/{i}.png", *table[i]] for i in range(4)]) == "holds none of the 12 training images"


def test_a_partial_file_may_miss_images(dataset: Dataset, table: np.ndarray, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", values=table[:4], index=np.arange(4))
    found = read_soft_labels(SoftLabelFile("lab", str(tmp_path / "a.npz"), partial=True), dataset)
    assert found.has.tolist() == [True] * 4 + [False] * 8


def test_files_that_are_not_there_or_of_another_kind_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.npz").write_bytes(b"PK not really")
    (tmp_path / "empty.csv").write_text("")
    np.savez(tmp_path / "b.npz", probabilities=np.zeros((2, 2)))
    for name, message in {
        "a.txt": r"read from \.csv, \.npy, \.npz files, got '\.txt'",
        "none.csv": r"cannot be read: .*No such file.*teacher\.without",
        "a.npz": r"cannot be read|is no array",
        "empty.csv": r"line 1: the heading must be",
        "b.npz": r"expected the arrays 'values'.*got \['probabilities'\]",
    }.items():
        with pytest.raises(DataError, match=message):
            read(tmp_path / name, dataset)
