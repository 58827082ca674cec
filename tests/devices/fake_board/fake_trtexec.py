#!/usr/bin/env python3
"""Stands in for trtexec: takes its options, writes its log and its files in the formats of TensorRT 8.0 to 11.

Which options exist, what goes to which stream and how each number is printed follow NVIDIA's sources of each release
(sampleOptions.cpp, sampleReporting.cpp, trtexec.cpp; read, not copied). All times are simulated: they follow from the
bytes of the weights and a hash of the layer's name, and the log says so.

`trtexec.json` beside the program says which version it plays and which faults it has:
    {"version": [8, 5, 2], "faults": ["build_failure", null, ...], "every": null, "root": null, "milliseconds": 1.0}
`faults` holds one fault for each start that builds or runs an engine, `every` one for all starts after these, `root` is
the tree of a fake board whose state some faults change, and `milliseconds` scales all times.
`trtexec.calls.jsonl` beside it gets the options of each start. Python 3.6, standard library only.
"""

import hashlib
import json
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
NEVER, ALWAYS = (99, 0, 0), (0, 0, 0)
STAMP = "[11/28/2026-12:00:00]"

# Option -> versions from .. to (exclusive) that accept it.
OPTIONS = {
    "--onnx": (ALWAYS, NEVER),
    "--saveEngine": (ALWAYS, NEVER),
    "--loadEngine": (ALWAYS, NEVER),
    "--explicitBatch": (ALWAYS, (10, 0, 0)),
    "--workspace": (ALWAYS, (10, 0, 0)),
    "--memPoolSize": ((8, 4, 0), NEVER),
    "--buildOnly": (ALWAYS, (10, 0, 0)),
    "--skipInference": ((8, 6, 0), NEVER),
    "--fp16": (ALWAYS, (11, 0, 0)),
    "--int8": (ALWAYS, (11, 0, 0)),
    "--best": (ALWAYS, (11, 0, 0)),
    "--fp8": ((8, 6, 0), (11, 0, 0)),
    "--bf16": ((10, 0, 0), (11, 0, 0)),
    "--int4": ((10, 0, 0), (11, 0, 0)),
    "--noTF32": (ALWAYS, NEVER),
    "--stronglyTyped": ((9, 0, 0), NEVER),
    "--precisionConstraints": ((8, 2, 0), (11, 0, 0)),
    "--layerPrecisions": ((8, 4, 0), (11, 0, 0)),
    "--layerOutputTypes": ((8, 4, 0), (11, 0, 0)),
    "--calib": (ALWAYS, (11, 0, 0)),
    "--nvtxMode": (ALWAYS, (10, 0, 0)),
    "--profilingVerbosity": ((8, 2, 0), NEVER),
    "--useCudaGraph": (ALWAYS, NEVER),
    "--noCudaGraph": ((11, 0, 0), NEVER),
    "--useSpinWait": (ALWAYS, NEVER),
    "--noSpinWait": ((11, 0, 0), NEVER),
    "--noDataTransfers": (ALWAYS, NEVER),
    "--includeDataTransfers": ((11, 0, 0), NEVER),
    "--separateProfileRun": (ALWAYS, NEVER),
    "--builderOptimizationLevel": ((8, 6, 0), NEVER),
    "--maxAuxStreams": ((8, 6, 0), NEVER),
    "--timingCacheFile": (ALWAYS, NEVER),
    "--dumpProfile": (ALWAYS, NEVER),
    "--exportProfile": (ALWAYS, NEVER),
    "--exportTimes": (ALWAYS, NEVER),
    "--exportLayerInfo": ((8, 2, 0), NEVER),
    "--dumpLayerInfo": ((8, 2, 0), NEVER),
    "--avgRuns": (ALWAYS, NEVER),
    "--warmUp": (ALWAYS, NEVER),
    "--iterations": (ALWAYS, NEVER),
    "--duration": (ALWAYS, NEVER),
    "--percentile": (ALWAYS, NEVER),
    "--minShapes": (ALWAYS, NEVER),
    "--optShapes": (ALWAYS, NEVER),
    "--maxShapes": (ALWAYS, NEVER),
    "--shapes": (ALWAYS, NEVER),
    "--loadInputs": (ALWAYS, NEVER),
    "--useDLACore": (ALWAYS, NEVER),
    "--allowGPUFallback": (ALWAYS, NEVER),
    "--verbose": (ALWAYS, NEVER),
    "--device": (ALWAYS, NEVER),
    "--streams": (ALWAYS, NEVER),
    "--tacticSources": (ALWAYS, NEVER),
    "--cpuOnly": ((11, 0, 0), NEVER),
}
FUSED = {"Relu", "Clip", "BatchNormalization", "Add"}
HIDDEN = {"QuantizeLinear", "DequantizeLinear", "Constant", "Identity", "Flatten", "Cast"}
MOST_WARM_UP = 200  # queries of the warm-up that are written; a real run has as many as fit into its time


class Failure(Exception):
    """Ends the run: lines for the error stream."""


def main(arguments, folder=HERE):
    """Runs once and gives the exit status, as trtexec would."""
    with open(os.path.join(folder, "trtexec.json"), encoding="utf-8") as f:
        scenario = json.load(f)
    version = tuple(scenario["version"])
    test = "TensorRT.trtexec [TensorRT v%s] # %s" % (_number(version), " ".join(["trtexec"] + arguments))
    _write("&&&& RUNNING %s" % test)
    options = _options(arguments)
    fault = _next_fault(folder, scenario, arguments)
    if "--help" in options or "-h" in options:
        _help(version)
        return 0
    try:
        _run(version, options, fault, scenario)
    except Failure as e:
        for line in str(e).splitlines():
            _log("E", line)
        _write("&&&& FAILED %s" % test)
        return 1
    _write("&&&& PASSED %s" % test)
    return 0


def _number(version):
    scale = 1000 if version[0] < 10 else 10000
    return "%d" % (version[0] * scale + version[1] * 100 + version[2])


def _write(line, stream=None):
    (stream or sys.stdout).write(line + "\n")
    (stream or sys.stdout).flush()


def _log(level, line):
    """Information goes to the output, warnings and errors to the error stream (logging.h)."""
    _write("%s [%s] %s" % (STAMP, level, line), sys.stderr if level in "WE" else sys.stdout)


def _options(arguments):
    result = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        result[name] = value
    return result


def _next_fault(folder, scenario, arguments):
    """The fault of this start; asking for help counts for nothing."""
    path = os.path.join(folder, "trtexec.calls.jsonl")
    calls = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            calls = [json.loads(line) for line in f]
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(arguments) + "\n")
    before = sum(1 for call in calls if "--help" not in call)
    faults = scenario.get("faults") or []
    return faults[before] if before < len(faults) else scenario.get("every")


def _help(version):
    _write("=== Model Options ===")
    for name, (first, last) in sorted(OPTIONS.items()):
        if first <= version < last:
            _write("  %s" % name)


def _run(version, options, fault, scenario):
    unknown = [n for n in options if n not in OPTIONS or not OPTIONS[n][0] <= version < OPTIONS[n][1]]
    if unknown:
        _help(version)
        raise Failure("\n".join("Unknown option: %s %s" % (n, options[n]) for n in unknown))
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    _log("I", "TensorRT version: %d.%d.%d" % version)
    _log("I", "SIMULATED: this is a stand-in for trtexec; no time in this log comes from a GPU")
    if fault == "out_of_memory":
        raise Failure(
            "Error[2]: [virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory "
            "(no further information)"
            "\nEngine set up failed"
        )
    engine = _built(version, options, fault) if "--onnx" in options else _loaded(version, options)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if options.get("--saveEngine"):
        _save(options["--saveEngine"], json.dumps(engine))
    if "--exportLayerInfo" in options or "--dumpLayerInfo" in options:
        text = _layer_information(version, engine, fault)
        if "--dumpLayerInfo" in options:
            _log("I", "Layer Information:")
            _write(text)
        if options.get("--exportLayerInfo"):
            _save(options["--exportLayerInfo"], _cut(text, fault))
    if "--buildOnly" in options or "--skipInference" in options:
        _log("I", "Skipped inference phase since --skipInference is added.")
        return
    _disturb(scenario, fault)
    _infer(version, options, fault, engine, scenario)


def _save(path, text):
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise Failure("Cannot open %s: %s" % (path, e.strerror))


def _cut(text, fault):
    return text[: len(text) // 2] if fault == "truncated" else text


# -- building ------------------------------------------------------------------------------------------------------


def _built(version, options, fault):
    try:
        with open(options["--onnx"], "rb") as f:
            model = f.read()
        nodes, weights, sizes = _onnx(model)
    except (OSError, ValueError, IndexError) as e:
        raise Failure(
            "[TRT] ModelImporter.cpp:688: Failed to parse ONNX model from file: %s (%s)\nFailed to parse onnx file"
            "\nEngine set up failed" % (options["--onnx"], e)
        )
    _log("I", "Start parsing network model.")
    for i, node in enumerate(nodes):
        if node["op"] == "HardSwish" and version < (8, 4, 0):
            raise Failure(
                '[TRT] ModelImporter.cpp:773: While parsing node number %d [%s -> "%s"]:\n'
                "[TRT] ModelImporter.cpp:778: ERROR: ModelImporter.cpp:180 In function parseGraph:\n"
                "[6] No importer registered for op: %s. Attempting to import as plugin.\n"
                "Failed to parse onnx file\nEngine set up failed" % (i, node["op"], node["outputs"][0], node["op"])
            )
    _log("I", "Finish parsing network model")
    if fault == "skipped_tactics":
        for tactic in range(3):
            _log(
                "W",
                "[TRT] UNSUPPORTED_STATE: Skipping tactic %d due to insufficient memory on requested size of %d "
                "detected for tactic 0x%016x." % (tactic, 1290442752, tactic + 60),
            )
    precision = "int8" if "--int8" in options or "--best" in options else "fp16" if "--fp16" in options else "fp32"
    layers = _fuse(nodes, weights, precision, fault)
    if fault == "build_failure":
        raise Failure(
            "Error[10]: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any "
            "implementation for node %s.)\nError[2]: [builder.cpp::buildSerializedNetwork::751] Error Code 2: Internal "
            "Error (Assertion engine != nullptr failed. )\nEngine could not be created from network\n"
            "Building engine failed\nFailed to create engine from model or file.\nEngine set up failed"
            % layers[1]["name"]
        )
    if options.get("--timingCacheFile"):
        path = options["--timingCacheFile"]
        had = os.path.getsize(path) if os.path.exists(path) else 0
        _log("I", "Loaded %d bytes of timing cache from %s" % (had, path))
        _save(path, json.dumps({"simulated_cache": sorted({layer["name"] for layer in layers})}))
    _log("I", "Engine built in 1.25 sec.")
    return {
        "simulated_engine": True,
        "version": list(version),
        "detailed": options.get("--profilingVerbosity") == "detailed",
        "layers": layers,
        "tensors": sizes,
    }


def _fuse(nodes, weights, precision, fault):
    """Layers of the engine: a convolution takes what follows it; Q/DQ and casts vanish; reformats at both ends."""
    shown = [n for n in nodes if n["op"] not in HIDDEN]
    groups = []
    for node in shown:
        last = groups[-1] if groups else None
        follows = last is not None and set(last[-1]["outputs"]) & set(node["inputs"])
        if follows and node["op"] in FUSED and last[0]["op"] in ("Conv", "Gemm", "MatMul"):
            last.append(node)
        elif follows and node["op"] == "Mul" and last[-1]["op"] == "HardSigmoid":
            last.append(node)
        else:
            groups.append([node])
    layers = []
    for group in groups:
        names = [n["name"] or n["outputs"][0] for n in group]
        name = "PWN(%s)" % ", ".join(names) if group[0]["op"] == "HardSigmoid" else " + ".join(names)
        if fault == "control_characters":
            name += ' "quoted"\x1f'
        size = sum(weights.get(i, 0) for n in group for i in n["inputs"])
        kind = {"Conv": "CaskConvolution", "Gemm": "CaskConvolution", "GlobalAveragePool": "CaskPooling"}
        layers.append(
            {
                "name": name,
                "type": kind.get(group[0]["op"], "PointWiseV2"),
                "nodes": names,
                "ms": (0.004 + size / 4e8) * (0.9 + 0.2 * _hash(name)) * {"int8": 0.7, "fp16": 0.8}.get(precision, 1.0),
            }
        )
    first = layers[0]["name"] if layers else "output"
    last = layers[-1]["name"] if layers else "input"
    reformats = (
        ("Reformatting CopyNode for Input Tensor 0 to %s" % first),
        ("Reformatting CopyNode for Output Tensor 0 to %s" % last),
    )
    before, after = ({"name": n, "type": "Reformat", "nodes": [], "ms": 0.003} for n in reformats)
    return [before] + layers + [after]


def _hash(text):
    """A number from 0 to 1 that is always the same for a text."""
    return int(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8], 16) / float(0xFFFFFFFF)


def _loaded(version, options):
    try:
        with open(options.get("--loadEngine", ""), encoding="utf-8") as f:
            engine = json.load(f)
    except (OSError, ValueError):
        raise Failure(
            "Error[1]: [runtime.cpp::parsePlan::314] Error Code 1: Serialization (Serialization assertion "
            "plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.)\nFailed to create engine from model or file."
            "\nEngine set up failed"
        )
    if tuple(engine["version"]) != version:
        raise Failure(
            "Error[6]: The engine plan file is not compatible with this version of TensorRT, expecting library version "
            "%d.%d.%d got %s, please rebuild.\nEngine set up failed"
            % (version + (".".join(map(str, engine["version"])),))
        )
    _log("I", "Engine loaded in 0.01 sec.")
    return engine


def _layer_information(version, engine, fault):
    """Inspector JSON; raw control characters stand in its strings from 8.6 on, as TensorRT writes them."""
    if not engine["detailed"]:
        layers = [layer["name"] for layer in engine["layers"]]
    else:
        layers = [_layer(version, layer) for layer in engine["layers"]]
    names = sorted(engine["tensors"])
    if version >= (11, 0, 0):
        tail = {"I/O Tensors": [{"Name": n, "IOMode": engine["tensors"][n], "DataType": "FP32"} for n in names]}
    else:
        tail = {"Bindings": names}
    text = json.dumps(dict([("Layers", layers)] + list(tail.items())), indent=2, ensure_ascii=False)
    for code in (0x1E, 0x1F):  # json.dumps escapes them, TensorRT does not
        text = text.replace("\\u%04x" % code, chr(code))
    return text.replace('\\"', '"') if fault == "unescaped" else text


def _layer(version, layer):
    form = "Row major linear FP32"
    tensor = {"Name": layer["name"] + "_output", "Location": "Device", "Dimensions": [1, 8, 4, 4]}
    if version >= (11, 0, 0):
        tensor.update({"Format": form, "DataType": "FP32"})
    else:
        tensor["Format/Datatype"] = form
    record = {"Name": layer["name"], "LayerType": layer["type"], "Inputs": [tensor], "Outputs": [tensor]}
    if layer["type"] == "Reformat":
        record.update({"ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x0"})
    else:
        record.update({"ParameterType": "Convolution", "TacticName": "simulated_kernel", "TacticValue": "0x1"})
    if version >= (8, 6, 0):
        record["Metadata"] = "\x1e".join("[ONNX Layer: %s]" % name for name in layer["nodes"])
    return record


# -- inference -----------------------------------------------------------------------------------------------------


def _disturb(scenario, fault):
    """Changes the fake board as the fault says; the board's files are written by `tree.py`."""
    root = scenario.get("root")
    if fault == "reboot":
        with open(os.path.join(root, "proc/sys/kernel/random/boot_id"), "w") as f:
            f.write("00000000-0000-4000-8000-%012d\n" % os.getpid())
    if fault == "throttle":
        changes = os.path.join(root, "throttle.json")  # file -> text, written by the tree
        with open(changes, encoding="utf-8") as f:
            for path, text in json.load(f).items():
                with open(os.path.join(root, path), "w") as out:
                    out.write(text)


def _infer(version, options, fault, engine, scenario):
    total_ms = sum(layer["ms"] for layer in engine["layers"]) * float(scenario.get("milliseconds") or 1.0)
    if fault == "throttle":
        total_ms *= 1.6
    warm_ms, duration_s = float(options.get("--warmUp") or 200), float(options.get("--duration") or 3)
    runs = max(int(options.get("--iterations") or 10), min(2000, int(duration_s * 1000 / total_ms)))
    profiled = "--dumpProfile" in options or bool(options.get("--exportProfile"))
    separate = "--separateProfileRun" in options or version >= (11, 0, 0)
    graph = "--noCudaGraph" not in options if version >= (11, 0, 0) else "--useCudaGraph" in options
    if version >= (11, 0, 0):
        for old in ("--useCudaGraph", "--useSpinWait", "--noDataTransfers", "--separateProfileRun", "--stronglyTyped"):
            if old in options:
                _log("W", "%s is the default or has no effect in this version" % old)
    if graph and fault == "no_graph":
        # The first text is that of NVIDIA's common headers, the second that of later releases.
        short = version >= (10, 0, 0)
        _log("W", "CUDA graph capture failed" if short else "The CUDA graph capture on the stream has failed.")
        _log("W", "The built TensorRT engine contains operations that are not permitted under CUDA graph capture mode.")
        graph = False
    elif graph:
        _log("I", "Successfully captured CUDA graph for the current execution context")
    transfers = "--includeDataTransfers" in options if version >= (11, 0, 0) else "--noDataTransfers" not in options
    queries = _queries(version, total_ms, runs, warm_ms, graph, transfers, fault)
    _log("I", "Starting inference")
    if profiled and not separate:
        _log("I", "The e2e network timing is not reported since it is inaccurate due to the extra synchronizations")
    else:
        _report(version, options, [q for q in queries if q["startComputeMs"] >= warm_ms])
    if options.get("--exportTimes"):
        kept = queries if version < (8, 5, 0) else [q for q in queries if q["startComputeMs"] >= warm_ms]
        _save(options["--exportTimes"], _cut(_times(kept), fault))
    if profiled:
        _profile(version, options, engine, runs, fault, float(scenario.get("milliseconds") or 1.0))


def _queries(version, total_ms, runs, warm_ms, graph, transfers, fault):
    """One record per query, back to back; the warm-up first."""
    result = []
    warm = min(MOST_WARM_UP, max(1, int(warm_ms / total_ms)))
    clock = warm_ms - warm * total_ms * 1.2
    copy_ms = 0.02 if transfers else 0.0
    for i in range(warm + runs):
        if i == warm:
            clock = max(clock, warm_ms)
        spread = 0.5 if fault == "unstable" and i % 5 == 0 else 0.01
        ms = total_ms * (1.0 + spread * _hash("%d" % i))
        enqueue_ms = 0.003 if graph else 0.2 * ms
        start = clock + copy_ms
        record = {
            "startEnqMs": clock,
            "endEnqMs": clock + enqueue_ms,
            "startH2dMs": clock,
            "endH2dMs": start,
            "startComputeMs": start,
            "endComputeMs": start + ms,
            "startD2hMs": start + ms,
            "endD2hMs": start + ms + copy_ms / 2,
            "h2dMs": copy_ms,
            "computeMs": ms,
            "d2hMs": copy_ms / 2,
            "latencyMs": copy_ms * 1.5 + ms,
        }
        if version < (8, 4, 0):
            record["endToEndMs"] = record["latencyMs"] + ms
        result.append(record)
        clock += ms + copy_ms * 1.5 + 0.001
    return result


def _times(queries):
    """As exportJSONTrace writes them: a list, one object per query, numbers with six digits."""
    lines = []
    for query in queries:
        lines.append("{ " + ", ".join('"%s" : %s' % (name, _digits(value)) for name, value in query.items()) + " }")
    return "[\n  " + "\n, ".join(lines) + "\n]\n"


def _digits(value):
    return "%.6g" % value


def _statistics(values, percentiles):
    ordered = sorted(values)
    n = len(ordered)
    middle = n // 2
    median = ordered[middle] if n % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    parts = [("min", ordered[0]), ("max", ordered[-1]), ("mean", sum(ordered) / n), ("median", median)]
    for p in percentiles:
        parts.append(("percentile(%s%%)" % p, ordered[max(n - 1 - int((1 - float(p) / 100) * n), 0)]))
    return ", ".join("%s = %s ms" % (name, _digits(value)) for name, value in parts)


def _report(version, options, queries):
    default = "99" if version < (8, 5, 0) else "90,95,99"
    percentiles = (options.get("--percentile") or default).split(",")
    wall_ms = queries[-1]["endD2hMs"] - queries[0]["startH2dMs"]
    _log("I", "Warmup completed 40 queries over %s ms" % (options.get("--warmUp") or 200))
    _log("I", "Timing trace has %d queries over %s s" % (len(queries), _digits(wall_ms / 1000)))
    _log("I", "")
    _log("I", "=== Trace details ===")
    _log("I", "Trace averages of %s runs:" % (options.get("--avgRuns") or 10))
    latency = queries[0]["latencyMs"]
    _log(
        "I",
        "Average on 10 runs - GPU latency: %s ms - Host latency: %s ms (enqueue 0.003 ms)"
        % (_digits(queries[0]["computeMs"]), _digits(latency)),
    )
    _log("I", "")
    _log("I", "=== Performance summary ===")
    _log("I", "Throughput: %s qps" % _digits(1000 * len(queries) / wall_ms))
    metrics = [("Latency", "latencyMs")]
    if version < (8, 4, 0):
        metrics.append(("End-to-End Host Latency", "endToEndMs"))
    metrics += [("Enqueue Time", None), ("H2D Latency", "h2dMs"), ("GPU Compute Time", "computeMs")]
    for name, key in [*metrics, ("D2H Latency", "d2hMs")]:
        values = [q[key] if key else q["endEnqMs"] - q["startEnqMs"] for q in queries]
        _log("I", "%s: %s" % (name, _statistics(values, percentiles)))
    compute = [q["computeMs"] for q in queries]
    _log("I", "Total Host Walltime: %s s" % _digits(wall_ms / 1000))
    _log("I", "Total GPU Compute Time: %s s" % _digits(sum(compute) / 1000))
    enqueue = sorted(q["endEnqMs"] - q["startEnqMs"] for q in queries)[len(queries) // 2]
    if enqueue > 0.8 * sorted(compute)[len(compute) // 2]:
        _log(
            "W", "* Throughput may be bound by Enqueue Time rather than GPU Compute and the GPU may be under-utilized."
        )
    mean = sum(compute) / len(compute)
    spread = (sum((v - mean) ** 2 for v in compute) / len(compute)) ** 0.5 / mean
    if version >= (8, 4, 0) and spread > 0.025:
        _log("W", "* GPU compute time is unstable, with coefficient of variance = %s%%." % _digits(100 * spread))
        _log(
            "W",
            "  If not already in use, locking GPU clock frequency or adding --useSpinWait may improve the stability.",
        )
    _log("I", "Explanations of the performance metrics are printed in the verbose logs.")


def _profile(version, options, engine, count, fault, scale):
    rows = [(layer["name"], layer["ms"] * scale) for layer in engine["layers"]]
    total = sum(ms for _, ms in rows) * count
    if "--dumpProfile" in options:
        _log("I", "")
        _log("I", "=== Profile (%d iterations ) ===" % count)
        for line in _profile_table(version, rows, count, total):
            _log("I", line)
    if options.get("--exportProfile"):
        lines = ["[", '  { "count" : %d }' % count]
        for name, ms in rows:
            share = "nan" if fault == "nan" else _digits(100 * ms * count / total)
            median = "" if version < (8, 4, 0) else ', "medianMs" : %s' % _digits(ms)
            lines.append(
                ', { "name" : "%s", "timeMs" : %s, "averageMs" : %s%s, "percentage" : %s }'
                % (name, _digits(ms * count), _digits(ms), median, share)
            )
        _save(options["--exportProfile"], _cut("\n".join([*lines, "]", ""]), fault))


def _profile_table(version, rows, count, total):
    """8.2 puts the name first and has no median; later ones put it last."""
    if version < (8, 4, 0):
        width = max(len(name) for name, _ in rows) + 1
        yield "%*s   Time (ms)   Avg. Time (ms)   Time %%" % (width, "Layer")
        for name, ms in [*rows, ("Total", total / count)]:
            yield "%*s%12.2f%17.4f%9.1f" % (width, name, ms * count, ms, 100 * ms * count / total)
        return
    yield "   Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer"
    for name, ms in [*rows, ("Total", total / count)]:
        yield "%11.2f%13.4f%13.4f%10.1f   %s" % (ms * count, ms, ms, 100 * ms * count / total, name)


# -- ONNX, as little as a stand-in needs: names, operators, edges and bytes of weights -----------------------------


def _onnx(data):
    graph = b"".join(value for number, value in _fields(data) if number == 7)
    if not graph:
        raise ValueError("no graph")
    nodes, weights, tensors = [], {}, {}
    for number, value in _fields(graph):
        if number == 1:
            fields = list(_fields(value))
            nodes.append(
                {
                    "inputs": [_text(v) for n, v in fields if n == 1],
                    "outputs": [_text(v) for n, v in fields if n == 2],
                    "name": next((_text(v) for n, v in fields if n == 3), ""),
                    "op": next((_text(v) for n, v in fields if n == 4), ""),
                }
            )
        elif number == 5:
            fields = list(_fields(value))
            name = next((_text(v) for n, v in fields if n == 8), "")
            weights[name] = sum(len(v) for n, v in fields if n in (4, 9) and isinstance(v, bytes))
        elif number in (11, 12):
            name = next((_text(v) for n, v in _fields(value) if n == 1), "")
            tensors[name] = "Input" if number == 11 else "Output"
    return nodes, weights, {n: mode for n, mode in tensors.items() if n not in weights}


def _text(value):
    return value.decode("utf-8", "replace")


def _fields(data):
    """Number and value of each field of a protobuf message: bytes where it has a length, else None."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("cut off")
            yield key >> 3, data[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(data, at)
            yield key >> 3, None
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            yield key >> 3, None
        else:
            raise ValueError("not a protobuf message")


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
