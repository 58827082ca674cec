"""A search by predictors in the manner of LINAS, to compare samplers with.

Cummings et al. 2022, arXiv 2205.10358 (DyNAS-T; LINAS in arXiv 2202.12954): random networks first; then, round by
round, a predictor of accuracy is trained anew, an inner NSGA-II (Deb et al. 2002) searches thousands of networks with
it, and the best of what it found is trained. Differs: latency is the table's and not predicted, networks over the
budget are thrown away in the inner search, and the predictor is the better of ridge regression and kernel
ridge regression by the closed form of leaving one out. All three favour it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.problems import MAXIMIZE, Genotypes, Problem
from nas.latency.pareto import non_dominated

FloatArray = NDArray[np.float64]

POPULATION = 200
GENERATIONS = 50  # 10,000 networks a round
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
GAMMAS = (0.25, 0.5, 1.0, 2.0)  # of the squared distance over its median


def search(problem: Problem, count: int, seed: int, batch: int, first: Genotypes) -> Genotypes:
    """The networks that were trained, in their order, [count, G].

    Args:
        problem: what to search.
        count: trainings.
        seed: decides all draws.
        batch: trainings of a round.
        first: random networks within the budget, distinct; the first `batch` of them are trained, others where the
            inner search finds too few new ones.
    """
    rng = np.random.default_rng([seed, 1])
    trained = first[:batch]
    shown = problem.train(trained, rng)
    spare = first[batch:]
    while len(trained) < count:
        predictor = Predictor(problem, trained, shown)
        found = inner_search(problem, predictor, trained, rng)
        known = set(map(tuple, trained.tolist()))
        new = [row for row in found.tolist() if tuple(row) not in known][:batch]
        missing = [row for row in spare.tolist() if tuple(row) not in known and row not in new]
        new = np.array((new + missing)[: min(batch, count - len(trained))], np.int64)
        trained = np.concatenate([trained, new])
        shown = np.append(shown, problem.train(new, rng))
    return trained[:count]


class Predictor:
    """Accuracy of a network: the best of some kernel ridge regressions by the squared error of leaving one out."""

    def __init__(self, problem: Problem, genotypes: Genotypes, accuracies: FloatArray) -> None:
        self._problem = problem
        self._known = self._features(genotypes)
        self._mean = float(accuracies.mean())
        products = self._known @ self._known.T
        lengths = np.diag(products)
        squared = lengths[:, None] + lengths - 2 * products
        self._unit = float(np.median(squared[squared > 0])) if (squared > 0).any() else 1.0
        best = np.inf
        for gamma in (0.0, *GAMMAS):  # 0 is ridge regression
            kernel = self._kernel(self._known, gamma)
            values, vectors = np.linalg.eigh(kernel)
            turned = vectors.T @ (accuracies - self._mean)
            for penalty in PENALTIES:
                inverse = 1 / (np.maximum(values, 0) + penalty)
                weights = vectors @ (inverse * turned)
                left_out = weights / ((vectors**2) @ inverse)  # the error at each network when it is left out
                error = float(left_out @ left_out)
                if error < best:
                    best, self._weights, self._gamma = error, weights, gamma

    def __call__(self, genotypes: Genotypes) -> FloatArray:
        """Predicted accuracy in percent, [N]."""
        result: FloatArray = self._mean + self._kernel(self._features(genotypes), self._gamma) @ self._weights
        return result

    def _features(self, genotypes: Genotypes) -> FloatArray:
        sizes = self._problem.cardinalities
        columns = np.zeros((len(genotypes), sum(sizes)))
        columns[np.arange(len(genotypes))[:, None], genotypes + np.cumsum((0, *sizes[:-1]))] = 1
        return columns

    def _kernel(self, features: FloatArray, gamma: float) -> FloatArray:
        products = features @ self._known.T
        if gamma == 0:
            return products / self._known.shape[1]
        squared = (features**2).sum(axis=1)[:, None] + (self._known**2).sum(axis=1) - 2 * products
        return np.exp(-gamma * np.maximum(squared, 0) / self._unit)


def inner_search(problem: Problem, predictor: Predictor, trained: Genotypes, rng: np.random.Generator) -> Genotypes:
    """Networks within the budget, the best on predicted accuracy and latency first: fronts, then crowding."""
    drawn = problem.sample(rng, 20 * POPULATION)
    drawn = drawn[problem.latency_ms(drawn) <= problem.budget_ms][:POPULATION]
    population = np.unique(np.concatenate([trained[-POPULATION:], drawn]), axis=0)
    points = _points(problem, predictor, population)
    for _ in range(GENERATIONS):
        order, _ = ranked(points)
        population, points = population[order[:POPULATION]], points[order[:POPULATION]]
        # Rows are in the order of rank and crowding now, so the better of two is the one that comes first.
        mothers, fathers = (rng.integers(len(population), size=(2, POPULATION)).min(axis=0) for _ in range(2))
        parents = population[mothers]
        crossed = (rng.random((POPULATION, 1)) < 0.9) & (rng.random(parents.shape) < 0.5)
        children = np.where(crossed, population[fathers], parents)
        changed = rng.random(parents.shape) < 1 / parents.shape[1]
        children = np.where(changed, rng.integers(0, problem.cardinalities, size=parents.shape), children)
        children = np.unique(problem.canonical(children), axis=0)
        children = children[problem.latency_ms(children) <= problem.budget_ms]
        seen = set(map(tuple, population.tolist()))
        children = children[[tuple(row) not in seen for row in children.tolist()]]
        if len(children):
            population = np.concatenate([population, children])
            points = np.concatenate([points, _points(problem, predictor, children)])
    return population[ranked(points)[0]]


def _points(problem: Problem, predictor: Predictor, genotypes: Genotypes) -> FloatArray:
    return np.column_stack([predictor(genotypes), problem.latency_ms(genotypes)])


def ranked(points: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows by front and, within a front, the least crowded first; and the number of the front of each row."""
    front_of = np.full(len(points), -1, np.int64)
    order: list[NDArray[np.int64]] = []
    left = np.arange(len(points))
    while len(left):
        on = non_dominated(points[left], MAXIMIZE)
        front = left[on]
        front_of[front] = len(order)
        order.append(front[np.argsort(-_crowding(points[front]), kind="stable")])
        left = left[~on]
    return np.concatenate(order), front_of


def _crowding(points: FloatArray) -> FloatArray:
    """Distance of each point's neighbours along the front, summed over objectives; infinite at the ends."""
    result = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = max(float(values[order[-1]] - values[order[0]]), 1e-12)
        gaps = np.full(len(points), np.inf)
        gaps[1:-1] = (values[order[2:]] - values[order[:-2]]) / span
        result[order] += gaps
    return result
