"""Images per second: the generated defects at 32, 48 and 64 px, decoding an image folder, augmenting.

CPU time of one process; the folder is also timed by the wall, because decoding uses several threads.
Run: python -m benchmarks.data [--json] [--images N] [--repeats N]
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common import parser, report, spread
from nas.data import AugmentSettings, DataSettings, augmented, load_dataset
from nas.data.defects import CLASS_NAMES, generate

SIDE_PX = 200  # of the files that are decoded, as in NEU-DET


def rates(work: Callable[[], Any], images: int, repeats: int, clock: Callable[[], float]) -> dict[str, float | int]:
    """Images per second of each repeat, after one that is not counted."""
    work()
    values = []
    for _ in range(repeats):
        start = clock()
        work()
        values.append(images / (clock() - start))
    return spread(values)


def write_folder(folder: Path, images: int) -> None:
    """JPEG files of generated defects, enlarged, as DIR/<class>/*."""
    split = generate("train", images, 64)
    for index, (pixels, label) in enumerate(zip(split.images, split.labels, strict=True)):
        place = folder / CLASS_NAMES[label]
        place.mkdir(exist_ok=True)
        large = Image.fromarray(pixels).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        large.save(place / f"{index}.jpg", quality=90)


def main() -> None:
    """Prints a table, or with --json one object last."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=2000, help="images per repeat (default 2000)")
    options.add_argument("--repeats", type=int, default=5, help="timed repeats per line (default 5)")
    args = options.parse_args()
    images, repeats = args.images, args.repeats

    figures: dict[str, dict[str, float | int]] = {}
    for side in (32, 48, 64):
        work = partial(generate, "train", images, side)
        figures[f"generate {side} px, per CPU second"] = rates(work, images, repeats, time.process_time)
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), images)
        settings = DataSettings(name="folder", path=name)
        load = partial(load_dataset, settings, 64)
        title = f"folder of {SIDE_PX} px JPEG at 64 px, per"
        figures[f"{title} CPU second"] = rates(load, images, repeats, time.process_time)
        figures[f"{title} second"] = rates(load, images, repeats, time.perf_counter)
    small = generate("train", images, 32).images
    every = AugmentSettings(quarter_turns=True, brightness=0.2, contrast=0.2, cutout=0.2)
    for title, augment in (("shift and flip", AugmentSettings()), ("every change", every)):
        change = partial(augmented, small, augment, np.random.default_rng(0))
        figures[f"augment 32 px, {title}, per CPU second"] = rates(change, images, repeats, time.process_time)

    rows = [(name, value["median"], value["min"], value["max"]) for name, value in figures.items()]
    columns = ("images per second", "median", "min", "max")
    report(f"{images} images, {repeats} repeats", columns, rows, {"images": images, "figures": figures}, args.json)


if __name__ == "__main__":
    main()
