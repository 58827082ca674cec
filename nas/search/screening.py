"""Proposals from very many candidates: a cheap model looks at all of them, the full one at the best few thousand.

Latency comes from the table, accuracy from the grey-box model. A model of few networks costs microseconds a candidate,
so millions can be looked at for each batch; what they promise is compared exactly with what the grey-box sampler's own
local search found, and the best of both is proposed.

Source: Sarah et al. 2022, LINAS, arXiv 2202.12954 (a search on predictors alone between trainings). Differs: candidates
are drawn and screened by expected hypervolume improvement instead of bred by an evolution, and accuracy has a
posterior.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nas.search.greybox import (
    Effort,
    Fronts,
    GreyBoxProblem,
    Hyperparameters,
    Pool,
    Scored,
    best_batch,
    encoded,
    fit_hyperparameters,
    fit_model,
    hashes,
    improvement,
    kernel,
    latencies,
    model_rows,
    mutated,
    on_a_front,
    posterior,
    predict_accuracy,
    propose,
    refit_count,
)

IntArray = NDArray[np.int64]

CHUNK = 32_768  # candidates at a time: 30 MB of features
KEPT = 2048  # candidates that the full model looks at
CHEAP_POINTS = 128  # scored networks that the cheap model sees
NEAR = 0.5  # share of the candidates that are changed ones of the front; the others are drawn from the whole space
CHANGES = (1, 2, 4, 8)  # genes changed in those, on average
FEWEST = 8  # scored networks, below which there is no model


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
    taken = scored.genotypes if excluded is None else np.concatenate([scored.genotypes, excluded])
    chosen = fit_hyperparameters(problem, scored.at(slice(refit_count(len(scored.genotypes)))))
    seen, model, fronts = posterior(problem, scored, scored.genotypes[:0], Effort(), chosen)
    candidates = _screen(problem, seen, chosen, fronts, taken, draws, np.random.default_rng(list(seed)))
    if is_with_local:
        local = propose(problem, scored, excluded=excluded, count=count, seed=seed, hyperparameters=lambda *_: chosen)
        candidates = np.concatenate([local, candidates])
        candidates = candidates[np.sort(np.unique(hashes(candidates), return_index=True)[1])]
    return best_batch(problem, model, fronts, Pool.of(problem, model, fronts, candidates), count)


def _screen(
    problem: GreyBoxProblem,
    seen: Scored,
    chosen: Hyperparameters,
    fronts: Fronts,
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
    promising = encoded(problem, fronts.genotypes, chosen, fronts.latencies.ms)
    base = on_a_front(problem, replace(fronts, accuracies=predict_accuracy(model, promising)))
    parents = fronts.genotypes[base] if len(base) else seen.genotypes
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
        rows, known = rows[inside], known.at(inside)
        features = encoded(problem, rows, chosen, known.ms)
        mean = kernel(features, trained, model.genes, chosen) @ model.weights
        values = improvement(problem, model, fronts, known, mean, np.full(len(rows), doubt))
        best = np.argsort(-values, kind="stable")[: 2 * KEPT]
        kept, kept_values = np.concatenate([kept, rows[best]]), np.concatenate([kept_values, values[best]])
        kept_codes = hashes(kept)
        first = np.unique(kept_codes, return_index=True)[1]
        first = first[~np.isin(kept_codes[first], codes)]
        order = first[np.argsort(-kept_values[first], kind="stable")[:KEPT]]
        kept, kept_values = kept[order], kept_values[order]
    return kept
