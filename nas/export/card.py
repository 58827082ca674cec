"""README.md of a package: a model card whose latency always names device, mode, versions, batch and precision."""

from __future__ import annotations

import json

from nas.export.manifest import Manifest

_VERDICTS = {
    "over_budget": "OVER BUDGET: do not deploy where the deadline matters",
    "accuracy_loss": "ACCURACY LOSS: loses more than was allowed",
    "unmeasured": "UNMEASURED: deploy it on its device before you use it",
}


def model_card(manifest: Manifest) -> str:
    """Markdown with the metadata block that Hugging Face reads.

    Args:
        manifest: of the package; its file hashes are not used.
    """
    m = manifest
    head = len(m.candidate.exits)
    lines = [
        *_metadata(m),
        f"# {text(m.name)}",
        "",
        f"**{_verdict(m)}**",
        *(f"- {text(reason)}" for reason in m.reasons),
        "",
        f"Image classifier, {len(m.class_names)} classes, {m.candidate.resolution} px, {m.precision}, "
        f"{m.macs:,} multiply-adds, {m.params:,} parameters, file {m.model_bytes:,} bytes. "
        f"Accuracy and latency below are those of {_model_names(m)} itself.",
        *_integer_note(m),
        "",
        "## Use",
        "",
        *_commands(m),
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
        *_latency(m, head),
    ]
    if m.segments:
        names = ", ".join(f"`{s.file}` (to exit {s.exit_index} at {s.threshold:.6g})" for s in m.segments[:-1])
        lines += [
            "",
            "The model files run one after the other, each on the feature map of the one before it. An image leaves "
            f"behind one when its output `confidence` is at least the threshold: {names or 'no exits'}. The host "
            "decides between two files; that decision is not in the latency above.",
        ]
    if m.form == "if":
        names = ", ".join(
            f"`{entry.name}` = {m.candidate.exits[int(entry.name.rpartition('_')[2])].threshold:.6g}"
            for entry in m.inputs[1:]
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


def _model_names(m: Manifest) -> str:
    return "`model.onnx`" if not m.segments else f"the {len(m.segments)} model files, `segment_0.onnx` and so on,"


def _commands(m: Manifest) -> list[str]:
    if m.dialect == "ort":
        return [
            "```sh",
            "python -m pip install numpy onnxruntime   # and pillow, for JPEG, PNG, TIFF, ...",
            "python parity.py                          # does this machine compute the same? PASS or FAIL",
            "python bench.py                           # and how fast?",
            "python infer.py photo.jpg                 # or several files, or a folder",
            "```",
        ]
    return [
        f"Graphs of dialect {m.dialect} (opset {m.opset}). On the board, with JetPack's Python, TensorRT and numpy:",
        "",
        "```sh",
        "python3 build_engine.py        # minutes; engines lie outside this folder and are never shared",
        "python3 parity.py              # does this board compute the same? PASS or FAIL",
        "python3 bench.py               # and how fast?",
        "python3 infer.py photo.ppm     # or several files, or a folder; JPEG and PNG need python3-pil",
        "```",
        "",
        "With `--runtime onnxruntime` the same scripts run on a processor.",
    ]


def _latency(m: Manifest, head: int) -> list[str]:
    """Latency with everything that it depends on, path by path."""
    if m.latency is None:
        return ["Not measured: the device that it is for was not there. `nas deploy` measures it."]
    latency, device = m.latency, m.latency.device
    where = (
        f"{device.board}, {device.runtime} {device.runtime_version}, {device.threads} thread(s), "
        f"power mode {device.power_mode}, clocks {'locked' if device.clocks_locked else 'not locked'}"
    )
    budget = f" (budget: {m.budget_of} {m.budget_ms:.4g} ms)" if m.budget_ms is not None else ""
    lines = [
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
    if m.stream is not None:
        lines += [
            "",
            f"A stream of {m.stream.images:,} test images, one by one: mean {m.stream.mean_ms:.4g} ms "
            f"({100 * m.stream.off(latency.figures.expected_ms):+.1f} % against the expected latency), 99 % of images "
            f"{m.stream.p99_ms:.4g} ms.",
        ]
    return lines


def _integer_note(m: Manifest) -> list[str]:
    if m.integer_convolutions is None or m.latency is None:
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
    results = [("accuracy", "Top-1", round(m.accuracy.top1, 6))]
    if m.latency is not None:
        device, figures = m.latency.device, m.latency.figures
        machine = f"{device.board}, {device.runtime} {device.runtime_version}, {device.threads} thread(s)"
        for kind, name, value in (
            ("latency_expected_ms", "Expected latency", figures.expected_ms),
            ("latency_worst_ms", "Worst-case latency", figures.worst_ms),
        ):
            results.append((kind, f"{name}, {machine}, {m.precision}, batch 1", round(value, 6)))
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
