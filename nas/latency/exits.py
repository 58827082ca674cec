"""Exact evaluation of every early-exit threshold setting of a trained student, from its cached logits.

Letters: E exits (the head is the last), N images, K classes, G threshold values per exit.

Rule, in training, evaluation and deployment alike: an image leaves at the first exit whose largest softmax
probability is at least the exit's threshold, else at the head. The cost of leaving at exit k is that of everything
executed until then.

Method: one histogram of the images per depth over the grid of thresholds, cumulated along every axis, counts the
images that stay up to that depth under each of the G^(E-1) settings; accuracy and expected cost are sums of such
counts. Work: O(E N) to fill, O(E G^(E-1)) to cumulate, against O(E N G^(E-1)) one by one. `python -m
benchmarks.thresholds` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import ConfigError, RecordError, UsageError
from nas.core.run import LatencyKind
from nas.core.units import parse_ms

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
CountArray = NDArray[np.int32]

ALWAYS = 0.0  # threshold of an exit where every image leaves that reaches it
NEVER = 2.0  # threshold of an exit where none leaves; above every probability
TAIL = 0.99  # the quantile of `p99`

# Threshold values per exit by the number of thresholds: about 10^5 to 10^6 settings, some 10-100 ms. Finer grids gain
# little: 30 values reach the expected cost of 60 within one percent.
_GRID_BY_THRESHOLDS = {0: 2, 1: 1000, 2: 400, 3: 60, 4: 30, 5: 15, 6: 9}


def default_grid(exits: int) -> int:
    """Threshold values per exit that keep a sweep of a student with this many exits (head included) within 10^6."""
    thresholds = exits - 1
    return _GRID_BY_THRESHOLDS.get(thresholds) or max(2, int(1e6 ** (1 / thresholds)))


@dataclass(frozen=True, slots=True)
class ThresholdSetting:
    """One setting of all thresholds and what it does on the images that were swept.

    `thresholds` has one entry per exit before the head: 0.0 where every image leaves, 2.0 where none does. `right` of
    `images` were classified correctly. `shares` has one entry per exit, the head last, and adds up to 1.
    """

    thresholds: tuple[float, ...]
    right: int
    images: int
    expected_ms: float
    shares: tuple[float, ...]

    @property
    def top1(self) -> float:
        return self.right / self.images

    @property
    def last_exit(self) -> int:
        """Index of the last exit where an image leaves."""
        return max(k for k, share in enumerate(self.shares) if share > 0)

    @property
    def truncation(self) -> int | None:
        """Exit to cut the network behind (`Candidate.truncated`) when no image goes further: the rest is dead weight.

        None when the head is reached. A cut network has the same figures and a better worst case.
        """
        return None if self.last_exit == len(self.shares) - 1 else self.last_exit

    @property
    def unused_exits(self) -> tuple[int, ...]:
        """Exits before the last used one where no image leaves: their heads cost time and give nothing."""
        return tuple(k for k in range(self.last_exit) if self.shares[k] == 0)


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdSweep:
    """Every combination of the grids' thresholds with its exact figures.

    Attributes:
        grids: rising thresholds of each exit before the head; the first is 0.0 (always), the last 2.0 (never).
        right: correct images of each setting, shape [G_1, ..., G_(E-1)].
        expected_ms: mean latency of each setting under its exit distribution, same shape.
        stays: for m = 1..E-1 the images that stay at exits 1..m, shape [G_1, ..., G_m].
        exit_ms: cumulative latency of leaving at each exit, the head last.
        images: N.
    """

    grids: tuple[FloatArray, ...]
    right: CountArray
    expected_ms: FloatArray
    stays: tuple[CountArray, ...]
    exit_ms: tuple[float, ...]
    images: int

    @property
    def vectors(self) -> int:
        """Number of settings."""
        return self.right.size

    @property
    def full_right(self) -> int:
        """Correct images when none leaves early."""
        return int(self.right.reshape(-1)[-1])

    def setting(self, flat_index: int) -> ThresholdSetting:
        """The setting at a position of `right.ravel()`."""
        index = np.unravel_index(flat_index, self.right.shape)
        reach = [self.images] + [int(s[index[: m + 1]]) for m, s in enumerate(self.stays)] + [0]
        return ThresholdSetting(
            thresholds=tuple(float(grid[j]) for grid, j in zip(self.grids, index, strict=True)),
            right=int(self.right[index]),
            images=self.images,
            expected_ms=float(self.expected_ms[index]),
            shares=tuple((a - b) / self.images for a, b in pairwise(reach)),
        )

    def front(self) -> tuple[ThresholdSetting, ...]:
        """The Pareto set, fastest first: settings that no other one beats in accuracy and expected latency."""
        right, cost = self.right.reshape(-1), self.expected_ms.reshape(-1)
        cheapest = np.full(self.images + 1, np.inf)
        np.minimum.at(cheapest, right, cost)
        # A count of right answers is on the front when every higher count costs more.
        above = np.append(np.minimum.accumulate(cheapest[::-1])[::-1][1:], np.inf)
        on_front = np.flatnonzero(cheapest < above)
        chosen = np.full(self.images + 1, -1)
        places = np.flatnonzero(cost == cheapest[right])
        chosen[right[places]] = places  # of equal settings the last one stays: the highest thresholds
        return tuple(self.setting(int(chosen[r])) for r in on_front)


def sweep(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    exit_ms: Sequence[float] | FloatArray,
    grid: int | None = None,
) -> ThresholdSweep:
    """Accuracy and expected latency of every combination of thresholds.

    Args:
        logits: of every exit, the head last, shape [E, N, K].
        labels: shape [N].
        exit_ms: cumulative latency of an image that leaves at each exit, shape [E].
        grid: threshold values per exit; quantiles of its confidences, and "never". None: `default_grid`.

    Raises:
        RecordError: shapes that do not fit, logits or latencies that are not finite, a grid below 2.
    """
    conf, correct, cost = _checked(logits, labels, exit_ms)
    exits, n = conf.shape
    values = default_grid(exits) if grid is None else grid
    if values < 2:
        raise RecordError(f"threshold grid needs at least 2 values (always, never), got {values}")
    grids = tuple(_threshold_grid(conf[k], values) for k in range(exits - 1))

    right = np.full((1,) * (exits - 1), int(correct[0].sum()), dtype=np.int32)
    expected = np.full((1,) * (exits - 1), float(cost[0]))
    stays: list[CountArray] = []
    cells = np.zeros(n, dtype=np.int64)
    shape: tuple[int, ...] = ()
    for k, thresholds in enumerate(grids):
        # Bin b = number of thresholds at or below the confidence: the image stays under threshold index j when b <= j.
        cells = cells * len(thresholds) + np.searchsorted(thresholds, conf[k], side="right")
        shape = (*shape, len(thresholds))
        stay = _survivors(cells, shape)
        gained = _survivors(cells[correct[k + 1] & ~correct[k]], shape)
        lost = _survivors(cells[correct[k] & ~correct[k + 1]], shape)
        rest = (1,) * (exits - 2 - k)
        right = right + (gained - lost).reshape(shape + rest)
        expected = expected + (stay * ((cost[k + 1] - cost[k]) / n)).reshape(shape + rest)
        stays.append(stay)
    return ThresholdSweep(grids, right, expected, tuple(stays), tuple(float(c) for c in cost), n)


def evaluate_thresholds(
    logits: NDArray[np.floating],
    labels: NDArray[np.integer],
    thresholds: Sequence[float] | FloatArray,
    exit_ms: Sequence[float] | FloatArray,
) -> tuple[float, FloatArray, float]:
    """Accuracy, share of images per exit and expected latency of one setting, such as one chosen on other images.

    Args:
        logits: shape [E, N, K].
        labels: shape [N].
        thresholds: of the exits before the head, shape [E - 1].
        exit_ms: cumulative latency per exit, shape [E].

    Returns:
        top1, shares [E], expected_ms.

    Raises:
        RecordError: shapes that do not fit, or numbers that are not finite.
    """
    conf, correct, cost = _checked(logits, labels, exit_ms)
    taken = exit_taken(conf, thresholds)
    shares = np.bincount(taken, minlength=len(conf)) / conf.shape[1]
    return float(correct[taken, np.arange(len(taken))].mean()), shares, float(shares @ cost)


def answers(logits: NDArray[np.floating], thresholds: Sequence[float] | FloatArray) -> NDArray[np.floating]:
    """Logits of the exit where each image leaves, shape [N, K] from logits [E, N, K]; `thresholds` as `exit_taken`."""
    taken = exit_taken(confidences(logits), thresholds)
    return logits[taken, np.arange(logits.shape[1])]


def confidences(logits: NDArray[np.floating]) -> FloatArray:
    """Largest softmax probability in float64, shape [...] for logits [..., K]."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    result: FloatArray = 1.0 / np.exp(shifted).sum(axis=-1)
    return result


def exit_taken(conf: FloatArray, thresholds: Sequence[float] | FloatArray) -> IntArray:
    """Index of the exit where each image leaves, shape [N].

    Args:
        conf: confidences of every exit, shape [E, N]; those of the head are not used.
        thresholds: shape [E - 1].

    Raises:
        RecordError: not one threshold per exit before the head, or one that is not a number.
    """
    if len(thresholds) != len(conf) - 1:
        raise RecordError(f"{len(conf)} exits need {len(conf) - 1} thresholds, got {len(thresholds)}")
    if any(math.isnan(t) for t in thresholds):
        raise RecordError(f"thresholds must be numbers, got {tuple(thresholds)}")
    leaves = np.ones(conf.shape, dtype=bool)
    leaves[:-1] = conf[:-1] >= np.asarray(thresholds, dtype=np.float64).reshape(-1, 1)
    taken: IntArray = leaves.argmax(axis=0)
    return taken


def solve_for_loss(swept: ThresholdSweep, loss: float) -> ThresholdSetting:
    """The fastest setting (least expected latency) that loses at most `loss` against the network without early exits.

    Args:
        swept: from `sweep`.
        loss: allowed drop of top1 as a ratio: 0.01 is one point. Right answers are compared as whole images.

    Raises:
        RecordError: a loss outside 0..1.
    """
    if not 0.0 <= loss <= 1.0:
        raise RecordError(f"allowed loss of accuracy must be from 0 to 1, got {loss}")
    needed = math.ceil(swept.full_right - loss * swept.images - 1e-9)
    return _fastest(swept, (swept.right >= needed).reshape(-1))


def solve_for_expected(swept: ThresholdSweep, expected_ms: float) -> ThresholdSetting | None:
    """The most accurate setting with an expected latency of at most `expected_ms`, the fastest of equals; or None."""
    return _most_accurate(swept, (swept.expected_ms <= expected_ms).reshape(-1))


def solve_for_tail(swept: ThresholdSweep, tail_ms: float, quantile: float = TAIL) -> ThresholdSetting | None:
    """The most accurate setting where at least `quantile` of the images take at most `tail_ms`; None: none does.

    Raises:
        RecordError: a quantile outside 0..1.
    """
    if not 0.0 < quantile <= 1.0:
        raise RecordError(f"quantile must be above 0 and at most 1, got {quantile}")
    in_time = [c <= tail_ms for c in swept.exit_ms]
    late = np.zeros(swept.right.shape, dtype=np.int64)  # images that leave at an exit over the limit
    reach: Sequence[CountArray | int] = [swept.images, *swept.stays, 0]
    for k, ok in enumerate(in_time):
        if not ok:
            late += _padded(reach[k], late.ndim) - _padded(reach[k + 1], late.ndim)
    return _most_accurate(swept, (late <= (1.0 - quantile) * swept.images + 1e-9).reshape(-1))


@dataclass(frozen=True, slots=True)
class ExitTarget:
    """What thresholds are solved for: `loss`, an accuracy (ratio) given up against the network without early exits; or
    `expected` or `p99`, a mean or tail latency in milliseconds within which the accuracy is as high as it can be.
    """

    kind: Literal["loss", "expected", "p99"]
    value: float

    def solve(
        self, swept: ThresholdSweep, exit_std_ms: Sequence[float] | None = None, margin_std: float = 0.0
    ) -> ThresholdSetting | None:
        """The exact solution, None where no setting reaches the target; deviations as in `solve_for_deadline`."""
        if self.kind == "loss":
            return solve_for_loss(swept, self.value)
        return solve_for_deadline(swept, self.value, self.kind, exit_std_ms, margin_std)


def read_target(text: str, where: str) -> ExitTarget:
    """The target of a text such as `loss=0.01`, `expected=0.4` (ms) or `p99=900us`.

    Raises:
        ConfigError: another form; the message begins with `where`.
    """
    kind, _, value = text.partition("=")
    if kind == "loss":
        try:
            loss = float(value)
        except ValueError:
            loss = math.nan
        if 0.0 <= loss < 1.0:
            return ExitTarget("loss", loss)
        raise ConfigError(f"{where}: loss={value}: a ratio from 0 to 1 is needed, such as loss=0.01 for one point")
    if kind in ("expected", "p99"):
        try:
            return ExitTarget("p99" if kind == "p99" else "expected", parse_ms(value, f"{where}: {kind}"))
        except UsageError as e:
            raise ConfigError(str(e)) from e
    raise ConfigError(f"{where}: {text!r} is no target; give loss=RATIO, expected=TIME or p99=TIME, such as p99=2ms")


def solve_for_deadline(
    swept: ThresholdSweep,
    deadline_ms: float,
    of: LatencyKind,
    exit_std_ms: Sequence[float] | None = None,
    margin_std: float = 0.0,
) -> ThresholdSetting | None:
    """The most accurate setting that keeps a deadline, with room for what the swept images cannot know.

    Two things differ where the network is used: other images take other exits, and a latency is known to within its
    deviation. `margin_std` deviations of both together are kept free.

    Args:
        swept: from `sweep`.
        deadline_ms: the limit.
        of: `expected` or `p99`; `worst` does not depend on thresholds.
        exit_std_ms: standard deviation of each entry of `swept.exit_ms`; None: exact.
        margin_std: how many standard deviations are kept free.

    Returns:
        The setting, or None where no setting keeps the deadline (for `worst`: where the head is too late).
    """
    std = np.zeros(len(swept.exit_ms)) if exit_std_ms is None else np.asarray(exit_std_ms, dtype=np.float64)
    if of == "worst":
        kept = swept.exit_ms[-1] + margin_std * std[-1] <= deadline_ms
        return solve_for_loss(swept, 0.0) if kept else None
    if of == "p99":
        # Share of late images in one sample of images against another one of the same size: twice the variance.
        spread = math.sqrt(2 * TAIL * (1 - TAIL) / swept.images)
        quantile = min(1.0, TAIL + margin_std * spread)
        return solve_for_tail(swept, deadline_ms - margin_std * float(std.max()), quantile)
    # The mean on these images against that on as many others: twice the variance of a mean.
    variance = _mean_of(swept, np.asarray(swept.exit_ms) ** 2) - swept.expected_ms**2
    between = np.sqrt(np.maximum(variance, 0.0) * (2 / swept.images))
    needed = swept.expected_ms + margin_std * np.hypot(between, _mean_of(swept, std))
    return _most_accurate(swept, (needed <= deadline_ms).reshape(-1))


def _mean_of(swept: ThresholdSweep, per_exit: FloatArray) -> FloatArray:
    """Mean over the images of a value of the exit where they leave, for every setting."""
    total = np.full((1,) * len(swept.grids), float(per_exit[0]))
    for k, stay in enumerate(swept.stays):
        total = total + _padded(stay, len(swept.grids)) * ((per_exit[k + 1] - per_exit[k]) / swept.images)
    return total


def _padded(counts: CountArray | int, ndim: int) -> CountArray:
    array = np.asarray(counts, dtype=np.int32)
    return array.reshape(array.shape + (1,) * (ndim - array.ndim))


def _fastest(swept: ThresholdSweep, allowed: NDArray[np.bool_]) -> ThresholdSetting:
    places = np.flatnonzero(allowed)
    cost, right = swept.expected_ms.reshape(-1)[places], swept.right.reshape(-1)[places]
    best = np.flatnonzero(cost == cost.min())
    best = best[right[best] == right[best].max()]
    return swept.setting(int(places[best[-1]]))  # the highest thresholds of equals: they leave later on new images


def _most_accurate(swept: ThresholdSweep, allowed: NDArray[np.bool_]) -> ThresholdSetting | None:
    if not allowed.any():
        return None
    right = swept.right.reshape(-1)
    return _fastest(swept, allowed & (right == right[allowed].max()))


def _survivors(cells: IntArray, shape: tuple[int, ...]) -> CountArray:
    """Images whose bin is at or below each grid position in every axis, shape `shape`."""
    counts = np.bincount(cells, minlength=math.prod(shape)).astype(np.int32).reshape(shape)
    for axis in range(len(shape)):
        np.cumsum(counts, axis=axis, out=counts)
    return counts


def _threshold_grid(conf: FloatArray, values: int) -> FloatArray:
    """Rising thresholds of one exit: always, quantiles of its confidences, never; without repeats.

    A quantile stands half-way between the confidences beside it, where the rounding of another run-time moves no image,
    and is exact in float32, as it is deployed, where the gap allows. The first one would be the smallest confidence; a
    new image may score lower, so it is deployed as "always".
    """
    ordered = np.sort(conf)
    levels = np.quantile(ordered, np.linspace(0.0, 1.0, values - 1)) if values > 2 else ordered[:1]
    first = np.minimum(np.searchsorted(ordered, levels, side="left"), len(ordered) - 1)
    first = first[first > 0]
    below, above = ordered[first - 1], ordered[first]
    middle = ((below + above) / 2).astype(np.float32).astype(np.float64)
    middle = np.where((below < middle) & (middle <= above), middle, above)
    return np.unique(np.concatenate([[ALWAYS], middle, [NEVER]]))


def _checked(
    logits: NDArray[np.floating], labels: NDArray[np.integer], exit_ms: Sequence[float] | FloatArray
) -> tuple[FloatArray, NDArray[np.bool_], FloatArray]:
    """Confidences [E, N], right answers [E, N] and costs [E]."""
    if logits.ndim != 3 or 0 in logits.shape:
        raise RecordError(f"logits must have shape [exits, images, classes] with no empty axis, got {logits.shape}")
    exits, n, classes = logits.shape
    if labels.shape != (n,):
        raise RecordError(f"labels must have shape [{n}] like the logits {logits.shape}, got {labels.shape}")
    if labels.min() < 0 or labels.max() >= classes:
        raise RecordError(f"labels must be from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    cost = np.asarray(exit_ms, dtype=np.float64)
    if cost.shape != (exits,) or not np.isfinite(cost).all() or cost.min() < 0:
        raise RecordError(f"exit_ms needs {exits} finite latencies, one per exit and the head, got {tuple(exit_ms)}")
    bad = np.argwhere(~np.isfinite(logits).all(axis=2))
    if len(bad):
        raise RecordError(f"exit {bad[0][0]}, image {bad[0][1]}: a logit is not finite ({len(bad)} such rows)")
    return confidences(logits), logits.argmax(axis=2) == labels, cost
