"""Correction of a latency table from measured whole networks: hierarchical Bayes in relative residuals.

A table gives p, the sum of a network's entries. Measured networks say by how much such sums are wrong: all of them
(the scale), families of entries (groups), single entries, costs that no entry contains (overheads: per inference, per
layer, per MB), and a smooth rest that no sum can express. Each has a Gaussian prior around the table as it is, so few
networks move the large things only and many move single entries. It is a Gaussian process over networks:

    s = exp(median log(y/p));  q = s p;  r = y/q - 1
    r = d0 + sum_g d_g v_g + sum_e d_e w_e + sum_j b_j u_j + f(z, log p) + noise
    w_e = entry e / p, v_g = sum of w_e over group g, u_j = (B_j/q) / (geometric mean of B_j/q when measured)

f has the squared exponential kernel. Linear part and kernel as one covariance: Rasmussen and Williams 2006, Gaussian
Processes for Machine Learning, section 2.7; marginal likelihood eq. 5.8; left-out residuals eq. 5.12. The variances are
integrated over a grid with log-normal priors (MacKay 1999, Neural Computation 11(5): averaging rather than maximising).
Everything is linear in y, so the posterior is again a table (`coefficients`), and a prediction needs sums over entries
only (`Sums`): no array of networks x entries. For millions of candidates the posterior is multiplied out beforehand
(`Compact`).

Letters: N measured networks, M networks to predict, E entries, G groups, J overheads, D descriptors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special
from scipy.linalg import block_diag

from nas.core.errors import RecordError

FloatArray = NDArray[np.float64]
SingleArray = NDArray[np.float32]
IntArray = NDArray[np.intp]
Method = Literal["raw", "scale", "bayes"]
Prior = Literal["same device", "other"]

RBF_LENGTHS = (1.0, 2.5)  # in root mean square descriptors
LOG_UNIT = 0.5  # of log p, at a length of 1: a fast and a slow network of the same depth are not alike
NOISE_STD = (0.005, 0.01, 0.02, 0.04, 0.08)
SMALL = 0.01  # standard deviations below this, but for the noise, are all alike to the log-normal priors
KEPT_MASS, KEPT_POINTS = 0.99, 40  # of the grid, in the average
PASSES = 3  # of the search for outliers
OUTLIER = 2.5  # robust deviations beyond which a network's noise is inflated,
FAR_OUTLIER = 6.0  # and from the scale alone, before the first fit
MIN_SPREAD = 0.01  # relative; left-out residuals closer than this are no outliers
CALIBRATION_WEIGHT = 5.0  # networks that the deviations as computed count for, against the left-out ones
MIN_RATIO, MAX_RATIO = 0.1, 10.0  # a correction never moves a prediction further from the scaled sum
SCALE_WEIGHT = 3.0  # networks that the error around the scale counts for before anything is known
KERNEL_ERROR = 1e-3  # of the noise: how far a kernel that `Compact` leaves out may be from those that it keeps
ROUNDING = 1e-12  # eigenvalues smaller than the largest by this are zero
_CHUNK = 8192  # networks predicted at once: bounds the memory


@dataclass(frozen=True, slots=True)
class _Belief:
    """How wrong a table may be, before any network says so: relative standard deviations.

    `raw` of a sum that nothing has tested, `around_scale` once the scale is known; below `least` networks only the
    scale is fitted. The grid: `constant` of d0, `group`, `entry`, `overhead`, and `rbf` for each length. `medians` and
    `widths` of the log-normal priors of group, entry, overhead, rbf and noise.
    """

    raw: float
    around_scale: float
    least: int
    constant: float
    group: tuple[float, ...]
    entry: tuple[float, ...]
    overhead: tuple[float, ...]
    rbf: tuple[tuple[float, float], ...]
    medians: tuple[float, ...]
    widths: tuple[float, ...]


# The first was chosen on tables of isolated blocks of an x86-64 CPU (40 to 64 networks each in fp32, int8 and mixed):
# better there than a ridge on scale, constant and weight megabytes from 3 networks on. The other: on published
# measurements (`benchmarks.feedback_published`).
_BELIEFS: dict[Prior, _Belief] = {
    "same device": _Belief(
        raw=0.05,
        around_scale=0.04,
        least=3,
        constant=0.05,
        group=(0.01, 0.03, 0.08, 0.15, 0.3),
        entry=(0.0, 0.1, 0.3),
        overhead=(0.01, 0.03, 0.1, 0.3),
        rbf=((0.0, 0.0), (0.0, 0.02), (0.02, 0.0), (0.04, 0.0), (0.0, 0.04), (0.04, 0.04), (0.12, 0.0), (0.0, 0.12)),
        medians=(0.03, 0.1, 0.05, 0.03, 0.02),
        widths=(1.0, 1.0, 1.0, 1.0, 1.0),
    ),
    "other": _Belief(
        raw=0.5,
        around_scale=0.12,
        least=5,
        constant=0.3,
        group=(0.03, 0.08, 0.15, 0.3, 0.6, 1.5),
        entry=(0.0, 0.1, 0.3),
        overhead=(0.03, 0.1, 0.3, 0.8),
        rbf=((0.0, 0.0), (0.0, 0.04), (0.12, 0.0), (0.0, 0.12), (0.06, 0.12), (0.0, 0.35)),
        medians=(0.15, 0.08, 0.1, 0.03, 0.02),
        widths=(1.5, 1.5, 1.5, 1.5, 1.0),
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Networks:
    """Networks as the table sees them.

    Attributes:
        contributions_ms: milliseconds of each entry in each network (number of uses times the entry), shape [M, E].
        overheads: bases of costs that no entry contains (1, number of layers, weight MB), not negative, shape [M, J].
        descriptors: what the rest may depend on smoothly, standardised over the candidates, shape [M, D].

    Raises:
        RecordError: shapes that do not fit, a value that is negative or not finite, a network without any latency.
    """

    contributions_ms: FloatArray
    overheads: FloatArray
    descriptors: FloatArray

    def __post_init__(self) -> None:
        for name, minimum in (("contributions_ms", 0.0), ("overheads", 0.0), ("descriptors", -np.inf)):
            object.__setattr__(self, name, _array(name, getattr(self, name), 2, minimum))
        _rows("overheads", self.overheads, len(self))
        _rows("descriptors", self.descriptors, len(self))
        _positive("networks: the sum of contributions_ms", self.contributions_ms.sum(axis=1))

    def __len__(self) -> int:
        return len(self.contributions_ms)


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Mean, standard deviation and interval of each network, milliseconds, shape [M] each."""

    mean_ms: FloatArray
    std_ms: FloatArray
    low_ms: FloatArray
    high_ms: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Coefficients:
    """Posterior of the linear part, and the table that it makes.

    r = constant + group + entry + overhead parts (module docstring). A corrected table alone is
    `sum of corrected entries + sum_j overhead_ms[j] * B_j`; entries without data move with their group only.

    Attributes:
        constant, constant_std: d0 and its standard deviation.
        group, group_std: d_g, shape [G].
        entry, entry_std: d_e, shape [E].
        factor, factor_std: corrected entry / raw entry, shape [E].
        overhead_ms, overhead_std_ms: milliseconds per unit of each overhead base, shape [J].
    """

    constant: float
    constant_std: float
    group: FloatArray
    group_std: FloatArray
    entry: FloatArray
    entry_std: FloatArray
    factor: FloatArray
    factor_std: FloatArray
    overhead_ms: FloatArray
    overhead_std_ms: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """A fitted correction. Raw tables are never changed; a new device state needs a new fit.

    The features of a network are [1, v (G), u (J), w(x) . w_i (N), one kernel to each z_i per length (N each)], shape
    [F]; the posterior of r is `weights @ features`, its variance the prior's less `|root @ features|^2` plus
    `|spread @ features|^2` (how much the points of the grid differ).

    Attributes:
        method: what is used: the raw table, a scale, or the whole model.
        reason: why, for people.
        scale: s.
        group_of: group of each entry, shape [E].
        groups: G.
        overhead_units: geometric mean of B_j/q over the measured networks that have any, infinite where none has, [J].
        shares: w of the measured networks, shape [N, E].
        places: z and log p of the measured networks in the units of the kernel, shape [N, D + 1].
        measured_ms: y, shape [N].
        left_out_ms, left_out_std_ms: prediction of each measured network from the others, shape [N].
        outlier: how many times the noise of each measured network was inflated, 1 for most, shape [N].
        prior: mean prior variances of constant, group, overhead, entry, rest and noise.
        calibration: what all deviations are multiplied by, so that the left-out ones are as large as they should be.
        degrees: of the t distribution of the intervals.
    """

    method: Method
    reason: str
    scale: float
    group_of: IntArray
    groups: int
    overhead_units: FloatArray
    shares: FloatArray
    places: FloatArray
    measured_ms: FloatArray
    left_out_ms: FloatArray
    left_out_std_ms: FloatArray
    outlier: FloatArray
    prior: FloatArray
    weights: FloatArray
    root: FloatArray
    spread: FloatArray
    calibration: float
    degrees: float

    @property
    def normal_factor(self) -> float:
        """What a deviation is multiplied by so that a normal distribution has the same 90 % interval."""
        return _quantile(0.9, self.degrees) / _quantile(0.9, np.inf)

    @property
    def left_out_z(self) -> FloatArray:
        """Deviations of each measured network from what the others say of it, shape [N]."""
        return (self.measured_ms - self.left_out_ms) / self.left_out_std_ms

    @property
    def left_out_error(self) -> float | None:
        """Mean |left-out prediction / measured - 1|, or None below two networks."""
        if len(self.measured_ms) < 2:
            return None
        return float(np.mean(np.abs(self.left_out_ms / self.measured_ms - 1)))


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Sums over the entries of M networks: all that a prediction needs, without an array of networks x entries.

    Attributes:
        columns: milliseconds in each group, then milliseconds times the share that the entry has in each of the
            measured networks (`Feedback.shares`), shape [M, G + N].
        squares: of the milliseconds that each different entry contributes in all (an entry c used twice counts (2 c)^2,
            not 2 c^2), shape [M].
    """

    columns: FloatArray
    squares: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Compact:
    """A correction multiplied out, to predict by the million: single precision, one sum over entries, few kernels.

    The features of a network are the linear ones, c = [1, v, u, w(x) . w_i], and its kernels k to K places. Posterior
    and prior of r are forms in them. Times p, in milliseconds, c is a sum over entries, and so are the outputs
    `o = p (c @ linear + k @ kernels)`, shape [L], but for the kernels; some more, `f = p k @ kernels_only`, have no
    linear part. The mean of p r is `o[0]`, its variance

        entry_variance * squares + |o[1 : 1 + adding]|^2 - |o[1 + adding :]|^2 - |f|^2

    2026-11-21: only kernels are left out. They are smooth, so few tell all; the linear part is not, since every
    measured network has rows of its own: of rank 40, deviations were 10 to 30 % too wide with 100 networks.

    Attributes:
        by_column: what each column of `Sums` adds to o, shape [G + N, L].
        by_overhead: what each overhead adds, shape [J, L].
        by_total: what each millisecond of p adds, shape [L].
        kernels: shape [K, L].
        kernels_only: shape [K, F].
        adding: how many outputs add their square to the variance.
        center: subtracted from places, as differences of small numbers are exact, shape [D + 1].
        exponents: of the kernels times p, from [place, |place|^2, 1, log p], shape [D + 4, K].
        entry_variance: prior variance of entries.
        least_variance: the noise; rounding must not take the variance of r below it.
        scale, calibration, normal_factor: as in `Feedback`.
    """

    by_column: FloatArray
    by_overhead: FloatArray
    by_total: FloatArray
    kernels: SingleArray
    kernels_only: SingleArray
    adding: int
    center: FloatArray
    exponents: SingleArray
    entry_variance: float
    least_variance: float
    scale: float
    calibration: float
    normal_factor: float


def fit(
    networks: Networks,
    measured_ms: ArrayLike,
    group_of: ArrayLike,
    *,
    prior: Prior = "other",
    doubt: ArrayLike | None = None,
) -> Feedback:
    """Fits the correction to measured networks, with the method that their number allows.

    Args:
        networks: the measured networks; may be none (N = 0).
        measured_ms: shape [N].
        group_of: group of each entry as a number from 0, shape [E]: 5 to 15 families whose errors move together.
        prior: where the table is from; one of the same device is believed more.
        doubt: how many times noisier than usual each network was measured, at least 1, shape [N].

    Raises:
        RecordError: shapes that do not fit, a latency that is not positive, an unknown prior.
    """
    y = _array("measured_ms", measured_ms, 1)
    _rows("measured_ms", y, len(networks))
    _positive("measured_ms", y)
    numbers = _array("group_of", group_of, 1, minimum=0.0)
    group = numbers.astype(np.intp)
    if (group != numbers).any():
        raise RecordError("group_of must be whole numbers")
    if len(group) != networks.contributions_ms.shape[1]:
        raise RecordError(f"group_of has {len(group)} entries, contributions_ms {networks.contributions_ms.shape[1]}")
    if prior not in _BELIEFS:
        raise RecordError(f"prior {prior!r} is not one of: {', '.join(_BELIEFS)}")
    noisier = np.ones(len(y)) if doubt is None else _array("doubt", doubt, 1, minimum=1.0)
    _rows("doubt", noisier, len(networks))
    belief, n = _BELIEFS[prior], len(y)
    if n >= belief.least:
        return _fit_bayes(networks, y, group, belief, noisier)
    reason = f"{n} measured networks of {belief.least}: scale only" if n else "no measured network: the raw table"
    return _fit_scale(networks, y, group, belief, reason)


def predict(fitted: Feedback, networks: Networks, level: float = 0.9) -> Prediction:
    """Predicts networks from their contributions.

    Args:
        fitted: a correction.
        networks: with the entries, overheads and descriptors of the fit.
        level: probability of the interval, for a new measurement.

    Raises:
        RecordError: networks that do not fit the correction, a level outside (0, 1).
    """
    if networks.contributions_ms.shape[1] != len(fitted.group_of):
        given, known = networks.contributions_ms.shape[1], len(fitted.group_of)
        raise RecordError(f"contributions_ms has {given} entries, the correction {known}")
    total, shares = _shares(networks.contributions_ms)
    return _predict(
        fitted,
        total,
        _by_group(shares, fitted.group_of, fitted.groups),
        shares @ fitted.shares.T,
        (shares**2).sum(axis=1),
        networks.overheads,
        networks.descriptors,
        level,
    )


def predict_sums(
    fitted: Feedback, sums: Sums, overheads: ArrayLike, descriptors: ArrayLike, level: float = 0.9
) -> Prediction:
    """Predicts networks from sums over their entries, without an array of networks x entries.

    Args:
        fitted: a correction.
        sums: with the entries of the fit.
        overheads: shape [M, J].
        descriptors: shape [M, D].
        level: probability of the interval, for a new measurement.

    Raises:
        RecordError: as `predict`.
    """
    columns = _array("sums", sums.columns, 2, minimum=0.0)
    if columns.shape[1] != fitted.groups + len(fitted.shares):
        wanted = fitted.groups + len(fitted.shares)
        raise RecordError(f"sums has {columns.shape[1]} columns, the correction {wanted}: of another fit?")
    squares = _array("squares", sums.squares, 1, minimum=0.0)
    _rows("squares", squares, len(columns))
    by_group = columns[:, : fitted.groups]
    total = by_group.sum(axis=1)
    _positive("sums: the total", total)
    return _predict(
        fitted,
        total,
        by_group / total[:, None],
        columns[:, fitted.groups :] / total[:, None],
        squares / total**2,
        _array("overheads", overheads, 2, minimum=0.0),
        _array("descriptors", descriptors, 2),
        level,
    )


def compact(fitted: Feedback) -> Compact:
    """The correction multiplied out.

    From it `predict_compact` gives what `predict_sums` gives; means differ by less than 1e-5, deviations by 1e-4.
    """
    g, j, n = fitted.groups, len(fitted.overhead_units), len(fitted.shares)
    c = 1 + g + j + n
    posterior = fitted.spread.T @ fitted.spread - fitted.root.T @ fitted.root
    matters = np.sqrt((np.abs(np.diag(posterior)) + fitted.weights**2)[c:] / fitted.prior[-1])  # of a kernel that is 1
    kernels = _rbf(fitted.places, fitted.places)
    spanning = [_spanning(k, m) for k, m in zip(kernels, np.split(matters, len(kernels)), strict=True)]
    onto = block_diag(np.eye(c), *(weights for _, weights in spanning)).T  # from fewer features to all of them

    constant, group, overhead, entry, rests, noise = fitted.prior.tolist()
    prior = np.zeros(len(fitted.weights))
    prior[:c] = np.repeat([constant + rests + noise, group, overhead, 0.0], [1, g, j, n])
    values, vectors = np.linalg.eigh(onto.T @ (np.diag(prior) + posterior) @ onto)
    roots = (vectors * np.sqrt(np.abs(values))).T
    zero = ROUNDING * np.abs(values).max()
    adding, taking = roots[values > zero], roots[values < -zero]
    # Any rotation has the same squares; in a triangle, only the first c have a linear part.
    taking = np.asarray(np.linalg.qr(taking, mode="r"))
    outputs = np.concatenate([[fitted.weights @ onto], adding, taking]).T
    linear, kernels_only = np.split(outputs, [1 + len(adding) + min(c, len(taking))], axis=1)

    center = fitted.places.mean(axis=0) if n else np.zeros(fitted.places.shape[1])
    far = np.concatenate([fitted.places[chosen] - center for chosen, _ in spanning])
    sharpness = np.repeat([length**-2 for length in RBF_LENGTHS], [len(chosen) for chosen, _ in spanning])
    exponents = np.vstack([far.T, np.full(len(far), -0.5), -0.5 * (far**2).sum(axis=1)]) * sharpness
    return Compact(
        by_column=np.concatenate([linear[1 : 1 + g], linear[1 + g + j : c]]),
        by_overhead=linear[1 + g : 1 + g + j] / (fitted.scale * fitted.overhead_units)[:, None],
        by_total=linear[0],
        kernels=linear[c:].astype(np.float32),
        kernels_only=kernels_only[c:].astype(np.float32),
        adding=len(adding),
        center=center,
        exponents=np.vstack([exponents, np.ones(len(far))]).astype(np.float32),
        entry_variance=entry,
        least_variance=noise,
        scale=fitted.scale,
        calibration=fitted.calibration,
        normal_factor=fitted.normal_factor,
    )


def predict_compact(
    fitted: Compact, total_ms: FloatArray, sums: SingleArray, squares: FloatArray, descriptors: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of many networks, milliseconds, shape [M] each; NaN where a number is NaN.

    Args:
        fitted: a correction.
        total_ms: p, shape [M].
        sums: what entries, overheads and p add to the outputs, shape [M, L].
        squares: as in `Sums`.
        descriptors: shape [M, D].
    """
    near = _places(descriptors, total_ms) - fitted.center
    of_places = np.column_stack([near, (near**2).sum(axis=1), np.ones(len(near)), np.log(total_ms)])
    kernels = of_places.astype(np.float32) @ fitted.exponents
    np.exp(kernels, out=kernels)
    outputs = kernels @ fitted.kernels
    outputs += sums
    adding, taking = np.split(outputs[:, 1:], [fitted.adding], axis=1)
    variance = fitted.entry_variance * squares + _squared(adding) - _squared(taking)
    variance = np.maximum(variance - _squared(kernels @ fitted.kernels_only), fitted.least_variance * total_ms**2)
    mean = np.clip(total_ms + outputs[:, 0], MIN_RATIO * total_ms, MAX_RATIO * total_ms)
    return fitted.scale * mean, fitted.scale * fitted.calibration * np.sqrt(variance)


def coefficients(fitted: Feedback) -> Coefficients:
    """The linear part: what the table becomes, and how sure each number of it is."""
    entries, (n, g, j) = len(fitted.group_of), (len(fitted.shares), fitted.groups, len(fitted.overhead_units))
    width = len(fitted.weights)
    one, families, costs = np.eye(1, width), np.eye(g, width, k=1), np.eye(j, width, k=1 + g)
    single = np.zeros((entries, width))
    single[:, 1 + g + j : 1 + g + j + n] = fitted.shares.T
    mean, relative = _posterior(
        fitted,
        np.concatenate([one, families, costs, single, one + families[fitted.group_of] + single]),
        np.repeat(
            [
                [1.0, 0, 0, 0, 0, 0],
                [0, 1.0, 0, 0, 0, 0],
                [0, 0, 1.0, 0, 0, 0],
                [0, 0, 0, 1.0, 0, 0],
                [1.0, 1, 0, 1, 0, 0],
            ],
            [1, g, j, entries, entries],
            axis=0,
        ),
    )
    std = relative * fitted.calibration
    cuts = np.cumsum([1, g, j, entries])
    d0, group, overhead, entry, factor = np.split(mean, cuts)
    d0_std, group_std, overhead_std, entry_std, factor_std = np.split(std, cuts)
    return Coefficients(
        constant=float(d0[0]),
        constant_std=float(d0_std[0]),
        group=group,
        group_std=group_std,
        entry=entry,
        entry_std=entry_std,
        factor=1.0 + factor,
        factor_std=factor_std,
        overhead_ms=overhead / fitted.overhead_units,
        overhead_std_ms=overhead_std / fitted.overhead_units,
    )


def rest(fitted: Feedback, descriptors: ArrayLike, total_ms: ArrayLike) -> FloatArray:
    """f(z, log p), shape [M]: a prediction is the sum of the corrected table plus s p f.

    Args:
        fitted: a correction.
        descriptors: z, shape [M, D].
        total_ms: p, the sum of the raw entries, shape [M].

    Raises:
        RecordError: another number of descriptors than in the fit, a total that is not positive.
    """
    total = _array("total_ms", total_ms, 1)
    _positive("total_ms", total)
    kernels = _rbf(_places(_array("descriptors", descriptors, 2), total), fitted.places)
    return np.hstack(kernels) @ fitted.weights[len(fitted.weights) - len(kernels) * len(fitted.shares) :]


def _fit_scale(networks: Networks, y: FloatArray, group: IntArray, belief: _Belief, reason: str) -> Feedback:
    """A scale only, or with no network the raw table; the same record with weights of zero."""
    total, shares = _shares(networks.contributions_ms)
    n, groups, j = len(y), int(group.max(initial=-1)) + 1, networks.overheads.shape[1]
    scale, std = _robust_scale(total, y, belief)
    left = [_robust_scale(np.delete(total, i), np.delete(y, i), belief) for i in range(n)]
    left_scale, left_std = np.array(left).reshape(n, 2).T
    features = 1 + groups + j + (1 + len(RBF_LENGTHS)) * n
    return Feedback(
        method="scale" if n else "raw",
        reason=reason,
        scale=scale,
        group_of=group,
        groups=groups,
        overhead_units=np.ones(j),
        shares=shares,
        places=_places(networks.descriptors, total),
        measured_ms=y,
        left_out_ms=left_scale * total,
        left_out_std_ms=left_scale * total * left_std,
        outlier=np.ones(n),
        prior=np.array([0.0, 0, 0, 0, 0, std**2]),
        weights=np.zeros(features),
        root=np.zeros((0, features)),
        spread=np.zeros((0, features)),
        calibration=1.0,
        degrees=SCALE_WEIGHT + n,
    )


def _robust_scale(total: FloatArray, y: FloatArray, belief: _Belief) -> tuple[float, float]:
    """Median ratio, and the relative standard deviation of a new network around it."""
    if not len(y):
        return 1.0, belief.raw
    scale = float(np.exp(np.median(np.log(y / total))))
    residual = y / (scale * total) - 1
    # Inverse gamma prior; the median of n values has pi/2 times the variance of their mean.
    var = (SCALE_WEIGHT * belief.around_scale**2 + residual @ residual) / (SCALE_WEIGHT + len(y) - 1)
    return scale, float(np.sqrt(var * (1 + np.pi / 2 / len(y))))


def _fit_bayes(networks: Networks, y: FloatArray, group: IntArray, belief: _Belief, doubt: FloatArray) -> Feedback:
    total, w = _shares(networks.contributions_ms)
    n, groups = len(y), int(group.max()) + 1
    scale = float(np.exp(np.median(np.log(y / total))))
    q = scale * total
    v = _by_group(w, group, groups)
    units = _geometric_means(networks.overheads / q[:, None])
    u = networks.overheads / q[:, None] / units
    r = y / q - 1
    places = _places(networks.descriptors, total)
    kernels = np.stack([np.ones((n, n)), v @ v.T, u @ u.T, w @ w.T, *_rbf(places, places)])
    variances, log_prior, rough = _grid(belief)

    # Begun where most networks agree: with few of them the fit would follow one that does not (r has the median 0).
    inflated = _inflation(r, FAR_OUTLIER, doubt)
    tried = variances[rough]
    for _ in range(PASSES - 1):
        likely = _log_likelihood(tried, kernels, r, _noise(tried, inflated, doubt)) + log_prior[rough]
        best = tried[[np.argmax(likely)]]
        inverse = np.linalg.inv(_covariance(best, kernels, _noise(best, inflated, doubt))[0])
        before, inflated = inflated, _inflation(inverse @ r / np.diag(inverse), OUTLIER, doubt)
        if np.array_equal(before, inflated):
            break

    kept, share = _heaviest(_log_likelihood(variances, kernels, r, _noise(variances, inflated, doubt)) + log_prior)
    h = variances[kept]
    noise = _noise(h, inflated, doubt)
    lower = np.linalg.cholesky(_covariance(h, kernels, noise))
    half = np.linalg.solve(lower, np.broadcast_to(np.eye(n), lower.shape))  # its inverse, [P, N, N]
    alpha = np.einsum("pki,pkj,j->pi", half, half, r, optimize=True)
    diagonal = (half**2).sum(axis=1)
    # Features -> covariance with the measured networks at each point of the grid, [P, N, F].
    eye = np.eye(n)
    blocks = (np.ones((n, 1)), v, u, *[eye] * (h.shape[1] - 4))
    lift = np.concatenate([h[:, c, None, None] * block for c, block in enumerate(blocks)], axis=2)
    means = np.einsum("pi,pif->pf", alpha, lift)
    weights = share @ means
    stacked = (np.sqrt(share)[:, None, None] * (half @ lift)).reshape(-1, lift.shape[2])
    root: FloatArray = np.asarray(np.linalg.qr(stacked, mode="r"))
    spread = np.sqrt(share)[:, None] * (means - weights)

    left_mean = r - alpha / diagonal
    left_var = np.maximum(1 / diagonal - noise, 0.0) + h[:, -1:]  # of an ordinary new measurement
    left_r = share @ left_mean
    left_std = np.sqrt(share @ (left_var + (left_mean - left_r) ** 2))
    deviations = np.abs(r - left_r) / left_std
    z = np.minimum(deviations, OUTLIER)
    spread_out = float(np.sqrt((CALIBRATION_WEIGHT + z @ z) / (CALIBRATION_WEIGHT + n)))
    calibration = max(1.0, spread_out, _reaching(deviations))
    mean_h = share @ h
    return Feedback(
        method="bayes",
        reason=f"{n} measured networks, {int((inflated > doubt).sum())} of them outliers",
        scale=scale,
        group_of=group,
        groups=groups,
        overhead_units=units,
        shares=w,
        places=_places(networks.descriptors, total),
        measured_ms=y,
        left_out_ms=q * np.clip(1 + left_r, MIN_RATIO, MAX_RATIO),
        left_out_std_ms=q * left_std * calibration,
        outlier=inflated,
        prior=np.array([*mean_h[:4], mean_h[4:-1].sum(), mean_h[-1]]),
        weights=weights,
        root=root,
        spread=spread,
        calibration=calibration,
        degrees=n - 1,  # the variances are from N networks only
    )


def _reaching(deviations: FloatArray) -> float:
    """By how much deviations have to be widened so that 90 % of the left-out networks lie within 1.645 of them.

    As many as `CALIBRATION_WEIGHT` networks that lie where a normal distribution has them count beside those left out.
    """
    usual = special.ndtri(0.5 + (np.arange(CALIBRATION_WEIGHT) + 0.5) / CALIBRATION_WEIGHT / 2)
    return float(np.quantile(np.concatenate([deviations, usual]), 0.9) / special.ndtri(0.95))


def _grid(belief: _Belief) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Variances of constant, group, overhead, entry, rests, noise at each point, shape [P, 6 + 1]; log prior [P]; where
    outliers are looked for [P].

    That is every second value of group and overhead, a quarter of the time, and noise that outliers are told from, not
    less: of five quiet networks, two that are far off would otherwise be taken for an effect of what they consist of.
    """
    rows = list(product(belief.group, belief.overhead, belief.entry, belief.rbf, NOISE_STD))
    std = np.array([(belief.constant, g, b, e, *f, noise) for g, b, e, f, noise in rows])
    of_prior = np.array([(*np.maximum((g, e, b, max(f)), SMALL), noise) for g, b, e, f, noise in rows])
    median, width = np.array(belief.medians), np.array(belief.widths)
    rough = np.isin(std[:, 1], belief.group[::2]) & np.isin(std[:, 2], belief.overhead[::2])
    rough &= std[:, -1] >= MIN_SPREAD
    return std**2, -0.5 * ((np.log(of_prior / median) / width) ** 2).sum(axis=1), rough


def _inflation(residuals: FloatArray, limit: float, doubt: FloatArray) -> FloatArray:
    """How many times the noise of each network is inflated: beyond `limit` robust deviations of residuals, [N]."""
    size = np.abs(residuals)
    far = size / max(1.4826 * float(np.median(size)), MIN_SPREAD)
    return np.where(far > limit, np.maximum(far, doubt), doubt)


def _noise(variances: FloatArray, inflated: FloatArray, doubt: FloatArray) -> FloatArray:
    """Variance of the noise of each measured residual at each point, shape [P, N].

    Outliers were told by how many spreads of `MIN_SPREAD` at least they lie off, so theirs is inflated from there.
    """
    least = np.where(inflated > doubt, MIN_SPREAD**2, 0.0)
    return np.maximum(variances[:, -1:], least) * inflated**2


def _covariance(variances: FloatArray, kernels: FloatArray, noise: FloatArray) -> FloatArray:
    """Covariance of the measured residuals at each point, shape [P, N, N], with the noise of each, shape [P, N]."""
    n = noise.shape[1]
    result = (variances[:, :-1] @ kernels.reshape(len(kernels), -1)).reshape(-1, n, n)
    diagonal = np.arange(n)
    result[:, diagonal, diagonal] += noise
    return result


def _log_likelihood(variances: FloatArray, kernels: FloatArray, r: FloatArray, noise: FloatArray) -> FloatArray:
    """Log marginal likelihood of each point without its constant, shape [P]; stacked Cholesky factors."""
    n = len(r)
    result = np.empty(len(variances))
    for start in range(0, len(variances), 64):
        part, of_part = variances[start : start + 64], noise[start : start + 64]
        # With r as one more row, the last row of the factor is (inverse factor) r; its corner only has to be large.
        bordered = np.empty((len(part), n + 1, n + 1))
        bordered[:, :n, :n] = _covariance(part, kernels, of_part)
        bordered[:, n, :n] = bordered[:, :n, n] = r
        bordered[:, n, n] = 1.0 + 2 * (r @ r) / of_part.min(axis=1)
        factor = np.linalg.cholesky(bordered)
        logs = np.log(np.diagonal(factor, axis1=1, axis2=2)[:, :n]).sum(axis=1)
        result[start : start + 64] = -0.5 * (factor[:, n, :n] ** 2).sum(axis=1) - logs
    return result


def _heaviest(score: FloatArray) -> tuple[IntArray, FloatArray]:
    """Points that carry the mass of the grid, and their shares of it."""
    weight = np.exp(score - score.max())
    order = np.argsort(-weight, kind="stable")
    cumulative = np.cumsum(weight[order]) / weight.sum()
    kept = order[: min(KEPT_POINTS, int(np.searchsorted(cumulative, KEPT_MASS)) + 1)]
    return kept, weight[kept] / weight[kept].sum()


def _predict(
    fitted: Feedback,
    total: FloatArray,
    groups: FloatArray,
    products: FloatArray,
    squares: FloatArray,
    overheads: FloatArray,
    descriptors: FloatArray,
    level: float,
) -> Prediction:
    """From p [M], group shares [M, G], products of shares with the measured [M, N], sums of squared shares [M]."""
    _rows("overheads", overheads, len(total))
    _rows("descriptors", descriptors, len(total))
    if overheads.shape[1] != len(fitted.overhead_units):
        raise RecordError(f"overheads has {overheads.shape[1]} columns, the correction {len(fitted.overhead_units)}")
    width = _quantile(level, fitted.degrees)
    mean, std = np.empty(len(total)), np.empty(len(total))
    for part in _chunks(len(total)):
        q = fitted.scale * total[part]
        u = overheads[part] / q[:, None] / fitted.overhead_units
        kernels = _rbf(_places(descriptors[part], total[part]), fitted.places)
        one = np.ones((len(q), 1))
        features = np.hstack([one, groups[part], u, products[part], *kernels])
        amounts = np.column_stack([one, (groups[part] ** 2).sum(axis=1), (u**2).sum(axis=1), squares[part], one, one])
        ratio, relative = _posterior(fitted, features, amounts)
        mean[part] = q * np.clip(1 + ratio, MIN_RATIO, MAX_RATIO)
        std[part] = q * relative * fitted.calibration
    return Prediction(mean, std, np.maximum(mean - width * std, 0.0), mean + width * std)


def _posterior(fitted: Feedback, features: FloatArray, amounts: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation of r of each row of features; `amounts` of each prior variance it has, [M, 6]."""
    known = _squared(features @ fitted.root.T)
    floor = amounts[:, -1] * fitted.prior[-1]  # rounding must not take a variance below the noise
    variance = np.maximum(amounts @ fitted.prior - known, floor) + _squared(features @ fitted.spread.T)
    return features @ fitted.weights, np.sqrt(variance)


def _squared(rows: NDArray[Any]) -> FloatArray:
    """Squared length of each row."""
    return np.asarray(np.einsum("ij,ij->i", rows, rows), np.float64)


def _spanning(kernel: FloatArray, matters: FloatArray) -> tuple[IntArray, FloatArray]:
    """Places whose kernels add up to those of all, and how much of each, shape [K, N].

    By Cholesky factorisation with pivots: what it leaves on the diagonal is the squared norm of what the chosen kernels
    do not express of each other one, and no kernel function is anywhere larger than its norm.

    Args:
        kernel: between all places, shape [N, N].
        matters: by how much an error of each kernel is multiplied, shape [N].
    """
    scaled = kernel * np.outer(matters, matters)
    left, factor = np.diag(scaled).copy(), np.zeros((len(kernel), 0))
    chosen: list[int] = []
    while len(chosen) < len(kernel) and left.max() > KERNEL_ERROR**2:
        most = int(np.argmax(left))
        column = (scaled[:, most] - factor @ factor[most]) / np.sqrt(left[most])
        factor, left = np.column_stack([factor, column]), left - column**2
        chosen.append(most)
    amounts: FloatArray = np.linalg.solve(kernel[np.ix_(chosen, chosen)], kernel[chosen]).astype(np.float64)
    return np.array(chosen, np.intp), amounts


def _shares(contributions_ms: FloatArray) -> tuple[FloatArray, FloatArray]:
    total = contributions_ms.sum(axis=1)
    return total, contributions_ms / total[:, None]


def _by_group(values: FloatArray, group_of: IntArray, groups: int) -> FloatArray:
    """Sums over the entries of each group, [M, E] to [M, G]."""
    membership = np.zeros((len(group_of), groups))
    membership[np.arange(len(group_of)), group_of] = 1.0
    return values @ membership


def _geometric_means(values: FloatArray) -> FloatArray:
    """Of the positive values of each column; infinite for a column without any: what no network has stays zero."""
    used = values > 0
    logs = np.log(np.where(used, values, 1.0)).sum(axis=0)
    return np.where(used.any(axis=0), np.exp(logs / np.maximum(used.sum(axis=0), 1)), np.inf)


def _places(z: FloatArray, total: FloatArray) -> FloatArray:
    """Where networks lie for the kernel: z [M, D] over the root of D, and log p, shape [M, D + 1]."""
    return np.column_stack([z / np.sqrt(max(z.shape[1], 1)), np.log(total) / LOG_UNIT])


def _rbf(places: FloatArray, others: FloatArray) -> list[FloatArray]:
    """Kernel of each length between places [M, D + 1] and others [N, D + 1], shape [M, N] each."""
    if places.shape[1] != others.shape[1]:
        raise RecordError(f"descriptors has {places.shape[1] - 1} columns, the correction {others.shape[1] - 1}")
    center = others.mean(axis=0) if len(others) else 0.0  # small numbers keep the differences exact
    near, far = places - center, others - center
    squared = (near**2).sum(axis=1)[:, None] + (far**2).sum(axis=1) - 2 * near @ far.T
    np.maximum(squared, 0.0, out=squared)
    return [np.exp(squared * (-0.5 / length**2)) for length in RBF_LENGTHS]


def _quantile(level: float, degrees: float) -> float:
    if not 0 < level < 1:
        raise RecordError(f"level must be between 0 and 1, got {level}")
    p = 0.5 + level / 2
    return float(special.stdtrit(degrees, p) if np.isfinite(degrees) else special.ndtri(p))


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, rows, _CHUNK))


def _array(name: str, values: ArrayLike, dimensions: int, minimum: float = -np.inf) -> FloatArray:
    """The values as float64, checked."""
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != dimensions:
        raise RecordError(f"{name} must have {dimensions} dimensions, got shape {result.shape}")
    if not np.isfinite(result).all():
        raise RecordError(f"{name}: {int((~np.isfinite(result)).sum())} values are not finite")
    if (result < minimum).any():
        raise RecordError(f"{name} must not be below {minimum:g}, got {result.min():g}")
    return result


def _rows(name: str, values: FloatArray, rows: int) -> None:
    if len(values) != rows:
        raise RecordError(f"{name} is of {len(values)} networks, their contributions of {rows}")


def _positive(what: str, values: FloatArray) -> None:
    if not (values > 0).all():
        raise RecordError(f"{what} must be positive in every network, got {values.min():g}")
