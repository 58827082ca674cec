"""Augmentation: what each change does, and that chance comes from the generator only."""

import numpy as np
import pytest

from nas.core.errors import ConfigError, DataError
from nas.data import AugmentSettings, augmented

NOTHING = AugmentSettings(shift=0, horizontal_flip=False)


def _images(count: int = 40, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _kinds(settings: AugmentSettings, image: np.ndarray, count: int = 200) -> set[bytes]:
    many = np.repeat(image[None], count, axis=0)
    return {result.tobytes() for result in augmented(many, settings, np.random.default_rng(1))}


def test_nothing_allowed_changes_nothing() -> None:
    images = _images()
    assert np.array_equal(augmented(images, NOTHING, np.random.default_rng(0)), images)


def test_the_same_generator_gives_the_same_images_and_the_source_stays() -> None:
    settings = AugmentSettings(quarter_turns=True, brightness=0.3, contrast=0.3, cutout=0.3)
    images = _images(600)
    kept = images.copy()
    first = augmented(images, settings, np.random.default_rng(5))
    assert np.array_equal(first, augmented(images, settings, np.random.default_rng(5)))
    assert not np.array_equal(first, augmented(images, settings, np.random.default_rng(6)))
    assert np.array_equal(images, kept)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (AugmentSettings(shift=0), [lambda a: a, lambda a: a[:, ::-1]]),
        (AugmentSettings(shift=0, horizontal_flip=False, vertical_flip=True), [lambda a: a, lambda a: a[::-1]]),
        (
            AugmentSettings(shift=0, horizontal_flip=False, quarter_turns=True),
            [lambda a, k=k: np.rot90(a, k) for k in range(4)],
        ),
    ],
)
def test_flips_and_turns_give_exactly_these_images(settings: AugmentSettings, changes: list) -> None:
    image = _images(1)[0]
    assert _kinds(settings, image) == {np.ascontiguousarray(change(image)).tobytes() for change in changes}


def test_the_default_never_flips_vertically() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[:16] = 255
    for result in augmented(np.repeat(image[None], 200, axis=0), AugmentSettings(), np.random.default_rng(0)):
        assert result[4].min() == 255 and result[-5].max() == 0


def test_shifts_are_those_of_a_reflected_border() -> None:
    image = _images(1)[0]
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    assert _kinds(AugmentSettings(shift=0.25, horizontal_flip=False), image, 600) == expected


def test_shift_scales_with_the_side() -> None:
    for side, most in ((32, 2), (64, 4)):
        image = np.zeros((side, side, 3), dtype=np.uint8)
        image[:, side // 2] = 255
        results = augmented(
            np.repeat(image[None], 200, axis=0), AugmentSettings(horizontal_flip=False), np.random.default_rng(0)
        )
        columns = results[:, 0, :, 0].argmax(axis=1) - side // 2
        assert set(columns.tolist()) == set(range(-most, most + 1))


def test_brightness_multiplies_and_contrast_keeps_the_mean() -> None:
    images = np.clip(_images(), 90, 160)
    bright = augmented(images, AugmentSettings(0, False, brightness=0.2), np.random.default_rng(0)).astype(float)
    ratio = bright.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.79 < ratio.min() < 0.9 and 1.1 < ratio.max() < 1.21
    spread = augmented(images, AugmentSettings(0, False, contrast=0.3), np.random.default_rng(0)).astype(float)
    assert np.abs(spread.mean((1, 2, 3)) - images.mean((1, 2, 3))).max() < 1
    ratio = spread.std((1, 2, 3)) / images.std((1, 2, 3))
    assert 0.68 < ratio.min() < 0.85 and 1.15 < ratio.max() < 1.32


def test_cutout_sets_one_square_to_the_mean_colour() -> None:
    images = _images(50)
    results = augmented(images, AugmentSettings(0, False, cutout=0.5), np.random.default_rng(0))
    changed = (results != images).any(axis=3)
    for image, result, mask in zip(images, results, changed, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert rows[-1] - rows[0] <= 3 and columns[-1] - columns[0] <= 3
        assert np.all(result[mask] == image.mean(axis=(0, 1)).astype(np.uint8))


def test_a_single_pixel_and_no_image_at_all_work() -> None:
    settings = AugmentSettings(shift=0.5, quarter_turns=True, brightness=0.1, cutout=0.5)
    assert augmented(_images(3, 1), settings, np.random.default_rng(0)).shape == (3, 1, 1, 3)
    assert augmented(_images(0), settings, np.random.default_rng(0)).shape == (0, 8, 8, 3)


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(DataError, match="augmentation needs square images, got 4 x 8 px"):
        augmented(np.zeros((1, 4, 8, 3), dtype=np.uint8), AugmentSettings(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("shift", 0.6, "data.augment.shift must be a number from 0 to 0.5, got 0.6"),
        ("shift", 2, "data.augment.shift must be a number from 0 to 0.5, got 2"),
        ("brightness", float("nan"), "data.augment.brightness must be a number from 0 to 0.9, got nan"),
        ("contrast", -0.1, "data.augment.contrast must be a number"),
        ("cutout", "big", "data.augment.cutout must be a number from 0 to 0.75, got 'big'"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        AugmentSettings(**{name: value})  # type: ignore[arg-type]
