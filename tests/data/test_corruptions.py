"""Corruptions of images: they do what they are called, and more so with every severity."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from nas.core.errors import ConfigError
from nas.data import AugmentSettings, DataSettings, augmented, load_dataset
from nas.data.corruptions import CORRUPTIONS, SEVERITIES, corrupted
from nas.data.records import Corruption, Images


@pytest.fixture(scope="module")
def images() -> Images:
    return load_dataset(DataSettings(train_images=24, val_images=2, test_images=2), 32).train.images


def changed(images: Images, name: Corruption, severity: int, seed: int = 0) -> Images:
    return corrupted(images, name, severity, np.random.default_rng(seed))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_severity_changes_images_more_than_the_one_before(images: Images, name: Corruption) -> None:
    before = images.copy()
    errors = [np.abs(changed(images, name, s).astype(float) - images).mean() for s in SEVERITIES]
    assert errors[0] > 0.2
    assert all(a < b for a, b in pairwise(errors))
    assert np.array_equal(before, images)
    assert np.array_equal(changed(images, name, 3), changed(images, name, 3))


def dot(side: int = 33) -> Images:
    image = np.zeros((40, side, side, 3), np.uint8)
    image[:, side // 2, side // 2] = 255
    return image


def test_motion_blurs_along_a_line_and_a_lens_in_a_disc() -> None:
    for name, is_line in (("motion_blur", True), ("defocus_blur", False)):
        found = changed(dot(), name, 5).astype(float)[..., 0]
        for image in found:
            assert image.sum() == pytest.approx(255, rel=0.35)  # up to the rounding of dark pixels
            y, x = (np.indices(image.shape) - 16.0).reshape(2, -1)
            spread = np.cov(np.stack([y, x]), aweights=image.ravel())
            low, high = np.linalg.eigvalsh(spread)
            assert (low < 0.2 * high) == is_line
            assert abs(np.average(y, weights=image.ravel())) < 0.3  # it does not move the picture
    angles = [np.argmax(image.sum(0) > 0) for image in changed(dot(), "motion_blur", 5)[..., 0].astype(int)]
    assert len(set(angles)) > 3  # directions are drawn image by image


def test_blur_leaves_an_even_picture_as_it_is() -> None:
    even = np.full((2, 16, 16, 3), 200, np.uint8)
    for name in ("motion_blur", "defocus_blur"):
        assert np.array_equal(changed(even, name, 5), even)


def test_exposure_goes_both_ways_and_vignetting_darkens_corners_only() -> None:
    grey = np.full((40, 16, 16, 3), 100, np.uint8)
    means = changed(grey, "exposure", 2).mean((1, 2, 3))
    assert means.min() < 90 < 110 < means.max()
    shaded = changed(grey, "vignetting", 5)
    assert (shaded[:, 8, 8] > 95).all()
    assert (shaded[:, 0, 0] < 40).all()


def test_shot_noise_grows_with_the_light() -> None:
    grey = np.stack([np.full((64, 64, 3), v, np.uint8) for v in (20, 200)])
    dark, bright = changed(grey, "noise", 4).std((1, 2, 3))
    assert 1.5 * dark < bright


def test_a_severity_means_the_same_at_every_resolution(images: Images) -> None:
    large = images.repeat(2, 1).repeat(2, 2)
    ratio = [np.abs(changed(x, "defocus_blur", 4).astype(float) - x).mean() for x in (images, large)]
    assert ratio[1] == pytest.approx(ratio[0], rel=0.4)


def test_augmentation_corrupts_its_share_and_leaves_the_other_changes_alone(images: Images) -> None:
    plain = AugmentSettings()
    everything = replace(plain, corruptions=CORRUPTIONS, corrupted_share=0.5, max_severity=5)
    many = np.concatenate([images] * 10)

    def of(settings: AugmentSettings) -> Images:
        return augmented(many, settings, np.random.default_rng(1))

    same = (of(plain) == of(everything)).all((1, 2, 3))
    assert 0.35 < same.mean() < 0.65
    assert np.array_equal(of(plain), of(replace(everything, corrupted_share=0.0)))


def test_unknown_corruptions_and_severities_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.corruptions: each of noise, .* at most once, got \['fog'\]"):
        AugmentSettings(corruptions=("fog",))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.augment\.max_severity must be a whole number from 1 to 5"):
        AugmentSettings(max_severity=6)
