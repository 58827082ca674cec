"""Batches of cached targets, where a network is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nas.train.evaluate import normalised, raw_tensor
from nas.train.targets import Targets

RESIDENT_SHARE = 0.25  # of a GPU's free memory: other workers and the maps of a batch need the rest


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step learns from, all on one device.

    Fields:
        images: normalised, or raw where that was wanted, float32 [B, 3, H, W], channels last.
        logits: of the teacher, float32 [B, K].
        labels: int64 [B].
        features: of the teacher by name, float32 [B, C, h, w].
    """

    images: Tensor
    logits: Tensor
    labels: Tensor
    features: dict[str, Tensor]


class Feed:
    """Batches of cached targets where a network is trained.

    On a GPU a whole variant is kept there while it is used, where a quarter of the free memory holds it: images travel
    once an epoch, as bytes. Else, and on processors, each batch is read from the files.

    Args:
        targets: cached variants.
        features: those of its features that are wanted, by name.
        device: where batches are needed.
        free_bytes: of that device; asked before a variant is kept there. Tests set it.
        is_raw: images are wanted as raw pixels 0-255.
    """

    def __init__(
        self,
        targets: Targets,
        features: Mapping[str, np.ndarray],
        device: torch.device,
        free_bytes: Callable[[torch.device], int] | None = None,
        *,
        is_raw: bool = False,
    ) -> None:
        self._targets, self._features, self.device = targets, features, device
        self._free_bytes = free_bytes or _free_bytes
        self._is_raw = is_raw
        self._variant = -1
        self._kept: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]] | None = None

    def batch(self, variant: int, index: np.ndarray) -> Batch:
        """Images of one variant by their numbers, in rising order.

        The order inside a batch means nothing, and a sorted gather reads the file forwards.
        """
        index = np.sort(index)
        if variant != self._variant:
            self._keep(variant)
        targets = self._targets
        if self._kept is not None:
            images, logits, labels, features = self._kept
            place = torch.from_numpy(index).to(self.device)
            return Batch(
                self._input(images[place]),
                logits[place],
                labels[place],
                {name: kept[place].float() for name, kept in features.items()},
            )
        return Batch(
            self._input(targets.images[variant][index]),
            torch.from_numpy(targets.logits[variant][index]).to(self.device),
            torch.from_numpy(targets.labels[index]).to(self.device),
            {n: torch.from_numpy(f[variant][index]).to(self.device).float() for n, f in self._features.items()},
        )

    def _input(self, images: np.ndarray | Tensor) -> Tensor:
        if self._is_raw:
            return raw_tensor(images, self.device)
        return normalised(images, self._targets.mean, self._targets.std, self.device)

    def _keep(self, variant: int) -> None:
        self._variant, self._kept = variant, None
        targets = self._targets
        arrays = [targets.images[variant], targets.logits[variant], targets.labels]
        features = {name: cached[variant] for name, cached in self._features.items()}
        if sum(a.nbytes for a in (*arrays, *features.values())) > RESIDENT_SHARE * self._free_bytes(self.device):
            return
        images, logits, labels = (torch.tensor(a, device=self.device) for a in arrays)
        self._kept = images, logits, labels, {n: torch.tensor(f, device=self.device) for n, f in features.items()}


def _free_bytes(device: torch.device) -> int:
    """Memory into which a variant may be copied: none on processors, which read the mapped files as fast."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
