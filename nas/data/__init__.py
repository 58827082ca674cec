"""Data sets: the embedded surface defects, image folders and published sets, their decoding and augmentation."""

from nas.data.augment import augmented
from nas.data.decode import decode_image
from nas.data.load import load_dataset
from nas.data.records import (
    AugmentSettings,
    DataFolderError,
    Dataset,
    DataSettings,
    Split,
    channel_statistics,
    even_places,
    evenly,
)
from nas.data.torchvision_sets import published_names

__all__ = [
    "AugmentSettings",
    "DataFolderError",
    "DataSettings",
    "Dataset",
    "Split",
    "augmented",
    "channel_statistics",
    "decode_image",
    "even_places",
    "evenly",
    "load_dataset",
    "published_names",
]
