"""Candidates that a user wants trained first, whatever the sampler thinks: the entries of `search.enqueue`.

An entry is the name of a published network, a JSON file that holds a candidate, a candidate of an earlier run, or
values of genes; all of them become genotypes of the search space before any long work begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from nas.core.errors import ConfigError, NasError, RecordError, did_you_mean
from nas.core.jsonio import read_record
from nas.core.records import Activation, BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.search.folder import RunFolder
from nas.search.settings import EnqueueEntry, GeneValue, is_candidate_file
from nas.search.view import load_outcome
from nas.space.space import SearchSpace

Genotype = tuple[int, ...]
RUN_KEYS = ("run", "id")
SHOWN = 12  # names in a message


@dataclass(frozen=True, slots=True)
class Seed:
    """A candidate of `search.enqueue`: what the user calls it, and its canonical genotype."""

    name: str
    genotype: Genotype


@dataclass(frozen=True, slots=True)
class Block:
    """A row of the published tables; sizes are channels."""

    kernel_size: int
    expanded: int
    out: int
    use_se: bool
    activation: Activation
    stride: int


@dataclass(frozen=True, slots=True)
class Published:
    """A published network at 224 px: its stages, and the channels of the head's convolution and hidden layer."""

    stages: tuple[tuple[Block, ...], ...]
    conv_channels: int
    hidden_channels: int

    def candidate(self, num_classes: int) -> Candidate:
        """The network in fp32, without exits."""
        channels, stages = 16, []
        for rows in self.stages:
            blocks = []
            for row in rows:
                blocks.append(
                    BlockConfig(
                        channels, row.expanded, row.out, row.kernel_size, row.stride, row.use_se, row.activation
                    )
                )
                channels = row.out
            stages.append(StageConfig(tuple(blocks)))
        head = HeadConfig(self.conv_channels, self.hidden_channels)
        return Candidate(224, num_classes, StemConfig(16), tuple(stages), head)


# Howard et al. 2019, Searching for MobileNetV3 (arXiv 1905.02244), Table 2
_SMALL = Published(
    (
        (Block(3, 16, 16, True, "relu", 2),),
        (Block(3, 72, 24, False, "relu", 2), Block(3, 88, 24, False, "relu", 1)),
        (Block(5, 96, 40, True, "hard_swish", 2), *(Block(5, 240, 40, True, "hard_swish", 1),) * 2),
        (Block(5, 120, 48, True, "hard_swish", 1), Block(5, 144, 48, True, "hard_swish", 1)),
        (Block(5, 288, 96, True, "hard_swish", 2), *(Block(5, 576, 96, True, "hard_swish", 1),) * 2),
    ),
    576,
    1024,
)
# ibid., Table 1
_LARGE = Published(
    (
        (Block(3, 16, 16, False, "relu", 1),),
        (Block(3, 64, 24, False, "relu", 2), Block(3, 72, 24, False, "relu", 1)),
        (Block(5, 72, 40, True, "relu", 2), *(Block(5, 120, 40, True, "relu", 1),) * 2),
        (
            Block(3, 240, 80, False, "hard_swish", 2),
            Block(3, 200, 80, False, "hard_swish", 1),
            *(Block(3, 184, 80, False, "hard_swish", 1),) * 2,
        ),
        (Block(3, 480, 112, True, "hard_swish", 1), Block(3, 672, 112, True, "hard_swish", 1)),
        (Block(5, 672, 160, True, "hard_swish", 2), *(Block(5, 960, 160, True, "hard_swish", 1),) * 2),
    ),
    960,
    1280,
)
PUBLISHED: Mapping[str, Published] = {"mobilenet_v3_small": _SMALL, "mobilenet_v3_large": _LARGE}


def resolve(entries: Sequence[EnqueueEntry], space: SearchSpace) -> tuple[Seed, ...]:
    """The candidates of `search.enqueue` in their order; of equal ones the first.

    Raises:
        ConfigError: an entry is unknown, cannot be read, or is not in the space; the message names what is.
    """
    found: dict[Genotype, Seed] = {}
    for i, entry in enumerate(entries):
        name, genotype = _one(entry, space, f"search.enqueue[{i}]")
        found.setdefault(genotype, Seed(name, genotype))
    return tuple(found.values())


def _one(entry: EnqueueEntry, space: SearchSpace, where: str) -> tuple[str, Genotype]:
    """What an entry is called, and its genotype."""
    if isinstance(entry, str):
        return (Path(entry).name if is_candidate_file(entry) else entry), _named(entry, space, where)
    if any(key in entry for key in RUN_KEYS):
        candidate = _of_run(entry, where)
        return candidate.id, _encoded(candidate, space, f"{where} ({candidate.id} of {entry['run']})")
    genotype = _of_genes(entry, space, where)
    return space.decode(genotype).id, genotype


def _named(text: str, space: SearchSpace, where: str) -> Genotype:
    """Genotype of a published network or of a file."""
    if is_candidate_file(text):
        try:
            candidate = read_record(Candidate, Path(text))
        except NasError as e:
            raise ConfigError(f"{where}: no candidate can be read: {e}") from e
        return _encoded(candidate, space, f"{where} ({text})")
    if text not in PUBLISHED:
        raise ConfigError(
            f"{where}: {text!r} is no published network{did_you_mean(text, PUBLISHED)} (names: "
            f"{', '.join(PUBLISHED)}); a file of a candidate ends in .json, a candidate of an earlier run is "
            "{run: DIR, id: ID}, genes are {NAME: VALUE, ...}"
        )
    return _encoded(PUBLISHED[text].candidate(space.num_classes), space, f"{where} ({text})")


def _encoded(candidate: Candidate, space: SearchSpace, where: str) -> Genotype:
    """The genotype of a candidate, with the classes of this data set."""
    try:
        return space.encode(replace(candidate, num_classes=space.num_classes))
    except RecordError as e:
        raise ConfigError(f"{where}: {e}. Leave it out, or take a space that contains it (--set space=NAME)") from e


def _of_run(entry: Mapping[str, GeneValue], where: str) -> Candidate:
    """The candidate of an earlier run by its id, that of its architecture, or that of a student that came from it."""
    run, wanted = (entry.get(key) for key in RUN_KEYS)
    if len(entry) != len(RUN_KEYS) or not isinstance(run, str) or not isinstance(wanted, str):
        raise ConfigError(
            f"{where}: a candidate of an earlier run is given as {{run: DIR, id: ID}}, both of them text; got the keys "
            f"{', '.join(entry)}"
        )
    path = Path(run)
    if not (path / "fingerprint.json").exists():
        raise ConfigError(f"{where}: {run}: not a run folder (no fingerprint.json). Runs that are there: nas runs")
    try:
        records = RunFolder(path).trials()
        points = load_outcome(path).points if (path / "outcome.json").exists() else ()
    except NasError as e:
        raise ConfigError(f"{where}: {run}: cannot be read: {e}") from e
    for record in records:
        if wanted in (record.candidate.id, record.candidate.arch_id):
            return record.candidate
    numbers = [p.trial for p in points if p.id == wanted]
    for record in records:
        if record.number in numbers:
            return record.candidate
    known = [*(r.candidate.id for r in records), *(p.id for p in points)]
    raise ConfigError(
        f"{where}: {run} has no candidate {wanted!r}{did_you_mean(wanted, known)} ({len(records)} were scored there; "
        f"see: nas pareto {quote(run)})"
    )


def _of_genes(entry: Mapping[str, GeneValue], space: SearchSpace, where: str) -> Genotype:
    """The genotype of gene values; those that are not given are of the network in `like`, or of the smallest one."""
    values = dict(entry)
    like = values.pop("like", None)
    if like is not None and not isinstance(like, str):
        raise ConfigError(f"{where}: like: expected a published network or a .json file, got {like!r}")
    genotype = list(space.smallest() if like is None else _named(like, space, f"{where}: like"))
    places = {gene.name: i for i, gene in enumerate(space.genes)}
    for name, value in values.items():
        if name not in places:
            raise ConfigError(
                f"{where}: unknown gene {name!r}{did_you_mean(name, places)} (genes of {space.name}: "
                f"{_shown(places)}; beside them: like)"
            )
        choices = space.genes[places[name]].choices
        index = next((i for i, choice in enumerate(choices) if _equal(choice, value)), None)
        if index is None:
            allowed = [_text(choice) for choice in choices]
            raise ConfigError(
                f"{where}: {name}: {_text(value)} is not allowed; allowed: {', '.join(allowed)}"
                f"{did_you_mean(_text(value), allowed)}"
            )
        genotype[places[name]] = index
    return space.canonical(genotype)


def _equal(choice: Any, value: GeneValue) -> bool:
    """Whether a value of a file means a choice; true is not 1."""
    return isinstance(choice, bool) == isinstance(value, bool) and bool(choice == value)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(names: Mapping[str, int]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f", ... {len(listed)} in all" if len(listed) > SHOWN else "")
