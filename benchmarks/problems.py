"""Search problems whose networks cost nothing to train: a simulated MobileNetV3-like space, and published tables.

The simulated problem has the shape of a MobileNetV3 search (Howard et al. 2019, arXiv 1905.02244: resolution, five
stages of depth, kernel, expansion, width, squeeze-excite, and beside them a precision per stage and one early exit),
but all its numbers are drawn here: no figure of it is one of a real network or device. Latency is additive over the
stages, each of which depends on the width and precision of the stage before it, with a fixed irregularity as tables
have; accuracy saturates in a sum of capacities with pair interactions, and loses by quantisation and by exits that are
taken too early. In the rugged variant interactions weigh three times as much, 60 more random pairs of genes interact,
and a training repeats less well.

Published tables are read from a folder that the caller names; the README there says where they come from.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from nas.core.errors import DataError
from nas.latency.pareto import hypervolume, hypervolume_growth, non_dominated

FloatArray = NDArray[np.float64]
Genotypes = NDArray[np.int64]  # [N, G], one genotype in each row
Kind = Literal["plain", "rugged", "macro", "accel", "ofa"]
KINDS: tuple[Kind, ...] = ("plain", "rugged", "macro", "accel", "ofa")
SIMULATED = ("plain", "rugged")
MAXIMIZE = (True, False)  # accuracy, latency

STAGES = 5
RESOLUTIONS_PX = (160, 176, 192, 208, 224)
STAGE_SIZES = (3, 3, 3, 3, 2, 3)  # depth, kernel, expansion, width, squeeze-excite, precision
EXIT_AFTER = (0, 2, 3, 4)  # stages before the exit; 0 is none
THRESHOLDS = tuple(np.linspace(0.5, 0.92, 8).tolist())
NUMBERS = 20190505  # seed of everything that is drawn once and then belongs to the problem
QUANTILE_DRAWS = 40_000


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """A space of networks with a known latency and an accuracy that a training shows with noise.

    Attributes:
        name: the kind.
        cardinalities: choices of each gene, [G].
        ordinal: which genes are ordered.
        canonical: genotypes [N, G] to those with the same network, of which there is one per network.
        latency_ms: canonical genotypes [N, G] to milliseconds [N].
        accuracy: canonical genotypes [N, G] to the accuracy without noise in percent [N].
        train: canonical genotypes [N, G] and a generator to what one training of each shows, in percent [N].
        budget_ms: largest latency that counts.
        reference_accuracy: accuracy in percent above which a network counts.
        everything: all networks [N, G] where they are few, else None.
    """

    name: str
    cardinalities: tuple[int, ...]
    ordinal: tuple[bool, ...]
    canonical: Callable[[Genotypes], Genotypes]
    latency_ms: Callable[[Genotypes], FloatArray]
    accuracy: Callable[[Genotypes], FloatArray]
    train: Callable[[Genotypes, np.random.Generator], FloatArray]
    budget_ms: float
    reference_accuracy: float
    everything: Genotypes | None = None

    def sample(self, rng: np.random.Generator, count: int) -> Genotypes:
        """`count` canonical genotypes [N, G]; every gene is drawn uniformly."""
        drawn = rng.integers(0, self.cardinalities, size=(count, len(self.cardinalities)))
        return self.canonical(drawn)

    def volumes(self, genotypes: Genotypes) -> FloatArray:
        """Hypervolume of the first 1, 2, ..., N networks within the budget, in percent * ms, no noise."""
        points = np.column_stack([self.accuracy(genotypes), self.latency_ms(genotypes)])
        return hypervolume_growth(points, (self.reference_accuracy, self.budget_ms), MAXIMIZE)


@cache
def load_problem(kind: Kind, data: Path | None = None, quantile: float = 0.12) -> Problem:
    """The problem of a name.

    Args:
        kind: `plain`, `rugged` are simulated; `macro` is NAS-Bench-Macro, `accel` Accel-NASBench, `ofa` once-for-all.
        data: folder with `nasbench_macro`, `accel_nasbench`, `dynast_ofa` and `help`, for these three.
        quantile: share of random networks that keep the budget of a simulated problem.

    Raises:
        DataError: a published table is asked for and `data` is not given, or a file is missing.
    """
    if kind in SIMULATED:
        return _simulated(kind == "rugged", quantile)
    if data is None:
        raise DataError(f"problem {kind}: give the folder of the published tables with --data")
    if kind == "macro":
        return _macro(data / "nasbench_macro")
    return _accel(data / "accel_nasbench") if kind == "accel" else _ofa(data)


def _simulated(rugged: bool, quantile: float) -> Problem:
    rng = np.random.default_rng(NUMBERS)
    latency_tables, head_ms = _latency_tables(rng)
    capacity = _capacity(rng, rugged)
    noise_points = 0.30 if rugged else 0.12
    sizes = (len(RESOLUTIONS_PX), *STAGE_SIZES * STAGES, len(EXIT_AFTER), len(THRESHOLDS))

    def canonical(genotypes: Genotypes) -> Genotypes:
        result = genotypes.copy()
        result[:, -1] *= result[:, -2] > 0
        return result

    def exit_rate(genotypes: Genotypes) -> FloatArray:
        """Share of images that leave at the exit: fewer at a high threshold, more behind more stages."""
        after = np.array(EXIT_AFTER)[genotypes[:, -2]]
        threshold = np.array(THRESHOLDS)[genotypes[:, -1]]
        rate = 1 / (1 + np.exp(9.0 * (threshold - 0.44 - 0.075 * after)))
        return np.where(after > 0, rate, 0.0)

    def latency_ms(genotypes: Genotypes) -> FloatArray:
        stage_ms = np.column_stack([_stage_ms(genotypes, s, latency_tables[s]) for s in range(STAGES)])
        after = np.array(EXIT_AFTER)[genotypes[:, -2]]
        late = (stage_ms * (np.arange(STAGES) >= after[:, None])).sum(axis=1) + head_ms
        rate = exit_rate(genotypes)
        return stage_ms.sum(axis=1) + head_ms + np.where(after > 0, 0.07, 0.0) - rate * late * (after > 0)

    def accuracy(genotypes: Genotypes) -> FloatArray:
        whole = capacity(genotypes)
        precision = genotypes[:, 6 : 1 + 6 * STAGES : 6]
        sensitivity = np.array([0.0030, 0.0018, 0.0014, 0.0016, 0.0026])
        kept = (1 - np.array([0.0, 0.12, 1.0])[precision] * sensitivity).prod(axis=1)
        top1 = (80.0 - 26.0 * np.exp(-2.9 * whole)) * kept
        after = np.array(EXIT_AFTER)[genotypes[:, -2]]
        threshold = np.array(THRESHOLDS)[genotypes[:, -1]]
        rate = exit_rate(genotypes)
        # What leaves early is easy: the loss grows faster than the share that leaves.
        return top1 - rate**1.6 * (5.2 - after) * (0.6 + 2.2 * (0.95 - threshold))

    def train(genotypes: Genotypes, generator: np.random.Generator) -> FloatArray:
        return accuracy(genotypes) + noise_points * generator.normal(size=len(genotypes))

    ordinal = (True, *((True, True, True, True, True, True) * STAGES), True, True)
    drawn = canonical(np.random.default_rng(NUMBERS + 1).integers(0, sizes, size=(QUANTILE_DRAWS, len(sizes))))
    budget_ms = float(np.quantile(latency_ms(drawn), quantile))
    name = "rugged" if rugged else "plain"
    return Problem(name, sizes, ordinal, canonical, latency_ms, accuracy, train, budget_ms, 65.0)


def _stage_ms(genotypes: Genotypes, stage: int, table: FloatArray) -> FloatArray:
    own = genotypes[:, 1 + 6 * stage : 7 + 6 * stage]
    before = genotypes[:, [6 * stage - 2, 6 * stage]] if stage else np.ones((len(genotypes), 2), np.int64)
    return table[(genotypes[:, 0], *own.T, *before.T)]


def _latency_tables(rng: np.random.Generator) -> tuple[list[FloatArray], float]:
    """Milliseconds of each stage by [resolution, its six genes, width and precision before it], and of the head."""
    tables = []
    strides = (4, 8, 16, 16, 32)
    channels = (24, 40, 80, 112, 160)
    before = (16, *channels)
    scale = np.array([0.75, 1.0, 1.25])
    macs_per_ns = np.array([225.0, 425.0, 725.0])
    shape = (len(RESOLUTIONS_PX), *STAGE_SIZES, 3, 3)
    for s in range(STAGES):
        r, d, k, e, w, se, p, w0, p0 = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij", sparse=True)
        pixels = (np.array(RESOLUTIONS_PX)[r] / strides[s]) ** 2
        inner, entering = channels[s] * scale[w], before[s] * scale[w0]
        expansion = np.array([3, 4, 6])[e]
        kernel = np.array([3, 5, 7])[k]

        def block_macs(
            c_in: FloatArray,
            c_out: FloatArray = inner,
            pixels: FloatArray = pixels,
            expansion: NDArray[np.int64] = expansion,
            kernel: NDArray[np.int64] = kernel,
        ) -> FloatArray:
            # A depthwise MAC costs four times as much as one of a dense convolution: it waits for memory.
            return pixels * c_in * expansion * (c_in + c_out + 4 * kernel**2)

        depth = d + 2
        macs = block_macs(entering) + (depth - 1) * block_macs(inner)
        stage_us = macs / macs_per_ns[p] / 1000
        stage_us = stage_us + depth * (24.0 + 16.0 * se) + 20.0 * (p != p0)  # launches, squeeze-excite, reformatting
        irregular = 1 + rng.uniform(-0.06, 0.06, size=shape)
        tables.append(stage_us * irregular / 1000)
    return tables, 0.18


def _capacity(rng: np.random.Generator, rugged: bool) -> Callable[[Genotypes], FloatArray]:
    """Sum of the genes' parts and of pair interactions, about 0 for the smallest network and 1 for the largest."""
    weight = {"depth": 1.0, "kernel": 0.45, "expansion": 0.8, "width": 0.9, "se": 0.35, "precision": 0.0}
    genes = list(weight)
    main: list[FloatArray] = [1.6 * np.log(np.array(RESOLUTIONS_PX) / 160) / np.log(224 / 160)]
    for s in range(STAGES):
        stage_weight = (0.6, 0.8, 1.1, 1.2, 1.3)[s] * rng.uniform(0.8, 1.2)
        for gene, size in zip(genes, STAGE_SIZES, strict=True):
            steps = np.sort(rng.uniform(0, 1, size))
            steps = (steps - steps[0]) / max(steps[-1] - steps[0], 1e-9)
            diminishing = np.sqrt(steps) if size > 2 else steps
            main.append(weight[gene] * stage_weight * diminishing * rng.uniform(0.7, 1.3))
    main += [np.zeros(len(EXIT_AFTER)), np.zeros(len(THRESHOLDS))]
    total = sum(float(part.max()) for part in main)
    pairs: list[tuple[int, int, FloatArray]] = []

    def add(a: int, b: int, size: float) -> None:
        table = rng.normal(size=(len(main[a]), len(main[b])))
        table -= table.mean(axis=0, keepdims=True)
        pairs.append((a, b, size * (table - table.mean(axis=1, keepdims=True))))

    strength = 0.016 * total * (3 if rugged else 1)
    for s in range(STAGES):
        first = 1 + 6 * s
        add(first + 2, first + 4, strength)  # expansion with squeeze-excite
        add(first + 1, 0, strength)  # kernel with resolution
        add(first, first + 3, strength)  # depth with width
        if s:
            add(first - 3, first + 3, strength)  # widths of neighbours
    if rugged:
        for _ in range(60):
            a, b = sorted(rng.choice(1 + 6 * STAGES, size=2, replace=False).tolist())
            add(a, b, strength / 3)

    def capacity(genotypes: Genotypes) -> FloatArray:
        result = np.zeros(len(genotypes))
        for gene, part in enumerate(main):
            result += part[genotypes[:, gene]]
        for a, b, table in pairs:
            result += table[genotypes[:, a], genotypes[:, b]]
        return result / total

    return capacity


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror}. Give the folder of the published tables") from e


def _macro(folder: Path) -> Problem:
    """NAS-Bench-Macro (Su et al. 2021, arXiv 2103.11922): 8 layers of 3 kinds, CIFAR-10, three trainings of each.

    Latency: sums of published TensorRT FP16 rows at batch 1, not measured networks. Budget: the median network.
    """
    accuracies = {row["arch"]: row for row in _rows(folder / "nas_bench_macro.csv")}
    rows = [(row["arch"], float(row["fp16_b1"])) for row in _rows(folder / "v100trt_lutsum_ms_derived.csv")]
    everything = np.array([[int(c) for c in arch] for arch, _ in rows], np.int64)
    radix = 3 ** np.arange(everything.shape[1])
    place = np.empty(len(rows), np.int64)
    place[everything @ radix] = np.arange(len(rows))
    all_ms = np.array([ms for _, ms in rows])
    seeds = np.array([[float(accuracies[arch][f"acc_seed{i}"]) for i in range(3)] for arch, _ in rows])

    def index(genotypes: Genotypes) -> NDArray[np.int64]:
        return place[genotypes @ radix]

    return Problem(
        "macro",
        (3,) * everything.shape[1],
        (False,) * everything.shape[1],
        lambda genotypes: genotypes.copy(),
        lambda genotypes: all_ms[index(genotypes)],
        lambda genotypes: seeds[index(genotypes)].mean(axis=1),
        lambda genotypes, rng: seeds[index(genotypes), rng.integers(3, size=len(genotypes))],
        float(np.median(all_ms)),
        85.0,
        everything,
    )


def _accel(folder: Path) -> Problem:
    """Accel-NASBench (Ahmad et al. 2024, arXiv 2404.08005): measured RTX 3090 speed, accuracy of a short schedule.

    Only a sample of the space was trained, so any genotype stands for the trained network that differs in the fewest
    genes: its canonical form. Latency is 1000 / throughput, milliseconds an image in large batches. One training of
    each network is published, so a training shows no noise. Budget: the network at 40 % of the latencies.
    """
    rows = [row for row in _rows(folder / "accel_nasbench.csv") if row["throughput_3090_mean"]]
    names = [name for name in rows[0] if name.startswith("block")]
    values = np.array([[int(row[name]) for name in names] for row in rows])
    choices = [np.unique(values[:, g]) for g in range(len(names))]
    genotypes = np.column_stack([np.searchsorted(c, values[:, g]) for g, c in enumerate(choices)]).astype(np.int64)
    everything, first = np.unique(genotypes, axis=0, return_index=True)
    all_ms = np.array([1000 / float(rows[i]["throughput_3090_mean"]) for i in first])
    top1 = np.array([float(rows[i]["val_top1"]) for i in first])
    return _sampled("accel", tuple(len(c) for c in choices), np.copy, everything, all_ms, top1, 55.0)


def _sampled(
    name: str,
    sizes: tuple[int, ...],
    active: Callable[[Genotypes], Genotypes],
    everything: Genotypes,
    all_ms: FloatArray,
    top1: FloatArray,
    reference_accuracy: float,
) -> Problem:
    """A space of which only some networks were trained: every genotype stands for the one that is most alike.

    Args:
        name: of the problem.
        sizes: choices of each gene, all of them ordered.
        active: genotypes [N, G] to the same with genes that do not count set to 0.
        everything: the trained networks [T, G], distinct and `active`.
        all_ms: their latency [T].
        top1: their accuracy in percent [T].
        reference_accuracy: accuracy in percent above which a network counts.
    """
    offsets = np.cumsum((0, *sizes[:-1]))
    known = _one_hot(everything, offsets, sum(sizes))
    factors = np.random.default_rng(NUMBERS).integers(1, 2**62, size=len(sizes))
    codes = everything @ factors  # wraps around: a hash, by which trained networks are found without comparing them all
    order = np.argsort(codes)

    def index(genotypes: Genotypes) -> NDArray[np.int64]:
        genotypes = active(genotypes)
        place = np.minimum(np.searchsorted(codes[order], genotypes @ factors), len(order) - 1)
        result = order[place]
        others = np.flatnonzero((everything[result] != genotypes).any(axis=1))
        for part in np.array_split(others, 1 + len(others) // 1000):
            if len(part):
                result[part] = (_one_hot(genotypes[part], offsets, sum(sizes)) @ known.T).argmax(axis=1)
        return result

    return Problem(
        name,
        sizes,
        (True,) * len(sizes),
        lambda genotypes: everything[index(genotypes)],
        lambda genotypes: all_ms[index(genotypes)],
        lambda genotypes: top1[index(genotypes)],
        lambda genotypes, rng: top1[index(genotypes)],  # noqa: ARG005 - one published training of each
        float(np.quantile(all_ms, 0.4)),
        reference_accuracy,
        everything,
    )


OFA_STAGES = 5
OFA_LAYERS = 4  # of each stage; those beyond its depth do not count
OFA_CHOICES = ((3, 5, 7), (3, 4, 6), (2, 3, 4))  # kernel, expansion, depth
OFA_DEVICE = "v100_64"  # a column that repeats well; titan_rtx_1 and 2080ti_32 do not


def _ofa(folder: Path) -> Problem:
    """Once-for-all MobileNetV3 (Cai et al. 2020, arXiv 1908.09791): ImageNet top-1 of 2,223 networks with its weights.

    The accuracies are those that DyNAS-T published. Latency is the sum of a table of a V100 at batch 64, which was
    fitted here to 5,000 other networks of the space that HELP measured (Lee et al. 2021): one row for each stage, place
    in it, kernel and expansion, with one part that grows with the image and one that does not. As in `accel`, any
    genotype stands for the evaluated network that is most alike. Budget: the network at 40 % of the latencies.
    """
    rows = _rows(folder / "dynast_ofa" / "ofa_mbv3_w1.0_top1.csv")
    distinct: dict[tuple[int, ...], list[float]] = {}
    for genotype, row in zip(_ofa_genotypes(rows).tolist(), rows, strict=True):
        distinct.setdefault(tuple(genotype), []).append(float(row["top1"]))
    everything = np.array(list(distinct), np.int64)
    top1 = np.array([float(np.median(values)) for values in distinct.values()])
    sizes = tuple(len(c) for c in OFA_CHOICES for _ in range(OFA_STAGES * (1 if c == OFA_CHOICES[2] else OFA_LAYERS)))
    all_ms = _ofa_latency(_rows(folder / "help" / "ofa_mbv3_latency.csv"), everything)
    return _sampled("ofa", sizes, _ofa_active, everything, all_ms, top1, 73.0)


def _ofa_genotypes(rows: list[dict[str, str]]) -> Genotypes:
    """Kernels [20], expansions [20] and depths [5] of each row as indices of their choices, [N, 45]."""
    parts = [
        np.array([[choices.index(int(v)) for v in row[name].split("-")] for row in rows], np.int64)
        for name, choices in zip(("ks", "e", "d"), OFA_CHOICES, strict=True)
    ]
    return _ofa_active(np.concatenate(parts, axis=1))


def _ofa_active(genotypes: Genotypes) -> Genotypes:
    """The same with kernel and expansion 0 where a layer is beyond the depth of its stage."""
    result = genotypes.copy()
    layers = OFA_STAGES * OFA_LAYERS
    beyond = np.arange(OFA_LAYERS) >= result[:, 2 * layers :, None] + OFA_CHOICES[2][0]
    beyond = beyond.reshape(len(result), layers)
    result[:, :layers][beyond] = 0
    result[:, layers : 2 * layers][beyond] = 0
    return result


def _ofa_latency(measured: list[dict[str, str]], genotypes: Genotypes) -> FloatArray:
    """Milliseconds at 224 px of active genotypes [N, 45], by non-negative least squares on relative errors."""

    def columns(of: Genotypes, size_px: FloatArray) -> FloatArray:
        layers = OFA_STAGES * OFA_LAYERS
        kinds = np.zeros((len(of), OFA_STAGES, 2, 9))
        for layer in range(layers):
            stage, place = divmod(layer, OFA_LAYERS)
            there = np.flatnonzero(of[:, 2 * layers + stage] + OFA_CHOICES[2][0] > place)
            kind = 3 * of[there, layer] + of[there, layers + layer]
            kinds[there, stage, min(place, 1), kind] += 1
        flat = np.column_stack([np.ones(len(of)), kinds.reshape(len(of), -1)])
        return np.concatenate([flat, flat * (size_px[:, None] / 224) ** 2], axis=1)

    target_ms = np.array([float(row[OFA_DEVICE]) for row in measured])
    known = columns(_ofa_genotypes(measured), np.array([float(row["r"]) for row in measured]))
    table_ms, _ = nnls(known / target_ms[:, None], np.ones(len(measured)))
    result: FloatArray = columns(genotypes, np.full(len(genotypes), 224.0)) @ table_ms
    return result


def _one_hot(genotypes: Genotypes, offsets: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    result = np.zeros((len(genotypes), width), np.float32)
    result[np.arange(len(genotypes))[:, None], genotypes + offsets] = 1
    return result


@cache  # a long search, whose result belongs to the problem
def best_known(problem: Problem) -> float:
    """Largest known hypervolume within the budget, in percent times milliseconds.

    Exact where all networks are listed; else the front of a long evolution on the accuracies without noise, improved
    until no change of one gene, and no crossover of two of its networks that was drawn, adds a network to it.
    """
    front = problem.everything if problem.everything is not None else _long_search(problem)
    points = np.column_stack([problem.accuracy(front), problem.latency_ms(front)])
    return hypervolume(points, (problem.reference_accuracy, problem.budget_ms), MAXIMIZE)


def _long_search(problem: Problem, generations: int = 700, children: int = 6000) -> Genotypes:
    rng = np.random.default_rng(NUMBERS)
    front = _front(problem, [problem.sample(rng, 50_000)])
    for _ in range(generations):
        parents = front[rng.integers(len(front), size=children)]
        others = front[rng.integers(len(front), size=children)]
        crossed = np.where((rng.random(parents.shape) < 0.5) & (rng.random((children, 1)) < 0.5), others, parents)
        rate = rng.integers(1, 5, size=(children, 1)) / parents.shape[1]
        fresh = rng.integers(0, problem.cardinalities, size=parents.shape)
        front = _front(problem, [front, problem.canonical(np.where(rng.random(parents.shape) < rate, fresh, crossed))])
    while True:
        grown = _front(problem, [front, *_neighbours(problem, front)])
        if np.array_equal(grown, front):
            return front
        front = grown


def _neighbours(problem: Problem, genotypes: Genotypes) -> Iterable[Genotypes]:
    """All networks that differ in one gene."""
    for gene, size in enumerate(problem.cardinalities):
        for value in range(size):
            changed = genotypes.copy()
            changed[:, gene] = value
            yield problem.canonical(changed)


def _front(problem: Problem, parts: Iterable[Genotypes]) -> Genotypes:
    """The distinct networks within the budget that no other one dominates, in a fixed order."""
    genotypes = np.concatenate(list(parts))
    latency_ms = problem.latency_ms(genotypes)
    genotypes, latency_ms = genotypes[latency_ms <= problem.budget_ms], latency_ms[latency_ms <= problem.budget_ms]
    points = np.column_stack([problem.accuracy(genotypes), latency_ms])
    return np.unique(genotypes[non_dominated(points, MAXIMIZE)], axis=0)
