"""TensorRT through trtexec: found where JetPack puts it, its options chosen by its version, its output parsed.

An engine is built once, in a process of its own under a time limit, and saved in a folder of ours; each timing then
loads it. Conditions are the same on every version: a CUDA graph, spinning instead of sleeping, transfers excluded
(below 11 by options, from 11 on by default).
"""

import os
import shutil
import statistics
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import processes
from . import trtexec_output as output
from .errors import BoardError
from .onnx_facts import OnnxFacts, onnx_facts
from .trt_chain import TensorRtChain

# JetPack installs it outside PATH; the others are where NVIDIA's tar file and containers have it.
PLACES = (
    "/usr/src/tensorrt/bin/trtexec",
    "/opt/tensorrt/bin/trtexec",
    "/usr/local/tensorrt/bin/trtexec",
    "/usr/local/TensorRT/bin/trtexec",
)
BF16_VERSION = (10, 13, 0)  # from here on graphs are strongly typed, and only such a graph says bf16
WORKSPACE_MIB = 512  # a Jetson shares its memory with the system: some of it has to stay free
WARMUP_MS = 200
PROFILE_RUNS = 50
HELP_TIMEOUT_S = 60.0  # the first start on a slow board loads hundreds of megabytes of libraries
BUILD_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 300.0  # where the caller sets no limit
TRANSFER_RUNS = 20
ENQUEUE_BOUND = 0.8  # trtexec itself warns from this share on

Version = Tuple[int, int, int]
Run = Callable[[List[str], float], Tuple[int, str, str]]


def find_trtexec(given: Optional[str] = None) -> Optional[str]:
    """Path of trtexec: the given one, else the one on PATH, else where JetPack or NVIDIA's archive puts it."""
    candidates = [given] if given else [shutil.which("trtexec")] + list(PLACES)
    for path in candidates:
        if path and os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def effective_precision(model: OnnxFacts, precision: str) -> str:
    """The precision to build in: that of the file where none, or only fp32, is asked for.

    A file with QuantizeLinear nodes cannot be built without int8, nor one of half precision without fp16.

    int8 and mixed name a whole layer or network, of which the file may be a float part without such nodes (an int8
    head, a segment of a mixed network). A file of this project says what it is built in itself; where another file has
    no such nodes, `is_weak` refuses it.
    """
    if precision in ("fp32", "none", "auto"):
        return "int8" if model.is_quantized else "fp16" if model.is_half else "fp32"
    if precision in ("int8", "mixed"):
        return model.precision or precision
    return precision


def is_weak(version: Version, model: OnnxFacts, precision: str, typing: str = "auto") -> bool:
    """Whether precision is asked for by flags (weak typing) rather than taken from the ONNX file (strong typing).

    Strong typing is complete from 10.13 on and the only kind on 11; below, flags are what the version wants. A file
    that does not carry its precision cannot be built with strong typing: it would silently become fp32.

    Args:
        version: of TensorRT.
        model: what the file says.
        precision: what is wanted.
        typing: `weak`, `strong`, or `auto`.

    Raises:
        BoardError: `bad_request`: it cannot be had.
    """
    if typing not in ("auto", "weak", "strong"):
        raise BoardError("bad_request", "typing is auto, weak or strong, got %r" % typing)
    if typing == "weak" and version[0] >= 11:
        raise BoardError("unsupported", "TensorRT %d.%d.%d has no weak typing" % version)
    if typing == "strong" and version[0] < 10:
        raise BoardError("unsupported", "TensorRT %d.%d.%d has no strong typing" % version)
    if precision in ("int8", "mixed") and not model.carries(precision):
        raise BoardError("bad_request", "%s is asked for, but the file has no QuantizeLinear nodes" % precision)
    carried = model.carries(precision)
    is_strong = typing == "strong" or (typing == "auto" and (version[0] >= 11 or (version >= (10, 13, 0) and carried)))
    if is_strong and not carried:
        raise BoardError(
            "bad_request",
            "%s is asked for, but the weights of the file are not half precision; with strong typing TensorRT "
            "%d.%d.%d would build it in fp32. Export it in %s" % ((precision,) + version + (precision,)),
        )
    return not is_strong


def build_command(
    program: str, version: Version, model: str, engine: str, weak: bool, precision: str, options: Dict[str, Any]
) -> List[str]:
    """The command that builds an engine without running it, in the options of this version (8.0 to 11.x)."""
    workspace = int(options.get("workspace_mib", WORKSPACE_MIB))
    command = [program, "--onnx=" + model, "--saveEngine=" + engine]
    if version < (8, 4, 0):
        command += ["--explicitBatch", "--workspace=%d" % workspace]
    else:
        command.append("--memPoolSize=workspace:%d" % workspace)
    command.append("--buildOnly" if version < (8, 6, 0) else "--skipInference")
    if version >= (8, 2, 0):
        command.append("--profilingVerbosity=detailed")
    if options.get("timing_cache"):
        command.append("--timingCacheFile=%s" % options["timing_cache"])
    if weak:
        flags: Dict[str, List[str]] = {"fp32": [], "bf16": ["--bf16"], "fp16": ["--fp16"]}
        # int8 alone would run everything that is not quantized in fp32
        command += flags.get(precision, ["--int8", "--fp16"])
    elif version[0] < 11:
        command.append("--stronglyTyped")
    return command


def run_command(program: str, version: Version, engine: str, runs: int, options: Dict[str, Any]) -> List[str]:
    """The command that times an engine, in the options of this version.

    `options`: `times`, `profile`, `layers`: files to export to; `inputs`: name -> file of raw values; `transfers`:
    whether they are part of it.
    """
    command = [program, "--loadEngine=" + engine, "--iterations=%d" % runs, "--duration=0", "--warmUp=%d" % WARMUP_MS]
    transfers = bool(options.get("transfers"))
    if version[0] >= 11:
        command += ["--includeDataTransfers"] if transfers else []
    else:
        command += ["--useCudaGraph", "--useSpinWait"] + ([] if transfers else ["--noDataTransfers"])
    if options.get("times"):
        command.append("--exportTimes=%s" % options["times"])
    if options.get("profile"):
        command.append("--exportProfile=%s" % options["profile"])
        if version[0] < 11:
            command.append("--separateProfileRun")
    if options.get("layers") and version >= (8, 2, 0):
        command.append("--exportLayerInfo=%s" % options["layers"])
    if options.get("inputs"):
        files = ["%s:%s" % (name, path) for name, path in sorted(options["inputs"].items())]
        command.append("--loadInputs=" + ",".join(files))
    return command


class TrtexecRunner(object):
    """Builds and times ONNX files with trtexec."""

    name = "trtexec"
    streams_by = "tensorrt"  # it takes no images one by one: its engines are then run by the Python module

    def __init__(self, program: Optional[str] = None, run: Run = processes.run) -> None:
        """Looks for trtexec; nothing is started.

        Args:
            program: its path; looked for where not given.
            run: starts programs; tests set it.
        """
        self._given = program
        self._program = find_trtexec(program)
        self._run = run
        self._version: Optional[Version] = None

    def available(self) -> Optional[str]:
        """None, or what is missing."""
        if self._program is None:
            where = self._given or "PATH, " + ", ".join(PLACES)
            return "trtexec was not found (%s). On JetPack: apt-get install tensorrt" % where
        try:
            self._known_version()
        except BoardError as e:
            return e.message
        return None

    def describe(self) -> Dict[str, Any]:
        """Runtime, version, precisions and details.

        Raises:
            BoardError: `not_found`, or it does not tell its version.
        """
        version = self._known_version()
        return {
            "runtime": "tensorrt",
            "version": "%d.%d.%d" % version,
            "precisions": ["fp32", "fp16", "bf16", "int8"] if version >= BF16_VERSION else ["fp32", "fp16", "int8"],
            "details": {
                "program": str(self._program),
                "typing": "strong" if version[0] >= 11 else "weak, strong" if version >= (10, 13, 0) else "weak",
            },
        }

    def load(self, model_path: str, options: Dict[str, Any]) -> "TrtexecSession":
        """Builds an engine.

        Args:
            model_path: an ONNX file.
            options: `precision`; `timing_cache`: a file shared by builds; `timeout_s` of the build and `run_s` of each
                run; `work`: a folder of ours; `typing`: auto, weak or strong; `workspace_mib`.

        Raises:
            BoardError: `build_failed`, `out_of_memory`, `hung`, `killed`, `unsupported`, `bad_request`, `not_found`.
        """
        version = self._known_version()
        with open(model_path, "rb") as file:
            model = onnx_facts(file.read())
        precision = effective_precision(model, str(options.get("precision", "fp32")))
        weak = is_weak(version, model, precision, str(options.get("typing", "auto")))
        folder = tempfile.mkdtemp(prefix="engine-", dir=options.get("work"))
        engine = os.path.join(folder, "engine.plan")
        try:
            command = build_command(str(self._program), version, model_path, engine, weak, precision, options)
            what = "building %s" % os.path.basename(model_path)
            limit_s = float(options.get("timeout_s", BUILD_TIMEOUT_S))
            text, seconds, warnings = self._built(command, limit_s, what, options.get("timing_cache"))
            if not os.path.isfile(engine) or os.path.getsize(engine) == 0:
                raise BoardError("build_failed", "%s: trtexec ended well but wrote no engine" % what)
        except BoardError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        warnings += output.skipped_note(text)
        run_s = float(options.get("run_s", RUN_TIMEOUT_S))
        return TrtexecSession(self, version, folder, engine, model, seconds, run_s, warnings)

    def chain(self, sessions: List["TrtexecSession"], thresholds: List[float]) -> Any:
        """Engines one behind the other, run by the Python module; see `TensorRtRunner.chain`.

        Raises:
            BoardError: `not_found`: that module is not there; TensorRT or CUDA refuses.
        """
        from .trt_engine import TensorRtRunner  # that module imports this one

        loaded = [session.loaded() for session in sessions]
        return TensorRtChain(TensorRtRunner().cuda(), loaded, thresholds, list(sessions))

    def command(self, engine: str, runs: int, options: Dict[str, Any]) -> List[str]:
        """The command that times an engine with this program."""
        return run_command(str(self._program), self._known_version(), engine, runs, options)

    def start(self, command: List[str], timeout_s: float, what: str) -> Tuple[str, float]:
        """Runs trtexec; what it printed, and the seconds it took.

        Raises:
            BoardError: it failed, in the kind of its failure.
        """
        began = time.monotonic()
        code, text = self._ran(command, timeout_s, what)
        if code != 0:
            raise output.failure_of(text, code, what)
        return text, time.monotonic() - began

    def _ran(self, command: List[str], timeout_s: float, what: str) -> Tuple[int, str]:
        """Exit status, never 0 where trtexec says that it failed, and what it printed."""
        try:
            code, out, err = self._run(command, timeout_s)
        except BoardError as e:
            raise BoardError(e.kind, "%s: %s" % (what, e.message)) from e
        text = out + "\n" + err  # warnings and errors go to the second channel
        return (code or 1 if "&&&& FAILED" in text else code), text

    def _built(
        self, command: List[str], timeout_s: float, what: str, cache: Optional[str]
    ) -> Tuple[str, float, List[str]]:
        """Runs a build; what it printed, its seconds and warnings.

        A timing cache that a killed build or a power cut left damaged would fail every later build: it is removed, and
        the engine is built once more.
        """
        began = time.monotonic()
        had = bool(cache) and os.path.exists(str(cache))
        code, text = self._ran(command, timeout_s, what)
        failed = None if code == 0 else output.failure_of(text, code, what)
        if failed is None:
            return text, time.monotonic() - began, []
        if not had or failed.kind != "build_failed" or not output.blames_timing_cache(text):
            raise failed
        os.remove(str(cache))
        text, seconds = self.start(command, timeout_s, what)
        return text, seconds, ["the timing cache could not be used and a new one was begun: %s" % failed.message]

    def _known_version(self) -> Version:
        if self._program is None:
            raise BoardError("not_found", str(self.available()))
        if self._version is None:
            code, out, err = self._run([self._program, "--help"], HELP_TIMEOUT_S)
            self._version = output.version_of(out + err)
            if self._version is None:  # such as the loader's line about a library that is not there
                said = [line.strip() for line in (out + "\n" + err).splitlines() if line.strip()]
                ended = "signal %d" % -code if code < 0 else "exit code %d" % code
                raise BoardError(
                    "unsupported",
                    "%s does not tell its version; is it trtexec? It ended with %s: %s"
                    % (self._program, ended, said[-1] if said else "nothing was printed"),
                )
        if self._version < (8, 0, 0):
            raise BoardError("unsupported", "TensorRT %d.%d.%d is too old; 8.0 or newer is needed" % self._version)
        return self._version


class TrtexecSession(object):
    """A built engine; each call loads it in a process of its own."""

    def __init__(
        self,
        runner: TrtexecRunner,
        version: Version,
        folder: str,
        engine: str,
        model: OnnxFacts,
        build_s: float,
        run_s: float,
        warnings: List[str],
    ) -> None:
        self.build_s = build_s
        self._run_s = run_s
        self.engine_bytes = os.path.getsize(engine)
        self.warnings = warnings
        self._runner = runner
        self._version = version
        self._folder = folder
        self._engine = engine
        self._model = model
        self._inputs: Dict[str, str] = {}
        self._exact: Any = None  # the same engine in this process, for outputs and streams

    def inputs(self) -> List[Dict[str, Any]]:
        """Name, dtype and shape of each input, as the ONNX file has them."""
        return [dict(entry) for entry in self._model.inputs]

    def set_inputs(self, feeds: Dict[str, bytes]) -> None:
        """Values of inputs by name, raw in C order; the others are random, as trtexec makes them.

        Raises:
            BoardError: `bad_request`: there is no such input.
        """
        known = [entry["name"] for entry in self._model.inputs]
        for name, data in feeds.items():
            if name not in known:
                raise BoardError("bad_request", "no input %r; inputs: %s" % (name, ", ".join(known)))
            path = os.path.join(self._folder, "input-%d.raw" % known.index(name))
            with open(path, "wb") as file:
                file.write(data)
            self._inputs[name] = path

    def time(self, runs: int, warmup: int = 0) -> Dict[str, Any]:
        """Times of the GPU for `runs` inferences, one by one, after at least 200 ms of warm-up.

        Args:
            runs: inferences.
            warmup: ignored beyond those 200 ms: trtexec counts the warm-up in time.

        Raises:
            BoardError: as `load`; `truncated`, also where its own summary tells another median than its queries.
        """
        del warmup
        queries, text = self._queries(runs, False)
        samples = [query["computeMs"] for query in queries]
        host = [query["endEnqMs"] - query["startEnqMs"] for query in queries]
        output.check_median(text, statistics.median(samples))
        captured = output.captured_graph(text)
        return {
            "samples_ms": samples,
            "host_ms": host,
            "clock": "cuda_event",
            "cuda_graph": self._version[0] >= 11 if captured is None else captured,
            "enqueue_bound": statistics.median(host) >= ENQUEUE_BOUND * statistics.median(samples),
        }

    def transfer_ms(self) -> float:
        """Median time of copying inputs and outputs of an inference, in a run of its own.

        Raises:
            BoardError: as `time`.
        """
        copied, _ = self._queries(TRANSFER_RUNS, True)
        return statistics.median([query["h2dMs"] + query["d2hMs"] for query in copied])

    def outputs(self) -> List[Dict[str, Any]]:
        """Runs once; name, dtype, shape and bytes of each output.

        trtexec writes outputs as rounded text, so the same engine is loaded by the Python module.

        Raises:
            BoardError: `not_found`: that module is not there; TensorRT or CUDA refuses.
        """
        feeds = {}
        exact = self.loaded()
        for name, path in self._inputs.items():
            with open(path, "rb") as file:
                feeds[name] = file.read()
        exact.set_inputs(feeds)
        found: List[Dict[str, Any]] = exact.outputs()
        return found

    def loaded(self) -> Any:
        """The same engine in this process, as a session of the Python module; `close` closes it too.

        Raises:
            BoardError: as `outputs`.
        """
        from .trt_engine import TensorRtRunner, TensorRtSession, import_tensorrt  # that module imports this one

        if self._exact is None:
            try:
                trt, cuda = import_tensorrt(), TensorRtRunner().cuda()
            except BoardError as e:
                raise BoardError(e.kind, "trtexec gives no exact outputs, and %s" % e.message) from e
            with open(self._engine, "rb") as file:
                self._exact = TensorRtSession(trt, cuda, file.read(), 0, [])
        return self._exact

    def profile(self, runs: int = PROFILE_RUNS) -> List[Dict[str, Any]]:
        """Median time of each layer of the engine, with what TensorRT tells of it.

        Raises:
            BoardError: as `load`, or `truncated`.
        """
        options = {"profile": self._file("profile.json"), "layers": self._file("layers.json"), "inputs": self._inputs}
        self._timed(runs, options, "profiling")
        count, layers = output.profile_of_json(_read(options["profile"]))
        told: Dict[str, Dict[str, str]] = {}
        if os.path.exists(str(options["layers"])):
            told = {layer["name"]: layer for layer in output.layers_of(_read(options["layers"]))}
        rows = []
        for layer in layers:
            name = str(layer["name"])
            median = layer.get("medianMs")
            facts = told.get(name, {})
            rows.append(
                {
                    "name": name,
                    "median_ms": float(median if median is not None else layer["timeMs"] / count),
                    "metadata": facts.get("metadata", ""),
                    "type": facts.get("type", ""),
                    "origin": facts.get("origin", ""),
                }
            )
        return rows

    def close(self) -> None:
        """Removes the engine."""
        if self._exact is not None:
            self._exact.close()
            self._exact = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def _queries(self, runs: int, transfers: bool) -> Tuple[List[Dict[str, float]], str]:
        options = {"times": self._file("times.json"), "transfers": transfers, "inputs": self._inputs}
        text = self._timed(runs, options, "timing")
        return output.times_of(_read(options["times"]), self._version, WARMUP_MS), text

    def _timed(self, runs: int, options: Dict[str, Any], what: str) -> str:
        for name in ("times", "profile", "layers"):
            if options.get(name) and os.path.exists(options[name]):
                os.remove(options[name])  # a file of the run before must not pass for one of this run
        text, _ = self._runner.start(self._runner.command(self._engine, runs, options), self._run_s, what)
        return text

    def _file(self, name: str) -> str:
        return os.path.join(self._folder, name)


def _read(path: Any) -> str:
    try:
        with open(str(path), "r", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError as e:
        raise BoardError("truncated", "trtexec wrote no %s: %s" % (os.path.basename(str(path)), e.strerror)) from e
