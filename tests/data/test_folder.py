"""Image folders: layouts, and every fault that real folders have."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nas.core.errors import DataError
from nas.data import DataFolderError, Dataset, DataSettings, load_dataset


def _png(number: int) -> bytes:
    """A small picture that no other number gives."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _fill(root: Path, counts: dict[str, int], first: int = 0) -> None:
    """Folder `root/<class>` with so many pictures each; classes may be paths such as "train/a"."""
    for place, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / f"{i:03d}.png").write_bytes(_png(first + 1000 * place + i))


def _load(root: Path, resolution: int = 8, **settings: object) -> Dataset:
    return load_dataset(DataSettings(name="folder", path=str(root), **settings), resolution)  # type: ignore[arg-type]


def _notes(dataset: Dataset) -> str:
    return "\n".join(dataset.warnings)


def _sizes(dataset: Dataset) -> tuple[int, int, int]:
    return len(dataset.train), len(dataset.val), len(dataset.test)


def _all_names(dataset: Dataset) -> list[str]:
    return [name for split in (dataset.train, dataset.val, dataset.test) for name in split.names or ()]


# Layouts


def test_three_given_splits_are_used_as_they_are(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 3})
    dataset = _load(tmp_path)
    assert _sizes(dataset) == (8, 4, 6) and dataset.warnings == ()
    assert dataset.class_names == ("a", "b")
    assert dataset.train.names is not None and dataset.train.names[0] == "train/a/000.png"
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_without_test_the_given_val_is_the_test_split(tmp_path: Path, name: str) -> None:
    _fill(tmp_path, {"train/a": 20, "train/b": 20, f"{name}/a": 5, f"{name}/b": 5})
    dataset = _load(tmp_path)
    assert _sizes(dataset) == (34, 6, 10)
    assert all(image.startswith(name) for image in dataset.test.names or ())
    assert np.bincount(dataset.val.labels).tolist() == [3, 3]
    assert "The given val split is used as the test split; the search-validation split is taken from train" in _notes(
        dataset
    )
    assert "34 train, 6 search validation, 10 test images" in _notes(dataset)


def test_train_and_test_give_search_validation_from_train(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5})
    dataset = _load(tmp_path, val_share=0.3)
    assert _sizes(dataset) == (14, 6, 10)


def test_an_undivided_folder_is_divided_class_by_class(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 20, "b": 40})
    dataset = _load(tmp_path)
    assert _sizes(dataset) == (42, 9, 9)
    assert np.bincount(dataset.test.labels).tolist() == [3, 6]
    assert len(set(_all_names(dataset))) == 60
    assert "The set is not divided" in _notes(dataset)
    assert _load(tmp_path).sha256 == dataset.sha256
    assert _load(tmp_path, seed=1).val.names != dataset.val.names


def test_in_order_validation_has_the_last_names_of_each_class(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 20, "b": 20})
    dataset = _load(tmp_path, division="order")
    for label in "ab":
        splits = (dataset.train, dataset.val, dataset.test)
        train, val, test = ([n for n in split.names or () if n.startswith(label)] for split in splits)
        assert max(train) < min(val) <= max(val) < min(test)
    assert "class by class (the last ones by name): 28 train, 6 search validation, 6 test images" in _notes(dataset)
    assert _load(tmp_path, division="order", seed=1).sha256 == dataset.sha256


def test_images_below_a_folder_called_images_are_found(tmp_path: Path) -> None:
    _fill(tmp_path, {f"{split}/images/{label}": 4 for split in ("train", "val") for label in "ab"})
    (tmp_path / "train" / "annotations").mkdir()
    (tmp_path / "train" / "annotations" / "a_1.xml").write_text("<annotation/>")
    dataset = _load(tmp_path)
    assert dataset.class_names == ("a", "b") and _sizes(dataset) == (6, 2, 8)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    _fill(tmp_path, {"bus": 8, "train": 8, "tram": 8})
    assert _load(tmp_path).class_names == ("bus", "train", "tram")


def test_images_in_deeper_folders_and_through_links_are_found_once(tmp_path: Path) -> None:
    _fill(tmp_path / "set", {"a/camera 1": 4, "b": 4})
    _fill(tmp_path / "elsewhere", {"c": 4}, first=5000)
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set" / "a", target_is_directory=True)
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere" / "c", target_is_directory=True)
    dataset = _load(tmp_path / "set")
    assert dataset.class_names == ("a", "b", "c") and sum(_sizes(dataset)) == 12


def test_unlabelled_test_images_are_left_out_with_a_warning(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 8, "train/b": 8, "val/a": 2, "val/b": 2, "test": 3})
    dataset = _load(tmp_path)
    assert "test holds no class folders (images without labels?) and is not used" in _notes(dataset)
    assert all(name.startswith("val") for name in dataset.test.names or ())


# Folders that cannot be used


def test_a_missing_folder_is_an_error_with_the_closest_name(tmp_path: Path) -> None:
    (tmp_path / "steel").mkdir()
    with pytest.raises(
        DataFolderError, match=r"data\.path: .*stell does not exist; did you mean 'steel'\?.*--set data\.path=DIR"
    ):
        _load(tmp_path / "stell")


def test_a_missing_folder_is_a_mistake_of_usage() -> None:
    assert DataFolderError("x").exit_code == 2 and issubclass(DataFolderError, DataError)


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataFolderError, match=r"no class folders; it is empty; expected DIR/train/<class>/\*"):
        _load(tmp_path)


def test_a_folder_of_loose_images_says_what_was_found(tmp_path: Path) -> None:
    _fill(tmp_path.parent, {tmp_path.name: 9})
    with pytest.raises(DataFolderError, match=r"no class folders; found 000\.png, 001\.png.* and 1 more; expected DIR"):
        _load(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataFolderError, match=r"set\.zip is a file; expected .* Unpack it first"):
        _load(tmp_path / "set.zip")


def test_no_path_at_all() -> None:
    with pytest.raises(
        DataFolderError, match=r"data\.path: missing for data\.name 'folder'\. Add --set data\.path=DIR"
    ):
        load_dataset(DataSettings(name="folder"), 8)


def test_class_folders_without_images(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
    with pytest.raises(DataFolderError, match="no images; found train/; expected DIR"):
        _load(tmp_path)


def test_val_and_test_without_train(tmp_path: Path) -> None:
    _fill(tmp_path, {"val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    with pytest.raises(DataFolderError, match="no class folders; found test/, val/; expected DIR/train"):
        _load(tmp_path)


def test_two_validation_folders(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1})
    with pytest.raises(DataFolderError, match=r"holds both val and valid\. Keep one as val"):
        _load(tmp_path)


def test_a_val_folder_without_classes(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 4, "train/b": 4, "val": 3})
    with pytest.raises(DataFolderError, match=r"val: no class folders; found 000\.png"):
        _load(tmp_path)


def test_a_single_class(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5})
    with pytest.raises(DataError, match="only one class, 'a': there is nothing to tell apart"):
        _load(tmp_path)


# Broken files


def _break(root: Path) -> None:
    (root / "a" / "000.png").write_bytes(b"")
    (root / "a" / "001.png").write_bytes(_png(1)[:90])
    (root / "b" / "page.jpg").write_bytes(b"<html>not found</html>")


def test_many_broken_files_stop_and_all_are_listed(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 10})
    _break(tmp_path)
    with pytest.raises(DataError) as caught:
        _load(tmp_path)
    text = str(caught.value)
    assert "3 of 21 image files cannot be read (14.3%, allowed 1.0%)" in text
    assert "\n  a/000.png: empty file" in text
    assert "\n  a/001.png: broken image: " in text
    assert "\n  b/page.jpg: not an image" in text
    assert "--set data.max_corrupt_share=SHARE" in text


def test_few_broken_files_are_left_out_with_a_warning(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 10})
    _break(tmp_path)
    dataset = _load(tmp_path, max_corrupt_share=0.2)
    assert sum(_sizes(dataset)) == 18
    assert not {"a/000.png", "a/001.png", "b/page.jpg"} & set(_all_names(dataset))
    assert "3 image files cannot be read and are left out:\n  a/000.png: empty file" in _notes(dataset)


def test_broken_links_and_pipes_are_broken_files(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    notes = _notes(_load(tmp_path, max_corrupt_share=0.2))
    assert "a/link.png: cannot be read: No such file" in notes and "a/pipe.png: not a regular file" in notes


def test_files_beside_the_images_are_named_and_not_counted_as_broken(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 5})
    for name in ("000.xml", "README", ".DS_Store", "Thumbs.db"):
        (tmp_path / "a" / name).write_text("not a picture")
    (tmp_path / "b" / "without_extension").write_bytes(_png(777))
    dataset = _load(tmp_path)
    assert "b/without_extension" in _all_names(dataset) and sum(_sizes(dataset)) == 11
    assert "1 files are not images by their names and are not used:\n  a/000.xml" in _notes(dataset)
    assert "1 files without an extension are not images and are not used:\n  a/README" in _notes(dataset)
    assert "Thumbs" not in _notes(dataset)


def test_nothing_readable_is_left_of_a_class(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 1})
    (tmp_path / "b" / "000.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no usable training image is left of: b"):
        _load(tmp_path, max_corrupt_share=0.5)


# Classes


def test_classes_missing_in_val_or_test_are_warned_about(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 2, "test/a": 2, "test/b": 2})
    assert "The search validation split holds no image of: b. Accuracy says nothing about them." in _notes(
        _load(tmp_path)
    )


def test_classes_are_matched_by_name_not_by_order(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 2, "train/b": 2, "train/c": 2, "val/c": 2, "test/b": 1, "test/c": 2})
    dataset = _load(tmp_path)
    assert dataset.val.labels.tolist() == [2, 2] and dataset.test.labels.tolist() == [1, 2, 2]


def test_classes_that_train_lacks_are_an_error_with_the_closest_name(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/scratch": 4, "train/dent": 4, "val/scratches": 2, "val/dent": 2})
    with pytest.raises(
        DataError,
        match=r"val has classes without training images: 'scratches'; did you mean 'scratch'\?.*dent, scratch",
    ):
        _load(tmp_path)


def test_a_class_of_one_image_stays_in_train_and_is_reported(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 1})
    dataset = _load(tmp_path)
    assert dataset.train.labels.tolist().count(1) == 1
    assert "A single training image is all there is of: b." in _notes(dataset)
    assert "The test split holds no image of: b." in _notes(dataset)


def test_one_image_per_class_leaves_nothing_to_validate_on(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 1, "b": 1})
    with pytest.raises(DataError, match="no image is left for search validation"):
        _load(tmp_path)


def test_an_empty_class_folder_is_no_class(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 5, "c": 0})
    dataset = _load(tmp_path)
    assert dataset.class_names == ("a", "b") and "1 folders hold no image and are not classes: c." in _notes(dataset)


# Copies


def test_training_images_that_are_also_tested_are_left_out_of_train(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 10, "train/b": 10, "test/a": 5, "test/b": 5})
    (tmp_path / "train" / "a" / "copy.png").write_bytes((tmp_path / "test" / "a" / "000.png").read_bytes())
    dataset = _load(tmp_path)
    assert (
        "1 images of test are also in train and are left out of train:\n  train/a/copy.png = test/a/000.png"
        in _notes(dataset)
    )
    assert "train/a/copy.png" not in _all_names(dataset) and "test/a/000.png" in _all_names(dataset)


def test_a_test_split_copied_from_train_is_an_error(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 4, "val/b": 4})
    for path in (tmp_path / "train").rglob("*.png"):
        (tmp_path / "val" / path.relative_to(tmp_path / "train")).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="8 of 8 images of val are also in train, so its figures would mean nothing"):
        _load(tmp_path)


def test_copies_stay_on_one_side_of_our_own_division(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 10})
    for path in list(tmp_path.rglob("*.png")):
        path.with_name(f"copy of {path.name}").write_bytes(path.read_bytes())
    dataset = _load(tmp_path)
    sides = [{image.tobytes() for image in split.images} for split in (dataset.train, dataset.val, dataset.test)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert "Files that are copies of another file of their class and split: 20." in _notes(dataset)


def test_one_picture_with_two_labels_is_reported(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 10, "b": 10})
    (tmp_path / "b" / "same.png").write_bytes((tmp_path / "a" / "003.png").read_bytes())
    notes = _notes(_load(tmp_path))
    assert "1 identical files carry different labels" in notes and "a/003.png = b/same.png" in notes


# Names, identity, properties


def test_unicode_space_newline_and_quote_names_work(tmp_path: Path) -> None:
    root = tmp_path / "ñ 目录"
    _fill(root, {"tür auf": 5, "$(touch x)": 5})
    (root / "tür auf" / "line\nbreak 'q'.png").write_bytes(_png(99))
    dataset = _load(root)
    assert dataset.name == "ñ 目录" and dataset.class_names == ("$(touch x)", "tür auf")
    assert any("line\\nbreak" in name for name in _all_names(dataset))
    assert all(name.isprintable() for name in _all_names(dataset))


def test_file_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 5})
    (Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png"))).write_bytes(_png(99))
    assert any("\\xff" in name for name in _all_names(_load(tmp_path)))


def test_unicode_folders_work_in_the_c_locale(tmp_path: Path) -> None:
    _fill(tmp_path / "ñ 目录", {"tür": 5, "b": 5})
    program = (
        "import sys; from nas.data import DataSettings, load_dataset; "
        "print(load_dataset(DataSettings(name='folder', path=sys.argv[1]), 8).class_names)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "ñ 目录")]
    done = subprocess.run(command, env={"LC_ALL": "C"}, capture_output=True, check=True)
    assert done.stdout.decode() == "('b', 'tür')\n"


def test_class_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 5})
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).mkdir()
    with pytest.raises(DataError, match=r"\\xff: the name of a class folder must be valid UTF-8. Rename it"):
        _load(tmp_path)


def test_identity_follows_content_and_not_names_or_places(tmp_path: Path) -> None:
    _fill(tmp_path / "one", {"a": 6, "b": 6})
    _fill(tmp_path / "two", {"a": 6, "b": 6})
    first = _load(tmp_path / "one")
    assert _load(tmp_path / "two").sha256 == first.sha256 and len(first.sha256) == 64
    assert _load(tmp_path / "one", resolution=16).sha256 != first.sha256
    (tmp_path / "two" / "a" / "000.png").write_bytes(_png(4242))
    assert _load(tmp_path / "two").sha256 != first.sha256


def test_statistics_come_from_the_training_images_only(tmp_path: Path) -> None:
    _fill(tmp_path, {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 3})
    dataset = _load(tmp_path)
    assert dataset.mean == pytest.approx(dataset.train.images.mean((0, 1, 2)) / 255)
    assert dataset.std == pytest.approx(dataset.train.images.std((0, 1, 2)) / 255)


def test_enlarged_and_dark_16_bit_images_are_reported(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(5):
            values = np.random.default_rng(i).integers(0, 4096, (8, 8), dtype=np.uint16)
            Image.fromarray(values).save(tmp_path / label / f"{label}{i}.png")
    notes = _notes(_load(tmp_path, resolution=16))
    assert "10 of 10 images are smaller than 16 px and are enlarged." in notes
    assert "10 images have 16 bits but no value above 40" in notes


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 5, "b": 5})
    seen: list[tuple[int, int]] = []
    load_dataset(DataSettings(name="folder", path=str(tmp_path)), 8, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)
