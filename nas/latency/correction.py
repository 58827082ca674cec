"""What measured networks taught about a table, as it is stored beside the rows: evidence, numbers, how sure they are.

Raw rows are never changed. One fit per precision label (fp32, int8, mixed, ...): their errors have different causes.
The numbers are for people, for other programs and for `written_back`; a search fits them anew from the networks that
are named here (`nas.latency.fitting`), which takes milliseconds and gives the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nas.core.errors import RecordError

Method = Literal["scale", "bayes"]

CORRECTION_VERSION = 4


@dataclass(frozen=True, slots=True)
class NetworkEvidence:
    """A measured network in a fit: the plain sum of its rows, what was measured, and what the other networks say of it.

    `left_out_ms` and `left_out_std_ms` are the estimate of a fit without it, None where it is the only one. `outlier`
    is how many times its noise was inflated, because it does not agree with the others or was disturbed; 1 for most.
    """

    key: str
    sum_ms: float
    measured_ms: float
    stable: bool
    left_out_ms: float | None = None
    left_out_std_ms: float | None = None
    outlier: float = 1.0

    def __post_init__(self) -> None:
        if not (self.sum_ms > 0 and self.measured_ms > 0):
            raise RecordError(f"network {self.key}: times must be positive")


@dataclass(frozen=True, slots=True)
class Finding:
    """What a fit says of one thing, with its standard deviation."""

    name: str
    value: float
    std: float


@dataclass(frozen=True, slots=True)
class PrecisionFit:
    """Correction of one precision label.

    Attributes:
        precision: fp32, int8, mixed, ...
        method: `scale` where there are too few networks to tell more.
        reason: why this method, for people.
        scale: the median of measured / sum.
        constant: relative change of everything on top of the scale.
        groups: relative change of the rows of an operator group on top of that.
        costs: what no row contains, ms each: a call, a layer, a megabyte of weights, a decision at an exit, a change of
            precision between layers.
        rows: corrected / raw time of each row that the networks contain.
        error: relative standard deviation of what is left, noise of measuring included.
        networks: the evidence.
    """

    precision: str
    method: Method
    reason: str
    scale: float
    constant: Finding
    groups: tuple[Finding, ...]
    costs: tuple[Finding, ...]
    rows: tuple[Finding, ...]
    error: float
    networks: tuple[NetworkEvidence, ...]

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise RecordError(f"fit {self.precision}: scale must be positive, got {self.scale}")
        if not self.error >= 0:
            raise RecordError(f"fit {self.precision}: error must not be negative, got {self.error}")
        if not self.networks:
            raise RecordError(f"fit {self.precision}: no network is named as its evidence")

    @property
    def left_out_mape(self) -> float | None:
        """Mean |estimate / measured - 1| of each network by a fit without it, or None below two networks."""
        errors = [abs(n.left_out_ms / n.measured_ms - 1) for n in self.networks if n.left_out_ms is not None]
        return float(np.mean(errors)) if errors else None

    @property
    def label(self) -> str:
        """What was done, in a few words."""
        what = "scale" if self.method == "scale" else "corrected table"
        return f"{what} from {len(self.networks)} network{'' if len(self.networks) == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Correction:
    """All fits of one device state, with their evidence. `skipped` names networks that could not be used, and why."""

    fingerprint: str
    fits: tuple[PrecisionFit, ...]
    skipped: tuple[str, ...] = ()
    version: int = CORRECTION_VERSION

    def fit_for(self, precision: str) -> PrecisionFit | None:
        """The fit of a precision label, or None: the plain sum."""
        return next((fit for fit in self.fits if fit.precision == precision), None)
