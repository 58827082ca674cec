"""Real photographs, where they are at hand: NEU-DET, six classes of steel defects."""

import os
from pathlib import Path

import numpy as np

from nas.data import DataSettings, load_dataset
from nas.testing import requires_path

SHARED = Path(os.environ.get("NAS_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_neu_det_is_read_with_its_usual_split() -> None:
    path = requires_path(SHARED / "neu-det", "the NEU-DET photographs (set NAS_SHARED_DATA to the folder with neu-det)")
    dataset = load_dataset(DataSettings(name="folder", path=str(path)), 64)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (1224, 216, 360)
    assert dataset.class_names == ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
    assert np.bincount(dataset.val.labels).tolist() == [36] * 6
    assert np.bincount(dataset.test.labels).tolist() == [60] * 6
    assert np.array_equal(dataset.train.images[..., 0], dataset.train.images[..., 2])
    assert any("val split is used as the test split" in warning for warning in dataset.warnings)
