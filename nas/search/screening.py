"""Proposals from very many candidates: a cheap model looks at all of them, the full one at the best few thousand.

Latency comes from the table, accuracy from the grey-box model. A model of few networks costs microseconds a candidate,
so millions can be looked at for each batch; what they promise is compared exactly with what the grey-box sampler's own
local search found, and the best of both is proposed.

Source: Sarah et al. 2022, LINAS, arXiv 2202.12954 (a search on predictors alone between trainings). Differs: candidates
are drawn and screened by expected hypervolume improvement instead of bred by an evolution, and accuracy has a
posterior.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.search.greybox import (
    Effort,
    Features,
    GreyBoxProblem,
    Hyperparameters,
    Latencies,
    Model,
    Scale,
    Scored,
    encode,
    expected_improvement,
    fit_hyperparameters,
    fit_model,
    hashes,
    kernel,
    latencies,
    model_rows,
    mutated,
    predict,
    predict_accuracy,
    propose,
    refit_count,
    worthless_accuracy,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CHUNK = 32_768  # candidates at a time: 30 MB of features
KEPT = 2048  # candidates that the full model looks at
CHEAP_POINTS = 128  # scored networks that the cheap model sees
MODEL_POINTS = 700  # those that the full one sees
NEAR = 0.5  # share of the candidates that are changed ones of the front; the others are drawn from the whole space
CHANGES = (1, 2, 4, 8)  # genes changed in those, on average
FEWEST = 8  # scored networks, below which there is no model


@dataclass(frozen=True, slots=True, eq=False)
class _Front:
    """Networks that may stand on a front: median accuracies [F] and what the tables say of them."""

    accuracies: FloatArray
    latencies: Latencies
    reference: float


def screened(
    problem: GreyBoxProblem,
    scored: Scored,
    draws: int,
    *,
    count: int = 1,
    excluded: IntArray | None = None,
    seed: tuple[int, ...] = (0,),
    is_with_local: bool = True,
) -> IntArray:
    """The networks to train next: canonical, distinct, never seen, within a budget; fewer where none is left.

    Args:
        problem: what is known before training.
        scored: what was trained, in a fixed order; at least `FEWEST` networks.
        draws: candidates looked at, before those over the budget are left out.
        count: networks of the batch.
        excluded: canonical genotypes [E, G] that are not to be proposed.
        seed: decides all draws.
        is_with_local: whether the proposals of the grey-box sampler's local search are among the candidates.

    Returns:
        int64 [<= count, G].
    """
    rng = np.random.default_rng(list(seed))
    genes = len(problem.cardinalities)
    taken = scored.genotypes if excluded is None else np.concatenate([scored.genotypes, excluded])
    chosen = fit_hyperparameters(problem, scored.at(slice(refit_count(len(scored.genotypes)))))
    seen = scored.at(model_rows(scored.accuracies, latencies(problem, scored.genotypes).ms, MODEL_POINTS))
    model = fit_model(problem, seen, chosen)
    front = _front(problem, scored, seen, model)
    candidates = _screen(problem, seen, chosen, front, taken, draws, rng)
    if is_with_local:
        local = propose(problem, scored, excluded=excluded, count=count, seed=seed, hyperparameters=lambda *_: chosen)
        candidates = np.concatenate([local, candidates])
        candidates = candidates[np.sort(np.unique(hashes(candidates), return_index=True)[1])]
    picked: list[int] = []
    known = latencies(problem, candidates)
    features = encode(candidates, problem.cardinalities, problem.ordinal, chosen.relevance)
    while len(picked) < min(count, len(candidates)):
        # Those picked are believed to give their mean: doubt near them is gone, and what they would add is theirs.
        pending = candidates[picked]
        believing = fit_model(problem, seen, chosen, pending) if picked else model
        values = _values(problem, _with(front, known, believing, features, picked), believing, features, known)
        values[picked] = -np.inf
        picked.append(int(values.argmax()))
    return candidates[picked].reshape(-1, genes)


def _front(problem: GreyBoxProblem, scored: Scored, seen: Scored, model: Model) -> _Front:
    known = latencies(problem, seen.genotypes)
    on = np.flatnonzero(seen.eligible & known.within.any(axis=1))
    reference = problem.reference_accuracy
    if reference is None:
        reference = worthless_accuracy(scored.accuracies[: Effort().start])
    return _Front(predict_accuracy(model, model.known.at(on)), _rows(known, on), reference)


def _rows(known: Latencies, rows: IntArray | list[int]) -> Latencies:
    return Latencies(known.ms[rows], known.keeping[rows], known.within[rows])


def _with(front: _Front, known: Latencies, model: Model, features: Features, picked: list[int]) -> _Front:
    """The front with picked candidates as if they had given their mean."""
    if not picked:
        return front
    more = _rows(known, picked)
    old = front.latencies
    return _Front(
        np.concatenate([front.accuracies, predict_accuracy(model, features.at(np.array(picked)))]),
        Latencies(*(np.concatenate([getattr(old, n), getattr(more, n)]) for n in ("ms", "keeping", "within"))),
        front.reference,
    )


def _values(problem: GreyBoxProblem, front: _Front, model: Model, features: Features, known: Latencies) -> FloatArray:
    mean, deviation, _ = predict(model, features)
    return _improvement(problem, front, known, mean, deviation, model.scale)


def _improvement(
    problem: GreyBoxProblem, front: _Front, known: Latencies, mean: FloatArray, deviation: FloatArray, scale: Scale
) -> FloatArray:
    """Sum over the devices of the expected growth of their fronts, each as a share of its budget, [M].

    `mean` and `deviation` are those of standardised accuracies.
    """
    result = np.zeros(len(mean))
    for device, budget in enumerate(problem.budgets_ms):
        on = front.latencies.within[:, device]
        rows = np.flatnonzero(known.within[:, device])
        gain = expected_improvement(
            mean[rows],
            deviation[rows],
            known.ms[rows, device],
            (front.accuracies[on], front.latencies.ms[on, device]),
            (front.reference, budget),
            scale,
        )
        result[rows] += gain / budget * (known.keeping[rows, device] if problem.weigh_keeping else 1.0)
    return result


def _screen(
    problem: GreyBoxProblem,
    seen: Scored,
    chosen: Hyperparameters,
    front: _Front,
    taken: IntArray,
    draws: int,
    rng: np.random.Generator,
) -> IntArray:
    """The most promising of very many candidates by a cheap model, [<= KEPT, G].

    It sees few networks, and every candidate has the same doubt: the deviation before anything was known.
    """
    few = seen.at(model_rows(seen.accuracies, latencies(problem, seen.genotypes).ms, CHEAP_POINTS))
    model = fit_model(problem, few, chosen)
    doubt = float(np.sqrt(chosen.pair + chosen.rbf))
    trained = model.known.at(slice(len(model.weights)))
    parents = _parents(problem, seen, model)
    codes = hashes(taken)
    genes = len(problem.cardinalities)
    kept, kept_values = np.empty((0, genes), np.int64), np.empty(0)
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        near = int(NEAR * size)
        drawn = problem.canonical(rng.integers(0, problem.cardinalities, size=(size - near, genes)))
        changed = mutated(problem, parents[rng.integers(len(parents), size=near)], rng, CHANGES)
        rows = np.concatenate([drawn, changed])
        known = latencies(problem, rows)
        inside = np.flatnonzero(known.within.any(axis=1))
        rows, known = rows[inside], _rows(known, inside)
        features = encode(rows, problem.cardinalities, problem.ordinal, chosen.relevance)
        mean = kernel(features, trained, model.genes, chosen) @ model.weights
        values = _improvement(problem, front, known, mean, np.full(len(rows), doubt), model.scale)
        best = np.argsort(-values, kind="stable")[: 2 * KEPT]
        kept, kept_values = np.concatenate([kept, rows[best]]), np.concatenate([kept_values, values[best]])
        kept_codes = hashes(kept)
        first = np.unique(kept_codes, return_index=True)[1]
        first = first[~np.isin(kept_codes[first], codes)]
        order = first[np.argsort(-kept_values[first], kind="stable")[:KEPT]]
        kept, kept_values = kept[order], kept_values[order]
    return kept


def _parents(problem: GreyBoxProblem, seen: Scored, model: Model) -> IntArray:
    """Trained networks that no other one dominates on some device by their mean accuracy; all where there are none."""
    known = latencies(problem, seen.genotypes)
    relevance = model.hyperparameters.relevance
    mean = predict_accuracy(model, encode(seen.genotypes, problem.cardinalities, problem.ordinal, relevance))
    found: list[int] = []
    for device in range(len(problem.budgets_ms)):
        rows = np.flatnonzero(known.within[:, device] & seen.eligible)
        order = rows[np.lexsort((-mean[rows], known.ms[rows, device]))]
        before = np.maximum.accumulate(np.append(-np.inf, mean[order]))[:-1]
        found += order[mean[order] > before].tolist()
    return seen.genotypes[sorted(set(found))] if found else seen.genotypes
