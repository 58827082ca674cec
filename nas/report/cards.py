"""What the report's page knows of each student, as plain JSON: figures for its card, parts of its stage diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nas.core.records import KEY_NAMES, Candidate, EnergyFigures, LatencyFigures, LayerSpec
from nas.core.run import STREAM_TOLERANCE, FinishStep, Point, RunView, SplitAccuracy, StreamLatency, TeacherView
from nas.core.units import format_bytes, format_count, format_duration, format_ms
from nas.core.walk import expand
from nas.report.tables import budget_latency_ms, format_number, format_spread, name_of, notes

CONFIDENCE_Z = 1.96  # two-sided 95 %


def card(view: RunView, point: Point) -> dict[str, Any]:
    """Everything the page shows of one student when it is selected."""
    return {
        "id": point.id,
        "name": name_of(point),
        "notes": notes(view, point),
        "facts": [{"name": name, "value": value, "detail": detail} for name, value, detail in _facts(view, point)],
        "exits": _exit_rows(point),
        "diagram": diagram(point.candidate),
        "layers": _layer_rows(point.candidate),
        "command": point.export_command,
        "x": budget_latency_ms(view, point),
        "y": 100 * point.top1,
    }


def diagram(candidate: Candidate) -> list[dict[str, Any]]:
    """Parts of a network in execution order: stem, stages with their blocks, exits where they stand, head."""
    layers = expand(candidate)
    total = sum(layer.macs for layer in layers)
    parts: list[dict[str, Any]] = [
        {
            "kind": "input",
            "title": "Input",
            "detail": f"{candidate.in_channels} x {candidate.resolution} x {candidate.resolution} px",
        }
    ]
    for layer in layers:
        if layer.is_block:
            stage = int(layer.name.split(".")[1])
            if parts[-1].get("stage") != stage:
                parts.append({"kind": "stage", "stage": stage, "title": f"Stage {stage + 1}", "blocks": []})
            parts[-1]["blocks"].append(_block(layer, total))
            parts[-1]["detail"] = f"{layer.out_channels} channels, {layer.out_size} px, {layer.precision}"
        elif layer.kind == "exit_head":
            widths = [f"conv {layer.expanded_channels}"] * (layer.expanded_channels > 0)
            widths += [f"hidden {layer.hidden_channels}"] * (layer.hidden_channels > 0)
            title = f"Exit {layer.segment + 1}" + f" ({', '.join(widths)})" * bool(widths)
            parts.append({"kind": "exit", "exit": layer.segment, "title": title})
        else:
            name = "Stem" if layer.kind == "stem" else "Head"
            where = f"{layer.out_channels} channels, {layer.out_size} px" if layer.kind == "stem" else "classifier"
            parts.append(
                {
                    "kind": layer.kind,
                    "title": name,
                    "detail": f"{where}, {layer.precision}",
                    "blocks": [_block(layer, total)],
                }
            )
    return parts


def _block(layer: LayerSpec, total_macs: int) -> dict[str, Any]:
    """One box of the diagram: a short text, badges, its share of the multiply-adds, and a full description."""
    share = layer.macs / total_macs
    if layer.kind == "head":
        widths = [layer.expanded_channels, layer.hidden_channels, layer.out_channels]
        text = " > ".join(str(w) for w in widths if w)
        badges = []
    elif layer.kind == "stem":
        text, badges = f"{layer.kernel_size}x{layer.kernel_size} conv", [f"/{layer.stride}"] if layer.stride > 1 else []
    else:
        text = f"{layer.kernel_size}x{layer.kernel_size}  e{layer.expanded_channels}"
        kinds = [KEY_NAMES[layer.kind]] * (layer.kind != "inverted_residual")
        badges = kinds + [f"/{layer.stride}"] * (layer.stride > 1) + ["SE"] * layer.use_se
    return {
        "text": text,
        "badges": badges,
        "share": round(share, 4),
        "residual": layer.has_residual,
        "title": f"{describe(layer)}; {format_count(layer.macs)} MACs ({100 * share:.1f} % of all)",
    }


def describe(layer: LayerSpec) -> str:
    """A layer in words, for tooltips and for readers of the page that do not see the drawing."""
    size = f"{layer.in_size} px -> {layer.out_size} px" if layer.in_size != layer.out_size else f"{layer.out_size} px"
    if layer.is_block:
        extras = [f", {layer.heads} heads over {layer.tokens} tokens"] * (layer.heads > 0)
        extras += [", squeeze-and-excitation"] * layer.use_se + [", skip connection"] * layer.has_residual
        kernel, kind = f"{layer.kernel_size}x{layer.kernel_size}", layer.kind.replace("_", " ")
        return (
            f"{layer.name}: {kernel} {kind}, channels {layer.in_channels} -> "
            f"{layer.expanded_channels} -> {layer.out_channels}, {size}, {layer.activation}{''.join(extras)}, "
            f"{layer.precision}"
        )
    if layer.kind == "stem":
        return (
            f"stem: {layer.kernel_size}x{layer.kernel_size} convolution, channels {layer.in_channels} -> "
            f"{layer.out_channels}, {size}, {layer.activation}, {layer.precision}"
        )
    hidden = "".join(f" -> {w}" for w in (layer.expanded_channels, layer.hidden_channels) if w)
    channels = f"{layer.in_channels}{hidden} -> {layer.out_channels} classes"
    return f"{layer.name}: classifier, channels {channels}, {layer.precision}"


def interval(accuracy: SplitAccuracy) -> tuple[float, float]:
    """95 % interval of an accuracy from its number of images (Wilson 1927), as ratios."""
    n, p, z = accuracy.images, accuracy.top1, CONFIDENCE_Z
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def compared_with_teacher(point: Point, teacher: TeacherView | None) -> str:
    """`98.9 % of the teacher's accuracy at 1/14 of its latency`, as far as both are known; else an empty string."""
    if teacher is None or teacher.split != point.split or teacher.top1 == 0:
        return ""
    text = f"{100 * point.top1 / teacher.top1:.1f} % of the teacher's accuracy"
    if teacher.latency_ms is None:
        return text
    ratio = teacher.latency_ms / point.latency.expected_ms
    return f"{text} at {f'1/{_short(ratio)} of' if ratio >= 1 else f'{_short(1 / ratio)} times'} its latency"


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _facts(view: RunView, point: Point) -> list[tuple[str, str, str]]:
    latency, facts = point.latency, []
    spread = format_spread(latency.expected_ms, latency.std_ms)
    for split, accuracy in (("test", point.test), ("validation", point.val)):
        if accuracy is not None:
            low, high = interval(accuracy)
            detail = f"{accuracy.images} images; 95 % interval {100 * low:.1f} to {100 * high:.1f}"
            facts.append((f"Accuracy, {split}", f"{100 * accuracy.top1:.1f} %", detail))
    facts += [
        (
            "Expected latency",
            format_ms(latency.expected_ms),
            f"{latency.provenance}, ± {spread} ms{_was_predicted(point.prediction)}",
        ),
        ("Worst case", format_ms(latency.worst_ms), f"99th percentile {format_ms(latency.p99_ms)}"),
    ]
    if point.stream is not None:
        facts.append(_stream_fact(point.stream, latency.expected_ms))
    if point.energy is not None:
        facts.append(_energy_fact(point.energy))
    if view.budget_ms is not None:
        used = budget_latency_ms(view, point) / view.budget_ms
        verdict = f"{100 * used:.0f} %"
        facts.append(("Budget used", verdict, "within the budget" if used <= 1 else "over the budget"))
    compared = compared_with_teacher(point, view.teacher)
    if compared:
        accuracy_part, _, latency_part = compared.partition(" at ")
        facts.append(("Against the teacher", latency_part.replace("of its ", "") or "-", accuracy_part))
    facts += [
        ("Precision", point.precision, point.candidate.precision_text if point.precision == "mixed" else ""),
        ("Parameters", format_count(point.params), ""),
        ("MACs", format_count(point.macs), "all exits passed"),
    ]
    if point.model_bytes is not None:
        facts.append(("File size", format_bytes(point.model_bytes), ""))
    else:
        facts.append(("Weights", format_bytes(point.weight_bytes), "in this precision"))
    if point.cost_s > 0:
        facts.append(("Training", format_duration(point.cost_s), "CPU time"))
    if point.steps:
        facts.append(("Steps", ", ".join(step.name for step in point.steps), steps_text(point.steps)))
    if point.trial is not None:
        proposer = view.proposer_of(point)
        found = [f"found in round {point.round}"] * (point.round is not None)
        found += [f"proposed by {proposer}"] * bool(proposer)
        facts.append(("Trial", str(point.trial), ", ".join(found)))
    return facts


def _stream_fact(stream: StreamLatency, expected_ms: float) -> tuple[str, str, str]:
    off = stream.off(expected_ms)
    verdict = "" if abs(off) <= STREAM_TOLERANCE else f"; more than {100 * STREAM_TOLERANCE:.0f} % off"
    busy = "" if stream.is_calm else "; the machine was not calm"
    detail = (
        f"{stream.images} test images one by one, {100 * off:+.1f} % against the expected latency{verdict}; 99 % "
        f"within {format_ms(stream.p99_ms)}, typical runs {format_ms(stream.typical_ms)}{busy}"
    )
    return "Measured stream", format_ms(stream.mean_ms), detail


def steps_text(steps: Sequence[FinishStep]) -> str:
    """What a finalist went through, in words: epochs, accuracy on validation, CPU time and outcome of each step."""
    parts = []
    for step in steps:
        epochs = f"{step.epochs} epochs, " if step.epochs else ""
        note = f", {step.note}" if step.note else ""
        parts.append(f"{step.name}: {epochs}{100 * step.top1:.1f} %, {format_duration(step.cpu_s)}{note}")
    return "; ".join(parts) + " (accuracies on validation)"


def _energy_fact(energy: EnergyFigures) -> tuple[str, str, str]:
    spread = f"± {format_spread(energy.expected_mj, energy.std_mj)} mJ"
    how = f"{energy.provenance}, {spread}; with the idle power of the board"
    if energy.is_error_assumed:
        how += "; no measured network says yet how far the sum of blocks is off, so the error is assumed"
    if energy.worst_mj != energy.expected_mj:
        how += f"; {format_number(energy.worst_mj)} mJ where no exit is taken"
    return "Energy", f"{format_number(energy.expected_mj)} mJ", how


def _was_predicted(prediction: LatencyFigures | None) -> str:
    return "" if prediction is None else f"; predicted {format_ms(prediction.expected_ms)}"


def _exit_rows(point: Point) -> list[dict[str, Any]]:
    """One row per exit, the head last; unknown values are None."""
    candidate, alone = point.candidate, point.accuracy.exit_top1
    thresholds: list[float | None] = [*point.thresholds, None]
    rows = []
    for k, threshold in enumerate(thresholds):
        is_head = k == len(candidate.exits)
        rows.append(
            {
                "name": "Head" if is_head else f"Exit {k + 1}",
                "rule": "" if is_head else rule_of(threshold),
                "confidence": "the rest" if is_head else confidence_of(threshold),
                "share": point.exit_shares[k] if point.exit_shares else None,
                "latency": format_ms(point.exit_ms[k]) if point.exit_ms else None,
                "top1": f"{100 * alone[k]:.1f} %" if k < len(alone) else None,
                "calibration": _calibration(point, k),
            }
        )
    return rows


def _calibration(point: Point, k: int) -> str | None:
    """Expected calibration error of an exit without and with its temperature."""
    if k >= len(point.confidence):
        return None
    own = point.confidence[k]
    return f"{100 * own.error_before:.1f} → {100 * own.error_after:.1f} %"


def rule_of(threshold: float | None) -> str:
    """When an image leaves at an exit, in words."""
    if threshold is None:
        return "threshold not set"
    if threshold <= 0:
        return "every image leaves here"
    if threshold > 1:
        return "no image leaves here"
    return f"confidence at least {threshold:.3f}"


def confidence_of(threshold: float | None) -> str:
    """The same for a narrow column."""
    if threshold is None:
        return "not set"
    if threshold <= 0:
        return "any"
    if threshold > 1:
        return "never"
    return f"≥ {threshold:.3f}"


def _layer_rows(candidate: Candidate) -> list[list[str]]:
    return [
        [
            layer.name,
            f"{layer.in_channels} x {layer.in_size} px",
            f"{layer.out_channels} x {layer.out_size} px",
            layer.precision,
            format_count(layer.macs),
            format_count(layer.params),
        ]
        for layer in expand(candidate)
    ]
