"""Proposes networks to train when their latency is known beforehand and accuracy is the only unknown.

A Gaussian process models accuracy alone; what a candidate would add to the front is then known in closed form, because
its latency is a number and not a second prediction. The method in one pass: hyper-parameters by marginal likelihood,
posterior medians of the trained networks as their denoised front, candidates by local search around that front and
random ones within the budget, and the candidate with the largest expected hypervolume improvement.

Sources: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1 (regression and marginal
likelihood); Astudillo and Frazier 2019, arXiv 1906.02327 (grey-box Bayesian optimisation); Emmerich et al. 2011,
Hypervolume-based expected improvement, CEC (closed form; here with one known objective); Snelson et al. 2003, Warped
Gaussian processes, NIPS (a scale of accuracy by marginal likelihood; here one of four ceilings); Ginsbourger et al.
2010, Kriging is well-suited to parallelize optimization (batches by a believer's fantasy).

Everything is a function of the scored networks and a seed: the same state gives the same proposal, in any process.
Genotypes are int64 [N, G], one row of gene indices for each network; accuracies are numbers of which more is better, in
any unit; latencies are milliseconds [N, D] on D devices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.blas import dtrsm
from scipy.optimize import minimize
from scipy.special import ndtr

from nas.core.errors import ConfigError, RecordError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Grid of the marginal likelihood; variances as shares of the signal's, the length as a share of `typical_distance`.
LINEAR_SHARES = (0.1, 0.3, 0.6, 0.8, 0.93)
PAIR_SHARES = (0.0, 0.5, 1.0)  # of what the linear part leaves; the rest is smooth
LENGTHS = (0.25, 0.42, 0.7)
NOISES = (0.0005, 0.003, 0.015, 0.06)
HEADROOMS = (np.inf, 4.0, 1.5, 0.7)
MAX_FIT_POINTS = 240  # the grid factorises this many points 140 times
RELEVANCE_SPREAD = 0.7  # deviation of the logarithm of a gene's weight before anything is known
VARIANCE_SPREAD = 1.0  # the same of a variance around its best value in the grid
RELEVANCE_STEPS = 25
PRIOR_POINTS = 4.0  # weight of the standardised variance 1 beside the observations when the signal variance is set
JITTER = 1e-8
COST_VARIANCE = 1.0  # of the part of a network's latency beside the signal of variance 1, where it is begun with
COST_RANGE = 4.0  # standard deviations of random networks' latency, beyond which others count as no farther
LEAST_COST_UNIT = 1e-6  # of logarithms: latencies that differ by less are all alike but for rounding
LATENCY_DRAWS = 4096  # random networks that tell how latency varies, and by which options
MANY_POINTS = 150  # from which on a candidate, whose cost grows with their square, is dear
START_WINDOW = 15  # networks next to the latency aimed at, of which the start takes the largest
REFERENCE_SPREADS = 8.0  # times (q90 - median) below the median, from where on a network counts at least
OUTLIER_SPREADS = 4.0  # a network this many times (q90 - median) below the median tells only that it is bad


@dataclass(frozen=True, slots=True)
class GreyBoxProblem:
    """What is known before any training.

    Attributes:
        cardinalities: choices of each gene, [G].
        ordinal: which genes are ordered, so that neighbouring indices are alike, [G].
        canonical: genotypes [N, G] to the one genotype that stands for each network.
        latency: canonical genotypes [N, G] to milliseconds [N, D] and their standard deviations [N, D]; NaN where
            unknown: such a network is not proposed, and where it was trained it is on no front.
        budgets_ms: largest latency on each device, [D]. A network has to keep at least one of them.
        margin: how many standard deviations the latency has to stay below the budget.
        weigh_keeping: whether the value of a candidate is multiplied by the probability that it keeps the budget.
        reference_accuracy: accuracy above which a network is worth anything; None: `worthless_accuracy` of the first
            `start` scored ones.
    """

    cardinalities: tuple[int, ...]
    ordinal: tuple[bool, ...]
    canonical: Callable[[IntArray], IntArray]
    latency: Callable[[IntArray], tuple[FloatArray, FloatArray]]
    budgets_ms: tuple[float, ...]
    margin: float = 1.0
    weigh_keeping: bool = False
    reference_accuracy: float | None = None

    def __post_init__(self) -> None:
        if not self.cardinalities or min(self.cardinalities) < 1 or len(self.ordinal) != len(self.cardinalities):
            raise ConfigError(
                f"cardinalities {self.cardinalities}, ordinal {self.ordinal}: give one number of choices, at least 1, "
                "and one flag for each gene"
            )
        if not self.budgets_ms or not all(np.isfinite(b) and b > 0 for b in self.budgets_ms):
            raise ConfigError(f"budgets_ms is {self.budgets_ms}; allowed: one finite number above 0 for each device")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a proposal costs, while the model sees fewer networks than `MANY_POINTS`; see `lessened`.

    The defaults are those that were measured.

    Attributes:
        start: networks of the spread over latency, before the model is used.
        random: random networks within the budget among the candidates.
        draws: random networks drawn at most to find these.
        children: networks bred in each round of the local search.
        rounds: rounds of the local search.
        parents: best candidates that breed beside the front.
        climbs: rounds after these, in which all networks that differ from the best ones in one gene join; fewer where
            none of them is better.
        climbers: best candidates whose neighbours join.
        model_points: scored networks that the model sees at most.
    """

    start: int = 10
    random: int = 600
    draws: int = 4096
    children: int = 900
    rounds: int = 4
    parents: int = 60
    climbs: int = 12
    climbers: int = 16
    model_points: int = 700

    def lessened(self) -> Effort:
        """That of a proposal from `MANY_POINTS` networks on: a candidate costs the square of their number.

        Of the defaults it makes what a proposal was measured with there (`benchmarks.ask_cost`).
        """
        return replace(
            self,
            random=(self.random + 1) // 2,
            children=(2 * self.children + 2) // 3,
            rounds=(self.rounds + 1) // 2,
            climbs=(self.climbs + 1) // 2,
            climbers=(self.climbers + 5) // 6,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The networks that were trained, in a fixed order such as that of their trial numbers.

    Attributes:
        genotypes: canonical, int64 [N, G].
        accuracies: more is better, [N].
        eligible: which may stand on the front, [N]; others, such as those over a further limit, only teach the model.
    """

    genotypes: IntArray
    accuracies: FloatArray
    eligible: BoolArray

    def __post_init__(self) -> None:
        count = len(self.genotypes)
        if self.genotypes.ndim != 2 or self.accuracies.shape != (count,) or self.eligible.shape != (count,):
            raise RecordError(
                f"scored networks: genotypes {self.genotypes.shape}, accuracies {self.accuracies.shape}, eligible "
                f"{self.eligible.shape}; allowed: [N, G], [N], [N]"
            )
        if not np.isfinite(self.accuracies).all():
            raise RecordError("scored networks: an accuracy is not finite; leave failed trainings out")

    def at(self, rows: IntArray | slice) -> Scored:
        """Some of them."""
        return Scored(self.genotypes[rows], self.accuracies[rows], self.eligible[rows])


@dataclass(frozen=True, slots=True, eq=False)
class Hyperparameters:
    """Kernel of standardised accuracies: three parts that are 1 for equal networks, and one of latency; see `kernel`.

    Attributes:
        linear: variance of what genes add one by one.
        pair: variance of what genes add two by two.
        rbf: variance of what is smooth in all genes at once.
        length: of the smooth part, in the unit of distances between codes.
        noise: variance of one training at the median accuracy.
        headroom: how far above the best accuracy its ceiling lies, in units of `Scale`; infinite: no ceiling.
        relevance: weight of each gene, [G], mean 1; None: all alike.
        cost: variance of what a network's latency adds, see `costs`.
        cost_center: mean logarithm of the latency of random networks.
        cost_unit: standard deviation of it.
    """

    linear: float
    pair: float
    rbf: float
    length: float
    noise: float
    headroom: float = np.inf
    relevance: FloatArray | None = None
    cost: float = 0.0
    cost_center: float = 0.0
    cost_unit: float = 1.0

    @property
    def prior(self) -> float:
        """Variance of a standardised accuracy before anything is known, but for the part of the latency."""
        return self.linear + self.pair + self.rbf


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Genotypes as the kernel sees them.

    Attributes:
        shares: columns whose products sum up to the weight of the genes in which two networks agree, [N, C].
        codes: ordered genes as index / (choices - 1), others as columns at distance 1 from each other, [N, K].
        norms: squared length of the rows of `codes`, [N].
        cost: of the networks, see `costs`, [N]; 0 where it is not used.
    """

    shares: NDArray[np.float32]
    codes: FloatArray
    norms: FloatArray
    cost: FloatArray

    def at(self, rows: IntArray | BoolArray | slice) -> Features:
        """Some rows."""
        return Features(self.shares[rows], self.codes[rows], self.norms[rows], self.cost[rows])


def joined(parts: list[Features]) -> Features:
    """All rows of several."""
    return Features(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("shares", "codes", "norms", "cost"))
    )


def encode(
    genotypes: IntArray,
    cardinalities: tuple[int, ...],
    ordinal: tuple[bool, ...],
    relevance: FloatArray | None = None,
    cost: FloatArray | None = None,
) -> Features:
    """Features of genotypes [N, G]: `relevance` [G] are the weights of the genes, all 1 unless given, `cost` is [N]."""
    weights = np.ones(len(cardinalities)) if relevance is None else relevance
    offsets = np.cumsum((0, *cardinalities[:-1]))
    one_hot = np.zeros((len(genotypes), sum(cardinalities)), np.float32)
    one_hot[np.arange(len(genotypes))[:, None], genotypes + offsets] = 1
    ordered = np.array(ordinal, bool)
    roots = np.sqrt(weights)
    steps = np.maximum(np.array(cardinalities)[ordered] - 1, 1)
    nominal = np.repeat(~ordered, cardinalities)
    by_choice = np.repeat(roots, cardinalities)
    codes = np.concatenate(
        [genotypes[:, ordered] * (roots[ordered] / steps), one_hot[:, nominal] * (by_choice[nominal] / np.sqrt(2.0))],
        axis=1,
    )
    cost = np.zeros(len(genotypes)) if cost is None else cost
    return Features(one_hot * by_choice.astype(np.float32), codes, (codes**2).sum(axis=1), cost)


def costs(latency_ms: FloatArray, h: Hyperparameters) -> FloatArray | None:
    """Latency [N, D] as the kernel sees it, [N]: mean logarithm over the devices, standardised; None if it does not.

    What costs time is in a space because it is worth some accuracy, exits too. With a part of their latency in the
    kernel, what genes have to explain is by how much a network is better than others that are as fast. Where latency
    is unknown it is the mean, and far from random networks it does not grow on.

    2026-11-30: standardised over random networks, not over the trained ones: those are few at first and near one
    another, and all others seemed far from them (of a small space, 0.66 of a hypervolume after 20 trainings, for 0.75).
    """
    if not h.cost:
        return None
    z = np.nan_to_num((_log_ms(latency_ms) - h.cost_center) / h.cost_unit)
    return np.clip(z, -COST_RANGE, COST_RANGE)


def _log_ms(latency_ms: FloatArray) -> FloatArray:
    """Mean logarithm over the devices, NaN where latency is unknown on one, [N]."""
    known = np.isfinite(latency_ms) & (latency_ms > 0)
    logs: FloatArray = np.log(np.where(known, latency_ms, np.nan)).mean(axis=1)
    return logs


def _random_networks(problem: GreyBoxProblem) -> tuple[IntArray, FloatArray]:
    """Random genotypes whose latency is known, [M, G], and the mean logarithm of it over the devices, [M]."""
    sizes = problem.cardinalities
    drawn = problem.canonical(np.random.default_rng(0).integers(0, sizes, size=(LATENCY_DRAWS, len(sizes))))
    log_ms = _log_ms(latencies(problem, drawn).ms)
    known = np.isfinite(log_ms)
    return drawn[known], log_ms[known]


def network_sizes(problem: GreyBoxProblem, genotypes: IntArray) -> FloatArray:
    """How large networks are, [N]: the sum of how large each option of their genes makes one.

    Options count as larger the more latency they cost on average over random networks, in equal steps within a gene. A
    network that is large for its latency has its options where they are cheap. On all five spaces of
    `benchmarks.samplers`, three of them published tables, networks of the same latency are the more accurate the larger
    they are: correlation 0.23 to 0.52.
    """
    sizes = problem.cardinalities
    offsets = np.cumsum((0, *sizes[:-1]))
    drawn, log_ms = _random_networks(problem)
    of_options = np.zeros(sum(sizes))
    for gene, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        counts = np.bincount(drawn[:, gene], minlength=size)
        seen = np.flatnonzero(counts)
        if len(seen) > 1:
            mean = np.bincount(drawn[:, gene], log_ms, size)[seen] / counts[seen]
            of_options[offset + seen[np.argsort(mean, kind="stable")]] = np.linspace(-0.5, 0.5, len(seen))
    result: FloatArray = of_options[genotypes + offsets].sum(axis=1)
    return result


def typical_distance(cardinalities: tuple[int, ...], ordinal: tuple[bool, ...]) -> float:
    """Root of the mean squared distance of the codes of two random genotypes; the unit of the kernel's lengths."""
    total = 0.0
    for size, ordered in zip(cardinalities, ordinal, strict=True):
        if size > 1:
            total += (size + 1) / (6 * (size - 1)) if ordered else (size - 1) / size
    return float(np.sqrt(max(total, 1e-12)))


def _shared(a: Features, b: Features, genes: int) -> FloatArray:
    shared = (a.shares @ b.shares.T).astype(np.float64)
    shared /= genes
    return shared


def _squared_distances(a: Features, b: Features) -> FloatArray:
    squared = a.codes @ b.codes.T
    squared *= -2.0
    squared += a.norms[:, None]
    squared += b.norms
    return np.maximum(squared, 0.0, out=squared)


def kernel(a: Features, b: Features, genes: int, h: Hyperparameters) -> FloatArray:
    """Covariance of the standardised accuracies of two lists of networks, [N, M], without noise.

    `linear` * s + `pair` * s^2 + `rbf` * exp(-d^2 / (2 `length`^2)) + `cost` * z z' with s the share of the genes that
    agree and z, z' the latency of both, see `costs`.
    """
    shared = _shared(a, b, genes)
    if h.pair:
        factor = h.pair * shared
        factor += h.linear
        shared *= factor
    else:
        shared *= h.linear
    result = shared
    if h.rbf:
        smooth = _squared_distances(a, b)
        smooth *= -0.5 / h.length**2
        np.exp(smooth, out=smooth)
        smooth *= h.rbf
        result += smooth
    if h.cost:
        result += np.outer(h.cost * a.cost, b.cost)
    return result


def prior_variance(features: Features, h: Hyperparameters) -> FloatArray:
    """Of each network's standardised accuracy, [N]."""
    return h.prior + h.cost * features.cost**2


@dataclass(frozen=True, slots=True)
class Scale:
    """How accuracies become numbers of mean 0 and variance 1, and back.

    With a ceiling c, t = -log(c - accuracy) is standardised, else t = accuracy: what parts add to a network counts the
    less the better it is already, and below a ceiling t is nearer to a sum of parts than accuracy is.

    Attributes:
        mean: of t.
        deviation: of t.
        ceiling: infinite: none.
    """

    mean: float
    deviation: float
    ceiling: float = np.inf

    def accuracy(self, values: FloatArray) -> FloatArray:
        """Accuracies from standardised numbers."""
        bent = self.mean + self.deviation * values
        return bent if np.isinf(self.ceiling) else self.ceiling - np.exp(-bent)


def standardised(
    accuracies: FloatArray, headroom: float = np.inf, least_ceiling: float = -np.inf
) -> tuple[FloatArray, Scale, FloatArray, float]:
    """Accuracies with mean 0 and variance 1, and how they came about.

    Those far below the rest, such as trainings at chance level, are drawn in first: how bad they are says nothing about
    good networks and would hide the differences between those.

    Args:
        accuracies: [N].
        headroom: of the ceiling above the best accuracy, in units of their 90 % quantile above their median.
        least_ceiling: below which the ceiling is not, before the headroom.

    Returns:
        The standardised accuracies [N]; their scale; the variance of the noise of each as a multiple of that at the
        median [N]; the logarithm of the density that the change of variables takes, for comparing scales.
    """
    middle, high = np.quantile(accuracies, [0.5, 0.9])
    unit = float(high - middle)
    drawn_in = np.maximum(accuracies, middle - OUTLIER_SPREADS * unit) if unit > 0 else accuracies
    if np.isinf(headroom) or unit <= 0:
        mean, deviation = float(drawn_in.mean()), float(drawn_in.std())
        deviation = deviation if deviation > 0 else 1.0
        log_density = -len(accuracies) * np.log(deviation)
        return (drawn_in - mean) / deviation, Scale(mean, deviation), np.ones(len(accuracies)), log_density
    ceiling = max(float(accuracies.max()), least_ceiling) + headroom * unit
    below = ceiling - drawn_in
    bent = -np.log(below)
    mean, deviation = float(bent.mean()), float(bent.std())
    noise = ((ceiling - middle) / below) ** 2
    log_density = -len(accuracies) * np.log(deviation) + float(bent.sum())
    return (bent - mean) / deviation, Scale(mean, deviation, ceiling), noise, log_density


def log_marginal_likelihood(covariance: FloatArray, observed: FloatArray) -> float:
    """Of observations [N] with mean 0 and a covariance [N, N], noise included (Rasmussen and Williams, eq. 2.30)."""
    factor = cholesky(covariance, lower=True, check_finite=False)
    half = solve_triangular(factor, observed, lower=True, check_finite=False)
    return float(-0.5 * half @ half - np.log(np.diag(factor)).sum() - 0.5 * len(observed) * np.log(2 * np.pi))


def fit_hyperparameters(problem: GreyBoxProblem, scored: Scored) -> Hyperparameters:
    """The headroom and then the point of the grid with the largest marginal likelihood, and the genes' relevance there.

    Three steps, each from the best of the one before: headrooms, each with and without a part of the latency, on a
    coarse grid; the grid; `fit_relevance`.

    2026-11-30: while networks are fewer than genes, what is beyond single genes is pairs alone. The smooth part, which
    can be anything then, made the share of the best known hypervolume after 15 trainings 0.54 where it is 0.61 without
    (mean of both simulated problems, 12 seeds).
    """
    seen = scored.at(spread_rows(len(scored.accuracies), MAX_FIT_POINTS))
    pair_shares = PAIR_SHARES[-1:] if len(seen.accuracies) < len(problem.cardinalities) else PAIR_SHARES
    coarse = (LINEAR_SHARES[::2], (pair_shares[len(pair_shares) // 2],), LENGTHS[1:2], NOISES[1::2])
    ms = latencies(problem, seen.genotypes).ms
    without = Hyperparameters(0.6, 0.0, 0.4, LENGTHS[0], NOISES[0])
    _, log_ms = _random_networks(problem)
    starts = [without]
    if len(log_ms) and log_ms.std() > LEAST_COST_UNIT:
        center, unit = float(log_ms.mean()), float(log_ms.std())
        starts.append(replace(without, cost=COST_VARIANCE, cost_center=center, cost_unit=unit))
    started = [replace(start, headroom=headroom) for headroom, start in itertools.product(HEADROOMS, starts)]
    likely = [_best_of_grid(problem, seen, ms, start, *coarse)[0] for start in started]
    start = started[int(np.argmax(likely))]
    _, best = _best_of_grid(problem, seen, ms, start, LINEAR_SHARES, pair_shares, LENGTHS, NOISES)
    return fit_relevance(problem, seen, ms, best)


def _best_of_grid(
    problem: GreyBoxProblem,
    scored: Scored,
    latency_ms: FloatArray,
    start: Hyperparameters,
    linear_shares: tuple[float, ...],
    pair_shares: tuple[float, ...],
    lengths: tuple[float, ...],
    noises: tuple[float, ...],
) -> tuple[float, Hyperparameters]:
    """The logarithm of the largest marginal likelihood, but for a constant, and where it is.

    The signal variance has a closed form for each shape of the kernel (ibid., exercise 5.6; here with a prior that is
    worth `PRIOR_POINTS` observations), so that only shares, length and noise are searched. Headroom and the part of the
    latency are those of `start`, the latter as a share of the signal.
    """
    features = encoded(problem, scored.genotypes, start, latency_ms)
    by_cost = start.cost * np.outer(features.cost, features.cost)
    shared, squared = _shared(features, features, len(problem.cardinalities)), _squared_distances(features, features)
    unit = typical_distance(problem.cardinalities, problem.ordinal)
    observed, _, noise_shape, log_density = standardised(scored.accuracies, start.headroom, least_ceiling(problem))
    count = len(observed)
    best, best_value = start, -np.inf
    for length, pair_share in itertools.product(lengths, pair_shares):
        if pair_share == 1 and length != lengths[0]:
            continue  # nothing is smooth, so all lengths are alike
        rest = pair_share * shared**2 + (1 - pair_share) * np.exp(squared * (-0.5 / (length * unit) ** 2))
        for linear, noise in itertools.product(linear_shares, noises):
            covariance = linear * shared + (1 - linear) * rest + by_cost
            covariance[np.diag_indices(count)] += noise * noise_shape + JITTER
            factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
            half = solve_triangular(factor, observed, lower=True, check_finite=False)
            signal = (half @ half + PRIOR_POINTS) / (count + PRIOR_POINTS)
            value = -0.5 * (count + PRIOR_POINTS) * np.log(signal) - np.log(np.diag(factor)).sum() + log_density
            if value > best_value:
                best_value = value
                pair, smooth = (1 - linear) * pair_share, (1 - linear) * (1 - pair_share)
                best = replace(
                    start,
                    linear=linear * signal,
                    pair=pair * signal,
                    rbf=smooth * signal,
                    length=length * unit,
                    noise=noise * signal,
                    cost=start.cost * signal,
                )
    return float(best_value), best


def fit_relevance(
    problem: GreyBoxProblem, scored: Scored, latency_ms: FloatArray, start: Hyperparameters
) -> Hyperparameters:
    """Weights of the genes by marginal likelihood and a log-normal prior around 1, with the variances beside them.

    Automatic relevance determination (Rasmussen and Williams, section 5.1; gradient: eq. 5.9) in which one weight of a
    gene serves all three parts of the kernel, as in Agrawal and Broderick 2021, arXiv 2106.12408.
    """
    least = least_ceiling(problem)
    observed, _, noise_shape, _ = standardised(scored.accuracies, start.headroom, least)
    genes, count = len(problem.cardinalities), len(observed)
    plain = encode(scored.genotypes, problem.cardinalities, problem.ordinal, None, costs(latency_ms, start))
    alike_in_cost = np.outer(plain.cost, plain.cost)
    share_genes, code_genes = _columns(problem.cardinalities, problem.ordinal)
    columns = plain.shares.astype(np.float64)
    variances = np.array([start.linear, start.pair, start.rbf, start.noise, start.cost])
    used = variances > 0
    origin = np.log(variances[used])

    def unpacked(point: FloatArray) -> tuple[FloatArray, FloatArray]:
        levels = np.zeros(len(variances))
        levels[used] = np.exp(point[genes:])
        return np.exp(point[:genes]), levels

    def loss(point: FloatArray) -> tuple[float, FloatArray]:
        weights, (linear, pair, rbf, noise, cost) = unpacked(point)
        weighted = columns * weights[share_genes]
        shared = weighted @ columns.T / genes
        codes = plain.codes * np.sqrt(weights[code_genes])
        norms = (codes**2).sum(axis=1)
        squared = np.maximum(norms[:, None] + norms - 2 * codes @ codes.T, 0.0)
        smooth = np.exp(squared * (-0.5 / start.length**2))
        covariance = shared * (linear + pair * shared) + rbf * smooth + cost * alike_in_cost
        covariance[np.diag_indices(count)] += noise * noise_shape + JITTER
        factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
        inverse = cho_solve((factor, True), np.eye(count), check_finite=False)
        solved = inverse @ observed
        value = 0.5 * observed @ solved + np.log(np.diag(factor)).sum()
        left = inverse - np.outer(solved, solved)  # the gradient is half the trace of this times that of the covariance
        by_share = left * ((linear + 2 * pair * shared) / genes)
        by_distance = left * smooth * (-0.5 * rbf / start.length**2)
        along = by_distance.sum(axis=1)
        gradient = np.zeros(len(point))
        of_shares = (columns * (by_share @ columns)).sum(axis=0)
        of_codes = 2 * ((plain.codes**2).T @ along - (plain.codes * (by_distance @ plain.codes)).sum(axis=0))
        gradient[:genes] = np.bincount(share_genes, of_shares, genes) + np.bincount(code_genes, of_codes, genes)
        gradient[:genes] *= 0.5 * weights
        levels = np.array(
            [
                linear * (left * shared).sum(),
                pair * (left * shared**2).sum(),
                rbf * (left * smooth).sum(),
                noise * (np.diag(left) * noise_shape).sum(),
                cost * (left * alike_in_cost).sum(),
            ]
        )
        gradient[genes:] = 0.5 * levels[used]
        away = np.concatenate([point[:genes] / RELEVANCE_SPREAD**2, (point[genes:] - origin) / VARIANCE_SPREAD**2])
        offset = np.concatenate([point[:genes], point[genes:] - origin])
        return float(value + 0.5 * offset @ away), gradient + away

    found = minimize(
        loss,
        np.concatenate([np.zeros(genes), origin]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-4.0, 4.0)] * genes + [(level - 4.0, level + 4.0) for level in origin],
        options={"maxiter": RELEVANCE_STEPS},
    )
    weights, (linear, pair, rbf, noise, cost) = unpacked(found.x)
    mean = float(weights.mean())
    return replace(
        start,
        linear=linear * mean,
        pair=pair * mean**2,
        rbf=rbf,
        length=start.length / np.sqrt(mean),
        noise=noise,
        cost=cost,
        relevance=weights / mean,
    )


def _columns(cardinalities: tuple[int, ...], ordinal: tuple[bool, ...]) -> tuple[IntArray, IntArray]:
    """The gene of each column of `Features.shares` and of `Features.codes`."""
    genes = np.arange(len(cardinalities))
    ordered = np.array(ordinal, bool)
    by_choice = np.repeat(genes, cardinalities)
    nominal = by_choice[np.repeat(~ordered, cardinalities)]
    return by_choice, np.concatenate([genes[ordered], nominal])


def refit_count(count: int) -> int:
    """How many of `count` scored networks the hyper-parameters are fitted to.

    They change every 10 up to 100, every 50 up to 500, every 250 beyond: a function of the state alone, so that what is
    remembered between proposals saves time and changes nothing.
    """
    step = 1 if count < 10 else 10 if count < 100 else 50 if count < 500 else 250
    return count // step * step


def batch_count(count: int) -> int:
    """How many networks to propose at once to one worker after `count` trainings."""
    return 1 if count < 150 else 5 if count < 500 else 20


def spread_rows(count: int, most: int) -> IntArray:
    """At most `most` of `count` rows, evenly spread, the last one among them."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def encoded(problem: GreyBoxProblem, genotypes: IntArray, h: Hyperparameters, latency_ms: FloatArray) -> Features:
    """Features of genotypes [N, G] with their latency [N, D] for a kernel with these hyper-parameters."""
    return encode(genotypes, problem.cardinalities, problem.ordinal, h.relevance, costs(latency_ms, h))


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """Posterior of a Gaussian process over accuracy, and of networks that are being trained.

    Attributes:
        known: features of the N trained and then of the P pending networks.
        factor: lower Cholesky factor of the covariance of all of them, noise included, [N + P, N + P].
        weights: inverse covariance of the trained ones times their standardised accuracies, [N].
        scale: how accuracies were standardised.
    """

    known: Features
    factor: FloatArray
    weights: FloatArray
    scale: Scale
    genes: int
    hyperparameters: Hyperparameters


def fit_model(
    problem: GreyBoxProblem, scored: Scored, hyperparameters: Hyperparameters, pending: IntArray | None = None
) -> Model:
    """The posterior given scored networks.

    Pending networks are believed to give their mean: that leaves every mean as it is and takes away the doubt near
    them, so that parallel workers spread.
    """
    observed, scale, noise_shape, _ = standardised(scored.accuracies, hyperparameters.headroom, least_ceiling(problem))
    pending = scored.genotypes[:0] if pending is None else pending
    genotypes = np.concatenate([scored.genotypes, pending])
    features = encoded(problem, genotypes, hyperparameters, latencies(problem, genotypes).ms)
    genes = len(problem.cardinalities)
    covariance = kernel(features, features, genes, hyperparameters)
    noise = hyperparameters.noise * np.append(noise_shape, np.ones(len(pending)))
    covariance[np.diag_indices_from(covariance)] += noise + JITTER
    factor = cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)
    trained = len(observed)
    weights = cho_solve((factor[:trained, :trained], True), observed, check_finite=False)
    return Model(features, factor, weights, scale, genes, hyperparameters)


def least_ceiling(problem: GreyBoxProblem) -> float:
    """Below which the ceiling of accuracies is not, before the headroom."""
    return -np.inf if problem.reference_accuracy is None else problem.reference_accuracy


def predict_accuracy(model: Model, features: Features) -> FloatArray:
    """Posterior median of the accuracy without noise, [M]."""
    trained = len(model.weights)
    cross = kernel(features, model.known.at(slice(trained)), model.genes, model.hyperparameters)
    return model.scale.accuracy(cross @ model.weights)


def predict(model: Model, features: Features) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Posterior mean [M] and deviation [M] of the standardised accuracy without noise, and the whitened covariances.

    The last, [N + P, M], are what a further network in a batch needs.
    """
    cross = kernel(model.known, features, model.genes, model.hyperparameters)
    mean = model.weights @ cross[: len(model.weights)]
    # X L' = cross' is solved in place, where solve_triangular would copy a matrix that is not in Fortran's order.
    white = dtrsm(1.0, model.factor, cross.T, side=1, lower=1, trans_a=1, overwrite_b=1).T
    variance = prior_variance(features, model.hyperparameters) - np.einsum("nm,nm->m", white, white)
    return mean, np.sqrt(np.maximum(variance, 1e-12)), white


def expected_improvement(
    mean: FloatArray,
    deviation: FloatArray,
    latency_ms: FloatArray,
    front: tuple[FloatArray, FloatArray],
    reference: tuple[float, float],
    scale: Scale | None = None,
) -> FloatArray:
    """Expected growth of the hypervolume of accuracy and latency by each candidate, [M].

    With the front sorted by latency, the candidate improves the strip between two of its latencies l_i and l_(i+1) by
    what it is above the accuracy f_i there: the sum over i of max(0, l_(i+1) - max(l_i, l)) times the expected
    improvement over f_i, with l_0 = -infinity, f_0 the reference accuracy and l_(k+1) the reference latency.

    Below a ceiling c the distance of an accuracy to it is log-normal, and the improvement over f_i is what that
    distance falls short of c - f_i: the closed form of Black and Scholes 1973 for a put.

    Args:
        mean: of the candidates' standardised accuracy, [M].
        deviation: of that, [M]; 0 is allowed.
        latency_ms: of the candidates, [M].
        front: accuracies [K] and latencies [K] in any order, dominated ones allowed.
        reference: accuracy above and latency below which a point counts.
        scale: how accuracies were standardised; None: not at all.
    """
    scale = scale or Scale(0.0, 1.0)
    accuracies, latencies = staircase(front[0], front[1], reference)
    heights = np.append(reference[0], accuracies)
    ends = np.append(latencies, reference[1])
    starts = np.append(-np.inf, latencies)
    result = np.zeros(len(mean))
    bent = scale.mean + scale.deviation * mean
    spread = np.maximum(scale.deviation * deviation, 1e-12)
    distance = np.exp(0.5 * spread**2 - bent) if np.isfinite(scale.ceiling) else bent  # mean one to the ceiling
    order = np.argsort(latency_ms)
    first = np.searchsorted(latency_ms[order], ends)  # candidates from here on are not faster than the strip's end
    for height, start, end, until in zip(heights, starts, ends, first, strict=True):
        rows = order[:until]
        if not len(rows):
            continue
        if np.isinf(scale.ceiling):
            gain = bent[rows] - height
            u = gain / spread[rows]
            improvement = gain * ndtr(u) + spread[rows] * np.exp(-0.5 * u * u) * (1 / np.sqrt(2 * np.pi))
        elif scale.ceiling > height:
            room = scale.ceiling - height
            u = (np.log(room) + bent[rows]) / spread[rows]
            improvement = room * ndtr(u) - distance[rows] * ndtr(u - spread[rows])
        else:
            continue
        width = end - np.maximum(start, latency_ms[rows])
        result[rows] += width * np.maximum(improvement, 0.0)
    return result


def staircase(
    accuracies: FloatArray, latencies_ms: FloatArray, reference: tuple[float, float]
) -> tuple[FloatArray, FloatArray]:
    """The points that beat the reference and that no other one dominates, by rising latency and accuracy, [K] each."""
    order = np.lexsort((-accuracies, latencies_ms))
    order = order[(accuracies[order] > reference[0]) & (latencies_ms[order] < reference[1])]
    before = np.maximum.accumulate(np.append(reference[0], accuracies[order]))[:-1]
    order = order[accuracies[order] > before]
    return accuracies[order], latencies_ms[order]


def worthless_accuracy(first: FloatArray) -> float:
    """Accuracy from which on a network counts, from those of the first trainings, which are spread over latency.

    As far below the worst of them as that is below their median: the fastest networks of the front are less accurate
    than random ones of any latency. Trainings that failed at chance level do not draw it far down.

    2026-11-30: from `REFERENCE_SPREADS` below the median on, where it was 4. With these 2 searches of 20 on
    NAS-Bench-Macro never trained the fastest networks of the front, and had 0.97 and 0.99 of its hypervolume for good.
    """
    worst, middle, high = np.quantile(first, [0.0, 0.5, 0.9])
    return float(max(2 * worst - middle, middle - REFERENCE_SPREADS * (high - middle)))


def model_rows(accuracies: FloatArray, latency_ms: FloatArray, most: int) -> IntArray:
    """Which of the scored networks the model sees: all while they are few, then those near the fronts and a spread.

    Two thirds are taken front by front (non-dominated layers of the observed values, on the devices in turn), the rest
    evenly from the others in the order of their accuracy.

    Args:
        accuracies: [N].
        latency_ms: [N, D], NaN where unknown.
        most: rows at most.
    """
    count = len(accuracies)
    if count <= most:
        return np.arange(count)
    chosen = np.zeros(count, bool)
    near = 2 * most // 3
    for device in itertools.cycle(range(latency_ms.shape[1])):
        left = np.flatnonzero(~chosen & np.isfinite(latency_ms[:, device]))
        if not len(left):
            break
        order = left[np.lexsort((-accuracies[left], latency_ms[left, device]))]
        before = np.maximum.accumulate(np.append(-np.inf, accuracies[order]))[:-1]
        layer = order[accuracies[order] > before]
        if chosen.sum() + len(layer) > near:
            break
        chosen[layer] = True
    others = np.flatnonzero(~chosen)
    others = others[np.argsort(accuracies[others], kind="stable")]
    chosen[others[spread_rows(len(others), most - int(chosen.sum()))]] = True
    return np.flatnonzero(chosen)


@dataclass(frozen=True, slots=True, eq=False)
class Latencies:
    """What the tables say of some networks.

    Attributes:
        ms: [N, D], NaN where unknown.
        keeping: probability that each keeps each budget, [N, D]; 0 where unknown.
        within: which keep each budget with the margin, [N, D].
    """

    ms: FloatArray
    keeping: FloatArray
    within: BoolArray

    def at(self, rows: IntArray | BoolArray) -> Latencies:
        """Some of them."""
        return Latencies(self.ms[rows], self.keeping[rows], self.within[rows])


def latencies(problem: GreyBoxProblem, genotypes: IntArray) -> Latencies:
    """Latency of canonical genotypes [N, G].

    Raises:
        RecordError: the problem's latency gives arrays of another shape.
    """
    shape = (len(genotypes), len(problem.budgets_ms))
    # Callers' functions need not know what the latency of no network looks like.
    ms, deviation = problem.latency(genotypes) if len(genotypes) else (np.empty(shape), np.empty(shape))
    if ms.shape != shape or deviation.shape != shape:
        raise RecordError(f"latency: arrays {ms.shape} and {deviation.shape} were given; allowed: {shape} for both")
    budgets = np.array(problem.budgets_ms)
    spread = np.maximum(np.nan_to_num(deviation), 1e-12)
    with np.errstate(invalid="ignore"):
        keeping = np.nan_to_num(ndtr((budgets - ms) / spread))
        keeping[np.nan_to_num(deviation) <= 0] = 1.0
        within = ms + problem.margin * spread <= budgets
    return Latencies(ms, np.where(within, keeping, 0.0), within)


def hashes(genotypes: IntArray) -> NDArray[np.uint64]:
    """One number for each row; two different rows share one with a probability of about 2^-60."""
    factors = np.random.default_rng(0).integers(1, 2**63, size=genotypes.shape[1], dtype=np.uint64) * np.uint64(2) + 1
    mixed = (genotypes.astype(np.uint64) + np.uint64(1)) * factors
    mixed ^= mixed >> np.uint64(29)
    return (mixed * np.uint64(0xBF58476D1CE4E5B9)).sum(axis=1, dtype=np.uint64)


def _new(genotypes: IntArray, taken: NDArray[np.uint64]) -> IntArray:
    """The first of each distinct row whose hash is not taken, in their order."""
    codes = hashes(genotypes)
    _, first = np.unique(codes, return_index=True)
    first.sort()
    return genotypes[first[~np.isin(codes[first], taken)]]


def mutated(
    problem: GreyBoxProblem, parents: IntArray, rng: np.random.Generator, changes: tuple[int, ...] = (1, 2, 3)
) -> IntArray:
    """Canonical children of genotypes [N, G]: each gene changes with probability m / G, m drawn from `changes`.

    At least one gene changes; half of the changes are one step up or down, half a fresh value.
    """
    sizes = np.array(problem.cardinalities)
    free = sizes > 1
    shape = parents.shape
    rate = rng.choice(changes, size=(shape[0], 1)) / max(1, int(free.sum()))
    weights = np.where(free, rng.random(shape), np.inf)
    hit = weights < rate
    hit[np.arange(shape[0]), weights.argmin(axis=1)] = True
    step = parents + rng.choice((-1, 1), size=shape)
    step = np.where(step < 0, 1, np.where(step >= sizes, sizes - 2, step))
    fresh = rng.integers(0, sizes, size=shape)
    return problem.canonical(np.where(hit & free, np.where(rng.random(shape) < 0.5, step, fresh), parents))


def bred(problem: GreyBoxProblem, base: IntArray, rng: np.random.Generator, count: int) -> IntArray:
    """`count` canonical children of genotypes [N, G]: 40 % by uniform crossover of two, all mutated."""
    parents = base[rng.integers(len(base), size=count)]
    others = base[rng.integers(len(base), size=count)]
    crossed = (rng.random((count, 1)) < 0.4) & (rng.random(parents.shape) < 0.5)
    return mutated(problem, np.where(crossed, others, parents), rng)


def neighbours(problem: GreyBoxProblem, genotypes: IntArray) -> IntArray:
    """All canonical genotypes that come of genotypes [N, G] by another option of one gene, [M, G]."""
    sizes = problem.cardinalities
    genes = np.repeat(np.arange(len(sizes)), np.array(sizes) * len(genotypes))
    options = np.concatenate([np.repeat(np.arange(size), len(genotypes)) for size in sizes])
    changed = np.tile(genotypes, (sum(sizes), 1))
    cells = np.arange(len(changed)), genes
    is_other = changed[cells] != options
    changed[cells] = options
    return problem.canonical(changed[is_other])


def random_within(
    problem: GreyBoxProblem, rng: np.random.Generator, count: int, draws: int, near: IntArray | None = None
) -> IntArray:
    """At most `count` distinct canonical genotypes that keep a budget, [N, G].

    Random ones first. Where the budget is so tight that fewer than a tenth of `count` are found among `draws`, those
    with the least excess, and the given networks, are mutated towards lower latency.
    """
    sizes = problem.cardinalities
    nothing = np.empty(0, np.uint64)
    found = [np.empty((0, len(sizes)), np.int64)]
    drawn = 0
    while drawn < draws and sum(map(len, found)) < count:
        size = min(draws - drawn, 1024)
        drawn += size
        rows = problem.canonical(rng.integers(0, sizes, size=(size, len(sizes))))
        found.append(rows[latencies(problem, rows).within.any(axis=1)])
    within = _new(np.concatenate(found), nothing)
    if 10 * len(within) >= count or 10 * len(within) >= drawn:
        return within[:count]
    parents = np.concatenate([within, near[:64] if near is not None else within, rows[:256]])
    for _ in range(40):
        parents = _new(np.concatenate([parents, bred(problem, parents, rng, 512)]), nothing)
        known = latencies(problem, parents)
        inside = known.within.any(axis=1)
        within = _new(np.concatenate([within, parents[inside]]), nothing)
        if len(within) >= count:
            break
        with np.errstate(invalid="ignore"):
            excess = (known.ms / np.array(problem.budgets_ms)).min(axis=1, initial=np.inf, where=~np.isnan(known.ms))
        # Those within the budget breed on at random, or the fastest corner of the space would be all that is found.
        excess = np.where(inside, rng.random(len(parents)), excess)
        parents = parents[np.argsort(excess, kind="stable")[:128]]
    return within[:count]


def start_spread(
    problem: GreyBoxProblem, taken: IntArray, seed: tuple[int, ...], count: int, effort: Effort | None = None
) -> IntArray:
    """At most `count` networks spread evenly over latency, none of `taken` [T, G] among them, [N, G].

    The latency of each is aimed at by a low-discrepancy sequence whose place is the number of those taken, on the
    devices in turn, between the lowest that was drawn and the budget, the first in the middle, where one network alone
    is worth the most; of the `START_WINDOW` networks nearest to it the largest is taken, see `network_sizes`.
    """
    effort = effort or Effort()
    rng = np.random.default_rng(list(seed))
    drawn = _new(random_within(problem, rng, effort.random, effort.draws, taken), hashes(taken))
    known = latencies(problem, drawn)
    chosen: list[int] = []
    golden = (np.sqrt(5) - 1) / 2
    size = network_sizes(problem, drawn)
    shift = np.random.default_rng(list(seed[:1])).random()
    for place in range(len(taken), len(taken) + count):
        device = place % len(problem.budgets_ms)
        usable = np.flatnonzero(known.within[:, device] & ~np.isin(np.arange(len(drawn)), chosen))
        if not len(usable):
            usable = np.setdiff1d(np.arange(len(drawn)), chosen)
            if not len(usable):
                break
        ms = np.nan_to_num(known.ms[usable, device], nan=np.inf)
        low = float(ms.min())
        nth = place // len(problem.budgets_ms)
        share = (shift + golden * nth) % 1 if nth else 0.5
        aim = low + (problem.budgets_ms[device] - low) * share
        near = usable[np.argsort(np.abs(ms - aim), kind="stable")[:START_WINDOW]]
        chosen.append(int(near[size[near].argmax()]))
    return drawn[chosen]


def propose(
    problem: GreyBoxProblem,
    scored: Scored,
    *,
    pending: IntArray | None = None,
    excluded: IntArray | None = None,
    count: int = 1,
    seed: tuple[int, ...] = (0,),
    effort: Effort | None = None,
    hyperparameters: Callable[[GreyBoxProblem, Scored], Hyperparameters] = fit_hyperparameters,
) -> IntArray:
    """The networks to train next: canonical, distinct, never seen, within a budget; fewer where none is left.

    Args:
        problem: what is known before training.
        scored: what was trained, in a fixed order.
        pending: canonical genotypes [P, G] that are being trained.
        excluded: canonical genotypes [E, G] that are not to be proposed, such as those whose training failed.
        count: networks of one batch, `batch_count` gives what suits one worker.
        seed: decides all draws; the first number that of the search, further ones such as the trial number.
        effort: how much the proposal may cost.
        hyperparameters: `fit_hyperparameters`, or the same with a memory.

    Returns:
        int64 [<= count, G].
    """
    effort = effort or Effort()
    genes = len(problem.cardinalities)
    none = np.empty((0, genes), np.int64)
    pending = none if pending is None else pending
    taken = np.concatenate([scored.genotypes, pending, none if excluded is None else excluded])
    started = len(scored.genotypes) + len(pending)
    if started < effort.start or len(scored.genotypes) < 3:
        missing = max(1, min(count, effort.start - started))
        first = start_spread(problem, taken, seed, missing, effort)
        if len(first) == count or len(scored.genotypes) < 3:
            return first
        rest = propose(
            problem,
            scored,
            pending=np.concatenate([pending, first]),
            excluded=excluded,
            count=count - len(first),
            seed=(*seed, 1),
            effort=replace(effort, start=0),
            hyperparameters=hyperparameters,
        )
        return np.concatenate([first, rest])
    chosen = hyperparameters(problem, scored.at(slice(refit_count(len(scored.genotypes)))))
    return _modelled(problem, scored, pending, taken, count, np.random.default_rng(list(seed)), effort, chosen)


@dataclass(frozen=True, slots=True, eq=False)
class Fronts:
    """Accuracies and latencies of the networks that may stand on the front of each device."""

    accuracies: FloatArray  # [F]
    latencies: Latencies  # of these networks
    genotypes: IntArray  # [F, G]
    reference: float

    def with_one(self, accuracy: float, ms: FloatArray, within: BoolArray, genotype: IntArray) -> Fronts:
        known = self.latencies
        return Fronts(
            np.append(self.accuracies, accuracy),
            Latencies(np.vstack([known.ms, ms]), np.vstack([known.keeping, within]), np.vstack([known.within, within])),
            np.vstack([self.genotypes, genotype]),
            self.reference,
        )


def improvement(
    problem: GreyBoxProblem, model: Model, fronts: Fronts, known: Latencies, mean: FloatArray, deviation: FloatArray
) -> FloatArray:
    """Sum over the devices of the expected improvement of their fronts, each as a share of its budget, [M]."""
    result = np.zeros(len(mean))
    for device, budget in enumerate(problem.budgets_ms):
        on = fronts.latencies.within[:, device]
        rows = np.flatnonzero(known.within[:, device])
        front = fronts.accuracies[on], fronts.latencies.ms[on, device]
        gain = expected_improvement(
            mean[rows], deviation[rows], known.ms[rows, device], front, (fronts.reference, budget), model.scale
        )
        result[rows] += gain / budget * (known.keeping[rows, device] if problem.weigh_keeping else 1.0)
    return result


def posterior(
    problem: GreyBoxProblem, scored: Scored, pending: IntArray, effort: Effort, hyperparameters: Hyperparameters
) -> tuple[Scored, Model, Fronts]:
    """The networks that the model sees, the model, and the denoised fronts of these and of pending ones."""
    of_scored = latencies(problem, scored.genotypes)
    reference = problem.reference_accuracy
    if reference is None:
        reference = worthless_accuracy(scored.accuracies[: max(effort.start, 4)])
    rows = model_rows(scored.accuracies, of_scored.ms, effort.model_points)
    seen = scored.at(rows)
    model = fit_model(problem, seen, hyperparameters, pending)
    on = seen.eligible & of_scored.within[rows].any(axis=1)
    front_rows = np.concatenate([np.flatnonzero(on), len(rows) + np.arange(len(pending))])
    genotypes = np.concatenate([seen.genotypes[on], pending])
    accuracies = predict_accuracy(model, model.known.at(front_rows))
    return seen, model, Fronts(accuracies, latencies(problem, genotypes), genotypes, reference)


def _modelled(
    problem: GreyBoxProblem,
    scored: Scored,
    pending: IntArray,
    taken: IntArray,
    count: int,
    rng: np.random.Generator,
    effort: Effort,
    hyperparameters: Hyperparameters,
) -> IntArray:
    seen, model, fronts = posterior(problem, scored, pending, effort, hyperparameters)
    effort = effort if len(seen.accuracies) < MANY_POINTS else effort.lessened()
    base = on_a_front(problem, fronts)
    near = fronts.genotypes[base] if len(base) else seen.genotypes
    codes = hashes(taken)
    candidates = _new(random_within(problem, rng, effort.random, effort.draws, near), codes)
    pool = Pool.of(problem, model, fronts, candidates, is_for_batch=count > 1)
    for _ in range(effort.rounds):
        best = pool.genotypes[np.argsort(-pool.values, kind="stable")[: effort.parents]]
        parents = np.concatenate([near, best])
        codes = np.concatenate([codes, hashes(candidates)])  # those over the budget too: they are not looked at again
        candidates = _new(bred(problem, parents, rng, effort.children), codes)
        pool = pool.united(Pool.of(problem, model, fronts, candidates, is_for_batch=count > 1))
    for _ in range(effort.climbs):
        best = pool.genotypes[np.argsort(-pool.values, kind="stable")[: effort.climbers]]
        codes = np.concatenate([codes, hashes(candidates)])
        candidates = _new(neighbours(problem, best), codes)
        before = pool.values.max(initial=-np.inf)
        pool = pool.united(Pool.of(problem, model, fronts, candidates, is_for_batch=count > 1))
        if pool.values.max(initial=-np.inf) <= before:
            break
    return best_batch(problem, model, fronts, pool, count)


def on_a_front(problem: GreyBoxProblem, fronts: Fronts) -> IntArray:
    """Rows of the networks that no other one dominates on some device."""
    found: list[int] = []
    for device in range(len(problem.budgets_ms)):
        rows = np.flatnonzero(fronts.latencies.within[:, device])
        order = rows[np.lexsort((-fronts.accuracies[rows], fronts.latencies.ms[rows, device]))]
        before = np.maximum.accumulate(np.append(-np.inf, fronts.accuracies[order]))[:-1]
        found += order[fronts.accuracies[order] > before].tolist()
    return np.unique(np.array(found, np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Candidates with what the model says of them; `white` is large and has no rows where no batch needs it."""

    genotypes: IntArray
    features: Features
    latencies: Latencies
    mean: FloatArray
    deviation: FloatArray
    white: FloatArray
    values: FloatArray

    @staticmethod
    def of(
        problem: GreyBoxProblem, model: Model, fronts: Fronts, genotypes: IntArray, *, is_for_batch: bool = True
    ) -> Pool:
        known = latencies(problem, genotypes)
        keep = known.within.any(axis=1)
        known = known.at(keep)
        features = encoded(problem, genotypes[keep], model.hyperparameters, known.ms)
        mean, deviation, white = predict(model, features)
        values = improvement(problem, model, fronts, known, mean, deviation)
        return Pool(genotypes[keep], features, known, mean, deviation, white if is_for_batch else white[:0], values)

    def united(self, other: Pool) -> Pool:
        def both(a: NDArray, b: NDArray) -> NDArray:
            return np.concatenate([a, b])

        a, b = self.latencies, other.latencies
        return Pool(
            both(self.genotypes, other.genotypes),
            joined([self.features, other.features]),
            Latencies(both(a.ms, b.ms), both(a.keeping, b.keeping), both(a.within, b.within)),
            both(self.mean, other.mean),
            both(self.deviation, other.deviation),
            np.concatenate([self.white, other.white], axis=1),
            both(self.values, other.values),
        )


def best_batch(problem: GreyBoxProblem, model: Model, fronts: Fronts, pool: Pool, count: int) -> IntArray:
    """The best candidate, then each next one as if those before had given their mean."""
    picked: list[int] = []
    values, variance = pool.values, pool.deviation**2
    white = pool.white
    while len(picked) < min(count, len(pool.genotypes)):
        if picked:
            values = improvement(problem, model, fronts, pool.latencies, pool.mean, np.sqrt(variance))
        values = np.where(np.isin(np.arange(len(values)), picked), -np.inf, values)
        best = int(values.argmax())
        picked.append(best)
        if len(picked) == count:
            break
        fronts = fronts.with_one(
            float(model.scale.accuracy(pool.mean[best])),
            pool.latencies.ms[best],
            pool.latencies.within[best],
            pool.genotypes[best],
        )
        # One more row of the Cholesky factor: the covariance with the picked one that is left, over its deviation.
        prior = kernel(pool.features.at(np.array([best])), pool.features, model.genes, model.hyperparameters)[0]
        left = prior - white[:, best] @ white
        row = left / np.sqrt(variance[best] + model.hyperparameters.noise + JITTER)
        white = np.vstack([white, row])
        variance = np.maximum(variance - row * row, 1e-12)
    return pool.genotypes[picked]
