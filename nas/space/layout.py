"""Where each gene of a space stands: the order of the flat encoding, and the rules that make a genotype canonical."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from nas.core.records import KINDS_WITH_EXPANSION, KINDS_WITH_SE, Activation, BlockKind, Precision
from nas.space.choices import (
    ExitChoices,
    HeadChoices,
    PrecisionChoices,
    StageChoices,
    StemChoices,
    expanded_channels,
    pruned_channels,
)

Genotype = tuple[int, ...]
Genotypes = npt.NDArray[np.int64]  # [N, G], one genotype in each row
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gene:
    """One decision: a name such as `s2.0.kernel_size` and the values to choose from."""

    name: str
    choices: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Site(Generic[T]):
    """A place where a value is chosen; `gene` is None where there is one choice only."""

    choices: tuple[T, ...]
    gene: int | None

    def of(self, genotype: Sequence[int]) -> T:
        return self.choices[0 if self.gene is None else genotype[self.gene]]

    def column(self, genotypes: Genotypes) -> npt.NDArray[np.int64]:
        """Index of the choice in each of the genotypes, [N]."""
        return np.zeros(len(genotypes), np.int64) if self.gene is None else genotypes[:, self.gene]


@dataclass(frozen=True, slots=True)
class BlockSites:
    """The choices of one block."""

    kernel_size: Site[int]
    expansion: Site[float]


@dataclass(frozen=True, slots=True)
class StageSites:
    """The choices of one stage and of its blocks, as many as the deepest network has."""

    kind: Site[BlockKind]
    depth: Site[int]
    width: Site[int]
    use_se: Site[bool]
    activation: Site[Activation]
    precision: Site[Precision]
    prune: Site[float]
    blocks: tuple[BlockSites, ...]


@dataclass(frozen=True, slots=True)
class ExitSites:
    """An exit that may stand after stage `after_stage`; the gene `present` is 0 or 1."""

    after_stage: int
    present: int
    conv_channels: Site[int]
    hidden_channels: Site[int]
    threshold: Site[float | None]


@dataclass(frozen=True, slots=True)
class Layout:
    """All places of a space. Precision places share one gene where the precision is chosen for the whole network."""

    genes: tuple[Gene, ...]
    resolution: Site[int]
    stem_channels: Site[int]
    stem_activation: Site[Activation]
    stem_precision: Site[Precision]
    stages: tuple[StageSites, ...]
    conv_channels: Site[int]
    hidden_channels: Site[int]
    head_precision: Site[Precision]
    exits: tuple[ExitSites, ...]


def build_layout(
    resolution: tuple[int, ...],
    stem: StemChoices,
    stages: tuple[StageChoices, ...],
    head: HeadChoices,
    exits: ExitChoices,
    precision: PrecisionChoices,
) -> Layout:
    """Genes in their fixed order: resolution, precision, stem, stages from first to last, head, exits.

    A precision that is chosen for each stage stands with its stage instead of in front.
    """
    genes: list[Gene] = []

    def site(name: str, choices: tuple[T, ...]) -> Site[T]:
        if len(choices) == 1:
            return Site(choices, None)
        genes.append(Gene(name, choices))
        return Site(choices, len(genes) - 1)

    resolution_site = site("resolution", resolution)
    whole = site("precision", precision.choices) if precision.per == "network" else None

    def precision_site(name: str) -> Site[Precision]:
        return whole or site(f"{name}.precision", precision.choices)

    def stage_sites(stage: StageChoices) -> StageSites:
        return StageSites(
            site(f"{stage.name}.kind", stage.kind),
            site(f"{stage.name}.depth", stage.depth),
            site(f"{stage.name}.width", stage.width),
            site(f"{stage.name}.use_se", stage.use_se),
            site(f"{stage.name}.activation", stage.activation),
            precision_site(stage.name),
            site(f"{stage.name}.prune", stage.prune),
            tuple(
                BlockSites(
                    site(f"{stage.name}.{b}.kernel_size", stage.kernel_size),
                    site(f"{stage.name}.{b}.expansion", stage.expansion),
                )
                for b in range(stage.max_depth)
            ),
        )

    def exit_sites(name: str) -> ExitSites:
        present = len(genes)
        genes.append(Gene(f"exits.{name}", (False, True)))
        conv_channels = site(f"exits.{name}.conv_channels", exits.conv_channels)
        hidden_channels = site(f"exits.{name}.hidden_channels", exits.hidden_channels)
        threshold: Site[float | None] = site(f"exits.{name}.threshold", exits.thresholds or (None,))
        after = [stage.name for stage in stages].index(name)
        return ExitSites(after, present, conv_channels, hidden_channels, threshold)

    # arguments are evaluated in order, and with them the genes are numbered
    sites = (
        resolution_site,
        site("stem.channels", stem.channels),
        site("stem.activation", stem.activation),
        precision_site("stem"),
        tuple(stage_sites(stage) for stage in stages),
        site("head.conv_channels", head.conv_channels),
        site("head.hidden_channels", head.hidden_channels),
        precision_site("head"),
        tuple(exit_sites(name) for name in exits.after),
    )
    return Layout(tuple(genes), *sites)


@dataclass(frozen=True, slots=True)
class PrunedStage:
    """The rule of a stage whose blocks may be pruned: the same channels come from one share and one expansion only.

    Of all shares with which every block that is there can have its channels the first is taken; of all expansions that
    give them with this share the first as well.

    `tables`, one for each block: [width of the input, share, expansion, other share] -> the first expansion that gives
    the same channels with the other share, -1 where none does.
    """

    prune: Site[float]
    depth: Site[int]
    blocks: tuple[tuple[Site[float], Site[int]], ...]  # expansion, width of the input
    tables: tuple[npt.NDArray[np.int64], ...]

    def __call__(self, genotypes: Genotypes) -> None:
        """Changes genotypes [N, G] in place."""
        share, rows = self.prune.column(genotypes), np.arange(len(genotypes))
        depth = np.array(self.depth.choices)[self.depth.column(genotypes)]
        fits = np.ones((len(genotypes), len(self.prune.choices)), bool)
        found = []
        for b, ((expansion, width), table) in enumerate(zip(self.blocks, self.tables, strict=True)):
            same = table[width.column(genotypes), share, expansion.column(genotypes)]
            fits &= (same >= 0) | (depth <= b)[:, None]
            found.append(same)
        first = fits.argmax(axis=1)
        if self.prune.gene is not None:
            genotypes[:, self.prune.gene] = first
        for (expansion, _), same in zip(self.blocks, found, strict=True):
            if expansion.gene is not None:  # of a block that is not there the rules below set it to 0
                genotypes[:, expansion.gene] = np.maximum(same[rows, first], 0)


def _pruned_stage(stage: StageSites, input_width: Site[int]) -> PrunedStage:
    blocks = tuple((block.expansion, stage.width if b else input_width) for b, block in enumerate(stage.blocks))
    tables = []
    for expansion, width in blocks:
        channels = np.array(
            [
                [[pruned_channels(c, e, p) for e in expansion.choices] for p in stage.prune.choices]
                for c in width.choices
            ]
        )
        same = channels[:, :, :, None, None] == channels[:, None, None, :, :]  # [width, p, e, other p, other e]
        tables.append(np.where(same.any(axis=-1), same.argmax(axis=-1), -1))
    return PrunedStage(stage.prune, stage.depth, blocks, tuple(tables))


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules of different genes: gene `genes[r]` is active where `active[r, index of gene parents[r]]`."""

    genes: npt.NDArray[np.int64]
    parents: npt.NDArray[np.int64]
    active: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Canoniser:
    """The rules that set inactive genes to 0, as arrays over many genotypes.

    A gene is active where the rules of all passes say so. An alias rule maps expansions that round to the same channels
    to the first of them: `table[index of the input width, index of the expansion]`.
    """

    passes: tuple[Rules, ...]
    aliases: tuple[tuple[int, Site[int], npt.NDArray[np.int64]], ...]
    pruned: tuple[PrunedStage, ...]
    exit_genes: npt.NDArray[np.int64]
    max_exits: int

    def __call__(self, genotypes: Genotypes) -> Genotypes:
        result = genotypes.copy()
        if self.max_exits < len(self.exit_genes):
            present = result[:, self.exit_genes]
            result[:, self.exit_genes] = present * (present.cumsum(axis=1) <= self.max_exits)
        for gene, width, table in self.aliases:
            result[:, gene] = table[width.column(result), result[:, gene]]
        for rule in self.pruned:
            rule(result)
        for rules in self.passes:
            result[:, rules.genes] *= rules.active[np.arange(len(rules.genes)), result[:, rules.parents]]
        return result


def build_canoniser(layout: Layout, max_exits: int) -> Canoniser:
    """The rules of a layout, of whose exits a network has at most `max_exits`."""
    rules: list[tuple[int, int, list[int]]] = []
    kind_rules: list[tuple[int, int, list[int]]] = []
    aliases = []
    pruned = []
    input_width = layout.stem_channels
    for stage in layout.stages:
        if stage.kind.gene is not None:
            for gene, kinds in (
                (stage.use_se.gene, KINDS_WITH_SE),
                *((block.expansion.gene, KINDS_WITH_EXPANSION) for block in stage.blocks),
            ):
                if gene is not None:
                    kind_rules.append((gene, stage.kind.gene, [int(kind in kinds) for kind in stage.kind.choices]))
        if stage.prune.choices != (0.0,):
            pruned.append(_pruned_stage(stage, input_width))
        for b, block in enumerate(stage.blocks):
            for gene in (block.kernel_size.gene, block.expansion.gene):
                if gene is not None and stage.depth.gene is not None:
                    rules.append((gene, stage.depth.gene, [int(b < depth) for depth in stage.depth.choices]))
            if block.expansion.gene is not None and stage.prune.choices == (0.0,):
                rows = [[expanded_channels(c, e) for e in block.expansion.choices] for c in input_width.choices]
                table = np.array([[row.index(wide) for wide in row] for row in rows], np.int64)
                if (table != np.arange(table.shape[1])).any():
                    aliases.append((block.expansion.gene, input_width, table))
            input_width = stage.width
    for place in layout.exits:
        for gene in (place.conv_channels.gene, place.hidden_channels.gene, place.threshold.gene):
            if gene is not None:
                rules.append((gene, place.present, [0, 1]))
    return Canoniser(
        tuple(_rules(group) for group in (rules, kind_rules) if group),
        tuple(aliases),
        tuple(pruned),
        np.array([place.present for place in layout.exits], np.int64),
        max_exits,
    )


def _rules(group: Sequence[tuple[int, int, list[int]]]) -> Rules:
    active = np.zeros((len(group), max(len(flags) for _, _, flags in group)), np.int64)
    for row, (_, _, flags) in enumerate(group):
        active[row, : len(flags)] = flags
    return Rules(np.array([r[0] for r in group], np.int64), np.array([r[1] for r in group], np.int64), active)
