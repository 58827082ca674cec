"""The best network for every latency at once, where latency and quality are both sums: exact dynamic programming.

Latency is the sum of a network's table rows. Quality is a sum of scores, one for each choice of each gene, learnt from
the candidates that were scored so far. Both depend on a few genes at each place of the network, so the best network
under each of a ladder of budgets comes from one pass over the places: its state is what later places still depend on
(resolution, precision, channels, depth, ...) and the latency spent so far, in steps.

Source: Molchanov et al. 2022, LANA, arXiv 2107.10624 (additive scores, one solve for each budget). Differs: there the
scores come from training every operation in the teacher's place and an integer program is solved; here they come from
a ridge regression on whole networks, and the program is solved by dynamic programming, which no solver is needed for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.core.errors import RecordError
from nas.core.records import LayerSpec
from nas.space.space import SearchSpace

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

STEPS = 256  # of latency: rounding moves the sum of 20 places by half a percent of the limit; it is computed afterwards
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, as shares of the mean squared length of the features


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A term of both sums: what it costs and what it is worth for each combination of a few genes.

    `cost` and `score` have one axis for each of `genes`, in that order.
    """

    genes: tuple[int, ...]
    cost: FloatArray
    score: FloatArray

    def __post_init__(self) -> None:
        if self.cost.shape != self.score.shape or self.cost.ndim != len(self.genes):
            raise RecordError(
                f"part of genes {self.genes}: cost {self.cost.shape} and score {self.score.shape}; allowed: one axis "
                "for each gene, the same in both"
            )
        if self.cost.size and not self.cost.min() >= 0:
            raise RecordError(f"part of genes {self.genes}: a cost of {self.cost.min():g}; allowed: at least 0")


def best_for_each_cost(parts: Sequence[Part], sizes: Sequence[int], limit: float, steps: int = STEPS) -> IntArray:
    """The genotypes [K, G] with the largest score among all that cost at most so much, by rising cost and score.

    Exact but for the rounding of each cost to `limit / steps`. Genes that no part has are 0.

    Args:
        parts: terms; it is fast where a gene appears in parts that stand close together.
        sizes: choices of each gene, [G].
        limit: largest cost looked at, in the unit of the costs.
        steps: of the cost.
    """
    last = {gene: i for i, part in enumerate(parts) for gene in part.genes}
    done: list[tuple[tuple[int, ...], IntArray] | tuple[int, tuple[int, ...], IntArray]] = []
    alive: list[int] = []
    best = np.zeros(steps + 1)  # the largest score at a cost of at most so many steps, for each state
    for i, part in enumerate(parts):
        new = [gene for gene in part.genes if gene not in alive]
        alive += new
        shape = [sizes[gene] for gene in alive]
        best = best.reshape(*best.shape[:-1], *[1] * len(new), steps + 1)
        best = np.broadcast_to(best, (*shape, steps + 1))
        spent = np.rint(np.minimum(part.cost / limit, 2.0) * steps).astype(np.int64)
        if spent.any():
            before = np.arange(steps + 1) - _aligned(part.genes, spent, alive)[..., None]
            best = np.where(before >= 0, np.take_along_axis(best, np.maximum(before, 0), axis=-1), -np.inf)
        best = best + _aligned(part.genes, part.score, alive)[..., None]
        done.append((part.genes, spent))
        for gene in sorted({gene for gene in part.genes if last[gene] == i}):
            axis = alive.index(gene)
            alive.remove(gene)
            done.append((gene, tuple(alive), best.argmax(axis=axis)))
            best = best.max(axis=axis)
    left = np.flatnonzero(best > np.append(-np.inf, best[:-1]))  # where more cost allows a better score
    found = np.zeros((len(left), len(sizes)), np.int64)
    for step in reversed(done):
        if len(step) == 2:
            genes, spent = step
            left = left - spent[tuple(found[:, gene] for gene in genes)]
        else:
            gene, others, choice = step
            found[:, gene] = choice[(*(found[:, other] for other in others), left)]
    return found


def _aligned(genes: Sequence[int], values: NDArray[Any], scope: Sequence[int]) -> NDArray[Any]:
    """Values over some genes with an axis for each gene of a scope that has them all."""
    order = sorted(range(len(genes)), key=lambda axis: scope.index(genes[axis]))
    sizes = [values.shape[genes.index(gene)] if gene in genes else 1 for gene in scope]
    return values.transpose(order).reshape(sizes)


def choice_scores(
    genotypes: IntArray, accuracies: FloatArray, sizes: Sequence[int], ordered: Sequence[bool]
) -> tuple[FloatArray, ...]:
    """What each choice of each gene is worth, in units of accuracy: the weights of an additive model.

    Ridge regression on one column for each choice and, for ordered genes, one for the place of the choice, so that few
    networks teach a slope before they teach single choices. The penalty is the one that predicts left-out networks
    best (closed form: Rasmussen and Williams 2006, section 5.4.2).

    Args:
        genotypes: canonical, [N, G].
        accuracies: [N].
        sizes: choices of each gene, [G].
        ordered: which genes are ordered, [G].

    Returns:
        One array for each gene, with a score for each of its choices.
    """
    columns = [_columns(size, is_ordered) for size, is_ordered in zip(sizes, ordered, strict=True)]
    features = np.concatenate([c[genotypes[:, gene]] for gene, c in enumerate(columns)], axis=1)
    centre = features.mean(axis=0)
    features = features - centre
    wanted = accuracies - accuracies.mean()
    shared = features @ features.T
    scale = max(float(np.trace(shared)) / len(shared), 1e-12)
    best, least = np.zeros(len(wanted)), np.inf
    for penalty in PENALTIES:
        inverse = np.linalg.inv(shared + penalty * scale * np.eye(len(shared)))
        weights = inverse @ wanted
        error = float(np.square(weights / np.diag(inverse)).mean())
        if error < least:
            best, least = weights, error
    slopes = features.T @ best
    ends = np.cumsum([c.shape[1] for c in columns])[:-1]
    return tuple(c @ w for c, w in zip(columns, np.split(slopes, ends), strict=True))


def _columns(size: int, is_ordered: bool) -> FloatArray:
    """Features of the choices of a gene, [size, columns]."""
    single: FloatArray = np.eye(size) * np.sqrt(0.5)
    if not is_ordered or size < 2:
        return single
    return np.column_stack([single, np.linspace(-1.0, 1.0, size)])


def network_parts(
    space: SearchSpace, cost: Callable[[LayerSpec], float], scores: Sequence[FloatArray]
) -> tuple[Part, ...]:
    """The parts of a space's networks without early exits.

    Args:
        space: gives the layers.
        cost: of a layer.
        scores: of each choice of each gene, [G] arrays.
    """
    places = space.layout.exits
    fixed = {
        gene
        for p in places
        for gene in (p.present, p.conv_channels.gene, p.hidden_channels.gene, p.threshold.gene)
        if gene is not None
    }
    scopes = _scopes(space)
    scored: set[int] = set(fixed)
    parts: list[Part] = []

    def add_scores(genes: Sequence[int]) -> None:
        for gene in genes:
            if gene not in scored:
                scored.add(gene)
                parts.append(_score_part(space, gene, scopes.get(gene, ()), scores[gene]))

    for slot in space.slots():
        kept = tuple(gene for gene in slot.genes if gene not in fixed)
        index = np.arange(len(slot.layers)).reshape(slot.shape)
        index = index[tuple(0 if gene in fixed else slice(None) for gene in slot.genes)]
        layers = [slot.layers[i] for i in index.ravel().tolist()]
        values = np.array([0.0 if layer is None else cost(layer) for layer in layers]).reshape(index.shape)
        add_scores(kept)
        if values.any():
            parts.append(Part(kept, values, np.zeros(values.shape)))
    add_scores(range(len(space.genes)))
    return tuple(parts)


def _scopes(space: SearchSpace) -> dict[int, tuple[int, ...]]:
    """Genes that decide what stands in a canonical genotype for the kernel or expansion of a block.

    Where a stage may be pruned, all of its expansions decide together which share it is; that is left out here: of two
    genotypes for one network the ladder then weighs one or the other.
    """
    found: dict[int, tuple[int, ...]] = {}
    width = space.layout.stem_channels
    for stage in space.layout.stages:
        for block in stage.blocks:
            if block.kernel_size.gene is not None and stage.depth.gene is not None:
                found[block.kernel_size.gene] = (stage.depth.gene,)
            if block.expansion.gene is not None:
                above = (stage.depth.gene, width.gene, stage.prune.gene)
                found[block.expansion.gene] = tuple(dict.fromkeys(g for g in above if g is not None))
            width = stage.width
    return found


def _score_part(space: SearchSpace, gene: int, others: Sequence[int], scores: FloatArray) -> Part:
    """The score of a gene as it stands in the canonical genotype: that of choice 0 where the gene decides nothing."""
    genes = (gene, *others)
    shape = tuple(space.gene_sizes[g] for g in genes)
    rows = np.zeros((int(np.prod(shape)), len(space.genes)), np.int64)
    rows[:, list(genes)] = list(itertools.product(*map(range, shape)))
    values = scores[space.canonical_many(rows)[:, gene]].reshape(shape)
    return Part(genes, np.zeros(shape), values)


def rungs(latency_ms: FloatArray, budget_ms: float, count: int) -> list[int]:
    """Which of the best networks stand on a ladder of `count` latencies up to the budget, the slowest first.

    Args:
        latency_ms: of networks by rising score, [K], at least one.
        budget_ms: the longest rung; the others are evenly spread down to the fastest network.
        count: rungs.

    Returns:
        For each rung the network with the best score below it that no longer rung has taken.
    """
    chosen: list[int] = []
    low_ms = float(latency_ms.min())
    for rung_ms in np.linspace(budget_ms, low_ms, count + 1)[:count]:
        below = [i for i in np.flatnonzero(latency_ms <= rung_ms).tolist() if i not in chosen]
        if below:
            chosen.append(below[-1])
    return chosen
