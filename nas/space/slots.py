"""Slots: the places of a network as tables of layers, for estimating many genotypes at once without building them.

Each slot depends on the few genes that decide its layer. The tables are filled from representative genotypes that are
built and walked by `expand`; there is no second walk. Sums over slots are then array lookups, and their exact minimum
and maximum over the whole space come from eliminating one gene after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.core.records import Candidate, LayerSpec, SlotKind
from nas.core.walk import expand
from nas.space.layout import Genotype, Layout, Site


@dataclass(frozen=True, slots=True)
class Slot:
    """One place of the network. Slots stand in execution order; the stem counts to stage 0, the head to the last.

    For a canonical genotype g the layer is `layers[ravel_multi_index(g[genes], shape)]`, None where it is absent.
    Name and segment of the layers are those of the network with all exits; they do not take part in comparing layers.
    """

    name: str
    kind: SlotKind
    stage: int
    genes: tuple[int, ...]
    shape: tuple[int, ...]
    layers: tuple[LayerSpec | None, ...]

    def layer(self, genotype: Genotype) -> LayerSpec | None:
        """The layer of one canonical genotype."""
        index = 0
        for gene, size in zip(self.genes, self.shape, strict=True):
            index = index * size + genotype[gene]
        return self.layers[index]


@dataclass(frozen=True, slots=True)
class _Place:
    """A slot before its table is filled. `presence`: the gene that can remove the layer, a flag for each choice."""

    name: str
    kind: SlotKind
    stage: int
    genes: tuple[int, ...]
    presence: tuple[int, tuple[bool, ...]] | None = None


def build_slots(layout: Layout, build: Callable[[Genotype], Candidate]) -> tuple[Slot, ...]:
    """Slots of a space in execution order.

    Args:
        layout: the genes of the space.
        build: gives the candidate of a genotype, with exactly the exits that are marked.
    """
    places = _places(layout)
    sizes = [len(gene.choices) for gene in layout.genes]
    colours = _colours([place.genes for place in places])
    ranges = [max(sizes[g] for g in colours if colours[g] == c) for c in range(max(colours.values(), default=-1) + 1)]
    genotype = [0] * len(sizes)
    for place in places:
        if place.presence is not None:
            genotype[place.presence[0]] = len(place.presence[1]) - 1  # the deepest network, with all exits
    tables: list[list[LayerSpec | None]] = [[None] * math.prod(sizes[g] for g in place.genes) for place in places]
    for counters in itertools.product(*map(range, ranges)):
        for gene, colour in colours.items():
            genotype[gene] = counters[colour] % sizes[gene]
        layers = expand(build(tuple(genotype)))  # one layer for each place, in the same order
        for place, table, layer in zip(places, tables, layers, strict=True):
            index = 0
            for gene in place.genes:
                index = index * sizes[gene] + genotype[gene]
            table[index] = layer
    return tuple(_slot(place, sizes, table) for place, table in zip(places, tables, strict=True))


def _places(layout: Layout) -> list[_Place]:
    """The places in the order of `expand`."""

    def genes(*sites: Site[Any]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(site.gene for site in sites if site.gene is not None))

    resolution = layout.resolution
    exits = {place.after_stage: place for place in layout.exits}
    result = [
        _Place(
            "stem",
            "stem",
            0,
            genes(resolution, layout.stem_channels, layout.stem_activation, layout.stem_precision),
        )
    ]
    width = layout.stem_channels
    for s, stage in enumerate(layout.stages):
        for b, block in enumerate(stage.blocks):
            flags = tuple(b < depth for depth in stage.depth.choices)
            result.append(
                _Place(
                    f"stages.{s}.{b}",
                    "block",
                    s,
                    genes(
                        resolution,
                        width,
                        stage.kind,
                        stage.width,
                        stage.use_se,
                        stage.activation,
                        stage.precision,
                        stage.prune,
                        block.kernel_size,
                        block.expansion,
                    ),
                    None if all(flags) or stage.depth.gene is None else (stage.depth.gene, flags),
                )
            )
            width = stage.width
        if s in exits:
            result.append(
                _Place(
                    f"exits.{s}",
                    "exit_head",
                    s,
                    genes(resolution, width, stage.precision, exits[s].conv_channels, exits[s].hidden_channels),
                    (exits[s].present, (False, True)),
                )
            )
    result.append(
        _Place(
            "head",
            "head",
            len(layout.stages) - 1,
            genes(resolution, width, layout.conv_channels, layout.hidden_channels, layout.head_precision),
        )
    )
    return result


def _colours(groups: Sequence[tuple[int, ...]]) -> dict[int, int]:
    """A colour for each gene so that the genes of a group differ.

    Genes of one colour can be swept together: going through all combinations of colours still meets every combination
    of genes in every group, with thousands of networks instead of tens of thousands.
    """
    neighbours: dict[int, set[int]] = {}
    for group in groups:
        for gene in group:
            neighbours.setdefault(gene, set()).update(group)
    colours: dict[int, int] = {}
    for gene in sorted(neighbours):
        taken = {colours[other] for other in neighbours[gene] if other in colours}
        colours[gene] = next(c for c in itertools.count() if c not in taken)
    return colours


def _slot(place: _Place, sizes: Sequence[int], table: list[LayerSpec | None]) -> Slot:
    # a layer that nothing decides is listed for every choice of gene 0: ravel_multi_index needs an axis
    gene, flags = place.presence or (0, (True,) * sizes[0])
    genes = place.genes
    if place.presence is not None or not genes:
        table = [layer if flag else None for layer in table for flag in flags]
        genes = (*genes, gene)
    return Slot(place.name, place.kind, place.stage, genes, tuple(sizes[g] for g in genes), tuple(table))


def extreme_genotype(
    slots: Sequence[Slot],
    gene_sizes: Sequence[int],
    cost: Callable[[LayerSpec], float],
    fixed: Mapping[int, int],
    *,
    largest: bool,
) -> tuple[float, Genotype]:
    """The smallest or largest sum of a layer cost over the space, exactly, and the first genotype that has it.

    Args:
        slots: slots of the space.
        gene_sizes: number of choices of each gene.
        cost: cost of a layer.
        fixed: genes that keep a given index (those that the cost does not depend on are better fixed: less to sum).
        largest: whether the largest sum is looked for.
    """
    sign = -1.0 if largest else 1.0
    factors: list[_Factor] = []
    for slot in slots:
        indices = np.arange(len(slot.layers)).reshape(slot.shape)
        kept = tuple(gene for gene in slot.genes if gene not in fixed)
        indices = indices[tuple(fixed.get(gene, slice(None)) for gene in slot.genes)]
        chosen = [slot.layers[i] for i in indices.ravel().tolist()]
        values = np.array([0.0 if layer is None else sign * cost(layer) for layer in chosen])
        factors.append(_without_idle_axes(kept, values.reshape(indices.shape)))
    genotype = [fixed.get(gene, 0) for gene in range(len(gene_sizes))]
    order: list[tuple[int, tuple[int, ...], npt.NDArray[np.int64]]] = []
    remaining = sorted({gene for genes, _ in factors for gene in genes})
    while remaining:  # variable elimination: the gene whose joint table is smallest goes first
        gene = min(remaining, key=lambda g: math.prod(gene_sizes[i] for i in _scope(factors, g)))
        remaining.remove(gene)
        scope = tuple(g for g in _scope(factors, gene) if g != gene)
        joint = np.zeros([gene_sizes[g] for g in scope] + [gene_sizes[gene]])
        for genes, values in factors:
            if gene in genes:
                joint = joint + _aligned(genes, values, (*scope, gene))
        order.append((gene, scope, joint.argmin(axis=-1)))
        factors = [f for f in factors if gene not in f[0]]
        factors.append((scope, joint.min(axis=-1)))
    for gene, scope, best in reversed(order):
        genotype[gene] = int(best[tuple(genotype[g] for g in scope)])
    return sign * sum(float(values) for _, values in factors), tuple(genotype)


_Factor = tuple[tuple[int, ...], npt.NDArray[np.float64]]


def _without_idle_axes(genes: tuple[int, ...], values: npt.NDArray[np.float64]) -> _Factor:
    """The table without the axes along which it does not change."""
    kept: list[int] = []
    for gene in genes:
        axis = len(kept)
        if (values == values.take([0], axis=axis)).all():
            values = np.asarray(values.take(0, axis=axis))
        else:
            kept.append(gene)
    return tuple(kept), values


def _scope(factors: Sequence[_Factor], gene: int) -> tuple[int, ...]:
    return tuple(sorted({other for genes, _ in factors if gene in genes for other in genes}))


def _aligned(
    genes: tuple[int, ...], values: npt.NDArray[np.float64], scope: tuple[int, ...]
) -> npt.NDArray[np.float64]:
    order = sorted(range(len(genes)), key=lambda axis: scope.index(genes[axis]))
    sizes = [values.shape[genes.index(g)] if g in genes else 1 for g in scope]
    return values.transpose(order).reshape(sizes)
