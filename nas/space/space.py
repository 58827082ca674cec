"""The search space: YAML choices as a flat, fixed-length encoding of candidates.

A genotype holds one index per gene. All blocks of the deepest network have genes always; those that a network does not
use are inactive and 0 in the canonical form, so that two canonical genotypes are equal exactly when their candidates
are. Flat instead of conditional: equal or better with every sampler that was compared (NSGA-II, TPE), and one array of
fixed width is what a vectorised estimate needs. Fields with one choice have no gene.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nas.core.errors import ConfigError, RecordError
from nas.core.jsonio import content_hash, to_plain
from nas.core.records import (
    KINDS_WITH_SE,
    BlockConfig,
    Candidate,
    ExitConfig,
    HeadConfig,
    LayerSpec,
    Precision,
    StageConfig,
    StemConfig,
)
from nas.core.walk import expand
from nas.space.choices import (
    MAX_CHANNELS,
    MAX_RESOLUTION_PX,
    MAX_STAGES,
    ExitChoices,
    HeadChoices,
    PrecisionChoices,
    Section,
    StageChoices,
    StemChoices,
    integer,
    pruned_channels,
    read_exits,
    read_head,
    read_precision,
    read_stage,
    read_stem,
    shown,
    text,
)
from nas.space.layout import (
    Canoniser,
    Gene,
    Genotype,
    Genotypes,
    Layout,
    Site,
    StageSites,
    build_canoniser,
    build_layout,
)
from nas.space.slots import Slot, build_slots, extreme_genotype
from nas.space.yamlio import load_yaml


@dataclass(frozen=True)  # without slots: cached_property needs a place for what is derived once
class SearchSpace:
    """Everything that a candidate may be. Made by `load_space`; `to_plain` gives the fields of its file back.

    `dropped` names precisions of the file that the device does not offer.
    """

    name: str
    source: str
    num_classes: int
    in_channels: int
    resolution: tuple[int, ...]
    stem: StemChoices
    stages: tuple[StageChoices, ...]
    head: HeadChoices
    exits: ExitChoices
    precision: PrecisionChoices
    dropped: tuple[Precision, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy sent to another process leaves the tables behind that are made on first use."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def layout(self) -> Layout:
        """Which gene decides which place of the network."""
        return build_layout(self.resolution, self.stem, self.stages, self.head, self.exits, self.precision)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """Decisions in their fixed order; a genotype has one index for each."""
        return self.layout.genes

    @cached_property
    def gene_sizes(self) -> tuple[int, ...]:
        """Number of choices of each gene."""
        return tuple(len(gene.choices) for gene in self.genes)

    @property
    def size(self) -> int:
        """Number of genotypes, inactive genes counted."""
        return math.prod(self.gene_sizes)

    @property
    def log10_size(self) -> float:
        """Decimal logarithm of `size`."""
        return sum(math.log10(n) for n in self.gene_sizes)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Grid of exit thresholds; empty where they are only solved from logits."""
        return self.exits.thresholds

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions to choose from."""
        return self.precision.choices

    @cached_property
    def sha256(self) -> str:
        """Hash of what decides the networks: all choices and the number of classes, neither name nor source."""
        content = {key: value for key, value in self.to_plain().items() if key not in ("name", "source")}
        return content_hash({**content, "num_classes": self.num_classes}, 64)

    def to_plain(self) -> dict[str, Any]:
        """The fields of a space file; `space_from_plain` reads them back."""
        exits = {key: value for key, value in to_plain(self.exits).items() if value != []}
        # as it was before heads were choices: the hash of a space without such choices is what it was
        if len(self.exits.hidden_channels) == 1:
            exits["hidden_channels"] = self.exits.hidden_channels[0]
        if self.exits.conv_channels == (0,):
            del exits["conv_channels"]
        return {
            "name": self.name,
            "source": self.source,
            "in_channels": self.in_channels,
            "resolution": list(self.resolution),
            "stem": to_plain(self.stem),
            "stages": [_stage_plain(stage) for stage in self.stages],
            "head": to_plain(self.head),
            **({"exits": exits} if self.exits.after else {}),
            "precision": to_plain(self.precision),
        }

    @cached_property
    def unpruned(self) -> SearchSpace:
        """The space in which every block has all of its expanded channels: what shared weights are trained for."""
        if not self.is_pruned:
            return self
        return replace(self, stages=tuple(replace(stage, prune=(0.0,)) for stage in self.stages))

    @property
    def is_pruned(self) -> bool:
        """Whether a network may go without some of its expanded channels."""
        return any(stage.prune != (0.0,) for stage in self.stages)

    def restricted(self, precisions: Iterable[Precision]) -> SearchSpace:
        """The space without the precisions that are not among these; `dropped` of the result names them.

        Raises:
            ConfigError: no precision is left.
        """
        offered = tuple(precisions)
        kept = tuple(p for p in self.precision.choices if p in offered)
        dropped = tuple(p for p in self.precision.choices if p not in offered)
        if not kept:
            raise ConfigError(
                f"space {self.name}: precision: none of {', '.join(dropped)} runs on this device; "
                f"it offers {', '.join(offered)}"
            )
        if not dropped:
            return self
        space = replace(self, precision=replace(self.precision, choices=kept), dropped=(*self.dropped, *dropped))
        _require_genes(space, f"space {self.name}")
        return space

    def decode(self, genotype: Sequence[int]) -> Candidate:
        """The candidate of a genotype; inactive genes do not matter.

        Raises:
            RecordError: the number of genes or an index does not fit.
        """
        return self._build(self.canonical(genotype))

    def _build(self, genotype: Genotype) -> Candidate:
        """The candidate as the indices say, with every exit that is marked."""
        layout = self.layout
        channels = layout.stem_channels.of(genotype)
        stem = StemConfig(
            channels,
            self.stem.kernel_size,
            self.stem.stride,
            layout.stem_activation.of(genotype),
            layout.stem_precision.of(genotype),
        )
        stages = []
        for choices, sites in zip(self.stages, layout.stages, strict=True):
            width, stride = sites.width.of(genotype), choices.stride
            kind, activation = sites.kind.of(genotype), sites.activation.of(genotype)
            use_se = sites.use_se.of(genotype) and kind in KINDS_WITH_SE
            share = sites.prune.of(genotype)
            blocks = []
            for block in sites.blocks[: sites.depth.of(genotype)]:
                wide = pruned_channels(channels, block.expansion.of(genotype), share, kind)
                kernel_size = block.kernel_size.of(genotype)
                blocks.append(BlockConfig(channels, wide, width, kernel_size, stride, use_se, activation, kind))
                channels, stride = width, 1
            stages.append(StageConfig(tuple(blocks), sites.precision.of(genotype)))
        head = HeadConfig(
            layout.conv_channels.of(genotype),
            layout.hidden_channels.of(genotype),
            self.head.activation,
            layout.head_precision.of(genotype),
        )
        exits = tuple(
            ExitConfig(
                place.after_stage,
                place.hidden_channels.of(genotype),
                place.threshold.of(genotype),
                place.conv_channels.of(genotype),
            )
            for place in layout.exits
            if genotype[place.present]
        )
        return Candidate(
            layout.resolution.of(genotype), self.num_classes, stem, tuple(stages), head, exits, self.in_channels
        )

    def encode(self, candidate: Candidate) -> Genotype:
        """The canonical genotype of a candidate.

        Raises:
            RecordError: the candidate is not in the space; the message names the first unit that is not.
        """
        layout = self.layout
        genotype = [0] * len(self.genes)

        def put(site: Site[Any], value: Any, unit: str) -> None:
            if value not in site.choices:
                allowed = ", ".join(map(str, site.choices))
                raise RecordError(f"{unit}: {value} is not in space {self.name}; allowed: {allowed}")
            if site.gene is not None:
                genotype[site.gene] = site.choices.index(value)

        put(layout.resolution, candidate.resolution, "resolution")
        put(layout.stem_channels, candidate.stem.out_channels, "stem: channels")
        put(layout.stem_activation, candidate.stem.activation, "stem: activation")
        put(layout.stem_precision, candidate.stem.precision, "stem: precision")
        if len(candidate.stages) != len(self.stages):
            raise RecordError(f"{len(candidate.stages)} stages are given; space {self.name} has {len(self.stages)}")
        for s, (stage, sites) in enumerate(zip(candidate.stages, layout.stages, strict=True)):
            unit, first = f"stages.{s}", stage.blocks[0]
            put(sites.depth, len(stage.blocks), f"{unit}: depth")
            put(sites.width, first.out_channels, f"{unit}: width")
            put(sites.kind, first.kind, f"{unit}: kind")
            if first.kind in KINDS_WITH_SE:
                put(sites.use_se, first.use_se, f"{unit}: use_se")
            put(sites.activation, first.activation, f"{unit}: activation")
            put(sites.precision, stage.precision, f"{unit}: precision")
            share = _share_of(stage, sites)
            put(sites.prune, share, f"{unit}: prune")
            for b, (block, block_sites) in enumerate(zip(stage.blocks, sites.blocks, strict=False)):
                put(block_sites.kernel_size, block.kernel_size, f"{unit}.{b}: kernel_size")
                expansion = block_sites.expansion
                wides = tuple(pruned_channels(block.in_channels, e, share, first.kind) for e in expansion.choices)
                put(Site(wides, expansion.gene), block.expanded_channels, f"{unit}.{b}: expanded channels")
        put(layout.conv_channels, candidate.head.conv_channels, "head: conv_channels")
        put(layout.hidden_channels, candidate.head.hidden_channels, "head: hidden_channels")
        put(layout.head_precision, candidate.head.precision, "head: precision")
        self._put_exits(candidate, genotype, put)
        result = self.canonical(genotype)
        _require_equal(self.name, candidate, self._build(result))
        return result

    def _put_exits(self, candidate: Candidate, genotype: list[int], put: Callable[[Site[Any], Any, str], None]) -> None:
        places = {place.after_stage: place for place in self.layout.exits}
        for k, given in enumerate(candidate.exits):
            if given.after_stage not in places:
                allowed = ", ".join(self.exits.after) or "none"
                raise RecordError(
                    f"exits.{k}: an exit after stage {given.after_stage} is not in space {self.name}; "
                    f"allowed: {allowed}"
                )
            place = places[given.after_stage]
            genotype[place.present] = 1
            put(place.conv_channels, given.conv_channels, f"exits.{k}: conv_channels")
            put(place.hidden_channels, given.hidden_channels, f"exits.{k}: hidden_channels")
            put(place.threshold, given.threshold, f"exits.{k}: threshold")
        if len(candidate.exits) > self.exits.max_count:
            raise RecordError(
                f"{len(candidate.exits)} exits are given; space {self.name} allows {self.exits.max_count}"
            )

    def contains(self, candidate: Candidate) -> bool:
        """Whether `encode` finds a genotype for the candidate."""
        try:
            self.encode(candidate)
        except RecordError:
            return False
        return True

    @cached_property
    def _canoniser(self) -> Canoniser:
        return build_canoniser(self.layout, self.exits.max_count)

    def canonical(self, genotype: Sequence[int]) -> Genotype:
        """The genotype with every inactive gene 0; see `canonical_many`.

        Raises:
            RecordError: the number of genes or an index does not fit.
        """
        row = self.canonical_many(np.array([genotype], np.int64))[0]
        return tuple(row.tolist())

    def canonical_many(self, genotypes: Genotypes) -> Genotypes:
        """`canonical` of each row of [N, G], as a new array.

        Genes of blocks beyond the depth become 0; expansions that round to the same channels become the first of them;
        exits beyond the allowed number are dropped from the last stage on; genes of absent exits become 0.

        Raises:
            RecordError: the number of genes or an index does not fit.
        """
        if genotypes.ndim != 2 or genotypes.shape[1] != len(self.genes):
            raise RecordError(
                f"genotype of {genotypes.shape[-1]} genes; space {self.name} has {len(self.genes)} (shape [N, G])"
            )
        wrong = (genotypes < 0) | (genotypes >= self._size_row)
        if wrong.any():
            row, gene = (int(i) for i in np.argwhere(wrong)[0])
            raise RecordError(
                f"gene {self.genes[gene].name}: index {genotypes[row, gene]}; allowed: 0 to {self.gene_sizes[gene] - 1}"
            )
        return self._canoniser(genotypes)

    @cached_property
    def _size_row(self) -> Genotypes:
        return np.array(self.gene_sizes, np.int64)

    def sample(self, rng: np.random.Generator) -> Genotype:
        """A canonical genotype; every gene is drawn uniformly."""
        return tuple(self.sample_many(rng, 1)[0].tolist())

    def sample_many(self, rng: np.random.Generator, count: int) -> Genotypes:
        """`count` canonical genotypes [N, G]; every gene is drawn uniformly."""
        return self._canoniser(rng.integers(0, self._size_row, size=(count, len(self.genes))))

    @cached_property
    def _slots(self) -> tuple[Slot, ...]:
        return build_slots(self.layout, self._build)

    def slots(self) -> tuple[Slot, ...]:
        """Places of the network as tables of layers, in execution order; made on first use, then kept."""
        return self._slots

    def layers(self, precisions: Iterable[Precision] | None = None) -> tuple[LayerSpec, ...]:
        """All distinct rows that a network of the space can need, in execution order.

        Args:
            precisions: only rows in these precisions; all where not given.
        """
        wanted = set(self.precisions if precisions is None else precisions)
        distinct = dict.fromkeys(layer for slot in self.slots() for layer in slot.layers if layer is not None)
        return tuple(layer for layer in distinct if layer.precision in wanted)

    @cached_property
    def _extremes(self) -> tuple[Genotype, Genotype]:
        layout, sizes = self.layout, self.gene_sizes
        presents = [place.present for place in layout.exits]
        free_of_macs = (
            layout.stem_activation,
            layout.stem_precision,
            layout.head_precision,
            *(site for stage in layout.stages for site in (stage.activation, stage.precision)),
        )
        fixed = dict.fromkeys(presents, 0) | {site.gene: 0 for site in free_of_macs if site.gene is not None}
        _, least = extreme_genotype(self.slots(), sizes, _macs, fixed, largest=False)
        found = []
        for chosen in itertools.combinations(presents, min(self.exits.max_count, len(presents))):
            marked = fixed | dict.fromkeys(chosen, 1)
            found.append(extreme_genotype(self.slots(), sizes, _macs, marked, largest=True))
        most = max(found, key=lambda pair: pair[0])[1]
        return self.canonical(least), self.canonical(most)

    def smallest(self) -> Genotype:
        """The first genotype with the fewest MACs."""
        return self._extremes[0]

    def largest(self) -> Genotype:
        """The first genotype with the most MACs, exit heads counted."""
        return self._extremes[1]

    def with_earliest_exits(self, genotype: Genotype, most: int) -> Genotype:
        """The same network with the `most` earliest exits alone, or as many as it may have."""
        changed = {place.present: int(i < most) for i, place in enumerate(self.layout.exits)}
        return self.canonical([changed.get(gene, choice) for gene, choice in enumerate(genotype)])


def _share_of(stage: StageConfig, sites: StageSites) -> float:
    """The first share with which every block of a stage has its channels; the first of all where none has."""

    def fits(share: float) -> bool:
        return all(
            block.expanded_channels
            in {pruned_channels(block.in_channels, e, share, block.kind) for e in own.expansion.choices}
            for block, own in zip(stage.blocks, sites.blocks, strict=False)
        )

    return next((share for share in sites.prune.choices if fits(share)), sites.prune.choices[0])


def _stage_plain(stage: StageChoices) -> dict[str, Any]:
    """The fields of a stage; without `prune` and `kind` where they are what they are in files that do not name them."""
    plain: dict[str, Any] = to_plain(stage)
    idle = {"prune": stage.prune == (0.0,), "kind": stage.kind == ("inverted_residual",)}
    return {key: value for key, value in plain.items() if not idle.get(key, False)}


def _macs(layer: LayerSpec) -> float:
    return float(layer.macs)


def _require_equal(name: str, given: Candidate, built: Candidate) -> None:
    """The choices of `given` are in the space; so must be its fixed fields (strides, activations, equal blocks)."""
    units: list[tuple[str, Any, Any]] = [
        ("in_channels", given.in_channels, built.in_channels),
        ("num_classes", given.num_classes, built.num_classes),
        ("stem", given.stem, built.stem),
    ]
    for s, (stage, other) in enumerate(zip(given.stages, built.stages, strict=True)):
        units += [(f"stages.{s}.{b}", *pair) for b, pair in enumerate(zip(stage.blocks, other.blocks, strict=True))]
        units.append((f"stages.{s}: precision", stage.precision, other.precision))
    units += [(f"exits.{k}", *pair) for k, pair in enumerate(zip(given.exits, built.exits, strict=True))]
    units.append(("head", given.head, built.head))
    for unit, value, expected in units:
        if value != expected:
            raise RecordError(f"{unit}: not in space {name}: {value}; the closest there: {expected}")


FIELDS = ("name", "source", "in_channels", "resolution", "stem", "stages", "head", "exits", "precision")


def load_space(path: Path, num_classes: int, precisions: Iterable[Precision] | None = None) -> SearchSpace:
    """The search space of a YAML file.

    Args:
        path: the file.
        num_classes: classes of the data set.
        precisions: what the device offers; choices beyond them are left out and named in `dropped`.

    Raises:
        ConfigError: the file cannot be read or a field does not fit; the message names file, place and what is allowed.
    """
    space = space_from_plain(load_yaml(path), str(path), num_classes)
    return space if precisions is None else space.restricted(precisions)


def space_from_plain(data: Any, where: str, num_classes: int) -> SearchSpace:
    """The search space of plain data, such as a parsed file or `to_plain` of a space.

    Raises:
        ConfigError: a field does not fit; the message begins with `where`.
    """
    section = Section(data, where, FIELDS)
    if num_classes < 1:
        raise ConfigError(f"{where}: num_classes is {num_classes}; a space needs the classes of a data set, at least 1")
    stages_data = section.value("stages", None)
    if not isinstance(stages_data, list):
        raise section.fail("stages", f"expected a list of stages, got {shown(stages_data)}")
    if not 1 <= len(stages_data) <= MAX_STAGES:
        raise section.fail("stages", f"{len(stages_data)} stages; allowed: 1 to {MAX_STAGES}")
    stages = tuple(read_stage(item, f"{where}: stages[{i}]") for i, item in enumerate(stages_data))
    names = tuple(stage.name for stage in stages)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{where}: stages[{i}] ({name}): name '{name}' is taken by stages[{names.index(name)}]")
    has_exits = section.data.get("exits") is not None
    space = SearchSpace(
        name=section.one("name", text),
        source=section.one("source", text),
        num_classes=num_classes,
        in_channels=section.one("in_channels", integer(1, MAX_CHANNELS, "channels"), 3),
        resolution=tuple(sorted(section.many("resolution", integer(1, MAX_RESOLUTION_PX, "px")))),
        stem=read_stem(section.value("stem", None), f"{where}: stem"),
        stages=stages,
        head=read_head(section.value("head", {}), f"{where}: head"),
        exits=read_exits(section.data["exits"], f"{where}: exits", names) if has_exits else ExitChoices(),
        precision=read_precision(section.value("precision", {"choices": "fp32"}), f"{where}: precision"),
    )
    _require_genes(space, where)
    _require_shapes(space, where)
    return space


def _require_genes(space: SearchSpace, where: str) -> None:
    if not space.genes:
        raise ConfigError(
            f"{where}: holds one network only; give at least one field two choices, such as depth: [1, 2]"
        )
    if not space.unpruned.genes:
        raise ConfigError(f"{where}: prune is the only choice; give another field two choices, such as depth: [1, 2]")


def _require_shapes(space: SearchSpace, where: str) -> None:
    """Sizes of maps depend on the resolution and the strides alone; so one network per resolution, kinds last, tells.

    The last kind is attention wherever that is a choice, the only one that bounds the size of a map.
    """
    genotype = [0] * len(space.genes)
    for stage in space.layout.stages:
        if stage.kind.gene is not None:
            genotype[stage.kind.gene] = len(stage.kind.choices) - 1
    site = space.layout.resolution
    for index, resolution in enumerate(space.resolution):
        if site.gene is not None:
            genotype[site.gene] = index
        try:
            expand(space._build(tuple(genotype)))
        except RecordError as e:
            raise ConfigError(f"{where}: resolution: {resolution} px does not fit: {e}") from e
