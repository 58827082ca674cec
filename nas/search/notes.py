"""Notes in Markdown for the dashboard of a study: a card for each candidate, and what the study is about.

Only what Markdown with tables can say, in few bytes: the dashboard sends all notes of a study with each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nas.core.records import Candidate, LayerSpec
from nas.core.run import PredictedMeasured, RunView, latency_of
from nas.core.units import format_bytes, format_count, format_ms
from nas.core.walk import expand, total_macs
from nas.latency.exits import NEVER
from nas.search.folder import TrialRecord

STUDENTS_SHOWN = 4  # of one candidate; it may be finished in several precisions and with several thresholds
FIGURE_TITLE = "Scores and the budget"
GAP = "\N{EM SPACE}"  # the dashboard draws tables without any room between columns


@dataclass(frozen=True, slots=True)
class MirroredTrial:
    """A scored candidate as the mirrored study has it.

    `latency_ms` is the estimate under the exits that the validation images took, on each device; `std_ms` its standard
    deviation on the first one, None where the study was written without it; `excess` what it is over the budget, as a
    share of it.
    """

    record: TrialRecord
    latency_ms: tuple[float, ...]
    std_ms: float | None
    excess: float


def candidate_note(trial: MirroredTrial, view: RunView) -> str:
    """The card of a candidate.

    Args:
        trial: what the study knows of it.
        view: the run on its first device.
    """
    record = trial.record
    candidate = record.candidate
    devices = [view.device_name, *(own.device_name for own in view.others)]
    own_ms, *elsewhere_ms = trial.latency_ms
    rows = [
        ("proposed by", f"{record.proposer}, round {record.round}, trial {record.number}"),
        ("score", _score(record, view.scorer)),
        ("latency, predicted", _spread(own_ms, trial.std_ms)),
        *(
            (f"latency on {name}, predicted", format_ms(ms))
            for name, ms in zip(devices[1:], elsewhere_ms, strict=False)
        ),
        ("latency, measured", _measured(candidate, view.predictions)),
        ("budget", _budget(trial.excess, view)),
        ("precision", record.candidate.precision_label),
        ("size", f"{format_count(total_macs(candidate))} MACs, {_weights(candidate)} of weights"),
    ]
    parts = [f"**{candidate.id}**", _table(("", ""), [row for row in rows if row[1]]), _stages(candidate)]
    if candidate.exits:
        parts.append(_exits(record))
    students = _students(record, view)
    if students:
        parts.append(students)
    return "\n\n".join(parts)


def study_note(view: RunView, copied_at: str) -> str:
    """What a study is about, what the dashboard does not see, and how to go on.

    Args:
        view: the run on its first device.
        copied_at: when the copy that is shown was made, as text.
    """
    rows = [
        ("budget", "none" if view.budget_ms is None else f"{format_ms(view.budget_ms)}, {view.budget_of} latency"),
        ("device", view.device_name if view.device is None else f"{view.device_name}: {view.device.name}"),
        *((f"also on {own.device_name}", f"{format_ms(own.budget_ms or 0)}") for own in view.others),
        ("space", f"{view.space_name}, {format_count(view.space_size)} candidates"),
        ("scorer", view.scorer),
        ("scored", f"{len(view.trials)}; {len(view.failed)} failed"),
        ("pick", "" if view.pick_id is None else f"{view.pick_id}: {view.pick_reason}"),
        ("nothing keeps the budget", "" if view.closest_id is None else f"closest: {view.closest_id}"),
    ]
    proposers = [
        (s.name, str(s.scored), str(s.on_front), str(s.students), f"{100 * s.hypervolume_lost:.1f} %")
        for s in view.proposers
    ]
    parts = [
        f"**{view.name}: {view.status}**",
        _table(("", ""), [row for row in rows if row[1]]),
        "`score` is taken on validation images, the mean probability of the right label, not the accuracy of a "
        "finished student. `latency_ms` is the estimate under the exits that these images took.",
        "**Which trials keep the budget** this dashboard does not see: it does not read the constraints of Optuna 5, "
        f"so its best trials and its Pareto front hold candidates over the budget too. The figure *{FIGURE_TITLE}* "
        "marks them, and the note of each trial says it.",
    ]
    if proposers:
        head = ("proposer", "scored", "on the front of scores", "students on the front", "hypervolume lost without it")
        parts.append(_table(head, proposers))
    if view.commands:
        parts.append("**How to go on**\n\n" + "\n".join(f"    {command}" for command in view.commands))
    parts.append(f"A copy of {copied_at}, read only. Start `nas dashboard` again to see later trials.")
    return "\n\n".join(parts)


def _score(record: TrialRecord, scorer: str) -> str:
    after = f" after {record.epochs} epochs" if record.epochs else ""
    kind = "right answers" if record.soft_top1 is None else "mean probability of the right label"
    return f"{100 * record.score:.1f} %: {kind} ({scorer}{after}, validation; not final accuracy)"


def _spread(ms: float, std_ms: float | None) -> str:
    return format_ms(ms) if std_ms is None else f"{format_ms(ms)} ± {format_ms(std_ms)}"


def _measured(candidate: Candidate, predictions: Sequence[PredictedMeasured]) -> str:
    """The whole network as it was measured in the search; empty where it was not."""
    unset = candidate.with_thresholds((None,) * len(candidate.exits)).id
    found = [p for p in predictions if p.candidate_id == unset]
    if not found:
        return ""
    last = found[-1]
    return f"{format_ms(last.measured_ms)} at worst; predicted before {_spread(last.predicted_ms, last.std_ms)}"


def _budget(excess: float, view: RunView) -> str:
    if view.budget_ms is None:
        return ""
    limit = f"{format_ms(view.budget_ms)} ({view.budget_of})"
    where = " of one device" if view.others else ""
    share = 100 * (1 + excess)
    return f"keeps {limit}{where}: {share:.0f} % of it" if excess <= 0 else f"**over** {limit}: {share:.0f} % of it"


def _weights(candidate: Candidate) -> str:
    return format_bytes(sum(layer.weight_bytes for layer in expand(candidate)))


def _stages(candidate: Candidate) -> str:
    """One line for each stage; where its blocks differ, one value for each block."""
    groups: dict[str, list[LayerSpec]] = {}
    for layer in expand(candidate):
        if layer.is_block:
            groups.setdefault(f"stage {int(layer.name.split('.')[1]) + 1}", []).append(layer)
        elif layer.kind == "exit_head":
            groups[f"exit {layer.segment + 1}"] = [layer]
        else:
            groups[layer.kind] = [layer]
    rows = [
        (
            name,
            _blocks(layers) if layers[0].is_block else "",
            _each(str(x.kernel_size) if x.is_block or x.kind == "stem" else "" for x in layers),
            _each(str(x.expanded_channels or x.hidden_channels or "") for x in layers),
            f"{layers[-1].out_channels}, {layers[-1].out_size} px",
            _each(("yes" if x.use_se else "no") if x.is_block else "" for x in layers),
            layers[0].precision,
        )
        for name, layers in groups.items()
    ]
    side = candidate.resolution
    return f"Input {candidate.in_channels} x {side} x {side} px\n\n" + _table(
        ("part", "blocks", "kernel", "expanded", "channels out", "SE", "precision"), rows
    )


def _blocks(layers: Sequence[LayerSpec]) -> str:
    """Their number, and their kind where it is not the usual one."""
    kind = layers[0].kind
    return str(len(layers)) if kind == "inverted_residual" else f"{len(layers)} {kind.replace('_', ' ')}"


def _each(values: Iterable[str]) -> str:
    """One value where all are alike, else all of them."""
    found = list(values)
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def _exits(record: TrialRecord) -> str:
    rows = []
    for k, place in enumerate(record.candidate.exits):
        threshold = "not set" if place.threshold is None else f"{place.threshold:.3g}"
        if place.threshold is not None and place.threshold >= NEVER:
            threshold = "never"
        rows.append((f"exit {k + 1}, after stage {place.after_stage + 1}", threshold, *_exit_figures(record, k)))
    rows.append(("head", "the rest", *_exit_figures(record, len(record.candidate.exits))))
    return _table(("exit", "confidence", "images", "right if all left here"), rows)


def _exit_figures(record: TrialRecord, k: int) -> tuple[str, str]:
    share = f"{100 * record.exit_shares[k]:.0f} %" if k < len(record.exit_shares) else ""
    alone = f"{100 * record.exit_top1[k]:.1f} %" if k < len(record.exit_top1) else ""
    return share, alone


def _students(record: TrialRecord, view: RunView) -> str:
    """The finished students of this candidate, those on the front first; empty where there are none."""
    own = [p for p in view.points if p.trial == record.number and p.is_finished]
    own.sort(key=lambda p: (p.id != view.pick_id, not p.on_front, latency_of(p.latency, view.budget_of)))
    rows = [
        (
            p.id + (", **pick**" if p.id == view.pick_id else ""),
            f"{100 * p.top1:.1f} % ({p.split})",
            _spread(p.latency.expected_ms, p.latency.std_ms),
            format_ms(p.latency.worst_ms),
            p.latency.provenance,
            ("yes" if p.on_front else "no") + ("" if view.meets_budget(p) else ", over the budget"),
        )
        for p in own[:STUDENTS_SHOWN]
    ]
    if not rows:
        return ""
    more = f"\n\nand {len(own) - STUDENTS_SHOWN} more: nas pareto --all" if len(own) > STUDENTS_SHOWN else ""
    return (
        "**Finished students**\n\n"
        + _table(("student", "accuracy", "expected latency", "worst", "latency is", "on the front"), rows)
        + more
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, *rows]
    shown = [[*(_cell(cell) + GAP for cell in line[:-1]), _cell(line[-1])] for line in lines]
    shown.insert(1, ["---"] * len(head))
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
