"""The generated surface defects: the same picture for ever, at every resolution, with right labels and boxes."""

import dataclasses

import numpy as np
import pytest

from nas.core.errors import ConfigError
from nas.data import defects
from nas.data.defects import CLASS_NAMES, draw_scenes, generate, render


def test_the_sample_has_the_stored_hash() -> None:
    # A failure means other pictures: raise GENERATOR_VERSION and store the new hash, or find what changed them.
    assert defects.sample_sha256() == defects.SAMPLE_SHA256


def test_image_i_does_not_depend_on_how_many_are_drawn() -> None:
    many = generate("train", 150, 32)
    few = generate("train", 40, 32)
    assert np.array_equal(many.images[:40], few.images)
    assert np.array_equal(many.labels[:40], few.labels)
    alone = render(draw_scenes("train", np.array([137])), 32)
    assert np.array_equal(alone.images[0], many.images[137])
    assert many.boxes is not None and alone.boxes is not None
    assert np.array_equal(alone.boxes[0], many.boxes[137])


def test_splits_and_seeds_share_no_image() -> None:
    drawn = [generate("train", 50, 32), generate("val", 50, 32), generate("test", 50, 32), generate("train", 50, 32, 1)]
    pictures = {image.tobytes() for split in drawn for image in split.images}
    assert len(pictures) == 200


@pytest.mark.parametrize("large", [48, 64])
def test_every_resolution_shows_the_same_scene(large: int) -> None:
    scene = draw_scenes("val", np.arange(120))
    still = dataclasses.replace(scene, noise=np.zeros_like(scene.noise))  # sensor noise belongs to the pixels
    small = render(still, 16).images.astype(float)
    step = large // 16
    averaged = render(still, large).images.reshape(120, 16, step, 16, step, 3).mean(axis=(2, 4))
    assert np.abs(averaged - small).mean() < 2.0  # grey levels of 255
    assert np.array_equal(render(scene, 16).labels, render(scene, large).labels)


def test_float32_and_float64_pictures_agree_within_one_grey_level() -> None:
    scene = draw_scenes("train", np.arange(100))
    fast, exact = render(scene, 32).images.astype(int), render(scene, 32, np.float64).images.astype(int)
    assert np.abs(fast - exact).max() <= 1
    assert np.mean(fast != exact) < 1e-3


def test_classes_are_about_equally_frequent_and_difficulty_has_the_stated_spread() -> None:
    scene = draw_scenes("train", np.arange(20_000))
    shares = np.bincount(scene.label, minlength=10) / 20_000
    assert np.all(np.abs(shares - 0.1) < 0.01)
    assert scene.difficulty.max() < defects.MAX_DIFFICULTY
    assert np.quantile(scene.difficulty, [0.1, 0.5, 0.9]) == pytest.approx([0.09, 0.36, 0.64], abs=0.02)


def test_boxes_enclose_the_defect_and_are_zero_for_ok() -> None:
    split = generate("train", 600, 32)
    assert split.boxes is not None
    left, top, right, bottom = split.boxes.T
    is_ok = split.labels == CLASS_NAMES.index("ok")
    assert np.all(split.boxes[is_ok] == 0)
    found = ~is_ok
    assert np.all((left < right)[found] & (top < bottom)[found])
    assert split.boxes.min() >= 0 and split.boxes.max() <= 32
    hole = split.labels == CLASS_NAMES.index("hole")
    width = (right - left)[hole]
    assert width.min() > 2 * 0.07 * 32 * 0.8 and width.max() < 2 * 0.17 * 32 * 1.2 + 2


def test_boxes_scale_with_the_resolution() -> None:
    scene = draw_scenes("test", np.arange(200))
    small, large = render(scene, 32).boxes, render(scene, 64).boxes
    assert small is not None and large is not None
    assert np.quantile(np.abs(small * 2 - large), 0.95) <= 2.0


def _easy(label: str, count: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Images of one class with little difficulty as grey [N, 32, 32], and their boxes."""
    scene = draw_scenes("train", np.arange(count))
    scene = scene.take(np.flatnonzero((scene.label == CLASS_NAMES.index(label)) & (scene.difficulty < 0.2)))
    split = render(scene, 32)
    assert split.boxes is not None
    return split.images.mean(axis=3), split.boxes.astype(int)


def _lower_minus_upper(label: str) -> np.ndarray:
    images, boxes = _easy(label)
    halves = []
    for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
        middle = (top + bottom) // 2
        halves.append(image[middle:bottom, left:right].mean() - image[top:middle, left:right].mean())
    return np.array(halves)


def test_dents_are_dark_above_and_bumps_bright_above() -> None:
    assert np.mean(_lower_minus_upper("dent") > 0) > 0.97
    assert np.mean(_lower_minus_upper("bump") < 0) > 0.97


@pytest.mark.parametrize(("label", "brighter"), [("dust", True), ("pits", False), ("hole", False)])
def test_polarity_of_dots_and_holes(label: str, brighter: bool) -> None:
    images, boxes = _easy(label)
    inside = [image[t:b, x:r] for image, (x, t, r, b) in zip(images, boxes, strict=True)]
    surface = np.median(images, axis=(1, 2))
    extreme = [part.max() - s if brighter else s - part.min() for part, s in zip(inside, surface, strict=True)]
    opposite = [s - part.min() if brighter else part.max() - s for part, s in zip(inside, surface, strict=True)]
    assert np.mean(np.array(extreme) > np.array(opposite)) > 0.9


def test_no_picture_is_blank_or_saturated() -> None:
    images = generate("train", 500, 32).images
    assert np.all(images.reshape(500, -1).std(axis=1) > 2)
    assert np.mean((images == 0) | (images == 255)) < 0.05


@pytest.mark.parametrize("resolution", [8, 31, 100])
def test_any_side_works(resolution: int) -> None:
    split = generate("train", 40, resolution)
    assert split.images.shape == (40, resolution, resolution, 3)
    assert split.boxes is not None and split.boxes.max() <= resolution


def test_unknown_split_and_resolution_are_refused() -> None:
    with pytest.raises(ConfigError, match="split must be one of train, val, test, got 'dev'"):
        generate("dev", 1, 32)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="resolution must be a whole number from 8 to 1024, got 4"):
        generate("train", 1, 4)
