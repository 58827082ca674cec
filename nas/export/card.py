"""README.md of a package: a model card whose latency always names device, mode, versions, batch and precision."""

from __future__ import annotations

import json

from nas.export.manifest import Manifest

_VERDICTS = {
    "over_budget": "OVER BUDGET: do not deploy where the deadline matters",
    "accuracy_loss": "ACCURACY LOSS: loses more than was allowed",
}


def model_card(manifest: Manifest) -> str:
    """Markdown with the metadata block that Hugging Face reads.

    Args:
        manifest: of the package; its file hashes are not used.
    """
    m, latency, device = manifest, manifest.latency, manifest.latency.device
    head = len(m.candidate.exits)
    where = (
        f"{device.board}, {device.runtime} {device.runtime_version}, {device.threads} thread(s), "
        f"power mode {device.power_mode}, clocks {'locked' if device.clocks_locked else 'not locked'}"
    )
    budget = f" (budget: {m.budget_of} {m.budget_ms:.4g} ms)" if m.budget_ms is not None else ""
    lines = [
        *_metadata(m),
        f"# {text(m.name)}",
        "",
        f"**{_verdict(m)}**",
        *(f"- {text(reason)}" for reason in m.reasons),
        "",
        f"Image classifier, {len(m.class_names)} classes, {m.candidate.resolution} px, {m.precision}, "
        f"{m.macs:,} multiply-adds, {m.params:,} parameters, file {m.model_bytes:,} bytes. "
        f"Accuracy and latency below are those of `model.onnx` itself.",
        *_integer_note(m),
        "",
        "## Use",
        "",
        "```sh",
        "python -m pip install numpy onnxruntime   # and pillow, for JPEG, PNG, TIFF, ...",
        "python parity.py                          # does this machine compute the same? PASS or FAIL",
        "python infer.py photo.jpg                 # or several files, or a folder",
        "```",
        "",
        f"Input `image`: float32 [1, {len(m.mean)}, {m.candidate.resolution}, {m.candidate.resolution}], RGB, raw "
        "pixels 0-255; normalisation is inside the model. `preprocess.json` describes the decoding.",
        "",
        "## Accuracy",
        "",
        f"Top-1 {100 * m.accuracy.top1:.2f} % on {m.accuracy.images:,} {text(m.accuracy.split)} images"
        + (f" (reference {100 * m.reference_top1:.2f} %)." if m.reference_top1 is not None else "."),
        "",
        "## Latency",
        "",
        f"{text(where)}; batch 1, {m.precision}; clock: {latency.clock}; measured {text(latency.measured_at)}.",
        "",
        f"Expected {latency.figures.expected_ms:.4g} ms, worst case {latency.figures.worst_ms:.4g} ms, "
        f"99 % of images {latency.figures.p99_ms:.4g} ms{budget}.",
        "",
        "| image leaves at | share of images | ms | p50 ms | p95 ms | runs |",
        "|---|---|---|---|---|---|",
    ]
    for path in latency.paths:
        place = "head" if path.exit_index == head else f"exit {path.exit_index}"
        note = "" if path.is_stable else " (no calm round)"
        lines.append(
            f"| {place} | {100 * path.share:.1f} % | {path.latency_ms:.4g}{note} | {path.p50_ms:.4g} | "
            f"{path.p95_ms:.4g} | {path.samples} |"
        )
    if m.form == "if":
        names = ", ".join(
            f"`threshold_{k}` = {m.candidate.exits[k].threshold:.6g}"
            for k in (path.exit_index for path in latency.paths)
            if k < head and (m.candidate.exits[k].threshold or 0.0) > 0.0
        )
        lines += [
            "",
            "An image leaves at an exit when its largest softmax probability there is at least the threshold. "
            f"Thresholds are optional inputs with these defaults: {names or 'none'}. "
            "Other values change accuracy and latency.",
        ]
    lines += ["", "## Classes", "", ", ".join(text(name) for name in m.class_names), "", "## Provenance", ""]
    lines += ["| | |", "|---|---|", f"| candidate | {text(m.candidate_id)} |", f"| exported | {text(m.created_at)} |"]
    lines += [f"| {text(key)} | {text(value)} |" for key, value in (*m.provenance.items(), *m.tools.items())]
    return "\n".join(lines) + "\n"


def _integer_note(m: Manifest) -> list[str]:
    if m.integer_convolutions is None:
        return []
    runtime = f"{m.latency.device.runtime} {m.latency.device.runtime_version}"
    return ["", f"{m.integer_convolutions} of {m.convolutions} convolutions run in int8 on {runtime}."]


def _verdict(m: Manifest) -> str:
    if not m.is_good:
        return _VERDICTS[m.verdict]
    met = [
        *(["meets its budget"] if m.budget_ms is not None else []),
        *(["keeps its accuracy"] if m.reference_top1 is not None else []),
    ]
    return f"GOOD: {' and '.join(met)}" if met else "MEASURED: no budget and no accuracy limit was given"


def _metadata(m: Manifest) -> list[str]:
    # JSON texts are valid YAML, so names cannot break out of the block
    device = m.latency.device
    machine = f"{device.board}, {device.runtime} {device.runtime_version}, {device.threads} thread(s), {m.precision}"
    results = (
        ("accuracy", "Top-1", round(m.accuracy.top1, 6)),
        ("latency_expected_ms", f"Expected latency, {machine}, batch 1", round(m.latency.figures.expected_ms, 6)),
        ("latency_worst_ms", f"Worst-case latency, {machine}, batch 1", round(m.latency.figures.worst_ms, 6)),
    )
    lines = ["---", "pipeline_tag: image-classification", "library_name: onnx", "model-index:"]
    lines += [f"- name: {json.dumps(m.name)}", "  results:", "  - task:", "      type: image-classification"]
    lines += ["    dataset:", f"      name: {json.dumps(m.provenance.get('data set', 'unnamed'))}"]
    lines += [f"      type: {json.dumps(m.provenance.get('data set', 'unnamed'))}", f"      split: {m.accuracy.split}"]
    lines.append("    metrics:")
    for kind, name, value in results:
        lines += [f"    - type: {kind}", f"      name: {json.dumps(name)}", f"      value: {value}"]
    return [*lines, "---", ""]


def text(value: str) -> str:
    """Foreign text made harmless inside Markdown and HTML, on one line."""
    line = " ".join(value.split())
    for sign in "\\`*_{}[]|#":
        line = line.replace(sign, f"\\{sign}")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
